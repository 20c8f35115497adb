#include <algorithm>
#include <mutex>
#include <new>

#include "common.h"

namespace fasttx::bindings {
namespace {

// What one thread keeps at most. A block that does not fit under it goes back to the system at once.
constexpr size_t kMostKept = size_t{256} << 20;
constexpr std::align_val_t kAlignment{64};

void free_block(const Workspace::Block& block) { ::operator delete(block.data, kAlignment); }

// The blocks that a thread keeps; entered in the list of all pools for as long as the thread lives.
class Pool {
 public:
  Pool() {
    const std::lock_guard lock(all_mutex());
    all().push_back(this);
  }
  ~Pool() {
    const std::lock_guard lock(all_mutex());
    all().erase(std::find(all().begin(), all().end(), this));
    release();
  }

  Workspace::Block take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    // The smallest that fits.
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->bytes >= bytes && (best == free_.end() || block->bytes < best->bytes)) best = block;
    if (best == free_.end()) return {::operator new(bytes, kAlignment), bytes};
    const Workspace::Block block = *best;
    kept_ -= block.bytes;
    free_.erase(best);
    return block;
  }

  void give_back(const Workspace::Block& block) {
    const std::lock_guard lock(mutex_);
    // A thread that is given larger and larger work keeps no row of blocks that became too small.
    while (!free_.empty() && kept_ + block.bytes > kMostKept) {
      const auto smallest = std::min_element(free_.begin(), free_.end(),
                                             [](const auto& a, const auto& b) { return a.bytes < b.bytes; });
      kept_ -= smallest->bytes;
      free_block(*smallest);
      free_.erase(smallest);
    }
    if (block.bytes > kMostKept) return free_block(block);
    free_.push_back(block);
    kept_ += block.bytes;
  }

  void release() {
    const std::lock_guard lock(mutex_);
    for (const Workspace::Block& block : free_) free_block(block);
    free_.clear();
    kept_ = 0;
  }

  size_t kept() {
    const std::lock_guard lock(mutex_);
    return kept_;
  }

  static std::vector<Pool*>& all() {
    static std::vector<Pool*>* pools = new std::vector<Pool*>;  // outlives every thread
    return *pools;
  }
  static std::mutex& all_mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }

 private:
  std::mutex mutex_;
  std::vector<Workspace::Block> free_;
  size_t kept_ = 0;
};

Pool& pool() {
  thread_local Pool mine;
  return mine;
}

}  // namespace

Workspace::Workspace(size_t bytes) {
  if (bytes > 0) block_ = pool().take(bytes);
}

Workspace::~Workspace() {
  if (block_.data != nullptr) pool().give_back(block_);
}

size_t workspace_bytes() {
  const std::lock_guard lock(Pool::all_mutex());
  size_t total = 0;
  for (Pool* each : Pool::all()) total += each->kept();
  return total;
}

void release_workspaces() {
  const std::lock_guard lock(Pool::all_mutex());
  for (Pool* each : Pool::all()) each->release();
}

}  // namespace fasttx::bindings
