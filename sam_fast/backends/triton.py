"""The ``triton`` backend: the kernels of ``sam_fast.kernels`` on NVIDIA, AMD and Intel GPUs.

With ``TRITON_INTERPRET=1`` it takes CPU tensors. triton is imported when the first bucket is built, not with sam_fast.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from array import array
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling
from ..devices import made_current
from ..steps import RULES
from .bucket import Bucket, GroupOptions, StepOptions
from .columns import column
from .native import DTYPE_CODES, NativeBackend, NativeBucket
from .upload import Upload

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether triton's interpreter stands in for a GPU; triton itself decides when the kernels are imported."""

PROGRAMS_PER_MULTIPROCESSOR = 8
"""At most this many. With 128 threads each they are half of what a multiprocessor holds: enough loads are under way,
and there are few partial sums.
"""

INTERPRETED_PROGRAMS = 4


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _kernels(module: str) -> Any:
    """The module ``sam_fast.kernels.<module>``."""
    knobs = importlib.import_module("triton").knobs
    if bool(knobs.runtime.interpret) is not INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET has changed since sam_fast was imported: set it before")
    return importlib.import_module(f"sam_fast.kernels.{module}")


def _load_a_kernel(device: torch.device) -> None:
    with made_current(device):
        kernel = _kernels("grad_norm").compiled(torch.empty(5, dtype=torch.int64, device=device), torch.float32)
        _ = kernel.run


