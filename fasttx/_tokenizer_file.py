"""What a tokenizer.json describes, whichever version of `tokenizers` wrote it."""

import hashlib
import json
from typing import Any

# By role, the special token's own name here and the usual ones elsewhere, in the order in which they are looked for.
ROLES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("[BOS]", "<s>", "<|endoftext|>"),
    "eos": ("[EOS]", "</s>", "<|endoftext|>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


def kind(content: dict[str, Any]) -> str:
    """In the words of Tokenizer.train as far as those go."""
    model = content["model"].get("type") or "unknown"
    if model == "WordLevel":
        return "character" if (content["pre_tokenizer"] or {}).get("type") == "Split" else "word"
    return model.lower()


def fingerprint(content: dict[str, Any]) -> str:
    """16 hexadecimal digits, different where anything is that changes what is encoded or decoded.

    What one version writes and another leaves out is not among it: options that are not set, and the ways to write a
    pair of merged tokens.
    """
    parts = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
    described = {part: _set(content.get(part)) for part in parts}
    if "merges" in described["model"]:
        merges = described["model"]["merges"]
        described["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _set(value: Any) -> Any:
    """Without the options that are None or False."""
    if isinstance(value, list):
        return [_set(item) for item in value]
    if isinstance(value, dict):
        return {name: _set(item) for name, item in value.items() if item is not None and item is not False}
    return value
