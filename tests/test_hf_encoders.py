"""optimize() on Hugging Face's encoders: BERT, RoBERTa, DistilBERT and ViT, and a family that it does not know."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from budget import assert_within_budget

import fasttx
from fasttx import dispatch

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

from fasttx.patch import _hf  # noqa: E402

ENCODERS = ("bert", "roberta", "distilbert", "vit")
WITH_MASKS = ENCODERS[:3]
LAYERS = {"bert": "encoder.layer", "roberta": "encoder.layer", "distilbert": "transformer.layer", "vit": "layers"}
QUERIES = {"bert": "attention.self.query", "distilbert": "attention.q_lin", "vit": "attention.q_proj"}
QUERIES["roberta"] = QUERIES["bert"]
DENSES = {"bert": "intermediate.dense", "roberta": "intermediate.dense", "distilbert": "ffn.lin1", "vit": "mlp.fc1"}


def layers(model, family):
    return model.get_submodule(LAYERS[family])


def valid(inputs):
    mask = inputs.get("attention_mask")
    return slice(None) if mask is None else mask.bool()


def assert_same(theirs, ours, inputs, **options):
    expected, actual = run(theirs, inputs, **options), run(ours, inputs, **options)
    assert_close(actual.last_hidden_state[valid(inputs)], expected.last_hidden_state[valid(inputs)])
    return expected, actual


def loss(model, inputs):
    return model(**inputs).last_hidden_state[valid(inputs)].square().sum()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ENCODERS)
def test_results_and_gradients(family, implementation):
    theirs, ours = pair(family, implementation)
    kept = fasttx.optimize(copy.deepcopy(theirs), padding="keep")
    for pattern in ("right", "left", "holes", "none"):
        inputs = hf_models.batch(family, pattern)
        for training in (False, True):
            for model in (theirs, ours, kept):
                model.train(training)
            _, actual = assert_same(theirs, ours, inputs)
            assert_same(theirs, kept, inputs)
            if family in WITH_MASKS:
                assert (actual.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()
            assert_same_gradients(loss, theirs, ours, inputs)
    assert_same_gradients(loss, theirs, kept, inputs)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pooled_first_tokens(family):
    """Of a first token that is padding, with padding removed, the pooler sees zeros; kept, what it sees in theirs."""
    theirs, ours = pair(family)
    kept, inputs = fasttx.optimize(copy.deepcopy(theirs), padding="keep"), hf_models.batch(family, "left")
    first = inputs["attention_mask"][:, 0].bool()
    assert first.any() and not first.all()
    expected, actual, padded = (run(model, inputs).pooler_output for model in (theirs, ours, kept))
    assert_close(padded, expected)
    assert_close(actual[first], expected[first])
    of_zeros = theirs.pooler(torch.zeros_like(run(ours, inputs).last_hidden_state))
    assert_close(actual[~first], of_zeros[~first])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ENCODERS)
def test_attentions_and_hidden_states(family, implementation):
    theirs, ours = pair(family, implementation)
    eager = fasttx.restore(copy.deepcopy(ours))
    eager.set_attn_implementation("eager")
    inputs = hf_models.batch(family, "holes")
    for _ in range(2):
        expected, actual = run(eager, inputs, output_attentions=True), run(ours, inputs, output_attentions=True)
        assert len(actual.attentions) == 2
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if family == "vit" else {"rtol": 1e-9, "atol": 1e-11}
        for a, b in zip(actual.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        expected, actual = assert_same(theirs, ours, inputs, output_hidden_states=True)
        assert len(actual.hidden_states) == 3 and actual.attentions is None
        for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert_close(a[valid(inputs)], b[valid(inputs)])
    # The hooks that collected stay in place, and are no reason to step aside.
    assert {row.backend for row in fasttx.explain(ours, **inputs).rows} <= {"cpu", "reference"}


def test_collected_weights_are_those_applied():
    """With dropout, as eager attention returns them: dropped and scaled up, and the output made of them."""
    module = torch.nn.Identity()
    module.is_causal = False
    query, key, value = (torch.randn(2, 3, 5, 8).double() for _ in range(3))
    collector = _hf.output_capturing._active_collector
    token = collector.set({"attentions": []})
    try:
        output, weights = _hf.attention_forward(module, query, key, value, None, dropout=0.5)
    finally:
        collector.reset(token)
    assert (weights == 0).any() and weights.shape == (2, 3, 5, 5)
    assert_close(output, (weights @ value).transpose(1, 2))


@pytest.mark.parametrize("family", ENCODERS)
def test_restore(family):
    theirs = hf_models.make(family)
    ours, inputs = copy.deepcopy(theirs), hf_models.batch(family)
    fasttx.optimize(fasttx.optimize(ours))
    assert ours.config._attn_implementation == "fasttx" and type(layers(ours, family)[0]).__name__.startswith("Fast")
    assert_restores(theirs, ours, inputs)
    eager = fasttx.optimize(hf_models.make(family, attn_implementation="eager"))
    assert eager.config._attn_implementation == "fasttx-eager"
    assert fasttx.restore(eager).config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ENCODERS)
def test_saving_and_copies(family, tmp_path):
    ours, inputs = fasttx.optimize(hf_models.make(family)), hf_models.batch(family)
    expected = run(ours, inputs).last_hidden_state
    ours.save_pretrained(tmp_path)
    assert "fasttx" not in (tmp_path / "config.json").read_text()
    loaded = type(ours).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    for twin in (fasttx.optimize(loaded), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(run(twin, inputs).last_hidden_state, expected)


def test_pickles_in_another_process(tmp_path):
    """A pickle registers the attention, and the masks, that its config names: of a family with classes and without."""
    inputs = hf_models.batch("bert")
    models = [fasttx.optimize(m, padding="keep") for m in (hf_models.make("bert"), albert())]
    path = tmp_path / "model.pickle"
    for model in models:
        path.write_bytes(pickle.dumps((model, inputs, run(model, inputs).last_hidden_state)))
        program = (
            "import pickle, sys, torch\n"
            "model, inputs, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
            "with torch.no_grad():\n"
            "    torch.testing.assert_close(model(**inputs).last_hidden_state, expected)\n"
        )
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=120)


@pytest.mark.parametrize("family", ENCODERS)
def test_gradient_checkpointing(family):
    theirs, ours = pair(family)
    for model in (theirs, ours):
        model.train().gradient_checkpointing_enable()
    assert_same_gradients(loss, theirs, ours, hf_models.batch(family))


@pytest.mark.parametrize("family", ENCODERS)
def test_changed_children_are_honoured(family):
    """An adapter around the query, a parametrized dense layer, hooks on attention, feed-forward and norm."""
    original = hf_models.make(family)

    def change(model):
        torch.manual_seed(3)
        first, second = layers(model, family)
        parent, _, name = QUERIES[family].rpartition(".")
        setattr(first.get_submodule(parent), name, Adapter(getattr(first.get_submodule(parent), name)))
        dense = first.get_submodule(DENSES[family])
        torch.nn.utils.parametrizations.weight_norm(dense)
        parent = second.get_submodule(DENSES[family].rpartition(".")[0])
        parent.register_forward_hook(lambda module, args, output: output * 1.5)
        second.attention.register_forward_hook(lambda module, args, output: (output[0] - 1, *output[1:]))
        norm = next(m for m in second.modules() if isinstance(m, torch.nn.LayerNorm))
        norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        return model.double()

    theirs, ours = change(copy.deepcopy(original)), change(fasttx.optimize(copy.deepcopy(original)))
    for pattern in ("right", "none"):
        inputs = hf_models.batch(family, pattern)
        assert_same(theirs, ours, inputs)
        assert_same_gradients(loss, theirs, ours, inputs)
    path = LAYERS[family]
    reasons = {row.module: row.reason for row in fasttx.explain(ours).rows}
    for child in (f"0.{QUERIES[family]}", f"0.{DENSES[family]}", f"1.{QUERIES[family]}", f"1.{DENSES[family]}"):
        assert "outside the fusion" in reasons[f"{path}.{child}"]
    fasttx.restore(ours)
    assert torch.equal(run(ours, inputs).last_hidden_state, run(theirs, inputs).last_hidden_state)


@pytest.mark.parametrize("family", WITH_MASKS)
def test_masks_of_the_user(family):
    """(B, 1, T, T), bool for sdpa and to be added for both; padding among them is packed, all else is not."""
    inputs = hf_models.batch(family)
    length = hf_models.LENGTH
    padding = inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, length, length)
    some = torch.rand(4, 1, length, length) < 0.6
    some[..., 0] = True
    for implementation in ("sdpa", "eager"):
        theirs, ours = pair(family, implementation)
        for mask in (padding, padding.contiguous(), some):
            hidden = torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float64).min)
            for given in (hidden,) if implementation == "eager" else (mask, hidden):
                changed = inputs | {"attention_mask": given}
                states = [run(m, changed).last_hidden_state for m in (theirs, ours)]
                if mask is not some:
                    states = [state[valid(inputs)] for state in states]
                assert_close(states[1], states[0])


def test_a_mask_that_changes_in_place_is_packed_anew():
    hidden_states = torch.randn(4, hf_models.LENGTH, 8)
    mask = hf_models.padding("right").bool()[:, None, None].repeat(1, 1, hf_models.LENGTH, 1)
    first = _hf.packing_of(mask, hidden_states)
    assert _hf.packing_of(mask, hidden_states) is first
    mask[0, :, :, 1] = False
    assert len(_hf.packing_of(mask, hidden_states).index) == len(first.index) - 1


@pytest.mark.parametrize(
    "family, name",
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForTokenClassification"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_heads(family, name):
    model = hf_models.make(family, getattr(transformers, name)).double()
    ours, inputs = fasttx.optimize(copy.deepcopy(model)), hf_models.batch(family)
    logits = [run(m, inputs).logits for m in (model, ours)]
    if "LM" in name or "Token" in name:
        logits = [value[valid(inputs)] for value in logits]
    assert_close(logits[1], logits[0])


@pytest.mark.parametrize("family, name", [("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM")])
def test_decoders(family, name):
    """generate() with a cache and left padding, cross-attention, and attentions of both."""
    theirs = hf_models.make(
        family,
        getattr(transformers, name),
        is_decoder=True,
        add_cross_attention=True,
        pad_token_id=1,
        eos_token_id=None,
    ).double()
    ours, inputs = fasttx.optimize(copy.deepcopy(theirs)), hf_models.batch(family, "left")
    for beams in (1, 3):
        tokens = [m.generate(**inputs, max_new_tokens=8, num_beams=beams, do_sample=False) for m in (theirs, ours)]
        assert torch.equal(*tokens)
    options = {
        "encoder_hidden_states": torch.randn(4, 3, hf_models.WIDTH).double(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]]),
    }
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    for cached in (False, True):
        expected, actual = (run(m, inputs | options, use_cache=cached, output_attentions=True) for m in (eager, ours))
        assert_close(actual.logits[valid(inputs)], expected.logits[valid(inputs)])
        for kind in ("attentions", "cross_attentions"):
            # eager's weights of a query that sees nothing are those of its mask's rounding; ours are zeros.
            for a, b in zip(actual[kind], expected[kind], strict=True):
                assert_close(a.transpose(1, 2)[valid(inputs)], b.transpose(1, 2)[valid(inputs)])
        plain = inputs | {"attention_mask": None}
        states = [run(m, plain, use_cache=cached).logits for m in (theirs, ours)]
        assert_close(states[1], states[0])


@pytest.mark.parametrize("family", ENCODERS)
def test_float16_within_budget(family):
    model, inputs = hf_models.make(family).half(), hf_models.batch(family)
    eager = run(model, inputs).last_hidden_state[valid(inputs)]
    truth = run(copy.deepcopy(model).double(), inputs).last_hidden_state[valid(inputs)]
    actual = run(fasttx.optimize(model), inputs).last_hidden_state[valid(inputs)]
    assert_within_budget(actual=actual, eager=eager, truth=truth)


@pytest.mark.parametrize("family", ENCODERS)
def test_everything_runs_on_the_kernels(family, needs_extension):
    for pattern in ("right", "none"):
        inputs = hf_models.batch(family, pattern)
        ours = fasttx.optimize(hf_models.make(family))
        assert {row.backend for row in fasttx.explain(ours, **inputs).rows} == {"cpu"}
    fused = [row for row in fasttx.explain(ours).rows if "fused into" in row.reason]
    assert sum(row.class_name == "Linear" for row in fused) == 2 * 6


@pytest.mark.parametrize("family", ENCODERS)
def test_strict(family, needs_extension):
    """Nothing leaves the kernels, in training, in inference and while attentions are collected; a hook says where."""
    ours, inputs = fasttx.optimize(hf_models.make(family, dropout=True)), hf_models.batch(family)
    with fasttx.strict():
        gradients(loss, ours.train(), inputs)
        expected = run(ours.eval(), inputs).last_hidden_state
        run(ours, inputs, output_attentions=True)
        with torch.inference_mode():
            assert torch.equal(ours(**inputs).last_hidden_state, expected)
        layers(ours, family)[1].get_submodule(DENSES[family]).register_forward_hook(lambda *_: None)
        with pytest.raises(fasttx.FallbackError, match="linear1: it has hooks"):
            run(ours, inputs)


def test_masks_that_are_mere_padding():
    """None where all is valid; else one row for all queries, of stride 0. Other masks are transformers' own."""
    create = transformers.masking_utils.create_bidirectional_mask
    config = fasttx.optimize(hf_models.make("bert")).config
    embeds = torch.randn(4, hf_models.LENGTH, hf_models.WIDTH)
    assert create(config=config, inputs_embeds=embeds, attention_mask=hf_models.padding("none")) is None
    assert create(config=config, inputs_embeds=embeds, attention_mask=None) is None
    mask = create(config=config, inputs_embeds=embeds, attention_mask=hf_models.padding("holes"))
    assert mask.dtype == torch.bool and mask.stride(2) == 0
    assert torch.equal(mask[:, 0, 3], hf_models.padding("holes").bool())
    sdpa = _hf.sdpa_mask
    given = hf_models.padding("left").bool()
    for offsets in ((0, 0), (3, 0)):
        arguments = (4, 2, hf_models.LENGTH, *offsets, _hf.causal_mask_function, given)
        assert torch.equal(_hf.attention_mask(*arguments), sdpa(*arguments))
    bidirectional = (4, 2, 5, 0, 3, _hf.bidirectional_mask_function, given)
    assert torch.equal(_hf.attention_mask(*bidirectional), sdpa(*bidirectional))


