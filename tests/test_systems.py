"""What `python -m fasttx train` trains: batches, what is held out, and measures against written-out ones."""

import collections
import math
import re
import shutil
import weakref

import pytest
import torch
from torch.nn import functional as F

import fasttx
from fasttx import datasets
from fasttx.models import TokenizerMismatchError
from fasttx.systems import SYSTEMS
from fasttx.systems import multimodal as clothes
from fasttx.systems._ngram import bits_per_character
from fasttx.systems._system import Epochs, described
from fasttx.systems.translation import translate
from fasttx.text import Tokenizer
from fasttx.train import Recipe, Run, train

for _module in ("safetensors", "tokenizers"):
    pytest.importorskip(_module)
from test_datasets import catalogue, write  # noqa: E402
from tiny_data import TINY, modelled, system  # noqa: E402

EACH = pytest.mark.parametrize("name", TINY)
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = Recipe(steps=3, warmup=1, interval=3)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_system_is_tried():
    assert SYSTEMS.keys() == TINY.keys()


@EACH
def test_a_batch_follows_from_its_number_and_the_seed(name, tiny_system):
    first, again, other = tiny_system(name), tiny_system(name), tiny_system(name, "--seed", 1)
    forward = [first.batch(i) for i in (0, 7, 3)]
    backward = [again.batch(i) for i in (3, 7, 0)][::-1]
    assert all(map(same, forward, backward))
    assert not any(same(*pair) for pair in zip(forward, forward[1:], strict=False))
    assert not all(same(first.batch(i), other.batch(i)) for i in range(3))


@EACH
def test_it_trains_on_the_kernels(name, tiny_system, tmp_path, needs_extension):
    task = tiny_system(name)
    with fasttx.strict():
        for part in (task, *map(task.variant, task.variants)):
            run = Run(modelled(part), part, STEPS, tmp_path / getattr(part, "modality", ""))
            assert [math.isfinite(row["loss"]) for _, row in train(run)] == [True] * 3
        assert all(isinstance(line, str) and line for line in task.report(run.model.eval()))
    assert (tmp_path / getattr(task, "modality", "") / "model.safetensors").exists()


def test_every_batch_has_its_own_masks(tiny_system):
    task = tiny_system("bert")
    chosen = {tuple((task.batch(i)["mlm_targets"][:, :9] != -100).flatten().tolist()) for i in range(6)}
    assert len(chosen) == 6


@pytest.mark.parametrize("name", ["translation", "sentiment", "digits", "fashion"])
def test_every_example_comes_once_an_epoch(name, tiny_system):
    task = tiny_system(name)
    count = len(task.images if hasattr(task, "images") else task.pairs if name == "translation" else task.train)
    orders, index = [], 0
    for _ in range(2):
        epoch = []
        while len(epoch) < count:
            epoch += list(map(int, task.batches[index]))
            index += 1
        assert sorted(epoch) == list(range(count))
        orders.append(epoch)
    assert orders[0] != orders[1]


def test_epochs_are_of_any_lengths():
    epochs = Epochs(lambda epoch: [f"{epoch}{part}" for part in "abc"[: epoch + 1]])
    assert [epochs[i] for i in (4, 0, 2, 5, 1, 3)] == ["2b", "0a", "1b", "2c", "1a", "2a"]
    with pytest.raises(ValueError, match="no batches"):
        Epochs(lambda epoch: [])[0]


def test_epochs_keep_one_epoch():
    alive = []

    class Batches(list):
        pass

    def make(number):
        batches = Batches([number] * 3)
        alive.append(weakref.ref(batches))
        return batches

    epochs = Epochs(make)
    assert [epochs[i] for i in range(30)] == [i // 3 for i in range(30)] and len(alive) == 10
    assert [reference() is not None for reference in alive] == [False] * 9 + [True]
    assert epochs[0] == 0 and len(alive) == 11  # an earlier one is made again


@EACH
def test_everything_that_is_measured_goes_where_the_model_is(name, tiny_system, monkeypatch):
    """To a device whose tensors hold nothing: as soon as a model is asked there is no more to see."""

    class Asked(Exception):
        pass

    task = tiny_system(name)
    model = modelled(task).eval().to("meta")

    def asked(*arguments, **named):
        assert {x.device.type for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)} == {"meta"}
        raise Asked

    for method in ("forward", "loss", "generate", "caption"):
        if hasattr(model, method):
            monkeypatch.setattr(model, method, asked)
    with pytest.raises(Asked):
        task.evaluate(model)
    if name in ("translation", "multimodal"):
        with pytest.raises(Asked):
            list(task.report(model))


