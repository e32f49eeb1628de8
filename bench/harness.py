"""How a benchmark is measured: interleaved with its baselines in one process, in random order, next to a bandwidth
measured in the same rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.clock import BASELINE, OURS, WARMUP, DeviceTimer, Gpu, HostTimer, Rehearsal, Timer
from bench.records import COPY, Record
from sam_fast import SAM, backends

COPY_BYTES = {"cpu": 64_000_000, "cuda": 1 << 30}
"""How much the streaming copy copies: more than the caches of the machines this runs on."""

PARTS = tuple(range(5))
"""On a CPU, cases are measured in so many parts, minutes apart, and their rounds put together: whoever shares the
machine's memory comes and goes.
"""
FEWER_PARTS = PARTS[::2]
"""Of large cases, whose contenders are made anew for each part: together they would not fit the memory."""

CACHES = 10
"""How many times a GPU's cache the bytes that move must be, for their rate to be the memory's: a tenth may be cached.
"""

BYTES_PER_ELEMENT = {"grad_norm": 4, "perturb": 16, "restore": 8, "step_sgd": 20, "step_adam": 28}
"""Bytes that must move per float32 element: norm reads g; perturb reads w and g, writes w and the backup; restore
copies; step_sgd, which restores and steps in one, reads backup, g and momentum and writes w and momentum; step_adam the
same with two moments."""


T = TypeVar("T")


# ---- What is measured ------------------------------------------------------------------------------------------------


def nothing() -> None:
    pass


class Contender:
    """What is timed: one piece of work, or several ``stages`` one after the other, each timed by itself.

    ``prepare`` runs before and ``finish`` after each stage, untimed. ``head_start``: see bench/clock.py; on the CPU
    there is none.
    """

    def __init__(
        self,
        run: Callable[[], object] | dict[str, Callable[[], object]],
        prepare: Callable[[], object] = nothing,
        finish: Callable[[], object] = nothing,
        head_start: float | None = BASELINE,
    ) -> None:
        self.stages = run if isinstance(run, dict) else {"": run}
        self.prepare = prepare
        self.finish = finish
        self.head_start = head_start


@dataclass
class Plan:
    """How long to measure."""

    seconds: float = 5.0
    """For all rounds of all contenders together."""
    rounds: tuple[int, int] = (9, 60)
    """At least and at most."""


GPU_PLAN = Plan(seconds=2.5, rounds=(11, 60))
"""Of every case on a GPU, which is measured in one part."""


class Machine:
    """Where a run's tensors are, and how their work is timed."""

    def __init__(self, kind: str) -> None:
        self.rehearsal = kind == "rehearsal"
        self.gpu = Rehearsal() if self.rehearsal else Gpu() if kind == "cuda" else None
        self.kind = "cuda" if self.gpu else "cpu"
        """What the records are of: a rehearsal's go where a GPU's would."""
        self.device = "cpu" if self.rehearsal else kind

    def timer(self, head_start: float | None) -> Timer:
        if self.gpu and head_start is not None:
            return DeviceTimer(head_start, self.gpu)
        return HostTimer(self.gpu.synchronize if self.gpu else nothing)

    def flush(self) -> None:
        """Leave a GPU's cache full of what was written last, for every contender alike."""
        if self.device != "cpu":
            streaming_copy(self.device).stages[""]()

    @cached_property
    def cache_bytes(self) -> int:
        return 0 if self.rehearsal or not self.gpu else int(torch.cuda.get_device_properties(0).L2_cache_size)


def measure(
    machine: Machine, contenders: dict[str, Contender], plan: Plan
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, Timer]]]:
    """Seconds by stage and contender, one number for each round; and what timed them.

    A round runs every contender once, in an order drawn anew, so that none always finds the caches and the allocator as
    the same other left them. Numbers of one round belong together: they are compared with each other.
    """
    times: dict[str, dict[str, list[float]]] = {}
    timers: dict[str, dict[str, Timer]] = {}
    for name, contender in contenders.items():
        for stage in contender.stages:
            times.setdefault(stage, {})[name] = []
            timers.setdefault(stage, {})[name] = machine.timer(contender.head_start)
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    settle_allocator()
    gc.disable()
    try:
        begin, rounds, done = 0.0, WARMUP + 1, 0
        while done < rounds:
            if done == 1:
                begin = time.perf_counter()  # the first round makes what is made once
            shuffle(order)
            for name in order:
                contender = contenders[name]
                for stage, run in contender.stages.items():
                    contender.prepare()
                    machine.flush()
                    times[stage][name].append(timers[stage][name](run))
                    contender.finish()
            done += 1
            if done == WARMUP:
                least, most = plan.rounds
                rounds = WARMUP + max(least, min(most, int(plan.seconds / max(time.perf_counter() - begin, 1e-9))))
    finally:
        gc.enable()
    return {
        stage: {name: values[WARMUP:] for name, values in by_name.items()} for stage, by_name in times.items()
    }, timers


