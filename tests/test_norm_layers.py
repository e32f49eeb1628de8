"""norm_layers_only: which parameters, no gradients of the others in the first pass, no backup for them."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import buckets_of
from plain_sam import furthest
from torch import nn

from sam_fast import SAM, TrainStep, norm_layers_only


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class RmsNorm(LlamaRMSNorm):
    """As timm spells it."""


class InstanceNorm(LlamaRMSNorm):
    """As in many a repository."""


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        LlamaRMSNorm(6),
        nn.GroupNorm(2, 6),
        RmsNorm(6),
        InstanceNorm(6),
    )


def test_groups_by_class_and_by_name() -> None:
    model = network()
    norms, others = norm_layers_only(model, rho=0.25, lr=0.1)
    assert {id(p) for p in norms["params"]} == {id(p) for i in (1, 3, 4, 5, 6, 7) for p in model[i].parameters()}
    assert {id(p) for p in others["params"]} == {id(p) for i in (0, 2) for p in model[i].parameters()}
    assert norms["rho"] == others["rho"] == 0.25
    assert others["perturb"] is False
    assert norms.get("perturb", True)


def test_a_shared_weight_is_in_one_group() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    norms, others = norm_layers_only(model)
    assert len(norms["params"]) == 2
    assert len(others["params"]) == 1


def test_a_layer_that_normalizes_and_multiplies_is_none() -> None:
    class LayerNormLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_norm_weight = nn.Parameter(torch.ones(4))
            self.weight = nn.Parameter(torch.ones(3, 4))

    model = nn.Sequential(LayerNormLinear(), nn.LayerNorm((3, 4)), nn.PReLU(4))  # whose weight is a vector, too
    norms, others = norm_layers_only(model)
    assert {id(p) for p in norms["params"]} == {id(p) for p in model[1].parameters()}
    assert len(others["params"]) == 3
    nn.utils.parametrizations.weight_norm(model[0])
    assert {id(p) for p in norm_layers_only(model)[0]["params"]} == {id(p) for p in model[1].parameters()}


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("number", [3, 4])
def test_a_norm_layer_with_a_parametrized_weight_is_one(name: str, number: int) -> None:
    model = network()
    getattr(nn.utils.parametrizations, name)(model[number])
    norms, others = norm_layers_only(model)
    assert {id(p) for p in norms["params"]} == {id(p) for i in (1, 3, 4, 5, 6, 7) for p in model[i].parameters()}
    assert {id(p) for p in others["params"]} == {id(p) for i in (0, 2) for p in model[i].parameters()}


def test_norm_layers_that_are_all_frozen_are_warned_of() -> None:
    model = network()
    for i in (1, 3, 4, 5, 6, 7):
        model[i].requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="all normalization layers are frozen"):
        norm_layers_only(model)
    model[3].bias.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm_layers_only(model)


def test_errors() -> None:
    with pytest.raises(ValueError, match="no normalization layer"):
        norm_layers_only(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="Module"):
        norm_layers_only(nn.Linear(3, 3).parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="perturb"):
        norm_layers_only(network(), perturb=True)


@pytest.mark.guarantee(id="norm-layers-only")
def test_the_first_pass_computes_no_other_gradient_whatever_happens() -> None:
    model = network()
    optimizer = SAM(norm_layers_only(model, rho=0.5), lr=0.1)
    norms, others = (group["params"] for group in optimizer.param_groups)
    others[0].requires_grad_(False)  # frozen by its user: stays so
    with optimizer.first_pass(model):
        model(torch.randn(8, 4)).square().sum().backward()
    assert all(p.grad is not None for p in norms)
    assert all(p.grad is None for p in others)
    assert [p.requires_grad for p in others] == [False, True, True, True]
    with pytest.raises(ZeroDivisionError), optimizer.first_pass(model):
        raise ZeroDivisionError
    assert [p.requires_grad for p in others] == [False, True, True, True]


@pytest.mark.guarantee(id="norm-layers-only")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_step_equals_plain_pytorch_and_backs_up_norm_layers_only(
    backend: str, flatten: bool, base: type[torch.optim.Optimizer]
) -> None:
    torch.manual_seed(3)
    model, expected = network().double(), network().double()
    expected.load_state_dict(model.state_dict())
    optimizer = SAM(norm_layers_only(model, rho=0.5), base, backend=backend, flatten=flatten, lr=0.01)
    plain = base(expected.parameters(), lr=0.01)
    perturbed = [p for i in (1, 3, 4, 5, 6, 7) for p in expected[i].parameters()]
    for _ in range(5):
        x = torch.randn(8, 4, dtype=torch.float64)
        with optimizer.first_pass(model):
            model(x).square().sum().backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            model(x).square().sum().backward()
        optimizer.second_step(zero_grad=True)

        grads = torch.autograd.grad(expected(x).square().sum(), perturbed)
        old = [p.detach().clone() for p in perturbed]
        norm = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(perturbed, grads, strict=True):
                p += 0.5 * g / norm
        buffers = [b.clone() for b in expected.buffers()]
        expected(x).square().sum().backward()
        with torch.no_grad():
            for p, w in zip([*perturbed, *expected.buffers()], [*old, *buffers], strict=True):
                p.copy_(w)
        plain.step()
        plain.zero_grad()
    assert furthest(model.parameters(), expected.parameters()) < 1e-8
    assert furthest(model.buffers(), expected.buffers()) < 1e-8
    if base is torch.optim.SGD:
        assert optimizer.second_step_path == "fused"
    norms, others = buckets_of(optimizer)
    assert "backup" in vars(norms)
    assert "backup" not in vars(others)


def test_perturb_may_change_from_step_to_step() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = SAM(norm_layers_only(model, rho=0.5), lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for perturb in (False, True, False):
        optimizer.param_groups[1]["perturb"] = perturb
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.first_step(zero_grad=True)
        moved = not torch.equal(model[0].weight, before[0])
        assert moved == perturb
        optimizer.second_step()
        assert furthest(model.parameters(), before) == 0.0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_without_weights_that_are_perturbed_is_a_step_of_the_base_optimizer(micro_batches: int) -> None:
    """As one for a head that is left alone: its loss has no gradient in the first pass."""
    model, twin = (nn.ModuleDict({"norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)}).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(norm_layers_only(model), torch.optim.SGD, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(model, optimizer, lambda model, x: model["head"](x).square().mean(), micro_batches=micro_batches)
    for number in range(3):
        x = torch.full((4, 4), 1.0 + number, dtype=torch.float64)
        assert float(step(x).grad_norm) == 0.0  # type: ignore[arg-type]
        twin["head"](x).square().mean().backward()
        base.step()
        base.zero_grad()
    assert furthest(model.parameters(), twin.parameters()) < 1e-12
