// What the ranks of a node exchange through symmetric memory: loads, replica weights, replica gradients.
//
// Every rank owns a region of flags, `flags[kind][from]`, that only the rank `from` writes. A flag counts calls and only
// grows, so a wait is `flag >= call`, and a late or early rank changes nothing. Who may touch what, and when:
//
//   weight slots of rank r     r: FREE n to all  ->  homes: write  ->  PLACED n to r  ->  r: read, until its next FREE
//   gradient slots of rank r   r: READY m to all ->  homes: read   ->  TAKEN m to r   ->  r: write, until its next READY
//   loads                      each word carries its call number; two mailboxes in turn (see Gather)
//
// Flags are released with system scope after the writes or reads that they stand for, and acquired before those that
// they allow. Every wait has a limit; past it the report says who was waited for and the kernel traps.
#pragma once

#include "team.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#else
#include <sched.h>

#include <chrono>
#include <cstring>
#endif

namespace ultraep {

enum Flag : int { FREE, PLACED, READY, TAKEN, LOADS };

// `report`: int64[4] in memory that the host reads: 1 when a wait was given up, flag, rank in the node, call.
struct Patience {
  uint64 limit_ns;
  volatile int64* report;
};

ULTRAEP_DEVICE uint64 load_acquire(const uint64* flag) {
#if defined(__CUDACC__)
  uint64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
#else
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
#endif
}

ULTRAEP_DEVICE void store_release(uint64* flag, uint64 value) {
#if defined(__CUDACC__)
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
#else
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
#endif
}

ULTRAEP_DEVICE uint64 load_word(const uint64* word) {
#if defined(__CUDACC__)
  uint64 value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  return __atomic_load_n(word, __ATOMIC_RELAXED);
#endif
}

ULTRAEP_DEVICE void store_word(uint64* word, uint64 value) {
#if defined(__CUDACC__)
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#else
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
#endif
}

ULTRAEP_DEVICE void fence_system() {
#if defined(__CUDACC__)
  __threadfence_system();
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

ULTRAEP_DEVICE uint64 now_ns() {
#if defined(__CUDACC__)
  uint64 time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
#else
  return (uint64)std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// Between two looks at a flag; false when patience has run out.
ULTRAEP_DEVICE bool keep_waiting(const Patience& patience, uint64 started, int flag, int rank, uint64 call) {
  if (now_ns() - started < patience.limit_ns) {
#if defined(__CUDACC__)
    __nanosleep(20);
#else
    sched_yield();
#endif
    return true;
  }
  patience.report[1] = flag;
  patience.report[2] = rank;
  patience.report[3] = (int64)call;
  fence_system();
  patience.report[0] = 1;
  fence_system();
#if defined(__CUDACC__)
  __trap();
#endif
  return false;
}

// By one thread; false (on a CPU) when patience has run out.
ULTRAEP_DEVICE bool wait_for(const uint64* flags, int ranks, Flag flag, int rank, uint64 call,
                             const Patience& patience) {
  const uint64* own = flags + flag * ranks + rank;
  if (load_acquire(own) >= call) return true;
  uint64 started = now_ns();
  while (load_acquire(own) < call)
    if (!keep_waiting(patience, started, flag, rank, call)) return false;
  return true;
}

ULTRAEP_DEVICE uint32 count_up(uint32* counter) {
#if defined(__CUDACC__)
  return atomicAdd(counter, 1u);
#else
  return (*counter)++;
#endif
}

// True for the last block of the grid to come here: all that the blocks did before is then done and visible to all.
// `counter` is 0 before and after. `word` is in shared memory.
ULTRAEP_DEVICE bool last_to_finish(Block block, uint32* counter, int* word) {
  block.sync();
  if (block.rank() == 0) {
    fence_system();
    *word = count_up(counter) == (uint32)block.count() - 1;
    if (*word) {
      *counter = 0;
      fence_system();
    }
  }
  block.sync();
  return *word != 0;
}

// The ranks of a node, as one of them sees them. Ranks here count inside the node.
struct Peers {
  int rank, ranks;
  uint64* const* flags;  // [ranks]: each one's region of flags
};

ULTRAEP_DEVICE void tell(const Peers& peers, Flag flag, int rank, uint64 call) {
  store_release(peers.flags[rank] + flag * peers.ranks + peers.rank, call);
}

// One warp: a flag to all ranks. What the stream did before is done.
struct Announce {
  Peers peers;
  Flag flag;
  uint64 call;

  ULTRAEP_DEVICE void operator()(Block block, char*) const {
    fence_system();
    for (int rank = block.rank(); rank < peers.ranks; rank += block.size()) tell(peers, flag, rank, call);
  }
};

// One block: loads of all ranks. A word is (call << 32 | tokens), so it says itself that it has come: no flag, no fence.
//
// Two mailboxes in turn suffice: a rank writes for call n + 2 after it has read all of call n + 1, which a rank sends
// after it has read call n. FREE is told along, as the stream has passed all earlier readers of the slots.
struct Gather {
  Peers peers;
  uint64* const* mail;  // [ranks]: each one's mailboxes, [2][ranks][experts]
  const int64* loads;   // [experts]
  int64* gathered;      // [ranks, experts]
  int experts;
  uint64 call;
  uint64 place_call;  // 0: tell nothing about slots
  Patience patience;

  ULTRAEP_DEVICE void operator()(Block block, char*) const {
    size_t box = (size_t)(call & 1) * peers.ranks * experts;
    int words = peers.ranks * experts;
    uint64 stamp = (call & 0xffffffffu) << 32;
    for (int i = block.rank(); i < words; i += block.size()) {
      int expert = i % experts;
      store_word(mail[i / experts] + box + (size_t)peers.rank * experts + expert, stamp | (uint64)loads[expert]);
    }
    if (place_call) {
      fence_system();
      for (int rank = block.rank(); rank < peers.ranks; rank += block.size()) tell(peers, FREE, rank, place_call);
    }
    const uint64* in = mail[peers.rank] + box;
    for (int i = block.rank(); i < words; i += block.size()) {
      uint64 word = load_word(in + i);
      if (word >> 32 != stamp >> 32) {
        uint64 started = now_ns();
        do {
          if (!keep_waiting(patience, started, LOADS, i / experts, call)) return;
          word = load_word(in + i);
        } while (word >> 32 != stamp >> 32);
      }
      gathered[i] = (int64)(word & 0xffffffffu);
    }
  }
};

// Which replicas a plan makes, as one rank of the node sees it.
struct Replicas {
  const int64* replica_expert;  // [all ranks, slots]: logical expert, -1 for none
  const int32* home_slot;       // [experts]: home rank (of all) * homes + place
  int first_rank;               // of the node
  int slots, homes;

  ULTRAEP_DEVICE int expert(int rank, int slot) const {
    return (int)replica_expert[(size_t)(first_rank + rank) * slots + slot];
  }
  ULTRAEP_DEVICE int home(int expert) const { return home_slot[expert] / homes - first_rank; }
  ULTRAEP_DEVICE int place(int expert) const { return home_slot[expert] % homes; }
};

// The replicas of one rank's experts, in shared memory, by place, then by rank: the order of sums.
struct OwnReplicas {
  struct Entry {
    int place, rank, slot;
  };
  int* count;  // entries
  int* owners;  // different places
  int* first;  // [owners + 1]: where each place's entries begin
  Entry* entries;

  int* places;  // [ranks * slots]: place of the replica's home, -1 for none of this rank's

  static size_t bytes(int ranks, int slots) {
    size_t most = (size_t)ranks * slots;
    return 16 + (most + 2) * sizeof(int) + most * (sizeof(Entry) + sizeof(int)) + 16;
  }

  ULTRAEP_DEVICE OwnReplicas(char* shared, int ranks, int slots) {
    count = reinterpret_cast<int*>(shared);
    owners = count + 1;
    first = count + 4;
    entries = reinterpret_cast<Entry*>(first + ranks * slots + 2);
    places = reinterpret_cast<int*>(entries + ranks * slots);
  }

  // Collective over the block. Every (rank, slot) finds its place in the order by counting, so threads need no order.
  ULTRAEP_DEVICE void find(Block block, const Replicas& replicas, const Peers& peers) {
    int most = peers.ranks * replicas.slots;
    if (block.rank() == 0) *count = 0;
    for (int i = block.rank(); i < most; i += block.size()) {
      int expert = replicas.expert(i / replicas.slots, i % replicas.slots);
      places[i] = expert >= 0 && replicas.home(expert) == peers.rank ? replicas.place(expert) : -1;
    }
    block.sync();
    for (int i = block.rank(); i < most; i += block.size()) {
      int place = places[i], before = 0, all = 0;
      if (place < 0) continue;
      for (int j = 0; j < most; ++j) {
        int at = places[j];
        all += at >= 0;
        before += at >= 0 && (at < place || (at == place && j < i));
      }
      entries[before] = {place, i / replicas.slots, i % replicas.slots};
      if (before == 0) *count = all;
    }
    block.sync();
    if (block.rank() == 0) {
      int found = 0;
      for (int i = 0; i < *count; ++i)
        if (i == 0 || entries[i].place != entries[i - 1].place) first[found++] = i;
      first[found] = *count;
      *owners = found;
    }
    block.sync();
  }
};

// The parameters of one expert: where they lie in a slot, and how an expert is cut into pieces of work.
// By value: a kernel has them without a load.
struct Parts {
  static constexpr int MOST = 8;           // parameters
  static constexpr int64 PIECE = 64 * 1024;  // bytes

  int64 offsets[MOST];  // bytes from the start of a slot
  int64 sizes[MOST];    // bytes
  int parameters;
  size_t stride;  // bytes from slot to slot
  int pieces;     // of an expert

  // Piece of an expert: parameter, first byte in it, bytes.
  ULTRAEP_DEVICE void piece(int number, int& parameter, int64& start, int64& bytes) const {
    parameter = 0;
    int64 here = (sizes[0] + PIECE - 1) / PIECE;
    while (number >= here) {
      number -= (int)here;
      ++parameter;
      here = (sizes[parameter] + PIECE - 1) / PIECE;
    }
    start = number * PIECE;
    bytes = smaller(PIECE, sizes[parameter] - start);
  }
};

struct alignas(16) Vector {
  uint32 words[4];
};

ULTRAEP_DEVICE bool aligned(const void* a, const void* b, int64 bytes) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | (uintptr_t)bytes) & 15) == 0;
}

