// Emulates the part of CUDA that csrc/cuda uses on a CPU, and exposes errors. The threads of a block are fibers, which
// run until they wait for each other, in an order that ATTNKERN_HOST_ORDER names (forward, reverse, shuffled). Shared
// memory is filled with NaN. A barrier or a shuffle that not all threads reach is an error. With ATTNKERN_HOST_RECORD
// launches are recorded and not run (benchmarks/count/launches.py).
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// --- storage types ---

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
inline __half __float2half_rn(float x) { return {c10::Half(x).x}; }
inline float __bfloat162float(__nv_bfloat16 x) { return c10::BFloat16(x.bits, c10::BFloat16::from_bits()); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {c10::BFloat16(x).x}; }

namespace cuda_on_host {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedMemory = 99 << 10;      // of a block that asks for it, on the GPUs that have the least
constexpr size_t kUsualSharedMemory = 48 << 10; // that a block's variables can take

enum class State { ready, at_barrier, at_shuffle, done };

struct Copy {
  void* to;
  const void* from; // null for zeros
  size_t bytes;
  int group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started;
  State state;
  int vote;                  // of __syncthreads_or
  unsigned mask;             // the lanes that a shuffle waits for
  uint64_t sent;             // this lane's value in the shuffle
  uint64_t received[kLanes]; // the values of all lanes
  // This lane's factors in mma_tf32(): of even and of odd calls, because other lanes may still read the previous ones.
  float a[2][4], b[2][2];
  int calls;
  int groups; // of copies that have been committed
  std::vector<Copy> copies; // started and not waited for
};

struct Block {
  std::vector<Fiber> fibers{1024};
  int threads = 0, current = 0, votes = 0;
  int64_t serial = 0; // number of blocks run so far; shared() compares it to find out that a new block has begun
  alignas(16) unsigned char memory[kSharedMemory];
  size_t used = 0, dynamic = 0;
  jmp_buf scheduler;
  std::string error;
  const std::function<void()>* body = nullptr;
};
inline Block block;
inline std::mutex one_kernel;

inline Fiber& self() { return block.fibers[block.current]; }

inline void wait(State state) {
  self().state = state;
  if (_setjmp(self().resume) == 0)
    _longjmp(block.scheduler, 1);
}

// Ends the kernel with an error, from inside a fiber.
inline void fail(const std::string& message) {
  block.error = message;
  wait(State::done);
}

inline void run_fiber() {
  (*block.body)();
  self().state = State::done;
  _longjmp(block.scheduler, 1);
}

inline void resume(int index) {
  block.current = index;
  threadIdx = dim3(index);
  Fiber& fiber = self();
  if (_setjmp(block.scheduler) != 0)
    return;
  if (fiber.started)
    _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Completes the shuffles of a warp whose lanes have all arrived. Returns false if there is none.
inline bool release_lanes(int warp) {
  bool moved = false;
  Fiber* lanes = &block.fibers[warp * kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane].state != State::at_shuffle)
      continue;
    const unsigned mask = lanes[lane].mask;
    bool complete = true;
    for (int other = 0; other < kLanes; ++other)
      complete &= (mask >> other & 1) == 0 || (lanes[other].state == State::at_shuffle && lanes[other].mask == mask);
    if (!complete)
      continue;
    for (int to = 0; to < kLanes; ++to)
      if (mask >> to & 1) {
        for (int from = 0; from < kLanes; ++from)
          lanes[to].received[from] = mask >> from & 1 ? lanes[from].sent : ~uint64_t(0);
        lanes[to].state = State::ready;
      }
    moved = true;
  }
  return moved;
}

// Completes the block's barrier once all threads have arrived. Returns false if they have not.
inline bool release_block() {
  int alive = 0, arrived = 0, votes = 0;
  for (int i = 0; i < block.threads; ++i) {
    const Fiber& fiber = block.fibers[i];
    alive += fiber.state != State::done;
    if (fiber.state == State::at_barrier)
      ++arrived, votes += fiber.vote;
  }
  if (arrived < block.threads) // threads that have returned never arrive
    return false;
  block.votes = votes;
  for (int i = 0; i < block.threads; ++i)
    block.fibers[i].state = State::ready;
  return alive > 0;
}

