// A step's kernel: which tensors it touches, and the walk over their tiles.
#pragma once

#include <cmath>

#include "../steps.h"
#include "arguments.h"
#include "format.h"

namespace sam::cuda {

// The operations of steps.h on the device.
struct DeviceMath {
  static SAM_HD float madd(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  static SAM_HD double madd(double a, double b, double c) {
#ifdef __CUDA_ARCH__
    return __fma_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  template <class C>
  static SAM_HD C root(C x) {
    return sqrt(x);
  }
};

// What a kernel knows of tensors that are stepped alike: the options of their group, what follows from their counter
// where that is on the host, and whether the weights come from the backup.
template <class Step>
struct Entry : Step::Options, Step::Counted {
  LearningRate learning_rate;
  int64_t saved;
};

// A tensor's addresses are those of its weight, gradient, states, and its counter if that is on the device.
template <class Step>
constexpr int kStepAddresses = kStates + Step::kNumStates + (Step::kCounts ? 1 : 0);
template <class Step>
constexpr int kCounter = kStates + Step::kNumStates;

template <class Step>
using StepSizes = Sizes<Entry<Step>, kStepAddresses<Step>, 730, 2912>;

// What a kernel takes beside its tensors.
struct Update {
  const char* backup;
  const float* grad_scale;
  const float* found_inf;
  uint32_t rounding_key;
};

template <class Step>
__device__ __forceinline__ double learning_rate_of(const Entry<Step>& entry) {
  const LearningRate& on_device = entry.learning_rate;
  if (on_device.address == 0) return entry.lr;
  if (on_device.dtype == static_cast<int64_t>(DType::f64)) {
    return load<false>(reinterpret_cast<const double*>(on_device.address));
  }
  return static_cast<double>(load<false>(reinterpret_cast<const float*>(on_device.address)));
}

// What gradients are multiplied by: the reciprocal of their scale, rounded as sam_fast.amp.inverse_scale rounds it.
__device__ __forceinline__ float gradient_factor(const float* grad_scale, bool maximize) {
  const float factor = grad_scale == nullptr ? 1.0f : static_cast<float>(1.0 / static_cast<double>(*grad_scale));
  return maximize ? -factor : factor;
}

// What is computed once per block and entry.
template <class Step, class Compute>
struct Prepared {
  typename Step::template Numbers<Compute> numbers;
  Compute scale;
  int flags;
  bool saved;
  float counter;  // the one on the device that the numbers are for; negative: none yet
};

template <class Step, class Compute>
__device__ __forceinline__ Prepared<Step, Compute> prepared(const Entry<Step>& entry, const Update& update) {
  return {Step::template numbers<Compute>(entry, learning_rate_of(entry), entry),
          static_cast<Compute>(gradient_factor(update.grad_scale, entry.maximize != 0.0)), Step::flags(entry),
          entry.saved != 0, -1.0f};
}

// Reads the tensor's counter if it is on the device; all threads call it. One thread computes the numbers, and only if
// the entry's tensor before had another counter.
template <class Step, class Compute, class Arguments>
__device__ __forceinline__ void look_up(const Arguments& arguments, const Tile<Arguments::kAddresses>& tile,
                                        Prepared<Step, Compute>& step) {
  if constexpr (Step::kCounts) {
    const uint64_t address = arguments.address[kCounter<Step>][tile.tensor];
    if (address == 0) return;
    const float counter = load<false>(reinterpret_cast<const float*>(address));
    if (counter == step.counter) return;
    __syncthreads();  // all threads have compared, and are done with the tile before
    if (threadIdx.x == 0) {
      const Entry<Step>& entry = arguments.groups[tile.group];
      const auto counted = Step::counted(entry, static_cast<double>(counter + 1.0f));
      step.numbers = Step::template numbers<Compute>(entry, learning_rate_of(entry), counted);
      step.counter = counter;
    }
    __syncthreads();
  }
}

// Units of every stream that are under way at once: as many as leave registers.
template <class Step>
constexpr int kUnitsPerStep = Step::kNumStates > 1 ? 1 : 2;

// The elements from `begin` to `end` of a tile, whole units. Without `moves` weights are only put back.
template <class Step, class T, class U, int Addresses>
__device__ __forceinline__ void step_units(const Tile<Addresses>& tile, int begin, int end,
                                           const typename T::Bits* from,
                                           const Prepared<Step, typename T::Compute>& step, bool moves,
                                           const RoundingBits& random) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  constexpr int kStride = kThreads * U::kSize;
  constexpr int K = Step::kNumStates;
  constexpr int kBatch = kUnitsPerStep<Step>;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]);
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kAlong]);
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * U::kSize; first < end; first += kBatch * kStride) {
    U weights[kBatch], grads[kBatch], states[K + 1][kBatch] = {};  // one more: there may be none
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * kStride;
      if (i >= end) continue;
      grads[k] = load_unit<true, U>(g + i);
      weights[k] = load_unit<true, U>(from + i);
#pragma unroll
      for (int s = 0; s < K; ++s)
        if (Step::uses(s, step.flags))
          states[s][k] = load_unit<true, U>(reinterpret_cast<const Bits*>(tile.address[kStates + s]) + i);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * kStride;
      if (i >= end) continue;
      if (moves) {
#pragma unroll
        for (int j = 0; j < U::kSize; ++j) {
          Compute state[K + 1];
#pragma unroll
          for (int s = 0; s < K; ++s) state[s] = T::widen(states[s][k].element[j]);
          const Compute grad = T::widen(grads[k].element[j]) * step.scale;
          const Compute weight = T::widen(weights[k].element[j]);
          const Compute moved = Step::template apply<DeviceMath>(weight, grad, state, step.numbers, step.flags);
          weights[k].element[j] = narrow_weight<T>(moved, random, i + j);
#pragma unroll
          for (int s = 0; s < K; ++s) states[s][k].element[j] = T::narrow(state[s]);
        }
#pragma unroll
        for (int s = 0; s < K; ++s)
          if (Step::uses(s, step.flags))
            store_unit<true>(reinterpret_cast<Bits*>(tile.address[kStates + s]) + i, states[s][k]);
      }
      store_unit<false>(w + i, weights[k]);
    }
  }
}

