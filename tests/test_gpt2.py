"""optimize() on Hugging Face's GPT-2: real weights, and small random ones for every argument."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget
from decoding import Decodes
from module_checks import assert_gradients_within_budget
from torch.nn.utils import prune

import fasttx

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402 (it needs transformers)
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache  # noqa: E402

from fasttx.patch import _hf_cache  # noqa: E402

IMPLEMENTATIONS = ("sdpa", "eager")


@pytest.fixture(scope="module")
def pretrained():
    """The package itself is not imported: its dependencies are not installed."""
    package = importlib.util.find_spec("mgm")
    if package is None:
        pytest.skip("microformer-mgm is not installed")
    path = Path(package.submodule_search_locations[0]) / "resources" / "general_model"
    return transformers.GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture
def small():
    return hf_models.make("gpt2").double()


def swapped(model):
    return fasttx.optimize(copy.deepcopy(model))


def started(model, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


def generate(model, tokens, mask=None, **options):
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)


def prompts(vocabulary, *shape):
    return torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_logits_within_budget_and_restored(pretrained, implementation, use_cache):
    """At real tokens: on queries that are padding, Hugging Face's own implementations differ."""
    model = started(pretrained, implementation)
    tokens, mask = prompts(9669, 4, 24), torch.ones(4, 24, dtype=torch.int64)
    for row, hidden in enumerate((0, 5, 17, 1)):
        mask[row, :hidden] = 0

    def logits(model):
        return model(tokens, attention_mask=mask, use_cache=use_cache).logits[mask.bool()]

    eager, truth = logits(model), logits(copy.deepcopy(model).double())
    parameters = list(model.parameters())
    fasttx.optimize(model)
    assert_within_budget(actual=logits(model), eager=eager, truth=truth)
    torch.testing.assert_close(logits(copy.deepcopy(model).double()), truth, rtol=1e-9, atol=1e-9)
    fasttx.restore(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model), eager)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greedy_generation_token_for_token(pretrained, implementation):
    model, tokens = started(pretrained, implementation), prompts(9669, 3, 16)
    options = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64}
    ours = swapped(model)
    for batch in (tokens[:1], tokens):
        assert torch.equal(generate(ours, batch, **options), generate(model, batch, **options))


