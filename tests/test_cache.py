"""KVCache: decoding step by step against whole passes."""

import copy

import pytest
import torch
from budget import DTYPES, assert_within_budget

import fasttx
from fasttx.nn import KVCache

B, T, S, E, H = 3, 34, 9, 32, 4
CHUNKS = (1, 3, 17)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def later(queries, keys=None):
    """True where a query may not look: the causal mask, for the last of so many keys."""
    keys = queries if keys is None else keys
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)


def make_attention(**options):
    return torch.nn.MultiheadAttention(E, H, **{"batch_first": True, **options}).eval()


def make_decoder(layers=2, **options):
    layer = torch.nn.TransformerDecoderLayer(E, H, 48, **{"batch_first": True, **options})
    decoder = torch.nn.TransformerDecoder(layer, layers, torch.nn.LayerNorm(E)).eval()
    for parameter in decoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def inputs(batch_first=True):
    tensors = torch.randn(B, T, E), torch.randn(B, S, E)
    return tensors if batch_first else tuple(t.transpose(0, 1).contiguous() for t in tensors)


def attend(attention, x, cache, **options):
    return attention(x, x, x, need_weights=False, cache=cache, **options)[0]


def in_steps(run, x, chunk, dim=1):
    """run(part, the tokens before it) on each `chunk` tokens of x, joined again."""
    parts, done = [], 0
    for part in x.split(chunk, dim):
        parts.append(run(part, done))
        done += part.shape[dim]
    return torch.cat(parts, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_in_steps_is_the_whole_pass(dtype, chunk, batch_first):
    theirs = make_attention(batch_first=batch_first).to(dtype)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = inputs(batch_first)[0].to(dtype)
    cache = KVCache()
    actual = in_steps(lambda part, _: attend(ours, part, cache), x, chunk, 1 if batch_first else 0)

    def whole(precision):
        y, module = x.to(precision), copy.deepcopy(theirs).to(precision)
        return module(y, y, y, need_weights=False, attn_mask=later(T))[0]

    eager = whole(torch.float32 if dtype == torch.float64 else dtype)
    assert actual.dtype == dtype and cache.length() == cache.length(ours) == T
    assert_within_budget(actual=actual, eager=eager, truth=whole(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_in_steps_is_the_whole_pass(dtype, chunk, norm_first):
    theirs = make_decoder(norm_first=norm_first).to(dtype)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x, memory = (t.to(dtype) for t in inputs())
    cache = KVCache(max_length=T)
    actual = in_steps(lambda part, _: ours(part, memory, cache=cache), x, chunk)

    def whole(precision):
        module = copy.deepcopy(theirs).to(precision)
        return module(x.to(precision), memory.to(precision), tgt_mask=later(T))

    eager = whole(torch.float32 if dtype == torch.float64 else dtype)
    assert_within_budget(actual=actual, eager=eager, truth=whole(torch.float64))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_masks_are_over_all_tokens_seen(batch_first, padding):
    """Left-padded sequences, a padded memory, and biases of both kinds of shape, against torch's whole pass."""
    theirs = make_decoder(batch_first=batch_first).double()
    ours = fasttx.optimize(copy.deepcopy(theirs), padding=padding)
    x, memory = (t.double() for t in inputs(batch_first))
    of_x = torch.arange(T) < torch.tensor([[0], [5], [2]])
    of_memory = torch.arange(S) >= torch.tensor([[S], [4], [1]])
    shared, per_head = torch.randn(T, T).double(), torch.randn(B * H, T, T).double()
    valid = ~of_x if batch_first else ~of_x.T
    for bias in (None, shared, per_head):
        whole = torch.zeros(T, T).double() if bias is None else bias
        expected = theirs(
            x, memory, tgt_mask=whole.masked_fill(later(T), -torch.inf),
            tgt_key_padding_mask=torch.zeros(B, T).double().masked_fill(of_x, -torch.inf),
            memory_key_padding_mask=of_memory,
        )  # fmt: skip
        cache = KVCache()

        def run(part, done):
            end = done + part.shape[1 if batch_first else 0]
            return ours(
                part, memory, tgt_mask=None if bias is None else bias[..., done:end, :end],  # noqa: B023
                tgt_key_padding_mask=of_x[:, :end], memory_key_padding_mask=of_memory, cache=cache,  # noqa: B023
            )  # fmt: skip

        actual = in_steps(run, x, 4, 1 if batch_first else 0)
        torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("average", [False, True])
def test_weights(average):
    theirs = make_attention().double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = inputs()[0].double()
    bias = torch.randn(T, T).double()
    options = {"average_attn_weights": average}
    for mask in (None, bias, bias < -0.5):
        if mask is None or mask.dtype == torch.bool:
            whole = later(T) if mask is None else (mask | later(T)) & ~torch.eye(T, dtype=torch.bool)
            given = None if mask is None else mask & ~torch.eye(T, dtype=torch.bool)
        else:
            whole, given = mask.masked_fill(later(T), -torch.inf), mask
        expected, of_expected = theirs(x, x, x, attn_mask=whole, **options)
        cache, done = KVCache(), 0
        for part in x.split(5, 1):
            end = done + part.shape[1]
            mask = None if given is None else given[done:end, :end]
            output, weights = ours(part, part, part, attn_mask=mask, cache=cache, **options)
            torch.testing.assert_close(output, expected[:, done:end])
            torch.testing.assert_close(weights, of_expected[..., done:end, :end])
            done = end


def test_dropout_in_training_is_drawn_from_torchs_seed():
    ours = fasttx.optimize(make_attention(dropout=0.5)).train()
    x = inputs()[0]

    def run(seed, **options):
        torch.manual_seed(seed)
        return ours(x, x, x, cache=KVCache(), **options)

    for options in ({"need_weights": False}, {}):
        assert torch.equal(run(1, **options)[0], run(1, **options)[0])
        assert not torch.equal(run(1, **options)[0], run(2, **options)[0])
    assert (run(1, average_attn_weights=False)[1].tril() == 0).float().mean() > 0.6


def test_unbatched():
    theirs = make_attention().double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x, padding = torch.randn(T, E).double(), torch.arange(T) == 3
    expected, of_expected = theirs(x, x, x, attn_mask=later(T), key_padding_mask=padding)
    cache, done = KVCache(), 0
    for part in x.split(5):
        end = done + len(part)
        output, weights = ours(part, part, part, key_padding_mask=padding[:end], cache=cache)
        torch.testing.assert_close(output, expected[done:end])
        torch.testing.assert_close(weights, of_expected[done:end, :end])
        done = end


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_sequence_alone_and_among_others_is_the_same_bits(dtype, isa, threads):
    model = fasttx.optimize(make_decoder().to(dtype))
    x, memory = torch.randn(5, T, E).to(dtype), torch.randn(5, S, E).to(dtype)

    def run(rows, cache):
        return in_steps(lambda part, _: model(part, memory[rows], cache=cache), x[rows], 3)

    with fasttx.backend("cpu"):
        together = run(slice(0, 5), KVCache())
        for row in (0, 3):
            with threads(1 + row):
                assert torch.equal(run(slice(row, row + 1), KVCache(T))[0], together[row])


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}], ids=str)
def test_memory_is_projected_once(options):
    theirs = make_attention(**options).double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = inputs()[0].double()
    key = torch.randn(B, S, options.get("kdim", E)).double()
    value = torch.randn(B, S, options["vdim"]).double() if "vdim" in options else key
    padding = torch.arange(S) >= torch.tensor([[S], [4], [1]])
    expected, of_expected = theirs(x, key, value, key_padding_mask=padding)
    cache, done = KVCache(), 0
    for part in x.split(7, 1):
        end = done + part.shape[1]
        output, weights = ours(part, key, value, key_padding_mask=padding, cache=cache)
        torch.testing.assert_close(output, expected[:, done:end])
        torch.testing.assert_close(weights, of_expected[:, done:end])
        # Whatever is given for them from now on is not read.
        key, value, done = torch.full_like(key, torch.nan), torch.empty(0), end
    assert cache.length() == 0 and cache.nbytes == 2 * B * S * E * 8


