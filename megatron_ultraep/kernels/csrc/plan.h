// The planner of plan/search.py and plan/quota.py on a GPU, bit for bit: `Search` decides, `Fill` writes the plan.
//
// Legend as in plan/search.py: D ranks of a node, L home experts of a rank, R slots of a rank, G ranks, E experts, P
// physical experts; a place is a home slot counted inside the node. Tokens of all ranks are at most 2^30, so counts,
// and targets minus counts, fit int32; so does every sum of slacks that is compared (see `receiver`).
#pragma once

#include "team.h"

namespace ultraep {
namespace plan {

// plan/search.py has the same list.
enum Outcome { kBalanced, kWithinTolerance, kGainBelowCost, kNoReplicaPossible, kEmpty };

constexpr int kPolicies = 2;
constexpr int kSteps = 8;                     // targets of a ladder
constexpr int kLadder = kPolicies * kSteps;   // attempts of a ladder
constexpr int kMostWarps = kPolicies + kLadder;  // the first target and a ladder side by side
constexpr int kWaves = 3;
constexpr int kDecision = 6;  // numbers of a decision: outcome, before, after, bound, saved_ps, cost_ps
constexpr uint32 kNoName = ~0u;
constexpr int32 kMost = 0x7fffffff;

// Hands out memory piece by piece, aligned to 16 bytes; counts only where there is none.
struct Arena {
  char* start;
  size_t used;

  template <class T>
  ULTRAEP_BOTH T* take(size_t count) {
    T* piece = start ? reinterpret_cast<T*>(start + used) : nullptr;
    used += (count * sizeof(T) + 15) / 16 * 16;
    return piece;
  }
};

// A rank below the target that has a slot left.
struct alignas(8) Receiver {
  int32 slack;
  int32 rank;
};

struct alignas(8) Replica {
  uint16_t place;
  uint16_t rank;
  uint16_t home;    // rank of the place
  uint16_t number;  // replicas that its rank had before it
};

// What fills a slot, before it is known which slot: the name of a place, and tokens.
struct alignas(8) Held {
  uint32 name;
  int32 tokens;
};

// The best attempt of a warp.
struct Best {
  int64 key;
  int32 count;  // replicas; 0: no attempt was better than no replicas
  int32 peak;
  int32 attempt;  // its number
  int32 lowest;   // lowest peak of all attempts of the warp, kept or not
  int32 buffer;   // where its replicas are

  // The earlier of equals is kept, and an attempt that counts has a replica (without one the peak is what it was), so
  // taking the attempts in order and keeping the first best is the same as this order, which is total.
  ULTRAEP_DEVICE bool better_than(const Best& other) const {
    if (count == 0 || other.count == 0) return count != 0;
    if (key != other.key) return key < other.key;
    if (count != other.count) return count < other.count;
    if (peak != other.peak) return peak < other.peak;
    return attempt < other.attempt;
  }
};

// A node in shared memory, as all attempts see it.
struct Node {
  int32* tokens;    // [D L] of the expert at each place
  uint32* name;     // [D L] logical expert * 2^16 + place: orders places by expert
  int32* load;      // [D]
  int32* hottest;   // [D] ranks by load, descending; ties to the lower rank
  int32* coldest;   // [D] ranks by load, ascending; ties to the lower rank
  Best* best;       // [waves, warps]
  int32* partial;   // [threads]

  ULTRAEP_BOTH void place(Arena& arena, int ranks, int homes) {
    tokens = arena.take<int32>(ranks * homes);
    name = arena.take<uint32>(ranks * homes);
    load = arena.take<int32>(ranks);
    hottest = arena.take<int32>(ranks);
    coldest = arena.take<int32>(ranks);
    best = arena.take<Best>(kWaves * kMostWarps);
    partial = arena.take<int32>(kMostWarps * 32);
  }
};

// What one attempt works on, in shared memory, and the replicas of the best one before it.
struct Scratch {
  int32* home_tokens;   // [D L]
  int32* slack;         // [D]
  int32* received;      // [D] replicas
  int32* mark;          // [D] the relay that last found a replica of its expert here
  Receiver* receivers;  // [D] by slack, descending; ties to the lower rank
  uint32* until;        // [D + 1] sums of the receivers' slacks
  Replica* replicas;     // [2, D R]
  int32* replica_tokens;  // [2, D R]

