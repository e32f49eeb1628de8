"""Whole training iterations on real networks: what SAM costs over SGD, and what it costs with fewer passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sam_fast
from bench.contenders import OURS, SHAPES, Problem, make_params, params_of
from bench.harness import LAUNCHES, Bench, Case, Contender, Work
from sam_fast import SAM, disable_running_stats, enable_running_stats
from sam_fast.reference import ReferenceSAM

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SGD_ONCE, SGD_TWICE, REFERENCE = "SGD", "2 x SGD", "SAM reference"
ITERATION, PRICE, UNPERTURBED = "training iteration", "iteration, fewer passes", "unperturbed step"
CYCLE = 4  # one of so many iterations perturbs under Schedule(every=4)
ASCENT, EVERY = "ascent=1/4", f"every={CYCLE}"


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def convnet() -> nn.Module:
    """Three convolutions with BatchNorm and a linear layer for 28x28 images: 0.1M parameters."""
    blocks = [(*_convolution(i, o), nn.ReLU(), nn.MaxPool2d(2)) for i, o in ((1, 32), (32, 64), (64, 128))]
    layers = [layer for block in blocks for layer in block]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.body = nn.Sequential(*_convolution(inputs, outputs, stride), nn.ReLU(), *_convolution(outputs, outputs))
        self.shortcut = nn.Sequential(*_convolution(inputs, outputs, stride, 1)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18's eight blocks behind a stem that halves 32x32 images: 11.2M parameters, 62 tensors."""
    stem = [*_convolution(3, 64, 2), nn.ReLU()]
    blocks = [_Residual(i, o) for i, o in pairwise((64, 64, 64, 128, 128, 256, 256, 512, 512))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def transformer() -> nn.Module:
    """A small encoder that predicts a token at every place: 3.4M parameters. No dropout: rounds must be alike."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(512, 256), encoder, nn.Linear(256, 512), nn.Flatten(0, 1))


def _images(batch: int, channels: int, side: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, channels, side, side), torch.randint(0, 10, (batch,)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "ConvNet, batch 32": (convnet, _images(32, 1, 28)),
    "ConvNet, batch 128": (convnet, _images(128, 1, 28)),
    "ResNet-18, batch 32": (resnet18, _images(32, 3, 32)),
    "transformer, batch 8": (transformer, lambda: (torch.randint(0, 512, (8, 64)), torch.randint(0, 512, (8 * 64,)))),
}
"""Name -> what makes the network, and what makes a batch of inputs and labels: small enough for two cores."""


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Work:
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=True)

    def iteration() -> None:
        loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iteration


def perturbed(model: nn.Module, x: Tensor, y: Tensor, sam: Any = SAM) -> Work:
    """The loop that runs with every SAM implementation."""
    optimizer = sam(model.parameters(), torch.optim.SGD, **SGD)

    def iteration() -> None:
        loss(model, x, y).backward()
        optimizer.first_step(zero_grad=True)
        disable_running_stats(model)
        loss(model, x, y).backward()
        optimizer.second_step(zero_grad=True)
        enable_running_stats(model)

    return iteration


def scheduled(model: nn.Module, x: Tensor, y: Tensor, schedule: Any = None, ascent: float = 1.0) -> Work:
    optimizer = SAM(model.parameters(), **SGD, schedule=schedule)
    return partial(sam_fast.TrainStep(model, optimizer, loss, ascent=ascent), x, y)


CONTENDERS: dict[str, dict[str, tuple[Callable[..., Work], int]]] = {
    ITERATION: {
        OURS: (perturbed, 1),
        SGD_ONCE: (plain, 1),
        SGD_TWICE: (plain, 2),
        REFERENCE: (partial(perturbed, sam=ReferenceSAM), 1),
    },
    PRICE: {
        OURS: (scheduled, CYCLE),
        ASCENT: (partial(scheduled, ascent=0.25), CYCLE),
        EVERY: (partial(scheduled, schedule=sam_fast.Schedule(every=CYCLE)), CYCLE),
        SGD_ONCE: (plain, CYCLE),
    },
}
"""By group and name: what makes an iteration, and how many are timed together."""


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One iteration in float32 must move the weights as the reference does in float64."""
    oracle, tested = copy.deepcopy(model).double(), copy.deepcopy(model)
    perturbed(oracle, x.double() if x.is_floating_point() else x, y, ReferenceSAM)()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32, as what it is compared with
        perturbed(tested, x, y)()
    want, got = weights(oracle) - weights(model), weights(tested) - weights(model)
    # Both the passes and the weights are rounded to float32: an update of lr times a gradient loses some thousandths of
    # its length.
    error = float((got - want).norm() / want.norm())
    assert error < 0.02, f"the update is off by {error:.3g} of its length, so it is not timed"
    for a, b in zip(tested.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def iteration(bench: Bench, case: Case) -> None:
    torch.manual_seed(0)
    make, batch = NETWORKS[case.name]
    x, y = (t.to(bench.device) for t in batch())
    few = 8 if bench.smoke and len(x) > 8 else None
    model, x, y = make().to(bench.device), x[:few], y[:few]
    if case.id not in bench.checked:
        check(model, x, y)

    def repeat(run: Work, times: int) -> None:
        for _ in range(times):
            run()

    contenders = {}
    for name, (make_iteration, times) in CONTENDERS[case.group].items():
        runs = partial(repeat, make_iteration(copy.deepcopy(model), x, y), times)
        contenders[name] = Contender({"": runs}, method=LAUNCHES)
    bench.run(case, contenders, weights(model).numel())


def unperturbed(bench: Bench, case: Case) -> None:
    """first_step and second_step of a step that does not perturb, against the base optimizer alone."""
    problem = Problem(make_params(SHAPES[case.name], device=bench.device))
    ours = SAM(problem.params(), **SGD, schedule=sam_fast.Schedule(start=10**9))
    base = torch.optim.SGD(problem.params(), **SGD, fused=True)
    runs = {OURS: (ours, lambda: (ours.first_step(), ours.step())), SGD_ONCE: (base, base.step)}
    contenders = {}
    for name, (optimizer, run) in runs.items():
        make_gradients = problem.backward(params_of(optimizer))
        make_gradients()
        run()
        optimizer.zero_grad()
        contenders[name] = Contender({"": run}, make_gradients, optimizer.zero_grad)
    torch.testing.assert_close(params_of(ours), params_of(base))
    bench.run(case, contenders, problem.elements)