@EACH
def test_a_smaller_folder_is_seen(name, tiny_system, tiny_folder, tmp_path, tiny_bert):
    """By how much there is, and by its checksum."""
    task = tiny_system(name)
    assert re.fullmatch(r"[\d,]+ (plays|lines|pairs|images) to learn from, \d+ held out \(checksum \w{8}\)", task.data)
    assert task.data == tiny_system(name).data
    if name in ("digits", "fashion", "multimodal"):  # of one folder, or of sizes that are given
        return
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "shakespeare/03.txt").unlink()
    lines = tmp_path / "sentiment/movieReviewSnippets_GroundTruth.txt"
    lines.write_text("\n".join(lines.read_text().splitlines()[:-9]))
    few = {f"please {word} it all": f"veuillez {word}" for word in ("open", "close", "print", "save") * 9}
    few |= {f"now {word} number {i}": f"autre {word} {i}" for word in ("open", "close") for i in range(30)}
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    write(tmp_path / "translations/a/fr/LC_MESSAGES/a.mo", catalogue(header | few))
    start = ["--start", tiny_bert] if name == "sentiment" else []
    other = system(name, tmp_path, *start)
    assert int(other.data.split()[0]) < int(task.data.split()[0])
    assert other.data.split()[-1] != task.data.split()[-1]


def test_a_checksum_is_of_the_data():
    assert described("lines", ["a", "b"], ["c"]) != described("lines", ["a", "d"], ["c"])
    assert described("lines", list("ab") * 600, ["c"]).startswith("1,200 lines to learn from, 1 held out (checksum ")


def test_plays_are_held_out_whole(tiny_system, tiny_folder):
    plays = datasets.shakespeare(tiny_folder)
    train_text, held_out = tiny_system("gpt").texts
    assert collections.Counter((play in train_text, play in held_out) for play in plays) == {
        (True, False): 18, (False, True): 2,
    }  # fmt: skip
    bert = tiny_system("bert")
    unseen = [play.split(".")[0] for play in plays if play in held_out]  # "Play 7", which no other play says
    trained = {bert.tokenizer.decode(side) for batch in (bert.batches[i] for i in range(20)) for pair in batch
               for side in (pair.first, pair.second)}  # fmt: skip
    tested = set()
    for batch in bert.held_out:
        masked = batch["mlm_targets"] != -100
        tested |= set(map(bert.tokenizer.decode, torch.where(masked, batch["mlm_targets"], batch["token_ids"])))
    assert any(play in text for play in unseen for text in tested)
    assert not any(re.search(rf"{play}\b", text) for play in unseen for text in trained)


def test_lines_are_held_out(tiny_system, tiny_folder):
    task = tiny_system("sentiment")
    texts = [{task.tokenizer.decode(ids): label for ids, label in lines} for lines in (task.train, task.held_out)]
    assert not texts[0].keys() & texts[1].keys() and len(texts[1]) == 4
    scores = {text: int(score > 0) for text, score in datasets.sentiment(tiny_folder) if score != 0}
    assert texts[0] | texts[1] == scores  # nothing without praise and blame


def test_no_translation_is_learned_that_is_held_out(tiny_folder, tmp_path):
    """Not in other case, punctuation and numbers either, and not in French alone."""

    def words(text):
        return " ".join(re.findall(r"[^\W\d]+", text.lower()))

    pairs = datasets.translations(tiny_folder)
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    nearly = {f"{english.upper()} 2...": f"« {french.title()} »" for english, french in pairs}
    nearly |= {f"now {english}": french for english, french in pairs}
    write(tmp_path / "translations/a.mo", catalogue(header | dict(pairs) | nearly))
    task = system("translation", tmp_path)
    english, french = ({words(text) for text in texts} for texts in zip(*task.held_out, strict=True))
    assert len(task.held_out) == 9 and len(task.pairs) >= 300 - 9 * 3
    for source, target in task.pairs:
        assert words(task.tokenizer.decode(source)) not in english
        assert words(task.tokenizer.decode(target)) not in french


