"""EncoderDecoder: against torch.nn's layers, with padding, caches and beams, trained and generating."""

import copy

import pytest
import torch
from budget import assert_within_budget
from module_checks import Loss, assert_gradients_within_budget
from torch.func import functional_call
from torch.nn import functional as F

import fasttx
from fasttx.models import EncoderDecoder, EncoderDecoderConfig
from fasttx.models._decoding import beam_search

SOURCES, TARGETS, B, S, T = 50, 41, 4, 19, 13
SIZES = {
    "source_vocab": SOURCES, "width": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feed_forward": 48,
    "max_positions": 24,
}  # fmt: skip
CONFIGS = {
    "shared": {},
    "pre-norm": {"target_vocab": TARGETS, "norm_first": True, "positions": "learned", "activation": "gelu"},
    "projected": {"target_vocab": TARGETS, "embedding_width": 20, "norm_first": True, "label_smoothing": 0.0},
    "shared and projected": {"embedding_width": 20, "positions": "learned"},
    "untied": {"target_vocab": TARGETS, "embedding_width": 20, "tied": False, "activation": "gelu_tanh"},
}
ACTIVATIONS = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU("tanh")}
by_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def make(**options):
    """A model whose every weight matters."""
    model = EncoderDecoder(EncoderDecoderConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.05 * torch.randn_like(values))
    return model


def right(length, *lengths):
    """Padding of rows that hold the first so many of `length` tokens."""
    return torch.arange(length) >= torch.tensor(lengths)[:, None]


def batch(model):
    """source, target, and their padding."""
    targets = model.config.target_vocab or SOURCES
    source, target = torch.randint(3, SOURCES, (B, S)), torch.randint(3, targets, (B, T))
    return source, target, right(S, S, 1, 7, 16), right(T, 5, T, 1, 9)


def plainly(model, source, target, source_padding, target_padding):
    """The model in eager PyTorch, on its weights: torch.nn's layers."""
    config, dtype = model.config, model.head.weight.dtype
    activation = ACTIVATIONS[config.activation]
    options = (config.width, config.heads, config.feed_forward, 0.0, activation)

    def stack(kind, ours, layers):
        norm = torch.nn.LayerNorm(config.width) if config.norm_first else None
        layer = getattr(torch.nn, f"{kind}Layer")(*options, batch_first=True, norm_first=config.norm_first)
        extra = {"enable_nested_tensor": False} if kind.endswith("Encoder") else {}
        module = getattr(torch.nn, kind)(layer, layers, norm, **extra)  # in training: not torch's fast path
        for layer in module.layers:
            layer.activation = activation  # torch's decoder would go on with a relu
        return lambda *args, **kwargs: functional_call(module, dict(ours.named_parameters()), args, kwargs)

    def embed(embedding, projection, token_ids):
        x = embedding.token_weight[token_ids] * config.width**0.5
        if config.positions == "learned":
            x = x + embedding.position_weight[: token_ids.shape[1]]
        if config.embedding_width is not None:
            x = F.linear(x, projection.weight)
        if config.positions == "sinusoidal":
            places = torch.arange(token_ids.shape[1], dtype=torch.float64)[:, None]
            angles = places / 10000 ** (torch.arange(0, config.width, 2) / config.width)
            x = x + torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(dtype)
        return x

    source = embed(model.source_embedding, model.source_projection, source)
    target = embed(model.target_embedding, model.target_projection, target)
    memory = stack("TransformerEncoder", model.encoder, config.encoder_layers)(
        source, src_key_padding_mask=source_padding
    )
    later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    x = stack("TransformerDecoder", model.decoder, config.decoder_layers)(
        target, memory, tgt_mask=later, tgt_key_padding_mask=target_padding, memory_key_padding_mask=source_padding
    )
    if config.tied and config.embedding_width is not None:
        x = F.linear(x, model.output_projection.weight)
    return F.linear(x, model.target_embedding.token_weight if config.tied else model.head.weight)


@by_config
@torch.no_grad()
def test_logits_within_budget(options):
    model = make(**options)
    given = batch(model)
    valid = ~given[3]
    eager, truth = plainly(model, *given)[valid], plainly(copy.deepcopy(model).double(), *given)[valid]
    assert_within_budget(actual=model(*given)[valid], eager=eager, truth=truth)


