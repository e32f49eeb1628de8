"""The benchmarks' own arithmetic, the report, and the comparison: what readers of a figure rely on."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import cycle, repeat
from pathlib import Path

import pytest
import torch

from bench import compare, contenders, harness, report
from bench.cases import CASES
from bench.contenders import MAKERS, PEER_FOREACH, PEER_LOOP, REFERENCE, Problem, make_params, params_of
from bench.figures import figures, median
from bench.harness import PARTS, Bench, Case, Contender, nothing
from bench.optimizer import operations_of, optimizer_step
from bench.processes import import_time
from bench.records import COPY, Record, Run
from sam_fast import backends

ROOT = Path(__file__).parent.parent
MACHINE = {
    "device": "d",
    "threads": "2",
    "instruction set": "avx2",
    "torch": "t",
    "date": "2026-01-01T00:00",
    "commit": "c" * 40,
}


CASE = Case(nothing, "g", "c")


def run_with(slower: float = 1.0, seed: int = 0, noise: float = 0.05, machine: float = 1.0) -> Run:
    """A run on a machine whose speed varies by half, for all contenders of a round alike, and with noisy timings."""
    draw = random.Random(seed)

    def rounds(*seconds: float) -> list[list[float]]:
        wobble = [machine * draw.uniform(1, 1.5) for _ in range(21)]
        return [[s * w * draw.uniform(1, 1 + noise) for w in wobble] for s in seconds]

    ours, reference, copy = rounds(1e-3 * slower, 4e-3, 5e-4)
    step = Record(
        "first_step, SGD", "resnet50", "sam_fast", {"sam_fast": ours, REFERENCE: reference}, 1000, 20_000, copy, 20_000
    )
    other, reference = rounds(2e-3, 4e-3)
    return Run(
        MACHINE,
        [step, Record("optimizer step, SGD", "resnet50", "sam_fast", {"sam_fast": other, REFERENCE: reference}, 1000)],
    )


def test_the_median_s_interval_is_the_textbook_s():
    found = median([float(i) for i in range(1, 12)])
    assert (found.value, found.low, found.high) == (6.0, 2.0, 10.0)  # n = 11: the 2nd to the 10th, 98.8 %
    assert (median([3.0]).low, median([3.0]).high) == (3.0, 3.0)


def test_ratios_are_taken_within_a_round():
    record = Record("g", "c", "a", {"a": [1.0, 10.0, 2.0], "b": [3.0, 30.0, 6.0]}, 10, 40, [1.0, 10.0, 2.0], 80)
    a, b = figures(Run({}, [record]), lambda record: record.target).to_dict("records")
    assert (a["seconds"], a["rate"], a["share"]) == (2.0, 20.0, 0.5)
    assert (b["seconds"], b["ratio"], b["low"], b["high"]) == (6.0, 3.0, 3.0, 3.0)


def test_a_planted_slowdown_of_a_quarter_is_a_regression_and_nothing_else_is(tmp_path, capsys):
    for name, run in (
        ("base", run_with()),
        ("head", run_with(1.25, seed=1, machine=1.3)),
        ("same", run_with(seed=2, machine=0.7)),
    ):
        run.save(tmp_path / f"{name}.json")
    base, head, same = (str(tmp_path / f"{name}.json") for name in ("base", "head", "same"))
    assert compare.main(["--base", base, "--head", same]) == 0
    capsys.readouterr()
    assert compare.main(["--base", base, "--head", head]) == 1
    blamed = [line for line in capsys.readouterr().out.splitlines() if "REGRESSION" in line]
    assert len(blamed) == 1
    assert blamed[0].startswith("first_step, SGD | resnet50")
    assert compare.main(["--base", head, "--head", base]) == 0  # faster is no regression
    assert compare.main(["--base", base, same, "--head", head, head]) == 1
    apart = compare.apart(Run.load(Path(base)), Run.load(Path(same)))
    assert list(apart.index) == ["first_step, SGD, resnet50", "optimizer step, SGD, resnet50"]
    assert 0 < apart.min() <= apart.max() < 0.1


def test_noise_alone_is_no_regression():
    found = compare.changes([run_with(noise=1.0)], [run_with(noise=1.0, seed=1)])
    assert len(found) == 2
    assert compare.REGRESSION not in set(found["verdict"])


def test_a_run_is_saved_and_loaded_unchanged(tmp_path):
    run = run_with()
    run.save(tmp_path / "a.json")
    again = Run.load(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert again.records[0].rounds["sam_fast"] == pytest.approx(run.records[0].rounds["sam_fast"], rel=1e-3)


@pytest.mark.parametrize("mistake", ["first_step", "second_step"])
def test_a_wrong_result_is_not_timed(mistake):
    problem = Problem(make_params([[300, 7], [11], []]), torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9})
    optimizer = contenders.make("sam_fast", problem)
    problem.check("right", contenders.make("sam_fast", problem))
    original = getattr(optimizer, mistake)

    def wrong() -> None:
        original()
        with torch.no_grad():
            params_of(optimizer)[0][299, 6] *= 1 + 3e-6  # the last element, 25 units in the last place

    setattr(optimizer, mistake, wrong)
    with pytest.raises(AssertionError, match="is wrong, so it is not timed"):
        problem.check("wrong", optimizer)


@pytest.mark.parametrize("adaptive", [False, True], ids=["", "adaptive"])
@pytest.mark.parametrize("name", [name for name in MAKERS if "compile" not in name])
def test_every_baseline_makes_sam_s_step(name, adaptive):
    if name in (PEER_LOOP, PEER_FOREACH):
        pytest.importorskip("pytorch_optimizer")
    problem = Problem(make_params([[30, 7], [11], [64]]), torch.optim.AdamW, {"lr": 1e-4}, rho=0.5, adaptive=adaptive)
    problem.check(name, contenders.make(name, problem))


def record_at(share: float, group: str) -> Record:
    """Whose target moves bytes at this share of the copy's bandwidth."""
    return Record(
        group,
        "resnet50",
        "cuda",
        {"cuda": [1.0 / share] * 9, "torch copy_": [0.01] * 9},
        1,
        100,
        [1.0] * 9,
        100,
    )


