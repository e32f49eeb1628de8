// What the fused second steps have in common: which rows they touch, and the walk over their tiles.
#pragma once

#include <cmath>
#include <map>
#include <tuple>
#include <vector>

#include "../step_math.h"
#include "format.h"
#include "plan.h"

namespace sam::cuda {

// a * b + c, rounded once, as on processors that have such an instruction.
struct MultiplyAdd {
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
};

// What a kernel knows of rows that are stepped alike: the options of their group, and whether the weights come from the backup.
template <class GroupOptions>
struct Entry {
  using Options = GroupOptions;
  Options options;
  LearningRate learning_rate;
  int64_t saved;
};

// What a kernel takes beside its rows.
struct Update {
  const char* flat;
  const float* grad_scale;
  const float* found_inf;
  uint32_t rounding_key;
};

template <class Options>
__device__ __forceinline__ double learning_rate_of(const Entry<Options>& entry) {
  const LearningRate& on_device = entry.learning_rate;
  if (on_device.address == 0) return entry.options.lr;
  if (on_device.dtype == static_cast<int64_t>(DType::f64)) return load<false>(reinterpret_cast<const double*>(on_device.address));
  return static_cast<double>(load<false>(reinterpret_cast<const float*>(on_device.address)));
}

// What gradients are multiplied by: the reciprocal of their scale, rounded as sam_fast.amp.inverse_scale rounds it.
__device__ __forceinline__ float gradient_factor(const float* grad_scale, bool maximize) {
  const float factor = grad_scale == nullptr ? 1.0f : static_cast<float>(1.0 / static_cast<double>(*grad_scale));
  return maximize ? -factor : factor;
}

// The elements from `begin` to `end` of a tile, whole units. step.apply(w, g, states) gives an element's new weight, from its weight and gradient,
// and updates the base optimizer's state. step.has(s): whether there is such a state. Step::kUnitsPerBatch: of every stream, as many as leave
// registers. Without `moves` weights are only put back.
template <class T, class U, class Step, int Addresses>
__device__ __forceinline__ void update_units(const Tile<Addresses>& tile, int begin, int end, const typename T::Bits* from, const Step& step,
                                             bool moves, const Dice& dice) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  constexpr int kStride = kThreads * U::kSize;
  constexpr int K = Step::kNumStates;
  constexpr int kBatch = Step::kUnitsPerBatch;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]);
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kGrads]);
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * U::kSize; first < end; first += kBatch * kStride) {
    U weights[kBatch], grads[kBatch], states[K][kBatch] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * kStride;
      if (i >= end) continue;
      grads[k] = load_unit<true, U>(g + i);
      weights[k] = load_unit<true, U>(from + i);
#pragma unroll
      for (int s = 0; s < K; ++s)
        if (step.has(s)) states[s][k] = load_unit<true, U>(reinterpret_cast<const Bits*>(tile.address[kStates + s]) + i);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * kStride;
      if (i >= end) continue;
      if (moves) {
#pragma unroll
        for (int j = 0; j < U::kSize; ++j) {
          Compute state[K];
#pragma unroll
          for (int s = 0; s < K; ++s) state[s] = T::widen(states[s][k].element[j]);
          const Compute moved = step.apply(T::widen(weights[k].element[j]), T::widen(grads[k].element[j]), state);
          weights[k].element[j] = narrow_weight<T>(moved, dice, i + j);
#pragma unroll
          for (int s = 0; s < K; ++s) states[s][k].element[j] = T::narrow(state[s]);
        }
#pragma unroll
        for (int s = 0; s < K; ++s)
          if (step.has(s)) store_unit<true>(reinterpret_cast<Bits*>(tile.address[kStates + s]) + i, states[s][k]);
      }
      store_unit<false>(w + i, weights[k]);
    }
  }
}

