"""optimize() on Hugging Face's encoder-decoders: BART, Marian and Whisper."""

import copy
import pickle

import pytest
import torch

import fasttx

transformers = pytest.importorskip("transformers")
hf_models = pytest.importorskip("hf_models")

from hf_checks import (  # noqa: E402
    Adapter,
    assert_close,
    assert_dropout_follows_the_seed,
    assert_restores,
    assert_same_gradients,
    gradients,
    pair,
    run,
)

FAMILIES = ("bart", "marian", "whisper")
PADDED = FAMILIES[:2]


def batch(family, pattern="right"):
    inputs = hf_models.batch(family, pattern)
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def encoder_states(output, inputs):
    states = output.encoder_last_hidden_state
    return states[inputs["attention_mask"].bool()] if "attention_mask" in inputs else states


def assert_same(theirs, ours, inputs, **options):
    expected, actual = run(theirs, inputs, **options), run(ours, inputs, **options)
    assert_close(actual.logits, expected.logits)
    assert_close(encoder_states(actual, inputs), encoder_states(expected, inputs))
    return expected, actual


def loss(model, inputs):
    return model(**inputs, labels=inputs["decoder_input_ids"].roll(-1, 1)).loss


def layers(model):
    return model.get_encoder().layers, model.get_decoder().layers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients(family, implementation):
    theirs, ours = pair(family, implementation)
    kept = fasttx.optimize(copy.deepcopy(theirs), padding="keep")
    for pattern in ("right", "left", "holes", "none") if family in PADDED else ("none",):
        inputs = batch(family, pattern)
        for training in (False, True):
            for model in (theirs, ours, kept):
                model.train(training)
            for cached in (False, True):
                _, actual = assert_same(theirs, ours, inputs, use_cache=cached)
            assert_same(theirs, kept, inputs)
            if family in PADDED:
                assert (actual.encoder_last_hidden_state[inputs["attention_mask"] == 0] == 0).all()
            assert_same_gradients(loss, theirs, ours, inputs)


@pytest.mark.parametrize("family", PADDED)
def test_padding_is_kept_where_that_is_asked_for(family):
    """Layers are fused all the same, and restore() knows them."""
    theirs = hf_models.make(family).double()
    kept = fasttx.optimize(copy.deepcopy(theirs), padding="keep")
    inputs = batch(family)
    actual, expected = kept(**inputs), theirs(**inputs)
    torch.testing.assert_close(
        actual.encoder_last_hidden_state, expected.encoder_last_hidden_state, rtol=1e-9, atol=1e-11
    )
    original = type(layers(theirs)[0][0])
    fast = type(layers(kept)[0][0])
    assert issubclass(fast, original) and not fast.removes_padding
    assert type(layers(fasttx.optimize(kept))[0][0]).removes_padding
    assert type(layers(fasttx.restore(kept))[0][0]) is original


@pytest.mark.parametrize("family", PADDED)
def test_padded_targets(family):
    theirs, ours = pair(family)
    inputs = batch(family)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    assert_same(theirs, ours, inputs | {"decoder_attention_mask": mask}, use_cache=False)
    assert_same_gradients(loss, theirs, ours, inputs | {"decoder_attention_mask": mask})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_and_hidden_states(family, implementation):
    theirs, ours = pair(family, implementation)
    eager, inputs = copy.deepcopy(theirs), batch(family, "holes")
    eager.set_attn_implementation("eager")
    valid = inputs["attention_mask"].bool() if family in PADDED else slice(None)
    for _ in range(2):
        expected, actual = assert_same(eager, ours, inputs, output_attentions=True)
        for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
            assert len(actual[kind]) == 2
            for a, b in zip(actual[kind], expected[kind], strict=True):
                if kind == "encoder_attentions":
                    a, b = a.transpose(1, 2)[valid], b.transpose(1, 2)[valid]
                assert_close(a, b)
        expected, actual = assert_same(theirs, ours, inputs, output_hidden_states=True)
        assert actual.encoder_attentions is None
        for kind in ("encoder_hidden_states", "decoder_hidden_states"):
            assert len(actual[kind]) == 3
            for a, b in zip(actual[kind], expected[kind], strict=True):
                if kind == "encoder_hidden_states":
                    a, b = a[valid], b[valid]
                assert_close(a, b)
    # The hooks that collected stay in place, and are no reason to step aside.
    assert {row.backend for row in fasttx.explain(ours, **inputs).rows} <= {"cpu", "reference"}


