"""`python -m fasttx train` on a tiny folder of data: what it prints, writes and refuses."""

import argparse
import csv
import gzip
import importlib
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import fasttx
from fasttx import dispatch, finetune
from fasttx.__main__ import main
from fasttx.cli import train
from fasttx.models import BertForPretraining, BertForSequenceClassification
from fasttx.models._model import read_safetensors
from fasttx.systems import SYSTEMS
from fasttx.text import Tokenizer
from fasttx.train import Run

for _module in ("matplotlib", "rich", "safetensors", "sacrebleu", "tokenizers"):
    pytest.importorskip(_module)
from matplotlib import pyplot  # noqa: E402
from test_datasets import idx  # noqa: E402
from tiny_data import TINY  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = ("--steps", 3, "--interval", 2)
RUN = ["checkpoint.pt", "metrics.csv", "model.safetensors"]


@pytest.fixture
def command(tiny_folder, tiny_bert, capsys):
    """Trains a tiny system: the exit code, output and errors."""

    def run(name, output, *options):
        if name == "digits":
            pytest.importorskip("sklearn")
        options = [*TINY[name], *(["--start", tiny_bert] if name == "sentiment" else []), *options]
        code = main(list(map(str, ["train", name, "--data", tiny_folder, "--output", output, *options])))
        return code, *capsys.readouterr()

    return run


