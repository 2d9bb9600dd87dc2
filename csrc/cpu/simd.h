// Loops over lanes that the compiler turns into vectors, tails included: a masked vector, not a scalar loop, so that a
// row of 49 costs four vectors. Included once per instruction set.

namespace attnkern::ATTNKERN_ISA {

constexpr int kLanes = 16;

// body(i) for i in [0, count).
template <typename Body> ATTNKERN_INLINE void for_lanes(int64_t count, const Body& body) {
  const int64_t whole = count & -kLanes;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i)
    body(i);
  const int rest = static_cast<int>(count - whole);
  if (rest > 0)
#pragma omp simd
    for (int i = 0; i < kLanes; ++i)
      if (i < rest)
        body(whole + i);
}

// Σ term(i) for i in [0, count), lane by lane and then over the lanes.
template <typename A, typename Term> ATTNKERN_INLINE A sum_lanes(int64_t count, const Term& term) {
  A lane[kLanes] = {};
  const int64_t whole = count & -kLanes;
  for (int64_t first = 0; first < whole; first += kLanes)
#pragma omp simd
    for (int i = 0; i < kLanes; ++i)
      lane[i] += term(first + i);
  const int rest = static_cast<int>(count - whole);
  if (rest > 0)
#pragma omp simd
    for (int i = 0; i < kLanes; ++i)
      lane[i] += i < rest ? term(whole + i) : A(0);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kLanes; ++i)
    sum += lane[i];
  return sum;
}

} // namespace attnkern::ATTNKERN_ISA
