"""The benchmarks: that every bar is there, how bars are compared, what is not printed, and under which allocator."""

import dataclasses
import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from budget import DTYPES
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import allocators, machine, report, row, rows
from benchmarks.case import Case, Growth, NotMeasured, Work, op_work, touch
from fasttx import measure
from fasttx.dispatch import extension
from fasttx.measure import Verdict

F32, BF16 = "float32", "bfloat16"
ATTENTION = "attention {} {} ({},64)"
FEED_FORWARD = "feed_forward {} ({},768,3072)"
BERT = "bert 62 % valid, against {} ({})"


def transcribed():
    """The bars as the project sets them, as a table: row -> float32, bfloat16."""
    wanted = {}
    for kind, shape, fwd, bwd in (
        ("full", "8,12,128", (1.5, 2.0), (1.4, 2.2)),
        ("full", "2,12,512", (1.1, 1.6), (1.1, 1.4)),
        ("full", "1,12,2048", (1.1, 1.5), (1.1, 1.2)),
        ("causal", "2,12,512", (2.0, 2.8), (2.1, 2.6)),
        ("causal", "1,12,2048", (1.3, 1.8), (1.3, 1.5)),
        ("half padded", "2,12,512", (2.1, 3.0), (2.1, 2.6)),
        ("dropout", "2,12,512", None, (2.3, 3.2)),
    ):
        wanted[ATTENTION.format(kind, "fwd", shape)] = fwd
        wanted[ATTENTION.format(kind, "fwd+bwd", shape)] = bwd
    wanted["attention decode fwd (8,12,1x1024,64)"] = (1.8, 6)
    wanted["layer_norm fwd (64,768)"] = (1.2, 1.5)
    wanted["layer_norm fwd (16384,768)"] = (1.6, 2.0)
    wanted["layer_norm fwd+bwd (4096,768)"] = (1.7, 2.2)
    wanted["layer_norm dropout + add fwd+bwd (4096,768)"] = (6, 6)
    wanted["gelu exact fwd+bwd (128,3072)"] = (1.6, 1.8)
    for tokens, bars in ((16, (2.5, 1.2)), (128, (1.6, 1.05)), (1024, (1.15, 1.02)), (4096, (1.15, 1.02))):
        wanted[FEED_FORWARD.format("fwd", tokens)] = bars
    for tokens, bars in ((128, (1.4, 1.1)), (1024, (1.12, 1.05))):
        wanted[FEED_FORWARD.format("fwd+bwd", tokens)] = bars
    wanted["encoder_layer eval (8,128,768)"] = (1.1, 1.05)
    wanted["encoder_layer eval (8,512,768)"] = (1.6, 1.05)
    wanted["encoder_layer 62 % valid (8,128,768)"] = (1.25, 1.25)
    wanted["encoder_layer 62 % valid (8,512,768)"] = (1.6, 1.25)
    wanted["encoder_layer train step (8,128,768)"] = (1.5, 1.4)
    wanted["encoder_layer train step (4,512,768)"] = (1.6, 1.6)
    wanted[BERT.format("eager", "8,128")] = (1.8, 1.8)
    wanted[BERT.format("eager", "4,512")] = (2.0, 1.8)
    wanted[BERT.format("OpenVINO", "8,128")] = (1.45, 1.35)
    wanted[BERT.format("OpenVINO", "4,512")] = (1.7, 1.5)
    layers = ("EncoderLayer", "Encoder", "DecoderLayer", "Decoder")
    called = (
        "layer_norm", "add_layer_norm", "softmax", "gelu", "gelu tanh", "linear", "feed_forward", "attention",
        "nn.LayerNorm", "nn.GELU", "nn.MultiheadAttention", "nn.MultiheadAttention, weights",
        *(f"nn.Transformer{layer}" for layer in layers),
    )  # fmt: skip
    overheads = {
        f"overhead {name} {mode} (1,16,64) {F32}": 1.0
        for name in called
        for mode in ("eval", "train fwd", "train fwd+bwd")
    }
    wanted["padding train step, 62 % valid (8,128,768)"] = (1.35, 1.35)
    wanted["padding train step, 62 % valid (8,512,768)"] = (1.35, 1.35)
    generation = {f"gpt2 generate, 256 tokens, against eager (1,16) {F32}": 1.3}
    return _by_dtype(wanted) | overheads | generation


