// The edges of a layer of PaiNN: sums over neighbours of filtered scalars and vectors (model/encoders/painn.py).
//
//   w_x = u (b W_x^T + bias_x), x one of a, b, c;   m_0 = w_a phi_a,   m_d = w_b phi_b v_d + w_c phi_c r_d
//
// phi and v are the sender's. Nothing of an edge is kept: filters are a product with a few radial functions. The four
// functions are those of egnn.h; the second derivative is the first one taken with dual numbers.
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
  static constexpr long EDGES = 56 / ROWS * ROWS;

public:
  explicit PaiNN(const PaiNNCall &call)
      : p(call), H(call.H), R(call.R), step(stride(call.H)), step_b(stride(call.R)), weights(call.g_weight) {
    filter.pack(in(p.weight), R, 3 * H, 1, R);
    if (p.g_b)
      for (long x = 0; x < 3; ++x) filter_back[x].pack(in(p.weight) + x * H * R, H, R, R, 1);
  }
  void forward() { over_tiles([&](Tile &t, long e, long rows) { ahead<Plain<T>>(t, e, rows); }); }
  void tangent() { over_tiles([&](Tile &t, long e, long rows) { ahead<Changing<T>>(t, e, rows); }); }
  void backward() { over_tiles([&](Tile &t, long e, long rows) { back<Plain<T>>(t, e, rows); }), end(); }
  void again() { over_tiles([&](Tile &t, long e, long rows) { back<Changing<T>>(t, e, rows); }), end(); }

