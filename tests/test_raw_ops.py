"""Bad input to the raw ops: none reads past its tensors."""

import math

import pytest
import torch
from properties import draw

B, H, T, S, D, DV, W = 2, 4, 3, 5, 8, 6, 7


def f32(*shape):
    return draw(*shape, dtype=torch.float32)


# Of every op, valid arguments by name, and the changes that must each raise.
def wrong(**changes):
    return changes


X, G, VECTOR, SEED = f32(T, W), f32(T, S), f32(W), torch.tensor(1)
WEIGHT = {"input": X, "weight": f32(S, W)}
FFN = {"input": X, "weight1": f32(S, W), "weight2": f32(D, S)}
LAYERS = {"activation": 2, "dropout_p": 0.0, "seed": None}
NO_SEED = wrong(dropout_p=0.5)
BAD_P = [wrong(dropout_p=p, seed=SEED) for p in (-0.5, 1.0, math.nan)]
BAD_SEEDS = [wrong(dropout_p=0.5, seed=s) for s in (SEED.float(), torch.tensor([1, 2]))]
DROPOUT = [NO_SEED, *BAD_P, *BAD_SEEDS]
NORM = {"input": X, "width": W, "weight": VECTOR, "bias": VECTOR, "eps": 1e-5}
NORMED = {"weight": VECTOR, "width": W, "eps": 1e-5}
BAD_NORM = [
    wrong(width=0), wrong(width=-7), wrong(width=5), wrong(weight=f32(W - 1)),
    wrong(weight=VECTOR.double()),
]  # fmt: skip
NEEDS = ("needs_input", "needs_residual", "needs_weight", "needs_bias")
RAW = {
    "gelu_fwd": (
        {"input": X, "bias": VECTOR, "activation": 2},
        [wrong(bias=f32(W + 1)), wrong(bias=f32(1, W)), wrong(activation=9), wrong(activation=-1),
         wrong(input=f32()), wrong(input=X.long(), bias=None), wrong(bias=VECTOR.double())],
    ),
    "gelu_bwd": (
        {"grad": X, "input": X, "bias": VECTOR, "activation": 2, "needs_bias": True},
        [wrong(grad=f32(T, W - 1)), wrong(grad=X.double()), wrong(bias=f32(1)), wrong(activation=4)],
    ),
    "softmax_fwd": (
        {"input": X, "mask": torch.ones(T, W, dtype=torch.bool), "is_causal": False},
        [wrong(mask=torch.ones(T, W + 1, dtype=torch.bool)), wrong(mask=torch.ones(T, W).long()),
         wrong(mask=f32(1, T, W)), wrong(mask=X.double()), wrong(input=f32(), mask=None),
         wrong(input=VECTOR, mask=None, is_causal=True), wrong(input=X.int(), mask=None)],
    ),
    "softmax_bwd": (
        {"grad": X, "output": X},
        [wrong(grad=f32(T, W + 1)), wrong(grad=X.half()), wrong(grad=f32(), output=f32())],
    ),
    "layer_norm_fwd": (
        NORM, [*BAD_NORM, wrong(bias=f32(W + 1)), wrong(input=X.long(), weight=None, bias=None)],
    ),
    "layer_norm_bwd": (
        {"grad": X, "input": X, **NORMED, **dict.fromkeys(("needs_input", *NEEDS[2:]), True)},
        [*BAD_NORM, wrong(grad=f32(T, 1)), wrong(grad=X.half())],
    ),
    "add_layer_norm_fwd": (
        {**NORM, "residual": X, "dropout_p": 0.0, "seed": None, "store_sum": True},
        [*BAD_NORM, *DROPOUT, wrong(residual=f32(1, W)), wrong(residual=X.double())],
    ),
    "add_layer_norm_bwd": (
        {"grad": X, "grad_sum": X, "sum": X, **NORMED, "dropout_p": 0.0, "seed": None,
         **dict.fromkeys(NEEDS, True)},
        [*BAD_NORM, *DROPOUT, wrong(grad=f32(1, W)), wrong(grad_sum=f32(T))],
    ),
    "pack_weight": (
        {"weight": f32(S, W)}, [wrong(weight=VECTOR), wrong(weight=f32(1, S, W)),
                                wrong(weight=torch.ones(S, W, dtype=torch.int8))],
    ),
    "linear_fwd": (
        {**WEIGHT, "bias": f32(S), "packed": None},
        [wrong(weight=f32(S, W + 1)), wrong(weight=VECTOR), wrong(bias=f32(S + 1)),
         wrong(weight=f32(S, W).double()), wrong(packed=torch.zeros(1, dtype=torch.uint8)),
         wrong(packed=f32(S, W)), wrong(input=f32()), wrong(input=X.long())],
    ),
    "linear_bwd": (
        {"grad": G, **WEIGHT, **dict.fromkeys(("needs_input", *NEEDS[2:]), True)},
        [wrong(grad=f32(T, S + 1)), wrong(grad=f32(T - 1, S)), wrong(grad=G.double()),
         wrong(weight=f32(S + 1, W)), wrong(input=f32(T - 1, W))],
    ),
    "feed_forward_fwd": (
        {**FFN, "bias1": f32(S), "bias2": f32(D), **LAYERS, "store_preact": True, "packed1": None,
         "packed2": None},
        [*DROPOUT, wrong(weight1=f32(S, 1)), wrong(weight2=f32(D, 1)), wrong(weight2=f32(S)),
         wrong(bias1=f32(D)), wrong(bias2=f32(S)), wrong(activation=7), wrong(input=f32()),
         wrong(packed1=torch.zeros(3, dtype=torch.uint8)), wrong(packed2=f32(D, S)),
         wrong(weight2=f32(D, S).half())],
    ),
    "feed_forward_bwd": (
        {"grad": f32(T, D), **FFN, "preact": G, **LAYERS, "needs_input": True,
         **{f"needs_{kind}{n}": True for kind in ("weight", "bias") for n in (1, 2)}},
        [*DROPOUT, wrong(grad=f32(T, S)), wrong(preact=f32(T, D)), wrong(preact=f32(1, S)),
         wrong(weight1=f32(S + 1, W)), wrong(activation=-1), wrong(preact=G.double())],
    ),
}  # fmt: skip
Q, K, V = f32(B, H, T, D), f32(B, H, S, D), f32(B, H, S, DV)
ATTENTION = {
    "query": Q, "key": K, "value": V, "attn_mask": None, "key_lengths": None,
    "cu_seqlens_q": None, "cu_seqlens_k": None, "alibi_slopes": None, "is_causal": False,
    "query_offset": 0, "window_left": -1, "window_right": -1, "dropout_p": 0.0, "seed": None,
    "scale": 1.0,
}  # fmt: skip
PACKED = {
    "query": Q[0].transpose(0, 1), "key": K[0].transpose(0, 1), "value": V[0].transpose(0, 1),
    "cu_seqlens_q": torch.tensor([0, T]), "cu_seqlens_k": torch.tensor([0, S]),
}  # fmt: skip
BAD_ATTENTION = [
    *DROPOUT, wrong(query=f32(B, H, T, D + 1)), wrong(key=f32(B, 3, S, D)),
    wrong(key=f32(B + 1, H, S, D)), wrong(value=f32(B, H, S + 1, DV)), wrong(query=f32(H, T, D)),
    wrong(key=K.double()), wrong(key_lengths=torch.tensor([S, S + 1])),
    wrong(key_lengths=torch.tensor([-1, S])), wrong(key_lengths=torch.tensor([S])),
    wrong(key_lengths=torch.tensor([1.0, 2.0])), wrong(alibi_slopes=f32(H + 1)),
    wrong(alibi_slopes=f32(H).half()), wrong(attn_mask=f32(1, 1, T, S + 1)),
    wrong(attn_mask=f32(T, S)), wrong(attn_mask=torch.ones(1, 1, T, S).int()),
    wrong(cu_seqlens_q=torch.tensor([0, T])),
    *(wrong(**PACKED | {"cu_seqlens_k": torch.tensor(c)})
      for c in ([0, S + 1], [1, S], [0, S + 1, S], [0], [])),
]  # fmt: skip
RAW["attention_fwd"] = (
    ATTENTION, [*BAD_ATTENTION, wrong(weights=3), wrong(weights=-1), wrong(**PACKED, weights=1),
                wrong(query=f32(B, 0, T, D), key=f32(B, 0, S, D), value=f32(B, 0, S, DV), weights=2)],
)  # fmt: skip
ATTENTION_BWD = {
    **ATTENTION, "grad": f32(B, H, T, DV), "grad_lse": None, "output": f32(B, H, T, DV), "stats": f32(B, H, T, 2)
}  # fmt: skip
BAD_ATTENTION_BWD = [
    *BAD_ATTENTION, wrong(grad=f32(B, H, T, D)), wrong(output=f32(B, H, 1, DV)), wrong(stats=f32(B, H, T)),
    wrong(stats=f32(B, H, T, 2).double()), wrong(grad_lse=f32(B, H, 1)), wrong(grad_weights=f32(B, H, T, S + 1)),
    wrong(grad_weights=f32(B, H, T, 1)), wrong(grad_weights=f32(1, T, S)), wrong(grad_weights=f32(T, S)),
    wrong(grad_weights=f32(B, T, S).double()),
]  # fmt: skip
RAW["attention_bwd"] = (ATTENTION_BWD, BAD_ATTENTION_BWD)
RAW["attention_bias_bwd"] = (
    {**ATTENTION_BWD, "attn_mask": f32(1, H, T, 1)},
    [*BAD_ATTENTION_BWD, wrong(attn_mask=None), wrong(attn_mask=torch.ones(1, 1, T, S, dtype=torch.bool)),
     wrong(attn_mask=f32(1, H, T, 1).double()), wrong(attn_mask=f32(B + 1, 1, 1, 1))],
)  # fmt: skip
RAW["attention_alibi_bwd"] = (
    {**ATTENTION_BWD, "alibi_slopes": f32(H)}, [*BAD_ATTENTION_BWD, wrong(alibi_slopes=None)]
)