@by_config
def test_loss_and_gradients_within_budget(options):
    results = {}
    for name, dtype in (("actual", torch.float32), ("eager", torch.float32), ("truth", torch.float64)):
        torch.manual_seed(1)
        model = make(**options).to(dtype)
        source, target, source_padding, target_padding = batch(model)
        target_out = target.roll(-1, 1)
        target_out[1, 3] = -100
        if name == "actual":
            loss = model.loss(source, target, target_out, source_padding, target_padding)
        else:
            logits = plainly(model, source, target, source_padding, target_padding)[~target_padding]
            smoothing = model.config.label_smoothing
            loss = F.cross_entropy(logits, target_out[~target_padding], label_smoothing=smoothing)
        loss.backward()
        results[name] = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    losses, gradients = zip(*results.values(), strict=True)
    assert_within_budget(**dict(zip(results, losses, strict=True)), name="loss")
    assert_gradients_within_budget(*gradients)


@by_config
@torch.no_grad()
def test_a_row_is_the_same_bits_alone_and_padded(options):
    model = make(**options)
    source, target, source_padding, target_padding = batch(model)
    together = model(source, target, source_padding, target_padding)
    memory = model.encode(source, source_padding)
    for row in range(B):
        s, t = source[row : row + 1, ~source_padding[row]], target[row : row + 1, ~target_padding[row]]
        assert torch.equal(together[row, ~target_padding[row]], model(s, t)[0])
        assert torch.equal(memory[row, ~source_padding[row]], model.encode(s)[0])
    assert not memory[source_padding].any()


def finished(row, config, length):
    """The row up to eos, then padding."""
    end = row.index(config.eos_id) + 1 if config.eos_id in row else len(row)
    return row[:end] + [config.pad_id] * (length - end)


@by_config
@torch.no_grad()
def test_greedy_generation_is_the_likeliest_token_of_a_whole_pass_each(options):
    model, new = make(**options).double(), 16
    source, _, padding, _ = batch(model)
    model.head.weight[model.config.eos_id] *= 1.5  # so that some rows end
    made = torch.full((B, 1), model.config.bos_id)
    for _ in range(new):
        nothing = torch.zeros(made.shape, dtype=torch.bool)
        logits = plainly(model, source, made, padding, nothing)
        made = torch.cat((made, logits[:, -1:].argmax(-1)), 1)
    actual = model.generate(source, source_padding=padding, max_new_tokens=new)
    expected = [finished(row, model.config, new) for row in made[:, 1:].tolist()]
    assert actual.tolist() == [row[: actual.shape[1]] for row in expected]
    assert not any(token != model.config.pad_id for row in expected for token in row[actual.shape[1] :])


@by_config
@torch.no_grad()
def test_beams_with_a_cache_find_what_whole_passes_find(options):
    model, new = make(**options).double(), 9
    source, _, padding, _ = batch(model)
    for penalty in (0.0, 1.0):
        state = {"source": source, "padding": padding, "made": None}

        def step(tokens):
            made = state["made"]  # noqa: B023
            state["made"] = made = tokens if made is None else torch.cat((made, tokens), 1)  # noqa: B023
            return model(state["source"], made, state["padding"])[:, -1]  # noqa: B023

        def reorder(index):
            state.update({name: value[index] for name, value in state.items()})  # noqa: B023

        config = model.config
        expected, _ = beam_search(
            step, reorder, torch.full((B, 1), config.bos_id), beams=3, length_penalty=penalty, max_new_tokens=new,
            stop={config.eos_id}, pad_id=config.pad_id,
        )  # fmt: skip
        found = {"max_new_tokens": new, "beams": 3, "length_penalty": penalty}
        actual = model.generate(source, source_padding=padding, **found)
        assert torch.equal(actual, expected)
        for row in range(B):
            alone = model.generate(source[row : row + 1, ~padding[row]], **found)[0]
            assert finished(alone.tolist(), config, new) == finished(actual[row].tolist(), config, new)


