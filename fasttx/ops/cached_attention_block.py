"""The attention half of a decoder layer over keys and values kept from call to call: inference alone.

norm(x + f(x)), or x + f(norm(x)), with f(x) = out(attention(q, keys, values)) and in(x) the queries q; or q, and the
keys and values of the tokens x themselves, which are first written behind those that are kept.
"""

from torch import Tensor
from torch.compiler import is_compiling

from fasttx.packing import packed

from ._library import define

cached_attention_block_fwd = define(
    "cached_attention_block_fwd(Tensor input, Tensor weight_in, Tensor? bias_in, Tensor weight_out,"
    " Tensor? bias_out, Tensor? norm_weight, Tensor? norm_bias, float eps, bool norm_first, Tensor(a!) keys,"
    " Tensor(b!) values, int length, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool is_causal,"
    " float scale, Tensor? packed_in, Tensor? packed_out, bool decodes) -> Tensor",
    lambda input, *_: input.new_empty(input.shape),
)


def cached_attention_block(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    keys: Tensor,
    values: Tensor,
    length: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    decodes: bool = False,
) -> Tensor:
    """The half's output (B, T, width); it has no gradient.

    keys, values (B, H, capacity, D): room of which `length` places are filled. weight_in (3 * H * D, width): those of
    the tokens of input go to the places after, and is_causal lets each attend to itself and what is before it.
    weight_in (H * D, width): nothing is written. attn_mask has 4 dims that broadcast to (B, H, T, all that is seen).
    With cu_seqlens_q and cu_seqlens_k, input (total_q, width) and keys, values (total_k, H, D) are packed sequences.
    decodes: tokens come one at a time, as few rows.
    """
    op = cached_attention_block_fwd.registered if is_compiling() else cached_attention_block_fwd.raw
    return op(
        input, weight_in, bias_in, weight_out, bias_out, norm_weight, norm_bias, eps, norm_first, keys, values,
        length, attn_mask, cu_seqlens_q, cu_seqlens_k, is_causal, scale,
        packed(weight_in, decodes), packed(weight_out, decodes), decodes,
    )  # fmt: skip
