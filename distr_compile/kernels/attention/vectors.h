// Vectors of fp32, their exponential, transposition, the product, and rows of any dtype.

#pragma once

#include <algorithm>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

// ---- tiles per instruction set ------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 4;  // 6 x 4 sums, 4 operands, 1 broadcast: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, COLUMNS = 2;  // 6 x 2 sums, 2 operands, 1 broadcast: 15 of 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, COLUMNS = 4;
#else
constexpr int LANES = 4, COLUMNS = 2;
#endif
constexpr int ROWS = 6;         // rows of a product at a time; what is left goes by 4, 2 and 1
constexpr int QUERY_TILE = 64;  // query rows of a task
constexpr int KEY_TILE = 192;   // keys of a softmax step: even, a multiple of ROWS and LANES
constexpr int WIDTH_UNIT = 16;  // Khat and B are padded to a multiple of it, whatever the lanes

#ifndef DISTR_PACK_BYTES
#define DISTR_PACK_BYTES (12 << 20)
#define DISTR_STATE_BYTES (4 << 20)
#endif
constexpr int64_t PACK_BYTES = DISTR_PACK_BYTES;    // packed keys and values of a wave of tasks
constexpr int64_t STATE_BYTES = DISTR_STATE_BYTES;  // unfinished tiles where keys take many waves

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr bool HAS_BF16_DOT = true;
#else
constexpr bool HAS_BF16_DOT = false;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LOG2E_REST = float(1.44269504088896340736 - double(LOG2E));

enum Kind : int64_t { F32 = 0, F16 = 1, BF16 = 2, BOOL = 3, F64 = 4, NONE = -1 };

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, Body, void*);  // torch_parallel_for


// ---- vectors ------------------------------------------------------------------------------------

template <class V> inline V load(const void* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
template <class V> inline void store(void* p, V x) { std::memcpy(p, &x, sizeof x); }
template <class To, class From> inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To y; std::memcpy(&y, &x, sizeof y); return y;
}
inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, also for -0: no subtraction is left
inline vf vmax(vf x, vf y) { return x > y ? x : y; }  // y where either is NaN

inline vi iota() {
  vi x{};
  for (int i = 0; i < LANES; i++) x[i] = i;
  return x;
}

// The polynomial is a minimax fit of (2^f - 1) / f on [-1/2, 1/2], of relative error 2e-9.
inline vf exp2_polynomial(vf f) {
  vf p = splat(1.5353362e-4f);
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  return p * f + 1.0f;
}

// e^x for x <= 0: exactly 1 at 0, exactly 0 for -inf and what is below all fp32 numbers of full
// precision, NaN for NaN. x log2(e) is split into an integer and a fraction without a rounding of
// the product, so that the error does not grow with x.
inline vf exp_negative(vf x) {
#if defined(__AVX512F__)
  x = (vf)_mm512_max_ps((__m512)splat(-140.f), (__m512)x);  // NaN stays NaN
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  vf n = (vf)_mm512_roundscale_ps((__m512)(x * LOG2E), NEAREST);
  vf p = exp2_polynomial((x * LOG2E - n) + x * LOG2E_REST);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vf y = x < -104.f ? splat(-104.f) : x;
  vf t = y * LOG2E + 12582912.f;  // 1.5 * 2^23: rounds to an integer, which then is in the low bits
  vf p = exp2_polynomial((y * LOG2E - (t - 12582912.f)) + y * LOG2E_REST);
  p = bits<vf>(bits<vi>(p) + (bits<vi>(t) << 23));  // n to the exponent of p
  return y < -87.f ? vf{} : p;
#endif
}

// e^(x factor) likewise for a result that is rounded to bf16: of relative error 9e-8.
inline vf exp_of_pairs(vf x, float factor) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const vf y = x * (factor * LOG2E);
  const vf f = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf p = splat(0.0013264727f);
  p = p * f + 0.0096715127f;
  p = p * f + 0.055507337f;
  p = p * f + 0.24022242f;
  p = p * f + 0.69314698f;
  p = p * f + 1.f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(y - f));  // f is 0 where y is -inf
#else
  return exp_negative(x * factor);
#endif
}