// Collective over the block; `from` may be null: zeros.
ULTRAEP_DEVICE void copy_piece(Block block, char* to, const char* from, int64 bytes) {
  constexpr int FLIGHT = 8;  // loads under way before the first store
  if (aligned(to, from, bytes)) {
    Vector* out = reinterpret_cast<Vector*>(to);
    const Vector* in = reinterpret_cast<const Vector*>(from);
    int64 n = bytes / 16;
    int64 i = block.rank();
    if (from) {
      for (; i + (FLIGHT - 1) * (int64)block.size() < n; i += FLIGHT * (int64)block.size()) {
        Vector held[FLIGHT];
#pragma unroll
        for (int k = 0; k < FLIGHT; ++k) held[k] = in[i + k * (int64)block.size()];
#pragma unroll
        for (int k = 0; k < FLIGHT; ++k) out[i + k * (int64)block.size()] = held[k];
      }
      for (; i < n; i += block.size()) out[i] = in[i];
    } else {
      for (; i < n; i += block.size()) out[i] = Vector{{0, 0, 0, 0}};
    }
  } else {
    for (int64 i = block.rank(); i < bytes; i += block.size()) to[i] = from ? from[i] : 0;
  }
}

// Weights of this rank's experts into the slots of other ranks.
struct Place {
  Peers peers;
  Replicas replicas;
  Parts parts;
  const char* const* home;  // [homes * parameters]
  char* const* slots;       // [ranks]: each one's weight slots
  uint32* counter;
  uint64 call;
  Patience patience;

