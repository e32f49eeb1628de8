"""SAM in the Trainer of Transformers: ``class MyTrainer(SAMTrainerMixin, Trainer)``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..amp import without_scale
from ..batches import with_own_containers
from ..closures import are_new
from ..running_stats import ExtraBuffers, check_extra_buffers
from ..sam import SAM
from ..unwrapping import unwrap
from .window import Window

COUNTED_IN_COMPUTE_LOSS = ("_metrics", "_total_train_tokens")
"""Attributes of TRL's trainers that their ``compute_loss`` adds to."""


class SAMTrainerMixin:
    """Makes both passes of SAM in a Trainer; it goes before ``Trainer``, or a class derived from it, among the bases.

    The optimizer that the Trainer creates (``--optim``, weight-decay groups) becomes SAM's base optimizer. Batches that
    are accumulated are kept for the second pass, which calls ``training_step`` on the same ones again at ``w + e``.
    The loss that is logged is the first pass's, ``grad_norm`` and clipping are of the second gradient. With the loss,
    ``sam/grad_norm`` and ``sam/sharpness`` of the last step are logged.

    Args:
        sam_rho: radius of the perturbation.
        sam_adaptive: True for ASAM.
        sam_replay_rng: the second pass draws the first one's dropout masks.
        sam_extra_buffers: further buffers that only the first pass may change, see
            :func:`sam_fast.disable_running_stats`.
        sam_options: further options of :class:`sam_fast.SAM`, such as ``schedule``.

    Raises:
        ValueError: the Trainer is used in a way that leaves no place for a second pass.
    """

    optimizer: Any
    args: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool

    def __init__(
        self,
        *args: Any,
        sam_rho: float = 0.05,
        sam_adaptive: bool = False,
        sam_replay_rng: bool = False,
        sam_extra_buffers: ExtraBuffers = (),
        sam_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._sam_options = {"rho": sam_rho, "adaptive": sam_adaptive, **(sam_options or {})}
        self._sam_replay_rng = sam_replay_rng
        self._sam_extra_buffers = check_extra_buffers(sam_extra_buffers)
        self._sam_window: Window | None = None
        self._sam_prepared: Any = None
        self._sam_second_pass = False
        self._sam_values: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, or the one it was given, inside a SAM."""
        self._check_sam()
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        try:
            unwrap(self.optimizer)
        except TypeError:
            self.optimizer = SAM(self.optimizer, **self._sam_options)
        return self.optimizer

    def _check_sam(self) -> None:
        fsdp1 = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1
        if self.is_deepspeed_enabled or fsdp1:
            engine = "FSDP1" if fsdp1 else "DeepSpeed"
            raise ValueError(
                f"SAMTrainerMixin does not work with {engine}, whose parameters are not those that the optimizer was "
                'made with: use FSDP2 (fsdp_config={"version": 2}), or several processes without either (DDP)'
            )
        optim = str(self.args.optim)
        if any(name in optim for name in ("layerwise", "lomo")):
            raise ValueError(
                f"SAMTrainerMixin does not work with optim={optim!r}, which steps during the backward pass: use "
                'another one, such as "adamw_torch"'
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. If it raises, the weights are w."""
        self._sam_window = None
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._sam_window is not None:
                self._sam_window.sam.restore()
            self._sam_window = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A part of the first pass; after the last one of a step, all of the second pass."""
        step = super().training_step  # type: ignore[misc]
        if self._sam_window is None:
            self._sam_window = Window(unwrap(self.optimizer), 1.0, self._sam_replay_rng, self._sam_extra_buffers)
        window, sam = self._sam_window, self._sam_window.sam
        if not are_new(sam._gradients()):
            window.clear()  # training has been stopped half-way through a step
        loss: Tensor = window.first(step, (model, inputs, num_items_in_batch), {})
        if sam.needs_first_pass:
            window.forwards[-1].args = (model, self._sam_prepared, num_items_in_batch)
            window.forwards[-1].loss = loss.detach()
            if self.accelerator.sync_gradients:
                with self._sam_unnoticed():
                    losses = window.second(model, step)
                assert losses is not None
                self._sam_values = {"sam/sharpness": losses[1] - losses[0]}
        if sam.perturbed:
            self._sam_values["sam/grad_norm"] = without_scale(sam.grad_norm, self.accelerator.scaler)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """What was prepared for the first pass serves the second: trainers that generate text generate it once."""
        if self._sam_second_pass:
            return copy.copy(inputs)
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        self._sam_prepared = with_own_containers(prepared)
        return prepared

    @contextmanager
    def _sam_unnoticed(self) -> Iterator[None]:
        """Inside, what TRL's trainers count does not change, and optimizers that are told in which mode they are, such
        as schedule-free ones, are not told again while the weights are perturbed.
        """
        counted = {name: copy.deepcopy(vars(self)[name]) for name in COUNTED_IN_COMPUTE_LOSS if name in vars(self)}
        optimizer = self.optimizer
        try:
            self.optimizer, self._sam_second_pass = None, True
            yield
        finally:
            self.optimizer, self._sam_second_pass = optimizer, False
            vars(self).update(counted)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the loss, what the last step has measured."""
        if "loss" in logs:
            logs.update({name: float(value) for name, value in self._sam_values.items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