def test_samples_are_their_generators_and_the_model_stays_in_training():
    model = make(dropout=0.3).train()
    source = batch(model)[0]
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 20, "top_p": 0.95}
    first, again, other = (
        model.generate(source, **options, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(module.training for module in model.modules())
    greedy = model.generate(source, max_new_tokens=3)
    assert torch.equal(greedy, model.eval().generate(source, max_new_tokens=3))
    model.loss(source, first, first).backward()  # what was generated can be trained on


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "positions": "learned", "embedding_width": 20}], ids=str)
def test_a_tiny_batch_is_learned_by_heart(options):
    """Sentences reversed: the source has to be read."""
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(**SIZES | {"dropout": 0.0, "label_smoothing": 0.0} | options))
    config = model.config
    source, padding = torch.randint(3, SOURCES, (4, 6)), right(6, 6, 3, 4, 5)
    rows = [ids[~pad].flip(0).tolist() + [config.eos_id] for ids, pad in zip(source, padding, strict=True)]
    target_out = torch.tensor([row + [-100] * (7 - len(row)) for row in rows])
    target_in = torch.tensor([[config.bos_id] + row[:-1] + [config.pad_id] * (7 - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(source, target_in, target_out, padding, target_out == -100)
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    expected = [row + [config.pad_id] * (7 - len(row)) for row in rows]
    for beams in (1, 3):
        assert model.generate(source, source_padding=padding, max_new_tokens=9, beams=beams).tolist() == expected


@by_config
@pytest.mark.parametrize("padded", [False, True])
def test_every_call_stays_on_the_kernels(needs_extension, options, padded):
    model = make(**options, dropout=0.2).train()
    source, target, *padding = batch(model)
    padding = padding if padded else [None, None]
    with fasttx.strict():
        model.loss(source, target, target, *padding).backward()
        with torch.no_grad():
            model.eval()(source, target, *padding)
        for beams in (1, 3):
            model.generate(source, source_padding=padding[0], max_new_tokens=4, beams=beams)
    assert all(values.grad is not None for values in model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"embedding_width": 3, "norm_first": True, "positions": "learned", "max_positions": 3}], ids=str
)
def test_gradcheck(options):
    sizes = {"source_vocab": 7, "width": 4, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feed_forward": 3}
    # A relu has kinks, which finite differences may straddle.
    model = EncoderDecoder(EncoderDecoderConfig(**sizes, dropout=0.0, activation="gelu", **options)).double()
    source, target, out = (torch.randint(3, 7, (2, 3)) for _ in range(3))
    given = source, target, out, right(3, 2, 3), right(3, 3, 1)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return functional_call(Loss(model), {f"model.{n}": v for n, v in zip(names, values, strict=True)}, given)

    assert torch.autograd.gradcheck(loss, values)


def test_dropout_is_its_seeds():
    for positions in ("sinusoidal", "learned"):
        model, losses = make(dropout=0.3, positions=positions).train(), []
        source, target, *padding = batch(model)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model.loss(source, target, target, *padding).item())
        assert losses[0] == losses[1] != losses[2]


@by_config
def test_saved_and_loaded(tmp_path, options):
    model = make(**options)
    given = batch(model)
    model.save(tmp_path / "translator.safetensors")
    loaded = EncoderDecoder.load(tmp_path / "translator.safetensors").eval()
    assert loaded.config == model.config and loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(*given), model(*given))
    assert (loaded.head.weight is loaded.target_embedding.token_weight) == model.config.tied
    assert (loaded.target_embedding is loaded.source_embedding) == (model.config.target_vocab is None)


def test_compiled(needs_extension):
    model = make(**CONFIGS["projected"])
    source, target, *padding = batch(model)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target, target, *padding), model.loss(source, target, target, *padding))