private:
  const PaiNNCall &p;
  const long H, R, step, step_b;
  const bool weights;
  Panels<T> filter, filter_back[3];

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }

  struct Tile {
    Room<T> b, db, f, df, g, dg, g_b, turned, room_phi, room_v, room_weights;
    bool began = false;
    T *g_phi = nullptr, *g_v = nullptr, *weight = nullptr, *bias = nullptr; // weight: (3, R up to ROWS, H)
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

  // f (rows, 3 H) = b W^T of the tile's edges, and with changes df; without the bias.
  template <class M> void filters(Tile &t, long e, long rows) const {
    constexpr bool CHANGE = M::CHANGE;
    T *b = t.b.of((EDGES + ROWS) * step_b), *f = t.f.of((EDGES + ROWS) * (3 * H + 2 * L));
    for (long n = 0; n < rows; ++n) std::memcpy(b + n * step_b, in(p.b) + (e + n) * R, R * sizeof(T));
    multiply(rows, b, step_b, filter, f, 3 * H, false);
    if (!CHANGE) return;
    T *db = t.db.of((EDGES + ROWS) * step_b), *df = t.df.of((EDGES + ROWS) * (3 * H + 2 * L));
    for (long n = 0; n < rows; ++n)
      if (p.d_b) std::memcpy(db + n * step_b, in(p.d_b) + (e + n) * R, R * sizeof(T));
      else std::memset((void *)(db + n * step_b), 0, R * sizeof(T));
    multiply(rows, db, step_b, filter, df, 3 * H, false);
  }

  template <class M> void ahead(Tile &t, long e, long rows) const {
    using Q = typename M::Q;
    filters<M>(t, e, rows);
    T *sums = out(M::CHANGE ? p.d_sum_m : p.sum_m);
    for (long n = 0; n < rows; ++n) {
      const long sender = p.j[e + n] * 3 * H;
      const T *f = t.f.get() + n * 3 * H, *df = t.df.get() + n * 3 * H;
      T *to = sums + p.i[e + n] * 4 * H;
      typename M::S u, r[3];
      get(u, in(p.u), in(p.d_u), e + n);
      for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * (e + n) + d);
      for (long k = 0; k < H; k += L) {
        Q m[3], v;
        for (int x = 0; x < 3; ++x) {
          Q phi;
          get(m[x], f, df, x * H + k), get(phi, in(p.phi), in(p.d_phi), sender + x * H + k);
          add_constant(m[x], load(in(p.bias) + x * H + k));
          m[x] = u * (m[x] * phi);
        }
        increase(to + k, last(m[0]));
        for (int d = 0; d < 3; ++d) {
          get(v, in(p.v), in(p.d_v), sender + d * H + k);
          increase(to + (d + 1) * H + k, last(m[1] * v + r[d] * m[2]));
        }
      }
    }
  }

  void begin(Tile &t) {
    const bool first = &t == tiles[0];
    t.began = true;
    t.g_phi = first ? out(p.g_phi) : t.room_phi.zeros(p.atoms * 3 * H);
    t.g_v = first ? out(p.g_v) : t.room_v.zeros(p.atoms * 3 * H);
    if (!weights) return;
    const long size = 3 * up(R, ROWS) * H;
    t.weight = t.room_weights.zeros(size + 3 * H);
    t.bias = t.weight + size;
  }
  void end() {
    for (size_t k = 0; k < tiles.size(); ++k) {
      if (!tiles[k] || !tiles[k]->began) continue;
      const Tile &t = *tiles[k];
      if (k) sum_up(out(p.g_phi), t.g_phi, p.atoms * 3 * H), sum_up(out(p.g_v), t.g_v, p.atoms * 3 * H);
      if (!weights) continue;
      for (long x = 0; x < 3; ++x)
        for (long h = 0; h < H; ++h)
          for (long m = 0; m < R; ++m) out(p.g_weight)[(x * H + h) * R + m] += t.weight[(x * up(R, ROWS) + m) * H + h];
      sum_up(out(p.g_bias), t.bias, 3 * H);
    }
  }
  static void sum_up(T *to, const T *x, long count) {
    for (long k = 0; k < count; ++k) to[k] += x[k];
  }

  // Gradients of the filters before their bias and envelope to g (3, rows, step), and their changes to dg.
  template <class M> void back(Tile &t, long e, long rows) {
    using Q = typename M::Q;
    constexpr bool CHANGE = M::CHANGE;
    if (!t.began) begin(t);
    filters<M>(t, e, rows);
    const long part = (EDGES + ROWS) * step;
    T *g = t.g.of(3 * part), *dg = CHANGE ? t.dg.of(3 * part) : g;
    for (long n = 0; n < rows; ++n) {
      const long sender = p.j[e + n] * 3 * H, receiver = p.i[e + n] * 4 * H;
      const T *f = t.f.get() + n * 3 * H, *df = t.df.get() + n * 3 * H;
      typename M::S u, r[3];
      get(u, in(p.u), in(p.d_u), e + n);
      for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * (e + n) + d);
      Q of_u = {}, of_r[3] = {};
      for (long k = 0; k < H; k += L) {
        Q w[3], phi[3], of_m[3], of_sum[4], v[3];
        for (int d = 0; d < 4; ++d) get(of_sum[d], in(p.G_m), in(p.N_m), receiver + d * H + k);
        for (int x = 0; x < 3; ++x) {
          get(w[x], f, df, x * H + k), get(phi[x], in(p.phi), in(p.d_phi), sender + x * H + k);
          add_constant(w[x], load(in(p.bias) + x * H + k));
          get(v[x], in(p.v), in(p.d_v), sender + x * H + k);
        }
        of_m[0] = of_sum[0];
        of_m[1] = of_sum[1] * v[0] + of_sum[2] * v[1] + of_sum[3] * v[2];
        of_m[2] = r[0] * of_sum[1] + r[1] * of_sum[2] + r[2] * of_sum[3];
        const Q moved = u * (w[1] * phi[1]), turned = u * (w[2] * phi[2]);
        for (int d = 0; d < 3; ++d) {
          increase(t.g_v + sender + d * H + k, last(of_sum[d + 1] * moved));
          of_r[d] += of_sum[d + 1] * turned;
        }
        for (int x = 0; x < 3; ++x) {
          const Q of_w = of_m[x] * phi[x], of_f = u * of_w;
          increase(t.g_phi + sender + x * H + k, last(u * (w[x] * of_m[x])));
          of_u += of_w * w[x];
          put(of_f, g + x * part + n * step + k, dg + x * part + n * step + k);
          if (weights) increase(t.bias + x * H + k, last(of_f));
        }
      }
      if (p.g_u) out(p.g_u)[e + n] = last(total<T>(of_u));
      if (p.g_r)
        for (int d = 0; d < 3; ++d) out(p.g_r)[3 * (e + n) + d] = last(total<T>(of_r[d]));
    }
    if (weights) {
      T *turned = t.turned.of((EDGES + ROWS) * up(R, ROWS));
      turn(rows, R, t.b.get(), step_b, turned);
      for (long x = 0; x < 3; ++x)
        accumulate(rows, turned, R, dg + x * part, step, H, t.weight + x * up(R, ROWS) * H, H);
      if (CHANGE) {
        turn(rows, R, t.db.get(), step_b, turned);
        for (long x = 0; x < 3; ++x)
          accumulate(rows, turned, R, g + x * part, step, H, t.weight + x * up(R, ROWS) * H, H);
      }
    }
    if (!p.g_b) return;
    T *to = t.g_b.of((EDGES + ROWS) * step_b);
    for (long x = 0; x < 3; ++x) multiply(rows, dg + x * part, step, filter_back[x], to, step_b, x > 0);
    for (long n = 0; n < rows; ++n) std::memcpy(out(p.g_b) + (e + n) * R, to + n * step_b, R * sizeof(T));
  }
  static void put(V<T> x, T *to, T *) { store(to, x); }
  static void put(Dual<V<T>> x, T *to, T *d) { store(to, x.v), store(d, x.d); }
};

} // namespace multifid
