"""The ``triton`` backend: the kernels of ``sam_fast.kernels`` on NVIDIA, AMD and Intel GPUs; with ``TRITON_INTERPRET=1`` on CPU tensors.

triton is imported when the first bucket is built, not with sam_fast.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
from array import array
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..devices import is_capturing, made_current
from .addresses import DTYPE_CODES, AddressBackend, AddressTable
from .base import GroupOptions, StateTensors

if TYPE_CHECKING:
    from ..amp import Scaling
    from ..bucket import Bucket

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether triton's interpreter stands in for a GPU; triton itself decides when the kernels are imported."""

PROGRAMS_PER_MULTIPROCESSOR = 8
"""At most. With 128 threads each, half of what a multiprocessor holds: enough loads under way, and few partial sums."""

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


@cache
def _multiprocessors(device: torch.device) -> int:
    properties = getattr(torch, device.type).get_device_properties(device)
    return int(properties.multi_processor_count if device.type == "cuda" else properties.gpu_subslice_count)


def _programs_at_once(kernel: Any, device: torch.device) -> int:
    """How many programs of a compiled kernel a multiprocessor runs at once, but at most ``PROGRAMS_PER_MULTIPROCESSOR``.

    On NVIDIA GPUs its registers decide. Elsewhere neither Triton nor PyTorch says how many there are.
    """
    if device.type != "cuda" or torch.version.hip:
        return PROGRAMS_PER_MULTIPROCESSOR
    _ = kernel.run  # loads the machine code: only the driver knows its registers
    properties: Any = torch.cuda.get_device_properties(device)
    threads = kernel.metadata.num_warps * properties.warp_size
    registers = -(-kernel.n_regs // 8) * 8 * threads  # they are given out in eights
    fit = min(properties.regs_per_multiprocessor // registers, properties.max_threads_per_multi_processor // threads)
    return int(max(1, min(PROGRAMS_PER_MULTIPROCESSOR, fit)))


class _Copies(NamedTuple):
    host: Tensor
    device: Tensor


class Upload:
    """8-byte numbers that the host keeps, in device memory: copied when they are not those that were sent last.

    A graph replays its copies, from the memory it was captured with to the memory it was captured with. So what a capture uses is written by nothing
    else afterwards, and is kept as long as this object. If the numbers are what an eager operation has sent last, a capture uses that memory and
    copies nothing. Otherwise it takes a spare pair: pinned memory should not be allocated while a graph is captured.
    """

    SPARES = 2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploads = 0
        self._captured = False
        self._sent: tuple[bytes, Tensor] | None = None  # valid for the operation that has begun
        self._eager: tuple[bytes, Tensor] | None = None  # None while it is not known what the device has
        self._memory: Tensor | None = None  # of eager operations
        self._spares: list[_Copies] = []
        self._kept: list[_Copies | Tensor] = []

    def begin(self) -> None:
        """Start an operation, or several that follow each other on the device: a graph must hold the copies that its kernels read."""
        self._captured = is_capturing(self.device)
        self._sent = None

    def send(self, numbers: bytes) -> Tensor:
        """An int64 tensor on the device with ``numbers``; they are valid for what is launched after this call."""
        if self._sent is None or self._sent[0] != numbers:
            self._sent = None  # if this is interrupted, it is not known what the device has
            with torch.inference_mode(False):
                self._sent = (numbers, self._send_captured(numbers) if self._captured else self._send(numbers))
        return self._sent[1]

    def _send(self, numbers: bytes) -> Tensor:
        if self._eager is not None and self._eager[0] == numbers:
            return self._eager[1]
        self._eager = None
        count = len(numbers) // 8
        if self._memory is None or self._memory.numel() != count:
            self._memory = self._new_device(count)
        # A new pinned tensor each time: an earlier copy may still be reading the last one. PyTorch reuses its memory when that is done.
        self._copy(numbers, _Copies(self._new_host(count), self._memory))
        self._eager = (numbers, self._memory)
        if not self._spares or self._spares[0].device.numel() != count:
            self._spares.clear()
        while len(self._spares) < self.SPARES:
            self._spares.append(self._new(count))
        return self._memory

    def _send_captured(self, numbers: bytes) -> Tensor:
        if self._eager is not None and self._eager[0] == numbers:
            if self._memory is self._eager[1]:
                self._kept.append(self._memory)
                self._memory = None  # eager operations write elsewhere from now on
            return self._eager[1]
        count = len(numbers) // 8
        fits = bool(self._spares) and self._spares[-1].device.numel() == count
        copies = self._spares.pop() if fits else self._new(count)
        self._kept.append(copies)
        self._copy(numbers, copies)
        return copies.device

    def _copy(self, numbers: bytes, copies: _Copies) -> None:
        copies.host.copy_(torch.frombuffer(bytearray(numbers), dtype=torch.int64))
        copies.device.copy_(copies.host, non_blocking=True)
        self.uploads += 1

    def _new_host(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=self.device.type != "cpu")

    def _new(self, count: int) -> _Copies:
        return _Copies(self._new_host(count), self._new_device(count))

    def _new_device(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self.device)


class TritonTable(AddressTable):
    """The addresses, their copies on the device, and which backup was written.

    A signal can come between a launch and the note that it was made. So the note, ``saved``, is made before the launch, with a ticket that no
    launch before had; the kernel that writes the backup leaves the ticket on the device, and ``restore`` does nothing unless it finds it there.
    """

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        device = bucket.device
        with torch.inference_mode(False):
            self.chunks = bucket.chunks.to(device)
            self.written = torch.zeros(1, dtype=torch.int64, device=device)
        self.device = device
        self.ticket = 0
        self.num_rows = len(bucket.rows)
        self._programs: dict[str, int] = {}
        if not INTERPRETED and bucket.dtype in DTYPE_CODES:
            with made_current(device):
                self.learn("grad_norm", _kernels("grad_norm").compiled(self.chunks, bucket.dtype))
        self.climb = Upload(device)
        self.targets = Upload(device)
        self.addresses = Upload(device)
        self.numbers = Upload(device)

    def programs(self, operation: str) -> int:
        """How many programs share the chunks out: as many as the device runs at once. More would wait until others have ended."""
        default = INTERPRETED_PROGRAMS if INTERPRETED else _multiprocessors(self.device) * PROGRAMS_PER_MULTIPROCESSOR
        return max(1, min(len(self.chunks), self._programs.get(operation, default)))

    def learn(self, operation: str, kernel: Any) -> None:
        """Note what an operation was compiled to, for its next launch; its result is the same with any number of programs."""
        if kernel is not None and operation not in self._programs:
            self._programs[operation] = _multiprocessors(self.device) * _programs_at_once(kernel, self.device)

    def climb_table(self, options: GroupOptions) -> Tensor:
        """Weights, gradients and group options on the device."""
        return self.climb.send(self.weights.tobytes() + self.grads.tobytes() + options.values.tobytes())

    def mark_saved(self, rows: array[int]) -> tuple[int, int]:
        """Note that the rows with an address in ``rows`` are backed up; returns the ticket for the launch that does it, and their number."""
        self.ticket += 1
        count = self.num_rows - rows.count(0)
        if count == self.occupied:
            self.saved[:] = self.weights
        else:
            for row, address in enumerate(rows):
                if address:
                    self.saved[row] = self.weights[row]
        return self.ticket, count

    def saved_targets(self) -> bytes:
        """The present addresses of the rows that are saved."""
        if self.all_saved:
            return self.weights.tobytes()
        return array("Q", [address if saved else 0 for address, saved in zip(self.weights, self.saved, strict=True)]).tobytes()

    def release_saved(self) -> None:
        """Note that the rows that have an address are as they were."""
        for row, address in enumerate(self.weights):
            if address:
                self.saved[row] = 0

    def share_saved(self, source: AddressTable, source_params: list[list[Tensor]]) -> None:
        super().share_saved(source, source_params)
        assert isinstance(source, TritonTable)
        self.written, self.ticket = source.written, source.ticket  # the proof goes with the backup

    def step_table(self, state: StateTensors, names: tuple[str, ...], num_groups: int) -> Tensor:
        """The address table of a fused second step (kernels/update.py) on the device."""
        parts = [self.weights.tobytes(), self.grads.tobytes(), self.saved_targets()]
        for name in names:
            on_host = name == "step" and not state.device_steps
            parts.append(bytes(8 * self.num_rows) if on_host else self.states[name].addresses.tobytes())
        rates = array("Q")
        for lr in state.learning_rates or [None] * num_groups:
            rates.extend((0, 0) if lr is None else (lr.data_ptr(), lr.element_size()))
        return self.addresses.send(b"".join([*parts, rates.tobytes()]))

    def release_stepped(self) -> bool:
        """Note that the rows with a gradient are as the step left them; returns whether others are still saved."""
        self.all_saved = False
        for row, address in enumerate(self.grads):
            if address:
                self.saved[row] = 0
        self.release_copies()
        return any(self.saved)

    def restore_changed(self, changed: list[int], backups: list[Tensor], release: bool) -> None:
        if any(self.saved[row] for row in changed) and int(self.written) != self.ticket:  # waits for the device, but this case is rare
            if release:
                for row in changed:
                    self.saved[row] = 0
            return
        super().restore_changed(changed, backups, release)


class TritonBackend(AddressBackend):
    name = "triton"

    def unavailable(self) -> str | None:
        if not _installed():
            return "triton is not installed: pip install sam_fast[triton]"
        if not INTERPRETED and not torch.cuda.is_available() and not torch.xpu.is_available():
            return "PyTorch finds no GPU that Triton can compile for, and its interpreter is not asked for (TRITON_INTERPRET=1 before the import)"
        return None

    def build_info(self) -> dict[str, str]:
        if not _installed():
            return {}
        return {"version": importlib.metadata.version("triton"), "interpreter": "yes (TRITON_INTERPRET=1)" if INTERPRETED else "no"}

    def rejects_device(self, tensor: Tensor) -> str | None:
        device = tensor.device
        if INTERPRETED and device.type != "cpu":
            return f"a tensor on {device} (with TRITON_INTERPRET=1 the triton backend takes CPU tensors)"
        if not INTERPRETED and device.type not in ("cuda", "xpu"):
            return f"a tensor on {device} (the triton backend takes tensors on cuda and xpu; on the CPU with TRITON_INTERPRET=1)"
        if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
            return f"a tensor on {device}, which has no float64 (the norm is summed in it)"
        return None

    def attach(self, bucket: Bucket) -> TritonTable:
        return TritonTable(bucket)

    def num_partials(self, bucket: Bucket) -> int:
        table: TritonTable = bucket.table
        return table.programs("grad_norm")

    def collect(self, bucket: Bucket, options: GroupOptions) -> bool:
        table: TritonTable = bucket.table
        table.climb.begin()
        return super().collect(bucket, options)

    def grad_norm(self, bucket: Bucket, options: GroupOptions, partials: Tensor) -> None:
        table: TritonTable = bucket.table
        with made_current(bucket.device):
            _kernels("grad_norm").grad_norm(table.chunks, table.climb_table(options), table.num_rows, partials, bucket.dtype)

    def launch_perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> int:
        table: TritonTable = bucket.table
        launch = _kernels("perturb").perturb
        with made_current(bucket.device):
            uploaded = table.climb_table(options)
            flat = bucket.flat.view(torch.uint8)
            ticket, count = table.mark_saved(table.grads)
            key = options.rounding_key
            table.learn(
                "perturb",
                launch(
                    table.programs("perturb"),
                    table.chunks,
                    uploaded,
                    table.num_rows,
                    partials,
                    eps,
                    norm,
                    flat,
                    table.written,
                    ticket,
                    key,
                    bucket.dtype,
                ),
            )
        return count

    def launch_copy(self, bucket: Bucket, restore: bool, release: bool) -> None:
        table: TritonTable = bucket.table
        targets = table.saved_targets() if restore else table.weights.tobytes()
        if any(targets):
            operation = "restore" if restore else "backup"
            launch = getattr(_kernels("copy"), operation)
            table.targets.begin()
            with made_current(bucket.device):
                uploaded = table.targets.send(targets)
                flat = bucket.flat.view(torch.uint8)
                ticket = table.ticket if restore else table.mark_saved(table.weights)[0]
                programs = table.programs(operation)
                table.learn(operation, launch(programs, table.chunks, uploaded, flat, table.written, ticket, bucket.dtype.itemsize))
        if restore and release:
            table.release_saved()

    fused_steps = frozenset({"restore_sgd", "restore_adam"})

    decides_on_device = True

    def restore_sgd(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        self._restore_and_step("restore_sgd", bucket, state, scaling, ("momentum_buffer",), state.groups, len(state.groups) // 6)

    def restore_adam(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        table: TritonTable = bucket.table
        steps = state.tensors["step"]
        # A row without elements has no address, but a counter.
        rows = [row for row, p in enumerate(bucket.rows) if table.grads[row] or (state.device_steps and p.numel() == 0 and steps[row] is not None)]
        counters = [step for row in rows if (step := steps[row]) is not None]
        common, corrections = _bias_corrections(bucket, state, rows)
        names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        groups = len(state.groups) // 8
        self._restore_and_step("restore_adam", bucket, state, scaling, names, corrections + state.groups, groups, state.device_steps, common)
        # After the launch: one that fails has counted nothing.
        if counters:
            torch._foreach_add_(counters, 1.0 if scaling.found_inf is None else 1.0 - scaling.found_inf.reshape(()))

    def _restore_and_step(
        self,
        operation: str,
        bucket: Bucket,
        state: StateTensors,
        scaling: Scaling,
        names: tuple[str, ...],
        numbers: array[float],
        num_groups: int,
        *more: Any,
    ) -> None:
        table: TritonTable = bucket.table
        if any(table.grads):
            launch = getattr(_kernels(operation), operation)
            table.addresses.begin()
            table.numbers.begin()
            with made_current(bucket.device):
                kernel = launch(
                    table.programs(operation),
                    table.chunks,
                    table.step_table(state, names, num_groups),
                    table.num_rows,
                    table.numbers.send(numbers.tobytes()),
                    bucket.flat.view(torch.uint8),
                    table.written,
                    table.ticket,
                    scaling.grad_scale,
                    scaling.found_inf,
                    state.rounding_key,
                    bucket.dtype,
                    *more,
                )
                table.learn(operation, kernel)
        if table.release_stepped():  # rows whose gradient vanished between the passes
            self.launch_copy(bucket, True, True)


def _bias_corrections(bucket: Bucket, state: StateTensors, rows: list[int]) -> tuple[tuple[float, float], array[float]]:
    """``1 - beta1^t`` and ``sqrt(1 - beta2^t)``, t being the number of the step to come; ``log2(beta)`` if the device knows t.

    Returns those of the first row, and a table with those of every row, but zeros where they are the first row's: it need not be copied to the
    device at every step as long as all rows have stepped as often as each other.
    """
    corrections = array("d", bytes(16 * len(bucket.rows)))
    common: tuple[float, float] | None = None
    known: dict[tuple[int, float], tuple[float, float]] = {}
    for row in rows:
        step = state.tensors["step"][row]
        assert step is not None
        group, t = bucket.groups[row], 0.0 if state.device_steps else step.item() + 1.0
        if (group, t) not in known:
            beta1, beta2 = state.groups[8 * group + 1 : 8 * group + 3]
            if state.device_steps:
                known[group, t] = _log2(beta1), _log2(beta2)
            else:
                known[group, t] = 1.0 - beta1**t, math.sqrt(1.0 - beta2**t)
        common = common or known[group, t]
        if known[group, t] != common:
            corrections[2 * row], corrections[2 * row + 1] = known[group, t]
    return common or (1.0, 1.0), corrections


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0.0 else -math.inf


BACKEND = TritonBackend()
