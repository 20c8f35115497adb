"""BERT's heads against Hugging Face's, and what each learns from and leaves out."""

import copy
import dataclasses
import json
import sys
import warnings

import pytest
import torch
from bert_models import HEADS, TINY, Tokenizer, batch, copied, flat_valid, heads, hugging_face
from budget import assert_within_budget

from fasttx.models import (
    Bert,
    BertForPretraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertHeadConfig,
    ModelFileError,
    TokenizerMismatchError,
)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


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
    for ours, kind in (
        (BertForSequenceClassification, "BertForTokenClassification"),
        (BertForPretraining, "BertForQuestionAnswering"),
    ):
        with pytest.raises(ModelFileError, match=f"holds a {kind}, not a {ours.__name__}: from_encoder gives"):
            ours.from_pretrained(folders[kind])
    for folder in folders.values():  # as classes that others derived, and files that do not say what they are
        described(folder, architectures=["Mine"] if "Token" in folder.name else None)
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


def described(folder, **changes):
    """Changes what a folder's config.json says."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_derived_classes_and_other_names_of_a_head(transformers, tmp_path):
    class Mine(BertForTokenClassification):
        pass

    hugging_face(transformers, "BertForTokenClassification").save_pretrained(tmp_path / "tokens")
    described(tmp_path / "tokens", problem_type="multi_label_classification")  # theirs does not look at it
    Mine.from_pretrained(tmp_path / "tokens")
    hugging_face(transformers, "BertForMaskedLM").save_pretrained(tmp_path / "words")
    described(tmp_path / "words", architectures=["BertLMHeadModel"])
    with pytest.warns(UserWarning, match="drawn anew"):
        BertForPretraining.from_pretrained(tmp_path / "words")


def test_without_a_masked_token_every_weight_has_a_gradient():
    model, token_ids = BertForPretraining(TINY), torch.ones(2, 5, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(token_ids, mlm_targets=torch.full_like(token_ids, -100))
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    without = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without == {"next_sentence", "bert.pooler"} and not model.decoder.bias.grad.any()


def test_another_use_of_a_head_is_refused(transformers, tmp_path):
    hugging_face(transformers, "BertForSequenceClassification").save_pretrained(tmp_path)
    described(tmp_path, problem_type="single_label_classification")
    BertForSequenceClassification.from_pretrained(tmp_path)
    described(tmp_path, problem_type="multi_label_classification")
    with pytest.raises(ModelFileError, match="its problem_type is multi_label_classification"):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
@torch.no_grad()
def test_the_head_of_pretraining_has_the_encoders_activation(transformers, tmp_path, activation):
    theirs = hugging_face(transformers, "BertForMaskedLM", hidden_act=activation)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="drawn anew"):
        ours = BertForPretraining.from_pretrained(tmp_path).double().eval()
    token_ids = torch.randint(1, TINY.vocab_size, (2, 9))
    torch.testing.assert_close(ours(token_ids)[0], theirs.double()(token_ids).logits, rtol=1e-9, atol=1e-9)


def test_many_masked_tokens_do_not_overflow_float16():
    model = BertForPretraining(dataclasses.replace(TINY, width=8, heads=1, layers=1, max_positions=500))
    token_ids = torch.randint(1, TINY.vocab_size, (50, 500))
    expected = model.loss(token_ids, mlm_targets=token_ids)
    loss = model.half().loss(token_ids, mlm_targets=token_ids)
    torch.testing.assert_close(loss.float(), expected, rtol=2e-3, atol=0.0)


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