  ULTRAEP_BOTH void place(Arena& arena, int ranks, int homes, int slots) {
    home_tokens = arena.take<int32>(ranks * homes);
    slack = arena.take<int32>(ranks);
    received = arena.take<int32>(ranks);
    mark = arena.take<int32>(ranks);
    receivers = arena.take<Receiver>(ranks);
    until = arena.take<uint32>(ranks + 1);
    replicas = arena.take<Replica>(2 * ranks * slots);
    replica_tokens = arena.take<int32>(2 * ranks * slots);
  }
};

ULTRAEP_BOTH size_t search_block_bytes(int ranks, int homes) {
  Arena arena{nullptr, 0};
  Node node;
  node.place(arena, ranks, homes);
  return arena.used;
}

ULTRAEP_BOTH size_t search_warp_bytes(int ranks, int homes, int slots) {
  Arena arena{nullptr, 0};
  Scratch scratch;
  scratch.place(arena, ranks, homes, slots);
  return arena.used;
}

// One attempt (`_attempt`), by one warp. What is called uniform is the same for all its members.
struct Attempt {
  const Node& node;
  Scratch& scratch;
  int ranks, homes, slots;
  int32 min_tokens;
  Warp warp;

  // Out; uniform.
  int count;
  int32 peak;
  int link;

  ULTRAEP_DEVICE void run(int32 target, bool cold_first, int buffer) {
    const int lane = warp.rank(), lanes = warp.size();
    Replica* replicas = scratch.replicas + buffer * ranks * slots;
    int32* replica_tokens = scratch.replica_tokens + buffer * ranks * slots;
    for (int i = lane; i < ranks * homes; i += lanes) scratch.home_tokens[i] = node.tokens[i];
    int32 hot = 0, roomy = 0;
    for (int i = lane; i < ranks; i += lanes) {
      const int32 slack = target - node.load[i];
      scratch.slack[i] = slack;
      scratch.received[i] = 0;
      scratch.mark[i] = 0;
      hot += slack < 0;
      roomy += slack >= min_tokens;
      // Cold ranks first, so the receivers are the beginning of this list; what follows is not looked at.
      const int32 rank = node.coldest[i];
      scratch.receivers[i] = Receiver{target - node.load[rank], rank};
    }
    const int givers = warp.sum(hot);
    int room = slots ? warp.sum(roomy) : 0;
    int relays = 0;
    count = 0;
    link = 0;
    warp.sync();
    for (int turn = 0; turn < givers; ++turn) {
      const int giver = node.hottest[cold_first ? givers - 1 - turn : turn];
      int32 over = -scratch.slack[giver];  // uniform, as all that follows but in the loops over members
      int sent = 0;
      while (over > 0) {
        int32 tokens;
        const uint32 name = largest_expert(giver, tokens);
        const int place = (int)(name & 0xffff);
        if (tokens <= min_tokens) break;
        const int32 need = larger(over, min_tokens);
        int32 piece = smaller(need, tokens - 1);
        int rank, position = -1, relay = -1;
        int32 left = 0;  // slack of the rank
        if (room > 0) {
          position = receiver(need, room);
          const Receiver found = scratch.receivers[position];
          rank = found.rank;
          piece = smaller(piece, found.slack);
          left = found.slack - piece;
        } else {
          ++relays;
          relay = best_relay(place, giver, piece, replicas, relays);
          if (relay < 0) break;
          rank = replicas[relay].home;
        }
        const int received = scratch.received[rank];
        warp.sync();  // all have read what is written now
        if (lane == 0) {
          if (relay >= 0) {
            const Replica grown = replicas[relay];
            replica_tokens[relay] += piece;
            scratch.home_tokens[grown.place] -= piece;
            scratch.slack[grown.rank] -= piece;  // and the rank has as much more slack, for a moment
          } else {
            scratch.slack[rank] = left;
          }
          replicas[count] = Replica{(uint16_t)place, (uint16_t)rank, (uint16_t)giver, (uint16_t)received};
          replica_tokens[count] = piece;
          scratch.received[rank] = received + 1;
          scratch.home_tokens[place] = tokens - piece;
          scratch.slack[giver] = piece - over;
        }
        over -= piece;
        ++count;
        ++sent;
        link = larger(link, larger(sent, received + 1));
        if (position >= 0) room = reorder(position, room, received + 1 < slots && left >= min_tokens, left, rank);
        warp.sync();
      }
    }
    int32 least = kMost;
    for (int i = lane; i < ranks; i += lanes) least = smaller(least, scratch.slack[i]);
    peak = target - warp.min(least);
    warp.sync();  // before the next attempt writes
  }

