"""What all architectures share: configs of the right types, and files that hold a model or are refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fasttx import finetune
from fasttx.models import (
    GPT,
    Bert,
    BertConfig,
    BertForPretraining,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    ModelFileError,
    Multimodal,
    MultimodalConfig,
    ViT,
    ViTConfig,
)
from fasttx.models._model import write_atomically

safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"width": 8, "layers": 1, "heads": 2}
BERT = BertConfig(vocab_size=20, max_positions=6, **SIZES)
IMAGE = ViTConfig(image_size=8, patch_size=4, **SIZES)
CONFIGS = [
    BERT,
    GPTConfig(vocab_size=20, max_positions=6, **SIZES),
    EncoderDecoderConfig(source_vocab=20, width=8, heads=2, encoder_layers=1, decoder_layers=1),
    IMAGE,
    MultimodalConfig(IMAGE, BERT, queries=2, classes=3, **SIZES),
]
# Values that a field must not have, by the type of the one that it has.
WRONG = {
    int: ("x", 1.5, True), float: ("x", [1.0], True), bool: ("x", 1), str: (1, ["gelu"]), dict: ("x", 1),
    tuple: ("x", 1.5, True), type(None): ("x", 1.5, True),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_config_has_values_of_its_fields_types_alone(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))
    for name, value in dataclasses.asdict(config).items():
        for wrong in WRONG[type(value)]:
            with pytest.raises((TypeError, ValueError), match=name):
                dataclasses.replace(config, **{name: wrong})
        if isinstance(value, float):
            assert type(getattr(dataclasses.replace(config, **{name: 0}), name)) is float
            for wrong in (float("nan"), float("inf"), -0.1):
                with pytest.raises(ValueError, match=f"{name} must be finite and not negative"):
                    dataclasses.replace(config, **{name: wrong})


def test_configs_within_configs_are_of_their_kind():
    with pytest.raises(TypeError, match="image must be ViTConfig, got BertConfig"):
        MultimodalConfig(BERT, BERT, queries=2, classes=3, **SIZES)
    values = CONFIGS[-1].to_dict()
    with pytest.raises(ValueError, match="ViTConfig is made of a dict, got list"):
        MultimodalConfig.from_dict(values | {"image": [1]})
    for wrong in ([1], None, "x"):
        with pytest.raises(ValueError, match="BertConfig is made of a dict"):
            BertConfig.from_dict(wrong)


@pytest.fixture
def refused(tmp_path):
    """Whether a file of a Bert with these changes is refused."""
    model, path = Bert(BERT), tmp_path / "model.safetensors"

    def check(match, state=None, **changes):
        what = {"architecture": "Bert", "config": BERT.to_dict(), "tokenizers": {}} | changes
        state = model.state_dict() if state is None else state(model.state_dict())
        path.write_bytes(safetensors.save(state, {"fasttx": json.dumps(what)}))
        with pytest.raises(ModelFileError, match=match):
            Bert.load(path)

    return check


def test_files_with_another_config_are_refused(refused):
    values = BERT.to_dict()
    for wrong in ([], "x", None):
        refused("its config makes no Bert: BertConfig is made of a dict", config=wrong)
    refused("init_std must be finite", config=values | {"init_std": -1.0})
    refused("eps must be float, got str", config=values | {"eps": "x"})
    refused("activation must be str, got list", config=values | {"activation": ["gelu"]})
    refused("its config makes no Bert", config=values | {"width": 2**40})  # no memory holds it
    refused("its config makes no Bert", tokenizers=None)


def test_files_with_weights_of_another_kind_are_refused(refused):
    refused("is torch.int64, and no model", lambda state: {name: x.long() for name, x in state.items()})
    refused("pooler.bias is torch.int64", lambda state: state | {"pooler.bias": torch.ones(8, dtype=torch.int64)})
    refused("is torch.float8_e5m2", lambda state: {name: x.to(torch.float8_e5m2) for name, x in state.items()})


def test_names_of_one_tensor_must_agree(tmp_path):
    model = BertForPretraining(BERT)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_weights(state, "both names")
    before = [x.clone() for x in model.state_dict().values()]
    with pytest.raises(ModelFileError, match="bert.embedding.token_weight and decoder.weight differ"):
        model.load_weights(state | {"decoder.weight": state["decoder.weight"] + 1}, "two tensors")
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_each_weight_keeps_its_dtype(tmp_path, dtype):
    model, path = BertForPretraining(BERT).to(dtype), tmp_path / "model.safetensors"
    for mixed in (False, True):
        if mixed:
            model.norm.float()
            model.next_sentence.bias.data[0] = torch.nan  # what is broken is kept as it is
        model.save(path)
        loaded = BertForPretraining.load(path)
        assert loaded.decoder.weight is loaded.bert.embedding.token_weight
        for name, values in model.state_dict().items():
            assert values.dtype == loaded.state_dict()[name].dtype
            assert torch.equal(values.nan_to_num(7), loaded.state_dict()[name].nan_to_num(7)), name


def test_loading_leaves_torchs_generator_alone(tmp_path):
    model, path = BertForPretraining(BERT), tmp_path / "model.safetensors"
    model.save(path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    BertForPretraining.load(path)
    assert torch.equal(torch.rand(4), expected)


def test_writing_keeps_the_umask_and_a_links_target(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere/target"
    link.symlink_to(target)
    for umask, mode in ((0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            write_atomically(link, b"%d" % umask)
        finally:
            os.umask(before)
        assert link.is_symlink() and target.read_bytes() == b"%d" % umask
        assert target.stat().st_mode & 0o777 == mode
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link", "target"]


def test_a_write_that_was_killed_leaves_nothing_for_ever(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = """if True:
        import os, signal, sys
        from fasttx.models import _model
        _model.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        _model.write_atomically(sys.argv[1], b"half")
    """
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script, path])
        assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_gpt_is_drawn_from_its_std():
    model = GPT(GPTConfig(vocab_size=300, width=128, layers=2, heads=4, init_std=0.1))
    for values, wanted in (
        (model.embedding.token_weight, 0.1), (model.transformer.layers[0].linear1.weight, 0.1),
        (model.transformer.layers[1].linear2.weight, 0.05),
    ):  # fmt: skip
        assert abs(values.std() / wanted - 1) < 0.05


def test_a_model_with_adapters_is_not_saved(tmp_path):
    """Its file would have names that no model has."""
    pytest.importorskip("peft")
    model = Bert(BERT)
    adapted = finetune.lora(model)
    with pytest.raises(ValueError, match="has adapters: fasttx.finetune.merge them"):
        model.save(tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())
    finetune.merge(adapted)
    model.save(tmp_path / "model.safetensors")
    assert Bert.load(tmp_path / "model.safetensors").state_dict().keys() == model.state_dict().keys()


def _fewer_layers(model):
    model.transformer.layers = model.transformer.layers[:1]


def _another_width(model):
    model.head.weight = torch.nn.Parameter(torch.zeros(20, 6))


def _untied(model):
    model.head.weight = torch.nn.Parameter(model.head.weight + 1)


@pytest.mark.parametrize(
    "change, match",
    [
        (_fewer_layers, "its file would not load: transformer.layers.1"),
        (_another_width, "its file would not load: head.weight"),
        (_untied, "embedding.token_weight and head.weight are one weight in a GPT, and differ here"),
        (lambda model: torch.nn.utils.parametrizations.weight_norm(model.head), "not load: head.weight, head.p"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path, change, match):
    model = GPT(GPTConfig(vocab_size=20, max_positions=6, **SIZES | {"layers": 2}))
    change(model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        model.save(tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir()) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_the_default_device_does_not_matter(tmp_path, config):
    kind = next(kind for kind in (Bert, GPT, EncoderDecoder, ViT, Multimodal) if kind.Config is type(config))
    model = kind(config)
    with torch.device("meta"):
        model.save(tmp_path / "model.safetensors")
        loaded = kind.load(tmp_path / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_weight_that_was_untied_but_is_the_same_is_saved(tmp_path):
    """As by to_empty and load_state_dict."""
    model = GPT(CONFIGS[1])
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(GPT.load(tmp_path / "model.safetensors").head.weight, model.head.weight)


class Derived(GPT):
    """Reads values that it begins with, and has a buffer of integers."""

    def __init__(self, config):
        super().__init__(config)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        self.register_buffer("ids", torch.arange(5))


class Wanting(GPT):
    def __init__(self, config, more):
        super().__init__(config)


def test_derived_models_are_saved(tmp_path):
    model, path = Derived(CONFIGS[1]), tmp_path / "model.safetensors"
    model.bfloat16().save(path)
    loaded = Derived.load(path)
    assert loaded.ids.tolist() == list(range(5)) and loaded.head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a Wanting is not made by its config alone"):
        Wanting(CONFIGS[1], 5).save(path)
    assert Derived.load(path).state_dict().keys() == model.state_dict().keys()


def test_weights_that_were_tied_or_are_nan_are_saved(tmp_path):
    model, path = GPT(dataclasses.replace(CONFIGS[1], tied=False)), tmp_path / "model.safetensors"
    model.head.weight = model.embedding.token_weight
    model.save(path)
    assert torch.equal(GPT.load(path).head.weight, model.embedding.token_weight)
    model = GPT(CONFIGS[1])
    model.head.weight.data[0, 0] = torch.nan
    model.save(path)
    assert GPT.load(path).head.weight[0, 0].isnan()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_weights_of_hugging_faces(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    torch.save({"a": torch.ones(30)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for data in (*(whole[:size] for size in range(0, len(whole), 40)), b"hello world\n"):
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match="pytorch_model.bin"):
            Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, state, match",
    [
        ({"is_decoder": True}, {}, "it is a decoder"),
        ({"hidden_size": "8"}, {}, "width must be int, got str"),
        ({}, {1: torch.ones(2)}, "holds no weights by name"),
        ({}, [torch.ones(2)], "holds no weights by name"),
    ],
)
def test_folders_of_hugging_faces_that_hold_no_bert(tmp_path, config, state, match):
    sizes = {
        "model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 6, "type_vocab_size": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=match):
        Bert.from_pretrained(tmp_path)


def test_a_head_that_is_not_the_tokens_weight_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    torch.save(state | {"lm_head.weight": state["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="embedding.token_weight and head.weight differ"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_weights_in_several_files(tmp_path, safe):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    parts, index = sorted(tmp_path.glob("model-*.safetensors")), tmp_path / "model.safetensors.index.json"
    assert len(parts) > 1
    if not safe:
        weights = {}
        for part in parts:
            torch.save(safetensors.load_file(part), tmp_path / part.with_suffix(".bin").name)
            weights |= dict.fromkeys(safetensors.load_file(part), part.with_suffix(".bin").name)
            part.unlink()
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weights}))
        parts = sorted(tmp_path.glob("*.bin"))
    token_ids = torch.randint(20, (2, 7))
    ours = GPT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours.double()(token_ids), theirs.double()(token_ids).logits, rtol=1e-9, atol=1e-9)
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match=parts[0].name):
        GPT.from_pretrained(tmp_path)
    for wrong, message in (
        ("[]", "names no files"), ("{", "names no files"), ('{"weight_map": {"a": "../b"}}', "not beside it"),
    ):  # fmt: skip
        index.write_text(wrong)
        with pytest.raises(ModelFileError, match=message):
            GPT.from_pretrained(tmp_path)
