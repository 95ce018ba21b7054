// The edges of a layer of PaiNN: sums over neighbours of filtered scalars and vectors (model/encoders/painn.py).
//
//   w_x = u (b W_x^T + bias_x), x one of a, b, c;   m_0 = w_a phi_a,   m_d = w_b phi_b v_d + w_c phi_c r_d
//
// phi and v are the sender's. Nothing of an edge is kept: filters are a product with a few radial functions, in which
// envelope and bias are one more of them, w_x = [u b, u] [W_x, bias_x]^T. The four functions are those of egnn.h; the
// second derivative is the first one taken with dual numbers. In a first layer v is zero, and b has no part in anything.
#pragma once
#include "duals.h"
#include "products.h"
#include <omp.h>

namespace multifid {

// What Python hands over. N atoms, E edges, R radial functions; H channels, a multiple of 16.
struct PaiNNCall {
  int64_t edges, atoms, H, R, threads, type;
  const int64_t *i, *j;                          // (E), i ascending
  const void *phi, *v, *r, *b, *u, *weight, *bias; // (N,3,H) (N,3,H) (E,3) (E,R) (E) (3H,R) (3H)
  void *sum_m;                                   // (N,4,H), zeros
  const void *G_m;
  void *g_phi, *g_v, *g_r, *g_b, *g_u, *g_weight, *g_bias; // zeros
  const void *d_phi, *d_v, *d_r, *d_b, *d_u;
  void *d_sum_m;                                 // zeros
  const void *N_m;
};

template <class Type> class PaiNN {
  using T = typename Type::Number;
  static constexpr long L = Lanes<T>::N;
  static constexpr long EDGES = 56 / ROWS * ROWS, ROOM = EDGES + ROWS;

public:
  explicit PaiNN(const PaiNNCall &call)
      : p(call), H(call.H), R(call.R), step(stride(call.H)), step_b(stride(call.R + 1)), weights(call.g_weight),
        geometry(call.g_b || call.g_r || call.g_u), moving(any(call.v) || any(call.d_v)), all(moving || call.g_v) {
    Room<T> room;
    T *wide = room.of(3 * H * (R + 1));
    for (long h = 0; h < 3 * H; ++h) {
      std::memcpy(wide + h * (R + 1), in(p.weight) + h * R, R * sizeof(T));
      wide[h * (R + 1) + R] = in(p.bias)[h];
    }
    for (long x = 0; x < 3; ++x) {
      filter[x].pack(wide + x * H * (R + 1), R + 1, H, 1, R + 1);
      if (geometry) filter_back[x].pack(wide + x * H * (R + 1), H, R, R + 1, 1);
    }
  }
  void forward() { over_tiles([&](Tile &t, long e, long rows) { ahead<Plain<T>>(t, e, rows); }); }
  void tangent() { over_tiles([&](Tile &t, long e, long rows) { ahead<Changing<T>>(t, e, rows); }); }
  void backward() { over_tiles([&](Tile &t, long e, long rows) { back<Plain<T>>(t, e, rows); }), end(); }
  void again() { over_tiles([&](Tile &t, long e, long rows) { back<Changing<T>>(t, e, rows); }), end(); }

private:
  const PaiNNCall &p;
  const long H, R, step, step_b;
  const bool weights, geometry, moving, all; // gradients of what are wanted; whether v is not zero; and whether b matters
  Panels<T> filter[3], filter_back[3];       // of a, b, c

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }
  bool any(const void *v) const {
    return v && std::any_of(in(v), in(v) + p.atoms * 3 * p.H, [](T x) { return x != 0; }); // also where it is no number
  }
  bool matters(long x) const { return x != 1 || all; }

  struct Tile {
    Room<T> b[2], f[2], g[2], g_b[2], turned, room_phi, room_v, room_weights; // of pairs the second are changes
    bool began = false;
    T *g_phi = nullptr, *g_v = nullptr, *weight = nullptr; // weight: (3, `columns`, H)
  };
  Tiles<Tile> tiles;

  template <class Work> void over_tiles(Work work) {
    const int threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, up(p.edges, EDGES) / EDGES));
    tiles.resize(threads, H <= NARROW);