def test_gradients_within_budget(pretrained):
    tokens = prompts(9669, 2, 12)

    def gradients(model):
        model(tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    truth = gradients(copy.deepcopy(pretrained).double())
    eager, actual = gradients(copy.deepcopy(pretrained)), gradients(swapped(pretrained))
    # The keys' share of c_attn's bias has no gradient but rounding: softmax ignores what all scores of a row share.
    for found in (actual, eager, truth):
        for name in found:
            if name.endswith("c_attn.bias"):
                found[name] = torch.cat((found[name][:256], found[name][512:]))
    assert_gradients_within_budget(actual, eager, truth)


def test_nothing_is_left_on_a_slow_path(pretrained, needs_extension):
    model, tokens = swapped(pretrained), prompts(9669, 2, 9)
    for training in (False, True):
        rows = fasttx.explain(model.train(training), tokens).rows
        assert {row.backend for row in rows} == {"cpu"}
    rows = fasttx.explain(model.eval(), tokens, use_cache=False).rows
    ops = [row.op for row in rows if row.module == "transformer.h.3"]
    assert ops == ["attention_block", "feed_forward_block"]
    fused = [row for row in fasttx.explain(model).rows if "fused into" in row.reason]
    assert sum("Conv1D" in row.class_name for row in fused) == 8 * 4
    with fasttx.strict():
        generate(model, tokens, max_new_tokens=3)


@pytest.mark.parametrize("pattern", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_masks_and_gradients(small, pattern, training, use_cache):
    batch = hf_models.batch("gpt2", pattern)
    valid = batch["attention_mask"].bool()
    results = []
    for model in (small, swapped(small)):
        logits = model.train(training)(**batch, use_cache=use_cache).logits[valid]
        logits.square().mean().backward()
        results.append((logits, *(p.grad for p in model.parameters())))
        with torch.no_grad():
            results[-1] += (model(**batch, use_cache=use_cache).logits[valid],)
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5},
     {"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)  # fmt: skip
def test_every_way_to_generate(small, implementation, options):
    model = started(small, implementation)
    batch = hf_models.batch("gpt2", "left")
    if "prompt_lookup_num_tokens" in options:
        batch = {name: tensor[:1] for name, tensor in batch.items()}
    results = []
    for each in (model, swapped(model)):
        torch.manual_seed(3)
        results.append(generate(each, batch["input_ids"], batch["attention_mask"], max_new_tokens=12, **options))
    assert torch.equal(*results)


def test_attentions_and_hidden_states(small):
    batch = hf_models.batch("gpt2", "left")
    valid = batch["attention_mask"].bool()
    theirs, ours = started(small, "eager"), swapped(started(small, "eager"))
    for _ in range(2):
        asked = {"output_attentions": True, "output_hidden_states": True}
        expected, actual = theirs(**batch, **asked), ours(**batch, **asked)
        for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(a[valid], b[valid])
        for a, b in zip(actual.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[valid], b.transpose(1, 2)[valid])
        # The hooks that collected them stay, and are no reason to leave the fused path afterwards.
        torch.testing.assert_close(ours(**batch).logits[valid], theirs(**batch).logits[valid])
    expected, actual = (
        generate(
            model, batch["input_ids"], batch["attention_mask"], max_new_tokens=4, do_sample=False,
            return_dict_in_generate=True, output_attentions=True,
        )
        for model in (theirs, ours)
    )  # fmt: skip
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.attentions[-1], expected.attentions[-1], strict=True):
        torch.testing.assert_close(a, b)


def test_the_cache_grows_in_place(small):
    model, tokens = swapped(small), prompts(50, 2, 20)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        full = model(tokens).logits
        steps = [model(tokens[:, :4], past_key_values=cache).logits]
        places = set()
        for i in range(4, 20):
            steps.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
            places.add(cache.layers[0].keys.data_ptr())
    torch.testing.assert_close(torch.cat(steps, 1), full)
    assert type(cache.layers[0]) is _hf_cache.GrowingLayer and len(places) <= 3
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_decoding_is_two_operations_a_block(pretrained, needs_extension):
    model, tokens = swapped(pretrained), prompts(9669, 2, 9)
    first = model(tokens[:, :8], use_cache=True)
    for given in ({}, {"attention_mask": torch.tensor([[1] * 9, [0, 0] + [1] * 7])}):
        cache = copy.deepcopy(first.past_key_values)
        rows = fasttx.explain(model, tokens[:, 8:], past_key_values=cache, **given).rows
        ops = [row.op for row in rows if row.module == "transformer.h.3"]
        assert ops == ["cached_attention_block", "feed_forward_block"]
        assert {row.backend for row in rows} == {"cpu"}


class WithoutCache(torch.nn.Module):
    """An attention of somebody else's."""

    def forward(self, x, **options):
        return torch.sin(x), None


@torch.no_grad()
def test_changes_between_two_tokens_are_honoured(small):
    """Each model is as it was made, then changed after the first of its cached calls, and changed again."""
    tokens, theirs, ours = prompts(50, 2, 12), small, swapped(small)
    caches = [DynamicCache(config=theirs.config) for _ in range(2)]
    changes = [
        lambda block: None,
        lambda block: block.mlp.c_fc.weight.mul_(1.5),
        lambda block: block.attn.c_attn.bias.add_(1),
        lambda block: setattr(block.ln_2, "eps", 1e-2),
        lambda block: block.mlp.c_proj.register_forward_hook(lambda module, args, output: output + 1),
        lambda block: block.attn.c_proj.weight.data.neg_(),
        lambda block: setattr(block.attn, "c_attn", torch.nn.Sequential(block.attn.c_attn)),
        lambda block: setattr(block.mlp, "act", torch.nn.ReLU()),
        lambda block: setattr(block, "mlp", torch.nn.Tanh()),
        lambda block: setattr(block, "attn", WithoutCache()),
    ]  # fmt: skip
    for i, change in enumerate(changes):
        for model in (theirs, ours):
            change(model.transformer.h[0])
        outputs = [
            model(tokens[:, i : i + 1], past_key_values=cache).logits
            for model, cache in zip((theirs, ours), caches, strict=True)
        ]
        torch.testing.assert_close(*outputs)


@torch.no_grad()
def test_decoding_under_autocast_and_in_a_transform(small):
    """Neither takes the fused operations, and each gives what the original does."""
    theirs = small.float()
    ours, tokens = swapped(theirs), prompts(50, 2, 6)
    for model in (theirs, ours):
        model(tokens, past_key_values=DynamicCache(config=model.config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = []
        for model in (theirs, ours):
            cache = DynamicCache(config=model.config)
            model(tokens[:, :5], past_key_values=cache)
            steps.append(model(tokens[:, 5:], past_key_values=cache).logits)
    torch.testing.assert_close(*steps, rtol=2e-2, atol=2e-2)
    halved = {name: tensor / 2 for name, tensor in theirs.named_parameters()}
    steps = []
    for model in (theirs, ours):
        cache = DynamicCache(config=model.config)
        model(tokens[:, :5], past_key_values=cache)
        steps.append(torch.func.functional_call(model, halved, (tokens[:, 5:], cache)).logits)
    torch.testing.assert_close(*steps)


def test_cache_layers_like_transformers_own():
    """Whatever is done to a cache in between, its contents are those of one that concatenates; views kept, too."""
    edits = [
        lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
        lambda layer: layer.reset(),
        lambda layer: layer.offload(),
    ]
    for edit in edits:
        theirs, ours = DynamicLayer(), _hf_cache.GrowingLayer()
        batch, kept = 3, []
        for step in range(12):
            if step == 6:
                edit(theirs)
                edit(ours)
                batch = theirs.keys.shape[0] if theirs.is_initialized else 3
            if step == 8:
                twin = copy.deepcopy(ours)
                pickled = pickle.loads(pickle.dumps(ours))
            k, v = torch.randn(batch, 2, 1 + step % 2, 4), torch.randn(batch, 2, 1 + step % 2, 5)
            with torch.no_grad():
                expected, actual = theirs.update(k, v), ours.update(k, v)
            assert all(map(torch.equal, actual, expected))
            kept.append((actual, [tensor.clone() for tensor in actual]))
            if step == 8:
                with torch.no_grad():
                    assert all(torch.equal(c.update(k, v)[0], actual[0]) for c in (twin, pickled))
        assert all(torch.equal(a, b) for views, copies in kept for a, b in zip(views, copies, strict=True))


@torch.no_grad()
def test_reordered_sequences_go_on_in_one_buffer():
    layer, expected = _hf_cache.GrowingLayer(), torch.empty(2, 3, 0, 4)
    kept = []
    for i in range(40):
        new, order = torch.randn(2, 3, 1, 4), torch.randint(2, (2,))
        buffers, full = layer._room, i > 0 and expected.shape[2] == layer._room[0].shape[2]
        keys, values = layer.update(new, -new)
        assert full or i == 0 or layer._room is buffers
        expected = torch.cat((expected, new), 2)
        kept.append((keys, expected))
        layer.reorder_cache(order)
        expected = expected[order]
        assert torch.equal(layer.keys, expected) and torch.equal(layer.values, -expected)
    assert all(torch.equal(view, value) for view, value in kept)
    layer.reorder_cache(torch.tensor([1]))
    assert torch.equal(layer.update(new[:1], new[:1])[0][:, :, :-1], expected[1:])


def test_a_cache_with_gradients_and_one_that_does_not_fit():
    layer = _hf_cache.GrowingLayer()
    first, second = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(2))
    layer.update(first, first)
    keys, values = layer.update(second, second)
    (keys.sum() + values.sum()).backward()
    assert (first.grad == 2).all() and (second.grad == 2).all()
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer.update(first[:1], first[:1])


def test_static_cache_by_hand(small):
    tokens = prompts(50, 2, 9)
    results = []
    with torch.no_grad():
        for model in (small, swapped(small)):
            cache = StaticCache(config=model.config, max_cache_len=16)
            first = model(tokens[:, :8], past_key_values=cache).logits
            results.append((first, model(tokens[:, 8:], past_key_values=cache).logits))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cross_attention():
    theirs = hf_models.make("gpt2", add_cross_attention=True).double()
    ours, tokens = swapped(theirs), prompts(50, 2, 6)
    memory, valid = torch.randn(2, 5, 16).double(), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    results = []
    for model in (theirs, ours):
        given = {"encoder_hidden_states": memory, "encoder_attention_mask": valid}
        first = model(tokens[:, :5], **given, use_cache=True)
        second = model(tokens[:, 5:], **given, past_key_values=first.past_key_values)
        results.append(torch.cat((first.logits, second.logits), 1))
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="add_cross_attention"):
        swapped(hf_models.make("gpt2")).transformer(tokens, encoder_hidden_states=memory.float())


@pytest.mark.parametrize(
    "changes",
    [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"activation_function": "relu"},
     {"activation_function": "silu"}, {"n_inner": 24}, {"reorder_and_upcast_attn": True}],
    ids=str,
)  # fmt: skip
def test_configurations(changes):
    model = started(hf_models.make("gpt2", **changes), "eager")
    batch = hf_models.batch("gpt2")
    valid, ours = batch["attention_mask"].bool(), swapped(model)
    torch.testing.assert_close(ours(**batch).logits[valid], model(**batch).logits[valid], rtol=1e-4, atol=1e-4)
    if "reorder_and_upcast_attn" in changes:
        reasons = {row.reason for row in fasttx.explain(ours).rows}
        assert any("reorder_and_upcast_attn" in reason for reason in reasons)