  size_t shared_bytes() const { return OwnReplicas::bytes(peers.ranks, replicas.slots) + 16; }

  ULTRAEP_DEVICE void operator()(Block block, char* shared) const {
    int* word = reinterpret_cast<int*>(shared);
    OwnReplicas own(shared + 16, peers.ranks, replicas.slots);
    own.find(block, replicas, peers);
    if (*own.count == 0) return;  // all blocks alike
    if (block.rank() == 0) {
      *word = 1;
      for (int i = 0; i < *own.count; ++i)
        if (!wait_for(peers.flags[peers.rank], peers.ranks, FREE, own.entries[i].rank, call, patience)) *word = 0;
    }
    block.sync();
    if (*word == 0) return;
    int pieces = parts.pieces;
    // Neighbouring pieces go to different ranks, so that all their links are busy.
    for (int work = block.id(); work < pieces * *own.count; work += block.count()) {
      OwnReplicas::Entry entry = own.entries[work % *own.count];
      int parameter;
      int64 start, bytes;
      parts.piece(work / *own.count, parameter, start, bytes);
      copy_piece(block, slots[entry.rank] + entry.slot * parts.stride + parts.offsets[parameter] + start,
                 home[entry.place * parts.parameters + parameter] + start, bytes);
    }
    if (last_to_finish(block, counter, word))
      for (int i = block.rank(); i < *own.count; i += block.size()) tell(peers, PLACED, own.entries[i].rank, call);
  }
};

