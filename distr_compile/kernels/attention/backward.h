// Gradients of one call of attention, A and B held constant: what lowering/cpu_backward.py says.
//
// The lanes of a vector are query rows where scores are made, as in engine.h, and columns where
// gradients of keys and values are summed:
//
//     S^T[j][rows]   = sum_c Khat[j][c] Qhat^T[c][rows]       P = exp(S - lse)
//     dP^T[j][rows]  = sum_c V[j][c] dO^T[c][rows]            dS = P (dP - delta)
//     dV[j][c]      += sum_rows P^T[j][rows] dO[rows][c]
//     dKhat[j][c]   += sum_rows dS^T[j][rows] Qhat[rows][c]
//     dQhat^T[c][rows] += sum_j Khat[j][c] dS^T[j][rows]      Khat packed in panels
//
// A task is one key head with all that shares it: its query heads, and where K is broadcast the
// batch entries. It takes CHUNK_ROWS query rows at a time, and for each of these chunks every key
// tile, so that its workspace does not grow with N or M. Sums are added in one order, whatever the
// number of threads, in fp32. In the strict form a block's own keys and later ones have K
// and Q in the places of Khat and Qhat: two sides of a tile of keys.

#pragma once

#include <atomic>

#include "amx.h"
#include "dropout.h"
#include "vectors.h"

// The arguments of one call. Strides are in elements, those of a broadcast dimension are 0. A and B
// come four times, as each product reads them by rows; null where the call is exact.
struct Gradients {
  int64_t size;
  const void *q, *k, *v, *mask, *out, *grad;
  const float *lse;           // (B, H, N), contiguous
  const float *a, *a_t;       // A (d, padded r) and A^T (r, padded d) per head and block
  const float *b, *b_t;       // B and B^T likewise
  void* dq;
  float *dk, *dv;             // (B or 1, H_k, M, d or d_v), unit last stride, zero before
  float* delta;               // (B, H, N), contiguous, or null: the sums of dO times O
  float* dmask;               // like the mask, contiguous, zero before, or null
  int64_t q_strides[4];       // batch, head, row, column
  int64_t k_strides[4];
  int64_t v_strides[4];
  int64_t mask_strides[4];    // batch, head, row, key
  int64_t out_strides[4];
  int64_t grad_strides[4];
  int64_t basis_strides[3];   // of A and B: batch, head, block
  int64_t basis_t_strides[3]; // of A^T and B^T
  int64_t dq_strides[4];
  int64_t dk_strides[4];
  int64_t dv_strides[4];
  int64_t dmask_strides[4];
  int64_t batch, heads, key_heads, shares, queries, keys;  // shares: batch entries of one K and V
  int64_t entries;            // batch entries of one task, a multiple of shares
  int64_t rank, head_dim, value_dim;
  int64_t block;              // query rows that share A and B
  int64_t is_causal, causal_offset, strict;
  int64_t dtype, mask_kind;
  double scale, softcap;
  Dropout dropout;
  ParallelFor parallel_for;
  int64_t threads;
  char* workspace;            // distr_backward_workspace(call) bytes, 64-byte aligned
};