def rooflines():
    wanted = {FEED_FORWARD.format("fwd", tokens): (0.88, 0.80) for tokens in (128, 1024, 4096)}
    wanted[ATTENTION.format("full", "fwd", "1,12,2048")] = (0.70, 0.55)
    wanted["layer_norm fwd (65536,768)"] = (0.85, 0.85)
    wanted["attention decode fwd (8,12,1x1024,64)"] = (0.70, 0.70)
    return _by_dtype(wanted)


def _by_dtype(wanted):
    return {
        f"{name} {dtype}": bar
        for name, bars in wanted.items()
        if bars is not None
        for dtype, bar in zip((F32, BF16), bars, strict=True)
    }


def barred(kind, field):
    """What the rows hold: a list, so that a bar that is there twice shows."""
    found = [
        (f"{case.op} {case.name} {case.shape} {str(case.dtype)[6:]}", getattr(case, field))
        for case in rows.select()
        if isinstance(case, kind) and getattr(case, field) is not None
    ]
    return sorted(found)


def test_every_bar_is_there_once():
    assert barred(Case, "bar") == sorted(transcribed().items())


def test_every_roofline_is_there_once():
    assert barred(Case, "roofline") == sorted(rooflines().items())
    limits = {case.op + " " + case.name: case.limit for case in rows.select() if isinstance(case, Case)}
    assert limits["layer_norm fwd"] == "copy" and limits["attention decode fwd"] == "read"
    assert limits["feed_forward fwd"] == limits["attention full fwd"] == "flops"


def test_growth_has_bars():
    found = barred(Growth, "bar")
    assert [name for name, _ in found if "memory" in name] == [
        *(f"attention memory {way} (1,12,16384,64) {dtype}" for way in ("fwd", "fwd+bwd") for dtype in (BF16, F32)),
        *(f"cross_entropy memory fwd+bwd (8192,64,32768) {dtype}" for dtype in (BF16, F32)),
    ]
    assert all(bar == 64 for name, bar in found if "memory" in name)
    flat = [name for name, _ in found if "time per token" in name]
    assert len(flat) == 4 and all("1024 to 65536 tokens" in name for name in flat)


def test_rows_are_distinct_and_can_be_selected():
    ids = [case.id for case in rows.select()]
    assert len(set(ids)) == len(ids)
    chosen = rows.select(["gelu", "attention"], [BF16], ["causal", "exact fwd+bwd"])
    assert {case.op for case in chosen} == {"gelu", "attention"}
    assert all(case.dtype == torch.bfloat16 for case in chosen) and len(chosen) == 5
    assert {case.op for case in rows.select()} == set(rows.STEMS)


# A machine of round numbers.
MACHINE = machine.Machine({torch.float32: 1e9}, {torch.float32: "scalar"}, copy=1e9, read=1e9)


def case_of(work, **options):
    options = {"flops": 1e6, "bytes": 1e3, "bar": 1.5, **options}
    return Case("op", "fwd", "(3)", torch.float32, lambda: work, **options)


def judged(error):
    return lambda: Verdict(error=error, eager_error=0.5, budget=1.0)


class Clock:
    """Stands for `time`: its time passes in calls of `wait`, and a little at each look, however busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-5
        return self.now

    def wait(self, seconds):
        """A call of that length."""
        def call():
            self.now += seconds

        return call


@pytest.fixture
def wait(monkeypatch):
    """wait(seconds): a call that takes as long, by the clock that times it."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock.wait


def run(case, seconds=0.0):
    def rounds(target, count):
        for _ in range(count):
            target()

    return row.identity(case) | row.measure(case, MACHINE, seconds, rounds)


def printed(reports):
    console = Console(width=250)
    with console.capture() as capture:
        command.show(console, reports)
    return capture.get()


def report_of(*measured):
    limits = {"peak": {F32: {"flops_per_second": 1e9, "isa": "scalar"}}}
    limits |= dict.fromkeys(("copy_bytes_per_second", "read_bytes_per_second"), 1e9)
    return {"allocator": "here", "about": ["a machine"], "machine": limits, "rows": list(measured)}


def test_the_fastest_rival_counts(wait):
    work = Work({"slow": wait(3e-3), "fast": wait(2e-3), "hopeless": wait(2e-2)}, wait(1e-3), judged(0.5))
    found = run(case_of(work))
    assert found["rival"] == "fast" and set(found["times"]) == {"fast", "fasttx"}
    assert found["ratio"]["value"] == pytest.approx(2, rel=0.02) and found["ratio"]["bar"] == 1.5
    # A million FLOP take a millisecond at a GFLOP/s.
    assert found["roofline"]["value"] == pytest.approx(1, rel=0.02) and found["roofline"]["bar"] is None
    assert row.passed(found)


