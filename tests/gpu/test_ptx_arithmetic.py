"""Arithmetic and bit instructions of the emulator, one by one, against numpy, Python's integers and torch."""

import math

import numpy as np
import pytest
import torch

from gpu.harness import elementwise

RNG = np.random.default_rng(0)
F32 = np.concatenate(
    [
        RNG.standard_normal(150).astype(np.float32) * np.float32(10) ** RNG.integers(-6, 6, 150).astype(np.float32),
        np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38], np.float32),
    ]
)
OTHER = np.roll(F32, 7)
THIRD = np.roll(F32, 31)
EDGES = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF], np.uint32)
U32 = np.concatenate([RNG.integers(0, 2**32, 100, np.uint64).astype(np.uint32), np.repeat(EDGES, 10)])
V32 = np.concatenate([RNG.integers(0, 2**32, 100, np.uint64).astype(np.uint32), np.tile(EDGES, 10)])
U64 = (U32.astype(np.uint64) << np.uint64(32)) | V32


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual, expected)


def close(actual: np.ndarray, expected: np.ndarray, ulps: float = 1) -> None:
    np.testing.assert_allclose(actual, expected, rtol=ulps * 2.0**-23, atol=1e-38)


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 {d}, {a}, {b};", lambda a, b: a + b),
        ("sub.rn.f32 {d}, {a}, {b};", lambda a, b: a - b),
        ("mul.f32 {d}, {a}, {b};", lambda a, b: a * b),
        ("div.rn.f32 {d}, {a}, {b};", lambda a, b: a / b),
        ("min.f32 {d}, {a}, {b};", np.fmin),
        ("max.f32 {d}, {a}, {b};", np.fmax),
        ("min.NaN.f32 {d}, {a}, {b};", np.minimum),
        ("max.NaN.f32 {d}, {a}, {b};", np.maximum),
        ("copysign.f32 {d}, {b}, {a};", np.copysign),
    ],
)
def test_float32(instruction, expected) -> None:
    same(elementwise(instruction, [F32, OTHER], np.float32), expected(F32, OTHER))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("neg.f32 {d}, {a};", np.negative),
        ("abs.f32 {d}, {a};", np.abs),
        ("sqrt.rn.f32 {d}, {a};", np.sqrt),
        ("rcp.approx.f32 {d}, {a};", lambda a: 1 / a),
        ("rsqrt.approx.f32 {d}, {a};", lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)),
        ("ex2.approx.f32 {d}, {a};", np.exp2),
        ("lg2.approx.f32 {d}, {a};", np.log2),
        ("tanh.approx.f32 {d}, {a};", np.tanh),
        ("sin.approx.f32 {d}, {a};", np.sin),
        ("cos.approx.f32 {d}, {a};", np.cos),
    ],
)
def test_functions_of_float32(instruction, expected) -> None:
    close(elementwise(instruction, [F32], np.float32), expected(F32), 4)


def test_fused_multiply_add_rounds_once() -> None:
    got = elementwise("fma.rn.f32 {d}, {a}, {b}, {c};", [F32, OTHER, THIRD], np.float32)
    expected = (F32.astype(np.longdouble) * OTHER.astype(np.longdouble) + THIRD.astype(np.longdouble)).astype(
        np.float32
    )
    same(got, expected)
    a = np.array([1 + 2.0**-12], np.float32)
    assert elementwise("fma.rn.f32 {d}, {a}, {b}, {c};", [a, a, -a * a], np.float32)[0] == 2.0**-24


def test_subnormals_are_flushed_only_when_asked() -> None:
    a, b = np.array([1e-38, -1e-38, 2e-38], np.float32), np.array([0.5, 0.5, 1.0], np.float32)
    same(elementwise("mul.f32 {d}, {a}, {b};", [a, b], np.float32), a * b)
    flushed = elementwise("mul.ftz.f32 {d}, {a}, {b};", [a, b], np.float32)
    same(flushed, np.array([0, -0.0, 2e-38], np.float32))
    assert np.signbit(flushed).tolist() == [False, True, False]


