"""Each instruction set's kernels directly, without the bindings: what they write, and that only."""

import math

import pytest
import torch
from budget import DTYPES, assert_within_budget
from properties import draw, same_bits

from fasttx import reference
from fasttx.dispatch import extension

pytestmark = pytest.mark.usefixtures("needs_extension")

GUARD = 67  # elements on either side that must stay as they are
CODES = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def index_of(dtype):
    """The table's index."""
    return extension.dtypes.index(str(dtype).removeprefix("torch."))


def accumulate(dtype):
    """What statistics and packed operands are kept in."""
    return torch.promote_types(dtype, torch.float32)


class Guarded:
    """Memory for an output: NaN (bytes: 255) in it, before it and after it."""

    def __init__(self, *shape, dtype):
        size = math.prod(shape)
        self.blank = 255 if dtype == torch.uint8 else math.nan
        self.memory = torch.full((size + 2 * GUARD,), self.blank, dtype=dtype)
        self.values = self.memory[GUARD : GUARD + size].view(shape)

    @property
    def address(self):
        return self.values.data_ptr()

    def is_blank(self, values):
        return values == 255 if self.blank == 255 else values.isnan()

    def assert_guards_stand(self):
        assert self.is_blank(self.memory[:GUARD]).all()
        assert self.is_blank(self.memory[-GUARD:]).all()


class Call:
    """One kernel, its arguments, and outputs made anew for every run."""

    def __init__(self, kernel, arguments, isa, dtype, inputs, outputs, **fields):
        self.run_kernel = getattr(extension, f"run_{kernel}")
        self.arguments, self.isa, self.dtype = getattr(extension, arguments), isa, dtype
        self.inputs, self.shapes, self.fields = inputs, outputs, fields

    def run(self, *ranges):
        """The outputs by name after these ranges (begin, end), in this order, and the item count."""
        args = self.arguments()
        outputs = {name: Guarded(*shape, dtype=dt) for name, (shape, dt) in self.shapes.items()}
        addresses = {name: x.data_ptr() for name, x in self.inputs.items()}
        addresses |= {name: x.address for name, x in outputs.items()}
        for name, value in (addresses | self.fields).items():
            setattr(args, name, value)
        for begin, end in ranges:
            items = self.run_kernel(self.isa, index_of(self.dtype), args, begin, end)
        for output in outputs.values():
            output.assert_guards_stand()
        return outputs, items

    def whole(self):
        """The outputs of one run over every item."""
        outputs, _ = self.run((0, -1))
        return {name: output.values for name, output in outputs.items()}


def layer_norm(isa, dtype, width=37):
    rows = 13
    shapes = {"x": (rows, width), "residual": (rows, width), "weight": (width,), "bias": (width,)}
    outputs = dict.fromkeys(("y", "sum"), ((rows, width), dtype))
    dropout = extension.Dropout(5, 2**30, 4 / 3)  # seed, threshold, scale
    inputs = {name: draw(*shape, dtype=dtype) for name, shape in shapes.items()}
    fields = {"rows": rows, "width": width, "eps": 1e-5, "dropout": dropout}
    return Call("layer_norm_fwd", "LayerNormFwd", isa, dtype, inputs, outputs, **fields)


def activation(isa, dtype, rows=13, width=37, bias=True, code=2):
    inputs = {"x": draw(rows, width, dtype=dtype)}
    if bias:
        inputs["bias"] = draw(width, dtype=dtype)
    fields = {"rows": rows, "width": width, "activation": code}
    outputs = {"y": ((rows, width), dtype)}
    return Call("activation_fwd", "ActivationFwd", isa, dtype, inputs, outputs, **fields)


def without_bias(isa, dtype):
    """One long row, which items cut by 4096."""
    return activation(isa, dtype, rows=101, width=173, bias=False)


def packed_by_the_binding(isa, weight, on_vectors=False):
    """What the binding packs on this instruction set; another is in use afterwards."""
    extension.set_isa(isa)
    packed = torch.ops.fasttx.pack_weight(weight, on_vectors)
    extension.set_isa("scalar")
    return packed


def pack_b(isa, dtype, k=71, n=333):
    weight = draw(n, k, dtype=dtype)
    packed = packed_by_the_binding(isa, weight)
    fields = {"k": k, "n": n, "k_stride": 1, "n_stride": k}
    outputs = {"packed": ((packed.numel(),), torch.uint8)}
    return Call("pack_b", "PackB", isa, dtype, {"b": weight}, outputs, **fields)