namespace {

constexpr int64_t CHUNK_ROWS = 2048;  // a multiple of QUERY_TILE

// With PAIRS, of bf16 inputs on CPUs with dot products of bf16, scores and dP are such products: Qhat
// and Khat are rounded as in the forward, V and dO are bf16 as they come.
template <bool PAIRS> struct Backward {
  const Gradients& c;
  const bool bases;
  const int64_t rep, units, d, r, dv, dp, rp, vp;  // dp, rp, vp: padded to whole vectors
  const float factor, cap;
  std::atomic<int64_t> next{0};

  explicit Backward(const Gradients& call)
      : c(call), bases(call.a != nullptr), rep(call.heads / call.key_heads),
        units(call.batch / call.entries * call.key_heads), d(call.head_dim), r(call.rank),
        dv(call.value_dim), dp(round_up(d, WIDTH_UNIT)), rp(round_up(r, WIDTH_UNIT)),
        vp(round_up(dv, WIDTH_UNIT)),
        factor(float(call.softcap ? call.scale / call.softcap : call.scale)),
        cap(float(call.softcap)) {}

  // ---- workspace --------------------------------------------------------------------------------

  struct Scratch {  // of one worker
    float *buffer, *q_rows, *o_rows;             // to read rows
    float *grad, *grad_t, *lse, *delta;          // of the query tiles of a chunk
    float *k_rows, *v_rows, *d_k, *d_v;          // of a key tile
    float *scores, *d_scores, *d_bias, *bias, *stays, *ones;
    struct Side {  // Qhat and Khat, or Q and K: rows of a chunk and of a key tile, and their sums
      float *rows, *rows_t, *d_rows_t, *k, *panels, *d_k, *k_words;
      int64_t width, padded;
    } hat, exact;
    float* v_words;
  };
  typedef typename Scratch::Side Side;
  int64_t chunk_rows() const {  // fewer where blocks are short, whose tiles are not full
    return c.block < QUERY_TILE ? CHUNK_ROWS / QUERY_TILE * c.block : CHUNK_ROWS;
  }
  int64_t tiles_at_once() const { return most_tiles(std::min(chunk_rows(), c.queries)); }
  // Of so many rows, cut where blocks end.
  int64_t most_tiles(int64_t rows) const {
    return (rows + QUERY_TILE - 1) / QUERY_TILE + rows / c.block + 1;
  }
  Scratch scratch(char* base, int64_t* used = nullptr) const {
    Scratch s{};
    int64_t at = 0;
    auto take = [&](int64_t words) {
      float* p = reinterpret_cast<float*>(base + at);
      at += round_up(4 * words, 64);
      return p;
    };
    const int64_t tile = QUERY_TILE * tiles_at_once();
    s.buffer = take(LANES * std::max(round_up(std::max({d, r, dv}), LANES), int64_t(KEY_TILE)));
    s.q_rows = take(QUERY_TILE * dp);
    s.o_rows = take(QUERY_TILE * std::max(dp, vp));
    auto take_side = [&](int64_t width, int64_t padded, bool has_keys) {
      Side side{};
      side.rows = take(tile * padded), side.rows_t = take(tile * padded);
      side.d_rows_t = take(tile * padded);
      if (has_keys) side.k = take(KEY_TILE * padded);
      side.panels = take(KEY_TILE * padded), side.d_k = take(KEY_TILE * padded);
      if (PAIRS) side.k_words = take(KEY_TILE * padded / 2);
      side.width = width, side.padded = padded;
      return side;
    };
    s.hat = take_side(r, rp, true);
    s.grad = take(tile * vp), s.grad_t = take(tile * vp);
    s.lse = take(tile), s.delta = take(tile);
    s.k_rows = take(KEY_TILE * dp), s.v_rows = take(KEY_TILE * vp);
    if (c.strict) s.exact = take_side(d, dp, false), s.exact.k = s.k_rows;
    s.d_k = take(KEY_TILE * dp), s.d_v = take(KEY_TILE * vp);
    if (PAIRS) s.v_words = take(KEY_TILE * vp / 2);
    s.scores = take(KEY_TILE * QUERY_TILE), s.d_scores = take(KEY_TILE * QUERY_TILE);
    if (c.mask_kind != NONE) s.bias = take(KEY_TILE * QUERY_TILE);
    if (c.dmask) s.d_bias = take(KEY_TILE * QUERY_TILE);
    if (c.dropout.scale) s.stays = take(KEY_TILE * QUERY_TILE);
    s.ones = take(QUERY_TILE);
    if (used) *used = at;
    return s;
  }
  int64_t scratch_bytes() const {
    int64_t used = 0;
    scratch(nullptr, &used);
    return used;
  }
  int64_t workspace() const { return c.threads * scratch_bytes(); }

  // ---- where things lie -------------------------------------------------------------------------

  struct Head {  // a query head of a batch entry, and its key head
    int64_t batch, head, key_batch, key_head;
  };
  const char* at(const void* base, const int64_t* s, int64_t batch, int64_t head, int64_t row) const {
    return static_cast<const char*>(base) +
           (batch * s[0] + head * s[1] + row * s[2]) * element_bytes(c.dtype);
  }
  const float* basis(const float* all, const int64_t* s, const Head& h, int64_t block) const {
    return all + h.batch * s[0] + h.key_head * s[1] + block * s[2];
  }
  int64_t keys_seen(int64_t last_row) const {  // by rows before last_row
    if (!c.is_causal) return c.keys;
    return std::max<int64_t>(0, std::min(c.keys, last_row + c.causal_offset));
  }

  int64_t edge_of(int64_t block) const {  // keys before it are scored by Qhat and Khat
    if (!c.strict) return c.keys;
    if (!block) return 0;
    return std::max<int64_t>(0, std::min(c.keys, block * c.block + c.causal_offset));
  }

  struct Tile {  // query rows of one block of a chunk
    int64_t row, rows, block, place;  // place: among the tiles of the chunk
    int vectors;
  };
  // Calls `each` with the tiles of rows first to stop in turn.
  template <class F> void tiles(int64_t first, int64_t stop, const F& each) const {
    int64_t place = 0;
    for (int64_t row = first; row < stop; place++) {
      const int64_t block = row / c.block;
      const int64_t end = std::min({stop, (block + 1) * c.block, row + QUERY_TILE});
      Tile t{row, end - row, block, place, int((end - row + LANES - 1) / LANES)};
      each(t);
      row = end;
    }
  }

  // ---- query tiles ------------------------------------------------------------------------------

  // Rows of any dtype as fp32, padded by zeros to `padded` words; missing rows are 0.
  void read_rows(const char* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t all,
                 int64_t width, int64_t padded, float* to) const {
    for (int64_t i = 0; i < rows; i++) {
      read_floats(from + i * row_stride * element_bytes(c.dtype), c.dtype, stride, width,
                  to + i * padded);
      std::memset(to + i * padded + width, 0, 4 * (padded - width));
    }
    std::memset(to + rows * padded, 0, 4 * (all - rows) * padded);
  }
  // Rows of a tile as [word][QUERY_TILE], with PAIRS of bf16 pairs of columns.
  void turn(const float* from, int64_t words, int64_t width, float* buffer, float* to) const {
    read_transposed(false, reinterpret_cast<const char*>(from), F32, words, 1, QUERY_TILE, width,
                    buffer, to);
    if (!PAIRS) return;
    for (int64_t i = 0; i < width; i += 2)  // in place: what is written has been read
      for (int u = 0; u < QUERY_TILE; u += LANES) {
        const vf low = load<vf>(to + i * QUERY_TILE + u);
        const vf high = i + 1 < width ? load<vf>(to + (i + 1) * QUERY_TILE + u) : vf{};
        store(to + i / 2 * QUERY_TILE + u, pair_of(low, high));
      }
  }
  void read_tile(const Head& h, const Tile& t, Scratch& s) const {
    const int64_t at_rp = t.place * QUERY_TILE * rp, at_dp = t.place * QUERY_TILE * dp;
    float *hat = s.hat.rows + at_rp, *grad = s.grad + t.place * QUERY_TILE * vp;
    // Q lies where it is a factor itself: with `strict` beside Qhat, in an exact call as Qhat.
    float* rows = c.strict ? s.exact.rows + at_dp : bases ? s.q_rows : hat;
    read_rows(at(c.q, c.q_strides, h.batch, h.head, t.row), c.q_strides[2], c.q_strides[3], t.rows,
              QUERY_TILE, d, dp, rows);
    if (bases)  // Qhat = Q A
      product<false, false>(reinterpret_cast<const char*>(rows), 4 * dp,
                            basis(c.a, c.basis_strides, h, t.block), rp, QUERY_TILE, d,
                            int(rp / LANES), {hat, rp, 1.f, nullptr});
    turn(hat, rp, r, s.buffer, s.hat.rows_t + at_rp);
    if (c.strict) {
      turn(rows, dp, d, s.buffer, s.exact.rows_t + at_dp);
      std::memset(s.exact.d_rows_t + at_dp, 0, 4 * QUERY_TILE * dp);
    }
    // dO by rows and transposed, O by rows for delta.
    read_rows(at(c.grad, c.grad_strides, h.batch, h.head, t.row), c.grad_strides[2],
              c.grad_strides[3], t.rows, QUERY_TILE, dv, vp, grad);
    turn(grad, vp, dv, s.buffer, s.grad_t + t.place * QUERY_TILE * vp);
    read_rows(at(c.out, c.out_strides, h.batch, h.head, t.row), c.out_strides[2], c.out_strides[3],
              t.rows, QUERY_TILE, dv, vp, s.o_rows);
    std::memset(s.hat.d_rows_t + at_rp, 0, 4 * QUERY_TILE * rp);
    const int64_t first = (h.batch * c.heads + h.head) * c.queries + t.row;
    for (int64_t i = 0; i < QUERY_TILE; i++) {
      // The row's sum of dO times O, and its lse.
      float *lse = s.lse + t.place * QUERY_TILE, *delta = s.delta + t.place * QUERY_TILE;
      vf sum{};
      for (int64_t j = 0; j < vp; j += LANES)
        sum += load<vf>(grad + i * vp + j) * load<vf>(s.o_rows + i * vp + j);
      float total = 0;
      for (int k = 0; k < LANES; k++) total += sum[k];
      delta[i] = total;
      // Where a row sees nothing, or is none, its weights are 0.
      lse[i] = i < t.rows && c.lse[first + i] != -INFINITY ? c.lse[first + i] : INFINITY;
      if (c.delta && i < t.rows) c.delta[first + i] = total;
    }
  }

  // The sums of a side's queries as rows, times the factor.
  void gather(const Tile& t, const Side& side, float* rows) const {
    const float* from = side.d_rows_t + t.place * QUERY_TILE * side.padded;
    for (int64_t first = 0; first < t.vectors * LANES; first += LANES)
      for (int64_t i = 0; i < side.width; i += LANES) {
        vf x[LANES];
        for (int k = 0; k < LANES; k++)
          x[k] = i + k < side.width ? load<vf>(from + (i + k) * QUERY_TILE + first) : vf{};
        transpose(x);
        for (int k = 0; k < LANES; k++)
          store(rows + (first + k) * side.padded + i, x[k] * factor);
      }
  }

  void write_tile(const Head& h, const Tile& t, Scratch& s) const {
    float* rows = s.q_rows;  // QUERY_TILE x dp, and rp is no more
    const bool by_hat = !c.strict || edge_of(t.block);  // whether Qhat has scored any key
    gather(t, by_hat ? s.hat : s.exact, rows);
    if (bases && by_hat) {  // dQ = dQhat A^T
      product<false, false>(reinterpret_cast<const char*>(rows), 4 * rp,
                            basis(c.a_t, c.basis_t_strides, h, t.block), dp, t.rows, r,
                            int(dp / LANES), {s.o_rows, dp, 1.f, nullptr});
      rows = s.o_rows;
      if (c.strict) {
        gather(t, s.exact, s.q_rows);
        for (int64_t i = 0; i < t.rows * dp; i++) rows[i] += s.q_rows[i];
      }
    }
    const int64_t bytes = element_bytes(c.dtype);
    char* to = static_cast<char*>(c.dq) + (h.batch * c.dq_strides[0] + h.head * c.dq_strides[1] +
                                           t.row * c.dq_strides[2]) * bytes;
    for (int64_t i = 0; i < t.rows; i++)
      write_row(rows + i * dp, c.dtype, c.dq_strides[3], d, to + i * c.dq_strides[2] * bytes);
  }

  // ---- scores -----------------------------------------------------------------------------------

  // The bias of a tile; false where it hides every key from every row.
  bool read_bias(const Head& h, const Tile& t, int64_t key, int64_t n, Scratch& s) const {
    const int64_t* st = c.mask_strides;
    const int64_t place = h.batch * st[0] + h.head * st[1] + t.row * st[2] + key * st[3];
    return read_mask(c.mask, place, c.mask_kind, st[2], st[3], t.rows, n, s.buffer, s.bias);
  }

  // P^T into s.scores, dS^T without the factor into s.d_scores, for n keys of the tile of keys that
  // begins at `key`, from its key `from` on, by one side. Of dropped weights P is 0, and dS has what
  // their softmax does to the others.
  template <bool DROPS>
  void weigh(const Tile& t, const Side& side, int64_t key, int64_t from, int64_t n,
             Scratch& s) const {
    const float *bias = s.bias, *stays = s.stays + from * QUERY_TILE;
    const float *k = PAIRS ? side.k_words : side.k, *v = PAIRS ? s.v_words : s.v_rows;
    const int64_t k_row = words_of(PAIRS, side.padded), v_row = words_of(PAIRS, vp);
    // S^T = Khat Qhat^T times the factor, dP^T = V dO^T, both [key][QUERY_TILE].
    product_by_rows<PAIRS>(reinterpret_cast<const char*>(k + from * k_row), 4 * k_row,
                          side.rows_t + t.place * QUERY_TILE * side.padded, QUERY_TILE, n,
                          words_of(PAIRS, side.width), t.vectors,
                          {s.scores, QUERY_TILE, factor, nullptr});
    product_by_rows<PAIRS>(reinterpret_cast<const char*>(v + from * v_row), 4 * v_row,
                          s.grad_t + t.place * QUERY_TILE * vp, QUERY_TILE, n, words_of(PAIRS, dv),
                          t.vectors, {s.d_scores, QUERY_TILE, 1.f, nullptr});
    const bool has_bias = c.mask_kind != NONE, by_row = has_bias && c.mask_strides[2];
    if (has_bias) bias += by_row ? from * QUERY_TILE : from;
    key += from;
    const bool cut = c.is_causal && key + n - 1 > t.row + c.causal_offset;
    for (int u = 0; u < t.vectors; u++) {
      const vf lse = load<vf>(s.lse + t.place * QUERY_TILE + u * LANES);
      const vf delta = load<vf>(s.delta + t.place * QUERY_TILE + u * LANES);
      for (int64_t j = 0; j < n; j++) {
        float *p = s.scores + j * QUERY_TILE + u * LANES, *q = s.d_scores + (p - s.scores);
        vf x = load<vf>(p), slope = splat(1.f);
        if (c.softcap) {
          x = tanh_of(x);
          slope = cap - x * x * cap;  // d(cap tanh(y)) / dy
          x = x * cap;
        }
        if (has_bias) {
          const vf y = by_row ? load<vf>(bias + j * QUERY_TILE + u * LANES) : splat(bias[j]);
          x = y == -INFINITY ? y : x + y;
        }
        if (cut) {
          const int64_t first = key + j - c.causal_offset - t.row;  // row that sees the key
          const int32_t from = int32_t(std::min<int64_t>(first, QUERY_TILE));
          x = iota() + u * LANES >= from ? x : splat(-INFINITY);
        }
        x = x - lse;
        const vf weight = exp_negative(x > 0.f ? vf{} : x);  // lse was rounded
        const vf z = DROPS ? load<vf>(stays + j * QUERY_TILE + u * LANES) : splat(1.f);
        store(p, DROPS ? weight * z : weight);
        vf ds = weight * ((DROPS ? load<vf>(q) * z : load<vf>(q)) - delta);
        // The mask is added after the soft cap: its gradient has no slope.
        if (c.dmask) store(s.d_bias + (p - s.scores), ds);
        if (c.softcap) ds = ds * slope;
        store(q, ds);
      }
    }
  }

  // ---- one task ---------------------------------------------------------------------------------

  void zero(float* p, int64_t words) const { std::memset(p, 0, 4 * words); }

  void read_keys(int64_t batch, int64_t head, int64_t key, int64_t n, Scratch& s) const {
    read_rows(at(c.k, c.k_strides, batch, head, key), c.k_strides[2], c.k_strides[3], n, n, d, dp,
              bases ? s.k_rows : s.hat.k);
    read_rows(at(c.v, c.v_strides, batch, head, key), c.v_strides[2], c.v_strides[3], n, n, dv, vp,
              s.v_rows);
    if (PAIRS) narrow(s.v_rows, n * vp, s.v_words);
  }
  // n keys of a side, from `from` on, in panels of ROWS columns (then 4, 2, 1), one after another.
  void pack_panels(const Side& side, int64_t from, int64_t n) const {
    const float* k = side.k + from * side.padded;
    for (int64_t column = 0; column < side.width;) {
      const int64_t step = next_rows(side.width - column);
      float* to = side.panels + column * KEY_TILE;
      for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < step; i++) to[j * step + i] = k[j * side.padded + column + i];
      column += step;
    }
  }

