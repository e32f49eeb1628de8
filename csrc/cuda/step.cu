// step: put w back and step as the base optimizer does, in one pass over memory. Compiled once for each of SAM_STEPS,
// which is SAM_STEP then.
#include "step.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace sam::cuda {
namespace {

template <class Step, class T, class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_kernel(const __grid_constant__ Arguments arguments, Update update) {
  step_tensors<Step, T>(arguments, update);
}

bool is_stepped(const Bucket& b, int64_t i) { return b.tensors[i].numel > 0 && b.along[i] != 0; }

// The bucket's tensors, each with the number of its entry in place of its group.
template <class Step>
struct Entries {
  std::vector<TensorInfo> tensors;
  std::vector<Entry<Step>> entries;
};

// Tensors of one group share an entry if all or none are saved and their counters on the host are equal.
template <class Step>
Entries<Step> entries_of(const Bucket& b, const typename Step::Options* options, const StepArgs& args) {
  Entries<Step> found{std::vector<TensorInfo>(b.tensors, b.tensors + b.num_tensors), {}};
  using Key = std::tuple<int64_t, bool, float>;
  std::map<Key, int64_t> known;
  Key last{-1, false, 0.0f};
  int64_t number = 0;
  for (int64_t i = 0; i < b.num_tensors; ++i) {
    TensorInfo& tensor = found.tensors[static_cast<size_t>(i)];
    const int64_t group = tensor.group;
    tensor.group = 0;
    if (!is_stepped(b, i)) continue;
    const bool on_host = Step::kCounts && !args.device_counters;
    const float count = on_host ? *reinterpret_cast<const float*>(b.counters[i]) + 1.0f : 1.0f;
    const Key key{group, b.saved[i] != 0, count};
    if (key != last) {
      const auto [position, is_new] = known.emplace(key, static_cast<int64_t>(found.entries.size()));
      if (is_new) {
        Entry<Step> entry{};
        static_cast<typename Step::Options&>(entry) = options[group];
        static_cast<typename Step::Counted&>(entry) = Step::counted(options[group], static_cast<double>(count));
        entry.learning_rate = args.learning_rates == nullptr ? LearningRate{} : args.learning_rates[group];
        entry.saved = b.saved[i] != 0;
        found.entries.push_back(entry);
      }
      number = position->second;
      last = key;
    }
    tensor.group = number;
  }
  return found;
}

template <class Step>
TensorAddresses<kStepAddresses<Step>> addresses_of(const Bucket& b, bool device_counters) {
  TensorAddresses<kStepAddresses<Step>> found{};
  found[kWeights] = b.weights;
  found[kAlong] = b.along;
  for (int s = 0; s < Step::kNumStates; ++s) found[kStates + s] = b.states[s];
  if constexpr (Step::kCounts) found[kCounter<Step>] = device_counters ? b.counters : nullptr;
  return found;
}

}  // namespace

template <class Step>
int64_t step(const Bucket& b, const void* options, const StepArgs& args, Launch on) {
  const auto entries = entries_of<Step>(b, static_cast<const typename Step::Options*>(options), args);
  const Members<Entry<Step>> members{entries.tensors.data(), b.num_tensors, entries.entries.data()};
  const Update update{static_cast<const char*>(b.backup), args.grad_scale, args.found_inf, args.rounding.key};
  with_format(static_cast<DType>(b.dtype), args.rounding, [&](auto format) {
    using T = decltype(format);
    for_launches<StepSizes<Step>>(
        members, on, static_cast<int>(sizeof(typename T::Bits)), addresses_of<Step>(b, args.device_counters), false,
        false, [&](int64_t i) { return is_stepped(b, i); },
        [&](const auto& arguments, const std::vector<int64_t>& launched) {
          using Arguments = std::decay_t<decltype(arguments)>;
          const auto kernel = step_kernel<Step, T, Arguments>;
          launch("step", kernel, blocks_for(kernel, arguments.num_tiles()), kThreads, on.stream, arguments, update);
          for (const int64_t i : launched) {
            b.saved[i] = 0;
            if (Step::kCounts && !args.device_counters) *reinterpret_cast<float*>(b.counters[i]) += 1.0f;
          }
        });
  });
  return b.num_tensors - std::count(b.saved, b.saved + b.num_tensors, uint64_t{0});
}

template int64_t step<SAM_STEP>(const Bucket&, const void*, const StepArgs&, Launch);

}  // namespace sam::cuda
