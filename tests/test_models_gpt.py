"""GPT: against eager PyTorch and Hugging Face, with and without a cache and padding, trained and generating."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget
from module_checks import Loss
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fasttx
from fasttx.models import GPT, GPTConfig, ModelFileError
from fasttx.nn import KVCache

VOCABULARY, POSITIONS, B, T = 50, 40, 4, 23
SIZES = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "max_positions": POSITIONS}


def make(**options):
    """A model whose weights are large enough that everything matters."""
    model = GPT(GPTConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.2 * torch.randn_like(values))
    return model


def tokens(*shape):
    return torch.randint(VOCABULARY, shape or (B, T))


def left(*lengths):
    """Padding of rows that hold the last so many of T tokens."""
    return torch.arange(T) < T - torch.tensor(lengths)[:, None]


def plainly(model, token_ids):
    """GPT-2 in eager PyTorch, on the model's weights."""
    config, x = model.config, model.embedding.token_weight[token_ids]
    x = x + model.embedding.position_weight[: token_ids.shape[1]]
    activate = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[config.activation]
    later = torch.ones(token_ids.shape[1], token_ids.shape[1], dtype=torch.bool).triu(1)

    def norm(module, x):
        return F.layer_norm(x, (config.width,), module.weight, module.bias, config.eps)

    for layer in model.transformer.layers:
        attention = layer.self_attn
        joined = F.linear(norm(layer.norm1, x), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (config.heads, -1)).transpose(1, 2) for part in joined.chunk(3, -1))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, attention.out_proj.weight, attention.out_proj.bias)
        inner = activate(F.linear(norm(layer.norm2, x), layer.linear1.weight, layer.linear1.bias))
        x = x + F.linear(inner, layer.linear2.weight, layer.linear2.bias)
    return F.linear(norm(model.transformer.norm, x), model.head.weight)


@pytest.mark.parametrize("options", [{}, {"activation": "gelu_tanh", "tied": False}, {"activation": "relu"}], ids=str)
@torch.no_grad()
def test_logits_within_budget(options):
    model, token_ids = make(**options), tokens()
    eager, truth = plainly(model, token_ids), plainly(copy.deepcopy(model).double(), token_ids)
    assert_within_budget(actual=model(token_ids), eager=eager, truth=truth)
    for chunk in (1, 5):
        cache = KVCache()
        steps = [model(part, cache=cache) for part in token_ids.split(chunk, 1)]
        assert_within_budget(actual=torch.cat(steps, 1), eager=eager, truth=truth, name=f"cached by {chunk}")


def test_loss_and_gradients_within_budget():
    token_ids, targets = tokens().split((T - 1, 1), 1)[0], tokens(B, T - 1)
    targets[:, :3] = -100
    results = {}
    for name, dtype in (("actual", torch.float32), ("eager", torch.float32), ("truth", torch.float64)):
        torch.manual_seed(1)
        model = make().to(dtype)
        if name == "actual":
            loss = model.loss(token_ids, targets)
        else:
            loss = F.cross_entropy(plainly(model, token_ids).flatten(0, 1), targets.flatten())
        loss.backward()
        results[name] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
    for name in results["truth"]:
        assert_within_budget(**{kind: values[name] for kind, values in results.items()}, name=name)


@torch.no_grad()
def test_a_row_is_the_same_bits_alone_and_padded():
    model, lengths = make(), (T, 1, 7, 16)
    token_ids, padding = tokens(), left(*lengths)
    on_the_left = model(token_ids, padding=padding)
    on_the_right = model(token_ids.flip(1), padding=padding.flip(1))
    for row, length in enumerate(lengths):
        assert torch.equal(on_the_left[row, T - length :], model(token_ids[row : row + 1, T - length :])[0])
        assert torch.equal(on_the_right[row, :length], model(token_ids[row : row + 1].flip(1)[:, :length])[0])
    hidden = model.hidden(token_ids, padding=padding)
    assert not hidden[padding].any() and hidden[~padding].all()


@torch.no_grad()
def test_cached_with_padding_is_the_whole_pass():
    model, token_ids, padding = make().double(), tokens(), left(T, 1, 7, 16)
    cache, steps, done = KVCache(), [], 0
    for part in token_ids.split(6, 1):
        done += part.shape[1]
        steps.append(model(part, padding=padding[:, :done], cache=cache))
    whole = model(token_ids, padding=padding)
    torch.testing.assert_close(torch.cat(steps, 1)[~padding], whole[~padding], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_position_ids_are_taken():
    model, token_ids = make().double(), tokens(2, 6)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 3, 9, 9, 0, 1]])
    twin = copy.deepcopy(model)
    twin.embedding.position_weight[:6] = model.embedding.position_weight[position_ids[1]]
    expected = torch.cat((plainly(model, token_ids[:1]), plainly(twin, token_ids[1:])))
    torch.testing.assert_close(model(token_ids, position_ids=position_ids), expected)