def contents(folder):
    """Every file's bytes by its path, but for the plot, which is drawn again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def identity(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["identity"]


@pytest.mark.parametrize("name", TINY)
def test_what_is_trained_and_written(name, command, tmp_path):
    beside = ["reference", "torch", *SYSTEMS[name].variants]
    code, output, errors = command(name, tmp_path, *STEPS, "--beside", *beside)
    assert code == 0, errors
    saved = read_safetensors(tmp_path / "model.safetensors")[1]["fasttx"]
    tokenizers = {"translation": ["source.json", "target.json"], "digits": [], "fashion": []}.get(name, ["text.json"])
    assert all(Tokenizer.load(tmp_path / file).fingerprint in saved for file in tokenizers)
    for run, folder in {name: tmp_path, **{other: tmp_path / other for other in beside}}.items():
        files = {path.name for path in folder.iterdir() if path.is_file()} - {"loss.png"}
        assert sorted(files) == sorted([*RUN, *tokenizers])
        measured = list(rows(folder)[0])[6:]
        assert [[row[key] != "" for key in measured] for row in rows(folder)] == [
            [False] * len(measured), [True] * len(measured), [True] * len(measured),
        ]  # fmt: skip
        last = ", ".join(f"{key.replace('_', ' ')} {float(rows(folder)[-1][key]):.4f}" for key in measured)
        unit = SYSTEMS[name].unit
        assert re.search(rf"^{run}: {last}; 3 steps in \d+ s, [\d,]+ {unit} a second$", output, re.M)
        assert re.search(rf"^{run}: step 2, loss ", output, re.M) and f" in {folder}; " in output
    assert re.search(rf"^{name}: [\d,]+ [a-z]+ to learn from, \d+ held out \(checksum [0-9a-f]{{8}}\)$", output, re.M)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"fasttx took its steps at [\d.]+.* times the speed of (?:reference|torch) ", output)) == 2
    fast, slow = ([float(row["loss"]) for row in rows(folder)] for folder in (tmp_path, tmp_path / "reference"))
    assert fast == pytest.approx(slow, rel=1e-2)

    before = contents(tmp_path)
    code, output, _ = command(name, tmp_path, *STEPS, "--beside", *beside)  # there is nothing left to do
    assert code == 0 and output.count("from step 3") == 1 + len(beside) and "step 2" not in output
    assert contents(tmp_path) == before


def test_what_does_not_fit_a_folders_run_changes_nothing(command, tmp_path):
    assert command("gpt", tmp_path, *STEPS)[0] == 0
    before = contents(tmp_path)
    for options in (
        ("--seed", 1), ("--steps", 4), ("--learning-rate", 1), ("--accumulate", 2), ("--batch", 5), ("--float32",),
        ("--backend", "reference"), ("--vocabulary", 280), ("--width", 32), ("--dropout", 0.2),
    ):  # fmt: skip
        code, _, errors = command("gpt", tmp_path, *STEPS, *options)
        assert code == 2 and "is of another run" in errors and str(tmp_path) in errors, options
    told = "is of another run, whose recipe.seed is 0 (here 1), settings.batch is 4 (here 5): choose"
    assert told in command("gpt", tmp_path, *STEPS, "--seed", 1, "--batch", 5)[2]
    assert command("lstm", tmp_path, *STEPS)[0] == 2
    assert contents(tmp_path) == before
    (tmp_path / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
    code, _, errors = command("gpt", tmp_path, *STEPS)
    assert code == 2 and "no whole checkpoint" in errors


@pytest.mark.parametrize("name", ["gpt", "multimodal", "sentiment"])
def test_it_goes_on_where_it_was_interrupted(name, command, tmp_path, monkeypatch):
    options = ("--steps", 5, "--interval", 2)
    assert command(name, tmp_path / "whole", *options)[0] == 0
    step = Run.step

    def interrupted(run):
        if run.steps == 3:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(name, tmp_path / "broken", *options)
    monkeypatch.undo()
    code, output, _ = command(name, tmp_path / "broken", *options)
    assert code == 0 and "from step 2" in output
    whole, broken = (tmp_path / kind for kind in ("whole", "broken"))
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(broken)]


@pytest.mark.parametrize("name", [name for name in TINY if name != "digits"])
def test_missing_data(name, command, tmp_path):
    code, _, errors = command(name, tmp_path / "out", "--data", tmp_path)
    assert code == 2 and "run `make data`" in errors and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_one_is_refused_before_training(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "step", lambda run: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    code, _, errors = command("digits", tmp_path / "file")
    assert code == 2 and errors.startswith("fasttx train: ") and "file" in errors


def test_what_sentiment_starts_from_is_missing(command, tmp_path):
    code, _, errors = command("sentiment", tmp_path / "out", "--start", tmp_path / "bert")
    assert code == 2 and not (tmp_path / "out").exists()
    assert f"no BERT in {tmp_path / 'bert'}: run `python -m fasttx train bert` first, or take --start minilm" in errors


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gpt", ("--steps", 0), "steps must be at least 1"),
        ("gpt", ("--learning-rate", -1), "learning_rate must be positive"),
        ("gpt", ("--batch", 0), "--batch must be at least 1"),
        ("gpt", ("--threads", 0), "--threads must be at least 1, got 0"),
        ("gpt", ("--threads", -1), "--threads must be at least 1, got -1"),
        ("gpt", ("--seed", 2**64), "seed must be from 0 to"),
        ("gpt", ("--seed", -1), "seed must be from 0 to"),
        ("gpt", ("--warmup", 11, "--steps", 10), "--warmup 11 of --steps 10"),
        ("gpt", ("--clip", 0), "clip must be positive"),
        ("gpt", ("--weight-decay", -1), "weight_decay must be at least 0"),
        ("gpt", ("--context", 10**6), "--context 1000000: the held-out plays have 356 tokens"),
        ("gpt", ("--context", 356), "--context 356: the held-out plays have 356 tokens"),
        ("gpt", ("--device", "nowhere"), "--device nowhere: "),
        ("gpt", ("--device", "meta"), "--device meta: "),
        ("translation", ("--beams", 0), "beams must be at least 1"),
        ("bert", ("--batch", -1), "--batch must be at least 1"),
        ("digits", ("--batch", 0), "--batch must be at least 1"),
        ("gpt", ("--vocabulary", 10), "vocab_size must be at least"),
        ("gpt", ("--heads", 3), "heads"),
        ("fashion", ("--patch", 5), "no whole number of patches"),
        ("sentiment", ("--tokens", 5), "a batch at most 5"),
        ("translation", ("--tokens", 5), "a batch at most 5"),
        ("bert", ("--length", 4), "at least 5"),
        ("multimodal", ("--layers", 0), "layers must be at least 1"),
        ("multimodal", ("--width", 0), "width must be at least 1"),
        ("fashion", ("--width", 0), "width must be at least 1"),
        ("fashion", ("--shift", -1), "--shift must be 0 or more, got -1"),
    ],
)
def test_sizes_that_do_not_fit(name, options, message, command, tmp_path):
    code, _, errors = command(name, tmp_path / "out", *options)
    assert code == 2 and errors.startswith("fasttx train: ") and message in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_is_not_there(command, tmp_path):
    code, _, errors = command("gpt", tmp_path, "--backend", "cuda")
    assert code == 2 and "cannot run on the backend 'cuda'" in errors


def test_a_loss_that_is_nan(command, tmp_path):
    code, _, errors = command("gpt", tmp_path, "--steps", 9, "--learning-rate", 1e30)
    assert code == 2 and "the loss is nan" in errors


def test_digits_are_trained_in_float32_and_others_on_request(command, tmp_path):
    for name, options, bfloat16 in (("digits", (), False), ("gpt", (), True), ("bert", ("--float32",), False)):
        assert command(name, tmp_path / name, "--steps", 1, *options)[0] == 0
        assert identity(tmp_path / name)["recipe"]["bfloat16"] is bfloat16
        assert identity(tmp_path / name)["recipe"]["steps"] == 1


def test_the_options_of_the_command_reach_the_run(command, tmp_path):
    given = {"seed": 3, "accumulate": 2, "learning_rate": 0.5, "warmup": 2, "clip": 0.25, "weight_decay": 0.125}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    options += ["--no-bfloat16", "--backend", "reference", "--threads", 1]
    assert command("gpt", tmp_path, *STEPS, *options)[0] == 0
    made = identity(tmp_path)
    assert made["backend"] == "reference" and made["settings"]["batch"] == 4
    assert made["recipe"] == given | {"steps": 3, "interval": 2, "bfloat16": False}
    assert [float(row["size"]) for row in rows(tmp_path)] == [2 * 4 * 16] * 3


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_warm_up_has_the_recipes_share_of_the_steps(name):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    usual = SYSTEMS[name].recipe

    def recipe(*options):
        return train._recipe(parser.parse_args([name, *map(str, options)]))

    assert recipe() == usual
    assert recipe("--steps", 10 * usual.steps).warmup == usual.warmup
    assert recipe("--steps", usual.steps // 2).warmup == usual.warmup // 2
    assert recipe("--steps", 1).warmup == 0 and recipe("--steps", 7, "--warmup", 7).warmup == 7


def test_the_environments_backend_is_the_default(command, tmp_path):
    with fasttx.backend("reference"):
        assert command("gpt", tmp_path, *STEPS)[0] == 0
    assert identity(tmp_path)["backend"] == "reference"
    code, _, errors = command("gpt", tmp_path, *STEPS)
    assert code == 2 and "whose backend is reference (here auto)" in errors


def test_beams_make_no_other_run(command, tmp_path):
    assert command("translation", tmp_path, *STEPS, "--beams", 1)[0] == 0
    code, output, _ = command("translation", tmp_path, *STEPS, "--beams", 2)
    assert code == 0 and "with 2 beams" in output and "from step 3" in output


def test_other_images_make_another_run(command, tiny_folder, tmp_path):
    """Of the same names, sizes and number: it is the labels that differ."""
    assert command("fashion", tmp_path / "out", *STEPS)[0] == 0
    shutil.copytree(tiny_folder, tmp_path / "data")
    labels = (torch.arange(40) * 3 % 10).to(torch.uint8)
    path = tmp_path / "data/fashion-mnist/train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(labels)))
    code, _, errors = command("fashion", tmp_path / "out", *STEPS, "--data", tmp_path / "data")
    assert code == 2 and "whose settings.data is 40 images to learn from, 20 held out (checksum" in errors


@pytest.mark.parametrize("name, module, extra", [
    ("gpt", "matplotlib.pyplot", "train"), ("gpt", "rich.progress", "train"), ("gpt", "rich.console", "train"),
    ("gpt", "safetensors", "train"), ("translation", "sacrebleu", "train"),
])  # fmt: skip
def test_what_is_not_installed_is_told_before_training(name, module, extra, command, tmp_path, monkeypatch):
    real = importlib.import_module

    def without(wanted, *rest):
        if wanted == module:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    code, output, errors = command(name, tmp_path / "out", *STEPS)
    assert code == 2 and module.split(".")[0] in errors and f'pip install "fasttx[{extra}]"' in errors
    assert "step 2" not in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["evaluate", "report"])
@pytest.mark.parametrize("error", [ValueError("it cannot be measured"), ImportError("it cannot be measured")])
def test_what_was_trained_is_kept_where_measuring_it_fails(where, error, command, tmp_path, monkeypatch):
    def failing(*arguments):
        raise error

    monkeypatch.setattr(SYSTEMS["gpt"], where, failing)
    code, _, errors = command("gpt", tmp_path / "out", *STEPS)
    assert code == 2 and f"it cannot be measured (what was trained before is in {tmp_path / 'out'})" in errors
    monkeypatch.undo()
    code, output, _ = command("gpt", tmp_path / "out", *STEPS)
    assert code == 0 and f"from step {2 if where == 'evaluate' else 3};" in output
    assert command("gpt", tmp_path / "whole", *STEPS)[0] == 0
    files = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("out", "whole")]
    assert files[0] == files[1]
    assert [row["bits_per_character"] for row in rows(tmp_path / "out")] == [
        row["bits_per_character"] for row in rows(tmp_path / "whole")
    ]


def test_what_is_told_at_the_end(command, tmp_path, monkeypatch):
    """Measured at the intervals' ends alone; examples by the backend that was asked for."""
    system, measured = SYSTEMS["gpt"], []
    evaluate = system.evaluate
    monkeypatch.setattr(system, "evaluate", lambda self, model: measured.append(1) or evaluate(self, model))
    monkeypatch.setattr(system, "report", lambda self, model: iter([f"told by {dispatch.requested_backend()}"]))
    code, output, _ = command("gpt", tmp_path, *STEPS, "--backend", "reference")
    assert code == 0 and len(measured) == 2 and "\ntold by reference\n" in output
    assert identity(tmp_path)["settings"]["device"] == "cpu"


