// Teams of many members on one CPU thread, for tests: what a GPU runs in parallel, in a random order.
//
// Every member is a fiber that runs until its next collective call. There it waits for the others of its team, and the
// next fiber is picked at random, so a missing `sync` shows as a wrong result sooner or later. Members of one team in
// different collective calls, and members that wait for one that has left, are reported. What this does not show:
// writes that a `sync` would have made visible but another collective call does not.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace ultraep {
namespace lanes {

constexpr int kWidth = 32;  // members of a warp
constexpr size_t kStack = 64 * 1024;
constexpr size_t kLargestValue = 32;

// Where the members of a team wait for each other and leave the values that they exchange.
struct Meeting {
  int members = 0;
  int waiting = 0;
  unsigned generation = 0;
  int kind = 0;
  // Two sets: while some members read the last exchange, others may already take part in the next.
  alignas(16) char values[2][kWidth][kLargestValue];
};

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Meeting* waits_at = nullptr;
  unsigned generation = 0;
  bool done = false;
};

// The threads of one block.
struct Machine {
  std::vector<Lane> lanes;
  std::vector<Meeting> warps;
  Meeting block;
  ucontext_t scheduler;
  int current = 0;
  uint32_t state = 1;
  const char* failure = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;

  uint32_t random() {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
  }
};

inline Machine*& machine() {
  static Machine* current = nullptr;
  return current;
}

inline int current() { return machine()->current; }

inline void yield() {
  Machine& m = *machine();
  swapcontext(&m.lanes[m.current].context, &m.scheduler);
}

// Wait until all members are here; `kind` tells collective calls apart. Returns which set of values was used.
inline int meet(Meeting& meeting, int kind) {
  Machine& m = *machine();
  if (meeting.waiting > 0 && meeting.kind != kind) {
    m.failure = "members of a team are in different collective calls";
    yield();  // never comes back
  }
  meeting.kind = kind;
  const int set = meeting.generation & 1;
  Lane& lane = m.lanes[m.current];
  lane.waits_at = &meeting;
  lane.generation = meeting.generation;
  if (++meeting.waiting == meeting.members) {
    meeting.waiting = 0;
    ++meeting.generation;
  }
  yield();
  return set;
}

// Every member's value, in `all`.
template <class T>
void exchange(int kind, T value, T (&all)[kWidth]) {
  static_assert(sizeof(T) <= kLargestValue, "value too large to exchange");
  Meeting& meeting = machine()->warps[current() / kWidth];
  std::memcpy(meeting.values[meeting.generation & 1][current() % kWidth], &value, sizeof(T));
  const int set = meet(meeting, kind);
  for (int i = 0; i < kWidth; ++i) std::memcpy(&all[i], meeting.values[set][i], sizeof(T));
}

inline void enter() {
  Machine& m = *machine();
  m.body(m.argument);
  m.lanes[m.current].done = true;
  yield();
}

// Run `body(argument)` in every thread of a block; returns what went wrong, or null.
inline const char* run_block(int threads, uint32_t seed, void (*body)(void*), void* argument) {
  static std::unique_ptr<Machine> kept;
  if (!kept) kept = std::make_unique<Machine>();
  Machine& m = *kept;
  machine() = &m;
  if ((int)m.lanes.size() < threads) m.lanes.resize(threads);
  m.warps.assign(threads / kWidth, Meeting{});
  for (Meeting& warp : m.warps) warp.members = kWidth;
  m.block = Meeting{};
  m.block.members = threads;
  m.failure = nullptr;
  m.state = seed;
  m.body = body;
  m.argument = argument;
  for (int i = 0; i < threads; ++i) {
    Lane& lane = m.lanes[i];
    if (!lane.stack) lane.stack = std::make_unique<char[]>(kStack);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, enter, 0);
    lane.waits_at = nullptr;
    lane.done = false;
  }
  std::vector<int> ready;
  uint32_t held_back = 0;  // warps, modulo 16
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (int i = 0; i < threads; ++i) {
      const Lane& lane = m.lanes[i];
      all_done &= lane.done;
      if (!lane.done && (!lane.waits_at || lane.waits_at->generation != lane.generation)) ready.push_back(i);
    }
    if (all_done) return nullptr;
    if (ready.empty()) return "some members wait for others that never come";
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[m.random() % i]);
    // Some warps, and some members of the others, are held back, so that the rest runs ahead as far as it can.
    if (m.random() % 16 == 0) held_back = m.random();
    const auto waits = [&](int i) { return (held_back >> (i / kWidth % 16) & 1) != 0; };
    if (std::all_of(ready.begin(), ready.end(), waits)) held_back = 0;
    for (size_t i = 0; i < ready.size(); ++i) {
      if (waits(ready[i]) || (i > 0 && m.random() % 4 == 0)) continue;
      m.current = ready[i];
      m.lanes[m.current].waits_at = nullptr;
      swapcontext(&m.scheduler, &m.lanes[m.current].context);
      if (m.failure) return m.failure;
    }
  }
}

}  // namespace lanes

