"""Attention and decoders to decode step by step with, and what to feed them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

B, T, S, E, H = 3, 34, 9, 32, 4
CHUNKS = (1, 3, 17)


def later(queries, keys=None):
    """True where a query may not look: the causal mask, for the last of so many keys."""
    keys = queries if keys is None else keys
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)


def make_attention(**options):
    return torch.nn.MultiheadAttention(E, H, **{"batch_first": True, **options}).eval()


def make_decoder(layers=2, **options):
    layer = torch.nn.TransformerDecoderLayer(E, H, 48, **{"batch_first": True, **options})
    decoder = torch.nn.TransformerDecoder(layer, layers, torch.nn.LayerNorm(E)).eval()
    for parameter in decoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def inputs(batch_first=True):
    tensors = torch.randn(B, T, E), torch.randn(B, S, E)
    return tensors if batch_first else tuple(t.transpose(0, 1).contiguous() for t in tensors)


def attend(attention, x, cache, **options):
    return attention(x, x, x, need_weights=False, cache=cache, **options)[0]


def in_steps(run, x, chunk, dim=1):
    """run(part, the tokens before it) on each `chunk` tokens of x, joined again."""
    parts, done = [], 0
    for part in x.split(chunk, dim):
        parts.append(run(part, done))
        done += part.shape[dim]
    return torch.cat(parts, dim)


class Decodes(TorchDispatchMode):
    """Whether each operation that may decode was told that its tokens come one at a time, in the order of calls."""

    OPS = ("cached_attention_block_fwd", "feed_forward_block_fwd")

    def __init__(self):
        super().__init__()
        self.told = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasttx" and func._opname in self.OPS:
            names = [argument.name for argument in func._schema.arguments]
            self.told.append(args[names.index("decodes")])
        return func(*args, **kwargs or {})
