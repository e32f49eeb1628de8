"""What is measured: one row for each case."""

from __future__ import annotations

from typing import Any

from bench import contenders as c
from bench.contenders import FOREACH, OURS, REFERENCE
from bench.harness import HOST, LAUNCHES, Case
from bench.optimizer import operations, optimizer_step
from bench.processes import MEMORY, WEAK_SCALING, import_time, memory, weak_scaling
from bench.training import ITERATION, NETWORKS, PRICE, UNPERTURBED, iteration, unperturbed

Names = tuple[str, ...]
EVERY, FEW = (OURS, REFERENCE, c.REFERENCE_FUSED, c.PEER_LOOP, c.PEER_FOREACH, FOREACH), (OURS, REFERENCE, FOREACH)
OF_TARGETS = (OURS, REFERENCE, c.PEER_LOOP, FOREACH)
HOST_TIME, SCALING = "host time, in a loop", "scaling with the number of"
EVERYWHERE, CPU, GPU = ("cpu", "cuda"), ("cpu",), ("cuda",)
ONCE: dict[str, Any] = {"parts": 1, "lead_in": 1}
LOOP: dict[str, Any] = {**ONCE, "seconds": 1.5, "rounds": (5, 200)}
OPERATION: dict[str, Any] = {"parts": 1, "seconds": 4.0, "rounds": (12, 60)}
RESNETS = ("resnet18", "resnet50")


def step(group: str, name: str, contenders: Names, on: Names = EVERYWHERE, how: Any = None, **options: Any) -> Case:
    return Case(optimizer_step, group, name, {"contenders": contenders, **options}, on, **(how or {}))


CASES = [
    # Tiny tensors come first, and once: what they cost depends on how scattered the heap is by then. On a GPU the
    # profiler, which the others use, may leave every launch a little slower.
    step(HOST_TIME, "1 x 8", FEW, how=LOOP, method=HOST),
    step(HOST_TIME, "1 x 8, flatten", FEW, how=LOOP, method=HOST, flatten=True),
    step(HOST_TIME, "161 x 8", FEW, how=LOOP, method=HOST),
    step(HOST_TIME, "161 x 8, flatten", FEW, how=LOOP, method=HOST, flatten=True),
    *(step(f"{SCALING} parameters", name, (OURS, REFERENCE), CPU, ONCE) for name in c.BY_ELEMENTS),
    *(step(f"{SCALING} tensors", name, (OURS, REFERENCE), CPU, ONCE) for name in c.BY_TENSORS),
    *(Case(iteration, ITERATION, name, seconds=2.0, rounds=(4, 60)) for name in NETWORKS),
    *(Case(iteration, PRICE, f"ConvNet, batch {n}", parts=1, seconds=8.0, rounds=(8, 20)) for n in (32, 128)),
    *(Case(unperturbed, UNPERTURBED, name) for name in RESNETS),
    *(step("SGD", f"{name}, with launches", EVERY, GPU, method=LAUNCHES) for name in RESNETS),
    step("SGD", "resnet18", (*EVERY, c.COMPILED), CPU),
    step("SGD", "resnet18", EVERY, GPU),
    step("SGD", "resnet50", EVERY),
    *(step("SGD", name, OF_TARGETS) for name in c.MODELS if name not in RESNETS),
    step("SGD", c.TINY, FEW),
    step("SGD", "resnet18, flatten", FEW, flatten=True),
    step("SGD", "resnet18, adaptive", FEW, adaptive=True),
    step("SGD", "resnet18, bfloat16", FEW, dtype="bfloat16"),
    step("SGD", "resnet18, triton backend", FEW, GPU, backend="triton"),
    step("SGD", "resnet18, torch backend", FEW, backend="torch"),
    *(step("AdamW", name, FEW, base="AdamW") for name in c.MODELS if name != c.LARGEST),  # which would take the longest
    Case(operations, "operation", "vit_base_patch16_224, float32", **OPERATION),
    Case(operations, "operation", "vit_base_patch16_224, float32, adaptive", {"adaptive": True}, **OPERATION),
    Case(operations, "operation", "vit_base_patch16_224, bfloat16", {"dtype": "bfloat16"}, **OPERATION),
    Case(memory, MEMORY, "8 linear layers of 2048", parts=1),
    Case(weak_scaling, WEAK_SCALING, "resnet18", parts=1),
    Case(import_time, "import sam_fast after import torch", "fresh process", on=CPU, parts=1),
]
