"""What ``run.py`` breaks: a text of a source, what it is replaced with, and the smallest set of test files that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Breakage:
    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


PERTURB = ("kernels/test_perturb.py",)
NORM = ("kernels/test_grad_norm.py",)
COPY = ("kernels/test_copy.py",)
STEP = ("kernels/test_restore_step.py",)
WEIGHTS = ("test_weights.py",)
STATE = ("test_state_dict.py", "test_protocol.py")
FAULTS = ("test_faults.py",)

BREAKAGES = [
    # ---- C++ kernels
    Breakage("wrong sign of e", "csrc/sam_math.h", "return w + g * scale;", "return w - g * scale;", PERTURB),
    Breakage("ASAM with T instead of T squared", "csrc/sam_math.h", "return w + (t * t * g) * scale;", "return w + (t * g) * scale;", PERTURB),
    Breakage("a norm that is infinite climbs", "csrc/sam_math.h", "return norm - norm == 0.0;", "return norm == norm;", PERTURB),
    Breakage(
        "zero gradient divides zero by zero",
        "csrc/sam_math.h",
        "return norm + eps > 0.0 ? rho / (norm + eps) : 0.0;",
        "return rho / (norm + eps);",
        (*PERTURB, *WEIGHTS),
    ),
    Breakage("the tail of a chunk is not moved", "csrc/cpu/perturb.cpp", "      std::memcpy(w + i, w_tail, bytes);\n", "", PERTURB),
    Breakage("the tail of a chunk is not backed up", "csrc/cpu/perturb.cpp", "      std::memcpy(flat + i, flat_tail, bytes);\n", "", PERTURB),
    Breakage(
        "the tail of a chunk is not in the norm", "csrc/cpu/grad_norm.cpp", "    accumulate<T, Adaptive>(sums, w_tail, g_tail, eta);\n", "", NORM
    ),
    Breakage("a row without a gradient keeps an old partial sum", "csrc/cpu/grad_norm.cpp", "        a.partials[i] = 0.0;\n", "", NORM),
    Breakage(
        "the last chunk of all is not restored",
        "csrc/cpu/parallel.h",
        "  work(Range{0, chunks.size});",
        "  work(Range{0, chunks.size - 1});",
        (*COPY, *PERTURB),
    ),
    Breakage(
        "a row that was never saved is restored",
        "csrc/cpu/copy.cpp",
        "if (a.rows[c.row] == 0 || (!ToFlat && a.saved[c.row] == 0)) continue;",
        "if (a.rows[c.row] == 0) continue;",
        (*COPY, *WEIGHTS),
    ),
    Breakage("momentum without dampening", "csrc/cpu/restore_sgd.cpp", "keep(L::all(1.0 - group.dampening))", "keep(L::all(1.0))", STEP),
    Breakage(
        "AdamW decays through the gradient",
        "csrc/cpu/restore_adam.cpp",
        "else if (group.decoupled == 0.0) step_chunk<T, Decay::coupled>",
        "else if (group.decoupled != 0.0) step_chunk<T, Decay::coupled>",
        STEP,
    ),
    Breakage("Adam's step is not counted", "csrc/cpu/restore_adam.cpp", "    *step += 1.0f;\n", "", STEP),
    Breakage(
        "the fused step starts from w + e", "csrc/cpu/update.h", "a.saved[c.row] != 0 ? static_cast<const Bits*>(a.flat) + c.slot : to;", "to;", STEP
    ),
    Breakage(
        "address 0 of a freed storage", "csrc/gather.cpp", "  if (t.data == nullptr) return false;", "  if (t.data == nullptr) return true;", FAULTS
    ),
    Breakage("a changed dtype is not noticed", "csrc/gather.cpp", "t.dtype.bits == record.dtype_bits && ", "", ("test_addresses.py", *COPY)),
    Breakage(
        "changed strides are not noticed",
        "csrc/gather.cpp",
        "same = t.shape[d] == record.shape[d] && (t.strides[d] == record.strides[d] || t.shape[d] == 1 || record.empty);",
        "same = t.shape[d] == record.shape[d];",
        ("test_addresses.py", *WEIGHTS),
    ),
    # ---- Optimizer
    Breakage(
        "the norm without one group",
        "sam_fast/backends/addresses.py",
        "                if not options.perturb[group]:\n",
        "                if not options.perturb[group] or group == 0:\n",
        (*NORM, *WEIGHTS),
    ),
    Breakage(
        "norms of several buckets are not added",
        "sam_fast/perturbation.py",
        "bucket.backend.perturb(bucket, options, sums.partials, self.eps, sums.norm)",
        "bucket.backend.perturb(bucket, options, _, self.eps, sums.norm)",
        ("test_bucket.py", *WEIGHTS),
    ),
    Breakage(
        "restore is skipped for a gradient that vanished",
        "sam_fast/backends/cpu.py",
        "        if left:  # rows whose gradient vanished between the passes\n",
        "        if False:\n",
        ("test_fused_step.py", *WEIGHTS),
    ),
    Breakage("maximize climbs", "sam_fast/backends/base.py", '(-rho if group.get("maximize", False) else rho, ', "(rho, ", WEIGHTS),
    Breakage(
        "weights stay perturbed when the second pass raises",
        "sam_fast/sam.py",
        "                    with random_state.replayed():\n                        yield\n        except BaseException:\n            self.restore()",
        "                    with random_state.replayed():\n                        yield\n        except BaseException:",
        WEIGHTS,
    ),
    Breakage(
        "weights stay perturbed when Ctrl-C is pressed",
        "sam_fast/perturbation.py",
        "            self._touched = self._saved_params()\n            _announce(self._touched)\n        except BaseException:\n",
        "            self._touched = self._saved_params()\n            _announce(self._touched)\n        except Exception:\n",
        (*WEIGHTS, *FAULTS),
    ),
    Breakage("version counters stand still", "sam_fast/perturbation.py", "    increment_version(written)\n", "", WEIGHTS),
    Breakage("autocast keeps old casts", "sam_fast/perturbation.py", "    torch.clear_autocast_cache()\n", "", ("test_amp.py",)),
    Breakage(
        "momentum is lost on load",
        "sam_fast/sam.py",
        "        self.base_optimizer.load_state_dict(state_dict)\n",
        '        self.base_optimizer.load_state_dict({**state_dict, "state": {}})\n',
        STATE,
    ),
    Breakage(
        "loading leaves SAM's options out",
        "sam_fast/sam.py",
        "        self._fill_in_options(self.param_groups)\n        for post_hook",
        "        for post_hook",
        STATE,
    ),
    Breakage(
        "a refused group stays",
        "sam_fast/sam.py",
        "            self.param_groups.pop()  # a group that SAM refuses must not stay in the base optimizer\n",
        "",
        ("test_options.py",),
    ),
    Breakage(
        "hooks of load_state_dict in no order",
        "sam_fast/sam.py",
        "        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():",
        "        for pre_hook in reversed(self._optimizer_load_state_dict_pre_hooks.values()):",
        ("test_conformance.py",),
    ),
    Breakage(
        "gradients of a step that was given up count as new",
        "sam_fast/sam.py",
        "                self._mark_spent()  # they belong to a step that was given up\n",
        "",
        ("test_steps.py",),
    ),
    Breakage(
        "an overflow of the first pass is not told to the scaler",
        "sam_fast/amp.py",
        "        overflow |= ~norm.isfinite().to(overflow.device)\n",
        "        pass\n",
        ("test_amp.py",),
    ),
    Breakage(
        "BatchNorm's counter is not restored",
        "sam_fast/batchnorm.py",
        'return name.startswith(("running_", "moving_")) or name == "num_batches_tracked"',
        'return name.startswith(("running_", "moving_"))',
        ("test_batchnorm.py", "test_batchnorm_training.py"),
    ),
    Breakage(
        "BatchNorm's statistics stay when the body raises",
        "sam_fast/batchnorm.py",
        "    try:\n        yield\n    finally:\n        snapshot.restore()\n",
        "    yield\n    if True:\n        snapshot.restore()\n",
        ("test_batchnorm_switches.py",),
    ),
    Breakage(
        "the second pass draws other masks", "sam_fast/passes.py", "        self.apply()\n        try:\n", "        try:\n", ("test_passes.py",)
    ),
    Breakage("flatten counts a gradient that is gone", "sam_fast/flat.py", "                    view.zero_()\n", "", ("test_flatten.py",)),
    Breakage(
        "a stale table of the state after an interruption",
        "sam_fast/backends/addresses.py",
        "            self._gather = make_gather([row if tensor is None else tensor for tensor",
        "            self._tensors = list(tensors)\n            self._gather = make_gather([row if tensor is None else tensor for tensor",
        FAULTS,
    ),
    Breakage("empty parameters count their steps twice", "sam_fast/backends/torch.py", "    steps_empty_rows = True\n", "", ("test_fused_step.py",)),
    Breakage(
        "a gradient of another shape is broadcast", "sam_fast/backends/base.py", "    if grad.shape != param.shape:\n", "    if False:\n", WEIGHTS
    ),
]
