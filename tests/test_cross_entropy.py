"""A linear layer and the cross-entropy of its output: the CPU kernels against float64, and the public function."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, assert_within_budget, poisoned
from properties import (
    assert_compiles,
    assert_gradients_of_any_layout,
    assert_gradients_only_where_asked,
    assert_refuses_second_derivatives,
    assert_same_bits,
    assert_threads_do_not_matter,
    assert_within_budget_on_every_isa,
    draw,
    results,
)
from torch.autograd import gradcheck

import fasttx
from fasttx import functional, reference
from fasttx.ops import cross_entropy as ops

pytestmark = pytest.mark.usefixtures("needs_extension")

IGNORED = -100
CPU = partial(functional.linear_cross_entropy, backend="cpu")


def targets(rows, classes, ignored=3):
    """The class of every row; each third one, or so, is ignored."""
    target = torch.randint(0, classes, rows)
    if ignored:
        target.view(-1)[::ignored] = IGNORED
    return target


def problem(rows, width, classes, dtype=torch.float64, bias=True):
    inputs = {"input": draw(*rows, width), "weight": draw(classes, width) / width**0.5}
    inputs |= {"bias": draw(classes)} if bias else {}
    return {name: x.to(dtype) for name, x in inputs.items()}


def of(function, target, **options):
    """The function of the floating tensors alone."""
    return lambda input, weight, bias=None: function(input, weight, target, bias, **options)


def eager(input, weight, target, bias=None, **options):
    logits = F.linear(input, weight, bias)
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def check(inputs, target, dtype, **options):
    options = {"reduction": "none"} | options
    assert_within_budget_on_every_isa(
        of(CPU, target, **options),
        eager=of(eager, target, **options),
        reference=of(reference.linear_cross_entropy, target, **options),
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_within_budget(dtype, smoothing):
    check(problem((3, 23), 40, 77), targets((3, 23), 77), dtype, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_of_classes(dtype):
    check(problem((37,), 24, 2500), targets((37,), 2500), dtype, label_smoothing=0.2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_several_tiles_of_rows(dtype):
    target = targets((2300,), 1100, ignored=50)
    inputs = problem((2300,), 8, 1100)
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    wide = {name: x.double() for name, x in rounded.items()}
    truth = results(of(reference.linear_cross_entropy, target, reduction="none"), wide)
    theirs = results(of(eager, target, reduction="none"), rounded)
    with poisoned():
        ours = results(of(CPU, target, reduction="none"), rounded)
    for name, true in truth.items():
        error, budget = ((x[name].double() - true).abs().max() for x in (ours, theirs))
        assert error <= 2 * budget + torch.finfo(dtype).eps * true.abs().max(), name


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_reductions(isa, dtype, reduction):
    inputs, target = problem((50,), 24, 60, torch.float32), targets((50,), 60)
    given, wide = ({name: x.to(kind) for name, x in inputs.items()} for kind in (dtype, torch.float64))
    call = partial(of, target=target, label_smoothing=0.1)
    ours = results(call(CPU, reduction=reduction), given)
    theirs = results(call(eager, reduction=reduction), inputs)
    truth = results(call(reference.linear_cross_entropy, reduction=reduction), wide)
    # One number's error in eager PyTorch is a matter of luck. Ours: additions in float64, and a result that is rounded.
    losses = call(CPU, reduction="none")(**given).double()
    divisor = int((target != -100).sum()) if reduction == "mean" else 1
    total, size = (math.fsum(x.tolist()) / divisor for x in (losses, losses.abs()))
    allowed = torch.finfo(dtype).eps * abs(total) + len(losses) * torch.finfo(torch.float64).eps * size
    assert abs(ours["output 0"].item() - total) <= allowed
    for name in (f"d {name}" for name in inputs):
        assert_within_budget(actual=ours[name], eager=theirs[name], truth=truth[name], name=name)


def test_the_reference_is_torchs():
    inputs, target = problem((4, 9), 16, 30), targets((4, 9), 30)
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.3, 1.0):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            ours, theirs = (results(of(f, target, **options), inputs) for f in (reference.linear_cross_entropy, eager))
            for name, x in ours.items():
                torch.testing.assert_close(x, theirs[name])


@pytest.mark.parametrize("kind", ("strided", "transposed weight", "offset"))
def test_layouts(isa, kind):
    inputs, target = problem((4, 9), 24, 40, torch.float32), targets((4, 9), 40)
    dense = results(of(CPU, target), inputs)
    if kind == "strided":
        inputs["input"] = inputs["input"].repeat_interleave(2, -1)[..., ::2]
    elif kind == "offset":
        inputs["input"] = F.pad(inputs["input"], (1, 0))[..., 1:]
    else:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    assert_same_bits(results(of(CPU, target), inputs), dense)


def test_targets_of_any_layout(isa):
    inputs, target = problem((4, 9), 24, 40, torch.float32), targets((9, 4), 40)
    expected = results(of(CPU, target.t().contiguous()), inputs)
    assert_same_bits(results(of(CPU, target.t()), inputs), expected)
    assert_same_bits(results(of(CPU, target.t().int()), inputs), expected)


def test_layouts_of_incoming_gradients(isa):
    target = targets((4, 9), 40)
    assert_gradients_of_any_layout(of(CPU, target, reduction="none"), problem((4, 9), 24, 40, torch.float32))


@pytest.mark.parametrize("smoothing", (0.0, 0.3))
def test_gradcheck(smoothing):
    inputs, target = problem((7,), 5, 11), targets((7,), 11)
    for reduction in ("none", "mean"):
        op = of(CPU, target, reduction=reduction, label_smoothing=smoothing)
        assert gradcheck(op, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_threads_do_not_matter(isa, threads, dtype):
    target = targets((130,), 1500)
    for reduction in ("none", "mean"):
        op = of(CPU, target, reduction=reduction, label_smoothing=0.1)
        assert_threads_do_not_matter(op, problem((130,), 40, 1500, dtype), threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    inputs, target = problem((620,), 40, 1100, dtype), targets((620,), 1100)
    weight, bias = inputs["weight"], inputs["bias"]

    def run(x, target):
        return results(of(CPU, target, reduction="none"), {"input": x, "weight": weight, "bias": bias}, ["input"])

    together = run(inputs["input"], target)
    cuts = [1, 19, 600]
    parts = [run(x, t) for x, t in zip(inputs["input"].split(cuts), target.split(cuts), strict=True)]
    # Of the slopes, every part has the first ones.
    assert torch.equal(together["output 0"], torch.cat([part["output 0"] for part in parts]))
    assert torch.equal(together["d input"][:1], parts[0]["d input"])


def test_ignored_rows(isa):
    """They have loss 0 and no gradient, whatever is in them; any index may be the one that is ignored."""
    inputs, target = problem((12,), 16, 20, torch.float32), targets((12,), 20, ignored=0)
    target[[0, 5, 6]] = 7
    counted = target != 7
    inputs["input"][~counted] = torch.nan
    with poisoned():
        found = results(of(CPU, target, ignore_index=7, reduction="none"), inputs)
        mean = of(CPU, target, ignore_index=7)(**inputs)
    assert not found["output 0"][~counted].any() and not found["d input"][~counted].any()
    alone = {**inputs, "input": inputs["input"][counted]}
    losses = of(CPU, target[counted], reduction="none")(**alone)
    assert torch.equal(found["output 0"][counted], losses)
    assert found["d weight"].isfinite().all()
    torch.testing.assert_close(mean, losses.mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (0, 4))
def test_nothing_counts(isa, rows, dtype):
    inputs, nothing = problem((rows,), 24, 20, dtype), torch.full((rows,), IGNORED)
    with poisoned():
        assert of(CPU, nothing)(**inputs).isnan()
        found = results(of(CPU, nothing, reduction="sum"), inputs)
    assert not any(x.any() for x in found.values())


def test_infinite_logits(isa):
    x, weight = torch.ones(3, 16), torch.zeros(6, 16)
    bias, target = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf, 2.0, 0.5]), torch.tensor([0, 1, 4])
    loss = CPU(x, weight, target, bias, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight, bias), target, reduction="none"))
    assert not CPU(x, weight, target, bias.abs(), reduction="none").isfinite().any()
    assert not CPU(x, weight, target, torch.full((6,), -torch.inf), reduction="none").isfinite().any()


def test_values_that_are_not_finite_stay_in_their_row(isa):
    inputs, target = problem((9,), 24, 1500, torch.float32), targets((9,), 1500, ignored=0)
    expected = of(CPU, target, reduction="none")(**inputs)
    inputs["input"][4, 3] = torch.nan
    found = of(CPU, target, reduction="none")(**inputs)
    assert found[4].isnan()
    others = torch.arange(9) != 4
    assert torch.equal(found[others], expected[others])


def test_large_logits(isa):
    """Sums are kept relative to the largest logit, of whichever tile."""
    x, weight = torch.eye(3, 8), torch.zeros(2100, 8)
    weight[5, 0], weight[2000, 0], weight[2099, 1], weight[1500, 2] = 3e4, 2.9e4, 5e4, -5e4
    target = torch.tensor([5, 2099, 1500])
    torch.testing.assert_close(
        CPU(x, weight, target, reduction="none"), F.cross_entropy(F.linear(x, weight), target, reduction="none")
    )


def test_a_weight_that_is_an_embeddings_too(isa):
    weight, tokens = torch.randn(50, 16).requires_grad_(), torch.randint(0, 50, (2, 9))

    def loss(entry, function):
        x = F.embedding(tokens[:, :-1], entry)
        return function(x, entry, tokens[:, 1:])

    ours, theirs = (torch.autograd.grad(loss(weight, f), weight)[0] for f in (CPU, eager))
    torch.testing.assert_close(ours, theirs)


def test_compiles():
    target = targets((2, 9), 40)
    assert_compiles(of(functional.linear_cross_entropy, target), problem((2, 9), 24, 40, torch.float32))


def test_compiles_with_symbolic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(functional.linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8, 21):
        inputs, target = problem((rows,), 24, 40, torch.float32), targets((rows,), 40)
        expected = of(functional.linear_cross_entropy, target)(**inputs)
        assert torch.equal(compiled(inputs["input"], inputs["weight"], target, inputs["bias"]), expected)


def test_meta():
    inputs = {name: x.to("meta") for name, x in problem((2, 9), 24, 40, torch.bfloat16).items()}
    for reduction, shape in (("none", (2, 9)), ("mean", ())):
        loss = of(functional.linear_cross_entropy, targets((2, 9), 40).to("meta"), reduction=reduction)(**inputs)
        assert loss.shape == shape and loss.dtype == torch.bfloat16 and loss.device.type == "meta"
    loss, stats = ops.linear_cross_entropy_fwd.registered(
        inputs["input"], inputs["weight"], targets((2, 9), 40).to("meta"), inputs["bias"], IGNORED, 0.0, 1
    )
    assert (loss.shape, loss.dtype, stats.shape) == ((), torch.float32, (2, 9, 2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reduction", ops.REDUCTIONS.values())
def test_opcheck(dtype, reduction):
    inputs, target = problem((2, 5), 8, 12, dtype), targets((2, 5), 12)
    leaves = [x.requires_grad_() for x in inputs.values()]
    arguments = (leaves[0], leaves[1], target, leaves[2], IGNORED, 0.1, reduction)
    torch.library.opcheck(ops.linear_cross_entropy_fwd.registered, arguments)
    tensors, options = [x.detach() for x in arguments[:4]], arguments[4:]
    loss, stats = ops.linear_cross_entropy_fwd.raw(*tensors, *options)
    torch.library.opcheck(
        ops.linear_cross_entropy_bwd.registered,
        (torch.rand_like(loss), *tensors, stats, *options, True, True, True),
    )


def test_second_derivatives_are_refused():
    assert_refuses_second_derivatives(of(CPU, targets((5,), 9)), problem((5,), 8, 9, torch.float32))


def test_gradients_only_where_asked():
    op, inputs = of(CPU, targets((5,), 9)), problem((5,), 8, 9, torch.float32)
    assert_gradients_only_where_asked(op, inputs, "linear_cross_entropy_bwd")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_gives_the_loss_that_torch_gives(dtype):
    inputs, target = problem((6,), 24, 40, torch.float32), targets((6,), 40)
    with torch.autocast("cpu", dtype):
        ours, theirs = (of(f, target)(**inputs) for f in (functional.linear_cross_entropy, eager))
    assert ours.dtype == theirs.dtype == torch.float32
    true = of(eager, target)(**{name: x.to(dtype).double() for name, x in inputs.items()})
    assert abs(ours - true) <= 2 * abs(theirs - true) + torch.finfo(torch.float32).eps * true


def test_dtype_of_the_loss():
    inputs, target = problem((6,), 24, 40, torch.bfloat16), targets((6,), 40)
    for backend in ("cpu", "reference"):
        call = partial(functional.linear_cross_entropy, backend=backend)
        assert of(call, target)(**inputs).dtype == torch.bfloat16
        wide = of(call, target, dtype=torch.float32)(**inputs)
        assert wide.dtype == torch.float32 and wide.bfloat16() == of(call, target)(**inputs)


X, W, B, T = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), torch.tensor([0, 4, IGNORED])
WRONG = {
    "class probabilities": ({"target": torch.rand(3, 5)}, TypeError, "class indices.*class probabilities are not"),
    "targets of another integer": ({"target": T.to(torch.int8)}, TypeError, "target must be int64 or int32"),
    "a class too large": ({"target": torch.tensor([0, 5, 1])}, ValueError, r"target must lie in \[0, 4\].*got 5"),
    "a negative class": ({"target": torch.tensor([0, -3, 1])}, ValueError, r"target must lie in.*got -3"),
    "a target of another shape": ({"target": T[:2]}, ValueError, r"target must have the shape \(3,\)"),
    "a weight of another width": ({"weight": torch.randn(5, 9)}, ValueError, r"weight must have .* \(classes, 8"),
    "no classes": ({"weight": torch.randn(0, 8), "bias": None}, ValueError, "weight must have the shape"),
    "a bias of another length": ({"bias": torch.randn(8)}, ValueError, "bias must have the shape"),
    "integers": ({"input": torch.ones(3, 8).long()}, TypeError, "input must be a floating-point"),
    "a scalar": ({"input": torch.tensor(1.0)}, ValueError, "at least one dimension"),
    "a reduction": ({"reduction": "max"}, ValueError, "reduction must be one of none, mean, sum"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    "smoothing by a tensor": ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing must be a number"),
    "an index": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
    "a dtype": ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    changes, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        functional.linear_cross_entropy(**{"input": X, "weight": W, "bias": B, "target": T} | changes)


def test_what_runs_it_is_told_and_strict():
    found = []
    fasttx.dispatch.listeners.append(found.append)
    try:
        functional.linear_cross_entropy(X, W, T, B)
    finally:
        fasttx.dispatch.listeners.clear()
    assert [(d.op, d.backend, d.kernel) for d in found] == [("linear_cross_entropy", "cpu", "linear_cross_entropy_fwd")]
    with fasttx.strict(), pytest.raises(fasttx.FallbackError, match="linear_cross_entropy would run on the reference"):
        functional.linear_cross_entropy(X, W.double(), T, B)


class TestModule:
    def test_is_the_function(self):
        head = fasttx.nn.LinearCrossEntropy(8, 5, label_smoothing=0.1, ignore_index=2, reduction="sum")
        linear = torch.nn.Linear(8, 5)
        linear.load_state_dict(head.state_dict())
        target = torch.tensor([0, 4, 2])
        expected = F.cross_entropy(linear(X), target, ignore_index=2, label_smoothing=0.1, reduction="sum")
        torch.testing.assert_close(head(X, target), expected)
        torch.testing.assert_close(head.logits(X), linear(X))

    def test_tied_weight(self):
        embedding = torch.nn.Embedding(5, 8)
        head = fasttx.nn.LinearCrossEntropy(8, 5, bias=False)
        head.weight = embedding.weight
        head(embedding(torch.tensor([1, 2])), torch.tensor([3, 4])).backward()
        assert embedding.weight.grad[1:].any(-1).all()

    def test_draws_as_linear_does(self):
        torch.manual_seed(0)
        head = fasttx.nn.LinearCrossEntropy(64, 50)
        assert head.weight.abs().max() <= 1 / 8 and head.bias.abs().max() <= 1 / 8

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="classes must be at least 1"):
            fasttx.nn.LinearCrossEntropy(8, 0)
        with pytest.raises(ValueError, match="reduction"):
            fasttx.nn.LinearCrossEntropy(8, 5, reduction="max")


# Prints by how many bytes a forward and backward raise the peak over their tensors, all of which exist before.
PROGRAM = """
import sys, torch
from fasttx.functional import linear_cross_entropy

def peak():
    # Of this program alone: ru_maxrss would begin with the size of the process that started it.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def run(rows, classes, dtype):
    x = torch.randn(rows, 64).to(dtype).requires_grad_()
    weight = torch.randn(classes, 64).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    before = peak()
    results = torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))
    return peak() - before - sum(r.nbytes for r in results)

torch.set_num_threads(2)
dtype = getattr(torch, sys.argv[1])
run(300, 300, dtype)
print(run(8192, 32768, dtype))
"""


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_logits_of_a_gibibyte_take_less_than_32_mib(dtype):
    command = [sys.executable, "-c", PROGRAM, dtype]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 32 << 20, found.stdout