@cache
def _glibc() -> Any:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


@cache
def fix_allocator() -> None:
    """Let glibc's allocator start where it ends up in every long-lived process.

    Its thresholds grow with the blocks that have been freed, up to 32 and 64 MiB. Whether a temporary costs page faults
    would otherwise depend on which benchmarks came before.
    """
    libc = _glibc()
    if libc is not None and hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)


BACKED_BYTES = 12 << 30
"""What the largest cases use together with what small ones keep."""


@cache
def back_memory() -> None:
    """Touch memory once, at most half of what is free.

    The host of a virtual machine provides memory when it is first touched, seven times as slowly as the kernel does
    afterwards. Whichever baseline comes to it first would pay for that, some 100 ms in each round.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.ones(min(BACKED_BYTES, free // 2), dtype=torch.uint8)


def settle_allocator() -> None:
    """Give freed memory back to the system: what a check or an earlier benchmark has used must not serve this one's
    temporaries.
    """
    fix_allocator()
    gc.collect()
    libc = _glibc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Bench:
    """Measures cases on one machine and collects their records.

    ``replay`` shows a record's rounds to pytest-benchmark.
    """

    def __init__(self, kind: str = "cpu", full: bool = False, smoke: bool = False) -> None:
        self.machine = Machine(kind)
        self.device = self.machine.device
        self.full = full
        self.smoke = smoke or self.machine.rehearsal
        """Does it run at all? Tiny shapes (shapes.shrink) and a few rounds; the figures say nothing."""
        self.parts = PARTS[:1] if self.machine.gpu else PARTS
        self.records: list[Record] = []
        self.shown: Record | None = None
        """What the last test has measured."""
        self.left_out: list[str] = []
        self._kept: dict[Any, Any] = {}
        self._checked: set[Any] = set()

    def kept(self, key: Any, part: int | None, make: Callable[[bool], T], anew: bool = False) -> T:
        """What the first part of a case has made, for its other parts; the last lets go of it.

        Args:
            key: names the case.
            part: None for a case that has none.
            make: makes the contenders; its argument says whether their results must still be checked.
            anew: keep nothing; the other parts only need no second check. For large cases.
        """
        if anew and not self.machine.gpu and not self.smoke:
            back_memory()
        made: T = self._kept.pop(key) if key in self._kept else make(key not in self._checked)
        self._checked.add(key)
        if not anew and part is not None and part != self.parts[-1]:
            self._kept[key] = made
        return made

    def run(
        self,
        group: str,
        case: str,
        contenders: dict[str, Contender],
        *,
        elements: int,
        bytes_moved: int | dict[str, int] | None = None,
        plan: Plan | None = None,
        total: str | None = None,
        **facts: Any,
    ) -> list[Record]:
        """Measure one case. The first contender is the one that the others are baselines of.

        Args:
            bytes_moved: that must move, for each stage where there are several; where given, the streaming copy joins
                the contenders. On a GPU it is left out where the cache would hold too much of it.
            total: name of a further record, the sum over the stages.
            facts: what else a reader of the record should know.

        Raises:
            AssertionError: a figure cannot be right (:meth:`Record.invalid`). The records are kept, and say so.
        """
        target = next(iter(contenders))
        plan = Plan(0.0, (3, 3)) if self.smoke else GPU_PLAN if self.machine.gpu else plan or Plan()
        by_stage = bytes_moved if isinstance(bytes_moved, dict) else {"": bytes_moved}
        by_stage = {
            stage: moved for stage, moved in by_stage.items() if moved and moved >= CACHES * self.machine.cache_bytes
        }
        rounds, timers = measure(
            self.machine, {**contenders, COPY: streaming_copy(self.device)} if by_stage else contenders, plan
        )
        copy_rounds = rounds[""].pop(COPY) if by_stage else []
        if not rounds.get(""):
            rounds.pop("", None)
        parts = {stage: [stage] for stage in rounds}
        if total is not None:
            sums = {
                name: [math.fsum(parts) for parts in zip(*(rounds[s][name] for s in rounds), strict=True)]
                for name in contenders
            }
            if all(stage in by_stage for stage in rounds):
                by_stage[total] = sum(by_stage.values())
            parts[total] = list(rounds)
            rounds = {total: sums, **rounds}
        made = []
        for stage, by_name in rounds.items():
            name = f"{stage}, {group}" if stage else group
            record = Record(
                name,
                case,
                target,
                by_name,
                elements,
                by_stage.get(stage),
                copy_rounds,
                COPY_BYTES[self.device] * 2,
                dict(facts),
            )
            record.facts |= {"device": self.machine.kind, "threads": torch.get_num_threads()}
            if self.machine.gpu:
                used = {name: [timers[part][name] for part in parts[stage]] for name in contenders}
                record.facts["timed by"] = {
                    name: "; ".join(dict.fromkeys(t.method for t in its)) for name, its in used.items()
                }
                record.facts["launches"] = {
                    name: sum(t.launches or 0 for t in its) for name, its in used.items() if its[0].launches is not None
                }
            made.append(self.add(record))
        self.shown = made[0]
        wrong = {record.key: record.invalid() for record in made if record.invalid()}
        assert not wrong, "; ".join(f"{key}: {reason}" for key, reason in wrong.items())
        return made

    def add(self, record: Record) -> Record:
        """Keep a record, or its rounds with those of the same case's earlier part. Returns what was kept."""
        earlier = next(
            (r for r in self.records if r.key == record.key and r.rounds.keys() == record.rounds.keys()), None
        )
        if earlier is None:
            self.records.append(record)
            return record
        earlier.rounds = {name: earlier.rounds[name] + rounds for name, rounds in record.rounds.items()}
        earlier.copy_rounds = earlier.copy_rounds + record.copy_rounds
        return earlier


