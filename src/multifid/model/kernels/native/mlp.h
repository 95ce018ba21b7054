// Linear maps with SiLU between them, for the features of atoms: z_l = y_(l-1) w_l^T + b_l, y_l = silu(z_l); y_(-1) is x,
// or x after a LayerNorm.
//
// The four functions are those of egnn.h. Columns are taken up to a multiple of Type::WIDTH; those behind are zero and
// stay so.
#pragma once
#include "norm.h"
#include "products.h"
#include <omp.h>

namespace multifid {

constexpr int MAPS = 8;

// What Python hands over. D_l: width behind l maps; W_l: that up to a multiple of 32. Absent arrays are null.
struct MLPCall {
  int64_t rows, maps, bent, threads, type; // bent: whether the last map has SiLU behind it
  int64_t width[MAPS + 1];                 // D_0 ... D_maps
  double epsilon;                          // of the norm
  const void *x, *norm, *norm_bias;        // (N, D_0), and (D_0) x 2 or null
  const void *w[MAPS], *b[MAPS];           // (D_(l+1), D_l), (D_(l+1)) or null
  void *sum_y;                             // (N, D_maps)
  void *z[MAPS];                           // (N, W_(l+1)): kept where there is SiLU
  const void *G_y;
  void *g_x, *g_norm, *g_norm_bias, *g_w[MAPS], *g_b[MAPS]; // zeros
  void *back[MAPS], *back_x;               // (N, W_(l+1)), (N, W_0): gradients of y, which `again` reads
  const void *d_x;
  void *d_sum_y, *d_z[MAPS];
  const void *N_y;
};

template <class Type> class MLP {
  using T = typename Type::Number;
  using Operand = typename Type::Operand;
  using Kept = typename Type::Kept;
  static constexpr long L = Lanes<T>::N;

public:
  explicit MLP(const MLPCall &call) : p(call), weights(call.g_w[0]) {
    long widest = 0;
    for (long l = 0; l <= p.maps; ++l) widest = std::max(widest, wide(l));
    step = stride(widest);
  }

  void forward() { over_tiles(true, [&](Tile &t, long n, long rows) { ahead<false>(t, n, rows); }); }
  void tangent() { over_tiles(true, [&](Tile &t, long n, long rows) { ahead<true>(t, n, rows); }); }
  void backward() { over_tiles(false, [&](Tile &t, long n, long rows) { back<false>(t, n, rows); }); }
  void again() { over_tiles(false, [&](Tile &t, long n, long rows) { back<true>(t, n, rows); }); }

private:
  const MLPCall &p;
  const bool weights;
  long step;
  Type w[MAPS];
  Room<T> bias[MAPS], norm; // norm: its weight and bias

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }
  long wide(long l) const { return up(p.width[l], Type::WIDTH); }
  static long kept_width(long width) { return up(width, 32); }
  bool bent(long l) const { return l + 1 < p.maps || p.bent; } // whether SiLU comes behind map l

  struct Tile {
    typename Type::Work work;
    Room<T> b1, b2, row, d_row, sums;
    Room<Operand> o1, o2, o3, o4;
    bool began = false;
    T *g_w[MAPS], *g_b[MAPS], *g_norm;
  };
  Tiles<Tile> tiles;

  template <class Work> void over_tiles(bool forwards, Work work) {
    for (long l = 0; l < p.maps; ++l) {
      w[l].pack(in(p.w[l]), p.width[l + 1], p.width[l], forwards);
      T *to = bias[l].zeros(wide(l + 1));
      if (p.b[l]) std::memcpy(to, p.b[l], p.width[l + 1] * sizeof(T));
    }
    if (p.norm) {
      std::memcpy(norm.zeros(2 * wide(0)), p.norm, p.width[0] * sizeof(T));
      std::memcpy(norm.get() + wide(0), p.norm_bias, p.width[0] * sizeof(T));
    }
    const long count = up(p.rows, Type::EDGES) / Type::EDGES;
    const int threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, count));
    tiles.resize(threads, step <= stride(NARROW));
