// A and B of the estimator `projection`: Gram matrices, then small algebra per block.
//
// kernels/projection/reference.py is the definition. The basis that it takes from a QR comes from
// Gram-Schmidt here, repeated until orthogonal: the same span, and only the span matters.

#pragma once

#include <atomic>

#include "amx.h"
#include "vectors.h"

// The arguments of one call: blocks first_block to first_block + blocks of all units, a unit being
// a key head of a batch entry. Strides are in elements, those of a broadcast dimension are 0.
struct Bases {
  int64_t size;
  const void *q, *k;
  const uint8_t *queries, *keys;  // which rows count, or null: all
  const float* start;             // (d, r), contiguous
  const int64_t* seen;            // per block of the sequence: keys that have a part, or null
  float *a, *b;                   // A^T (units, blocks, r, d), B (units, blocks, d, padded r)
  const float* carry;             // (units, 2, d padded d + 16): sums so far of Q and of K
  float* carry_out;               // likewise, after these blocks; another tensor
  int64_t q_strides[5];           // batch, key head, head, row, column
  int64_t k_strides[4];           // batch, key head, row, column
  int64_t queries_strides[4];     // batch, key head, head, row
  int64_t keys_strides[3];        // batch, key head, row
  int64_t batch, key_heads, rep, num_queries, num_keys, head_dim, rank;
  int64_t block, first_block, blocks, rounds;
  int64_t strict, limited, causal_offset;  // limited: row i sees keys j <= i + causal_offset only
  int64_t dtype;
  double ridge;
  ParallelFor parallel_for;
  int64_t threads;
  float* workspace;  // distr_bases_workspace(call) bytes, 64-byte aligned
};

namespace {

constexpr int64_t PIECE_ROWS = 2048;  // rows of a Gram matrix that one task sums, if they are few
constexpr int64_t MOST_PIECES = 4;    // of the rows that a block adds; then they are longer

struct Projection {
  const Bases& c;
  const int64_t d, r, dp, rp, units, matrix;  // dp, rp: padded; matrix: words of C and its unit
  std::atomic<int64_t> next{0};
  int64_t total = 0;
  bool summing = false;

  explicit Projection(const Bases& call)
      : c(call), d(call.head_dim), r(call.rank), dp(round_up(d, WIDTH_UNIT)),
        rp(round_up(r, WIDTH_UNIT)), units(call.batch * call.key_heads), matrix(d * dp + 16) {}

  // Of one worker: more than either gram() or solve() cuts up.
  int64_t scratch_words() const {
    return KEY_TILE * 2 * dp + 2 * matrix + 4 * d * rp + 3 * r * dp + 2 * r * rp + dp + rp + 64;
  }
  // Partial sums, [unit][block][Q or K][piece].
  int64_t partial_words() const { return units * c.blocks * 2 * MOST_PIECES * matrix; }
  int64_t workspace() const { return 4 * (partial_words() + c.threads * scratch_words()); }

  // ---- which rows -------------------------------------------------------------------------------

  struct Range {
    int64_t first, stop;
    int64_t piece() const {
      return std::max(PIECE_ROWS, (stop - first + MOST_PIECES - 1) / MOST_PIECES);
    }
  };
  int64_t keys_of(int64_t block) const {  // that count in it; never fewer than in the one before
    if (block < 0) return 0;
    if (c.seen) return c.seen[block];
    int64_t seen = c.num_keys;
    if (c.strict) seen = block ? block * c.block + c.causal_offset : 0;
    else if (c.limited) seen = std::min((block + 1) * c.block, c.num_queries) + c.causal_offset;
    return std::max<int64_t>(0, std::min(c.num_keys, seen));
  }
  // Rows whose sums a block adds to those of the block before, of Q only with `strict`.
  Range new_keys(int64_t block) const { return {keys_of(block - 1), keys_of(block)}; }
  Range new_queries(int64_t block) const {
    if (c.strict) return {std::max<int64_t>(0, block - 1) * c.block, block * c.block};
    return {block * c.block, std::min((block + 1) * c.block, c.num_queries)};
  }
  float* partial(int64_t unit, int64_t block, bool keys, int64_t piece) const {
    return c.workspace +
           (((unit * c.blocks + block) * 2 + keys) * MOST_PIECES + piece) * matrix;
  }
  const float* carried(int64_t unit, bool keys) const {
    return c.carry + (unit * 2 + keys) * matrix;
  }

  // ---- Gram matrices ----------------------------------------------------------------------------