def heard(call):
    decisions = []
    dispatch.listeners.append(decisions.append)
    try:
        return call(), decisions
    finally:
        dispatch.listeners.pop()


def test_attention_forward():
    """Grouped heads, a preallocated cache's first call, and what is left to transformers, by its eager or sdpa."""
    sdpa = _hf.sdpa_attention_forward
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    query, key, value = (torch.randn(2, heads, 6, 8).double() for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 6, 6) < 0.7
    mask[..., 0] = True
    for given in (None, mask, torch.randn(2, 1, 6, 6).double()):
        actual, weights = _hf.attention_forward(module, query, key, value, given, scaling=0.3)
        assert weights is None
        assert_close(actual, sdpa(module, query, key, value, given, scaling=0.3)[0])
    first = query[:, :, :4]
    for arguments in ((module, first, key, value, None), (module, query[:, :, :1], key, value, None)):
        assert_close(_hf.attention_forward(*arguments)[0], sdpa(*arguments)[0])

    bias = torch.randn(1, 4, 6, 6).double()
    module.config = transformers.BertConfig()
    module.config._attn_implementation_internal = "fasttx"
    (actual, _), decisions = heard(lambda: _hf.attention_forward(module, query, key, value, mask, position_bias=bias))
    assert_close(actual, sdpa(module, query, key, value, mask, position_bias=bias)[0])
    assert [decision.refusals[0][1] for decision in decisions] == ["the argument position_bias"]