  // `_largest_expert`: name of the place, uniform.
  ULTRAEP_DEVICE uint32 largest_expert(int rank, int32& tokens) const {
    int32 most = -1;
    uint32 name = kNoName;
    for (int i = rank * homes + warp.rank(); i < (rank + 1) * homes; i += warp.size()) {
      const int32 here = scratch.home_tokens[i];
      const uint32 its_name = node.name[i];
      if (here > most || (here == most && its_name < name)) {
        most = here;
        name = its_name;
      }
    }
    tokens = warp.max(most);
    return warp.min(most == tokens ? name : kNoName);
  }

  // `_receiver`: the position to begin at, uniform.
  //
  // Slacks descend, so the sum of a run of `width` ranks does not grow with its start: the runs that hold the need come
  // first, the loop of the original ends after them, and it keeps the first of the least. That is the first of the
  // least among all runs that hold the need, in any order of looking.
  //
  // Arithmetic modulo 2^32 is enough: the first `width - 1` slacks are less than the need and one more slack is at most
  // 2^30, so every sum up to the first that holds the need, and every run, is below 2^31.
  ULTRAEP_DEVICE int receiver(int32 need, int room) {
    const int lane = warp.rank(), lanes = warp.size();
    const Receiver* receivers = scratch.receivers;
    int32 least = kMost;
    int first = kMost;
    if (receivers[0].slack >= need) {  // one rank is enough
      for (int i = lane; i < room; i += lanes) {
        const int32 slack = receivers[i].slack;
        if (slack >= need && slack < least) {
          least = slack;
          first = i;
        }
      }
    } else {
      uint32* until = scratch.until;
      const int width = sum_until(need, room);
      if (width == 0) return 0;
      for (int i = lane; i + width <= room; i += lanes) {
        const int32 run = (int32)(until[i + width] - until[i]);
        if (run >= need && run < least) {
          least = run;
          first = i;
        }
      }
    }
    const int32 of_all = warp.min(least);
    return warp.min(least == of_all ? first : kMost);
  }

  // Sums of the slacks into `until`; how many ranks from the first on hold the need, 0 where all do not. Uniform.
  ULTRAEP_DEVICE int sum_until(int32 need, int room) {
    uint32 carry = 0;
    int short_of = 0;  // ranks from the first on that do not hold it
    bool held = false;
    if (warp.rank() == 0) scratch.until[0] = 0;
    for (int start = 0; start < room; start += warp.size()) {
      const int i = start + warp.rank();
      const uint32 slack = i < room ? (uint32)scratch.receivers[i].slack : 0;
      uint32 total;
      const uint32 sum = carry + warp.sum_before(slack, total) + slack;
      if (i < room) scratch.until[i + 1] = sum;
      if (!held) {
        // Sums grow until the first that holds the need; what comes after it may have wrapped.
        const int holds = warp.min(i < room && sum >= (uint32)need ? i : kMost);
        held = holds != kMost;
        short_of = held ? holds : room;
      }
      carry += total;
    }
    warp.sync();
    return held ? short_of + 1 : 0;
  }

  // `_reorder`: move the receiver at a position, whose slack is now `left`, back to where it belongs, or out. Returns
  // how many receivers are left, uniform. All members have read the receiver before.
  ULTRAEP_DEVICE int reorder(int position, int room, bool usable, int32 left, int rank) {
    Receiver* receivers = scratch.receivers;
    int moved = 0;
    // Receivers are in order, so those that now come before it are the next ones, without a gap: they move up by one.
    for (int start = position + 1; start < room; start += warp.size()) {
      const int i = start + warp.rank();
      const Receiver next = i < room ? receivers[i] : Receiver{0, 0};
      const bool ahead =
          i < room && (!usable || next.slack > left || (next.slack == left && next.rank < rank));
      const int here = warp.count(ahead);
      warp.sync();  // all have read before any writes; the next round reads only what this one does not write
      if (ahead) receivers[i - 1] = next;
      moved += here;
      if (here < warp.size()) break;
    }
    if (warp.rank() == 0) receivers[position + moved] = Receiver{left, rank};
    return usable ? room : room - 1;
  }