def gemm(isa, dtype, m=200, k=71, n=333, c_stride=340, on_vectors=False):
    """Rows in two blocks; the result's rows lie further apart than they are long."""
    x, weight = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype)
    packed = packed_by_the_binding(isa, weight, on_vectors)
    inputs = {"a": x, "b": weight, "packed_b": packed, "bias": draw(n, dtype=dtype)}
    fields = {"m": m, "n": n, "k": k, "a_row_stride": k, "a_k_stride": 1, "b_k_stride": 1, "b_n_stride": k}
    fields |= {"threads": 8, "c_stride": c_stride, "on_vectors": on_vectors}
    call = Call("gemm", "Gemm", isa, dtype, inputs, {"c": ((m, c_stride), dtype)}, **fields)
    call.x, call.weight, call.columns = x, weight, n
    return call


def gemm_on_vectors(isa, dtype, m=200, k=71, n=333):
    return gemm(isa, dtype, m, k, n, on_vectors=True)


def layer_norm_bwd(isa, dtype, rows=45, width=37):
    """Several chunks of rows, each with its own line of partial sums."""
    kept, chunks = accumulate(dtype), extension.sum_chunks(rows)
    inputs = {name: draw(rows, width, dtype=dtype) for name in ("dy", "dsum", "x")}
    inputs["weight"] = draw(width, dtype=dtype)
    outputs = dict.fromkeys(("dx", "dinput"), ((rows, width), dtype))
    outputs |= dict.fromkeys(("dweight_partial", "dbias_partial"), ((chunks, width), kept))
    fields = {"rows": rows, "width": width, "partial_stride": width, "eps": 1e-5}
    fields["dropout"] = extension.Dropout(5, 2**30, 4 / 3)
    return Call("layer_norm_bwd", "LayerNormBwd", isa, dtype, inputs, outputs, **fields)


def reduce_rows(isa, dtype, rows=13, width=101):
    inputs = {"partial": draw(rows, width, dtype=accumulate(dtype))}
    fields = {"rows": rows, "width": width, "row_stride": width}
    return Call("reduce_rows", "ReduceRows", isa, dtype, inputs, {"out": ((width,), dtype)}, **fields)


def reduce_rows_to_two(isa, dtype, rows=13, width=101):
    """The first two vectors of columns to one output, the others to another."""
    split = 2 * {"scalar": 1, "avx2": 8}.get(isa, 16)
    if isa != "scalar" and dtype == torch.float64:
        split //= 2
    call = reduce_rows(isa, dtype, rows, width)
    call.shapes = {"out": ((split,), dtype), "tail": ((width - split,), dtype)}
    call.fields["split"] = split
    return call


def column_sum(isa, dtype, rows=45, width=37, stride=40):
    inputs, chunks = {"x": draw(rows, stride, dtype=dtype)}, extension.sum_chunks(rows)
    outputs = {"partial": ((chunks, width), accumulate(dtype))}
    fields = {"rows": rows, "width": width, "x_stride": stride}
    return Call("column_sum", "ColumnSum", isa, dtype, inputs, outputs, **fields)


def activation_bwd(isa, dtype, rows=13, width=37):
    inputs = {name: draw(rows, width, dtype=dtype) for name in ("dy", "x")}
    inputs["bias"] = draw(width, dtype=dtype)
    fields = {"rows": rows, "width": width, "activation": CODES["gelu"]}
    outputs = {"dx": ((rows, width), dtype)}
    return Call("activation_bwd", "ActivationBwd", isa, dtype, inputs, outputs, **fields)


def softmax_fwd(isa, dtype, shape=(2, 3, 5, 37)):
    fields = dict(zip(("batch", "heads", "queries", "width"), shape, strict=True)) | {"is_causal": True}
    inputs = {"x": draw(*shape, dtype=dtype)}
    return Call("softmax_fwd", "SoftmaxFwd", isa, dtype, inputs, {"y": (shape, dtype)}, **fields)


