// Vectors as wide as the processor's registers, in the extensions that GCC and Clang share; SiLU and its slopes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace multifid {

// ROWS: rows that a product of matrices keeps in registers, two vectors wide.
#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 14;
#elif defined(__AVX2__)
constexpr int BYTES = 32, ROWS = 6;
#else
constexpr int BYTES = 16, ROWS = 6;
#endif

template <class T> struct Lanes {
  static constexpr int N = BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(BYTES)));
  typedef T Anywhere __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};
template <class T> using V = typename Lanes<T>::Vector;

struct bf16 {
  uint16_t bits;
};

inline V<float> load(const float *p) { return *(const Lanes<float>::Anywhere *)p; }
inline V<double> load(const double *p) { return *(const Lanes<double>::Anywhere *)p; }
inline void store(float *p, V<float> x) { *(Lanes<float>::Anywhere *)p = x; }
inline void store(double *p, V<double> x) { *(Lanes<double>::Anywhere *)p = x; }

typedef uint32_t U32 __attribute__((vector_size(BYTES)));
typedef int32_t I32 __attribute__((vector_size(BYTES)));
typedef int64_t I64 __attribute__((vector_size(BYTES)));
typedef uint16_t U16 __attribute__((vector_size(BYTES / 2)));
typedef uint16_t U16Anywhere __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

inline V<float> load(const bf16 *p) {
  return (V<float>)(__builtin_convertvector((U16) * (const U16Anywhere *)p, U32) << 16);
}

// Rounded to the nearest, ties to even; what is not a number stays none.
inline void store(bf16 *p, V<float> x) {
#if defined(__AVX512BF16__)
  *(U16Anywhere *)p = (U16)_mm512_cvtneps_pbh((__m512)x);
#else
  U32 bits = (U32)x;
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (x == x) ? rounded : rounded * 0 + 0x7fc0;
  *(U16Anywhere *)p = __builtin_convertvector(rounded, U16);
#endif
}

