// Threads that work together: a warp or a block on a GPU, one thread on a CPU.
//
// Every kernel of this directory is written against these teams, so the same source runs on a GPU and, thread by
// thread, on a CPU, where a team has one member. Rules:
//
// 1. Collective calls (sync, sum, ...) are made by all members, so loops around them have the same trip count for all.
// 2. Work is dealt out as `for (int i = team.rank(); i < n; i += team.size())`.
// 3. Between writing shared memory and another member's reading it there is a `sync`; the other collective calls order
//    no memory.
//
// For tests of what only teams of many members do there is a third kind: fibers on a CPU (lanes.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define ULTRAEP_DEVICE __device__ __forceinline__
#define ULTRAEP_BOTH __host__ __device__ __forceinline__  // for kernels and their launchers
#else
#include <algorithm>
#include <vector>
#define ULTRAEP_DEVICE inline
#define ULTRAEP_BOTH inline
#endif

namespace ultraep {

using int64 = int64_t;
using int32 = int32_t;
using uint64 = uint64_t;
using uint32 = uint32_t;
using uint8 = uint8_t;

template <class T>
ULTRAEP_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
ULTRAEP_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}

// Positions in sets of members (`Warp::members`), which are not empty.
ULTRAEP_DEVICE int first_of(uint32 members) {
#if defined(__CUDA_ARCH__)
  return __ffs((int)members) - 1;
#else
  int first = 0;
  while (!(members >> first & 1)) ++first;
  return first;
#endif
}

ULTRAEP_DEVICE int last_of(uint32 members) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz((int)members);
#else
  int last = 31;
  while (!(members >> last & 1)) --last;
  return last;
#endif
}

ULTRAEP_DEVICE int number_of(uint32 members) {
#if defined(__CUDA_ARCH__)
  return __popc(members);
#else
  int number = 0;
  for (; members; members &= members - 1) ++number;
  return number;
#endif
}

#if defined(__CUDACC__)

struct Warp {
  static constexpr int kWidth = 32;  // what `size` returns
  __device__ __forceinline__ int rank() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int size() const { return 32; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ bool any(bool value) const { return __any_sync(~0u, value); }
  // The members for which it is true, as a set of bits.
  __device__ __forceinline__ uint32 members(bool value) const { return __ballot_sync(~0u, value); }
  // Members for which it is true: all of them, and those before this one.
  __device__ __forceinline__ int count(bool value) const { return __popc(__ballot_sync(~0u, value)); }
  __device__ __forceinline__ int count_before(bool value, int& total) const {
    unsigned members = __ballot_sync(~0u, value);
    total = __popc(members);
    return __popc(members & ((1u << rank()) - 1));
  }

  // The same value for all members; `join` is associative and commutative.
  template <class T, class Join>
  __device__ __forceinline__ T reduce(T value, Join join) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) value = join(value, shuffle_xor(value, distance));
    return value;
  }
  template <class T>
  __device__ __forceinline__ T sum(T value) const {
#if __CUDA_ARCH__ >= 800
    if constexpr (is_word<T>) return __reduce_add_sync(~0u, value);
#endif
    return reduce(value, [](T a, T b) { return a + b; });
  }
  template <class T>
  __device__ __forceinline__ T min(T value) const {
#if __CUDA_ARCH__ >= 800
    if constexpr (is_word<T>) return __reduce_min_sync(~0u, value);
#endif
    return reduce(value, [](T a, T b) { return smaller(a, b); });
  }
  template <class T>
  __device__ __forceinline__ T max(T value) const {
#if __CUDA_ARCH__ >= 800
    if constexpr (is_word<T>) return __reduce_max_sync(~0u, value);
#endif
    return reduce(value, [](T a, T b) { return larger(a, b); });
  }
  // Sum over the members before this one; `total` is the sum over all.
  template <class T>
  __device__ __forceinline__ T sum_before(T value, T& total) const {
    T until = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
      T other = __shfl_up_sync(~0u, until, distance);
      if (rank() >= distance) until += other;
    }
    total = __shfl_sync(~0u, until, 31);
    return until - value;
  }
  // What one member has; each may ask for another's.
  template <class T>
  __device__ __forceinline__ T from(T value, int member) const {
    return __shfl_sync(~0u, value, member);
  }

 private:
  // What one instruction reduces.
  template <class T>
  static constexpr bool is_word = std::is_same<T, int>::value || std::is_same<T, unsigned>::value;

  template <class T>
  __device__ __forceinline__ static T shuffle_xor(T value, int distance) {
    if constexpr (sizeof(T) <= 8 && std::is_arithmetic<T>::value) {
      return __shfl_xor_sync(~0u, value, distance);
    } else {  // a plain struct, word by word
      static_assert(sizeof(T) % 4 == 0, "shuffled structs are made of whole words");
      T other;
#pragma unroll
      for (size_t i = 0; i < sizeof(T) / 4; ++i)
        reinterpret_cast<int*>(&other)[i] = __shfl_xor_sync(~0u, reinterpret_cast<const int*>(&value)[i], distance);
      return other;
    }
  }
};

