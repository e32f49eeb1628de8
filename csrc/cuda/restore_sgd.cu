// restore_sgd: put w back and step as torch.optim.SGD does, in one pass over memory.
#include "update.h"

namespace sam::cuda {
namespace {

using SgdEntry = Entry<SgdGroup>;
using SgdTables = Tables<Rows<SgdEntry, 3, 76, 8>, Rows<SgdEntry, 3, 256, 16>, Rows<SgdEntry, 3, 700, 40>>;

template <class T>
struct SgdStep {
  using Compute = typename T::Compute;
  static constexpr int kNumStates = 1;  // momentum_buffer
  static constexpr int kUnitsPerBatch = 2;

  Compute minus_lr, momentum, keep, decay, scale;
  bool has_momentum, nesterov, decays, saved;

  static __device__ __forceinline__ SgdStep of(const SgdEntry& entry, const Update& update) {
    const SgdGroup& o = entry.options;
    return {static_cast<Compute>(-learning_rate_of(entry)),
            static_cast<Compute>(o.momentum),
            static_cast<Compute>(1.0 - o.dampening),
            static_cast<Compute>(o.weight_decay),
            static_cast<Compute>(gradient_factor(update.grad_scale, o.maximize != 0.0)),
            o.momentum != 0.0,
            o.nesterov != 0.0,
            o.weight_decay != 0.0,
            entry.saved != 0};
  }

  template <class Table>
  static __device__ __forceinline__ void look_up(const Table&, const Tile<Table::kAddresses>&, SgdStep&) {}

  __device__ __forceinline__ bool has(int) const { return has_momentum; }

  __device__ __forceinline__ Compute apply(Compute w, Compute g, Compute (&states)[kNumStates]) const {
    Compute direction = g * scale;
    if (decays) direction = decayed_gradient<MultiplyAdd>(w, direction, decay);
    if (has_momentum) {
      states[0] = sgd_momentum<MultiplyAdd>(states[0], direction, momentum, keep);
      direction = nesterov ? sgd_nesterov<MultiplyAdd>(direction, states[0], momentum) : states[0];
    }
    return sgd_step<MultiplyAdd>(w, direction, minus_lr);
  }
};

template <class T, class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) restore_sgd_kernel(const __grid_constant__ Table rows, Update update) {
  update_rows<T, SgdStep<T>>(rows, update);
}

}  // namespace

int64_t restore_sgd(const RestoreSgdArgs& a) {
  const auto entries = entries_of<SgdGroup>(
      a.update, [](int64_t) { return 0.0f; }, [&](int64_t group, float) { return a.groups[group]; });
  return launch_updates<SgdTables>(
      "restore_sgd", a.update, entries, {a.update.weights, a.update.grads, a.momentum_buffers},
      [](auto format, const auto& table) { return restore_sgd_kernel<decltype(format), std::decay_t<decltype(table)>>; }, [](int64_t) {});
}

}  // namespace sam::cuda
