"""What ``run.py`` breaks in the C++ kernels."""

from __future__ import annotations

from breakage import Breakage

OF_KERNELS = [
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
        "what is prefetched from goes on into the next chunk",
        "csrc/cpu/grad_norm.cpp",
        "left - ahead < n ? left - ahead : n",
        "left - ahead",
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
]