def test_a_row_over_budget_has_no_speed():
    ran = []
    work = Work({"rival": lambda: ran.append("rival")}, lambda: ran.append("fasttx"), judged(1.01))
    found = run(case_of(work))
    assert not ran and not row.passed(found)
    assert not {"times", "ratio", "roofline"} & set(found)
    text = printed({"default": report_of(found)})
    assert "over budget: no speed" in text and "1.0e+00" in text
    assert "[" not in next(line for line in text.splitlines() if "over budget" in line)
    assert report.outcomes({"default": report_of(found)}) == []


def test_an_error_over_budget_is_found_in_a_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, slope):
            return slope

    work = op_work({"x": torch.randn(5)}, {"exp": torch.exp}, lambda x: Wrong.apply(x), torch.exp, backward=True)
    assert not work.judge().passed
    right = op_work({"x": torch.randn(5)}, {"exp": torch.exp}, torch.exp, torch.exp, backward=True)
    assert right.judge().passed


@pytest.mark.parametrize("limit", ["flops", "copy", "read"])
def test_a_roofline_is_timed_beside_the_row(limit, monkeypatch, wait):
    beside = machine.Limit(wait(1e-3), 2e6)
    monkeypatch.setattr(machine.Machine, "limit", lambda self, case: beside)
    work = Work({"rival": wait(1e-3)}, wait(2e-3), judged(0.0))
    found = run(case_of(work, flops=2e6, bytes=2e6, roofline=0.4, limit=limit))["roofline"]
    assert found["value"] == pytest.approx(0.5, rel=0.02)
    assert (found["bar"], found["limit"]) == (0.4, limit) and report.met(found)


def test_weights_count_as_changed_before_every_backward():
    versions = []

    def op(x, weight):
        versions.append(weight._version)
        return x * weight

    inputs = {"x": torch.ones(3), "weight": torch.ones(3)}
    work = op_work(inputs, {"op": op}, op, op, backward=True, weights=("weight",))
    versions.clear()
    work.fasttx(), work.fasttx()
    assert versions[1] > versions[0]
    tensor = torch.randn(4, 3)
    before = tensor.clone()
    touch(tensor)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    "value, at_least, expected",
    [(1.5, True, True), (1.49, True, False), (1.5, False, True), (1.51, False, False), (9.0, True, True)],
)
def test_a_bar_is_met_by_the_value(value, at_least, expected):
    assert report.met({"value": value, "low": 0.0, "high": 10.0, "bar": 1.5}, at_least) is expected


def measured(ratio, share=0.5, roofline=None):
    interval = {"low": ratio - 0.1, "high": ratio + 0.1}
    found = row.identity(case_of(None))
    return found | {
        "error": {"value": 0.5, "eager": 0.5, "budget": 1.0, "passed": True, "misplaced": None},
        "times": {name: {"value": 1.0, "low": 1.0, "high": 1.0} for name in ("theirs", "fasttx")},
        "rival": "theirs",
        "ratio": {"value": ratio, "bar": 1.5, **interval},
        "roofline": {"value": share, "low": share, "high": share, "bar": roofline, "limit": "flops"},
    }


def test_bars_are_held_against_tcmalloc_where_it_was_measured():
    default, tcmalloc = report_of(measured(1.6, 0.9, 0.8)), report_of(measured(1.4, 0.7, 0.8))
    name = measured(1.0)["id"]
    assert report.outcomes({"default": default}) == [(f"{name} ratio", True), (f"{name} roofline", True)]
    both = {"default": default, "tcmalloc": tcmalloc}
    assert report.outcomes(both) == [(f"{name} ratio", False), (f"{name} roofline", False)]
    text = printed(both)
    assert "1.60 [1.50, 1.70]" in text and "1.40 [1.30, 1.50]" in text and "1.50" in text and "NO" in text
    assert "0 of 2 bars met under tcmalloc" in text and "2 of 2 bars met under default" in printed({"default": default})