  const char* row_at(int64_t unit, bool keys, int64_t head, int64_t row) const {
    const int64_t batch = unit / c.key_heads, h = unit % c.key_heads;
    const int64_t *q = c.q_strides, *k = c.k_strides;
    return keys ? static_cast<const char*>(c.k) +
                      (batch * k[0] + h * k[1] + row * k[2]) * element_bytes(c.dtype)
                : static_cast<const char*>(c.q) +
                      (batch * q[0] + h * q[1] + head * q[2] + row * q[3]) * element_bytes(c.dtype);
  }
  bool counts(int64_t unit, bool keys, int64_t head, int64_t row) const {
    const int64_t batch = unit / c.key_heads, h = unit % c.key_heads;
    const int64_t *q = c.queries_strides, *k = c.keys_strides;
    if (keys) return !c.keys || c.keys[batch * k[0] + h * k[1] + row * k[2]];
    return !c.queries || c.queries[batch * q[0] + h * q[1] + head * q[2] + row * q[3]];
  }

  // Up to KEY_TILE rows as fp32, what is not finite or does not count as 0; returns the largest.
  float read_rows(int64_t unit, bool keys, int64_t head, int64_t first, int64_t n,
                  float* rows) const {
    const int64_t stride = keys ? c.k_strides[3] : c.q_strides[4];
    // As integers magnitudes compare as the numbers do.
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
      float* row = rows + i * dp;
      std::memset(row, 0, 4 * dp);
      if (!counts(unit, keys, head, first + i)) continue;
      read_floats(row_at(unit, keys, head, first + i), c.dtype, stride, d, row);
      for (int64_t j = 0; j < d; j++) {
        const uint32_t size = bits<uint32_t>(row[j]) & 0x7fffffffu;
        const bool finite = size < 0x7f800000u;
        row[j] = finite ? row[j] : 0.f;
        largest = std::max(largest, finite ? size : 0u);
      }
    }
    return bits<float>(largest);
  }

  // Two bf16 rows side by side as words, what is not finite as 0; returns the largest.
  float join_rows(const uint16_t* low, const uint16_t* high, uint32_t* words) const {
    uint32_t largest = 0;
    for (int64_t j = 0; j < d; j++) {
      const uint32_t x = low[j], y = high[j], a = x & 0x7fffu, b = y & 0x7fffu;
      words[j] = (a < 0x7f80u ? x : 0u) | (b < 0x7f80u ? y : 0u) << 16;
      largest = std::max(largest, std::max(a < 0x7f80u ? a : 0u, b < 0x7f80u ? b : 0u));
    }
    return bits<float>(largest << 16);
  }
  // Up to KEY_TILE rows, joined two by two. `zeros`: a row of 0, for rows that do not count.
  float read_pairs(int64_t unit, bool keys, int64_t head, int64_t first, int64_t n,
                   const uint16_t* zeros, float* rows) const {
    float largest = 0;
    auto row = [&](int64_t i) {
      const bool is_zero = i >= n || !counts(unit, keys, head, first + i);
      const char* at = row_at(unit, keys, head, is_zero ? first : first + i);
      return is_zero ? zeros : reinterpret_cast<const uint16_t*>(at);
    };
    for (int64_t i = 0; i < n; i += 2) {
      float* words = rows + i / 2 * dp;
      std::memset(words + d, 0, 4 * (dp - d));
      const float size = join_rows(row(i), row(i + 1), reinterpret_cast<uint32_t*>(words));
      largest = std::max(largest, size);
    }
    return largest;
  }

  // What rows are divided by before they are squared: 1, or a power of two for extreme numbers.
  static float unit_for(float largest) {
    if (largest == 0 || (largest > 0x1p-15f && largest < 0x1p15f)) return 1;
    int e;
    std::frexp(largest, &e);
    return std::ldexp(1.f, std::max(e - 1, -126));  // its inverse is finite
  }

