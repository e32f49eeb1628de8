"""What all measures have in common: a model and its batches, checked; moving the weights; leaving no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..backends import forced
from ..batches import number_of_rows, with_own_containers
from ..batchnorm import frozen_running_stats
from ..closure_stats import refers_to
from ..options import check_count, check_flag, check_loss_fn
from ..perturbation import Perturbation
from ..random_state import RandomState
from ..storage import is_dtensor, sharded_storage
from ..storage.fsdp import forget_gathered_weights, give_up_pass, is_fsdp_module

_STREAM = 20_180_000
"""Added to seeds, see :func:`generator`."""

PERTURB_EPS = 1e-12
"""Added to the norm, as SAM does by default."""


class Measurement:
    """A model, a loss and batches, and what every measure does with them.

    The model is measured in the mode it is in. With DistributedDataParallel its ``module`` is called, nothing is
    synchronised, and numbers are combined over its processes; with FSDP2 and tensor parallelism over the device mesh.

    Args:
        model: with at least one parameter that requires a gradient; the others are left alone.
        loss_fn: ``loss_fn(model, *batch)`` returns a scalar, a mean over the batch's rows.
        batches: what ``loss_fn`` takes after the model, in tuples or lists; anything else is one argument.
        whole: the name, for the error, of a function that needs whole parameters; None if DTensors will do.
        backend: as in :class:`sam_fast.SAM`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model has no trainable parameters, has DistributedDataParallel or FullyShardedDataParallel
            inside, or DTensor parameters where ``whole`` forbids them.
        RuntimeError: inside ``torch.inference_mode()``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batches: Iterable[Any],
        whole: str | None = None,
        backend: str | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("sharpness needs gradients: measure outside torch.inference_mode()")
        check_loss_fn(loss_fn)
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
            raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}: use [(x, y)]")
        self.params_by_name = trainable(model)
        self.params = list(self.params_by_name.values())
        spread = sharded_storage(self.params)
        if spread is not None and whole is not None:
            raise ValueError(
                f"{whole} needs whole parameters, and model's are spread over processes: gather them "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load them "
                "into a model that is not sharded, and measure that"
            )
        self.module = unwrapped(model)
        self.loss_fn, self.batches = loss_fn, batches
        self.mesh = next((p.device_mesh for p in self.params if is_dtensor(p)), None)  # type: ignore[attr-defined]
        self._replicas: Any = model.process_group if isinstance(model, DistributedDataParallel) else None
        self._fsdp = any(map(is_fsdp_module, self.module.modules()))
        forced(backend)
        self._perturbation = Perturbation(backend, flatten=False, eps=PERTURB_EPS, nested=True)

    # ---- Batches and losses ------------------------------------------------------------------------------------------

    @property
    def count(self) -> int | None:
        """How many batches there are, where that is known."""
        try:
            return length_hint(self.batches) or None
        except Exception:  # a loader that cannot say it may raise anything; the progress bar alone asks
            return None

    def each_batch(self) -> Iterator[tuple[tuple[Any, ...], int]]:
        """Every batch as arguments of ``loss_fn``, with its number of rows."""
        for batch in self.batches:
            arguments = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
            rows = number_of_rows(arguments)
            if not rows:
                raise ValueError("batches has a batch with no tensor that has rows, so that it cannot be weighted")
            yield arguments, rows

    def loss(self, batch: Sequence[Any]) -> Tensor:
        """The loss of one batch where the weights are now."""
        loss = self.loss_fn(self.module, *with_own_containers(batch))
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
        if loss.is_complex():
            raise ValueError("loss_fn must return a real number, got a complex one")
        if loss.dim():
            raise ValueError(f"loss_fn must return a scalar, the mean over the batch, got shape {tuple(loss.shape)}")
        return loss

    def gradients(self, loss: Tensor, create_graph: bool = False) -> list[Tensor | None]:
        """The gradient of ``loss`` with respect to each of ``params``; None where it does not depend on one."""
        finite(loss, "w")
        grads: list[Tensor | None] = [None]
        if loss.requires_grad and self._fsdp:  # FSDP2 reduces gradients in hooks of backward()
            self.put_gradients([None] * len(self.params))
            loss.backward()
            grads = [p.grad for p in self.params]
        elif loss.requires_grad:  # calls no hooks, so that DistributedDataParallel has nothing to wait for
            grads = list(torch.autograd.grad(loss, self.params, create_graph=create_graph, allow_unused=True))
        if all(grad is None for grad in grads):
            raise ValueError("loss_fn returned a loss that depends on no trainable parameter of model")
        return grads

    def put_gradients(self, grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    # ---- The weights and everything else as they were ----------------------------------------------------------------

    def random_state(self) -> RandomState:
        return RandomState.capture({p.device for p in self.params}, generators_of(self.batches))

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Running statistics, gradients and random state end as they were. Gradients are computed inside."""
        grads, random_state = [p.grad for p in self.params], self.random_state()
        modules = [self.module, *refers_to(self.loss_fn)[0]]  # such as the other half of a GAN
        try:
            with frozen_running_stats(modules), torch.enable_grad(), iterator_left_alone(self.batches):
                yield
        except BaseException:
            if self._fsdp:
                give_up_pass(self.params)
            raise
        finally:
            self.put_gradients(grads)
            random_state.apply()

    @contextmanager
    def moved(
        self,
        direction: Sequence[Tensor | None],
        rho: float,
        adaptive: bool = False,
        eta: float = 0.0,
        eps: float = PERTURB_EPS,
    ) -> Iterator[None]:
        """The weights are at ``w + e`` inside, where no gradients are computed, and at w again after it.

        Args:
            direction: for each parameter the tensor that SAM would have as its gradient.
            rho: radius; if negative, the weights move the other way.
            adaptive, eta: as in :class:`sam_fast.SAM`.
            eps: added to the direction's norm.

        Raises:
            ValueError: the direction's norm is not finite.
        """
        group = {"params": self.params, "param_names": list(self.params_by_name), "rho": abs(rho), "perturb": True}
        group |= {"adaptive": adaptive, "eta": eta, "maximize": rho < 0.0}
        self._perturbation.eps = eps
        try:
            self.put_gradients(direction)
            self._perturbation.perturb([group])
            if not math.isfinite(self._perturbation.norm.value):  # the kernels have moved nothing
                raise ValueError(
                    "the direction to move in is not finite: loss_fn's gradient at w, or a step times a direction, has "
                    "overflowed"
                )
            self.put_gradients([None] * len(self.params))
            forget_gathered_weights(self.module)
            with torch.no_grad():
                yield
        finally:
            if self._perturbation.active:
                try:
                    self._perturbation.restore()
                except BaseException:  # interrupted: nobody else can put back what is left
                    self._perturbation.restore()
                    raise
                forget_gathered_weights(self.module)

    # ---- Processes ---------------------------------------------------------------------------------------------------

    def add_over_replicas(self, *tensors: Tensor) -> None:
        """Add up, in place, what the processes of DistributedDataParallel have found; each has batches of its own."""
        for tensor in tensors if self._replicas is not None else ():
            distributed.all_reduce(tensor, group=self._replicas)

    def add_over_mesh(self, tensor: Tensor) -> Tensor:
        """The sum over all processes among which the parameters are spread. These have parts of the same batches."""
        if self.mesh is None:
            return tensor
        total = tensor.to(self.mesh.device_type)
        for dim in range(self.mesh.ndim):
            distributed.all_reduce(total, group=self.mesh.get_group(dim))
        return total.to(tensor.device)

    def numbers(self, values: Any) -> Tensor:
        """A float64 tensor where the processes can exchange it."""
        device = "cpu" if self._replicas is None else self.params[0].device
        return torch.tensor(values, dtype=torch.float64, device=device)

    def means(self, sums: Sequence[float], rows: int) -> Tensor:
        """Sums over the rows of all batches, of all processes of DistributedDataParallel, divided by their number."""
        found = self.numbers([rows, *sums])
        self.add_over_replicas(found)
        return found[1:] / not_empty(found[0])

    @contextmanager
    def progress(self, wanted: bool, what: str, total: int | None) -> Iterator[Callable[[], Any]]:
        """A progress bar in one of the processes. Yields a function that moves it on by one."""
        check_flag("progress", wanted)
        if wanted:  # in all processes: if one alone raised, the others would wait for it
            try:
                from tqdm import tqdm
            except ImportError:
                raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        if self.mesh is not None:
            first = not any(self.mesh.get_coordinate())
        else:
            first = self._replicas is None or distributed.get_rank(self._replicas) == 0
        if not (wanted and first):
            yield lambda: None
            return
        with tqdm(desc=what, total=total) as bar:
            yield bar.update


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside DistributedDataParallel."""
    module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return module


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, each under its first name in the model without its wrapper.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there are none, DistributedDataParallel is not the outermost module, or it has hidden some.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    module = unwrapped(model)
    forget_gathered_weights(module)  # after a forward pass alone FSDP2's root still shows those as parameters
    if any(isinstance(inner, DistributedDataParallel) for inner in module.modules()):
        raise ValueError(
            "model has a DistributedDataParallel inside, whose passes wait for gradients: pass the "
            "DistributedDataParallel itself, or what is in it for this process alone"
        )
    if module is not model and any(is_dtensor(value) for inner in module.modules() for value in vars(inner).values()):
        raise ValueError(
            "model is in a DistributedDataParallel over tensor parallelism, which has taken parameters out of it: load "
            "the weights into a model without DistributedDataParallel, and measure that"
        )
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model has no trainable parameters: none requires a gradient")
    return found


def generators_of(batches: Any) -> list[torch.Generator]:
    """What a DataLoader and its samplers shuffle with, where that is not PyTorch's default generator."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    owners = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(own for own in found if isinstance(own, torch.Generator)))


@contextmanager
def iterator_left_alone(batches: Any) -> Iterator[None]:
    """Inside, a DataLoader with persistent workers has another iterator. Otherwise it has only one, which ``iter()``
    starts anew: a training loop over it would end early, and its workers' random states would go on.
    """
    if not (isinstance(batches, DataLoader) and batches.persistent_workers):
        yield
        return
    iterator, batches._iterator = batches._iterator, None
    try:
        yield
    finally:
        batches._iterator = iterator


def generator(device: torch.device | str, seed: int) -> torch.Generator:
    """A generator of other numbers than those with which ``torch.manual_seed(seed)`` has initialized the model."""
    check_count("seed", seed, at_least=0)
    return torch.Generator(device).manual_seed(_STREAM + seed)


def finite(loss: Tensor, where: str) -> float:
    """The loss as a number.

    Raises:
        ValueError: it is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"loss_fn returned {value} at {where}: nothing can be measured there")
    return value


def not_empty(count: Tensor | float) -> float:
    """The number of batches or rows in all processes. Raises ValueError if there were none."""
    if not count:
        raise ValueError("batches is empty")
    return float(count)
