// Records launches with their arguments instead of running them, as a CUDA graph does.
#include <utility>

#include "cuda/emulated/state.h"

namespace fastmaml::emu {
namespace {

thread_local Recording* under_way = nullptr;

}  // namespace

void begin_recording() {
  delete under_way;  // left by a thread that gave up
  under_way = new Recording;
}

Recording* end_recording() { return std::exchange(under_way, nullptr); }

void launch_or_keep(const Launch& what, const std::function<std::shared_ptr<const void>()>& kept_call) {
  if (!under_way) return launch(what);
  Launch kept = what;
  under_way->calls.push_back(kept_call());
  kept.call = under_way->calls.back().get();
  under_way->launches.push_back(kept);
}

void replay(const Recording& recording) {
  for (const Launch& kept : recording.launches) launch(kept);
}

}  // namespace fastmaml::emu