inline float rounded(float x) {
  if (x != x) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline V<float> rounded(V<float> x) {
  U32 bits = (U32)x;
  V<float> near = (V<float>)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
  return (x == x) ? near : x;
}

// The sum of the numbers of a vector, by halves.
template <class T, int SIZE, class X> inline T sum_of(X x) {
  if constexpr (SIZE == 1) {
    return x[0];
  } else if constexpr (SIZE * sizeof(T) <= 16) {
    T total = x[0];
    for (int l = 1; l < SIZE; ++l) total += x[l];
    return total;
  } else {
    typedef T Half __attribute__((vector_size(SIZE / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, &x, sizeof(Half));
    std::memcpy(&high, reinterpret_cast<const char *>(&x) + sizeof(Half), sizeof(Half));
    return sum_of<T, SIZE / 2>(Half(low + high));
  }
}
template <class T> inline T sum(V<T> x) { return sum_of<T, Lanes<T>::N>(x); }

// Eight channels of an atom.
constexpr int GROUP = 8;
template <class T> struct Group {
  typedef T Vector __attribute__((vector_size(GROUP * sizeof(T))));
  typedef T Anywhere __attribute__((vector_size(GROUP * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T> using G = typename Group<T>::Vector;
template <class T> inline G<T> group(const T *p) { return *(const typename Group<T>::Anywhere *)p; }
template <class T> inline void put_group(T *p, G<T> x) { *(typename Group<T>::Anywhere *)p = x; }
template <class T> inline T sum_group(G<T> x) { return sum_of<T, GROUP>(x); }

inline V<float> exponential(V<float> x) {
  const V<float> top = V<float>{} + 80.0f, bottom = V<float>{} - 87.0f;
  x = (x > top) ? top : x;
  x = (x < bottom) ? bottom : x;
  const V<float> shifted = x * 1.44269504088896f + 12582912.0f; // 1.5 * 2^23: the whole number stands in the last bits
  const V<float> n = shifted - 12582912.0f;
  const V<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V<float> p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return (V<float>)((I32)p + ((I32)shifted << 23));
}

inline V<double> exponential(V<double> x) {
  const V<double> top = V<double>{} + 708.0, bottom = V<double>{} - 708.0;
  x = (x > top) ? top : x;
  x = (x < bottom) ? bottom : x;
  const V<double> shifted = x * 1.4426950408889634074 + 6755399441055744.0;
  const V<double> n = shifted - 6755399441055744.0;
  const V<double> f = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
  constexpr double factorials[] = {6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                   720.0,        120.0,       24.0,       6.0,       2.0,      1.0,     1.0};
  V<double> p = V<double>{} + 1.0 / 87178291200.0; // 1 / 14!
#pragma GCC unroll 14
  for (double factorial : factorials) p = p * f + 1 / factorial;
  return (V<double>)((I64)p + ((I64)shifted << 52));
}

// 1 / x to the last bit or two, x positive and no larger than 1e36: an estimate and Newton's step, where division is slow.
inline V<double> reciprocal(V<double> x) { return 1 / x; }
inline V<float> reciprocal(V<float> x) {
#if defined(__AVX512F__)
  const V<float> near = (V<float>)_mm512_rcp14_ps((__m512)x);
  return near * (2 - x * near);
#elif defined(__AVX2__)
  const V<float> near = (V<float>)_mm256_rcp_ps((__m256)x);
  return near * (2 - x * near);
#else
  return 1 / x;
#endif
}

// 1 / (1 + 2^t), t = -x / log(2). What t leaves over whole numbers is exact but for the constant, so that the logarithm of
// 2 needs no second part; 2^f is a polynomial, within 2e-8 for |f| <= 1/2.
inline V<float> sigmoid(V<float> x) {
  constexpr float SCALE = -1.44269504088896f, MAGIC = 12582912.0f;
#if defined(__AVX512F__)
  x = (V<float>)_mm512_max_ps(_mm512_set1_ps(-80.0f), (__m512)x); // of what is not a number, x
  x = (V<float>)_mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)x);
#else
  const V<float> top = V<float>{} + 87.0f, bottom = V<float>{} - 80.0f;
  x = (x > top) ? top : x;
  x = (x < bottom) ? bottom : x;
#endif
  const V<float> shifted = x * SCALE + MAGIC, n = shifted - MAGIC;
#if defined(__AVX512F__)
  const V<float> f = (V<float>)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(SCALE), (__m512)n);
#elif defined(__FMA__) && defined(__AVX2__)
  const V<float> f = (V<float>)_mm256_fmsub_ps((__m256)x, _mm256_set1_ps(SCALE), (__m256)n);
#else
  const V<float> f = x * SCALE - n;
#endif
  V<float> p = f * 1.535336189e-4f + 1.339887442e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
  return reciprocal(1 + (V<float>)((I32)p + ((I32)shifted << 23)));
}
inline V<double> sigmoid(V<double> x) { return reciprocal(1 + exponential(-x)); }
inline float sigmoid_of(float x) { return 1 / (1 + std::exp(-x)); }
inline double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

// y = x s, its slope s + y (1 - s), and the slope of that, (1 - s) (2 s + y - 2 y s); s the sigmoid of x.
template <class X> struct SiLU {
  X y, slope, bend;
  explicit SiLU(X x) {
    const X s = sigmoid(x), rest = 1 - s;
    y = x * s;
    slope = s + y * rest;
    bend = rest * (2 * s + y - 2 * y * s);
  }
};

// A number, or a group of them, with its derivative along one direction.
template <class X> struct Dual {
  X v, d;
};
template <class A, class B> inline auto operator+(Dual<A> a, Dual<B> b) -> Dual<decltype(a.v + b.v)> {
  return {a.v + b.v, a.d + b.d};
}
template <class A, class B> inline auto operator-(Dual<A> a, Dual<B> b) -> Dual<decltype(a.v - b.v)> {
  return {a.v - b.v, a.d - b.d};
}
template <class A, class B> inline auto operator*(Dual<A> a, Dual<B> b) -> Dual<decltype(a.v * b.v)> {
  return {a.v * b.v, a.v * b.d + a.d * b.v};
}
template <class T, class X, class = std::enable_if_t<std::is_floating_point<T>::value>>
inline Dual<X> operator*(T a, Dual<X> b) {
  return {a * b.v, a * b.d};
}
template <class X> inline Dual<X> &operator+=(Dual<X> &a, Dual<X> b) { return a = a + b; }

} // namespace multifid
