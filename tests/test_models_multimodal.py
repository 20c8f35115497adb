"""Images and texts together: the classifier, the captions, and one modality without the other."""

import pytest
import torch
from module_checks import Loss
from torch.func import functional_call

import fasttx
from fasttx.models import BertConfig, ModelFileError, Multimodal, MultimodalConfig, ViTConfig
from fasttx.models._decoding import next_tokens

IMAGE = ViTConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2)
TEXT = BertConfig(vocab_size=20, width=12, layers=1, heads=2, max_positions=10, dropout=0.0)
TINY = MultimodalConfig(
    IMAGE, TEXT, width=16, layers=2, heads=2, queries=3, classes=4, caption_layers=2, max_caption=8,
    init_std=0.1,  # from 0.02, training so narrow a model stalls now and then
)  # fmt: skip
LENGTHS = (6, 2, 4, 1)
GIVEN = pytest.mark.parametrize("given", ["both", "image", "text"])


def batch(given="both"):
    """Images, token ids and their padding: four of each, or None."""
    images, token_ids = torch.randn(4, 1, 8, 8), torch.randint(3, 20, (4, 6))
    padding = torch.arange(6) >= torch.tensor(LENGTHS)[:, None]
    token_ids = token_ids.masked_fill(padding, 0)
    return (None if given == "text" else images), *((None, None) if given == "image" else (token_ids, padding))


def captions():
    """Four captions that differ, and where their padding is."""
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [1, 8, 9, 4, 2], [1, 2, 0, 0, 0]])
    return ids, torch.arange(5) >= torch.tensor([4, 3, 5, 2])[:, None]


