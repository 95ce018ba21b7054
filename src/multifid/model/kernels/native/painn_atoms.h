// What a layer of PaiNN computes of atoms, from the sums over their neighbours (model/encoders/painn.py):
//
//   s = s_0 + m_0 / M,   v = v_0 + m_123 / sqrt(M),   [U v, V v] = mix v,   q = |V v|^2
//   z = w0 [norm(s), log(1 + q)] + b0,   [a, b, c] = w1 silu(z) + b1
//   s + a + b <U v, V v> / sqrt(1 + q),   v + c U v                                     (outputs)
//
// The four functions are those of egnn.h. Atoms are taken in tiles; between two products of matrices lies one loop.
#pragma once
#include "norm.h"
#include "products.h"
#include <omp.h>

namespace multifid {

// What Python hands over. N atoms, H channels; W: H up to a multiple of 16, for bfloat16 of 32. Absent arrays are null.
struct PaiNNAtomsCall {
  int64_t atoms, H, threads, type;
  double of_scalars, of_vectors, epsilon;                   // 1 / M, 1 / sqrt(M), of the norm
  const void *s, *v, *m;                                    // (N,H) (N,3,H) (N,4,H)
  const void *norm, *norm_bias, *mix, *w0, *b0, *w1, *b1;   // (H) (H) (2H,H) (H,2H) (H) (3H,H) (3H)
  void *sum_s, *sum_v;                                      // (N,H) (N,3,H)
  void *uv, *z, *abc;                                       // kept: (N,3,2,W) (N,W) (N,3,W)
  const void *G_s, *G_v;
  void *g_s, *g_v, *g_m;
  void *g_norm, *g_norm_bias, *g_mix, *g_w0, *g_b0, *g_w1, *g_b1; // zeros
  void *back_h, *back_x;                                    // (N,W) (N,2,W): gradients that `again` reads
  const void *d_s, *d_v, *d_m;
  void *d_sum_s, *d_sum_v, *d_uv, *d_z, *d_abc;
  const void *N_s, *N_v;
};

template <class Type> class PaiNNAtoms {
  using T = typename Type::Number;
  using Operand = typename Type::Operand;
  using Kept = typename Type::Kept;
  static constexpr long L = Lanes<T>::N, ATOMS = Type::EDGES / 2, ROOM = ATOMS + ROWS + Type::MULTIPLE;

public:
  explicit PaiNNAtoms(const PaiNNAtomsCall &call)
      : p(call), H(call.H), W(up(call.H, Type::WIDTH)), two(stride(2 * W)), three(stride(3 * W)), weights(call.g_mix) {}
  void forward() { over_tiles(true, [&](Tile &t, long n, long rows) { ahead<Plain<T>>(t, n, rows); }); }
  void tangent() { over_tiles(true, [&](Tile &t, long n, long rows) { ahead<Changing<T>>(t, n, rows); }); }
  void backward() { over_tiles(false, [&](Tile &t, long n, long rows) { back<Plain<T>>(t, n, rows); }), end(); }
  void again() { over_tiles(false, [&](Tile &t, long n, long rows) { back<Changing<T>>(t, n, rows); }), end(); }

private:
  const PaiNNAtomsCall &p;
  const long H, W, two, three; // two, three: from row to row of operands that are two and three times as wide
  const bool weights;
  Type mix, w0, w1;
  Room<T> small; // norm, norm_bias, b0, b1 with zeros behind

  static const T *in(const void *x) { return static_cast<const T *>(x); }
  static T *out(void *x) { return static_cast<T *>(x); }

  struct Tile {
    typename Type::Work work;
    Room<T> s[2], centred[2], v[2], of_s[2], of_v[2], wide[3], sums; // of pairs the second are changes
    Room<Operand> o[4];
    bool began = false;
    T *norm, *norm_bias, *mix, *w0, *b0, *w1, *b1;
  };
  Tiles<Tile> tiles;

  const T *norm() const { return small.get(); }
  const T *norm_bias() const { return small.get() + W; }
  const T *bias0() const { return small.get() + 2 * W; }
  const T *bias1() const { return small.get() + 3 * W; }

  // A matrix of blocks (H, H) with zeros behind the rows and columns of each.
  void pack(Type &to, const void *from, long down, long across, bool forwards) {
    if (W == H) return to.pack(in(from), down * H, across * H, forwards);
    Room<T> room;
    T *wide = room.zeros(down * across * W * W);
    for (long r = 0; r < down * H; ++r)
      for (long x = 0; x < across; ++x)
        std::memcpy(wide + (r / H * W + r % H) * across * W + x * W, in(from) + (r * across + x) * H, H * sizeof(T));
    to.pack(wide, down * W, across * W, forwards);
  }
  void add_block(void *to, const T *from, long down, long across) const {
    for (long r = 0; r < down * H; ++r)
      for (long x = 0; x < across; ++x)
        for (long k = 0; k < H; ++k)
          out(to)[(r * across + x) * H + k] += from[(r / H * W + r % H) * across * W + x * W + k];
  }

  template <class Work> void over_tiles(bool forwards, Work work) {
    pack(mix, p.mix, 2, 1, forwards), pack(w0, p.w0, 1, 2, forwards), pack(w1, p.w1, 3, 1, forwards);
    T *to = small.zeros(6 * W);
    for (const void *from : {p.norm, p.norm_bias, p.b0}) std::memcpy(to, from, H * sizeof(T)), to += W;
    for (long x = 0; x < 3; ++x, to += W) std::memcpy(to, in(p.b1) + x * H, H * sizeof(T));
    const long count = up(p.atoms, ATOMS) / ATOMS;
    const int threads = std::max<int64_t>(1, std::min<int64_t>(p.threads, count));
    tiles.resize(threads, H <= NARROW);
#pragma omp parallel num_threads(threads)
    {
      const long k = omp_get_thread_num(), of = omp_get_num_threads();
      Tile &t = tiles.begin(k);
      Type::begin();
      for (long n = count * k / of; n < count * (k + 1) / of; ++n)
        work(t, p.atoms * n / count, p.atoms * (n + 1) / count - p.atoms * n / count);
      Type::end();
    }
  }
  void begin(Tile &t) {
    t.began = true;
    if (!weights) return;
    const long sizes[] = {W, W, up(2 * W, ROWS) * W, up(W, ROWS) * 2 * W, W, up(3 * W, ROWS) * W, 3 * W};
    T **places[] = {&t.norm, &t.norm_bias, &t.mix, &t.w0, &t.b0, &t.w1, &t.b1};
    long all = 0;
    for (long size : sizes) all += size;
    T *at = t.sums.zeros(all);
    for (int k = 0; k < 7; ++k) *places[k] = at, at += sizes[k];
  }
  void end() {
    if (!weights) return;
    for (size_t k = 0; k < tiles.size(); ++k) {
      const Tile *t = tiles[k];
      if (!t || !t->began) continue;
      add_block(p.g_mix, t->mix, 2, 1), add_block(p.g_w0, t->w0, 1, 2), add_block(p.g_w1, t->w1, 3, 1);
      for (long h = 0; h < H; ++h) {
        out(p.g_norm)[h] += t->norm[h], out(p.g_norm_bias)[h] += t->norm_bias[h], out(p.g_b0)[h] += t->b0[h];
        for (long x = 0; x < 3; ++x) out(p.g_b1)[x * H + h] += t->b1[x * W + h];
      }
    }
  }

  // Rows of an array (N parts, H) as rows (parts, W) of a tile.
  void read(const void *from, long n, long rows, long parts, Room<T> &room) const {
    T *to = room.of((ROOM * parts) * W);
    for (long r = 0; r < rows * parts; ++r, to += W) {
      std::memcpy(to, in(from) + (n * parts + r) * H, H * sizeof(T));
      std::memset((void *)(to + H), 0, (W - H) * sizeof(T));
    }
  }
  // s and v of the equations, and s once more, for the norm.
  void sums(const void *s, const void *v, const void *m, Tile &t, int which, long n, long rows) const {
    read(s, n, rows, 1, t.s[which]), read(v, n, rows, 3, t.v[which]);
    for (long r = 0; r < rows; ++r)
      for (int d = 0; d < 4; ++d) {
        const T *add = in(m) + ((n + r) * 4 + d) * H, factor = d ? p.of_vectors : p.of_scalars;
        T *to = d ? t.v[which].get() + (3 * r + d - 1) * W : t.s[which].get() + r * W;
        for (long k = 0; k < H; ++k) to[k] += factor * add[k];
      }
    std::memcpy(t.centred[which].of(ROOM * W), t.s[which].get(), rows * W * sizeof(T));
  }
  template <class M> void sums(Tile &t, long n, long rows) const {
    sums(p.s, p.v, p.m, t, 0, n, rows);
    if (M::CHANGE) sums(p.d_s, p.d_v, p.d_m, t, 1, n, rows);
  }
  template <class M> Norm<M, T> normed(const Tile &t, long r) const {
    return {t.centred[0].get() + r * W, M::CHANGE ? t.centred[1].get() + r * W : nullptr, H, T(p.epsilon)};
  }
  // U v and V v of an atom, with |V v|^2 and <U v, V v>.
  template <class M> struct Moved {
    using Q = typename M::Q;
    Q u[3], w[3], square, dot;
    Moved(const T *uv, const T *d_uv, long W, long k) {
      for (int d = 0; d < 3; ++d) get(u[d], uv, d_uv, 2 * d * W + k), get(w[d], uv, d_uv, (2 * d + 1) * W + k);
      square = w[0] * w[0] + w[1] * w[1] + w[2] * w[2];
      dot = u[0] * w[0] + u[1] * w[1] + u[2] * w[2];
    }
  };

  // What the first map is applied to, and its change.
  template <class M> void known(const Tile &t, const T *uv, const T *d_uv, long rows, Operand *x, Operand *dx) const {
    for (long r = 0; r < rows; ++r) {
      const Norm<M, T> of_s = normed<M>(t, r);
      for (long k = 0; k < W; k += L) {
        put(of_s(k, norm(), norm_bias()), x, dx, r * two + k);
        put(log_of_more<T>(Moved<M>(uv + r * 6 * W, d_uv + r * 6 * W, W, k).square), x, dx, r * two + W + k);
      }
    }
  }
  static void put(V<T> x, Operand *to, Operand *, long k) { Type::put(to + k, x); }
  static void put(Dual<V<T>> x, Operand *to, Operand *d, long k) { Type::put(to + k, x.v), Type::put(d + k, x.d); }

  template <class M> void ahead(Tile &t, long n, long rows) const {
    using Q = typename M::Q;
    constexpr bool CHANGE = M::CHANGE;
    sums<M>(t, n, rows);
    Operand *o = t.o[0].of(3 * ROOM * two), *x = t.o[1].of(ROOM * two), *dx = t.o[2].of(ROOM * two);
    Operand *y = t.o[3].of(ROOM * three);
    // U v, V v: values of this pass, or kept ones and their changes
    T *found = t.wide[0].of(3 * ROOM * 2 * W);
    operands(t.v[CHANGE].get(), 3 * rows, W, o, two);
    mix.times(3 * rows, o, two, found, 2 * W);
    if (void *to = CHANGE ? p.d_uv : p.uv) std::memcpy(out(to) + n * 6 * W, found, rows * 6 * W * sizeof(T));
    const T *uv = CHANGE ? in(p.uv) + n * 6 * W : found;
    known<M>(t, uv, found, rows, x, dx);
    // z
    T *b = t.wide[1].of(ROOM * 3 * W);
    w0.times(rows, CHANGE ? dx : x, two, b, W);
    for (long r = 0; r < rows; ++r)
      for (long k = 0; k < W; k += L) {
        V<T> z = load(b + r * W + k);
        if (!CHANGE) z += load(bias0() + k);
        if (void *to = CHANGE ? p.d_z : p.z) store(static_cast<Kept *>(to) + (n + r) * W + k, z);
        if (CHANGE) z *= SiLU<V<T>>(load(static_cast<const Kept *>(p.z) + (n + r) * W + k)).slope;
        else z *= sigmoid(z);
        Type::put(y + r * three + k, z);
      }
    // a, b, c
    w1.times(rows, y, three, b, 3 * W);
    if (!CHANGE)
      for (long r = 0; r < rows; ++r)
        for (long k = 0; k < 3 * W; k += L) store(b + r * 3 * W + k, load(b + r * 3 * W + k) + load(bias1() + k));
    if (void *to = CHANGE ? p.d_abc : p.abc) std::memcpy(out(to) + n * 3 * W, b, rows * 3 * W * sizeof(T));
    const T *abc = CHANGE ? in(p.abc) + n * 3 * W : b;
    T *s = t.s[CHANGE].get(), *v = t.v[CHANGE].get();
    for (long r = 0; r < rows; ++r)
      for (long k = 0; k < W; k += L) {
        Q of[3];
        for (int c = 0; c < 3; ++c) get(of[c], abc + r * 3 * W, b + r * 3 * W, c * W + k);
        const Moved<M> moved(uv + r * 6 * W, found + r * 6 * W, W, k);
        increase(s + r * W + k, last(of[0] + of[1] * moved.dot * bounded(moved.square)));
        for (int d = 0; d < 3; ++d) increase(v + (3 * r + d) * W + k, last(of[2] * moved.u[d]));
      }
    write(s, n, rows, 1, CHANGE ? p.d_sum_s : p.sum_s), write(v, n, rows, 3, CHANGE ? p.d_sum_v : p.sum_v);
  }
  static void operands(const T *from, long rows, long width, Operand *to, long step) {
    for (long r = 0; r < rows; ++r)
      for (long k = 0; k < width; k += L) Type::put(to + r * step + k, load(from + r * width + k));
  }
  void write(const T *from, long n, long rows, long parts, void *to) const {
    for (long r = 0; r < rows * parts; ++r) std::memcpy(out(to) + (n * parts + r) * H, from + r * W, H * sizeof(T));
  }

  template <class M> void back(Tile &t, long n, long rows) {
    using Q = typename M::Q;
    constexpr bool CHANGE = M::CHANGE;
    if (!t.began) begin(t);
    sums<M>(t, n, rows);
    read(CHANGE ? p.N_s : p.G_s, n, rows, 1, t.of_s[CHANGE]), read(CHANGE ? p.N_v : p.G_v, n, rows, 3, t.of_v[CHANGE]);
    if (CHANGE) read(p.G_s, n, rows, 1, t.of_s[0]), read(p.G_v, n, rows, 3, t.of_v[0]);
    const T *G_s = t.of_s[0].get(), *G_v = t.of_v[0].get(), *N_s = t.of_s[1].get(), *N_v = t.of_v[1].get();
    const T *uv = in(p.uv) + n * 6 * W, *d_uv = CHANGE ? in(p.d_uv) + n * 6 * W : uv;
    const T *abc = in(p.abc) + n * 3 * W, *d_abc = CHANGE ? in(p.d_abc) + n * 3 * W : abc;
    Operand *g = t.o[0].of(3 * ROOM * two + ROOM * three), *dg = t.o[1].of(3 * ROOM * two + ROOM * three);
    Operand *x = t.o[2].of(3 * ROOM * two + ROOM * three), *dx = t.o[3].of(3 * ROOM * two + ROOM * three);
    Operand *of = CHANGE ? dg : g;
    // of a, b, c
    for (long r = 0; r < rows; ++r)
      for (long k = 0; k < W; k += L) {
        const Moved<M> moved(uv + r * 6 * W, d_uv + r * 6 * W, W, k);
        Q of_s, of_v, of_abc[3] = {};
        get(of_s, G_s, N_s, r * W + k);
        of_abc[0] = of_s, of_abc[1] = of_s * moved.dot * bounded(moved.square);
        for (int d = 0; d < 3; ++d) get(of_v, G_v, N_v, (3 * r + d) * W + k), of_abc[2] += of_v * moved.u[d];
        for (int c = 0; c < 3; ++c) {
          put(of_abc[c], g, dg, r * three + c * W + k);
          if (weights) increase(t.b1 + c * W + k, last(of_abc[c]));
        }
      }
    T *of_h = t.wide[1].of(ROOM * 2 * W);
    w1.times(rows, of, three, of_h, W);
    const Kept *z = static_cast<const Kept *>(p.z) + n * W, *d_z = static_cast<const Kept *>(CHANGE ? p.d_z : p.z) + n * W;
    if (weights) {
      for (long r = 0; r < rows; ++r)
        for (long k = 0; k < W; k += L) {
          const SiLU<V<T>> silu(load(z + r * W + k));
          Type::put(x + r * three + k, silu.y);
          if (CHANGE) Type::put(dx + r * three + k, silu.slope * load(d_z + r * W + k));
        }
      gradient<M>(t, rows, g, dg, 3 * W, x, dx, W, three, t.w1);
    }
    // of z, and of what the first map is applied to
    keep(of_h, rows, W, p.back_h, n);
    const T *before = CHANGE ? in(p.back_h) + n * W : of_h;
    for (long r = 0; r < rows; ++r)
      for (long k = 0; k < W; k += L) {
        const SiLU<V<T>> silu(load(z + r * W + k));
        Q of_z;
        get(of_z, before, of_h, r * W + k);
        of_z = of_z * slope<Q>(silu, load(d_z + r * W + k));
        put(of_z, g, dg, r * two + k);
        if (weights) increase(t.b0 + k, last(of_z));
      }
    T *of_x = of_h;
    w0.times(rows, of, two, of_x, 2 * W);
    if (weights) {
      known<M>(t, uv, d_uv, rows, x, dx);
      gradient<M>(t, rows, g, dg, W, x, dx, 2 * W, two, t.w0);
    }
    keep(of_x, rows, 2 * W, p.back_x, n);
    before = CHANGE ? in(p.back_x) + n * 2 * W : of_x;
    // of s, U v and V v
    T *row = t.wide[2].of(2 * W), *d_row = row + W;
    T *of_s = t.of_s[CHANGE].get(), *of_v = t.of_v[CHANGE].get();
    for (long r = 0; r < rows; ++r) {
      for (long k = 0; k < W; k += L) {
        const Moved<M> moved(uv + r * 6 * W, d_uv + r * 6 * W, W, k);
        Q of_log, G, b, c, v[3];
        get(of_log, before, of_x, (2 * r + 1) * W + k), get(G, G_s, N_s, r * W + k);
        get(b, abc, d_abc, (3 * r + 1) * W + k), get(c, abc, d_abc, (3 * r + 2) * W + k);
        for (int d = 0; d < 3; ++d) get(v[d], G_v, N_v, (3 * r + d) * W + k);
        const Q s = bounded(moved.square), of_dot = G * b * s;
        const Q of_square = s * s * (T(2) * of_log - of_dot * moved.dot); // twice that
        for (int d = 0; d < 3; ++d) {
          put(v[d] * c + of_dot * moved.w[d], g, dg, (3 * r + d) * two + k);
          put(of_dot * moved.u[d] + of_square * moved.w[d], g, dg, (3 * r + d) * two + W + k);
        }
      }
      const Norm<M, T> of_norm = normed<M>(t, r);
      std::memcpy(row, before + 2 * r * W, W * sizeof(T)), std::memcpy(d_row, of_x + 2 * r * W, W * sizeof(T));
      if (weights)
        for (long k = 0; k < W; k += L) {
          Q y;
          get(y, row, d_row, k);
          increase(t.norm + k, last(y * of_norm(k))), increase(t.norm_bias + k, last(y));
        }
      of_norm.back(row, d_row, norm());
      for (long k = 0; k < W; k += L) increase(of_s + r * W + k, load((CHANGE ? d_row : row) + k));
    }
    T *of_moved = t.wide[0].of(3 * ROOM * 2 * W);
    mix.times(3 * rows, of, two, of_moved, W);
    for (long k = 0; k < 3 * rows * W; k += L) increase(of_v + k, load(of_moved + k));
    if (weights) {
      operands(t.v[0].get(), 3 * rows, W, x, two);
      if (CHANGE) operands(t.v[1].get(), 3 * rows, W, dx, two);
      gradient<M>(t, 3 * rows, g, dg, 2 * W, x, dx, W, two, t.mix);
    }
    write(of_s, n, rows, 1, p.g_s), write(of_v, n, rows, 3, p.g_v);
    for (long r = 0; r < 4 * rows; ++r) {
      const T *from = r % 4 ? of_v + (r / 4 * 3 + r % 4 - 1) * W : of_s + r / 4 * W;
      for (long k = 0; k < H; ++k) out(p.g_m)[(4 * n + r) * H + k] = T(r % 4 ? p.of_vectors : p.of_scalars) * from[k];
    }
  }
  void keep(const T *from, long rows, long width, void *to, long n) const {
    if (to && !p.d_z) std::memcpy(out(to) + n * width, from, rows * width * sizeof(T));
  }
  template <class Q> static Q slope(const SiLU<V<T>> &silu, V<T> change) {
    if constexpr (std::is_same<Q, V<T>>::value) return silu.slope;
    else return {silu.slope, silu.bend * change};
  }
  // c += g^T x, or the change of that.
  template <class M>
  static void gradient(Tile &t, long rows, Operand *g, Operand *dg, long width_g, Operand *x, Operand *dx, long width,
                       long step, T *c) {
    for (Operand *o : {g, x, M::CHANGE ? dg : nullptr, M::CHANGE ? dx : nullptr})
      if (o) std::memset((void *)(o + rows * step), 0, (up(rows, Type::MULTIPLE) - rows) * step * sizeof(Operand));
    Type::gradient(t.work, rows, M::CHANGE ? dg : g, width_g, x, width, step, c, width);
    if (M::CHANGE) Type::gradient(t.work, rows, g, width_g, dx, width, step, c, width);
  }
};

} // namespace multifid
