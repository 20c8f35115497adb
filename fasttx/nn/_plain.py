"""What may be fused: modules that do nothing but what their class says.

A fused operation reads a child's parameters and never calls it. So a child that was replaced,
subclassed, hooked, parametrized, quantized or given a forward of its own has to be called, and the
fusion steps aside.
"""

from torch import Tensor
from torch import nn as torch_nn
from torch.nn import Module, Parameter
from torch.nn.modules import module as torch_module

from fasttx import dispatch

# torch fills and empties these, and never puts others in their place.
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
# The methods that the forwards of torch.nn's layers consist of.
_HALVES = ("_sa_block", "_mha_block", "_ff_block")


def has_global_hooks() -> bool:
    """Whether hooks are set that see every module."""
    return any(_GLOBAL_HOOKS)


def is_plain(module: object, *classes: type) -> bool:
    """Whether the module's class is exactly one of these, its forward and its parameters are as that class has them.

    That is: nothing observes or replaces the forward, and no parameter is of a class that overrides operators.
    """
    if (
        type(module) not in classes
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(_GLOBAL_HOOKS)
    ):
        return False
    for tensor in module._parameters.values():
        if tensor is not None and type(tensor) is not Parameter and not dispatch.is_plain_tensor(tensor):
            return False
    return True


def why_not_plain(module: object, *classes: type) -> str | None:
    """The reason, in words, why `is_plain` says no; None where it says yes."""
    if is_plain(module, *classes):
        return None
    kind = type(module)
    if kind not in classes:
        # In full where it could be taken for torch's own, as peft's Linear, or for the class itself.
        namesake = getattr(torch_nn, kind.__name__, classes[0])
        in_full = namesake is not kind and namesake.__name__ == kind.__name__
        return f"it is a {kind.__module__ + '.' if in_full else ''}{kind.__name__}, not a {classes[0].__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if any(_GLOBAL_HOOKS):
        return "a global module hook is set"
    for name, tensor in module._parameters.items():
        if tensor is not None and not dispatch.is_plain_tensor(tensor):
            return f"its {name} is a {type(tensor).__name__}"
    return "it has hooks"


def why_patched(layer: Module) -> str | None:
    """The reason, in words, why one of torch.nn's layers has to run torch's own forward; None where it need not."""
    for name in _HALVES:
        if name in layer.__dict__:
            return f"its {name} was replaced"
    return None


def parameter(module: Module, name: str) -> Tensor | None:
    """module.<name>, without the Python call that it takes a module to find a parameter."""
    # One that is parametrized or pruned is not among them.
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def adopt(module: Module | None, fast: type[Module]) -> None:
    """Turns a module of exactly the class that `fast` drops in for into a `fast`, in place."""
    if type(module) is fast.__base__:
        module.__class__ = fast


def refuse_scripting(module: Module) -> None:
    """What torch.jit.script asks of a module before it compiles its forward."""
    raise RuntimeError(
        f"torch.jit.script cannot compile fasttx's {type(module).__name__}: call fasttx.restore(model) before, or take "
        "torch.jit.trace, torch.export or torch.compile"
    )


def step_aside(op: str, reason: str) -> None:
    """Tells whoever wants to know that a module runs its original forward, or calls a child, and why."""
    dispatch.report(op, "original", (("fasttx", reason),))
