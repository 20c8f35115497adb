"""The specification against loops, against torch's own operations, and against its promises."""

import itertools
import math
from functools import partial

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fasttx import philox, reference

HALVES = [torch.bfloat16, torch.float16]


def draw(*shape, dtype=torch.float64, grad=False):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def as_tuple(tensors):
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


def close(actual, expected, tolerance=1e-12):
    for ours, theirs in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def gradients(outputs, inputs):
    """Of a random but repeatable linear function of the outputs."""
    seeded = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=seeded).to(x) for x in as_tuple(outputs)]
    return torch.autograd.grad(as_tuple(outputs), inputs, weights, retain_graph=True)


def all_finite(tensors):
    return all(torch.isfinite(tensor).all() for tensor in tensors)


def attention_by_loops(q, k, v, options):
    """One score, one exponential and one product at a time, in Python floats."""
    attn_mask, key_lengths, slopes, dropout_p = (
        options[name] for name in ("attn_mask", "key_lengths", "alibi_slopes", "dropout_p")
    )
    left, right = options["window"] or (-1, -1)
    (batch, heads, queries, width), (_, kv_heads, keys, _) = q.shape, k.shape
    output = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    if attn_mask is None:
        attn_mask = torch.tensor(True)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
    attn_mask = attn_mask.expand(batch, heads, queries, keys)
    indices = torch.arange(batch), torch.arange(heads)
    keep = philox.keep_mask(options["seed"], *indices, queries, keys, dropout_p)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        g, position = h // (heads // kv_heads), i + options["query_offset"]
        scores = {}
        for j in range(keys):
            if key_lengths is not None and j >= key_lengths[b]:
                continue
            if options["is_causal"] and j > position:
                continue
            if (0 <= left < position - j) or (0 <= right < j - position):
                continue
            products = (float(q[b, h, i, d]) * float(k[b, g, j, d]) for d in range(width))
            score = options["scale"] * sum(products) + float(attn_mask[b, h, i, j])
            if slopes is not None:
                score -= float(slopes[h]) * abs(position - j)
            if score > -math.inf:
                scores[j] = score
        total = math.fsum(math.exp(score) for score in scores.values())
        if total == 0:
            continue
        lse[b, h, i] = math.log(total)
        for j, score in scores.items():
            if keep[b, h, i, j]:
                output[b, h, i] += math.exp(score) / total / (1 - dropout_p) * v[b, g, j]
    return output, lse


@st.composite
def attention_cases(draw_from):
    """Shapes with zeros and every option, alone and together."""
    torch.manual_seed(draw_from(st.integers(0, 2**31)))
    batch, kv_heads, group = (draw_from(st.integers(low, 2)) for low in (0, 0, 1))
    queries, keys, width, value_width = (draw_from(st.integers(low, 5)) for low in (0, 0, 1, 0))
    heads = kv_heads * group
    sizes = (heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width)
    tensors = [draw(batch, *size) for size in sizes]
    mask = None
    kind = draw_from(st.sampled_from([None, "bool", "float", "-inf"]))
    if kind is not None:
        full = [batch, heads, queries, keys]
        shape = [size if draw_from(st.booleans()) else 1 for size in full]
        mask = draw(*shape[draw_from(st.integers(0, 2)) :])
        if kind == "bool":
            mask = mask > 0
        elif kind == "-inf":
            mask = mask.masked_fill(mask > 0.3, -math.inf)
    side = st.integers(-1, 3)
    options = {
        "attn_mask": mask,
        "key_lengths": draw_from(st.sampled_from([None, torch.randint(0, keys + 1, (batch,))])),
        "is_causal": draw_from(st.booleans()),
        "query_offset": draw_from(st.integers(0, 4)),
        "window": draw_from(st.one_of(st.none(), st.tuples(side, side))),
        "alibi_slopes": draw_from(st.sampled_from([None, draw(heads)])),
        "dropout_p": draw_from(st.sampled_from([0.0, 0.0, 0.3])),
        "scale": draw_from(st.sampled_from([None, 0.0, 0.7])),
        "seed": draw_from(st.integers(0, 2**63 - 1)),
    }
    return tensors, options


@settings(max_examples=150, deadline=None, database=None)
@given(attention_cases())
def test_attention_matches_loops(case):
    (q, k, v), options = case
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output, lse = reference.attention(*inputs, **options, enable_gqa=True, return_lse=True)
    if options["scale"] is None:
        options["scale"] = q.shape[-1] ** -0.5
    expected, expected_lse = attention_by_loops(*(x.detach() for x in inputs), options)
    close(output, expected)
    close(lse, expected_lse)
    assert all_finite(gradients(output, inputs)) and all_finite(gradients(lse, inputs[:2]))


