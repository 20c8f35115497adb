"""Parts of a model that fine-tuning trains as a whole: modules or parameters, by their names."""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Module, Parameter


def require_heads(model: Module, heads: str | Iterable[str]) -> list[str]:
    """The names, if each is a module's that has parameters, or a parameter's."""
    heads = [heads] if isinstance(heads, str) else list(heads)
    for head in heads:
        if not head_state(model, [head]):
            raise ValueError(f"the model has no parameters {head} or {head}.*")
    return heads


def train_heads(model: Module, heads: list[str]) -> None:
    for values in head_state(model, heads).values():
        if isinstance(values, Parameter):
            values.requires_grad_(True)


def head_state(model: Module, heads: list[str]) -> dict[str, Tensor]:
    """The parameters and buffers of these, without the adapters among them."""
    return {
        name: values
        for name, values in model.state_dict(keep_vars=True).items()
        if any(f"{name}.".startswith(f"{head}.") for head in heads) and ".lora_" not in name
    }