struct Block {
  __device__ __forceinline__ int rank() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return blockDim.x; }
  __device__ __forceinline__ int id() const { return blockIdx.x; }
  __device__ __forceinline__ int count() const { return gridDim.x; }
  __device__ __forceinline__ int warp() const { return threadIdx.x >> 5; }
  __device__ __forceinline__ int warps() const { return blockDim.x >> 5; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// A kernel is a struct of arguments with `operator()(Block, char* shared)`; shared memory is aligned to 16 bytes.
template <class Kernel>
__global__ void run(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) char shared[];
  kernel(Block{}, shared);
}

// The same for kernels that say how many threads a block may have, `kMostThreads`: they get no more registers.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMostThreads, 1) run_within(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) char shared[];
  kernel(Block{}, shared);
}

template <class Kernel, class = void>
struct Entry {
  static constexpr auto kEntry = run<Kernel>;
};

template <class Kernel>
struct Entry<Kernel, std::void_t<decltype(Kernel::kMostThreads)>> {
  static constexpr auto kEntry = run_within<Kernel>;
};

// Returns a cudaError_t.
template <class Kernel>
int launch(const Kernel& kernel, int blocks, int threads, size_t shared, void* stream) {
  const auto entry = Entry<Kernel>::kEntry;
  if (shared > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error != cudaSuccess) return (int)error;
  }
  entry<<<blocks, threads, shared, (cudaStream_t)stream>>>(kernel);
  return (int)cudaGetLastError();
}

#elif !defined(ULTRAEP_HOST_LANES)

struct Warp {
  static constexpr int kWidth = 1;
  int rank() const { return 0; }
  int size() const { return 1; }
  void sync() const {}
  bool any(bool value) const { return value; }
  uint32 members(bool value) const { return value; }
  int count(bool value) const { return value; }
  int count_before(bool value, int& total) const {
    total = value;
    return 0;
  }
  template <class T, class Join>
  T reduce(T value, Join) const {
    return value;
  }
  template <class T>
  T sum(T value) const {
    return value;
  }
  template <class T>
  T min(T value) const {
    return value;
  }
  template <class T>
  T max(T value) const {
    return value;
  }
  template <class T>
  T sum_before(T value, T& total) const {
    total = value;
    return 0;
  }
  template <class T>
  T from(T value, int) const {
    return value;
  }
};

struct Block {
  int block, blocks;
  int rank() const { return 0; }
  int size() const { return 1; }
  int id() const { return block; }
  int count() const { return blocks; }
  int warp() const { return 0; }
  int warps() const { return 1; }
  void sync() const {}
};

// Blocks one after the other. Shared memory is poisoned before each: it holds nothing at the start on a GPU either.
template <class Kernel>
int launch(const Kernel& kernel, int blocks, int, size_t shared, void*) {
  std::vector<uint64> memory(shared / 8 + 2);
  for (int block = 0; block < blocks; ++block) {
    std::fill(memory.begin(), memory.end(), 0xA5A5A5A5A5A5A5A5ull);
    char* start = reinterpret_cast<char*>(memory.data());
    start += (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
    kernel(Block{block, blocks}, start);
  }
  return 0;
}

#endif

}  // namespace ultraep

#if defined(ULTRAEP_HOST_LANES)
#include "lanes.h"
#endif