def test_softcap_stays_with_the_eager_function():
    from transformers.models.gemma2 import modeling_gemma2

    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, attn_implementation="eager", attn_logit_softcapping=2.0, pad_token_id=1,
    )  # fmt: skip
    theirs = modeling_gemma2.Gemma2Model(config).eval()
    ours, inputs = fasttx.optimize(copy.deepcopy(theirs)), hf_models.batch("bert", "left")
    assert ours.config._attn_implementation == "fasttx-eager"
    expected, actual = (run(m, inputs).last_hidden_state[valid(inputs)] for m in (theirs, ours))
    torch.testing.assert_close(actual, expected)


def albert():
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_act="gelu",
    )  # fmt: skip
    return transformers.AlbertModel(config).eval()


def test_a_family_without_classes_of_its_own():
    """ALBERT: attention through the interface, layer norms and activations swapped."""
    theirs = albert().double()
    ours, inputs = fasttx.optimize(copy.deepcopy(theirs)), hf_models.batch("bert")
    assert ours.config._attn_implementation == "fasttx"
    assert_same(theirs, ours, inputs)
    assert_same_gradients(loss, theirs, ours, inputs)
    assert {row.op for row in fasttx.explain(ours, **inputs).rows} == {"attention", "layer_norm", "gelu"}
    fasttx.restore(ours)
    assert torch.equal(run(ours, inputs).last_hidden_state, run(theirs, inputs).last_hidden_state)


