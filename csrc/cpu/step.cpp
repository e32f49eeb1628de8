// step: put w back and step as the base optimizer does, in one pass over memory. Compiled once for each of SAM_STEPS,
// which is SAM_STEP then.
#include "step.h"

#include <vector>

#include "parallel.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

// The numbers of every tensor that takes part. Most tensors share them, having the same group and counter.
template <class Step, class Compute>
class Plan {
 public:
  // Counts the step.
  Plan(const Bucket& b, const typename Step::Options* options, double grad_scale) {
    int64_t last_group = -1;
    float last_count = 0.0f;
    for (int64_t i = 0; i < b.num_tensors; ++i) {
      if (b.along[i] == 0) continue;
      const int64_t group = b.tensors[i].group;
      float count = 0.0f;
      if constexpr (Step::kCounts) count = *reinterpret_cast<float*>(b.counters[i]) += 1.0f;
      if (group != last_group || count != last_count) {
        const typename Step::Options& o = options[group];
        const auto counted = Step::counted(o, static_cast<double>(count));
        prepared_.push_back({Step::template numbers<Compute>(o, o.lr, counted),
                             static_cast<Compute>(o.maximize != 0.0 ? -grad_scale : grad_scale), Step::flags(o)});
        last_group = group;
        last_count = count;
        if (prepared_.size() == 2) index_.resize(static_cast<size_t>(b.num_tensors));
      }
      if (!index_.empty()) index_[static_cast<size_t>(i)] = prepared_.size() - 1;
    }
  }

  const Prepared<Step, Compute>& of(int64_t tensor) const {
    return prepared_[index_.empty() ? 0 : index_[static_cast<size_t>(tensor)]];
  }

 private:
  std::vector<size_t> index_;  // each tensor's; empty while all have the first
  std::vector<Prepared<Step, Compute>> prepared_;
};

template <class Step, class T>
void step_of(const Bucket& b, const typename Step::Options* options, double grad_scale, Rounding rounding,
             int threads) {
  using Bits = typename Lanes<T>::Bits;
  const Plan<Step, typename Lanes<T>::Compute> plan(b, options, grad_scale);
  const bool large = num_elements(b) * static_cast<int64_t>(sizeof(Bits)) >= kStreamBytes;
  parallel_chunks(b, threads, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& c = b.chunks[i];
      if (b.along[c.tensor] == 0) continue;
      const auto at = [&c](uint64_t tensor) { return reinterpret_cast<Bits*>(tensor) + c.begin; };
      Bits* to = at(b.weights[c.tensor]);
      const Bits* from = b.saved[c.tensor] != 0 ? static_cast<const Bits*>(b.backup) + c.slot : to;
      Elements<T, Step::kNumStates> elements{from, to, at(b.along[c.tensor]), {}};
      for (int s = 0; s < Step::kNumStates; ++s) elements.states[s] = at(b.states[s][c.tensor]);
      const bool past_caches = large && from != to && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
      const RoundingBits random{rounding.key, static_cast<uint32_t>(c.slot)};
      step_chunk<Step, T>(elements, c.count, b.tensors[c.tensor].numel - c.begin, plan.of(c.tensor), past_caches,
                          rounding.stochastic ? &random : nullptr);
    }
    if (large) stream_fence();
  });
}

}  // namespace

template <class Step>
int64_t step(const Bucket& b, const void* options, double grad_scale, Rounding rounding, int threads) {
  with_dtype(b.dtype, [&](auto format) {
    step_of<Step, decltype(format)>(b, static_cast<const typename Step::Options*>(options), grad_scale, rounding,
                                    threads);
  });
  int64_t left = 0;
  for (int64_t i = 0; i < b.num_tensors; ++i) {
    if (b.along[i] != 0) b.saved[i] = 0;
    left += b.saved[i] != 0;
  }
  return left;
}

template int64_t step<SAM_STEP>(const Bucket&, const void*, double, Rounding, int);

}  // namespace SAM_ISA
}  // namespace sam
