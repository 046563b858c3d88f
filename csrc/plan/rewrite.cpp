#include "plan/rewrite.h"

#include <utility>

#include "plan/chunks.h"
#include "plan/fuse.h"
#include "plan/fuse_updates.h"
#include "plan/lane_schedule.h"
#include "plan/stream.h"

namespace fastmaml {
namespace {

// A gradient of more bytes has left the cache before it is read, so it is made in chunks that have not; both are chosen from the network
// and N alone, as a sum's order depends on them.
constexpr int64_t kCacheBytes = int64_t(2) << 20, kChunkBytes = int64_t(512) << 10;
constexpr int64_t kChunkedBytes = int64_t(1) << 20;  // the same for what a run of layers touches

}  // namespace

Schedule rewritten(Schedule schedule, const OpTable& table, const AfterStage& after) {
  const auto supports = [&](Op op) { return table.supports(op); };
  const int64_t bytes = int64_t(table.real_bytes);
  const bool host = !table.device, side_by_side = table.lanes > 1;
  const auto done = [&](const char* stage) {
    if (after) after(stage, schedule);
  };
  schedule = fuse(std::move(schedule), supports);
  done("fuse");
  if (host) {
    schedule = stream(schedule, {kCacheBytes / bytes, kChunkBytes / bytes});
    done("stream");
  }
  if (host && !side_by_side) {
    schedule = chunk_examples(schedule, {kChunkedBytes / bytes});
    done("chunk_examples");
  }
  if (side_by_side) {
    schedule = lane_schedule(std::move(schedule));
    done("lane_schedule");
  }
  schedule = fuse_updates(std::move(schedule), supports);
  done("fuse_updates");
  return schedule;
}

}  // namespace fastmaml
