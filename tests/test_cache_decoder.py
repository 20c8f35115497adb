"""KVCache: decoders step by step against whole passes."""

import copy

import pytest
import torch
from budget import DTYPES, assert_within_budget
from decoding import CHUNKS, B, Decodes, E, H, S, T, in_steps, inputs, later, make_decoder

import fasttx
from fasttx.nn import KVCache


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


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
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_masks_are_over_all_tokens_seen(batch_first, padding, norm_first):
    """Left-padded sequences, a padded memory, and biases of both kinds of shape, against torch's whole pass."""
    theirs = make_decoder(batch_first=batch_first, norm_first=norm_first).double()
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


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_decoder_with_a_window(chunk, norm_first):
    theirs = make_decoder(norm_first=norm_first).double()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x, memory = (t.double() for t in inputs())
    far = torch.arange(T)[:, None] - torch.arange(T) >= 6
    bias = torch.randn(T, T).double()
    for given in (None, bias, bias < -1):
        mask = torch.zeros(T, T).double() if given is None else bias
        if given is not None and given.dtype == torch.bool:
            given = given & ~torch.eye(T, dtype=torch.bool)
            mask = torch.zeros(T, T).double().masked_fill(given, -torch.inf)
        expected = theirs(x, memory, tgt_mask=mask.masked_fill(later(T) | far, -torch.inf))
        cache = KVCache(window=6)

        def run(part, done):
            mask = None if given is None else given[done : done + part.shape[1], : done + part.shape[1]]  # noqa: B023
            return ours(part, memory, tgt_mask=mask, cache=cache)  # noqa: B023

        torch.testing.assert_close(in_steps(run, x, chunk), expected, rtol=1e-9, atol=1e-11)


def test_a_decoder_layer_is_three_operations():
    """In inference, whatever the layout, the order of the norms, the masks and the window."""
    for options in ({}, {"norm_first": True}, {"batch_first": False}, {"bias": False}):
        model = fasttx.optimize(make_decoder(1, **options))
        x, memory = inputs(options.get("batch_first", True))
        for given in (x, memory), (x[0], memory[0]):
            for cache in (KVCache(), KVCache(window=4)):
                first, then = (fasttx.explain(model, *given, cache=cache) for _ in range(2))
                ops = [row.op for row in then.rows]
                assert ops == ["cached_attention_block", "feed_forward_block", "layer_norm"], ops
                assert [row.op for row in first.rows if row.op not in ops] == ["linear"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_cached_step_of_one_token_is_told_apart_and_nothing_else(norm_first, batch_first):
    """Its products may take another unit. A batch of sequences of one token without a cache must not: packed, they are
    not told from longer ones."""
    model = fasttx.optimize(make_decoder(1, norm_first=norm_first, batch_first=batch_first))
    x, memory = inputs(batch_first)
    first, then = x.split((8, T - 8), 1 if batch_first else 0)
    one = then[:, :1] if batch_first else then[:1]
    cache, told = KVCache(), []
    for call in (
        lambda: model(first, memory, cache=cache), lambda: model(one, memory, cache=cache), lambda: model(one, memory)
    ):  # fmt: skip
        with Decodes() as mode:
            call()
        told.append(set(mode.told))
    assert told == [{False}, {True}, {False}]


def test_an_unbatched_decoder():
    for batch_first in (False, True):
        theirs = make_decoder(batch_first=batch_first).double()
        ours = fasttx.optimize(copy.deepcopy(theirs))
        x, memory = (t[0].double() for t in inputs())
        padding, cache = torch.arange(T) == 3, KVCache()

        def run(part, done):
            padded = padding[: done + len(part)]  # noqa: B023
            return ours(part, memory, tgt_key_padding_mask=padded, cache=cache)  # noqa: B023

        expected = theirs(x, memory, tgt_mask=later(T), tgt_key_padding_mask=padding)
        torch.testing.assert_close(in_steps(run, x, 4, 0), expected, rtol=1e-9, atol=1e-11)


def test_with_gradients_on_and_none_wanted():
    model = fasttx.optimize(make_decoder()).requires_grad_(False)
    x, memory = inputs()
    expected = model(x, memory, cache=KVCache())
    with torch.enable_grad():
        assert torch.equal(model(x, memory, cache=KVCache()), expected)
    model.train()
    torch.manual_seed(1)
    dropped = model(x, memory, cache=KVCache())
    assert (dropped - expected).abs().max() > 0.1


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


def test_reasons_of_a_layer_that_is_not_three_operations():
    x, memory = inputs()
    for change, reason in {
        lambda layer: layer.self_attn.register_forward_hook(lambda *args: None): "attention: it has hooks",
        lambda layer: layer.multihead_attn.register_forward_hook(lambda *args: None): "attention: it has hooks",
        lambda layer: layer.norm1.register_forward_hook(lambda *args: None): "norm: it has hooks",
        lambda layer: layer.norm2.register_forward_hook(lambda *args: None): "norm: it has hooks",
    }.items():
        for norm_first in (False, True):
            model = fasttx.optimize(make_decoder(norm_first=norm_first))
            expected = model(x, memory, cache=KVCache())
            change(model.layers[1])
            torch.testing.assert_close(model(x, memory, cache=KVCache()), expected)
            with fasttx.strict(), pytest.raises(fasttx.FallbackError, match=reason):
                model(x, memory, cache=KVCache())


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


@pytest.mark.parametrize("norm_first", [False, True])
def test_what_a_decoder_refuses_leaves_the_cache_as_it_was(norm_first):
    """Also where it is the second attention of a layer that cannot take the call."""
    x, memory = inputs()
    model, cache = fasttx.optimize(make_decoder(norm_first=norm_first)), KVCache(max_length=T)
    first, one = x[:, :8], x[:, 8:9]
    padding = torch.zeros(B, S + 1, dtype=torch.bool)
    for message, call in {
        "a width is not the module's": lambda: model(first, memory[..., 1:], cache=cache),
        "query and key differ in batch": lambda: model(first, memory[1:], cache=cache),
        "mask must have the shape": lambda: model(first, memory, memory_key_padding_mask=padding, cache=cache),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
        assert cache.length() == 0
    model(first, memory, cache=cache)
    wrong = torch.zeros(1, S, dtype=torch.int64)
    for message, call in {
        "query differs from the cache's memory in sequences: 1, and 3": lambda: model(one[:1], memory, cache=cache),
        "attn_mask must be": lambda: model(one, memory, memory_mask=wrong, cache=cache),
        r"attn_mask must have the shape \(1, 9\)": lambda: model(one, memory, torch.zeros(1, 1), cache=cache),
        "room for max_length=34": lambda: model(x, memory, cache=cache),
        "cache must be a fasttx.nn.KVCache, got dict": lambda: model(one, memory, cache={}),
        "memory must be a tensor, got NoneType": lambda: model(one, None, cache=cache),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
        assert cache.length() == 8
    with torch.enable_grad(), pytest.raises(ValueError, match="wants a gradient, and a cache holds none"):
        model(one, memory, cache=cache)
    assert {cache.length(layer.self_attn) for layer in model.layers} == {8}
