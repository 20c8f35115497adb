"""KVCache: attention step by step, and what is kept."""

import copy

import pytest
import torch
from budget import DTYPES, assert_within_budget
from decoding import CHUNKS, B, E, H, S, T, attend, in_steps, inputs, later, make_attention, make_decoder

import fasttx
from fasttx.nn import KVCache


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


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


def test_room_is_taken_when_it_is_committed():
    model, sizes = make_attention(), (B, H, 5, E // H)
    cache = KVCache(max_length=8)
    room = cache.reserve(model, torch.zeros(0), sizes)
    assert room.keys.shape == room.values.shape == (B, H, 8, E // H) and (room.filled, room.first) == (0, 0)
    assert cache.length() == cache.nbytes == 0
    room.keys[:, :, :5], room.values[:, :, :5] = 1, 2
    room.commit()
    assert cache.length(model) == 5
    keys, values, first = cache.append(model, *(torch.zeros(B, H, 1, E // H) for _ in range(2)))
    assert first == 0 and keys[0, 0, :, 0].tolist() == [1] * 5 + [0] and values[0, 0, :, 0].tolist() == [2] * 5 + [0]
    with pytest.raises(ValueError, match="room for max_length=8 tokens, and these make 11"):
        cache.reserve(model, torch.zeros(0), sizes)
    with pytest.raises(ValueError, match=r"key differs from the cache's in dtype: torch.float64, after torch.float32"):
        cache.reserve(model, torch.zeros(0).double(), (B, H, 1, E // H))
    windowed = KVCache(window=3)
    for seen in range(9):
        room = windowed.reserve(model, torch.zeros(0), (B, H, 1, E // H))
        assert (room.filled, room.first) == (min(seen, 2), max(seen - 2, 0)) and room.keys.shape[2] > room.filled
        room.commit()


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
