"""parity(): errors before and after optimize(), against float64."""

import pytest
import torch

import fasttx

B, T, E = 3, 7, 16


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(E, 4, 24, dropout=0.3, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(E, 5)

    def forward(self, x, attention_mask=None):
        padding = None if attention_mask is None else attention_mask == 0
        states = self.encoder(x, src_key_padding_mask=padding)
        logits = self.head(states)
        return {"logits": logits, "states": (states,), "best": logits.argmax(-1), "name": "a model"}


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batch():
    lengths = torch.tensor([[7], [3], [5]])
    return {"x": torch.randn(B, T, E), "attention_mask": (torch.arange(T) < lengths).long()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outputs_are_within_budget(model, batch, dtype):
    result = fasttx.parity(model.to(dtype), batch | {"x": batch["x"].to(dtype)})
    assert list(result.verdicts) == ["logits", "states.0", "best"]
    assert result.passed, str(result)
    assert result.verdicts["logits"].eager_error > 0
    lines = str(result).splitlines()
    assert len(lines) == 4 and lines[1].startswith("logits") and lines[1].endswith("passed")


def test_the_model_is_not_touched(model, batch):
    classes = [type(module) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    fasttx.parity(fasttx.optimize(model), batch, gradients=True)
    assert model.training and torch.equal(torch.get_rng_state(), seed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in fasttx.restore(model).modules()] == classes


@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_gradients(model, batch, padding):
    result = fasttx.parity(model, batch, padding=padding, gradients=True)
    assert result.passed, str(result)
    assert list(result.verdicts) == ["logits", "states.0", "best", "gradients"]


def test_a_wrong_gradient_fails(batch, monkeypatch):
    run = fasttx.nn.LayerNorm.forward

    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    monkeypatch.setattr(fasttx.nn.LayerNorm, "forward", lambda self, input: run(self, Tripled.apply(input)))
    result = fasttx.parity(torch.nn.LayerNorm(E), batch["x"], gradients=True)
    assert result.verdicts["output"].passed and not result.verdicts["gradients"].passed and not result.passed


def test_only_valid_positions_count(model, batch):
    """Padded positions hold zeros after optimize(): told that they count, they are errors."""
    batch["attention_mask"] = batch["attention_mask"].flip(1)  # where torch would not give zeros as well
    assert fasttx.parity(model, batch).passed
    everywhere = torch.ones(B, T, dtype=torch.bool)
    assert not fasttx.parity(model, batch, valid=everywhere).passed


def test_forms_of_inputs(batch):
    norm = torch.nn.LayerNorm(E)
    for inputs in (batch["x"], (batch["x"],), [batch["x"]], {"input": batch["x"]}):
        result = fasttx.parity(norm, inputs)
        assert list(result.verdicts) == ["output"] and result.passed


def test_a_difference_fails_and_shows(batch, monkeypatch):
    monkeypatch.setattr(fasttx.nn.LayerNorm, "forward", lambda self, input: input * 1.5)
    result = fasttx.parity(torch.nn.LayerNorm(E), batch["x"])
    assert not result.passed and "FAILED" in str(result)
    monkeypatch.setattr(fasttx.nn.LayerNorm, "forward", lambda self, input: input.half())
    result = fasttx.parity(torch.nn.LayerNorm(E), batch["x"])
    assert not result.passed and "float16 (3, 7, 16) where float32 (3, 7, 16) was expected" in str(result)


def test_refuses_bad_arguments(model, batch):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        fasttx.parity([model], batch)
    with pytest.raises(TypeError, match="inputs must be .*, got int"):
        fasttx.parity(model, 3)
    with pytest.raises(ValueError, match=r"valid must be a bool tensor \(B, T\), got int64 \(3, 7\)"):
        fasttx.parity(model, batch, valid=batch["attention_mask"])
    with pytest.raises(ValueError, match="padding must be one of"):
        fasttx.parity(model, batch, padding="drop")


def test_a_model_without_float64_is_an_error_that_says_so(batch):
    class Single(torch.nn.Module):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise NotImplementedError("no float64 here")
            return x

    with pytest.raises(RuntimeError, match="float64, in which the model cannot run: no float64 here"):
        fasttx.parity(Single(), batch["x"])