def test_pictures_are_held_out(tiny_system, tiny_folder):
    task = tiny_system("fashion")
    assert torch.equal(task.images, datasets.fashion_mnist(tiny_folder, "train")[0])
    assert torch.equal(task.held_out, datasets.fashion_mnist(tiny_folder, "test")[0])
    digits, (images, _) = tiny_system("digits"), datasets.digits()
    rows = collections.Counter(map(tuple, torch.cat((digits.images, digits.held_out)).flatten(1).tolist()))
    assert rows == collections.Counter(map(tuple, images.flatten(1).tolist())) and len(digits.held_out) == 359


@pytest.mark.parametrize("name, mirrored", [("digits", (False,)), ("fashion", (False, True))])
@pytest.mark.parametrize("shift", [0, 1])
def test_pictures_move_or_are_mirrored(tiny_system, name, shift, mirrored):
    """By a pixel at most, and in every way that there is, about equally often."""
    task = tiny_system(name, "--batch", 40, "--shift", shift)
    side, ways = task.images.shape[-1], collections.Counter()
    places = range(2 * shift + 1)
    for index in range(12):
        for moved, original in zip(task.batch(index)["images"], task.images[task.batches[index]], strict=True):
            padded = F.pad(original, (shift,) * 4)
            options = {(y, x, m): (padded.flip(2) if m else padded)[:, y : y + side, x : x + side]
                       for y in places for x in places for m in mirrored}  # fmt: skip
            (way,) = (way for way, option in options.items() if torch.equal(moved, option))
            ways[way] += 1
    expected = len(places) ** 2 * len(mirrored)
    assert len(ways) == expected and max(ways.values()) < 1.5 * ways.total() / expected


@pytest.mark.parametrize("name", ["digits", "fashion", "sentiment", "multimodal"])
def test_accuracy(name, tiny_system):
    """Asked one by one."""
    task = tiny_system(name)
    model = modelled(task).eval()
    right = []
    with torch.inference_mode():
        for parameter in model.parameters():  # answers that differ
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if name == "sentiment":
            right = [int(model(torch.tensor([ids])).argmax()) == label for ids, label in task.held_out]
        elif name == "multimodal":
            for image, question, answer, _ in zip(*task.held_out, strict=True):
                ids = task.tokenizers["text"].batch([clothes._QUESTIONS[question]], cls=True).token_ids
                right.append(int(model(image[None], ids).argmax()) == int(answer))
        else:
            labels = task.held_out_labels.tolist()
            right = [int(model(x[None]).argmax()) == y for x, y in zip(task.held_out, labels, strict=True)]
        assert task.evaluate(model) == {"accuracy": pytest.approx(sum(right) / len(right))}
    assert len(right) == {"digits": 359, "sentiment": 4}.get(name, 20)


