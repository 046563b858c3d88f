// CUDA's device language on the host, for kernels compiled by g++: the counterpart of cuda_runtime.h.
// Every CUDA thread is a fiber, and blocks run one after the other (block.cpp). Only device.h includes this file.
#pragma once

#include <math.h>  // not cmath: kernels call exp(float) without std

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__ __attribute__((abi_tag("kernel"), noinline))  // the tag marks kernels among the symbols
#define __shared__ thread_local                                  // implies static, and marks shared memory
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define FASTMAML_SHARED unsigned char* const shared_bytes = ::fastmaml::emu::dynamic_shared()
#define FASTMAML_UNSEEN __attribute__((no_sanitize("thread", "undefined")))  // the race build does not check such code

// ---------------------------------------------------------------- vectors and indices

#define FASTMAML_VECTORS(T, name, align2, align4)                              \
  struct name##1 { T x; };                                                     \
  struct alignas(align2) name##2 { T x, y; };                                  \
  struct name##3 { T x, y, z; };                                               \
  struct alignas(align4) name##4 { T x, y, z, w; };                            \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FASTMAML_VECTORS(float, float, 8, 16)
FASTMAML_VECTORS(double, double, 16, 16)
FASTMAML_VECTORS(int, int, 8, 16)
FASTMAML_VECTORS(unsigned, uint, 8, 16)
FASTMAML_VECTORS(unsigned char, uchar, 2, 4)
#undef FASTMAML_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---------------------------------------------------------------- launches

namespace fastmaml::emu {

using Where = std::source_location;  // where a kernel calls a barrier or warp operation, for the messages

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void* call);  // runs the kernel once, as one thread
  const void* call;
};
void launch(const Launch& launch);

// Between begin_recording and end_recording this thread's launches are kept with a copy of their arguments, and do not run.
struct Recording {
  std::vector<Launch> launches;
  std::vector<std::shared_ptr<const void>> calls;  // owners of each Launch::call
};
void begin_recording();
Recording* end_recording();  // the caller deletes it
void replay(const Recording& recording);
void launch_or_keep(const Launch& what, const std::function<std::shared_ptr<const void>()>& kept_call);

// The value that choose.h uses for blocks at once. Small, so that small tests need a second launch.
extern int64_t blocks_at_once;

template <class... Params>
struct Call {
  void (*kernel)(Params...);
  std::tuple<Params...> arguments;

  FASTMAML_UNSEEN static void run(const void* call) { static_cast<const Call*>(call)->apply(std::index_sequence_for<Params...>()); }

 private:
  template <size_t... i>
  FASTMAML_UNSEEN void apply(std::index_sequence<i...>) const {
    kernel(std::get<i>(arguments)...);
  }
};

unsigned char* dynamic_shared();

// ---------------------------------------------------------------- barriers and warp operations

enum class Vote { all, any, count };

int barrier(Vote vote, bool value, Where where);
void sync_warp(uint32_t mask, Where where);

// Every lane of the mask gives `bits` and receives the bits of lane source(lane).
enum class Shuffle { from, up, down, exchange };
uint64_t shuffle(Shuffle how, uint32_t mask, uint64_t bits, int argument, int width, Where where);
uint32_t ballot(uint32_t mask, bool value, Where where);
enum class Reduce { add, min, max, bit_and, bit_or, bit_xor };
int64_t reduce(Reduce how, uint32_t mask, int64_t value, Where where);

void async_copy(void* shared, const void* from, int bytes, bool valid, Where where);
void async_commit();
void async_wait(int left);

uint32_t to_tf32(float x);
uint32_t to_bf16(float x);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Where where);
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Where where);

