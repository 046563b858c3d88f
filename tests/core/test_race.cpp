// Does the race build find every planted fault in every order of threads, and nothing in clean kernels?
#include <algorithm>
#include <vector>

#include "emulator_cases.h"

namespace fastmaml {
namespace {

void planted_faults() {
  for (const planted::Fault& fault : planted::faults())
    for (int i = 0; i < kOrders; ++i) {
      set_order(i);
      const std::string said = run_fault(fault);
      expect(said.find(fault.watched) != std::string::npos, std::string(fault.name) + " " + kOrderNames[i], said);
    }
}

// Random programs of reads, writes and barriers: a race is reported exactly where two accesses of one word, one of them a write, have
// nothing between them that orders them.
void random_programs() {
  constexpr int kBlocks = 2, kThreads = 64, kSteps = 8, kWords = 8, kRow = kThreads + 1;
  struct Done {
    int block, thread, word, barriers, syncs;
    bool writes;
  };
  int racy = 0, wrong = 0;
  for (unsigned seed = 0; seed < 600; ++seed) {
    std::mt19937 random(seed);
    const Buffer<int> program(kBlocks * kSteps * kRow);
    const Buffer<float> out(kBlocks * kThreads), words(kBlocks * kWords);
    std::vector<Done> all;
    const unsigned words_used = 1 + random() % kWords, one_writes_in = 2 << random() % 6, touches = 2 + random() % 4;
    const bool blocks_meet = random() % 8 == 0;  // in the words they touch
    for (int b = 0; b < kBlocks; ++b)
      for (int s = 0, barriers = 0, syncs = 0; s < kSteps; ++s) {
        int* row = program.data + (b * kSteps + s) * kRow;
        std::fill(row, row + kRow, 0);
        for (unsigned n = random() % touches; n > 0; --n) {
          const int thread = int(random() % kThreads), word = int(random() % words_used) + (blocks_meet ? 0 : b * kWords);
          if (row[thread]) continue;
          const bool writes = random() % one_writes_in == 0;
          row[thread] = writes ? word + 1 : -word - 1;
          all.push_back({b, thread, word, barriers, syncs, writes});
        }
        row[kThreads] = int(random() % 3);
        barriers += row[kThreads] == 2;
        syncs += row[kThreads] >= 1;
      }
    bool race = false;
    for (const Done& x : all)
      for (const Done& y : all) {
        const bool ordered = x.block == y.block &&
                             (x.thread == y.thread || x.barriers != y.barriers || (x.thread / 32 == y.thread / 32 && x.syncs != y.syncs));
        race = race || (x.word == y.word && (x.writes || y.writes) && !ordered);
      }
    racy += race;
    for (int i = 0; i < kOrders; ++i) {
      set_order(i);
      bool found = false;
      try {
        example::program(out.data, words.data, program.data, kBlocks, kThreads, kSteps);
      } catch (const std::runtime_error&) {
        found = true;
      }
      wrong += found != race;
    }
  }
  expect(wrong == 0 && racy > 200 && racy < 400, "random programs", std::to_string(racy) + " of 600 race, wrong: " + std::to_string(wrong));
}

// Global memory as the threads ask for it: every block of the product fetches its rows of a and columns of b once.
void requested_bytes() {
  const int m = 64, n = 32, k = 16;
  const Buffer<float> a(size_t(m * k), 1), b(size_t(k * n), 2), out(size_t(m * n));
  emu::reset_counts();
  example::gemm_blocked(out.data, a.data, b.data, m, n, k);
  const emu::Kernel gemm = emu::kernels().begin()->second;
  const int64_t blocks = 2, read = blocks * (32 * k + k * 32) * 4, written = int64_t(m) * n * 4;
  expect(gemm.launches == 1 && gemm.bytes_read == read && gemm.bytes_written == written, "bytes of a product",
         std::to_string(gemm.bytes_read) + " read, " + std::to_string(gemm.bytes_written) + " written");
  const Buffer<double> x(1000, 5), total(1);
  emu::reset_counts();
  example::sum(total.data, x.data, 1000);
  const emu::Kernel sum = emu::kernels().begin()->second;
  expect(sum.bytes_read == 8000 && sum.bytes_written == 8, "bytes of a sum");
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  for (int i = 0; i < kOrders; ++i) {
    set_order(i);
    clean_kernels(kOrderNames[i]);
    language(kOrderNames[i]);
  }
  requested_bytes();
  random_programs();
  planted_faults();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
