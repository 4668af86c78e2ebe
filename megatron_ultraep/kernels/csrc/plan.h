// The planner of plan/search.py and plan/quota.py on a GPU, bit for bit: `Search` decides, `Fill` writes the plan.
//
// Legend as in plan/search.py: D ranks of a node, L home experts of a rank, R slots of a rank, G ranks, E experts, P
// physical experts; a place is a home slot counted inside the node. Tokens of all ranks are at most 2^30, so counts,
// and targets minus counts, fit int32; so does every sum of slacks that is compared (see `receiver`).
#pragma once

#include <limits>

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
constexpr int kInFlight = Warp::kWidth == 1 ? 1 : 32;  // loads of a thread that do not wait for each other
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

// An expert of a rank.
struct alignas(8) Home {
  int32 tokens;
  int32 place;
};

// How many ranks of a node each member of a warp keeps in registers (`NarrowAttempt`); 0 where there are too many ranks,
// or too many experts a rank, and everything is in shared memory (`Attempt`).
ULTRAEP_BOTH int items_of(int ranks, int homes) {
  if (Warp::kWidth < 32 || homes > Warp::kWidth) return 0;
  return ranks <= Warp::kWidth ? 1 : ranks <= 2 * Warp::kWidth ? 2 : ranks <= 4 * Warp::kWidth ? 4 : 0;
}

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
  Home* by_name;    // [D L] of each rank, by logical expert; for `NarrowAttempt`
  Best* best;       // [waves, warps]
  int32* partial;   // [threads]

  ULTRAEP_BOTH void place(Arena& arena, int ranks, int homes) {
    tokens = arena.take<int32>(ranks * homes);
    name = arena.take<uint32>(ranks * homes);
    load = arena.take<int32>(ranks);
    hottest = arena.take<int32>(ranks);
    coldest = arena.take<int32>(ranks);
    by_name = arena.take<Home>(items_of(ranks, homes) ? ranks * homes : 0);
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

// What all attempts (`_attempt`) have, each made by one warp. What is called uniform is the same for all its members.
struct AnyAttempt {
  const Node& node;
  Scratch& scratch;
  int ranks, homes, slots;
  int32 min_tokens;
  Warp warp;

  // Out; uniform.
  int count;
  int32 peak;
  int link;

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

// An attempt in a node of any size.
struct Attempt : AnyAttempt {
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
};

// An attempt in a node of at most `Items` ranks for each member of a warp, and as many experts a rank as a warp has
// members. What every replica depends on is in registers: the receivers, and the experts of the rank that exports.
//
// Shared memory is written along, for relays and for the peak, and read only after a `sync`:
// - `slack` and `received` by member 0 alone (but for the start), so that its later writes come after its earlier ones;
//   `received` counts relays only, which go to ranks that are no receivers;
// - `home_tokens` of a rank when its turn ends, by the member that has the expert; only relays of later turns read or
//   change it;
// - a replica once, by the member that has its expert.
template <int Items>
struct NarrowAttempt : AnyAttempt {
  // The receivers by slack, descending; ties to the lower rank: at lane + 32 k. Void from `room` on.
  int32 slack[Items];
  uint32 until[Items];  // sum of the slacks up to this one, modulo 2^32: see `Attempt::receiver`
  uint32 who[Items];    // received * 2^16 + rank

  ULTRAEP_DEVICE void run(int32 target, bool cold_first, int buffer) {
    const int lane = warp.rank();
    Replica* replicas = scratch.replicas + buffer * ranks * slots;
    int32* replica_tokens = scratch.replica_tokens + buffer * ranks * slots;
    int givers = 0, room = 0, relays = 0;
    uint32 carry = 0;
#pragma unroll
    for (int k = 0; k < Items; ++k) {
      const int i = at(k);
      const bool exists = i < ranks;
      const int rank = exists ? node.coldest[i] : 0;
      slack[k] = exists ? target - node.load[rank] : 0;
      who[k] = (uint32)rank;
      if (exists) {
        scratch.slack[rank] = slack[k];
        scratch.received[rank] = 0;
        scratch.mark[rank] = 0;
      }
      givers += warp.count(exists && slack[k] < 0);
      room += warp.count(exists && slack[k] >= min_tokens);  // cold ranks first: the beginning of the list
      uint32 total;
      until[k] = carry + warp.sum_before((uint32)slack[k], total) + (uint32)slack[k];
      carry += total;
    }
    if (slots == 0) room = 0;
    count = 0;
    link = 0;
    warp.sync();  // member 0 writes next
    // Read one turn ahead: nothing of it changes before.
    int next = 0;
    int32 next_over = 0;
    Home next_home{-1, 0};
    const auto read = [&](int turn) {
      if (turn >= givers) return;
      next = node.hottest[cold_first ? givers - 1 - turn : turn];
      next_over = node.load[next] - target;
      if (lane < homes) next_home = node.by_name[next * homes + lane];
    };
    read(0);
    for (int turn = 0; turn < givers; ++turn) {
      const int giver = next;
      int32 over = next_over;  // uniform, as all that follows but this member's expert
      Home home = next_home;   // tokens -1: none
      read(turn + 1);
      int sent = 0;
      while (over > 0) {
        // `_largest_expert`: the lower logical expert is the lower member.
        const int32 tokens = warp.max(home.tokens);
        if (tokens <= min_tokens) break;
        const int holder = first_of(warp.members(home.tokens == tokens));
        const int32 need = larger(over, min_tokens);
        int32 piece = smaller(need, tokens - 1);
        int rank, received;
        if (room > 0) {
          const int position = receiver(need, room);
          const int32 old = value_at(slack, position);
          const uint32 found = value_at(who, position);
          rank = (int)(found & 0xffff);
          received = (int)(found >> 16);
          piece = smaller(piece, old);
          const int32 left = old - piece;
          if (lane == 0) scratch.slack[rank] = left;
          const bool usable = received + 1 < slots && left >= min_tokens;
          reorder(position, room, usable, left, old, found + (1u << 16));
          room -= !usable;
        } else {
          ++relays;
          warp.sync();  // what was written since the last relay
          const int place = warp.from(home.place, holder);
          const int relay = best_relay(place, giver, piece, replicas, relays);
          Replica grown{};
          received = 0;
          if (relay >= 0) {
            grown = replicas[relay];
            received = scratch.received[grown.home];
          }
          warp.sync();  // all have read what is written now, or when the turn ends
          if (relay < 0) break;
          rank = grown.home;
          if (lane == 0) {
            replica_tokens[relay] += piece;
            scratch.home_tokens[grown.place] -= piece;
            scratch.slack[grown.rank] -= piece;  // and the rank has as much more slack, for a moment
            scratch.received[rank] = received + 1;
          }
        }
        if (lane == holder) {
          replicas[count] = Replica{(uint16_t)home.place, (uint16_t)rank, (uint16_t)giver, (uint16_t)received};
          replica_tokens[count] = piece;
          home.tokens -= piece;
        }
        over -= piece;
        ++count;
        ++sent;
        link = larger(link, larger(sent, received + 1));
      }
      if (lane < homes) scratch.home_tokens[home.place] = home.tokens;
      if (lane == 0) scratch.slack[giver] = -over;
    }
    warp.sync();
    int32 least = kMost;
    for (int i = lane; i < ranks; i += warp.size()) least = smaller(least, scratch.slack[i]);
    peak = target - warp.min(least);
    warp.sync();  // before the next attempt writes
  }

  // Values, not places: `?:` would choose an address, and keep arrays out of registers.
  template <class T>
  ULTRAEP_DEVICE static T pick(bool condition, T a, T b) {
    return condition ? a : b;
  }

  // Position of this member's k-th receiver.
  ULTRAEP_DEVICE int at(int k) const { return warp.rank() + 32 * k; }

  // What is at a position, which is uniform.
  template <class T>
  ULTRAEP_DEVICE T value_at(const T (&values)[Items], int position) const {
    T value = values[0];
#pragma unroll
    for (int k = 1; k < Items; ++k) value = pick(position >> 5 == k, values[k], value);
    return warp.from(value, position & 31);
  }

  // `_receiver`: the position to begin at, uniform. See `Attempt::receiver`: runs of the width that hold the need come
  // first, and do not grow. So the first of the least ones is the last that holds it and is less than the one before.
  ULTRAEP_DEVICE int receiver(int32 need, int room) const {
    const int lane = warp.rank();
    int width = 0;  // less one
    bool held = false;
#pragma unroll
    for (int k = Items - 1; k >= 0; --k) {
      // From the first that holds the need on sums may have wrapped.
      const uint32 holds = warp.members(at(k) < room && until[k] >= (uint32)need);
      if (holds) {
        width = first_of(holds) + 32 * k;
        held = true;
      }
    }
    if (!held) return 0;
    int32 run[Items], wrapped[Items];
    if (width == 0) {
#pragma unroll
      for (int k = 0; k < Items; ++k) run[k] = slack[k];
    } else {
      uint32 other[Items];
#pragma unroll
      for (int k = 0; k < Items; ++k) other[k] = warp.from(until[k], (lane + width) & 31);
#pragma unroll
      for (int k = 0; k < Items; ++k) {
        const int item = (at(k) + width) >> 5;
        uint32 end = other[k];
#pragma unroll
        for (int later = k + 1; later < Items; ++later) end = pick(item == later, other[later], end);
        run[k] = (int32)(end - until[k] + (uint32)slack[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < Items; ++k) wrapped[k] = warp.from(run[k], (lane + 31) & 31);
    int position = 0;
#pragma unroll
    for (int k = 0; k < Items; ++k) {
      const int32 before = pick(lane == 0, wrapped[k ? k - 1 : 0], wrapped[k]);
      const uint32 less =
          warp.members((at(k) + width < room) & (run[k] >= need) & ((at(k) == 0) | (run[k] < before)));
      if (less) position = last_of(less) + 32 * k;
    }
    return position;
  }

  // `_reorder`: move the receiver at a position, whose slack was `old` and is now `left`, back to where it belongs, or
  // to the end of the room, which the caller takes away where it is not usable.
  ULTRAEP_DEVICE void reorder(int position, int room, bool usable, int32 left, int32 old, uint32 moved) {
    const int lane = warp.rank();
    const int neighbour = (lane + 1) & 31;
    const uint32 rank = moved & 0xffff;
    // Of those after the position. `&` and `|` here and below: branches would cost more.
    const auto ahead = [&](int i, int32 its, uint32 name) {
      return (i < room) & (!usable | (its > left) | ((its == left) & ((name & 0xffff) < rank)));
    };
    int32 its[Items + 1];
    uint32 sum[Items + 1], name[Items + 1];
#pragma unroll
    for (int k = 0; k < Items; ++k) {
      its[k] = warp.from(slack[k], neighbour);
      sum[k] = warp.from(until[k], neighbour);
      name[k] = warp.from(who[k], neighbour);
    }
    its[Items] = 0;
    sum[Items] = name[Items] = 0;
#pragma unroll
    for (int k = 0; k < Items; ++k) {
      const int i = at(k);
      const bool wraps = lane == 31;
      const int32 next = pick(wraps, its[k + 1], its[k]);
      const uint32 next_sum = pick(wraps, sum[k + 1], sum[k]);
      const uint32 next_name = pick(wraps, name[k + 1], name[k]);
      const bool here = (i == position) | ((i > position) & ahead(i, slack[k], who[k]));
      const bool moves_up = here & ahead(i + 1, next, next_name);
      until[k] = pick(moves_up, next_sum - (uint32)old, until[k] - pick(i >= position, (uint32)(old - left), 0u));
      slack[k] = pick(here, pick(moves_up, next, left), slack[k]);
      who[k] = pick(here, pick(moves_up, next_name, moved), who[k]);
    }
  }
};

// One block for each node: which replicas exist, how many tokens each takes, and the decision (`_balance`).
// `Items`: see `items_of`.
template <int Items>
struct Search {
  static constexpr int kMostThreads = kMostWarps * 32;

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

    int32 sum = 0;
    for (int i = warp.rank(); i < node_size; i += warp.size()) sum += node.load[i];
    const int32 total = warp.sum(sum);
    const int32 before = node.load[node.hottest[0]];
    const int32 bound = (int32)(((uint32)total + node_size - 1) / (uint32)node_size);
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
    std::conditional_t<Items == 0, Attempt, NarrowAttempt<Items>> attempt{
        {node, scratch, node_size, homes, slots, min_tokens, warp, 0, 0, 0}};
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
      int32 least = lowest;
      for (int i = warp.rank(); i < block.warps(); i += warp.size()) least = smaller(least, row[i].lowest);
      lowest = warp.min(least);
    }

    const int winner = best_of(warp, all, compared);
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

  // Which of them is the best; uniform. Field by field in the order of `better_than`.
  ULTRAEP_DEVICE int best_of(Warp warp, const Best* all, int compared) const {
    int mine = smaller(warp.rank(), compared - 1);
    for (int i = mine + warp.size(); i < compared; i += warp.size())
      if (all[i].better_than(all[mine])) mine = i;
    const Best& best = all[mine];
    bool still = best.count != 0;
    // Among those that still are candidates keep the ones with the least; without any nothing matters.
    const auto keep = [&](auto value) {
      const auto least = warp.min(still ? value : std::numeric_limits<decltype(value)>::max());
      still = still && value == least;
    };
    keep((int32)(best.key >> 32));
    keep((uint32)best.key);
    keep(best.count);
    keep(best.peak);
    keep(best.attempt);
    return warp.max(still ? mine : 0);
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
    // Of a single node the sums are by expert, so no load waits for `here`.
    const bool by_expert = shares > 1 && places == experts;
    for (int i = block.rank(); i < places * shares; i += block.size()) {
      const int place = i % places;
      const int expert = here[place];
      const int64* load = loads + (by_expert ? place : expert);
      int32 sum = 0;
      for (int source = i / places; source < ranks; source += kInFlight * shares) {
        int32 some[kInFlight];
#if defined(__CUDACC__)
#pragma unroll
#endif
        for (int k = 0; k < kInFlight; ++k) {
          const int here = source + k * shares;
          some[k] = here < ranks ? (int32)load[(int64)here * experts] : 0;
        }
#if defined(__CUDACC__)
#pragma unroll
#endif
        for (int k = 0; k < kInFlight; ++k) sum += some[k];
      }
      (shares > 1 ? node.partial : node.tokens)[i] = sum;
      if (i < places) node.name[place] = (uint32)expert << 16 | (uint32)place;
    }
    block.sync();
    if (shares == 1) return;
    for (int place = block.rank(); place < places; place += block.size()) {
      int32 sum = 0;
      const int column = by_expert ? (int)(node.name[place] >> 16) : place;
      for (int share = 0; share < shares; ++share) sum += node.partial[share * places + column];
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
    // A warp counts how many others come before a rank.
    const Warp warp{};
    for (int rank = block.warp(); rank < node_size; rank += block.warps()) {
      const int32 mine = node.load[rank];
      int hotter = 0, colder = 0;
      for (int start = 0; start < node_size; start += warp.size()) {
        const int other = start + warp.rank();
        const int32 its = other < node_size ? node.load[other] : mine;  // and not before it
        const bool earlier = its == mine && other < rank;
        hotter += warp.count(its > mine || earlier);
        colder += warp.count(its < mine || earlier);
      }
      if (warp.rank() == 0) {
        node.hottest[hotter] = rank;
        node.coldest[colder] = rank;
      }
    }
    if (Items) {
      for (int place = block.rank(); place < node_size * homes; place += block.size()) {
        const int first = place / homes * homes;
        const uint32 name = node.name[place];
        int position = first;
        for (int other = first; other < first + homes; ++other) position += node.name[other] < name;
        node.by_name[position] = Home{node.tokens[place], place};
      }
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

struct alignas(16) Quad {
  int32 a, b, c, d;
};

constexpr int kTogether = Warp::kWidth == 1 ? 1 : 2;  // sources that a member handles at once
constexpr int kSlotsAtOnce = Warp::kWidth == 1 ? 1 : 4;  // slots that a member reads at once
constexpr int kFew = 2 * Warp::kWidth;  // up to so many sources are kept in registers: see `split_few`

// What one warp of `Fill` works on, in shared memory.
struct Shares {
  int32* column;     // [D] physical id of each copy
  int32* rank;       // [D] of each copy
  int32* tokens;     // [D] of each copy, less what its own rank sends
  int32* local;      // [D] what its own rank sends
  int32* rest;       // [G] tokens of each source that have no copy yet
  int32* share;      // [G]
  int32* remainder;  // [G], and zeros up to a multiple of 4

  ULTRAEP_BOTH void place(Arena& arena, int ranks, int node_size, int slots) {
    column = arena.take<int32>(node_size);
    rank = arena.take<int32>(node_size);
    tokens = arena.take<int32>(node_size);
    local = arena.take<int32>(node_size);
    rest = arena.take<int32>(ranks);
    share = arena.take<int32>(ranks);
    remainder = arena.take<int32>((ranks + 3) / 4 * 4);
  }
};

ULTRAEP_BOTH size_t fill_warp_bytes(int ranks, int node_size, int slots) {
  Arena arena{nullptr, 0};
  Shares shares;
  shares.place(arena, ranks, node_size, slots);
  return arena.used;
}

ULTRAEP_DEVICE uint32 greatest_common_divisor(uint32 a, uint32 b) {
  while (b) {
    const uint32 rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// The plan as tensors, from what `Search` decided. A warp at a time for each home place (twice), slot and node.
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
      const int slot = task - 2 * experts, node = slot - ranks * slots;
      if (task < experts) {
        fill_copies(warp, shares, task);
        warp.sync();  // `shares` is used again
      } else if (task < 2 * experts) {
        fill_stride(warp, task - experts);
      } else if (node < 0) {
        fill_slot(warp, slot, has_replicas(warp, slot / slots / node_size));
      } else {
        fill_decision(warp, node);
      }
    }
  }

  ULTRAEP_BOTH int tasks() const { return 2 * experts + ranks * slots + ranks / node_size; }

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
    const int64 outcome = decided[node * kDecision], before = decided[node * kDecision + 1];
    int64 most = 0;
    for (int i = warp.rank(); i < nodes(); i += warp.size()) most = larger(most, decided[i * kDecision + 2]);
    // Loads wait for each other nowhere: `&` reads both.
    return (outcome == kBalanced) & (before <= warp.max(most));
  }

  ULTRAEP_DEVICE bool has_replicas(Warp warp, int node) const {
    const int64 outcome = decided[node * kDecision];
    const bool spared = is_spared(warp, node);
    return (outcome == kBalanced) & !spared;
  }

  // Slots from one on of the node: place (-1 for none, or beyond the last) and tokens.
  struct Slots {
    int32 place[kSlotsAtOnce], tokens[kSlotsAtOnce];
  };

  ULTRAEP_DEVICE Slots read_slots(Warp warp, int node, int start) const {
    const int entries = node_size * slots;
    const int32* all = held + 2 * (int64)node * entries;
    Slots read;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < kSlotsAtOnce; ++k) {
      const int i = start + k * warp.size() + warp.rank();
      read.place[k] = i < entries ? all[2 * i] : -1;
      read.tokens[k] = i < entries ? all[2 * i + 1] : 0;
    }
    return read;
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
  ULTRAEP_DEVICE void fill_copies(Warp warp, const Shares& shares, int home_slot) const {
    const int lane = warp.rank(), lanes = warp.size();
    const int node = home_slot / (node_size * homes), first_rank = node * node_size;
    // Slots are read whether they count or not, so that nothing but the column of loads waits for another load.
    const int expert = expert_at[home_slot];
    const Slots first_slots = read_slots(warp, node, 0);
    const bool replicated = has_replicas(warp, node);
    int32* row = table + (int64)expert * (3 + 2 * node_size);
    int32 own = 0;
    for (int start = lane; start < ranks; start += kTogether * lanes) {
      int32 here[kTogether];
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < kTogether; ++k)
        here[k] = start + k * lanes < ranks ? (int32)loads[(int64)(start + k * lanes) * experts + expert] : 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < kTogether; ++k) {
        if (start + k * lanes < ranks) shares.rest[start + k * lanes] = here[k];
        own += here[k];
      }
    }
    const int32 tokens = warp.sum(own);
    int copies = 1;
    if (replicated) copies = find_copies(warp, shares, home_slot - first_rank * homes, tokens, node, first_slots);
    if (lane == 0) {
      shares.column[0] = home_slot / homes * width() + home_slot % homes;
      shares.rank[0] = home_slot / homes;
    }
    warp.sync();
    const int32 load = shares.rest[source];
    if (lane == 0) {
      row[0] = copies;
      row[1] = larger(1, load);
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
      const int rank = shares.rank[i];
      const int32 local = smaller(shares.rest[rank], shares.tokens[i]);
      shares.local[i] = local;
      shares.rest[rank] -= local;
      shares.tokens[i] -= local;
      remote += shares.tokens[i];
    }
    int32 total = warp.sum(remote);
    warp.sync();
    if (lanes > 1 && ranks <= kFew) {
      split_few(warp, shares, copies, total, row);
      return;
    }
    int32 sent = 0;  // by `source`, of the member that handles it
    for (int copy = 0; copy < copies; ++copy) {
      const int32 wanted = shares.tokens[copy];
      const int own_rank = shares.rank[copy];
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

  // What is left of `fill_copies`, by copies. Each member has the sources lane and lane + 32 in registers.
  ULTRAEP_DEVICE void split_few(Warp warp, const Shares& shares, int copies, int32 total, int32* row) const {
    int32 rest[2];
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < 2; ++k) {
      const int i = warp.rank() + k * warp.size();
      rest[k] = i < ranks ? shares.rest[i] : 0;
    }
    int32 sent = 0;  // by `source`, of the member that handles it
    for (int copy = 0; copy < copies; ++copy) {
      const int32 wanted = shares.tokens[copy], local = shares.local[copy];
      const int own_rank = shares.rank[copy];
      int64* out = quota + shares.column[copy];
      int32 share[2] = {0, 0};
      if (wanted) apportion_few(warp, shares, rest, total, wanted, share);
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < 2; ++k) {
        const int i = warp.rank() + k * warp.size();
        rest[k] -= share[k];
        const int32 value = share[k] + (i == own_rank ? local : 0);
        if (i < ranks) out[i * physical()] = value;
        if (i == source) {
          sent += value;
          row[3 + copy] = sent;
        }
      }
      total -= wanted;
    }
  }

  // `_apportion`, see `apportion`. The `over` sources that get one more are found by comparing all with all: a source
  // is one if fewer than `over` come before it, by remainder, descending, and id. There are more than `over` remainders
  // above 0, as in `bisected_remainder`, so members without a source, whose remainder is 0, are none.
  ULTRAEP_DEVICE void apportion_few(
      Warp warp, const Shares& shares, const int32 (&rest)[2], int32 total, int32 wanted, int32 (&share)[2]) const {
    const double inverse = 1.0 / total;
    const int padded = (ranks + 3) / 4 * 4;
    int32 remainder[2];
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < 2; ++k) share[k] = share_of(rest[k], total, wanted, inverse, remainder[k]);
    const int32 over = wanted - warp.sum(share[0] + share[1]);
    if (over == 0) return;
    warp.sync();  // all have read the last copy's
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < 2; ++k) {
      const int i = warp.rank() + k * warp.size();
      if (i < padded) shares.remainder[i] = remainder[k];
    }
    warp.sync();
    const Quad* all = reinterpret_cast<const Quad*>(shares.remainder);
    int before[2] = {0, 0};
#if defined(__CUDACC__)
#pragma unroll 4
#endif
    for (int start = 0; start < padded; start += 4) {
      const Quad four = all[start / 4];
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < 2; ++k) {
        // Of equals those in earlier quads come before it.
        const int32 least = remainder[k] - (start + 4 <= warp.rank() + k * warp.size());
        before[k] += (four.a > least) + (four.b > least) + (four.c > least) + (four.d > least);
      }
    }
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int k = 0; k < 2; ++k) {
      const int i = warp.rank() + k * warp.size(), mine = remainder[k];
      const Quad own = all[i < padded ? i / 4 : 0];
      before[k] += ((i & 3) > 0) & (own.a == mine);
      before[k] += ((i & 3) > 1) & (own.b == mine);
      before[k] += ((i & 3) > 2) & (own.c == mine);
      share[k] += before[k] < over;
    }
  }

  // Tokens of `rest` that are given for sure, and the remainder.
  ULTRAEP_DEVICE static int32 share_of(int32 rest, int32 total, int32 wanted, double inverse, int32& remainder) {
    const int64 product = (int64)rest * wanted;
    // Off by one at most: the quotient is below 2^31 and the factors are good to 2^-52.
    const int32 share = (int32)((double)product * inverse);
    const int64 left = product - (int64)share * total;
    const int by = (left >= total) - (left < 0);
    remainder = (int32)(left - by * (int64)total);
    return share + by;
  }

  // `_copies`: physical ids and tokens of an expert's copies, home first (its id is not written), then by rank.
  ULTRAEP_DEVICE int find_copies(
      Warp warp, const Shares& shares, int place, int32 tokens, int node, const Slots& first_slots) const {
    const int entries = node_size * slots;
    int copies = 1;
    int32 moved = 0;
    // Slots are in the order of ranks, and a rank holds an expert once.
    for (int start = 0; start < entries; start += kSlotsAtOnce * warp.size()) {
      const Slots read = start ? read_slots(warp, node, start) : first_slots;
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < kSlotsAtOnce; ++k) {
        const bool mine = read.place[k] == place;
        int found;
        const int copy = copies + warp.count_before(mine, found);
        if (mine) {
          const int entry = start + k * warp.size() + warp.rank();
          const int rank = node * node_size + entry / slots;
          shares.rank[copy] = rank;
          shares.column[copy] = rank * width() + homes + entry % slots;
          shares.tokens[copy] = read.tokens[k];
          moved += read.tokens[k];
        }
        copies += found;
      }
    }
    const int32 away = warp.sum(moved);
    if (warp.rank() == 0) shares.tokens[0] = tokens - away;
    return copies;
  }

  // Stride of an expert's row of the table. Beside `fill_copies`: finding it takes about as long as splitting.
  ULTRAEP_DEVICE void fill_stride(Warp warp, int home_slot) const {
    const int node = home_slot / (node_size * homes), place = home_slot - node * node_size * homes;
    const int expert = expert_at[home_slot];
    bool mine = false;
    for (int start = 0; start < node_size * slots; start += kSlotsAtOnce * warp.size()) {
      const Slots read = read_slots(warp, node, start);
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < kSlotsAtOnce; ++k) mine |= read.place[k] == place;
    }
    const bool replicated = has_replicas(warp, node);
    const int32 load = (int32)loads[(int64)source * experts + expert];
    const int32 stride = replicated & warp.any(mine) ? stride_of(warp, load) : 1;
    if (warp.rank() == 0) table[(int64)expert * (3 + 2 * node_size) + 2] = stride;
  }

  // The `over`-th largest remainder. It is at least 1: remainders are below the total, and `over` times that in sum.
  ULTRAEP_DEVICE int32 bisected_remainder(Warp warp, const Shares& shares, int32 over, int32 largest) const {
    int32 low = 1, high = largest + 1;
    while (high - low > 1) {
      const int32 middle = low + (high - low) / 2;
      int reached = 0;
      for (int i = warp.rank(); i < ranks; i += warp.size()) reached += shares.remainder[i] >= middle;
      if (warp.sum(reached) >= over) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // `_apportion`: `share` of every source, in proportion to `rest`; at most that, `wanted` in all.
  ULTRAEP_DEVICE void apportion(Warp warp, const Shares& shares, int32 total, int32 wanted) const {
    const int lane = warp.rank(), lanes = warp.size();
    const double inverse = 1.0 / total;
    int32 given = 0, largest = 0;
    for (int start = lane; start < ranks; start += kTogether * lanes) {
      int32 rest[kTogether];
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < kTogether; ++k) rest[k] = start + k * lanes < ranks ? shares.rest[start + k * lanes] : 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int k = 0; k < kTogether; ++k) {
        const int i = start + k * lanes;
        int32 remainder;
        const int32 share = share_of(rest[k], total, wanted, inverse, remainder);
        if (i < ranks) {
          shares.share[i] = share;
          shares.remainder[i] = remainder;
        }
        given += share;
        largest = larger(largest, remainder);
      }
    }
    const int32 over = wanted - warp.sum(given);
    if (over == 0) return;
    const int32 low = bisected_remainder(warp, shares, over, warp.max(largest));
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
      const int32 found = warp.min(greatest_common_divisor((uint32)safe, (uint32)mine) == 1 ? mine : kMost);
      if (found != kMost) return found;
    }
  }
};

}  // namespace plan
}  // namespace ultraep
