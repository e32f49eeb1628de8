"""SAM in Lightning's automatic optimization: ``Trainer(callbacks=[SAMCallback()])``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..amp import without_scale
from ..closures import WholeStep
from ..running_stats import ExtraBuffers, check_extra_buffers, modules_aside
from ..sam import SAM
from ..storage.fsdp import has_fsdp1
from ..train_step import stride_of
from ..unwrapping import unwrap
from .window import Window, at_w

# Both packages may be installed: the user's Trainer is of the one that is imported.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers.logger import DummyLogger
else:
    try:
        from lightning.pytorch import Callback
        from lightning.pytorch.loggers.logger import DummyLogger
    except ImportError as error:
        try:
            from pytorch_lightning import Callback
            from pytorch_lightning.loggers.logger import DummyLogger
        except ImportError:
            raise error from None  # the one to install, or what that one lacks


class SAMCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Makes both passes of SAM in Lightning's automatic optimization.

    ``configure_optimizers`` has to return a SAM. Accumulated batches are kept for the second pass, which runs
    ``training_step`` on them again at ``w + e`` before the step, without logging and hooks. Metrics, attributes of the
    module that are numbers or lists, and BatchNorm statistics count the first pass only. Lightning clips the second
    gradient.
    ``on_after_backward`` is called in the first pass, ``on_before_optimizer_step`` with the second gradient.

    Every ``log_every_n_steps`` steps the callback logs ``sam/grad_norm`` and, if ``ascent`` is 1, ``sam/sharpness``
    (loss at ``w + e`` minus loss at w, in this process) of the last step that perturbed.

    Args:
        ascent: share of each batch's rows that the first pass sees, see :class:`sam_fast.TrainStep`. What
            ``training_step`` logs is of these rows.
        replay_rng: the second pass draws the first one's dropout masks; needs ``ascent=1``.
        extra_buffers: further buffers that only the first pass may change, see :func:`sam_fast.disable_running_stats`.

    Raises:
        TypeError: ``extra_buffers`` is of the wrong type.
        ValueError: ``ascent`` is out of range, or below 1 with ``replay_rng``. At the beginning of training: the
            optimizer is no SAM, or Lightning is used in a way that leaves no place for a second pass.
    """

    def __init__(self, ascent: float = 1.0, replay_rng: bool = False, extra_buffers: ExtraBuffers = ()) -> None:
        stride_of(ascent, replay_rng)
        self.ascent, self.replay_rng = ascent, replay_rng
        self.extra_buffers = check_extra_buffers(extra_buffers)
        self._detach: Callable[[], None] | None = None
        self._window: Window | None = None
        self._values: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the recording of batches, and the second pass, into the strategy."""
        self._end()
        sam = self._checked(trainer, pl_module)
        strategy = trainer.strategy
        window = Window(sam, pl_module, self.ascent, self.replay_rng, self.extra_buffers)
        training_step, optimizer_step = strategy.training_step, strategy.optimizer_step
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        silent: dict[int, Any] = {}

        def first_pass(*args: Any, **kwargs: Any) -> Any:
            if trainer.fit_loop._skip_backward:  # StochasticWeightAveraging's epoch for BatchNorm statistics
                return training_step(*args, **kwargs)
            output = window.first(training_step, args, kwargs)
            if sam.needs_first_pass:
                loss = _loss_of(output, trainer)
                window.forwards[-1].loss = None if loss is None else loss.detach()
            return output

        def second_pass(*args: Any, **kwargs: Any) -> Tensor | None:
            loss = _loss_of(training_step(*args, **kwargs), trainer)
            if loss is None:
                return None
            scaled = loss if scaler is None else scaler.scale(loss)
            strategy.precision_plugin.backward(scaled, pl_module, trainer.optimizers[0])
            return loss.detach()

        def whole_step(closure: Callable[[], Any]) -> Any:
            result = closure()
            with _unnoticed(trainer, pl_module, silent):
                losses = window.second(strategy.model, second_pass)
            window.clear()
            if sam.perturbed:
                self._values["sam/grad_norm"] = without_scale(sam.grad_norm, scaler)
            if losses is not None:
                self._values["sam/sharpness"] = losses[1] - losses[0]
            return result

        def step(optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
            return optimizer_step(optimizer, WholeStep(lambda: whole_step(closure)), *args, **kwargs)

        save = trainer.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            with at_w(sam):  # after SLURM's signal Lightning saves wherever training stands
                save(*args, **kwargs)

        def detach() -> None:
            del strategy.training_step, strategy.optimizer_step, trainer.save_checkpoint

        strategy.training_step, strategy.optimizer_step = first_pass, step
        trainer.save_checkpoint = save_checkpoint
        self._detach, self._window = detach, window

    def _checked(self, trainer: Any, pl_module: Any) -> SAM:
        """The SAM of this run.

        Raises:
            ValueError: see the class.
        """
        strategy = trainer.strategy
        if not pl_module.automatic_optimization:
            raise ValueError(
                "SAMCallback is for automatic optimization. With automatic_optimization=False leave it out and write "
                "both passes: opt = self.optimizers(); manual_backward(loss); opt.first_step(zero_grad=True); "
                "with opt.second_pass(self): manual_backward(loss again); opt.second_step(zero_grad=True)"
            )
        if strategy.handles_gradient_accumulation or "deepspeed" in type(strategy).__name__.lower():
            raise ValueError(
                f"SAMCallback does not work with {type(strategy).__name__}, which steps with an engine of its own and "
                'shards what SAM has to move: use strategy="ddp", or ModelParallelStrategy (FSDP2)'
            )
        if has_fsdp1(strategy.model):
            raise ValueError("SAMCallback does not work with FSDP1: use ModelParallelStrategy (FSDP2)")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(
                "SAMCallback needs the batch twice, and training_step(dataloader_iter) fetches it itself: write "
                "training_step(self, batch, batch_idx)"
            )
        if sum(isinstance(callback, SAMCallback) for callback in trainer.callbacks) > 1:
            raise ValueError("there are two SAMCallbacks: leave one of them out")
        try:
            return unwrap(trainer.optimizers)
        except TypeError as error:
            raise ValueError(
                f"SAMCallback needs a SAM from configure_optimizers, such as SAM(self.parameters(), "
                f"torch.optim.AdamW, lr=1e-3): {error}"
            ) from None

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Forget the batches before this one: they take no part in the coming step."""
        if self._window is not None:
            self._window.keep_last()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what has been measured, as tensors: nothing waits for the device. Logging takes Lightning half a
        millisecond, so it is left out in steps whose values no logger would get (``log_every_n_steps``).
        """
        if self._values and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._values, on_step=True, on_epoch=False, batch_size=1)
            self._values = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the strategy as it was."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the weights, and leave the strategy as it was."""
        if self._window is not None:
            self._window.sam.restore()
        self._end()

    def _end(self) -> None:
        if self._detach is not None:
            self._detach()
        self._detach, self._window, self._values = None, None, {}