template <class Step, class T, class Arguments>
__device__ __forceinline__ void step_tensors(const Arguments& arguments, const Update& update) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  __shared__ Prepared<Step, Compute> steps[Arguments::kMaxGroups];
  for (int i = static_cast<int>(threadIdx.x); i < arguments.num_groups; i += kThreads)
    steps[i] = prepared<Step, Compute>(arguments.groups[i], update);
  __syncthreads();

  const bool moves = update.found_inf == nullptr || *update.found_inf == 0.0f;
  int last_tensor = -1;
  const uint32_t tiles = arguments.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = arguments.tile(index, sizeof(Bits));
    if (tile.tensor != last_tensor) look_up(arguments, tile, steps[tile.group]);
    last_tensor = tile.tensor;
    const Prepared<Step, Compute>& step = steps[tile.group];
    const uint64_t saved = reinterpret_cast<uint64_t>(update.backup) + static_cast<uint64_t>(tile.slot);
    const Bits* from = reinterpret_cast<const Bits*>(step.saved ? saved : tile.address[kWeights]);
    const RoundingBits random = rounding_bits_of<T>(tile, update.rounding_key);
    uint64_t all = tile.address[kWeights] | tile.address[kAlong];
#pragma unroll
    for (int s = 0; s < Step::kNumStates; ++s)
      if (Step::uses(s, step.flags)) all |= tile.address[kStates + s];
    in_widest_units<Bits>(all, static_cast<int>(tile.count), [&](auto unit, int begin, int end) {
      step_units<Step, T, decltype(unit)>(tile, begin, end, from, step, moves, random);
    });
  }
}

}  // namespace sam::cuda
