"""KVCache: encoders, as decoder-only transformers, step by step against whole passes under a causal mask."""

import copy

import pytest
import torch
from budget import DTYPES, assert_within_budget
from decoding import CHUNKS, B, Decodes, E, H, T, in_steps, later

import fasttx
from fasttx.nn import KVCache


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def no_fast_path():
    """torch's own gives NaN at queries that may attend to nothing, and then everywhere."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def make_encoder(layers=2, **options):
    layer = torch.nn.TransformerEncoderLayer(E, H, 48, **{"batch_first": True, **options})
    encoder = torch.nn.TransformerEncoder(layer, layers, torch.nn.LayerNorm(E), enable_nested_tensor=False).eval()
    for parameter in encoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def inputs(batch_first=True):
    x = torch.randn(B, T, E)
    return x if batch_first else x.transpose(0, 1).contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_in_steps_is_the_whole_pass(dtype, chunk, norm_first):
    theirs = make_encoder(norm_first=norm_first).to(dtype)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = inputs().to(dtype)
    cache = KVCache(max_length=T)
    actual = in_steps(lambda part, _: ours(part, cache=cache), x, chunk)

    def whole(precision):
        return copy.deepcopy(theirs).to(precision)(x.to(precision), mask=later(T))

    eager = whole(torch.float32 if dtype == torch.float64 else dtype)
    assert_within_budget(actual=actual, eager=eager, truth=whole(torch.float64))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_masks_are_over_all_tokens_seen(no_fast_path, batch_first, padding, norm_first):
    """Left-padded sequences, and biases of both kinds of shape, against torch's whole pass."""
    theirs = make_encoder(batch_first=batch_first, norm_first=norm_first).double()
    ours = fasttx.optimize(copy.deepcopy(theirs), padding=padding)
    x = inputs(batch_first).double()
    padded = torch.arange(T) < torch.tensor([[0], [5], [2]])
    shared, per_head = torch.randn(T, T).double(), torch.randn(B * H, T, T).double()
    valid = ~padded if batch_first else ~padded.T
    for bias in (None, shared, per_head):
        whole = torch.zeros(T, T).double() if bias is None else bias
        expected = theirs(
            x, whole.masked_fill(later(T), -torch.inf), torch.zeros(B, T).double().masked_fill(padded, -torch.inf)
        )
        cache = KVCache()

        def run(part, done):
            end = done + part.shape[1 if batch_first else 0]
            mask = None if bias is None else bias[..., done:end, :end]  # noqa: B023
            return ours(part, mask, padded[:, :end], cache=cache)  # noqa: B023

        actual = in_steps(run, x, 4, 1 if batch_first else 0)
        torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_encoder_with_a_window(chunk, norm_first):
    theirs = make_encoder(norm_first=norm_first).double()
    ours, x = fasttx.optimize(copy.deepcopy(theirs)), inputs().double()
    far = torch.arange(T)[:, None] - torch.arange(T) >= 6
    cache = KVCache(window=6)
    actual = in_steps(lambda part, _: ours(part, cache=cache), x, chunk)
    torch.testing.assert_close(actual, theirs(x, later(T) | far), rtol=1e-9, atol=1e-11)


def test_an_encoder_layer_is_two_operations():
    """In inference, whatever the layout, the order of the norms and the window."""
    for options in ({}, {"norm_first": True}, {"batch_first": False}, {"bias": False}):
        model = fasttx.optimize(make_encoder(1, **options))
        x = inputs(options.get("batch_first", True))
        for given in (x, x[0]):
            for cache in (KVCache(), KVCache(window=4)):
                for _ in range(2):
                    ops = [row.op for row in fasttx.explain(model, given, cache=cache).rows]
                    assert ops == ["cached_attention_block", "feed_forward_block", "layer_norm"], ops


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_cached_step_of_one_token_is_told_apart_and_nothing_else(norm_first, batch_first):
    model = fasttx.optimize(make_encoder(1, norm_first=norm_first, batch_first=batch_first))
    first, then = inputs(batch_first).split((8, T - 8), 1 if batch_first else 0)
    one = then[:, :1] if batch_first else then[:1]
    cache, told = KVCache(), []
    for call in (lambda: model(first, cache=cache), lambda: model(one, cache=cache), lambda: model(one)):
        with Decodes() as mode:
            call()
        told.append(set(mode.told))
    assert told == [{False}, {True}, {False}]