  // `_relay`: the replica that can grow the most, at most by `piece`, which is set to how much; -1 for none. Uniform.
  ULTRAEP_DEVICE int best_relay(int place, int giver, int32& piece, const Replica* replicas, int relays) {
    const int lane = warp.rank(), lanes = warp.size();
    for (int i = lane; i < count; i += lanes)
      if (replicas[i].place == place) scratch.mark[replicas[i].rank] = relays;
    warp.sync();
    int32 most = min_tokens - 1;
    int best = kMost;
    for (int i = lane; i < count; i += lanes) {
      const Replica replica = replicas[i];
      const int32 more =
          smaller(piece, smaller(scratch.slack[replica.rank], scratch.home_tokens[replica.place] - 1));
      if (more > most && replica.home != giver && scratch.received[replica.home] != slots &&
          scratch.mark[replica.home] != relays) {
        most = more;
        best = i;
      }
    }
    const int32 of_all = warp.max(best == kMost ? -1 : most);
    if (of_all < 0) return -1;
    piece = of_all;
    return warp.min(best != kMost && most == of_all ? best : kMost);
  }
};

// One block for each node: which replicas exist, how many tokens each takes, and the decision (`_balance`).
struct Search {
  const int64* loads;      // [G, E]
  const int32* expert_at;  // [E]
  int64* decisions;        // [nodes, 6], written; idle nodes are not spared yet
  int32* held;             // [G, R, 2], written: place (-1 for none) and tokens of every slot
  int experts, ranks, node_size, homes, slots;
  int32 min_tokens;
  int64 tolerance_ppm;
  int64 gated, token_ps, replica_ps, fixed_ps;

  ULTRAEP_DEVICE void operator()(const Block& block, char* shared) const {
    const Warp warp{};
    Arena arena{shared, 0};
    Node node;
    node.place(arena, node_size, homes);
    const size_t warp_bytes = search_warp_bytes(node_size, homes, slots);
    char* scratches = shared + arena.used;
    Scratch scratch = scratch_of(scratches + block.warp() * warp_bytes);

    count_tokens(block, node);
    order_ranks(block, node);

    int32 sum = 0, most = 0;
    for (int i = warp.rank(); i < node_size; i += warp.size()) {
      sum += node.load[i];
      most = larger(most, node.load[i]);
    }
    const int32 total = warp.sum(sum);
    const int32 before = warp.max(most);
    const int32 bound = (int32)(((int64)total + node_size - 1) / node_size);
    // At most twice the bound: int64, and below `before` wherever it is a target.
    const int64 tolerated = (int64)bound * (1000000 + tolerance_ppm) / 1000000;
    int64 decision[kDecision] = {total == 0 ? kEmpty : kWithinTolerance, before, before, bound, 0, 0};
    if (before <= tolerated) {
      write(block, decision, nullptr, 0);
      return;
    }

    // The first ladder has one target; the second runs beside it where it is wanted anyhow, and where there are warps
    // for both it does so on the chance that it is.
    const bool together = gated || block.warps() >= kMostWarps;
    Attempt attempt{node, scratch, node_size, homes, slots, min_tokens, warp, 0, 0, 0};
    Best best{0, 0, before, 0, before, 0};
    int32 lowest = before;
    int compared = block.warps();
    const Best* all = node.best;
    for (int wave = 0; wave < kWaves; ++wave) {
      if (wave == 1 && together) continue;
      if (wave > 0 && lowest <= tolerated) break;
      const int begin = wave == 0 ? 0 : wave == 1 ? kPolicies : kPolicies + kLadder;
      const int end = wave == 0 ? (together ? kPolicies + kLadder : kPolicies) : begin + kLadder;
      const int32 top = wave == 2 ? lowest : before;
      for (int i = begin + block.warp(); i < end; i += block.warps()) {
        int32 target = (int32)tolerated;
        if (i >= kPolicies) target += (int32)((int64)(top - target) * ((i - kPolicies) % kLadder / kPolicies + 1) / kSteps);
        attempt.run(target, i % kPolicies == 1, 1 - best.buffer);
        const int32 peak = attempt.peak;
        best.lowest = smaller(best.lowest, peak);
        if (peak >= before) continue;
        const int64 key = gated ? token_ps * peak + replica_ps * attempt.link + fixed_ps : larger<int64>(peak, tolerated);
        const Best next{key, attempt.count, peak, i, best.lowest, 1 - best.buffer};
        if (next.better_than(best)) best = next;
      }
      // A row for each wave: nobody writes what others may still be reading.
      Best* row = node.best + wave * kMostWarps;
      if (warp.rank() == 0) row[block.warp()] = best;
      block.sync();
      all = row;
      if (wave == 0 && !gated && block.warps() >= kMostWarps) {
        const int32 first = smaller(row[0].lowest, row[1].lowest);
        if (first <= tolerated) {  // the second ladder would not have run
          compared = kPolicies;
          break;
        }
      }
      for (int i = 0; i < block.warps(); ++i) lowest = smaller(lowest, row[i].lowest);
    }

    int winner = 0;
    for (int i = 1; i < compared; ++i)
      if (all[i].better_than(all[winner])) winner = i;
    best = all[winner];
    if (best.count == 0) {
      decision[0] = kNoReplicaPossible;
      write(block, decision, nullptr, 0);
      return;
    }
    if (gated) {
      decision[4] = token_ps * (before - best.peak);
      decision[5] = best.key - token_ps * best.peak;
      if (best.key >= token_ps * before) {
        decision[0] = kGainBelowCost;
        write(block, decision, nullptr, 0);
        return;
      }
    }
    decision[0] = kBalanced;
    decision[2] = best.peak;
    const Scratch won = scratch_of(scratches + winner * warp_bytes);
    // Its other buffer is free: there the replicas are sorted by rank.
    const int used = best.buffer * node_size * slots, unused = node_size * slots - used;
    static_assert(sizeof(Held) <= sizeof(Replica), "the buffer holds a slot for each replica");
    Held* by_rank = reinterpret_cast<Held*>(won.replicas + unused);
    for (int i = block.rank(); i < node_size * slots; i += block.size()) by_rank[i] = Held{kNoName, 0};
    block.sync();
    for (int i = block.rank(); i < best.count; i += block.size()) {
      const Replica replica = won.replicas[used + i];
      by_rank[replica.rank * slots + replica.number] = Held{node.name[replica.place], won.replica_tokens[used + i]};
    }
    block.sync();
    write(block, decision, by_rank, slots);
  }

