// One call of attention: what is packed, and how a tile of query rows walks over the keys.

#pragma once

#include <atomic>

#include "dropout.h"
#include "vectors.h"

// The arguments of one call. Strides are in elements, those of a broadcast dimension are 0.
struct Call {
  int64_t size;          // sizeof(Call), to tell a library from an older caller
  const void *q, *k, *v, *mask;
  const void *q_exact, *k_exact;  // of the strict form: (B, H, N, d) and (B, H_k, M, d)
  const float *a, *b;             // A^T (r, d) and B (d, padded r) per head and block, or null
  const float* sinks;             // (H,)
  void* out;
  float* lse;                 // (B, H, N) or null
  int64_t q_strides[4];       // batch, head, row, column
  int64_t k_strides[5];       // batch, head, block, row, column
  int64_t v_strides[4];
  int64_t mask_strides[4];    // batch, head, row, key
  int64_t q_exact_strides[4];
  int64_t k_exact_strides[4];
  int64_t a_strides[3];       // batch, head, block
  int64_t b_strides[3];
  int64_t out_strides[4];
  int64_t lse_strides[3];
  int64_t batch, heads, key_heads, queries, keys;
  int64_t rank, head_dim, value_dim;
  int64_t block;              // query rows that share a Khat, and A and B
  int64_t is_causal, causal_offset;
  int64_t strict;             // 1: the first block has no Khat, 2: it follows others
  int64_t dtype, mask_kind;
  double scale, softcap;
  Dropout dropout;
  ParallelFor parallel_for;
  int64_t threads;
  char* workspace;            // distr_workspace(call) bytes, 64-byte aligned
};

namespace {

// Cuts 64-byte aligned pieces off a workspace; with base 0 it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  float* take(int64_t words) {
    float* p = reinterpret_cast<float*>(base + used);
    used += round_up(4 * words, 64);
    return p;
  }
};

struct Scratch {  // of one worker
  float *rows, *q_rows, *q_wide, *q, *q_exact, *k_rows, *k_wide;
  float *scores, *weights, *bias, *stays, *out, *top, *total, *rescale;
};

// A part of the work whose packed keys and values fit in PACK_BYTES. A unit is a key head of a
// batch entry, a pair is a unit and a grouping block, an item a query tile of a head of a pair.
struct Wave {
  int64_t pair, pairs, tile, tiles, item, items;
  bool first, last;  // of the key tiles of its items
};

