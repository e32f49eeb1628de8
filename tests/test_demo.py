"""The demo: the whole command on a tiny run, its data readers, and its measurements against computations by hand.

No network.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from sam_fast.demo import data, fetch, landscape, metrics
from sam_fast.demo.errors import DemoError
from sam_fast.demo.idx import read_idx


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sam_fast", "demo", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[str, str, Path]:
    """A run on the digits: what it printed, its progress, and its folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = demo(
        "--dataset",
        "digits",
        "--epochs",
        "2",
        "--train-size",
        "300",
        "--seed",
        "0",
        "1",
        "--output",
        str(out),
        "--threads",
        "1",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, out


def test_the_table_has_a_line_for_each_optimizer(tiny_run):
    stdout, _, _ = tiny_run
    for column in ("acc. %", "sd 0.25", "sd 0.5", "sharp-", "seconds", "optim."):
        assert column in stdout
    lines = stdout.splitlines()
    for label in ("SGD", "SAM"):
        (line,) = [line for line in lines if line.startswith(label + " ")]
        assert line.count("±") == 6
    assert "standard deviation over 2 seeds" in stdout


def test_progress_shows_loss_and_accuracy_for_every_epoch(tiny_run):
    _, stderr, _ = tiny_run
    for seed in (0, 1):
        for label in ("SGD", "SAM"):
            for epoch in (1, 2):
                (line, *_) = [
                    part
                    for part in stderr.split("\r")
                    if f"seed {seed}  {label:<9} epoch {epoch:>2}/2" in part and "test acc" in part
                ]
                assert "loss" in line


def test_the_picture_and_the_figures_are_where_it_says(tiny_run):
    stdout, _, out = tiny_run
    picture, figures = out / "demo.png", out / "demo.json"
    assert str(picture) in stdout
    assert str(figures) in stdout
    from matplotlib import image

    pixels = image.imread(picture)
    assert pixels.shape[0] > 400
    assert pixels.std() > 0.05  # something is drawn on it


def test_the_json_holds_every_figure_and_setting(tiny_run):
    _, _, out = tiny_run
    document = json.loads((out / "demo.json").read_text())
    assert document["settings"]["label_noise"] == 0.3
    assert {(r["optimizer"], r["seed"]) for r in document["runs"]} == {("sgd", 0), ("sam", 0), ("sgd", 1), ("sam", 1)}
    for run in document["runs"]:
        assert len(run["noisy_accuracy"]) == 2
        assert math.isfinite(run["sharpness"])
        assert len(run["curves"]["test_accuracy"]) == 2
        assert len(run["landscape"]["losses"]) == 3
    for optimizer in ("sgd", "sam"):
        summary = document["summary"][optimizer]
        assert 0 <= summary["test_accuracy"]["mean"] <= 1
        assert 0 < summary["optimizer_share"]["mean"] < 1
        assert len(summary["sharpness"]["values"]) == 2


@pytest.mark.nightly
def test_adamw_and_asam_run(tmp_path):
    done = demo(
        *(
            "--dataset",
            "digits",
            "--epochs",
            "1",
            "--train-size",
            "200",
            "--seed",
            "3",
            "--adaptive",
            "--optimizer",
            "adamw",
            "sam-adamw",
        ),
        *("--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "SAM+AdamW" in done.stdout
    assert "ASAM" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "at least 1"),
        (["--label-noise", "1.5"], "more than 1"),
        (["--rho", "-1"], "at least 0"),
        (["--dataset", "digits", "--train-size", "99999"], "only 1,297 training images"),
        (["--data", "/nonexistent/folder"], "no such folder"),
    ],
)
def test_bad_options_end_in_one_message(arguments, words, tmp_path):
    done = demo(*arguments, "--output", str(tmp_path))
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_package_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    from sam_fast.__main__ import main

    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo", "--dataset", "digits", "--output", str(tmp_path)]) == 1
    assert 'pip install "sam_fast[demo]"' in capsys.readouterr().err


def test_info_names_versions_backends_and_the_build(capsys):
    from sam_fast.__main__ import main

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("sam_fast", "torch", "triton", "usable", "instruction set in use"):
        assert word in printed


# ---- Data ------------------------------------------------------------------------------------------------------------


def idx_bytes(array: torch.Tensor, magic: int = 8) -> bytes:
    header = struct.pack(">BBBB", 0, 0, magic, array.dim()) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + bytes(array.flatten().tolist())


IMAGES = torch.arange(2 * 8 * 8, dtype=torch.uint8).reshape(2, 8, 8)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_file_is_read(packed, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES)) if packed else idx_bytes(IMAGES))
    assert torch.equal(read_idx(path), IMAGES)


@pytest.mark.guarantee(id="downloads")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (idx_bytes(IMAGES)[:-1], "truncated"),
        (idx_bytes(IMAGES) + b"x", "goes on"),
        (idx_bytes(IMAGES, magic=13), "type code"),
        (b"\x01\x02\x03\x04rest", "IDX"),
        (b"", "truncated"),
        (gzip.compress(idx_bytes(IMAGES))[:-9], "truncated|damaged"),
        (struct.pack(">BBBBII", 0, 0, 8, 2, 2**20, 2**20), "limit"),
    ],
    ids=["truncated", "longer", "type", "magic", "empty", "gzip-truncated", "bomb"],
)
def test_bad_idx_file_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DemoError, match=words) as raised:
        read_idx(path)
    assert "images" in str(raised.value)


