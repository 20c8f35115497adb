"""A token's result is the same bit for bit on any number of threads, in any batch, beside any padding."""

import contextlib

import pytest
import torch
from properties import THREADS

import fasttx

pytestmark = pytest.mark.usefixtures("needs_extension")

E, H = 64, 4
LENGTHS = (40, 7, 1, 23, 40, 16)
MEMORY_LENGTHS = (5, 33, 12, 1, 20, 33)
DTYPES = (torch.float32, torch.bfloat16)


def encoder(norm_first):
    layer = torch.nn.TransformerEncoderLayer(
        E, H, 3 * E, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E), enable_nested_tensor=False)


def decoder(norm_first):
    layer = torch.nn.TransformerDecoderLayer(E, H, 3 * E, batch_first=True, norm_first=norm_first)
    return torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(E))


def sequences(lengths, dtype):
    return [torch.randn(length, E).to(dtype) for length in lengths]


def positions(length, size, place):
    """Where the tokens of a sequence stand among `size` places."""
    if place == "right":
        return torch.arange(length)
    if place == "left":
        return torch.arange(size - length, size)
    return torch.randperm(size)[:length].sort().values


def pad(sequences, size, place):
    """One batch (B, size, E) of sequences, with noise where there are none, its key padding mask, and the places."""
    batch = torch.randn(len(sequences), size, E).to(sequences[0].dtype)
    padding = torch.ones(len(sequences), size, dtype=torch.bool)
    places = [positions(len(sequence), size, place) for sequence in sequences]
    for row, (sequence, at) in enumerate(zip(sequences, places, strict=True)):
        batch[row, at] = sequence
        padding[row, at] = False
    return batch, padding, places


@contextlib.contextmanager
def inference():
    with torch.no_grad(), fasttx.backend("cpu"):
        yield


def assert_equal(actual, expected, what):
    assert torch.equal(actual, expected), f"{what}: {(actual != expected).sum()} values differ"


