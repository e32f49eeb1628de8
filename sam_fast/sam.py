"""The class SAM: Sharpness-Aware Minimization around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any
from weakref import finalize

import torch
from torch.optim import Optimizer

from .amp import UNSCALED, clear_scaling, is_under_way, report_overflow, scaling_of, step_base
from .backends import forced
from .base_step import reset_gradients
from .batchnorm import settle_running_stats, watch_steps
from .clipping import clipped
from .closures import AUTO, check_closure_option, closure_step, step_without_closure
from .compiling import leave_uncompiled
from .fused_step import fused_step
from .gradients import left_by_a_pass, mark_used
from .options import (
    as_groups,
    check_at_least_zero,
    check_base,
    check_flag,
    check_variant,
    make_base,
    take_over_options,
    warn_of_kept_options,
)
from .passes import Passes
from .perturbation import Perturbation, forget_old_weights
from .rounding import PERTURB, ROUNDED, UPDATE, rounding_key
from .running_stats import ExtraBuffers, Models
from .schedule import STEP, Schedule, ScheduleWatch, check_schedule, count_step, start_counter, steps_taken
from .step_state import StepState, set_by_scaler


class SAM(Passes):
    """Sharpness-Aware Minimization (Foret et al., https://arxiv.org/abs/2010.01412) and ASAM (Kwon et al.,
    https://arxiv.org/abs/2102.11600).

    ``first_step`` moves the weights from w to ``w + e``, ``e = rho T^2 g / (||T g|| + perturb_eps)``, where the norm
    is one number over all parameters of all groups and T = 1, or ``|w| + eta`` in adaptive groups. ``second_step`` puts
    w back, bit for bit, and lets the base optimizer step with the gradient found at ``w + e``::

        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        with optimizer.second_pass(model):
            loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer, of any floating or complex
            dtype, on any devices; or an optimizer, which becomes the base optimizer. Groups may set ``rho``,
            ``adaptive``, ``eta`` and ``perturb`` (False: neither perturbed nor counted in the norm).
        base_optimizer: an Optimizer class, its import path (``"torch.optim.SGD"``), or a callable that takes the
            parameter groups and ``base_kwargs`` and returns an Optimizer. It may make groups of its own.
        rho: radius of the perturbation in the 2-norm, in units of the weights; at least 0.
        adaptive: True for ASAM; its rho is usually about ten times SAM's.
        eta: added to ``|w|`` in ASAM's T; at least 0 (the reference implementation has 0, the paper's code 0.01).
        perturb_eps: added to the norm; at least 0.
        flatten: make parameters and gradients views of flat buffers; gradients are then zero, not None. On the CPU it
            was not faster (docs/speed.md).
        backend: name of a backend to force (see :func:`sam_fast.backends.available`); by default the best for each
            parameter.
        closure: what ``step(closure)`` does with existing gradients. "second": they are the first pass, and the closure
            is called for the second, as in the reference implementation. "both": they are discarded and the closure is
            called for both, as with any torch optimizer. "auto", the default: "second" if they are new (neither used by
            a step with a closure nor zeroed by ``zero_grad()``) and not all zero, else "both"; to decide, the host
            waits for the norm.
        stochastic_rounding: round weights in bfloat16 and float16 up or down with the probabilities that make ``w + e``
            right on average, and with a fused second step the new weights too. False rounds to nearest, which loses
            most of a small e. None, the default, means False (docs/mixed_precision.md has the measurement).
        schedule: which steps perturb, a :class:`sam_fast.Schedule`; None: all do.
        along: the direction of the perturbation. There is only "gradient", that of a first pass over this batch: other
            directions did not keep enough of SAM's accuracy (docs/quality.md).
        **base_kwargs: options of the base optimizer.

    Attributes:
        base_optimizer: the torch optimizer that steps. ``state`` and ``param_groups`` are its own objects.

    Raises:
        TypeError: ``base_optimizer`` makes no Optimizer, ``params`` is a single tensor or a module, ``schedule`` is no
            Schedule, an optimizer is given together with ``base_optimizer`` or ``base_kwargs``, or a subclass has a
            ``_grad_norm`` of its own, or a ``second_step`` that needs one, but no ``first_step``.
        ValueError: ``params`` is empty, a parameter overlaps itself, an option is out of range, the base optimizer has
            an option of the same name as one of SAM's, needs a closure, differentiates gradients or steps during
            backward passes, the forced backend is unknown or does not support a parameter, or ``flatten=True`` with
            parameters that share memory.
        RuntimeError: the forced backend cannot be used here.
    """

    grad_scale = set_by_scaler("grad_scale")
    found_inf = set_by_scaler("found_inf")
    _step_supports_amp_scaling = True  # a GradScaler calls step() even after an overflow: the weights must come back

    def __init__(
        self,
        params: Iterable[Any] | Optimizer,
        base_optimizer: Callable[..., Optimizer] | str = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        perturb_eps: float = 1e-12,
        flatten: bool = False,
        backend: str | None = None,
        closure: str = "auto",
        stochastic_rounding: bool | None = None,
        schedule: Schedule | None = None,
        along: str = "gradient",
        **base_kwargs: Any,
    ) -> None:
        check_variant(type(self), SAM)
        make = make_base(params, base_optimizer, base_kwargs)
        check_at_least_zero("perturb_eps", perturb_eps)
        check_flag("flatten", flatten)
        if stochastic_rounding is not None:
            check_flag("stochastic_rounding", stochastic_rounding, "None, True or False")
        check_closure_option("closure", closure)
        check_schedule(schedule)
        if along != "gradient":
            raise ValueError(f'along must be "gradient", got {along!r}: docs/quality.md says why there is no other')
        forced(backend)
        groups = as_groups(params)
        self._rounds = bool(stochastic_rounding)
        self._closure = closure
        self._schedule = schedule
        self._sam_defaults = {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True}
        if isinstance(params, Optimizer):
            warn_of_kept_options(groups, self._sam_defaults)
        self._fill_in_options(groups)
        super().__init__(groups)
        base = make(groups)
        check_base(base, flatten)
        take_over_options(base.param_groups, groups)
        self._fill_in_options(base.param_groups)
        self._note_options(base.param_groups)
        self.base_optimizer = base
        self.defaults = {**base.defaults, **self._sam_defaults}
        self._perturbation = Perturbation(backend, flatten, perturb_eps)
        self._begin()

    def _begin(self) -> None:
        """Build what copies and pickles leave out."""
        leave_uncompiled()
        self._work_with(self.base_optimizer)
        self._step = StepState()
        self._schedule_watch = None if self._schedule is None else ScheduleWatch(self._schedule)
        if self._schedule_watch is not None:
            finalize(self._step, self._schedule_watch.warn_at_the_end)  # the step is shared with copies and wrappers
        watch_steps(self._step)
        self._prepare()

    def __copy__(self) -> SAM:
        """Another view of the same optimizer: one base optimizer, one set of buckets."""
        self._require_restored("copying the optimizer")
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__.pop("step", None)  # a scheduler's wrapper is bound to the original
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self._require_restored("copying or pickling the optimizer")
        return {
            "defaults": self.defaults,
            "base_optimizer": self._current_base(),
            "_sam_defaults": self._sam_defaults,
            "_made_with": self._made_with,
            "_rounds": self._rounds,
            "_closure": self._closure,
            "_schedule": self._schedule,
            "_perturbation": (self._perturbation.backend, self._perturbation.flatten, self._perturbation.eps),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"_rounds": False, "_closure": AUTO, "_schedule": None, "_made_with": [], **state}  # as 0.1.0
        settings = state.pop("_perturbation")
        super().__setstate__(state)
        self._perturbation = Perturbation(*settings)
        self._begin()

    def _prepare(self) -> None:
        """Build the buckets.

        With flatten=True parameters get a gradient of zeros here, which must not count as a first pass.
        """
        without = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        self._perturbation.prepare(self.param_groups)
        mark_used(p.grad for p in without if p.grad is not None)
        if self._schedule is not None or (self._rounds and self._perturbation.holds(ROUNDED)):
            start_counter(self.param_groups)

    # ---- The two steps -----------------------------------------------------------------------------------------------

    def first_step(self, zero_grad: bool = False) -> None:
        """Move from w to ``w + e`` along the gradients of the first pass.

        The gradients may be multiplied by any scale, as a GradScaler does: it cancels, except against ``perturb_eps``.
        Do not unscale them before.

        Parameters without a gradient do not move. If the norm is not finite no parameter moves (the second pass is then
        an ordinary one at w); this is decided on the device.

        Args:
            zero_grad: call ``zero_grad()`` afterwards.

        Raises:
            RuntimeError: a step is under way already; or a gradient is sparse, has another shape than its parameter, or
                is of a kind whose elements cannot be reached. The weights are then as before the call.
            ValueError: an option of a group is out of range.
        """
        step = self._step
        if step.active or self._perturbation.active:
            raise RuntimeError(
                "first_step() was called twice: finish with second_step(), or call restore() to give this step up"
            )
        known = self._known_base
        groups = (known if self.base_optimizer is known else self._current_base()).param_groups  # most often no call
        for group in groups:
            if not group.keys() >= self._sam_defaults.keys():  # added to the base optimizer, or loaded into it
                self._fill_in_options(groups, self._made_with)
                break
        if step.unused:
            step.train_unused()
        perturbs = self.will_perturb
        first_pass_done = perturbs or step.first_pass_entered or left_by_a_pass(self._gradients())
        if perturbs:
            rounds = self._rounds and self._perturbation.holds(ROUNDED)
            key = rounding_key(steps_taken(groups), PERTURB) if rounds else None
            self._perturbation.perturb(groups, key, step.own_gradient)
        else:
            self._perturbation.prepare(groups)
        step.active, step.thread, step.first_pass_done, step.perturbs = True, get_ident(), first_pass_done, perturbs
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore w and step the base optimizer with the gradients found at ``w + e``. Goes through :meth:`step`.

        Args:
            zero_grad: call ``zero_grad()`` afterwards.

        Raises:
            RuntimeError: there was no first_step.
        """
        if not self._step.active:
            self._require_first_step("second_step()")
        watched = self._step.found_inf is not None or self._is_watched()
        by_step = watched and not self._step.finishing and self._step_leads_on()
        if by_step:
            self._finish(self.step)
        if not by_step or self._step.active:  # a step that was put in its place may do nothing
            vars(self)["_opt_called"] = True  # which schedulers check; __setattr__ would take longer
            self._update()
        if zero_grad:
            self.zero_grad()

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        passes: str | None = None,
        replay_rng: bool = False,
        model: Models | None = None,
        extra_buffers: ExtraBuffers = (),
    ) -> Any:
        """The second step; or, with a closure, a whole SAM step.

        Without a closure, while perturbed: restore w and step the base optimizer. Called by a ``torch.amp.GradScaler``,
        the gradients are unscaled first, and there is no step of the base optimizer if a gradient of either pass was
        not finite.

        With a closure, while perturbed: the closure is the second pass. Otherwise it is called for both passes, or only
        for the second if existing gradients are the first: see ``closure`` of the constructor. BatchNorm statistics
        count the first pass alone.

        Args:
            closure: computes the loss, calls backward and returns the loss.
            passes: "auto", "both" or "second", for this call instead of the constructor's ``closure``.
            replay_rng: the second call of the closure draws what the first one drew (the same dropout masks); the
                random state afterwards is that after the first call.
            model: modules whose BatchNorm statistics the second pass must leave alone, and which the closure does not
                call itself because a compiled function does: a module, or a list or tuple. Modules that the closure
                calls are found without this.
            extra_buffers: further buffers that the second pass must leave as they were; see
                :func:`sam_fast.disable_running_stats`.

        Returns:
            None without a closure; else the loss of the first pass if the closure computed it, or that of the second.

        Raises:
            RuntimeError: no closure and no first_step before; ``passes="second"`` without gradients where the step
                perturbs; or a closure from a GradScaler. If the closure raises, w is restored.
            ValueError: ``replay_rng`` where the closure would not be called for both passes, or
                ``first_pass(replay_rng=True)`` where it would; a pattern in ``extra_buffers`` that matches nothing in
                ``model``.
            TypeError: ``model`` or ``extra_buffers`` is of the wrong type.
        """
        try:
            if closure is None:
                return step_without_closure(self, passes, replay_rng)
            passes = self._closure if passes is None else passes
            return closure_step(self, closure, passes, replay_rng, model, extra_buffers)
        except BaseException:
            # A GradScaler removes its scale only if step() returns, and multiplies the next one by what is left.
            clear_scaling(self)
            raise

    _plain_step = staticmethod(step)  # as it is here: PyTorch wraps ``step`` later

    def _end_step(self) -> None:
        """The second step, with which ``step`` ends: a subclass's own one, unless that has called ``step``."""
        its_own = type(self).second_step
        if its_own is not SAM.second_step and not (self._step.finishing or is_under_way(its_own)):
            self._finish(self.second_step)
            return
        self._require_first_step("step()")
        self._update()

    def _finish(self, call: Callable[[], None]) -> None:
        """Call ``step`` from ``second_step`` or the other way round, and keep them from doing so again."""
        try:
            self._step.finishing = True
            call()
        finally:
            self._step.finishing = False

    def _update(self) -> None:
        base, step, perturbation = self.base_optimizer, self._step, self._perturbation
        if step.without_sync:
            step.require_sync("second_step()")
        step.zeroed = False
        settle_running_stats(base.param_groups, counts=not step.first_pass_done)
        scaling = UNSCALED
        if step.grad_scale is not None or step.found_inf is not None:
            # If the first pass overflows on one rank alone, that rank must not skip an update that the others make.
            scaling = scaling_of(step.grad_scale, step.found_inf, self._common_norm())
        if step.first_pass_entered:
            step.forget_first_pass()
        if perturbation.flatten:
            perturbation.storage.release_frozen()  # what was frozen between the passes
        rounds = self._rounds and perturbation.holds(ROUNDED)
        key = rounding_key(steps_taken(base.param_groups), UPDATE) if rounds else None
        perturbed = perturbation.active
        try:
            clips = step.clip_grad_norm
            applied = scaling if clips is None else clipped(perturbation, base, scaling, clips)
            reason = fused_step(perturbation, base, applied, key)
            if reason is not None:
                if perturbed:
                    perturbation.restore()
                step_base(base, applied, self._base_step)
                forget_old_weights()
        finally:
            if not perturbation.active:
                step.active = step.first_pass_done = step.perturbs = False
        step.path = "fused" if reason is None else reason
        if scaling is not UNSCALED:
            report_overflow(self, scaling)
        if self._schedule is not None or rounds or STEP in base.param_groups[0]:
            self._count_step(perturbed)

    def _count_step(self, perturbed: bool) -> None:
        number = count_step(self.base_optimizer.param_groups)
        if self._schedule_watch is not None:
            mark_used(self._gradients())  # they must not look like a first pass of the next step
            self._schedule_watch.count(number, perturbed)
            self._schedule_watch.look_for_capture(number, {bucket.device for bucket in self._perturbation.buckets})

    def restore(self) -> None:
        """Give up the current step, if one is under way: put w back, bit for bit, without a step."""
        self._step.forget_first_pass()
        under_way = self._step.active or self._perturbation.active
        try:
            if self._perturbation.active:
                self._perturbation.restore()
            if under_way:
                self._perturbation.storage.give_up_pass()
        finally:
            if not self._perturbation.active:
                self._step.end()
        settle_running_stats(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients.

        With ``flatten=True`` they are zeroed by one memset and never None, whatever ``set_to_none`` says.
        """
        if self._perturbation.flatten:
            self._perturbation.zero_grad(self.param_groups)
        else:
            reset_gradients(self.base_optimizer, set_to_none)
        if self._perturbation.flatten or not set_to_none:
            mark_used(self._gradients())
        self._step.zeroed = True
