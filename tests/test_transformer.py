"""TransformerEncoderLayer and TransformerEncoder against torch.nn's."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.utils.prune as prune
from budget import DTYPES
from module_checks import assert_equals_torch, assert_module_within_budget
from torch.nn import functional as F

import fasttx
from fasttx import dispatch

B, T, E, H = 4, 6, 16, 4
LAYER_OPTIONS = [
    {},
    {"batch_first": True},
    {"norm_first": True},
    {"norm_first": True, "batch_first": True, "activation": "gelu"},
    {"bias": False},
    {"bias": False, "norm_first": True, "activation": F.gelu},
    {"layer_norm_eps": 1e-2, "activation": torch.nn.ReLU()},
    {"activation": torch.nn.GELU("tanh"), "batch_first": True},
    {"activation": torch.nn.SiLU(), "batch_first": True},
    {"activation": lambda x: x * x, "batch_first": True},
]
LAYER_IDS = [
    ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    for options in LAYER_OPTIONS
]


def make_layer(**options):
    layer = torch.nn.TransformerEncoderLayer(E, H, 24, **{"dropout": 0.0, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def make_encoder(layers=2, norm=True, **options):
    layer = make_layer(**{"batch_first": True, **options})
    final = torch.nn.LayerNorm(E) if norm else None
    encoder = torch.nn.TransformerEncoder(layer, layers, final, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def nesting(encoder, **attributes):
    """The encoder with torch's nested-tensor path on, in inference."""
    encoder.enable_nested_tensor = encoder.use_nested_tensor = True
    for name, value in attributes.items():
        setattr(encoder, name, value)
    return encoder.eval()


def batch(batch_first=True):
    return torch.randn(B, T, E) if batch_first else torch.randn(T, B, E)


def paddings():
    """By pattern, (B, T), True = padding; every sequence keeps a token, for torch's sake."""
    lengths = torch.tensor([T, 1, 3, 4])
    positions = torch.arange(T)
    holes = torch.rand(B, T) < 0.5
    holes[:, 2] = False
    return {
        "right": positions >= lengths[:, None],
        "left": positions < T - lengths[:, None],
        "holes": holes,
        "none": torch.zeros(B, T, dtype=torch.bool),
    }


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)


def layer_masks():
    mask = torch.rand(T, T) < 0.4
    mask[:, 2] = False
    padding = paddings()["holes"]
    return [
        {},
        {"src_mask": mask},
        {"src_mask": torch.randn(B * H, T, T)},
        {"src_key_padding_mask": padding},
        {"src_key_padding_mask": torch.zeros(B, T).masked_fill_(padding, -torch.inf)},
        {"src_mask": mask, "src_key_padding_mask": padding},
        {"src_mask": CAUSAL, "is_causal": True},
    ]