@pytest.mark.parametrize("window", [1, 4, 11, 50])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_window(window, chunk):
    theirs = make_attention().double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = inputs()[0].double()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    bias = torch.randn(T, T).double()
    mask = bias.masked_fill(later(T) | (distance >= window), -torch.inf)
    expected, of_expected = theirs(x, x, x, attn_mask=mask)
    cache, done = KVCache(window=window), 0
    for part in x.split(chunk, 1):
        end = done + part.shape[1]
        last = copy.deepcopy(cache)
        output = attend(ours, part, cache, attn_mask=bias[done:end, :end])
        torch.testing.assert_close(output, expected[:, done:end])
        again, weights = ours(part, part, part, attn_mask=bias[done:end, :end], cache=last)
        torch.testing.assert_close(again, output)
        keys = weights.shape[-1]
        assert keys == min(end, window - 1 + part.shape[1])
        torch.testing.assert_close(weights, of_expected[:, done:end, end - keys : end])
        assert cache.length() == end
        done = end
    model = fasttx.optimize(make_attention())
    cache = KVCache(window=window)
    for part in torch.randn(1, 300, E).split(chunk, 1):
        attend(model, part, cache, key_padding_mask=torch.zeros(1, cache.length() + part.shape[1], dtype=torch.bool))
        assert cache.nbytes <= 2 * max(2 * window, window - 1 + chunk) * E * 4


