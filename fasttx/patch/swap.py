"""optimize() and restore(): a module changes its class and nothing else.

Parameters, buffers, hooks, names and children stay the objects that they were, so state_dict,
optimizers, deepcopy and pickle go on as before. Only modules of exactly a known class are swapped:
a subclass may do something else.
"""

import importlib
import sys
from types import ModuleType

import torch
from torch.nn import Module

from fasttx import nn
from fasttx.nn.decoder import PackingTransformerDecoder
from fasttx.nn.transformer import PackingTransformerEncoder

_PADDING = ("remove", "keep")
_SWAPS = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.GELU: nn.GELU,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerEncoder: nn.TransformerEncoder,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.TransformerDecoder: nn.TransformerDecoder,
    torch.nn.Transformer: nn.Transformer,
}
# What these become with padding="remove".
_PACKING = {
    torch.nn.TransformerEncoder: PackingTransformerEncoder,
    torch.nn.TransformerDecoder: PackingTransformerDecoder,
}
# By module of Hugging Face's, what fasttx has for it: a module with SWAPS, by original class the one that it becomes,
# and KEEPING, what those become instead that shall keep padding.
_FAMILIES = {
    "transformers.modeling_utils": "fasttx.patch._hf",
    "transformers.models.bart.modeling_bart": "fasttx.patch.bart",
    "transformers.models.bert.modeling_bert": "fasttx.patch.bert",
    "transformers.models.distilbert.modeling_distilbert": "fasttx.patch.distilbert",
    "transformers.models.gpt2.modeling_gpt2": "fasttx.patch.gpt2",
    "transformers.models.marian.modeling_marian": "fasttx.patch.marian",
    "transformers.models.roberta.modeling_roberta": "fasttx.patch.roberta",
    "transformers.models.vit.modeling_vit": "fasttx.patch.vit",
    "transformers.models.whisper.modeling_whisper": "fasttx.patch.whisper",
}


def optimize(model: Module, *, padding: str = "remove") -> Module:
    """Swaps the model's modules for fasttx's, in place, and returns the model; `restore` undoes it.

    Known are torch.nn's LayerNorm, GELU, MultiheadAttention, TransformerEncoderLayer,
    TransformerEncoder, TransformerDecoderLayer, TransformerDecoder and Transformer, anywhere in the model, and
    Hugging Face's BERT, RoBERTa, DistilBERT, ViT, GPT-2, BART, Marian and Whisper; other Hugging Face models get
    fasttx's attention where they take theirs from transformers' interface. Unknown modules are left
    alone; `explain(model)` lists them all. To do it twice is harmless.

    padding="remove": given a padding mask, encoders and decoders run on the valid tokens alone, in inference and
    in training; results at valid positions are those of the padded batch, padded positions hold
    zeros. Whoever reads a padded position reads those: where first tokens are padding, BERT's pooler and
    other heads that take the first token say the same of every such sequence, what they say of zeros.
    Left-padded batches under such a head need padding="keep".
    padding="keep": padding is removed only where torch itself does so.

    Raises TypeError for what is no module, ValueError for another `padding`.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if padding not in _PADDING:
        raise ValueError(f"padding must be one of {', '.join(_PADDING)}, got {padding!r}")
    originals, swaps = original_classes(), swaps_for(padding)
    for module in model.modules():
        original = originals.get(type(module), type(module))
        swapped = swaps.get(original, original)
        if type(module) is not swapped:
            module.__class__ = swapped
    hugging_face = _hugging_face()
    if hugging_face is not None:
        hugging_face.switch(model)
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
    hugging_face = _hugging_face()
    if hugging_face is not None:
        hugging_face.unswitch(model)
    return model


def original_classes() -> dict[type, type]:
    """By swapped class, the class that it is swapped in for."""
    tables = (_SWAPS, _PACKING, *(table for family in _families() for table in (family.SWAPS, family.KEEPING)))
    pairs = (pair for table in tables for pair in table.items())
    return {swapped: original for original, swapped in pairs if swapped is not original}


def swaps_for(padding: str) -> dict[type, type]:
    """By original class, what it becomes: with padding="keep", nothing that packs where the original does not."""
    swaps = dict(_SWAPS)
    for family in _families():
        swaps |= family.SWAPS if padding == "remove" else family.SWAPS | family.KEEPING
    return swaps | _PACKING if padding == "remove" else swaps


def why_attention_stays(module: Module) -> str | None:
    """Why a Hugging Face model cannot have fasttx's attention; None where it can, and for any other module."""
    hugging_face = _hugging_face()
    if hugging_face is None or not isinstance(module, hugging_face.PreTrainedModel):
        return None
    return hugging_face.why_not_switched(module)


def _families() -> list[ModuleType]:
    """What fasttx has for those of Hugging Face's modules that are loaded: no model is made of others."""
    return [family for name in _FAMILIES if (family := _family(name)) is not None]


def _family(name: str) -> ModuleType | None:
    if name not in sys.modules:
        return None
    try:
        return importlib.import_module(_FAMILIES[name])
    except ImportError as error:
        if (error.name or "").startswith("fasttx"):
            raise
        return None  # a transformers older than those this is written for


def _hugging_face() -> ModuleType | None:
    """fasttx.patch._hf, which switches a model's attention to fasttx's (`switch`) and back (`unswitch`)."""
    return _family("transformers.modeling_utils")