def test_initialisation():
    config = EncoderDecoderConfig(300, 200, 128, 4, 2, 2, embedding_width=64, positions="learned")
    for name, values in EncoderDecoder(config).named_parameters():
        if values.dim() == 1:
            assert (values == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
            continue
        drawn = "embedding" in name
        wanted = 64**-0.5 if drawn else (2 / sum(values.shape)) ** 0.5
        assert abs(values.std() / wanted - 1) < 0.05, name
        assert drawn or values.abs().max() <= 3**0.5 * wanted, name


@pytest.mark.parametrize("side, entries", [("source", SOURCES), ("target", TARGETS)])
def test_word_vectors(side, entries):
    model = make(**CONFIGS["projected"])
    source, target, *padding = batch(model)
    vectors = torch.randn(entries, 20, dtype=torch.float64)
    weight = getattr(model, f"{side}_embedding").token_weight
    for frozen in (True, False):
        model.load_word_vectors(vectors, side, frozen=frozen)
        assert torch.equal(weight, vectors.float()) and weight.requires_grad is not frozen
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.loss(source, target, target, *padding).backward()
        optimizer.step()
        assert torch.equal(weight, vectors.float()) is frozen
    assert model.head.weight is model.target_embedding.token_weight
    for wrong, error, message in (
        ((vectors[1:], side), ValueError, rf"vectors must be \({entries}, 20\), got \({entries - 1}, 20\)"),
        ((vectors.long(), side), TypeError, "vectors must be a floating-point tensor"),
        ((vectors, "both"), ValueError, "side must be source or target, got 'both'"),
    ):
        with pytest.raises(error, match=message):
            model.load_word_vectors(*wrong)


def test_sinusoidal_positions_know_no_end():
    model = make(max_positions=4)
    source, target, *_ = batch(model)
    assert model(source, target).isfinite().all()
    assert model.generate(source, max_new_tokens=30).shape[1] <= 30


ONES = torch.ones(2, 3, dtype=torch.int64)
LEFT = torch.tensor([[True, False, False], [False, False, False]])
LONG = ONES.repeat(1, 9)
MASK = torch.zeros(2, 3, dtype=torch.bool)
BAD = {
    "empty source": ((ONES[:0], ONES), ValueError, "source is an empty batch"),
    "empty target": ((ONES, ONES[:, :0]), ValueError, "target is an empty batch"),
    "one sequence": ((ONES[0], ONES), ValueError, r"source must be \(sequences, tokens\)"),
    "floating target": ((ONES, ONES.float()), TypeError, "target must be int64 or int32"),
    "no tensor": ((None, ONES), TypeError, "source must be a tensor, got NoneType"),
    "other sequences": ((ONES, ONES[:1]), ValueError, "source and target differ in sequences: 2 and 1"),
    "long source": ((LONG, ONES), ValueError, "source has 27 tokens, and the model has positions for 24"),
    "long target": ((ONES, LONG), ValueError, "target has 27 tokens, and the model has positions for 24"),
    "unknown source": ((ONES * SOURCES, ONES), ValueError, r"token_ids must lie in \[0, 49\], got 50"),
    "unknown target": ((ONES, ONES * TARGETS), ValueError, r"token_ids must lie in \[0, 40\], got 41"),
    "source padding": ((ONES, ONES, MASK[:, 1:]), ValueError, "source_padding must have"),
    "target padding": ((ONES, ONES, MASK, MASK.float()), TypeError, "target_padding must be bool"),
    "source padded left": ((ONES, ONES, LEFT), ValueError, "source_padding must be on the right"),
    "target padded left": ((ONES, ONES, None, LEFT), ValueError, "target_padding must be on the right"),
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input(given):
    model, (given, error, message) = make(**CONFIGS["pre-norm"]), BAD[given]
    with pytest.raises(error, match=message):
        model(*given)
    with pytest.raises(error, match=message):
        model.loss(*given[:2], ONES, *given[2:])


def test_targets_of_another_shape():
    """A row of targets is no batch of them, though it would broadcast over the padding."""
    for padding in (None, MASK):
        with pytest.raises(ValueError, match=r"target_out must have the tokens' shape \(2, 3\), got \(3,\)"):
            make().loss(ONES, ONES, ONES[0], None, padding)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 25}, ValueError, "max_new_tokens has 25 tokens, and the model has positions for 24"),
        ({"beams": 0}, ValueError, "beams must be at least 1"),
        ({"beams": 2, "temperature": 1.0}, ValueError, "temperature must be 0, and top_k and top_p None, got 1.0"),
        ({"beams": 2, "top_k": 3}, ValueError, "a beam search draws nothing: .* got 0.0, 3 and None"),
        ({"beams": 2, "length_penalty": "1"}, TypeError, "length_penalty must be a number"),
        ({"beams": 2, "length_penalty": float("nan")}, ValueError, "length_penalty must be finite, got nan"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 2.0}, ValueError, "top_p"),
        ({"source_padding": MASK[:, 1:]}, ValueError, "source_padding must have"),
        ({"source_padding": LEFT}, ValueError, "source_padding must be on the right"),
    ],
    ids=str,
)  # fmt: skip
def test_generations_that_are_none_are_refused_before_the_decoder_runs(options, error, message):
    model = make(**CONFIGS["pre-norm"])
    model.decoder.layers[0].register_forward_hook(lambda *given: pytest.fail("the decoder ran"))
    with pytest.raises(error, match=message):
        model.generate(ONES, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 5}, "width must be a multiple of heads"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1"),
        ({"embedding_width": 0}, "embedding_width must be at least 1"),
        ({"positions": "rotary"}, "positions must be sinusoidal or learned, got 'rotary'"),
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, got 'swish'"),
        ({"eos_id": 50}, r"eos_id must lie in \[0, 49\], got 50"),
        ({"target_vocab": 2}, r"eos_id must lie in \[0, 1\], got 2"),
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderDecoder(EncoderDecoderConfig(**SIZES | options))