def test_the_fast_quotient_gives_up_on_huge_divisors() -> None:
    a, b = np.array([1, 1, 6], np.float32), np.array([2.0**126, 2.0**127, 3], np.float32)
    same(elementwise("div.full.f32 {d}, {a}, {b};", [a, b], np.float32), np.array([2.0**-126, 0, 2], np.float32))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "min", "max", "fma"])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision(kind: str, name: str, packed: bool) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b, c = (torch.randn(128).to(dtype) for _ in range(3))
    wide = [t.double() for t in (a, b, c)]
    expected = {
        "add": wide[0] + wide[1],
        "sub": wide[0] - wide[1],
        "mul": wide[0] * wide[1],
        "min": torch.minimum(*wide[:2]),
        "max": torch.maximum(*wide[:2]),
        "fma": wide[0] * wide[1] + wide[2],
    }[name].to(dtype)
    count = 3 if name == "fma" else 2
    operands = ", ".join("{" + x + "}" for x in "abc"[:count])
    rounding = ".rn" if name == "fma" else ""
    bits = np.uint32 if packed else np.uint16
    inputs = [t.view(torch.int16).numpy().view(bits) for t in (a, b, c)[:count]]
    got = elementwise(f"{name}{rounding}.{kind}{'x2' if packed else ''} {{d}}, {operands};", inputs, bits)
    same(got.view(np.uint16), expected.view(torch.int16).numpy().view(np.uint16))


def _signed(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32 if x.itemsize == 4 else np.int64)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", ["s", "u"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
        ("div", lambda a, b: -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
        ("rem", lambda a, b: a if b == 0 else abs(a) % abs(b) * (1 if a >= 0 else -1)),
        ("mul.hi", None),
    ],
)
def test_integers(name: str, function, sign: str, bits: int) -> None:
    a, b = (U32, V32) if bits == 32 else (U64, np.roll(U64, 5))
    view = _signed if sign == "s" else lambda x: x
    if name == "mul.hi":
        function = lambda x, y: (x * y) >> bits  # noqa: E731
    got = elementwise(f"{name}.{sign}{bits} {{d}}, {{a}}, {{b}};", [a, b], a.dtype)
    pairs = zip(view(a).tolist(), view(b).tolist(), strict=True)
    same(got, np.array([function(x, y) & ((1 << bits) - 1) for x, y in pairs], a.dtype))


@pytest.mark.parametrize("sign", ["s", "u"])
def test_wide_products(sign: str) -> None:
    a, b = (_signed(U32), _signed(V32)) if sign == "s" else (U32, V32)
    expected = np.array([(int(x) * int(y)) & (2**64 - 1) for x, y in zip(a, b, strict=True)], np.uint64)
    same(elementwise(f"mul.wide.{sign}32 {{d}}, {{a}}, {{b}};", [U32, V32], np.uint64), expected)
    got = elementwise(f"mad.wide.{sign}32 {{d}}, {{a}}, {{b}}, {{c}};", [U32, V32, U64], np.uint64)
    same(got, expected + U64)


def test_multiply_add_of_integers() -> None:
    got = elementwise("mad.lo.s32 {d}, {a}, {b}, {c};", [U32, V32, np.roll(U32, 3)], np.uint32)
    same(got, U32 * V32 + np.roll(U32, 3))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("and.b32 {d}, {a}, {b};", lambda a, b: a & b),
        ("or.b32 {d}, {a}, {b};", lambda a, b: a | b),
        ("xor.b32 {d}, {a}, {b};", lambda a, b: a ^ b),
        ("not.b32 {d}, {a};", lambda a, b: ~a & 0xFFFFFFFF),
        ("shl.b32 {d}, {a}, {b};", lambda a, b: (a << b) & 0xFFFFFFFF if b < 32 else 0),
        ("shr.u32 {d}, {a}, {b};", lambda a, b: a >> b if b < 32 else 0),
        ("shr.s32 {d}, {a}, {b};", lambda a, b: ((a - (a >> 31 << 32)) >> min(b, 31)) & 0xFFFFFFFF),
        ("popc.b32 {d}, {a};", lambda a, b: a.bit_count()),
        ("clz.b32 {d}, {a};", lambda a, b: 32 - a.bit_length()),
        ("brev.b32 {d}, {a};", lambda a, b: int(f"{a:032b}"[::-1], 2)),
        ("bfind.u32 {d}, {a};", lambda a, b: (a.bit_length() - 1) & 0xFFFFFFFF),
        ("bfe.u32 {d}, {a}, 5, 9;", lambda a, b: (a >> 5) & 0x1FF),
        ("bfe.s32 {d}, {a}, 5, 9;", lambda a, b: (((a >> 5) & 0x1FF) - ((a >> 13 & 1) << 9)) & 0xFFFFFFFF),
        ("bfe.s32 {d}, {a}, 30, 5;", lambda a, b: ((a >> 30) - ((a >> 31) << 2)) & 0xFFFFFFFF),
        ("bfi.b32 {d}, {a}, {b}, 4, 12;", lambda a, b: (b & ~0xFFF0) | (a & 0xFFF) << 4),
        ("shf.l.wrap.b32 {d}, {a}, {b}, 9;", lambda a, b: (b << 9 | a >> 23) & 0xFFFFFFFF),
        ("shf.r.clamp.b32 {d}, {a}, {b}, 40;", lambda a, b: b),
        ("prmt.b32 {d}, {a}, {b}, 0x5140;",
         lambda a, b: (a & 0xFF) | (b & 0xFF) << 8 | (a & 0xFF00) << 8 | (b & 0xFF00) << 16),
        ("prmt.b32 {d}, {a}, {b}, 0xBBBB;", lambda a, b: 0xFFFFFFFF if a >> 31 else 0),
        ("lop3.b32 {d}, {a}, {b}, 0x0F0F0F0F, 0xCA;", lambda a, b: (a & b) | (~a & 0x0F0F0F0F)),
    ],
)  # fmt: skip
def test_bits(instruction: str, expected) -> None:
    got = elementwise(instruction, [U32, V32], np.uint32)
    pairs = zip(U32.tolist(), V32.tolist(), strict=True)
    same(got, np.array([expected(a, b) for a, b in pairs], np.uint32))


