// Cuts a bucket's tensors into launches, and says how many blocks a launch gets.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "arguments.h"

namespace sam::cuda {

// As many blocks as the current device runs at once: more would only wait. At most one per tile, at least one.
template <class Kernel>
unsigned blocks_for(Kernel kernel, int64_t tiles) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& resident = known[{reinterpret_cast<const void*>(kernel), device}];
  if (resident == 0) {
    int processors = 0, per_processor = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    resident = std::max(1, processors * per_processor);
  }
  return static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(tiles, resident)));
}

// Tensors, and what a kernel has to know of the group that each is in.
template <class Group>
struct Members {
  const TensorInfo* tensors;
  int64_t num_tensors;
  const Group* groups;
};

// For each tensor its addresses: an array for each kind, or null.
template <int Addresses>
using TensorAddresses = std::array<const uint64_t*, Addresses>;

inline int64_t tiles_of(int64_t numel, int itemsize) {
  const int64_t elements = kTileBytes / itemsize;
  return (numel + elements - 1) / elements;
}

// Fills `table` with the tensors from `next` on that take part, as many as fit, and moves `next` behind them. Adds
// their numbers to `launched`.
template <class Table, class TakesPart>
void fill(Table& table, const Members<typename Table::Group>& members, int itemsize,
          const TensorAddresses<Table::kAddresses>& addresses, const TakesPart& takes_part, int64_t& next,
          std::vector<int64_t>& launched) {
  table.num_tensors = 0;
  table.num_groups = 0;
  std::vector<int64_t> groups;  // their numbers in the bucket
  uint32_t tiles = 0;
  for (; next < members.num_tensors && table.num_tensors < Table::kMaxTensors; ++next) {
    const TensorInfo& tensor = members.tensors[next];
    if (tensor.numel == 0 || !takes_part(next)) continue;
    size_t group = groups.size() - 1;  // mostly that of the tensor before
    if (groups.empty() || groups[group] != tensor.group)
      group = static_cast<size_t>(std::find(groups.begin(), groups.end(), tensor.group) - groups.begin());
    if (group == groups.size()) {
      if (table.num_groups == Table::kMaxGroups) return;
      groups.push_back(tensor.group);
      table.groups[table.num_groups++] =
          members.groups == nullptr ? typename Table::Group{} : members.groups[tensor.group];
    }
    const int i = table.num_tensors++;
    tiles += static_cast<uint32_t>(tiles_of(tensor.numel, itemsize));
    for (int k = 0; k < Table::kAddresses; ++k) table.address[k][i] = addresses[k] == nullptr ? 0 : addresses[k][next];
    table.numel[i] = tensor.numel;
    table.slot[i] = static_cast<uint32_t>(tensor.slot * itemsize / kSlotBytes);
    table.last_tile[i] = tiles;
    table.group[i] = static_cast<uint16_t>(group);
    launched.push_back(next);
  }
}

// Calls launch_tensors(table, launched) for one table after the other until all tensors that take part are served; at
// least once, then without tensors, if `always`. `launched` are the table's tensors by number. backwards: the last
// tensors first.
template <class Table, class TakesPart, class LaunchTensors>
void for_tables(const Members<typename Table::Group>& members, int itemsize,
                const TensorAddresses<Table::kAddresses>& addresses, bool always, bool backwards,
                const TakesPart& takes_part, const LaunchTensors& launch_tensors) {
  struct Filled {
    Table table;
    std::vector<int64_t> launched;
  };
  std::vector<std::unique_ptr<Filled>> filled;
  int64_t next = 0;
  while (next < members.num_tensors) {
    filled.emplace_back(new Filled);  // not make_unique: that would write 32 KB of zeros
    fill(filled.back()->table, members, itemsize, addresses, takes_part, next, filled.back()->launched);
    if (filled.back()->launched.empty()) filled.pop_back();
  }
  if (filled.empty() && always) {
    filled.emplace_back(new Filled);  // not make_unique: that would write 32 KB of zeros
    filled.back()->table.num_tensors = filled.back()->table.num_groups = 0;
  }
  if (backwards) std::reverse(filled.begin(), filled.end());
  for (const auto& f : filled) launch_tensors(f->table, f->launched);
}

// for_tables with the smallest kernel arguments that hold all tensors, else with the largest that the device takes.
template <class Sizes, class... Rest>
void for_launches(const Members<typename Sizes::GroupType>& members, Launch on, int itemsize,
                  const TensorAddresses<Sizes::kAddresses>& addresses, const Rest&... rest) {
  using Small = typename Sizes::Small;
  using Medium = typename Sizes::Medium;
  int64_t groups = 0;
  for (int64_t i = 0; i < members.num_tensors; ++i) groups = std::max(groups, members.tensors[i].group + 1);
  const auto fits = [&](int max_tensors, int max_groups) {
    return members.num_tensors <= max_tensors && groups <= max_groups;
  };
  if (fits(Small::kMaxTensors, Small::kMaxGroups) || !on.large_arguments)
    for_tables<Small>(members, itemsize, addresses, rest...);
  else if (fits(Medium::kMaxTensors, Medium::kMaxGroups)) for_tables<Medium>(members, itemsize, addresses, rest...);
  else for_tables<typename Sizes::Large>(members, itemsize, addresses, rest...);
}

}  // namespace sam::cuda