@cache
def _why_unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None. Cached: what Triton needs does not come or go."""
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return "it has no float64 (the norm is summed in it)"
    try:
        _load_a_kernel(device)
    except Exception as error:  # of Triton, of the compilers that it calls, of the driver
        first_line = str(error).strip().partition("\n")[0]
        needs = "It needs a C compiler, Python's headers and a folder to write to"
        return f"triton cannot build a kernel ({type(error).__name__}: {first_line}). {needs}"
    return None


@cache
def _multiprocessors(device: torch.device) -> int:
    properties = getattr(torch, device.type).get_device_properties(device)
    return int(properties.multi_processor_count if device.type == "cuda" else properties.gpu_subslice_count)


def _programs_at_once(kernel: Any, device: torch.device) -> int:
    """How many programs of a kernel a multiprocessor runs at once, at most ``PROGRAMS_PER_MULTIPROCESSOR``.

    On NVIDIA GPUs its registers decide. Elsewhere neither Triton nor PyTorch says how many there are.
    """
    if device.type != "cuda" or torch.version.hip:
        return PROGRAMS_PER_MULTIPROCESSOR
    _ = kernel.run  # loads the machine code: only the driver knows its registers
    properties: Any = torch.cuda.get_device_properties(device)
    threads = kernel.metadata.num_warps * properties.warp_size
    registers = -(-kernel.n_regs // 8) * 8 * threads  # allocated in units of eight
    fit = min(properties.regs_per_multiprocessor // registers, properties.max_threads_per_multi_processor // threads)
    return int(max(1, min(PROGRAMS_PER_MULTIPROCESSOR, fit)))


class TritonBucket(NativeBucket):
    """The addresses, their copies on the device, and which backup was written.

    An interruption may come between a launch and a note that it was made. So the tensors are noted as saved before the
    launch, which gets a new ticket. The kernel that writes the backup leaves its ticket on the device, and restore does
    nothing unless it finds that ticket there.
    """

    backend = "triton"
    steps = frozenset(rule.name for rule in RULES if find_spec(f"sam_fast.kernels.{rule.name}"))
    decides_on_device = True
    counts = False
    proves_backup = True

    def __init__(self, tensors: Sequence[Tensor], groups: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(tensors, groups, *args, **kwargs)
        with torch.inference_mode(False):
            self._chunks = self.chunks.to(self.device)
            self._written = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ticket = 0
        self._programs: dict[str, int] = {}
        if not INTERPRETED and self.dtype in DTYPE_CODES:
            with made_current(self.device):
                self._learn("grad_norm", _kernels("grad_norm").compiled(self._chunks, self.dtype))
        self.directions = Upload(self.device)
        self.targets = Upload(self.device)
        self.addresses = Upload(self.device)
        self.numbers = Upload(self.device)

    def _programs_for(self, operation: str) -> int:
        """How many programs share the chunks out: as many as the device runs at once. More would wait for others."""
        most = INTERPRETED_PROGRAMS if INTERPRETED else _multiprocessors(self.device) * PROGRAMS_PER_MULTIPROCESSOR
        return max(1, min(len(self._chunks), self._programs.get(operation, most)))

    def _learn(self, operation: str, kernel: Any) -> None:
        """Note how many programs of an operation run at once, for its next launch. Any number gives the same result."""
        if kernel is not None and operation not in self._programs:
            self._programs[operation] = _multiprocessors(self.device) * _programs_at_once(kernel, self.device)

    @cached_property
    def num_partials(self) -> int:
        return self._programs_for("grad_norm")

    @property
    def _backup_bytes(self) -> Tensor:
        # If nothing was ever saved there is no backup. Other memory stands in for it, and is not read.
        return (self.backup if "backup" in vars(self) else self._chunks).view(torch.uint8)

    # ---- First step --------------------------------------------------------------------------------------------------

    def collect(self, options: GroupOptions, along: list[Tensor | None] | None = None) -> bool:
        self.directions.begin()
        return super().collect(options, along)

    def _directions(self, options: GroupOptions) -> Tensor:
        """Weights, direction and group options on the device."""
        parts = (self._weights, self._along, options.values)
        return self.directions.send(b"".join(part.tobytes() for part in parts))

    def grad_norm(self, options: GroupOptions, partials: Tensor) -> None:
        launch = _kernels("grad_norm").grad_norm
        with made_current(self.device):
            launch(self._chunks, self._directions(options), len(self.tensors), partials, self.dtype)

    def launch_perturb(self, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        launch = _kernels("perturb").perturb
        with made_current(self.device):
            uploaded = self._directions(options)
            backup = self._backup_bytes
            count = self._mark_saved(self._along)
            kernel = launch(
                self._programs_for("perturb"),
                self._chunks,
                uploaded,
                len(self.tensors),
                partials,
                eps,
                norm,
                backup,
                self._written,
                self._ticket,
                options.rounding_key,
                self.dtype,
            )
            self._learn("perturb", kernel)
        return count

    # ---- Backup ------------------------------------------------------------------------------------------------------

    def _mark_saved(self, addresses: array[int]) -> int:
        """Note that the tensors with an address are backed up by the next launch; returns their number."""
        self._ticket += 1
        count = len(addresses) - addresses.count(0)
        if count == self._occupied:
            self._saved[:] = self._weights
        else:
            for index, address in enumerate(addresses):
                if address:
                    self._saved[index] = self._weights[index]
        return count

    def _mark_restored(self, addresses: array[int]) -> None:
        for index, address in enumerate(addresses):
            if address:
                self._saved[index] = 0

    def is_backed_up(self) -> bool:
        return int(self._written) == self._ticket

    def _saved_targets(self) -> array[int]:
        """The present addresses of the tensors that are saved."""
        pairs = zip(self._weights, self._saved, strict=True)
        return array("Q", [address if saved else 0 for address, saved in pairs])

    def launch_copy(self, restore: bool, release: bool) -> None:
        targets = self._saved_targets() if restore else self._weights
        if any(targets):
            operation = "restore" if restore else "backup"
            launch = getattr(_kernels("copy"), operation)
            self.targets.begin()
            with made_current(self.device):
                uploaded = self.targets.send(targets.tobytes())
                backup = self._backup_bytes
                if not restore:
                    self._mark_saved(self._weights)
                programs = self._programs_for(operation)
                itemsize = self.dtype.itemsize
                kernel = launch(programs, self._chunks, uploaded, backup, self._written, self._ticket, itemsize)
                self._learn(operation, kernel)
        if restore and release:
            self._mark_restored(self._weights)

    def _restore_changed(self, changed: list[int], release: bool) -> None:
        # It waits for the device, but this case is rare.
        if any(self._saved[index] for index in changed) and not self.is_backed_up():
            for index in changed if release else ():
                self._saved[index] = 0
            return
        super()._restore_changed(changed, release)

    # ---- Second step -------------------------------------------------------------------------------------------------

    def share_saved(self, source: Bucket) -> None:
        super().share_saved(source)
        assert isinstance(source, TritonBucket)
        self._written, self._ticket = source._written, source._ticket  # the proof goes with the backup

    def launch_step(self, options: StepOptions, scaling: Scaling) -> int:
        rule = options.rule
        if any(self._along):
            module = _kernels(rule.name)
            launch = _kernels("step").step
            common, counted = self._counted_numbers(options, module) if module.COUNTS else ((1.0, 1.0), array("d"))
            self.addresses.begin()
            self.numbers.begin()
            with made_current(self.device):
                kernel = launch(
                    module,
                    self._programs_for(rule.name),
                    self._chunks,
                    self._step_table(options),
                    len(self.tensors),
                    self.numbers.send((counted + options.values).tobytes()),
                    self._backup_bytes,
                    self._written,
                    self._ticket,
                    scaling.grad_scale,
                    scaling.found_inf,
                    options.rounding_key,
                    self.dtype,
                    self.device_counters,
                    common,
                )
                self._learn(rule.name, kernel)
        self._mark_restored(self._along)
        return len(self._saved) - self._saved.count(0)

    def _step_table(self, options: StepOptions) -> Tensor:
        """The address table of a fused step (kernels/step.py) on the device."""
        rule, size = options.rule, len(self.tensors)
        parts = [self._weights, self._along, self._saved_targets()]
        if rule.counter is not None:
            parts.append(self._counters if self.device_counters else column(size))
        parts += self._states[: len(rule.states)]
        rates = array("Q")
        for lr in options.learning_rates or [None] * options.num_groups:
            rates.extend((0, 0) if lr is None else (lr.data_ptr(), lr.element_size()))
        return self.addresses.send(b"".join(part.tobytes() for part in (*parts, rates)))

    def _counted_numbers(self, options: StepOptions, module: Any) -> tuple[tuple[float, float], array[float]]:
        """The two numbers that follow from the number of the coming step; if only the device knows that, the bases from
        which it computes them.

        Returns those of the first tensor, and a table for all tensors, with zeros where they are the same as the first
        one's. So the table need not be copied at every step as long as all tensors have taken equally many steps.
        """
        table = array("d", bytes(16 * len(self.tensors)))
        common: tuple[float, float] | None = None
        known: dict[tuple[int, float], tuple[float, float]] = {}
        for index, step in zip(self._counted(), self._steps, strict=True):
            group, t = self.groups[index], 0.0 if self.device_counters else step.item() + 1.0
            if (group, t) not in known:
                of_group = options.of(group)
                known[group, t] = module.bases(of_group) if self.device_counters else module.counted(of_group, t)
            common = common or known[group, t]
            if known[group, t] != common:
                table[2 * index], table[2 * index + 1] = known[group, t]
        return common or (1.0, 1.0), table


class TritonBackend(NativeBackend):
    name = "triton"
    bucket = TritonBucket

    def unavailable(self) -> str | None:
        if not _installed():
            return "triton is not installed: pip install sam_fast[triton]"
        if not INTERPRETED and not torch.cuda.is_available() and not torch.xpu.is_available():
            return (
                "PyTorch finds no GPU that Triton can compile for, and its interpreter is not asked for "
                "(TRITON_INTERPRET=1 before the import)"
            )
        return None

    def build_info(self) -> dict[str, str]:
        if not _installed():
            return {}
        interpreter = "yes (TRITON_INTERPRET=1)" if INTERPRETED else "no"
        return {"version": importlib.metadata.version("triton"), "interpreter": interpreter}

    def rejects_device(self, tensor: Tensor) -> str | None:
        device = tensor.device
        if INTERPRETED and device.type != "cpu":
            return f"a tensor on {device} (with TRITON_INTERPRET=1 the triton backend takes CPU tensors)"
        if not INTERPRETED and device.type not in ("cuda", "xpu"):
            takes = "the triton backend takes tensors on cuda and xpu; on the CPU with TRITON_INTERPRET=1"
            return f"a tensor on {device} ({takes})"
        return None

    def unusable_on(self, device: torch.device) -> str | None:
        return None if INTERPRETED else _why_unusable(device)


BACKEND = TritonBackend()