_ORDERED = {"eq": np.equal, "ne": None, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("name", [*_ORDERED, *(n + "u" for n in _ORDERED), "num", "nan"])
def test_comparisons_of_floats(name: str) -> None:
    got = elementwise(f"setp.{name}.f32 %p1, {{a}}, {{b}};\nselp.b32 {{d}}, 1, 0, %p1;", [F32, OTHER], np.uint32)
    unordered = np.isnan(F32) | np.isnan(OTHER)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    else:
        base = name[:2]
        ordered = (F32 != OTHER) if base == "ne" else _ORDERED[base](F32, OTHER)
        expected = np.where(unordered, name.endswith("u"), ordered)
    same(got, expected.astype(np.uint32))


@pytest.mark.parametrize(("kind", "name"), [("s32", "lt"), ("u32", "lt"), ("s32", "ge"), ("u32", "hi"), ("b32", "eq")])
def test_comparisons_of_integers(kind: str, name: str) -> None:
    body = f"setp.{name}.{kind} %p1|%p2, {{a}}, {{b}};\nselp.b32 {{d}}, 1, 0, %p1;\n@%p2 add.s32 {{d}}, {{d}}, 2;"
    got = elementwise(body, [U32, V32], np.uint32)
    a, b = (_signed(U32), _signed(V32)) if kind == "s32" else (U32, V32)
    holds = {"lt": a < b, "ge": a >= b, "hi": a > b, "eq": a == b}[name]
    same(got, np.where(holds, 1, 2).astype(np.uint32))


def test_comparison_combined_with_a_predicate() -> None:
    body = "setp.lt.u32 %p1, {a}, {b};\nsetp.ne.and.u32 %p2, {a}, 1, !%p1;\nselp.b32 {d}, 1, 0, %p2;"
    same(elementwise(body, [U32, V32], np.uint32), ((U32 != 1) & ~(U32 < V32)).astype(np.uint32))


def _bits_of(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_half_precision_and_back(kind: str, dtype: torch.dtype) -> None:
    values = F32[np.isfinite(F32)]
    expected = torch.from_numpy(values).to(dtype)
    same(elementwise(f"cvt.rn.{kind}.f32 {{d}}, {{a}};", [values], np.uint16), _bits_of(expected))
    pair = elementwise(f"cvt.rn.{kind}x2.f32 {{d}}, {{b}}, {{a}};", [values, values[::-1].copy()], np.uint32)
    same(pair & 0xFFFF, _bits_of(expected).astype(np.uint32))
    same(pair >> 16, _bits_of(expected.flip(0)).astype(np.uint32))
    back = elementwise(f"cvt.f32.{kind} {{d}}, {{a}};", [_bits_of(expected)], np.float32)
    same(back, expected.float().numpy())
    truncated = elementwise(f"cvt.rz.{kind}.f32 {{d}}, {{a}};", [values], np.uint16)
    wide = torch.from_numpy(truncated.view(np.int16)).view(dtype).float().numpy()
    fits = np.abs(values) < 6e4
    assert (np.abs(wide) <= np.abs(values))[fits].all()


def test_rounding_to_tf32() -> None:
    a = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-12, -1 - 2.0**-11, 1 + 2.0**-13], np.float32)
    expected = np.array([1 + 2.0**-10, 1 + 2.0**-10, -1 - 2.0**-10, 1], np.float32)
    same(elementwise("cvt.rna.tf32.f32 {d}, {a};", [a], np.float32), expected)


