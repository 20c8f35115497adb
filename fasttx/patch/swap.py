"""optimize() and restore(): a module changes its class and nothing else.

Parameters, buffers, hooks, names and children stay the objects that they were, so state_dict,
optimizers, deepcopy and pickle go on as before. Only modules of exactly a known class are swapped:
a subclass may do something else.
"""

import sys

import torch
from torch.nn import Module

from fasttx import nn
from fasttx.nn.decoder import PackingTransformerDecoder
from fasttx.nn.transformer import PackingTransformerEncoder

_PADDING = ("remove", "keep")


def optimize(model: Module, *, padding: str = "remove") -> Module:
    """Swaps the model's modules for fasttx's, in place, and returns the model; `restore` undoes it.

    Known are torch.nn's LayerNorm, GELU, MultiheadAttention, TransformerEncoderLayer,
    TransformerEncoder, TransformerDecoderLayer and TransformerDecoder, anywhere in the model, and
    Hugging Face's BERT. Unknown modules are left alone; `explain(model)` lists them all. To do it
    twice is harmless.

    padding="remove": given a padding mask, encoders and decoders run on the valid tokens alone, in inference and
    in training; results at valid positions are those of the padded batch, padded positions hold
    zeros. padding="keep": only where torch itself does so. Raises TypeError for what is no module,
    ValueError for another `padding`.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if padding not in _PADDING:
        raise ValueError(f"padding must be one of {', '.join(_PADDING)}, got {padding!r}")
    originals, swaps = original_classes(), swaps_for(padding)
    for module in model.modules():
        original = originals.get(type(module), type(module))
        swapped = swaps.get(original)
        if swapped is not None:
            module.__class__ = swapped
    return model


def restore(model: Module) -> Module:
    """Gives every swapped module its original class back, in place, and returns the model.

    Modules that were made as fasttx.nn's become torch.nn's too. Raises TypeError for what is no
    module.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    originals = original_classes()
    for module in model.modules():
        original = originals.get(type(module))
        if original is not None:
            module.__class__ = original
    return model


def original_classes() -> dict[type, type]:
    """By swapped class, the class that it is swapped in for."""
    originals = {
        nn.LayerNorm: torch.nn.LayerNorm,
        nn.GELU: torch.nn.GELU,
        nn.MultiheadAttention: torch.nn.MultiheadAttention,
        nn.TransformerEncoderLayer: torch.nn.TransformerEncoderLayer,
        nn.TransformerEncoder: torch.nn.TransformerEncoder,
        PackingTransformerEncoder: torch.nn.TransformerEncoder,
        nn.TransformerDecoderLayer: torch.nn.TransformerDecoderLayer,
        nn.TransformerDecoder: torch.nn.TransformerDecoder,
        PackingTransformerDecoder: torch.nn.TransformerDecoder,
    }
    bert = _bert()
    if bert is not None:
        originals[bert.FastBertLayer] = bert.BertLayer
        originals[bert.FastBertEncoder] = bert.BertEncoder
    return originals


def swaps_for(padding: str) -> dict[type, type]:
    """By original class, what it becomes: with padding="keep", nothing that packs where the original does not."""
    swaps = {original: swapped for swapped, original in original_classes().items()}
    bert = _bert()
    if padding == "keep":
        swaps[torch.nn.TransformerEncoder] = nn.TransformerEncoder
        swaps[torch.nn.TransformerDecoder] = nn.TransformerDecoder
        if bert is not None:
            swaps[bert.BertEncoder] = bert.BertEncoder
    return swaps


def _bert():
    """fasttx.patch.bert, where Hugging Face's BERT is loaded already: a model made of it cannot exist before."""
    if "transformers.models.bert.modeling_bert" not in sys.modules:
        return None
    try:
        from fasttx.patch import bert
    except ImportError:
        return None  # a transformers older than those this is written for
    return bert