U8 = torch.zeros(3, dtype=torch.uint8)
BLOCK_DROPOUT = [wrong(dropout_p=0.5), wrong(attention_p=0.5), wrong(dropout_p=1.0, seed=SEED),
                 wrong(attention_p=math.nan, attention_seed=SEED)]  # fmt: skip
BLOCK = {
    "input": f32(B, T, W), "weight_in": f32(3 * H * D, W), "weight_out": f32(W, H * D), "norm_weight": VECTOR,
    "eps": 1e-5, "heads": H, "batch_first": True, "attn_mask": None, "cu_seqlens": None, "is_causal": False,
    "scale": 1.0, "attention_p": 0.0, "attention_seed": None, "dropout_p": 0.0, "seed": None,
}  # fmt: skip
BAD_BLOCK = [
    *BLOCK_DROPOUT, wrong(weight_in=f32(3 * H * D, W + 1)), wrong(weight_in=f32(3 * H * D + 1, W)),
    wrong(weight_in=f32(3 * H * D + 3 * H, W)), wrong(weight_out=f32(W + 1, H * D)),
    wrong(weight_out=f32(W - 1, H * D)),
    wrong(weight_out=f32(W, H * D + 1)), wrong(weight_out=f32(W, H * D).double()), wrong(heads=0), wrong(heads=-1),
    wrong(norm_weight=f32(W + 1)), wrong(input=f32(T, W)), wrong(input=f32(B, T, W).half()),
    wrong(attn_mask=f32(1, 1, T, T + 1)), wrong(cu_seqlens=torch.tensor([0, T])),
    wrong(input=f32(T, W), cu_seqlens=torch.tensor([0, T + 1])),
]  # fmt: skip
RAW["attention_block_fwd"] = (
    {**BLOCK, "bias_in": f32(3 * H * D), "bias_out": VECTOR, "norm_bias": VECTOR, "norm_first": False, "store": True,
     "packed_in": None, "packed_out": None},
    [*BAD_BLOCK, wrong(bias_in=f32(H * D)), wrong(bias_out=f32(1)), wrong(norm_bias=f32(1)), wrong(packed_in=U8),
     wrong(packed_out=U8)],
)  # fmt: skip
RAW["attention_block_bwd"] = (
    {**BLOCK, "grad": f32(B, T, W), "qkv": f32(B, T, 3 * H * D), "attended": f32(B, T, H * D),
     "stats": f32(B, H, T, 2), "sum": f32(B, T, W),
     **{f"needs_{n}": True for n in ("input", "weight_in", "bias_in", "weight_out", "bias_out", "norm_weight",
                                     "norm_bias")}},
    [*BAD_BLOCK, wrong(grad=f32(B, T, W + 1)), wrong(grad=f32(B, T, W).double()), wrong(qkv=f32(B, T, 3)),
     wrong(attended=f32(B, T, 1)), wrong(stats=f32(B, H, T)), wrong(sum=f32(B, T, 1)), wrong(sum=f32(B, 1, W))],
)  # fmt: skip
CACHED = {k: v for k, v in BLOCK.items() if k not in ("heads", "batch_first", "cu_seqlens") and "dropout" not in k}
CACHED = {k: v for k, v in CACHED.items() if k not in ("attention_p", "attention_seed", "seed")}
OF_TWO = torch.tensor([0, 1, T])
PACKED = {
    "input": f32(T, W), "weight_in": f32(H * D, W), "bias_in": f32(H * D), "keys": f32(S, H, D),
    "values": f32(S, H, D), "length": S, "cu_seqlens_q": torch.tensor([0, T]), "cu_seqlens_k": torch.tensor([0, S]),
    "attn_mask": None,
}  # fmt: skip
RAW["cached_attention_block_fwd"] = (
    {**CACHED, "bias_in": f32(3 * H * D), "bias_out": VECTOR, "norm_bias": VECTOR, "norm_first": False,
     "keys": f32(B, H, S, D), "values": f32(B, H, S, D), "length": S - T, "cu_seqlens_q": None, "cu_seqlens_k": None,
     "packed_in": None, "packed_out": None, "decodes": False},
    [wrong(weight_in=f32(3 * H * D, W + 1)), wrong(weight_in=f32(2 * H * D, W)), wrong(weight_in=f32(H * D, W)),
     wrong(weight_out=f32(W + 1, H * D)), wrong(weight_out=f32(W, H * D + 1)), wrong(weight_out=f32(W, H * D).double()),
     wrong(norm_weight=f32(W + 1)), wrong(input=f32(T, W)), wrong(input=f32(B, T, W).half()), wrong(input=f32(1, T, W)),
     wrong(attn_mask=f32(1, 1, T, S + 1)), wrong(bias_in=f32(H * D)), wrong(bias_out=f32(1)), wrong(norm_bias=f32(1)),
     wrong(length=-1), wrong(length=S - T + 1), wrong(keys=f32(B, H, S, D + 1)), wrong(values=f32(B, H, S + 1, D)),
     wrong(keys=f32(B, H, S, D).double()), wrong(values=f32(B, H, S, D).half()), wrong(keys=f32(B, 2 * H, S, D)),
     wrong(keys=f32(H, S, D), values=f32(H, S, D)), wrong(keys=f32(B, H, D, S).mT), wrong(values=f32(B, H, D, S).mT),
     wrong(packed_in=U8), wrong(packed_out=U8), wrong(cu_seqlens_q=OF_TWO), wrong(cu_seqlens_k=OF_TWO),
     wrong(cu_seqlens_q=OF_TWO, cu_seqlens_k=OF_TWO), wrong(**PACKED | {"weight_in": f32(3 * H * D, W)}),
     wrong(**PACKED | {"keys": f32(S, H, D + 1)}), wrong(**PACKED | {"values": f32(S + 1, H, D)}),
     wrong(**PACKED | {"keys": f32(B, H, S, D), "values": f32(B, H, S, D)}), wrong(**PACKED | {"length": S + 1}),
     wrong(**PACKED | {"cu_seqlens_q": torch.tensor([0, T + 1])}),
     wrong(**PACKED | {"cu_seqlens_k": torch.tensor([0])}),
     wrong(**PACKED | {"cu_seqlens_k": torch.tensor([0, S + 1])}), wrong(**PACKED | {"input": f32(1, T, W)})],
)  # fmt: skip
SELF = {k: v for k, v in BLOCK.items() if k not in ("norm_weight", "eps", "dropout_p", "seed")}
BAD_SELF = [
    wrong(attention_p=0.5), wrong(attention_p=math.nan, attention_seed=SEED), wrong(weight_in=f32(3 * H * D, W + 1)),
    wrong(weight_in=f32(3 * H * D + 1, W)), wrong(weight_in=f32(3 * H * D + 3 * H, W)),
    wrong(weight_out=f32(W, H * D + 1)), wrong(weight_out=f32(W, H * D).double()), wrong(weight_out=VECTOR),
    wrong(heads=0), wrong(heads=-1), wrong(input=f32(T, W)), wrong(input=f32()), wrong(input=f32(B, T, W).half()),
    wrong(attn_mask=f32(1, 1, T, T + 1)), wrong(cu_seqlens=torch.tensor([0, T])),
    wrong(input=f32(T, W), cu_seqlens=torch.tensor([0, T + 1])),
]  # fmt: skip
RAW["self_attention_fwd"] = (
    {**SELF, "bias_in": f32(3 * H * D), "bias_out": VECTOR, "store": True, "packed_in": None, "packed_out": None},
    [*BAD_SELF, wrong(bias_in=f32(H * D)), wrong(bias_out=f32(1)), wrong(packed_in=U8), wrong(packed_out=U8),
     wrong(weights=3), wrong(weights=1, input=f32(T, W), cu_seqlens=torch.tensor([0, T]))],
)  # fmt: skip
RAW["self_attention_bwd"] = (
    {**SELF, "grad": f32(B, T, W), "qkv": f32(B, T, 3 * H * D), "attended": f32(B, T, H * D),
     "stats": f32(B, H, T, 2),
     **{f"needs_{n}": True for n in ("input", "weight_in", "bias_in", "weight_out", "bias_out")}},
    [*BAD_SELF, wrong(grad=f32(B, T, W + 1)), wrong(grad=f32(B, T, W).double()), wrong(qkv=f32(B, T, 3)),
     wrong(attended=f32(B, T, 1)), wrong(stats=f32(B, H, T)), wrong(grad_weights=f32(B, T, T + 1)),
     wrong(grad_weights=f32(B, 1, T, T))],
)  # fmt: skip
FFN_DROPOUT = [wrong(dropout1_p=0.5), wrong(dropout2_p=0.5), wrong(dropout1_p=1.0, seed1=SEED),
               wrong(dropout2_p=-0.5, seed2=SEED)]  # fmt: skip
