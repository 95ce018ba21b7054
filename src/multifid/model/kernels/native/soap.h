// An update of matrices of one shape by SOAP, or of other numbers by AdamW: the equations at the head of training/soap.py.
#pragma once
#include "duals.h"
#include "products.h"
#include <omp.h>

namespace multifid {

// What Python hands over: `many` parameters, whose moments and bases lie one behind the other. m: 0 where they are not
// rotated. iterations: of the bases, before the update (the first one) or after it.
struct SOAPCall {
  int64_t many, m, n, threads, type, before, after;
  double lr, decay, b1, b2, c1, c2, scale, damping, floor, epsilon; // c: 1 - b^t; scale: divides gradients
  const int64_t *sizes;                                             // of parameters that are not rotated
  void *const *weights;
  const void *const *gradients;
  void *first, *second, *left, *right, *left_basis, *right_basis;
};

template <class T> class SOAP {
public:
  explicit SOAP(const SOAPCall &call) : p(call), m(call.m), n(call.n) {}

  void update() const {
    if (!m) {
      for (long k = 0, at = 0; k < p.many; at += p.sizes[k++]) plain(k, at);
      return;
    }
#pragma omp parallel for num_threads(std::max<int64_t>(1, std::min(p.threads, p.many)))
    for (long k = 0; k < p.many; ++k) {
      static thread_local Workspace work;
      rotated(k, work);
    }
  }

private:
  const SOAPCall &p;
  const long m, n;
  static constexpr long L = Lanes<T>::N;

  // Matrices with rows of whole vectors, at distances that are no powers of two; rows up to a multiple of ROWS.
  template <class X> struct Padded {
    long step = 0;
    Room<X> room;
    X *of(long rows, long columns) {
      step = up(columns, 2 * Lanes<X>::N) + Lanes<X>::N;
      return room.of(up(rows, ROWS) * step);
    }
    X *operator[](long row) const { return room.get() + row * step; }
  };
  struct Workspace {
    Padded<T> g, g_t, first_t, basis, basis_t, other, other_t, square, a, b, c;
    Padded<double> x, x_t, triangle;
    Room<T> turned;
    Room<double> turned_x, column;
  };

  static T *at(void *x, long k, long size) { return static_cast<T *>(x) + k * size; }

  // c (columns of a, width) = a^T x, over `depth` rows of both; of a^T a, what is not left of the diagonal.
  template <class X>
  static void product(Room<X> &room, long depth, const Padded<X> &a, long columns, const Padded<X> &x, long width, Padded<X> &c) {
    c.of(columns, width);
    transposed_times(room, depth, a[0], a.step, columns, x[0], x.step, width, c[0], c.step, false, &a == &x);
  }

  // A matrix (rows, columns), times a factor, with the ends of its rows, and its transpose.
  template <class X, class Y> static void copy(const Y *from, long step, long rows, long columns, X factor, Padded<X> &to) {
    to.of(rows, columns);
    for (long r = 0; r < rows; ++r) {
      for (long k = 0; k < columns; ++k) to[r][k] = from[r * step + k] * factor;
      for (long k = columns; k < to.step; ++k) to[r][k] = 0;
    }
  }
  template <class X> static void transpose(const Padded<X> &from, long rows, long columns, Padded<X> &to) {
    to.of(columns, rows);
    for (long r0 = 0; r0 < rows; r0 += 8)
      for (long k = 0; k < columns; ++k)
        for (long r = r0; r < std::min(r0 + 8, rows); ++r) to[k][r] = from[r][k];
    for (long k = 0; k < columns; ++k)
      for (long r = rows; r < to.step; ++r) to[k][r] = 0;
  }

  // The moments of a number, and what is subtracted from it.
  void plain(long k, long begin) const {
    T *__restrict first = at(p.first, 1, begin), *__restrict second = at(p.second, 1, begin);
    T *__restrict weight = static_cast<T *>(p.weights[k]);
    const T *__restrict gradient = static_cast<const T *>(p.gradients[k]);
    const T b1 = T(1 - p.b1), b2 = T(p.b2), rest = T(1 - p.b2), root = T(1 / std::sqrt(p.c2)), scale = T(p.scale);
    const T rate = T(p.lr), c1 = T(p.c1), epsilon = T(p.epsilon), kept = T(1 - p.lr * p.decay);
    for (long x = 0; x < p.sizes[k]; ++x) {
      const T g = gradient[x] / scale;
      first[x] += b1 * (g - first[x]);
      second[x] = b2 * second[x] + rest * g * g;
      weight[x] = kept * weight[x] - rate * (first[x] / (std::sqrt(second[x]) * root + epsilon) / c1);
    }
  }

  void rotated(long k, Workspace &w) const {
    T *first = at(p.first, k, m * n), *second = at(p.second, k, m * n);
    T *left = at(p.left, k, m * m), *right = at(p.right, k, n * n);
    T *left_basis = at(p.left_basis, k, m * m), *right_basis = at(p.right_basis, k, n * n);
    const T rest = T(1 - p.b2);
    copy<T>(static_cast<const T *>(p.gradients[k]), n, m, n, T(1 / p.scale), w.g);
    transpose(w.g, m, n, w.g_t);
    for (long r = 0; r < m; ++r)
      for (long c = 0; c < n; ++c) first[r * n + c] += T(1 - p.b1) * (w.g[r][c] - first[r * n + c]);
    product(w.turned, n, w.g_t, m, w.g_t, m, w.square);
    approach(left, w.square, m, rest);
    product(w.turned, m, w.g, n, w.g, n, w.square);
    approach(right, w.square, n, rest);
    if (p.before) iterate(left, left_basis, m, p.before, w), iterate(right, right_basis, n, p.before, w);

    copy<T>(left_basis, m, m, m, T(1), w.basis), copy<T>(right_basis, n, n, n, T(1), w.other);
    product(w.turned, n, w.g_t, m, w.other, n, w.a);
    product(w.turned, m, w.basis, m, w.a, n, w.b); // of the gradient
    copy<T>(first, n, m, n, T(1), w.g);
    transpose(w.g, m, n, w.first_t);
    product(w.turned, n, w.first_t, m, w.other, n, w.a);
    product(w.turned, m, w.basis, m, w.a, n, w.c); // of its average
    double mean = 0;
    for (long r = 0; r < m; ++r) {
      T total = 0;
      for (long c = 0; c < n; ++c) {
        T &square = second[r * n + c];
        square = T(p.b2) * square + rest * w.b[r][c] * w.b[r][c];
        total += square;
      }
      mean += total;
    }
    const T c2 = T(p.c2), least = T(p.floor * std::sqrt(mean / p.c2 / (m * n)) + p.epsilon);
    for (long r = 0; r < m; ++r)
      for (long c = 0; c < n; ++c) w.c[r][c] /= std::sqrt(second[r * n + c] / c2) + least;

    transpose(w.basis, m, m, w.basis_t), transpose(w.other, n, n, w.other_t);
    product(w.turned, m, w.c, n, w.basis_t, m, w.a); // (Q_L X)^T
    product(w.turned, n, w.a, m, w.other_t, n, w.b);
    T *weight = static_cast<T *>(p.weights[k]);
    const T kept = T(1 - p.lr * p.decay), rate = T(p.lr), c1 = T(p.c1);
    for (long r = 0; r < m; ++r)
      for (long c = 0; c < n; ++c) weight[r * n + c] = kept * weight[r * n + c] - rate * (w.b[r][c] / c1);
    if (p.after) iterate(left, left_basis, m, p.after, w), iterate(right, right_basis, n, p.after, w);
  }

  static void approach(T *average, const Padded<T> &x, long size, T part) { // symmetric ones
    for (long r = 0; r < size; ++r)
      for (long c = r; c < size; ++c) average[r * size + c] += part * (x[r][c] - average[r * size + c]);
    for (long r = 1; r < size; ++r)
      for (long c = 0; c < r; ++c) average[r * size + c] = average[c * size + r];
  }

  // The basis rotated towards the eigenvectors of a symmetric matrix.
  void iterate(const T *symmetric, T *basis, long size, long times, Workspace &w) const {
    double mean = 0;
    for (long k = 0; k < size; ++k) mean += symmetric[k * size + k];
    copy<T>(symmetric, size, size, size, T(1 / (mean / size + p.epsilon * p.epsilon)), w.square);
    for (; times; --times) {
      copy<T>(basis, size, size, size, T(1), w.basis);
      product(w.turned, size, w.square, size, w.basis, size, w.a);
      for (long r = 0; r < size; ++r)
        for (long c = 0; c < size; ++c) w.a[r][c] += T(p.damping) * w.basis[r][c];
      orthogonal_factor(size, w);
      for (long r = 0; r < size; ++r)
        for (long c = 0; c < size; ++c) basis[r * size + c] = T(w.x[r][c]);
    }
  }

  // w.x = Q of w.a = Q R with a positive diagonal of R: R^T R = a^T a, Q = a R^-1, in float64, where squares of condition
  // numbers (at most size / damping) have room. Once more for float64, whose own rounding they would exceed.
  void orthogonal_factor(long size, Workspace &w) const {
    copy<double>(w.a[0], w.a.step, size, size, 1.0, w.x);
    for (int pass = 0; pass < (sizeof(T) == 8 ? 2 : 1); ++pass) {
      product(w.turned_x, size, w.x, size, w.x, size, w.triangle);
      for (long k = 0; k < size; ++k) {
        double *row = w.triangle[k];
        const double root = 1 / std::sqrt(row[k]);
        for (long c = k; c < size; ++c) row[c] *= root;
        for (long r = k + 1; r < size; ++r) {
          double *__restrict below = w.triangle[r];
          const double factor = row[r];
          for (long c = r; c < size; ++c) below[c] -= factor * row[c];
        }
      }
      transpose(w.x, size, size, w.x_t);
      for (long k = 0; k < size; ++k) solve(k, size, w);
      transpose(w.x_t, size, size, w.x);
    }
  }

  // Column k of Q, a row of w.x_t, from those before.
  static void solve(long k, long size, Workspace &w) {
    constexpr long D = Lanes<double>::N;
    double *column = w.column.of(size);
    for (long j = 0; j <= k; ++j) column[j] = w.triangle[j][k];
    for (long c = 0; c < size; c += 2 * D) { // rows have whole pairs of vectors
      V<double> x = load(w.x_t[k] + c), y = load(w.x_t[k] + c + D);
      for (long j = 0; j < k; ++j) {
        x -= column[j] * load(w.x_t[j] + c);
        y -= column[j] * load(w.x_t[j] + c + D);
      }
      store(w.x_t[k] + c, x / column[k]), store(w.x_t[k] + c + D, y / column[k]);
    }
  }
};

} // namespace multifid