  ULTRAEP_DEVICE Scratch scratch_of(char* memory) const {
    Arena arena{memory, 0};
    Scratch scratch;
    scratch.place(arena, node_size, homes, slots);
    return scratch;
  }

  // Tokens and names of the places: sums over source ranks, dealt out over all threads, then over the shares.
  ULTRAEP_DEVICE void count_tokens(const Block& block, const Node& node) const {
    const int places = node_size * homes;
    const int32* here = expert_at + (int64)block.id() * places;
    const int shares = larger(1, block.size() / places);
    for (int i = block.rank(); i < places * shares; i += block.size()) {
      const int place = i % places;
      const int expert = here[place];
      const int64* load = loads + expert;
      int32 sum = 0;
#if defined(__CUDACC__)
#pragma unroll 16
#endif
      for (int source = i / places; source < ranks; source += shares) sum += (int32)load[(int64)source * experts];
      (shares > 1 ? node.partial : node.tokens)[i] = sum;
      if (i < places) node.name[place] = (uint32)expert << 16 | (uint32)place;
    }
    block.sync();
    if (shares == 1) return;
    for (int place = block.rank(); place < places; place += block.size()) {
      int32 sum = 0;
      for (int share = 0; share < shares; ++share) sum += node.partial[share * places + place];
      node.tokens[place] = sum;
    }
    block.sync();
  }

  // Loads of the ranks, and the ranks by load.
  ULTRAEP_DEVICE void order_ranks(const Block& block, const Node& node) const {
    for (int rank = block.rank(); rank < node_size; rank += block.size()) {
      int32 sum = 0;
      for (int place = rank * homes; place < (rank + 1) * homes; ++place) sum += node.tokens[place];
      node.load[rank] = sum;
    }
    block.sync();
    for (int rank = block.rank(); rank < node_size; rank += block.size()) {
      const int32 mine = node.load[rank];
      int more = 0, less = 0, equal = 0;
      for (int other = 0; other < node_size; ++other) {
        const int32 its = node.load[other];
        more += its > mine;
        less += its < mine;
        equal += its == mine && other < rank;
      }
      node.hottest[more + equal] = rank;
      node.coldest[less + equal] = rank;
    }
    block.sync();
  }