def test_prompts_padded_on_the_left_go_on_as_they_do_alone():
    model, lengths = make(), (T, 1, 7, 16)
    prompts, padding, new = tokens(), left(*lengths), POSITIONS - T
    together = model.generate(prompts, padding=padding, max_new_tokens=new)
    assert together.shape == (B, POSITIONS) and torch.equal(together[:, :T], prompts)
    for row, length in enumerate(lengths):
        alone = model.generate(prompts[row : row + 1, T - length :], max_new_tokens=new)
        assert torch.equal(alone[0, length:], together[row, T:])


@torch.no_grad()
def test_generation_is_the_likeliest_token_of_a_whole_pass_each():
    model, prompts = make().double(), tokens(B, 5)
    expected = prompts
    for _ in range(12):
        expected = torch.cat((expected, plainly(model, expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(prompts, max_new_tokens=12), expected)
    stop = expected[0, 8].item()  # ends a row early, and others where they come to it
    for row, made in enumerate(model.generate(prompts, max_new_tokens=12, stop={stop}, pad_id=9).tolist()):
        whole = expected[row].tolist()
        end = whole.index(stop, 5) + 1 if stop in whole[5:] else 17
        assert made == (whole[:end] + [9] * 12)[: len(made)] and set(whole[len(made) : end]) == set()


def test_generation_may_fill_the_positions_and_stops_are_any_iterable():
    model, prompt = make(), tokens(1, POSITIONS - 2)
    full = model.generate(prompt, max_new_tokens=3)
    assert full.shape == (1, POSITIONS + 1)
    assert torch.equal(model(full[:, :-1])[:, -1].argmax(-1), full[:, -1])
    stopped = model.generate(prompt, max_new_tokens=3, stop=iter([int(full[0, -3])]))
    assert torch.equal(stopped, full[:, :-2])


def test_samples_are_their_generators_and_the_model_stays_in_training():
    model, prompts = make(dropout=0.3).train(), tokens(B, 5)
    options = {"max_new_tokens": 12, "temperature": 1.2, "top_k": 30, "top_p": 0.95}
    first, again, other = (
        model.generate(prompts, **options, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.generate(prompts, max_new_tokens=3), model.eval().generate(prompts, max_new_tokens=3))
    model.loss(first[:, :-1], first[:, 1:]).backward()  # what was generated can be trained on


class Attentions(TorchDispatchMode):
    """The mask and the causality of every fused attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasttx" and "attention" in func._opname and func._opname.endswith("_fwd"):
            given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
            self.seen.append((given.get("mask"), given["is_causal"]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("lengths", [None, (T, 1, 7, 16)], ids=["whole", "padded"])
def test_every_call_stays_on_the_kernels_and_causal_without_a_mask(needs_extension, dropout, lengths):
    model, token_ids = make(dropout=dropout).train(), tokens()
    padding = None if lengths is None else left(*lengths)
    with fasttx.strict(), Attentions() as mode:
        model.loss(token_ids, token_ids, padding).backward()
        model.eval()
        with torch.no_grad():
            model(token_ids, padding=padding)
    assert mode.seen == [(None, True)] * 2 * model.config.layers
    with fasttx.strict():
        model.generate(token_ids, padding=padding, max_new_tokens=4)


def test_padding_has_no_part_in_the_loss():
    model, token_ids, padding = make().double(), tokens(), left(T, 1, 7, 16)
    targets = token_ids.roll(-1, 1)
    loss = model.loss(token_ids, targets, padding)
    rows = [model(token_ids[i : i + 1], padding=padding[i : i + 1])[~padding[i : i + 1]] for i in range(B)]
    expected = F.cross_entropy(torch.cat(rows), targets[~padding])
    torch.testing.assert_close(loss, expected)


def test_a_tiny_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model, token_ids = GPT(GPTConfig(**SIZES | {"dropout": 0.0})), tokens(3, 9)
    token_ids[:, 0] = torch.arange(3)  # tells the rows apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(token_ids[:, :-1], token_ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(model.generate(token_ids[:, :1], max_new_tokens=8), token_ids)


@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(padded):
    model = make(width=4, heads=2, vocab_size=7, max_positions=6, feed_forward=5).double()
    token_ids, targets = torch.randint(7, (2, 4)), torch.randint(7, (2, 4))
    padding = torch.tensor([[True, True, False, False], [False] * 4]) if padded else None
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        given = (token_ids, targets, padding)
        return torch.func.functional_call(Loss(model), {f"model.{n}": v for n, v in zip(names, values)}, given)  # noqa: B905

    assert torch.autograd.gradcheck(loss, values)


def test_dropout_is_its_seeds_and_not_within_the_feed_forward():
    model, token_ids = make(dropout=0.3).train(), tokens()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.loss(token_ids, token_ids).item())
    assert losses[0] == losses[1] != losses[2]
    assert {layer.dropout.p for layer in model.transformer.layers} == {0.0}
    assert {(layer.dropout1.p, layer.dropout2.p, layer.self_attn.dropout) for layer in model.transformer.layers} == {
        (0.3, 0.3, 0.3)
    }


def test_compiled(needs_extension):
    model, token_ids, padding = make(), tokens(), left(T, 1, 7, 16)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_ids, token_ids, padding), model.loss(token_ids, token_ids, padding))


@torch.no_grad()
def test_a_model_in_halves(needs_extension):
    model, token_ids = make().bfloat16(), tokens().int()
    eager, truth = plainly(model, token_ids), plainly(copy.deepcopy(model).double(), token_ids)
    with fasttx.strict():
        assert_within_budget(actual=model(token_ids), eager=eager, truth=truth)
        assert model.generate(token_ids, padding=left(T, 1, 7, 16), max_new_tokens=3).shape == (B, T + 3)


def test_initialisation():
    model = GPT(GPTConfig(vocab_size=300, width=128, layers=8, heads=4))
    for name, values in model.named_parameters():
        if values.dim() == 1:
            assert (values == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            wanted = 0.005 if "out_proj" in name or "linear2" in name else 0.02
            assert abs(values.std() / wanted - 1) < 0.05 and abs(values.mean()) < 0.05 * wanted, name
    first, second = (layer.linear1.weight for layer in model.transformer.layers[:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tmp_path, tied):
    model = make(tied=tied)
    model.save(tmp_path / "gpt.safetensors")
    loaded = GPT.load(tmp_path / "gpt.safetensors").eval()
    assert loaded.config == model.config and (loaded.head.weight is loaded.embedding.token_weight) == tied
    named = {"embedding.token_weight", "transformer.layers.1.linear1.weight", "transformer.norm.bias", "head.weight"}
    assert named < loaded.state_dict().keys()
    token_ids = tokens(2, 6)
    assert torch.equal(loaded(token_ids), model(token_ids))


ONES = torch.ones(2, 3, dtype=torch.int64)
BAD = {
    "empty": (ONES[:0], None, ValueError, "{} is an empty batch"),
    "one sequence": (ONES[0], None, ValueError, r"{} must be \(sequences, tokens\)"),
    "too long": (ONES.repeat(1, 14), None, ValueError, "has 4[23] tokens, and the model has positions for 40"),
    "unknown": (VOCABULARY * ONES, None, ValueError, r"token_ids must lie in \[0, 49\], got 50"),
    "negative": (-ONES, None, ValueError, r"token_ids must lie in \[0, 49\], got -1"),
    "floating": (ONES.float(), None, TypeError, "{} must be int64 or int32, got torch.float32"),
    "a list": ([[1, 2]], None, TypeError, "{} must be a tensor, got list"),
    "floating padding": (ONES, torch.zeros(2, 3), TypeError, "padding must be bool"),
    "longer padding": (ONES, torch.zeros(2, 4, dtype=torch.bool), ValueError, r"padding must have .* got \(2, 4\)"),
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input(given):
    model, (token_ids, padding, error, message) = make(), BAD[given]
    with pytest.raises(error, match=message.format("token_ids")):
        model(token_ids, padding=padding)
    with pytest.raises(error, match=message.format("token_ids")):
        model.loss(token_ids, token_ids, padding)
    with pytest.raises(error, match=message.format("prompts")):
        model.generate(token_ids, padding=padding, max_new_tokens=1)


@pytest.mark.parametrize("padding", [None, torch.zeros(2, 3, dtype=torch.bool)], ids=["whole", "padded"])
def test_bad_targets(padding):
    """A row of targets is no batch of them, though it would broadcast."""
    for targets in (ONES[0], ONES[:1], ONES[:, :2]):
        with pytest.raises(ValueError, match=r"targets must have the tokens' shape \(2, 3\)"):
            make().loss(ONES, targets, padding)
    for targets in (None, ONES.float()):
        with pytest.raises(TypeError, match="targets must be"):
            make().loss(ONES, targets, padding)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_new_tokens": POSITIONS - 3}, ValueError, "prompts with max_new_tokens has 41 tokens"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"pad_id": VOCABULARY}, ValueError, r"pad_id must lie in \[0, 49\], got 50"),
        ({"pad_id": 1.0}, TypeError, "pad_id must be an int, got float"),
        ({"stop": 3}, TypeError, "int"),
        ({"stop": {3, -1}}, ValueError, r"stop must lie in \[0, 49\], got -1"),
        ({"padding": torch.tensor([[False] * 4 + [True]])}, ValueError, "padding must be on the left of prompts"),
        ({"padding": torch.tensor([[True] * 5])}, ValueError, "each must have a token"),
        ({"padding": torch.tensor([[True, False, True, False, False]])}, ValueError, "on the left"),
    ],
    ids=str,
)  # fmt: skip
def test_generations_that_are_none_are_refused_before_anything_runs(options, error, message):
    model = make()
    model.embedding.register_forward_hook(lambda *given: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        model.generate(tokens(1, 5), **{"max_new_tokens": 2, **options})


@torch.no_grad()
def test_a_cache_that_is_full_of_positions_and_padding_of_another_length():
    model, cache = make(), KVCache()
    model(tokens(2, POSITIONS - 1), cache=cache)
    with pytest.raises(ValueError, match="token_ids has 41 tokens"):
        model(tokens(2, 2), cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 40\), got \(2, 1\)"):
        model(tokens(2, 1), padding=torch.zeros(2, 1, dtype=torch.bool), cache=cache)
    assert cache.length() == POSITIONS - 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 5}, "width must be a multiple of heads"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, got 'swish'"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**SIZES | options))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pretrained():
    """A folder of real weights; the package that holds it is not imported: its dependencies are not installed."""
    package = importlib.util.find_spec("mgm")
    if package is None:
        pytest.skip("microformer-mgm is not installed")
    return Path(package.submodule_search_locations[0]) / "resources" / "general_model"


@torch.no_grad()
def test_real_weights_give_hugging_faces_logits(transformers, pretrained):
    """At real tokens, with the positions that both give them: those without the padding."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(pretrained, attn_implementation="eager").eval()
    ours = GPT.from_pretrained(pretrained).eval()
    token_ids, padding = torch.randint(5, 9669, (B, T)), left(T, 5, 17, 1)
    given = {"attention_mask": (~padding).long(), "position_ids": (~padding).cumsum(1).sub(1).clamp(min=0)}
    eager, truth = (model(token_ids, **given).logits[~padding] for model in (theirs, copy.deepcopy(theirs).double()))
    assert_within_budget(actual=ours(token_ids, padding=padding)[~padding], eager=eager, truth=truth)
    cache, steps, done = KVCache(), [], 0
    for part in token_ids.split(4, 1):
        done += part.shape[1]
        steps.append(ours(part, padding=padding[:, :done], cache=cache))
    assert_within_budget(actual=torch.cat(steps, 1)[~padding], eager=eager, truth=truth, name="cached")


def test_real_weights_generate_hugging_faces_tokens(transformers, pretrained):
    theirs, ours = transformers.GPT2LMHeadModel.from_pretrained(pretrained).eval(), GPT.from_pretrained(pretrained)
    prompts, padding = torch.randint(5, 9669, (B, T)), left(T, 5, 17, 1)
    expected = theirs.generate(
        prompts, attention_mask=(~padding).long(), max_new_tokens=32, do_sample=False, eos_token_id=3, pad_token_id=0
    )
    assert torch.equal(ours.generate(prompts, padding=padding, max_new_tokens=32, stop={3}), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "bin", "without a head"])
@torch.no_grad()
def test_folders_as_hugging_face_saves_them(transformers, tmp_path, tied, form):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, n_inner=24, resid_pdrop=0.2,
        activation_function="gelu", layer_norm_epsilon=1e-3, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for values in theirs.parameters():
        values.add_(0.2 * torch.randn_like(values))
    (theirs.transformer if form == "without a head" else theirs).save_pretrained(tmp_path)
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    if form == "without a head" and not tied:
        with pytest.raises(ModelFileError, match="it lacks head.weight"):
            GPT.from_pretrained(tmp_path)
        return
    ours, token_ids = GPT.from_pretrained(tmp_path).eval(), tokens()
    assert ours.config == GPTConfig(VOCABULARY, 16, 2, 2, 24, POSITIONS, 0.2, "gelu", 1e-3, tied)
    torch.testing.assert_close(ours.double()(token_ids), theirs.double()(token_ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bert"}, "type bert, not gpt2"),
        ({"activation_function": "silu"}, "activation is silu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"n_layer": 3}, "it lacks transformer.layers.2"),
        ({"n_layer": 1}, "has transformer.layers.1"),
        ({"n_embd": 32}, r"is \(48,\), and this GPT has \(96,\)"),
        ({"n_head": None}, "makes no GPT"),
    ],
    ids=str,
)  # fmt: skip
def test_folders_that_hold_no_such_model(transformers, tmp_path, changes, message):
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelFileError, match=message):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        GPT.from_pretrained(tmp_path / "nowhere")
