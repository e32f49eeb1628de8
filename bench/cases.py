"""What is measured: one row for each case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.harness import Case
from bench.models import BY_ELEMENTS, BY_TENSORS, LARGEST, MODELS, NETWORKS, TINY
from bench.optimizer import operations, optimizer_step
from bench.peers import COMPILED, FOREACH, OURS, PEER_FOREACH, PEER_LOOP, PUBLIC_LOOP, REFERENCE, REFERENCE_FUSED
from bench.processes import MEMORY, WEAK_SCALING, import_time, memory, weak_scaling
from bench.timers import HOST_ALONE, WITH_LAUNCHES
from bench.training import ITERATION, PRICE, UNPERTURBED, iteration, unperturbed

EVERY, FEW = (OURS, REFERENCE, REFERENCE_FUSED, PEER_LOOP, PEER_FOREACH, FOREACH), (OURS, REFERENCE, FOREACH)
OF_TARGETS = (OURS, REFERENCE, PEER_LOOP, FOREACH)
EVERYWHERE, CPU, GPU = ("cpu", "cuda"), ("cpu",), ("cuda",)


def step(group: str, name: str, contenders: tuple[str, ...], on: tuple[str, ...] = EVERYWHERE, **options: Any) -> Case:
    return Case(optimizer_step, group, name, {"contenders": contenders, **options}, on)


# Tiny tensors come first, and once: what they cost depends on how scattered the heap is by then. On a GPU the profiler,
# which the others use, may leave every launch a little slower.
LOOP: dict[str, Any] = {"parts": 1, "lead_in": 1}
HOST = [
    replace(
        step("host time, in a loop", f"{name}{kind}", FEW, head_start=HOST_ALONE, **settings),
        seconds=1.5,
        rounds=(5, 200),
        **LOOP,
    )
    for name in ("1 x 8", "161 x 8")
    for kind, settings in (("", {}), (", flatten", {"flatten": True}))
]
SCALING = [
    replace(step(f"scaling with the number of {what}", name, (OURS, REFERENCE), CPU), **LOOP)
    for what, names in (("parameters", BY_ELEMENTS), ("tensors", BY_TENSORS))
    for name in names
]
CONVNETS = [name for name in NETWORKS if name.startswith("ConvNet")]
TRAINING = [
    *(Case(iteration, ITERATION, name, seconds=2.0, rounds=(4, 60)) for name in NETWORKS),
    *(Case(iteration, PRICE, name, parts=1, seconds=8.0, rounds=(8, 20)) for name in CONVNETS),
    *(Case(unperturbed, UNPERTURBED, name) for name in ("resnet18", "resnet50")),
]
STEPS = [
    *(step("SGD", f"{name}, with launches", EVERY, GPU, head_start=WITH_LAUNCHES) for name in ("resnet18", "resnet50")),
    step("SGD", "resnet18", (*EVERY, COMPILED), CPU),
    step("SGD", "resnet18", EVERY, GPU),
    step("SGD", "resnet50", EVERY),
    *(step("SGD", name, OF_TARGETS) for name in MODELS if name not in ("resnet18", "resnet50")),
    step("SGD", TINY, FEW),
    step("SGD", "resnet18, flatten", FEW, flatten=True),
    step("SGD", "resnet18, adaptive", FEW, adaptive=True),
    step("SGD", "resnet18, bfloat16", FEW, dtype="bfloat16"),
    step("SGD", "resnet18, triton backend", FEW, GPU, backend="triton"),
    step("SGD", "resnet18, torch backend", FEW, backend="torch"),
    *(step("AdamW", name, FEW, base="AdamW") for name in MODELS if name != LARGEST),  # which would take the longest
    # reference.py is no straw man: a loop with the public implementation's operations, written independently
    *(
        step("reference and public loop", name, (REFERENCE, PUBLIC_LOOP), CPU)
        for name in ("resnet18", "efficientnet_b0")
    ),
]
VARIANTS = {"float32": {}, "float32, adaptive": {"adaptive": True}, "bfloat16": {"dtype": "bfloat16"}}
OPERATIONS = [
    Case(operations, "operation", f"vit_base_patch16_224, {name}", options, parts=1, seconds=4.0, rounds=(12, 60))
    for name, options in VARIANTS.items()
]
PROCESSES = [
    Case(memory, MEMORY, "8 linear layers of 2048", parts=1),
    Case(weak_scaling, WEAK_SCALING, "resnet18", parts=1),
    Case(import_time, "import sam_fast after import torch", "fresh process", on=CPU, parts=1),
]
CASES = [*HOST, *SCALING, *TRAINING, *STEPS, *OPERATIONS, *PROCESSES]
