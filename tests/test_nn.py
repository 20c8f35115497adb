"""LayerNorm, GELU and MultiheadAttention against torch.nn's."""

import copy
import pickle

import pytest
import torch
from budget import DTYPES
from module_checks import assert_equals_torch, assert_module_within_budget
from properties import Recorder
from torch.nn import functional as F
from torch.nn.utils import prune

import fasttx

PAIRS = [
    (torch.nn.LayerNorm, fasttx.nn.LayerNorm, (24,), {}),
    (torch.nn.LayerNorm, fasttx.nn.LayerNorm, ((4, 6),), {"eps": 1e-3}),
    (torch.nn.LayerNorm, fasttx.nn.LayerNorm, (24,), {"elementwise_affine": False}),
    (torch.nn.LayerNorm, fasttx.nn.LayerNorm, (24,), {"bias": False}),
    (torch.nn.GELU, fasttx.nn.GELU, (), {}),
    (torch.nn.GELU, fasttx.nn.GELU, ("tanh",), {}),
]


def randomize(module):
    """Initial biases are zero and initial norms one: neither would show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("theirs", "ours", "args", "kwargs"), PAIRS)
def test_small_modules_within_budget(theirs, ours, args, kwargs, dtype):
    fast = assert_module_within_budget(
        randomize(theirs(*args, **kwargs)),
        {"x": torch.randn(5, 4, 6) if args == ((4, 6),) else torch.randn(2, 3, 24)},
        dtype,
        lambda module, x: module(x),
    )
    assert type(fast) is ours


MHA_OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 12, "vdim": 20},
    {"kdim": 12, "vdim": 20, "batch_first": True, "bias": False},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]
B, TQ, TK, E, H = 3, 5, 7, 16, 4


def masks(kind, batched=True):
    """Keyword arguments by kind; every query keeps its first key, as torch has NaN for those that keep none."""
    padding = torch.rand(B, TK) < 0.4
    two, three = torch.rand(TQ, TK) < 0.4, torch.rand(B * H, TQ, TK) < 0.4
    padding[:, 0] = two[:, 0] = three[:, :, 0] = False
    if not batched:
        padding, three = padding[0], three[:H]
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding.float() * -3},
        "2-D": {"attn_mask": two},
        "3-D": {"attn_mask": three},
        "float 2-D": {"attn_mask": torch.randn(two.shape).bfloat16().float()},
        "float 3-D": {"attn_mask": torch.randn(three.shape).bfloat16().float()},
        "2-D and padding": {"attn_mask": two, "key_padding_mask": padding},
        "3-D and padding": {"attn_mask": three, "key_padding_mask": padding},
        "float 3-D and padding": {
            "attn_mask": torch.randn(three.shape).bfloat16().float(),
            "key_padding_mask": torch.zeros(padding.shape).masked_fill_(padding, -torch.inf),
        },
    }[kind]


MASKS = ["none", "padding", "float padding", "2-D", "3-D", "float 2-D", "float 3-D"]
MASKS += ["2-D and padding", "3-D and padding", "float 3-D and padding"]


def mha_inputs(module, batched=True):
    shapes = [(TQ, module.embed_dim), (TK, module.kdim), (TK, module.vdim)]
    if batched:
        shapes = [(B, t, w) if module.batch_first else (t, B, w) for t, w in shapes]
    names = ("query", "key", "value")
    return {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}


def call_mha(need_weights=True, average=True, **given):
    def run(module, query, key, value):
        cast = {
            name: mask.to(query.dtype) if mask.is_floating_point() else mask
            for name, mask in given.items()
        }
        return module(
            query, key, value, need_weights=need_weights, average_attn_weights=average, **cast
        )

    return run


@pytest.mark.parametrize("options", MHA_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_mha_arguments_and_masks(options, kind):
    module = randomize(torch.nn.MultiheadAttention(E, H, **options))
    inputs = mha_inputs(module)
    assert_equals_torch(module, inputs, call_mha(**masks(kind)))
    assert_equals_torch(module, inputs, call_mha(average=False, **masks(kind)), gradients=False)
    assert_equals_torch(module, inputs, call_mha(False, **masks(kind)))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_mha_unbatched(kind, batch_first):
    module = randomize(torch.nn.MultiheadAttention(E, H, batch_first=batch_first))
    for need_weights in (False, True):
        run = call_mha(need_weights, **masks(kind, batched=False))
        assert_equals_torch(module, mha_inputs(module, batched=False), run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_mha_dtypes_and_shared_inputs(dtype, batch_first):
    module = randomize(torch.nn.MultiheadAttention(48, 4, batch_first=batch_first))
    x, memory = torch.randn(9, 9, 48), torch.randn(9, 9, 48)
    for need_weights in (False, True):
        for run in (
            lambda m, x: m(x, x, x, need_weights=need_weights),  # noqa: B023
            lambda m, x: m(x, memory.to(x), memory.to(x), need_weights=need_weights),  # noqa: B023
        ):
            assert_module_within_budget(module, {"x": x}, dtype, run)
    same = memory.bfloat16().float()  # one tensor for key and value, exact in every dtype
    def shared(module, x):
        keys = same.to(x.dtype)
        return module(x, keys, keys, need_weights=False)[0]
    assert_module_within_budget(module, {"x": x}, dtype, shared)



@pytest.mark.parametrize("training", [False, True])
def test_mha_causal_hint(training):
    module = randomize(torch.nn.MultiheadAttention(E, H, batch_first=True)).train(training)
    x = torch.randn(B, TK, E)
    causal = torch.ones(TK, TK, dtype=torch.bool).triu(1)
    padding = torch.zeros(B, TK, dtype=torch.bool)
    padding[0, 4:] = True
    for extra in ({}, {"key_padding_mask": padding}):
        for need_weights in (False, True):
            assert_equals_torch(
                module, {"x": x},
                lambda m, x: m(
                    x, x, x, attn_mask=causal, is_causal=True, need_weights=need_weights, **extra  # noqa: B023
                ),
            )  # fmt: skip


def test_mha_rows_without_keys_give_zeros():
    module = fasttx.nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, TK, E, requires_grad=True)
    padding = torch.zeros(B, TK, dtype=torch.bool)
    padding[1] = True
    output, weights = module(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(output[1], module.out_proj.bias.expand(TK, E))
    assert (weights[1] == 0).all()
    (output.sum() + weights.sum()).backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("need_weights", [False, True])
def test_mha_dropout(need_weights):
    """Weights are dropped as torch's are: scaled or zero; the seed decides which, and the mean stays."""
    module = fasttx.nn.MultiheadAttention(E, H, dropout=0.25, batch_first=True)
    x = torch.randn(2, 40, E)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return module(x, x, x, need_weights=need_weights, average_attn_weights=False)

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    mean = torch.stack([run(seed)[0] for seed in range(300)]).mean(0)
    module.eval()
    torch.testing.assert_close(mean, run(0)[0], atol=0.05, rtol=0.0)
    if need_weights:
        undropped, dropped = run(0)[1], first[1]
        kept = dropped != 0
        assert 0.70 < kept.float().mean() < 0.80
        torch.testing.assert_close(dropped[kept], undropped[kept] / 0.75)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x[0, 0], x[0, 0], x[0, 0]),
        lambda m, x: m(x, x[0], x[0]),
        lambda m, x: m(x[..., :3], x, x),
        lambda m, x: m(x, x, x[:, :2]),
        lambda m, x: m(x, x[:1], x[:1]),
        lambda m, x: m(x.double(), x.double(), x.double()),
        lambda m, x: m(x, x, x, is_causal=True),
        lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(B, 2, dtype=torch.bool)),
        lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(B, TK, dtype=torch.int64)),
        lambda m, x: m(x, x, x, attn_mask=torch.zeros(2, 2, dtype=torch.bool)),
        lambda m, x: m(x, x, x, attn_mask=torch.zeros(B, TK, TK, dtype=torch.bool)),
        lambda m, x: m(x, x, x, attn_mask=torch.zeros(1, B, TK, TK, dtype=torch.bool)),
    ],
)
def test_mha_refuses_what_torch_refuses(call):
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True)
    ours = fasttx.optimize(copy.deepcopy(theirs))
    x = torch.randn(B, TK, E)
    with pytest.raises(Exception) as expected:  # noqa: B017
        call(theirs, x)
    with pytest.raises(type(expected.value)) as raised:
        call(ours, x)
    assert str(raised.value) == str(expected.value)


