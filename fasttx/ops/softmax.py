"""Masked softmax over the last dim."""

import torch
from torch import Tensor

from ._library import define, differentiate, forbid_double_backward, given, map_rows, plain_call, run, wants_grad


def _dense_like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _softmax_fwd(input, mask, is_causal):
    return _dense_like(input)


def _softmax_bwd(grad, output):
    return _dense_like(output)


softmax_fwd = define("softmax_fwd(Tensor input, Tensor? mask, bool is_causal) -> Tensor", _softmax_fwd, on_cuda=True)
softmax_bwd = define("softmax_bwd(Tensor grad, Tensor output) -> Tensor", _softmax_bwd, on_cuda=True)


def _save(ctx, inputs, output):
    _, mask, _ = inputs
    ctx.save_for_backward(output)
    if ctx.needs_input_grad[1]:
        ctx.mask_shape, ctx.mask_dtype = mask.shape, mask.dtype


def _backward(ctx, grad):
    (output,) = ctx.saved_tensors
    needs_input, needs_mask, _ = ctx.needs_input_grad
    dinput = softmax_bwd(grad, output)
    # The mask is added to the input: its gradient is the input's, summed where the mask repeats.
    dmask = dinput.to(ctx.mask_dtype).sum_to_size(ctx.mask_shape) if needs_mask else None
    return given(dinput, needs_input), dmask, None


differentiate(softmax_fwd, _backward, _save)
forbid_double_backward(softmax_bwd)
plain_softmax = plain_call(softmax_fwd)
map_rows(softmax_fwd, "input", alone=("mask",))
map_rows(softmax_bwd, "grad", "output")


def softmax(input: Tensor, mask: Tensor | None, is_causal: bool, dim: int, backend: str = "") -> Tensor:
    """Softmax along dim of what the mask, broadcastable to input, keeps."""
    if dim not in (-1, input.dim() - 1):
        if mask is not None:
            mask = mask[(None,) * (input.dim() - mask.dim())].transpose(dim, -1)
        return softmax(input.transpose(dim, -1), mask, is_causal, -1, backend).transpose(dim, -1)
    if mask is not None and mask.dtype != torch.bool and input.dtype == torch.float64:
        mask = mask.to(torch.float64)
    if mask is not None and input.dim() > 4 and mask.dim() > 3:
        # The kernel knows four dims: those in front fold into one.
        mask = mask.expand(input.shape).flatten(0, -4)
    return run(softmax_fwd.on(backend), wants_grad(input, mask), input, mask, is_causal)
