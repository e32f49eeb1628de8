"""Hooks of an optimizer, torch's and SAM's alike: what calls them, in which order, and what they see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_params
from torch.optim import optimizer as torch_optimizer
from torch_conformance import bases, sam_step

from sam_fast import SAM


def with_hooks(optimizer: torch.optim.Optimizer) -> list[str]:
    """Registers hooks of every kind, two of each, the second in front; the list says in which order they
    were called.
    """
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step-pre"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("step-pre-2"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step-post"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step-post-2"))
    for name, arguments in (
        ("state_dict_pre", 1),
        ("state_dict_post", 2),
        ("load_state_dict_pre", 2),
        ("load_state_dict_post", 1),
    ):
        register = getattr(optimizer, f"register_{name}_hook")
        for number, prepend in ((1, False), (2, True)):
            text = f"{name}-{number}"
            register(
                (lambda o, text=text: seen.append(text))
                if arguments == 1
                else (lambda o, d, text=text: seen.append(text)),
                prepend=prepend,
            )
    return seen


@pytest.mark.guarantee(id="hooks")
@bases
def test_hooks_run_in_torchs_order(base: type[torch.optim.Optimizer], flatten: bool) -> None:
    params, own = make_params([5]), make_params([5])
    optimizer, plain = SAM(params, base, flatten=flatten, lr=0.1), base(own, lr=0.1)
    seen, expected = with_hooks(optimizer), with_hooks(plain)
    anywhere: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda o, *_: anywhere.append(f"{type(o).__name__}-pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, *_: anywhere.append(f"{type(o).__name__}-post")),
    ]
    try:
        sam_step(optimizer, params, 0)
        own[0].grad = params[0].grad.clone()  # type: ignore[union-attr]
        plain.step()
    finally:
        for handle in handles:
            handle.remove()
    name = base.__name__
    assert anywhere == ["SAM-pre", "SAM-post", f"{name}-pre", f"{name}-post"]
    optimizer.load_state_dict(optimizer.state_dict())
    plain.load_state_dict(plain.state_dict())
    assert seen == expected
    assert len(seen) == 12


def test_a_hook_that_returns_another_state_dict_is_obeyed() -> None:
    def halved(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]}

    optimizer, plain = SAM(make_params([5]), lr=0.8), torch.optim.SGD(make_params([5]), lr=0.8)
    for o in (optimizer, plain):
        o.register_state_dict_post_hook(halved)
        o.register_load_state_dict_pre_hook(halved)
        o.load_state_dict(o.state_dict())
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.2
