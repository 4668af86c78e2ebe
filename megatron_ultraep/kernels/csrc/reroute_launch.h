#pragma once
#include "reroute.h"

namespace ultraep {

constexpr int kInvalidArgument = 1;  // cudaErrorInvalidValue

template <class Element, bool kBackward>
int launch_reroute(const void* from, const void* map, const void* before, const void* table, void* to, void* to_map,
                   int64 tokens, int64 experts, int64 physical, int64 copies, void* stream) {
  using Kernel = Reroute<Element, kBackward>;
  const RoutingMap routing{static_cast<const uint8*>(map), tokens, (int)experts};
  const Kernel kernel{routing,
                      Table{static_cast<const int32*>(table), (int)copies},
                      static_cast<const int32*>(before),
                      static_cast<const Element*>(from),
                      static_cast<Element*>(to),
                      static_cast<uint8*>(to_map),
                      (int)physical};
  const int chunks = (int)((tokens + kChunkRows - 1) / kChunkRows);
  return launch(kernel, chunks, kRerouteThreads, Kernel::shared_bytes(experts), stream);
}

template <bool kBackward>
int launch_reroute_of_size(int64 bytes, const void* from, const void* map, const void* before, const void* table,
                           void* to, void* to_map, int64 tokens, int64 experts, int64 physical, int64 copies,
                           void* stream) {
  const auto launched = [&](auto element) {
    return launch_reroute<decltype(element), kBackward>(from, map, before, table, to, to_map, tokens, experts, physical,
                                                        copies, stream);
  };
  switch (bytes) {
    case 2:
      return launched(uint16_t{});
    case 4:
      return launched(uint32{});
    case 8:
      return launched(uint64{});
    default:
      return kInvalidArgument;
  }
}

}  // namespace ultraep

extern "C" {

// map bool [T, E] -> before int32 [chunks of 32 rows, E], totals int64 [E]. E > 0.
int ultraep_count(const void* map, void* before, void* totals, int64_t tokens, int64_t experts, void* stream) {
  using namespace ultraep;
  const int64 chunks = (tokens + kChunkRows - 1) / kChunkRows;
  if (chunks > 0) {
    const Count count{RoutingMap{static_cast<const uint8*>(map), tokens, (int)experts}, static_cast<int32*>(before)};
    const int error = launch(count, (int)chunks, kRerouteThreads, Count::shared_bytes(experts), stream);
    if (error) return error;
  }
  const Scan scan{static_cast<int32*>(before), static_cast<int64*>(totals), chunks, (int)experts};
  const int strips = (int)((experts + Scan::kStrip - 1) / Scan::kStrip);
  return launch(scan, strips, Scan::kThreads, Scan::shared_bytes(), stream);
}

// probs [T, E] -> out [T, P], out_map bool [T, P], aligned to 16 bytes. `bytes` of a value; T, E, P > 0.
int ultraep_reroute(const void* probs, const void* map, const void* before, const void* table, void* out, void* out_map,
                    int64_t tokens, int64_t experts, int64_t physical, int64_t copies, int64_t bytes, void* stream) {
  return ultraep::launch_reroute_of_size<false>(bytes, probs, map, before, table, out, out_map, tokens, experts,
                                                physical, copies, stream);
}

// grad [T, P] -> out [T, E], aligned to 16 bytes.
int ultraep_reroute_backward(const void* grad, const void* map, const void* before, const void* table, void* out,
                             int64_t tokens, int64_t experts, int64_t physical, int64_t copies, int64_t bytes,
                             void* stream) {
  return ultraep::launch_reroute_of_size<true>(bytes, grad, map, before, table, out, nullptr, tokens, experts, physical,
                                               copies, stream);
}

}  // extern "C"