FFN_BLOCK = {
    "input": X, "weight1": f32(S, W), "weight2": f32(W, S), "norm_weight": VECTOR, "eps": 1e-5, "activation": 2,
    "dropout1_p": 0.0, "seed1": None, "dropout2_p": 0.0, "seed2": None,
}  # fmt: skip
BAD_FFN_BLOCK = [
    *FFN_DROPOUT, wrong(weight1=f32(S, 1)), wrong(weight2=f32(W + 1, S)), wrong(weight2=f32(W - 1, S)),
    wrong(weight2=f32(W, 1)), wrong(weight2=f32(W, S).half()), wrong(norm_weight=f32(1)), wrong(activation=7),
]  # fmt: skip
RAW["feed_forward_block_fwd"] = (
    {**FFN_BLOCK, "bias1": f32(S), "bias2": VECTOR, "norm_bias": VECTOR, "norm_first": False, "store": True,
     "packed1": None, "packed2": None, "decodes": False},
    [*BAD_FFN_BLOCK, wrong(bias1=f32(1)), wrong(bias2=f32(1)), wrong(norm_bias=f32(1)), wrong(packed1=U8),
     wrong(packed2=U8)],
)  # fmt: skip
RAW["feed_forward_block_bwd"] = (
    {**FFN_BLOCK, "grad": X, "preact": G, "sum": X,
     **{f"needs_{n}": True for n in ("input", "weight1", "bias1", "weight2", "bias2", "norm_weight", "norm_bias")}},
    [*BAD_FFN_BLOCK, wrong(grad=f32(T, W + 1)), wrong(preact=f32(T, 1)), wrong(sum=f32(T, 1)), wrong(sum=f32(1, W))],
)  # fmt: skip