# Only rows with something to attend to: torch's own answer to the others is not specified.
SDPA_MASKS = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "bool 2d": lambda: {"attn_mask": (draw(6, 7) > 0).index_fill(1, torch.tensor([0]), True)},
    "bool 3d": lambda: {"attn_mask": (draw(4, 1, 7) > 0).index_fill(2, torch.tensor([3]), True)},
    "bool 4d": lambda: {"attn_mask": (draw(2, 1, 6, 7) > 0).index_fill(3, torch.tensor([6]), True)},
    "float 2d": lambda: {"attn_mask": draw(6, 7, grad=True)},
    "float 4d": lambda: {"attn_mask": draw(1, 4, 1, 7, grad=True)},
    "scale": lambda: {"scale": 0.3},
}


@pytest.mark.parametrize("kind", SDPA_MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_matches_torch(kind, kv_heads):
    shapes = [(2, 4, 6, 5), (2, kv_heads, 7, 5), (2, kv_heads, 7, 3)]
    inputs = [draw(*shape, grad=True) for shape in shapes]
    options = SDPA_MASKS[kind]() | {"enable_gqa": kv_heads != 4}
    actual = reference.attention(*inputs, **options)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    close(actual, expected)
    mask = options.get("attn_mask")
    if mask is not None and mask.requires_grad:
        inputs.append(mask)
    close(gradients(actual, inputs), gradients(expected, inputs))


EMPTY_ROWS = {
    "bool mask": {"attn_mask": torch.tensor([[False] * 5, [True] * 5, [False] * 5])},
    "-inf mask": {"attn_mask": torch.full((3, 5), -math.inf).index_fill(0, torch.tensor([1]), 0)},
    "key lengths": {"key_lengths": torch.tensor([0, 5])},
    "window": {"window": (0, 0), "query_offset": 4},
    "causal": {"is_causal": True, "query_offset": -2},
}


@pytest.mark.parametrize("kind", EMPTY_ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_empty_rows_give_zeros(kind, dtype):
    options = dict(EMPTY_ROWS[kind])
    q, k, v = (draw(2, 2, n, 4, dtype=dtype, grad=True) for n in (3, 5, 5))
    leaves = [q, k, draw(2, dtype=dtype, grad=True)]
    if kind == "-inf mask":
        options["attn_mask"] = options["attn_mask"].to(dtype).requires_grad_()
        leaves.append(options["attn_mask"])
    output, lse = reference.attention(q, k, v, alibi_slopes=leaves[2], return_lse=True, **options)
    empty = lse == -math.inf
    assert empty.any() and not empty.all()
    assert (output[empty] == 0).all()
    assert torch.isfinite(lse[~empty]).all()
    assert (output[~empty] != 0).any()
    for result in (output, lse):
        found = gradients(result, leaves)
        assert all_finite(found)
        assert (found[0][empty] == 0).all()


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_without_elements(batch, queries, keys, dropout_p):
    inputs = [draw(batch, 2, n, 4, grad=True) for n in (queries, keys, keys)]
    output, lse = reference.attention(*inputs, dropout_p=dropout_p, seed=1, return_lse=True)
    assert output.shape == (batch, 2, queries, 4) and (output == 0).all()
    assert lse.shape == (batch, 2, queries) and (lse == -math.inf).all()
    assert all((gradient == 0).all() for gradient in gradients(output, inputs))


def test_large_scores_do_not_overflow():
    q, k, v = draw(1, 1, 4, 8) * 1e4, draw(1, 1, 6, 8) * 1e4, draw(1, 1, 6, 2)
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    output, lse = reference.attention(*inputs, return_lse=True)
    assert all_finite([output, lse]) and all_finite(gradients(output, inputs))


LENGTHS = [((3, 0, 5, 1), (3, 0, 5, 1)), ((2, 4, 0, 3), (5, 1, 3, 0)), ((), ()), ((0,), (0,))]


@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_equals_padded(lengths_q, lengths_k, dropout_p, index_dtype):
    sizes = (4, max(lengths_q, default=0), 4), (2, 6, 4), (2, 6, 4)
    padded = [draw(len(lengths_q), *size, grad=True) for size in sizes]

    def pack(x, lengths):
        rows = [x[n, :, :length].transpose(0, 1) for n, length in enumerate(lengths)]
        return torch.cat([x[:, :, :0].transpose(1, 2).flatten(0, 1), *rows])

    def bounds(lengths):
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=index_dtype)

    options = {"is_causal": True, "window": (2, -1), "alibi_slopes": draw(4).abs()}
    options |= {"dropout_p": dropout_p, "seed": 99, "enable_gqa": True, "return_lse": True}
    key_lengths = torch.tensor(lengths_k, dtype=index_dtype)
    expected, expected_lse = reference.attention(*padded, key_lengths=key_lengths, **options)
    all_lengths = (lengths_q, lengths_k, lengths_k)
    packed = [pack(x, lengths) for x, lengths in zip(padded, all_lengths, strict=True)]
    output, lse = reference.attention_varlen(
        *packed, bounds(lengths_q), bounds(lengths_k), **options
    )
    assert lse.shape == (4, sum(lengths_q))
    close(output, pack(expected, lengths_q))
    close(lse, pack(expected_lse[..., None], lengths_q)[..., 0].T)
    close(gradients(output, padded), gradients(pack(expected, lengths_q), padded))


def test_dropout_does_not_depend_on_the_rest_of_the_batch():
    q, k, v = draw(3, 2, 5, 4), draw(3, 2, 7, 4), draw(3, 2, 7, 4)
    attention = partial(reference.attention, dropout_p=0.5, seed=torch.tensor(1234))
    close(attention(q[:2, :, :3], k[:2], v[:2]), attention(q, k, v)[:2, :, :3])
    padded = attention(q, k, v, key_lengths=torch.tensor([7, 4, 2]))
    close(attention(q[:2], k[:2, :, :4], v[:2, :, :4])[1], padded[1])


def test_dropout_keeps_the_expectation():
    q, k, v = draw(1, 1, 4, 8), draw(1, 1, 64, 8), torch.eye(64, dtype=torch.float64)[None, None]
    probabilities = reference.attention(q, k, v)[0].expand(512, 4, 64)
    dropped = reference.attention(q.expand(512, 1, 4, 8), k, v, dropout_p=0.25, seed=5)[:, 0]
    kept = dropped != 0
    close(dropped[kept], probabilities[kept] / 0.75)
    deviation = math.sqrt(0.25 * 0.75 / kept.numel())
    assert abs(kept.double().mean().item() - 0.75) < 5 * deviation


@settings(max_examples=50, deadline=None, database=None)
@given(st.data())
def test_softmax_matches_torch(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shape = data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=4))
    is_causal = data.draw(st.booleans())
    dim = -1 if is_causal else data.draw(st.integers(-len(shape), len(shape) - 1))
    x = draw(*shape, grad=True)
    mask_shape = [size if data.draw(st.booleans()) else 1 for size in shape]
    mask = data.draw(st.sampled_from([None, draw(*mask_shape) > 0, draw(*mask_shape)]))
    scores = x
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e300) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
        scores = scores.masked_fill(columns > rows, -1e300)
    empty = (scores == -1e300).all(dim, keepdim=True)
    expected = torch.softmax(scores, dim).masked_fill(empty, 0.0)
    actual = reference.softmax(x, mask=mask, is_causal=is_causal, dim=dim)
    close(actual, expected)
    close(gradients(actual, [x]), gradients(expected, [x]))


