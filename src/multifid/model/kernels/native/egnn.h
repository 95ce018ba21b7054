// The edges of a layer of EGNN: the equations at the head of model/encoders/egnn.py between the features of atoms.
//
//   forward    sums of messages, moves of vectors, sums of tensors                      (outputs)
//   backward   gradients of a sum of the outputs times `G`                              (g); of inputs also for many `G` at once
//   tangent    how the outputs change along a direction of the inputs                   (d)
//   again      gradients of the sum of `backward`'s g times the direction, and of the outputs times `N`:
//              the derivative of `backward` along the direction, with `N` as that of `G`
//
// The second derivative needs no formula of its own: it is the backward pass, taken with dual numbers.
//
// Edges are taken in tiles whose values stay in the cache. Of a tile, the products of hidden units with hidden units are
// products of matrices (products.h); all else is done in one loop between two of them.
#pragma once
#include "products.h"
#include <deque>
#include <omp.h>

namespace multifid {

// What Python hands over; arrays are contiguous. N atoms, E edges; K hidden units, a multiple of 16 (32 for bfloat16);
// C vectors and T tensors, multiples of 8 (what is missing is zero); R radial functions; P = C + R (+ 2 C with angles)
// numbers that the first map reads; O = C + T. Absent arrays are null.
struct EGNNCall {
  int64_t edges, atoms, K, C, R, T, angles, threads, type;
  double per_area;
  const int64_t *i, *j;                         // (E), i ascending
  const void *a, *c, *v, *r, *b, *u, *y;        // (N,K) (N,K) (N,3,C) (E,3) (E,R) (E) (E,5)
  const void *pair, *message, *message_bias, *gate, *gate_bias; // (K,P) (K,K) (K) (K) (1)
  const void *move, *move_bias, *weight, *weight_bias;          // (K,K) (K) (O,K) (O)
  void *sum_m, *sum_v, *sum_t;                  // (N,K) (N,3,C) (N,5,T), zeros
  void *first, *second, *third, *gates, *phi;   // (E,K) x 3, (E), (E,O)
  const void *G_m, *G_v, *G_t;
  void *g_a, *g_c, *g_v, *g_r, *g_b, *g_u, *g_y; // zeros, like those of the weights
  void *g_pair, *g_message, *g_message_bias, *g_gate, *g_gate_bias, *g_move, *g_move_bias, *g_weight, *g_weight_bias;
  void *back_m, *back_y;                        // (E,K) x 2: gradients that `again` reads
  const void *d_a, *d_c, *d_v, *d_r, *d_b, *d_u, *d_y;
  void *d_sum_m, *d_sum_v, *d_sum_t;            // zeros
  void *d_first, *d_second, *d_third, *d_phi;
  const void *N_m, *N_v, *N_t;
};

template <class Type> class EGNN {
  using T = typename Type::Number;
  using Operand = typename Type::Operand;
  using Kept = typename Type::Kept;
  static constexpr long L = Lanes<T>::N;

  // Numbers without or with their change: of an edge, and of eight of its channels.
  struct Plain {
    using S = T;
    using Q = G<T>;
  };
  struct Changing {
    using S = Dual<T>;
    using Q = Dual<G<T>>;
  };

public:
  explicit EGNN(const EGNNCall &call, const EGNN *like = nullptr) // like: has the same weights, laid out
      : p(call), K(call.K), C(call.C), R(call.R), O(call.C + call.T),
        P(call.C + call.R + (call.angles ? 2 * call.C : 0)), step(stride(call.K)), step_p(stride(std::max(P, O))),
        weights(call.g_message), vectors(call.g_v || call.g_r || call.g_b), laid(like ? like->laid : own) {}

  void forward() {
    lay(true);
    over_tiles([&](Tile &t, long e, long rows) { forward_tile(t, e, rows); });
  }
  void tangent() {
    lay(true);
    over_tiles([&](Tile &t, long e, long rows) { tangent_tile(t, e, rows); });
  }
  void backward() { back<false>(); }

  // Gradients of inputs for many gradients of the outputs: what calls differ in. What an edge and its SiLU need is made once.
  static void backward(const EGNNCall *calls, long many) {
    EGNN whole(*calls);
    std::deque<EGNN> each;
    for (long k = 0; k < many; ++k) each.emplace_back(calls[k], &whole);
    whole.lay(false);
    whole.over_tiles([&](Tile &t, long e, long rows) {
      if (!t.began) whole.begin(t, many);
      whole.share(t, e, rows);
      for (long k = 0; k < many; ++k) {
        each[k].receive(t, k, &t == whole.tiles[0]);
        each[k].template back_tile<false, true>(t, e, rows);
      }
    });
    for (size_t thread = 1; thread < whole.tiles.size(); ++thread)
      for (long k = 0; k < many; ++k)
        if (Tile *t = whole.tiles[thread]; t && t->began) {
          each[k].receive(*t, k, false);
          each[k].add_atoms(*t);
        }
  }
  void again() { back<true>(); }

private:
  const EGNNCall &p;
  const long K, C, R, O, P, step, step_p;
  const bool weights, vectors; // which gradients are wanted
  struct Laid {
    Type message, move;  // (K, K), for the direction of the pass
    Room<T> pair;        // (P, K)
    Panels<T> pair_back; // (K, P)
    Panels<T> last;      // (K, O)
  } own;
  Laid &laid;

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }
  static const Kept *kept(const void *x) { return static_cast<const Kept *>(x); }
  static Kept *keep(void *x) { return static_cast<Kept *>(x); }

