// Resolving addresses.
#include "memory.h"

#include "engine.h"

namespace emu {

static void check_alignment(u64 address, u64 align, const char* space) {
  if (address % align) fault(ErrorKind::kAlignment, "%s address 0x%llx is not aligned to %llu bytes", space, address, align);
}

Place Engine::shared_place(Cta& cta, u64 address, u64 bytes, u64 align, bool write) {
  check_alignment(address, align, "shared");
  Cta* owner = &cta;
  if (u64 rank = address >> kClusterRankShift) {
    if (rank > cta.cluster->ctas.size())
      fault(ErrorKind::kBounds, "shared address 0x%llx is in no CTA of the cluster", address);
    owner = cta.cluster->ctas[rank - 1].get();
    if (!owner->live_threads)
      fault(ErrorKind::kBounds, "access to the shared memory of CTA %llu of the cluster, which has exited", (rank - 1));
  }
  u64 offset = address & ((1u << kClusterRankShift) - 1);
  if (offset < kSharedBase)
    fault(ErrorKind::kBounds, "%s of %llu bytes at shared address %llu, below the CTA's shared memory",
          write ? "write" : "read", bytes, offset);
  owner->shared.check(offset, bytes, write);
  return {&owner->shared, offset, kFenceShared};
}

Place Engine::global_place(u64 address, u64 bytes, bool write) {
  u64 index = (address >> kBufferShift) - 1;
  if (index >= buffers.size()) {
    // Just below a buffer is still meant for it.
    u64 next = ((address + (1ull << (kBufferShift - 1))) >> kBufferShift) - 1;
    if (next < buffers.size()) buffers[next].check(address - buffers[next].address, bytes, write);
    fault(ErrorKind::kBounds, "%s of %llu bytes at 0x%llx, which is in no buffer", write ? "write" : "read", bytes, address);
  }
  Region& region = buffers[index];
  u64 offset = address - region.address;
  if (i64(offset) > i64(1ull << (kBufferShift - 1)) && index + 1 < buffers.size()) {
    Region& above = buffers[index + 1];
    above.check(address - above.address, bytes, write);
  }
  region.check(offset, bytes, write);
  return {&region, offset, kFenceGlobal};
}

Place Engine::place(Warp& warp, u32 at_lane, u64 address, Space space, u64 bytes, u64 align, bool write) {
  lane = int(at_lane);
  if (space == Space::kGeneric) space = address & kSharedWindow ? Space::kShared : Space::kGlobal;
  if (space == Space::kShared) return shared_place(*warp.cta, address & ~kSharedWindow, bytes, align, write);
  check_alignment(address, align, "global");
  return global_place(address, bytes, write);
}

}  // namespace emu