// tanh: an odd polynomial (minimax, 5e-9) near 0, where the quotient would cancel.
inline vf tanh_of(vf x) {
  vf size = bits<vf>(bits<vi>(x) & 0x7fffffff), z = x * x;
  vf p = splat(-5.648316e-3f);
  p = p * z + 2.0589827e-2f;
  p = p * z - 5.3725127e-2f;
  p = p * z + 0.13331275f;
  p = p * z - 0.33333275f;
  vf e = exp_negative(size * -2.f);
  vf far = (1.f - e) / (1.f + e);
  far = x < 0.f ? -far : far;
  return size < 0.625f ? x + x * z * p : far;
}

// Rounded to nearest even.
inline uint32_t bf16_of(float x) {
  uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
// Two rows of fp32 as bf16 pairs, lane by lane, the first in the low half.
inline vi pair_of(vf low, vf high) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6, 22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (vi)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
#else
  vi x{};
  for (int i = 0; i < LANES; i++) x[i] = int32_t(bf16_of(low[i]) | bf16_of(high[i]) << 16);
  return x;
#endif
}

// Numbers as bf16, n of them, a multiple of LANES.
inline void narrow(const float* from, int64_t n, void* to) {
  uint16_t* out = static_cast<uint16_t*>(to);
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  for (int64_t i = 0; i < n; i += LANES) {
    const __m256bh x = _mm512_cvtneps_pbh((__m512)load<vf>(from + i));
    std::memcpy(out + i, &x, 2 * LANES);
  }
#else
  for (int64_t i = 0; i < n; i++) out[i] = uint16_t(bf16_of(from[i]));
#endif
}

inline float half_to_float(uint16_t h) {
  uint32_t size = uint32_t(h & 0x7fff) << 13;
  // The exponent bias of fp16 is 15, that of fp32 127.
  float x = bits<float>(size) * 0x1p112f;  // exact, also for subnormal numbers
  uint32_t u = size >= 0x0f800000u ? size | 0x7f800000u : bits<uint32_t>(x);  // infinity and NaN
  return bits<float>(u | uint32_t(h & 0x8000) << 16);
}
inline uint16_t half_of(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, 0));
#else
  uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  // From 2^16 on; what only rounds up to it carries over into infinity below.
  if (u >= 0x47800000u) return uint16_t(sign | (u > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (u < 0x38800000u)  // subnormal: the sum rounds to a multiple of 2^-24
    return uint16_t(sign | (bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13));
#endif
}

// ---- transposition of LANES x LANES words -------------------------------------------------------

template <int... I> struct List {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef List<I...> type; };

// A step of the transposition: in blocks of 2 S x 2 S the quarters beside the diagonal swap.
template <int S, bool HIGH, int... I> inline vf exchange(vf x, vf y, List<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(
      x, y, (HIGH ? ((I & S) ? I + LANES : I + S) : ((I & S) ? I - S + LANES : I))...);
#else
  return __builtin_shuffle(
      x, y, vi{(HIGH ? ((I & S) ? I + LANES : I + S) : ((I & S) ? I - S + LANES : I))...});
#endif
}
template <int S> inline void transpose_from(vf* x) {
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) {
      vf low = exchange<S, false>(x[i], x[i + S], typename Count<LANES>::type());
      x[i + S] = exchange<S, true>(x[i], x[i + S], typename Count<LANES>::type());
      x[i] = low;
    }
  if constexpr (2 * S < LANES) transpose_from<2 * S>(x);
}
inline void transpose(vf* x) { transpose_from<1>(x); }

// ---- the product --------------------------------------------------------------------------------

inline int next_rows(int64_t left) {
  return left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <bool PAIRS> inline vf multiply_add(vf sum, int32_t x, vf y) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (PAIRS)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), bits<__m512bh>(y));
#endif
  return sum + splat(bits<float>(x)) * y;
}

// Where a product goes: to[i][u] = sum * factor, or with rescale to[i][u] * rescale[u] + sum.
struct Target {
  float* to;
  int64_t words;         // from one row to the next
  float factor;
  const float* rescale;  // or null
  bool add = false;      // to[i][u] + sum * factor instead; not with rescale
};

