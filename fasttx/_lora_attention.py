"""LoRA around a torch.nn.MultiheadAttention, for peft, which this module needs."""

from typing import Any

from peft.tuners.lora import layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor
from torch.func import functional_call


class LoraMultiheadAttention(layer.MultiheadAttention):
    """peft's, by weights that are made for each call, instead of changes to the module's own.

    peft's changes them before a call and back after it, which rounds them a little every time; and it adds the change
    of the output projection twice, where its gradient is that of once (peft 0.21). Parameters and their names are the
    same. As there, adapters of attention have no dropout of their inputs.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self._check_forward_args(query, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(query, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return self.base_layer(query, *args, **kwargs)
        weights = {
            "in_proj_weight": _changed(self.in_proj_weight, self, names),
            "out_proj.base_layer.weight": _changed(self.out_proj.weight, self._output, names),
        }
        return functional_call(self.base_layer, weights, (query, *args), kwargs, tie_weights=False)

    @property
    def _output(self) -> layer.Linear:
        """The output projection with its adapters; `out_proj` is the one without."""
        return self.base_layer.out_proj

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        for name in names:
            merged = _changed(self.in_proj_weight.data, self, [name]).detach()
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"the merged weights are not finite: the adapter {name} seems to be broken")
            self.in_proj_weight.data.copy_(merged)
            self.merged_adapters.append(name)
        remaining = [name for name in names if name not in self._output.merged_adapters]
        if remaining:
            self._output.merge(safe_merge, remaining)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.in_proj_weight.data -= self.get_delta_weight(self.merged_adapters.pop()).detach()
        if self._output.merged:
            self._output.unmerge()

    def _restore_weights(self) -> None:
        """Nothing to restore: the weights are parameters all the time."""


def _changed(weight: Tensor, adapters: layer.LoraLayer, names: list[str]) -> Tensor:
    """The weight with the adapters' changes, in its dtype: adapters are kept in float32."""
    return weight + sum(adapters.get_delta_weight(name) for name in names).to(weight.dtype)
