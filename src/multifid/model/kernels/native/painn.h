// The edges of a layer of PaiNN: sums over neighbours of filtered scalars and vectors (model/encoders/painn.py).
//
//   w_x = u (b W_x^T + bias_x), x one of a, b, c;   m_0 = w_a phi_a,   m_d = w_b phi_b v_d + w_c phi_c r_d
//
// phi and v are the sender's. Nothing of an edge is kept: filters are a product with a few radial functions, in which
// envelope and bias are one more of them, w_x = [u b, u] [W_x, bias_x]^T. The four functions are those of egnn.h; the
// second derivative is the first one taken with dual numbers. In a first layer v is zero, and b has no part in anything.
//
// The edges i -> j and j -> i have one length, and so one filter: where `twin` says which edge is the other one, and their
// radial functions, and changes of these, are the same to the last bit, they are one row of the products.
#pragma once
#include "duals.h"
#include "products.h"
#include <omp.h>

namespace multifid {

// What Python hands over. N atoms, E edges, R radial functions; H channels, a multiple of 16.
struct PaiNNCall {
  int64_t edges, atoms, H, R, threads, type;
  const int64_t *i, *j, *twin;                   // (E), i ascending; twin: the edge the other way, -1 or null where none is
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
        geometry(call.g_b || call.g_r || call.g_u), paired(call.twin && !(weights && geometry)),
        moving(any(call.v) || any(call.d_v)), all(moving || call.g_v) {
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
  void forward() { over_tiles([&](Tile &t, long rows) { ahead<Plain<T>>(t, rows); }), end_sums(p.sum_m); }
  void tangent() { over_tiles([&](Tile &t, long rows) { ahead<Changing<T>>(t, rows); }), end_sums(p.d_sum_m); }
  void backward() { over_tiles([&](Tile &t, long rows) { back<Plain<T>>(t, rows); }), end(); }
  void again() { over_tiles([&](Tile &t, long rows) { back<Changing<T>>(t, rows); }), end(); }

private:
  const PaiNNCall &p;
  const long H, R, step, step_b;
  const bool weights, geometry; // gradients of what are wanted
  const bool paired, moving, all; // whether twins share a row; whether v is not zero; and whether b matters
  Panels<T> filter[3], filter_back[3]; // of a, b, c

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }
  bool any(const void *v) const {
    return v && std::any_of(in(v), in(v) + p.atoms * 3 * p.H, [](T x) { return x != 0; }); // also where it is no number
  }
  bool matters(long x) const { return x != 1 || all; }

  struct Tile {
    Room<T> b[2], f[2], g[2], g_b[2], turned, room_sums, room_phi, room_v, room_weights; // of pairs the second are changes
    bool began = false;
    T *sums = nullptr, *g_phi = nullptr, *g_v = nullptr, *weight = nullptr; // weight: (3, `columns`, H)
    long first[EDGES], second[EDGES]; // the edges of each row; second: -1 where it has one only
  };
  Tiles<Tile> tiles;

