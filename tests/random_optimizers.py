"""Random optimizers for the property tests, and how many cases those take.

``SAM_FAST_HYPOTHESIS`` names the profile: ``ci`` (the default), ``nightly``, or a number of cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from cases import normal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from model_of_sam import params_of
from torch import Tensor, nn

from sam_fast import SAM

PROFILE = os.environ.get("SAM_FAST_HYPOTHESIS", "ci")
CASES = {"ci": 300, "nightly": 10_000}
profile = settings(
    max_examples=CASES[PROFILE] if PROFILE in CASES else int(PROFILE),
    deadline=None,
    derandomize=PROFILE == "ci",  # a failure in CI can be reproduced; the nightly run looks for new ones
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (17,), (3, 5), (2, 3, 4, 5), (65,), (1009,), (128, 130))
LAYOUTS = ("contiguous", "contiguous", "transposed", "gaps")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return (
            t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))) if t.dim() > 1 else t
        )
    if layout == "gaps" and t.dim() > 0:
        room = t.new_zeros((*t.shape[:-1], t.shape[-1] + 1))
        room[..., :-1] = t
        return room[..., :-1]
    return t


def make_param(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(laid_out((normal(shape, generator) * 0.5).to(dtype), layout))


specs = st.tuples(st.integers(0, 99), st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
sam_options = st.fixed_dictionaries(
    {},
    optional={
        "rho": st.sampled_from([0.0, 0.05, 0.5, 3.0]),
        "adaptive": st.booleans(),
        "eta": st.sampled_from([0.0, 0.01]),
        "perturb": st.booleans(),
    },
)
base_options = st.fixed_dictionaries(
    {}, optional={"lr": st.sampled_from([0.0, 0.01, 0.3]), "weight_decay": st.sampled_from([0.0, 0.1])}
)
maximize = st.fixed_dictionaries({}, optional={"maximize": st.booleans()})
BASES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"momentum": 0.5, "dampening": 0.3, "maximize": True}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"betas": (0.5, 0.9)}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.RMSprop, {"momentum": 0.9}),
    (torch.optim.AdamW, {"foreach": True}),
]


@st.composite
def optimizers(draw: Callable[..., Any], schedules: Any = None) -> tuple[SAM, list[nn.Parameter]]:
    base, options = draw(st.sampled_from(BASES))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        params = [make_param(*spec) for spec in draw(st.lists(specs, min_size=1, max_size=3))]
        groups.append({"params": params, **draw(sam_options), **draw(base_options), **draw(maximize)})
    flatten = draw(st.booleans())
    dense = flatten or all(
        p.stride() == nn.Parameter(p.detach().clone()).stride() for group in groups for p in group["params"]
    )
    backend = draw(st.sampled_from([None, None, "torch", "cpu"])) if dense else None
    schedule = None if schedules is None else draw(schedules)
    optimizer = SAM(groups, base, rho=0.1, lr=0.05, flatten=flatten, backend=backend, schedule=schedule, **options)
    return optimizer, params_of(optimizer)
