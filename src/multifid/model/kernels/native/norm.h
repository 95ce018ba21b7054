// LayerNorm of a row, without or with its change: y = w x' + b, x' = (x - mean(x)) / sqrt(var(x) + eps).
#pragma once
#include "duals.h"

namespace multifid {

// Rows are `width` numbers with zeros behind, up to whole vectors.
template <class M, class T> class Norm {
  using S = typename M::S;
  using Q = typename M::Q;
  static constexpr long L = Lanes<T>::N;

public:
  // Takes the mean from a row, and from its change (null without one); they must live as long as this.
  Norm(T *x_, T *d_, long width, T epsilon) : x(x_), d(d_), part(1 / T(width)), wide((width + L - 1) / L * L) {
    V<T> of_x = {}, of_d = {};
    for (long k = 0; k < wide; k += L) of_x += load(x + k), of_d += M::CHANGE ? load(d + k) : V<T>{};
    const T mean = sum<T>(of_x) * part, change = sum<T>(of_d) * part;
    for (long k = 0; k < width; ++k) x[k] -= mean;
    if (M::CHANGE)
      for (long k = 0; k < width; ++k) d[k] -= change;
    Q squares = {};
    for (long k = 0; k < wide; k += L) {
      Q y;
      get(y, x, d, k);
      squares += y * y;
    }
    set(scale, part * total<T>(squares), epsilon);
  }
  Q operator()(long k) const { // x'
    Q y;
    get(y, x, d, k);
    return scale * y;
  }
  Q operator()(long k, const T *weight, const T *bias) const { // y
    Q y = times_constant(load(weight + k), (*this)(k));
    add_constant(y, load(bias + k));
    return y;
  }
  // The gradient of y to that of x, in place: g (and its change d_g) with zeros behind.
  void back(T *g, T *d_g, const T *weight) const {
    Q of_one = {}, of_x = {};
    for (long k = 0; k < wide; k += L) {
      const Q h = weighted(g, d_g, weight, k);
      of_one += h, of_x += h * (*this)(k);
    }
    const S mean = part * total<T>(of_one), along = part * total<T>(of_x);
    for (long k = 0; k < wide; k += L) {
      const Q h = scale * (weighted(g, d_g, weight, k) - mean - along * (*this)(k));
      store(M::CHANGE ? d_g + k : g + k, last(h));
    }
  }

private:
  T *x, *d;
  const T part;
  const long wide;
  S scale;

  static Q weighted(const T *g, const T *d_g, const T *weight, long k) {
    Q h;
    get(h, g, d_g, k);
    return times_constant(load(weight + k), h);
  }
  static void set(T &to, T variance, T epsilon) { to = 1 / std::sqrt(variance + epsilon); }
  static void set(Dual<T> &to, Dual<T> variance, T epsilon) {
    to.v = 1 / std::sqrt(variance.v + epsilon);
    to.d = -to.v * to.v * to.v * variance.d / 2;
  }
};

} // namespace multifid