template <class T>
T shuffle(Shuffle how, uint32_t mask, T value, int argument, int width, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(how, mask, bits, argument, width, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void atomic_access(const void* address, size_t bytes, Where where);  // reports to the race build

}  // namespace fastmaml::emu

#define FASTMAML_WHERE ::fastmaml::emu::Where where = ::fastmaml::emu::Where::current()

inline void __syncthreads(FASTMAML_WHERE) { ::fastmaml::emu::barrier(::fastmaml::emu::Vote::all, true, where); }
inline int __syncthreads_and(int p, FASTMAML_WHERE) { return ::fastmaml::emu::barrier(::fastmaml::emu::Vote::all, p != 0, where); }
inline int __syncthreads_or(int p, FASTMAML_WHERE) { return ::fastmaml::emu::barrier(::fastmaml::emu::Vote::any, p != 0, where); }
inline int __syncthreads_count(int p, FASTMAML_WHERE) { return ::fastmaml::emu::barrier(::fastmaml::emu::Vote::count, p != 0, where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTMAML_WHERE) { ::fastmaml::emu::sync_warp(mask, where); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, FASTMAML_WHERE) {
  return ::fastmaml::emu::shuffle<T>(::fastmaml::emu::Shuffle::from, mask, value, lane, width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, FASTMAML_WHERE) {
  return ::fastmaml::emu::shuffle<T>(::fastmaml::emu::Shuffle::up, mask, value, int(by), width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, FASTMAML_WHERE) {
  return ::fastmaml::emu::shuffle<T>(::fastmaml::emu::Shuffle::down, mask, value, int(by), width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, FASTMAML_WHERE) {
  return ::fastmaml::emu::shuffle<T>(::fastmaml::emu::Shuffle::exchange, mask, value, with, width, where);
}
inline unsigned __ballot_sync(unsigned mask, int p, FASTMAML_WHERE) { return ::fastmaml::emu::ballot(mask, p != 0, where); }
inline int __any_sync(unsigned mask, int p, FASTMAML_WHERE) { return ::fastmaml::emu::ballot(mask, p != 0, where) != 0; }
inline int __all_sync(unsigned mask, int p, FASTMAML_WHERE) { return ::fastmaml::emu::ballot(mask, p != 0, where) == mask; }

#define FASTMAML_REDUCE(T, name, how)                                                                 \
  inline T __reduce_##name##_sync(unsigned mask, T value, FASTMAML_WHERE) {                           \
    return static_cast<T>(::fastmaml::emu::reduce(::fastmaml::emu::Reduce::how, mask, value, where)); \
  }
FASTMAML_REDUCE(int, add, add)
FASTMAML_REDUCE(int, min, min)
FASTMAML_REDUCE(int, max, max)
FASTMAML_REDUCE(unsigned, add, add)
FASTMAML_REDUCE(unsigned, min, min)
FASTMAML_REDUCE(unsigned, max, max)
FASTMAML_REDUCE(unsigned, and, bit_and)
FASTMAML_REDUCE(unsigned, or, bit_or)
FASTMAML_REDUCE(unsigned, xor, bit_xor)
#undef FASTMAML_REDUCE

// ---------------------------------------------------------------- memory
// Only integer atomics: sums of floats would depend on the order of threads.

#define FASTMAML_ATOMIC(name, expression)                                             \
  template <class T>                                                                  \
  FASTMAML_UNSEEN T name(T* address, std::type_identity_t<T> value, FASTMAML_WHERE) { \
    static_assert(std::is_integral_v<T>, "atomics are for integers");                 \
    ::fastmaml::emu::atomic_access(address, sizeof(T), where);                        \
    const T old = *address;                                                           \
    *address = expression;                                                            \
    return old;                                                                       \
  }
FASTMAML_ATOMIC(atomicAdd, T(old + value))
FASTMAML_ATOMIC(atomicExch, value)
FASTMAML_ATOMIC(atomicMin, old < value ? old : value)
FASTMAML_ATOMIC(atomicMax, old > value ? old : value)
#undef FASTMAML_ATOMIC
template <class T>
FASTMAML_UNSEEN T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value, FASTMAML_WHERE) {
  static_assert(std::is_integral_v<T>, "atomics are for integers");
  ::fastmaml::emu::atomic_access(address, sizeof(T), where);
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

#undef FASTMAML_WHERE

template <class T>
inline T __ldg(const T* from) {
  return *from;
}

// ---------------------------------------------------------------- arithmetic

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

#define FASTMAML_BITS(From, To, name)   \
  inline To name(From from) {           \
    To to;                              \
    std::memcpy(&to, &from, sizeof to); \
    return to;                          \
  }
FASTMAML_BITS(float, int, __float_as_int)
FASTMAML_BITS(float, unsigned, __float_as_uint)
FASTMAML_BITS(int, float, __int_as_float)
FASTMAML_BITS(unsigned, float, __uint_as_float)
#undef FASTMAML_BITS

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

#define FASTMAML_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
FASTMAML_MIN_MAX(int)
FASTMAML_MIN_MAX(unsigned)
FASTMAML_MIN_MAX(long)
FASTMAML_MIN_MAX(unsigned long)
FASTMAML_MIN_MAX(long long)
FASTMAML_MIN_MAX(unsigned long long)
#undef FASTMAML_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