def test_softmax_fully_masked_rows():
    x = draw(3, 4, grad=True)
    mask = draw(3, 4).index_fill(0, torch.tensor([1]), -math.inf).requires_grad_()
    output = reference.softmax(x, mask=mask)
    assert (output[1] == 0).all()
    for gradient in gradients(output, [x, mask]):
        assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()
    assert (reference.softmax(x, mask=torch.tensor(False)) == 0).all()


LAYER_NORM_SHAPES = [((5, 7), 7), ((2, 3, 4), (3, 4)), ((2, 3, 4), [2, 3, 4]), ((9,), (9,))]
LAYER_NORM_SHAPES += [((0, 7), (7,)), ((3, 1), (1,)), ((2, 5, 7), torch.Size([7]))]


@pytest.mark.parametrize(("shape", "normalized"), LAYER_NORM_SHAPES)
@pytest.mark.parametrize("affine", ["neither", "weight", "both"])
def test_layer_norm_matches_torch(shape, normalized, affine):
    dims = [normalized] if isinstance(normalized, int) else list(normalized)
    inputs = [(draw(*shape) * 3 + 100).requires_grad_()]
    inputs += [draw(*dims, grad=True) for _ in range(["neither", "weight", "both"].index(affine))]
    actual = reference.layer_norm(inputs[0], normalized, *inputs[1:], eps=1e-3)
    expected = F.layer_norm(inputs[0], dims, *inputs[1:], eps=1e-3)
    close(actual, expected, 1e-11)
    close(gradients(actual, inputs), gradients(expected, inputs), 1e-11)


