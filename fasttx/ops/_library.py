"""The `fasttx` operator library: schemas live beside each op, kernels register themselves when fasttx._C is loaded.

Ops that have CUDA C++ kernels are defined a second time, in the library `fasttx_cuda`: a call of `fasttx` on CUDA
tensors runs on Triton, one of `fasttx_cuda` on those, and so does its gradient, wherever and whenever that is taken.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fasttx.dispatch import extension

from ._functorch import as_rows, has_tangent, no_forward_mode, one_by_one, transformable

# The codes of Activation in csrc/cpu/kernels.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}

# Asked on every call, where the way to a name through two modules counts too.
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_LIBRARIES = {name: torch.library.Library(name, "DEF") for name in ("fasttx", "fasttx_cuda")}


class Operator:
    """One op of the library, in the three ways that it can be called.

    The default overload knows its gradient wherever it is traced: under torch.compile and torch.export. Its wrapper
    takes 20 us a call, so eager calls go around it: to the overload `raw`, which has no gradient, or to `apply`, an
    autograd.Function of the same formula. Under torch.func it is `transformed`, a Function which that can look into.
    """

    def __init__(self, name: str, library: str, cuda: "Operator | None" = None):
        packet = getattr(getattr(torch.ops, library), name)
        self.name, self.library = name, library
        self.cuda = cuda  # the same op of the CUDA C++ kernels, if there are any
        self.registered = packet.default
        self.raw = packet.raw._op  # what the overload calls: one Python frame less
        self.apply = self.transformed = None
        self.vmap_rule = one_by_one(self.raw)

    def on(self, backend: str) -> "Operator":
        """The op whose kernels are the backend's."""
        return self.cuda if backend == "cuda" else self

    def each(self) -> tuple["Operator", ...]:
        """The op in every library that it is defined in."""
        return (self,) if self.cuda is None else (self, self.cuda)

    def __call__(self, *args):
        """The op inside of a gradient formula, where a further derivative is the exception."""
        if _formula.on_cuda and self.cuda is not None:
            return self.cuda(*args)
        if is_grad_enabled() or is_compiling():
            if not is_compiling() and _are_functorch_transforms_active():
                return self.transformed(*args)
            return self.registered(*args)
        return self.raw(*args)


class _Formula(threading.local):
    """Whether the gradient formula that this thread evaluates is one of an op of the CUDA C++ kernels."""

    on_cuda = False


_formula = _Formula()


def _on_cuda(backward: Callable) -> Callable:
    """The formula with the ops in it being those of the CUDA C++ kernels."""

    def formula(ctx, *grads):
        before, _formula.on_cuda = _formula.on_cuda, True
        try:
            return backward(ctx, *grads)
        finally:
            _formula.on_cuda = before

    return formula


def define(schema: str, fake: Callable, *, on_cuda: bool = False) -> Operator:
    """Defines `fasttx::<schema>` and its overload `raw`, with their shape function.

    on_cuda: whether there are CUDA C++ kernels for it, and so `fasttx_cuda::<schema>` too.
    """
    return _define(schema, fake, "fasttx", _define(schema, fake, "fasttx_cuda") if on_cuda else None)


def _define(schema: str, fake: Callable, library: str, cuda: Operator | None = None) -> Operator:
    name, signature = schema.split("(", 1)
    lib = _LIBRARIES[library]
    for overload in (name, f"{name}.raw"):
        lib.define(f"{overload}({signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{library}::{overload}", fake, lib=lib)
    lib.impl(f"{name}.raw", torch.library.fallthrough_kernel, "Autograd")
    op = Operator(name, library, cuda)
    for overload in (name, f"{name}.raw"):
        torch.library.register_vmap(f"{library}::{overload}", lambda *args: op.vmap_rule(*args), lib=lib)
    return op


def implement(name: str, kernel: Callable, key: str) -> None:
    """Makes a Python function the kernel of the op of `fasttx` for a dispatch key, in both of its overloads."""
    for overload in (name, f"{name}.raw"):
        _LIBRARIES["fasttx"].impl(overload, kernel, key)