  // `_fill_slots` without the experts' names: slots of a rank are in the order of logical experts, empty ones last.
  ULTRAEP_DEVICE void write(const Block& block, const int64* decision, const Held* by_rank, int filled) const {
    const int first = block.id() * node_size * slots;
    for (int i = block.rank(); i < node_size * slots; i += block.size()) {
      const int rank = i / slots;
      const Held mine = filled ? by_rank[i] : Held{kNoName, 0};
      int slot = i - rank * slots;
      if (mine.name != kNoName) {  // the empty ones are last already, and have the largest name
        slot = 0;
        for (int other = rank * slots; other < (rank + 1) * slots; ++other) slot += by_rank[other].name < mine.name;
      }
      int32* out = held + 2 * (int64)(first + rank * slots + slot);
      out[0] = mine.name == kNoName ? -1 : (int32)(mine.name & 0xffff);
      out[1] = mine.tokens;
    }
    if (block.rank() == 0)
      for (int i = 0; i < kDecision; ++i) decisions[block.id() * kDecision + i] = decision[i];
  }
};

// What one warp of `Fill` works on, in shared memory.
struct Shares {
  int32* held;       // [D R, 2] of the node
  int32* column;     // [D] physical id of each copy
  int32* tokens;     // [D] of each copy, less what its own rank sends
  int32* local;      // [D] what its own rank sends
  int32* rest;       // [G] tokens of each source that have no copy yet
  int32* share;      // [G]
  int32* remainder;  // [G]

