// C interface of exchange.h.
#pragma once

#include "exchange.h"

namespace ultraep {

constexpr int THREADS = 512;

enum Dtype : int64 { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

inline Peers peers_of(int64 rank, int64 ranks, void* flags) {
  return Peers{(int)rank, (int)ranks, (uint64* const*)flags};
}

inline Patience patience_of(int64 limit_ns, void* report) { return Patience{(uint64)limit_ns, (volatile int64*)report}; }

inline Replicas replicas_of(void* replica_expert, void* home_slot, int64 first_rank, int64 slots, int64 homes) {
  return Replicas{(const int64*)replica_expert, (const int32*)home_slot, (int)first_rank, (int)slots, (int)homes};
}

// Offsets and sizes lie in memory of the host; at most Parts::MOST parameters.
inline Parts parts_of(void* offsets, void* sizes, int64 parameters, int64 stride) {
  Parts parts{};
  parts.parameters = (int)parameters;
  parts.stride = (size_t)stride;
  for (int64 p = 0; p < parameters && p < Parts::MOST; ++p) {
    parts.offsets[p] = ((const int64*)offsets)[p];
    parts.sizes[p] = ((const int64*)sizes)[p];
    parts.pieces += (int)((parts.sizes[p] + Parts::PIECE - 1) / Parts::PIECE);
  }
  return parts;
}

template <class Kernel>
int launch_with_shared(const Kernel& kernel, int64 blocks, void* stream) {
  return launch(kernel, (int)blocks, THREADS, kernel.shared_bytes(), stream);
}

template <class From, class To>
int launch_stash(const Peers& peers, const Replicas& replicas, const Parts& parts, void* grads, void* slots,
                 int64 blocks, void* stream) {
  Stash<From, To> kernel{peers, replicas, parts, (const char* const*)grads, (char*)slots};
  return launch(kernel, (int)blocks, THREADS, 0, stream);
}

constexpr int UNKNOWN_DTYPE = 1;  // cudaErrorInvalidValue

}  // namespace ultraep

extern "C" {

using namespace ultraep;

int ultraep_announce(int64_t rank, int64_t ranks, void* flags, int64_t flag, int64_t call, void* stream) {
  return launch(Announce{peers_of(rank, ranks, flags), (Flag)flag, (uint64)call}, 1, 32, 0, stream);
}

int ultraep_gather(int64_t rank, int64_t ranks, void* flags, void* mail, void* loads, void* gathered, int64_t experts,
                   int64_t call, int64_t place_call, int64_t limit_ns, void* report, void* stream) {
  Gather kernel{peers_of(rank, ranks, flags),
                (uint64* const*)mail,
                (const int64*)loads,
                (int64*)gathered,
                (int)experts,
                (uint64)call,
                (uint64)place_call,
                patience_of(limit_ns, report)};
  int64_t words = ranks * experts;
  return launch(kernel, 1, words < 1024 ? (int)(words + 31) / 32 * 32 : 1024, 0, stream);
}

int ultraep_place(int64_t rank, int64_t ranks, void* flags, void* replica_expert, void* home_slot, int64_t first_rank,
                  int64_t slots_per_rank, int64_t homes, void* offsets, void* sizes, int64_t parameters, int64_t stride,
                  void* home, void* slots, void* counter, int64_t call, int64_t limit_ns, void* report, int64_t blocks,
                  void* stream) {
  Place kernel{peers_of(rank, ranks, flags),
               replicas_of(replica_expert, home_slot, first_rank, slots_per_rank, homes),
               parts_of(offsets, sizes, parameters, stride),
               (const char* const*)home,
               (char* const*)slots,
               (uint32*)counter,
               (uint64)call,
               patience_of(limit_ns, report)};
  return launch_with_shared(kernel, blocks, stream);
}

int ultraep_await_placed(int64_t rank, int64_t ranks, void* flags, void* replica_expert, void* home_slot,
                         int64_t first_rank, int64_t slots_per_rank, int64_t homes, int64_t call, int64_t limit_ns,
                         void* report, void* stream) {
  AwaitPlaced kernel{peers_of(rank, ranks, flags),
                     replicas_of(replica_expert, home_slot, first_rank, slots_per_rank, homes), (uint64)call,
                     patience_of(limit_ns, report)};
  return launch(kernel, 1, 32, 0, stream);
}

int ultraep_reduce(int64_t rank, int64_t ranks, void* flags, void* replica_expert, void* home_slot, int64_t first_rank,
                   int64_t slots_per_rank, int64_t homes, void* offsets, void* sizes, int64_t parameters,
                   int64_t stride, void* home, void* slots, void* counter, int64_t dtype, int64_t call,
                   int64_t limit_ns, void* report, int64_t blocks, void* stream) {
  auto fill = [&](auto kernel) {
    kernel.peers = peers_of(rank, ranks, flags);
    kernel.replicas = replicas_of(replica_expert, home_slot, first_rank, slots_per_rank, homes);
    kernel.parts = parts_of(offsets, sizes, parameters, stride);
    kernel.home = (char* const*)home;
    kernel.slots = (const char* const*)slots;
    kernel.counter = (uint32*)counter;
    kernel.call = (uint64)call;
    kernel.patience = patience_of(limit_ns, report);
    return launch_with_shared(kernel, blocks, stream);
  };
  switch (dtype) {
    case FLOAT32: return fill(Reduce<Float32>{});
    case FLOAT64: return fill(Reduce<Float64>{});
    case BFLOAT16: return fill(Reduce<BFloat16>{});
    case FLOAT16: return fill(Reduce<Float16>{});
  }
  return UNKNOWN_DTYPE;
}

int ultraep_clear(int64_t rank, int64_t ranks, void* flags, void* replica_expert, void* home_slot, int64_t first_rank,
                  int64_t slots_per_rank, int64_t homes, void* offsets, void* sizes, int64_t parameters, int64_t stride,
                  void* slots, int64_t zero, int64_t call, int64_t limit_ns, void* report, int64_t blocks,
                  void* stream) {
  Clear kernel{peers_of(rank, ranks, flags),
               replicas_of(replica_expert, home_slot, first_rank, slots_per_rank, homes),
               parts_of(offsets, sizes, parameters, stride),
               (char*)slots,
               zero != 0,
               (uint64)call,
               patience_of(limit_ns, report)};
  return launch(kernel, (int)blocks, THREADS, 16, stream);
}

int ultraep_stash(int64_t rank, int64_t ranks, void* flags, void* replica_expert, void* home_slot, int64_t first_rank,
                  int64_t slots_per_rank, int64_t homes, void* offsets, void* sizes, int64_t parameters, int64_t stride,
                  void* grads, void* slots, int64_t from, int64_t to, int64_t blocks, void* stream) {
  Peers peers = peers_of(rank, ranks, flags);
  Replicas replicas = replicas_of(replica_expert, home_slot, first_rank, slots_per_rank, homes);
  Parts parts = parts_of(offsets, sizes, parameters, stride);
  auto start = [&](auto stored_as, auto made_as) {
    return launch_stash<decltype(made_as), decltype(stored_as)>(peers, replicas, parts, grads, slots, blocks, stream);
  };
  auto pick = [&](auto made_as) {
    switch (to) {
      case FLOAT32: return start(Float32{}, made_as);
      case FLOAT64: return start(Float64{}, made_as);
      case BFLOAT16: return start(BFloat16{}, made_as);
      case FLOAT16: return start(Float16{}, made_as);
    }
    return UNKNOWN_DTYPE;
  };
  switch (from) {
    case FLOAT32: return pick(Float32{});
    case FLOAT64: return pick(Float64{});
    case BFLOAT16: return pick(BFloat16{});
    case FLOAT16: return pick(Float16{});
  }
  return UNKNOWN_DTYPE;
}

// What is queued on `from` so far happens before what is queued on `stream` from now on; `event` is a cudaEvent_t.
int ultraep_follow(int64_t event, int64_t from, void* stream) {
#if defined(__CUDACC__)
  cudaError_t error = cudaEventRecord((cudaEvent_t)event, (cudaStream_t)from);
  if (error == cudaSuccess) error = cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0);
  return (int)error;
#else
  return (int)(0 * (event + from + (int64_t)stream));
#endif
}

int ultraep_splits(int64_t ranks, int64_t width, int64_t slots, int64_t source, void* quota, void* replica_expert,
                   void* out, void* told, void* stream) {
  Splits kernel{(const int64*)quota, (const int64*)replica_expert, (int64*)out, (int64*)told,
                (int)ranks,          (int)width,                   (int)slots,  (int)source};
  int64_t words = ranks * width;
  return launch(kernel, 1, words < 512 ? (int)(words + 31) / 32 * 32 : 512, 0, stream);
}

int ultraep_delay(int64_t ns, void* stream) { return launch(Delay{(uint64)ns}, 1, 32, 0, stream); }

}  // extern "C"