def softmax_bwd(isa, dtype, rows=13, width=37):
    inputs = {name: draw(rows, width, dtype=dtype) for name in ("dy", "y")}
    outputs = {"dx": ((rows, width), dtype)}
    return Call("softmax_bwd", "SoftmaxBwd", isa, dtype, inputs, outputs, rows=rows, width=width)


def strides(*sizes):
    """Of a dense (batch, heads, tokens, width)."""
    value = extension.Strides()
    value.b, value.h, value.t = sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3]
    return value


def attention(arguments, batch, heads, queries, keys, width):
    """Arguments of the forward or the backward for dense tensors, causal, with dropout."""
    shape = extension.AttentionShape()
    sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "queries": queries, "keys": keys}
    sizes |= {"width": width, "value_width": width, "window_left": -1, "window_right": -1}
    options = {"is_causal": True, "scale": 0.3, "dropout": extension.Dropout(5, 2**30, 4 / 3)}
    for name, value in (sizes | options).items():
        setattr(shape, name, value)
    fields = {"shape": shape}
    for name in arguments:
        fields[f"{name}_strides"] = strides(batch, heads, keys if name[-1] in "kv" else queries, width)
    return fields


def attention_fwd(isa, dtype, batch=3, heads=2, queries=50, keys=70, width=24):
    kept = accumulate(dtype)
    inputs = {"q": draw(batch, heads, queries, width, dtype=dtype)}
    inputs |= {name: draw(batch, heads, keys, width, dtype=dtype) for name in "kv"}
    outputs = {"out": ((batch, heads, queries, width), dtype)}
    outputs |= {"lse": ((batch, heads, queries), kept), "stats": ((batch, heads, queries, 2), kept)}
    fields = attention(("q", "k", "v", "out"), batch, heads, queries, keys, width)
    return Call("attention_fwd", "AttentionFwd", isa, dtype, inputs, outputs, **fields)


def attention_bwd(isa, dtype, batch=3, heads=2, queries=50, keys=70, width=24):
    forward = attention_fwd(isa, dtype, batch, heads, queries, keys, width)
    found = forward.whole()
    inputs = forward.inputs | {"out": found["out"], "stats": found["stats"]}
    inputs["dout"] = draw(batch, heads, queries, width, dtype=dtype)
    outputs = {"dq": ((batch, heads, queries, width), dtype)}
    outputs |= dict.fromkeys(("dk", "dv"), ((batch, heads, keys, width), dtype))
    names = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    fields = attention(names, batch, heads, queries, keys, width)
    return Call("attention_bwd", "AttentionBwd", isa, dtype, inputs, outputs, **fields)


def attention_bias_bwd(isa, dtype, batch=3, heads=2, queries=300, keys=140, width=24):
    """A mask for each head, of which a sequence and a row of keys have one."""
    backward = attention_bwd(isa, dtype, batch, heads, queries, keys, width)
    mask, kept = torch.zeros(heads, queries, dtype=accumulate(dtype)), accumulate(dtype)
    shape, stride = backward.fields["shape"], extension.Mask()
    stride.data, stride.kind, stride.wide, stride.stride_h, stride.stride_q = mask.data_ptr(), 2, True, queries, 1
    shape.mask = stride
    fields = backward.fields | {"mask_batch": 1, "mask_heads": heads, "mask_queries": queries, "mask_keys": 1}
    outputs = {"dmask": ((1, heads, queries, 1), kept)}
    call = Call("attention_bias_bwd", "AttentionBiasBwd", isa, dtype, backward.inputs, outputs, **fields)
    call.mask = mask  # which the shape points to
    return call


def attention_alibi_bwd(isa, dtype):
    backward = attention_bwd(isa, dtype)
    fields = backward.fields
    slopes = torch.rand(fields["shape"].heads).to(accumulate(dtype))
    fields["shape"].alibi_slopes = slopes.data_ptr()
    outputs = {"dslopes_partial": ((fields["shape"].batch, fields["shape"].heads), accumulate(dtype))}
    call = Call("attention_alibi_bwd", "AttentionAlibiBwd", isa, dtype, backward.inputs, outputs, **fields)
    call.slopes = slopes  # which the shape points to
    return call