// One warp: until all replicas of this rank are in their slots.
struct AwaitPlaced {
  Peers peers;
  Replicas replicas;
  uint64 call;
  Patience patience;

  ULTRAEP_DEVICE void operator()(Block block, char*) const {
    for (int slot = block.rank(); slot < replicas.slots; slot += block.size()) {
      int expert = replicas.expert(peers.rank, slot);
      if (expert >= 0)
        wait_for(peers.flags[peers.rank], peers.ranks, PLACED, replicas.home(expert), call, patience);
    }
  }
};

// Element types of gradients. Sums are made in a type that is at least float32 and rounded once.
struct Float32 {
  using Stored = float;
  using Sum = float;
  static ULTRAEP_DEVICE float up(float x) { return x; }
  static ULTRAEP_DEVICE float down(float x) { return x; }
};
struct Float64 {
  using Stored = double;
  using Sum = double;
  static ULTRAEP_DEVICE double up(double x) { return x; }
  static ULTRAEP_DEVICE double down(double x) { return x; }
};
struct BFloat16 {
  using Stored = uint16_t;
  using Sum = float;
  static ULTRAEP_DEVICE float up(uint16_t x) {
    uint32 bits = (uint32)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  // To nearest, ties to even; NaN stays NaN.
  static ULTRAEP_DEVICE uint16_t down(float x) {
    uint32 bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Float16 {
#if defined(__CUDACC__)
  using Stored = __half;
  static ULTRAEP_DEVICE float up(__half x) { return __half2float(x); }
  static ULTRAEP_DEVICE __half down(float x) { return __float2half_rn(x); }
#else
  using Stored = _Float16;
  static ULTRAEP_DEVICE float up(_Float16 x) { return (float)x; }
  static ULTRAEP_DEVICE _Float16 down(float x) { return (_Float16)x; }
#endif
  using Sum = float;
};

// Gradients of replicas added to their homes': home + replica of the lowest rank + next ...
template <class Type>
struct Reduce {
  using Stored = typename Type::Stored;
  using Sum = typename Type::Sum;
  static constexpr int LANES = 16 / sizeof(Stored);
  static constexpr int FLIGHT = 8;  // loads under way before the first sum
  struct alignas(16) Pack {
    Stored elements[LANES];
  };

  Peers peers;
  Replicas replicas;
  Parts parts;
  char* const* home;         // [homes * parameters]: what is added to
  const char* const* slots;  // [ranks]: each one's gradient slots
  uint32* counter;
  uint64 call;
  Patience patience;

  size_t shared_bytes() const { return OwnReplicas::bytes(peers.ranks, replicas.slots) + 16; }

  ULTRAEP_DEVICE void operator()(Block block, char* shared) const {
    int* word = reinterpret_cast<int*>(shared);
    OwnReplicas own(shared + 16, peers.ranks, replicas.slots);
    own.find(block, replicas, peers);
    if (*own.count == 0) return;
    if (block.rank() == 0) {
      *word = 1;
      for (int i = 0; i < *own.count; ++i)
        if (!wait_for(peers.flags[peers.rank], peers.ranks, READY, own.entries[i].rank, call, patience)) *word = 0;
    }
    block.sync();
    if (*word == 0) return;
    int pieces = parts.pieces, owners = *own.owners;
    for (int work = block.id(); work < pieces * owners; work += block.count()) {
      int first = own.first[work % owners], last = own.first[work % owners + 1];
      int parameter;
      int64 start, bytes;
      parts.piece(work / owners, parameter, start, bytes);
      add_piece(block, home[own.entries[first].place * parts.parameters + parameter] + start,
                parts.offsets[parameter] + start, bytes, own.entries + first, last - first);
    }
    if (last_to_finish(block, counter, word))
      for (int i = block.rank(); i < *own.count; i += block.size()) tell(peers, TAKEN, own.entries[i].rank, call);
  }

  ULTRAEP_DEVICE const char* source(const OwnReplicas::Entry& entry, size_t offset) const {
    return slots[entry.rank] + entry.slot * parts.stride + offset;
  }

  ULTRAEP_DEVICE void add_piece(Block block, char* to, size_t offset, int64 bytes, const OwnReplicas::Entry* entries,
                                int count) const {
    int64 size = block.size();
    if (aligned(to, source(entries[0], offset), bytes)) {
      Pack* out = reinterpret_cast<Pack*>(to);
      int64 n = bytes / 16;
      int64 i = block.rank();
      for (; i + (FLIGHT - 1) * size < n; i += FLIGHT * size) add_packs<FLIGHT>(out, i, size, offset, entries, count);
      for (; i < n; i += size) add_packs<1>(out, i, size, offset, entries, count);
    } else {
      Stored* out = reinterpret_cast<Stored*>(to);
      for (int64 i = block.rank(); i < bytes / (int64)sizeof(Stored); i += size) {
        Sum sum = Type::up(out[i]);
        for (int k = 0; k < count; ++k)
          sum += Type::up(reinterpret_cast<const Stored*>(source(entries[k], offset))[i]);
        out[i] = Type::down(sum);
      }
    }
  }

  template <int N>
  ULTRAEP_DEVICE void add_packs(Pack* out, int64 at, int64 step, size_t offset, const OwnReplicas::Entry* entries,
                                int count) const {
    Sum sums[N][LANES];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Pack own = out[at + j * step];
#pragma unroll
      for (int l = 0; l < LANES; ++l) sums[j][l] = Type::up(own.elements[l]);
    }
    for (int k = 0; k < count; ++k) {
      const Pack* in = reinterpret_cast<const Pack*>(source(entries[k], offset));
      Pack held[N];
#pragma unroll
      for (int j = 0; j < N; ++j) held[j] = in[at + j * step];
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int l = 0; l < LANES; ++l) sums[j][l] += Type::up(held[j].elements[l]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Pack result;
#pragma unroll
      for (int l = 0; l < LANES; ++l) result.elements[l] = Type::down(sums[j][l]);
      out[at + j * step] = result;
    }
  }
};

// Until the homes have taken the gradients of this rank's replicas; then, if asked, filled slots are zero again.
struct Clear {
  Peers peers;
  Replicas replicas;
  Parts parts;
  char* slots;  // this rank's gradient slots
  bool zero;
  uint64 call;
  Patience patience;

  ULTRAEP_DEVICE void operator()(Block block, char* shared) const {
    int* word = reinterpret_cast<int*>(shared);
    if (block.rank() == 0) {
      *word = 1;
      for (int slot = 0; slot < replicas.slots; ++slot) {
        int expert = replicas.expert(peers.rank, slot);
        if (expert >= 0 &&
            !wait_for(peers.flags[peers.rank], peers.ranks, TAKEN, replicas.home(expert), call, patience))
          *word = 0;
      }
    }
    block.sync();
    if (!zero || *word == 0) return;
    int pieces = parts.pieces;
    for (int slot = 0; slot < replicas.slots; ++slot) {
      if (replicas.expert(peers.rank, slot) < 0) continue;
      for (int work = block.id(); work < pieces; work += block.count()) {
        int parameter;
        int64 start, bytes;
        parts.piece(work, parameter, start, bytes);
        copy_piece(block, slots + slot * parts.stride + parts.offsets[parameter] + start, nullptr, bytes);
      }
    }
  }
};

// Gradients that autograd made of replicas, into the gradient slots: filled slots alone are read.
template <class From, class To>
struct Stash {
  Peers peers;
  Replicas replicas;
  Parts parts;               // of gradient slots
  const char* const* grads;  // [slots * parameters]; null: zeros
  char* slots;               // this rank's gradient slots

  ULTRAEP_DEVICE void operator()(Block block, char*) const {
    int pieces = parts.pieces;
    for (int slot = 0; slot < replicas.slots; ++slot) {
      if (replicas.expert(peers.rank, slot) < 0) continue;
      for (int work = block.id(); work < pieces; work += block.count()) {
        int parameter;
        int64 start, bytes;
        parts.piece(work, parameter, start, bytes);
        int64 at = start / (int64)sizeof(typename To::Stored), n = bytes / (int64)sizeof(typename To::Stored);
        typename To::Stored* out =
            reinterpret_cast<typename To::Stored*>(slots + slot * parts.stride + parts.offsets[parameter]) + at;
        const typename From::Stored* in =
            reinterpret_cast<const typename From::Stored*>(grads[slot * parts.parameters + parameter]);
        for (int64 i = block.rank(); i < n; i += block.size())
          out[i] = To::down(in ? (typename To::Sum)From::up(in[at + i]) : (typename To::Sum)0);
      }
    }
  }
};

// One block: what a dispatcher counts, of one rank's part of a plan's quota `[ranks, ranks * width]`.
struct Splits {
  const int64* quota;
  const int64* replica_expert;  // [ranks, slots]
  // Sent [ranks], received [ranks], tokens of its physical experts [width], received [ranks, width], replicas of all.
  int64* out;
  int64* told;  // the same in memory of the host, or null
  int ranks, width, slots, source;

  ULTRAEP_DEVICE void operator()(Block block, char*) const {
    size_t row = (size_t)ranks * width;
    const int64* sent = quota + source * row;
    const int64* received = quota + (size_t)source * width;
    for (int i = block.rank(); i < ranks; i += block.size()) {
      int64 to = 0, from = 0;
      for (int place = 0; place < width; ++place) {
        to += sent[(size_t)i * width + place];
        from += received[i * row + place];
      }
      put(i, to);
      put(ranks + i, from);
    }
    for (int place = block.rank(); place < width; place += block.size()) {
      int64 tokens = 0;
      for (int rank = 0; rank < ranks; ++rank) tokens += received[rank * row + place];
      put(2 * ranks + place, tokens);
    }
    for (int i = block.rank(); i < ranks * width; i += block.size())
      put(2 * ranks + width + i, received[i / width * row + i % width]);
    if (block.warp() == 0) {
      Warp warp;
      int32 replicas = 0;
      for (int start = 0; start < ranks * slots; start += warp.size()) {
        const int i = start + warp.rank();
        int32 found;
        warp.sum_before(i < ranks * slots && replica_expert[i] >= 0 ? 1 : 0, found);
        replicas += found;
      }
      if (warp.rank() == 0) put(2 * ranks + width + ranks * width, replicas);
    }
  }

 private:
  ULTRAEP_DEVICE void put(int i, int64 value) const {
    out[i] = value;
    if (told != nullptr) told[i] = value;
  }
};

// Artificial lateness, for tests: the stream stands still for so long.
struct Delay {
  uint64 ns;

  ULTRAEP_DEVICE void operator()(Block, char*) const {
    uint64 started = now_ns();
    while (now_ns() - started < ns) {
    }
  }
};

}  // namespace ultraep