// A kernel's work. A Step is made once per block and entry. Step::look_up() completes it for another row; all threads call it.
template <class T, class Step, class Table>
__device__ __forceinline__ void update_rows(const Table& rows, const Update& update) {
  using Bits = typename T::Bits;
  __shared__ Step steps[Table::kMaxGroups];
  for (int i = static_cast<int>(threadIdx.x); i < rows.num_groups; i += kThreads) steps[i] = Step::of(rows.groups[i], update);
  __syncthreads();

  const bool moves = update.found_inf == nullptr || *update.found_inf == 0.0f;
  int last_row = -1;
  const uint32_t tiles = rows.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = rows.tile(index, sizeof(Bits));
    if (tile.row != last_row) Step::look_up(rows, tile, steps[tile.group]);
    last_row = tile.row;
    const Step& step = steps[tile.group];
    const Bits* from = reinterpret_cast<const Bits*>(step.saved ? reinterpret_cast<uint64_t>(update.flat) + static_cast<uint64_t>(tile.slot)
                                                                : tile.address[kWeights]);
    const Dice dice = dice_of<T>(tile, update.rounding_key);
    uint64_t all = tile.address[kWeights] | tile.address[kGrads];
#pragma unroll
    for (int s = 0; s < Step::kNumStates; ++s)
      if (step.has(s)) all |= tile.address[kStates + s];
    in_widest_units<Bits>(all, static_cast<int>(tile.count), [&](auto unit, int begin, int end) {
      update_units<T, decltype(unit)>(tile, begin, end, from, step, moves, dice);
    });
  }
}

// ---- The host's part --------------------------------------------------------------------------------------------------------------------

inline bool is_updated(const UpdateArgs& a, int64_t row) {
  return a.rows[row].numel > 0 && a.grads[row] != 0;
}

// The bucket's rows, each with the number of its entry in place of its group.
template <class Options>
struct Entries {
  std::vector<Row> rows;
  std::vector<Entry<Options>> entries;
};

// Rows of one group share an entry if all or none are saved and their counters are equal: counter(row), and options(group, counter).
template <class Options, class Counter, class MakeOptions>
Entries<Options> entries_of(const UpdateArgs& a, const Counter& counter, const MakeOptions& options) {
  Entries<Options> found{std::vector<Row>(a.rows, a.rows + a.num_rows), {}};
  using Key = std::tuple<int64_t, bool, float>;
  std::map<Key, int64_t> known;
  Key last{-1, false, 0.0f};
  int64_t entry = 0;
  for (int64_t i = 0; i < a.num_rows; ++i) {
    Row& row = found.rows[static_cast<size_t>(i)];
    const int64_t group = row.group;
    row.group = 0;
    if (!is_updated(a, i)) continue;
    const Key key{group, a.saved[i] != 0, counter(i)};
    if (key != last) {
      const auto [place, is_new] = known.emplace(key, static_cast<int64_t>(found.entries.size()));
      if (is_new) {
        const LearningRate rate = a.learning_rates == nullptr ? LearningRate{} : a.learning_rates[group];
        found.entries.push_back({options(group, counter(i)), rate, a.saved[i] != 0});
      }
      entry = place->second;
      last = key;
    }
    row.group = entry;
  }
  return found;
}

// kernel(format, table) is the kernel for both; updated(row) is called for the rows of every launch after it. Returns how many rows are still saved.
template <class Tables, class Options, class Kernel, class Updated>
int64_t launch_updates(const char* what, const UpdateArgs& a, const Entries<Options>& entries, const RowAddresses<Tables::Small::kAddresses>& addresses,
                       const Kernel& kernel, const Updated& updated) {
  const Update update{static_cast<const char*>(a.flat), a.grad_scale, a.found_inf, a.rounding.key};
  const Bucket<Entry<Options>> bucket{entries.rows.data(), a.num_rows, entries.entries.data()};
  with_format(a.dtype, a.rounding, [&](auto format) {
    for_launches<Tables>(
        bucket, a.place, static_cast<int>(sizeof(typename decltype(format)::Bits)), addresses, false, false,
        [&](int64_t row) { return is_updated(a, row); },
        [&](const auto& table, const std::vector<int64_t>& members) {
          const auto chosen = kernel(format, table);
          launch(what, chosen, blocks_for(chosen, table.num_tiles()), kThreads, a.place.stream, table, update);
          for (const int64_t row : members) {
            a.saved[row] = 0;
            updated(row);
          }
        });
  });
  return a.num_rows - std::count(a.saved, a.saved + a.num_rows, uint64_t{0});
}

}  // namespace sam::cuda
