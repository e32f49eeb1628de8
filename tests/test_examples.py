"""Every example runs with torch alone (digits come from scikit-learn), learns, and says so."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch

FOLDER = Path(__file__).parent.parent / "examples"
LEARNING = ["two_calls", "closure", "second_pass", "gradient_accumulation", "mixed_precision"]
ON_A_GPU = ["cuda_graph"]
DISTRIBUTED = {"ddp": ["--own-gradient"], "fsdp": []}
EXAMPLES = [*LEARNING, "resume", *ON_A_GPU, *DISTRIBUTED]


def output_of(name: str, folder: Path) -> str:
    """What the example prints, run as a user runs it, in its own folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small tensors: more threads only wait for each other
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(folder.iterdir()) == [], "an example leaves nothing behind"
    return done.stdout


def own_words(text: str) -> str:
    """What an example prints itself: with PyTorch 2.10 gloo names its peers, and a checkpoint warns of itself."""
    return re.sub(r"^\[Gloo\] .*\n|^\S+/torch/\S+: \w*Warning: .*\n  .*\n", "", text, flags=re.MULTILINE)


def test_all_examples_are_tested_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("[!_]*.py")) == sorted(EXAMPLES)  # fashion_mnist: test_demo.py


@pytest.mark.parametrize("name", LEARNING)
def test_example_learns(name: str, tmp_path: Path) -> None:
    accuracies = re.findall(r"test accuracy ([\d.]+)%", output_of(name, tmp_path))
    assert len(accuracies) == 5
    assert float(accuracies[-1]) > 90.0  # guessing gives 50 %


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs it")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_example_that_needs_a_gpu_says_so(name: str) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr == "this example needs an NVIDIA GPU and a PyTorch built for CUDA\n"


def test_resume_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert output_of("resume", tmp_path).splitlines()[-1] == "the same bits"


def test_the_notebook_measures_sharpness_while_it_trains() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("agg")
    namespace: dict[str, Any] = {}
    for cell in json.loads((FOLDER / "sharpness.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), namespace)
    assert [row["name"] for row in namespace["history"]] == ["SGD"] * 4 + ["SAM"] * 4


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_distributed_example_learns_and_resumes(name: str, tmp_path: Path) -> None:
    script, arguments = FOLDER / f"{name}.py", [*DISTRIBUTED[name], "--checkpoint", "saved"]
    accuracies = []
    for size, more in ((2, ["--epochs", "2"]), (1, ["--epochs", "5", "--resume"])):
        first, *others = map(own_words, launch(script, [*arguments, *more], size, tmp_path))
        assert others == [""] * (size - 1), "only rank 0 says something"
        accuracies += re.findall(r"^epoch (\d): test accuracy ([\d.]+)%$", first, re.MULTILINE)
        assert first.count("\n") == len(re.findall("epoch", first))
    assert [epoch for epoch, _ in accuracies] == ["1", "2", "3", "4", "5"]
    assert float(accuracies[-1][1]) > 90.0  # guessing gives 10 %


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short_explained_and_needs_torch_alone(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) < (80 if name in DISTRIBUTED else 65)
    runner = "torchrun --nproc-per-node 2" if name in DISTRIBUTED else "python"
    assert f"{runner} examples/{name}.py" in (ast.get_docstring(tree) or "")
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    data = {"sklearn"} if name in DISTRIBUTED else set()
    assert {module.split(".")[0] for module in modules} <= {"torch", "sam_fast", *data, *sys.stdlib_module_names}
