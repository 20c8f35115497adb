"""What is measured on a GPU: each op at sizes of real models, forward and forward + backward, beside its rivals.

A variant is a function of the case's tensors. Every variant of a case computes the same, which is checked before it is
timed; a rival that is not installed, or that cannot take the case, is left out with the reason.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fasttx
from fasttx import functional

Variant = Callable[..., Tensor]


@dataclass
class Case:
    """One op on one input: `inputs` by name, floating ones differentiated where `backward`; the least flops and bytes.

    bytes: every input, result and gradient moved once. rivals: by name, a function of the inputs, or the reason why
    there is none. fasttx is what `auto` takes; backends: by name, fasttx on each that there may be instead.
    """

    op: str
    shape: str
    dtype: torch.dtype
    backward: bool
    inputs: dict[str, Tensor]
    flops: float
    bytes: float
    fasttx: Variant
    eager: Variant
    rivals: dict[str, Variant | str] = field(default_factory=dict)
    backends: dict[str, Variant] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """op, shape, dtype and direction."""
        direction = "fwd+bwd" if self.backward else "fwd"
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')} {direction}"

    def call(self, variant: Variant) -> Callable[[], object]:
        """The variant, and its gradients where they are measured, on the case's own tensors."""
        if not self.backward:
            return torch.no_grad()(lambda: variant(**self.inputs))
        leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in self.inputs.items()}
        wanted = [x for x in leaves.values() if x.requires_grad]
        slope = torch.randn_like(variant(**leaves))
        return lambda: torch.autograd.grad(variant(**leaves), wanted, slope)


def _bytes(inputs: dict[str, Tensor], result: Tensor, backward: bool) -> float:
    moved = sum(x.nbytes for x in inputs.values())
    # Backward: inputs again, the result's slope, and every input's gradient.
    return float(moved + result.nbytes + (2 * moved + result.nbytes if backward else 0))


def _case(
    op: str, shape: str, dtype: torch.dtype, backward: bool, inputs: dict[str, Tensor], flops: float,
    of_rivals: tuple[str, ...] = (), **variants,
) -> Case:  # fmt: skip
    """of_rivals: the inputs that are what only rivals ask for; they need not be moved."""
    with torch.no_grad():  # no memory, nor time: a case that the GPU is too small for is to fail when its turn comes
        result = variants["eager"](**{name: x.to("meta") for name, x in inputs.items()})
    rivals = {"torch.compile": _compiled(variants["eager"]), **variants.pop("rivals", {})}
    moved = _bytes({name: x for name, x in inputs.items() if name not in of_rivals}, result, backward)
    is_on_gpu = any(x.is_cuda for x in inputs.values())
    backends = {f"fasttx on {name}": _on(name, variants["fasttx"]) for name in ("triton", "cuda") if is_on_gpu}
    return Case(
        op, shape, dtype, backward, inputs, flops * (3 if backward else 1), moved, rivals=rivals, backends=backends,
        **variants,
    )  # fmt: skip


def _on(backend: str, variant: Variant) -> Variant:
    def call(**inputs: Tensor) -> Tensor:
        with fasttx.backend(backend):
            return variant(**inputs)

    return call


def _compiled(function: Variant) -> Variant:
    return torch.compile(function, dynamic=False)


def _installed(module: str, make: Callable[[object], Variant]) -> Variant | str:
    try:
        return make(importlib.import_module(module))
    except Exception as error:  # a rival that fails to import, in whatever way, is only left out
        return f"{module}: {error}"