// R rows by C vectors of the product, whose sums are over c < n of left(i, c) * right[c][u]. The
// words of left are broadcast; row i starts at left + i * row_bytes, or with PANEL the R rows of a
// panel are interleaved. A word is one fp32 number, or with PAIRS two bf16 numbers of neighbours.
template <bool PAIRS, bool PANEL, int R, int C>
void product_block(const char* left, int64_t row_bytes, const float* right, int64_t right_words,
                   int64_t n, const Target& target) {
  vf sum[R][C];
  for (int i = 0; i < R; i++)
    for (int u = 0; u < C; u++) sum[i][u] = vf{};
  for (int64_t c = 0; c < n; c++) {
    vf y[C];
    for (int u = 0; u < C; u++) y[u] = load<vf>(right + c * right_words + u * LANES);
    for (int i = 0; i < R; i++) {
      int32_t x;
      std::memcpy(&x, PANEL ? left + (c * R + i) * 4 : left + i * row_bytes + c * 4, 4);
      for (int u = 0; u < C; u++) sum[i][u] = multiply_add<PAIRS>(sum[i][u], x, y[u]);
    }
  }
  for (int i = 0; i < R; i++)
    for (int u = 0; u < C; u++) {
      float* p = target.to + i * target.words + u * LANES;
      if (target.rescale)
        store(p, load<vf>(p) * load<vf>(target.rescale + u * LANES) + sum[i][u]);
      else if (target.add) store(p, load<vf>(p) + sum[i][u] * target.factor);
      else store(p, sum[i][u] * target.factor);
    }
}

template <bool PAIRS, bool PANEL, int C>
void product_columns(const char* left, int64_t row_bytes, const float* right, int64_t right_words,
                     int64_t rows, int64_t n, Target target) {
  for (int64_t i = 0; i < rows;) {
    // Also where rows are interleaved: a panel of R rows takes R times row_bytes.
    const char* at = left + i * row_bytes;
    const int step = next_rows(rows - i);
#define BLOCK(R) product_block<PAIRS, PANEL, R, C>(at, row_bytes, right, right_words, n, target)
    if (step == ROWS) BLOCK(ROWS);
    else if (step == 4) BLOCK(4);
    else if (step == 2) BLOCK(2);
    else BLOCK(1);
#undef BLOCK
    i += step;
    target.to += step * target.words;
  }
}

// The product of `rows` rows and `vectors` vectors.
template <bool PAIRS, bool PANEL>
void product(const char* left, int64_t row_bytes, const float* right, int64_t right_words,
             int64_t rows, int64_t n, int vectors, Target target) {
  for (int u = 0, step; u < vectors; u += step) {
    // Four vectors at a time where there are registers for it, then two, then one.
    step = COLUMNS == 4 && vectors - u >= 4 ? 4 : vectors - u >= 2 ? 2 : 1;
    auto columns = step == 4   ? product_columns<PAIRS, PANEL, COLUMNS>
                   : step == 2 ? product_columns<PAIRS, PANEL, 2>
                               : product_columns<PAIRS, PANEL, 1>;
    columns(left, row_bytes, right + u * LANES, right_words, rows, n, target);
    target.to += step * LANES;
    if (target.rescale) target.rescale += step * LANES;
  }
}

// ---- reading and writing rows -------------------------------------------------------------------

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t element_bytes(int64_t kind) {
  return kind == F32 ? 4 : kind == F64 ? 8 : kind == BOOL ? 1 : 2;
}
inline int64_t words_of(bool pairs, int64_t width) { return pairs ? (width + 1) / 2 : width; }

// n numbers of any dtype as fp32; ``from`` has a stride in elements.
template <class T, class F> inline void convert(const void* from, int64_t stride, int64_t n,
                                                float* to, const F& as_float) {
  const T* p = static_cast<const T*>(from);
  if (stride == 1) for (int64_t i = 0; i < n; i++) to[i] = as_float(p[i]);
  else for (int64_t i = 0; i < n; i++) to[i] = as_float(p[i * stride]);
}
void read_floats(const void* from, int64_t kind, int64_t stride, int64_t n, float* to) {
  if (kind == F32) convert<float>(from, stride, n, to, [](float x) { return x; });
  else if (kind == F64) convert<double>(from, stride, n, to, [](double x) { return float(x); });
  else if (kind == F16) convert<uint16_t>(from, stride, n, to, half_to_float);
  else if (kind == BF16)
    convert<uint16_t>(from, stride, n, to,
                      [](uint16_t x) { return bits<float>(uint32_t(x) << 16); });
  else convert<uint8_t>(from, stride, n, to, [](uint8_t x) { return x ? 0.f : -INFINITY; });
}