template <bool PAIRS> struct Engine {
  const Call& c;
  // Whether factors are made here; whether K, and exact K, are read where they lie.
  const bool bases, k_direct, exact_direct;
  // rep: query heads of a key head; query_tiles: of one block.
  const int64_t rep, blocks, query_tiles, key_tiles, units;
  // Words of a packed key, by Khat and by K; tile_words: of one column of V in a key tile.
  const int64_t hat_words, exact_words, padded_rank, tile_words;
  int64_t unit_words, v_words, pair_words;  // per key tile
  Wave wave{};
  std::atomic<int64_t> next{0};

  explicit Engine(const Call& call)
      : c(call), bases(call.a != nullptr),
        k_direct(!bases && is_direct(call.k_strides[3], call.k_strides[4], call.rank)),
        exact_direct(is_direct(call.k_exact_strides[2], call.k_exact_strides[3], call.head_dim)),
        rep(call.heads / call.key_heads), blocks((call.queries + call.block - 1) / call.block),
        query_tiles((std::min(call.block, call.queries) + QUERY_TILE - 1) / QUERY_TILE),
        key_tiles((call.keys + KEY_TILE - 1) / KEY_TILE), units(call.batch * call.key_heads),
        hat_words(words_of(PAIRS, bases ? round_up(call.rank, WIDTH_UNIT) : call.rank)),
        exact_words(words_of(PAIRS, call.head_dim)), padded_rank(round_up(call.rank, WIDTH_UNIT)),
        tile_words(PAIRS ? KEY_TILE / 2 : KEY_TILE) {
    v_words = round_up(tile_words * c.value_dim, 16);
    unit_words = v_words + (c.strict && !exact_direct ? KEY_TILE * exact_words : 0);
    pair_words = k_direct ? 0 : KEY_TILE * hat_words;
  }

  // Keys that can be multiplied where they lie. Far apart they would miss every cache: packed.
  bool is_direct(int64_t row_stride, int64_t stride, int64_t width) const {
    const bool kind = PAIRS ? c.dtype == BF16 && width % 2 == 0 : c.dtype == F32;
    return kind && stride == 1 && (row_stride == width || c.queries <= 2 * QUERY_TILE);
  }
  // O^T, top and total of a query tile.
  int64_t state_words() const { return round_up((c.value_dim + 2) * QUERY_TILE, 16); }
  int64_t pack_tiles() const {  // key tiles of one unit and one pair that fit
    return std::max<int64_t>(1, std::min(key_tiles, PACK_BYTES / 4 / (unit_words + pair_words)));
  }
  bool in_parts() const { return pack_tiles() < key_tiles; }
  int64_t items_in_pair() const { return rep * query_tiles; }
  int64_t items_with_state() const {
    return std::max<int64_t>(1, std::min(items_in_pair(), STATE_BYTES / 4 / state_words()));
  }
  int64_t pack_words() const {
    const int64_t all = key_tiles * (units * unit_words + units * blocks * pair_words);
    return std::min(all, std::max<int64_t>(PACK_BYTES / 4, unit_words + pair_words));
  }

  Scratch scratch(Arena& arena) const {
    Scratch s{};
    // Room for LANES rows of Q or a mask, to be transposed, or for one of V.
    const int64_t widest = std::max({c.head_dim, c.rank, c.value_dim, int64_t(KEY_TILE)});
    s.rows = arena.take(LANES * round_up(widest, LANES));
    // Q^T and rows of K in fp32, from which the factors are made; the factors before rounding.
    if (bases) {
      s.q_rows = arena.take(c.head_dim * QUERY_TILE);
      s.k_rows = arena.take(KEY_TILE * c.head_dim);
      if (PAIRS) s.q_wide = arena.take((c.rank + 1) * QUERY_TILE);
      if (PAIRS) s.k_wide = arena.take(KEY_TILE * padded_rank);
    }
    s.q = arena.take(words_of(PAIRS, c.rank) * QUERY_TILE);
    if (c.strict) s.q_exact = arena.take(exact_words * QUERY_TILE);
    // [key][QUERY_TILE]; P takes the place of S, but as pairs of keys it has one of its own.
    s.scores = s.weights = arena.take(KEY_TILE * QUERY_TILE);
    if (PAIRS) s.weights = arena.take(KEY_TILE / 2 * QUERY_TILE);
    if (c.mask_kind != NONE) s.bias = arena.take(KEY_TILE * QUERY_TILE);
    if (c.dropout.scale) s.stays = arena.take(KEY_TILE * QUERY_TILE);
    s.out = arena.take(c.value_dim * QUERY_TILE);
    s.top = arena.take(QUERY_TILE);
    s.total = arena.take(QUERY_TILE);
    s.rescale = arena.take(QUERY_TILE);
    return s;
  }

  int64_t workspace() const {
    // The same pieces in the same order as run() and work() take them.
    Arena arena{nullptr};
    arena.take(pack_words());
    if (in_parts()) arena.take(items_with_state() * state_words());
    for (int64_t i = 0; i < c.threads; i++) scratch(arena);
    return arena.used;
  }

  // ---- where things lie -------------------------------------------------------------------------

  float *packs = nullptr, *state = nullptr;
  Arena workers{nullptr};

  // Packs of a wave: for each unit its key tiles, V and then exact K; behind them Khat by pair.
  int64_t first_unit() const { return wave.pair / blocks; }
  int64_t wave_units() const { return (wave.pair + wave.pairs - 1) / blocks - first_unit() + 1; }
  float* packed_v(int64_t unit, int64_t tile) const {
    return packs + ((unit - first_unit()) * wave.tiles + tile - wave.tile) * unit_words;
  }
  float* packed_exact(int64_t unit, int64_t tile) const { return packed_v(unit, tile) + v_words; }
  float* packed_k(int64_t pair, int64_t tile) const {
    return packs + wave_units() * wave.tiles * unit_words +
           ((pair - wave.pair) * wave.tiles + tile - wave.tile) * pair_words;
  }
  const char* at(const void* base, int64_t offset) const {
    return static_cast<const char*>(base) + offset * element_bytes(c.dtype);
  }
  const char* k_at(int64_t pair, int64_t key) const {
    const int64_t unit = pair / blocks, *s = c.k_strides;
    return at(c.k, unit / c.key_heads * s[0] + unit % c.key_heads * s[1] + pair % blocks * s[2] +
                       key * s[3]);
  }
  const char* exact_at(int64_t unit, int64_t key) const {
    const int64_t* s = c.k_exact_strides;
    return at(c.k_exact, unit / c.key_heads * s[0] + unit % c.key_heads * s[1] + key * s[2]);
  }
  int64_t edge_of(int64_t block) const {  // keys before it are scored by Qhat and Khat
    if (!c.strict) return c.keys;
    if (!block && c.strict != 2) return 0;
    return std::max<int64_t>(0, std::min(c.keys, block * c.block + c.causal_offset));
  }
  int64_t keys_seen(int64_t last_row) const {  // by rows before last_row
    if (!c.is_causal) return c.keys;
    return std::max<int64_t>(0, std::min(c.keys, last_row + c.causal_offset));
  }

  // ---- packing ----------------------------------------------------------------------------------

  // V in panels of ROWS columns (then 4, 2, 1), keys one after another in a panel.
  void pack_v(int64_t unit, int64_t tile, Scratch& s) const {
    const int64_t* st = c.v_strides;
    const int64_t first = tile * KEY_TILE, n = std::min<int64_t>(KEY_TILE, c.keys - first);
    const char* from = at(c.v, unit / c.key_heads * st[0] + unit % c.key_heads * st[1]);
    float* to = packed_v(unit, tile);
    for (int64_t j = 0; j < n; j += PAIRS ? 2 : 1) {
      const char* row = from + (first + j) * st[2] * element_bytes(c.dtype);
      // A row that lies as it is wanted is copied from there.
      const float* words = s.rows;
      if (PAIRS) join_rows(row, j + 1 < n ? row + 2 * st[2] : nullptr, st[3], s.rows);
      else if (c.dtype == F32 && st[3] == 1) words = reinterpret_cast<const float*>(row);
      else read_floats(row, c.dtype, st[3], c.value_dim, s.rows);
      const int64_t place = PAIRS ? j / 2 : j;
      int64_t column = 0;
      for (; column + ROWS <= c.value_dim; column += ROWS)
        std::memcpy(to + column * tile_words + place * ROWS, words + column, 4 * ROWS);
      for (; column < c.value_dim;) {
        const int64_t step = next_rows(c.value_dim - column);
        std::memcpy(to + column * tile_words + place * step, words + column, 4 * step);
        column += step;
      }
    }
  }
  // Values of two keys as words, the first in the low half; 0 for a second that is missing.
  void join_rows(const char* low, const char* high, int64_t stride, float* to) const {
    const uint16_t *p = reinterpret_cast<const uint16_t*>(low),
                   *q = reinterpret_cast<const uint16_t*>(high);
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    const int64_t n = c.value_dim;
    if (!q) for (int64_t i = 0; i < n; i++) words[i] = p[i * stride];
    else if (stride == 1) for (int64_t i = 0; i < n; i++) words[i] = p[i] | uint32_t(q[i]) << 16;
    else for (int64_t i = 0; i < n; i++) words[i] = p[i * stride] | uint32_t(q[i * stride]) << 16;
  }

  void pack_exact(int64_t unit, int64_t tile) const {
    const int64_t first = tile * KEY_TILE, n = std::min<int64_t>(KEY_TILE, c.keys - first);
    for (int64_t j = 0; j < n; j++)
      read_words(PAIRS, exact_at(unit, first + j), c.dtype, c.k_exact_strides[3], c.head_dim,
                 packed_exact(unit, tile) + j * exact_words);
  }

  // Khat = K B, or K as it is given.
  void pack_k(int64_t pair, int64_t tile, Scratch& s) const {
    const int64_t first = tile * KEY_TILE, unit = pair / blocks, block = pair % blocks;
    const int64_t rows_end = std::min((block + 1) * c.block, c.queries);
    // No more than is scored by Khat and seen by a row of the block.
    const int64_t end = std::min(edge_of(block), keys_seen(rows_end));
    const int64_t n = std::min<int64_t>(KEY_TILE, end - first);
    if (n <= 0) return;
    float* to = packed_k(pair, tile);
    if (!bases) {
      for (int64_t j = 0; j < n; j++)
        read_words(PAIRS, k_at(pair, first + j), c.dtype, c.k_strides[4], c.rank,
                   to + j * hat_words);
      return;
    }
    // K as rows of fp32: where it lies, or converted.
    const char* rows = k_at(pair, first);
    int64_t row_bytes = 4 * c.k_strides[3];
    if (c.dtype != F32 || c.k_strides[4] != 1) {
      for (int64_t j = 0; j < n; j++)
        read_floats(k_at(pair, first + j), c.dtype, c.k_strides[4], c.head_dim,
                    s.k_rows + j * c.head_dim);
      rows = reinterpret_cast<const char*>(s.k_rows);
      row_bytes = 4 * c.head_dim;
    }
    const float* B = c.b + unit / c.key_heads * c.b_strides[0] +
                     unit % c.key_heads * c.b_strides[1] + block * c.b_strides[2];
    float* wide = PAIRS ? s.k_wide : to;
    product<false, false>(rows, row_bytes, B, padded_rank, n, c.head_dim, int(padded_rank / LANES),
                          {wide, padded_rank, 1.f, nullptr});
    if (PAIRS) {
      uint16_t* narrow = reinterpret_cast<uint16_t*>(to);
      for (int64_t i = 0; i < n * padded_rank; i++) narrow[i] = uint16_t(bf16_of(wide[i]));
    }
  }

  void pack(int64_t index, Scratch& s) const {
    const int64_t group = index / wave.tiles, tile = wave.tile + index % wave.tiles;
    if (group < wave_units()) {
      pack_v(first_unit() + group, tile, s);
      if (c.strict && !exact_direct) pack_exact(first_unit() + group, tile);
    } else {
      pack_k(wave.pair + group - wave_units(), tile, s);
    }
  }

  // ---- one query tile ---------------------------------------------------------------------------

  struct Item {
    int64_t pair, unit, block, batch, head, row, rows;
    int vectors;
  };

  // Qhat^T = A^T Q^T (or Q^T as given), and for the strict form Q^T.
  void read_queries(const Item& t, Scratch& s) const {
    const int64_t *st = c.q_strides, edge = edge_of(t.block);
    const char* from = at(c.q, t.batch * st[0] + t.head * st[1] + t.row * st[2]);
    // Q itself only where these rows see keys beyond the edge.
    if (c.strict && edge < keys_seen(t.row + t.rows)) {
      const int64_t* e = c.q_exact_strides;
      read_transposed(PAIRS, at(c.q_exact, t.batch * e[0] + t.head * e[1] + t.row * e[2]), c.dtype,
                      e[2], e[3], t.rows, c.head_dim, s.rows, s.q_exact);
    }
    if (!edge) return;  // no key is scored by Qhat
    if (!bases)
      return read_transposed(PAIRS, from, c.dtype, st[2], st[3], t.rows, c.rank, s.rows, s.q);
    read_transposed(false, from, c.dtype, st[2], st[3], t.rows, c.head_dim, s.rows, s.q_rows);
    const float* A = c.a + t.batch * c.a_strides[0] + t.unit % c.key_heads * c.a_strides[1] +
                     t.block * c.a_strides[2];
    float* wide = PAIRS ? s.q_wide : s.q;
    product<false, false>(reinterpret_cast<const char*>(A), 4 * c.head_dim, s.q_rows, QUERY_TILE,
                          c.rank, c.head_dim, t.vectors, {wide, QUERY_TILE, 1.f, nullptr});
    if (!PAIRS) return;
    if (c.rank % 2) std::memset(wide + c.rank * QUERY_TILE, 0, 4 * QUERY_TILE);
    // Two columns of Qhat side by side as one of bf16 pairs, an odd last one beside zeros.
    for (int64_t i = 0; i < c.rank; i += 2)
      for (int u = 0; u < t.vectors; u++) {
        const float* p = wide + i * QUERY_TILE + u * LANES;
        store(s.q + i / 2 * QUERY_TILE + u * LANES, pair_of(load<vf>(p), load<vf>(p + QUERY_TILE)));
      }
  }

  // The bias of a tile; false where it hides every key from every row.
  bool read_bias(const Item& t, int64_t key, int64_t n, Scratch& s) const {
    const int64_t* st = c.mask_strides;
    const int64_t place = t.batch * st[0] + t.head * st[1] + t.row * st[2] + key * st[3];
    return read_mask(c.mask, place, c.mask_kind, st[2], st[3], t.rows, n, s.rows, s.bias);
  }

  // Scores of n keys from `key` on, after soft cap, bias and causality.
  void score(const Item& t, int64_t key, int64_t n, Scratch& s) const {
    const float factor = float(c.softcap ? c.scale / c.softcap : c.scale);
    const int64_t tile = key / KEY_TILE;
    // The first `known` keys of the tile by Qhat and Khat, the others by Q and K.
    const int64_t known = std::max<int64_t>(0, std::min(n, edge_of(t.block) - key));
    if (known) {
      const bool direct = k_direct;
      const char* rows =
          direct ? k_at(t.pair, key) : reinterpret_cast<char*>(packed_k(t.pair, tile));
      const int64_t bytes = direct ? c.k_strides[3] * element_bytes(c.dtype) : 4 * hat_words;
      product<PAIRS, false>(rows, bytes, s.q, QUERY_TILE, known,
                            words_of(PAIRS, c.rank), t.vectors,
                            {s.scores, QUERY_TILE, factor, nullptr});
    }
    if (known < n) {
      const char* rows = exact_at(t.unit, key + known);
      int64_t bytes = c.k_exact_strides[2] * element_bytes(c.dtype);
      if (!exact_direct) {
        rows = reinterpret_cast<char*>(packed_exact(t.unit, tile) + known * exact_words);
        bytes = 4 * exact_words;
      }
      product<PAIRS, false>(rows, bytes, s.q_exact, QUERY_TILE, n - known, exact_words, t.vectors,
                            {s.scores + known * QUERY_TILE, QUERY_TILE, factor, nullptr});
    }
    auto each = [&](auto&& change) {
      for (int64_t j = 0; j < n; j++)
        for (int u = 0; u < t.vectors; u++) {
          float* p = s.scores + j * QUERY_TILE + u * LANES;
          store(p, change(load<vf>(p), j, u));
        }
    };
    if (c.softcap) each([cap = float(c.softcap)](vf x, int64_t, int) { return tanh_of(x) * cap; });
    if (c.mask_kind != NONE) {
      const float* bias = s.bias;
      auto add = [](vf x, vf y) { return y == -INFINITY ? y : x + y; };  // hides NaN as well
      // A mask that is broadcast over rows has one number a key.
      if (c.mask_strides[2])
        each([&](vf x, int64_t j, int u) {
          return add(x, load<vf>(bias + j * QUERY_TILE + u * LANES));
        });
      else each([&](vf x, int64_t j, int) { return add(x, splat(bias[j])); });
    }
    // Only in tiles with a key that the first row does not see.
    if (c.is_causal && key + n - 1 > t.row + c.causal_offset)
      each([&](vf x, int64_t j, int u) {
        const int64_t first = key + j - c.causal_offset - t.row;  // row that sees the key
        const int32_t from = int32_t(std::min<int64_t>(first, QUERY_TILE));
        return iota() + u * LANES >= from ? x : splat(-INFINITY);
      });
  }

  // One step of the running softmax and O^T = O^T * rescale + V^T P^T. Dropped weights count in the
  // sum of all, and those that stay are scaled when the row is finished.
  template <bool DROPS> void accumulate(const Item& t, int64_t key, int64_t n, Scratch& s) const {
    if (DROPS)
      read_dropout(c.dropout, t.batch, t.head, t.row, key, n, t.vectors, 1.f, s.stays);
    for (int u = 0; u < t.vectors; u++) {
      const int at = u * LANES;
      // LANES rows: their maximum so far, then P and its sum.
      const vf before = load<vf>(s.top + at);
      vf top = before, sum[4] = {};  // four sums: shorter chains, smaller rounding
      for (int64_t j = 0; j < n; j++) top = vmax(load<vf>(s.scores + j * QUERY_TILE + at), top);
      auto weight = [&](int64_t j, int place) {
        const vf p = exp_negative(load<vf>(s.scores + j * QUERY_TILE + at) - top);
        sum[place] += p;
        return DROPS ? p * load<vf>(s.stays + j * QUERY_TILE + at) : p;
      };
      auto weigh = [&](int64_t j, int place) {
        if (PAIRS) {
          const vf p = weight(j, place), q = j + 1 < n ? weight(j + 1, place + 1) : vf{};
          store(s.weights + j / 2 * QUERY_TILE + at, pair_of(p, q));
        } else {
          store(s.weights + j * QUERY_TILE + at, weight(j, place));
        }
      };
      constexpr int STEP = PAIRS ? 2 : 1;
      int64_t j = 0;
      // Four keys a step, each in a sum of its own; those that are left go into the first ones.
      for (; j + 4 <= n; j += 4)
        for (int place = 0; place < 4; place += STEP) weigh(j + place, place);
      for (; j < n; j += STEP) weigh(j, 0);
      const vf rescale = exp_negative(before - top);
      store(s.rescale + at, rescale);
      store(s.top + at, top);
      const vf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      store(s.total + at, load<vf>(s.total + at) * rescale + all);
    }
    const char* v = reinterpret_cast<const char*>(packed_v(t.unit, key / KEY_TILE));
    product<PAIRS, true>(v, 4 * tile_words, s.weights, QUERY_TILE, c.value_dim, words_of(PAIRS, n),
                         t.vectors, {s.out, QUERY_TILE, 1.f, s.rescale});
  }

  void start(const Item& t, Scratch& s) const {
    std::memset(s.out, 0, 4 * c.value_dim * QUERY_TILE);
    // From the lowest number on: a score of -inf adds e^-inf = 0, a row that sees no key stays 0.
    float top = -FLT_MAX, total = 0;
    if (c.sinks) {  // a first key without a value
      top = std::max(top, c.sinks[t.head]);
      total = std::exp(c.sinks[t.head] - top);
    }
    std::fill(s.top, s.top + QUERY_TILE, top);
    std::fill(s.total, s.total + QUERY_TILE, total);
  }

  void finish(const Item& t, Scratch& s) const {
    const int64_t *st = c.out_strides, bytes = element_bytes(c.dtype);
    char* to = static_cast<char*>(c.out);
    to += (t.batch * st[0] + t.head * st[1] + t.row * st[2]) * bytes;
    for (int u = 0; u < t.vectors; u++) {
      vf total = load<vf>(s.total + u * LANES);
      total = total == 0.f ? splat(1.f) : total;  // a row without keys stays 0
      if (c.dropout.scale) total = total / float(c.dropout.scale);  // so O is multiplied by it
      // Columns of O^T become rows, LANES x LANES at a time.
      for (int64_t i = 0; i < c.value_dim; i += LANES) {
        const int64_t n = std::min<int64_t>(LANES, c.value_dim - i);
        vf x[LANES];
        for (int k = 0; k < LANES; k++)
          x[k] = k < n ? load<vf>(s.out + (i + k) * QUERY_TILE + u * LANES) / total : vf{};
        transpose(x);
        for (int k = 0; k < LANES && u * LANES + k < t.rows; k++) {
          float row[LANES];
          store(row, x[k]);
          write_row(row, c.dtype, st[3], n, to + ((u * LANES + k) * st[2] + i * st[3]) * bytes);
        }
      }
    }
    if (!c.lse) return;
    const int64_t* ls = c.lse_strides;
    for (int64_t i = 0; i < t.rows; i++)
      c.lse[t.batch * ls[0] + t.head * ls[1] + (t.row + i) * ls[2]] =
          s.total[i] == 0 ? -INFINITY : s.top[i] + std::log(s.total[i]);
  }

  void attend(int64_t index, Scratch& s) const {
    if (c.is_causal) index = wave.items - 1 - index;  // long rows first
    const int64_t item = wave.item + index;
    // Items by pair, then query head, then tile, which varies fastest.
    const int64_t tile = item % query_tiles, block = item / items_in_pair();
    Item t{};
    t.pair = wave.pair + block;
    t.unit = t.pair / blocks;
    t.block = t.pair % blocks;
    t.batch = t.unit / c.key_heads;
    t.head = t.unit % c.key_heads * rep + item / query_tiles % rep;
    t.row = t.block * c.block + tile * QUERY_TILE;
    const int64_t stop = std::min(std::min((t.block + 1) * c.block, c.queries), t.row + QUERY_TILE);
    if (stop <= t.row) return;  // the last block may be shorter
    t.rows = stop - t.row;
    t.vectors = int((t.rows + LANES - 1) / LANES);
    // Where keys take several waves, O, top and total live on from one to the next.
    if (!(wave.first && wave.last)) {
      float* saved = state + index_in_state(item) * state_words();
      s.out = saved;
      s.top = saved + c.value_dim * QUERY_TILE;
      s.total = s.top + QUERY_TILE;
    }
    if (wave.first) start(t, s);
    read_queries(t, s);
    // Up to the last key of this wave that a row of the tile sees.
    const int64_t end = std::min(keys_seen(stop), (wave.tile + wave.tiles) * KEY_TILE);
    for (int64_t key = wave.tile * KEY_TILE; key < end; key += KEY_TILE) {
      const int64_t n = std::min<int64_t>(KEY_TILE, end - key);
      if (c.mask_kind != NONE && !read_bias(t, key, n, s)) continue;  // adds nothing to any row
      score(t, key, n, s);
      if (c.dropout.scale) accumulate<true>(t, key, n, s);
      else accumulate<false>(t, key, n, s);
    }
    if (wave.last) finish(t, s);
  }
  int64_t index_in_state(int64_t item) const { return item - wave.item; }

  // ---- the walk ---------------------------------------------------------------------------------

  bool packing = false;
  int64_t total = 0;

  static void work(int64_t begin, int64_t end, void* context) {
    Engine& e = *static_cast<Engine*>(context);
    for (int64_t worker = begin; worker < end; worker++) {
      Arena arena{e.workers.base};
      Scratch s{};
      // The worker's own piece lies behind those of the workers before.
      for (int64_t i = 0; i <= worker; i++) s = e.scratch(arena);
      for (int64_t i; (i = e.next.fetch_add(1, std::memory_order_relaxed)) < e.total;) {
        Scratch own = s;  // attend() points it into the state
        if (e.packing) e.pack(i, own);
        else e.attend(i, own);
      }
    }
  }
  void phase(bool is_packing, int64_t count) {
    packing = is_packing;
    total = count;
    next = 0;
    const int64_t n = std::min(c.threads, count);
    if (n <= 1 || !c.parallel_for) work(0, 1, this);
    else c.parallel_for(0, n, 1, work, this);
  }
  void run_wave() {
    // All is packed before any of it is read.
    phase(true, wave.tiles * (wave_units() + (k_direct ? 0 : wave.pairs)));
    phase(false, wave.items);
  }

  void run() {
    Arena arena{c.workspace};
    packs = arena.take(pack_words());
    if (in_parts()) state = arena.take(items_with_state() * state_words());
    workers.base = c.workspace + arena.used;
    const int64_t pairs = units * blocks;
    for (int64_t pair = 0; pair < pairs;) {
      if (in_parts()) {
        // One pair at a time: as many query tiles as the state holds, over all waves of keys.
        for (int64_t item = 0; item < items_in_pair(); item += items_with_state())
          for (int64_t tile = 0; tile < key_tiles; tile += pack_tiles()) {
            const int64_t tiles = std::min(pack_tiles(), key_tiles - tile);
            const int64_t items = std::min(items_with_state(), items_in_pair() - item);
            wave = {pair, 1, tile, tiles, item, items, tile == 0, tile + tiles == key_tiles};
            run_wave();
          }
        pair++;
        continue;
      }
      // All keys at once, for several pairs.
      wave = {pair, 1, 0, key_tiles, 0, items_in_pair(), true, true};
      while (pair + wave.pairs < pairs) {  // as many as fit
        wave.pairs++;
        if (key_tiles * (wave_units() * unit_words + wave.pairs * pair_words) > pack_words()) {
          wave.pairs--;
          break;
        }
      }
      wave.items = wave.pairs * items_in_pair();
      run_wave();
      pair += wave.pairs;
    }
  }
};

}  // namespace