def test_what_is_faster_than_a_copy_is_an_error():
    wrong = [record_at(1.11, "second_step, SGD"), record_at(1.4, "first_step, SGD")]
    right = [record_at(1.09, "second_step, AdamW"), record_at(1.4, "grad_norm, operation")]
    assert "cuda at 111 % of the copy's bandwidth" in harness.error_in(wrong[0])
    assert harness.error_in(wrong[1])
    assert not any(map(harness.error_in, right))


def test_a_benchmark_with_a_figure_that_cannot_be_right_fails_and_is_not_kept():
    bench = Bench("rehearsal")
    bench.smoke = False
    moved = 1600 * bench.copied  # in next to no time
    with pytest.raises(
        AssertionError, match=r"perturb, operation \| big: invalid, an error in the measurement: sam_fast at"
    ):
        bench.run(
            Case(nothing, "operation", "big"),
            {"sam_fast": Contender({"perturb": nothing})},
            1,
            bytes_moved={"perturb": moved},
        )
    assert bench.records == []
    assert bench.left_out[0].startswith("perturb, operation | big: invalid")
    reads = {"sam_fast": Contender({"grad_norm": nothing})}
    bench.run(Case(nothing, "operation", "big"), reads, 1, bytes_moved={"grad_norm": moved})
    assert len(bench.records) == 1


def test_a_cpu_s_cache_may_be_faster_than_a_copy():
    bench = Bench()
    bench.cache_bytes, bench.copied = 0, 1 << 20
    writes = {"sam_fast": Contender({"perturb": nothing})}
    case = Case(nothing, "operation", "big", seconds=0.0)
    (record,) = bench.run(case, writes, 1, bytes_moved={"perturb": 1600 * bench.copied})
    assert harness.error_in(record)
    assert bench.left_out == []


def test_the_figures_of_a_smoke_run_are_no_errors():
    bench = Bench("rehearsal")
    writes = {"sam_fast": Contender({"perturb": nothing})}
    (record,) = bench.run(Case(nothing, "operation", "big"), writes, 1, bytes_moved={"perturb": 1600 * bench.copied})
    assert harness.error_in(record)
    assert bench.left_out == []