  // What n keys from `key` on add to the gradient of the mask.
  void add_to_mask(const Head& h, const Tile& t, int64_t key, int64_t n, Scratch& s) const {
    const int64_t* st = c.dmask_strides;
    float* to = c.dmask + h.batch * st[0] + h.head * st[1] + t.row * st[2] + key * st[3];
    for (int64_t j = 0; j < n; j += LANES)
      for (int u = 0; u < t.vectors; u++) {
        vf x[LANES];
        for (int i = 0; i < LANES; i++)
          x[i] = j + i < n ? load<vf>(s.d_bias + (j + i) * QUERY_TILE + u * LANES) : vf{};
        transpose(x);
        for (int i = 0; i < LANES && u * LANES + i < t.rows; i++) {
          float* row = to + (u * LANES + i) * st[2];
          for (int m = 0; m < LANES && j + m < n; m++) row[(j + m) * st[3]] += x[i][m];
        }
      }
  }

  // What a tile and n keys, of the tile of keys at `key` those from `from` on, add by one side.
  void add(const Head& h, const Tile& t, const Side& side, int64_t key, int64_t from, int64_t n,
           Scratch& s) const {
    if (n <= 0) return;
    if (c.dropout.scale) weigh<true>(t, side, key, from, n, s);
    else weigh<false>(t, side, key, from, n, s);
    if (c.dmask) add_to_mask(h, t, key + from, n, s);
    const char *P = reinterpret_cast<char*>(s.scores), *dS = reinterpret_cast<char*>(s.d_scores);
    const int64_t row_bytes = 4 * QUERY_TILE, words = side.padded;
    // dV += P^T dO, dKhat += dS^T Qhat, dQhat^T += Khat^T dS^T.
    product<false, false>(P, row_bytes, s.grad + t.place * QUERY_TILE * vp, vp, n, t.rows,
                          int(vp / LANES), {s.d_v + from * vp, vp, 1.f, nullptr, true});
    product<false, false>(dS, row_bytes, side.rows + t.place * QUERY_TILE * words, words, n, t.rows,
                          int(words / LANES), {side.d_k + from * words, words, 1.f, nullptr, true});
    product<false, true>(reinterpret_cast<char*>(side.panels), 4 * KEY_TILE, s.d_scores, QUERY_TILE,
                         side.width, n, t.vectors,
                         {side.d_rows_t + t.place * QUERY_TILE * words, QUERY_TILE, 1.f, s.ones});
  }