def map_rows(op: Operator, *rows: str, alone: tuple[str, ...] = ()) -> None:
    """Under torch.func.vmap, the samples of an op that works row by row become more rows: see `as_rows`."""
    names = [argument.name for argument in op.registered._schema.arguments]
    for each in op.each():
        each.vmap_rule = as_rows(each.raw, names, rows, alone)


def differentiate(
    op: Operator, backward: Callable, setup_context: Callable, keeps: Callable[[tuple], bool] | None = None
) -> None:
    """Gives the op its gradient formula.

    keeps: whether a call with these inputs keeps what the backward reads. One that was traced for inference does not:
    it runs where gradients are on, and is refused only if one is asked for.
    """
    if op.cuda is not None:
        differentiate(op.cuda, _on_cuda(backward), setup_context, keeps)
    if keeps is not None:
        backward, setup_context = _where_kept(op.name, backward, setup_context, keeps)
    torch.library.register_autograd(op.registered, backward, setup_context=setup_context, lib=_LIBRARIES[op.library])

    raw = op.raw

    def forward(ctx, *args):
        output = raw(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op.name, (torch.autograd.Function,), members)
    # Function.apply is this, after checks for functorch, under which `run` does not come here.
    op.apply = super(torch.autograd.Function, function).apply
    # What the engine calls, after checks for ways to write a Function that are not used here.
    function._backward_cls.apply = backward
    op.transformed = transformable(op.name, raw, backward, setup_context)


def _where_kept(
    name: str, backward: Callable, setup_context: Callable, keeps: Callable[[tuple], bool]
) -> tuple[Callable, Callable]:
    def setup(ctx, inputs, output):
        ctx.kept = keeps(inputs)
        if ctx.kept:
            setup_context(ctx, inputs, output)

    def formula(ctx, *grads):
        if not ctx.kept:
            raise RuntimeError(
                f"fasttx's {name} kept nothing for a gradient: its call was traced for inference, as by torch.export "
                "under torch.no_grad() or without a parameter or input that requires one; trace it with gradients"
            )
        return backward(ctx, *grads)

    return formula, setup


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors will be differentiated."""
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
        # Which of the tensors a transform differentiates by does not show from within another one.
        return _are_functorch_transforms_active()
    return False


def has_tangents() -> bool:
    """Whether forward-mode derivatives are being taken, so that tensors may carry them."""
    return forward_ad._current_level >= 0


def run(op: Operator, differentiable: bool, *args):
    """Calls the op in the cheapest way that gives the gradients which are wanted."""
    if is_compiling():
        return op.registered(*args)
    if _are_functorch_transforms_active():
        return op.transformed(*args) if differentiable else op.raw(*args)
    if forward_ad._current_level >= 0 and any(map(has_tangent, args)):
        raise NotImplementedError(no_forward_mode(op.name))
    return op.apply(*args) if differentiable else op.raw(*args)


def plain_call(op: Operator, kind: str = "plain_call") -> Callable:
    """The op's quickest call, by the extension: its result, or None where the arguments take a closer look.

    kind: one of fasttx._C's, which say what the arguments are. Not to be called while torch.compile traces.
    """
    return (lambda *args: None) if extension is None else getattr(extension, kind)(op.raw, op.apply)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def given(tensor: Tensor, wanted: bool) -> Tensor | None:
    """A gradient, or None in place of one that was not asked for."""
    return tensor if wanted else None


def forbid_double_backward(op: Operator) -> None:
    """Makes differentiating a backward op an error with the way out, instead of a missing gradient."""
    def refuse(ctx, *grads):
        raise RuntimeError(
            f"fasttx's {op.name} cannot be differentiated again; for second derivatives use the "
            "reference path: `with fasttx.backend('reference'):` around the forward"
        )

    differentiate(op, refuse, lambda ctx, inputs, output: None)
