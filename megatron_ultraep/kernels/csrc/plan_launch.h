// Launchers of plan.h.
#pragma once

#include "plan.h"

extern "C" {

// Bytes of shared memory: out[0] of a block of `Search`, out[1] of each of its warps, out[2] of each warp of `Fill`;
// out[3] is what a block of the current device may have.
int ultraep_plan_sizes(int64_t ranks, int64_t node_size, int64_t homes, int64_t slots, int64_t* out, void*) {
  using namespace ultraep::plan;
  out[0] = (int64_t)search_block_bytes((int)node_size, (int)homes);
  out[1] = (int64_t)search_warp_bytes((int)node_size, (int)homes, (int)slots);
  out[2] = (int64_t)fill_warp_bytes((int)ranks, (int)node_size, (int)slots);
#if defined(__CUDACC__)
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  out[3] = most;
  return (int)error;
#else
  out[3] = 227 * 1024;  // what an H100 has: a CPU refuses the same layouts
  return 0;
#endif
}

// Shapes: see `Search`.
int ultraep_plan_search(
    const int64_t* loads,
    const int32_t* expert_at,
    int64_t* decisions,
    int32_t* held,
    int64_t experts,
    int64_t ranks,
    int64_t node_size,
    int64_t slots,
    int64_t min_tokens,
    int64_t tolerance_ppm,
    int64_t gated,
    int64_t token_ps,
    int64_t replica_ps,
    int64_t fixed_ps,
    int64_t warps,
    void* stream) {
  using namespace ultraep::plan;
  const int homes = (int)(experts / ranks);
  const size_t shared = search_block_bytes((int)node_size, homes) +
                        (size_t)warps * search_warp_bytes((int)node_size, homes, (int)slots);
  const auto launch = [&](auto items) {
    const Search<decltype(items)::value> search{
        loads,     expert_at,   decisions, held,           (int)experts,     (int)ranks,    (int)node_size,
        homes,     (int)slots,  (int)min_tokens, tolerance_ppm,  gated,            token_ps,      replica_ps,
        fixed_ps};
    return ultraep::launch(search, (int)(ranks / node_size), (int)warps * 32, shared, stream);
  };
  // With `if constexpr`, a CPU has no narrow attempts to compile.
  if constexpr (ultraep::Warp::kWidth == 32) {
    switch (items_of((int)node_size, homes)) {
      case 1: return launch(std::integral_constant<int, 1>{});
      case 2: return launch(std::integral_constant<int, 2>{});
      case 4: return launch(std::integral_constant<int, 4>{});
    }
  }
  return launch(std::integral_constant<int, 0>{});
}

// Shapes: see `Fill`.
int ultraep_plan_fill(
    const int64_t* loads,
    const int32_t* expert_at,
    const int64_t* decided,
    const int32_t* held,
    int64_t* replica_expert,
    int64_t* quota,
    int64_t* decisions,
    int32_t* table,
    int64_t experts,
    int64_t ranks,
    int64_t node_size,
    int64_t slots,
    int64_t source,
    int64_t gated,
    int64_t warps,
    void* stream) {
  using namespace ultraep::plan;
  const Fill fill{loads,        expert_at,     decided, held, replica_expert,
                  quota,        decisions,     table,   (int)experts,   (int)ranks,
                  (int)node_size, (int)(experts / ranks), (int)slots, (int)source, (int)(gated != 0)};
  const size_t shared = (size_t)warps * fill_warp_bytes((int)ranks, (int)node_size, (int)slots);
  return ultraep::launch(fill, (int)((fill.tasks() + warps - 1) / warps), (int)warps * 32, shared, stream);
}

}  // extern "C"