@pytest.mark.guarantee(id="downloads")
def test_wrong_checksum_is_refused(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(IMAGES))
    with pytest.raises(DemoError, match="SHA-256"):
        read_idx(path, sha256="0" * 64)


class Endless(io.RawIOBase):
    """A server's answer that never ends, or ends early."""

    def __init__(self, declared: str, size: int) -> None:
        self.headers = {"Content-Length": declared}
        self.left = size

    def read(self, size: int = -1) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


@pytest.mark.guarantee(id="downloads")
@pytest.mark.parametrize(
    ("declared", "size", "words"),
    [
        ("", 10**12, "longer than 1,000,000 bytes"),
        ("10", 10**12, "longer than"),
        ("5000", 4000, "4,000 of 5,000 bytes arrived"),
    ],
    ids=["endless", "lies", "cut off"],
)
def test_a_download_that_is_too_large_is_given_up(declared, size, words, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD", 1_000_000)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *_, **__: Endless(declared, size))
    with pytest.raises(DemoError, match=words):
        fetch._download("https://example.org/images", tmp_path / "images", time.monotonic() + 60)
    assert (tmp_path / "images").stat().st_size <= 1_000_000


def write_set(folder: Path) -> None:
    labels = torch.tensor([0, 1], dtype=torch.uint8)
    for file in fetch.FILES:
        (folder / file.name).write_bytes(gzip.compress(idx_bytes(IMAGES if "images" in file.name else labels)))


def test_a_given_folder_is_read_without_checksums(tmp_path):
    write_set(tmp_path)
    loaded = data.load("fashion-mnist", tmp_path, print)
    assert torch.equal(loaded.train_images, IMAGES)
    assert loaded.classes == 2


def test_a_given_folder_that_lacks_a_file_is_refused_by_name(tmp_path):
    write_set(tmp_path)
    (tmp_path / fetch.TEST_LABELS.name).unlink()
    with pytest.raises(DemoError, match="missing t10k-labels"):
        data.load("fashion-mnist", tmp_path, print)


def test_when_no_source_works_the_message_says_what_was_tried_and_what_to_do(monkeypatch):
    def refuse(log):
        raise DemoError("out of reach")

    for source in ("_installed", "_cached", "_from_debian", "_from_sites"):
        monkeypatch.setattr(fetch, source, refuse)
    with pytest.raises(DemoError, match="out of reach") as raised:
        data.load("fashion-mnist", None, print)
    for word in ("Debian", "--data", "--dataset digits"):
        assert word in str(raised.value)


def test_label_noise_draws_the_share_it_says():
    labels = torch.randint(0, 10, (10_000,), generator=torch.Generator().manual_seed(1))
    before = labels.clone()
    noisy = data.randomise_labels(labels, 10, 0.3, torch.Generator().manual_seed(2))
    assert torch.equal(labels, before)
    # 3000 labels are drawn anew and 9 in 10 of those are wrong: 2700, with a standard deviation of sqrt(3000 * 0.9 *
    # 0.1) = 16.
    assert abs(int((noisy != labels).sum()) - 2700) < 80


# ---- Measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_sharpness_of_a_linear_loss_is_known(adaptive):
    """For L = w . x the worst point of the ball raises the loss by rho ||x||, for ASAM by rho ||w * x||."""
    model = nn.Linear(4, 1, bias=False)
    x = torch.tensor([[1.0, 2.0, -2.0, 4.0]])
    found = metrics.sharpness(model, x, torch.zeros(1), rho=0.1, adaptive=adaptive, loss_fn=lambda out, _: out.sum())
    exact = 0.1 * float((model.weight.detach() * x).norm() if adaptive else x.norm())
    assert found == pytest.approx(exact, rel=1e-4)


def test_directions_have_the_filters_norms():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 2))
    direction = landscape.random_direction(model, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
        else:
            assert not direction[name].any()


def test_the_landscape_passes_through_the_solution():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images, labels = torch.rand(20, 1, 8, 8), torch.randint(0, 3, (20,))
    found = landscape.loss_along(model, images, labels, directions=2, points=5, span=1.0, seed=0)
    assert found.steps[2] == 0.0
    for losses in found.losses:
        assert losses[2] == pytest.approx(metrics.evaluate(model, images, labels)[0], rel=1e-6)


def test_measuring_changes_nothing_in_the_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, labels = torch.rand(20, 1, 8, 8), torch.randint(0, 3, (20,))
    metrics.evaluate(model, images, labels)
    metrics.noisy_accuracy(model, images, labels, 0.5)
    metrics.sharpness(model, images, labels, rho=0.1)
    landscape.loss_along(model, images, labels, directions=1, points=3, span=1.0, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