def test_questions_have_their_answers(tiny_system, tiny_folder):
    task = tiny_system("multimodal")
    images, labels = datasets.fashion_mnist(tiny_folder, "test")
    light = [float(x[x > 0].mean()) for x in datasets.fashion_mnist(tiny_folder, "train")[0]]
    middle = sorted(light)[(len(light) - 1) // 2]
    asked = collections.Counter()
    for _ in range(10):
        drawn = task._ask(images, labels, None)
        for image, label, question, answer, caption in zip(images, labels, *drawn, strict=True):
            thing, bright = clothes._NAMES[label], float(image[image > 0].mean()) > middle
            kind = min(int(question), 3)
            right = (thing, clothes._PLACES[thing], "yes" if bright else "no",
                     "yes" if clothes._QUESTIONS[question] == f"is it a {thing} ?" else "no")[kind]  # fmt: skip
            assert clothes._ANSWERS[answer] == right
            words = f"a {'bright' if bright else 'dark'} {thing} for the {clothes._PLACES[thing]}"
            encoded = task.tokenizers["text"].encode(words, bos=True, eos=True)
            assert task.captions.token_ids[caption][~task.captions.padding[caption]].tolist() == encoded
            asked[kind, right] += 1
    assert min(sum(n for (k, _), n in asked.items() if k == kind) for kind in range(4)) > 25
    assert asked[3, "yes"] > 10 and asked[3, "no"] > 10
    batch = task.batch(0)
    assert batch.keys() == {"images", "token_ids", "padding", "captions", "caption_padding", "labels"}
    alone = [{*task.variant(kind).batch(0)} & {"images", "token_ids", "padding"} for kind in ("image", "text")]
    assert alone == [{"images"}, {"token_ids", "padding"}]


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_bits_per_character(name, tiny_system):
    task, tokenizer = tiny_system(name), tiny_system(name).tokenizers["text"]
    model, ids, bits = modelled(task).eval(), task.held_out, 0.0
    starts = range(0, len(ids) - 16, 16)
    with torch.inference_mode():
        for start in starts:
            window = ids[None, start : start + 17]
            hidden = model.hidden(window[:, :-1]) if name == "gpt" else model.lstm(model.embedding(window[:, :-1]))[0]
            weight = model.embedding.token_weight if name == "gpt" else model.embedding.weight
            chances = (hidden @ weight.T).double().log_softmax(-1)[0]
            bits -= sum(float(chances[i, token]) for i, token in enumerate(window[0, 1:])) / math.log(2)
        characters = len(tokenizer.decode(ids[1 : 1 + 16 * len(starts)]))
        assert task.evaluate(model) == {"bits_per_character": pytest.approx(bits / characters, rel=1e-5)}
        for parameter in model.parameters():
            parameter.zero_()
        uniform = math.log2(len(tokenizer)) * 16 * len(starts) / characters
        assert task.evaluate(model) == {"bits_per_character": pytest.approx(uniform, rel=1e-5)}
        (line,) = task.report(model)
    best = min((bits_per_character(*task.texts, order), order) for order in range(3, 8))
    assert f"(order {best[1]}): {best[0]:.3f} bits" in line


def test_masked_and_following(tiny_system, tmp_path):
    task = tiny_system("bert")
    model, masked, following = modelled(task), [], []
    list(train(Run(model, task, Recipe(steps=30, learning_rate=1e-2, interval=30), tmp_path)))
    model.eval()
    with torch.inference_mode():
        for batch in task.held_out:
            for i in range(len(batch["token_ids"])):
                length = int((~batch["padding"][i]).sum())
                told, order = model(batch["token_ids"][i : i + 1, :length], batch["segment_ids"][i : i + 1, :length])
                following.append(int(order.argmax()) == int(batch["nsp_targets"][i]))
                targets = enumerate(batch["mlm_targets"][i].tolist())
                masked += [int(told[0, place].argmax()) == token for place, token in targets if token != -100]
        expected = {"masked_accuracy": sum(masked) / len(masked), "next_accuracy": sum(following) / len(following)}
        assert expected["masked_accuracy"] > 0 and task.evaluate(model) == pytest.approx(expected)
    assert same(task.held_out[0], tiny_system("bert").held_out[0])


def test_bleu(tiny_system, monkeypatch):
    pytest.importorskip("sacrebleu")
    task = tiny_system("translation", "--beams", 2)
    model, french = modelled(task).eval(), [text for _, text in task.held_out]
    assert task._bleu(french) == pytest.approx(100)
    assert task._bleu(["autre chose"] * len(french)) < 1
    one_by_one = [translate(model, task.tokenizer, task.tokenizer, [text])[0] for text, _ in task.held_out]
    assert task.translate(model, beams=1) == one_by_one
    monkeypatch.setattr(task, "translate", lambda model, beams: french if beams == 2 else one_by_one)
    assert task.evaluate(model) == {"bleu": task._bleu(one_by_one)}
    assert next(task.report(model)) == f"BLEU of {len(french)} held-out texts with 2 beams: 100.0"


def test_another_tokenizer_is_refused(tiny_system, tiny_bert, tmp_path, tiny_folder):
    other = Tokenizer.train("bpe", ["another text"], vocab_size=270)
    task = tiny_system("translation")
    with pytest.raises(TokenizerMismatchError):
        translate(modelled(task), task.tokenizer, other, ["open the file"])
    with pytest.raises(ValueError, match="empty"):
        translate(modelled(task), task.tokenizer, task.tokenizer, ["open the file", ""])
    (tmp_path / "model.safetensors").write_bytes((tiny_bert / "model.safetensors").read_bytes())
    other.save(tmp_path / "text.json")
    with pytest.raises(TokenizerMismatchError):
        system("sentiment", tiny_folder, "--start", tmp_path).model()
