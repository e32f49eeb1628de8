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
from examples.fashion_mnist.train import ROWS, Run, train

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
        assert all(0 < run[c] < most for c, most in {"accuracy": 100, "noisy": 100, "sharpness": 10}.items())
        assert run["curve"][-1] == [run["seconds"], run["accuracy"]]
    assert "SAM, against SGD on 2 seed(s):\n  accuracy " in done.stdout
    for name, row in ROWS.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{row.title}  "))
        accuracies = [run["accuracy"] for run in runs if run["row"] == name]
        assert f"  {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}  " in line


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "130"), (FloatingPointError("nan"), "given up: nan")]
)
def test_interrupted_it_keeps_what_is_finished(error, status, tmp_path, monkeypatch, capsys):
    def interrupted(name, *others):
        if name == "sam":
            raise error
        return train(name, *others)

    monkeypatch.setattr(command, "train", interrupted)
    with pytest.raises(SystemExit, match=status):
        command.main([*FEW_STEPS, "--output", str(tmp_path)])
    assert [run["row"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["sgd", "sgd-2x"]
    assert re.findall(r"^S[^ ]+", capsys.readouterr().out, re.MULTILINE) == ["SGD", "SGD,", "SGD,"]


def write_set(folder: Path, count: int = 256, size: int = 4, tests: int = 2, label: int = 1, last: bytes = b"") -> None:
    """``count`` images of bytes 0, 1, ... with labels 0 and 1; ``tests`` test images, gzipped, with label ``label``."""
    folder.mkdir()
    for name in data.FILES:
        packed = name.startswith("t10k")
        n = tests if packed else count
        labels = bytes([label] * n if packed else [0, 1] * (n // 2))
        pixels = bytes(i % 256 for i in range(n * size * size))
        header = b"\0\0\x08\1" if "idx1" in name else b"\0\0\x08\3"
        sizes = [n] if "idx1" in name else [n, size, size]
        content = header + b"".join(s.to_bytes(4, "big") for s in sizes) + (labels if "idx1" in name else pixels) + last
        (folder / (name + packed * ".gz")).write_bytes(gzip.compress(content) if packed else content)


SETS = {
    "short": {"count": 254},
    "small": {"size": 3},
    "untested": {"tests": 0},
    "unlearnt": {"label": 2},
    "longer": {"last": b"x"},
}
BROKEN = {
    "plain": b"no gzip",
    "cut": gzip.compress(b"\0\0\x08\1\0\0\0\2\1\1")[:-9],
    "headless": gzip.compress(b"\0\0\x08"),
    "floats": gzip.compress(b"\0\0\x0d\1\0\0\0\2\1\1"),
}
REFUSED = {
    **{f"--data {name}": f"argument --data: {name}/t10k-labels-idx1-ubyte.gz: not an IDX file" for name in BROKEN},
    "--epochs 0": "argument --epochs: 0 is less than 1",
    "--seeds -1": "argument --seeds: a seed is out of range",
    "--seeds 1 100": "argument --seeds: seeds 100 to 104 chose the settings",
    "--tune --seeds 1": "argument --seeds: seeds 100 to 104 chose the settings: give them with --tune, and no others",
    "--data short": "argument --data: short: this needs at least 256 training images and 1 test image",
    "--data small": "there are train-images-idx3-ubyte (256, 3, 3), train-labels-idx1-ubyte (256,),",
    "--data untested": "t10k-images-idx3-ubyte (0, 4, 4), t10k-labels-idx1-ubyte (0,)",
    "--data unlearnt": "argument --data: unlearnt: test label 2 is above all training labels",
    "--data unlabelled": "t10k-images-idx3-ubyte (2, 4, 4), t10k-labels-idx1-ubyte (1,)",
    "--data digits --output longer/train-images-idx3-ubyte": "argument --output:",
    "--data nowhere": "argument --data: nowhere is no folder with train-images-idx3-ubyte or train-images-idx3",
    "--data longer": "argument --data: longer/train-images-idx3-ubyte: not an IDX file",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_bad_option_is_named_at_once(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, options in SETS.items():
        write_set(tmp_path / name, **options)
    for name, content in BROKEN.items():
        write_set(tmp_path / name)
        (tmp_path / name / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    write_set(tmp_path / "unlabelled")
    (tmp_path / "unlabelled" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\1\1"))
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments.split())
    assert REFUSED[arguments] in capsys.readouterr().err


@pytest.mark.guarantee(id="downloads")
def test_fashion_mnist_that_is_missing_or_another_is_no_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FETCHED", tmp_path / "set")
    monkeypatch.setattr(data, "PACKAGE", Path("nonexistent"))
    pixels, labels = np.full((10_256, 784), 51.0), np.array(["1", "0"] * 5128)
    monkeypatch.setattr(data, "fetch_openml", lambda **_: Namespace(data=pixels, target=labels))
    with (
        pytest.warns(UserWarning, match=r"from OpenML.*make data"),
        pytest.warns(UserWarning, match=r"is not available, using scikit-learn's digits: OpenML: SHA-256"),
    ):
        assert data.load("auto").source == "scikit-learn's digits"
    content = b"".join(b"\x33" * 784 * n + b"\1\0" * (n // 2) for n in (256, 10_000))
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(content).hexdigest())
    with pytest.warns(UserWarning, match="loading Fashion-MNIST from OpenML"):
        found = data.load("auto")
    assert (found.test_images.shape, found.source) == ((10_000, 1, 14, 14), "Fashion-MNIST")
    assert found.test_images.unique().tolist() == pytest.approx([0.2])
    write_set(tmp_path / "set")
    given = data.load(str(tmp_path / "set"))
    assert (given.train_images.flatten()[:256] * 255).round().tolist() == list(range(256))
    assert (given.train_labels[:3].tolist(), given.test_labels.tolist(), given.classes) == ([0, 1, 0], [1, 1], 2)
    with pytest.raises(ValueError, match=f"{tmp_path}/set: SHA-256"):
        data.fashion_mnist()


def test_of_larger_images_the_rounded_averages_of_2_x_2_pixels_are_taken(tmp_path):
    write_set(tmp_path / "set", size=16)
    first = data.load(str(tmp_path / "set")).train_images[0, 0, 0]  # rows 0 to 15 and 16 to 31: averages 8.5, 10.5, ...
    assert (first * 255).tolist() == pytest.approx([8, 10, 12, 14, 16, 18, 20, 22])


def test_tuning_tries_all_radii_on_images_that_were_held_out(tmp_path, monkeypatch, capsys):
    tried = []

    def recorded(name, row, split, seed, epochs):
        tried.append((row.rho, row.start, seed))
        drawn, tested = ({i.numpy().tobytes() for i in images} for images in (split.train_images, split.test_images))
        assert tested <= pool - drawn
        return Run(name, seed, 1, 1.0, 50.0 + row.rho, 40.0, 0.1, [])

    pool = {i.numpy().tobytes() for i in data.load("digits").train_images}
    monkeypatch.setattr(command, "train", recorded)
    command.main(["--data", "digits", "--tune", "--output", str(tmp_path)])
    assert tried == [(rho, start, s) for s in (100, 101, 102) for start in (0.0, 0.75) for rho in command.RHOS]
    assert len(re.findall(r", rho [\d.]+ +50\.\d ± 0\.0 +40\.0 ± 0\.0 ", capsys.readouterr().out)) == 10
    assert not list(tmp_path.iterdir())


def test_the_rows_are_those_that_bench_quality_chose_and_accepts():
    found = re.findall(r"^\| ([^|]+) \| [\d.]+ \| [\d.]+ \| accepted on A and B \|$", PAGE.read_text(), re.MULTILINE)
    passes = dict(re.findall(r"^\| ([^|]+) \|(?: [^|]+ \|){6} ([\d.]+) \|", PAGE.read_text(), re.MULTILINE))
    cheapest, row = list(ROWS.items())[-1]
    assert row.title == f"SAM, {TITLES[cheapest]}" == f"SAM, {min(found, key=lambda title: float(passes[title]))}"
    assert (row.start, row.ascent) == (CONTENDERS[cheapest].start, 1 / CONTENDERS[cheapest].rows)
    for name, row in ROWS.items():
        setting = plan.chosen("A", name, plan.load())
        assert (row.lr, row.weight_decay) == (setting.lr, setting.weight_decay)
