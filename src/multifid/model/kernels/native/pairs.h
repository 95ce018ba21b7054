// What edges of a graph give to all layers: unit vectors, functions of the distance, and the envelope (model/layers.py).
//
//   n = r / d,   b_k = sin(w_k x) / x,   b_(R+k) = exp(-((d / l - c_k) / w)^2),   u = 1 - x^6 (28 - 48 x + 21 x^2)
//
// with x = d / cutoff, in u at most 1, and l the sum of both atoms' radii. The four functions are those of egnn.h; as many
// edges as a vector has numbers are taken at once.
#pragma once
#include "duals.h"
#include "products.h"
#include <omp.h>

namespace multifid {

// What Python hands over. E edges, R + C functions. Absent arrays are null.
struct PairsCall {
  int64_t edges, R, C, threads, type;
  double cutoff, width;
  const void *waves, *sizes, *centres, *r; // w (R), 1 / l (E), c (C), (E,3)
  void *sum_n, *sum_b, *sum_u;     // (E,3) (E,R+C) (E)
  const void *G_n, *G_b, *G_u;
  void *g_r;                       // zeros
  const void *d_r;
  void *d_sum_n, *d_sum_b, *d_sum_u;
  const void *N_n, *N_b, *N_u;
};

template <class Type> class Pairs {
  using T = typename Type::Number;
  static constexpr long L = Lanes<T>::N;

public:
  explicit Pairs(const PairsCall &call) : p(call), of(call.R + call.C) {}
  void forward() { over_edges([&](long e, long count) { ahead<Plain<T>>(e, count, p.sum_n, p.sum_b, p.sum_u); }); }
  void tangent() {
    over_edges([&](long e, long count) { ahead<Changing<T>>(e, count, p.d_sum_n, p.d_sum_b, p.d_sum_u); });
  }
  void backward() { over_edges([&](long e, long count) { back<Plain<T>>(e, count); }); }
  void again() { over_edges([&](long e, long count) { back<Changing<T>>(e, count); }); }

private:
  const PairsCall &p;
  const long of;

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }

  template <class Work> void over_edges(Work work) {
    const long count = up(p.edges, L) / L;
    const int threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, count / 64));
#pragma omp parallel for num_threads(threads)
    for (long k = 0; k < count; ++k) work(k * L, std::min(L, p.edges - k * L));
  }

  // One number of each of some edges; the last one's for those that are not there.
  static V<T> lanes(const void *from, long e, long count, long step, long k) {
    V<T> x = {};
    for (long l = 0; l < L; ++l) x[l] = in(from)[(e + std::min(l, count - 1)) * step + k];
    return x;
  }
  template <class Q> static Q lanes(const void *from, const void *d, long e, long count, long step, long k) {
    if constexpr (std::is_same<Q, V<T>>::value) return lanes(from, e, count, step, k);
    else return {lanes(from, e, count, step, k), lanes(d, e, count, step, k)};
  }
  static void put(V<T> x, void *to, long e, long count, long step, long k) {
    for (long l = 0; l < count; ++l) out(to)[(e + l) * step + k] = x[l];
  }

  template <class M> struct Pair {
    using Q = typename M::Q;
    Q n[3], one_by_d, d;
    Pair(const PairsCall &p, long e, long count) {
      Q square = {};
      for (int k = 0; k < 3; ++k) n[k] = lanes<Q>(p.r, p.d_r, e, count, 3, k), square += n[k] * n[k];
      one_by_d = inverse_root(square);
      d = square * one_by_d;
      for (Q &x : n) x = x * one_by_d;
    }
  };
  static V<T> inverse_root(V<T> x) { return 1 / root(x); }
  static Dual<V<T>> inverse_root(Dual<V<T>> x) {
    const V<T> s = inverse_root(x.v);
    return {s, s * s * s * x.d / -2};
  }

  // Calls work(k, value, slope) for the functions of d.
  template <class Q, class Work> void functions(Q d, Q one_by_d, long e, long count, Work work) const {
    const T cutoff = p.cutoff, by_cutoff = 1 / cutoff;
    for (long k = 0; k < p.R; ++k) {
      const T wave = in(p.waves)[k];
      Q sine, cosine;
      sine_and_cosine<T>(wave * (by_cutoff * d), sine, cosine);
      const Q value = cutoff * (sine * one_by_d);
      work(k, value, (wave * cosine - value) * one_by_d);
    }
    if (!p.C) return;
    const V<T> size = lanes(p.sizes, e, count, 1, 0);
    const T by_width = 1 / T(p.width);
    for (long k = 0; k < p.C; ++k) {
      Q t = times_constant(size, d);
      add_constant(t, V<T>{} - in(p.centres)[k]);
      t = by_width * t;
      const Q value = power(T(-1) * (t * t));
      work(p.R + k, value, times_constant(size * (-2 * by_width), t * value));
    }
  }
  static V<T> power(V<T> x) { return exponential(x); }
  static Dual<V<T>> power(Dual<V<T>> x) {
    const V<T> y = exponential(x.v);
    return {y, y * x.d};
  }
  // x, at most 1, and 1 - x.
  template <class Q> void near(Q d, Q &x, Q &rest) const {
    x = T(1 / p.cutoff) * d;
    limit(x);
    rest = T(-1) * x;
    add_constant(rest, V<T>{} + 1);
  }
  static void limit(V<T> &x) { x = x > 1 ? V<T>{} + 1 : x; }
  static void limit(Dual<V<T>> &x) { x.d = x.v > 1 ? V<T>{} : x.d, limit(x.v); }

  template <class M> void ahead(long e, long count, void *n, void *b, void *u) const {
    using Q = typename M::Q;
    const Pair<M> pair(p, e, count);
    if (n)
      for (int k = 0; k < 3; ++k) put(last(pair.n[k]), n, e, count, 3, k);
    functions(pair.d, pair.one_by_d, e, count, [&](long k, Q value, Q) { put(last(value), b, e, count, of, k); });
    Q x, rest;
    near(pair.d, x, rest);
    const Q x2 = x * x;
    Q inner = T(21) * x2 - T(48) * x;
    add_constant(inner, V<T>{} + 28);
    Q value = T(-1) * (x2 * x2 * x2 * inner);
    add_constant(value, V<T>{} + 1);
    put(last(value), u, e, count, 1, 0);
  }

  template <class M> void back(long e, long count) const {
    using Q = typename M::Q;
    const Pair<M> pair(p, e, count);
    Q x, rest, of_d = {};
    near(pair.d, x, rest);
    const Q x2 = x * x;
    of_d = lanes<Q>(p.G_u, p.N_u, e, count, 1, 0) * (T(-168 / p.cutoff) * (x2 * x2 * x * rest * rest));
    functions(pair.d, pair.one_by_d, e, count,
              [&](long k, Q, Q slope) { of_d += lanes<Q>(p.G_b, p.N_b, e, count, of, k) * slope; });
    Q of_n[3] = {}, along = {};
    if (p.G_n)
      for (int k = 0; k < 3; ++k)
        of_n[k] = lanes<Q>(p.G_n, p.N_n, e, count, 3, k), along += of_n[k] * pair.n[k];
    for (int k = 0; k < 3; ++k)
      put(last(of_d * pair.n[k] + (of_n[k] - along * pair.n[k]) * pair.one_by_d), p.g_r, e, count, 3, k);
  }
};

} // namespace multifid