def with_masks(**given):
    def run(module, src):
        cast = {
            k: v.to(src.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        return module(src, **cast)

    return run


@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=LAYER_IDS)
def test_layer_arguments_and_masks(options):
    layer, src = make_layer(**options), batch(options.get("batch_first", False))
    for masks in layer_masks():
        fast = assert_equals_torch(layer, {"src": src}, with_masks(**masks))
        assert type(fast) is fasttx.nn.TransformerEncoderLayer
    assert_equals_torch(layer, {"src": torch.randn(T, E)}, with_masks(src_mask=CAUSAL))
    if "GELU" not in str(options):  # torch's own fast path forgets that GELU is the approximate one
        assert_equals_torch(layer.eval(), {"src": src}, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_layer_within_budget(dtype, norm_first):
    torch.manual_seed(5)
    layer = torch.nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    assert_module_within_budget(layer, {"src": torch.randn(8, 24, 64)}, dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_relu_layer_within_budget_off_its_kink(norm_first, dtype, seed):
    """At zero the slope jumps: values whose rounding decides their sign have either gradient, in torch as here."""
    torch.manual_seed(seed)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    with torch.no_grad():  # half of the hidden values above zero, half below, none near it
        layer.linear1.bias.copy_(torch.tensor([4.0, -4.0]).repeat(32) + 0.1 * torch.randn(64))
    assert_module_within_budget(layer, {"src": torch.randn(2, 7, 32)}, dtype)


@pytest.mark.parametrize("pattern", ["right", "left", "holes", "none"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_without_padding_equals_torch_where_valid(
    pattern, batch_first, norm_first, training
):
    encoder = make_encoder(batch_first=batch_first, norm_first=norm_first).train(training)
    padding = paddings()[pattern]
    floating = torch.zeros(B, T).masked_fill_(padding, -torch.inf)

    def valid_part(given, **more):
        def run(module, src):
            cast = given if given.dtype == torch.bool else given.to(src.dtype)
            output = module(src, src_key_padding_mask=cast, **more)
            return output[~padding if batch_first else ~padding.T]

        return run

    src = batch(batch_first)
    fast = assert_equals_torch(encoder, {"src": src}, valid_part(padding))
    assert_equals_torch(encoder, {"src": src}, valid_part(floating))
    assert_equals_torch(encoder, {"src": src}, valid_part(padding), padding="keep")
    if pattern == "right":  # causal attention leaves the first queries of the others without keys
        assert_equals_torch(encoder, {"src": src}, valid_part(padding, mask=CAUSAL))
        assert_equals_torch(encoder, {"src": src}, valid_part(padding, mask=CAUSAL, is_causal=True))
    with torch.no_grad():
        output = fast(src.double(), src_key_padding_mask=padding)
    assert (output[padding if batch_first else padding.T] == 0).all()


def test_causal_mask_over_holes():
    encoder, src = make_encoder(), batch()
    padding = paddings()["holes"]
    padding[:, 0] = False

    def run(module, src):
        return module(src, mask=CAUSAL, src_key_padding_mask=padding)[~padding]

    assert_equals_torch(encoder, {"src": src}, run)


def test_masks_that_cannot_be_packed_run_padded():
    encoder, src, padding = make_encoder(), batch(), paddings()["right"]
    mask = torch.rand(T, T) < 0.3
    mask[:, 0] = False
    floating = padding.double() * -2  # a bias, not padding
    assert_equals_torch(
        encoder, {"src": src}, lambda m, src: m(src, mask=mask, src_key_padding_mask=padding)
    )
    assert_equals_torch(encoder, {"src": src}, lambda m, src: m(src, src_key_padding_mask=floating))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pattern", ["right", "left"])
def test_drop_in_zeros_padding_where_torch_does(pattern, norm):
    """Whole outputs equal torch's, padded positions too: with the nested path, without it, and in training."""
    theirs = nesting(make_encoder(norm=norm).double())
    ours = fasttx.optimize(copy.deepcopy(theirs), padding="keep")
    src, padding = batch().double(), paddings()[pattern]
    for module in (theirs, ours):
        module.eval()
    with torch.no_grad():
        expected = theirs(src, src_key_padding_mask=padding)
        torch.testing.assert_close(ours(src, src_key_padding_mask=padding), expected)
    of_zeros = theirs.norm.bias if norm else torch.zeros(E).double()
    assert bool((expected[padding] == of_zeros).all()) == (pattern == "right")
    expected = theirs(src, src_key_padding_mask=padding)
    torch.testing.assert_close(ours(src, src_key_padding_mask=padding), expected)


def test_drop_in_construction():
    torch.manual_seed(2)
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H, batch_first=True), 2)
    torch.manual_seed(2)
    layer = fasttx.nn.TransformerEncoderLayer(E, H, batch_first=True)
    ours = fasttx.nn.TransformerEncoder(layer, 2)
    assert ours.use_nested_tensor and repr(ours) == repr(theirs)
    assert type(ours.layers[1].norm1) is fasttx.nn.LayerNorm
    assert type(ours.layers[1].self_attn) is fasttx.nn.MultiheadAttention
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    plain = torch.nn.TransformerEncoderLayer(E, H)
    from_theirs = fasttx.nn.TransformerEncoder(plain, 1, enable_nested_tensor=False)
    assert type(from_theirs.layers[0]) is fasttx.nn.TransformerEncoderLayer
    assert type(plain) is torch.nn.TransformerEncoderLayer
    of_layer, of_encoder = (
        inspect.signature(getattr(fasttx.nn, name)) for name in ("TransformerEncoderLayer", "TransformerEncoder")
    )
    assert of_layer == inspect.signature(torch.nn.TransformerEncoderLayer)
    *parameters, remove_padding = of_encoder.parameters.values()
    assert parameters == list(inspect.signature(torch.nn.TransformerEncoder).parameters.values())
    assert str(remove_padding) == "remove_padding: bool | None = None"
    assert remove_padding.kind is inspect.Parameter.KEYWORD_ONLY
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        assert all(torch.equal(v, state[name]) for name, v in twin.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_sequences_without_tokens(training):
    encoder = fasttx.optimize(make_encoder().train(training))
    src = batch().requires_grad_()
    padding = paddings()["holes"]
    padding[2] = True
    output = encoder(src, src_key_padding_mask=padding)
    output.square().sum().backward()
    assert output.isfinite().all() and (output[2] == 0).all()
    assert src.grad.isfinite().all() and (src.grad[padding] == 0).all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_no_token_at_all():
    encoder = fasttx.optimize(make_encoder())
    src = batch().requires_grad_()
    output = encoder(src, src_key_padding_mask=torch.ones(B, T, dtype=torch.bool))
    assert output.shape == src.shape and (output == 0).all()
    output.sum().backward()
    assert (src.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (1, 1)])
def test_empty_and_single_batches(shape):
    encoder = fasttx.optimize(make_encoder())
    src, padding = torch.randn(*shape, E), torch.zeros(shape, dtype=torch.bool)
    assert encoder(src, src_key_padding_mask=padding).shape == src.shape


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pattern", ["none", "right"])
def test_dropout_statistics_and_determinism(norm_first, pattern):
    encoder = make_encoder(layers=1, dropout=0.2, norm_first=norm_first, norm=False)
    fast = fasttx.optimize(copy.deepcopy(encoder))
    src, padding = batch(), paddings()[pattern]

    def run(module, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return module(src, src_key_padding_mask=padding)[~padding]

    assert torch.equal(run(fast, 1), run(fast, 1))
    assert not torch.equal(run(fast, 1), run(fast, 2))
    ours = torch.stack([run(fast, seed) for seed in range(400)])
    theirs = torch.stack([run(encoder, seed) for seed in range(400)])
    # Means of 400 samples: five standard errors of their difference.
    error = ((ours.var(0) + theirs.var(0)) / 400).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error + 1e-6).all()
    assert 0.9 < (ours.var(0).mean() / theirs.var(0).mean()) < 1.1


def test_dropout_of_one_is_torchs():
    layer = fasttx.optimize(make_layer(dropout=1.0))
    src = batch(False)
    torch.testing.assert_close(layer(src), layer.norm2(layer.norm1(src)))


class LowRank(torch.nn.Module):
    """A linear layer with an adapter beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Scaled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def wrap_linear(layer):
    layer.linear1 = LowRank(layer.linear1)


def hook_linear(layer):
    layer.linear2.register_forward_hook(lambda m, args, output: output * 3)


def hook_norm(layer):
    layer.norm2.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def hook_attention(layer):
    layer.self_attn.register_forward_hook(lambda m, args, output: (output[0] * 2, None))


def parametrize_linear(layer):
    torch.nn.utils.parametrize.register_parametrization(layer.linear1, "weight", Scaled())


def parametrize_norm(layer):
    torch.nn.utils.parametrize.register_parametrization(layer.norm1, "weight", Scaled())


def prune_linear(layer):
    prune.l1_unstructured(layer.linear1, "weight", amount=0.5)


def replace_activation(layer):
    layer.activation = torch.nn.Hardtanh()


def replace_forward(layer):
    layer.linear1.forward = lambda x: F.linear(x, layer.linear1.weight)


CHANGES = {
    wrap_linear: "linear1", hook_linear: "linear2", hook_norm: "norm2", hook_attention: "self_attn",
    parametrize_linear: "linear1", parametrize_norm: "norm1", prune_linear: "linear1",
    replace_activation: "activation", replace_forward: "linear1",
}  # fmt: skip


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_children_are_honoured(change, before):
    """Before or after optimize(), alone and in an encoder that packs, against torch's module with the same change."""
    theirs = make_encoder().double()
    ours = copy.deepcopy(theirs)
    for module, when in ((theirs, True), (ours, before)):
        if when:
            torch.manual_seed(3)
            change(module.layers[0])
    fasttx.optimize(ours)
    if not before:
        torch.manual_seed(3)
        change(ours.layers[0])
    theirs, ours = theirs.double(), ours.double()
    src, padding = batch().double(), paddings()["right"]
    torch.testing.assert_close(ours.layers[0](src), theirs.layers[0](src))
    actual, expected = (m(src, src_key_padding_mask=padding) for m in (ours, theirs))
    torch.testing.assert_close(actual[~padding], expected[~padding])
    rows = {row.module: row for row in fasttx.explain(ours).rows}
    assert "outside the fusion" in rows[f"layers.0.{CHANGES[change]}"].reason
    assert "fused into layers.1" in rows["layers.1.linear1"].reason


def test_another_attention_module_gets_torchs_masks():
    class Recorder(torch.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            self.seen = kwargs
            return super().forward(*args, **kwargs)

    layer = fasttx.optimize(make_layer(batch_first=True))
    layer.self_attn = Recorder(E, H, batch_first=True)
    layer(batch(), src_key_padding_mask=paddings()["right"])
    assert layer.self_attn.seen["key_padding_mask"].dtype == torch.float32
    assert layer.self_attn.seen["need_weights"] is False


def test_nested_tensors_as_torch():
    theirs = make_layer(batch_first=True).eval()
    ours = fasttx.optimize(copy.deepcopy(theirs))
    src = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        for a, b in zip(ours(src).unbind(), theirs(src).unbind(), strict=True):
            torch.testing.assert_close(a, b)


def test_packing_happens(needs_extension):
    encoder = fasttx.optimize(make_encoder().train())
    heard = []
    listen = heard.append
    dispatch.listeners.append(listen)
    try:
        encoder(batch(), src_key_padding_mask=paddings()["holes"])
        assert {d.op for d in heard if "attention" in d.op} == {"attention_block_varlen"}
        heard.clear()
        encoder(batch(), src_key_padding_mask=paddings()["none"])
        assert {d.op for d in heard if "attention" in d.op} == {"attention_block"}
        assert {d.backend for d in heard} == {"cpu"}
    finally:
        dispatch.listeners.remove(listen)


def test_causal_hint_without_a_mask_is_torchs_error():
    encoder, padding = make_encoder(), paddings()["right"]
    for module in (encoder, fasttx.optimize(copy.deepcopy(encoder))):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            module(batch(), src_key_padding_mask=padding, is_causal=True)