def _draw(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def layer_norms(device: str, dtype: torch.dtype, backward: bool, rows: int, widths: tuple[int, ...]) -> Iterator[Case]:
    """Layer norm, alone and of residual + input."""
    draw = _draw(device, dtype)
    liger = _installed(
        "liger_kernel.ops.layer_norm",
        lambda m: lambda input, weight, bias: m.LigerLayerNormFunction.apply(input, weight, bias, 1e-5),
    )
    for width in widths:
        shape = (width,)
        inputs = {"input": draw(rows, width), "weight": draw(width), "bias": draw(width)}
        yield _case(
            "layer_norm", f"{rows}x{width}", dtype, backward, inputs, 8.0 * rows * width,
            fasttx=lambda input, weight, bias, s=shape: functional.layer_norm(input, s, weight, bias),
            eager=lambda input, weight, bias, s=shape: F.layer_norm(input, s, weight, bias),
            rivals={"liger": liger},
        )  # fmt: skip
        yield _case(
            "add_layer_norm", f"{rows}x{width}", dtype, backward, {**inputs, "residual": draw(rows, width)},
            9.0 * rows * width,
            fasttx=lambda input, weight, bias, residual, s=shape: functional.add_layer_norm(
                input, residual, s, weight, bias
            ),
            eager=lambda input, weight, bias, residual, s=shape: F.layer_norm(residual + input, s, weight, bias),
        )  # fmt: skip


def elementwise(device: str, dtype: torch.dtype, backward: bool, rows: int, width: int) -> Iterator[Case]:
    """Bias + GELU, and softmax."""
    draw = _draw(device, dtype)
    yield _case(
        "bias_gelu", f"{rows}x{width}", dtype, backward, {"input": draw(rows, width), "bias": draw(width)},
        20.0 * rows * width, fasttx=functional.bias_gelu, eager=lambda input, bias: F.gelu(input + bias),
    )  # fmt: skip
    yield _case(
        "softmax", f"{rows}x{width}", dtype, backward, {"input": draw(rows, width)}, 5.0 * rows * width,
        fasttx=functional.softmax, eager=lambda input: torch.softmax(input, -1),
    )  # fmt: skip


def feed_forwards(
    device: str, dtype: torch.dtype, backward: bool, rows: int, widths: tuple[int, ...]
) -> Iterator[Case]:
    """linear, GELU, linear, the hidden dim four times the width."""
    draw = _draw(device, dtype)
    for width in widths:
        hidden = 4 * width
        inputs = {
            "input": draw(rows, width), "weight1": draw(hidden, width) / width**0.5, "bias1": draw(hidden),
            "weight2": draw(width, hidden) / hidden**0.5, "bias2": draw(width),
        }  # fmt: skip
        yield _case(
            "feed_forward", f"{rows}x{width}x{hidden}", dtype, backward, inputs, 4.0 * rows * width * hidden,
            fasttx=functional.feed_forward,
            eager=lambda input, weight1, bias1, weight2, bias2: F.linear(
                F.gelu(F.linear(input, weight1, bias1)), weight2, bias2
            ),
        )  # fmt: skip


def ends(device: str, dtype: torch.dtype, backward: bool, rows: int, width: int, entries: int) -> Iterator[Case]:
    """What a language model begins and ends with: embeddings with layer norm, and a linear layer with its loss."""
    draw = _draw(device, dtype)
    ids = torch.randint(0, entries, (rows // 64, 64), device=device)
    inputs = {
        "token_ids": ids, "token_weight": draw(entries, width), "position_weight": draw(64, width),
        "norm_weight": draw(width), "norm_bias": draw(width),
    }  # fmt: skip

    def eager_embedding(token_ids, token_weight, position_weight, norm_weight, norm_bias):
        total = F.embedding(token_ids, token_weight) + position_weight
        return F.layer_norm(total, (width,), norm_weight, norm_bias)

    yield _case(
        "embedding", f"{rows}x{width} of {entries}", dtype, backward, inputs, 10.0 * rows * width,
        fasttx=functional.embedding, eager=eager_embedding,
    )  # fmt: skip
    liger = _installed(
        "liger_kernel.ops.fused_linear_cross_entropy",
        lambda m: lambda input, weight, target: m.LigerFusedLinearCrossEntropyFunction.apply(input, weight, target)[0],
    )
    inputs = {"input": draw(rows, width), "weight": draw(entries, width) / width**0.5, "target": ids.flatten()}
    yield _case(
        "linear_cross_entropy", f"{rows}x{width}x{entries}", dtype, backward, inputs, 2.0 * rows * width * entries,
        fasttx=functional.linear_cross_entropy,
        eager=lambda input, weight, target: F.cross_entropy(F.linear(input, weight), target),
        rivals={"liger": liger},
    )  # fmt: skip


def _by_backend(call: Variant) -> dict[str, Variant]:
    """A call of scaled_dot_product_attention on each of its backends alone; which it takes itself is eager's."""

    def on(backend: SDPBackend) -> Variant:
        def run(**inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return call(**inputs)

        return run

    backends = {
        "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }  # fmt: skip
    return {f"sdpa {name}": on(backend) for name, backend in backends.items()}


def _flash_attn(**options) -> Variant | str:
    def make(module) -> Variant:
        return lambda **inputs: module.flash_attn_func(
            *(inputs[name].transpose(1, 2) for name in ("query", "key", "value")), **options
        ).transpose(1, 2)

    return _installed("flash_attn", make)


# Of the work of a forward and backward, which is the forward's three times elsewhere: attention's multiplies five
# matrices backward after two forward.
_ATTENTION_BACKWARD = 3.5 / 3


def attentions(device: str, dtype: torch.dtype, backward: bool, shapes: tuple[tuple[int, ...], ...]) -> Iterator[Case]:
    """Attention, causal and not, beside every backend of scaled_dot_product_attention and flash-attn."""
    draw = _draw(device, dtype)
    for batch, heads, tokens, width in shapes:
        for causal in (False, True):
            inputs = {name: draw(batch, heads, tokens, width) for name in ("query", "key", "value")}
            shape = f"{batch}x{heads}x{tokens}x{width}{' causal' if causal else ''}"
            flops = 4.0 * batch * heads * tokens * tokens * width * (0.5 if causal else 1)
            eager = partial(F.scaled_dot_product_attention, is_causal=causal)
            yield _case(
                "attention", shape, dtype, backward, inputs, flops * (_ATTENTION_BACKWARD if backward else 1),
                fasttx=partial(functional.attention, is_causal=causal), eager=eager,
                rivals={"flash-attn": _flash_attn(causal=causal), **_by_backend(eager)},
            )  # fmt: skip


def padded_attention(
    device: str, dtype: torch.dtype, backward: bool, batch: int, heads: int, tokens: int, width: int
) -> Iterator[Case]:
    """Causal attention of sequences between half as long and as long as the longest; rivals get the mask made."""
    draw = _draw(device, dtype)
    longest = [tokens - i * tokens // (2 * batch) for i in range(batch)]
    lengths = torch.tensor(longest, device=device)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    mask = seen & (torch.arange(tokens, device=device) < lengths.view(-1, 1, 1, 1))
    inputs = {name: draw(batch, heads, tokens, width) for name in ("query", "key", "value")}
    pairs = sum(n * (n + 1) // 2 + (tokens - n) * n for n in longest)
    flops = 4.0 * heads * width * pairs * (_ATTENTION_BACKWARD if backward else 1)

    def eager(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def fasttx(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor, mask: Tensor) -> Tensor:
        return functional.attention(query, key, value, key_lengths=key_lengths, is_causal=True)

    yield _case(
        "attention", f"{batch}x{heads}x{tokens}x{width} causal padded", dtype, backward,
        {**inputs, "key_lengths": lengths, "mask": mask}, flops, ("mask",), fasttx=fasttx, eager=eager,
        rivals={"flash-attn": "flash_attn_func takes no mask", **_by_backend(eager)},
    )  # fmt: skip


def decoding(device: str, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> Iterator[Case]:
    """Attention of one query over the keys of a cache, several heads sharing one of keys; there is no backward."""
    draw = _draw(device, dtype)
    for batch, heads, kv_heads, keys, width in shapes:
        inputs = {
            "query": draw(batch, heads, 1, width), "key": draw(batch, kv_heads, keys, width),
            "value": draw(batch, kv_heads, keys, width),
        }  # fmt: skip
        eager = partial(F.scaled_dot_product_attention, enable_gqa=True)
        yield _case(
            "decoding", f"{batch}x{heads}/{kv_heads}x{keys}x{width}", dtype, False, inputs,
            4.0 * batch * heads * keys * width, fasttx=partial(functional.attention, enable_gqa=True), eager=eager,
            rivals={"flash-attn": _flash_attn(), **_by_backend(eager)},
        )  # fmt: skip


def all_cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Every case; quick: tiny ones of each kind, to see that all of it runs."""
    rows = 64 if quick else 16384
    for backward in (False, True):
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
            yield from layer_norms(device, dtype, backward, rows, (64,) if quick else (768, 1024, 4096))
            yield from elementwise(device, dtype, backward, rows, 128 if quick else 3072)
        yield from ends(device, torch.bfloat16, backward, *((rows, 64, 96) if quick else (4096, 768, 50257)))
        for few in (rows,) if quick else (512, rows):
            yield from feed_forwards(device, torch.bfloat16, backward, few, (64,) if quick else (768, 1024))
        shapes = ((2, 2, 64, 32),) if quick else ((8, 12, 512, 64), (2, 16, 4096, 64), (1, 16, 4096, 128))
        yield from attentions(device, torch.bfloat16, backward, shapes)
        usual = shapes[0]
        yield from attentions(device, torch.float32, backward, (usual,))
        yield from padded_attention(device, torch.bfloat16, backward, *usual)
        if not backward:
            caches = ((2, 4, 2, 300, 32),) if quick else ((8, 32, 8, 4096, 128), (64, 12, 12, 1024, 64))
            yield from decoding(device, torch.bfloat16, caches)


def standard(case: Case) -> tuple[Tensor, float]:
    """Eager's result in float64, and the largest error of eager in its own dtype: at least an ulp of float64."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.items()}
    with torch.no_grad():
        truth = case.eager(**wide)
        own = (case.eager(**case.inputs).double() - truth).abs().max().item()
    return truth, max(own, math.ulp(truth.abs().max().item()))


def agrees(case: Case, variant: Variant, against: tuple[Tensor, float]) -> float:
    """The variant's largest error `against` what `standard` gave, in units of eager's own."""
    truth, own = against
    with torch.no_grad():
        return (variant(**case.inputs).double() - truth).abs().max().item() / own