@cache
def streaming_copy(device: str) -> Contender:
    """A plain copy: what the memory gives at this moment.

    On the CPU it is the backup kernel on one tensor, whose streaming stores make it half again as fast as
    ``Tensor.copy_``.
    """
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    if device != "cpu":
        target = torch.empty_like(source)
        return Contender(lambda: target.copy_(source), head_start=OURS)
    backend = backends.choose(source)
    bucket = backend.bucket([source], [0])
    return Contender(lambda: bucket.save(), head_start=OURS)


def usable(device: str) -> list[str]:
    """Backends that take this device's tensors, the preferred one first."""
    probe = torch.zeros(16, device=device)
    best = backends.choose(probe).name
    return sorted(
        (name for name in backends.available() if backends.BACKENDS[name].rejects(probe) is None),
        key=lambda name: name != best,
    )


# ---- Parameters and gradients ----------------------------------------------------------------------------------------


def make_params(
    shapes: Sequence[Sequence[int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[nn.Parameter]:
    """Parameters like a network's: weights of sd 0.02, gradients of sd 0.001 (never zeros: those are faster)."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        p = nn.Parameter((torch.randn(list(shape), generator=generator) * 0.02).to(device, dtype))
        p.grad = (torch.randn(list(shape), generator=generator) * 0.001).to(device, dtype)
        params.append(p)
    return params


def copies(params: Sequence[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    out = []
    for p in params:
        q = nn.Parameter(p.detach().clone().to(dtype or p.dtype))
        q.grad = gradient(p).clone().to(dtype or p.dtype)
        out.append(q)
    return out


class Backward:
    """Hands out gradients as a backward pass does: in new memory, last parameter first. ``zero_grad`` frees them."""

    def __init__(self, params: Sequence[nn.Parameter], gradients: Sequence[Tensor] | None = None) -> None:
        self.params = params
        self.gradients = [gradient(p).clone() for p in params] if gradients is None else gradients

    def __call__(self) -> None:
        for p, own in zip(reversed(self.params), reversed(self.gradients), strict=True):
            if p.grad is None:
                p.grad = own.clone()
            else:
                p.grad.copy_(own)  # flatten=True: gradients stay where they are


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


# ---- A wrong result is not timed -------------------------------------------------------------------------------------


@dataclass
class Method:
    """One way to make SAM's step, and the parameters it works on."""

    optimizer: Any
    params: list[nn.Parameter]
    settings: str = ""

    def contender(self, gradients: Sequence[Tensor], **head_start: float | None) -> Contender:
        """first_step and second_step as in a training loop: each finds the gradients of a new backward pass."""
        return Contender(
            {"first_step": self.optimizer.first_step, "second_step": self.optimizer.second_step},
            prepare=Backward(self.params, gradients),
            finish=self.optimizer.zero_grad,
            **{"head_start": OURS if isinstance(self.optimizer, SAM) else BASELINE, **head_start},
        )


@dataclass
class Problem:
    """What every method is given: weights, gradients, options. The gradients do not depend on the weights."""

    start: list[nn.Parameter]
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.05
    adaptive: bool = False
    checks: bool = True
    """False if an earlier part of the case has checked the same methods."""

    def gradients(self) -> list[Tensor]:
        return [gradient(p) for p in self.start]

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.start)

    def norm(self) -> float:
        """``||T g||`` in float64."""
        return math.sqrt(math.fsum(float((self._t(w) * g).square_().sum()) for w, g in self._pieces()))

    @cached_property
    def perturbed(self) -> list[Tensor]:
        """w + e in float64, in pieces."""
        scale = self.rho / (self.norm() + 1e-12)
        return [w + self._t(w) ** 2 * g * scale for w, g in self._pieces()]

    @cached_property
    def stepped(self) -> list[Tensor]:
        """The weights after ``STEPS`` steps of the base optimizer in float64, in pieces: the perturbation leaves no
        trace.
        """
        pieces = []
        for w, g in self._pieces():
            q = nn.Parameter(w)
            q.grad = g
            optimizer = self.base([q], fused=True, **self.options)
            for _ in range(STEPS):
                optimizer.step()
            pieces.append(q.detach())
        return pieces

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        weights, gradients = _flat(self.start), _flat(self.gradients())
        for w, g in zip(weights.split(PIECE), gradients.split(PIECE), strict=True):
            yield w.double(), g.double()

    def _t(self, w: Tensor) -> Tensor | float:
        return w.abs() if self.adaptive else 1.0

    def check(self, name: str, method: Method, norm_error: float = 0.0) -> None:
        """Refuse to time a wrong result: after its first first_step and after ``STEPS`` steps the method must be where
        float64 says.

        Args:
            norm_error: what the method's norm may be off by, relative. PyTorch's sum over one tensor of 100M float32 is
                off by some per cent.
        """
        if not self.checks:
            return
        backward = Backward(method.params, self.gradients())
        for step in range(STEPS):
            backward()
            method.optimizer.first_step()
            if step == 0:
                check_close(name, method.params, self.perturbed, norm_error * self._largest_perturbation)
            method.optimizer.zero_grad()
            backward()
            method.optimizer.second_step()
            method.optimizer.zero_grad()
        # AdamW's steps are of the size of lr whatever the gradient: a gradient near zero may be rounded to either side
        # of it.
        slack = 0.0 if self.base is torch.optim.SGD else 0.01 * STEPS * float(self.options["lr"])
        check_close(name, method.params, self.stepped, slack)

    @cached_property
    def _largest_perturbation(self) -> float:
        return max(float((p - w).abs().max()) for p, (w, _) in zip(self.perturbed, self._pieces(), strict=True))


STEPS = 2
"""That a method makes before it is timed.

The first makes the base optimizer's state; fused second steps begin with the second.
"""

PIECE = 1 << 20
"""Elements that the oracle looks at together: float64 temporaries that a cache holds."""


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def check_close(name: str, params: Sequence[Tensor], wanted: list[Tensor], slack: float) -> None:
    # Rounded once or twice to the parameter's dtype: units in the last place of a weight of sd 0.02, all below 0.2.
    # 16-bit momentum adds more.
    epsilon = torch.finfo(params[0].dtype).eps
    rtol, atol = (max(8 * epsilon, 1e-12), 0.05 * epsilon) if epsilon < 1e-4 else (2 * epsilon, 0.01 * epsilon)
    for got, want in zip(_flat(params).split(PIECE), wanted, strict=True):
        bound = want.abs().mul_(rtol).add_(atol + slack)
        error = got.double().sub_(want).abs_()
        if not bool((error <= bound).all()):  # NaN is not
            raise AssertionError(
                f"{name} is wrong, so it is not timed: off by {float(error.max()):.3g} where "
                f"{float(bound[error.argmax()]):.3g} is allowed"
            )
