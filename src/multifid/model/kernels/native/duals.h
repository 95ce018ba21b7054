// Numbers and vectors of them, with or without their change along a direction; a few functions of both.
#pragma once
#include "lanes.h"

namespace multifid {

// What a loop over rows reads: values, or values with changes. S: one number; Q: a vector of them.
template <class T> struct Plain {
  using S = T;
  using Q = V<T>;
  static constexpr bool CHANGE = false;
};
template <class T> struct Changing {
  using S = Dual<T>;
  using Q = Dual<V<T>>;
  static constexpr bool CHANGE = true;
};

// From an array and that of its changes, which may be absent.
template <class T> inline void get(T &to, const T *from, const T *, long k) { to = from[k]; }
template <class T> inline void get(Dual<T> &to, const T *from, const T *d, long k) { to = {from[k], d ? d[k] : T(0)}; }
template <class T> inline void get(V<T> &to, const T *from, const T *, long k) { to = load(from + k); }
template <class T> inline void get(Dual<V<T>> &to, const T *from, const T *d, long k) {
  to = {load(from + k), d ? load(d + k) : V<T>{}};
}
template <class X> inline X last(X x) { return x; }
template <class X> inline X last(Dual<X> x) { return x.d; }
template <class T> inline void increase(T *to, V<T> x) { store(to, load(to) + x); }
template <class T> inline T total(V<T> x) { return sum<T>(x); }
template <class T> inline Dual<T> total(Dual<V<T>> x) { return {sum<T>(x.v), sum<T>(x.d)}; }
template <class X> inline void add_constant(X &x, X constant) { x += constant; }
template <class X> inline void add_constant(Dual<X> &x, X constant) { x.v += constant; }
template <class X> inline X times_constant(X constant, X x) { return constant * x; }
template <class X> inline Dual<X> times_constant(X constant, Dual<X> x) { return {constant * x.v, constant * x.d}; }

inline V<float> root(V<float> x) {
#if defined(__AVX512F__)
  return (V<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (V<float>)_mm256_sqrt_ps((__m256)x);
#else
  for (int l = 0; l < Lanes<float>::N; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
inline V<double> root(V<double> x) {
#if defined(__AVX512F__)
  return (V<double>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (V<double>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int l = 0; l < Lanes<double>::N; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}

// 1 / sqrt(1 + x), x not negative.
template <class X> inline X bounded(X x) { return reciprocal(root(1 + x)); }
template <class X> inline Dual<X> bounded(Dual<X> x) {
  const X s = bounded(x.v);
  return {s, s * s * s * x.d / -2};
}

// log(1 + x), x not negative: u = 1 + x = 2^e m, log(m) by a polynomial (those of fdlibm), and what 1 + x lost.
template <class T> struct Logarithm;
template <> struct Logarithm<float> {
  using Bits = I32;
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float HIGH = 6.9313812256e-01f, LOW = 9.0580006145e-06f;
  static constexpr float TERMS[] = {0.24279078841f, 0.28498786688f, 0.40000972152f, 0.66666662693f};
};
template <> struct Logarithm<double> {
  using Bits = I64;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double HIGH = 6.93147180369123816490e-01, LOW = 1.90821492927058770002e-10;
  static constexpr double TERMS[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                     2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                     6.666666666666735130e-01};
};
template <class T> inline V<T> log_of_more(V<T> x) {
  using F = Logarithm<T>;
  using Bits = typename F::Bits;
  const V<T> u = 1 + x, lost = (x - (u - 1)) / u;
  const Bits bits = (Bits)u;
  Bits e = (bits >> F::MANTISSA) - F::BIAS;
  V<T> m = (V<T>)((bits - (e << F::MANTISSA)));
  const Bits above = m > T(1.41421356237309504880); // -1 where it is
  m = above ? m * T(0.5) : m;
  e -= above;
  const V<T> f = m - 1, s = f / (2 + f), z = s * s, n = __builtin_convertvector(e, V<T>), half = T(0.5) * f * f;
  V<T> sum = {};
  for (T term : F::TERMS) sum = sum * z + term;
  return n * F::HIGH - ((half - (s * (half + sum * z) + (n * F::LOW + lost))) - f);
}
template <class T> inline Dual<V<T>> log_of_more(Dual<V<T>> x) { return {log_of_more<T>(x.v), x.d / (1 + x.v)}; }

// sin(x) and cos(x) of numbers of moderate size: series for what is left of x after whole multiples of pi.
template <class T> inline void sine_and_cosine(V<T> x, V<T> &sine, V<T> &cosine) {
  constexpr bool WIDE = sizeof(T) == 8;
  constexpr T HIGH = WIDE ? T(3.1415926218032837) : T(3.140625), LOW = T(3.14159265358979323846264L - HIGH);
  constexpr T MAGIC = WIDE ? T(6755399441055744.0) : T(12582912.0); // rounds to whole numbers
  constexpr int TERMS = WIDE ? 12 : 7;
  const V<T> n = (x * T(0.318309886183790671538) + MAGIC) - MAGIC;
  const V<T> f = (x - n * HIGH) - n * LOW, z = f * f;
  V<T> s = {}, c = {};
#pragma GCC unroll 12
  for (int k = TERMS; k > 0; --k) s = 1 - z * T(1.0L / (2 * k * (2 * k + 1))) * (k == TERMS ? V<T>{} + 1 : s);
#pragma GCC unroll 12
  for (int k = TERMS; k > 0; --k) c = 1 - z * T(1.0L / (2 * k * (2 * k - 1))) * (k == TERMS ? V<T>{} + 1 : c);
  const V<T> odd = n - 2 * ((n * T(0.5) + MAGIC) - MAGIC), sign = 1 - 2 * odd * odd;
  sine = sign * f * s, cosine = sign * c;
}
template <class T> inline void sine_and_cosine(Dual<V<T>> x, Dual<V<T>> &sine, Dual<V<T>> &cosine) {
  sine_and_cosine<T>(x.v, sine.v, cosine.v);
  sine.d = cosine.v * x.d, cosine.d = -sine.v * x.d;
}

} // namespace multifid
