"""The pages that people read first: their code runs, their figures are the reports', and nothing public is missing."""

from __future__ import annotations

import re
from ast import literal_eval
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sam_fast

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="runs from a checkout")


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page, each a list of rows by column; figures without their intervals, names without stars."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip(" *") for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        cut = [[re.sub(r" \(.*\)$", "", cell) for cell in row] for row in rows]
        found.append([dict(zip(header, row, strict=True)) for row in cut])
    return found


def page(name: str) -> str:
    return (DOCS / name).read_text()


def test_the_code_of_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page("start.md"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "start.md", "exec"), names)
    assert len(re.findall(r"loss \d\.\d+, sharpness -?\d\.\d+\n", capsys.readouterr().out)) == 8


class Observed(nn.Module):
    """A layer with the buffers of quantisation-aware training, and one of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("min_val", "max_val", "scale", "zero_point", "ema"):
            self.register_buffer(name, torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


def names_of_a_reader() -> dict[str, Any]:
    """What a page takes for granted. ``loss_fn`` serves a loop, ``loss_fn(model(x), y)``, and a TrainStep."""

    def loss_fn(first: Any, *rest: Tensor) -> Tensor:
        return cross_entropy(first(rest[0]), rest[1]) if isinstance(first, nn.Module) else cross_entropy(first, *rest)

    def closure() -> Tensor:
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    first = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 64))
    model = nn.Sequential(first, nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    model.add_module("observer", Observed())
    x, y = torch.randn(16, 20), torch.randint(0, 2, (16,))
    given = {"loss_fn": loss_fn, "closure": closure, "model": model, "params": list(model.parameters()), "x": x, "y": y}
    given |= {"loader": [(x, y)] * 4, "epochs": 1, "steps": 8, "step": 3, "writer": MagicMock(), "run": MagicMock()}
    names = {name: getattr(sam_fast, name) for name in sam_fast.__all__}
    return {**names, "torch": torch, **given, "optimizer": sam_fast.SAM(model.parameters(), rho=0.05, lr=0.1)}


PAGES = {
    "../README.md": 1,
    "differences.md": 1,
    "distributed.md": 1,
    "guide.md": 6,
    "mixed_precision.md": 3,
    "sharpness.md": 2,
}


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name: str) -> None:
    names = names_of_a_reader()
    blocks = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    assert len(blocks) == PAGES[name]
    for block in blocks:
        optimizer = names["optimizer"]
        if "second_pass" in block and "first_step" not in block:
            names["closure"]()
            optimizer.first_step(zero_grad=True)
        block = block.replace('"cuda"', '"cpu"').replace("GradScaler()", 'GradScaler("cpu")')
        exec(compile(block, name, "exec"), names)
        assert not optimizer.perturbed
        made = names["step"]
        if isinstance(made, sam_fast.TrainStep):
            assert made(names["x"], names["y"]).loss.isfinite()


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "bench/README.md", "examples/fashion_mnist/README.md"])
def test_links_of_pages_that_are_not_in_the_site_lead_somewhere(name: str) -> None:
    """Those of the others are checked by `make docs`."""
    here = DOCS.parent / name
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", here.read_text()):
        target, _, anchor = link.partition("#")
        path = here.parent / target if target else here
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_everything_public_is_on_the_page_of_the_api() -> None:
    listed = set(re.findall(r"^::: sam_fast\.(\w+)$", page("api.md"), re.MULTILINE))
    assert set(sam_fast.__all__) <= listed


def test_every_method_of_sam_is_on_the_page_of_the_api() -> None:
    listed = re.findall(r"^        - (\w+)$", page("api.md"), re.MULTILINE)
    classes = [c for c in sam_fast.SAM.__mro__ if c.__module__.startswith("sam_fast.")]
    public = {name for c in classes for name in vars(c) if not name.startswith("_")}
    with_words = {
        name for name in public if getattr(sam_fast.SAM, name).__doc__ and name not in ("state", "param_groups")
    }
    assert set(listed) == with_words - {"grad_scale", "found_inf"}


def test_the_costs_of_variants_are_those_of_the_report() -> None:
    (quoted,) = [table for table in tables(page("cost.md")) if "passes" in table[0]]
    assert len(quoted) >= 5
    for task, accuracy, time in (("A", "accuracy on A", "time on A"), ("B", "accuracy on B", "time on B")):
        section = page("quality.md").split(f"\n## Task {task}\n")[1].split("\n## ")[0]
        rows = {row["contender"]: row for table in tables(section) for row in table}
        for row in quoted:
            measured = rows[row["contender"]]
            assert (row["passes"], row[accuracy], row[time]) == (
                measured["cost"],
                measured["accuracy, %"],
                measured["time"],
            )


def test_which_rho_is_what_the_tuning_chose() -> None:
    text = " ".join(page("guide.md").split())
    chosen = {}
    for task in "AB":
        section = page("quality.md").split(f"\n## Task {task}\n")[1].split("\n## ")[0]
        for row in (row for table in tables(section) for row in table):
            chosen[task, row["contender"]] = [float(value) for value in row["lr / decay / rho"].split("/")]
    assert all(chosen[task, "SAM"][0] == chosen[task, "SGD"][0] / 2 for task in "AB")
    assert "SAM did best there with half of SGD's" in text

    def times(words: str) -> set[float]:
        rhos = {key: values[2] for key, values in chosen.items() if words in key[1] and "previous" not in key[1]}
        return {round(rho / chosen[task, "SAM"][2], 6) for (task, _), rho in rhos.items()}

    for words in ("of the steps", "every", "first pass on 1/4 of the batch", "first pass on 1/8"):
        assert times(words) <= {2.0, 4.0}, words
    assert "| a schedule, or `ascent` of a quarter and less | two to four did best" in text
    assert times("normalization layers only") - {8.0} == {4.0}
    assert "| normalization layers only | four to eight did best there" in text


def test_what_the_guide_names_for_quantisation_is_all_that_moves() -> None:
    fake_quantize = pytest.importorskip("torch.ao.quantization").FusedMovingAvgObsFakeQuantize()
    (names,) = re.findall(r'extra_buffers=(\("min_val",.*\))\)\n', page("guide.md"))
    fake_quantize(torch.linspace(0, 1, 9))
    before = {name: buffer.clone() for name, buffer in fake_quantize.named_buffers()}
    with sam_fast.frozen_running_stats(fake_quantize, extra_buffers=literal_eval(names)):
        fake_quantize(torch.linspace(-100, 1, 9))
        assert not torch.equal(fake_quantize.zero_point, before["zero_point"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in fake_quantize.named_buffers())


def test_frameworks_are_tested_with_the_versions_that_the_page_names() -> None:
    root = DOCS.parent
    pinned = (root / "tests/integrations/requirements.txt").read_text() + (root / "constraints.txt").read_text()
    installed = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==([\d.]+)$", pinned, re.MULTILINE))
    table = next(table for table in tables(page("integrations.md")) if "tested with" in table[0])
    named = [entry.split() for row in table for entry in row["tested with"].replace("PyTorch", "torch").split(", ")]
    assert len(named) > 15
    for name, version in named:
        assert f"{installed[name]}.".startswith(f"{version}."), name


def benchmarks() -> list[str]:
    """What docs/benchmarks.md says of the run in the README, and of each other one."""
    return page("benchmarks.md").split("\n## Another run: ")


def test_the_figures_in_the_text_about_costs_are_those_of_the_reports() -> None:
    text = " ".join(page("cost.md").split())
    rows = {task: {} for task in "AB"}
    for task, row_of in rows.items():
        section = page("quality.md").split(f"\n## Task {task}\n")[1].split("\n## ")[0]
        row_of |= {row["contender"]: row for table in tables(section) for row in table}

    def both(contender: str, column: str) -> list[float]:
        return [float(rows[task][contender][column].rstrip(" %")) for task in rows]

    longer = both("SGD, twice the epochs", "gain, points")
    assert "it lost {:.1f} points on A and {:.1f} on B".format(*(-gain for gain in longer)) in text
    norms = both("normalization layers only", "R")
    assert "kept {:.0f} % on A and {:.0f} % on B".format(*(100 * r for r in norms)) in text
    assert "took {:.2f} and {:.2f} times SGD's time".format(*both("normalization layers only", "time")) in text
    assert "({:.2f} and {:.2f} times its gain)".format(*both("Friendly-SAM", "R")) in text
    assert "kept {:.0f} % on A and half on B".format(100 * both("first pass on 1/4 of the batch", "R")[0]) in text
    assert "kept {:.0f} % on A and {:.0f} % on B".format(*(100 * r for r in both("every 4th step", "R"))) in text
    cheapest = "first pass on 1/4, the last quarter of the steps"
    time = sum(both(cheapest, "time")) / 2
    assert f"{both(cheapest, 'cost')[0]:.2f} times SGD's passes, here {time:.2f} times its time" in text

    measured, intel, two_threads = benchmarks()
    (memory,) = [row for table in tables(measured) for row in table if row.get("case") == "8 linear layers of 2048"]
    quoted = "{:.2f} of SGD's; the reference needs {:.2f}.".format(
        *map(float, (memory["sam_fast"], memory["reference"]))
    )
    assert quoted in text

    def steps(part: str, base: str) -> list[dict[str, str]]:
        rows = tables(part.split(f"**optimizer step, {base}**")[1])[0]
        return [row for row in rows if "tensors" not in row["case"] and "," not in row["case"]]

    for part, said in (
        (measured, "together {:.1f} to {:.1f} times as fast"),
        (two_threads, "with two threads {:.1f} to {:.1f}"),
        (intel, "on an Intel Xeon {:.1f} to {:.1f}"),
    ):
        faster = [float(row["reference"]) for row in steps(part, "SGD")]
        assert said.format(min(faster), max(faster)) in text
    shares = [
        int(row["of the measured bandwidth"].rstrip(" %"))
        for base in ("SGD", "AdamW")
        for row in steps(measured, base)
        if row["GB/s"]
    ]
    assert f"{min(shares)} to {max(shares)} % of the memory bandwidth" in text
    iterations = [float(row["sam_fast"]) for row in tables(measured.split("**training iteration**")[1])[0]]
    least_and_most = dict.fromkeys(f"{2 * each:.2f}" for each in (min(iterations), max(iterations)))
    assert f"That is {' to '.join(least_and_most)} SGD steps" in text


def test_what_flatten_costs_is_what_the_report_has() -> None:
    text, measured = " ".join(page("speed.md").split()), benchmarks()[0]
    step = measured.split("**optimizer step, SGD**")[1].split("\n\n**")[0]
    usual, flat = re.findall(r"^\| resnet18(?:, flatten)? \| ([\d.]+) ms", step, re.MULTILINE)
    assert 0.96 <= float(flat) / float(usual) <= 1.04
    assert "as long to within 4 %" in text
    host = tables(measured.split("**second_step, host time, in a loop**")[1])[0]
    of = {row["case"]: float(row["sam_fast"].split()[0]) for row in host}
    assert f"161 tiny tensors {of['161 x 8, flatten'] / of['161 x 8']:.1f} times as long" in text
    memory = tables(measured.split("**peak memory**")[1])[0][0]
    flat, usual = (f"{float(memory[name]):.2f}" for name in ("sam_fast, flatten", "sam_fast"))
    assert f"a peak of {flat} of SGD's memory instead of {usual}" in text


def test_the_numbers_of_parameters_in_a_launch_are_those_that_are_tested() -> None:
    text = (Path(__file__).parent / "cuda_emulation" / "test_launches.py").read_text()
    plain, medium, small = re.findall(r"^\w*TENSORS = (\d+)$", text, re.M)
    (sgd, small_sgd), (adam, small_adam) = re.findall(r", (\d+), (\d+)\)", re.search(r"^FUSED = .*$", text, re.M)[0])
    gpu = " ".join(page("gpu.md").split())
    assert gpu.count(f"for up to {plain} parameters") == 2
    assert f"for up to {sgd} parameters with SGD, {adam} with Adam" in gpu
    assert f"up to {small} parameters (in the second step {small_sgd} with SGD, {small_adam} with Adam)" in gpu
    assert f"for up to {medium}, else" in gpu


def test_the_price_of_an_iteration_is_that_of_the_report() -> None:
    quoted = re.findall(r"^\| ([^|]*, batch \d+) \| ([^|]+) \| ([\d.]+) \|$", page("cost.md"), re.MULTILINE)
    assert len(quoted) >= 4
    # other tables have the same networks
    table = benchmarks()[0].split("**training iteration**\n\n")[1].split("\n\n")[0]
    for network, own, reference in quoted:
        rows = re.findall(rf"^\| {re.escape(network)} +\|.*$", table, re.MULTILINE)
        assert [row for row in rows if f"| {own} " in row and f"| {reference} (" in row], network
