"""Registers the launchers as the `fasttx` operators' kernels on CUDA tensors; imported when Triton is first chosen."""

from fasttx.ops import _library

from . import (
    attention,
    attention_bias_bwd,
    attention_bwd,
    cross_entropy,
    embedding,
    feed_forward,
    gelu,
    layer_norm,
    linear,
    self_attention,
    softmax,
)

LAUNCHERS = (
    attention.attention_fwd, attention_bwd.attention_bwd, attention_bias_bwd.attention_bias_bwd,
    gelu.gelu_fwd, gelu.gelu_bwd,
    cross_entropy.linear_cross_entropy_fwd, cross_entropy.linear_cross_entropy_bwd,
    embedding.embedding_fwd, embedding.embedding_bwd,
    softmax.softmax_fwd, softmax.softmax_bwd,
    layer_norm.layer_norm_fwd, layer_norm.layer_norm_bwd, layer_norm.add_layer_norm_fwd, layer_norm.add_layer_norm_bwd,
    linear.linear_fwd, linear.linear_bwd,
    feed_forward.feed_forward_fwd, feed_forward.feed_forward_bwd,
    self_attention.self_attention_fwd, self_attention.self_attention_bwd,
    self_attention.attention_block_fwd, self_attention.attention_block_bwd,
    feed_forward.feed_forward_block_fwd, feed_forward.feed_forward_block_bwd,
)  # fmt: skip
# For eager calls, and for those that are traced.
for _launcher in LAUNCHERS:
    _library.implement(_launcher.__name__, _launcher, "CUDA")