def test_runs_are_joined_and_shown(tmp_path, capsys):
    first, second, other = measured(1.4), measured(1.7), measured(1.6) | {"id": "other", "name": "bwd"}
    for name, lines in (("a", [first, other]), ("b", [second])):
        (tmp_path / name).write_text(json.dumps({"default": report_of(*lines)}))
    assert command.main(["--show", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    output = capsys.readouterr().out
    assert "1.70 [1.60, 1.80]" in output and "1.60 [1.50, 1.70]" in output and "1.40 [" not in output
    assert "2 of 2 bars met" in output


def test_growth_must_stay_below_its_bar():
    case = Growth("op", "memory", "(3)", torch.float32, "MiB", lambda seconds: (63.0, 62.0, 64.5), bar=64.0)
    good = run(case)
    worse = run(dataclasses.replace(case, name="more", measure=lambda seconds: (65.0, 65.0, 65.0)))
    assert [met for _, met in report.outcomes({"default": report_of(good, worse)})] == [True, False]
    text = printed({"default": report_of(good, worse)})
    assert "63.00 [62.00, 64.50] MiB" in text and "1 of 2 bars met" in text


def test_what_cannot_be_measured_says_why():
    def missing():
        raise NotMeasured("openvino is not installed")

    with pytest.raises(NotMeasured):
        run(dataclasses.replace(case_of(None), work=missing))
    found = row.identity(case_of(None)) | {"not_measured": "openvino is not installed"}
    assert row.passed(found) and "not measured: openvino is not installed" in printed({"default": report_of(found)})
    broken = row.identity(case_of(None)) | {"failed": "RuntimeError: no kernel"}
    assert not row.passed(broken) and "failed: RuntimeError: no kernel" in printed({"default": report_of(broken)})


def test_other_processes_are_noticed():
    load = machine.OtherLoad()
    time.sleep(0.05)
    assert 0.0 <= load.share() <= 1.0

    # A child's work is this process's own, before and after its end.
    before = machine.OtherLoad._now()[2]
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint('spun', flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    assert machine.OtherLoad._now()[2] - before >= 0.25
    child.communicate("\n")
    assert machine.OtherLoad._now()[2] - before >= 0.25

    calm, busy = measured(1.6) | {"others": 0.05}, measured(1.6) | {"others": 0.3}
    assert "other processes" not in printed({"default": report_of(calm)})
    assert "other processes were busy during: op-fwd" in printed({"default": report_of(busy)})


@pytest.fixture
def tcmalloc(monkeypatch):
    """A tcmalloc that is there, whatever this machine has."""
    find = {"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}.get
    monkeypatch.setattr("ctypes.util.find_library", find)


def test_tcmalloc_is_preloaded_and_the_default_is_not(tcmalloc):
    inherited = {"PATH": "/bin", "LD_PRELOAD": "libother.so:/usr/lib/libtcmalloc_minimal.so.4"}
    assert allocators.environment("default", inherited) == {"PATH": "/bin", "LD_PRELOAD": "libother.so"}
    assert allocators.environment("tcmalloc", inherited) == {
        "PATH": "/bin", "LD_PRELOAD": "libtcmalloc_minimal.so.4:libother.so",
    }  # fmt: skip
    assert allocators.environment("default", {"LD_PRELOAD": "libtcmalloc_minimal.so.4"}) == {}


@pytest.fixture
def fake_runs(monkeypatch):
    """The runs that the command starts, and what each finds."""
    started = []

    def measure(options, environment):
        started.append((options, environment.get("LD_PRELOAD", "")))
        return report_of(measured(1.4 if "tcmalloc" in started[-1][1] else 1.6))

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return started


def test_both_allocators_are_run_and_shown_and_written(tcmalloc, fake_runs, tmp_path, capsys):
    arguments = ["ops", "--allocators", "both", "--dtype", F32, "--row", "causal", "--threads", "2"]
    assert command.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert [preload for _, preload in fake_runs] == ["", "libtcmalloc_minimal.so.4"]
    options = fake_runs[0][0]
    assert options == fake_runs[1][0]
    assert {"--dtype=float32", "--row=causal", "--threads=2", "--stem=attention", "--stem=gelu"} <= set(options)
    assert "--stem=bert" not in options
    output = capsys.readouterr().out
    assert "ratio, default" in output and "ratio, tcmalloc" in output
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["default", "tcmalloc"]
    assert [found["rows"][0]["ratio"]["value"] for found in written.values()] == [1.6, 1.4]


def test_without_tcmalloc_it_says_so(fake_runs, monkeypatch, capsys):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert command.main(["--allocators", "both"]) == 0
    assert "tcmalloc: not measured: no tcmalloc here (Debian: libtcmalloc-minimal4)" in capsys.readouterr().out
    assert [preload for _, preload in fake_runs] == [""]


def test_an_error_over_budget_is_the_exit_code(fake_runs, monkeypatch):
    wrong = measured(1.0)
    wrong["error"]["passed"] = False
    monkeypatch.setattr(command, "measure", lambda options, environment: report_of(measured(1.6), wrong))
    assert command.main([]) == 1


def test_a_run_that_breaks_off_shows_what_it_has(monkeypatch, tmp_path, capsys):
    def run(command, **options):
        path = next(part for part in command if part.startswith("--rows=")).removeprefix("--rows=")
        (tmp_path / path).write_text(json.dumps(report_of(measured(1.6))))
        return subprocess.CompletedProcess(command, -6)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main([]) == 2
    output = capsys.readouterr().out
    assert "1.60 [1.50, 1.70]" in output and "current: the run ended early: exit code -6" in output
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 4))
    assert command.main([]) == 2


def test_a_row_that_one_allocator_lacks_is_shown(capsys):
    second = measured(1.7) | {"id": "other", "name": "bwd"}
    reports = {"default": report_of(measured(1.6), second), "tcmalloc": report_of(measured(1.4))}
    assert "1.70 [1.60, 1.80]" in printed(reports)
    assert report.outcomes(reports)[1] == ("other ratio", True)


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["dance"])
    assert "dance" in capsys.readouterr().err


def test_one_row_from_end_to_end(needs_extension, tmp_path, capfd, monkeypatch):
    """Through pytest-benchmark, in a process of its own: no worker of pytest-xdist, under which it measures nothing."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    path = tmp_path / "out.json"
    arguments = ["gelu", "--row", "exact fwd+bwd", "--dtype", F32, "--seconds", "0.01", "--json", str(path)]
    assert command.main(arguments) == 0
    (name, found), *others = json.loads(path.read_text()).items()
    assert name == "current" and not others
    assert set(found) == {"allocator", "about", "machine", "rows"}
    assert set(found["machine"]["peak"]) == {F32, BF16}
    assert all(peak["flops_per_second"] > 1e8 for peak in found["machine"]["peak"].values())
    (line,) = found["rows"]
    assert line["id"] == "gelu-exact_fwd+bwd-(128,3072)-float32" and line["rounds"] >= 7
    for check in (line["ratio"], line["roofline"]):
        assert check["low"] <= check["value"] <= check["high"]
    assert line["error"]["passed"] and line["error"]["value"] <= line["error"]["budget"]
    output = capfd.readouterr().out
    assert "gelu exact fwd+bwd" in output and "GFLOP/s" in output


def test_every_row_makes_its_work(needs_extension):
    """On the smallest rows: that rivals, fasttx and the judge run, and that the error is within budget."""
    words = ["layer_norm-fwd-(64", "feed_forward-fwd-(16", "attention-decode", "gelu-exact_fwd-"]
    for case in rows.select(words=words):
        work = case.work()
        for call in (*work.rivals.values(), work.fasttx):
            call()
        verdict = work.judge()
        assert verdict.passed, f"{case.id}: {verdict}"


@pytest.mark.parametrize("index, dtype", list(enumerate(DTYPES)))
def test_peak_loops_and_reads(isa, index, dtype, threads):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    out, args = torch.full((3,), torch.nan, dtype=kept), extension.Peak()
    args.items, args.steps, args.out = 3, 40, out.data_ptr()
    extension.launch_peak(isa, index, args)
    assert out.isfinite().all() and (out == out[0]).all()
    assert extension.peak_step_flops(isa, index) >= 24

    chunk = extension.read_chunk
    x = torch.randint(-8, 9, (5 * chunk + 3,)).to(dtype)  # whole numbers, whose sums are exact
    sums, args = torch.full((5,), torch.nan, dtype=kept), extension.Read()
    args.x, args.count, args.sums = x.data_ptr(), x.numel(), sums.data_ptr()
    for count in (1, 2):
        with threads(count):
            extension.launch_read(isa, index, args)
        assert torch.equal(sums.double(), x[: 5 * chunk].double().view(5, chunk).sum(1))


def test_the_machines_limits_are_of_the_row(needs_extension, monkeypatch):
    monkeypatch.setattr(machine, "interleave", partial(machine.interleave, warm_up=0.0))
    by_limit = {
        limit: MACHINE.limit(case_of(None, bytes=2**20, limit=limit)) for limit in ("flops", "copy", "read")
    }
    for limit in by_limit.values():
        limit.call()
    assert by_limit["copy"].amount == by_limit["read"].amount == 2**20 and by_limit["flops"].amount > 0
    assert MACHINE.least_seconds(case_of(None, flops=2e9, bytes=2**20)) == 2.0
    # A megabyte can be moved at between 0.1 and 1000 GB/s.
    assert 1e-6 < MACHINE.least_seconds(case_of(None, flops=0, bytes=2**20)) < 1e-2
