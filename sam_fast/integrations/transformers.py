"""SAM in the Trainer of Transformers: ``class MyTrainer(SAMTrainerMixin, Trainer)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..amp import without_scale
from ..batches import with_own_containers
from ..gradients import are_new
from ..running_stats import ExtraBuffers, check_extra_buffers
from ..sam import SAM
from ..unwrapping import unwrap
from .window import Window, at_w

COLLECTED = ("_metrics", "_stored_metrics", "accum_loss_components")
"""Attributes in which trainers of TRL and Sentence Transformers collect what they log."""


class SAMTrainerMixin:
    """Makes both passes of SAM in a Trainer; it goes before ``Trainer``, or a class derived from it, among the bases.

    The optimizer that the Trainer creates (``--optim``, weight-decay groups) becomes SAM's base optimizer. Accumulated
    batches are kept for the second pass, which calls ``training_step`` on them again at ``w + e``. The logged loss is
    the first pass's; ``grad_norm`` and clipping are about the second gradient. ``sam/grad_norm`` and ``sam/sharpness``
    of the last step are logged with the loss. Nothing is logged in the second pass, and numbers in the Trainer
    (``self.seen += 1`` in ``compute_loss``) have the same values in it as in the first, and count once.

    Args:
        sam_rho: radius of the perturbation; by default SAM's own.
        sam_adaptive: True for ASAM.
        sam_replay_rng: the second pass draws the first one's dropout masks.
        sam_extra_buffers: further buffers that only the first pass may change, see
            :func:`sam_fast.disable_running_stats`.
        sam_options: further options of :class:`sam_fast.SAM`, such as ``schedule``.

    Raises:
        TypeError: a class puts ``Trainer`` before the mixin.
        ValueError: the Trainer is used in a way that leaves no place for a second pass; or it was given a SAM, which
            takes none of ``sam_rho``, ``sam_adaptive`` and ``sam_options``.
    """

    optimizer: Any
    _prepare_inputs: Callable[[Any], Any]
    args: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        from transformers import Trainer

        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(SAMTrainerMixin)]
        if Trainer in before:
            raise TypeError(
                f"{cls.__name__} would train without SAM: SAMTrainerMixin goes first, class {cls.__name__}("
                "SAMTrainerMixin, Trainer)"
            )

    def __init__(
        self,
        *args: Any,
        sam_rho: float | None = None,
        sam_adaptive: bool | None = None,
        sam_replay_rng: bool = False,
        sam_extra_buffers: ExtraBuffers = (),
        sam_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        named = {"rho": sam_rho, "adaptive": sam_adaptive}
        self._sam_options = {name: value for name, value in named.items() if value is not None} | (sam_options or {})
        self._sam_made: SAM | None = None
        self._sam_replay_rng = sam_replay_rng
        self._sam_extra_buffers = check_extra_buffers(sam_extra_buffers)
        self._sam_window: Window | None = None
        self._sam_values: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, or the one it was given, inside a SAM."""
        self._check_sam()
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        try:
            unwrap(self.optimizer)
        except TypeError:
            self.optimizer = self._sam_made = SAM(self.optimizer, **self._sam_options)
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

    def _sam(self) -> SAM:
        sam = unwrap(self.optimizer)
        if sam is not self._sam_made and self._sam_options:
            raise ValueError(
                f"the Trainer has a SAM of your own, and SAMTrainerMixin's {', '.join(self._sam_options)} would change "
                "nothing: give your SAM these options, and leave sam_rho, sam_adaptive and sam_options out"
            )
        return sam

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
            self._sam_window = Window(self._sam(), self, 1.0, self._sam_replay_rng, self._sam_extra_buffers)
        window, sam = self._sam_window, self._sam_window.sam
        if sam._step.active:
            sam.restore()  # the step has run out of memory, and training begins anew with smaller batches
        if not are_new(sam._gradients()):
            window.clear()  # training has been stopped half-way through a step
        prepare = self._prepare_inputs
        kept: dict[str, list[Any]] = {}

        def prepare_and_keep(inputs: Any) -> Any:
            prepared = prepare(inputs)
            kept.setdefault("prepared", []).append(with_own_containers(prepared))
            return prepared

        def again(*args: Any, prepared: Any = ()) -> Tensor:
            """Both passes get the same prepared inputs: trainers that generate text generate it once, and inputs that
            are changed while they are prepared are not changed twice.
            """
            left = list(prepared)
            with _with_attributes(self, _prepare_inputs=lambda inputs: left.pop(0) if left else prepare(inputs)):
                loss: Tensor = step(*args)
            return loss

        with _with_attributes(self, _prepare_inputs=prepare_and_keep):
            loss: Tensor = window.first(step, (model, inputs, num_items_in_batch), {})
        if sam.needs_first_pass:
            window.forwards[-1].kwargs.update(kept)
            window.forwards[-1].loss = loss.detach()
            if self.accelerator.sync_gradients:
                with self._sam_unnoticed():
                    losses = window.second(model, again)
                assert losses is not None
                self._sam_values = {"sam/sharpness": losses[1] - losses[0]}
        if sam.perturbed:
            self._sam_values["sam/grad_norm"] = without_scale(sam.grad_norm, self.accelerator.scaler)
        return loss

    @contextmanager
    def _sam_unnoticed(self) -> Iterator[None]:
        """Inside, nothing is logged, what the Trainer counts does not change, and optimizers with a training mode, such
        as schedule-free ones, are not put into it again while the weights are perturbed.
        """
        counted = {name: _copied(value) for name, value in vars(self).items() if name in COLLECTED}
        try:
            with _with_attributes(self, log=lambda *args, **kwargs: None), _with_attributes(self.optimizer, train=None):
                yield
        finally:
            vars(self).update(counted)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save w, even between the second pass and the step, as ``enable_jit_checkpoint`` may do."""
        with nullcontext() if self._sam_window is None else at_w(self._sam_window.sam):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the last step has measured together with the loss."""
        if "loss" in logs:
            logs.update({name: float(value) for name, value in self._sam_values.items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _copied(value: Any) -> Any:
    """A copy of dictionaries and lists of numbers and tensors. Tensors lose their graphs, which deepcopy refuses."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update((key, _copied(item)) for key, item in value.items())
        return made
    return [_copied(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _with_attributes(owner: Any, **attributes: Any) -> Iterator[None]:
    """Inside, ``owner`` has these attributes, which hide those of the same names in it and in its classes."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
