// What the CUDA backend does beside ops, on the emulator: vectors in another order, pieces of memory of any size and alignment, and
// launches that are recorded and replayed.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/cuda_tables.h"
#include "cuda/emulated/emu.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void report(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  std::printf("%s  %s\n", ok ? "ok  " : "FAIL", what.c_str());
}

// Memory between guard pages.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) : data_(static_cast<T*>(emu::allocate(size * sizeof(T)))), size_(size) {}
  ~Buffer() { emu::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  bool equals(const std::vector<T>& other) { return std::memcmp(data_, other.data(), size_ * sizeof(T)) == 0; }

 private:
  T* data_;
  size_t size_;
};

template <class T>
void test_gather(int64_t rows, int64_t size) {
  Buffer<T> x(size_t(rows * size)), out(size_t(rows * size));
  Buffer<int32_t> index{size_t(size)};
  std::vector<T> expected(size_t(rows * size));
  for (int64_t i = 0; i < rows * size; ++i) x[i] = T(i) + T(0.5);
  for (int64_t i = 0; i < size; ++i) index[i] = int32_t((i * 7 + 3) % size);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < size; ++i) expected[r * size + i] = x[r * size + (i * 7 + 3) % size];
  cuda_emulated_ops(sizeof(T)).device->gather(out.data(), x.data(), index.data(), rows, size, 0);
  report(out.equals(expected), "gather of " + std::to_string(rows) + " x " + std::to_string(size) + (sizeof(T) == 4 ? " f32" : " f64"));
}

void test_copy() {
  // Words from several places at once; 70 pieces are more than one launch takes.
  const Device& device = *cuda_emulated_ops(sizeof(float)).device;
  for (const size_t first : {0, 1, 2, 3})
    for (const size_t words : {0, 1, 3, 4, 5, 31, 33, 1025}) {
      Buffer<float> from(words + 4), to(words + 4);
      std::vector<float> expected(words + 4, -1);
      for (size_t i = 0; i < words + 4; ++i) from[i] = float(i), to[i] = -1;
      for (size_t i = 0; i < words; ++i) expected[first + i] = float(i);
      const Device::Piece piece{to.data() + first, from.data(), words * sizeof(float)};
      device.copy(&piece, 1, 0);
      report(to.equals(expected), "copy of " + std::to_string(words) + " words to word " + std::to_string(first));
    }
  std::vector<Device::Piece> pieces;
  Buffer<float> from(70 * 3), to(70 * 3);
  std::vector<float> expected(70 * 3);
  for (size_t i = 0; i < 70 * 3; ++i) from[i] = expected[i] = float(i);
  for (size_t i = 0; i < 70; ++i) pieces.push_back({to.data() + 3 * i, from.data() + 3 * i, 3 * sizeof(float)});
  device.copy(pieces.data(), int(pieces.size()), 0);
  report(to.equals(expected), "copy of 70 pieces");
}

void test_recording() {
  const Device& device = *cuda_emulated_ops(sizeof(float)).device;
  Buffer<float> a(5), b(5), c(5);
  for (size_t i = 0; i < 5; ++i) a[i] = float(i), b[i] = c[i] = -1;
  const int64_t before = emu::launches();
  const uintptr_t stream = device.begin_recording();
  for (const Device::Piece& piece : {Device::Piece{b.data(), a.data(), 20}, Device::Piece{c.data(), b.data(), 20}})
    device.copy(&piece, 1, stream);
  void* const recording = device.end_recording();
  report(emu::launches() == before && b[0] == -1, "recorded launches do not run");
  for (const float start : {1.0f, 10.0f}) {
    for (size_t i = 0; i < 5; ++i) a[i] = start + float(i);
    device.replay(recording, 0);
    bool good = true;
    for (size_t i = 0; i < 5; ++i) good = good && c[i] == start + float(i);
    report(good, "a replay reads what is there now, " + std::to_string(int(start)));
  }
  report(emu::launches() == before + 4, "a replay makes each launch once");
  device.forget(recording);
  const Device::Piece piece{b.data(), c.data(), 20};
  device.copy(&piece, 1, 0);
  report(emu::launches() == before + 5, "launches run again after a recording");
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  for (const int64_t rows : {1, 2, 3, 5})
    for (const int64_t size : {1, 2, 31, 33, 257}) {
      test_gather<float>(rows, size);
      test_gather<double>(rows, size);
    }
  test_copy();
  test_recording();
  std::printf("%d passed, %d failed, %lld launches of %zu kernels\n", passed, failed, static_cast<long long>(emu::launches()),
              emu::kernels().size());
  return failed > 0;
}
