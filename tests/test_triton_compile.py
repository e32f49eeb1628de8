"""The Triton kernels, compiled without a GPU for four architectures.

16-byte accesses, float64 sums, no fused multiply-add where bits count.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, INTERPRETED, each_dtype

from sam_fast import backends
from sam_fast.steps import RULES

triton = pytest.importorskip("triton", reason="triton is not installed: pip install sam_fast[triton]")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="with TRITON_INTERPRET=1 nothing is compiled")

if not INTERPRETED:
    from triton.backends.compiler import GPUTarget

    from sam_fast.kernels import copy, grad_norm, perturb, step, table

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

STACK = {"3.6": 32, "3.7": 48}.get(".".join(triton.__version__.split(".")[:2]), 0)
"""Bytes of stack per thread that a kernel may take on NVIDIA's GPUs. No number of registers is asked for: from Triton
3.6's and 3.7's code for a few kernels ptxas takes 48 to 128 and spills, from that of 3.9 nothing."""

LION_STACK = 8
"""The same for Lion: on sm_90 ptxas keeps the choice between its two kinds of averages on the stack."""

each_target = pytest.mark.parametrize("target", TARGETS)


class Driver:
    """What Triton's JIT asks of a GPU's driver until it has compiled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget(*TARGETS[self.target])