def train(loss, model, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return value.item()


@GIVEN
def test_overfits(given):
    model, (images, token_ids, padding), labels = Multimodal(TINY), batch(given), torch.tensor([0, 1, 3, 2])
    assert train(lambda: model.loss(images, token_ids, padding, labels=labels), model, 120) < 0.02
    assert torch.equal(model.eval()(images, token_ids, padding).argmax(1), labels)


@GIVEN
def test_captions_overfit_and_are_written(given):
    model, (images, token_ids, padding), (ids, ids_padding) = Multimodal(TINY), batch(given), captions()
    loss = train(lambda: model.loss(images, token_ids, padding, captions=ids, caption_padding=ids_padding), model, 150)
    assert loss < 0.02
    written = model.caption(images, token_ids, padding, max_new_tokens=8)
    assert torch.equal(written, ids[:, 1:])
    again = torch.cat((ids[:, :1], written), 1)
    model.loss(images, token_ids, padding, captions=again).backward()  # what was written can be trained on
    assert model.training  # as it was


@GIVEN
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_cached_decoding_is_full_decoding(given, temperature):
    """Each step of the cache against the decoder on the whole caption so far, in float64."""
    model, (images, token_ids, padding) = Multimodal(TINY).double().eval(), batch(given)
    images = None if images is None else images.double()
    generator, ended = torch.Generator().manual_seed(5), torch.zeros(4, dtype=torch.bool)
    with torch.no_grad():
        features, tokens = model.features(images, token_ids, padding), torch.ones(4, 1, dtype=torch.long)
        for length in range(1, 8):
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            hidden = model.caption_decoder(model.caption_embedding(tokens), features, later, tgt_is_causal=True)
            logits = model.caption_head.logits(hidden[:, -1])
            chosen = next_tokens(logits, temperature=temperature, generator=generator).masked_fill(ended, 0)
            ended |= chosen == 2
            tokens = torch.cat((tokens, chosen[:, None]), 1)
    written = model.caption(
        images, token_ids, padding, max_new_tokens=7, temperature=temperature, generator=generator.manual_seed(5)
    )
    expected = tokens[:, 1:]
    assert torch.equal(written, expected[:, : written.shape[1]]) and not expected[:, written.shape[1] :].any()
    assert temperature == 0.0 or len(set(expected[0].tolist())) > 2


def test_captions_are_drawn_by_the_generator():
    model, inputs = Multimodal(TINY), batch()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.caption(*inputs, max_new_tokens=8, temperature=1.0, generator=generator).tolist()

    assert drawn(1) == drawn(1) and drawn(1) != drawn(2)
    likeliest = model.caption(*inputs, max_new_tokens=8)
    assert torch.equal(model.caption(*inputs, max_new_tokens=8, temperature=1.0, top_k=1), likeliest)


@pytest.mark.parametrize("given", ["both", "text"])
def test_padding_changes_no_bit(given, needs_extension):
    model, (images, token_ids, padding) = Multimodal(TINY).eval(), batch(given)
    with torch.no_grad():
        together = model.features(images, token_ids, padding)
        logits = model(images, token_ids, padding)
        for row, length in enumerate(LENGTHS):
            image = None if images is None else images[row : row + 1]
            text = token_ids[row : row + 1, :length]
            assert torch.equal(model.features(image, text), together[row : row + 1])
            assert torch.equal(model(image, text), logits[row : row + 1])


def test_loss_of_captions_leaves_padding_out():
    model, inputs, (ids, padding) = Multimodal(TINY).double().eval(), batch(), captions()
    inputs = (inputs[0].double(), *inputs[1:])
    loss = model.loss(*inputs, captions=ids, caption_padding=padding)
    with torch.no_grad():
        features, total, count = model.features(*inputs), 0.0, 0
        for row, length in enumerate((4, 3, 5, 2)):
            later = torch.ones(length - 1, length - 1, dtype=torch.bool).triu(1)
            embedded = model.caption_embedding(ids[row : row + 1, : length - 1])
            hidden = model.caption_decoder(embedded, features[row : row + 1], later, tgt_is_causal=True)
            logits = hidden[0] @ model.caption_embedding.token_weight.T
            total += torch.nn.functional.cross_entropy(logits, ids[row, 1:length], reduction="sum")
            count += length - 1
    torch.testing.assert_close(loss.detach(), total / count)


@GIVEN
def test_loss_is_the_cross_entropy_of_the_logits(given):
    model, (images, token_ids, padding) = Multimodal(TINY), batch(given)
    labels = torch.tensor([3, -100, 0, 1])
    expected = torch.nn.functional.cross_entropy(model(images, token_ids, padding), labels)
    torch.testing.assert_close(model.loss(images, token_ids, padding, labels=labels), expected)


@GIVEN
def test_loss_of_both_is_the_sum(given):
    model, inputs, (ids, padding) = Multimodal(TINY), batch(given), captions()
    labels, of_captions = {"labels": torch.tensor([3, -100, 0, 1])}, {"captions": ids, "caption_padding": padding}
    both = model.loss(*inputs, **labels, **of_captions)
    torch.testing.assert_close(both, model.loss(*inputs, **labels) + model.loss(*inputs, **of_captions))


def test_each_modality_counts():
    """The queries see a change of either, and of which is which."""
    model, (images, token_ids, padding) = Multimodal(TINY).eval(), batch()
    with torch.no_grad():
        before = model.features(images, token_ids, padding)
        assert not torch.equal(model.features(images + 1, token_ids, padding), before)
        assert not torch.equal(model.features(images, token_ids.flip(0), padding), before)
        assert not torch.equal(model.features(images, None), before)
        model.modality_weight.copy_(model.modality_weight.flip(0))
        assert not torch.equal(model.features(images, token_ids, padding), before)


@GIVEN
def test_everything_runs_on_the_kernels(given, needs_extension):
    model, (images, token_ids, padding), (ids, ids_padding) = Multimodal(TINY), batch(given), captions()
    with fasttx.strict():
        model.loss(images, token_ids, padding, labels=torch.tensor([0, 1, 2, 3])).backward()
        model.loss(images, token_ids, padding, captions=ids, caption_padding=ids_padding).backward()
        model.caption(images, token_ids, padding, max_new_tokens=4)
        with torch.inference_mode():
            model.eval()(images, token_ids, padding)


@GIVEN
def test_the_reference_path_is_the_same(given):
    model, (images, token_ids, padding), (ids, ids_padding) = Multimodal(TINY).double(), batch(given), captions()
    images, losses, gradients = None if images is None else images.double(), [], []
    for backend in ("auto", "reference"):
        with fasttx.backend(backend):
            losses.append(
                model.loss(
                    images, token_ids, padding, labels=torch.tensor([0, 1, 2, 3]), captions=ids,
                    caption_padding=ids_padding,
                )
            )  # fmt: skip
            parameters = list(model.parameters())
            gradients.append(torch.autograd.grad(losses[-1], parameters, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_every_parameter_has_a_part():
    """But the pooler, which the text's tokens do not pass."""
    model, (images, token_ids, padding), (ids, ids_padding) = Multimodal(TINY), batch(), captions()
    labels = torch.tensor([0, 1, 2, 3])
    model.loss(images, token_ids, padding, labels=labels, captions=ids, caption_padding=ids_padding).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"text_encoder.pooler.weight", "text_encoder.pooler.bias"}


@pytest.mark.parametrize("captions_too", [False, True], ids=["classes", "captions"])
def test_gradcheck(captions_too):
    sizes = {"width": 4, "layers": 1, "heads": 2, "feed_forward": 4}
    config = MultimodalConfig(
        ViTConfig(image_size=4, patch_size=2, **sizes),
        BertConfig(vocab_size=7, max_positions=3, dropout=0.0, **sizes),
        queries=2, classes=2, caption_layers=1, max_caption=3, **sizes,
    )  # fmt: skip
    model = Multimodal(config).double()
    images, token_ids = torch.randn(2, 1, 4, 4).double(), torch.tensor([[3, 4, 5], [6, 1, 0]])
    padding, ids = torch.tensor([[False] * 3, [False, False, True]]), torch.tensor([[1, 4, 2], [1, 2, 0]])

    targets = {"captions": ids, "caption_padding": padding} if captions_too else {"labels": torch.tensor([1, 0])}

    def loss(*values):
        weights = {f"model.{n}": v for n, v in zip(named, values, strict=True)}
        return functional_call(Loss(model), weights, (images, token_ids, padding), targets)

    named = {n: p for n, p in model.named_parameters() if captions_too or "caption" not in n}
    named = {n: p for n, p in named.items() if "pooler" not in n and (not captions_too or "classifier" not in n)}
    values = [torch.randn_like(p).requires_grad_() for p in named.values()]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_save_and_load(tmp_path):
    model, inputs = Multimodal(TINY).eval(), batch()
    model.save(tmp_path / "model.safetensors")
    loaded = Multimodal.load(tmp_path / "model.safetensors").eval()
    assert loaded.config == TINY
    assert loaded.caption_head.weight is loaded.caption_embedding.token_weight
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))
    assert torch.equal(loaded.caption(*inputs, max_new_tokens=5), model.caption(*inputs, max_new_tokens=5))
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(ModelFileError, match="no whole safetensors"):
        Multimodal.load(tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"image": ViTConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, classes=2)}, "without a head"),
        ({"width": 15}, "multiple of heads"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"caption_layers": -1}, "caption_layers must be finite and not negative"),
        ({"bos_id": 20}, "bos_id must lie in"),
    ],
)
def test_bad_configs(change, match):
    values = {"image": IMAGE, "text": TEXT, "width": 16, "layers": 1, "heads": 2, "queries": 3, "classes": 4}
    with pytest.raises(ValueError, match=match):
        MultimodalConfig(**(values | change))


