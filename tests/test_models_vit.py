"""The vision transformer against Hugging Face's, and what every architecture has to do."""

import pytest
import torch
from budget import assert_within_budget
from torch.func import functional_call

import fasttx
from fasttx.models import ModelFileError, ViT, ViTConfig

TINY = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "classes": 3, "channels": 2}
POOLS = pytest.mark.parametrize("pool", ["class", "mean"])


def make(**changes):
    return ViT(ViTConfig(**(TINY | changes)))


def hugging_face(**sizes):
    """Its model in float64, with no weight 0 or 1 by design, and ours with the same ones."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_channels=2,
        layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, **sizes,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for values in theirs.parameters():
            values.add_(0.1 * torch.randn_like(values))
    state = {name.removeprefix("vit."): values.clone() for name, values in theirs.state_dict().items()}
    positions, patches = state["embeddings.position_embeddings"][0], "embeddings.patch_embeddings.projection"
    own = {
        "class_token": state["embeddings.cls_token"][0] + positions[:1],
        "position_weight": positions[1:],
        "patch_projection.weight": state[f"{patches}.weight"].flatten(1),
        "patch_projection.bias": state[f"{patches}.bias"],
    }
    names = {
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "self_attn.out_proj",
        "mlp.fc1": "linear1", "mlp.fc2": "linear2",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        own |= {f"encoder.norm.{kind}": state[f"layernorm.{kind}"], f"head.{kind}": state[f"classifier.{kind}"]}
        for i in range(2):
            parts = [state[f"layers.{i}.attention.{part}_proj.{kind}"] for part in "qkv"]
            own[f"encoder.layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for their_name, our_name in names.items():
                own[f"encoder.layers.{i}.{our_name}.{kind}"] = state[f"layers.{i}.{their_name}.{kind}"]
    ours = make(**sizes).eval()
    ours.load_weights(own, "theirs")
    return theirs, ours


@pytest.mark.parametrize("size", [8, 16, (12, 8), 4])
def test_as_hugging_face(size):
    """In float64, at the size that it was made for and at others."""
    theirs, ours = hugging_face(image_size=8, patch_size=4)
    sides = size if isinstance(size, tuple) else (size, size)
    images = torch.randn(3, 2, *sides).double()
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True, output_hidden_states=True)
        hidden = theirs.vit(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(images), expected.logits, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.features(images), hidden, rtol=1e-10, atol=1e-12)
        resized = ours.resize(size)
        torch.testing.assert_close(resized(images), expected.logits, rtol=1e-10, atol=1e-12)
    assert resized.config.image_size == sides and len(resized.position_weight) == sides[0] * sides[1] // 16


def test_within_budget():
    theirs, ours = (model.float() for model in hugging_face(image_size=8, patch_size=2))
    images = torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        actual = ours(images)
        theirs.set_attn_implementation("eager")
        eager = theirs(images).logits
        theirs.set_attn_implementation("sdpa")  # its eager attention rounds weights to float32 in float64 too
        truth = theirs.double()(images.double()).logits
    assert_within_budget(actual=actual, eager=eager, truth=truth)


@POOLS
def test_overfits(pool):
    model = make(pool=pool)
    images, labels = torch.randn(6, 2, 8, 8), torch.tensor([0, 1, 2, 2, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        loss = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    assert torch.equal(model.eval()(images).argmax(1), labels)


@POOLS
def test_other_images_change_no_bit(pool, needs_extension):
    model, images = make(pool=pool).eval(), torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        together = model(images)
        for i in range(5):
            assert torch.equal(model(images[i : i + 1]), together[i : i + 1])


@POOLS
def test_loss_is_the_cross_entropy_of_the_logits(pool):
    model, images = make(pool=pool).double(), torch.randn(4, 2, 8, 8).double()
    labels = torch.tensor([2, 0, -100, 1])
    for smoothing in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=smoothing)
        torch.testing.assert_close(model.loss(images, labels, label_smoothing=smoothing), expected)


@POOLS
def test_pools(pool):
    model, images = make(pool=pool).eval(), torch.randn(2, 2, 8, 8)
    features = model.features(images)
    assert features.shape == (2, 4 + (pool == "class"), 16)
    wanted = features[:, 0] if pool == "class" else features.mean(1)
    assert torch.equal(model(images), model.head.logits(wanted))


@POOLS
def test_everything_runs_on_the_kernels(pool, needs_extension):
    model, images = make(pool=pool, dropout=0.1), torch.randn(2, 2, 8, 8)
    with fasttx.strict():
        model.loss(images, torch.tensor([1, 2])).backward()
        with torch.inference_mode():
            model.eval()(images)
            model(torch.randn(2, 2, 12, 16))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p is not model.head.bias)


@POOLS
@pytest.mark.parametrize("shape", [(8, 8), (4, 8)], ids=["learned", "interpolated"])
def test_gradcheck(pool, shape):
    model = ViT(ViTConfig(image_size=8, patch_size=4, width=4, layers=1, heads=2, classes=2, feed_forward=4, pool=pool))
    model, images = model.double(), torch.randn(2, 1, *shape).double().requires_grad_()
    named = dict(model.named_parameters())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.loss(images, torch.tensor([0, 1]))

    def loss(images, *values):
        return functional_call(Loss(), {f"model.{n}": v for n, v in zip(named, values, strict=True)}, (images,))

    values = [torch.randn_like(p).requires_grad_() for p in named.values()]
    assert torch.autograd.gradcheck(loss, (images, *values))


@POOLS
def test_the_reference_path_is_the_same(pool):
    model, images = make(pool=pool).double(), torch.randn(2, 2, 12, 8).double()
    losses, gradients = [], []
    for backend in ("auto", "reference"):
        with fasttx.backend(backend):
            losses.append(model.loss(images, torch.tensor([1, 2]), label_smoothing=0.1))
            gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_dropout_follows_the_seed():
    model, images = make(dropout=0.3), torch.randn(2, 2, 8, 8)

    def logits(seed):
        torch.manual_seed(seed)
        return model(images)

    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


@POOLS
def test_save_and_load(pool, tmp_path):
    model, images = make(pool=pool, image_size=(8, 12)).eval(), torch.randn(2, 2, 8, 12)
    model.save(tmp_path / "model.safetensors")
    loaded = ViT.load(tmp_path / "model.safetensors").eval()
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    resized = model.resize((12, 12))
    resized.save(tmp_path / "resized.safetensors")
    with torch.no_grad():
        assert torch.equal(ViT.load(tmp_path / "resized.safetensors").eval()(images), resized(images))
    half = (tmp_path / "model.safetensors").read_bytes()[:-100]
    (tmp_path / "half.safetensors").write_bytes(half)
    with pytest.raises(ModelFileError, match="no whole safetensors"):
        ViT.load(tmp_path / "half.safetensors")


def test_resizing_leaves_the_model_as_it_was():
    model = make()
    before = model.position_weight.clone()
    resized = model.resize(16)
    with torch.no_grad():
        for values in resized.parameters():
            values.add_(1)
    assert torch.equal(model.position_weight, before) and model.config.image_size == (8, 8)
    assert resized.position_weight.requires_grad and resized.position_weight.grad is None
    assert torch.equal(model.resize(8).position_weight, before)


def test_a_model_without_a_head():
    model = make(classes=0)
    assert model.features(torch.randn(1, 2, 8, 8)).shape == (1, 5, 16)
    for call in (lambda x: model(x), lambda x: model.loss(x, torch.tensor([0]))):
        with pytest.raises(ValueError, match="no head"):
            call(torch.randn(1, 2, 8, 8))


@pytest.mark.parametrize(
    "change, kind, match",
    [
        ({"image_size": 10}, ValueError, "10 x 10 is no whole number of patches of 4 x 4"),
        ({"image_size": 2}, ValueError, "no whole number"),
        ({"image_size": (8, 8, 8)}, TypeError, "image_size must be an int or"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"patch_size": 2.0}, TypeError, "patch_size must be an int or"),
        ({"width": 15}, ValueError, "multiple of heads"),
        ({"pool": "max"}, ValueError, "pool must be one of"),
        ({"classes": -1}, ValueError, "classes must be finite and not negative"),
        ({"dropout": 1.0}, ValueError, "dropout"),
    ],
)
def test_bad_configs(change, kind, match):
    with pytest.raises(kind, match=match):
        make(**change)


def test_bad_input():
    model, images = make(), torch.randn(2, 2, 8, 8)
    for bad, kind, match in (
        ((images * 255).to(torch.uint8), TypeError, "images must be floating, got torch.uint8"),
        (images[:0], ValueError, "empty batch"),
        (images[:, :1], ValueError, "2 channels"),
        (images[0], ValueError, "2 channels"),
        (images[..., :6], ValueError, "no whole number of patches"),
        (images[:, :, :0], ValueError, "no whole number of patches"),
        (images.double(), TypeError, "images must be torch.float32, as the model, got torch.float64"),
        ([images], TypeError, "images must be a tensor"),
    ):
        with pytest.raises(kind, match=match):
            model(bad)
    with pytest.raises(ValueError, match="no whole number"):
        model.resize(9)
    with pytest.raises(ValueError, match="target must lie in"):
        model.loss(images, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="target must have the shape"):
        model.loss(images, torch.tensor([0]))
