"""The training loop: what a step does, and that a run which was killed goes on as if it had not been."""

import csv
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import fasttx
from fasttx import dispatch
from fasttx.models import BertConfig, BertForSequenceClassification, BertHeadConfig
from fasttx.train import COLUMNS, CheckpointError, Recipe, Run, measures, moved, train

pytest.importorskip("safetensors")

CONFIG = BertHeadConfig(BertConfig(vocab_size=20, width=16, layers=2, heads=2, max_positions=8, dropout=0.1), labels=3)
RECIPE = Recipe(steps=12, learning_rate=1e-2, warmup=3, interval=4, bfloat16=False)


class Sums:
    """Sequences classed by their first token modulo 3."""

    def __init__(self, batch=8):
        self.examples = batch

    def batch(self, index):
        ids = torch.randint(1, 20, (self.examples, 6), generator=torch.Generator().manual_seed(index))
        return {"token_ids": ids, "padding": ids == 0, "targets": ids[:, 0] % 3}

    def size(self, batch):
        return batch["token_ids"].numel()

    def evaluate(self, model):
        assert not model.training and torch.is_inference_mode_enabled()
        batch = self.batch(10**6)
        return {"held_out": model.loss(**batch).item()}

    def save(self, model, folder):
        model.save(folder / "model.safetensors")


def made(folder, recipe=RECIPE, task=None, **options):
    torch.manual_seed(0)
    return Run(BertForSequenceClassification(CONFIG), task or Sums(), recipe, folder, **options)


