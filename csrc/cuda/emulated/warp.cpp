// Warp operations: votes, shuffles, reductions and tensor-core products. The last lane to arrive computes for all.
#include <algorithm>

#include "cuda/emulated/state.h"

namespace fastmaml::emu {
namespace {

template <class Body>
void for_lanes(uint32_t mask, Body body) {
  for (; mask; mask &= mask - 1) body(__builtin_ctz(mask));
}

// ---------------------------------------------------------------- votes, shuffles, reductions

struct Shuffled {
  int source;
  uint64_t bits, result;
};
void run_shuffle(Thread* lanes, uint32_t mask) {
  for_lanes(mask, [&](int i) {
    Shuffled& to = *static_cast<Shuffled*>(lanes[i].deposit);
    // A lane outside the mask has no value: all bits one.
    to.result = mask >> to.source & 1 ? static_cast<Shuffled*>(lanes[to.source].deposit)->bits : ~uint64_t(0);
  });
}
const Operation kShuffles[] = {
    {"__shfl_sync", run_shuffle}, {"__shfl_up_sync", run_shuffle}, {"__shfl_down_sync", run_shuffle}, {"__shfl_xor_sync", run_shuffle}};

struct Voted {
  bool value;
  uint32_t result;
};
void run_ballot(Thread* lanes, uint32_t mask) {
  uint32_t result = 0;
  for_lanes(mask, [&](int i) { result |= uint32_t(static_cast<Voted*>(lanes[i].deposit)->value) << i; });
  for_lanes(mask, [&](int i) { static_cast<Voted*>(lanes[i].deposit)->result = result; });
}
const Operation kBallot{"a vote (__ballot_sync, __any_sync, __all_sync)", run_ballot};

int64_t combine(Reduce how, int64_t a, int64_t b) {
  switch (how) {
    case Reduce::add:
      return a + b;
    case Reduce::min:
      return std::min(a, b);
    case Reduce::max:
      return std::max(a, b);
    case Reduce::bit_and:
      return a & b;
    case Reduce::bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}
template <Reduce how>
void run_reduce(Thread* lanes, uint32_t mask) {
  int64_t result = *static_cast<int64_t*>(lanes[__builtin_ctz(mask)].deposit);
  for_lanes(mask & (mask - 1), [&](int i) { result = combine(how, result, *static_cast<int64_t*>(lanes[i].deposit)); });
  for_lanes(mask, [&](int i) { *static_cast<int64_t*>(lanes[i].deposit) = result; });
}
const Operation kReduce[] = {{"__reduce_add_sync", run_reduce<Reduce::add>},   {"__reduce_min_sync", run_reduce<Reduce::min>},
                             {"__reduce_max_sync", run_reduce<Reduce::max>},   {"__reduce_and_sync", run_reduce<Reduce::bit_and>},
                             {"__reduce_or_sync", run_reduce<Reduce::bit_or>}, {"__reduce_xor_sync", run_reduce<Reduce::bit_xor>}};

const Operation kSyncWarp{"__syncwarp", [](Thread*, uint32_t mask) {
                            if (watcher) watcher->sync_warp(mask);
                          }};

// ---------------------------------------------------------------- tensor cores

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

float tf32(uint32_t bits) {  // the tensor core ignores the low 13 bits
  float x;
  bits &= ~0x1fffu;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
float bf16(uint32_t pair, int half) {
  float x;
  const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// d [16, 8] += a [16, K] b [K, 8], gathered from the lanes in device.h's order.
template <int K>
void run_mma(Thread* lanes, uint32_t) {
  float a[16][K], b[K][8];
  const auto fragments = [&](int i) -> Fragments& { return *static_cast<Fragments*>(lanes[i].deposit); };
  for (int l = 0; l < 32; ++l) {
    const Fragments& f = fragments(l);
    const int g = l / 4, q = l % 4;
    for (int i = 0; i < 4; ++i)
      if constexpr (K == 8)
        a[g + i % 2 * 8][q + i / 2 * 4] = tf32(f.a[i]);
      else
        for (int half = 0; half < 2; ++half) a[g + i % 2 * 8][2 * q + half + i / 2 * 8] = bf16(f.a[i], half);
    for (int i = 0; i < 2; ++i)
      if constexpr (K == 8)
        b[q + i * 4][g] = tf32(f.b[i]);
      else
        for (int half = 0; half < 2; ++half) b[2 * q + half + i * 8][g] = bf16(f.b[i], half);
  }
  float d[16][8];
  const auto for_each_d = [&](auto body) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) body(fragments(l).d[i], d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  };
  for_each_d([](const float& of_lane, float& here) { here = of_lane; });
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] = std::fma(a[row][k], b[k][column], d[row][column]);
  for_each_d([](float& of_lane, const float& here) { of_lane = here; });
}
const Operation kMmaTf32{"mma_m16n8k8_tf32", run_mma<8>}, kMmaBf16{"mma_m16n8k16_bf16", run_mma<16>};

}  // namespace

// ---------------------------------------------------------------- as the kernels call them

void sync_warp(uint32_t mask, Where where) { wait_warp(kSyncWarp, mask, nullptr, where); }

uint64_t shuffle(Shuffle how, uint32_t mask, uint64_t bits, int argument, int width, Where where) {
  const int lane = block.running->lane, first = lane & ~(width - 1);
  int source = lane;
  if (how == Shuffle::from) source = first + (argument & (width - 1));
  if (how == Shuffle::up && lane - argument >= first) source = lane - argument;
  if (how == Shuffle::down && lane + argument < first + width) source = lane + argument;
  if (how == Shuffle::exchange && (lane ^ argument) < first + width) source = lane ^ argument;
  Shuffled mine{source, bits, 0};
  wait_warp(kShuffles[int(how)], mask, &mine, where);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool value, Where where) {
  Voted mine{value, 0};
  wait_warp(kBallot, mask, &mine, where);
  return mine.result;
}

int64_t reduce(Reduce how, uint32_t mask, int64_t value, Where where) {
  wait_warp(kReduce[int(how)], mask, &value, where);
  return value;
}

uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return 0x7fffffffu;
  return (bits + 0x1000u) & ~0x1fffu;
}

uint32_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Where where) {
  Fragments mine{d, a, b};
  wait_warp(kMmaTf32, 0xffffffffu, &mine, where);
}
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Where where) {
  Fragments mine{d, a, b};
  wait_warp(kMmaBf16, 0xffffffffu, &mine, where);
}

}  // namespace fastmaml::emu