@pytest.mark.parametrize("normalized", [(6,), (4, 6)])
@pytest.mark.parametrize("training", [False, True])
def test_add_layer_norm_is_its_parts(normalized, training):
    x, residual = draw(3, 4, 6, grad=True), draw(3, 4, 6, grad=True)
    weight, bias = draw(*normalized), draw(*normalized)
    columns = math.prod(normalized)
    keep = philox.matrix_keep_mask(8, 72 // columns, columns, 0.3).reshape(x.shape)
    total = residual + (x * keep / 0.7 if training else x)
    expected = F.layer_norm(total, normalized, weight, bias, 1e-4)
    options = {"dropout_p": 0.3, "training": training, "return_sum": True, "seed": 8}
    normed, added = reference.add_layer_norm(x, residual, normalized, weight, bias, 1e-4, **options)
    close(normed, expected)
    close(added, total)
    close(gradients(normed, [x, residual]), gradients(expected, [x, residual]))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_matches_torch(approximate):
    x, bias = draw(50, 9, grad=True), draw(9, grad=True)
    expected = F.gelu(x, approximate=approximate)
    close(reference.gelu(x, approximate), expected)
    actual = reference.bias_gelu(x, bias, approximate)
    expected = F.gelu(x + bias, approximate=approximate)
    close(actual, expected)
    close(gradients(actual, [x, bias]), gradients(expected, [x, bias]))


def exact_gelu(x, approximate):
    if approximate == "none":
        return x * mpmath.ncdf(x)
    # x (1 + tanh u) / 2, without a cancellation that 40 digits would not survive
    u = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x / (1 + mpmath.exp(-2 * u))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_keeps_its_digits_in_both_tails(approximate):
    x = torch.linspace(-30, 30, 401, dtype=torch.float64)
    with mpmath.workdps(40):
        exact = [float(exact_gelu(mpmath.mpf(value), approximate)) for value in x.tolist()]
    # Rounding the exponential's argument, up to 700, costs up to 700 * 2^-53 relative.
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(reference.gelu(x, approximate), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 0, 3), (2, 5, 3)])
def test_linear_matches_torch(shape):
    x, weight, bias = draw(*shape), draw(6, 3), draw(6)
    close(reference.linear(x, weight, bias), F.linear(x, weight, bias))
    close(reference.linear(x, weight), F.linear(x, weight))


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (0, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_feed_forward_is_its_parts(activation, biased, shape, training):
    x, weight1, weight2 = draw(*shape), draw(7, 3), draw(4, 7)
    bias1, bias2 = (draw(7), draw(4)) if biased else (None, None)
    hidden = ACTIVATIONS[activation](F.linear(x, weight1, bias1))
    if training:
        keep = philox.matrix_keep_mask(21, math.prod(shape[:-1]), 7, 0.2)
        hidden = hidden * keep.reshape(hidden.shape) / 0.8
    options = {"activation": activation, "dropout_p": 0.2, "training": training, "seed": 21}
    actual = reference.feed_forward(x, weight1, bias1, weight2, bias2, **options)
    close(actual, F.linear(hidden, weight2, bias2))


DROPOUT = {"dropout_p": 0.25, "seed": 7}
TRAINING = DROPOUT | {"training": True}


def attend(q, k, v, mask, slopes):
    lengths, options = torch.tensor([0, 3]), {"window": (1, 1), "query_offset": 1} | DROPOUT
    options |= {"attn_mask": mask, "alibi_slopes": slopes, "key_lengths": lengths}
    return reference.attention(q, k, v, enable_gqa=True, **options)


def attend_lse(q, k, v):
    return reference.attention(q, k, v, is_causal=True, return_lse=True)


def attend_packed(q, k, v, slopes):
    bounds = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 3])
    options = {"is_causal": True, "alibi_slopes": slopes} | DROPOUT
    return reference.attention_varlen(q, k, v, *bounds, **options)


def masked_softmax(x, mask):
    return reference.softmax(x, mask=mask, is_causal=True)