LOSS = {"input": X, "weight": f32(S, W), "target": torch.tensor([0, -100, S - 1]), "bias": f32(S), "ignore_index": -100,
        "label_smoothing": 0.1, "reduction": 1}  # fmt: skip
BAD_LOSS = [
    wrong(weight=f32(S, W + 1)), wrong(weight=f32(S, W).half()), wrong(weight=VECTOR),
    wrong(weight=f32(0, W), bias=None), wrong(bias=f32(S + 1)), wrong(bias=f32(S).double()), wrong(target=f32(T)),
    wrong(target=torch.tensor([0, 1])),
    wrong(target=torch.ones(T, 1).long()), wrong(target=torch.ones(T).int()), wrong(label_smoothing=1.5),
    wrong(label_smoothing=math.nan), wrong(reduction=3),
    wrong(reduction=-1), wrong(input=f32()), wrong(input=X.long()),
]  # fmt: skip
RAW["linear_cross_entropy_fwd"] = (LOSS, BAD_LOSS)
RAW["linear_cross_entropy_bwd"] = (
    {**LOSS, "grad": f32(), "stats": f32(T, 2).abs(), **{f"needs_{n}": True for n in ("input", "weight", "bias")}},
    [*BAD_LOSS, wrong(grad=f32(T)), wrong(grad=f32().double()), wrong(reduction=0), wrong(stats=f32(T)),
     wrong(stats=f32(T - 1, 2)), wrong(stats=f32(T, 2).double())],
)  # fmt: skip
IDS = torch.tensor([[0, S - 1, 2]])
EMBEDDING = {
    "token_ids": IDS, "token_weight": f32(S, W), "position_ids": torch.tensor([[3, 0, D - 1]]),
    "position_weight": f32(D, W), "segment_ids": torch.tensor([[0, 1, 1]]), "segment_weight": f32(2, W),
    "norm_weight": VECTOR, "norm_bias": VECTOR, "token_scale": 1.0, "offset": 0, "eps": 1e-5, "dropout_p": 0.0,
    "seed": None, "padding_idx": -1,
}  # fmt: skip
BAD_EMBEDDING = [
    *DROPOUT, wrong(token_weight=VECTOR), wrong(token_weight=f32(S, 0)), wrong(token_weight=f32(S, W).long()),
    wrong(token_ids=IDS.int()), wrong(position_ids=IDS[0]), wrong(position_ids=IDS.float()),
    wrong(position_weight=f32(D, W + 1)), wrong(position_weight=f32(D, W).half()), wrong(position_weight=None),
    wrong(position_ids=None, offset=D - 2), wrong(position_ids=None, offset=-1),
    wrong(segment_weight=f32(2, W - 1)), wrong(segment_weight=None), wrong(segment_weight=f32(0, W), segment_ids=None),
    wrong(norm_weight=f32(W + 1)), wrong(norm_bias=f32(1)), wrong(norm_weight=None),
]  # fmt: skip
RAW["embedding_fwd"] = (EMBEDDING, BAD_EMBEDDING)
NEEDS_ENTRIES = {f"needs_{n}": True for n in ("token", "position", "segment", "norm_weight", "norm_bias")}
RAW["embedding_bwd"] = (
    {**EMBEDDING, **NEEDS_ENTRIES, "grad": f32(1, T, W)},
    [*BAD_EMBEDDING, wrong(grad=f32(T, W)), wrong(grad=f32(1, T, W).double()),
     wrong(segment_weight=None, segment_ids=None), wrong(position_weight=None, position_ids=None),
     wrong(norm_weight=None, norm_bias=None)],
)  # fmt: skip
# What is wrong by a tensor's values: kernels that would have to wait to see them may take it, and read nothing outside.
WRONG_VALUES = {
    "linear_cross_entropy": [wrong(target=torch.tensor([0, 1, c])) for c in (S, -1, 2**40)],
    "embedding": [
        *(wrong(token_ids=IDS + n) for n in (1, -1, 2**40)), wrong(position_ids=IDS + 4), wrong(segment_ids=IDS)
    ],
}  # fmt: skip


def raw_ops():
    """The names of fasttx's ops, whose overloads `default` and `raw` are one function."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].removesuffix(".raw") for name in names if name.startswith("fasttx::")}


def test_every_raw_op_is_here():
    assert set(RAW) == raw_ops()


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("name", RAW)
def test_raw_ops_check_their_arguments(name):
    """Each alone: right arguments pass; wrong ones raise before memory is touched."""
    valid, changes = RAW[name]
    by_value = WRONG_VALUES.get(name.removesuffix("_fwd").removesuffix("_bwd"), ())
    op = getattr(torch.ops.fasttx, name).default
    op(**valid)
    for change in (*changes, *by_value):
        try:
            op(**valid | change)
        except (RuntimeError, TypeError) as error:
            assert str(error)
        else:
            pytest.fail(f"{name} took {change}")
