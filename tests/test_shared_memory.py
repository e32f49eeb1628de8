"""Parameters that share memory: each e arrives, all come back, no update is lost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import give, make_params, same_bits, values
from plain_sam import PlainSAM, furthest
from torch import nn

from sam_fast import SAM
from sam_fast.sharpness import rho_sharpness

CLOSE = 1e-12  # float64: a few roundings in numbers around 1


def tied(how: str, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(55, 55, dtype=dtype, generator=generator)) for _ in range(2))
    c = nn.Parameter(torch.randn(7, dtype=dtype, generator=generator))
    if how == "transposed":
        b.data = a.data.t()
    elif how == "the same":
        b.data = a.data
    elif how == "overlapping":
        whole = torch.randn(95, 55, dtype=dtype, generator=generator)
        a.data, b.data = whole[:55], whole[40:]
    return [a, c, b]


@pytest.mark.guarantee(id="shared-memory")
@pytest.mark.parametrize("how", ["transposed", "the same", "overlapping"])
@pytest.mark.parametrize("when", ["before", "after the optimizer was made", "in mid-training"])
@pytest.mark.parametrize(("base", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_that_share_memory(how, when, base, options, threads):
    """Each e arrives, restoring is exact, and no update is lost."""
    last = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params, twin = tied("not yet"), tied("not yet")
        shared = [tied(how), tied(how)]

        def tie() -> None:
            for own, source in zip((params, twin), shared, strict=True):
                for p, q in zip(own, source, strict=True):
                    p.data = q.data

        if when == "before":
            tie()
        optimizer, plain = (
            SAM(params, base, lr=0.1, rho=0.5, **options),
            PlainSAM(twin, base, lr=0.1, rho=0.5, **options),
        )
        if when == "after the optimizer was made":
            tie()
        for step in range(6):
            if step == 2 and when == "in mid-training":
                tie()
            before = values(params)
            give(params, 2 * step), give(twin, 2 * step)
            optimizer.first_step()
            plain.first_step()
            assert float(optimizer.grad_norm) == pytest.approx(plain.norm, rel=1e-12)
            assert furthest(params, twin) < CLOSE
            optimizer.restore()
            assert same_bits(values(params), before)
            optimizer.first_step()
            give(params, 2 * step + 1), give(twin, 2 * step + 1)
            optimizer.second_step()
            plain.second_step()
            assert furthest(params, twin) < CLOSE
    finally:
        torch.set_num_threads(last)
    assert "share memory" in optimizer.second_step_path


def test_adaptive_parameters_that_share_memory_take_t_of_w():
    params, twin = tied("transposed"), tied("transposed")
    optimizer, plain = SAM(params, lr=0.1, rho=0.5, adaptive=True), PlainSAM(twin, lr=0.1, rho=0.5, adaptive=True)
    give(params, 1), give(twin, 1)
    optimizer.first_step()
    plain.first_step()
    assert furthest(params, twin) < CLOSE


@pytest.mark.guarantee(id="shared-memory")
def test_parameters_of_different_dtypes_that_share_memory_come_back():
    whole = torch.randn(64, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(whole), nn.Parameter(torch.view_as_real(whole))]
    optimizer = SAM(params, lr=0.0, rho=0.5)
    before = values(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    assert not same_bits(values(params), before)
    optimizer.second_step()
    assert same_bits(values(params), before)


@pytest.mark.guarantee(id="shared-memory")
def test_parameters_tied_between_the_passes_lose_no_update():
    params, twin = tied("not yet"), tied("not yet")
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    give(params, 1)
    optimizer.first_step()
    params[2].data = params[0].data  # now both are what the last one restored brings back
    give(params, 2)
    optimizer.second_step()
    expected = twin[2].detach() - 0.1 * params[0].grad - 0.1 * params[2].grad
    assert torch.allclose(params[0], expected, rtol=0, atol=CLOSE) or torch.allclose(
        params[0], twin[0].detach() - 0.1 * params[0].grad - 0.1 * params[2].grad, rtol=0, atol=CLOSE
    )


@pytest.mark.parametrize("backend", [None, "torch"])
def test_parameters_tied_between_the_passes_of_a_step_that_is_given_up_are_seen(backend):
    params = make_params([12, 12])
    optimizer = SAM(params, lr=0.1, backend=backend)
    optimizer.first_step()
    params[1].data = params[0].data
    optimizer.restore()
    optimizer.first_step()
    optimizer.second_step()
    assert optimizer.second_step_path == "parameters share memory, and must be stepped one after the other"


def test_flatten_refuses_parameters_tied_later_by_name():
    a, b = make_params([12, 12])
    optimizer = SAM([("a", a), ("b", b)], lr=0.1, flatten=True)
    b.data = a.data
    with pytest.raises(ValueError, match=r"'a'.*'b'.*flatten=False"):
        optimizer.first_step()


@pytest.mark.guarantee(id="shared-memory")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_parameters_that_share_memory_come_back(groups: int, threads: int, backend: str | None) -> None:
    """flatten=True refuses them and sends users to flatten=False: there the invariant holds for them too.

    Repeated, since threads may race.
    """
    torch.set_num_threads(threads)
    for seed in range(20):
        memory = torch.randn(20_000)
        a, b = nn.Parameter(memory), nn.Parameter(memory)
        give([a, b], seed)
        before = memory.clone()
        optimizer = SAM([{"params": [a]}, {"params": [b]}] if groups == 2 else [a, b], lr=0.0, rho=1.0, backend=backend)
        optimizer.first_step()
        assert not torch.equal(memory, before)
        optimizer.second_step()
        assert same_bits([memory], [before])


def test_parameters_that_share_memory_are_refused_by_a_forced_fused_backend() -> None:
    memory = torch.randn(100)
    params = [nn.Parameter(memory[:60]), nn.Parameter(memory[50:])]
    with pytest.raises(ValueError, match="share memory"):
        SAM(params, lr=0.1, backend="cpu")
    with pytest.raises(ValueError, match="share memory"):
        SAM(params, lr=0.1, flatten=True)


@pytest.mark.parametrize("when", ["made", "later"])
@pytest.mark.parametrize(
    "overlapping", [torch.zeros(1).expand(5), torch.zeros(4, 1).expand(4, 5), torch.zeros(12).unfold(0, 5, 2)]
)
def test_a_parameter_that_overlaps_itself_is_refused_by_name(
    when: str, overlapping: torch.Tensor, flatten: bool
) -> None:
    """PyTorch refuses to write to an expanded one, where the others were perturbed and stayed so, or writes some of it
    twice; flattened, its elements were trained apart.
    """
    params = make_params([3, 5])
    before = values(params[:1])
    make = partial(SAM, params, lr=0.1, flatten=flatten)
    refused = make if when == "made" else make().first_step
    params[1].data = overlapping
    params[1].grad = torch.ones(overlapping.shape)
    with pytest.raises(ValueError, match=r"elements of parameter 1 of group 0 share memory with each other"):
        refused()
    assert same_bits(params[:1], before)
    assert params[1].stride() == overlapping.stride()


def test_strides_that_only_look_like_an_overlap_are_taken() -> None:
    p = nn.Parameter(torch.zeros(12).as_strided((3, 2), (2, 3)))
    p.grad = torch.ones(3, 2)
    optimizer = SAM([p], lr=0.0, rho=6**0.5)
    optimizer.first_step()
    assert torch.allclose(p.detach(), torch.ones(3, 2))
    optimizer.second_step()
    assert torch.equal(p.detach(), torch.zeros(3, 2))


def test_two_optimizers_do_not_perturb_a_parameter_at_the_same_time(flatten: bool) -> None:
    """What the first had added stayed in the weights once both had restored. Other parameters may be perturbed."""
    shared, own, unrelated = make_params([5, 6, 7])
    first = SAM([shared, own], lr=0.0)
    second = SAM([{"params": [unrelated]}, {"params": [shared]}], lr=0.0)
    third = SAM([{"params": [unrelated]}, {"params": [own], "perturb": False}], lr=0.0, flatten=flatten)
    before = values([shared, own, unrelated])
    first.first_step()
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 is perturbed by another SAM"):
        second.first_step()
    assert not second.perturbed
    third.first_step()
    first.second_step()
    third.second_step()
    assert same_bits([shared, own, unrelated], before)
    second.first_step()
    second.second_step()
    assert same_bits([shared, own, unrelated], before)


def test_sharpness_may_be_measured_while_the_weights_are_perturbed() -> None:
    model = nn.Linear(4, 3)
    optimizer = SAM(model.parameters(), lr=0.0)
    before = values(list(model.parameters()))
    x = torch.randn(5, 4)
    model(x).square().mean().backward()
    optimizer.first_step(zero_grad=True)
    climbed = values(list(model.parameters()))
    rho_sharpness(model, lambda model, x: model(x).square().mean(), [(x,)], rho=0.1)
    assert same_bits(list(model.parameters()), climbed)
    optimizer.second_step()
    assert same_bits(list(model.parameters()), before)


def test_a_third_optimizer_between_the_two_hides_nothing() -> None:
    """Only the one that had perturbed last was known."""
    (shared,), (other,) = make_params([3]), make_params([4])
    first, second, third = SAM([shared], lr=0.1), SAM([shared], lr=0.1), SAM([other], lr=0.1)
    first.first_step()
    third.first_step()
    with pytest.raises(RuntimeError, match="perturbed by another SAM"):
        second.first_step()
    third.restore()
    first.restore()
    second.first_step()
    second.restore()