@pytest.mark.parametrize("options", [{}, {"max_length": 2 * T}, {"window": 6}], ids=str)
def test_reorder_goes_on_from_the_chosen_sequences(options):
    model = fasttx.optimize(make_decoder())
    x, memory = inputs()
    first, then = x.split(T // 2, 1)
    for index in (torch.tensor([2, 0, 0]), torch.tensor([1, 1, 0, 0, 2, 2]), torch.tensor([1])):
        more = torch.randn(len(index), T // 2, E)
        cache, fresh = KVCache(**options), KVCache(**options)
        model(first, memory, cache=cache)
        model(then[:, :3], memory, cache=cache)
        model(first[index], memory[index], cache=fresh)
        model(then[index, :3], memory[index], cache=fresh)
        cache.reorder(index)
        for step in more.split(1, 1):
            actual = model(step, memory[index], cache=cache)
            assert torch.equal(actual, model(step, memory[index], cache=fresh))
        assert cache.length() == T // 2 + 3 + T // 2


def test_crop_and_reset():
    model = fasttx.optimize(make_decoder())
    x, memory = inputs()
    cache = KVCache()
    expected = model(x, memory, cache=cache)
    cache.crop(T + 5)
    cache.crop(10)
    assert cache.length() == 10
    torch.testing.assert_close(model(x[:, 10:], memory, cache=cache), expected[:, 10:])
    cache.reset()
    assert cache.length() == cache.nbytes == 0
    torch.testing.assert_close(model(x[:1], memory[:1], cache=cache), expected[:1])


def test_crop_within_a_window():
    model = fasttx.optimize(make_attention())
    x = inputs()[0]
    cache, whole = KVCache(window=4), KVCache(window=4)
    expected = attend(model, x, whole)
    for part in x.split(1, 1):
        attend(model, part, cache)
    cache.crop(T - 1)
    torch.testing.assert_close(attend(model, x[:, T - 1 :], cache), expected[:, T - 1 :])
    length = cache.length()
    with pytest.raises(ValueError, match=r"length 3 is too far back: of 34 tokens the window of 4 has kept the last"):
        cache.crop(3)
    assert cache.length() == length
    cache.crop(0)
    torch.testing.assert_close(attend(model, x, cache), expected)


def test_appends_in_place():
    model = fasttx.optimize(make_attention())
    x, places = inputs()[0], set()
    cache = KVCache(max_length=T)
    for part in x.split(1, 1):
        attend(model, part, cache)
        (kept,) = cache._kept.values()
        places.add((kept.keys.data_ptr(), kept.values.data_ptr()))
        assert cache.nbytes == 2 * B * T * E * 4
    assert len(places) == 1
    growing = KVCache()
    sizes = []
    for part in torch.randn(1, 600, E).split(1, 1):
        attend(model, part, growing)
        sizes.append(growing.nbytes)
    assert len(set(sizes)) <= 5 and sizes[-1] < 4 * 2 * 600 * E * 4


def test_a_copy_goes_its_own_way():
    model = fasttx.optimize(make_decoder())
    x, memory = inputs()
    cache = KVCache(T)
    model(x[:, :8], memory, cache=cache)
    fork = copy.deepcopy(cache)
    expected = model(x[:, 8:], memory, cache=cache)
    model(torch.randn(B, 5, E), memory, cache=fork)
    fork.crop(8)
    assert torch.equal(model(x[:, 8:], memory, cache=fork), expected)


def test_under_autocast():
    """In steps as in one pass, each in torch's dtypes; a cache begun under autocast does not go on outside of it."""
    theirs = make_decoder()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x, memory = inputs()
    truth = copy.deepcopy(theirs).double()(x.double(), memory.double(), tgt_mask=later(T))
    cache = KVCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = theirs(x, memory, tgt_mask=later(T))
        actual = in_steps(lambda part, _: ours(part, memory, cache=cache), x, 3)
    assert actual.dtype == eager.dtype
    assert_within_budget(actual=actual, eager=eager, truth=truth)
    with pytest.raises(ValueError, match="key differs from the cache's in dtype: torch.float32, after torch.bfloat16"):
        ours(x[:, :1], memory, cache=cache)


def test_under_compile():
    """As a whole it is refused with the way out; else attention with a cache is left to eager execution."""
    model, (x, memory) = fasttx.optimize(make_decoder(layers=1)), inputs()
    expected = model(x[:, :12], memory, cache=KVCache())
    compiled = torch.compile(lambda *args, cache: model(*args, cache=cache), backend="aot_eager")
    cache = KVCache()
    actual = in_steps(lambda part, _: compiled(part, memory, cache=cache), x[:, :12], 4)
    torch.testing.assert_close(actual, expected)
    assert cache.length() == 12
    whole = torch.compile(lambda *args, cache: model(*args, cache=cache), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="a KVCache cannot be compiled, as it is longer at every call: call the module"):
        whole(x[:, 12:], memory, cache=cache)
    assert cache.length() == 12


def test_inference_mode_and_no_grad_in_turns():
    model = fasttx.optimize(make_decoder())
    x, memory = inputs()
    cache = KVCache()
    expected = model(x, memory, cache=KVCache())
    with torch.inference_mode():
        model(x[:, :8], memory, cache=cache)
        cache.reorder(torch.arange(B))
    torch.testing.assert_close(model(x[:, 8:], memory, cache=cache), expected[:, 8:])


def test_forgets_a_module_that_is_gone():
    model, cache = fasttx.optimize(make_attention()), KVCache()
    attend(model, inputs()[0], cache)
    del model
    assert cache.nbytes == 0


def test_the_docstrings_greedy_decoding():
    torch.manual_seed(4)
    decoder, (_, memory) = fasttx.optimize(make_decoder()), inputs()
    embed, head = torch.nn.Embedding(50, E), torch.nn.Linear(E, 50)
    prompt, new_tokens = torch.randint(50, (B, 3)), 20
    tokens = prompt
    cache = fasttx.nn.KVCache()
    with torch.inference_mode():
        for _ in range(new_tokens):
            hidden = decoder(embed(tokens[:, cache.length() :]), memory, cache=cache)
            tokens = torch.cat((tokens, head(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1)
    expected = prompt
    for _ in range(new_tokens):
        hidden = decoder(embed(expected), memory, tgt_mask=later(expected.shape[1]))
        expected = torch.cat((expected, head(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(tokens, expected)


def test_changed_children_are_honoured():
    theirs = make_decoder().double()
    theirs.layers[0].self_attn.register_forward_hook(lambda m, args, output: (output[0] * 2, None))
    theirs.layers[0].linear1 = torch.nn.Sequential(theirs.layers[0].linear1, torch.nn.Tanh())
    theirs.layers[1].norm2.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x, memory = (t.double() for t in inputs())
    cache = KVCache()
    actual = in_steps(lambda part, _: ours(part, memory, cache=cache), x, 4)
    torch.testing.assert_close(actual, theirs(x, memory, tgt_mask=later(T)))


class Other(torch.nn.Module):
    """An attention of somebody else's."""

    batch_first = True

    def forward(self, query, key, value, **options):
        return query, None


def test_children_that_know_no_cache():
    x, memory = inputs()
    model = fasttx.optimize(make_decoder())
    model.layers[1].multihead_attn = Other()
    with pytest.raises(ValueError, match=r"cache: multihead_attn is a Other, not a fasttx.nn.MultiheadAttention"):
        model(x, memory, cache=KVCache())
    model.layers[0] = Other()
    with pytest.raises(ValueError, match=r"cache: layers.0 is a Other, not a fasttx.nn.TransformerDecoderLayer"):
        model(x, memory, cache=KVCache())
    model = fasttx.optimize(make_decoder())
    model.layers[1]._ff_block = lambda x: x
    with pytest.raises(ValueError, match="a layer with a cache cannot run torch's forward: its _ff_block was replaced"):
        model(x, memory, cache=KVCache())
    model = fasttx.optimize(make_decoder())
    model.layers[1] = model.layers[0]
    with pytest.raises(ValueError, match="cache: layers share a self_attn"):
        model(x, memory, cache=KVCache())


def test_bad_arguments_leave_the_cache_as_it_was():
    model, cache = fasttx.optimize(make_attention()), KVCache(max_length=12)
    x, memory = inputs()
    x = x[:, :8]
    attend(model, x, cache)
    one = x[:, :1]
    bad = {
        "room for max_length=12 tokens, and these make 16": lambda: attend(model, x, cache),
        r"key differs from the cache's in sequences: 1, after 3": lambda: attend(model, x[:1], cache),
        r"key_padding_mask must have the shape \(3, 9\)": lambda: attend(
            model, one, cache, key_padding_mask=torch.zeros(3, 8, dtype=torch.bool)
        ),
        r"attn_mask must have the shape \(1, 9\) or \(12, 1, 9\), over all tokens seen": lambda: attend(
            model, one, cache, attn_mask=torch.zeros(1, 1)
        ),
        "a width is not the module's": lambda: attend(model, one[..., 1:], cache),
        "query and key differ in batch": lambda: model(one, memory[:2], memory[:2], cache=cache),
        r"index must be \(sequences,\) in int64": lambda: cache.reorder(torch.zeros(3)),
        r"index must lie in \[0, 3\), got \[0, 3\]": lambda: cache.reorder(torch.tensor([0, 3])),
        "length must be an integer of at least 0, got -1": lambda: cache.crop(-1),
        "max_length must be a positive integer or None, got 0": lambda: KVCache(0),
        "window must be a positive integer or None, got 1.5": lambda: KVCache(window=1.5),
        "key and value differ": lambda: cache.append(model, torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 2, 8)),
        r"value must be \(batch, heads, length, width\)": lambda: cache.append(
            model, torch.zeros(3, 4, 1, 8), torch.zeros(3)
        ),
        "key differs from the cache's in dtype": lambda: cache.append(
            model, *(torch.zeros(3, 4, 1, 8).double() for _ in range(2))
        ),
        "keys of the module's own": lambda: attend(
            fasttx.optimize(make_attention(add_zero_attn=True)), one, cache
        ),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="attn_mask must be"):
        attend(model, one, cache, attn_mask=torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"cache must be a fasttx.nn.KVCache, got dict"):
        attend(model, one, {})
    with torch.enable_grad():
        for call in (
            lambda: attend(model, one, cache),
            lambda: model(one, memory, memory, cache=cache),
        ):
            with pytest.raises(ValueError, match=r"wants a gradient, and a cache holds none: call it under torch.no"):
                call()
    assert cache.length() == 8 and cache.nbytes == 2 * B * 12 * E * 4
    attend(model, one, cache)
