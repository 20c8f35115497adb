"""What PyTorch asks of an op: traced, exported, loaded, checkpointed, on the meta device, without aliases."""

import copy
import io
from functools import partial

import pytest
import torch
from test_raw_ops import RAW
from torch.export import Dim
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fasttx
from fasttx import functional

pytestmark = pytest.mark.usefixtures("needs_extension")
W, S, H = 8, 24, 2
# (batch, length), of numbers that no other size has: the tracer takes equal ones for the same.
SIZES = ((3, 5), (4, 7))


def raw(name):
    return getattr(torch.ops.fasttx, name).default


def move(arguments, change):
    return {name: change(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("name", RAW)
def test_opcheck(name):
    """Schema, fake kernel, autograd registration, and tracing with symbolic shapes."""
    differentiable = name.endswith("_fwd")
    arguments = move(
        RAW[name][0], lambda x: x.detach().clone().requires_grad_(differentiable and x.is_floating_point())
    )
    torch.library.opcheck(raw(name), (), arguments)


@pytest.mark.parametrize("name", RAW)
def test_no_result_shares_memory_with_an_argument(name):
    arguments = RAW[name][0]
    results = pytree.tree_leaves(raw(name)(**arguments))
    given = {x.untyped_storage().data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}
    places = [x.untyped_storage().data_ptr() for x in results if x.numel()]
    assert not given.intersection(places)
    assert len(set(places)) == len(places)


# How long a packed weight is, only its instruction set knows.
@pytest.mark.parametrize("name", [name for name in RAW if name != "pack_weight"])
def test_meta_tensors_have_the_layout_of_real_ones(name):
    arguments = RAW[name][0]
    real = pytree.tree_leaves(raw(name)(**arguments))
    meta = pytree.tree_leaves(raw(name)(**move(arguments, lambda x: x.to("meta"))))
    for x, y in zip(real, meta, strict=True):
        assert y.is_meta
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())


def rows(*shapes):
    return lambda batch, length: [(batch, length, W), *shapes]


def heads(count):
    return lambda batch, length: [(batch, H, length, W)] * count


CALLS = {
    "layer_norm": (lambda x, w, b: functional.layer_norm(x, (W,), w, b), rows((W,), (W,))),
    "add_layer_norm": (
        lambda x, w, b: functional.add_layer_norm(x, x.sin(), (W,), w, b, return_sum=True), rows((W,), (W,)),
    ),
    "gelu": (functional.gelu, rows()),
    "bias_gelu": (functional.bias_gelu, rows((W,))),
    "softmax": (functional.softmax, rows()),
    "causal softmax": (partial(functional.softmax, is_causal=True), heads(1)),
    "linear": (functional.linear, rows((S, W), (S,))),
    "feed_forward": (functional.feed_forward, rows((S, W), (S,), (W, S), (W,))),
    "attention": (partial(functional.attention, is_causal=True, return_lse=True), heads(3)),
    "attention of a window": (partial(functional.attention, window=(2, 1)), heads(3)),
}  # fmt: skip
DROPPED = {
    "add_layer_norm": (
        lambda x, w: functional.add_layer_norm(x, x, (W,), w, dropout_p=0.5, training=True), rows((W,)),
    ),
    "feed_forward": (
        partial(functional.feed_forward, dropout_p=0.5, training=True), rows((S, W), (S,), (W, S), (W,)),
    ),
    "attention": (partial(functional.attention, dropout_p=0.5), heads(3)),
}  # fmt: skip


def draw(shapes, size, requires_grad=True):
    return [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes(*size)]


def evaluate(call, inputs):
    """Outputs and gradients."""
    outputs = pytree.tree_leaves(call(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted:
        return outputs
    slopes = [torch.linspace(-1.0, 1.0, x.numel()).view(x.shape) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, slopes)]


def compiled(call):
    """The call in one graph that no further size compiles again."""
    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    calls = 0

    def run(*inputs, **options):
        nonlocal calls
        calls += 1
        stance = "default" if calls == 1 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            return function(*inputs, **options)

    return run


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_one_compiled_graph_serves_every_size(name, grad):
    call, shapes = CALLS[name]
    traced = compiled(call)
    for size in SIZES:
        inputs = draw(shapes, size, grad)
        for actual, expected in zip(evaluate(traced, inputs), evaluate(call, inputs), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", DROPPED)
def test_compiled_dropout_is_that_of_the_seed(name):
    call, shapes = DROPPED[name]
    traced = compiled(call)
    inputs, found = draw(shapes, SIZES[0]), []
    for function in (call, traced):
        torch.manual_seed(3)
        found.append(evaluate(function, inputs))
    assert all(map(torch.equal, *found))


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return self.call(*inputs)


def reloaded(module, inputs, dynamic_shapes):
    """The module exported, saved and loaded."""
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic_shapes)
    assert any("fasttx" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("name", CALLS)
def test_exported_saved_and_loaded(name):
    call, shapes = CALLS[name]
    inputs = draw(shapes, SIZES[0], False)
    batch, length = Dim("batch"), Dim("length")
    dims = {3: {0: batch, 1: length}, 4: {0: batch, 2: length}}
    loaded = reloaded(Module(call), inputs, {"inputs": tuple(dims.get(x.dim()) for x in inputs)})
    for size in SIZES:
        inputs = draw(shapes, size, False)
        for actual, expected in zip(evaluate(loaded, inputs), evaluate(call, inputs), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode(name):
    call, shapes = CALLS[name]
    inputs = draw(shapes, SIZES[0], False)
    expected = pytree.tree_leaves(call(*inputs))
    with torch.inference_mode():
        actual = pytree.tree_leaves(call(*inputs))
        of_inference_tensors = pytree.tree_leaves(call(*(x.clone() for x in inputs)))
    assert all(x.is_inference() for x in actual)
    assert all(map(torch.equal, actual, expected)) and all(map(torch.equal, of_inference_tensors, expected))


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused_with_the_way_out(name):
    call, shapes = CALLS[name]
    inputs = draw(shapes, SIZES[0])
    outputs = pytree.tree_leaves(call(*inputs))
    first = torch.autograd.grad([x.square().sum() for x in outputs], inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again.*reference"):
        torch.autograd.grad([x.square().sum() for x in first], inputs)
    with fasttx.backend("reference"):
        outputs = pytree.tree_leaves(call(*inputs))
    first = torch.autograd.grad([x.square().sum() for x in outputs], inputs, create_graph=True)
    torch.autograd.grad([x.square().sum() for x in first], inputs)


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_same_dropout(name, reentrant):
    call, shapes = DROPPED[name]
    inputs, found = draw(shapes, SIZES[0]), []
    for kept in (call, lambda *x: checkpoint(call, *x, use_reentrant=reentrant)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.manual_seed(5)
        output = kept(*leaves)
        output.square().sum().backward()
        found.append([output, *(x.grad for x in leaves)])
    assert all(map(torch.equal, *found))


MODULES = {
    "attention": (fasttx.nn.MultiheadAttention, {}, 3),
    "encoder layer": (fasttx.nn.TransformerEncoderLayer, {"dim_feedforward": S}, 1),
    "pre-norm layer": (fasttx.nn.TransformerEncoderLayer, {"dim_feedforward": S, "norm_first": True}, 1),
    "decoder layer": (fasttx.nn.TransformerDecoderLayer, {"dim_feedforward": S}, 2),
}


def module(name, **options):
    make, given, inputs = MODULES[name]
    return make(W, H, dropout=0.0, batch_first=True, **given, **options), inputs


@pytest.mark.parametrize("name", [*MODULES, "attention and its weights"])
@pytest.mark.parametrize("train", [True, False])
def test_one_compiled_graph_of_a_module_serves_every_size(name, train):
    layer, inputs = module(name.removesuffix(" and its weights"))
    layer.train(train).requires_grad_(train)
    options = {"need_weights": name != "attention"} if name.startswith("attention") else {}

    def call(x, *parameters):
        return [y for y in pytree.tree_leaves(layer(*(x,) * inputs, **options)) if y is not None]

    traced = compiled(call)
    for size in SIZES:
        x = torch.randn(*size, W, requires_grad=train)
        given = (x, *layer.parameters()) if train else (x,)
        for actual, expected in zip(evaluate(traced, given), evaluate(call, given), strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_compiled_encoder_with_padding():
    layer = torch.nn.TransformerEncoderLayer(W, H, S, 0.0, batch_first=True)
    encoder = fasttx.optimize(torch.nn.TransformerEncoder(layer, 2)).eval()
    traced = compiled(encoder)
    for batch, length in SIZES:
        x = torch.randn(batch, length, W)
        padding = torch.arange(length) >= torch.arange(2, 2 + batch)[:, None]
        actual, expected = (f(x, src_key_padding_mask=padding) for f in (traced, encoder))
        torch.testing.assert_close(actual[~padding], expected[~padding])


def test_inductor():
    """The default backend, once: its code around the kernels gives what eager gives."""
    torch._dynamo.reset()
    layer, _ = module("encoder layer")
    x = torch.randn(2, 5, W, requires_grad=True)
    given = (x, *layer.parameters())
    fast = torch.compile(layer, fullgraph=True)
    actual = evaluate(lambda x, *parameters: fast(x), given)
    torch.testing.assert_close(actual, evaluate(lambda x, *parameters: layer(x), given))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_made_on_the_meta_device(name):
    real, inputs = module(name)
    torch.set_default_device("meta")
    try:
        empty, _ = module(name)
    finally:
        torch.set_default_device(None)
    assert all(parameter.is_meta for parameter in empty.parameters())
    x = torch.randn(2, 5, W)
    shapes = [y.shape for y in pytree.tree_leaves(empty(*(x.to("meta"),) * inputs)) if y is not None]
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(real.state_dict())
    actual, expected = (pytree.tree_leaves(m(*(x,) * inputs)) for m in (filled, real))
    assert [y.shape for y in expected] == shapes
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_module(name, reentrant):
    layer, inputs = module(name)
    for child in layer.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.5
    x, found = torch.randn(2, 5, W), []

    def call(x):
        return pytree.tree_leaves(layer(*(x,) * inputs))[0]

    for kept in (call, partial(checkpoint, call, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(7)
        output = kept(leaf)
        output.square().sum().backward()
        found.append([output, leaf.grad, *(copy.deepcopy(p.grad) for p in layer.parameters())])
    # Not bit for bit: the first, discarded forward of a reentrant checkpoint has no gradient, and so other steps.
    torch.testing.assert_close(*found)


def test_a_module_exported_saved_and_loaded():
    layer, _ = module("encoder layer")
    layer.eval()
    loaded = reloaded(layer, (torch.randn(2, 5, W),), ({0: Dim("batch"), 1: Dim("length")},))
    for size in SIZES:
        x = torch.randn(*size, W)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), layer(x))


EXPORTED = {
    "attention": (lambda: torch.nn.MultiheadAttention(16, 2, batch_first=True), 3),
    "post-norm layer": (lambda: torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1),
    "pre-norm layer": (lambda: torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True), 1),
    "decoder layer": (lambda: torch.nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 2),
}


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_without_gradients(name):
    """It runs where gradients are on, and only a gradient is refused, with the way out."""
    make, times = EXPORTED[name]
    module, x = fasttx.optimize(make().eval()), torch.randn(2, 5, 16)
    with torch.no_grad():
        program = torch.export.export(module, (x,) * times).module()
        expected = module(*(x,) * times)
    output = program(*(x,) * times)
    torch.testing.assert_close(output, expected)
    output = output[0] if isinstance(output, tuple) else output
    with pytest.raises(RuntimeError, match="kept nothing for a gradient: .*trace it with gradients"):
        output.sum().backward()
    program = torch.export.export(module, (x,) * times).module()
    output = program(*(x,) * times)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
