"""Steps captured in CUDA graphs: they replay the bits of the eager ones, and what cannot be captured is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import SmallNet, batches, on_gpu, same_bits, values
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_fast import SAM


def trained(
    gpu_backend: str, with_graph: bool, base: type[torch.optim.Optimizer] = torch.optim.SGD
) -> tuple[list[Tensor], list[Tensor]]:
    """SmallNet after 8 steps on one batch after the other, with a learning rate that falls: its state
    and the losses.
    """
    torch.manual_seed(0)
    model = SmallNet().cuda()
    lr = torch.tensor(0.05, device="cuda")
    options: dict[str, object] = {"momentum": 0.9} if base is torch.optim.SGD else {"capturable": True}
    optimizer = SAM(model.parameters(), base, lr=lr, backend=gpu_backend, **options)
    data = [(x.cuda(), y.cuda()) for x, y in batches(8)]
    batch_x, batch_y = data[0][0].clone(), data[0][1].clone()

    def step() -> Tensor:
        loss = cross_entropy(model(batch_x), batch_y)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            cross_entropy(model(batch_x), batch_y).backward()
        optimizer.second_step(zero_grad=True)
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    run, replayed = step, None
    if with_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step()
        run = graph.replay
    losses = []
    for x, y in data:
        batch_x.copy_(x)
        batch_y.copy_(y)
        lr.mul_(0.9)
        loss = run()
        losses.append((replayed if with_graph else loss).clone())
    return [t.detach().clone() for t in model.state_dict().values()], losses


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_captured_step_replays_the_bits_of_the_eager_one(gpu_backend, base):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        eager, graph = trained(gpu_backend, False, base), trained(gpu_backend, True, base)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(eager[1], graph[1])
    assert same_bits(eager[0], graph[0])


# ---- Whole steps in one graph ----------------------------------------------------------------------------------------


class Captured:
    """SmallNet and rounds of whole steps, eager or in one graph: always on the same batches, one for each step of a
    round.
    """

    def __init__(
        self,
        gpu_backend: str,
        *,
        steps: int = 1,
        scaled: bool = False,
        base: type[torch.optim.Optimizer] = torch.optim.SGD,
    ) -> None:
        torch.manual_seed(0)
        self.model = SmallNet().cuda()
        self.lr = torch.tensor(0.05, device="cuda")
        options: dict[str, object] = {"momentum": 0.9} if base is torch.optim.SGD else {"capturable": True}
        self.optimizer = SAM(self.model.parameters(), base, lr=self.lr, backend=gpu_backend, **options)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=scaled)
        self.data = [(x.cuda(), y.cuda()) for x, y in batches(steps)]

    def step(self) -> None:
        for x, y in self.data:
            self.scaler.scale(cross_entropy(self.model(x), y)).backward()
            self.optimizer.first_step(zero_grad=True)
            with self.optimizer.second_pass(self.model):
                self.scaler.scale(cross_entropy(self.model(x), y)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def run(self, with_graph: bool, rounds: int, before: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Three eager rounds on a side stream, then ``rounds`` of them, each after ``before``; returns the model's and
        the optimizer's state.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        go = self.step
        if with_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            go = graph.replay
        for _ in range(rounds):
            before()
            go()
        torch.cuda.synchronize()
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return values([*self.model.state_dict().values(), *states])


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_whole_steps_in_one_graph_are_the_eager_ones(gpu_backend, base, steps):
    """BatchNorm's statistics and its counters too: one pass of each step counts."""
    eager, graph = (Captured(gpu_backend, steps=steps, base=base).run(with_graph, 4) for with_graph in (False, True))
    assert same_bits(graph, eager)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_captured_step_with_a_gradient_scaler_is_the_eager_one(gpu_backend, base):
    """Its scale and what it finds stay on the device, and so does the decision to skip a step."""
    eager, graph = (Captured(gpu_backend, scaled=True, base=base).run(with_graph, 4) for with_graph in (False, True))
    assert same_bits(graph, eager)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scheduler_reaches_a_captured_step_through_a_learning_rate_on_the_device(gpu_backend, base):
    results = []
    for with_graph in (False, True):
        captured = Captured(gpu_backend, base=base)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(captured.optimizer, 0.5)
        results.append(captured.run(with_graph, 4, scheduler.step))
        assert captured.optimizer.param_groups[0]["lr"] is captured.lr
        assert float(captured.lr) == pytest.approx(0.05 * 0.5**4)
    assert same_bits(*results)


@pytest.mark.parametrize(("replay_rng", "words"), [(False, "capturable=True"), (True, "replay_rng")])
def test_what_cannot_be_captured_is_refused_with_the_reason(gpu_backend, replay_rng, words):
    model = nn.Linear(3, 2).cuda()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.1, backend=gpu_backend)
    x = torch.ones(4, 3, device="cuda")

    def step(replay_rng: bool = False) -> None:
        with optimizer.first_pass(model, replay_rng=replay_rng):
            model(x).sum().backward()
        optimizer.first_step()
        optimizer.second_step()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(replay_rng)

    for _ in range(2):
        step()
    with pytest.raises(RuntimeError, match=words):
        capture()


def test_eager_steps_between_replays_do_not_disturb_the_graph(gpu_backend):
    params = on_gpu([100, 70_000])
    gradients = [p.grad.clone() for p in params]
    optimizer = SAM(params, lr=0.0, backend=gpu_backend)
    for _ in range(2):
        optimizer.first_step()
        optimizer.restore()
    before = values(params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.first_step()
        moved = [p.detach().clone() for p in params]
        optimizer.restore()
    expected = None
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        expected = expected or values(moved)
        assert same_bits(values(moved), expected)
        assert same_bits(values(params), before)
        # An eager step on gradients that lie elsewhere.
        old = [p.grad for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g * 2
        optimizer.first_step()
        optimizer.restore()
        for p, g in zip(params, old, strict=True):
            p.grad = g


def test_a_capture_that_ended_in_mid_step_has_moved_nothing(gpu_backend_or_torch):
    """Its backup was never written: what it holds are the weights of an earlier step."""
    params = on_gpu([100, 70_000])
    optimizer = SAM(params, lr=0.1, momentum=0.9, backend=gpu_backend_or_torch)
    for _ in range(2):
        optimizer.first_step()
        optimizer.second_step()
    before = values(params)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.first_step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.restore()
    assert ["captured in a graph" in str(w.message) for w in caught] == [True] * (gpu_backend_or_torch != "triton")
    assert same_bits(values(params), before)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="capture whole steps"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.second_step()
    optimizer.restore()
    assert same_bits(values(params), before)
