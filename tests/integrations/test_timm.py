"""timm: NativeScaler in float16, adaptive clipping of gradients, SAM without first_step."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import batches, furthest, plain_step, small_net
from plain_sam import PlainSAM
from recipes import framework, run
from torch import Tensor, nn

from sam_fast import SAM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

RHO, LR, CLIP = 0.05, 0.1, 0.02


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return oracle.cross_entropy(model, batch)


def native_scaler(scale: float) -> Any:
    found = framework("timm.utils").NativeScaler(device="cpu")
    found._scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return found


@pytest.mark.parametrize("mode", ["norm", "agc", "value"])
def test_native_scaler(mode: str):
    """Its first call goes without an update; what it clips is the second gradient."""
    clip_gradients = framework("timm.utils").clip_grad.dispatch_clip_grad
    names = {"optimizer": SAM, "loss_scaler": native_scaler(2.0**10), "loss_fn": loss_fn, "clip_mode": mode}
    model, plain = small_net(torch.float32), small_net(torch.float32)
    names["optimizer"] = SAM(model.parameters(), rho=RHO, lr=LR)
    run("timm", 1, model=model, loader=batches(dtype=torch.float32), clip_grad=CLIP, **names)

    class Clips(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            clip_gradients(list(plain.parameters()), CLIP, mode=mode)
            super().step()

    sam = PlainSAM(plain.parameters(), Clips, rho=RHO, lr=LR)
    for batch in batches(dtype=torch.float32):
        plain_step(plain, sam, [batch], loss_fn, 1)
    unclipped = small_net(torch.float32)
    sam = PlainSAM(unclipped.parameters(), rho=RHO, lr=LR)
    for batch in batches(dtype=torch.float32):
        plain_step(unclipped, sam, [batch], loss_fn, 1)
    assert names["loss_scaler"]._scaler.get_scale() == 2.0**10  # no step was skipped
    assert furthest(model, plain) < 1e-3  # gradients of another scale are rounded to float16 otherwise
    assert furthest(unclipped, plain) > 5e-3


def test_a_step_that_overflows_is_skipped():
    loss_scaler = native_scaler(2.0**40)
    model = small_net(torch.float32)
    optimizer = SAM(model.parameters(), rho=RHO, lr=LR)
    names = {"loss_scaler": loss_scaler, "loss_fn": loss_fn, "clip_grad": CLIP, "clip_mode": "norm"}
    run("timm", 1, model=model, optimizer=optimizer, loader=batches(dtype=torch.float32)[:1], **names)
    assert loss_scaler._scaler.get_scale() == 2.0**39
    assert not optimizer.perturbed
    assert all(p.equal(q) for p, q in zip(model.parameters(), small_net(torch.float32).parameters(), strict=True))


def test_one_call_of_the_scaler_is_an_error():
    model = small_net(torch.float32)
    loss_scaler, optimizer = native_scaler(2.0), SAM(model.parameters(), rho=RHO, lr=LR)
    with pytest.raises(RuntimeError, match="need_update=False"):
        loss_scaler(loss_fn(model, batches(dtype=torch.float32)[0]), optimizer)
