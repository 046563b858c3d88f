// The functions of Device (ops.h): moving numbers, and recording launches as CUDA graphs or as the emulator's lists.
#include <algorithm>
#include <vector>

#include "cuda/cuda_ops.h"
#include "cuda/kernels/move.cuh"
#include "cuda/launch.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

constexpr int kThreads = 256;

void copy(const Device::Piece* pieces, int count, uintptr_t stream) {
  for (int first = 0; first < count; first += kPieces) {
    const int here = std::min(count - first, kPieces);
    PieceList list{};
    size_t most = 16;
    for (int i = 0; i < here; ++i) {
      const Device::Piece& piece = pieces[first + i];
      list.to[i] = static_cast<unsigned char*>(piece.to);
      list.from[i] = static_cast<const unsigned char*>(piece.from);
      list.bytes[i] = int64_t(piece.bytes);
      most = std::max(most, piece.bytes);
    }
    const size_t blocks = (most / 16 + kThreads - 1) / kThreads;
    launch(copy_pieces<kThreads>, dim3(unsigned(std::clamp<size_t>(blocks, 1, 512)), unsigned(here)), dim3(kThreads), 0, stream, list);
  }
}

template <class T>
void run_gather(void* out, const void* x, const int32_t* index, int64_t rows, int64_t size, uintptr_t stream) {
  if (rows == 0 || size == 0) return;
  launch(gather<T, kThreads>, dim3(unsigned((size + kThreads - 1) / kThreads), unsigned(std::min<int64_t>(rows, 65535))), dim3(kThreads), 0,
         stream, static_cast<T*>(out), static_cast<const T*>(x), index, rows, int(size));
}

#ifdef FASTMAML_EMULATED

int use(int index) { return index; }
uintptr_t begin_recording() {
  emu::begin_recording();
  return 0;
}
void* end_recording() { return emu::end_recording(); }
void replay(void* recording, uintptr_t) { emu::replay(*static_cast<emu::Recording*>(recording)); }
void forget(void* recording) { delete static_cast<emu::Recording*>(recording); }
bool is_recorded(uintptr_t) { return false; }

#else

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

int use(int index) {
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  if (before != index) check(cudaSetDevice(index), "cudaSetDevice");
  return before;
}

// CUDA cannot record the default stream, so each thread keeps a stream for every device.
cudaStream_t recording_stream() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  thread_local std::vector<cudaStream_t> streams;
  if (device >= int(streams.size())) streams.resize(device + 1, nullptr);
  if (!streams[device]) check(cudaStreamCreateWithFlags(&streams[device], cudaStreamNonBlocking), "cudaStreamCreate");
  return streams[device];
}

uintptr_t begin_recording() {
  const cudaStream_t stream = recording_stream();
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  return reinterpret_cast<uintptr_t>(stream);
}

void* end_recording() {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(recording_stream(), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  return executable;
}

void replay(void* recording, uintptr_t stream) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording), stream_of(stream)), "cudaGraphLaunch");
}

// The device may still be running the graph. CUDA frees it after its last launch.
void forget(void* recording) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recording)); }

bool is_recorded(uintptr_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

#endif

}  // namespace

template <class T>
const Device* device() {
  static const Device it{use, copy, run_gather<T>, begin_recording, end_recording, replay, forget, is_recorded};
  return &it;
}
template const Device* device<float>();
template const Device* device<double>();

}  // namespace fastmaml::FASTMAML_CUDA_NS
