// From (token, logical expert) to (token, physical expert), by a plan's table; see kernels/reroute.py.
//
// Rows are handled in chunks of 32, one block for each, so that a column of a chunk (an expert's tokens in it) is one
// 32-bit mask:
//
// 1. Count: masks of every chunk, their numbers of bits to `before`. Scan: sums over earlier chunks, in place.
// 2. Reroute: the masks again, and sums of their bits over experts. These sums number the chunk's (token, expert) pairs,
//    so pairs are dealt out evenly however hot an expert is: pair k finds its expert by bisection in the sums and its
//    row as a bit of the mask, and what is left of k is the token's place among the expert's tokens of the chunk.
//
// Values are moved as words of their size; no arithmetic is done on them. Outputs are filled with zeros in wide stores,
// which drain while pairs are numbered; pairs overwrite them after a sync.
//
// Legend: T tokens, E logical experts, P physical experts, C most copies of an expert.
#pragma once

#include "team.h"

#if !defined(__CUDACC__)
#include <cstring>
#endif

namespace ultraep {

constexpr int kChunkRows = 32;  // bits of a mask; kernels/reroute.py has the same number
constexpr int kOctets = kChunkRows / 8;
constexpr int kRerouteThreads = 256;

ULTRAEP_DEVICE int bits_of(uint32 mask) {
#if defined(__CUDACC__)
  return __popc(mask);
#else
  return __builtin_popcount(mask);
#endif
}

// Index of bit number `n` (from 0) among the bits of `mask`, which has more than `n`.
ULTRAEP_DEVICE int position_of_bit(uint32 mask, int n) {
  int position = 0;
#pragma unroll
  for (int width = 16; width > 0; width >>= 1) {
    const int below = bits_of(mask & ((1u << width) - 1));
    const bool above = n >= below;
    n -= above ? below : 0;
    mask >>= above ? width : 0;
    position += above ? width : 0;
  }
  return position;
}

// Zeros by all members; `start` is aligned to 16 bytes. To be followed by a sync.
ULTRAEP_DEVICE void fill_zero(Block block, void* start, int64 bytes) {
#if defined(__CUDACC__)
  int4* wide = static_cast<int4*>(start);
  const int64 whole = bytes / 16;
  for (int64 i = block.rank(); i < whole; i += block.size()) wide[i] = make_int4(0, 0, 0, 0);
  uint8* tail = static_cast<uint8*>(start) + whole * 16;
  if (block.rank() < bytes - whole * 16) tail[block.rank()] = 0;
#else
  if (block.rank() == 0) std::memset(start, 0, (size_t)bytes);
#endif
}

// The map's columns as masks of 32 rows.
struct RoutingMap {
  const uint8* map;  // [T, E] of 0 and 1
  int64 tokens;
  int experts;

  ULTRAEP_DEVICE int64 chunks() const { return (tokens + kChunkRows - 1) / kChunkRows; }
  ULTRAEP_DEVICE int rows(int64 chunk) const {
    return (int)smaller<int64>(kChunkRows, tokens - chunk * kChunkRows);
  }

  // `masks` is shared, [E]: bit r of masks[e] is row r of column e of the chunk. To be followed by a sync.
  ULTRAEP_DEVICE void masks_of(Block block, int64 chunk, uint32* masks) const {
    const bool words = experts % 4 == 0 && reinterpret_cast<uintptr_t>(map) % 4 == 0;
    if (words) {
      read<uint32>(block, chunk, masks);
    } else {
      read<uint8>(block, chunk, masks);
    }
  }

 private:
  // A member reads one word of 8 rows. Its bytes are 0 or 1, so shifted by their row they add up to one byte of the
  // mask for each column, and none spills into the next. Masks are written by bytes (both machines are little-endian).
  template <class Word>
  ULTRAEP_DEVICE void read(Block block, int64 chunk, uint32* masks) const {
    constexpr int width = sizeof(Word);
    uint8* bytes = reinterpret_cast<uint8*>(masks);
    const int columns = experts / width;
    const int valid = rows(chunk);
    for (int i = block.rank(); i < columns * kOctets; i += block.size()) {
      const int octet = i / columns;
      const int column = i - octet * columns;
      const uint8* start = map + (chunk * kChunkRows + octet * 8) * experts + column * width;
      Word held[8];
#pragma unroll
      for (int row = 0; row < 8; ++row)
        held[row] = octet * 8 + row < valid ? *reinterpret_cast<const Word*>(start + (int64)row * experts) : Word(0);
      uint32 gathered = 0;
#pragma unroll
      for (int row = 0; row < 8; ++row) gathered |= (uint32)held[row] << row;
#pragma unroll
      for (int j = 0; j < width; ++j) bytes[(column * width + j) * kOctets + octet] = (uint8)(gathered >> (8 * j));
    }
  }
};

// Number of bits of every column of every chunk. One block for each chunk.
struct Count {
  RoutingMap map;
  int32* count;  // [chunks, E]

