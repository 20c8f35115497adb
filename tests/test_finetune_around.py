"""Adapters and what happens around them: fast paths, peft's own calls, shared weights, failures half-way."""

import copy

import pytest
import torch
from test_finetune import E, F, H, adapt, encoder, hugging_face

import fasttx
from fasttx import finetune
from fasttx.models import GPT, GPTConfig, ModelFileError

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")

# Of float64 between two right ways to one value: a million times its rounding, and far below what an adapter changes.
ROUNDINGS = {"rtol": 1e-9, "atol": 1e-10}


class OwnLayer(torch.nn.TransformerEncoderLayer):
    """As a user derives one."""


class OwnEncoder(torch.nn.TransformerEncoder):
    """As a user derives one."""


def nesting(layer=torch.nn.TransformerEncoderLayer, stack=torch.nn.TransformerEncoder):
    return stack(layer(E, H, F, 0.0, activation="gelu", batch_first=True), 2).double()


def inputs():
    return torch.randn(3, 5, E, dtype=torch.float64), torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]


@torch.no_grad()
def test_restored_models_keep_their_adapters():
    """fasttx.restore makes torch's modules of fasttx's, and parity measures against those."""
    adapted, (x, _) = adapt(fasttx.optimize(encoder().double())).eval(), inputs()
    expected = adapted(x)
    assert fasttx.parity(adapted, x).passed
    fasttx.restore(adapted)
    torch.testing.assert_close(adapted(x), expected, **ROUNDINGS)


@pytest.mark.parametrize("targets", [None, ["linear1"], ["self_attn"]])
@torch.no_grad()
def test_derived_layers_keep_their_adapters(targets):
    x, padding = inputs()
    for layer, stack in ((OwnLayer, torch.nn.TransformerEncoder), (torch.nn.TransformerEncoderLayer, OwnEncoder)):
        adapted = adapt(nesting(layer, stack), targets)
        expected = adapted.train()(x, src_key_padding_mask=padding)
        actual = adapted.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], expected[~padding], **ROUNDINGS)


@torch.no_grad()
def test_a_merged_encoder_is_on_the_fast_path_again():
    base, (x, padding) = nesting(), inputs()
    adapted = finetune.merge(adapt(base)).eval()
    fresh = nesting().eval()
    fresh.load_state_dict(base.state_dict())
    assert torch.equal(adapted(x, src_key_padding_mask=padding), fresh(x, src_key_padding_mask=padding))
    before = copy.deepcopy(finetune.unmerge(adapted))
    assert torch.equal(adapted(x), before(x)) and not torch.equal(adapted(x), fresh(x))
    torch.testing.assert_close(adapted(x), adapted.train()(x), **ROUNDINGS)


def test_adapters_are_in_the_models_mode(tmp_path):
    x = torch.randn(2, 5, E)
    adapted = adapt(encoder().eval(), ["linear1"], dropout=0.5)
    assert torch.equal(adapted(x), adapted(x)) and not adapted.training
    finetune.save_adapter(adapted, tmp_path / "adapter")
    loaded = finetune.load_adapter(encoder().eval(), tmp_path / "adapter")
    assert torch.equal(loaded(x), loaded(x))
    assert not torch.equal(adapted.train()(x), adapted(x))