def test_an_unbatched_encoder():
    for batch_first in (False, True):
        theirs = make_encoder(batch_first=batch_first).double()
        ours, x = fasttx.optimize(copy.deepcopy(theirs)), inputs()[0].double()
        padding, cache = torch.arange(T) == 3, KVCache()
        actual = in_steps(
            lambda part, done: ours(part, src_key_padding_mask=padding[: done + len(part)], cache=cache),  # noqa: B023
            x, 4, 0,
        )  # fmt: skip
        expected = theirs(x, later(T), padding)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_with_gradients_on_and_none_wanted():
    model, x = fasttx.optimize(make_encoder()).requires_grad_(False), inputs()
    expected = model(x, cache=KVCache())
    with torch.enable_grad():
        assert torch.equal(model(x, cache=KVCache()), expected)
    model.train()
    dropped = model(x, cache=KVCache())
    assert (dropped - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_sequence_alone_and_among_others_is_the_same_bits(dtype, isa, threads):
    model, x = fasttx.optimize(make_encoder().to(dtype)), torch.randn(5, T, E).to(dtype)

    def run(rows, cache):
        return in_steps(lambda part, _: model(part, cache=cache), x[rows], 3)

    with fasttx.backend("cpu"):
        together = run(slice(0, 5), KVCache())
        for row in (0, 3):
            with threads(1 + row):
                assert torch.equal(run(slice(row, row + 1), KVCache(T))[0], together[row])


def test_changed_children_are_honoured():
    theirs = make_encoder().double()
    theirs.layers[0].self_attn.register_forward_hook(lambda m, args, output: (output[0] * 2, None))
    theirs.layers[0].linear1 = torch.nn.Sequential(theirs.layers[0].linear1, torch.nn.Tanh())
    theirs.layers[1].norm2.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    ours, x, cache = fasttx.optimize(copy.deepcopy(theirs)), inputs().double(), KVCache()
    actual = in_steps(lambda part, _: ours(part, cache=cache), x, 4)
    torch.testing.assert_close(actual, theirs(x, later(T)))


def test_reasons_of_a_layer_that_is_not_two_operations():
    x = inputs()
    for change, reason in {
        lambda layer: layer.self_attn.register_forward_hook(lambda *args: None): "attention: it has hooks",
        lambda layer: layer.norm1.register_forward_hook(lambda *args: None): "norm: it has hooks",
    }.items():
        for norm_first in (False, True):
            model = fasttx.optimize(make_encoder(norm_first=norm_first))
            expected = model(x, cache=KVCache())
            change(model.layers[1])
            torch.testing.assert_close(model(x, cache=KVCache()), expected)
            with fasttx.strict(), pytest.raises(fasttx.FallbackError, match=reason):
                model(x, cache=KVCache())


class Other(torch.nn.Module):
    """An attention of somebody else's."""

    batch_first = True

    def forward(self, query, key, value, **options):
        return query, None


def test_children_that_know_no_cache():
    x, model = inputs(), fasttx.optimize(make_encoder())
    model.layers[1].self_attn = Other()
    with pytest.raises(ValueError, match=r"cache: self_attn is a Other, not a fasttx.nn.MultiheadAttention"):
        model(x, cache=KVCache())
    model.layers[0] = Other()
    with pytest.raises(ValueError, match=r"cache: layers.0 is a Other, not a fasttx.nn.TransformerEncoderLayer"):
        model(x, cache=KVCache())
    model = fasttx.optimize(make_encoder())
    model.layers[1]._ff_block = lambda x: x
    with pytest.raises(ValueError, match="a layer with a cache cannot run torch's forward: its _ff_block was replaced"):
        model(x, cache=KVCache())
    model = fasttx.optimize(make_encoder())
    model.layers[1] = model.layers[0]
    with pytest.raises(ValueError, match="cache: layers share a self_attn"):
        model(x, cache=KVCache())


@pytest.mark.parametrize("norm_first", [False, True])
def test_what_an_encoder_refuses_leaves_the_cache_as_it_was(norm_first):
    x, model, cache = inputs(), fasttx.optimize(make_encoder(norm_first=norm_first)), KVCache(max_length=T)
    first, one = x[:, :8], x[:, 8:9]
    model(first, cache=cache)
    nested = torch.nested.nested_tensor(list(one))
    for message, call in {
        "sequences: 1, after 3": lambda: model(one[:1], cache=cache),
        "a width is not the module's": lambda: model(one[..., 1:], cache=cache),
        r"attn_mask must have the shape \(1, 9\)": lambda: model(one, torch.zeros(1, 1), cache=cache),
        r"key_padding_mask must have the shape \(3, 9\)": lambda: model(one, None, torch.zeros(3, 1), cache=cache),
        "attn_mask must be": lambda: model(one, torch.zeros(1, 9, dtype=torch.int64), cache=cache),
        "room for max_length=34": lambda: model(x, cache=cache),
        "cache must be a fasttx.nn.KVCache, got dict": lambda: model(one, cache={}),
        "src must be a tensor, got NoneType": lambda: model(None, cache=cache),
        "cannot run torch's forward: src is nested": lambda: model(nested, cache=cache),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
        assert cache.length() == 8
    with torch.enable_grad(), pytest.raises(ValueError, match="wants a gradient, and a cache holds none"):
        model(one, cache=cache)
    assert {cache.length(layer.self_attn) for layer in model.layers} == {8}
