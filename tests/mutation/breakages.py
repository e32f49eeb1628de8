"""What ``run.py`` breaks: a text of a source, what it is replaced with, and the smallest set of tests that must
notice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Breakage:
    name: str
    file: str
    original: str
    broken: str
    tests: tuple[str, ...]


BREAKAGES = [
    # ---- C++ kernels
    Breakage(
        "wrong sign of e",
        "csrc/sam_math.h",
        "return w + g * scale;",
        "return w - g * scale;",
        ("kernels/test_perturb.py::test_one_tensor",),
    ),
    Breakage(
        "ASAM with T instead of T squared",
        "csrc/sam_math.h",
        "return w + ((t * g) * scale) * t;",
        "return w + (t * g) * scale;",
        ("kernels/test_perturb.py::test_adaptive",),
    ),
    Breakage(
        "an infinite norm perturbs",
        "csrc/sam_math.h",
        "return norm - norm == 0.0;",
        "return norm == norm;",
        ("kernels/test_perturb.py::test_non_finite_norm_moves_nothing_and_restores",),
    ),
    Breakage(
        "zero gradient divides zero by zero",
        "csrc/sam_math.h",
        "const double scale = norm + eps > 0.0 ? rho / (norm + eps) : 0.0;",
        "const double scale = rho / (norm + eps);",
        ("test_perturbation.py::test_zero_gradient_moves_nothing",),
    ),
    Breakage(
        "the tail of a chunk is not moved",
        "csrc/cpu/perturb.cpp",
        "    if (i < n) vector<Adaptive, false, Stochastic>(",
        "    if (i > n) vector<Adaptive, false, Stochastic>(",
        ("kernels/test_perturb.py::test_one_tensor",),
    ),
    Breakage(
        "the tail of a chunk is not backed up",
        "csrc/cpu/perturb.cpp",
        "    else part.store(backup, bits);\n",
        "    else if constexpr (std::is_same_v<Part, Whole>) part.store(backup, bits);\n",
        ("kernels/test_perturb.py::test_backup_holds_the_weights_in_their_slots",),
    ),
    Breakage(
        "the tail of a chunk is not in the norm",
        "csrc/cpu/grad_norm.cpp",
        "  if (i < n) add(i, [rest",
        "  if (i > n) add(i, [rest",
        ("kernels/test_grad_norm.py::test_one_tensor",),
    ),
    Breakage(
        "a tensor without a gradient keeps an old partial sum",
        "csrc/cpu/grad_norm.cpp",
        "        partials[i] = 0.0;\n",
        "",
        ("kernels/test_grad_norm.py::test_tensor_without_gradient_is_not_counted",),
    ),
    Breakage(
        "the last chunk of all is not restored",
        "csrc/cpu/parallel.h",
        "  work(Range{0, b.num_chunks});",
        "  work(Range{0, b.num_chunks - 1});",
        ("kernels/test_copy.py::test_round_trip",),
    ),
    Breakage(
        "a tensor that was never saved is restored",
        "csrc/cpu/copy.cpp",
        "if (b.weights[c.tensor] == 0 || (!ToBackup && b.saved[c.tensor] == 0)) continue;",
        "if (b.weights[c.tensor] == 0) continue;",
        (
            "kernels/test_perturb.py::test_tensors_without_gradient_are_neither_moved_nor_saved",
            "test_perturbation.py::test_gradient_that_appears_between_the_passes",
        ),
    ),
    Breakage(
        "momentum without dampening",
        "csrc/steps.h",
        "C(1.0 - o.dampening)",
        "C(1.0)",
        ("kernels/test_step.py::test_against_float64",),
    ),
    Breakage(
        "AdamW decays through the gradient",
        "csrc/steps.h",
        "(o.decoupled == 0.0 && o.weight_decay != 0.0 ? kCoupled : 0)",
        "(o.decoupled != 0.0 && o.weight_decay != 0.0 ? kCoupled : 0)",
        ("kernels/test_step.py::test_against_float64",),
    ),
    Breakage(
        "Adam's step is not counted",
        "csrc/cpu/step.cpp",
        "count = *reinterpret_cast<float*>(b.counters[i]) += 1.0f;",
        "count = *reinterpret_cast<float*>(b.counters[i]) + 1.0f;",
        ("kernels/test_step.py::test_against_float64",),
    ),
    Breakage(
        "the fused step starts from w + e",
        "csrc/cpu/step.cpp",
        "b.saved[c.tensor] != 0 ? static_cast<const Bits*>(b.backup) + c.slot : to;",
        "to;",
        ("test_fused_step.py::test_a_hundred_steps_are_those_of_the_base_optimizer",),
    ),
    Breakage(
        "address 0 of a freed storage",
        "csrc/gather.cpp",
        "  if (t.data == nullptr) return false;",
        "  if (t.data == nullptr) return true;",
        ("test_faults.py::TestStorageResizedToNothing",),
    ),
    Breakage(
        "a changed dtype is not noticed",
        "csrc/gather.cpp",
        "bool same = std::memcmp(&t.kind, &record.kind, sizeof(DlKind)) == 0;",
        "bool same = true;",
        ("test_columns.py",),
    ),
    Breakage(
        "changed strides are not noticed",
        "csrc/gather.cpp",
        "same = t.shape[d] == record.shape[d] && (t.strides[d] == record.strides[d] || t.shape[d] == 1 || "
        "record.empty);",
        "same = t.shape[d] == record.shape[d];",
        ("test_columns.py",),
    ),
    # ---- Optimizer
    Breakage(
        "the norm without one group",
        "csrc/gather.cpp",
        "    if (!wanted(groups_[i])) of_grads",
        "    if (!wanted(groups_[i]) || groups_[i] == 0) of_grads",
        ("test_perturbation.py::test_the_norm_is_one_number_over_all_groups",),
    ),
    Breakage(
        "norms of several buckets are not added",
        "sam_fast/perturbation.py",
        "                    bucket.perturb(options, home.partials,",
        "                    bucket.perturb(options, next(own for of, own, _ in self.norm.parts if of is bucket),",
        ("test_bucket.py::test_mixed_dtypes_and_layouts_share_one_norm",),
    ),
    Breakage(
        "restore is skipped for a gradient that vanished",
        "sam_fast/backends/native.py",
        "        if left:  # tensors whose gradient vanished between the passes\n",
        "        if False:\n",
        (
            "test_perturbation.py::test_gradient_that_vanishes_between_the_passes",
            "test_fused_step.py::test_a_gradient_that_vanishes_or_appears_between_the_passes",
        ),
    ),
    Breakage(
        "maximize does not flip the sign",
        "sam_fast/backends/bucket.py",
        '(-rho if group.get("maximize", False) else rho, ',
        "(rho, ",
        ("test_perturbation.py::test_maximize_descends",),
    ),
    Breakage(
        "weights stay perturbed when the second pass raises",
        "sam_fast/passes.py",
        "        except BaseException:\n            self.restore()\n            raise",
        "        except BaseException:\n            raise",
        ("test_interruptions.py::test_weights_come_back_when_the_second_pass_raises",),
    ),
    Breakage(
        "weights stay perturbed when Ctrl-C is pressed",
        "sam_fast/perturbation.py",
        "            self._mark_written(self._saved_params())\n        except BaseException:\n",
        "            self._mark_written(self._saved_params())\n        except Exception:\n",
        ("test_interruptions.py::test_a_first_step_that_fails_half_way_leaves_no_trace",),
    ),
    Breakage(
        "version counters stand still",
        "sam_fast/perturbation.py",
        "        increment_version(self.storage.written(params) if self.storage.process_wide else params)\n",
        "",
        ("test_perturbation.py::test_a_stale_graph_is_an_error",),
    ),
    Breakage(
        "autocast keeps old casts",
        "sam_fast/perturbation.py",
        "    torch.clear_autocast_cache()\n",
        "",
        ("test_amp.py::test_both_passes_in_one_autocast_region_see_their_own_weights",),
    ),
    Breakage(
        "momentum is lost on load",
        "sam_fast/wrapper.py",
        "        self.base_optimizer.load_state_dict(state_dict)\n",
        '        self.base_optimizer.load_state_dict({**state_dict, "state": {}})\n',
        ("test_state_dict.py::test_a_run_resumed_from_a_file_goes_on_with_the_same_bits",),
    ),
    Breakage(
        "loading leaves SAM's options out",
        "sam_fast/wrapper.py",
        "        self._fill_in_options(self.param_groups)\n        for post_hook",
        "        for post_hook",
        ("test_protocol.py",),
    ),
    Breakage(
        "a refused group stays",
        "sam_fast/wrapper.py",
        "            self.param_groups.pop()  # a group that SAM refuses must not stay in the base optimizer\n",
        "",
        ("test_options.py",),
    ),
    Breakage(
        "hooks of load_state_dict in no order",
        "sam_fast/wrapper.py",
        "        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():",
        "        for pre_hook in reversed(self._optimizer_load_state_dict_pre_hooks.values()):",
        ("test_hooks.py::test_hooks_run_in_torchs_order",),
    ),
    Breakage(
        "gradients of a step that was given up count as new",
        "sam_fast/closures.py",
        "        mark_used(optimizer._gradients())  # they belong to a step that was given up\n",
        "",
        ("test_sam.py::test_gradients_of_a_closure_that_raised_are_no_first_pass_of_the_next_batch",),
    ),
    Breakage(
        "an overflow of the first pass is not told to the scaler",
        "sam_fast/amp.py",
        "        overflow |= ~norm.isfinite().to(overflow.device)\n",
        "        pass\n",
        ("test_amp.py::test_after_an_overflow_everything_is_as_it_was_but_the_scale",),
    ),
    Breakage(
        "BatchNorm's counter is not restored",
        "sam_fast/running_stats.py",
        'return name.startswith(("running_", "moving_")) or name == COUNTER',
        'return name.startswith(("running_", "moving_"))',
        ("test_batchnorm.py",),
    ),
    Breakage(
        "BatchNorm's statistics stay when the body raises",
        "sam_fast/batchnorm.py",
        "    try:\n        yield\n    finally:\n        snapshot.restore()\n",
        "    yield\n    if True:\n        snapshot.restore()\n",
        ("test_batchnorm_switches.py::test_frozen_ends_however_the_body_ends",),
    ),
    Breakage(
        "disabled statistics are not put back when a step ends",
        "sam_fast/sam.py",
        "        settle_running_stats(base.param_groups, counts=not step.first_pass_done)\n",
        "",
        ("test_batchnorm_reference_loop.py::test_the_model_holds_the_first_passes_when_a_step_has_ended",),
    ),
    Breakage(
        "what was loaded is overwritten by the next step",
        "sam_fast/batchnorm.py",
        "            group.snapshot.save()\n            group.settled = False\n",
        "            group.settled = False\n",
        ("test_batchnorm_changes.py::test_what_somebody_changes_stands_where_enable_is_never_called",),
    ),
    Breakage(
        "a lazy sign is not asked for",
        "csrc/gather.cpp",
        "  if (found != known && is_lazy(local.get(), record)) return false;\n",
        "",
        ("test_memory.py::test_a_gradient_with_a_lazy_sign_counts_as_what_it_is",),
    ),
    Breakage(
        "parameters tied later are not looked for",
        "sam_fast/perturbation.py",
        "        if overlapping(self._tensors) != self._shared:\n            return True\n",
        "",
        ("test_shared_memory.py::test_parameters_that_share_memory",),
    ),
    Breakage(
        "memory of several dtypes is restored in the order in which it was moved",
        "sam_fast/perturbation.py",
        "        for bucket in reversed(self.buckets):",
        "        for bucket in self.buckets:",
        ("test_shared_memory.py::test_parameters_of_different_dtypes_that_share_memory_come_back",),
    ),
    Breakage(
        "frozen parameters have a backup",
        "sam_fast/perturbation.py",
        "    return (p.requires_grad or p.grad is not None) and is_plain",
        "    return is_plain",
        ("test_memory.py::test_frozen_weights_cost_no_memory_until_they_have_a_gradient",),
    ),
    Breakage(
        "gradients of zeros are a first pass",
        "sam_fast/closures.py",
        "    if step.perturbs and float(optimizer.grad_norm) == 0.0:\n",
        "    if step.perturbs and float(optimizer.grad_norm) < 0.0:\n",
        ("test_closures.py::test_gradients_of_zeros_are_no_first_pass",),
    ),
    Breakage(
        "entries of others count as the base optimizer's",
        "sam_fast/base_step.py",
        "                self._foreign |= entry.keys()\n                aside[p] = dict(entry)\n                "
        "entry.clear()\n",
        "                self._foreign |= entry.keys()\n",
        ("test_wrapper.py::test_entries_of_a_variant_of_sam_in_the_state",),
    ),
    Breakage(
        "the second call of a closure counts",
        "sam_fast/closure_stats.py",
        "        elif second.sees(module):\n            second.save([module])",
        "        elif second.sees(module):\n            pass",
        ("test_closure_stats.py",),
    ),
    Breakage(
        "the second pass draws other masks",
        "sam_fast/random_state.py",
        "        self.apply()\n        try:\n",
        "        try:\n",
        ("test_passes.py",),
    ),
    Breakage(
        "flatten counts a gradient that is gone",
        "sam_fast/storage/flat.py",
        "                    view.zero_()\n",
        "",
        ("test_flat.py",),
    ),
    Breakage(
        "empty parameters count their steps twice",
        "sam_fast/backends/native.py",
        "                if index in counted:\n                    counted[index] += 1\n",
        "                if index in counted:\n                    counted[index] += 2\n",
        ("test_fused_step.py::test_a_parameter_without_elements_counts_its_steps_once",),
    ),
    Breakage(
        "a gradient of another shape is broadcast",
        "sam_fast/backends/bucket.py",
        "    if direction.shape != tensor.shape:\n",
        "    if False:\n",
        ("test_perturbation.py::test_gradient_of_another_shape_is_refused_and_nothing_has_moved",),
    ),
    # ---- Schedules, TrainStep
    Breakage(
        "a single pass does not count in the statistics",
        "sam_fast/sam.py",
        "counts=not step.first_pass_done",
        "counts=False",
        ("test_schedule.py",),
    ),
    Breakage(
        "the second pass of a step without a first is frozen",
        "sam_fast/passes.py",
        "if self._step.first_pass_done else nullcontext()",
        "if True else nullcontext()",
        ("test_schedule.py",),
    ),
    Breakage(
        "a schedule does not count from its start",
        "sam_fast/schedule.py",
        "(step - self.first) % self.every == 0",
        "step % self.every == 0",
        ("test_schedule.py",),
    ),
    Breakage(
        "a distributed checkpoint loses the counter",
        "sam_fast/sam.py",
        "            start_counter(self.param_groups)\n",
        "            pass\n",
        ("test_schedule_edges.py",),
    ),
    Breakage(
        "weights that are not perturbed stay without gradients",
        "sam_fast/step_state.py",
        "            p.requires_grad = True\n",
        "            pass\n",
        ("test_norm_layers.py",),
    ),
    Breakage(
        "what is never perturbed is backed up",
        "sam_fast/perturbation.py",
        "storage.process_groups(member[0]), perturbs)",
        "storage.process_groups(member[0]))",
        ("test_norm_layers.py",),
    ),
    Breakage(
        "clipping forgets the scaler's scale",
        "sam_fast/clipping.py",
        "norm / scale + EPS",
        "norm + EPS",
        ("test_train_step.py",),
    ),
    Breakage(
        "the first pass sees the first rows",
        "sam_fast/train_step.py",
        "t[::every]",
        "t[:every]",
        ("test_train_step.py",),
    ),
]
