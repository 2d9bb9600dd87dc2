// Loops that the compiler vectorises, tails included: a row of 49 takes four vectors, of which the last one overlaps
// the one before it. Included once per instruction set.

namespace attnkern::ATTNKERN_ISA {

constexpr int kLanes = 16;

// body(i) for i in [0, count). It may run twice for an i, so it must assign, not add.
template <typename Body> ATTNKERN_INLINE void for_lanes(int64_t count, const Body& body) {
  const int64_t whole = count < kLanes ? 0 : count & -kLanes;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i)
    body(i);
  if (whole == count)
    return;
  if (whole > 0)
#pragma omp simd
    for (int64_t i = count - kLanes; i < count; ++i)
      body(i);
  else
    for (int64_t i = 0; i < count; ++i)
      body(i);
}

// lane[i % kLanes] += term(i), exactly once for each i in [0, count).
template <typename A, typename Term> ATTNKERN_INLINE void add_lanes(int64_t count, A (&lane)[kLanes], const Term& term) {
  const int64_t whole = count < kLanes ? 0 : count & -kLanes;
  for (int64_t first = 0; first < whole; first += kLanes)
#pragma omp simd
    for (int i = 0; i < kLanes; ++i)
      lane[i] += term(first + i);
  if (whole == count)
    return;
  if (whole > 0) {
    const int64_t last = count - kLanes;
    const int counted = static_cast<int>(whole - last); // lanes of the last vector that have been added
#pragma omp simd
    for (int i = 0; i < kLanes; ++i)
      lane[i] += i >= counted ? term(last + i) : A(0);
  } else {
    for (int i = 0; i < count; ++i)
      lane[i] += term(i);
  }
}

template <typename A> ATTNKERN_INLINE A sum_of(const A (&lane)[kLanes]) {
  A quarter[4];
#pragma omp simd
  for (int i = 0; i < 4; ++i)
    quarter[i] = (lane[i] + lane[i + 4]) + (lane[i + 8] + lane[i + 12]);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// The same for four sums at once.
template <typename A> ATTNKERN_INLINE void sums_of(const A (&lane)[4][kLanes], A* out) {
  A quarter[4][4];
  for (int k = 0; k < 4; ++k)
#pragma omp simd
    for (int i = 0; i < 4; ++i)
      quarter[k][i] = (lane[k][i] + lane[k][i + 4]) + (lane[k][i + 8] + lane[k][i + 12]);
#pragma omp simd
  for (int k = 0; k < 4; ++k)
    out[k] = (quarter[k][0] + quarter[k][1]) + (quarter[k][2] + quarter[k][3]);
}

// Σ term(i) for i in [0, count).
template <typename A, typename Term> ATTNKERN_INLINE A sum_lanes(int64_t count, const Term& term) {
  A lane[kLanes] = {};
  add_lanes(count, lane, term);
  return sum_of(lane);
}

// to[i] = value(i) for i in [0, count). With `stream` the stores bypass the caches, which avoids reading memory that is
// about to be overwritten. This pays off if the tensor is too large to stay in the caches until it is read.
template <typename T, typename Value>
ATTNKERN_INLINE void write_lanes(int64_t count, T* to, [[maybe_unused]] bool stream, const Value& value) {
#if defined(ATTNKERN_X86)
  if (stream) {
    // Segments are short, so that the loads of one overlap the stores of the one before it: with 1,024 elements the
    // same loop takes 1.5 times as long.
    constexpr int64_t segment = 128, vector = 16 / sizeof(T);
    alignas(64) T buffer[segment];
    for (int64_t first = 0; first < count; first += segment) {
      const int64_t length = std::min(segment, count - first);
      for_lanes(length, [&](int64_t i) { buffer[i] = value(first + i); });
      T* out = to + first;
      int64_t i = std::min<int64_t>(length, (-reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
      memcpy(out, buffer, i * sizeof(T));
      for (; i + vector <= length; i += vector)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<__m128i*>(buffer + i)));
      memcpy(out + i, buffer + i, (length - i) * sizeof(T));
    }
    return; // parallel() executes the fence
  }
#endif
  for_lanes(count, [=](int64_t i) { to[i] = value(i); });
}

} // namespace attnkern::ATTNKERN_ISA