def test_the_import_is_timed_with_its_byte_code_on_disk(monkeypatch):
    seen = []
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(
        subprocess, "check_output", lambda _, env=os.environ: seen.append(env["PYTHONDONTWRITEBYTECODE"]) or b"0.25"
    )
    import_time(bench := Bench(smoke=True), CASE)
    assert seen == [""] * 4
    assert bench.records[0].rounds == {"sam_fast": [0.25] * 3}


def test_what_a_gpu_s_cache_holds_has_no_bandwidth():
    bench = Bench("rehearsal")
    bench.cache_bytes = 1
    run = {"first_step": nothing, "second_step": nothing}
    records = bench.run(CASE, {"a": Contender(run)}, 1, bytes_moved={"first_step": 9, "second_step": 10}, total="all")
    assert {r.group: r.bytes_moved for r in records} == {"all, g": None, "first_step, g": None, "second_step, g": 10}
    assert COPY not in records[0].rounds


def test_what_a_cpu_s_cache_holds_has_no_bandwidth():
    record = Bench().run(CASE, {"a": Contender({"": nothing})}, 1, bytes_moved={"": 100_000})[0]
    assert (record.bytes_moved, record.copy_rounds) == (None, [])


@pytest.mark.parametrize("op", ["grad_norm", "perturb", "restore"])
def test_a_wrong_operation_is_not_timed(op, monkeypatch):
    problem = Problem(make_params([[300, 7], [11], []]), torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9})
    operations_of(problem, "torch")
    kind = type(backends.BACKENDS["torch"].bucket([torch.zeros(1)], [0]))
    original = getattr(kind, op)

    def wrong(bucket, *others, **named):
        original(bucket, *others, **named)
        if op == "grad_norm":
            others[1].mul_(1 + 1e-5)
        else:
            with torch.no_grad():
                bucket.all_params[0][299, 6] *= 1 + 3e-6

    monkeypatch.setattr(kind, op, wrong)
    with pytest.raises(AssertionError, match="so it is not timed"):
        operations_of(problem, "torch")


def test_the_interval_covers_the_median():
    """Of 2000 samples of a skewed distribution, whose median is log 2, at least 95 % (less three standard errors)."""
    draw = random.Random(0)
    found = [median([draw.expovariate(1.0) for _ in range(15)]) for _ in range(2000)]
    covered = sum(e.low <= 0.6931 <= e.high for e in found) / len(found)
    assert 0.95 - 3 * (0.95 * 0.05 / 2000) ** 0.5 < covered < 0.99


def test_the_parts_of_a_case_are_one_record_and_only_the_first_is_checked(monkeypatch):
    bench, checked = Bench(smoke=True), []
    monkeypatch.setattr(Problem, "check", lambda problem, name, optimizer, **slack: checked.append(name))
    for _ in range(PARTS):
        optimizer_step(bench, Case(optimizer_step, "SGD", "1 x 8"), ["sam_fast", REFERENCE])
    assert checked == ["sam_fast", REFERENCE]
    assert [r.group for r in bench.records] == ["optimizer step, SGD", "first_step, SGD", "second_step, SGD"]
    assert [len(r.rounds["sam_fast"]) for r in bench.records] == [3 * PARTS] * 3


def test_a_peer_that_is_not_installed_is_left_out_and_said(monkeypatch):
    bench = Bench(smoke=True)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    optimizer_step(bench, Case(optimizer_step, "SGD", "1 x 8"), ["sam_fast", PEER_LOOP])
    assert list(bench.records[0].rounds) == ["sam_fast"]
    assert bench.left_out[0].startswith(f"{PEER_LOOP}: import of pytorch_optimizer")


