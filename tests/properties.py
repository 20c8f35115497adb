"""Properties that every differentiable op is held to, whatever it computes.

An op here takes tensors by name and gives a tensor or a tuple of them; every floating input is
differentiated, through a random linear function of the outputs that is the same in every run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from budget import assert_meets, poisoned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx.dispatch import extension
from fasttx.measure import Standard

Op = Callable[..., object]
Inputs = Mapping[str, Tensor]

THREADS = (1, 2, 3, 8)

# Ways for a float32 tensor of a shape, of two dims or more, to lie in memory.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "transposed": lambda *shape: _draw32(*shape[:-2], shape[-1], shape[-2]).mT,
    "permuted": lambda *shape: _draw32(*shape[::-1]).permute(*range(len(shape))[::-1]),
    "expanded rows": lambda *shape: _draw32(shape[-1]).expand(shape),
    "expanded columns": lambda *shape: _draw32(*shape[:-1], 1).expand(shape),
    "strided": lambda *shape: _draw32(*shape[:-1], 2 * shape[-1])[..., ::2],
    "offset": lambda *shape: _draw32(*shape[:-1], shape[-1] + 1)[..., 1:],
}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed."""
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _draw32(*shape: int) -> Tensor:
    return draw(*shape, dtype=torch.float32)


def as_tuple(outputs: object) -> tuple[Tensor, ...]:
    """The outputs of an op, one or several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def leaves(inputs: Inputs, wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The inputs as new leaves; those `wanted` (all, where None) will get a gradient."""
    return {
        name: x.detach().requires_grad_(wanted is None or name in wanted)
        for name, x in inputs.items()
    }


