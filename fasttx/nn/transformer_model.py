"""The whole encoder-decoder transformer as a module."""

from typing import Any

import torch
from torch.nn import Module

from ._blocks import adopt_children
from ._padding import takes_remove_padding
from ._plain import adopt, refuse_scripting
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .layer_norm import LayerNorm
from .transformer import TransformerEncoder, TransformerEncoderLayer


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer of fasttx's encoder and decoder.

    Every constructor argument, mask and layout of torch's, and its random initial weights. A
    custom_encoder or custom_decoder of torch's own classes becomes fasttx's in place; any other is
    called as it is. Masks are torch's: a bool is True where a query must not attend. Queries with
    nothing to attend to get zeros from the attention, where torch gives NaN.

    To decode step by step, encode once and give the decoder a KVCache: `memory = model.encoder(src)`, and at each step
    `model.decoder(tgt, memory, cache=cache)`. forward takes none: it encodes src whenever it is called, as torch's.

    remove_padding is what TransformerEncoder and TransformerDecoder take: None does as torch does,
    True runs on the valid tokens alone wherever key padding masks allow it, in training too. Raises
    TypeError for another value, and where it is given beside an encoder or decoder that has no such choice.
    """

    __prepare_scriptable__ = refuse_scripting

    @takes_remove_padding(torch.nn.Transformer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_stack(self.encoder, TransformerEncoder, TransformerEncoderLayer)
        _adopt_stack(self.decoder, TransformerDecoder, TransformerDecoderLayer)

    @property
    def remove_padding(self) -> tuple[bool | None, bool | None]:
        """The encoder's and the decoder's; to set it sets both."""
        return tuple(getattr(stack, "remove_padding", None) for stack in (self.encoder, self.decoder))

    @remove_padding.setter
    def remove_padding(self, value: bool) -> None:
        stacks = (("encoder", TransformerEncoder), ("decoder", TransformerDecoder))
        for name, fast in stacks:
            stack = getattr(self, name)
            if not isinstance(stack, fast):
                raise TypeError(
                    f"remove_padding needs a custom_{name} that is a {fast.__name__}, got {type(stack).__name__}"
                )
        for name, _ in stacks:
            getattr(self, name).remove_padding = value


def _adopt_stack(stack: Module, fast: type[Module], fast_layer: type[Module]) -> None:
    """Turns an encoder or decoder of exactly torch's class, its layers and its norm into fasttx's, in place."""
    if type(stack) is not fast.__base__:
        return
    adopt(stack, fast)
    adopt(stack.norm, LayerNorm)
    for layer in stack.layers:
        if type(layer) is fast_layer.__base__:
            adopt_children(layer)
            adopt(layer, fast_layer)