  static size_t shared_bytes(int64 experts) { return (size_t)experts * sizeof(uint32); }

  ULTRAEP_DEVICE void operator()(Block block, char* shared) const {
    uint32* masks = reinterpret_cast<uint32*>(shared);
    map.masks_of(block, block.id(), masks);
    block.sync();
    int32* out = count + (int64)block.id() * map.experts;
    for (int e = block.rank(); e < map.experts; e += block.size()) out[e] = bits_of(masks[e]);
  }
};

// Counts of chunks to sums over earlier chunks, in place, and the totals. A block takes a strip of columns and splits
// the chunks into segments: sums of segments, their scan by a warp for each column, then sums within segments.
struct Scan {
  static constexpr int kStrip = 8;  // columns: a sector of memory
  static constexpr int kSegments = 64;
  static constexpr int kPitch = kSegments + 1;  // of a column in shared memory; odd, so columns fall in different banks
  static constexpr int kThreads = kStrip * kSegments;
  static constexpr int kInFlight = 8;  // loads

  int32* before;  // [chunks, E]: counts at first
  int64* totals;  // [E]
  int64 chunks;
  int experts;

  static size_t shared_bytes() { return (size_t)kStrip * kPitch * sizeof(int32); }

  ULTRAEP_DEVICE void operator()(Block block, char* shared) const {
    int32* sums = reinterpret_cast<int32*>(shared);
    const int64 share = (chunks + kSegments - 1) / kSegments;
    const int first_column = block.id() * kStrip;

    for (int i = block.rank(); i < kThreads; i += block.size()) {
      const int segment = i / kStrip, column = i % kStrip, e = first_column + column;
      int32 sum = 0;
      if (e < experts) {
        const int64 last = smaller(chunks, (segment + 1) * share);
#pragma unroll 8
        for (int64 chunk = segment * share; chunk < last; ++chunk) sum += before[chunk * experts + e];
      }
      sums[column * kPitch + segment] = sum;
    }
    block.sync();

    Warp warp;
    for (int column = block.warp(); column < kStrip; column += block.warps()) {
      int32 running = 0;
      for (int start = 0; start < kSegments; start += warp.size()) {
        int32* place = sums + column * kPitch + start + warp.rank();
        int32 total;
        const int32 earlier = warp.sum_before(*place, total);
        *place = running + earlier;
        running += total;
      }
      if (warp.rank() == 0 && first_column + column < experts) totals[first_column + column] = running;
    }
    block.sync();

    for (int i = block.rank(); i < kThreads; i += block.size()) {
      const int segment = i / kStrip, column = i % kStrip, e = first_column + column;
      if (e >= experts) continue;
      int32 running = sums[column * kPitch + segment];
      const int64 last = smaller(chunks, (segment + 1) * share);
      for (int64 chunk = segment * share; chunk < last; chunk += kInFlight) {
        // The stores go where loads come from, so the compiler would not start a load before an earlier store.
        int32 held[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) held[j] = chunk + j < last ? before[(chunk + j) * experts + e] : 0;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (chunk + j < last) before[(chunk + j) * experts + e] = running;
          running += held[j];
        }
      }
    }
  }
};

// Sums of value(0..i-1) for each i < n, to `sums`, shared; returns the sum of all. `warp_sums` is shared, one for each
// warp. Collective; ends with a sync.
template <class Value>
ULTRAEP_DEVICE uint32 sums_before(Block block, int n, uint32* sums, uint32* warp_sums, Value value) {
  Warp warp;
  const int share = (n + block.warps() - 1) / block.warps();
  const int first = smaller(n, block.warp() * share);
  const int last = smaller(n, first + share);
  uint32 running = 0;
  for (int start = first; start < last; start += warp.size()) {
    const int i = start + warp.rank();
    uint32 total;
    const uint32 earlier = warp.sum_before(i < last ? (uint32)value(i) : 0u, total);
    if (i < last) sums[i] = running + earlier;
    running += total;
  }
  if (warp.rank() == 0) warp_sums[block.warp()] = running;
  block.sync();
  uint32 base = 0, all = 0;
  for (int w = 0; w < block.warps(); ++w) {
    base += w < block.warp() ? warp_sums[w] : 0;
    all += warp_sums[w];
  }
  for (int i = first + warp.rank(); i < last; i += warp.size()) sums[i] += base;
  block.sync();
  return all;
}

