"""What is shipped: the wheel and the sdist, with and without native modules, and a source tree that names nothing it
should not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import sam_fast

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin") if os.environ.get("CUDA_HOME") else None)


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    """Run a command, outside this checkout's import path, and return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**environment, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built."""
    target = tmp_path_factory.mktemp("checkout") / "sam_fast"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "_build_info.json", ".*_cache", "out"
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of the build."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def built(checkout: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """``python -m build``: the sdist, the wheel made from the sdist, and what the build printed. Without CUDA: nvcc is
    slow, and the environment that runs these tests was built by the same setup.py with it where it is."""
    dist = tmp_path_factory.mktemp("dist")
    # What pip itself needs of the real home folder: its settings, and its cache.
    pip = {"PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache/pip"))}
    for path in (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
        if path.is_file():
            pip["PIP_CONFIG_FILE"] = str(path)
    output = run(
        sys.executable, "-m", "build", "--outdir", dist, cwd=checkout, SAM_FAST_CUDA="0", HOME=str(home), **pip
    )
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel, output


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def fresh_python(where: Path) -> Path:
    """An environment with this one's packages (torch) visible, and nothing else."""
    venv.create(where, with_pip=False)
    python = where / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    ours = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Not through a .pth: that would run this environment's editable finder too.
    for entry in Path(ours).iterdir():
        if "sam_fast" not in entry.name and "editable" not in entry.name and not entry.name.endswith(".pth"):
            (Path(site) / entry.name).symlink_to(entry)
    return python


def install(python: Path, wheel: Path, where: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", where, wheel)


@pytest.mark.slow
def test_wheel_has_no_top_level_kernels(built):
    top_level = {name.split("/")[0] for name in names_in(built[1])}
    assert top_level == {"sam_fast", f"sam_fast-{sam_fast.__version__}.dist-info"}
    assert {f"sam_fast/kernels/{name}.py" for name in ("__init__", "grad_norm", "perturb", "copy")} <= set(
        names_in(built[1])
    )


@pytest.mark.slow
def test_wheel_has_the_native_module_types_and_licence(built):
    names = names_in(built[1])
    assert any(name.startswith("sam_fast/_cpu.") and name.endswith(".so") for name in names)
    assert "sam_fast/py.typed" in names
    assert "sam_fast/_cpu.pyi" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("sam_fast/_cuda.") and name.endswith(".so") for name in names)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (Debian: binutils)")
