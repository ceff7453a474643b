// Memory in large pages, used again. Fresh memory costs a fault at every page when it is first touched, for a large
// image as long as a sparse convolution; and panels in small pages miss the TLB at nearly every live weight.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lottery {

constexpr size_t kLargePage = 2 << 20;

// `bytes`: a multiple of kLargePage. Freed with std::free.
inline void* allocate_large(size_t bytes) {
  void* data = std::aligned_alloc(kLargePage, bytes);
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);  // a mere hint
#endif
  return data;
}

inline size_t in_large_pages(size_t bytes) { return (bytes + kLargePage - 1) / kLargePage * kLargePage; }

// Second-level cache of a core, in bytes.
inline size_t cache_size() {
  static const size_t size = [] {
    long found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found >= (256 << 10) && found <= (4 << 20) ? size_t(found) : size_t(1 << 20);
  }();
  return size;
}

// A buffer that grows; its contents are undefined.
template <class S>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  S* at_least(size_t count) {
    if (count * sizeof(S) > bytes_) {
      std::free(data_);
      data_ = nullptr, bytes_ = 0;
      const size_t bytes = in_large_pages(count * sizeof(S));
      data_ = static_cast<S*>(allocate_large(bytes)), bytes_ = bytes;
    }
    return data_;
  }

 private:
  S* data_ = nullptr;
  size_t bytes_ = 0;
};

// Blocks of freed images, for the next ones of their size. With what is in use it holds up to half as much again as was
// ever in use at once: not all sizes that a training step asks for are in use at the same time.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // outlives every tensor
    return *pool;
  }

  // `bytes`: a multiple of kLargePage.
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    in_use_ += bytes;
    most_ = std::max(most_, in_use_);
    const auto fits = [&](const Block& block) { return block.bytes == bytes; };
    if (const auto found = std::find_if(held_.begin(), held_.end(), fits); found != held_.end()) {
      void* data = found->data;
      held_.erase(found), held_bytes_ -= bytes;
      return data;
    }
    while (held_bytes_ > 0 && held_bytes_ + in_use_ > most_ + most_ / 2) {
      held_bytes_ -= held_.back().bytes;
      std::free(held_.back().data);
      held_.pop_back();
    }
    return allocate_large(bytes);
  }

  void give_back(void* data, size_t bytes) {
    const std::lock_guard lock(mutex_);
    in_use_ -= bytes, held_bytes_ += bytes;
    held_.push_front({data, bytes});
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  std::mutex mutex_;
  std::list<Block> held_;  // freed last, first
  size_t in_use_ = 0, held_bytes_ = 0, most_ = 0;
};

}  // namespace lottery