inline void run_block(const std::vector<int>& order) {
  ++block.serial;
  std::memset(block.memory, 0xff, sizeof(block.memory)); // NaN in every floating type
  block.used = (block.dynamic + 15) / 16 * 16;
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.started = false;
    fiber.state = State::ready;
    fiber.calls = fiber.groups = 0;
    fiber.copies.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  // Each warp runs to the block's barrier before the next one starts, so that accesses which only a barrier would order
  // are as far apart as possible.
  std::vector<std::vector<int>> warps;
  std::vector<int> place(block.threads / kLanes, -1);
  for (const int i : order) {
    int& at = place[i / kLanes];
    if (at < 0)
      at = warps.size(), warps.emplace_back();
    warps[at].push_back(i);
  }
  do
    for (const std::vector<int>& warp : warps)
      do
        for (const int i : warp)
          if (block.fibers[i].state == State::ready) {
            resume(i);
            if (!block.error.empty())
              throw std::runtime_error(block.error);
          }
      while (release_lanes(warp.front() / kLanes));
  while (release_block());
  for (int i = 0; i < block.threads; ++i)
    if (block.fibers[i].state != State::done)
      throw std::runtime_error("thread " + std::to_string(i) + " waits for threads that do not arrive");
}

inline std::vector<int> ordered(int count, const std::string& order, std::mt19937& random) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == "reverse")
    std::reverse(indices.begin(), indices.end());
  else if (order == "shuffled")
    std::shuffle(indices.begin(), indices.end(), random);
  else if (order != "forward")
    throw std::runtime_error("ATTNKERN_HOST_ORDER must be forward, reverse or shuffled");
  return indices;
}

inline int64_t launches = 0;

// Narrow, so that grids need their second dimension and have surplus blocks.
constexpr int64_t kGridWidth = 3;

// Runs the blocks of a grid one after the other, in the chosen order; with ATTNKERN_HOST_LAST=n only the last n blocks.
inline void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_kernel);
  if (threads.x % kLanes != 0 || threads.x > block.fibers.size() || shared_bytes > kSharedMemory)
    throw std::runtime_error("a launch needs whole warps, at most 1024 threads and at most 99 KiB of shared memory");
  ++launches;
  const char* chosen = std::getenv("ATTNKERN_HOST_ORDER");
  const std::string order = chosen == nullptr ? "forward" : chosen;
  std::mt19937 random(0);
  gridDim = grid, blockDim = threads;
  block.threads = threads.x, block.dynamic = shared_bytes, block.body = &body;
  block.error.clear();
  const char* last = std::getenv("ATTNKERN_HOST_LAST");
  const int64_t blocks = int64_t(grid.x) * grid.y, some = last == nullptr ? blocks : std::min(blocks, std::atol(last));
  for (const int chosen : ordered(some, order, random)) {
    const int64_t index = blocks - some + chosen;
    blockIdx = dim3(index % grid.x, index / grid.x);
    run_block(ordered(threads.x, order, random));
  }
}

// The bytes of a kernel's parameters as CUDA passes them: in order, each at a multiple of its alignment, padding zero.
template <typename... Parameters> std::vector<unsigned char> packed(const Parameters&... parameters) {
  std::vector<unsigned char> bytes;
  const auto append = [&bytes](auto parameter) {
    const size_t align = alignof(decltype(parameter)), start = (bytes.size() + align - 1) / align * align;
    __builtin_clear_padding(&parameter);
    bytes.resize(start + sizeof(parameter));
    std::memcpy(&bytes[start], &parameter, sizeof(parameter));
  };
  (append(parameters), ...);
  return bytes;
}

// Whether an address belongs to this process's memory.
inline bool is_mapped(uint64_t address) {
  std::ifstream maps("/proc/self/maps");
  unsigned long long begin, end;
  for (std::string line; std::getline(maps, line);)
    if (std::sscanf(line.c_str(), "%llx-%llx", &begin, &end) == 2 && begin <= address && address < end)
      return true;
  return false;
}

inline const char* record_file() { return std::getenv("ATTNKERN_HOST_RECORD"); }

// What a block can have: where it runs here, or on the GPU of compute capability 9.0 that launches are recorded for.
inline size_t shared_memory() { return record_file() != nullptr ? 227 << 10 : kSharedMemory; }

// Appends a line to the file: the kernel's offset in this library, blocks, threads, bytes of dynamic shared memory,
// blocks of a cluster, the parameters in hexadecimal, and the places of the pointers among them.
template <typename... Parameters, typename... Arguments>
void record(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, int cluster,
            Arguments&&... arguments) {
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(kernel), &library) == 0)
    throw std::runtime_error("a kernel is not in a library");
  std::FILE* file = std::fopen(record_file(), "a");
  if (file == nullptr)
    throw std::runtime_error("the file that ATTNKERN_HOST_RECORD names cannot be written");
  const size_t offset = reinterpret_cast<char*>(kernel) - static_cast<char*>(library.dli_fbase);
  std::fprintf(file, "%zu %lld %d %zu %d ", offset, static_cast<long long>(blocks), threads, shared_bytes, cluster);
  const std::vector<unsigned char> bytes = packed<std::decay_t<Parameters>...>(arguments...);
  for (const unsigned char byte : bytes)
    std::fprintf(file, "%02x", byte);
  for (size_t place = 0; place + sizeof(uint64_t) <= bytes.size(); place += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, &bytes[place], sizeof(word));
    if (is_mapped(word))
      std::fprintf(file, " %zu", place);
  }
  std::fprintf(file, "\n");
  std::fclose(file);
}

