// Products of bf16 pairs by AMX, whose eight registers hold tiles of 16 rows of 16 words.
//
// A tile of sums is 16 rows by LANES columns of the product of vectors.h, whose operands lie as AMX
// wants them: the left one's words row by row, the right one's pairs [word][column]. So a tile is
// loaded from either as it is. What does not fill a tile is left to the vectors.

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define DISTR_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int TILE = 16;  // rows of a tile, and words of a row

#if defined(DISTR_AMX)

constexpr bool MAY_HAVE_TILES = true;

// Linux lets a process use the registers once it has asked.
inline bool has_tiles() {
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return permitted;
}

// The registers are those of a thread: configured while one of these lives.
struct TileRegisters {
  TileRegisters() {
    if (!has_tiles()) return;
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 4 * TILE, config.rows[i] = TILE;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() {
    if (has_tiles()) _tile_release();
  }
};

// R by C tiles of sums, R, C = 1 or 2, in registers 0 to 3; tiles of the left operand are in 4 and
// 5, of the right one in 6 and 7. With ADDS the sums start as `to` has them.
template <int R, int C, bool ADDS>
inline void tile_block(const char* left, int64_t row_bytes, const float* right, int64_t right_words,
                       int64_t n, float* to, int64_t words) {
  float* low = to + TILE * words;  // of the lower tiles
  const char* low_left = left + TILE * row_bytes;
  const int64_t to_bytes = 4 * words, right_bytes = 4 * right_words;
  asm volatile("" ::: "memory");  // the instructions below do not say what they read and write
  if constexpr (ADDS) {
    _tile_loadd(0, to, to_bytes);
    if constexpr (C == 2) _tile_loadd(1, to + TILE, to_bytes);
    if constexpr (R == 2) _tile_loadd(2, low, to_bytes);
    if constexpr (R == 2 && C == 2) _tile_loadd(3, low + TILE, to_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
  }
  for (int64_t c = 0; c < n; c += TILE) {
    const float* tile = right + c * right_words;
    _tile_loadd(4, left + 4 * c, row_bytes);
    _tile_loadd(6, tile, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, tile + TILE, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, low_left + 4 * c, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, to_bytes);
  if constexpr (C == 2) _tile_stored(1, to + TILE, to_bytes);
  if constexpr (R == 2) _tile_stored(2, low, to_bytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, low + TILE, to_bytes);
  asm volatile("" ::: "memory");
}

// Whole tiles of rows, and of n words.
template <bool ADDS>
void tile_product(const char* left, int64_t row_bytes, const float* right, int64_t right_words,
                  int64_t rows, int64_t n, int vectors, float* to, int64_t words) {
  for (int u = 0; u < vectors; u += 2)
    for (int64_t i = 0; i < rows; i += 2 * TILE) {
      const bool is_high = i + TILE < rows, is_wide = u + 1 < vectors;
      auto block = is_high ? is_wide ? tile_block<2, 2, ADDS> : tile_block<2, 1, ADDS>
                           : is_wide ? tile_block<1, 2, ADDS> : tile_block<1, 1, ADDS>;
      block(left + i * row_bytes, row_bytes, right + u * TILE, right_words, n,
            to + i * words + u * TILE, words);
    }
}

// `product` of bf16 pairs by rows: what fills tiles by tiles, the rest by vectors.
inline void product_of_pairs(const char* left, int64_t row_bytes, const float* right,
                             int64_t right_words, int64_t rows, int64_t n, int vectors,
                             Target target) {
  const int64_t whole = rows / TILE * TILE, words = n / TILE * TILE;
  if (!has_tiles() || !whole || !words || target.add)
    return product<true, false>(left, row_bytes, right, right_words, rows, n, vectors, target);
  auto each = [&](auto&& change) {
    for (int64_t i = 0; i < whole; i++)
      for (int u = 0; u < vectors; u++) {
        float* p = target.to + i * target.words + u * LANES;
        store(p, change(load<vf>(p), u));
      }
  };
  if (target.rescale) {
    bool same = true;
    for (int u = 0; u < vectors * LANES; u++) same &= target.rescale[u] == 1.f;
    if (!same) each([&](vf x, int u) { return x * load<vf>(target.rescale + u * LANES); });
    tile_product<true>(left, row_bytes, right, right_words, whole, words, vectors, target.to,
                       target.words);
  } else {
    tile_product<false>(left, row_bytes, right, right_words, whole, words, vectors, target.to,
                        target.words);
    if (target.factor != 1.f) each([&](vf x, int) { return x * target.factor; });
  }
  if (words < n)
    product<true, false>(left + 4 * words, row_bytes, right + words * right_words, right_words,
                         whole, n - words, vectors,
                         {target.to, target.words, target.factor, nullptr, true});
  if (whole < rows) {
    target.to += whole * target.words;
    product<true, false>(left + whole * row_bytes, row_bytes, right, right_words, rows - whole, n,
                         vectors, target);
  }
}

// Four chains of products in registers, and nothing else; returns its operations.
inline int64_t tile_chains(int64_t rounds) {
  const TileRegisters registers;
  for (int64_t i = 0; i < rounds; i++) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  return rounds * 4 * TILE * TILE * 2 * TILE * 2;
}

#else

constexpr bool MAY_HAVE_TILES = false;
inline bool has_tiles() { return false; }
struct TileRegisters {};
inline int64_t tile_chains(int64_t) { return 0; }

#endif

// CPUs that have tiles multiply fp32 faster than bf16 by dot products, which serve there for what
// does not fill a tile only.
constexpr bool TAKES_PAIRS = HAS_BF16_DOT && !MAY_HAVE_TILES;

// The product of `rows` rows, which lie row by row, and `vectors` vectors.
template <bool PAIRS>
inline void product_by_rows(const char* left, int64_t row_bytes, const float* right,
                            int64_t right_words, int64_t rows, int64_t n, int vectors,
                            Target target) {
#if defined(DISTR_AMX)
  if constexpr (PAIRS)
    return product_of_pairs(left, row_bytes, right, right_words, rows, n, vectors, target);
#endif
  product<PAIRS, false>(left, row_bytes, right, right_words, rows, n, vectors, target);
}

}  // namespace
