"""Hugging Face's ViT: imported only once transformers' own module of it is."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP

from fasttx.nn._plain import step_aside
from fasttx.patch import _hf, _layers


class FastViTLayer(ViTLayer):
    """ViTLayer with fused QKV, attention, and dense + activation; each half, with its norm, is one op in inference.

    The attention and feed-forward modules are called where they are hooked or replaced, and the first while attentions
    are collected; what follows stays fused.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The layer on a batch (B, T, width)."""
        parts, feed_forward = self._parts(), None
        refusal = self._feed_forward_refusal()
        if refusal is not None:
            step_aside("feed_forward_half", refusal)
            feed_forward = self.mlp
        refusal = self.attention_refusal()
        if refusal is not None:
            step_aside("attention_half", refusal)
        elif _hf.call_refusal(kwargs) is None and _hf.mask_refusal(attention_mask, hidden_states) is None:
            read = self._self_attention()
            return _layers.pre_norm(
                hidden_states, lambda x: read.attend(x, mask=attention_mask), parts,
                lambda x: read.half(x, parts, norm_first=True, mask=attention_mask), feed_forward,
            )  # fmt: skip
        return _layers.pre_norm(
            hidden_states, lambda x: self.attention(x, attention_mask, **kwargs)[0], parts, feed_forward=feed_forward
        )

    def _self_attention(self) -> _layers.SelfAttention:
        attention = self.attention
        return _layers.SelfAttention(
            attention, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj,
            attention.num_attention_heads, attention.scaling, self._attention_dropout(),
        )  # fmt: skip

    def _parts(self) -> _layers.Parts:
        mlp = self.mlp
        return _layers.Parts(
            self.dropout, self.layernorm_before,
            mlp.fc1, mlp.activation_fn, _hf.activation_name(mlp.activation_fn), None, mlp.fc2,
            self.dropout, self.layernorm_after,
        )  # fmt: skip

    def _attention_dropout(self) -> float:
        return self.attention.attention_dropout if self.attention.training else 0.0

    def attention_refusal(self) -> str | None:
        """Why the attention module, as it stands, has to be called."""
        return _layers.attention_refusal(self.attention, self._attention_dropout(), (self.attention, ViTAttention))

    def _feed_forward_refusal(self) -> str | None:
        return _layers.why_called((self.mlp, ViTMLP))

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Each submodule's name, and why it is not fused, or None where it is."""
        attention = self.attention_refusal()
        for name, reason in _layers.describe(
            self, tuple(f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        ):
            yield name, attention or reason
        feed_forward = self._feed_forward_refusal()
        for name, reason in _layers.describe(self, ("mlp.fc1", "mlp.fc2"), activations=("mlp.activation_fn",)):
            yield name, feed_forward or reason
        yield from _layers.describe(self, norms=("layernorm_before", "layernorm_after"), dropouts=("dropout",))


SWAPS = {ViTLayer: FastViTLayer}
KEEPING: dict[type, type] = {}
