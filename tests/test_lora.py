"""LoRA, put on before fasttx.optimize or after it, and merged: written out, and peft's own where it is installed."""

import copy
from functools import partial

import pytest
import torch

import fasttx

transformers = pytest.importorskip("transformers", minversion="5.23")
import hf_models  # noqa: E402
from hf_checks import assert_close, assert_same_gradients  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

E, H, RANK = 16, 2, 4


class Lora(torch.nn.Module):
    """base(x) + (x down) up: around a Linear, or a Conv1D, which keeps its weight the other way about."""

    def __init__(self, base):
        super().__init__()
        inputs, outputs = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(inputs, RANK, dtype=base.weight.dtype) / 4)
        self.up = torch.nn.Parameter(torch.randn(RANK, outputs, dtype=base.weight.dtype) / 4)

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up

    def merged(self):
        """The layer itself again, and the same function."""
        change = self.down @ self.up
        with torch.no_grad():
            self.base.weight += change if isinstance(self.base, Conv1D) else change.mT
        return self.base


def wrap(model, targets):
    torch.manual_seed(1)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in targets:
            setattr(model.get_submodule(parent), name, Lora(module))
    return model


def merge(model):
    for path, module in list(model.named_modules()):
        if isinstance(module, Lora):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.merged())
    return model


def encoder(**options):
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, **options)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def encoder_batch():
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    return {"src": torch.randn(3, 7, E).double(), "src_key_padding_mask": padding}


def valid(model, inputs):
    """What the model says where there is a token."""
    output = model(**inputs)
    if "src" in inputs:
        return output[~inputs["src_key_padding_mask"]]
    return (output.logits if "logits" in output else output.last_hidden_state)[inputs["attention_mask"].bool()]


BERT = partial(hf_models.make, "bert"), partial(hf_models.batch, "bert")
# By name: the model, what it is called with, the layers that LoRA goes around.
CASES = {
    "feed-forward": (encoder, encoder_batch, ["linear1", "linear2"]),
    "pre-norm, GELU, linear1": (partial(encoder, norm_first=True, activation="gelu"), encoder_batch, ["linear1"]),
    "BERT's query and value": (*BERT, ["query", "value"]),
    "all of BERT's": (*BERT, ["query", "key", "value", "dense"]),
    "GPT-2's c_attn": (partial(hf_models.make, "gpt2"), partial(hf_models.batch, "gpt2"), ["c_attn"]),
}


@pytest.fixture(autouse=True)
def without_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def check(theirs, ours, inputs):
    for training in (False, True):
        theirs.train(training), ours.train(training)
        with torch.no_grad():
            assert_close(valid(ours, inputs), valid(theirs, inputs))
        assert_same_gradients(lambda model, inputs: valid(model, inputs).square().sum(), theirs, ours, inputs)


@pytest.mark.parametrize("name", CASES)
def test_written_out(name):
    make, batch, targets = CASES[name]
    base, inputs = make().double(), batch()
    theirs = wrap(copy.deepcopy(base), targets)
    after = fasttx.optimize(copy.deepcopy(theirs))
    before = wrap(fasttx.optimize(copy.deepcopy(base)), targets)
    for ours in (after, before):
        check(theirs, ours, inputs)
        assert any("it is a Lora, not a " in row.reason for row in fasttx.explain(ours).slow)
        assert any("it is a Lora, not a " in row.reason for row in fasttx.explain(ours.eval(), **inputs).slow)
    theirs, *all_ours = map(merge, (theirs, after, before))
    for ours in all_ours:
        check(theirs.requires_grad_(), ours.requires_grad_(), inputs)
        assert not fasttx.explain(ours).slow
        check(theirs, fasttx.restore(ours), inputs)


@pytest.mark.parametrize("name", [*CASES, "attention"])
def test_pefts_own(name):
    peft = pytest.importorskip("peft")
    make, batch, targets = CASES.get(name) or (encoder, encoder_batch, ["self_attn"])
    transposed = "c_attn" in targets
    options = peft.LoraConfig(r=RANK, target_modules=targets, fan_in_fan_out=transposed, init_lora_weights=False)
    base, inputs = make().double(), batch()
    theirs = peft.get_peft_model(copy.deepcopy(base), options)
    after = fasttx.optimize(copy.deepcopy(theirs))
    before = peft.get_peft_model(fasttx.optimize(copy.deepcopy(base)), options)
    before.load_state_dict(theirs.state_dict())
    for ours in (after, before):
        check(theirs, ours, inputs)
        assert any("it is a peft.tuners.lora.layer." in row.reason for row in fasttx.explain(ours).slow)
        with theirs.disable_adapter(), ours.disable_adapter(), torch.no_grad():
            assert_close(valid(ours, inputs), valid(theirs, inputs))
    theirs, *all_ours = (model.merge_and_unload().requires_grad_() for model in (theirs, after, before))
    for ours in all_ours:
        check(theirs, ours, inputs)
        assert not fasttx.explain(ours).slow