def rows(folder):
    """metrics.csv without its times."""
    with (folder / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def contents(folder):
    return (folder / "model.safetensors").read_bytes(), rows(folder)


def test_the_files_of_a_run(tmp_path):
    run = made(tmp_path)
    yielded = list(train(run))
    assert [row["step"] for _, row in yielded] == list(range(1, 13)) and run.done
    evaluated = [row["step"] for _, row in yielded if measures(row)]
    assert evaluated == [4, 8, 12]
    written = rows(tmp_path)
    assert list(written[0]) == [name for name in COLUMNS if name != "seconds"] + ["held_out"]
    assert b"\r" not in (tmp_path / "metrics.csv").read_bytes()
    assert [float(row["loss"]) for row in written] == [row["loss"] for _, row in yielded]
    assert [row["held_out"] != "" for row in written] == [step % 4 == 0 for step in range(1, 13)]
    loaded = BertForSequenceClassification.load(tmp_path / "model.safetensors")
    for name, value in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv", "model.safetensors"]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(tmp_path):
    rates = [row["rate"] for _, row in train(made(tmp_path))]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert RECIPE.rate_at(RECIPE.steps) == pytest.approx(0.1)


def test_it_learns_the_same_on_the_reference_path(tmp_path):
    """Step by step in turn; rounding apart, dropout too is the same."""
    task = Sums(batch=32)
    recipe = Recipe(steps=40, learning_rate=1e-2, warmup=3, interval=40, bfloat16=False)
    fast, reference = made(tmp_path / "a", recipe, task), made(tmp_path / "b", recipe, task, backend="reference")
    order = [run is fast for run, _ in train(fast, reference)]
    assert order == [True, False] * 40
    first, second = ([row["loss"] for row in run.rows] for run in (fast, reference))
    assert first[:10] == pytest.approx(second[:10], rel=1e-4)
    assert sum(first[-5:]) < 0.95 * sum(first[:5])


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_goes_on_bit_for_bit(tmp_path, bfloat16, accumulate):
    recipe = Recipe(steps=12, learning_rate=1e-2, warmup=3, interval=4, bfloat16=bfloat16, accumulate=accumulate)
    list(train(made(tmp_path / "whole", recipe)))
    steps = train(made(tmp_path / "broken", recipe))
    for _ in range(6):  # two of them are lost
        next(steps)
    again = made(tmp_path / "broken", recipe)
    assert again.steps == 4 and len(again.rows) == 4
    torch.rand(7)  # whatever else was drawn meanwhile
    list(train(again))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


# Trains in the folder of its first argument, and once more for every moment: killed there, and gone on with.
_KILLED = """
import os, signal, sys
from pathlib import Path

import torch

import test_train as t
from fasttx.train import Recipe, train

torch.set_num_threads(1)
root, interval = Path(sys.argv[1]), 2
recipe = Recipe(steps=3 * interval, learning_rate=1e-2, warmup=3, interval=interval, bfloat16=False)

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def run(folder, moment=None):
    # Each file that is kept has four moments: before it is on the disk, then before and after it gets its name.
    passed = 0

    def passing():
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function, after):
        def call(*arguments):
            passing()
            function(*arguments)
            if after:
                passing()
        return call

    if moment is not None:
        os.fsync, os.replace = watched(os.fsync, False), watched(os.replace, True)
    list(train(t.made(root / folder, recipe)))

assert forked(lambda: run("whole")) == 0
moments = 0
while True:
    folder = str(moments)
    code = forked(lambda: run(folder, moments + 1))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    # Three files of three moments an interval; the last of them is after the checkpoint has its name.
    assert t.made(root / folder, recipe).steps == (moments + 1) // 9 * interval, moments
    assert forked(lambda: run(folder)) == 0
    moments += 1
print(moments)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, nor kill -9")
def test_it_goes_on_after_kill_9_at_any_moment(tmp_path):
    """Before and after each call that puts a file on the disk or in its place: of every interval, of every file."""
    paths = [os.path.dirname(__file__), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments == 3 * 3 * 3
    whole = contents(tmp_path / "whole")
    assert len(whole[1]) == 6 and all(contents(tmp_path / str(moment)) == whole for moment in range(moments))


@pytest.mark.parametrize("steps", [(3, 6), (6, 3), (6, 3, 4)])
def test_runs_of_different_lengths(tmp_path, steps):
    recipes = [Recipe(steps=n, warmup=1, interval=2, bfloat16=False) for n in steps]
    runs = [made(tmp_path / str(i), recipe) for i, recipe in enumerate(recipes)]
    order = [runs.index(run) for run, _ in train(*runs)]
    assert order == [i for step in range(6) for i, n in enumerate(steps) if step < n]
    assert [len(rows(run.folder)) for run in runs] == list(steps)


def test_what_was_learned_survives_an_evaluation_that_fails(tmp_path):
    """And it is evaluated as soon as that goes."""

    class Failing(Sums):
        fails = True

        def evaluate(self, model):
            if self.fails and self.asked:
                raise ValueError("there is nothing to measure it with")
            self.asked = True
            return super().evaluate(model)

    task = Failing()
    task.asked = False
    with pytest.raises(ValueError, match="nothing to measure"):
        list(train(made(tmp_path / "failed", task=task)))
    assert [row["held_out"] != "" for row in rows(tmp_path / "failed")] == [step == 4 for step in range(1, 9)]
    task.fails = False
    again = made(tmp_path / "failed", task=task)
    assert again.steps == 8
    list(train(again))
    list(train(made(tmp_path / "whole")))
    assert contents(tmp_path / "failed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("named", [None, "reference"])
def test_the_callers_backend_counts(tmp_path, named, needs_extension):
    """Unless the run has its own; a checkpoint knows which it was."""
    taken = set()
    dispatch.listeners.append(lambda decision: taken.add(decision.backend == "reference"))
    try:
        run = made(tmp_path / "auto", backend=named)
        run.step()
        assert taken == {named == "reference"}
        taken.clear()
        with fasttx.backend("reference"):
            list(train(made(tmp_path / "reference", backend=named)))
        assert taken == {True}
    finally:
        dispatch.listeners.pop()
    if named is None:
        with pytest.raises(CheckpointError, match=r"whose backend is reference \(here auto\): choose"):
            made(tmp_path / "reference")
    assert made(tmp_path / "reference", backend="reference").done


def test_batches_go_where_the_model_is():
    model = plain()
    assert moved(model, Sums().batch(0))["token_ids"].device.type == "cpu"
    assert {x.device.type for x in moved(model.to("meta"), Sums().batch(0)).values()} == {"meta"}


def test_accumulated_batches_are_one_of_their_size(tmp_path):
    """In float64, without dropout: the mean over parts of one size is the mean over all."""

    class Halves(Sums):
        def batch(self, index):
            whole = Sums.batch(self, index // 2)
            return {name: value.chunk(2)[index % 2] for name, value in whole.items()}

    def weights(task, accumulate):
        recipe = Recipe(steps=3, warmup=1, bfloat16=False, accumulate=accumulate)
        run = Run(plain().double(), task, recipe, tmp_path / str(accumulate))
        list(train(run))
        return run.model.state_dict()

    whole, halves = weights(Sums(), 1), weights(Halves(), 2)
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-9, atol=1e-12)


def plain():
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=20, width=16, layers=1, heads=2, max_positions=8, dropout=0.0)
    return BertForSequenceClassification(BertHeadConfig(bert, labels=3))


def test_a_long_gradient_is_clipped_and_matrices_alone_decay(tmp_path):
    run = Run(plain(), Sums(), Recipe(steps=1, clip=1e-3, warmup=0, weight_decay=0.5, bfloat16=False), tmp_path)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item())
    )
    (row,) = [row for _, row in train(run)]
    assert row["gradient_norm"] > 1e-2 and seen == [pytest.approx(1e-3, rel=1e-3)]
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, value in run.model.named_parameters():
        assert decays[id(value)] == (0.5 if value.dim() > 1 else 0.0)
        assert not torch.equal(value, before[name]) or not value.grad


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_from_before_are_no_part_of_a_step(tmp_path, frozen):
    clean, run = made(tmp_path / "a"), made(tmp_path / "b")
    if frozen:
        clean.model.bert.embedding.requires_grad_(False)
        run.model.loss(**run.task.batch(5)).backward()
        run.model.bert.embedding.requires_grad_(False)
        clean, run = (Run(one.model, one.task, RECIPE, one.folder) for one in (clean, run))
    else:
        run.model.loss(**run.task.batch(5)).backward()
    assert clean.step()["gradient_norm"] == run.step()["gradient_norm"]


def test_a_step_that_failed_leaves_nothing_behind(tmp_path):
    recipe = dataclasses.replace(RECIPE, accumulate=2)
    clean, run = made(tmp_path / "a", recipe), made(tmp_path / "b", recipe)
    batch, run.task.batch = run.task.batch, lambda index: batch(index) if index == 0 else {}
    with pytest.raises(StopIteration):
        run.step()
    run.task.batch = batch
    assert clean.step()["gradient_norm"] == run.step()["gradient_norm"]


def test_what_is_trained_is_part_of_a_run(tmp_path):
    list(train(made(tmp_path)))
    files = contents(tmp_path)
    model = made(tmp_path / "new").model
    model.bert.embedding.requires_grad_(False)
    with pytest.raises(CheckpointError, match="embedding.token_weight is float32 .here float32, frozen."):
        Run(model, Sums(), RECIPE, tmp_path)
    with pytest.raises(CheckpointError, match="is float32 .here bfloat16.*and [0-9]+ more"):
        Run(made(tmp_path / "new").model.bfloat16(), Sums(), RECIPE, tmp_path)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of this BertForSequenceClassification's parameters is trained"):
        Run(model, Sums(), RECIPE, tmp_path / "new")
    assert contents(tmp_path) == files


@pytest.mark.parametrize("value", [torch.tensor(0.5), pytest.param("numpy", id="numpy")])
def test_measures_are_kept_as_numbers(tmp_path, value):
    value = pytest.importorskip("numpy").float64(0.5) if isinstance(value, str) else value
    task = Sums()
    task.evaluate = lambda model: {"accuracy": value}
    list(train(made(tmp_path, task=task)))
    assert made(tmp_path).rows[-1]["accuracy"] == 0.5


def test_a_measure_overwrites_no_column(tmp_path):
    task = Sums()
    task.evaluate = lambda model: {"loss": 9.0}
    with pytest.raises(ValueError, match="loss: no measure may be called as a column"):
        list(train(made(tmp_path, task=task)))


def test_settings_that_a_checkpoint_could_not_hold(tmp_path):
    for wrong in ({"data": tmp_path}, {"data": [1, {"a": tmp_path}]}, {"data": pytest}):
        with pytest.raises(TypeError, match="settings.data.* must be of numbers and strings, got "):
            made(tmp_path, settings=wrong)
    settings = {"a": None, "b": [1, "c"], "d": {"e": 0.5}}
    list(train(made(tmp_path, settings=settings)))
    assert made(tmp_path, settings=settings).done


def test_a_checkpoint_without_weights_in_its_identity_goes_on(tmp_path):
    """As versions before wrote it."""
    list(train(made(tmp_path)))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["identity"]["weights"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert made(tmp_path).done


def test_another_runs_folder_is_left_alone(tmp_path):
    list(train(made(tmp_path, settings={"batch": 8})))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    settings = {"batch": 8, "name": "sums"}
    for different, make in (
        (r"recipe\.steps is 12 \(here 13\), recipe\.seed is 0 \(here 5\)",
         lambda: made(tmp_path, dataclasses.replace(RECIPE, steps=13, seed=5), settings={"batch": 8})),
        (r"config\.bert\.layers is 2 \(here 1\), config\.bert\.dropout is 0\.1 \(here 0\.0\)",
         lambda: Run(plain(), Sums(), RECIPE, tmp_path, settings={"batch": 8})),
        (r"backend is auto \(here reference\)", lambda: made(tmp_path, backend="reference", settings={"batch": 8})),
        (r"settings\.name is None \(here sums\)", lambda: made(tmp_path, settings=settings)),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"is of another run, whose {different}: choose"):
            make()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_truncated_checkpoint_is_refused(tmp_path):
    list(train(made(tmp_path)))
    path = tmp_path / "checkpoint.pt"
    data = path.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            made(tmp_path)
        assert path.read_bytes() == data[:size]


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"identity": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        made(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = made(tmp_path)
    with torch.no_grad():
        run.model.classifier.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 0: the loss is nan"):
        run.step()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_trained_again(tmp_path):
    list(train(made(tmp_path)))
    again = made(tmp_path)
    assert again.done and list(train(again)) == []
    assert again.evaluate() == measures(again.rows[-1])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"interval": 0}, {"accumulate": 0}, {"warmup": -1},
                                   {"learning_rate": 0.0}, {"clip": float("nan")}, {"weight_decay": -0.1},
                                   {"seed": -1}, {"seed": 2**40}, {"learning_rate": float("inf")},
                                   {"steps": 2.5}, {"learning_rate": "1e-3"}, {"seed": 1.5},
                                   {"accumulate": True}])  # fmt: skip
def test_a_recipe_that_is_none(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Recipe(**{"steps": 1} | wrong)


def test_training_leaves_the_kernels_nowhere(tmp_path):
    run = made(tmp_path)
    with fasttx.strict():
        run.step()
        run.evaluate()