def attention_weights_fwd(isa, dtype, averages=False, batch=3, heads=2, queries=300, keys=140):
    """On what the forward left, without dout."""
    backward = attention_bwd(isa, dtype, batch, heads, queries, keys)
    inputs = {name: x for name, x in backward.inputs.items() if name != "dout"}
    outputs = {"weights": ((batch, *(() if averages else (heads,)), queries, keys), dtype)}
    fields = backward.fields | {"averages": averages}
    return Call("attention_weights_fwd", "AttentionWeightsFwd", isa, dtype, inputs, outputs, **fields)


def attention_weights_mean(isa, dtype):
    return attention_weights_fwd(isa, dtype, averages=True)


def attention_weights_bwd(isa, dtype):
    call = attention_weights_mean(isa, dtype)
    inputs = call.inputs | {"dweights": draw(*call.shapes["weights"][0], dtype=dtype)}
    outputs = {"dlse_total": (call.inputs["stats"].shape[:-1], accumulate(dtype))}
    return Call("attention_weights_bwd", "AttentionWeightsBwd", isa, dtype, inputs, outputs, **call.fields)


KERNELS = (
    layer_norm, layer_norm_bwd, reduce_rows, reduce_rows_to_two, column_sum, activation, without_bias, activation_bwd,
    softmax_fwd, softmax_bwd, pack_b, gemm, gemm_on_vectors, attention_fwd, attention_bwd,
    attention_bias_bwd, attention_alibi_bwd, attention_weights_fwd, attention_weights_mean, attention_weights_bwd,
)  # fmt: skip
every_kernel = pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)