def slopes(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Repeatable gradients of the outputs; those of fewer rows are the first of those of more."""
    generator = torch.Generator()
    return [
        torch.rand(x.shape, generator=generator.manual_seed(i), device="cpu").sub(0.5).to(x)
        for i, x in enumerate(outputs)
    ]


def results(op: Op, inputs: Inputs, wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Outputs, and the gradients of the inputs `wanted` (all, where None), by name."""
    given = leaves(inputs, wanted)
    outputs = as_tuple(op(**given))
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    names = [name for name, x in given.items() if x.requires_grad]
    if names:
        found = torch.autograd.grad(outputs, [given[name] for name in names], slopes(outputs))
        named |= {f"d {name}": x for name, x in zip(names, found, strict=True)}
    return named


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal in shape, dtype and every bit: NaN equals NaN, and -0 differs from 0."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    whole = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    return torch.equal(*whole)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same results under the same names."""
    assert actual.keys() == expected.keys()
    differing = [name for name, x in actual.items() if not same_bits(x, expected[name])]
    assert not differing, f"bits differ in {', '.join(differing)}"


def every_isa() -> Iterator[str]:
    """Each instruction set of this machine, in use until the next; the fixtures put it back."""
    for name, present in extension.isas():
        if present:
            extension.set_isa(name)
            yield name


def assert_within_budget_on_every_isa(op: Op, **standard) -> None:
    """Outputs and gradients of the op within the error budget; `standard`: as Standard takes it.

    On one thread: the number does not matter to our results, and small calls are faster so.
    """
    torch.set_num_threads(1)
    measure = Standard(**standard)
    for isa in every_isa():
        try:
            assert_meets(measure, op)
        except AssertionError as error:
            raise AssertionError(f"{isa}: {error}") from None


def integers(*shape: int) -> Tensor:
    """-1, 0 and 1: sums of their products are exact in every dtype that accumulates in float32."""
    return torch.randint(-1, 2, shape).double()


def assert_exact_on_every_isa(
    op: Op, reference: Op, inputs: Inputs, slope: Tensor, dtype: torch.dtype
) -> None:
    """Output and gradients, given the output's, of `integers`: exact, and rounded once.

    Where a tensor has but a few elements, the error of eager PyTorch is a matter of luck, and no
    budget to hold a kernel to; an element at the wrong place is seen here as well as there.
    """

    def run(function: Op, kind: torch.dtype) -> list[Tensor]:
        given = {name: x.to(kind).requires_grad_() for name, x in inputs.items()}
        output = function(**given)
        gradients = torch.autograd.grad(output, list(given.values()), slope.to(kind))
        return [output.detach(), *gradients]

    torch.set_num_threads(1)
    expected = [x.to(dtype) for x in run(reference, torch.float64)]
    for isa in every_isa():
        with poisoned():
            found = run(op, dtype)
        for name, ours, truth in zip(("output", *inputs), found, expected, strict=True):
            assert torch.equal(ours, truth), (isa, name, {n: x.shape for n, x in inputs.items()})


def assert_layouts_do_not_matter(op: Op, inputs: Inputs) -> None:
    """Results are those of dense copies of the inputs, bit for bit, for any incoming gradient."""
    assert not all(x.is_contiguous() for x in inputs.values())
    dense = {name: x.contiguous() for name, x in inputs.items()}
    assert_same_bits(results(op, inputs), results(op, dense))


def assert_gradients_of_any_layout(op: Op, inputs: Inputs) -> None:
    """Gradients that come in expanded (as from sum()) or transposed give what dense ones give."""
    given = leaves(inputs)
    outputs = as_tuple(op(**given))
    expanded = [torch.ones((), dtype=x.dtype).expand(x.shape) for x in outputs]
    transposed = [draw(*x.shape[::-1], dtype=x.dtype).permute(*range(x.dim())[::-1]) for x in outputs]
    for incoming in (expanded, transposed):
        found = [
            torch.autograd.grad(outputs, list(given.values()), slopes, retain_graph=True)
            for slopes in (incoming, [x.contiguous() for x in incoming])
        ]
        assert all(map(same_bits, *found))


def assert_threads_do_not_matter(op: Op, inputs: Inputs, threads: Callable) -> None:
    """Results are the same, bit for bit, on 1, 2, 3 and 8 threads (`threads`: the fixture)."""
    found = []
    for count in THREADS:
        with threads(count):
            found.append(results(op, inputs))
    for other in found[1:]:
        assert_same_bits(other, found[0])


def assert_compiles(op: Op, inputs: Inputs) -> None:
    """torch.compile traces the op in one graph, and gives what eager gives, bit for bit."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for wanted in (None, ()):
        found = []
        for function in (op, compiled):
            torch.manual_seed(3)
            found.append(results(function, inputs, wanted))
        assert_same_bits(*found)


def assert_refuses_second_derivatives(op: Op, inputs: Inputs) -> None:
    """A second derivative is an error that says what to do, not a missing term."""
    given = leaves(inputs)
    outputs = as_tuple(op(**given))
    first = torch.autograd.grad(outputs, list(given.values()), slopes(outputs), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again.*reference"):
        torch.autograd.grad([x.square().sum() for x in first], list(given.values()))


class Recorder(TorchDispatchMode):
    """Keeps what each fasttx op returned: (name, results)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        if function.namespace == "fasttx":
            self.calls.append((function._schema.name.split("::")[1], as_tuple(returned)))
        return returned


def assert_gradients_only_where_asked(
    op: Op, inputs: Inputs, backward: str, shared: Mapping[str, str] | None = None
) -> None:
    """Whichever inputs want a gradient get the same one, and the others' are not computed.

    `backward` names the raw op; its results, in whatever order, number one for each gradient it
    computes, and are empty where they were not asked for.
    """
    complete = results(op, inputs)
    for bits in range(1, 2 ** len(inputs) - 1):
        wanted = [name for i, name in enumerate(inputs) if bits >> i & 1]
        with Recorder() as recorder:
            found = results(op, inputs, wanted)
        assert_same_bits(
            found, {n: x for n, x in complete.items() if n.startswith("output") or n in found}
        )
        assert [n for n in found if n.startswith("d ")] == [f"d {n}" for n in inputs if n in wanted]
        (computed,) = [tensors for name, tensors in recorder.calls if name == backward]
        distinct = {(shared or {}).get(name, name) for name in wanted}
        assert sum(x.numel() > 0 for x in computed) == len(distinct), wanted