# What becomes of the padding, and where it stands.
BATCHES = [(padding, place) for padding in ("remove", "keep") for place in ("right", "left", "holes")]


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoder(dtype, norm_first, causal, threads, isa):
    model = fasttx.optimize(encoder(norm_first).to(dtype).eval())
    alone = sequences(LENGTHS, dtype)

    def run(x, **options):
        if causal:
            options["mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return model(x, **options)

    with inference():
        with threads(1):
            expected = [run(sequence[None])[0] for sequence in alone]
        for count in THREADS:
            with threads(count):
                for sequence, result in zip(alone, expected, strict=True):
                    assert_equal(run(sequence[None])[0], result, f"alone, {count} threads")
                for padding, place in BATCHES:
                    fasttx.optimize(model, padding=padding)
                    batch, mask, places = pad(alone, 45, place)
                    together = run(batch, src_key_padding_mask=mask)
                    for row, at in enumerate(places):
                        what = f"{padding}, {place}, {count} threads, sequence {row}"
                        assert_equal(together[row, at], expected[row], what)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoder(dtype, norm_first, threads, isa):
    model = fasttx.optimize(decoder(norm_first).to(dtype).eval())
    alone, memories = sequences(LENGTHS, dtype), sequences(MEMORY_LENGTHS, dtype)

    def run(tgt, memory, **options):
        causal = torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1)
        return model(tgt, memory, tgt_mask=causal, **options)

    with inference():
        with threads(1):
            expected = [run(x[None], m[None])[0] for x, m in zip(alone, memories, strict=True)]
        for count in THREADS:
            with threads(count):
                for padding, place in BATCHES:
                    fasttx.optimize(model, padding=padding)
                    batch, mask, places = pad(alone, 45, place)
                    memory, memory_mask, _ = pad(memories, 36, place)
                    together = run(
                        batch, memory, tgt_key_padding_mask=mask, memory_key_padding_mask=memory_mask
                    )
                    for row, at in enumerate(places):
                        what = f"{padding}, {place}, {count} threads, sequence {row}"
                        assert_equal(together[row, at], expected[row], what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_in_any_batch(dtype):
    """Whatever stands beside it, in whatever order, and however many rows there are."""
    model = fasttx.optimize(encoder(False).to(dtype).eval())
    (sequence,) = sequences((24,), dtype)
    with inference():
        expected = model(sequence[None])[0]
        for batch in (2, 3, 7, 30):
            x = torch.randn(batch, 24, E).to(dtype)
            row = batch // 2
            x[row] = sequence
            assert_equal(model(x)[row], expected, f"batch of {batch}")


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_on_any_number_of_threads(dtype, norm_first, threads, isa):
    """Output and every gradient of a step with dropout, padded and packed."""
    model = fasttx.optimize(encoder(norm_first).to(dtype).train())
    batch, mask, _ = pad(sequences(LENGTHS, dtype), 45, "right")

    def step():
        model.zero_grad()
        torch.manual_seed(1)
        x = batch.clone().requires_grad_()
        output = model(x, src_key_padding_mask=mask)
        output.float().square().sum().backward()
        return [output.detach(), x.grad, *(p.grad for p in model.parameters())]

    for padding in ("remove", "keep"):
        fasttx.optimize(model, padding=padding)
        with threads(1):
            expected = step()
        for count in THREADS[1:]:
            with threads(count):
                for actual, wanted in zip(step(), expected, strict=True):
                    assert_equal(actual, wanted, f"{padding}, {count} threads")


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_tokens(dtype, norm_first, isa):
    """What reaches a token, where the loss leaves padding out."""
    model = fasttx.optimize(encoder(norm_first).to(dtype).eval())
    alone = sequences(LENGTHS, dtype)

    def gradient(x, valid, **options):
        x = x.clone().requires_grad_()
        model(x, **options)[valid].float().square().sum().backward()
        return x.grad

    with fasttx.backend("cpu"):
        expected = [gradient(x[None], ...)[0] for x in alone]
        for padding, place in BATCHES:
            fasttx.optimize(model, padding=padding)
            batch, mask, places = pad(alone, 45, place)
            together = gradient(batch, ~mask, src_key_padding_mask=mask)
            for row, at in enumerate(places):
                assert_equal(together[row, at], expected[row], f"{padding}, {place}, sequence {row}")


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("place", ["right", "left", "holes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multihead_attention(dtype, place, causal, isa):
    """Keys and queries from different sequences, several tiles of each."""
    module = fasttx.nn.MultiheadAttention(E, H, batch_first=True).to(dtype).eval()
    # Up to four queries over more than 128 keys are summed another way.
    lengths = (60, 5, 33)
    queries, keys = sequences(lengths, dtype), sequences(lengths if causal else (140, 270, 1), dtype)

    def run(query, key, **options):
        if causal:
            options["attn_mask"] = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        return module(query, key, key, need_weights=False, **options)[0]

    def results(query, key, valid=..., **options):
        given = [x.clone().requires_grad_() for x in (query, key)]
        output = run(*given, **options)
        output[valid].float().square().sum().backward()
        return [output.detach(), *(x.grad for x in given)]

    with fasttx.backend("cpu"):
        query, query_mask, rows = pad(queries, 70, place)
        key, mask, columns = pad(keys, 70 if causal else 300, place)
        if causal:  # keys stand where their queries do
            key, mask, columns = torch.randn_like(query), query_mask, rows
            for sequence, row in zip(keys, zip(range(3), rows, strict=True), strict=True):
                key[row] = sequence
        found = results(query, key, ~query_mask, key_padding_mask=mask)
        for row, (x, y) in enumerate(zip(queries, keys, strict=True)):
            output, dx, dy = results(x[None], y[None])
            assert_equal(found[0][row, rows[row]], output[0], f"output {row}")
            assert_equal(found[1][row, rows[row]], dx[0], f"gradient of query {row}")
            assert_equal(found[2][row, columns[row]], dy[0], f"gradient of key {row}")
            assert not found[2][row, mask[row]].any()


def test_inference_and_training_agree():
    """A step without dropout gives the bits that inference gives."""
    model = fasttx.optimize(encoder(False).eval())
    batch, mask, _ = pad(sequences(LENGTHS, torch.float32), 45, "right")
    output = model(batch.requires_grad_(), src_key_padding_mask=mask)
    with torch.no_grad():
        assert_equal(model(batch, src_key_padding_mask=mask), output, "without gradients")
