"""What a transformer's first layer reads: tokens, positions and segments, summed, normalised and dropped."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx import functional, reference
from fasttx.cli import eager
from fasttx.rng import draw_seed

from .case import DTYPES, Case, Work, item_size, op_work, tensors

_WIDTH, _TOKENS, _POSITIONS, _SEGMENTS = 768, 30522, 512, 2
_DROPOUT = 0.1


def cases() -> Iterator[Case]:
    """BERT's: forward of few and of many tokens, forward and backward with dropout."""
    for dtype in DTYPES:
        for (batch, length), backward in (((1, 128), False), ((8, 512), False), ((8, 512), True)):
            rows = batch * length
            entries = _TOKENS + _POSITIONS + _SEGMENTS
            moved = (7 * rows + entries if backward else 3 * rows) * _WIDTH * item_size(dtype)
            yield Case(
                "embedding", "dropout fwd+bwd" if backward else "fwd", f"({batch},{length},{_WIDTH})", dtype,
                partial(_work, batch, length, dtype, backward),
                flops=(30 if backward else 10) * rows * _WIDTH, bytes=moved,
            )  # fmt: skip


def _theirs(
    token_ids: Tensor, token_weight: Tensor, position_weight: Tensor, segment_ids: Tensor, segment_weight: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, *, dropout_p: float,
) -> Tensor:  # fmt: skip
    positions = torch.arange(token_ids.shape[-1])
    total = F.embedding(token_ids, token_weight) + F.embedding(segment_ids, segment_weight)
    total = total + F.embedding(positions, position_weight)
    return F.dropout(F.layer_norm(total, (total.shape[-1],), norm_weight, norm_bias), dropout_p)


def _work(batch: int, length: int, dtype: torch.dtype, backward: bool) -> Work:
    inputs = tensors(
        dtype, token_weight=(_TOKENS, _WIDTH), position_weight=(_POSITIONS, _WIDTH), segment_weight=(_SEGMENTS, _WIDTH),
        norm_weight=(_WIDTH,), norm_bias=(_WIDTH,),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    inputs["token_ids"] = torch.randint(0, _TOKENS, (batch, length), generator=generator)
    inputs["segment_ids"] = torch.randint(0, _SEGMENTS, (batch, length), generator=generator)
    options = {"dropout_p": _DROPOUT if backward else 0.0, "training": True}
    torch.manual_seed(0)
    known = options | {"seed": draw_seed()}
    ours = partial(functional.embedding, **options)

    def judged(**inputs):
        torch.manual_seed(0)
        return ours(**inputs)

    return op_work(
        inputs, {"embedding, layer_norm, dropout": partial(_theirs, dropout_p=options["dropout_p"])}, ours,
        partial(reference.embedding, **known), backward=backward, judged=judged,
        eager=partial(eager.embedding, **known),
    )  # fmt: skip