def test_the_active_adapter_is_saved_and_loaded(tmp_path):
    base, x = encoder(), torch.randn(2, 5, E)
    untouched = copy.deepcopy(base)
    adapted = adapt(base, ["linear1"]).eval()
    adapted.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["linear2"]))
    adapted.set_adapter("second")
    for name, values in adapted.named_parameters():
        if "lora_" in name and "second" in name:
            torch.nn.init.normal_(values, std=0.3)
    finetune.save_adapter(adapted, tmp_path / "adapter")
    loaded = finetune.load_adapter(untouched, tmp_path / "adapter").eval()
    assert torch.equal(loaded(x), adapted(x))
    again = copy.deepcopy(adapted)
    for name, values in again.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.zeros_(values)
    assert torch.equal(finetune.load_adapter(again, tmp_path / "adapter")(x), adapted(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"linear1": 2}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_modules": r".*linear1"}, "target_modules as a pattern"),
    ],
)
def test_options_of_pefts_own_are_not_lost(tmp_path, options, message):
    adapted = peft.get_peft_model(encoder(), peft.LoraConfig(**{"target_modules": ["linear1"], **options}))
    with pytest.raises(ValueError, match=f"adapters with {message} are for peft's own"):
        finetune.save_adapter(adapted, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_pefts_own_adapters_are_saved_and_loaded(tmp_path):
    base, x = encoder().eval(), torch.randn(2, 5, E)
    untouched = copy.deepcopy(base)
    config = peft.LoraConfig(r=2, target_modules=["linear1", "query"], init_lora_weights=False)  # it ignores "query"
    adapted = peft.get_peft_model(base, config)
    finetune.save_adapter(adapted, tmp_path / "adapter")
    loaded = finetune.load_adapter(untouched, tmp_path / "adapter")
    # In evaluation torch's encoder would leave peft's adapters out.
    assert torch.equal(loaded.train()(x), adapted.train()(x))


@torch.no_grad()
def test_fasttxs_encoder_leaves_zeros_at_padding_with_adapters_too():
    layer = fasttx.nn.TransformerEncoderLayer(E, H, F, 0.0, activation="gelu", batch_first=True)
    model, (x, padding) = fasttx.nn.TransformerEncoder(layer, 2).double().eval(), inputs()
    before = model(x, src_key_padding_mask=padding)
    after = finetune.lora(model)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(after, before, **ROUNDINGS)
    assert not after[padding].any()


def test_adapters_that_are_not_loras_are_refused(tmp_path):
    config = peft.IA3Config(target_modules=["linear1"], feedforward_modules=["linear1"])
    adapted = peft.get_peft_model(encoder(), config)
    with pytest.raises(ValueError, match="a IA3Config are not LoRA's"):
        finetune.save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        finetune.merge(adapted)


def test_what_peft_merged_is_not_merged_again():
    adapted, x = adapt(encoder().double()).eval(), torch.randn(2, 5, E, dtype=torch.float64)
    expected = adapted(x)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        finetune.merge(adapted)
    adapted.unmerge_adapter()
    torch.testing.assert_close(finetune.merge(adapted)(x), expected, **ROUNDINGS)


def test_an_adapter_around_some_of_the_layers_is_merged():
    adapted, x = adapt(encoder().double()).eval(), torch.randn(2, 5, E, dtype=torch.float64)
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["linear1"]))
    adapted.set_adapter("second")
    expected = adapted(x)
    torch.testing.assert_close(finetune.merge(adapted)(x), expected, **ROUNDINGS)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(9, E), torch.nn.Linear(E, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.emb(ids))


@pytest.mark.parametrize("targets", [["head"], ["emb", "head"]])
def test_a_weight_that_others_have_is_not_merged(targets):
    adapted, ids = adapt(Tied(), targets), torch.arange(9)
    expected = adapted(ids)
    with pytest.raises(ValueError, match="emb.weight and head.weight are one weight: merging would change both"):
        finetune.merge(adapted)
    assert torch.equal(adapted(ids), expected)


def test_a_layer_that_is_called_elsewhere_is_not_merged():
    layer = torch.nn.Linear(E, E)
    adapted = adapt(torch.nn.Sequential(layer, torch.nn.GELU(), layer), ["0"])
    with pytest.raises(ValueError, match="0.weight and 2.weight are one weight"):
        finetune.merge(adapted)


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_default_targets_of_hugging_faces_models(family):
    """BART's attention has the name of torch.nn's, and is none."""
    assert any("lora_" in name for name, _ in finetune.lora(hugging_face(family)).named_parameters())


@pytest.mark.parametrize("stack", [lambda: encoder().double(), nesting, lambda: fasttx.optimize(nesting())])
def test_what_fails_leaves_the_model_as_it_was(tmp_path, stack):
    model, (x, padding) = stack().eval(), inputs()
    model.layers[1].norm1.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
    kinds = [type(module) for module in model.modules()]

    def unchanged():
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
        assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "peft_config")
        with torch.no_grad():
            assert torch.equal(model(x, src_key_padding_mask=padding), expected)

    with pytest.raises(ValueError, match="not supported"):
        finetune.lora(model, targets=["self_attn", "linear1", "norm1"])
    unchanged()
    other = torch.nn.TransformerEncoderLayer(E, H, 2 * F, 0.0, batch_first=True)
    finetune.save_adapter(finetune.lora(torch.nn.TransformerEncoder(other, 2)), tmp_path / "adapter")
    with pytest.raises(ModelFileError, match="another architecture's"):
        finetune.load_adapter(model, tmp_path / "adapter")
    unchanged()
    adapt(model)  # and it can be adapted


def test_another_alpha_is_another_adapter(tmp_path):
    finetune.save_adapter(finetune.lora(encoder(), alpha=16), tmp_path / "adapter")
    with pytest.raises(ModelFileError, match="alpha is 16 in the file, and 2 in the model"):
        finetune.load_adapter(finetune.lora(encoder(), alpha=2), tmp_path / "adapter")


def test_biases_by_all_their_names():
    attention = torch.nn.MultiheadAttention(E, H, add_bias_kv=True)
    finetune.bitfit(attention)
    trained = {name for name, p in attention.named_parameters() if p.requires_grad}
    assert trained == {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}
    lstm = torch.nn.LSTM(2, 3)
    finetune.bitfit(lstm)
    assert {name for name, p in lstm.named_parameters() if p.requires_grad} == {"bias_ih_l0", "bias_hh_l0"}


def test_generating_with_adapters_says_what_to_do():
    model = GPT(GPTConfig(vocab_size=20, width=E, layers=1, heads=H, max_positions=8))
    finetune.lora(model)
    with pytest.raises(ValueError, match="finetune.merge the adapters first"):
        model.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=2)