def test_the_native_module_links_nothing_of_torch(built, tmp_path):
    with zipfile.ZipFile(built[1]) as archive:
        (module,) = (archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so"))
    needed = set(re.findall(r"NEEDED.*\[(\w[\w+-]*)\.so", run("readelf", "-d", module)))
    assert "libc" in needed
    assert needed <= {"libgomp", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}


@pytest.mark.slow
def test_sdist_has_everything_that_is_needed_to_build_and_test(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [
        "setup.py",
        "CMakeLists.txt",
        "csrc/sam_math.h",
        "csrc/cpu/perturb.cpp",
        "csrc/cuda/perturb.cu",
        "tests/cuda_emulation/cuda_runtime.h",
        "kernels/perturb.py",
        "tests/conftest.py",
        "LICENSE",
        "Makefile",
    ]
    assert not set(needed) - names
    assert not [name for name in names if name.startswith((".", "bench")) or name.endswith((".so", ".png", ".jsonl"))]


def test_the_oldest_torch_that_is_declared_is_the_one_that_is_tested():
    (declared,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    (tested,) = re.findall(r"^test-oldest: OTHER_PINS = torch==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested == f"{declared}.0"


def test_the_pythons_that_are_declared_are_those_that_get_a_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    (wheels,) = re.findall(r'^build = "cp3\{([\d,]+)\}-', text, re.MULTILINE)
    (oldest,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', text, re.MULTILINE)
    (checked,) = re.findall(r'^python_version = "3\.(\d+)"$', text, re.MULTILINE)
    assert declared == wheels.split(",")
    assert declared[0] == oldest == checked


@pytest.mark.guarantee(id="no-files")
@pytest.mark.slow
def test_a_build_writes_nothing_outside_its_folders(built, checkout, home):
    # pip asks rustc for its version, and rustup, where it is installed, writes a file
    assert {path.name for path in home.iterdir()} <= {".rustup"}
    assert {path.name for path in checkout.iterdir()} - {path.name for path in ROOT.iterdir()} <= {
        "build",
        "dist",
        "sam_fast.egg-info",
    }
    assert {path.name for path in built[0].parent.iterdir()} == {built[0].name, built[1].name}


@pytest.mark.slow
def test_build_says_what_it_built(built):
    assert "sam_fast._cpu: built" in built[2]
    assert "sam_fast._cuda: not built: SAM_FAST_CUDA=0" in built[2]


@pytest.mark.skipif(NVCC is None, reason="NOT CHECKED: there is no nvcc")
def test_where_nvcc_is_the_cuda_module_was_built():
    assert importlib.util.find_spec("sam_fast._cuda") is not None


@pytest.mark.slow
def test_installed_wheel_works_and_explains_itself(built, tmp_path):
    python = fresh_python(tmp_path / "env")
    install(python, built[1], tmp_path / "site")
    script = "import sam_fast, sam_fast.kernels, torch; print(sam_fast.__file__, sam_fast.backends.available())"
    output = run(python, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site") in output
    assert "cpu" in output
    assert "cpu" in run(python, "-m", "sam_fast", "info", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


@pytest.mark.guarantee(id="pure-python")
@pytest.mark.nightly
def test_without_a_compiler_the_package_runs_on_torch_and_says_why(checkout, tmp_path):
    """SAM_FAST_NATIVE=0 on a machine without compilers: a pure-Python wheel, one warning, and correct results."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--quiet",
        "-w",
        tmp_path,
        cwd=checkout,
        SAM_FAST_NATIVE="0",
        CC="false",
        CXX="false",
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert not any(name.endswith(".so") for name in names_in(wheel))
    python = fresh_python(tmp_path / "env")
    install(python, wheel, tmp_path / "site")
    script = """
import warnings, torch
from sam_fast import SAM, backends
p = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3))]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = SAM(p, lr=0.1)
    SAM(p, lr=0.1)
assert len(caught) == 1 and "SAM_FAST_NATIVE" in str(caught[0].message), [str(w.message) for w in caught]
assert backends.available() == ["torch"] and "cpu" in backends.why_not()
for q in p:
    q.grad = torch.ones_like(q)
optimizer.first_step()
assert torch.allclose(p[0], torch.full((4,), 1 + 0.05 / 7**0.5))
optimizer.restore()
assert (p[0] == 1).all()
print("fine")
"""
    assert "fine" in run(python, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


@pytest.mark.nightly
@pytest.mark.parametrize("forced", [False, True])
def test_a_compiler_that_fails_leaves_the_pure_package_unless_the_kernels_were_asked_for(checkout, tmp_path, forced):
    environment = {
        **os.environ,
        "CXX": "/bin/false",
        "SAM_FAST_CUDA": "0",
        "SAM_FAST_NATIVE": "1" if forced else "auto",
    }
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-v", "-w", str(tmp_path)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert 'The C++ compiler "/bin/false" is not able to compile' in output
    if forced:
        assert done.returncode != 0
        assert "SAM_FAST_NATIVE=0 installs the package without native kernels" in output
        return
    assert output.count("sam_fast: WARNING") == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"sam_fast-{sam_fast.__version__}-py3-none-any.whl"
    python = fresh_python(tmp_path / "env")
    install(python, wheel, tmp_path / "site")
    info = run(python, "-m", "sam_fast", "info", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert 'not built: The C++ compiler "/bin/false"' in info
    assert re.search(r"torch +usable", info)


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64 cross compiler (Debian: g++-aarch64-linux-gnu)"
)
@pytest.mark.parametrize("source", ["grad_norm", "perturb", "copy", "step", "isa_table"])
def test_kernels_compile_for_aarch64(source, tmp_path):
    run(
        "aarch64-linux-gnu-g++",
        *(
            "-std=c++17",
            "-O3",
            "-ffp-contract=off",
            "-fopenmp",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-psabi",
            "-DSAM_ISA=baseline",
            "-DSAM_STEP=Adam",
            "-c",
        ),
        ROOT / "csrc" / "cpu" / f"{source}.cpp",
        "-o",
        tmp_path / "out.o",
    )


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, torch; before = set(sys.modules); import sam_fast; new = set(sys.modules) - before; "
    script += (
        "assert not any(m.startswith(('torch.distributed', 'sam_fast.sharpness')) for m in new); "
        "assert {*sam_fast.__all__, 'sharpness', '__version__'} <= set(dir(sam_fast)); "
        "print(sorted({m.split('.')[0] for m in new}))"
    )
    output = run(sys.executable, "-c", script, cwd=ROOT)
    assert not {"numpy", "matplotlib", "sklearn", "tqdm", "triton"} & set(eval(output)) - set(sys.stdlib_module_names)


def test_the_callback_without_lightning_says_what_is_missing():
    """It said ``pytorch_lightning``, the older package, which is asked last."""
    if any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
        pytest.skip("Lightning is installed")
    with pytest.raises(ImportError, match="No module named 'lightning'"):
        importlib.import_module("sam_fast.integrations.lightning")


def test_info_names_versions_backends_and_the_build(capsys):
    from sam_fast.__main__ import main

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("sam_fast", "torch", "triton", "usable", "instruction set in use"):
        assert word in printed


@pytest.mark.parametrize(
    ("value", "said"),
    [("", None), ("torch", "torch for every parameter"), ("fast", "no optimizer can be made: .*'fast' is unknown")],
)
def test_info_says_which_backend_the_environment_forces(value, said, capsys, monkeypatch):
    from sam_fast.__main__ import main

    monkeypatch.setenv("SAM_FAST_BACKEND", value)
    assert main(["info"]) == 0
    found = re.search("SAM_FAST_BACKEND  (.*)", capsys.readouterr().out)
    assert (found is None) if said is None else re.match(said, found[1])


def test_versions_agree():
    from importlib.metadata import version

    assert version("sam_fast") == sam_fast.__version__
    assert f"## {sam_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
