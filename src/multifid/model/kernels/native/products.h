// Products of matrices of a tile: the rows are edges, the other matrix a layer's weights, laid out once for all tiles.
//
// Rows of a tile lie at distances that are known when this is compiled (STRIDES), so that the rows of a micro-kernel need
// one address. They are a little longer than powers of two, which would share a few lines of the cache.
#pragma once
#include "lanes.h"
#include <cstdlib>
#include <memory>
#include <vector>
#if defined(__AMX_BF16__) && defined(__linux__)
#define MULTIFID_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace multifid {

inline long up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr long STRIDES[] = {48, 80, 144, 272, 528, 1040, 2064};
inline long stride(long width) {
  for (long s : STRIDES)
    if (width + 16 <= s) return s;
  return 0; // too wide
}

// Memory that is aligned, grows, and is not cleared.
template <class T> class Room {
public:
  Room() = default;
  Room(const Room &) = delete;
  ~Room() { std::free(p); }
  T *of(long count) {
    if (count > size) {
      std::free(p);
      p = static_cast<T *>(std::aligned_alloc(64, up(count * sizeof(T) + 64, 64)));
      size = count;
    }
    return p;
  }
  T *zeros(long count) {
    std::memset((void *)of(count), 0, count * sizeof(T));
    return p;
  }
  T *get() const { return p; }

private:
  T *p = nullptr;
  long size = 0;
};

// What the threads of a call have for their tiles. That of narrow layers stays with the thread, because new memory costs
// them as much as a product of matrices; of wide ones it is given back with the call, after sums over threads were taken.
template <class Tile> class Tiles {
public:
  void resize(long threads, bool stay) {
    of.assign(threads, nullptr), own.resize(threads);
    stays = stay;
  }
  Tile &begin(long thread) {
    static thread_local Tile kept;
    if (!stays) own[thread].reset(new Tile);
    of[thread] = stays ? &kept : own[thread].get();
    of[thread]->began = false;
    return *of[thread];
  }
  size_t size() const { return of.size(); }
  Tile *operator[](size_t thread) const { return of[thread]; } // null where a thread did not come

private:
  std::vector<Tile *> of;
  std::vector<std::unique_ptr<Tile>> own;
  bool stays = true;
};
constexpr long NARROW = 256; // hidden units

constexpr long DEPTH = 256; // of a product at a time: a panel of so many rows stays in the smallest cache