def cuts(items):
    """The range in pieces, last first, of one item, two, and more."""
    points = sorted({0, 1, 3, items // 2, items - 1, items} & set(range(items + 1)))
    return list(zip(points, points[1:], strict=False))[::-1]


@every_kernel
@every_dtype
def test_a_range_in_pieces_gives_the_same_bits(isa, dtype, make):
    call = make(isa, dtype)
    whole, items = call.run((0, -1))
    assert items >= 4 and len(cuts(items)) >= 3
    pieces, _ = call.run(*cuts(items))
    singles, _ = call.run(*((i, i + 1) for i in range(items)))
    for name, output in whole.items():
        assert same_bits(pieces[name].values, output.values), name
        assert same_bits(singles[name].values, output.values), name


@every_kernel
@every_dtype
def test_a_range_writes_its_items_and_no_others(isa, dtype, make):
    """What one range writes is blank after the others, and the two make up the whole."""
    call = make(isa, dtype)
    whole, items = call.run((0, -1))
    inside, _ = call.run((1, 3), (2, 2))
    outside, _ = call.run((0, 1), (3, items))
    for name, output in whole.items():
        ours, theirs = inside[name].values, outside[name].values
        if make is pack_b:  # a byte may be 255 by itself
            both = torch.where(ours == 255, theirs, ours)
        else:
            written = ~ours.isnan()
            assert written.any() and theirs[written].isnan().all(), name
            both = torch.where(written, ours, theirs)
        assert same_bits(both, output.values), name
    nothing, _ = call.run((0, 0), (items, items))
    assert all(output.is_blank(output.memory).all() for output in nothing.values())


@every_dtype
def test_sums_by_blocks_are_those_of_all_rows(isa, dtype, rows=45, width=37, block=16):
    """Blocks summed in place, then their sums: the bits of one sum over every row."""
    kept, partial = accumulate(dtype), draw(rows, width, dtype=accumulate(dtype))

    def reduce(out, source, count, stride, to):
        args = extension.ReduceRows()
        args.partial, args.out, args.rows, args.width, args.row_stride = source, out.data_ptr(), count, width, stride
        extension.run_reduce_rows(isa, index_of(to), args)
        return out

    whole = reduce(torch.empty(width, dtype=dtype), partial.data_ptr(), rows, width, dtype)
    for first in range(0, rows, block):
        reduce(partial[first], partial[first].data_ptr(), min(block, rows - first), width, kept)
    blocks = reduce(torch.empty(width, dtype=dtype), partial.data_ptr(), -(-rows // block), block * width, dtype)
    assert same_bits(blocks, whole)


@every_dtype
def test_layer_norm_writes_every_element(isa, dtype):
    call = layer_norm(isa, dtype)
    found = call.whole()
    assert all(x.isfinite().all() for x in found.values())
    given = call.inputs
    truth, total = reference.add_layer_norm(
        *(given[name].double() for name in ("x", "residual")), (37,),
        given["weight"].double(), given["bias"].double(),
        dropout_p=0.25, training=True, return_sum=True, seed=5,
    )  # fmt: skip
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found["y"].double(), truth, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(found["sum"].double(), total, rtol=tolerance, atol=tolerance)


@every_dtype
@pytest.mark.parametrize("name", CODES)
def test_activation_writes_every_element(isa, dtype, name):
    call = activation(isa, dtype, code=CODES[name])
    functions = {
        "none": lambda x: x,
        "relu": torch.relu,
        "gelu": reference.gelu,
        "gelu_tanh": lambda x: reference.gelu(x, "tanh"),
    }
    truth = functions[name](call.inputs["x"].double() + call.inputs["bias"].double())
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-14)
    found = call.whole()["y"].double()
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@every_dtype
def test_pack_b_is_what_the_binding_packs(isa, dtype):
    """Padding included: no byte is left as it was."""
    call = pack_b(isa, dtype)
    found = call.whole()["packed"]
    assert torch.equal(found, packed_by_the_binding(isa, call.inputs["b"]))


@every_dtype
def test_gemm_writes_its_columns_only(isa, dtype):
    call = gemm(isa, dtype)
    found = call.whole()["c"]
    assert found[:, call.columns :].isnan().all()
    extension.set_isa(isa)
    expected = torch.ops.fasttx.linear_fwd(call.x, call.weight, call.inputs["bias"], None)
    assert same_bits(found[:, : call.columns], expected)
    truth = reference.linear(call.x.double(), call.weight.double(), call.inputs["bias"].double())
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(expected.double(), truth, rtol=tolerance, atol=8 * tolerance)


@every_dtype
@pytest.mark.parametrize("k", [1, 71, 300])
def test_gemm_on_vectors(isa, dtype, k):
    """Within the error budget, each row by itself, and where nothing comes in parts the bits of every product."""
    call = gemm_on_vectors(isa, dtype, m=19, k=k)
    found = call.whole()["c"][:, : call.columns]
    bias = call.inputs["bias"]
    operands = (call.x, call.weight, bias)
    narrow = (x.float() for x in operands) if dtype == torch.float64 else operands
    assert_within_budget(
        actual=found, eager=torch.nn.functional.linear(*narrow),
        truth=reference.linear(*(x.double() for x in operands)),
        eager_truth=reference.linear(*(x.float().double() for x in operands)) if dtype == torch.float64 else None,
    )  # fmt: skip
    row = gemm_on_vectors(isa, dtype, m=1, k=k)
    row.inputs |= call.inputs | {"a": call.x[:1].clone()}
    assert same_bits(row.whole()["c"][:, : call.columns], found[:1])
    extension.set_isa(isa)
    if isa != "amx_float32" or dtype not in (torch.float32, torch.float16):
        assert same_bits(found, torch.ops.fasttx.linear_fwd(call.x, call.weight, bias, None))


@pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [-1, 4, 100])
def test_a_wrong_dtype_raises(make, dtype):
    call = make("scalar", torch.float32)
    with pytest.raises(ValueError, match="dtype"):
        call.run_kernel("scalar", dtype, call.arguments())


@pytest.mark.parametrize("name", ["", "sse9", "AVX2"])
def test_an_unknown_instruction_set_raises(name):
    """The message names it and those that can be had; what is in use stays."""
    before = extension.isa()
    for call in (
        lambda: extension.set_isa(name),
        lambda: extension.run_gemm(name, 0, extension.Gemm()),
    ):
        with pytest.raises(ValueError, match=f"'{name}'.*scalar"):
            call()
    assert extension.isa() == before


@pytest.mark.parametrize("begin, end", [(-1, 2), (3, 2), (0, 14), (14, -1)])
def test_a_range_outside_the_items_raises(begin, end):
    with pytest.raises(ValueError, match="13 items"):
        layer_norm("scalar", torch.float32).run((begin, end))


def test_arguments_of_another_kernel_raise():
    with pytest.raises(TypeError):
        extension.run_gemm("scalar", 0, extension.PackB())


def test_an_unknown_activation_raises():
    with pytest.raises(RuntimeError, match="activation"):
        extension.ActivationFwd().activation = 4


def test_the_instruction_set_in_use_is_the_one_that_was_set(isa):
    assert extension.isa() == isa
    assert (isa, True) in extension.isas()