class Launch:
    """Stands in for a kernel: what would be launched is only compiled, by Triton's JIT, from the arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


STEPS = sorted(backends.BACKENDS["triton"].bucket.steps)
OPERATIONS = {
    "grad_norm": "grad_norm",
    "perturb": "perturb",
    "backup": "copy",
    "restore": "copy",
    **dict.fromkeys(STEPS, "step"),
}
"""Operation -> the module of its kernel."""


def launch(
    operation: str,
    dtype: torch.dtype,
    chunks: int = 7,
    tensors: int = 3,
    offset: int = 0,
    ticket: int = 5,
    eps: float = 1e-12,
    key: int | None = None,
    scaled: bool = False,
    device_counters: bool = False,
) -> None:
    """Launch with numbers of all kinds; partial sums, norm and what a scaler has on the device may lie anywhere."""
    numbers, floats = torch.zeros(500, dtype=torch.int64), torch.zeros(100, dtype=torch.float64)
    backup = torch.zeros(64, dtype=torch.uint8)
    table, partials = numbers[: 5 * chunks].view(-1, 5), floats[offset : offset + tensors]
    if operation == "grad_norm":
        grad_norm.grad_norm(table, numbers, tensors, partials, dtype)
    elif operation == "perturb":
        norm = floats[offset]
        perturb.perturb(7, table, numbers, tensors, partials, eps, norm, backup, numbers[:1], ticket, key, dtype)
    elif operation in STEPS:
        scalars = torch.ones(4)
        scaling = (scalars[offset], scalars[offset + 1]) if scaled else (None, None)
        module = importlib.import_module(f"sam_fast.kernels.{operation}")
        common = (table, numbers, tensors, numbers, backup, numbers[:1], ticket, *scaling, key, dtype)
        step.step(module, 7, *common, device_counters, (0.1, 0.03))
    else:
        getattr(copy, operation)(7, table, numbers, backup, numbers[:1], ticket, dtype.itemsize)


UPDATED = [
    *(("sm_90", dtype) for dtype in DTYPES),
    *(("gfx942", dtype) for dtype in DTYPES),
    ("sm_80", torch.float32),
    ("sm_100", torch.bfloat16),
]
"""For which targets and dtypes the fused second steps are compiled: not for all, it takes a second or two each."""


@pytest.fixture
def compiled(monkeypatch) -> Callable[..., Any]:
    """``compiled(target, operation, dtype, *numbers)``: the kernels that such :func:`launch` arguments compile to."""

    def compile_for(target: str, operation: str, dtype: torch.dtype, *numbers: dict[str, Any]) -> list[Any]:
        module = importlib.import_module(f"sam_fast.kernels.{OPERATIONS[operation]}")
        stand_in = Launch(getattr(module, f"{OPERATIONS[operation]}_kernel"))
        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", Driver(target))
            patch.setattr(module, f"{OPERATIONS[operation]}_kernel", stand_in)
            for arguments in numbers or ({},):
                launch(operation, dtype, **arguments)
        return stand_in.compiled

    return compile_for


def wide(assembly: str, target: str) -> tuple[int, int]:
    """How many 16-byte loads and stores there are."""
    if target.startswith("gfx"):
        patterns = [rf"\b(?:global|buffer)_{op}_dwordx4\b" for op in ("load", "store")]
    else:
        patterns = [rf"\b{op}\.global\.[\w:.]*(?:v4\.[bfu]32|v2\.[bfu]64)\b" for op in ("ld", "st")]
    loads, stores = (re.findall(pattern, assembly) for pattern in patterns)
    return len(loads), len(stores)


def narrow(assembly: str, size: int) -> tuple[int, int]:
    """How many loads and stores of 8 or 4 bytes there are."""
    word = {8: r"v2\.[bfu]32", 4: r"(?<!v[24]\.)[bfu]32"}[size]
    loads, stores = (re.findall(rf"\b{op}\.global\.[\w:.]*{word}\b", assembly) for op in ("ld", "st"))
    return len(loads), len(stores)


def assert_narrow_accesses(kernel: Any, target: str, dtype: torch.dtype, arrays: tuple[int, int]) -> None:
    """Tensors not aligned to 16 bytes take 8, or 4 for 16-bit formats: one at least for each array read and written.

    ``arrays``: how many are read and written. Nothing is moved through shared memory on the way, which a wrong order of
    the elements would make necessary. On AMD GPUs, whose warps are twice as large, a thread's part of the smaller
    blocks may be a single element.
    """
    if target.startswith("gfx"):
        return
    text = assembly(kernel)
    for size in (8, 4):
        if size > dtype.itemsize:
            assert all(found >= expected for found, expected in zip(narrow(text, size), arrays, strict=True)), size
    # complex128 is two words, which the compiler keeps together even where they are masked; with float64 masked blocks
    # have the wide ones' size.
    if dtype.itemsize < 8:
        assert not re.search(r"\bst\.shared\.v[24]", text)


def per_block(size: int, target: str) -> int:
    """16-byte accesses with which one thread moves its part of a block of ``size`` bytes."""
    return size // 16 // (table.NUM_WARPS * TARGETS[target][2])


def assembly(kernel: Any) -> str:
    return str(kernel.asm.get("ptx") or kernel.asm["amdgcn"])


def assert_nothing_is_spilled(kernel: Any, target: str, tmp_path: Path, operation: str = "") -> None:
    if target.startswith("gfx"):
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly(kernel)) == ["0"]
        assert re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly(kernel)) == ["0"]
        return
    assert not re.search(r"\b(?:ld|st)\.local", assembly(kernel))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.is_file():
        return
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [cuobjdump, "--dump-resource-usage", binary]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    allowed = max(STACK, LION_STACK if "lion" in operation else 0)
    assert all(int(stack) <= allowed and local == "0" for _, stack, local in found), usage


@each_target
@each_dtype
def test_grad_norm(compiled, target, dtype, tmp_path):
    (kernel,) = compiled(target, "grad_norm", dtype)
    text = assembly(kernel)
    # The gradients of SAM, the gradients and weights of ASAM.
    assert wide(text, target)[0] >= 3 * per_block(table.BLOCK * dtype.itemsize, target)
    amd, nvidia = r"\bv_(?:pk_)?(?:add|mul|fma|fmac)_f{}", r"\b(?:add|mul|fma)[\w.]*\.f{}"
    arithmetic = amd if target.startswith("gfx") else nvidia
    assert re.search(arithmetic.format(64), text)
    assert not re.search(arithmetic.format(32), text)
    assert_nothing_is_spilled(kernel, target, tmp_path)
    assert_narrow_accesses(kernel, target, dtype, (3, 0))


@each_target
@each_dtype
def test_perturb(compiled, target, dtype, tmp_path):
    (kernel,) = compiled(target, "perturb", dtype)
    text = assembly(kernel)
    # Two arrays are read and two are written, by SAM and by ASAM.
    expected = 4 * per_block(table.BLOCK * dtype.itemsize, target)
    loads, stores = wide(text, target)
    assert loads >= expected
    assert stores >= expected
    assert ".ftz" not in text
    if target.startswith("gfx"):
        assert not re.search(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_(?:f16|f32|bf16)", text)
        # Division and square root are made of fused multiply-adds there; the rest is not.
        scalar = assembly(*compiled(target, "perturb", torch.float32))
        assert len(re.findall(r"\bv_fmac?_f64", text)) == len(re.findall(r"\bv_fmac?_f64", scalar))
    else:
        assert not re.search(r"\bfma\.", text)
        assert "sqrt.rn.f64" in text
        assert "div.rn.f64" in text
        if dtype in (torch.bfloat16, torch.float16):
            assert re.search(r"\bcvt\.rn\.b?f16x2\.f32", text)
    assert_nothing_is_spilled(kernel, target, tmp_path)
    assert_narrow_accesses(kernel, target, dtype, (4, 4))


@each_target
@pytest.mark.parametrize("operation", ["backup", "restore"])
@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.float16, torch.float32, torch.float64, torch.complex128],
    ids=lambda d: f"{d.itemsize}-byte",
)
def test_copy(compiled, target, operation, dtype, tmp_path):
    (kernel,) = compiled(target, operation, dtype)
    loads, stores = wide(assembly(kernel), target)
    assert loads >= per_block(copy.BLOCK_BYTES, target)
    assert stores >= per_block(copy.BLOCK_BYTES, target)
    assert_nothing_is_spilled(kernel, target, tmp_path)
    assert_narrow_accesses(kernel, target, dtype, (1, 1))


@pytest.mark.parametrize("operation", STEPS)
@pytest.mark.parametrize(("target", "dtype"), UPDATED, ids=lambda x: str(x).removeprefix("torch."))
def test_steps(compiled, target, operation, dtype, tmp_path):
    """With every option: scaled gradients, counters on the device and, for 16 bits, stochastic rounding."""
    key = 7 if dtype.itemsize == 2 else None
    (kernel,) = compiled(target, operation, dtype, {"scaled": True, "device_counters": True, "key": key})
    text = assembly(kernel)
    module = importlib.import_module(f"sam_fast.kernels.{operation}")
    fuses = "tl.fma" in Path(module.__file__).read_text()
    # How many states there are, with and without what is optional.
    cases = {len(module.STATES), len([option for option in module.STATES.values() if option is None])}
    # Arrays that are read and written, in each case and by the copy of a step that is skipped.
    reads, writes = 1 + sum(2 + states for states in cases), 1 + sum(1 + states for states in cases)
    loads, stores = wide(text, target)
    block = per_block(step.BLOCK_BYTES, target)
    assert block >= 1
    assert loads >= reads * block
    assert stores >= writes * block
    bits = 64 if dtype == torch.float64 else 32
    if target.startswith("gfx"):
        assert re.search(rf"\bv_(?:pk_)?fmac?_f{bits}", text) or not fuses
        assert f"v_div_fixup_f{bits if operation == 'adam' else 32}" in text
    else:
        assert bool(re.search(rf"\bfma\.rn\.f{bits}", text)) is fuses
        assert not re.search(r"\b(?:div|sqrt)\.(?:full|approx)", text)
        if operation == "adam":
            assert f"div.rn.f{bits}" in text
            assert f"sqrt.rn.f{bits}" in text
    assert_nothing_is_spilled(kernel, target, tmp_path, operation)
    assert_narrow_accesses(kernel, target, dtype, (reads - 1, writes - 1))  # but for the copy


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_steps_have_their_rules_options_and_states(rule):
    module = importlib.import_module(f"sam_fast.kernels.{rule.name}")
    assert rule.options == module.OPTIONS
    assert rule.states == tuple(module.STATES)
    assert (rule.counter is not None) is module.COUNTS
    assert all(option is None for option in list(module.STATES.values())[:-1])


def test_steps_keep_subnormal_numbers(compiled):
    """Without the power in float64, in whose code .ftz is harmless."""
    for operation in STEPS:
        assert ".ftz" not in assembly(*compiled("sm_90", operation, torch.float32))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_launch_says_whether_multiply_adds_are_fused(compiled, operation):
    """The default changed between Triton versions."""
    (kernel,) = compiled("sm_90", operation, torch.float32)
    assert kernel.metadata.enable_fp_fusion is (operation == "grad_norm")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_kernel_whatever_the_numbers(compiled, operation):
    """Nothing is compiled anew for another size, step, option or model; eps stays a float64."""
    kernels = compiled(
        "sm_90",
        operation,
        torch.bfloat16,
        {"chunks": 1, "tensors": 1, "ticket": 1, "eps": 0.0, "key": 1, "scaled": True},
        {"chunks": 16, "tensors": 16, "ticket": 16, "eps": 1.0, "key": 16, "scaled": True},
        {"chunks": 7, "tensors": 3, "offset": 1, "ticket": 1 << 20, "eps": 0.1, "key": (1 << 32) - 1, "scaled": True},
        {"chunks": 32, "tensors": 64, "offset": 2, "ticket": 17, "key": 1 << 31, "scaled": True},
    )
    assert len(kernels) == 4
    assert len({id(kernel) for kernel in kernels}) == 1
    assert kernels[0].src.signature.get("eps", "fp64") == "fp64"