def _loss_of(output: Any, trainer: Any) -> Tensor | None:
    """What Lightning takes for the loss of a training step."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return None if loss is None else loss / trainer.accumulate_grad_batches


@contextmanager
def _unnoticed(trainer: Any, pl_module: Any, silent: dict[int, Any]) -> Iterator[None]:
    """Inside, nothing is logged, and metrics end as they were. ``silent`` keeps what stands in for each logger."""
    loggers = trainer.loggers
    for logger in loggers:
        if id(logger) not in silent:
            silent[id(logger)] = _silenced(logger)
    modules = chain.from_iterable(m.modules() for m in (pl_module, *modules_aside(pl_module)))  # a dict of metrics
    states = [state for module in modules if "_defaults" in vars(module) for state in _states_of(module)]
    results = trainer._results
    logged = set(results)
    try:
        pl_module.log = _log_nothing
        trainer.loggers = [silent[id(logger)] for logger in loggers]
        yield
    finally:
        del pl_module.log
        trainer.loggers = loggers
        for key in results.keys() - logged:  # by a ``self.log`` that was passed on before: its fx is another one here
            del results[key]
        for put_back in states:
            put_back()


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _silenced(logger: Any) -> Any:
    """A logger of the same class, with the same names, numbers and paths (``log_dir``), that logs nothing."""
    nothing = DummyLogger()
    nothing.finalize = logger.finalize  # which a signal's handler calls before the job is killed

    class Silent(type(logger)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = None if name == "experiment" else getattr(logger, name, None)
            return value if isinstance(value, (str, int, float, os.PathLike)) else getattr(nothing, name)

    return object.__new__(Silent)


def _states_of(metric: Any) -> Iterator[Callable[[], None]]:
    """Functions that put back the states of a torchmetrics metric, and other tensors and numbers in it, such as
    MinMaxMetric's and RunningMean's. Metrics may share tensors, so the tensors stay the same objects.
    """
    others = (name for name, value in vars(metric).items() if isinstance(value, (Tensor, int, float)))
    for name in dict.fromkeys((*metric._defaults, "_computed", "_forward_cache", *others)):
        if hasattr(metric, name):
            value = getattr(metric, name)
            copy = (
                value.detach().clone() if isinstance(value, Tensor) else list(value) if type(value) is list else value
            )
            yield lambda name=name, value=value, copy=copy: _put_back(metric, name, value, copy)  # type: ignore[misc]


def _put_back(metric: Any, name: str, value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(copy)
    elif type(value) is list:
        value[:] = copy
    setattr(metric, name, value)