  void lay(bool forwards) {
    laid.message.pack(in(p.message), K, K, forwards), laid.move.pack(in(p.move), K, K, forwards);
    T *to = laid.pair.of(P * K);
    for (long k = 0; k < K; ++k)
      for (long n = 0; n < P; ++n) to[n * K + k] = in(p.pair)[k * P + n];
    if (forwards) laid.last.pack(in(p.weight), K, O, 1, K);
    if (!forwards && vectors) laid.pair_back.pack(in(p.pair), K, P, P, 1);
  }

  // What a thread has for its tiles, and its gradients of what is shared.
  struct Tile {
    typename Type::Work work;
    Room<T> f, df, looks, moved, b1, b2, b3, s1, s2, row, turned;
    Room<T> y, slope_1, slope_2, slope_3; // of many at once: silu(second), and the slopes of the three
    Room<Operand> o1, o2, o3, o4, o5, o6;
    Room<T> room_weights, room_c, room_v;
    bool began = false;
    T *g_c = nullptr, *g_v = nullptr;
    T *pair, *message, *message_bias, *gate, *gate_bias, *move, *move_bias, *weight, *weight_bias; // pair: (K, P) in whole vectors
  };
  Tiles<Tile> tiles;

  template <class Work> void over_tiles(Work work) {
    const int threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, up(p.edges, Type::EDGES) / Type::EDGES));
    tiles.resize(threads, K <= NARROW);