@pytest.mark.parametrize(
    ("mode", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_to_integers_clamp(mode: str, function) -> None:
    got = elementwise(f"cvt.{mode}.s32.f32 {{d}}, {{a}};", [F32], np.int32)
    wide = np.nan_to_num(function(F32.astype(np.float64)), nan=0.0, posinf=2.0**40, neginf=-(2.0**40))
    same(got, np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32))
    same(elementwise(f"cvt.{mode}.f32.f32 {{d}}, {{a}};", [F32], np.float32), function(F32))


def test_integers_to_floats_and_other_widths() -> None:
    same(elementwise("cvt.rn.f32.s32 {d}, {a};", [U32], np.float32), U32.view(np.int32).astype(np.float32))
    same(elementwise("cvt.rn.f32.u32 {d}, {a};", [U32], np.float32), U32.astype(np.float32))
    same(elementwise("cvt.s64.s32 {d}, {a};", [U32], np.int64), U32.view(np.int32).astype(np.int64))
    same(elementwise("cvt.u64.u32 {d}, {a};", [U32], np.uint64), U32.astype(np.uint64))
    same(elementwise("cvt.u32.u64 {d}, {a};", [U64], np.uint32), V32)
    same(elementwise("cvt.s32.s8 {d}, {a};", [U32], np.int32), U32.astype(np.int8).astype(np.int32))
    same(elementwise("cvt.u16.u32 {d}, {a};", [U32], np.uint16), U32.astype(np.uint16))


def test_registers_taken_apart_and_put_together() -> None:
    same(elementwise("mov.b64 {{%r1, %r2}}, {a};\nmov.b64 {d}, {{%r2, %r1}};", [U64], np.uint64), np.bitwise_or(
        U64 << np.uint64(32), U64 >> np.uint64(32)))  # fmt: skip
    same(
        elementwise("mov.b32 {{%h1, %h2}}, {a};\nmov.b32 {d}, {{%h2, %h1}};", [U32], np.uint32),
        (U32 << np.uint32(16)) | (U32 >> np.uint32(16)),
    )


def test_float64() -> None:
    a, b = RNG.standard_normal(64), RNG.standard_normal(64)
    same(elementwise("add.f64 {d}, {a}, {b};", [a, b], np.float64), a + b)
    same(elementwise("fma.rn.f64 {d}, {a}, {b}, 0d3FF0000000000000;", [a, b], np.float64), a * b + 1)
    same(elementwise("cvt.rn.f32.f64 {d}, {a};", [a], np.float32), a.astype(np.float32))


def test_immediates() -> None:
    got = elementwise("add.f32 {d}, {a}, 0f3F800000;", [F32], np.float32)
    same(got, F32 + np.float32(1))
    assert elementwise("mov.b32 {d}, -1;", [U32], np.uint32)[0] == 0xFFFFFFFF
    assert elementwise("mov.b64 {d}, 0x10;", [U32], np.uint64)[0] == 16
    assert math.isinf(elementwise("mov.b32 {d}, 0fFF800000;", [U32], np.float32)[0])


@pytest.mark.parametrize(
    ("kinds", "first", "second"), [("s32.s32", "i1", "i1"), ("u32.s32", "u1", "i1"), ("u32.u32", "u1", "u1")]
)
def test_products_of_four_bytes(kinds, first, second) -> None:
    got = elementwise(f"dp4a.{kinds} {{d}}, {{a}}, {{b}}, {{c}};", [U32, V32, np.roll(U32, 3)], np.uint32)
    a, b = U32.view(first).reshape(-1, 4).astype(np.int64), V32.view(second).reshape(-1, 4).astype(np.int64)
    np.testing.assert_array_equal(got, ((a * b).sum(1) + np.roll(U32, 3)).astype(np.uint32))


@pytest.mark.parametrize("sign", ["s", "u"])
def test_sums_of_absolute_differences(sign) -> None:
    got = elementwise(f"sad.{sign}32 {{d}}, {{a}}, {{b}}, {{c}};", [U32, V32, np.roll(U32, 3)], np.uint32)
    a, b = (x.view(np.int32 if sign == "s" else np.uint32).astype(np.int64) for x in (U32, V32))
    np.testing.assert_array_equal(got, (np.abs(a - b) + np.roll(U32, 3)).astype(np.uint32))
