"""The base optimizer's own step, where restoring and stepping are not one pass: what surrounds ``base.step()``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .fused_step import RULES

FUSED_ON_CPU = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose ``fused=True`` walks over memory on the CPU as if gradients lay as their parameters do; SGD's is wrong in 16 bits too."""


class BaseStep:
    """Calls ``base.step()`` so that hooks run once, and entries that somebody else keeps in its state do no harm.

    PyTorch's optimizers take a state that is not empty for one of their own. What SAM's users keep in ``optimizer.state[p]`` before the base
    optimizer's first step with p is set aside for that step.
    """

    def __init__(self, base: Optimizer) -> None:
        self._look_at(base)

    def _look_at(self, base: Optimizer) -> None:
        self._state = base.state
        self._initialised = {id(p) for p, entry in base.state.items() if entry}
        self._entries = len(base.state)

    def __call__(self, base: Optimizer) -> None:
        """Step."""
        if base.state is not self._state:
            self._look_at(base)  # loaded
        aside = self._set_aside(base) if len(base.state) != self._entries else {}
        try:
            with _without_fused_on_cpu(base):
                _step_of(base)()
        finally:
            for p, entry in aside.items():
                base.state[p] |= entry
        if len(base.state) != self._entries:
            self._look_at(base)

    def _set_aside(self, base: Optimizer) -> dict[Tensor, dict[str, Any]]:
        rule = RULES.get(type(base))
        own_names = () if rule is None else rule.all_names
        aside = {}
        for p, entry in base.state.items():
            foreign = entry.keys().isdisjoint(own_names) if own_names else id(p) not in self._initialised
            if isinstance(p, Tensor) and entry and foreign:
                aside[p] = dict(entry)
                entry.clear()
        return aside


def _step_of(base: Optimizer) -> Callable[[], Any]:
    """``base.step`` without global step hooks, which see SAM's own step."""
    unhooked = getattr(type(base).step, "__wrapped__", None)
    there_are_some = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    its_own = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks or "step" in vars(base)
    if not there_are_some or its_own or unhooked is None:
        return base.step
    return unhooked.__get__(base)  # type: ignore[no-any-return]


@contextmanager
def _without_fused_on_cpu(base: Optimizer) -> Iterator[None]:
    groups = base.param_groups if type(base) in FUSED_ON_CPU else []
    fused = [group for group in groups if group.get("fused") and any(p.device.type == "cpu" for p in group["params"])]
    for group in fused:
        group["fused"] = False
    try:
        yield
    finally:
        for group in fused:
            group["fused"] = True
