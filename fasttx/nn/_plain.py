"""What may be fused: modules that do nothing but what their class says.

A fused operation reads a child's parameters and never calls it. So a child that was replaced,
subclassed, hooked, parametrized or given a forward of its own has to be called, and the fusion
steps aside.
"""

from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as torch_module

from fasttx import dispatch

# torch fills and empties these, and never puts others in their place.
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def is_plain(module: object, *classes: type) -> bool:
    """Whether the module's class is exactly one of these and nothing observes or replaces its forward."""
    return not (
        type(module) not in classes
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(_GLOBAL_HOOKS)
    )


def why_not_plain(module: object, *classes: type) -> str | None:
    """The reason, in words, why `is_plain` says no; None where it says yes."""
    if is_plain(module, *classes):
        return None
    if type(module) not in classes:
        return f"it is a {type(module).__name__}, not a {classes[0].__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    return "a global module hook is set" if any(_GLOBAL_HOOKS) else "it has hooks"


def parameter(module: Module, name: str) -> Tensor | None:
    """module.<name>, without the Python call that it takes a module to find a parameter."""
    # One that is parametrized or pruned is not among them.
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def adopt(module: Module | None, fast: type[Module]) -> None:
    """Turns a module of exactly the class that `fast` drops in for into a `fast`, in place."""
    if type(module) is fast.__base__:
        module.__class__ = fast


def step_aside(op: str, reason: str) -> None:
    """Tells whoever listens to decisions that a module runs its original forward, and why."""
    if dispatch.listeners:
        decision = dispatch.Decision(op, "original", (("fasttx", reason),))
        for listen in dispatch.listeners:
            listen(decision)