// A row of `width` numbers as words: fp32, or with `pairs` bf16 as it is, 0 after an odd last one.
void read_words(bool pairs, const void* from, int64_t kind, int64_t stride, int64_t width,
                float* to) {
  if (!pairs) return read_floats(from, kind, stride, width, to);
  const uint16_t* p = static_cast<const uint16_t*>(from);
  uint16_t* q = reinterpret_cast<uint16_t*>(to);
  if (stride == 1) std::memcpy(q, p, 2 * width);
  else for (int64_t i = 0; i < width; i++) std::memcpy(q + i, p + i * stride, 2);
  if (width % 2) std::memset(q + width, 0, 2);
}

// Up to `all` rows as [word][all], rows that are missing 0. `buffer`: LANES rows.
void read_transposed(bool pairs, const char* from, int64_t kind, int64_t row_stride, int64_t stride,
                     int64_t rows, int64_t width, float* buffer, float* to,
                     int64_t all = QUERY_TILE) {
  const int64_t words = words_of(pairs, width), padded = round_up(words, LANES);
  for (int64_t first = 0; first < rows; first += LANES) {
    // LANES rows into the buffer, from where LANES words of each are transposed.
    for (int i = 0; i < LANES; i++) {
      float* row = buffer + i * padded;
      if (first + i >= rows) { std::memset(row, 0, 4 * padded); continue; }
      const char* at = from + (first + i) * row_stride * element_bytes(kind);
      read_words(pairs, at, kind, stride, width, row);
      std::memset(row + words, 0, 4 * (padded - words));
    }
    for (int64_t c = 0; c < words; c += LANES) {
      vf x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load<vf>(buffer + i * padded + c);
      transpose(x);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, words - c); i++)
        store(to + (c + i) * all + first, x[i]);
    }
  }
}

// Up to `all` rows of a mask, of n keys from element `place` on, as fp32 [key][all]; of one that is
// broadcast over rows, one number a key. False where it hides every key from every row.
// `buffer`: LANES rows of KEY_TILE words.
bool read_mask(const void* mask, int64_t place, int64_t kind, int64_t row_stride, int64_t stride,
               int64_t rows, int64_t n, float* buffer, float* to, int64_t all = QUERY_TILE) {
  const int64_t bytes = element_bytes(kind);
  const char* from = static_cast<const char*>(mask) + place * bytes;
  bool seen = false;
  auto row = [&](int64_t i, float* out) {
    const char* at = from + i * row_stride * bytes;
    // Rows lie far apart: ask for those of the next tile while this one is computed.
    for (int64_t b = 0; stride == 1 && b < n * bytes; b += 64)
      __builtin_prefetch(at + KEY_TILE * bytes + b, 0, 2);
    read_floats(at, kind, stride, n, out);
    bool any = false;
    for (int64_t j = 0; j < n; j++) any |= out[j] != -INFINITY;
    seen |= any;
  };
  if (!row_stride) {  // broadcast over rows
    row(0, to);
    return seen;
  }
  for (int64_t first = 0; first < rows; first += LANES) {
    for (int i = 0; i < LANES; i++) {
      if (first + i < rows) row(first + i, buffer + i * KEY_TILE);
      else std::memset(buffer + i * KEY_TILE, 0, 4 * KEY_TILE);
    }
    for (int64_t j = 0; j < n; j += LANES) {
      vf x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load<vf>(buffer + i * KEY_TILE + j);
      transpose(x);
      for (int i = 0; i < LANES; i++) store(to + (j + i) * all + first, x[i]);
    }
  }
  return seen;
}

// n numbers of fp32 to a row of dtype `kind`: F32, F16 or BF16.
void write_row(const float* from, int64_t kind, int64_t stride, int64_t n, char* to) {
  if (kind == F32) {
    float* p = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < n; i++) p[i * stride] = from[i];
    return;
  }
  uint16_t* p = reinterpret_cast<uint16_t*>(to);
  if (kind == F16) for (int64_t i = 0; i < n; i++) p[i * stride] = half_of(from[i]);
  else for (int64_t i = 0; i < n; i++) p[i * stride] = uint16_t(bf16_of(from[i]));
}

}  // namespace