#pragma omp parallel num_threads(threads)
    {
      const int k = omp_get_thread_num(), of = omp_get_num_threads();
      Tile &t = tiles.begin(k);
      const long from = edge_of(k, of), all = edge_of(k + 1, of) - from;
      const long count = (all + EDGES - 1) / EDGES;
      for (long n = 0; n < count; ++n)
        work(t, from + all * n / count, all * (n + 1) / count - all * n / count);
    }
  }
  long edge_of(long k, long of) const {
    long e = p.edges * k / of;
    while (e > 0 && e < p.edges && p.i[e] == p.i[e - 1]) ++e;
    return e;
  }

  // [u b, u] of the tile's edges, f (rows, 3 H) of them, and with M their changes.
  template <class M> void filters(Tile &t, long e, long rows) const {
    T *b = t.b[0].of(ROOM * step_b), *db = M::CHANGE ? t.b[1].of(ROOM * step_b) : b;
    for (long n = 0; n < rows; ++n, b += step_b, db += step_b) {
      typename M::S u, x;
      get(u, in(p.u), in(p.d_u), e + n);
      for (long k = 0; k < R; ++k) get(x, in(p.b), in(p.d_b), (e + n) * R + k), put(u * x, b + k, db + k);
      put(u, b + R, db + R);
    }
    for (int change = 0; change <= M::CHANGE; ++change) {
      T *f = t.f[change].of(ROOM * (3 * H + 2 * L));
      for (long x = 0; x < 3; ++x)
        if (matters(x)) multiply(rows, t.b[change].get(), step_b, filter[x], f + x * H, 3 * H, false);
    }
  }
  template <class X> static void put(X x, X *to, X *) { *to = x; }
  template <class X> static void put(Dual<X> x, X *to, X *d) { *to = x.v, *d = x.d; }
  static void put(V<T> x, T *to, T *) { store(to, x); }
  static void put(Dual<V<T>> x, T *to, T *d) { store(to, x.v), store(d, x.d); }

  template <class M> void ahead(Tile &t, long e, long rows) const {
    using Q = typename M::Q;
    filters<M>(t, e, rows);
    T *const sums = out(M::CHANGE ? p.d_sum_m : p.sum_m);
    const T *const phi = in(p.phi), *const d_phi = in(p.d_phi), *const v = in(p.v), *const d_v = in(p.d_v);
    for (long n = 0; n < rows; ++n) {
      const long sender = p.j[e + n] * 3 * H;
      const T *const f = t.f[0].get() + n * 3 * H, *const df = t.f[M::CHANGE].get() + n * 3 * H;
      T *const to = sums + p.i[e + n] * 4 * H;
      typename M::S r[3];
      for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * (e + n) + d);
      for (long k = 0; k < H; k += L) {
        const auto message = [&](long x) {
          Q w, y;
          get(w, f, df, x * H + k), get(y, phi, d_phi, sender + x * H + k);
          return w * y;
        };
        increase(to + k, last(message(0)));
        const Q turned = message(2);
        if (moving) {
          const Q moved = message(1);
          for (int d = 0; d < 3; ++d) {
            Q of_v;
            get(of_v, v, d_v, sender + d * H + k);
            increase(to + (d + 1) * H + k, last(moved * of_v + r[d] * turned));
          }
        } else {
          for (int d = 0; d < 3; ++d) increase(to + (d + 1) * H + k, last(r[d] * turned));
        }
      }
    }
  }

  // Of the R + 1 functions so many are taken at once for gradients of weights; where one would be left, one more.
  static constexpr int FEW = BYTES == 64 ? 8 : 4;
  long columns() const { return (R + 1) % FEW == 1 ? R + 1 : up(R + 1, FEW); }

  void begin(Tile &t) {
    const bool first = &t == tiles[0];
    t.began = true;
    t.g_phi = first ? out(p.g_phi) : t.room_phi.zeros(p.atoms * 3 * H);
    if (p.g_v) t.g_v = first ? out(p.g_v) : t.room_v.zeros(p.atoms * 3 * H);
    if (weights) t.weight = t.room_weights.zeros(3 * columns() * H);
  }
  void end() {
    for (size_t k = 0; k < tiles.size(); ++k) {
      if (!tiles[k] || !tiles[k]->began) continue;
      const Tile &t = *tiles[k];
      if (k) sum_up(out(p.g_phi), t.g_phi, p.atoms * 3 * H);
      if (k && p.g_v) sum_up(out(p.g_v), t.g_v, p.atoms * 3 * H);
      if (!weights) continue;
      for (long x = 0; x < 3; ++x) {
        const T *from = t.weight + x * columns() * H;
        for (long h = 0; h < H; ++h)
          for (long m = 0; m < R; ++m) out(p.g_weight)[(x * H + h) * R + m] += from[m * H + h];
        sum_up(out(p.g_bias) + x * H, from + R * H, H);
      }
    }
  }
  static void sum_up(T *to, const T *x, long count) {
    for (long k = 0; k < count; ++k) to[k] += x[k];
  }

  template <class M> void back(Tile &t, long e, long rows) {
    using Q = typename M::Q;
    if (!t.began) begin(t);
    filters<M>(t, e, rows);
    const long part = ROOM * step; // gradients of filters are (3, rows, step)
    T *const g = t.g[0].of(3 * part), *const dg = M::CHANGE ? t.g[1].of(3 * part) : g;
    T *const g_phi = t.g_phi, *const g_v = t.g_v;
    const T *const phi = in(p.phi), *const d_phi = in(p.d_phi), *const v = in(p.v), *const d_v = in(p.d_v);
    const T *const G = in(p.G_m), *const N = in(p.N_m), *const bias = in(p.bias);
    for (long n = 0; n < rows; ++n) {
      const long sender = p.j[e + n] * 3 * H, receiver = p.i[e + n] * 4 * H;
      const T *const f = t.f[0].get() + n * 3 * H, *const df = t.f[M::CHANGE].get() + n * 3 * H;
      typename M::S r[3];
      for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * (e + n) + d);
      Q of_u = {}, of_r[3] = {};
      for (long k = 0; k < H; k += L) {
        Q of_sum[4], of_m, y;
        for (int d = 0; d < 4; ++d) get(of_sum[d], G, N, receiver + d * H + k);
        // from the gradient of a message to those of filter and phi
        const auto messages = [&](long x) {
          Q w;
          get(w, f, df, x * H + k), get(y, phi, d_phi, sender + x * H + k);
          const Q of_w = of_m * y;
          T *const to = g_phi + sender + x * H + k;
          increase(to, last(w * of_m));
          put(of_w, g + x * part + n * step + k, dg + x * part + n * step + k);
          if (geometry) of_u += times_constant(load(bias + x * H + k), of_w);
          return w * y;
        };
        of_m = of_sum[0];
        messages(0);
        of_m = r[0] * of_sum[1] + r[1] * of_sum[2] + r[2] * of_sum[3];
        const Q turned = messages(2);
        if (geometry)
          for (int d = 0; d < 3; ++d) of_r[d] += of_sum[d + 1] * turned;
        if (!all) continue;
        of_m = Q{};
        if (moving)
          for (int d = 0; d < 3; ++d) get(y, v, d_v, sender + d * H + k), of_m += of_sum[d + 1] * y;
        const Q moved = messages(1);
        if (g_v)
          for (int d = 0; d < 3; ++d) increase(g_v + sender + d * H + k, last(of_sum[d + 1] * moved));
      }
      if (p.g_u) out(p.g_u)[e + n] = last(total<T>(of_u));
      if (p.g_r)
        for (int d = 0; d < 3; ++d) out(p.g_r)[3 * (e + n) + d] = last(total<T>(of_r[d]));
    }
    if (weights) {
      of_weights(t, rows, t.b[0].get(), dg);
      if (M::CHANGE) of_weights(t, rows, t.b[1].get(), g);
    }
    if (geometry) of_geometry<M>(t, e, rows, g, dg);
  }

  // Adds b^T g of the tile to gradients of the weights, some functions at a time.
  void of_weights(Tile &t, long rows, const T *b, const T *g) const {
    T *const turned = t.turned.of(rows * (FEW + 1));
    for (long m = 0; m <= R; m += FEW) {
      const long few = R + 1 - m == FEW + 1 ? FEW + 1 : FEW, count = std::min(few, R + 1 - m);
      for (long n = 0; n < rows; ++n)
        for (long k = 0; k < few; ++k) turned[n * few + k] = k < count ? b[n * step_b + m + k] : 0;
      for (long x = 0; x < 3; ++x) {
        if (!matters(x)) continue;
        T *const to = t.weight + (x * columns() + m) * H;
        for (long h = 0; h < H; h += 2 * L) {
          const T *const from = g + x * ROOM * step + h;
          if (H - h <= L) few > FEW ? few_times<FEW + 1, 1>(rows, turned, from, to + h)
                                    : few_times<FEW, 1>(rows, turned, from, to + h);
          else few > FEW ? few_times<FEW + 1, 2>(rows, turned, from, to + h)
                         : few_times<FEW, 2>(rows, turned, from, to + h);
        }
      }
      if (few > FEW) break;
    }
  }
  // c (F, NV vectors of H) += a (rows, F)^T b (rows, NV vectors of step)
  template <int F, int NV> void few_times(long rows, const T *a, const T *b, T *c) const {
    V<T> s[F][NV];
#pragma GCC unroll 16
    for (int r = 0; r < F; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) s[r][v] = load(c + r * H + v * L);
    for (long n = 0; n < rows; ++n, a += F, b += step) {
      V<T> y[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) y[v] = load(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < F; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) s[r][v] += a[r] * y[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < F; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) store(c + r * H + v * L, s[r][v]);
  }

  // Gradients of b and u from those of [u b, u]; of u its own part is there.
  template <class M> void of_geometry(Tile &t, long e, long rows, const T *g, const T *dg) const {
    for (int change = 0; change <= M::CHANGE; ++change) {
      T *const to = t.g_b[change].of(ROOM * step_b);
      const T *const from = change ? dg : g;
      bool add = false;
      for (long x = 0; x < 3; ++x)
        if (matters(x)) multiply(rows, from + x * ROOM * step, step, filter_back[x], to, step_b, add), add = true;
    }
    for (long n = 0; n < rows; ++n) {
      typename M::S u, b, of_ub, of_u = {};
      get(u, in(p.u), in(p.d_u), e + n);
      for (long k = 0; k < R; ++k) {
        get(of_ub, t.g_b[0].get(), t.g_b[M::CHANGE].get(), n * step_b + k);
        get(b, in(p.b), in(p.d_b), (e + n) * R + k);
        of_u += of_ub * b;
        if (p.g_b) out(p.g_b)[(e + n) * R + k] = last(u * of_ub);
      }
      if (p.g_u) out(p.g_u)[e + n] += last(of_u);
    }
  }
};

} // namespace multifid
