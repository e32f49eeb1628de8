// Cuts a bucket's rows into launches, and says how many blocks a launch gets.
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
#include "rows.h"

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
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    resident = std::max(1, processors * per_processor);
  }
  return static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(tiles, resident)));
}

// For each row its addresses, as csrc/cpu/kernels.h has them: an array for each kind, or null.
template <int Addresses>
using RowAddresses = std::array<const uint64_t*, Addresses>;

inline int64_t tiles_of(int64_t numel, int itemsize) {
  const int64_t elements = kTileBytes / itemsize;
  return (numel + elements - 1) / elements;
}

// Fills `table` with the rows from `next` on that take part, as many as fit, and moves `next` behind them. Adds their numbers to `members`.
template <class Table, class TakesPart>
void fill(Table& table, const Bucket<typename Table::Group>& bucket, int itemsize, const RowAddresses<Table::kAddresses>& addresses,
          const TakesPart& takes_part, int64_t& next, std::vector<int64_t>& members) {
  table.num_rows = 0;
  table.num_groups = 0;
  std::vector<int64_t> groups;  // their numbers in the bucket
  uint32_t tiles = 0;
  for (; next < bucket.num_rows && table.num_rows < Table::kMaxRows; ++next) {
    const Row& row = bucket.rows[next];
    if (row.numel == 0 || !takes_part(next)) continue;
    size_t group = groups.size() - 1;  // mostly that of the row before
    if (groups.empty() || groups[group] != row.group) group = static_cast<size_t>(std::find(groups.begin(), groups.end(), row.group) - groups.begin());
    if (group == groups.size()) {
      if (table.num_groups == Table::kMaxGroups) return;
      groups.push_back(row.group);
      table.groups[table.num_groups++] = bucket.groups == nullptr ? typename Table::Group{} : bucket.groups[row.group];
    }
    const int i = table.num_rows++;
    tiles += static_cast<uint32_t>(tiles_of(row.numel, itemsize));
    for (int k = 0; k < Table::kAddresses; ++k) table.address[k][i] = addresses[k] == nullptr ? 0 : addresses[k][next];
    table.numel[i] = row.numel;
    table.slot[i] = static_cast<uint32_t>(row.slot * itemsize / kSlotBytes);
    table.last_tile[i] = tiles;
    table.group[i] = static_cast<uint16_t>(group);
    members.push_back(next);
  }
}

// Calls launch_rows(table, members) for one table after the other until all rows that take part are served; at least once, then without rows,
// if `always`. `members` are the table's rows by number. backwards: the last rows first.
template <class Table, class TakesPart, class LaunchRows>
void for_tables(const Bucket<typename Table::Group>& bucket, int itemsize, const RowAddresses<Table::kAddresses>& addresses, bool always,
                bool backwards, const TakesPart& takes_part, const LaunchRows& launch_rows) {
  struct Filled {
    Table table;
    std::vector<int64_t> members;
  };
  std::vector<std::unique_ptr<Filled>> filled;
  int64_t next = 0;
  while (next < bucket.num_rows) {
    filled.emplace_back(new Filled);  // not make_unique: that would write 32 KB of zeros
    fill(filled.back()->table, bucket, itemsize, addresses, takes_part, next, filled.back()->members);
    if (filled.back()->members.empty()) filled.pop_back();
  }
  if (filled.empty() && always) {
    filled.emplace_back(new Filled);  // not make_unique: that would write 32 KB of zeros
    filled.back()->table.num_rows = filled.back()->table.num_groups = 0;
  }
  if (backwards) std::reverse(filled.begin(), filled.end());
  for (const auto& f : filled) launch_rows(f->table, f->members);
}

// for_tables with the smallest kernel arguments that hold all rows, else with the largest that the device takes.
template <class Tables, class... Rest>
void for_launches(const Bucket<typename Tables::Small::Group>& bucket, Place place, int itemsize,
                  const RowAddresses<Tables::Small::kAddresses>& addresses, const Rest&... rest) {
  using Small = typename Tables::Small;
  using Medium = typename Tables::Medium;
  int64_t groups = 0;
  for (int64_t i = 0; i < bucket.num_rows; ++i) groups = std::max(groups, bucket.rows[i].group + 1);
  const auto fits = [&](int max_rows, int max_groups) { return bucket.num_rows <= max_rows && groups <= max_groups; };
  if (fits(Small::kMaxRows, Small::kMaxGroups) || !place.large_arguments) for_tables<Small>(bucket, itemsize, addresses, rest...);
  else if (fits(Medium::kMaxRows, Medium::kMaxGroups)) for_tables<Medium>(bucket, itemsize, addresses, rest...);
  else for_tables<typename Tables::Large>(bucket, itemsize, addresses, rest...);
}

}  // namespace sam::cuda
