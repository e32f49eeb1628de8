// backup / restore: copy a bucket's tensors to and from its backup, bit for bit, whatever their dtype: bytes here.
#include "format.h"
#include "plan.h"

namespace sam::cuda {
namespace {

using Byte = unsigned char;

// Moves the bytes from `begin` to `end`, whole units.
template <class U>
__device__ __forceinline__ void copy_units(Byte* to, const Byte* from, int begin, int end) {
  constexpr int kStride = kThreads * U::kSize;
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * U::kSize; first < end;
       first += kVectorsPerThread * kStride) {
    U moved[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k)
      if (first + k * kStride < end) moved[k] = load_unit<false, U>(from + first + k * kStride);
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k)
      if (first + k * kStride < end) store_unit<false>(to + first + k * kStride, moved[k]);
  }
}

template <bool ToBackup, class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    copy_kernel(const __grid_constant__ Arguments arguments, Byte* backup) {
  const uint32_t tiles = arguments.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = arguments.tile(index, 1);
    Byte* tensor = reinterpret_cast<Byte*>(tile.address[kWeights]);
    Byte* to = ToBackup ? backup + tile.slot : tensor;
    const Byte* from = ToBackup ? tensor : backup + tile.slot;
    // Slots are aligned; a tensor may lie anywhere its dtype allows.
    in_widest_units<Byte>(tile.address[kWeights], static_cast<int>(tile.count),
                          [&](auto unit, int begin, int end) { copy_units<decltype(unit)>(to, from, begin, end); });
  }
}

template <bool ToBackup, class TakesPart>
void copy_tensors(const Bucket& b, Launch on, const TakesPart& takes_part) {
  std::vector<TensorInfo> bytes(b.tensors, b.tensors + b.num_tensors);
  for (TensorInfo& tensor : bytes) tensor = {0, tensor.numel * b.itemsize, tensor.slot * b.itemsize};
  for_launches<PlainSizes>(Members<Group>{bytes.data(), b.num_tensors, nullptr}, on, 1, {b.weights, nullptr}, false,
                           false, takes_part, [&](const auto& arguments, const std::vector<int64_t>&) {
                             const auto kernel = copy_kernel<ToBackup, std::decay_t<decltype(arguments)>>;
                             launch(ToBackup ? "backup" : "restore", kernel, blocks_for(kernel, arguments.num_tiles()),
                                    kThreads, on.stream, arguments, static_cast<Byte*>(b.backup));
                           });
}

}  // namespace

void probe() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, copy_kernel<true, PlainSizes::Small>), "probe");
}

void backup(const Bucket& b, Launch on) {
  copy_tensors<true>(b, on, [&](int64_t i) { return b.weights[i] != 0; });
  std::copy(b.weights, b.weights + b.num_tensors, b.saved);
}

void restore(const Bucket& b, bool release, Launch on) {
  copy_tensors<false>(b, on, [&](int64_t i) { return b.weights[i] != 0 && b.saved[i] != 0; });
  if (!release) return;
  for (int64_t i = 0; i < b.num_tensors; ++i)
    if (b.weights[i] != 0) b.saved[i] = 0;
}

}  // namespace sam::cuda