def test_mha_without_batch_or_keys():
    module = fasttx.nn.MultiheadAttention(E, H, batch_first=True)
    empty = module(torch.zeros(0, 3, E), torch.zeros(0, 3, E), torch.zeros(0, 3, E))
    assert empty[0].shape == (0, 3, E) and empty[1].shape == (0, 3, 3)
    x, none = torch.randn(2, 3, E), torch.zeros(2, 0, E)
    output, weights = module(x, none, none)
    torch.testing.assert_close(output, module.out_proj.bias.expand(2, 3, E))
    assert weights.shape == (2, 3, 0)


MODULES = [
    lambda nn: nn.LayerNorm(E),
    lambda nn: nn.GELU("tanh"),
    lambda nn: nn.MultiheadAttention(E, H, add_bias_kv=True),
    lambda nn: nn.MultiheadAttention(E, H, kdim=4, vdim=6),
]


@pytest.mark.parametrize("make", MODULES)
def test_same_construction_state_and_copies(make):
    torch.manual_seed(3)
    theirs = make(torch.nn)
    torch.manual_seed(3)
    ours = make(fasttx.nn)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert repr(ours) == repr(theirs)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    ours.load_state_dict(randomize(theirs).state_dict())
    theirs.load_state_dict(ours.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        for name, value in twin.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_mha_outputs_do_not_depend_on_whether_weights_are_wanted(need_weights, p):
    """Weights are those that were applied, in training too: weights @ value is the output."""
    module = fasttx.nn.MultiheadAttention(E, 1, dropout=p, batch_first=True, bias=False).double()
    with torch.no_grad():
        module.in_proj_weight[2 * E :] = module.out_proj.weight.copy_(torch.eye(E))
    x, memory = (torch.randn(B, n, E, dtype=torch.float64, requires_grad=True) for n in (TQ, TK))
    torch.manual_seed(3)
    output, weights = module(x, memory, memory, need_weights=True)
    torch.testing.assert_close(weights @ memory, output)
    torch.manual_seed(3)
    assert torch.equal(module(x, memory, memory, need_weights=need_weights)[0], output)


@pytest.mark.parametrize("average", [False, True])
def test_mha_weights_come_from_the_fused_operation(average):
    """Under gradients and dropout, too."""
    module = fasttx.nn.MultiheadAttention(E, H, dropout=0.1, batch_first=True)
    x, memory = (torch.randn(B, n, E, requires_grad=True) for n in (TK, TQ))
    for inputs, op in (((x, x, x), "self_attention"), ((x, memory, memory), "attention")):
        with Recorder() as recorder:
            output, weights = module(*inputs, average_attn_weights=average)
            (output.sum() + weights.square().sum()).backward()
        names = [name for name, _ in recorder.calls]
        assert set(names) - {"pack_weight", "linear_fwd", "linear_bwd"} == {f"{op}_fwd", f"{op}_bwd"}


@pytest.mark.parametrize("need_weights", [False, True])
def test_mha_is_exported_as_ours(need_weights):
    module = fasttx.nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(B, TK, E)
    exported = torch.export.export(module, (x, x, x), {"need_weights": need_weights})
    assert "fasttx.self_attention_fwd" in str(exported.graph) or "fasttx.attention_fwd" in str(exported.graph)
    called = exported.module()(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(called, module(x, x, x, None, need_weights))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("target", ["in_proj_weight", "out_proj.weight"])
def test_mha_pruned(target, need_weights):
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True)
    child, _, name = target.rpartition(".")
    prune.l1_unstructured(theirs.get_submodule(child), name, amount=0.5)
    x = torch.randn(B, TK, E)
    expected = theirs(x, x, x, None, need_weights)
    ours = fasttx.optimize(theirs)  # in place: torch copies no pruned module
    torch.testing.assert_close(ours(x, x, x, None, need_weights), expected)


def test_mha_tied_moved_and_called_with_other_parameters():
    first, second = (fasttx.nn.MultiheadAttention(E, H, batch_first=True) for _ in range(2))
    second.in_proj_weight, second.out_proj = first.in_proj_weight, first.out_proj
    x = torch.randn(B, TK, E)
    (first(x, x, x)[0] + second(x, x, x)[0]).sum().backward()
    twice = first.in_proj_weight.grad.clone()
    first.zero_grad()
    first(x, x, x)[0].sum().backward()
    torch.testing.assert_close(twice, 2 * first.in_proj_weight.grad)

    others = {name: torch.randn_like(p) for name, p in first.named_parameters()}
    called = torch.func.functional_call(first, others, (x, x, x))
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True)
    theirs.load_state_dict(others)
    torch.testing.assert_close(called, theirs(x, x, x))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = x.to(dtype)
        output, weights = fasttx.optimize(copy.deepcopy(theirs).to(dtype))(y, y, y)
        assert output.dtype == weights.dtype == dtype


def test_hooks_run():
    seen = []
    module = fasttx.nn.LayerNorm(E)
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, output: output * 2)
    x = torch.randn(3, E)
    torch.testing.assert_close(module(x), 2 * F.layer_norm(x, (E,)))
    assert seen == ["before"]


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: fasttx.nn.LayerNorm(E), lambda m, x: m(x)),
        (lambda: fasttx.nn.GELU(), lambda m, x: m(x)),
        (lambda: fasttx.nn.MultiheadAttention(E, H, batch_first=True), lambda m, x: m(x, x, x)[0]),
        (
            lambda: fasttx.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True),
            lambda m, x: m(x),
        ),
    ],
    ids=["LayerNorm", "GELU", "MultiheadAttention", "TransformerEncoderLayer"],
)
def test_compiles_in_one_graph(make, call):
    module, x = make(), torch.randn(2, 5, E, requires_grad=True)
    expected = call(module, x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: call(module, x), fullgraph=True, backend="aot_eager")
    actual = compiled(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x)[0], wanted)