GENERATE = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 2},
    {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 10},
]


@pytest.mark.parametrize("options", GENERATE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, options):
    theirs, ours = pair(family)
    for pattern in ("right", "holes") if family in PADDED else ("none",):
        inputs = batch(family, pattern)
        del inputs["decoder_input_ids"]
        tokens = []
        for model in (theirs, ours):
            torch.manual_seed(1)
            tokens.append(model.generate(**inputs, min_new_tokens=8, max_new_tokens=10, **options))
        assert torch.equal(*tokens) and tokens[0].shape[1] > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_three_operations_a_layer(family, needs_extension):
    """From the second token on; the cache grows in place, and the encoder's states are projected once."""
    ours, inputs = fasttx.optimize(hf_models.make(family)), hf_models.batch(family)
    tokens = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        encoded = ours.get_encoder()(**inputs)
    given = {"encoder_outputs": encoded} | ({"attention_mask": inputs["attention_mask"]} if family in PADDED else {})
    cache = run(ours, given, decoder_input_ids=tokens[:, :2], use_cache=True).past_key_values
    memory = cache.cross_attention_cache.layers[0].keys
    for i in range(2, 5):
        rows = fasttx.explain(ours, **given, decoder_input_ids=tokens[:, i : i + 1], past_key_values=cache).rows
        ops = [row.op for row in rows if row.module == "model.decoder.layers.1"]
        assert ops == ["cached_attention_block", "feed_forward_block"]
        assert {row.backend for row in rows} == {"cpu"} and not any(row.module.endswith("attn") for row in rows)
        assert cache.cross_attention_cache.layers[0].keys is memory
    assert type(cache.self_attention_cache.layers[0]).__name__ == "GrowingLayer"


class WithoutCache(torch.nn.Module):
    """An attention of somebody else's."""

    def forward(self, x, **options):
        return torch.sin(x), None


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_between_two_tokens_are_honoured(family):
    theirs, ours = pair(family)
    inputs = batch(family)
    tokens = inputs.pop("decoder_input_ids")
    changes = [
        lambda layer: None,
        lambda layer: layer.self_attn.k_proj.weight.mul_(1.5),
        lambda layer: layer.self_attn.v_proj.bias.add_(1),
        lambda layer: layer.encoder_attn.q_proj.weight.data.neg_(),
        lambda layer: setattr(layer, "activation_fn", torch.nn.Tanh()),
        lambda layer: layer.encoder_attn.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1])),
        lambda layer: setattr(layer, "encoder_attn", WithoutCache()),
        lambda layer: setattr(layer, "self_attn", WithoutCache()),
    ]  # fmt: skip
    caches = [None, None]
    with torch.no_grad():
        for i, change in enumerate(changes):
            outputs = []
            for which, model in enumerate((theirs, ours)):
                change(layers(model)[1][0])
                called = model(
                    **inputs, decoder_input_ids=tokens[:, i % 5 : i % 5 + 1], past_key_values=caches[which],
                    use_cache=True,
                )  # fmt: skip
                caches[which] = called.past_key_values
                outputs.append(called.logits)
            assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("family", PADDED)
