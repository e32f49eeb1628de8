"""clip_grad_norm of TrainStep, against torch.nn.utils.clip_grad_norm_ in the loop written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_sam import PlainSAM, furthest
from test_train_step import OPTIONS, batches, loss_of, network
from torch import nn
from torch.nn.functional import mse_loss

from sam_fast import SAM, TrainStep, norm_layers_only
from sam_fast.amp import UNSCALED
from sam_fast.clipping import clipped


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).abs() * self.scale


@pytest.mark.guarantee(id="clip-grad-norm")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_of_complex_gradients(base: Any, max_norm: float) -> None:
    model, x = ComplexNet(), torch.randn(6, 4, dtype=torch.complex128)
    twin = copy.deepcopy(model)
    step = TrainStep(
        model,
        SAM(model.parameters(), base, lr=0.01),
        lambda model, x: model(x).square().mean(),
        clip_grad_norm=max_norm,
    )
    plain = PlainSAM(twin.parameters(), base, lr=0.01)
    for _ in range(3):
        step(x)
        twin(x).square().mean().backward()
        plain.first_step()
        twin(x).square().mean().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        plain.second_step()
    assert furthest(model.parameters(), twin.parameters()) < 1e-9


def test_a_sparse_gradient_that_cannot_be_clipped_is_named() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "perturb": False}]
    before = copy.deepcopy(list(model.parameters()))
    step = TrainStep(model, SAM(groups), lambda model, x: model(x).square().mean(), clip_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm cannot clip .* parameter 0 of group 1.* sparse=False"):
        step(torch.arange(6))
    assert furthest(model.parameters(), before) == 0.0


@pytest.mark.guarantee(id="clip-grad-norm")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_is_that_of_clip_grad_norm(
    backend: str, flatten: bool, base: Any, dtype: torch.dtype, max_norm: float, scaled: bool
) -> None:
    start = nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Linear(20, 2)).to(dtype)
    models = [copy.deepcopy(start) for _ in range(2)]
    made = [SAM(norm_layers_only(model), base, rho=0.1, lr=0.1, backend=backend, flatten=flatten) for model in models]
    x, y = torch.randn(9, 30).to(dtype), torch.randn(9, 2).to(dtype)

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return mse_loss(model(x).float(), y.float())

    scaler = torch.amp.GradScaler(x.device.type, init_scale=64.0) if scaled else None
    TrainStep(models[0], made[0], loss, clip_grad_norm=max_norm, scaler=scaler)(x, y)
    with made[1].first_pass(models[1]):
        loss(models[1], x, y).backward()
    made[1].first_step(zero_grad=True)
    loss(models[1], x, y).backward()
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), max_norm)
    made[1].second_step()
    # Of the factor in float32, and of the scaled gradients in the second pass.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b, w in zip(models[0].parameters(), models[1].parameters(), start.parameters(), strict=True):
        moved = (b.double() - w.double()).norm()
        assert float((a.double() - b.double()).norm()) <= tolerance * max(float(moved), float(w.double().norm()))


def test_clipping_reads_the_gradients_and_leaves_them(flatten: bool) -> None:
    model = network()
    optimizer = SAM(model.parameters(), flatten=flatten, **OPTIONS)
    (x, y), *_ = batches()
    loss_of(model, x, y).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, x, y).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer._step.clip_grad_norm = 1e-3
    optimizer.second_step()
    assert optimizer.second_step_path == "fused"
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)


def test_a_norm_that_float16_does_not_hold_clips_all_the_same(backend: str) -> None:
    """clip_grad_norm_ finds an infinite norm, and makes the gradients zero."""
    p = nn.Parameter(torch.zeros(40_000, dtype=torch.float16))
    optimizer = SAM([p], lr=1.0, backend=backend)
    for clip, call in ((None, optimizer.first_step), (64.0, optimizer.second_step)):
        p.grad = torch.full((40_000,), 1024.0, dtype=torch.float16)
        optimizer._step.clip_grad_norm = clip
        call()
    assert torch.allclose(p.detach().float(), torch.full((40_000,), -64 / 200), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32])
def test_clipping_of_complex_gradients_in_their_own_precision(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = SAM([p], lr=1.0, rho=0.0)
    p.grad = torch.tensor([3 + 4j] * 4, dtype=dtype)
    optimizer.first_step()
    optimizer._step.clip_grad_norm = 1.0
    optimizer.second_step()
    assert p.dtype == dtype
    assert torch.allclose(p.detach().to(torch.complex64), torch.tensor([-0.3 - 0.4j] * 4), rtol=1e-3)


def test_clipping_asks_nothing_of_the_host() -> None:
    """Without a scaler there is no overflow to be known beforehand, and a first step makes its state in one pass."""
    model = network()
    optimizer = SAM(model.parameters(), **OPTIONS)
    loss_of(model, *batches()[0]).backward()
    optimizer.first_step()
    applied = clipped(optimizer._perturbation, optimizer.base_optimizer, UNSCALED, 1.0)
    assert applied.found_inf is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_of_fused_optimizers_that_step_by_themselves(dtype: torch.dtype) -> None:
    """On the CPU ``fused=True`` may be taken back for a step (sam_fast/base_step.py)."""
    models = [nn.Linear(4, 3).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, clips in zip(models, (True, False), strict=True):
        sam = SAM(model.parameters(), lr=1.0, fused=True)
        sam.base_optimizer.register_step_pre_hook(lambda *_: None)
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
        sam.first_step(zero_grad=True)
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
        if clips:
            sam._step.clip_grad_norm = 0.25
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        sam.second_step()
        assert sam.second_step_path != "fused"
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        list(models[0].parameters()), list(models[1].parameters()), rtol=tolerance, atol=tolerance
    )