def test_what_keeps_its_attention():
    flash = hf_models.make("bert")
    flash.config._attn_implementation_internal = "flex_attention"
    assert _hf.why_not_switched(flash) == "the attention implementation is 'flex_attention'"
    asks = hf_models.make("bert", attn_implementation="eager", output_attentions=True)
    assert _hf.why_not_switched(asks) == "its config asks for attention weights"
    inputs = hf_models.batch("bert")
    expected, actual = (run(m, inputs).attentions for m in (asks, fasttx.optimize(copy.deepcopy(asks))))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    upcast = hf_models.make("gpt2", attn_implementation="eager", reorder_and_upcast_attn=True)
    assert "float32" in _hf.why_not_switched(upcast)
    assert fasttx.optimize(upcast).config._attn_implementation == "eager"
    assert _hf.why_not_switched(hf_models.make("gpt2")) is None


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python"])
def test_activations_outside_a_fusion(name):
    theirs = copy.deepcopy(transformers.activations.ACT2FN[name])
    ours, x = fasttx.optimize(copy.deepcopy(theirs)), torch.randn(5, 7).double()
    assert_close(ours(x), theirs(x))
    (_, decisions) = heard(lambda: ours(x))
    assert [decision.op for decision in decisions] == ([] if name == "gelu_python" else ["gelu"])


def test_compiled():
    ours, inputs = fasttx.optimize(hf_models.make("bert")), hf_models.batch("bert")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close = torch.testing.assert_close
    expected = run(ours, inputs).last_hidden_state[valid(inputs)]
    assert_close(run(compiled, inputs).last_hidden_state[valid(inputs)], expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_dropout_follows_the_seed(family):
    assert_dropout_follows_the_seed(family)


def test_a_layer_by_itself():
    """A layer outside a model, as a user's own stack has them."""
    theirs, ours = pair("bert")
    x = torch.randn(2, 5, hf_models.WIDTH).double()
    with torch.no_grad():
        assert_close(layers(ours, "bert")[0](x), layers(theirs, "bert")[0](x))