def test_generate_with_a_static_cache(family):
    theirs, ours = pair(family)
    inputs = batch(family)
    del inputs["decoder_input_ids"]
    options = {"min_new_tokens": 6, "max_new_tokens": 8, "do_sample": False}
    options |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(*(model.generate(**inputs, **options) for model in (theirs, ours)))


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_and_copies(family, tmp_path):
    theirs = hf_models.make(family)
    ours, inputs = copy.deepcopy(theirs), hf_models.batch(family)
    fasttx.optimize(fasttx.optimize(ours))
    assert ours.config._attn_implementation == "fasttx"
    assert all(type(layer).__name__.startswith("Fast") for stack in layers(ours) for layer in stack)
    expected = run(ours, inputs).logits
    ours.save_pretrained(tmp_path)
    # Not compared with what was saved: transformers itself makes Marian's positions anew.
    loaded = type(ours).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    wanted = run(loaded, inputs).logits
    torch.testing.assert_close(run(fasttx.optimize(loaded), inputs).logits, wanted)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(run(twin, inputs).logits, expected)
    assert_restores(theirs, ours, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_and_layer_drop(family):
    theirs, ours = pair(family, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    for checkpointing in (False, True):
        for model in (theirs, ours):
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
        for seed in range(3):
            expected, actual = [], []
            for model, found in ((theirs, expected), (ours, actual)):
                torch.manual_seed(seed)
                found.append(gradients(loss, model, batch(family)))
            assert actual[0].keys() == expected[0].keys()
            for name, gradient in actual[0].items():
                torch.testing.assert_close(gradient, expected[0][name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_children_are_honoured(family):
    """An adapter around the query, a parametrized dense layer, hooks on attention, feed-forward and norm."""
    original = hf_models.make(family)

    def change(model):
        torch.manual_seed(3)
        for first, second in layers(model):
            first.self_attn.q_proj = Adapter(first.self_attn.q_proj)
            torch.nn.utils.parametrizations.weight_norm(first.fc1)
            second.fc2.register_forward_hook(lambda module, args, output: output * 1.5)
            second.self_attn.register_forward_hook(lambda module, args, output: (output[0] - 1, *output[1:]))
            second.self_attn_layer_norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        decoder = layers(model)[1][0]
        decoder.encoder_attn.register_forward_hook(lambda module, args, output: (output[0] + 1, *output[1:]))
        decoder.encoder_attn_layer_norm.register_forward_hook(lambda module, args, output: output * 3)
        return model.double()

    theirs, ours = change(copy.deepcopy(original)), change(fasttx.optimize(copy.deepcopy(original)))
    inputs = batch(family)
    for cached in (False, True):
        assert_same(theirs, ours, inputs, use_cache=cached)
    assert_same_gradients(loss, theirs, ours, inputs)
    reasons = {row.module: row.reason for row in fasttx.explain(ours).rows}
    for stack in ("model.encoder", "model.decoder"):
        for child in ("0.self_attn.q_proj", "0.fc1", "1.self_attn.q_proj", "1.fc2", "1.self_attn_layer_norm"):
            assert "outside the fusion" in reasons[f"{stack}.layers.{child}"]
    fasttx.restore(ours)
    assert torch.equal(run(ours, inputs).logits, run(theirs, inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_runs_on_the_kernels(family, needs_extension):
    ours, inputs = fasttx.optimize(hf_models.make(family)), hf_models.batch(family)
    for training in (False, True):
        rows = fasttx.explain(ours.train(training), **inputs, use_cache=False).rows
        assert {row.backend for row in rows} == {"cpu"}
        ops = {row.op for row in rows}
        assert "feed_forward_block" in ops or family == "whisper"
        assert ("attention_block_varlen" in ops) is (family in PADDED)


def test_float16_is_clamped():
    """As the originals: Whisper always, BART only where something is not finite."""
    limit = torch.finfo(torch.float16).max - 1000
    for family in FAMILIES:
        theirs = hf_models.make(family)
        layer = layers(theirs)[0][0]
        with torch.no_grad():
            if family == "whisper":
                layer.fc2.bias.fill_(65200.0)
            else:
                layer.final_layer_norm.bias.fill_(torch.inf)
        ours = fasttx.optimize(copy.deepcopy(theirs).half())
        x = torch.zeros(2, 3, hf_models.WIDTH, dtype=torch.float16)
        with torch.no_grad():
            outputs = [layers(model)[0][0](x, None) for model in (theirs.half(), ours)]
        assert (outputs[0] == limit).all() and torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_follows_the_seed(family):
    assert_dropout_follows_the_seed(family)