enum { kSync, kBlockSync, kAny, kReduce, kSumBefore, kFrom, kCount, kCountBefore, kMembers };

struct Warp {
  static constexpr int kWidth = lanes::kWidth;
  int rank() const { return lanes::current() % lanes::kWidth; }
  int size() const { return lanes::kWidth; }
  void sync() const { lanes::meet(lanes::machine()->warps[lanes::current() / lanes::kWidth], kSync); }
  bool any(bool value) const {
    bool all[lanes::kWidth];
    lanes::exchange(kAny, value, all);
    return std::any_of(all, all + lanes::kWidth, [](bool b) { return b; });
  }
  uint32 members(bool value) const {
    bool all[lanes::kWidth];
    lanes::exchange(kMembers, value, all);
    uint32 set = 0;
    for (int i = 0; i < lanes::kWidth; ++i) set |= (uint32)all[i] << i;
    return set;
  }
  int count(bool value) const {
    bool all[lanes::kWidth];
    lanes::exchange(kCount, value, all);
    return (int)std::count(all, all + lanes::kWidth, true);
  }
  int count_before(bool value, int& total) const {
    bool all[lanes::kWidth];
    lanes::exchange(kCountBefore, value, all);
    total = (int)std::count(all, all + lanes::kWidth, true);
    return (int)std::count(all, all + rank(), true);
  }
  template <class T, class Join>
  T reduce(T value, Join join) const {
    T all[lanes::kWidth];
    lanes::exchange(kReduce, value, all);
    for (int i = 1; i < lanes::kWidth; ++i) all[0] = join(all[0], all[i]);
    return all[0];
  }
  template <class T>
  T sum(T value) const {
    return reduce(value, [](T a, T b) { return (T)(a + b); });
  }
  template <class T>
  T min(T value) const {
    return reduce(value, [](T a, T b) { return smaller(a, b); });
  }
  template <class T>
  T max(T value) const {
    return reduce(value, [](T a, T b) { return larger(a, b); });
  }
  template <class T>
  T sum_before(T value, T& total) const {
    T all[lanes::kWidth];
    lanes::exchange(kSumBefore, value, all);
    T before = 0;
    total = 0;
    for (int i = 0; i < lanes::kWidth; ++i) {
      if (i == rank()) before = total;
      total += all[i];
    }
    return before;
  }
  template <class T>
  T from(T value, int member) const {
    T all[lanes::kWidth];
    lanes::exchange(kFrom, value, all);
    return all[member];
  }
};

struct Block {
  int block, blocks, threads;
  int rank() const { return lanes::current(); }
  int size() const { return threads; }
  int id() const { return block; }
  int count() const { return blocks; }
  int warp() const { return lanes::current() / lanes::kWidth; }
  int warps() const { return threads / lanes::kWidth; }
  void sync() const { lanes::meet(lanes::machine()->block, kBlockSync); }
};

// Blocks one after the other, each in another order of its threads. Shared memory is poisoned before each.
template <class Kernel>
int launch(const Kernel& kernel, int blocks, int threads, size_t shared, void*) {
  struct Call {
    const Kernel& kernel;
    Block block;
    char* shared;
  };
  std::vector<uint64> memory(shared / 8 + 2);
  for (int block = 0; block < blocks; ++block) {
    std::fill(memory.begin(), memory.end(), 0xA5A5A5A5A5A5A5A5ull);
    char* start = reinterpret_cast<char*>(memory.data());
    start += (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
    Call call{kernel, Block{block, blocks, threads}, start};
    const char* failure = lanes::run_block(
        threads, 12345u + (uint32_t)block,
        [](void* argument) {
          Call& c = *static_cast<Call*>(argument);
          c.kernel(c.block, c.shared);
        },
        &call);
    if (failure) {
      std::fprintf(stderr, "block %d: %s\n", block, failure);
      return 1;
    }
  }
  return 0;
}

}  // namespace ultraep
