"""All rows, and those that are asked for."""

import importlib
from collections.abc import Iterable

from .case import Case, Growth, dtype_name

# The ops, what is built of them, and what calls of either cost: each has a file of its name here.
OPS = ("attention", "feed_forward", "layer_norm", "gelu", "softmax", "cross_entropy", "embedding")
STEMS = (*OPS, "encoder_layer", "padding", "bert", "gpt2", "overhead", "drawn")


def select(stems: Iterable[str] = STEMS, dtypes: Iterable[str] = (), words: Iterable[str] = ()) -> list[Case | Growth]:
    """The rows of these stems, in their order; of these dtypes and with one of these words in the id, where given."""
    dtypes, words = tuple(dtypes), [word.replace(" ", "_") for word in words]
    return [
        case
        for stem in stems
        for case in importlib.import_module(f"benchmarks.{stem}").cases()
        if (not dtypes or dtype_name(case.dtype) in dtypes) and (not words or any(word in case.id for word in words))
    ]
