"""Transformer against torch.nn's."""

import copy
import inspect
import pickle

import pytest
import torch
from budget import DTYPES
from pair_checks import assert_budget, assert_equal, casting, ops_of, randomize
from torch.nn import functional as F

import fasttx

B, S, T, E, H, WIDE = 3, 5, 6, 16, 4, 24
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
TRANSFORMERS = [
    {},
    {"batch_first": True},
    {"norm_first": True, "activation": "gelu"},
    {"bias": False, "batch_first": True, "activation": F.gelu, "layer_norm_eps": 1e-2},
    {"activation": torch.nn.SiLU(), "norm_first": True, "batch_first": True},
]


def transformers(**options):
    """torch's and ours, from one seed."""
    made = []
    for nn in (torch.nn, fasttx.nn):
        torch.manual_seed(3)
        made.append(nn.Transformer(E, H, 2, 2, WIDE, **{"dropout": 0.0, **options}))
    return made


def transformer_inputs(batch_first=True):
    src, tgt = torch.randn(B, S, E), torch.randn(B, T, E)
    return {"src": src, "tgt": tgt} if batch_first else {"src": src.transpose(0, 1), "tgt": tgt.transpose(0, 1)}


def transformer_masks():
    """Every query keeps its first key, as torch has NaN for those that keep none."""
    src, tgt, memory = torch.rand(S, S) < 0.4, torch.rand(T, T) < 0.4, torch.rand(T, S) < 0.4
    padding = torch.rand(B, S) < 0.4
    src[:, 0] = tgt[:, 0] = memory[:, 0] = padding[:, 0] = False
    right = torch.arange(T) >= torch.tensor([[T], [1], [4]])
    subsequent = torch.nn.Transformer.generate_square_subsequent_mask(T)
    return [
        {},
        {"src_mask": src, "tgt_mask": tgt, "memory_mask": memory},
        {"src_mask": torch.randn(B * H, S, S), "tgt_mask": torch.randn(T, T)},
        {"tgt_mask": subsequent},
        {"tgt_mask": subsequent, "tgt_is_causal": True, "memory_key_padding_mask": padding},
        {
            "src_key_padding_mask": padding, "memory_key_padding_mask": padding,
            "tgt_key_padding_mask": right, "tgt_mask": CAUSAL,
        },
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", TRANSFORMERS, ids=str)
def test_transformer_equals_torch(options, training):
    theirs, ours = (module.train(training) for module in transformers(**options))
    randomize(theirs)
    inputs = transformer_inputs(options.get("batch_first", False))
    for masks in transformer_masks():
        assert_equal(ours, theirs, inputs, casting(**masks))
    assert_equal(ours, theirs, {"src": torch.randn(S, E), "tgt": torch.randn(T, E)}, casting(tgt_mask=CAUSAL))
    with torch.no_grad():
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(**inputs), theirs(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformer_within_budget(dtype):
    theirs, ours = transformers(batch_first=True, activation="gelu")
    assert_budget(ours, theirs, transformer_inputs(), dtype, casting(tgt_mask=CAUSAL, tgt_is_causal=True))


def test_transformer_is_constructed_as_torchs():
    theirs, ours = transformers(batch_first=True)
    assert repr(ours) == repr(theirs)
    assert [vars(m).keys() for m in ours.modules()] == [vars(m).keys() for m in theirs.modules()]
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert type(ours.encoder) is fasttx.nn.TransformerEncoder
    assert type(ours.decoder.layers[1]) is fasttx.nn.TransformerDecoderLayer
    assert type(ours.decoder.layers[0].multihead_attn) is fasttx.nn.MultiheadAttention
    assert type(ours.encoder.norm) is type(ours.encoder.layers[1].norm2) is fasttx.nn.LayerNorm
    wanted = list(inspect.signature(torch.nn.Transformer).parameters.values())
    *parameters, last = inspect.signature(fasttx.nn.Transformer).parameters.values()
    assert parameters == wanted and last.name == "remove_padding" and last.kind is last.KEYWORD_ONLY
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        assert all(torch.equal(v, state[name]) for name, v in twin.state_dict().items())
    half = fasttx.nn.Transformer(E, H, 1, 1, WIDE, batch_first=True, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(torch.bfloat16, "meta")}


class Doubling(torch.nn.Module):
    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        return 2 * src


def test_transformer_of_custom_parts():
    layer = torch.nn.TransformerDecoderLayer(E, H, WIDE, dropout=0.0, batch_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 1)
    ours = fasttx.nn.Transformer(E, H, custom_encoder=Doubling(), custom_decoder=decoder, batch_first=True)
    theirs = torch.nn.Transformer(
        E, H, custom_encoder=Doubling(), custom_decoder=torch.nn.TransformerDecoder(layer, 1), batch_first=True
    )
    assert type(ours.encoder) is Doubling
    assert type(ours.decoder) is fasttx.nn.TransformerDecoder
    assert type(ours.decoder.layers[0]) is fasttx.nn.TransformerDecoderLayer
    assert_equal(ours, theirs, transformer_inputs())
    with pytest.raises(TypeError, match="remove_padding needs a custom_encoder that is a TransformerEncoder, got Doub"):
        fasttx.nn.Transformer(E, H, custom_encoder=Doubling(), remove_padding=True)


@pytest.mark.parametrize("remove_padding", [False, True])
def test_transformer_removes_padding(remove_padding):
    theirs, _ = transformers(batch_first=True)
    ours = fasttx.nn.Transformer(E, H, 2, 2, WIDE, dropout=0.0, batch_first=True, remove_padding=remove_padding)
    ours.load_state_dict(theirs.state_dict())
    assert ours.encoder.remove_padding is ours.decoder.remove_padding is remove_padding
    inputs, padding = transformer_inputs(), torch.arange(S) >= torch.tensor([[2], [S], [3]])
    masks = {"tgt_mask": CAUSAL, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    assert_equal(ours, theirs, inputs, casting(**masks))
    ops = ops_of(lambda: ours.encoder(inputs["src"], src_key_padding_mask=padding))
    assert ("attention_block_varlen" in ops) is remove_padding


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x, x[:1]),
        lambda m, x: m(x[..., :3], x),
        lambda m, x: m(x, x[..., :3]),
        lambda m, x: m(x, x, tgt_mask=torch.zeros(2, 2, dtype=torch.bool)),
        lambda m, x: m(x, x, src_key_padding_mask=torch.zeros(B, 2, dtype=torch.bool)),
        lambda m, x: m(x, x, src_is_causal=True),
    ],
)
def test_transformer_refuses_what_torch_refuses(call):
    theirs, ours = transformers(batch_first=True)
    x = torch.randn(B, T, E)
    with pytest.raises(Exception) as expected:  # noqa: B017
        call(theirs, x)
    with pytest.raises(type(expected.value)) as raised:
        call(ours, x)
    assert str(raised.value) == str(expected.value)


def test_transformer_compiles():
    _, module = transformers(batch_first=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = {**transformer_inputs(), "tgt_mask": CAUSAL, "tgt_is_causal": True}
    torch.testing.assert_close(compiled(**inputs), module(**inputs))


def test_optimize_and_restore_swap_the_container():
    """The Transformer itself too, and what was made as fasttx's becomes torch's."""
    model = torch.nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    assert type(fasttx.optimize(model)) is fasttx.nn.Transformer
    for made in (model, fasttx.nn.Transformer(16, 2, 1, 1, 32, batch_first=True)):
        assert {type(m).__module__.split(".")[0] for m in fasttx.restore(made).modules()} == {"torch"}


def test_remove_padding_is_a_choice_of_three():
    with pytest.raises(TypeError, match="remove_padding must be True, False or None, got 1"):
        fasttx.nn.Transformer(16, 2, 1, 1, 32, remove_padding=1)
    model = fasttx.nn.Transformer(16, 2, 1, 1, 32, remove_padding=True)
    assert model.remove_padding == (True, True) == (model.encoder.remove_padding, model.decoder.remove_padding)
