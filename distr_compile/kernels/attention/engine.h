// One call of attention: what is packed, and how a tile of query rows walks over the keys.

#pragma once

#include <atomic>

#include "amx.h"
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

// A part of the work whose packed keys and values fit in PACK_BYTES. A unit is a key head of a
// batch entry, a pair is a unit and a grouping block, an item a query tile of a head of a pair.
struct Wave {
  int64_t pair, pairs, tile, tiles, item, items;
  bool first, last;  // of the key tiles of its items
};

// PAIRS: bf16 inputs are multiplied as such; BY_TILES: by the tiles of amx.h.
template <bool PAIRS, bool BY_TILES> struct Engine {
  // Query rows of a task. Tiles are fast enough for the first cache to matter, where fewer fit.
  static constexpr int64_t QUERIES = BY_TILES ? QUERY_TILE / 2 : QUERY_TILE;
  static constexpr int64_t TOGETHER = 256 / QUERIES;  // tasks that go over the keys together

  struct State {  // of one query tile, from its first key to its last
    float *q, *q_exact, *out, *top, *total;
  };
  struct Scratch {  // of one worker
    float *rows, *q_rows, *q_wide, *k_rows, *k_wide;
    float *scores, *weights, *bias, *stays, *rescale;
    State tiles[TOGETHER];
  };

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
        query_tiles((std::min(call.block, call.queries) + QUERIES - 1) / QUERIES),
        key_tiles((call.keys + KEY_TILE - 1) / KEY_TILE), units(call.batch * call.key_heads),
        hat_words(whole_words(bases ? round_up(call.rank, WIDTH_UNIT) : call.rank)),
        exact_words(whole_words(call.head_dim)), padded_rank(round_up(call.rank, WIDTH_UNIT)),
        tile_words(PAIRS ? KEY_TILE / 2 : KEY_TILE) {
    v_words = round_up(tile_words * c.value_dim, 16);
    unit_words = v_words + (c.strict && !exact_direct ? KEY_TILE * exact_words : 0);
    pair_words = k_direct ? 0 : KEY_TILE * hat_words;
  }

  // Keys that can be multiplied where they lie. Far apart they would miss every cache: packed.
  bool is_direct(int64_t row_stride, int64_t stride, int64_t width) const {
    const bool kind = PAIRS ? c.dtype == BF16 && width % 2 == 0 : c.dtype == F32;
    const bool fills = !BY_TILES || (width % (2 * TILE) == 0 && c.keys % TILE == 0);
    return kind && fills && stride == 1 && (row_stride == width || c.queries <= 2 * QUERIES);
  }
  // Words of a row of Q, Qhat, K or Khat; where products are by tiles they fill these, with zeros.
  int64_t whole_words(int64_t width) const {
    return round_up(words_of(PAIRS, width), BY_TILES ? TILE : 1);
  }
  // O^T, top and total of a query tile.
  int64_t state_words() const { return round_up((c.value_dim + 2) * QUERIES, 16); }
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
      s.q_rows = arena.take(c.head_dim * QUERIES);
      s.k_rows = arena.take(KEY_TILE * c.head_dim);
      if (PAIRS) s.q_wide = arena.take((c.rank + 1) * QUERIES);
      if (PAIRS) s.k_wide = arena.take(KEY_TILE * padded_rank);
    }
    // [key][QUERIES]; P takes the place of S, but as pairs of keys it has one of its own.
    s.scores = s.weights = arena.take(KEY_TILE * QUERIES);
    if (PAIRS) s.weights = arena.take(KEY_TILE / 2 * QUERIES);
    if (c.mask_kind != NONE) s.bias = arena.take(KEY_TILE * QUERIES);
    if (c.dropout.scale) s.stays = arena.take(KEY_TILE * QUERIES);
    s.rescale = arena.take(QUERIES);
    for (State& tile : s.tiles) {
      tile.q = arena.take(whole_words(c.rank) * QUERIES);
      if (c.strict) tile.q_exact = arena.take(exact_words * QUERIES);
      tile.out = arena.take(c.value_dim * QUERIES);
      tile.top = arena.take(QUERIES);
      tile.total = arena.take(QUERIES);
    }
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

  // V in panels of ROWS columns (then 4, 2, 1), keys one after another in a panel; or, for products
  // by tiles, turned: the words of a column one after another.
  void pack_v(int64_t unit, int64_t tile, Scratch& s) const {
    const int64_t* st = c.v_strides;
    const int64_t first = tile * KEY_TILE, n = std::min<int64_t>(KEY_TILE, c.keys - first);
    const char* from = at(c.v, unit / c.key_heads * st[0] + unit % c.key_heads * st[1]);
    float* to = packed_v(unit, tile);
    if (BY_TILES) return turn_v(from + first * st[2] * element_bytes(c.dtype), n, s.rows, to);
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
  // A tile of V: rows of bf16 pairs of keys, 2 LANES keys at a time, become columns.
  void turn_v(const char* from, int64_t n, float* rows, float* to) const {
    const int64_t* st = c.v_strides;
    const int64_t padded = round_up(c.value_dim, LANES);
    for (int64_t j = 0; j < n; j += 2 * LANES) {
      for (int k = 0; k < LANES; k++) {
        const int64_t key = j + 2 * k;
        const char* row = from + key * st[2] * 2;
        float* words = rows + k * padded;
        if (key < n) join_rows(row, key + 1 < n ? row + 2 * st[2] : nullptr, st[3], words);
        else std::memset(words, 0, 4 * padded);
      }
      for (int64_t column = 0; column < c.value_dim; column += LANES) {
        vf x[LANES];
        for (int k = 0; k < LANES; k++) x[k] = load<vf>(rows + k * padded + column);
        transpose(x);
        for (int64_t k = 0; k < std::min<int64_t>(LANES, c.value_dim - column); k++)
          store(to + (column + k) * tile_words + j / 2, x[k]);
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
    for (int64_t j = 0; j < n; j++) {
      float* row = packed_exact(unit, tile) + j * exact_words;
      read_words(PAIRS, exact_at(unit, first + j), c.dtype, c.k_exact_strides[3], c.head_dim, row);
      clear(row, words_of(PAIRS, c.head_dim), exact_words);
    }
  }

  // Words of a row from `words` on are 0.
  static void clear(float* row, int64_t words, int64_t all) {
    if (words < all) std::memset(row + words, 0, 4 * (all - words));
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
      for (int64_t j = 0; j < n; j++) {
        float* row = to + j * hat_words;
        read_words(PAIRS, k_at(pair, first + j), c.dtype, c.k_strides[4], c.rank, row);
        clear(row, words_of(PAIRS, c.rank), hat_words);
      }
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
      for (int64_t j = 0; j < n; j++) {
        float* row = to + j * hat_words;
        narrow(wide + j * padded_rank, padded_rank, row);
        clear(row, padded_rank / 2, hat_words);
      }
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
    int64_t pair, unit, block, batch, head, row, rows, end;  // end: one past the last key it sees
    int vectors;
    State state;
  };

  // Qhat^T = A^T Q^T (or Q^T as given), and for the strict form Q^T.
  void read_queries(const Item& t, Scratch& s) const {
    const int64_t *st = c.q_strides, edge = edge_of(t.block);
    const char* from = at(c.q, t.batch * st[0] + t.head * st[1] + t.row * st[2]);
    auto clear_words = [](float* q, int64_t words, int64_t all) {
      clear(q, words * QUERIES, all * QUERIES);
    };
    // Q itself only where these rows see keys beyond the edge.
    if (c.strict && edge < keys_seen(t.row + t.rows)) {
      const int64_t* e = c.q_exact_strides;
      read_transposed(PAIRS, at(c.q_exact, t.batch * e[0] + t.head * e[1] + t.row * e[2]), c.dtype,
                      e[2], e[3], t.rows, c.head_dim, s.rows, t.state.q_exact, QUERIES);
      clear_words(t.state.q_exact, words_of(PAIRS, c.head_dim), exact_words);
    }
    if (!edge) return;  // no key is scored by Qhat
    clear_words(t.state.q, words_of(PAIRS, c.rank), whole_words(c.rank));
    if (!bases)
      return read_transposed(PAIRS, from, c.dtype, st[2], st[3], t.rows, c.rank, s.rows, t.state.q,
                             QUERIES);
    read_transposed(false, from, c.dtype, st[2], st[3], t.rows, c.head_dim, s.rows, s.q_rows,
                    QUERIES);
    const float* A = c.a + t.batch * c.a_strides[0] + t.unit % c.key_heads * c.a_strides[1] +
                     t.block * c.a_strides[2];
    float* wide = PAIRS ? s.q_wide : t.state.q;
    product<false, false>(reinterpret_cast<const char*>(A), 4 * c.head_dim, s.q_rows, QUERIES,
                          c.rank, c.head_dim, t.vectors, {wide, QUERIES, 1.f, nullptr});
    if (!PAIRS) return;
    // Two columns of Qhat side by side as one of bf16 pairs, an odd last one beside zeros.
    if (c.rank % 2) std::memset(wide + c.rank * QUERIES, 0, 4 * QUERIES);
    for (int64_t i = 0; i < c.rank; i += 2)
      for (int u = 0; u < t.vectors; u++) {
        const float* p = wide + i * QUERIES + u * LANES;
        store(t.state.q + i / 2 * QUERIES + u * LANES, pair_of(load<vf>(p), load<vf>(p + QUERIES)));
      }
  }

  // The bias of a tile; false where it hides every key from every row.
  bool read_bias(const Item& t, int64_t key, int64_t n, Scratch& s) const {
    const int64_t* st = c.mask_strides;
    const int64_t place = t.batch * st[0] + t.head * st[1] + t.row * st[2] + key * st[3];
    return read_mask(c.mask, place, c.mask_kind, st[2], st[3], t.rows, n, s.rows, s.bias,
                     QUERIES);
  }

  // Whether the softmax multiplies scores by the scale, and `top` is without it: where nothing
  // comes between a product by tiles and the softmax.
  bool factor_is_left() const {
    return BY_TILES && !c.softcap && !c.sinks && c.mask_kind == NONE && c.scale > 0;
  }

  // Scores of n keys from `key` on, after soft cap, bias and causality.
  void score(const Item& t, int64_t key, int64_t n, Scratch& s) const {
    const float factor = factor_is_left() ? 1.f : float(c.softcap ? c.scale / c.softcap : c.scale);
    const bool fills = BY_TILES && !c.strict;  // rows after the last key are there to be read
    const int64_t tile = key / KEY_TILE;
    // The first `known` keys of the tile by Qhat and Khat, the others by Q and K.
    const int64_t known = std::max<int64_t>(0, std::min(n, edge_of(t.block) - key));
    if (known) {
      const bool direct = k_direct;
      const char* rows =
          direct ? k_at(t.pair, key) : reinterpret_cast<char*>(packed_k(t.pair, tile));
      const int64_t bytes = direct ? c.k_strides[3] * element_bytes(c.dtype) : 4 * hat_words;
      product_by_rows<PAIRS>(rows, bytes, t.state.q, QUERIES, fills ? round_up(known, TILE) : known,
                             whole_words(c.rank), t.vectors,
                             {s.scores, QUERIES, factor, nullptr});
    }
    if (known < n) {
      const char* rows = exact_at(t.unit, key + known);
      int64_t bytes = c.k_exact_strides[2] * element_bytes(c.dtype);
      if (!exact_direct) {
        rows = reinterpret_cast<char*>(packed_exact(t.unit, tile) + known * exact_words);
        bytes = 4 * exact_words;
      }
      product_by_rows<PAIRS>(rows, bytes, t.state.q_exact, QUERIES, n - known, exact_words,
                             t.vectors, {s.scores + known * QUERIES, QUERIES, factor, nullptr});
    }
    auto each = [&](auto&& change) {
      for (int64_t j = 0; j < n; j++)
        for (int u = 0; u < t.vectors; u++) {
          float* p = s.scores + j * QUERIES + u * LANES;
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
          return add(x, load<vf>(bias + j * QUERIES + u * LANES));
        });
      else each([&](vf x, int64_t j, int) { return add(x, splat(bias[j])); });
    }
    // Only in tiles with a key that the first row does not see.
    if (c.is_causal && key + n - 1 > t.row + c.causal_offset)
      each([&](vf x, int64_t j, int u) {
        const int64_t first = key + j - c.causal_offset - t.row;  // row that sees the key
        const int32_t from = int32_t(std::min<int64_t>(first, QUERIES));
        return iota() + u * LANES >= from ? x : splat(-INFINITY);
      });
  }

  // The largest of n scores of each row of a vector; NaN is none.
  static vf highest(const float* scores, int64_t n) {
    vf top[4];  // shorter chains
    for (vf& x : top) x = splat(-INFINITY);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int i = 0; i < 4; i++) top[i] = vmax(load<vf>(scores + (j + i) * QUERIES), top[i]);
    for (; j < n; j++) top[0] = vmax(load<vf>(scores + j * QUERIES), top[0]);
    return vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
  }

  // One step of the running softmax and O^T = O^T * rescale + V^T P^T. Dropped weights count in the
  // sum of all, and those that stay are scaled when the row is finished.
  template <bool DROPS> void accumulate(const Item& t, int64_t key, int64_t n, Scratch& s) const {
    const float factor = factor_is_left() ? float(c.scale) : 1.f;
    if (DROPS)
      read_dropout(c.dropout, t.batch, t.head, t.row, key, n, t.vectors, 1.f, s.stays, QUERIES);
    for (int u = 0; u < t.vectors; u++) {
      const int at = u * LANES;
      // LANES rows: their maximum so far, then P and its sum.
      const vf before = load<vf>(t.state.top + at);
      const vf top = vmax(highest(s.scores + at, n), before);
      vf sum[4] = {};  // four sums: shorter chains, smaller rounding
      auto weight = [&](int64_t j, vf& sum) {
        const vf x = load<vf>(s.scores + j * QUERIES + at) - top;  // 0 at the largest
        const vf p = PAIRS ? exp_of_pairs(x, factor) : exp_negative(x);
        sum += p;
        return DROPS ? p * load<vf>(s.stays + j * QUERIES + at) : p;
      };
      float* to = s.weights + at;
      int64_t j = 0;
      // Four keys a step, each in a sum of its own; those that are left go into the first ones.
      if constexpr (PAIRS) {
        auto weigh = [&](int64_t j, vf& low, vf& high) {
          const vf p = weight(j, low);
          store(to + j / 2 * QUERIES, pair_of(p, weight(j + 1, high)));
        };
        for (; j + 4 <= n; j += 4) weigh(j, sum[0], sum[1]), weigh(j + 2, sum[2], sum[3]);
        if (j + 2 <= n) weigh(j, sum[0], sum[1]), j += 2;
        if (j < n) store(to + j / 2 * QUERIES, pair_of(weight(j, sum[0]), vf{})), j += 2;
        for (; BY_TILES && j % (2 * TILE); j += 2) store(to + j / 2 * QUERIES, vi{});
      } else {
        for (; j + 4 <= n; j += 4)
          for (int i = 0; i < 4; i++) store(to + (j + i) * QUERIES, weight(j + i, sum[i]));
        for (; j < n; j++) store(to + j * QUERIES, weight(j, sum[0]));
      }
      const vf rescale = exp_negative((before - top) * factor);
      store(s.rescale + at, rescale);
      store(t.state.top + at, top);
      const vf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      store(t.state.total + at, load<vf>(t.state.total + at) * rescale + all);
    }
    const char* v = reinterpret_cast<const char*>(packed_v(t.unit, key / KEY_TILE));
    const Target out{t.state.out, QUERIES, 1.f, s.rescale};
    constexpr auto add = BY_TILES ? product_by_rows<PAIRS> : product<PAIRS, true>;
    add(v, 4 * tile_words, s.weights, QUERIES, c.value_dim, whole_words(n), t.vectors, out);
  }

  void start(const Item& t) const {
    std::memset(t.state.out, 0, 4 * c.value_dim * QUERIES);
    // From the lowest number on: a score of -inf adds e^-inf = 0, a row that sees no key stays 0.
    float top = -FLT_MAX, total = 0;
    if (c.sinks) {  // a first key without a value
      top = std::max(top, c.sinks[t.head]);
      total = std::exp(c.sinks[t.head] - top);
    }
    std::fill(t.state.top, t.state.top + QUERIES, top);
    std::fill(t.state.total, t.state.total + QUERIES, total);
  }

  void finish(const Item& t) const {
    const int64_t *st = c.out_strides, bytes = element_bytes(c.dtype);
    char* to = static_cast<char*>(c.out);
    to += (t.batch * st[0] + t.head * st[1] + t.row * st[2]) * bytes;
    for (int u = 0; u < t.vectors; u++) {
      vf total = load<vf>(t.state.total + u * LANES);
      total = total == 0.f ? splat(1.f) : total;  // a row without keys stays 0
      if (c.dropout.scale) total = total / float(c.dropout.scale);  // so O is multiplied by it
      // Columns of O^T become rows, LANES x LANES at a time.
      for (int64_t i = 0; i < c.value_dim; i += LANES) {
        const int64_t n = std::min<int64_t>(LANES, c.value_dim - i);
        vf x[LANES];
        for (int k = 0; k < LANES; k++)
          x[k] = k < n ? load<vf>(t.state.out + (i + k) * QUERIES + u * LANES) / total : vf{};
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
    const float factor = factor_is_left() ? float(c.scale) : 1.f;
    for (int64_t i = 0; i < t.rows; i++)
      c.lse[t.batch * ls[0] + t.head * ls[1] + (t.row + i) * ls[2]] =
          t.state.total[i] == 0 ? -INFINITY : t.state.top[i] * factor + std::log(t.state.total[i]);
  }

  // An item of the wave; nothing of one whose rows the block has not.
  bool find(int64_t index, Item& t) const {
    if (c.is_causal) index = wave.items - 1 - index;  // long rows first
    const int64_t item = wave.item + index;
    // Items by pair, then query head, then tile, which varies fastest.
    const int64_t tile = item % query_tiles, block = item / items_in_pair();
    t.pair = wave.pair + block;
    t.unit = t.pair / blocks;
    t.block = t.pair % blocks;
    t.batch = t.unit / c.key_heads;
    t.head = t.unit % c.key_heads * rep + item / query_tiles % rep;
    t.row = t.block * c.block + tile * QUERIES;
    const int64_t stop = std::min(std::min((t.block + 1) * c.block, c.queries), t.row + QUERIES);
    if (stop <= t.row) return false;  // the last block may be shorter
    t.rows = stop - t.row;
    t.vectors = int((t.rows + LANES - 1) / LANES);
    t.end = std::min(keys_seen(stop), (wave.tile + wave.tiles) * KEY_TILE);
    if (wave.first && wave.last) return true;
    float* saved = state + index_in_state(item) * state_words();
    t.state.out = saved;
    t.state.top = saved + c.value_dim * QUERIES;
    t.state.total = t.state.top + QUERIES;
    return true;
  }

  // Some items together, so that a tile of keys and values is fetched once for all of them.
  void attend(int64_t index, Scratch& s) const {
    Item items[TOGETHER];
    int number = 0;
    int64_t end = 0;
    for (int64_t i = index * together; i < std::min((index + 1) * together, wave.items); i++) {
      Item& t = items[number];
      t = Item{};
      t.state = s.tiles[number];
      if (!find(i, t)) continue;
      number++;
      if (wave.first) start(t);
      read_queries(t, s);
      end = std::max(end, t.end);
    }
    for (int64_t key = wave.tile * KEY_TILE; key < end; key += KEY_TILE)
      for (int i = 0; i < number; i++) {
        const Item& t = items[i];
        const int64_t n = std::min<int64_t>(KEY_TILE, t.end - key);
        if (n <= 0 || (c.mask_kind != NONE && !read_bias(t, key, n, s))) continue;
        score(t, key, n, s);
        if (c.dropout.scale) accumulate<true>(t, key, n, s);
        else accumulate<false>(t, key, n, s);
      }
    for (int i = 0; i < number; i++)
      if (wave.last) finish(items[i]);
  }
  int64_t index_in_state(int64_t item) const { return item - wave.item; }

  // ---- the walk ---------------------------------------------------------------------------------

  bool packing = false;
  int64_t total = 0, together = 1;

  static void work(int64_t begin, int64_t end, void* context) {
    Engine& e = *static_cast<Engine*>(context);
    [[maybe_unused]] const TileRegisters registers;
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
    // Fewer where that leaves a thread without work.
    together = std::max<int64_t>(1, std::min(TOGETHER, wave.items / (2 * c.threads)));
    phase(false, (wave.items + together - 1) / together);
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