def test_the_faster_yardstick_of_each_round_counts_and_caches_hold_none_of_it(monkeypatch):
    """A share compares with the fastest way to stream: no kernel is measured against a slow copy."""
    bench, order = Bench(smoke=True), []
    seconds = {COPY: cycle([2.0, 1.0]), "update in place": cycle([1.0, 2.0]), "a": repeat(4.0)}
    runs = {name: lambda name=name: order.append(name) for name in seconds}
    bench.yardsticks = {name: Contender({COPY: runs[name]}) for name in (COPY, "update in place")}

    class FakeTimer(harness.Timer):
        def __call__(self, run):
            run()
            self.rounds.append(next(seconds[order[-1]]))

    monkeypatch.setattr(harness, "Timer", FakeTimer)
    moved = bench.copied // 2
    record = bench.run(CASE, {"a": Contender({"": runs["a"]})}, moved // 4, bytes_moved={"": moved})[0]
    assert record.copy_rounds == [1.0, 1.0, 1.0]
    assert record.shares("a") == [0.125] * 3
    assert all(order[i - 1] == COPY for i, name in enumerate(order) if name == "a")  # what was flushed with


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_case_has_a_name_of_its_own(kind):
    """By which its parts are put together, and its results checked once."""
    rows = [case for case in CASES if kind in case.on]
    assert len({case.id for case in rows}) == len({(case.group, case.name) for case in rows}) == len(rows) > 30


def test_targets_that_were_not_measured_say_so():
    rows = report.judged(report.ON_THE_CPU + report.ON_A_GPU, report.Result(MACHINE))
    assert len(rows) == len(report.ON_THE_CPU) + len(report.ON_A_GPU)
    assert {(row["measured"], row[""]) for row in rows} == {("", report.NOT_MEASURED)}


def test_without_results_or_marks_nothing_is_written_and_the_error_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--root", str(tmp_path)])
    assert "cpu.json: run `make bench`" in capsys.readouterr().err
    run_with().save(tmp_path / "bench" / "results" / "cpu.json")
    (tmp_path / "README.md").write_text(text := f"before\n{report.BEGIN}\nold\nafter\n")
    with pytest.raises(SystemExit):
        report.main(["--root", str(tmp_path)])
    assert f"lacks the marks {report.BEGIN}" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_the_suite_runs_and_its_run_becomes_a_report(tmp_path, monkeypatch):
    """A few cases with tiny shapes, as `make bench` runs them; then everything that bench.report makes of them."""
    saved = tmp_path / "run.json"
    select = "optimizer_step-SGD-efficientnet or (operations and float32 and not adaptive) or unperturbed"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        "--smoke",
        "-k",
        select,
    ]
    # of xdist: it disables benchmarks
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--save", str(saved)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run.load(saved)
    groups = {"optimizer step, SGD", "first_step, SGD", "second_step, SGD", "grad_norm, operation", "unperturbed step"}
    assert groups <= {r.group for r in run.records}
    assert {len(r.rounds[r.target]) for r in run.records} == {3, 6}  # three in each of two parts; operations have one
    assert run.machine["selection"] == "smoke"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results = tmp_path / "bench" / "results"
    run.save(results / "cpu.json")
    report.main(["--root", str(tmp_path)])
    assert f"| geometric mean | **{report.NOT_MEASURED}** |" in (tmp_path / "README.md").read_text()
    step = next(r for r in run.records if r.group == report.STEP)
    run.records += [replace(step, case=name) for name in contenders.MODELS if name != step.case]
    run.save(results / "cpu.json")
    run.save(results / "cpu-again.json")
    run.machine |= {"device": "an abacus", "commit": "another"}
    run.save(results / "cpu-other.json")
    report.main(["--root", str(tmp_path)])
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    first, second = page.split(f"## {report.OTHER} ")
    assert "| efficientnet_b0 " in first
    assert "| efficientnet_b0 " in second
    assert "- device: an abacus" in second
    assert second.startswith(report.where(run))
    assert re.search(r"threads? on an abacus \(commit another\), the mean of the table is [\d.]+x\.", readme)
    assert page.count(f"]({report.PICTURE})") == 1
    assert (tmp_path / "docs" / report.PICTURE).is_file()
    assert page.count(": every ratio to the reference within 15 % | 0 %, most: ") == 1
    assert page.count("### Two runs") == 1
    run.save(results / "cpu-again.json")  # of another commit
    report.main(["--root", str(tmp_path)])
    assert "### Two runs" not in (tmp_path / "docs" / "benchmarks.md").read_text()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(SystemExit):  # not into the project
        report.main([])


def test_readme_and_page_are_made_from_the_saved_results():
    """Nobody edits a figure: run `python -m bench.report` after changing results, README or the report itself."""
    cpu, gpu, others = report.results(ROOT)
    assert report.readme_table(cpu, others) in (ROOT / "README.md").read_text()
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.markdown(cpu, gpu, others)
    assert (ROOT / "docs" / report.PICTURE).is_file()
