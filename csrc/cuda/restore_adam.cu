// restore_adam: put w back and step as torch.optim.Adam or AdamW does, in one pass over memory.
#include "update.h"

namespace sam::cuda {
namespace {

// The bias corrections: 1 - beta1^t, and the root of 1 - beta2^t.
struct Corrections {
  double first;
  double root_of_second;
};

SAM_HD Corrections corrections_at(float step, const AdamGroup& group) {
  const double t = static_cast<double>(step);
  return {1.0 - pow(group.beta1, t), sqrt(1.0 - pow(group.beta2, t))};
}

// Corrected on the host where the step counters are there; else `corrections` is not used.
struct AdamOptions : AdamGroup {
  Corrections corrections;
};

using AdamEntry = Entry<AdamOptions>;
constexpr int kNumAddresses = kStates + 4;  // exp_avg, exp_avg_sq, max_exp_avg_sq, and the step counter if it is on the device
constexpr int kCounter = kStates + 3;
using AdamTables =
    Tables<Rows<AdamEntry, kNumAddresses, 48, 7>, Rows<AdamEntry, kNumAddresses, 256, 16>, Rows<AdamEntry, kNumAddresses, 448, 28>>;

template <class T>
struct AdamStep {
  using Compute = typename T::Compute;
  static constexpr int kNumStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr int kUnitsPerBatch = 1;

  Compute coefficient, beta2, keep2, eps, decay, scale, minus_step_size, root_correction;
  bool from_m, decays, decoupled, amsgrad, saved;
  float counter;  // the one on the device that the corrections are for; negative: none yet

  static __device__ __forceinline__ AdamStep of(const AdamEntry& entry, const Update& update) {
    const AdamOptions& o = entry.options;
    const double lr = learning_rate_of(entry);
    const Compute keep1 = static_cast<Compute>(1.0 - o.beta1);
    const bool from_m = keep1 < static_cast<Compute>(0.5);
    return {from_m ? keep1 : keep1 - static_cast<Compute>(1.0),
            static_cast<Compute>(o.beta2),
            static_cast<Compute>(1.0 - o.beta2),
            static_cast<Compute>(o.eps),
            static_cast<Compute>(o.decoupled != 0.0 ? 1.0 - lr * o.weight_decay : o.weight_decay),
            static_cast<Compute>(gradient_factor(update.grad_scale, o.maximize != 0.0)),
            static_cast<Compute>(-lr / o.corrections.first),
            static_cast<Compute>(o.corrections.root_of_second),
            from_m,
            o.weight_decay != 0.0,
            o.decoupled != 0.0,
            o.amsgrad != 0.0,
            entry.saved != 0,
            -1.0f};
  }

  // Reads the row's counter if it is on the device. One thread computes the corrections, and only if the entry's row before had another counter.
  template <class Table>
  static __device__ __forceinline__ void look_up(const Table& rows, const Tile<Table::kAddresses>& tile, AdamStep& step) {
    const uint64_t address = rows.address[kCounter][tile.row];
    if (address == 0) return;
    const float counter = load<false>(reinterpret_cast<const float*>(address));
    if (counter == step.counter) return;
    __syncthreads();  // all threads have compared, and are done with the tile before
    if (threadIdx.x == 0) {
      const AdamEntry& entry = rows.groups[tile.group];
      const Corrections c = corrections_at(counter + 1.0f, entry.options);
      step.minus_step_size = static_cast<Compute>(-learning_rate_of(entry) / c.first);
      step.root_correction = static_cast<Compute>(c.root_of_second);
      step.counter = counter;
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool has(int state) const { return state < 2 || amsgrad; }

  __device__ __forceinline__ Compute apply(Compute w, Compute g, Compute (&states)[kNumStates]) const {
    Compute grad = g * scale;
    if (decays && !decoupled) grad = decayed_gradient<MultiplyAdd>(w, grad, decay);
    if (decays && decoupled) w = decayed_weight(w, decay);
    const Compute m = states[0] = adam_first_moment<MultiplyAdd>(states[0], grad, coefficient, from_m);
    Compute v = states[1] = adam_second_moment<MultiplyAdd>(states[1], grad, beta2, keep2);
    if (amsgrad) {
      const Compute before = states[2];
      v = states[2] = before > v || before != before ? before : v;  // as torch.maximum: NaN stays
    }
    return adam_step(w, m, sqrt(v), minus_step_size, root_correction, eps);
  }
};

template <class T, class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) restore_adam_kernel(const __grid_constant__ Table rows, Update update) {
  update_rows<T, AdamStep<T>>(rows, update);
}

}  // namespace

int64_t restore_adam(const RestoreAdamArgs& a) {
  const auto host_counter = [&](int64_t row) { return reinterpret_cast<float*>(a.steps[row]); };
  const auto entries = entries_of<AdamOptions>(
      a.update, [&](int64_t row) { return a.device_steps ? 0.0f : *host_counter(row) + 1.0f; },
      [&](int64_t group, float step) {
        return AdamOptions{a.groups[group], a.device_steps ? Corrections{1.0, 1.0} : corrections_at(step, a.groups[group])};
      });
  const uint64_t* device_counters = a.device_steps ? a.steps : nullptr;
  return launch_updates<AdamTables>(
      "restore_adam", a.update, entries, {a.update.weights, a.update.grads, a.exp_avgs, a.exp_avg_sqs, a.max_exp_avg_sqs, device_counters},
      [](auto format, const auto& table) { return restore_adam_kernel<decltype(format), std::decay_t<decltype(table)>>; },
      [&](int64_t row) {
        if (!a.device_steps) *host_counter(row) += 1.0f;
      });
}

}  // namespace sam::cuda