// What a source rank reroutes by. A row: number of copies, max(1, tokens), stride, quota sums [C], physical ids [C].
struct Table {
  static constexpr int kHeader = 3;

  const int32* table;  // [E, 3 + 2 C]
  int copies;          // C

  // The physical expert of token number `ordinal` (in row order) of an expert.
  ULTRAEP_DEVICE int32 target(int expert, int64 ordinal) const {
    const int32* row = table + (int64)expert * (kHeader + 2 * copies);
    const int32* until = row + kHeader;
    const int32* physical = until + copies;
    const int32 count = row[0];
    const uint32 tokens = (uint32)row[1];
    const uint64 product = (uint64)ordinal * (uint32)row[2];
    // 64-bit division is a long routine on a GPU; the products of up to 65536 tokens fit in 32 bits.
    const int32 number = (int32)(product >> 32 ? (uint32)(product % tokens) : (uint32)product % tokens);
    // The first copy with number < until[copy]; sums ascend, and the last one is above every number.
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (number < until[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return physical[low];
  }
};

// Forward: `from` is [T, E] and `to` is [T, P]. Backward: the gradients, from [T, P] to [T, E]; no map is written.
// One block for each chunk. `Element` is an unsigned integer as wide as a value.
template <class Element, bool kBackward>
struct Reroute {
  RoutingMap map;
  Table table;
  const int32* before;  // [chunks, E]
  const Element* from;
  Element* to;
  uint8* to_map;  // bool [T, P]
  int physical;

  static size_t shared_bytes(int64 experts) { return (size_t)(2 * experts + kRerouteThreads / 32) * sizeof(uint32); }

  ULTRAEP_DEVICE void operator()(Block block, char* shared) const {
    const int experts = map.experts;
    uint32* masks = reinterpret_cast<uint32*>(shared);
    uint32* sums = masks + experts;
    uint32* warp_sums = sums + experts;
    const int64 chunk = block.id();
    const int64 first_row = chunk * kChunkRows;
    const int rows = map.rows(chunk);
    const int width = kBackward ? experts : physical;

    map.masks_of(block, chunk, masks);
    // A chunk starts at a multiple of 32 elements, so where an allocation does, it is aligned to 16 bytes.
    fill_zero(block, to + first_row * width, (int64)rows * width * sizeof(Element));
    if (!kBackward) fill_zero(block, to_map + first_row * physical, (int64)rows * physical);
    block.sync();
    const int pairs = (int)sums_before(block, experts, sums, warp_sums, [&](int e) { return bits_of(masks[e]); });

    for (int pair = block.rank(); pair < pairs; pair += block.size()) {
      const int e = expert_of(sums, experts, (uint32)pair);
      const int place = pair - (int)sums[e];
      const int64 row = first_row + position_of_bit(masks[e], place);
      const int64 logical_at = row * experts + e;
      if (kBackward) {
        const int32 target = table.target(e, (int64)before[chunk * experts + e] + place);
        Element value = from[row * physical + target];
        // Autograd's own gather adds gradients to zero, and 0 + -0 is 0.
        constexpr Element minus_zero = (Element)((Element)1 << (8 * sizeof(Element) - 1));
        if (value == minus_zero) value = 0;
        to[logical_at] = value;
      } else {
        const Element value = from[logical_at];  // needs no target, so its load is under way while that is found
        const int32 target = table.target(e, (int64)before[chunk * experts + e] + place);
        to[row * physical + target] = value;
        to_map[row * physical + target] = 1;
      }
    }
  }

 private:
  // The expert of a pair: the last one with sums[e] <= pair. It has tokens, because the next sum is larger.
  ULTRAEP_DEVICE static int expert_of(const uint32* sums, int experts, uint32 pair) {
    int low = 0, high = experts - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (sums[middle] <= pair) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace ultraep