// The values of all lanes of the mask.
template <typename T> const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  Fiber& fiber = self();
  fiber.sent = 0;
  std::memcpy(&fiber.sent, &value, sizeof(T));
  fiber.mask = mask;
  if ((mask >> (block.current % kLanes) & 1) == 0)
    fail("a shuffle's mask lacks the calling lane");
  wait(State::at_shuffle);
  return fiber.received;
}

template <typename T> T shuffle(unsigned mask, T value, int source) {
  const uint64_t* received = exchange(mask, value);
  std::memcpy(&value, &received[source], sizeof(T));
  return value;
}

inline int lane() { return block.current % kLanes; }

// mma.sync.aligned.m16n8k8 for TF32; csrc/cuda/mma.cuh says which elements a lane has. The hardware rounds sums towards
// zero, so this does, too.
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  Fiber& own = self();
  const int parity = own.calls++ % 2;
  const auto is_tf32 = [](float x) { return x != x || (std::bit_cast<uint32_t>(x) & 0x1fffu) == 0; };
  for (int i = 0; i < 4; ++i)
    if (own.a[parity][i] = a[i]; !is_tf32(a[i]))
      fail("a factor of mma is not a TF32 number");
  for (int i = 0; i < 2; ++i)
    if (own.b[parity][i] = b[i]; !is_tf32(b[i]))
      fail("a factor of mma is not a TF32 number");
  exchange(~0u, 0);
  const Fiber* lanes = &block.fibers[block.current / kLanes * kLanes];
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g, column = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += double(lanes[row * 4 + k % 4].a[parity][k / 4 * 2 + i / 2]) * lanes[column * 4 + k % 4].b[parity][k / 4];
    float rounded = static_cast<float>(sum);
    if (std::abs(rounded) > std::abs(sum) && std::isfinite(rounded))
      rounded = std::nextafter(rounded, 0.0f);
    d[i] = rounded;
  }
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline float round_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? x : std::bit_cast<float>((bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u);
}

// cp.async. The bytes arrive when the thread waits for their group.
inline void copy_async(void* to, const void* from, size_t bytes, bool exists) {
  self().copies.push_back({to, exists ? from : nullptr, bytes, self().groups});
}
inline void commit_copies() { ++self().groups; }
inline void wait_for_copies(int left) {
  std::vector<Copy>& copies = self().copies;
  const auto waits = [&](const Copy& copy) { return copy.group < self().groups - left; };
  for (const Copy& copy : copies)
    if (waits(copy) && copy.from == nullptr)
      std::memset(copy.to, 0, copy.bytes);
    else if (waits(copy))
      std::memcpy(copy.to, copy.from, copy.bytes);
  std::erase_if(copies, waits);
}

inline int barrier(int vote) {
  self().vote = vote;
  wait(State::at_barrier);
  return block.votes;
}

} // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::barrier(0); }
inline int __syncthreads_or(int predicate) { return cuda_on_host::barrier(predicate != 0) != 0; }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::exchange(mask, 0); }

template <typename T> T __shfl_xor_sync(unsigned mask, T value, int with) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() ^ with);
}
template <typename T> T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::shuffle(mask, value, source % cuda_on_host::kLanes);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* received = cuda_on_host::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane)
    votes |= unsigned((mask >> lane & 1) && (received[lane] & 1)) << lane;
  return votes;
}

template <typename T> unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t* received = cuda_on_host::exchange(mask, value);
  const uint64_t own = received[cuda_on_host::lane()];
  unsigned alike = 0;
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane)
    alike |= unsigned((mask >> lane & 1) && received[lane] == own) << lane;
  return alike;
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(unsigned(bits)) + 1; }

namespace attnkern {

// As in common.cuh. Each block has its own memory, filled with NaN.
template <typename S> S& shared() {
  using namespace cuda_on_host;
  static int64_t of_block = -1;
  static S* memory = nullptr;
  if (of_block != block.serial) {
    const size_t bytes = (sizeof(S) + 15) / 16 * 16;
    if (block.used + bytes > (block.dynamic > kUsualSharedMemory ? kSharedMemory : kUsualSharedMemory))
      fail("more shared memory than a block has");
    memory = reinterpret_cast<S*>(block.memory + block.used);
    block.used += bytes;
    of_block = block.serial;
  }
  return *memory;
}
template <typename T> T* dynamic_shared() { return reinterpret_cast<T*>(cuda_on_host::block.memory); }

} // namespace attnkern