def test_changed_children_are_honoured(small):
    def change(model):
        torch.manual_seed(1)
        blocks = model.transformer.h
        blocks[0].attn.c_attn = torch.nn.Sequential(blocks[0].attn.c_attn, torch.nn.Tanh())
        blocks[0].mlp.c_proj.register_forward_hook(lambda module, args, output: output + 1)
        blocks[0].ln_1.register_forward_hook(lambda module, args, output: output * 2)
        blocks[1].attn.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
        blocks[1].mlp.register_forward_hook(lambda module, args, output: output - 1)
        blocks[1].attn.resid_dropout.register_forward_hook(lambda module, args, output: output * 3)
        prune.random_unstructured(blocks[1].mlp.c_fc, "weight", amount=0.5)

    theirs, ours = small, swapped(small)
    change(theirs)
    change(ours)
    batch = hf_models.batch("gpt2", "left")
    valid = batch["attention_mask"].bool()
    for use_cache in (False, True):
        torch.testing.assert_close(
            ours(**batch, use_cache=use_cache).logits[valid], theirs(**batch, use_cache=use_cache).logits[valid]
        )
        with torch.no_grad():
            torch.testing.assert_close(
                ours(**batch, use_cache=use_cache).logits[valid], theirs(**batch, use_cache=use_cache).logits[valid]
            )
    rows = {row.module: row.reason for row in fasttx.explain(ours).rows}
    for name in ("h.0.attn.c_attn", "h.0.mlp.c_proj", "h.1.attn", "h.1.mlp"):
        assert "outside the fusion" in rows[f"transformer.{name}"]
    reasons = " ".join(row.reason for row in fasttx.explain(ours, **batch).rows)
    for part in ("c_attn: it is a Sequential", "mlp.c_proj: it has hooks", "mlp: it has hooks"):
        assert part in reasons
    with fasttx.strict(), pytest.raises(fasttx.FallbackError, match="c_attn: it is a Sequential"):
        ours(**batch)
    fasttx.restore(ours)
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_training_dropout_is_its_seeds(small):
    model = swapped(hf_models.make("gpt2", dropout=True)).train()
    tokens = prompts(50, 2, 7)

    def run(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), model.transformer.h[0].attn.c_attn.weight.grad.clone()

    first, again, other = run(1), run(1), run(2)
    assert all(map(torch.equal, first, again)) and first[0] != other[0]


def test_checkpointing_saving_and_tied_weights(small, tmp_path):
    tokens = prompts(50, 2, 7)
    ours = swapped(small)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    expected = ours(tokens).logits
    ours.save_pretrained(tmp_path)
    loaded = fasttx.optimize(transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)).eval()
    for twin in (loaded, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(twin(tokens).logits, expected)
    halved = {name: tensor.detach() / 2 for name, tensor in small.named_parameters()}
    called = [torch.func.functional_call(model, halved, (tokens,)).logits for model in (small, ours)]
    torch.testing.assert_close(*called)
    gradients = []
    for model in (small, ours):
        model.train().gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled(needs_extension):
    model, tokens = swapped(hf_models.make("gpt2")), prompts(50, 2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


def test_a_step_of_one_token_is_told_apart(small):
    """By both halves of every layer, at the first call with a cache and at later ones; longer prompts are not."""
    model, ids = swapped(small), torch.arange(5, 13)[None]
    with torch.no_grad():
        output, told = None, []
        for part in ids.split((6, 1, 1), 1):
            with Decodes() as mode:
                output = model(part, past_key_values=None if output is None else output.past_key_values, use_cache=True)
            told.append(set(mode.told))
    assert told == [{False}, {True}, {True}]