#pragma omp parallel num_threads(threads)
    {
      const long k = omp_get_thread_num(), of = omp_get_num_threads();
      Tile &t = tiles.begin(k);
      Type::begin();
      for (long n = count * k / of; n < count * (k + 1) / of; ++n)
        work(t, p.rows * n / count, p.rows * (n + 1) / count - p.rows * n / count);
      Type::end();
    }
    if (forwards || !weights) return;
    for (size_t thread = 0; thread < tiles.size(); ++thread) {
      const Tile *t = tiles[thread];
      if (!t || !t->began) continue;
      for (long l = 0; l < p.maps; ++l) {
        for (long r = 0; r < p.width[l + 1]; ++r)
          for (long k = 0; k < p.width[l]; ++k) out(p.g_w[l])[r * p.width[l] + k] += t->g_w[l][r * wide(l) + k];
        if (p.g_b[l])
          for (long k = 0; k < p.width[l + 1]; ++k) out(p.g_b[l])[k] += t->g_b[l][k];
      }
      for (long k = 0; p.norm && k < p.width[0]; ++k)
        out(p.g_norm)[k] += t->g_norm[k], out(p.g_norm_bias)[k] += t->g_norm[wide(0) + k];
    }
  }

  void begin(Tile &t) {
    t.began = true;
    if (!weights) return;
    long all = 2 * wide(0);
    for (long l = 0; l < p.maps; ++l) all += up(wide(l + 1), ROWS) * wide(l) + wide(l + 1);
    T *at = t.sums.zeros(all);
    for (long l = 0; l < p.maps; ++l) {
      t.g_w[l] = at, at += up(wide(l + 1), ROWS) * wide(l);
      t.g_b[l] = at, at += wide(l + 1);
    }
    t.g_norm = at;
  }

  static long rows_of_room() { return up(Type::EDGES, Type::MULTIPLE) + ROWS; }

  // A row of x, and of its changes, with zeros behind.
  template <class M> void read(Tile &t, long n) const {
    row_of(p.x, n, t.row);
    if (M::CHANGE) row_of(p.d_x, n, t.d_row);
  }
  void row_of(const void *from, long n, Room<T> &room) const {
    T *row = room.zeros(step);
    std::memcpy(row, in(from) + n * p.width[0], p.width[0] * sizeof(T));
  }
  template <class M> Norm<M, T> normed(Tile &t) const {
    return {t.row.get(), t.d_row.get(), p.width[0], T(p.epsilon)};
  }
  // What the first map is applied to, as operands, and its change.
  template <class M> void first(Tile &t, long n, long rows, Operand *to, Operand *d_to) const {
    for (long r = 0; r < rows; ++r, to += step, d_to += M::CHANGE ? step : 0) {
      read<M>(t, n + r);
      if (p.norm) {
        const Norm<M, T> of_x = normed<M>(t);
        for (long k = 0; k < wide(0); k += L) put(of_x(k, norm.get(), norm.get() + wide(0)), to, d_to, k);
      } else {
        for (long k = 0; k < wide(0); k += L) {
          typename M::Q x;
          get(x, t.row.get(), t.d_row.get(), k);
          put(x, to, d_to, k);
        }
      }
    }
  }
  static void put(V<T> x, Operand *to, Operand *, long k) { Type::put(to + k, x); }
  static void put(Dual<V<T>> x, Operand *to, Operand *d, long k) { Type::put(to + k, x.v), Type::put(d + k, x.d); }

  Kept *kept(void *const *of, long l, long row) const {
    return static_cast<Kept *>(of[l]) + row * kept_width(p.width[l + 1]);
  }

  template <bool CHANGE> void ahead(Tile &t, long n, long rows) const {
    const long room = rows_of_room();
    T *b = t.b1.of(room * step);
    Operand *o = t.o1.of(room * step), *values = CHANGE ? t.o2.of(room * step) : o;
    first<Of<CHANGE>>(t, n, rows, values, o);
    for (long l = 0; l < p.maps; ++l) {
      w[l].times(rows, o, step, b, step);
      const long width = wide(l + 1);
      const T *add = bias[l].get();
      for (long r = 0; r < rows; ++r)
        for (long k = 0; k < width; k += L) {
          V<T> x = load(b + r * step + k);
          if (!CHANGE) x += load(add + k);
          if (bent(l)) {
            if (CHANGE) {
              store(kept(p.d_z, l, n + r) + k, x);
              x *= SiLU<V<T>>(load(kept(p.z, l, n + r) + k)).slope;
            } else {
              if (p.z[l]) store(kept(p.z, l, n + r) + k, x);
              x *= sigmoid(x);
            }
          }
          if (l + 1 < p.maps) Type::put(o + r * step + k, x);
          else store(b + r * step + k, x);
        }
    }
    T *to = out(CHANGE ? p.d_sum_y : p.sum_y);
    const long width = p.width[p.maps];
    for (long r = 0; r < rows; ++r) std::memcpy(to + (n + r) * width, b + r * step, width * sizeof(T));
  }

  template <bool CHANGE> using Of = std::conditional_t<CHANGE, Changing<T>, Plain<T>>;

  template <bool AGAIN> void back(Tile &t, long n, long rows) {
    if (!t.began) begin(t);
    const long room = rows_of_room(), all = up(rows, Type::MULTIPLE);
    T *b = t.b1.of(room * step), *before = t.b2.of(room * step);
    Operand *g = t.o1.of(room * step), *dg = t.o2.of(room * step), *y = t.o3.of(room * step), *dy = t.o4.of(room * step);
    const long last = p.maps - 1, width_out = p.width[p.maps];
    // b: gradient of the output of the map at hand, with AGAIN its change; before: the gradient itself, of the last map
    for (long r = 0; r < rows; ++r) {
      std::memset((void *)(b + r * step), 0, wide(p.maps) * sizeof(T));
      std::memset((void *)(before + r * step), 0, wide(p.maps) * sizeof(T));
      std::memcpy(b + r * step, in(AGAIN ? p.N_y : p.G_y) + (n + r) * width_out, width_out * sizeof(T));
      if (AGAIN) std::memcpy(before + r * step, in(p.G_y) + (n + r) * width_out, width_out * sizeof(T));
    }
    for (long l = last; l >= 0; --l) {
      const long width = wide(l + 1), of_x = wide(l);
      for (long r = 0; r < rows; ++r)
        for (long k = 0; k < width; k += L) {
          V<T> x = load(b + r * step + k), q = {};
          if (AGAIN) q = l == last ? load(before + r * step + k) : load(kept(p.back, l, n + r) + k);
          if (!AGAIN && l < last && p.back[l]) store(kept(p.back, l, n + r) + k, x);
          if (bent(l)) {
            const SiLU<V<T>> silu(load(kept(p.z, l, n + r) + k));
            x *= silu.slope;
            if (AGAIN) {
              x += q * silu.bend * load(kept(p.d_z, l, n + r) + k);
              q *= silu.slope;
            }
          }
          Type::put((AGAIN ? dg : g) + r * step + k, x);
          if (AGAIN) Type::put(g + r * step + k, q);
          if (weights) store(t.g_b[l] + k, load(t.g_b[l] + k) + x);
        }
      if (weights) {
        inputs<AGAIN>(t, n, rows, l, y, dy);
        for (Operand *o : {g, y, AGAIN ? dg : nullptr, AGAIN ? dy : nullptr})
          if (o && rows < all) std::memset((void *)(o + rows * step), 0, (all - rows) * step * sizeof(Operand));
        Type::gradient(t.work, rows, AGAIN ? dg : g, width, y, of_x, step, t.g_w[l], of_x);
        if (AGAIN) Type::gradient(t.work, rows, g, width, dy, of_x, step, t.g_w[l], of_x);
      }
      if (l || p.g_x) w[l].times(rows, AGAIN ? dg : g, step, b, step);
    }
    if (!p.g_x) return;
    const long width = p.width[0];
    if (p.norm) before_norm<Of<AGAIN>>(t, n, rows, b);
    for (long r = 0; r < rows; ++r) std::memcpy(out(p.g_x) + (n + r) * width, b + r * step, width * sizeof(T));
  }

  // Gradients of what the first map is applied to, or their changes, to those of x, in place.
  template <class M> void before_norm(Tile &t, long n, long rows, T *g) {
    T *const to = g;
    for (long r = 0; r < rows; ++r) {
      read<M>(t, n + r);
      const Norm<M, T> of_x = normed<M>(t);
      T *row = to + r * step, *values = M::CHANGE ? out(p.back_x) + (n + r) * wide(0) : row;
      if (!M::CHANGE && p.back_x) std::memcpy(out(p.back_x) + (n + r) * wide(0), row, wide(0) * sizeof(T));
      if (weights)
        for (long k = 0; k < wide(0); k += L) {
          typename M::Q y;
          get(y, values, row, k);
          increase(t.g_norm + k, last(y * of_x(k))), increase(t.g_norm + wide(0) + k, last(y));
        }
      of_x.back(values, row, norm.get());
    }
  }

  // What map l was applied to, and its change.
  template <bool AGAIN> void inputs(Tile &t, long n, long rows, long l, Operand *y, Operand *dy) const {
    if (!l) return first<Of<AGAIN>>(t, n, rows, y, dy);
    for (long r = 0; r < rows; ++r)
      for (long k = 0; k < wide(l); k += L) {
        const SiLU<V<T>> silu(load(kept(p.z, l - 1, n + r) + k));
        Type::put(y + r * step + k, silu.y);
        if (AGAIN) Type::put(dy + r * step + k, silu.slope * load(kept(p.d_z, l - 1, n + r) + k));
      }
  }
};

} // namespace multifid
