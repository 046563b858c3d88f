// Launchers of emulator_kernels.cu: clean kernels that the emulator must run right, in any order of threads.
#pragma once

namespace fastmaml::example {

template <class T>
void gemm_tiled(T* out, const T* a, const T* b, int m, int n, int k);                // out [m, n] = a [m, k] b [k, n]
void gemm_blocked(float* out, const float* a, const float* b, int m, int n, int k);  // n, k multiples of 4
void gemm_tensor(bool bf16, float* out, const float* a, const float* b, int k);      // m = 16, n = 8, k a multiple of 16
template <class T>
void sum(T* out, const T* x, int n);    // out [1] = sum of x [n]
void count(int* counts, const int* x);  // counts [3]: the odd ones among x [128], counted three ways
void language(int* out);                // out [13, 64]: see use_language
// out [blocks, threads], words [..], program [blocks, steps, threads + 1]: see follow_program
void program(float* out, float* words, const int* program, int blocks, int threads, int steps);
void barriers(float* out, int threads, int n);  // n of them, in one block
void shuffles(float* out, int threads, int n);  // out [threads]

}  // namespace fastmaml::example