  // C = X^T X for rows X, in units of the square of C[d dp]; C[d dp + 1] is 0 if there are none.
  void gram(int64_t unit, bool keys, Range range, float* C, float* scratch) const {
    float *rows = scratch, *panels = rows + KEY_TILE * dp, *ones = panels + KEY_TILE * dp;
    float* zeros = ones + dp;
    std::fill(ones, ones + dp, 1.f);
    std::memset(zeros, 0, 4 * dp);
    std::memset(C, 0, 4 * matrix);
    float largest = 0, now = 1;  // so far: the largest number, what rows are divided by
    const int64_t stride = keys ? c.k_strides[3] : c.q_strides[4];
    const bool in_pairs = TAKES_PAIRS && c.dtype == BF16 && stride == 1;
    for (int64_t head = 0; head < (keys ? 1 : c.rep); head++)
      for (int64_t row = range.first; row < range.stop; row += KEY_TILE) {
        const int64_t n = std::min<int64_t>(KEY_TILE, range.stop - row);
        if (in_pairs && now == 1) {  // bf16 products are exact
          const float here = read_pairs(unit, keys, head, row, n,
                                        reinterpret_cast<uint16_t*>(zeros), rows);
          if (unit_for(here) == 1 && here > 0) {
            largest = std::max(largest, here);
            add_product<true>(rows, (n + 1) / 2, panels, ones, C);
            continue;
          }
        }
        // In fp32: other dtypes, and bf16 from extreme numbers on.
        const float here = read_rows(unit, keys, head, row, n, rows);
        if (here == 0) continue;
        // A larger number: what is summed so far is brought to its unit.
        if (here > largest) {
          const float before = largest > 0 ? now : unit_for(here);
          largest = here;
          now = unit_for(largest);
          if (now != before) scale(C, d * dp, before / now * (before / now));
        }
        if (now != 1) scale(rows, n * dp, 1 / now);
        add_product<false>(rows, n, panels, ones, C);
      }
    // The blocks below the diagonal, which add_product left out, by symmetry.
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < i / 64 * 64; j++) C[i * dp + j] = C[j * dp + i];
    C[d * dp] = now;
    C[d * dp + 1] = largest > 0;
  }
  // C += X^T X for n rows of words; C is symmetric: up to the diagonal of blocks.
  template <bool PAIRS>
  void add_product(const float* rows, int64_t n, float* panels, const float* ones, float* C) const {
    pack(rows, n, panels);
    for (int64_t column = 0; column < dp; column += 64) {
      const int64_t wide = std::min<int64_t>(64, dp - column);
      const int64_t high = std::min(d, round_up(column + wide, ROWS));  // whole panels
      product<PAIRS, true>(reinterpret_cast<char*>(panels), 4 * KEY_TILE, rows + column, dp, high,
                           n, int(wide / LANES), {C + column, dp, 1.f, ones});
    }
  }
  void pack(const float* rows, int64_t n, float* panels) const {
    for (int64_t column = 0; column < d;) {
      const int64_t step = next_rows(d - column);
      float* to = panels + column * KEY_TILE;
      if (step == ROWS)
        for (int64_t j = 0; j < n; j++)
          std::memcpy(to + j * ROWS, rows + j * dp + column, 4 * ROWS);
      else
        for (int64_t j = 0; j < n; j++)
          std::memcpy(to + j * step, rows + j * dp + column, 4 * step);
      column += step;
    }
  }
  static void scale(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
  }
  // C of a longer and a shorter sum; each with its unit and whether it has any rows.
  void add(float* C, const float* more) const {
    if (!more[d * dp + 1]) return;
    if (!C[d * dp + 1]) { std::memcpy(C, more, 4 * matrix); return; }
    const float now = std::max(C[d * dp], more[d * dp]);
    const float f = C[d * dp] / now, g = more[d * dp] / now;
    for (int64_t i = 0; i < d * dp; i++) C[i] = C[i] * (f * f) + more[i] * (g * g);
    C[d * dp] = now;
  }
  // To a Frobenius norm in [1, 4), plus a ridge; returns e with X^T X = 4^e C. A C of 0 becomes
  // the identity.
  int normalise(float* C, float ridge) const {
    double squares = 0;
    for (int64_t i = 0; i < d; i++) {
      float row = 0;
      for (int64_t j = 0; j < d; j++) row += C[i * dp + j] * C[i * dp + j];
      squares += row;
    }
    const float norm = std::sqrt(float(squares));
    int e, u;
    std::frexp(norm, &e);
    std::frexp(C[d * dp + 1] ? C[d * dp] : 1.f, &u);
    // norm / 4^exponent is in [1, 4); log2 of the unit of C is u - 1.
    const int exponent = norm > 0 ? (e - 1) >> 1 : -1;
    if (norm > 0) scale(C, d * dp, std::ldexp(1.f, -2 * exponent));
    else std::memset(C, 0, 4 * d * dp);
    for (int64_t i = 0; i < d; i++) C[i * dp + i] += norm > 0 ? ridge : 1.f;
    return exponent + u - 1;
  }

  void sum_pieces(int64_t index, float* scratch) const {
    // Tasks by unit, then block, then Q or K, then piece, which varies fastest.
    const int64_t piece = index % MOST_PIECES, keys = index / MOST_PIECES % 2;
    const int64_t block = index / (2 * MOST_PIECES) % c.blocks;
    const int64_t unit = index / (2 * MOST_PIECES) / c.blocks;
    const Range all = keys ? new_keys(c.first_block + block) : new_queries(c.first_block + block);
    const Range some{all.first + piece * all.piece(),
                     std::min(all.stop, all.first + (piece + 1) * all.piece())};
    float* C = partial(unit, block, keys, piece);
    if (some.stop > some.first) gram(unit, keys, some, C, scratch);
    else C[d * dp + 1] = 0;  // no rows
  }

  // ---- the small algebra ------------------------------------------------------------------------

  static float dot(const float* x, const float* y, int64_t n) {  // n: a multiple of LANES
    vf sum{};
    for (int64_t i = 0; i < n; i += LANES) sum += load<vf>(x + i) * load<vf>(y + i);
    float all = 0;
    for (int i = 0; i < LANES; i++) all += sum[i];
    return all;
  }
  static void subtract(float* x, float factor, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(x + i, load<vf>(x + i) - load<vf>(y + i) * factor);
  }
  // out (rows, padded columns) = left (rows, n) * right (n, padded columns)
  static void multiply(const float* left, int64_t left_words, const float* right, int64_t rows,
                       int64_t n, int64_t columns, float* out) {
    product<false, false>(reinterpret_cast<const char*>(left), 4 * left_words, right, columns, rows,
                          n, int(columns / LANES), {out, columns, 1.f, nullptr});
  }
  // x (rows, ld) to y (columns, ld2), whose padding becomes 0.
  static void transposed(const float* x, int64_t rows, int64_t columns, int64_t ld, float* y,
                         int64_t ld2) {
    std::memset(y, 0, 4 * columns * ld2);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) y[j * ld2 + i] = x[i * ld + j];
  }

  // Rows of XT (r, dp) become an orthonormal basis of their span, X (d, rp) its transpose. A row
  // that adds nothing to it but rounding becomes any direction that is left: the rounding, or what
  // is left of a unit vector.
  void orthonormalise(float* XT, float* X, float* factors) const {
    std::memset(X, 0, 4 * d * rp);
    for (int64_t j = 0; j < r; j++) {
      float* row = XT + j * dp;
      for (int64_t attempt = 0; attempt <= d; attempt++) {
        if (attempt) {
          std::memset(row, 0, 4 * dp);
          row[(j + attempt) % d] = 1;
        }
        if (orthogonal(row, XT, X, j, factors)) break;
      }
      for (int64_t i = 0; i < d; i++) X[i * rp + j] = row[i];
    }
  }
  // Row of length 1, orthogonal to the j rows of XT; false where it has lost its direction.
  bool orthogonal(float* row, const float* XT, const float* X, int64_t j, float* factors) const {
    float size = std::sqrt(dot(row, row, dp)), *change = factors + rp;
    // At least twice, and until no more than half of the length is lost.
    for (int turn = 0; turn < 4; turn++) {
      if (!(size > 1e-18f && size < INFINITY)) return false;
      scale(row, dp, 1 / size);
      multiply(row, dp, X, 1, d, rp, factors);  // (1, rp): inner products with the rows before
      multiply(factors, rp, XT, 1, j, dp, change);
      subtract(row, 1, change, dp);
      size = std::sqrt(dot(row, row, dp));
      if (turn && size > 0.5f) {
        scale(row, dp, 1 / size);
        return true;
      }
    }
    return false;
  }

  // G (r, rp), symmetric: the transposed Cholesky factor in its upper triangle.
  void cholesky(float* G) const {
    for (int64_t k = 0; k < r; k++) {
      float* row = G + k * rp;
      scale(row, rp, 1 / std::sqrt(std::max(row[k], 1e-30f)));
      for (int64_t i = k + 1; i < r; i++) subtract(G + i * rp, row[i], row, rp);
    }
  }

  void solve(int64_t index, float* scratch) const {
    const int64_t block = index % c.blocks, unit = index / c.blocks;
    float *Ck = scratch, *Cq = Ck + matrix, *X = Cq + matrix, *Y = X + d * rp, *Z = Y + d * rp;
    float *XT = Z + d * rp, *G = XT + r * dp, *P = G + r * rp, *factors = P + r * rp;
    // Gram matrices: what calls before summed, then the pieces of this call up to the block.
    std::memcpy(Ck, carried(unit, true), 4 * matrix);
    std::memcpy(Cq, carried(unit, false), 4 * matrix);
    if (!c.strict) Cq[d * dp + 1] = 0;  // Q's are of the block alone
    for (int64_t i = 0; i <= block; i++)
      for (int64_t piece = 0; piece < MOST_PIECES; piece++) {
        add(Ck, partial(unit, i, true, piece));
        if (c.strict || i == block) add(Cq, partial(unit, i, false, piece));
      }
    if (block == c.blocks - 1) {  // where the next call goes on
      std::memcpy(c.carry_out + 2 * unit * matrix, Cq, 4 * matrix);
      std::memcpy(c.carry_out + (2 * unit + 1) * matrix, Ck, 4 * matrix);
    }
    const int q_exponent = normalise(Cq, float(c.ridge)), k_exponent = normalise(Ck, 0);

    // Subspace iteration, X = orthonormal columns of Ck Cq X: X (d, rp), XT (r, dp).
    std::memset(X, 0, 4 * d * rp);
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < r; j++) X[i * rp + j] = c.start[i * r + j] / 64;
    for (int64_t round = 0; round < c.rounds; round++) {
      multiply(Cq, dp, X, d, d, rp, Y);
      multiply(Ck, dp, Y, d, d, rp, Z);
      transposed(Z, d, r, rp, XT, dp);
      orthonormalise(XT, X, factors);
    }
    // A: X made orthonormal in the product of Cq, by Cholesky of G = X^T Cq X = L L^T.
    multiply(Cq, dp, X, d, d, rp, Y);
    multiply(XT, dp, Y, r, d, rp, G);
    cholesky(G);
    for (int64_t i = 0; i < r; i++) {  // A^T = L^-1 X^T, in place
      float* row = XT + i * dp;
      for (int64_t k = 0; k < i; k++) subtract(row, G[k * rp + i], XT + k * dp, dp);
      scale(row, dp, 1 / G[i * rp + i]);
    }
    transposed(XT, r, d, dp, X, rp);  // A
    multiply(Cq, dp, X, d, d, rp, Y);  // B
    multiply(XT, dp, Y, r, d, rp, P);  // A^T B, the identity but for rounding
    // A Newton-Schulz step: A P and B P with P = 1.5 I - 0.5 A^T B.
    for (int64_t i = 0; i < r; i++)
      for (int64_t j = 0; j < rp; j++)
        P[i * rp + j] = (i == j ? 1.5f : 0.f) - 0.5f * (j < r ? P[i * rp + j] : 0.f);
    multiply(X, rp, P, d, r, rp, Z);
    // Into the caller's A^T and B, balanced.
    const float size = balance(Cq, Ck, q_exponent, k_exponent, c.first_block + block);
    float* A = c.a + index * r * d;
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < r; j++) A[j * d + i] = Z[i * rp + j] * size;
    float* B = c.b + index * d * rp;
    multiply(Y, rp, P, d, r, rp, B);
    scale(B, d * rp, 1 / size);
  }

  // As balance() of the definition.
  float balance(const float* Cq, const float* Ck, int q_exponent, int k_exponent,
                int64_t block) const {
    double energy = 0;
    for (int64_t i = 0; i < d; i++) energy += dot(Cq + i * dp, Ck + i * dp, dp);
    const Range rows = new_queries(block);
    const int64_t n = c.strict ? rows.stop : rows.stop - rows.first;
    const double keys = double(std::max<int64_t>(keys_of(block), 1));
    energy *= double(std::max<int64_t>(n, 1) * c.rep) / (keys * double(r));
    int e;
    std::frexp(float(energy), &e);
    const int exponent = ((e >> 1) + k_exponent - q_exponent) >> 1;
    return std::ldexp(1.f, std::max(-120, std::min(120, exponent)));
  }

  // ---- the walk ---------------------------------------------------------------------------------

  static void work(int64_t begin, int64_t end, void* context) {
    Projection& p = *static_cast<Projection*>(context);
    for (int64_t worker = begin; worker < end; worker++) {
      float* scratch = p.c.workspace + p.partial_words() + worker * p.scratch_words();
      for (int64_t i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < p.total;) {
        if (p.summing) p.sum_pieces(i, scratch);
        else p.solve(i, scratch);
      }
    }
  }
  void phase(bool is_summing, int64_t count) {
    summing = is_summing;
    total = count;
    next = 0;
    const int64_t n = std::min(c.threads, count);
    if (n <= 1 || !c.parallel_for) work(0, 1, this);
    else c.parallel_for(0, n, 1, work, this);
  }
  void run() {
    // All sums are there before a block is solved.
    phase(true, units * c.blocks * 2 * MOST_PIECES);
    phase(false, units * c.blocks);
  }
};

}  // namespace