  // What the tiles of one block and n keys from `key` on add to dV, dKhat and dQhat; the first
  // `known` of them by Qhat and Khat.
  void meet(const Head& h, int64_t first, int64_t stop, int64_t block, int64_t key, int64_t n,
            int64_t known, Scratch& s) const {
    tiles(first, stop, [&](const Tile& t) {
      if (t.block != block) return;
      const int64_t seen = std::min(n, keys_seen(t.row + t.rows) - key);
      if (seen <= 0 || (c.mask_kind != NONE && !read_bias(h, t, key, seen, s))) return;
      if (c.dropout.scale)
        read_dropout(c.dropout, h.batch, h.head, t.row, key, seen, t.vectors,
                     float(c.dropout.scale), s.stays);
      add(h, t, s.hat, key, 0, std::min(seen, known), s);
      if (c.strict) add(h, t, s.exact, key, known, seen - known, s);
    });
  }

  static void add_rows(const float* from, int64_t words, int64_t n, int64_t width, float* to,
                       int64_t row_stride) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < width; i++) to[j * row_stride + i] += from[j * words + i];
  }

  void chunk(const Head& h, int64_t first, int64_t stop, Scratch& s) const {
    // The chunk's rows are read once; then every key tile meets them.
    tiles(first, stop, [&](const Tile& t) { read_tile(h, t, s); });
    const int64_t end = keys_seen(stop);
    for (int64_t key = 0; key < end; key += KEY_TILE) {
      const int64_t n = std::min<int64_t>(KEY_TILE, end - key);
      read_keys(h.key_batch, h.key_head, key, n, s);
      // Sums of this chunk, which are added to dK and dV when the tile is done.
      zero(s.d_v, n * vp);
      zero(s.d_k, n * dp);
      for (int64_t block = first / c.block; block * c.block < stop; block++) {
        if (keys_seen(std::min(stop, (block + 1) * c.block)) <= key) continue;
        const int64_t known = std::max<int64_t>(0, std::min(n, edge_of(block) - key));
        // Khat of the block, and a fresh dKhat, as each block has a B of its own.
        float* d_k_hat = s.hat.d_k;
        zero(d_k_hat, n * rp);
        if (bases && known)
          product<false, false>(reinterpret_cast<char*>(s.k_rows), 4 * dp,
                                basis(c.b, c.basis_strides, h, block), rp, known, d,
                                int(rp / LANES), {s.hat.k, rp, 1.f, nullptr});
        if (PAIRS) narrow(s.hat.k, known * rp, s.hat.k_words);
        pack_panels(s.hat, 0, known);
        if (c.strict) {
          zero(s.exact.d_k, n * dp);
          if (PAIRS) narrow(s.exact.k, n * dp, s.exact.k_words);
          pack_panels(s.exact, known, n - known);
        }
        meet(h, first, stop, block, key, n, known, s);
        // dK += dKhat B^T; where the call is exact Khat is K, and rp is dp.
        for (int64_t i = 0; i < n * rp; i++) d_k_hat[i] *= factor;
        if (bases && known)
          product<false, false>(reinterpret_cast<char*>(d_k_hat), 4 * rp,
                                basis(c.b_t, c.basis_t_strides, h, block), dp, known, r,
                                int(dp / LANES), {s.d_k, dp, 1.f, nullptr, true});
        if (!bases)
          for (int64_t i = 0; i < n * dp; i++) s.d_k[i] += d_k_hat[i];
        if (c.strict)
          for (int64_t i = known * dp; i < n * dp; i++) s.d_k[i] += s.exact.d_k[i] * factor;
      }
      // All blocks of the chunk have added to the tile.
      const int64_t *ks = c.dk_strides, *vs = c.dv_strides;
      add_rows(s.d_k, dp, n, d, c.dk + h.key_batch * ks[0] + h.key_head * ks[1] + key * ks[2],
               ks[2]);
      add_rows(s.d_v, vp, n, dv, c.dv + h.key_batch * vs[0] + h.key_head * vs[1] + key * vs[2],
               vs[2]);
    }
    tiles(first, stop, [&](const Tile& t) { write_tile(h, t, s); });
  }

  void unit(int64_t index, Scratch& s) const {
    const int64_t first_entry = index / c.key_heads * c.entries, key_head = index % c.key_heads;
    // All that shares the key head, in one order.
    for (int64_t entry = first_entry; entry < first_entry + c.entries; entry++)
      for (int64_t i = 0; i < rep; i++)
        for (int64_t first = 0; first < c.queries; first += chunk_rows()) {
          const Head h{entry, key_head * rep + i, entry / c.shares, key_head};
          chunk(h, first, std::min(first + chunk_rows(), c.queries), s);
        }
  }

  static void work(int64_t begin, int64_t end, void* context) {
    Backward& e = *static_cast<Backward*>(context);
    [[maybe_unused]] const TileRegisters registers;
    for (int64_t worker = begin; worker < end; worker++) {
      Scratch s = e.scratch(e.c.workspace + worker * e.scratch_bytes());
      std::fill(s.ones, s.ones + QUERY_TILE, 1.f);
      for (int64_t i; (i = e.next.fetch_add(1, std::memory_order_relaxed)) < e.units;) e.unit(i, s);
    }
  }
  void run() {
    const int64_t n = std::min(c.threads, units);
    if (n <= 1 || !c.parallel_for) work(0, 1, this);
    else c.parallel_for(0, n, 1, work, this);
  }
};

}  // namespace