  template <class Work> void over_tiles(Work work) {
    const int threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, up(p.edges, EDGES) / EDGES));
    tiles.resize(threads, H <= NARROW);
#pragma omp parallel num_threads(threads)
    {
      const int k = omp_get_thread_num(), of = omp_get_num_threads();
      Tile &t = tiles.begin(k);
      for (long e = p.edges * k / of, end = p.edges * (k + 1) / of; e < end;) {
        long rows = 0;
        for (; e < end && rows < EDGES; ++e) {
          const long other = paired ? twin(e) : -1;
          // of two one is the first, now this one and now that, so that threads have equally many
          if (other >= 0 && e != ((e + other) % 2 ? std::min(e, other) : std::max(e, other))) continue;
          t.first[rows] = e, t.second[rows++] = other;
        }
        if (rows) work(t, rows);
      }
    }
  }
  // The edge that shares a row with another one, -1 where there is none.
  long twin(long e) const {
    const long other = p.twin[e];
    const auto differ = [&](const void *x, long width) {
      return x && std::memcmp(in(x) + e * width, in(x) + other * width, width * sizeof(T));
    };
    return other < 0 || differ(p.u, 1) || differ(p.d_u, 1) || differ(p.b, R) || differ(p.d_b, R) ? -1 : other;
  }

  // [u b, u] of the tile's rows, f (rows, 3 H) of them, and with M their changes.
  template <class M> void filters(Tile &t, long rows) const {
    T *b = t.b[0].of(ROOM * step_b), *db = M::CHANGE ? t.b[1].of(ROOM * step_b) : b;
    for (long n = 0; n < rows; ++n, b += step_b, db += step_b) {
      const long e = t.first[n];
      typename M::S u, x;
      get(u, in(p.u), in(p.d_u), e);
      for (long k = 0; k < R; ++k) get(x, in(p.b), in(p.d_b), e * R + k), put(u * x, b + k, db + k);
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

  // Where the numbers of an edge are.
  template <class M> struct Edge {
    long e, sender, receiver;
    typename M::S r[3];
    Edge(const PaiNNCall &p, long e_) : e(e_), sender(p.j[e] * 3 * p.H), receiver(p.i[e] * 4 * p.H) {
      for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * e + d);
    }
  };

  template <class M> void ahead(Tile &t, long rows) const {
    using Q = typename M::Q;
    T *const whole = out(M::CHANGE ? p.d_sum_m : p.sum_m);
    if (!t.began) t.began = true, t.sums = &t == tiles[0] ? whole : t.room_sums.zeros(p.atoms * 4 * H);
    filters<M>(t, rows);
    const T *const phi = in(p.phi), *const d_phi = in(p.d_phi), *const v = in(p.v), *const d_v = in(p.d_v);
    for (long n = 0; n < rows; ++n) {
      const T *const f = t.f[0].get() + n * 3 * H, *const df = t.f[M::CHANGE].get() + n * 3 * H;
      for (long e : {t.first[n], t.second[n]}) {
        if (e < 0) break;
        const Edge<M> edge(p, e);
        T *const to = t.sums + edge.receiver;
        for (long k = 0; k < H; k += L) {
          const auto message = [&](long x) {
            Q w, y;
            get(w, f, df, x * H + k), get(y, phi, d_phi, edge.sender + x * H + k);
            return w * y;
          };
          increase(to + k, last(message(0)));
          const Q turned = message(2);
          if (moving) {
            const Q moved = message(1);
            for (int d = 0; d < 3; ++d) {
              Q of_v;
              get(of_v, v, d_v, edge.sender + d * H + k);
              increase(to + (d + 1) * H + k, last(moved * of_v + edge.r[d] * turned));
            }
          } else {
            for (int d = 0; d < 3; ++d) increase(to + (d + 1) * H + k, last(edge.r[d] * turned));
          }
        }
      }
    }
  }
  void end_sums(void *to) const {
    for (size_t k = 1; k < tiles.size(); ++k)
      if (tiles[k] && tiles[k]->began) sum_up(out(to), tiles[k]->sums, p.atoms * 4 * H);
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

  template <class M> void back(Tile &t, long rows) {
    using Q = typename M::Q;
    if (!t.began) begin(t);
    filters<M>(t, rows);
    const long part = 2 * ROOM * step; // gradients of filters are (3, rows, step); for geometry each edge has a row
    T *const g = t.g[0].of(3 * part), *const dg = M::CHANGE ? t.g[1].of(3 * part) : g;
    T *const g_phi = t.g_phi, *const g_v = t.g_v;
    const T *const phi = in(p.phi), *const d_phi = in(p.d_phi), *const v = in(p.v), *const d_v = in(p.d_v);
    const T *const G = in(p.G_m), *const N = in(p.N_m), *const bias = in(p.bias);
    long of_edges = 0;
    for (long n = 0; n < rows; ++n) {
      const T *const f = t.f[0].get() + n * 3 * H, *const df = t.f[M::CHANGE].get() + n * 3 * H;
      for (long e : {t.first[n], t.second[n]}) {
        if (e < 0) break;
        const Edge<M> edge(p, e);
        const bool add = !geometry && e == t.second[n];
        const long row = (geometry ? of_edges++ : n) * step, sender = edge.sender;
        Q of_u = {}, of_r[3] = {};
        for (long k = 0; k < H; k += L) {
          Q of_sum[4], of_m, y;
          for (int d = 0; d < 4; ++d) get(of_sum[d], G, N, edge.receiver + d * H + k);
          // from the gradient of a message to those of filter and phi
          const auto messages = [&](long x) {
            Q w, before;
            get(w, f, df, x * H + k), get(y, phi, d_phi, sender + x * H + k);
            Q of_w = of_m * y;
            increase(g_phi + sender + x * H + k, last(w * of_m));
            if (geometry) of_u += times_constant(load(bias + x * H + k), of_w);
            if (add) get(before, g, dg, x * part + row + k), of_w += before;
            put(of_w, g + x * part + row + k, dg + x * part + row + k);
            return w * y;
          };
          of_m = of_sum[0];
          messages(0);
          of_m = edge.r[0] * of_sum[1] + edge.r[1] * of_sum[2] + edge.r[2] * of_sum[3];
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
        if (p.g_u) out(p.g_u)[e] = last(total<T>(of_u));
        if (p.g_r)
          for (int d = 0; d < 3; ++d) out(p.g_r)[3 * e + d] = last(total<T>(of_r[d]));
      }
    }
    if (geometry) of_geometry<M>(t, rows, of_edges, g, dg);
    if (!weights) return;
    of_weights(t, rows, t.b[0].get(), dg);
    if (M::CHANGE) of_weights(t, rows, t.b[1].get(), g);
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
          const T *const from = g + 2 * x * ROOM * step + h;
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
  template <class M> void of_geometry(Tile &t, long rows, long of_edges, const T *g, const T *dg) const {
    for (int change = 0; change <= M::CHANGE; ++change) {
      T *const to = t.g_b[change].of(2 * ROOM * step_b);
      const T *const from = change ? dg : g;
      bool add = false;
      for (long x = 0; x < 3; ++x)
        if (matters(x))
          multiply(of_edges, from + 2 * x * ROOM * step, step, filter_back[x], to, step_b, add), add = true;
    }
    long row = 0;
    for (long n = 0; n < rows; ++n)
      for (long e : {t.first[n], t.second[n]}) {
        if (e < 0) break;
        typename M::S u, b, of_ub, of_u = {};
        get(u, in(p.u), in(p.d_u), e);
        for (long k = 0; k < R; ++k) {
          get(of_ub, t.g_b[0].get(), t.g_b[M::CHANGE].get(), row * step_b + k);
          get(b, in(p.b), in(p.d_b), e * R + k);
          of_u += of_ub * b;
          if (p.g_b) out(p.g_b)[e * R + k] = last(u * of_ub);
        }
        if (p.g_u) out(p.g_u)[e] += last(of_u);
        ++row;
      }
  }
};

// For each edge the one that runs the other way along the same vector, -1 where there is none. r (E,3).
template <class T> void find_twins(long edges, long atoms, const int64_t *i, const int64_t *j, const T *r, int64_t *twin) {
  std::vector<long> begins(atoms + 1, 0);
  for (long e = 0; e < edges; ++e) ++begins[i[e] + 1];
  for (long n = 0; n < atoms; ++n) begins[n + 1] += begins[n];
  for (long e = 0; e < edges; ++e) {
    twin[e] = -1;
    for (long w = begins[j[e]]; w < begins[j[e] + 1] && twin[e] < 0; ++w)
      if (j[w] == i[e] && r[3 * w] == -r[3 * e] && r[3 * w + 1] == -r[3 * e + 1] && r[3 * w + 2] == -r[3 * e + 2])
        twin[e] = w;
  }
  for (long e = 0; e < edges; ++e)
    if (twin[e] >= 0 && twin[twin[e]] != e) twin[e] = -1;
}

} // namespace multifid
