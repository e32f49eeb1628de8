"""What surrounds a forward and backward pass: random state, gradient synchronisation, BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .batchnorm import frozen_running_stats
from .devices import devices_of
from .perturbation import Perturbation
from .random_state import RandomState
from .running_stats import ExtraBuffers, Models, as_models, check_models
from .step_state import StepState
from .storage.fsdp import forget_gathered_weights, is_fsdp_module, own_gradients


class Passes:
    """The two passes of an optimizer, as context managers."""

    param_groups: list[dict[str, Any]]
    _step: StepState
    _perturbation: Perturbation

    def restore(self) -> None:
        """Give the current step up."""
        raise NotImplementedError

    def _require_perturbed(self, what: str) -> None:
        raise NotImplementedError

    def _require_restored(self, what: str) -> None:
        raise NotImplementedError

    @contextmanager
    def first_pass(self, model: Models, replay_rng: bool = False, sync: bool = True) -> Iterator[None]:
        """Around the first forward and backward; optional.

        Args:
            model: the model, as it is called (the DDP wrapper where there is one), or a list or tuple of models.
            replay_rng: remember the random state of the CPU and of the parameters' devices, for ``second_pass`` to
                start from, so that dropout draws the same masks in both passes.
            sync: False to run this pass without gradient synchronisation (m-sharpness: each rank perturbs along its own
                gradient). With a GradScaler, only the second pass then decides whether the update is skipped, since the
                ranks must agree.

        Raises:
            RuntimeError: the weights are perturbed.
            TypeError: ``model`` is neither a module nor a list or tuple of modules.
            ValueError: ``sync=False`` where there can be no gradient of one replica: FSDP2 without HSDP, or DDP's first
                pass with a static graph.
        """
        self._require_restored("first_pass")
        models = as_models(model, "first_pass(model)")
        self._step.random_state = RandomState.capture(devices_of(self.param_groups)) if replay_rng else None
        self._step.own_gradient = not sync
        self._step.first_pass_entered = True
        try:
            with ExitStack() as stack:
                for module in () if sync else models:
                    stack.enter_context(without_gradient_sync(module))
                yield
        except BaseException:
            self._step.forget_first_pass()
            raise

    @contextmanager
    def second_pass(self, model: Models, extra_buffers: ExtraBuffers = ()) -> Iterator[None]:
        """Around the second forward and backward: the BatchNorm statistics of ``model`` end as they were, dropout draws
        the first pass's masks if ``first_pass`` was asked to remember, and if the body raises, the weights are restored
        before the exception goes on.

        ``break``, ``continue`` and ``return`` out of the body end it as its last line does: the weights stay perturbed,
        for the second_step that follows. Call ``restore()`` before them to give the step up.

        Args:
            model: the model, or a list or tuple of models.
            extra_buffers: further buffers that are to end as they were; see :func:`sam_fast.disable_running_stats`.

        Raises:
            RuntimeError: there was no first_step.
            TypeError: ``model`` or ``extra_buffers`` is of the wrong type. The weights are still perturbed, as after
                any wrong call.
            ValueError: a pattern in ``extra_buffers`` fits nothing. The same holds.
        """
        self._require_perturbed("second_pass")
        models, extra_buffers = check_models(model, extra_buffers, "second_pass(model)")
        random_state, self._step.random_state = self._step.random_state, None
        try:
            if self._perturbation.storage.process_wide:
                for module in models:
                    forget_gathered_weights(module)
            with frozen_running_stats(models, extra_buffers):
                if random_state is None:
                    yield
                else:
                    with random_state.replayed():
                        yield
        except BaseException:
            self.restore()
            raise


@contextmanager
def without_gradient_sync(model: Any) -> Iterator[None]:
    """Run forward and backward of ``model`` without gradient synchronisation, wherever in it a DDP or FSDP2 module is.

    For any other model there is none to leave out.

    Raises:
        ValueError: an FSDP2 module is sharded over all processes, so that no process has a gradient of its own; or a
            DDP module with a static graph has not had a pass with synchronisation yet.
    """
    with ExitStack() as stack:
        modules: Iterable[Any] = model.modules() if isinstance(model, nn.Module) else [model]
        for module in modules:
            if hasattr(type(module), "no_sync"):
                if getattr(module, "static_graph", False) and not getattr(
                    module, "_static_graph_delay_allreduce_enqueued", True
                ):
                    raise ValueError(
                        "first_pass(model, sync=False) cannot be the first pass of "
                        "DistributedDataParallel(static_graph=True), which learns the "
                        "graph in a backward pass with synchronisation: use sync=True in the first step"
                    )
                stack.enter_context(module.no_sync())
            elif is_fsdp_module(module):
                stack.enter_context(own_gradients(module))
            elif hasattr(type(module), "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield
