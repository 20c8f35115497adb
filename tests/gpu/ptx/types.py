"""PTX types as numpy dtypes, the rounding of bfloat16, and immediates."""

import re

import numpy as np

UNSIGNED = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
SIGNED = {8: np.dtype(np.int8), 16: np.dtype(np.int16), 32: np.dtype(np.int32), 64: np.dtype(np.int64)}
FLOAT = {16: np.dtype(np.float16), 32: np.dtype(np.float32), 64: np.dtype(np.float64)}
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
_WIDTHS = {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32}
NUMERIC = re.compile(r"(?:[subf](?:8|16|32|64|128)|pred|bf16|tf32|f16x2|bf16x2)$")


def width(kind: str) -> int:
    """Bits of a PTX type."""
    return _WIDTHS.get(kind) or int(kind.lstrip("subf"))


def dtype(kind: str) -> np.dtype:
    """The numpy dtype that a register is viewed as; bfloat16, TF32 and packed pairs are viewed as their bits."""
    if kind == "pred":
        return np.dtype(bool)
    table = FLOAT if kind in ("f16", "f32", "f64") else SIGNED if kind[0] == "s" else UNSIGNED
    return table[width(kind)]


def is_float(kind: str) -> bool:
    return kind in ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even (rn) or truncated (rz)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if mode == "rz":
        rounded = bits >> np.uint32(16)
    else:
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_tf32(values: np.ndarray, mode: str = "rna") -> np.ndarray:
    """float32 to the bits of TF32 (low 13 bits zero), ties away from zero (rna) or to even (rn)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x1000) if mode == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(values), (bits + half) & np.uint32(0xFFFFE000), bits)


def immediate(text: str, kind: str) -> np.generic:
    """The value of a literal operand, as a numpy scalar of the type's dtype."""
    kind_dtype = dtype(kind)
    if kind == "pred":
        return np.bool_(int(text, 0) != 0)
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view(kind_dtype if kind_dtype.itemsize == 4 else np.dtype(np.float32))
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(kind_dtype)
    bits = int(text.rstrip("U"), 0) & ((1 << width(kind)) - 1)
    return UNSIGNED[width(kind)].type(bits).view(kind_dtype)
