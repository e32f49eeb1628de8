"""The demo (examples/fashion_mnist): the command on a few steps, what it refuses, and where its images come from."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from bench.quality import plan
from bench.quality.contenders import CONTENDERS
from bench.quality.report import PAGE, TITLES
from examples.fashion_mnist import __main__ as command
from examples.fashion_mnist import data
from examples.fashion_mnist.train import ROWS, train

FEW_STEPS = ["--data", "digits", "--epochs", "1", "--seeds", "0", "1"]


def test_the_command_trains_all_rows_and_saves_what_it_prints(tmp_path):
    arguments = [sys.executable, "-m", "examples.fashion_mnist", *FEW_STEPS, "--output", str(tmp_path)]
    done = subprocess.run(arguments, cwd=plan.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["seed"], run["row"]) for run in runs] == [(seed, row) for seed in (0, 1) for row in ROWS]
    assert {run["row"]: run["steps"] for run in runs} == {"sgd": 7, "sgd-2x": 14, "sam": 7, "quarter-late-quarter": 7}
    for run in runs:
        assert all(0 < run[c] < most for c, most in {"accuracy": 1, "noisy": 1, "sharpness": 10}.items())
        assert run["curve"][-1] == [run["seconds"], run["accuracy"]]
    assert "SAM, against SGD on 2 seed(s):\n  accuracy " in done.stdout
    for name, row in ROWS.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{row.title}  "))
        accuracies = [100 * run["accuracy"] for run in runs if run["row"] == name]
        assert f"  {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}  " in line


def test_interrupted_it_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    def interrupted(name, *others):
        if name == "sam":
            raise KeyboardInterrupt
        return train(name, *others)

    monkeypatch.setattr(command, "train", interrupted)
    assert command.main([*FEW_STEPS, "--output", str(tmp_path)]) == 130
    assert [run["row"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["sgd", "sgd-2x"]
    assert re.findall(r"^S[^ ]+", capsys.readouterr().out, re.MULTILINE) == ["SGD", "SGD,", "SGD,"]


def write_set(folder: Path, last: bytes = b"") -> None:
    """Two images of 2 x 2 pixels with labels 1 and 0; the test's files are gzipped."""
    folder.mkdir()
    for name in data.FILES:
        header = b"\0\0\x08\1\0\0\0\2\1\0" if "idx1" in name else b"\0\0\x08\3" + 3 * b"\0\0\0\2" + bytes(range(8))
        packed = name.startswith("t10k")
        (folder / (name + packed * ".gz")).write_bytes(gzip.compress(header + last) if packed else header + last)


REFUSED = {
    "--epochs 0": "argument --epochs: 0 is less than 1",
    "--seeds 1 100": "argument --seeds: seeds 100 to 104 chose the settings",
    "--data short": "argument --data: short: 2 training images, 256 are needed",
    "--data digits --output longer/train-images-idx3-ubyte": "argument --output:",
    "--data nowhere": "argument --data: [Errno 2] No such file",
    "--data longer": "argument --data: longer/train-images-idx3-ubyte: not an IDX file",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_bad_option_is_named_at_once(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "short")
    write_set(tmp_path / "longer", last=b"x")
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments.split())
    assert REFUSED[arguments] in capsys.readouterr().err


@pytest.mark.guarantee(id="downloads")
def test_fashion_mnist_that_is_missing_or_another_is_no_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FETCHED", tmp_path / "set")
    monkeypatch.setattr(data, "PACKAGE", Path("nonexistent"))
    pixels, labels = np.full((10_002, 784), 7.0), np.array(["1", "0"] * 5001)
    monkeypatch.setattr(data, "fetch_openml", lambda **_: Namespace(data=pixels, target=labels))
    with pytest.warns(UserWarning, match=r"scikit-learn's digits.*OpenML.*make data.*SHA-256"):
        assert data.load("auto").source == "scikit-learn's digits"
    content = b"\7" * 784 * 2 + b"\1\0" + b"\7" * 7_840_000 + b"\1\0" * 5000
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(content).hexdigest())
    with pytest.warns(UserWarning, match="Fashion-MNIST is OpenML's"):
        assert data.load("auto").test_images.shape == (10_000, 28, 28)
    write_set(tmp_path / "set")
    given = data.load(str(tmp_path / "set"))
    assert given.train_images.flatten().tolist() == list(range(8))
    assert (given.test_labels.tolist(), given.classes) == ([1, 0], 2)
    with pytest.raises(RuntimeError, match=f"could not be had from {tmp_path}/set: SHA-256"):
        data.fashion_mnist()


def test_the_rows_are_those_that_bench_quality_chose_and_accepts():
    found = re.findall(r"^\| ([^|]+) \| [\d.]+ \| [\d.]+ \| accepted on A and B \|$", PAGE.read_text(), re.MULTILINE)
    passes = dict(re.findall(r"^\| ([^|]+) \|(?: [^|]+ \|){6} ([\d.]+) \|", PAGE.read_text(), re.MULTILINE))
    cheapest, row = list(ROWS.items())[-1]
    assert row.title == f"SAM, {TITLES[cheapest]}" == f"SAM, {min(found, key=lambda title: float(passes[title]))}"
    assert (row.start, row.ascent) == (CONTENDERS[cheapest].start, 1 / CONTENDERS[cheapest].rows)
    for name, row in ROWS.items():
        setting = plan.chosen("A", name, plan.load())
        assert (row.lr, row.weight_decay) == (setting.lr, setting.weight_decay)
