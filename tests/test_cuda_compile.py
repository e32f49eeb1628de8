"""The CUDA sources, compiled for every generation with nvcc, and what the machine code shows: no spills, 16-byte
accesses, few registers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda_emulation.build import operations, steps

CSRC = Path(__file__).parent.parent / "csrc"
DEFAULT = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]+)\)", (CSRC.parent / "CMakeLists.txt").read_text())
BUILT = sorted({name.partition("-")[0] for names in DEFAULT for name in names.split()}, key=int)
"""What CMakeLists.txt builds for where nothing else is asked for."""

# CI waits for the compilation for one.
ARCHITECTURES = [name if name == "90" else pytest.param(name, marks=pytest.mark.nightly) for name in BUILT]
STEPS = steps(CSRC)
OPERATIONS = [*operations(CSRC), *STEPS]
DTYPES = {"float32": "Native<float>", "float64": "Native<double>", "bfloat16": "bf16", "float16": "f16"}

KERNELS = {"copy": 6, "grad_norm": 12}
"""How many there are: dtypes, or directions, by three sizes of arguments.

The others: also with stochastic rounding, for the 16-bit dtypes.
"""

MAX_REGISTERS = {"75": 128}
"""2 blocks of 256 threads on a multiprocessor of 65,536 registers, elsewhere 3, which is 80: what kBlocksPerProcessor
in csrc/cuda/arguments.h promises.
"""


def find(tool: str) -> str | None:
    """A CUDA tool: in CUDA_HOME, on the PATH or, for the binary tools, in Triton's wheel."""
    folders = [
        os.path.join(os.environ.get("CUDA_HOME", "/nonexistent"), "bin"),
        os.environ["PATH"],
        "/usr/local/cuda/bin",
    ]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folders += [str(Path(folder) / "backends" / "nvidia" / "bin") for folder in triton.submodule_search_locations]
    return shutil.which(tool, path=os.pathsep.join(folders))


NVCC, CUOBJDUMP = find("nvcc"), find("cuobjdump")
pytestmark = pytest.mark.skipif(NVCC is None, reason="NOT CHECKED: there is no nvcc, the CUDA kernels are not compiled")
needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None, reason="NOT CHECKED: there is no cuobjdump, the machine code is not looked at"
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """What compiles an operation for an architecture, once, warnings being errors."""
    folder = tmp_path_factory.mktemp("cubins")

    @cache
    def compile_one(operation: str, architecture: str) -> Path:
        out = folder / f"{operation}_{architecture}.cubin"
        command = [
            str(NVCC),
            "-std=c++17",
            "-O3",
            f"-arch=sm_{architecture}",
            "-fmad=false",
            "-Werror=all-warnings",
            "-Xcompiler=-Wall,-Wextra",
        ]
        source = "step" if operation in STEPS else operation
        command += [f"-DSAM_STEP={operation}"] if operation in STEPS else []
        command += ["-cubin", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return out

    return compile_one


def dump(cubin: Path, *options: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *options, str(cubin)], capture_output=True, text=True, check=True).stdout


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def each(test: Any) -> Any:
    """Each operation for each architecture."""
    return pytest.mark.parametrize("architecture", ARCHITECTURES)(
        pytest.mark.parametrize("operation", OPERATIONS)(test)
    )


@needs_cuobjdump
@pytest.mark.slow
@each
def test_no_spills_and_few_registers(compiled, operation, architecture):
    usage = dump(compiled(operation, architecture), "--dump-resource-usage")
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == KERNELS.get(operation, 18), usage
    for registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0)
        assert int(registers) <= MAX_REGISTERS.get(architecture, 80)


@cache
def functions(cubin: Path) -> dict[str, str]:
    """Demangled kernel name -> its machine code."""
    parts = re.split(r"\n\s*Function : ", dump(cubin, "-sass"))[1:]
    assert parts, "cuobjdump shows no kernel"
    names = demangle("\n".join(part.splitlines()[0] for part in parts)).splitlines()
    return dict(zip(names, parts, strict=True))


def accesses_of(cubin: Path, dtype: str) -> list[Counter[str]]:
    """Those of each kernel for a dtype."""
    found = [accesses(code) for name, code in functions(cubin).items() if DTYPES[dtype] in name]
    assert found, f"no kernel's name has {DTYPES[dtype]}"
    return found


def accesses(code: str) -> Counter[str]:
    return Counter(re.findall(r"\b((?:LDG|STG|LDL|STL|LD|ST)\.[A-Z0-9_.]+)", code))


def wide(found: Counter[str], kind: str) -> int:
    return sum(n for name, n in found.items() if name.startswith(kind) and ".128" in name)


def by_bytes(found: Counter[str], kind: str) -> dict[int, int]:
    """Accesses by width."""
    widths: Counter[int] = Counter()
    for name, n in found.items():
        if name.startswith(kind):
            width = re.search(r"\.(?:(128|64)|[US](16|8))\b", name)
            widths[4 if width is None else int(width[1] or width[2]) // 8] += n
    return dict(widths)


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_main_path_moves_sixteen_bytes_at_a_time(compiled, architecture, dtype):
    """At least, in vectors of 16 bytes:

    perturb    4 of w and of g in, 4 of the backup and of w out, for SAM and once more for ASAM
    grad_norm  4 of g, and 4 of g and w
    Sgd        2 of the backup, of g and of the momentum in, 2 of w and of the momentum out
    Adam       1 each of five in, of four out
    """
    for operation, loads, stores in (("perturb", 16, 16), ("grad_norm", 12, 0), ("Sgd", 6, 4), ("Adam", 5, 4)):
        for found in accesses_of(compiled(operation, architecture), dtype):
            assert wide(found, "LDG") >= loads, (operation, found)
            assert wide(found, "STG") >= stores, (operation, found)


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_move_sixteen_bytes_at_a_time(compiled, architecture):
    for code in functions(compiled("copy", architecture)).values():
        found = accesses(code)
        assert (wide(found, "LDG"), wide(found, "STG")) == (4, 4), found


@needs_cuobjdump
@pytest.mark.slow
@each
def test_tensors_at_any_address_take_the_widest_accesses_that_suit_them(compiled, operation, architecture):
    """Every width from 16 bytes down to an element's, in loads and stores."""
    for name, code in functions(compiled(operation, architecture)).items():
        itemsize = 1 if operation == "copy" else 8 if "Native<double>" in name else 4 if "Native<float>" in name else 2
        widths = {width for width in (16, 8, 4, 2, 1) if width >= itemsize}
        assert widths <= by_bytes(accesses(code), "LDG").keys(), name
        if operation != "grad_norm":
            assert widths <= by_bytes(accesses(code), "STG").keys(), name


@needs_cuobjdump
@pytest.mark.slow
@each
def test_memory_is_reached_by_global_accesses_and_nothing_is_fused(compiled, operation, architecture):
    """Generic and local accesses are slower. A fused multiply-add where none is written would make the result differ
    from the CPU's (float64 divisions use it inside). In steps it is written, as on the CPU."""
    for name, code in functions(compiled(operation, architecture)).items():
        assert not [access for access in accesses(code) if access.startswith(("LD.", "ST.", "LDL", "STL"))]
        if operation in STEPS and "Native<double>" not in name:
            assert re.search(r"\bFFMA\b", code), name
        if operation == "perturb" and "double" not in re.sub(r"double (?:const)?\*|, double,", "", name):
            assert not re.search(r"\bFFMA\b", code), name