  ULTRAEP_BOTH void place(Arena& arena, int ranks, int node_size, int slots) {
    held = arena.take<int32>(2 * node_size * slots);
    column = arena.take<int32>(node_size);
    tokens = arena.take<int32>(node_size);
    local = arena.take<int32>(node_size);
    rest = arena.take<int32>(ranks);
    share = arena.take<int32>(ranks);
    remainder = arena.take<int32>(ranks);
  }
};

ULTRAEP_BOTH size_t fill_warp_bytes(int ranks, int node_size, int slots) {
  Arena arena{nullptr, 0};
  Shares shares;
  shares.place(arena, ranks, node_size, slots);
  return arena.used;
}

ULTRAEP_DEVICE int32 greatest_common_divisor(int32 a, int32 b) {
  while (b) {
    const int32 rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// The plan as tensors, from what `Search` decided. A warp at a time for each home place, slot and node.
struct Fill {
  const int64* loads;       // [G, E]
  const int32* expert_at;   // [E]
  const int64* decided;     // [nodes, 6]
  const int32* held;        // [G, R, 2]
  int64* replica_expert;    // [G, R], written
  int64* quota;             // [G, P], written
  int64* decisions;         // [nodes, 6], written
  int32* table;             // [E, 3 + 2 D], written
  int experts, ranks, node_size, homes, slots;
  int source;
  int gated;

  ULTRAEP_DEVICE int nodes() const { return ranks / node_size; }
  ULTRAEP_DEVICE int width() const { return homes + slots; }
  ULTRAEP_DEVICE int64 physical() const { return (int64)ranks * width(); }

  ULTRAEP_DEVICE void operator()(const Block& block, char* shared) const {
    const Warp warp{};
    Arena arena{shared + block.warp() * fill_warp_bytes(ranks, node_size, slots), 0};
    Shares shares;
    shares.place(arena, ranks, node_size, slots);
    // Homes first: they take longest.
    for (int task = block.id() * block.warps() + block.warp(); task < tasks(); task += block.count() * block.warps()) {
      const int slot = task - experts, node = slot - ranks * slots;
      if (task < experts) {
        fill_copies(warp, shares, task, has_replicas(warp, task / (node_size * homes)));
        warp.sync();  // `shares` is used again
      } else if (node < 0) {
        fill_slot(warp, slot, has_replicas(warp, slot / slots / node_size));
      } else {
        fill_decision(warp, node);
      }
    }
  }

  ULTRAEP_BOTH int tasks() const { return experts + ranks * slots + ranks / node_size; }

  ULTRAEP_DEVICE void fill_decision(Warp warp, int node) const {
    const bool spared = is_spared(warp, node);
    const int64* from = decided + node * kDecision;
    for (int i = warp.rank(); i < kDecision; i += warp.size()) {
      int64 value = from[i];
      if (spared && i == 0) value = kGainBelowCost;
      if (spared && i == 2) value = from[1];
      if (spared && i >= 4) value = 0;
      decisions[node * kDecision + i] = value;
    }
  }

  // `_spare_idle_nodes`: whether replicas are taken back because another node would be waited for all the same.
  ULTRAEP_DEVICE bool is_spared(Warp warp, int node) const {
    if (!gated) return false;
    int64 most = 0;
    for (int i = warp.rank(); i < nodes(); i += warp.size()) most = larger(most, decided[i * kDecision + 2]);
    const int64 slowest = warp.max(most);
    return decided[node * kDecision] == kBalanced && decided[node * kDecision + 1] <= slowest;
  }

  ULTRAEP_DEVICE bool has_replicas(Warp warp, int node) const {
    const bool spared = is_spared(warp, node);
    return decided[node * kDecision] == kBalanced && !spared;
  }

  // Replica expert of a slot, and zeros to an empty one.
  ULTRAEP_DEVICE void fill_slot(Warp warp, int slot, bool has_replicas) const {
    const int rank = slot / slots, first_place = rank / node_size * node_size * homes;
    const int place = has_replicas ? held[2 * (int64)slot] : -1;
    if (warp.rank() == 0) replica_expert[slot] = place < 0 ? -1 : expert_at[first_place + place];
    if (place >= 0) return;
    int64* out = quota + rank * width() + homes + (slot - rank * slots);
    for (int i = warp.rank(); i < ranks; i += warp.size()) out[i * physical()] = 0;
  }

  // Quotas of the copies of the expert at a home place of all ranks, and its row of the table (`_split_over_sources`).
  ULTRAEP_DEVICE void fill_copies(Warp warp, const Shares& shares, int home_slot, bool has_replicas) const {
    const int lane = warp.rank(), lanes = warp.size();
    const int expert = expert_at[home_slot];
    const int first_rank = home_slot / (node_size * homes) * node_size;
    int32* row = table + (int64)expert * (3 + 2 * node_size);
    int32 own = 0;
    for (int i = lane; i < ranks; i += lanes) {
      shares.rest[i] = (int32)loads[(int64)i * experts + expert];
      own += shares.rest[i];
    }
    const int32 tokens = warp.sum(own);
    int copies = 1;
    if (has_replicas) copies = find_copies(warp, shares, home_slot - first_rank * homes, tokens, first_rank);
    if (lane == 0) shares.column[0] = home_slot / homes * width() + home_slot % homes;
    warp.sync();
    const int32 load = shares.rest[source];
    const int32 stride = copies > 1 ? stride_of(warp, load) : 1;
    if (lane == 0) {
      row[0] = copies;
      row[1] = larger(1, load);
      row[2] = stride;
    }
    for (int i = lane; i < copies; i += lanes) row[3 + node_size + i] = shares.column[i];
    if (copies == 1) {
      int64* out = quota + shares.column[0];
      for (int i = lane; i < ranks; i += lanes) out[i * physical()] = shares.rest[i];
      if (lane == 0) row[3] = load;
      return;
    }
    warp.sync();  // `rest` was read

    // Copies lie on different ranks, so what their own ranks send is found for all of them at once.
    int32 remote = 0;
    for (int i = lane; i < copies; i += lanes) {
      const int rank = shares.column[i] / width();
      const int32 local = smaller(shares.rest[rank], shares.tokens[i]);
      shares.local[i] = local;
      shares.rest[rank] -= local;
      shares.tokens[i] -= local;
      remote += shares.tokens[i];
    }
    int32 total = warp.sum(remote);
    warp.sync();
    int32 sent = 0;  // by `source`, of the member that handles it
    for (int copy = 0; copy < copies; ++copy) {
      const int32 wanted = shares.tokens[copy];
      const int own_rank = shares.column[copy] / width();
      if (wanted) apportion(warp, shares, total, wanted);
      int64* out = quota + shares.column[copy];
      // Every source is handled by one member here and in `apportion`.
      for (int i = lane; i < ranks; i += lanes) {
        int32 value = wanted ? shares.share[i] : 0;
        shares.rest[i] -= value;
        if (i == own_rank) value += shares.local[copy];
        out[i * physical()] = value;
        if (i == source) {
          sent += value;
          row[3 + copy] = sent;
        }
      }
      total -= wanted;
    }
  }

  // `_copies`: physical ids and tokens of an expert's copies, home first (its id is not written), then by rank.
  ULTRAEP_DEVICE int find_copies(Warp warp, const Shares& shares, int place, int32 tokens, int first_rank) const {
    const int entries = node_size * slots;
    const int32* all = held + 2 * (int64)first_rank * slots;
    for (int i = warp.rank(); i < 2 * entries; i += warp.size()) shares.held[i] = all[i];
    warp.sync();
    int copies = 1;
    int32 moved = 0;
    // Slots are in the order of ranks, and a rank holds an expert once.
    for (int start = 0; start < entries; start += warp.size()) {
      const int i = start + warp.rank();
      const bool mine = i < entries && shares.held[2 * i] == place;
      int found;
      const int copy = copies + warp.count_before(mine, found);
      if (mine) {
        shares.column[copy] = (first_rank + i / slots) * width() + homes + i % slots;
        shares.tokens[copy] = shares.held[2 * i + 1];
        moved += shares.held[2 * i + 1];
      }
      copies += found;
    }
    const int32 away = warp.sum(moved);
    if (warp.rank() == 0) shares.tokens[0] = tokens - away;
    return copies;
  }

  // `_apportion`: `share` of every source, in proportion to `rest`; at most that, `wanted` in all.
  ULTRAEP_DEVICE void apportion(Warp warp, const Shares& shares, int32 total, int32 wanted) const {
    const int lane = warp.rank(), lanes = warp.size();
    const double inverse = 1.0 / total;
    int32 given = 0, largest = 0;
    for (int i = lane; i < ranks; i += lanes) {
      const int64 product = (int64)shares.rest[i] * wanted;
      // Off by one at most: the quotient is below 2^31 and the factors are good to 2^-52.
      int32 share = (int32)((double)product * inverse);
      int64 remainder = product - (int64)share * total;
      if (remainder < 0) {
        --share;
        remainder += total;
      } else if (remainder >= total) {
        ++share;
        remainder -= total;
      }
      shares.share[i] = share;
      shares.remainder[i] = (int32)remainder;
      given += share;
      largest = larger(largest, (int32)remainder);
    }
    const int32 over = wanted - warp.sum(given);
    if (over == 0) return;
    // The `over`-th largest remainder, by bisection. It is at least 1: remainders are below the total, and `over` times
    // that in sum.
    int32 low = 1, high = warp.max(largest) + 1;
    while (high - low > 1) {
      const int32 middle = low + (high - low) / 2;
      int reached = 0;
      for (int i = lane; i < ranks; i += lanes) reached += shares.remainder[i] >= middle;
      if (warp.sum(reached) >= over) {
        low = middle;
      } else {
        high = middle;
      }
    }
    int above = 0;
    for (int i = lane; i < ranks; i += lanes) above += shares.remainder[i] > low;
    int equal = over - warp.sum(above);  // so many of those with just this remainder get one, lower sources first
    for (int start = 0; start < ranks; start += lanes) {
      const int i = start + lane;
      const int32 remainder = i < ranks ? shares.remainder[i] : 0;
      int here;
      const int before = warp.count_before(remainder == low, here);
      if (remainder > low || (remainder == low && before < equal)) ++shares.share[i];
      equal -= here;
    }
  }

  // runtime/reroute.py `stride`; uniform.
  ULTRAEP_DEVICE int32 stride_of(Warp warp, int32 count) const {
    const int32 safe = larger(1, count);
    for (int32 from = larger(1, (int32)((int64)count * 618 / 1000));; from += warp.size()) {
      // Ends: of any `safe` neighbours one is coprime to it.
      const int32 mine = from + warp.rank();
      const int32 found = warp.min(greatest_common_divisor(safe, mine) == 1 ? mine : kMost);
      if (found != kMost) return found;
    }
  }
};

}  // namespace plan
}  // namespace ultraep