def test_bad_input():
    model, (images, token_ids, padding), (ids, ids_padding) = Multimodal(TINY), batch(), captions()
    silent = Multimodal(MultimodalConfig(IMAGE, TEXT, width=16, layers=1, heads=2, queries=3, classes=4))
    for call, match in (
        (lambda: model(), "both None"),
        (lambda: model(images, None, padding), "padding is that of token_ids"),
        (lambda: model(images, token_ids[:3]), "4 images, 3 token_ids"),
        (lambda: model(images, token_ids, padding[:, :3]), "padding must have the tokens' shape"),
        (lambda: model(images, token_ids, padding.flip(1)), "padding must be on the right"),
        (lambda: model(images[:0], token_ids[:0]), "empty batch"),
        (lambda: model(images, token_ids + 20), "token_ids must lie in"),
        (lambda: model(images, token_ids.repeat(1, 2)), "12 tokens, and the model has positions for 10"),
        (lambda: model.loss(images, token_ids, padding, labels=torch.tensor([0, 1, 2, 4])), "target must lie in"),
        (lambda: model.loss(images, token_ids, padding), "nothing to learn"),
        (lambda: model.loss(images, labels=torch.tensor([0, 1])), "4 images, 2 labels"),
        (lambda: model.loss(images, labels=torch.zeros(4).long(), caption_padding=ids_padding), "which are None"),
        (lambda: model.loss(images, captions=ids[:3]), "4 images, 3 captions"),
        (lambda: model.loss(images, captions=ids[:, 1:]), "begin with bos_id, 1"),
        (lambda: model.loss(images, captions=ids[:, :1]), "a token after bos_id"),
        (lambda: model.loss(images, captions=ids.repeat(1, 2)), "positions for 8"),
        (lambda: model.loss(images, captions=ids, caption_padding=ids_padding[:, :2]), "caption_padding must have"),
        (lambda: model.loss(images, captions=ids, caption_padding=ids_padding.flip(1)), "must be on the right"),
        (lambda: model.caption(images, max_new_tokens=9), "positions for 8"),
        (lambda: model.caption(images, max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda: model.caption(images, max_new_tokens=3, temperature=-1.0), "temperature"),
        (lambda: silent.caption(images, max_new_tokens=3), "writes no captions"),
        (lambda: silent.loss(images, captions=ids), "writes no captions"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_the_loss_with_captions_is_the_sum_of_both():
    model, (images, token_ids, padding) = Multimodal(TINY).eval(), batch()
    labels, (ids, ids_padding) = torch.tensor([0, 1, 2, 3]), captions()
    both = model.loss(images, token_ids, padding, labels=labels, captions=ids, caption_padding=ids_padding)
    apart = model.loss(images, token_ids, padding, labels=labels)
    written = model.loss(images, token_ids, padding, captions=ids, caption_padding=ids_padding)
    torch.testing.assert_close(both, apart + written)