def layer_norm(x, weight, bias):
    return reference.layer_norm(x, (4,), weight, bias)


def add_layer_norm(x, residual, weight, bias):
    options = {"return_sum": True} | TRAINING
    return reference.add_layer_norm(x, residual, (4,), weight, bias, **options)


def feed_forward(x, weight1, bias1, weight2, bias2):
    options = {"activation": "gelu_tanh"} | TRAINING
    return reference.feed_forward(x, weight1, bias1, weight2, bias2, **options)


# Each op with the shapes of its floating arguments; the first cannot be traced in one graph.
CALLS = [
    (attend_packed, [(5, 2, 2), (3, 2, 2), (3, 2, 3), (2,)]),
    (attend, [(2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 3), (2, 1, 4), (2,)]),
    (attend_lse, [(1, 2, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)]),
    (masked_softmax, [(2, 3, 4), (3, 1)]),
    (layer_norm, [(3, 4), (4,), (4,)]),
    (add_layer_norm, [(3, 4), (3, 4), (4,), (4,)]),
    (reference.gelu, [(3, 4)]),
    (reference.bias_gelu, [(3, 4), (4,)]),
    (reference.linear, [(2, 3), (4, 3), (4,)]),
    (feed_forward, [(2, 3), (4, 3), (4,), (2, 4), (2,)]),
]


def each(calls):
    return pytest.mark.parametrize(("op", "shapes"), calls, ids=[op.__name__ for op, _ in calls])


@pytest.mark.parametrize("op", [attend, attend_packed, add_layer_norm, feed_forward])
def test_dropout_needs_a_seed(op, monkeypatch):
    for options in (DROPOUT, TRAINING):
        monkeypatch.setitem(options, "seed", None)
    with pytest.raises(ValueError, match="seed"):
        op(*(draw(*shape) for shape in dict(CALLS)[op]))


@each(CALLS)
def test_gradcheck(op, shapes):
    inputs = [draw(*shape, grad=True) for shape in shapes]
    assert gradcheck(op, inputs, check_forward_ad=True)


@each(CALLS)
def test_vmap(op, shapes):
    inputs = [draw(3, *shape) for shape in shapes]
    mapped = as_tuple(torch.func.vmap(op)(*inputs))
    for index in range(3):
        close([output[index] for output in mapped], op(*(x[index] for x in inputs)))


@pytest.mark.parametrize("dtype", HALVES)
@each(CALLS)
def test_halves_are_rounded_once(op, shapes, dtype):
    """Outputs and gradients are those of float32 on the same values, rounded."""
    halves = [draw(*shape, dtype=dtype, grad=True) for shape in shapes]
    floats = [x.detach().float().requires_grad_() for x in halves]
    outputs, expected = as_tuple(op(*halves)), as_tuple(op(*floats))
    for index, (output, wide) in enumerate(zip(outputs, expected, strict=True)):
        is_lse = op is attend_lse and index == 1
        assert output.dtype == (torch.float32 if is_lse else dtype)
        assert torch.equal(output, wide.to(output.dtype))
    weights = [draw(*output.shape, dtype=output.dtype) for output in outputs]
    found = torch.autograd.grad(outputs, halves, weights)
    truth = torch.autograd.grad(expected, floats, [weight.float() for weight in weights])
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def test_float32_parameters_with_half_inputs():
    x, weight, bias = draw(3, 4, dtype=torch.bfloat16), draw(4).float(), draw(4).float()
    expected = reference.layer_norm(x.float(), 4, weight, bias).bfloat16()
    assert torch.equal(reference.layer_norm(x, 4, weight, bias), expected)


@each(CALLS[1:])
def test_compiled_equals_eager(op, shapes):
    torch.compiler.reset()
    inputs = [draw(*shape, grad=True) for shape in shapes]
    expected = op(*inputs)
    actual = torch.compile(op, backend="aot_eager", fullgraph=True)(*inputs)
    close(actual, expected)
    close(gradients(actual, inputs), gradients(expected, inputs))


def test_compiled_draws_the_seed_it_is_given():
    torch.compiler.reset()
    x = draw(1, 2, 6, 4)
    compiled = torch.compile(reference.attention, backend="aot_eager", fullgraph=True)
    for seed in (torch.tensor(5), torch.tensor(2**62 + 5), 5, 6):
        options = {"dropout_p": 0.5, "seed": seed}
        close(compiled(x, x, x, **options), reference.attention(x, x, x, **options))