// c (ROWS, NV vectors) (+)= a (ROWS, depth) b (depth, NV vectors). STEP: from row to row of a; 0 where rows are columns of
// another matrix: then `next` is from column to column of a. b: a panel.
template <class T, int NV, int STEP>
void rows_times(long depth, const T *a, long next, const T *b, long step_b, T *c, long step_c, bool add) {
  constexpr int L = Lanes<T>::N;
  V<T> s[ROWS][NV];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) s[r][v] = add ? load(c + r * step_c + v * L) : V<T>{};
  for (long k = 0; k < depth; ++k, b += step_b, a += STEP ? 1 : next) {
    V<T> y[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) y[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const T x = STEP ? a[r * STEP] : a[r];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) s[r][v] += x * y[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(c + r * step_c + v * L, s[r][v]);
}

template <class T, int NV> using Micro = void (*)(long, const T *, long, const T *, long, T *, long, bool);
template <class T, int NV> Micro<T, NV> micro(long step) {
  switch (step) {
  case 48: return rows_times<T, NV, 48>;
  case 80: return rows_times<T, NV, 80>;
  case 144: return rows_times<T, NV, 144>;
  case 272: return rows_times<T, NV, 272>;
  case 528: return rows_times<T, NV, 528>;
  case 1040: return rows_times<T, NV, 1040>;
  default: return rows_times<T, NV, 2064>;
  }
}

// A matrix (depth, width) in panels of two vectors of columns, the last of one where that suffices; zeros behind.
template <class T> class Panels {
public:
  long depth = 0, width = 0;
  static constexpr long L = Lanes<T>::N;

  // from[k * down + n * across]
  void pack(const T *from, long depth_, long width_, long down, long across) {
    depth = depth_, width = width_;
    T *to = room.of(depth * up(width, L));
    for (long n0 = 0; n0 < width; n0 += 2 * L) {
      const long columns = panel(n0);
      const long there = std::min(columns, width - n0);
      T *panel = to + depth * n0;
      for (long n = there; n < columns; ++n)
        for (long k = 0; k < depth; ++k) panel[k * columns + n] = T(0);
      if (across == 1) {
        for (long k = 0; k < depth; ++k) std::memcpy(panel + k * columns, from + k * down + n0, there * sizeof(T));
        continue;
      }
      for (long k0 = 0; k0 < depth; k0 += 16) // blocks, so that lines of the cache are read once
        for (long n = 0; n < there; ++n)
          for (long k = k0; k < std::min(k0 + 16, depth); ++k)
            panel[k * columns + n] = from[k * down + (n0 + n) * across];
    }
  }
  long panel(long n0) const { return std::min(2 * L, up(width - n0, L)); }
  const T *at(long n0) const { return room.get() + depth * n0; }

private:
  Room<T> room;
};

// c (rows up to a multiple of ROWS, width) (+)= a (rows, depth) b. step_a is one of STRIDES.
template <class T> void multiply(long rows, const T *a, long step_a, const Panels<T> &b, T *c, long step_c, bool add) {
  const auto two = micro<T, 2>(step_a);
  const auto one = micro<T, 1>(step_a);
  for (long k = 0; k < b.depth; k += DEPTH) {
    const long depth = std::min(DEPTH, b.depth - k);
    for (long n = 0; n < b.width; n += 2 * b.L) {
      const long columns = b.panel(n);
      for (long r = 0; r < rows; r += ROWS)
        (columns > b.L ? two : one)(depth, a + r * step_a + k, 1, b.at(n) + k * columns, columns, c + r * step_c + n,
                                    step_c, add || k);
    }
  }
}

// The columns of a (rows, width) in panels of ROWS, for products with its transpose.
template <class T> void turn(long rows, long width, const T *a, long step, T *to) {
  for (long n = 0; n < width; n += ROWS) {
    const long count = std::min<long>(ROWS, width - n);
    for (long t = 0; t < rows; ++t, to += ROWS) {
      std::memcpy(to, a + t * step + n, count * sizeof(T));
      for (long r = count; r < ROWS; ++r) to[r] = 0;
    }
  }
}

// c (width of g up to a multiple of ROWS, width of x up to whole vectors) (+)= g^T x. Where rows of g have room behind
// them, what stands there goes to rows of c that nobody reads. Of wide matrices a column is spread over too many pages.
// upper: of a symmetric product, no more than what is not left of the diagonal.
template <class T>
void transposed_times(Room<T> &room, long rows, const T *g, long step_g, long width_g, const T *x, long step_x, long width,
                      T *c, long step_c, bool add, bool upper = false) {
  constexpr long L = Lanes<T>::N;
  const bool turned = width_g > NARROW;
  if (turned) {
    T *panels = room.of(rows * up(width_g, ROWS));
    turn(rows, width_g, g, step_g, panels);
    g = panels, step_g = ROWS;
  }
  for (long n = 0; n < width; n += 2 * L)
    for (long r = 0; r < (upper ? std::min(width_g, n + 2 * L) : width_g); r += ROWS)
      (width - n > L ? rows_times<T, 2, 0> : rows_times<T, 1, 0>)(rows, g + (turned ? r * rows : r), step_g, x + n, step_x,
                                                                  c + r * step_c + n, step_c, add);
}

// The large products of an encoder, of hidden units with hidden units: in which type, and how.

// In the type of the numbers.
template <class T> struct Full {
  using Number = T;
  using Operand = T; // what is multiplied
  using Kept = T;    // what is written to memory between forward and backward pass
  static constexpr long EDGES = 112 / ROWS * ROWS; // rows of a tile
  static constexpr long MULTIPLE = ROWS;           // of rows, which are read and written up to it
  static constexpr long WIDTH = 16;                // what columns are a multiple of, with zeros behind

  Panels<T> panels; // of a matrix of weights, or of its transpose
  struct Work {
    Room<T> g;
  };
  static void begin() {}
  static void end() {}
  // w (outputs, inputs), for products with it (backwards) or its transpose (forwards)
  void pack(const T *w, long outputs, long inputs, bool forwards) {
    forwards ? panels.pack(w, inputs, outputs, 1, inputs) : panels.pack(w, outputs, inputs, inputs, 1);
  }
  void times(long rows, const T *a, long step_a, T *c, long step_c) const {
    multiply(rows, a, step_a, panels, c, step_c, false);
  }
  // c (width of g up to a multiple of ROWS, width of x) += g^T x
  static void gradient(Work &work, long rows, const T *g, long width_g, const T *x, long width_x, long step, T *c, long step_c) {
    transposed_times(work.g, rows, g, step, width_g, x, step, width_x, c, step_c, true);
  }
  static void put(T *p, V<T> x) { store(p, x); }
};

// bfloat16 on a processor that has no products of it: rounded numbers, multiplied in float32.
struct Rounded : Full<float> {
  using Kept = bf16;
  static constexpr long WIDTH = 32;
  void pack(const float *w, long outputs, long inputs, bool forwards) {
    std::vector<float> near(w, w + outputs * inputs);
    for (float &x : near) x = rounded(x);
    Full<float>::pack(near.data(), outputs, inputs, forwards);
  }
  static void put(float *p, V<float> x) { store(p, rounded(x)); }
};

#if defined(MULTIFID_AMX)

// bfloat16 in the tiles of AMX: products of (16, 32) and (32, 16), summed in float32.
struct Tiled {
  using Number = float;
  using Operand = bf16;
  using Kept = bf16;
  static constexpr long EDGES = 128, MULTIPLE = 32, WIDTH = 32;

  struct alignas(64) Layout {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static Layout &before() {
    static thread_local Layout layout;
    return layout;
  }
  static void begin() {
    _tile_storeconfig(&before()); // of other libraries, which may count on finding it again
    static const Layout layout;
    _tile_loadconfig(&layout);
  }
  static void end() { _tile_loadconfig(&before()); }

  static bool allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; } // ARCH_REQ_XCOMP_PERM, tile data

  Room<bf16> room;
  long depth = 0, width = 0; // multiples of 32, with zeros behind
  struct Work {
    Room<bf16> g, x;
  };

  // Panels of 16 columns; of each, blocks of 32 rows: 16 pairs of rows, 16 columns, the two of the pair.
  void pack(const float *w, long outputs, long inputs, bool forwards) {
    const long rows = forwards ? inputs : outputs, columns = forwards ? outputs : inputs;
    const long down = forwards ? 1 : inputs, across = forwards ? inputs : 1;
    depth = up(rows, 32), width = up(columns, 32);
    bf16 *to = room.of(depth * width);
    alignas(64) float row[32];
    for (long n = 0; n < width; n += 16)
      for (long k = 0; k < depth; k += 2, to += 32) {
        for (long c = 0; c < 16; ++c)
          for (long two = 0; two < 2; ++two)
            row[2 * c + two] = k + two < rows && n + c < columns ? w[(k + two) * down + (n + c) * across] : 0.0f;
        store(to, load(row));
        store(to + 16, load(row + 16));
      }
  }

  // c (32, 32) (+)= a (32, depth) b, `depth` in blocks of 32; blocks of a at step_a and 16 rows apart, of b side by side.
  static void product(long depth, const bf16 *a, const bf16 *a2, long next_a, long step_a, const bf16 *b,
                      const bf16 *b2, float *c, long step_c, bool add) {
    float *c2 = c + 16 * step_c;
    asm volatile("" ::: "memory");
    if (add) {
      _tile_loadd(0, c, step_c * 4);
      _tile_loadd(1, c + 16, step_c * 4);
      _tile_loadd(2, c2, step_c * 4);
      _tile_loadd(3, c2 + 16, step_c * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (long k = 0; k < depth; ++k, a += next_a, a2 += next_a, b += 512, b2 += 512) {
      _tile_loadd(4, a, step_a * 2);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b2, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a2, step_a * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, step_c * 4);
    _tile_stored(1, c + 16, step_c * 4);
    _tile_stored(2, c2, step_c * 4);
    _tile_stored(3, c2 + 16, step_c * 4);
    asm volatile("" ::: "memory");
  }

  void times(long rows, const bf16 *a, long step_a, float *c, long step_c) const {
    const bf16 *w = room.get();
    for (long n = 0; n < width; n += 32)
      for (long r = 0; r < rows; r += 32)
        product(depth / 32, a + r * step_a, a + (r + 16) * step_a, 32, step_a, w + n * depth, w + (n + 16) * depth,
                c + r * step_c + n, step_c, false);
  }

  // Rows up to a multiple of 32 must be there, zeros in g and numbers in x.
  static void gradient(Work &work, long rows, const bf16 *g, long width_g, const bf16 *x, long width_x, long step, float *c, long step_c) {
    const long blocks = up(rows, 32) / 32;
    bf16 *left = work.g.of(blocks * 32 * width_g), *right = work.x.of(blocks * 32 * width_x);
    for (long t = 0; t < blocks; ++t) {
      for (long n = 0; n < width_x; n += 16) pairs(x + 32 * t * step + n, step, right + (n * blocks + 16 * t) * 32, false);
      for (long n = 0; n < width_g; n += 16) pairs(g + 32 * t * step + n, step, left + (n * blocks + 16 * t) * 32, true);
    }
    for (long n = 0; n < width_x; n += 32)
      for (long r = 0; r < width_g; r += 32)
        product(blocks, left + r * blocks * 32, left + (r + 16) * blocks * 32, 512, 32, right + n * blocks * 32,
                right + (n + 16) * blocks * 32, c + r * step_c + n, step_c, true);
  }

  // 32 rows of 16 numbers -> 16 pairs of rows, (16, 16, 2); transposed: 16 columns of 32 numbers.
  static void pairs(const bf16 *from, long step, bf16 *to, bool transposed) {
    U32 m[16];
    for (int t = 0; t < 16; ++t) {
      const U32 even = __builtin_convertvector((U16) * (const U16Anywhere *)(from + 2 * t * step), U32);
      const U32 odd = __builtin_convertvector((U16) * (const U16Anywhere *)(from + (2 * t + 1) * step), U32);
      m[t] = even | (odd << 16);
    }
    if (transposed) {
      flip<1>(m);
      flip<2>(m);
      flip<4>(m);
      flip<8>(m);
    }
    for (int t = 0; t < 16; ++t) *(U32 *)(to + 32 * t) = m[t];
  }

  // Exchanges the blocks of S x S off the diagonals of blocks of 2 S x 2 S.
  template <int S> static void flip(U32 *m) {
    U32 low, high;
    for (int l = 0; l < 16; ++l) {
      low[l] = l & S ? 16 + l - S : l;
      high[l] = l & S ? 16 + l : l + S;
    }
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t)
      if (!(t & S)) {
        const U32 a = m[t], b = m[t + S];
        m[t] = __builtin_shuffle(a, b, low);
        m[t + S] = __builtin_shuffle(a, b, high);
      }
  }
  static void put(bf16 *p, V<float> x) { store(p, x); }
};

#endif

#if defined(__AVX512BF16__)

// bfloat16 in vectors: sums of products of two neighbours, in float32.
struct Paired {
  using Number = float;
  using Operand = bf16;
  using Kept = bf16;
  static constexpr long EDGES = 112, MULTIPLE = ROWS, WIDTH = 32, DEEP = 256;
  static void begin() {}
  static void end() {}

  Room<bf16> room;
  long depth = 0, width = 0; // multiples of 32, with zeros behind
  struct Work {
    Room<bf16> g, x;
  };

  // Panels of 32 columns; of each, pairs of rows: 32 columns, the two of the pair.
  void pack(const float *w, long outputs, long inputs, bool forwards) {
    const long rows = forwards ? inputs : outputs, columns = forwards ? outputs : inputs;
    const long down = forwards ? 1 : inputs, across = forwards ? inputs : 1;
    depth = up(rows, 32), width = up(columns, 32);
    bf16 *to = room.of(depth * width);
    alignas(64) float row[64];
    for (long n = 0; n < width; n += 32)
      for (long k = 0; k < depth; k += 2, to += 64) {
        for (long c = 0; c < 32; ++c)
          for (long two = 0; two < 2; ++two)
            row[2 * c + two] = k + two < rows && n + c < columns ? w[(k + two) * down + (n + c) * across] : 0.0f;
        for (int v = 0; v < 64; v += 16) store(to + v, load(row + v));
      }
  }

  // c (ROWS, 32) (+)= a (ROWS, 2 depth) b, b a panel. STEP: from row to row of a; 0: a is in pairs of rows.
  template <int STEP> static void product(long depth, const bf16 *a, const bf16 *b, float *c, long step_c, bool add) {
    __m512 s[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < 2; ++v) s[r][v] = add ? (__m512)load(c + r * step_c + 16 * v) : _mm512_setzero_ps();
    for (long k = 0; k < depth; ++k, b += 64, a += STEP ? 2 : 2 * ROWS) {
      const __m512bh y0 = (__m512bh)_mm512_loadu_si512(b), y1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        int two;
        std::memcpy(&two, a + r * (STEP ? STEP : 2), 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
        s[r][0] = _mm512_dpbf16_ps(s[r][0], x, y0), s[r][1] = _mm512_dpbf16_ps(s[r][1], x, y1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < 2; ++v) store(c + r * step_c + 16 * v, (V<float>)s[r][v]);
  }
  using Product = void (*)(long, const bf16 *, const bf16 *, float *, long, bool);
  static Product product_of(long step) {
    switch (step) {
    case 48: return product<48>;
    case 80: return product<80>;
    case 144: return product<144>;
    case 272: return product<272>;
    case 528: return product<528>;
    case 1040: return product<1040>;
    default: return product<2064>;
    }
  }

  void times(long rows, const bf16 *a, long step_a, float *c, long step_c) const {
    const Product product = product_of(step_a);
    for (long k = 0; k < depth; k += DEEP)
      for (long n = 0; n < width; n += 32)
        for (long r = 0; r < rows; r += ROWS)
          product(std::min(DEEP, depth - k) / 2, a + r * step_a + k, room.get() + n * depth + k * 32,
                  c + r * step_c + n, step_c, k > 0);
  }

  // Rows up to an even number must be there, zeros in g and numbers in x.
  static void gradient(Work &work, long rows, const bf16 *g, long width_g, const bf16 *x, long width_x, long step, float *c, long step_c) {
    const long pairs = up(rows, 2) / 2, columns = up(width_g, ROWS);
    bf16 *left = work.g.of(pairs * 2 * columns + 32), *right = work.x.of(pairs * 2 * width_x);
    for (long n = 0; n < columns; n += ROWS, left += pairs * 2 * ROWS)
      for (long t = 0; t < pairs; ++t) interleave(g + 2 * t * step + n, step, left + t * 2 * ROWS); // two more, written over
    for (long n = 0; n < width_x; n += 16)
      for (long t = 0; t < pairs; ++t)
        interleave(x + 2 * t * step + n, step, right + n / 32 * 32 * pairs * 2 + t * 64 + n % 32 * 2);
    left = work.g.get();
    for (long n = 0; n < width_x; n += 32)
      for (long r = 0; r < columns; r += ROWS)
        product<0>(pairs, left + r * pairs * 2, right + n * pairs * 2, c + r * step_c + n, step_c, true);
  }
  // 16 columns of two rows -> 16 pairs
  static void interleave(const bf16 *from, long step, bf16 *to) {
    const U32 even = __builtin_convertvector((U16) * (const U16Anywhere *)from, U32);
    const U32 odd = __builtin_convertvector((U16) * (const U16Anywhere *)(from + step), U32);
    const U32 both = even | (odd << 16);
    std::memcpy(to, &both, sizeof(both));
  }
  static void put(bf16 *p, V<float> x) { store(p, x); }
};

#endif

} // namespace multifid