def test_the_plot_names_what_each_line_is_a_mean_of(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    runs = {}
    for name, steps in (("long", 500), ("short", 3)):
        history = [{"step": i + 1, "loss": 1.0} for i in range(steps)]
        history[-1]["accuracy"] = 0.5
        runs[name] = SimpleNamespace(rows=history)
    train._plot(runs, tmp_path / "loss.png")
    (figure,) = drawn
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["long: mean of 5 steps", "short: mean of 1 steps"]
    assert [len(line.get_xdata()) for line in figure.axes[0].get_lines()] == [496, 3]
    monkeypatch.undo()
    pyplot.close(figure)


def test_only_what_is_trained_in_turn_is_compared(command, tmp_path):
    assert command("gpt", tmp_path, *STEPS)[0] == 0
    before = contents(tmp_path)
    code, _, errors = command("gpt", tmp_path, *STEPS, "--beside", "torch")
    assert code == 2 and "at step 3 and torch beside it at step 0" in errors and "another --output" in errors
    assert contents(tmp_path) == before


def test_what_a_kill_between_the_two_leaves_goes_on(command, tmp_path, monkeypatch):
    keep, kept = Run.keep, []

    def killed(run):
        keep(run)
        kept.append(run)
        if len(kept) == 3:
            raise KeyboardInterrupt

    options = ("--steps", 5, "--interval", 2, "--beside", "reference")
    monkeypatch.setattr(Run, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        command("gpt", tmp_path, *options)
    monkeypatch.undo()
    code, output, _ = command("gpt", tmp_path, *options)
    assert code == 0 and "from step 4" in output and "from step 2" in output and "times the speed of" in output


@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_fine_tuning(method, command, tiny_bert, tmp_path):
    """Beside torch.nn, whose weights are others: each folder has its own run's."""
    if method == "lora":
        pytest.importorskip("peft")
    options = (*STEPS, "--learning-rate", 0.05, "--method", method, "--rank", 3, "--beside", "torch")
    code, output, errors = command("sentiment", tmp_path, *options)
    assert code == 0, errors
    encoder = BertForPretraining.load(tiny_bert / "model.safetensors")
    first = BertForSequenceClassification.from_encoder(encoder, labels=2)
    width, (weights, trained) = 16, (dict(model.named_parameters()) for model in (first, first))
    if method == "bitfit":
        trained = {name: p for name, p in weights.items() if name.endswith("bias") or name.startswith("classifier")}
    count = sum(p.numel() for p in trained.values())
    if method == "lora":  # of attention's two projections, and of the two layers of the feed-forward
        count = 3 * (4 * width + 2 * width + 2 * 5 * width) + 2 * width + 2
    total = sum(p.numel() for p in weights.values()) + (count - 2 * width - 2 if method == "lora" else 0)
    told = f"BertForSequenceClassification in {tmp_path}; {count:,} of {total:,} parameters are trained"
    assert f"sentiment: {told} ({count / total:.2%})" in output

    models = [BertForSequenceClassification.load(folder / "model.safetensors").eval()
              for folder in (tmp_path, tmp_path / "torch")]  # fmt: skip
    changed = {name for name, p in models[0].named_parameters() if not torch.equal(p, weights[name])}
    matrices = {f"bert.encoder.layers.0.{name}" for name in (
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")}  # fmt: skip
    if method == "lora":
        assert changed == matrices | {"classifier.weight", "classifier.bias"}
    else:
        assert changed <= trained.keys() and bool(changed & matrices) == (method == "full")
    ids = torch.tensor([[4, 20, 30, 5], [4, 40, 50, 5]])
    logits = [model(ids) for model in models]
    assert not torch.allclose(*logits, rtol=1e-5)
    if method == "lora":
        for model, folder, merged in zip(models, (tmp_path, tmp_path / "torch"), logits, strict=True):
            alone = BertForSequenceClassification.from_encoder(
                BertForPretraining.load(tiny_bert / "model.safetensors"), labels=2
            )
            alone.classifier.load_state_dict(model.classifier.state_dict())
            finetune.load_adapter(alone, folder / "adapter.safetensors")
            torch.testing.assert_close(alone.eval()(ids), merged)


@pytest.mark.parametrize("positions", [512, 6])
def test_fine_tuning_begins_with_hugging_faces_bert_too(positions, command, tmp_path):
    """Of which no line has more tokens than there are positions."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train("word", ["a good picture number", "a bad one"])
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes["max_position_embeddings"] = positions
    theirs = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=2))
    theirs.save_pretrained(tmp_path / "start")
    tokenizer.save(tmp_path / "start/tokenizer.json")
    options = ("--start", tmp_path / "start", "--method", "bitfit")
    code, _, errors = command("sentiment", tmp_path / "out", *STEPS, *options)
    assert code == 0, errors
    model = BertForSequenceClassification.load(tmp_path / "out/model.safetensors")
    model.require_tokenizers(text=Tokenizer.load(tmp_path / "out/text.json"))
    words = theirs.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embedding.token_weight, words) and model.tokenizers["text"] == tokenizer.fingerprint


def test_a_system_has_to_be_named(capsys):
    for arguments in (["train"], ["train", "dance"], ["train", "gpt", "--beside", "image"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and "usage: python -m fasttx train" in capsys.readouterr().err
    for name, system in SYSTEMS.items():
        with pytest.raises(SystemExit) as stop:
            main(["train", name, "--help"])
        assert stop.value.code == 0 and " ".join(capsys.readouterr().out.split()).count(system.summary) == 1