#pragma omp parallel num_threads(threads)
    {
      const int k = omp_get_thread_num(), of = omp_get_num_threads();
      Tile &t = tiles.begin(k);
      Type::begin();
      const long from = edge_of(k, of), all = edge_of(k + 1, of) - from;
      const long count = (all + Type::EDGES - 1) / Type::EDGES;
      for (long n = 0; n < count; ++n)
        work(t, from + all * n / count, all * (n + 1) / count - all * n / count);
      Type::end();
    }
  }

  // Where the edges of a thread begin: with a receiver, so that no two threads add to the same one.
  long edge_of(long k, long of) const {
    long e = p.edges * k / of;
    while (e > 0 && e < p.edges && p.i[e] == p.i[e - 1]) ++e;
    return e;
  }

  // Rows whose gates are taken at once, so that none waits for the sum of another.
  static constexpr long TOGETHER = 16;

  // Rows four by four, then one by one.
  template <class Do> static void by_rows(long rows, Do work) {
    long n = 0;
    for (; n + 4 <= rows; n += 4) work(n, std::integral_constant<int, 4>());
    for (; n < rows; ++n) work(n, std::integral_constant<int, 1>());
  }

  // ---- numbers with or without their change

  static void get(T &to, const T *from, const T *, long k) { to = from[k]; }
  static void get(Dual<T> &to, const T *from, const T *d, long k) { to = {from[k], d ? d[k] : T(0)}; }
  static void get(G<T> &to, const T *from, const T *, long k) { to = group(from + k); }
  static void get(Dual<G<T>> &to, const T *from, const T *d, long k) {
    to = {group(from + k), d ? group(d + k) : G<T>{}};
  }
  static void put(T x, T *to, T *, long k) { to[k] = x; }
  static void put(Dual<T> x, T *to, T *d, long k) { to[k] = x.v, d[k] = x.d; }
  static void put(G<T> x, T *to, T *, long k) { put_group(to + k, x); }
  static void put(Dual<G<T>> x, T *to, T *d, long k) { put_group(to + k, x.v), put_group(d + k, x.d); }
  template <class X> static X last(X x) { return x; } // what is asked for: the number itself, or its change
  template <class X> static X last(Dual<X> x) { return x.d; }
  static void add(T *to, G<T> x) { put_group(to, group(to) + x); }
  static T total(G<T> x) { return sum_group<T>(x); }
  static Dual<T> total(Dual<G<T>> x) { return {sum_group<T>(x.v), sum_group<T>(x.d)}; }
  static G<T> root(G<T> x) { // 1 / sqrt(x + 1)
    T s[GROUP];
    for (int l = 0; l < GROUP; ++l) s[l] = 1 / std::sqrt(x[l] + 1);
    return group(s);
  }
  static Dual<G<T>> root(Dual<G<T>> x) {
    const G<T> s = root(x.v);
    return {s, T(-0.5) * s * s * s * x.d};
  }

  // ---- geometry of an edge: x_ij^c and what the first map reads of it

  template <class M> struct Look { // of eight channels
    typename M::Q vi[3], vj[3], x[3], s; // s = 1 / sqrt(|x|^2 + 1)
  };
  template <class M> Look<M> *looks_of(Tile &t, long rows) const {
    return reinterpret_cast<Look<M> *>(t.looks.of(rows * (C / GROUP) * (sizeof(Look<M>) / sizeof(T))));
  }

  // Writes the looks of an edge, one for each group, and f (P): what the first map reads; with changes also df.
  template <class M> void look(Look<M> *l, long e, T *f, T *df) const {
    using S = typename M::S;
    using Q = typename M::Q;
    const T area = T(p.per_area);
    S r[3], b;
    for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * e + d);
    for (long c = 0; c < C; c += GROUP, ++l) {
      Q x2;
      for (int d = 0; d < 3; ++d) {
        get(l->vi[d], in(p.v), in(p.d_v), (3 * p.i[e] + d) * C + c);
        get(l->vj[d], in(p.v), in(p.d_v), (3 * p.j[e] + d) * C + c);
        l->x[d] = r[d] + (l->vj[d] - l->vi[d]);
        x2 = d ? x2 + l->x[d] * l->x[d] : l->x[d] * l->x[d];
      }
      l->s = root(x2);
      put(area * x2, f, df, c);
      if (p.angles) {
        put(area * (r[0] * l->vi[0] + r[1] * l->vi[1] + r[2] * l->vi[2]), f, df, C + R + c);
        put(area * (r[0] * l->vj[0] + r[1] * l->vj[1] + r[2] * l->vj[2]), f, df, 2 * C + R + c);
      }
    }
    for (long n = 0; n < R; ++n) {
      get(b, in(p.b), in(p.d_b), e * R + n);
      put(b, f, df, C + n);
    }
  }

  // Add to v and t of the receiver what the edge says, or how it changes.
  template <class M> void move_receiver(const Look<M> *l, long e, const T *phi, const T *d_phi, T *to_v, T *to_t) const {
    typename M::S u, y;
    typename M::Q weight;
    get(u, in(p.u), in(p.d_u), e);
    for (long c = 0; c < C; c += GROUP, ++l) {
      get(weight, phi, d_phi, c);
      const auto w = u * weight * l->s;
      for (int d = 0; d < 3; ++d) add(to_v + (3 * p.i[e] + d) * C + c, last(w * l->x[d]));
    }
    for (long c = 0; c < p.T; c += GROUP) {
      get(weight, phi, d_phi, C + c);
      const auto w = u * weight;
      for (int n = 0; n < 5; ++n) {
        get(y, in(p.y), in(p.d_y), 5 * e + n);
        add(to_t + (5 * p.i[e] + n) * p.T + c, last(y * w));
      }
    }
  }

  template <class M> struct Moved { // gradients of an edge
    typename M::S u, y[5];
    typename M::Q *x; // (C / 8, 3): of x, by way of the moves
  };

  // From the gradients of v and t of the receiver: of phi (O) to g_phi, and their changes; of u, y and x to `moved`.
  template <class M> void move_back(const Look<M> *l, long e, T *g_phi, T *d_g_phi, Moved<M> &moved) const {
    using Q = typename M::Q;
    typename M::S u, y;
    Q weight, g[3], of_u = {};
    get(u, in(p.u), in(p.d_u), e);
    Q *to = moved.x;
    for (long c = 0; c < C; c += GROUP, ++l, to += 3) {
      get(weight, in(p.phi), in(p.d_phi), e * O + c);
      for (int d = 0; d < 3; ++d) get(g[d], in(p.G_v), in(p.N_v), (3 * p.i[e] + d) * C + c);
      const Q along = g[0] * l->x[0] + g[1] * l->x[1] + g[2] * l->x[2], scaled = l->s * along;
      put(u * scaled, g_phi, d_g_phi, c);
      of_u += weight * scaled;
      const Q w = u * weight * l->s, of_area = T(-1) * (w * l->s * scaled); // twice the gradient of |x|^2
      for (int d = 0; d < 3; ++d) to[d] = w * g[d] + of_area * l->x[d];
    }
    for (int n = 0; n < 5; ++n) moved.y[n] = {};
    for (long c = 0; c < p.T; c += GROUP) {
      get(weight, in(p.phi), in(p.d_phi), e * O + C + c);
      Q along = {};
      for (int n = 0; n < 5; ++n) {
        get(g[0], in(p.G_t), in(p.N_t), (5 * p.i[e] + n) * p.T + c);
        get(y, in(p.y), in(p.d_y), 5 * e + n);
        along += y * g[0];
        moved.y[n] += total(u * weight * g[0]);
      }
      put(u * along, g_phi, d_g_phi, C + c);
      of_u += weight * along;
    }
    moved.u = total(of_u);
  }

  // From the gradients of what the first map read, g_f (P), and of x: to r, b and v; added are the changes, if there are.
  template <class M> void look_back(const Look<M> *l, long e, const T *g_f, const T *d_g_f, const Moved<M> &moved, Tile &t) const {
    using Q = typename M::Q;
    const T area = T(p.per_area);
    typename M::S r[3], g;
    Q g_r[3] = {}, of_area, of_i = {}, of_j = {};
    for (int d = 0; d < 3; ++d) get(r[d], in(p.r), in(p.d_r), 3 * e + d);
    const Q *g_x = moved.x;
    for (long c = 0; c < C; c += GROUP, ++l, g_x += 3) {
      get(of_area, g_f, d_g_f, c);
      if (p.angles) get(of_i, g_f, d_g_f, C + R + c), get(of_j, g_f, d_g_f, 2 * C + R + c);
      for (int d = 0; d < 3; ++d) {
        const Q of_x = g_x[d] + 2 * area * (of_area * l->x[d]);
        Q to_i = T(-1) * of_x, to_j = of_x;
        g_r[d] += of_x;
        if (p.angles) {
          to_i += area * (r[d] * of_i);
          to_j += area * (r[d] * of_j);
          g_r[d] += area * (of_i * l->vi[d] + of_j * l->vj[d]);
        }
        if (p.g_v) {
          add(t.g_v + (3 * p.i[e] + d) * C + c, last(to_i));
          add(t.g_v + (3 * p.j[e] + d) * C + c, last(to_j));
        }
      }
    }
    if (p.g_r)
      for (int d = 0; d < 3; ++d) out(p.g_r)[3 * e + d] = last(total(g_r[d]));
    if (p.g_b)
      for (long n = 0; n < R; ++n) {
        get(g, g_f, d_g_f, C + n);
        out(p.g_b)[e * R + n] = last(g);
      }
  }

  // ---- tiles, forwards

  static long rows_of_room() { return up(Type::EDGES, Type::MULTIPLE) + ROWS; }

  // x = a_i + c_j + f pair, given to `use` row by row.
  template <class Use> void first_map(long e, long rows, const void *a, const void *c, const T *f, Use use) const {
    const T *w = laid.pair.get();
    by_rows(rows, [&](long n, auto four) {
      constexpr int Q = decltype(four)::value;
      const T *x[Q], *y[Q], *g[Q];
      for (int q = 0; q < Q; ++q) {
        x[q] = in(a) + p.i[e + n + q] * K, y[q] = in(c) + p.j[e + n + q] * K;
        g[q] = f + (n + q) * step_p;
      }
      for (long k = 0; k < K; k += L) {
        V<T> s[Q];
        for (int q = 0; q < Q; ++q) s[q] = load(x[q] + k) + load(y[q] + k);
        for (long m = 0; m < P; ++m) {
          const V<T> column = load(w + m * K + k);
          for (int q = 0; q < Q; ++q) s[q] += g[q][m] * column;
        }
        for (int q = 0; q < Q; ++q) use(n + q, k, s[q]);
      }
    });
  }

  void forward_tile(Tile &t, long e, long rows) {
    const long room = rows_of_room();
    T *f = t.f.of(room * step_p), *b = t.b1.of(room * step), *phis = t.s1.of(room * step_p);
    auto *looks = looks_of<Plain>(t, room);
    Operand *o = t.o1.of(room * step);
    Kept *first = keep(p.first), *second = keep(p.second), *third = keep(p.third);
    const long groups = C / GROUP;
    for (long n = 0; n < rows; ++n) look<Plain>(looks + n * groups, e + n, f + n * step_p, nullptr);
    first_map(e, rows, p.a, p.c, f, [&](long n, long k, V<T> x) {
      if (first) store(first + (e + n) * K + k, x);
      Type::put(o + n * step + k, x * sigmoid(x));
    });
    laid.message.times(rows, o, step, b, step);
    const T *gate = in(p.gate), *bias = in(p.message_bias);
    for (long n0 = 0; n0 < rows; n0 += TOGETHER) {
      const long n1 = std::min(n0 + TOGETHER, rows);
      T open[TOGETHER] = {};
      for (long n = n0; n < n1; ++n) {
        T *row = b + n * step;
        V<T> dot = {};
        for (long k = 0; k < K; k += L) {
          const V<T> x = load(row + k) + load(bias + k);
          if (second) store(second + (e + n) * K + k, x);
          const V<T> y = x * sigmoid(x);
          dot += y * load(gate + k);
          store(row + k, y);
        }
        open[n - n0] = sum<T>(dot) + in(p.gate_bias)[0];
      }
      for (long n = 0; n < TOGETHER; n += L) store(open + n, sigmoid(load(open + n)));
      for (long n = n0; n < n1; ++n) {
        const T *row = b + n * step, u = in(p.u)[e + n];
        T *to = out(p.sum_m) + p.i[e + n] * K;
        if (p.gates) out(p.gates)[e + n] = open[n - n0];
        for (long k = 0; k < K; k += L) {
          const V<T> m = load(row + k) * open[n - n0];
          Type::put(o + n * step + k, m);
          store(to + k, load(to + k) + u * m);
        }
      }
    }
    laid.move.times(rows, o, step, b, step);
    bias = in(p.move_bias);
    for (long n = 0; n < rows; ++n) {
      for (long k = 0; k < K; k += L) {
        const V<T> x = load(b + n * step + k) + load(bias + k);
        if (third) store(third + (e + n) * K + k, x);
        store(b + n * step + k, x * sigmoid(x));
      }
    }
    multiply(rows, b, step, laid.last, phis, step_p, false);
    for (long n = 0; n < rows; ++n) {
      T *phi = phis + n * step_p;
      for (long k = 0; k < O; ++k) phi[k] += in(p.weight_bias)[k];
      if (p.phi) std::memcpy(out(p.phi) + (e + n) * O, phi, O * sizeof(T));
      move_receiver<Plain>(looks + n * groups, e + n, phi, nullptr, out(p.sum_v), out(p.sum_t));
    }
  }

  void tangent_tile(Tile &t, long e, long rows) {
    const long room = rows_of_room();
    T *f = t.f.of(room * step_p), *df = t.df.of(room * step_p), *b = t.b1.of(room * step), *row = t.row.of(2 * K);
    T *phis = t.s1.of(room * step_p);
    auto *looks = looks_of<Changing>(t, room);
    Operand *o = t.o1.of(room * step);
    const long groups = C / GROUP;
    for (long n = 0; n < rows; ++n) look<Changing>(looks + n * groups, e + n, f + n * step_p, df + n * step_p);
    first_map(e, rows, p.d_a, p.d_c, df, [&](long n, long k, V<T> dx) {
      const long at = (e + n) * K + k;
      store(keep(p.d_first) + at, dx);
      Type::put(o + n * step + k, SiLU<V<T>>(load(kept(p.first) + at)).slope * dx);
    });
    laid.message.times(rows, o, step, b, step);
    const T *gate = in(p.gate);
    for (long n = 0; n < rows; ++n) {
      T *to = out(p.d_sum_m) + p.i[e + n] * K;
      V<T> dot = {};
      for (long k = 0; k < K; k += L) {
        const V<T> dx = load(b + n * step + k);
        store(keep(p.d_second) + (e + n) * K + k, dx);
        const SiLU<V<T>> silu(load(kept(p.second) + (e + n) * K + k));
        const V<T> dy = silu.slope * dx;
        dot += dy * load(gate + k);
        store(row + k, dy), store(row + K + k, silu.y);
      }
      const T open = in(p.gates)[e + n], d_open = open * (1 - open) * sum<T>(dot);
      const T u = in(p.u)[e + n], du = p.d_u ? in(p.d_u)[e + n] : T(0);
      for (long k = 0; k < K; k += L) {
        const V<T> y = load(row + K + k), dm = load(row + k) * open + y * d_open;
        Type::put(o + n * step + k, dm);
        store(to + k, load(to + k) + u * dm + (du * open) * y);
      }
    }
    laid.move.times(rows, o, step, b, step);
    for (long n = 0; n < rows; ++n) {
      for (long k = 0; k < K; k += L) {
        const V<T> dx = load(b + n * step + k);
        store(keep(p.d_third) + (e + n) * K + k, dx);
        store(b + n * step + k, SiLU<V<T>>(load(kept(p.third) + (e + n) * K + k)).slope * dx);
      }
    }
    multiply(rows, b, step, laid.last, phis, step_p, false);
    for (long n = 0; n < rows; ++n) {
      T *d_phi = out(p.d_phi) + (e + n) * O;
      std::memcpy(d_phi, phis + n * step_p, O * sizeof(T));
      move_receiver<Changing>(looks + n * groups, e + n, in(p.phi) + (e + n) * O, d_phi, out(p.d_sum_v), out(p.d_sum_t));
    }
  }

  // ---- tiles, backwards

  template <bool AGAIN> void back() {
    lay(false);
    over_tiles([&](Tile &t, long e, long rows) {
      if (!t.began) begin(t);
      back_tile<AGAIN>(t, e, rows);
    });
    end();
  }

  void begin(Tile &t, long many = 1) {
    const bool first = &t == tiles[0];
    t.began = true;
    if (!first) t.room_c.zeros(many * p.atoms * K);
    if (!first && p.g_v) t.room_v.zeros(many * p.atoms * C * 3);
    receive(t, 0, first);
    if (!weights) return;
    const long square = up(K, ROWS) * K;
    const long sizes[] = {up(K, ROWS) * up(P, L), square, K, K, 16, square, K, O * K, O};
    T **parts[] = {&t.pair, &t.message, &t.message_bias, &t.gate, &t.gate_bias, &t.move, &t.move_bias, &t.weight, &t.weight_bias};
    long all = 0;
    for (long size : sizes) all += size;
    T *at = t.room_weights.zeros(all);
    for (int k = 0; k < 9; ++k) *parts[k] = at, at += sizes[k];
  }

  // Where a thread adds gradients of senders, and of vectors: the first one to what was asked for.
  void receive(Tile &t, long number, bool first) const {
    t.g_c = first ? out(p.g_c) : t.room_c.get() + number * p.atoms * K;
    if (p.g_v) t.g_v = first ? out(p.g_v) : t.room_v.get() + number * p.atoms * C * 3;
  }
  void add_atoms(const Tile &t) const {
    sum_up(out(p.g_c), t.g_c, p.atoms * K);
    if (p.g_v) sum_up(out(p.g_v), t.g_v, p.atoms * C * 3);
  }

  // Sums over threads, in their order.
  void end() {
    for (size_t k = 0; k < tiles.size(); ++k) {
      if (!tiles[k] || !tiles[k]->began) continue; // no edges
      const Tile &t = *tiles[k];
      if (k) add_atoms(t);
      if (!weights) continue;
      for (long m = 0; m < K; ++m) sum_up(out(p.g_pair) + m * P, t.pair + m * up(P, L), P);
      sum_up(out(p.g_message), t.message, K * K), sum_up(out(p.g_move), t.move, K * K);
      sum_up(out(p.g_message_bias), t.message_bias, K), sum_up(out(p.g_move_bias), t.move_bias, K);
      sum_up(out(p.g_gate), t.gate, K), sum_up(out(p.g_gate_bias), t.gate_bias, 1);
      sum_up(out(p.g_weight), t.weight, O * K), sum_up(out(p.g_weight_bias), t.weight_bias, O);
    }
  }
  static void sum_up(T *to, const T *x, long count) {
    for (long k = 0; k < count; ++k) to[k] += x[k];
  }
  static void increase(T *to, V<T> x) { store(to, load(to) + x); }

  // to (count, K) += s^T x, of Q rows of s (count) and the vectors x of them at k.
  template <int Q> void outer(T *to, long count, const T *const *s, const V<T> *x, long k) const {
    for (long o = 0; o < count; ++o) {
      V<T> w = load(to + o * K + k);
      for (int q = 0; q < Q; ++q) w += s[q][o] * x[q];
      store(to + o * K + k, w);
    }
  }

  // The buffers of a tile, backwards; with AGAIN values have their changes beside them.
  struct Back {
    long e, rows;
    T *s1, *s2, *f, *df, *b1, *b2, *b3;
    Operand *third, *d_third, *m, *dm, *second, *d_second; // gradients of the third and second input of SiLU; messages
  };

  // Gradients of phi (s1, s2) -> of the third input of SiLU, and those of the last map.
  template <bool AGAIN, bool MANY> void back_last(const Back &x, Tile &t) const {
    by_rows(x.rows, [&](long n, auto four) {
      constexpr int Q = decltype(four)::value;
      const T *g[Q], *dg[Q];
      for (int q = 0; q < Q; ++q) g[q] = x.s1 + (n + q) * step_p, dg[q] = x.s2 + (n + q) * step_p;
      for (long k = 0; k < K; k += L) {
        V<T> of_y[Q] = {}, d_of_y[Q] = {}, y[Q], dy[Q];
        for (long o = 0; o < O; ++o) {
          const V<T> w = load(in(p.weight) + o * K + k);
          for (int q = 0; q < Q; ++q) of_y[q] += g[q][o] * w;
          if (AGAIN)
            for (int q = 0; q < Q; ++q) d_of_y[q] += dg[q][o] * w;
        }
        V<T> bias = {};
        for (int q = 0; q < Q; ++q) {
          const long at = (x.e + n + q) * K + k, to = (n + q) * step + k;
          if constexpr (MANY) {
            Type::put(x.third + to, of_y[q] * load(t.slope_3.get() + to));
            continue;
          }
          const SiLU<V<T>> silu(load(kept(p.third) + at));
          y[q] = silu.y;
          const V<T> of_third = of_y[q] * silu.slope;
          Type::put(x.third + to, of_third);
          if (AGAIN) {
            const V<T> d = load(kept(p.d_third) + at);
            const V<T> change = d_of_y[q] * silu.slope + of_y[q] * silu.bend * d;
            dy[q] = silu.slope * d;
            Type::put(x.d_third + to, change);
            bias += change;
          } else {
            bias += of_third;
          }
        }
        if (MANY || !weights) continue;
        increase(t.move_bias + k, bias);
        outer<Q>(t.weight, O, AGAIN ? dg : g, y, k);
        if (AGAIN) outer<Q>(t.weight, O, g, dy, k);
      }
    });
    if (MANY || !weights) return;
    const T *s = AGAIN ? x.s2 : x.s1;
    for (long n = 0; n < x.rows; ++n)
      for (long o = 0; o < O; ++o) t.weight_bias[o] += s[n * step_p + o];
  }

  // Gradients of messages by way of the moves (b1) -> of the second input of SiLU; of u by way of the sums to of_u.
  template <bool MANY> void back_gates(const Back &x, Tile &t, T *of_u) const {
    const T *gate = in(p.gate);
    T *room = t.row.of(2 * TOGETHER * K), of_gate[TOGETHER];
    for (long n0 = 0; n0 < x.rows; n0 += TOGETHER) {
      const long n1 = std::min(n0 + TOGETHER, x.rows);
      for (long n = n0; n < n1; ++n) {
        const long e = x.e + n;
        const T *G = in(p.G_m) + p.i[e] * K, u = in(p.u)[e], open = in(p.gates)[e];
        T *row = x.b1 + n * step, *ys = room + 2 * (n - n0) * K, *slopes = ys + K;
        const T *made = t.y.get() + n * step;
        V<T> at_gate = {}, at_u = {};
        for (long k = 0; k < K; k += L) {
          if constexpr (MANY) {
            const V<T> of_sum = load(G + k), of_m = load(row + k) + u * of_sum, y = load(made + k);
            store(row + k, of_m);
            at_gate += of_m * y;
            at_u += of_sum * y;
            continue;
          }
          const SiLU<V<T>> silu(load(kept(p.second) + e * K + k));
          const V<T> of_sum = load(G + k), of_m = load(row + k) + u * of_sum;
          if (p.back_m) store(keep(p.back_m) + e * K + k, of_m);
          store(row + k, of_m), store(ys + k, silu.y), store(slopes + k, silu.slope);
          if (weights) Type::put(x.m + n * step + k, silu.y * open);
          at_gate += of_m * silu.y;
          at_u += of_sum * silu.y;
        }
        of_gate[n - n0] = sum<T>(at_gate) * open * (1 - open);
        of_u[n] = sum<T>(at_u) * open;
      }
      for (long n = n0; n < n1; ++n) {
        const T open = in(p.gates)[x.e + n], of = of_gate[n - n0];
        const T *row = x.b1 + n * step, *ys = room + 2 * (n - n0) * K;
        const T *slopes = MANY ? t.slope_2.get() + n * step : ys + K;
        for (long k = 0; k < K; k += L) {
          const V<T> change = (load(row + k) * open + of * load(gate + k)) * load(slopes + k);
          Type::put(x.second + n * step + k, change);
          if (!weights) continue;
          increase(t.message_bias + k, change);
          increase(t.gate + k, of * load(ys + k));
        }
        if (weights) t.gate_bias[0] += of;
      }
    }
  }

  // The same for changes; returns the change of the gradient of u.
  T back_gate_again(const Back &x, Tile &t, long n) const {
    const long e = x.e + n;
    const T *G = in(p.G_m) + p.i[e] * K, *N = in(p.N_m) + p.i[e] * K, *gate = in(p.gate);
    const T u = in(p.u)[e], du = p.d_u ? in(p.d_u)[e] : T(0), open = in(p.gates)[e], slope = open * (1 - open);
    const Kept *second = kept(p.second) + e * K, *d_second = kept(p.d_second) + e * K, *back_m = kept(p.back_m) + e * K;
    T *row = x.b1 + n * step, *ys = t.row.of(4 * K), *dys = ys + K, *slopes = dys + K, *bends = slopes + K;
    V<T> dot = {}, at_gate = {}, d_at_gate = {}, at_u = {}, d_at_u = {};
    for (long k = 0; k < K; k += L) {
      const SiLU<V<T>> silu(load(second + k));
      const V<T> d = load(d_second + k), dy = silu.slope * d, of_m = load(back_m + k), of_sum = load(G + k);
      const V<T> d_of_m = load(row + k) + du * of_sum + u * load(N + k);
      store(row + k, d_of_m), store(ys + k, silu.y), store(dys + k, dy);
      store(slopes + k, silu.slope), store(bends + k, silu.bend * d);
      dot += dy * load(gate + k);
      at_gate += of_m * silu.y;
      d_at_gate += d_of_m * silu.y + of_m * dy;
      at_u += of_sum * silu.y;
      d_at_u += load(N + k) * silu.y + of_sum * dy;
    }
    const T d_open = slope * sum<T>(dot), plain = sum<T>(at_gate), of_gate = plain * slope;
    const T d_of_gate = sum<T>(d_at_gate) * slope + plain * d_open * (1 - 2 * open);
    for (long k = 0; k < K; k += L) {
      const V<T> w = load(gate + k), of_m = load(back_m + k), y = load(ys + k), dy = load(dys + k);
      const V<T> of_n = of_m * open + of_gate * w, d_of_n = load(row + k) * open + of_m * d_open + d_of_gate * w;
      const V<T> slope_of_y = load(slopes + k), change = d_of_n * slope_of_y + of_n * load(bends + k);
      Type::put(x.second + n * step + k, of_n * slope_of_y);
      Type::put(x.d_second + n * step + k, change);
      if (!weights) continue;
      Type::put(x.m + n * step + k, y * open);
      Type::put(x.dm + n * step + k, dy * open + y * d_open);
      increase(t.message_bias + k, change);
      increase(t.gate + k, d_of_gate * y + of_gate * dy);
    }
    if (weights) t.gate_bias[0] += d_of_gate;
    return sum<T>(d_at_u) * open + sum<T>(at_u) * d_open;
  }

  // Gradients of silu(first) (b2) -> of first (b1), or its change with the gradient itself in b3; silu(first) to m (dm).
  template <bool AGAIN, bool MANY> void back_first(const Back &x, Tile &t) const {
    by_rows(x.rows, [&](long n, auto four) {
      constexpr int Q = decltype(four)::value;
      for (long k = 0; k < K; k += L) {
        V<T> g[Q], plain[Q];
        for (int q = 0; q < Q; ++q) {
          const long e = x.e + n + q, at = e * K + k, to = (n + q) * step + k;
          if constexpr (MANY) {
            g[q] = load(x.b2 + to) * load(t.slope_1.get() + to);
            if (vectors) store(x.b1 + to, g[q]);
            increase(out(p.g_a) + p.i[e] * K + k, g[q]);
            increase(t.g_c + p.j[e] * K + k, g[q]);
            continue;
          }
          const SiLU<V<T>> silu(load(kept(p.first) + at));
          const V<T> of_y = load(x.b2 + to);
          g[q] = of_y * silu.slope;
          if (AGAIN) {
            const V<T> d = load(kept(p.d_first) + at), before = load(kept(p.back_y) + at);
            g[q] += before * silu.bend * d;
            plain[q] = before * silu.slope;
            store(x.b3 + to, plain[q]);
            if (weights) Type::put(x.dm + to, silu.slope * d);
          } else if (p.back_y) {
            store(keep(p.back_y) + at, of_y);
          }
          store(x.b1 + to, g[q]);
          if (weights) Type::put(x.m + to, silu.y);
          increase(out(p.g_a) + p.i[e] * K + k, g[q]);
          increase(t.g_c + p.j[e] * K + k, g[q]);
        }
      }
    });
    if (MANY || !weights) return;
    transposed_times(t.turned, x.rows, x.b1, step, K, x.f, step_p, P, t.pair, up(P, L), true);
    if (AGAIN) transposed_times(t.turned, x.rows, x.b3, step, K, x.df, step_p, P, t.pair, up(P, L), true);
  }

  // The gradient of a matrix of weights: g (dg) of its products, x (dx) what it was multiplied with.
  template <bool AGAIN>
  void gradient(Tile &t, long rows, Operand *g, Operand *dg, Operand *x, Operand *dx, T *to) const {
    if (!weights) return;
    for (Operand *o : {g, dg, x, dx}) // rows behind the last one, which whole blocks read
      if (o && rows < up(rows, Type::MULTIPLE))
        std::memset((void *)(o + rows * step), 0, (up(rows, Type::MULTIPLE) - rows) * step * sizeof(Operand));
    Type::gradient(t.work, rows, AGAIN ? dg : g, K, x, K, step, to, K);
    if (AGAIN) Type::gradient(t.work, rows, g, K, dx, K, step, to, K);
  }

  // Of a tile, for all gradients of the outputs: what edges look like, and the slopes of SiLU.
  void share(Tile &t, long e, long rows) const {
    const long room = rows_of_room(), groups = C / GROUP;
    T *f = t.f.of(room * step_p);
    auto *looks = looks_of<Plain>(t, room);
    T *y = t.y.of(room * step), *slopes[] = {t.slope_1.of(room * step), t.slope_2.of(room * step), t.slope_3.of(room * step)};
    const void *inputs[] = {p.first, p.second, p.third};
    for (long n = 0; n < rows; ++n) {
      look<Plain>(looks + n * groups, e + n, f + n * step_p, nullptr);
      for (int which = 0; which < 3; ++which)
        for (long k = 0; k < K; k += L) {
          const SiLU<V<T>> silu(load(kept(inputs[which]) + (e + n) * K + k));
          store(slopes[which] + n * step + k, silu.slope);
          if (which == 1) store(y + n * step + k, silu.y);
        }
    }
  }

  // MANY: one of many gradients of the outputs, after `share`.
  template <bool AGAIN, bool MANY = false> void back_tile(Tile &t, long e, long rows) {
    using M = std::conditional_t<AGAIN, Changing, Plain>;
    const long room = rows_of_room(), groups = C / GROUP;
    auto values = [&](Room<T> &of) { return of.of(room * step); };
    auto operands = [&](Room<Operand> &of, bool wanted) { return wanted ? of.of(room * step) : nullptr; };
    const Back x = {e, rows, t.s1.of(room * step_p), t.s2.of(room * step_p), t.f.of(room * step_p), t.df.of(room * step_p),
                    values(t.b1), values(t.b2), values(t.b3),
                    operands(t.o1, true), operands(t.o2, AGAIN), operands(t.o3, true), operands(t.o4, AGAIN),
                    operands(t.o5, true), operands(t.o6, AGAIN)};
    auto *looks = looks_of<M>(t, room);
    constexpr long Q = sizeof(typename M::Q) / sizeof(T);
    auto *room_x = reinterpret_cast<typename M::Q *>(t.moved.of(room * 3 * groups * Q));
    Moved<M> moved[Type::EDGES];
    for (long n = 0; n < rows; ++n) {
      if (!MANY) look<M>(looks + n * groups, e + n, x.f + n * step_p, x.df + n * step_p);
      moved[n].x = room_x + n * 3 * groups;
      move_back<M>(looks + n * groups, e + n, x.s1 + n * step_p, x.s2 + n * step_p, moved[n]);
    }
    back_last<AGAIN, MANY>(x, t);
    laid.move.times(rows, AGAIN ? x.d_third : x.third, step, x.b1, step);
    T of_u[Type::EDGES];
    if (AGAIN)
      for (long n = 0; n < rows; ++n) of_u[n] = back_gate_again(x, t, n);
    else
      back_gates<MANY>(x, t, of_u);
    if (p.g_u)
      for (long n = 0; n < rows; ++n) out(p.g_u)[e + n] = of_u[n] + last(moved[n].u);
    gradient<AGAIN>(t, rows, x.third, x.d_third, x.m, x.dm, t.move);
    laid.message.times(rows, AGAIN ? x.d_second : x.second, step, x.b2, step);
    back_first<AGAIN, MANY>(x, t);
    gradient<AGAIN>(t, rows, x.second, x.d_second, x.m, x.dm, t.message);
    if (p.g_y)
      for (long n = 0; n < rows; ++n)
        for (int k = 0; k < 5; ++k) out(p.g_y)[5 * (e + n) + k] = last(moved[n].y[k]);
    if (!vectors) return;
    multiply(rows, x.b1, step, laid.pair_back, x.s1, step_p, false); // of the features, or its change
    if (AGAIN) multiply(rows, x.b3, step, laid.pair_back, x.s2, step_p, false);
    for (long n = 0; n < rows; ++n) {
      const T *g = x.s1 + n * step_p, *other = x.s2 + n * step_p;
      look_back<M>(looks + n * groups, e + n, AGAIN ? other : g, g, moved[n], t);
    }
  }
};

} // namespace multifid
