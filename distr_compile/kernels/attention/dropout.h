// Which weights are dropped: the numbers of dropout.py, LANES query rows at a time.

#pragma once

#include "vectors.h"

// Of a call, or of the part of one that begins at query head `head` (counted through the batch
// entries) and at row `row`. A scale of 0: nothing is dropped.
struct Dropout {
  int64_t seed, threshold, heads, head, row;
  double scale;  // of the weights that stay
};

namespace {

typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

// The high halves of the products of words and a number; the low ones are x * y.
inline vu high_of(vu x, uint32_t y) {
#if defined(__AVX512F__)
  // Products of even and of odd lanes, 64 bits each; their high halves are put side by side.
  const __m512i a = (__m512i)x, b = _mm512_set1_epi64(y);
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  return (vu)_mm512_mask_blend_epi32(0xaaaa, even, odd);
#else
  vu z{};
  for (int i = 0; i < LANES; i++) z[i] = uint32_t(uint64_t(x[i]) * y >> 32);
  return z;
#endif
}

// Philox4x32 of the counters (group, row, head, 0), with the seed as its key.
inline void philox(vu group, vu row, uint32_t head, uint64_t seed, vu* words) {
  constexpr uint32_t A = 0xD2511F53u, B = 0xCD9E8D57u;
  vu c0 = group, c1 = row, c2 = head - vu{}, c3{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const vu a = high_of(c0, A), b = high_of(c2, B), low_a = c0 * A, low_b = c2 * B;
    c0 = b ^ c1 ^ k0, c1 = low_b, c2 = a ^ c3 ^ k1, c3 = low_a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// What the weights of n keys from `key` on, a multiple of 4, and of some rows of a head from `row`
// on are multiplied by, [key][all]: `stays`, or 0 where they are dropped.
void read_dropout(const Dropout& d, int64_t batch, int64_t head, int64_t row, int64_t key,
                  int64_t n, int vectors, float stays, float* to, int64_t all = QUERY_TILE) {
  const uint32_t number = uint32_t(d.head + batch * d.heads + head);
  for (int u = 0; u < vectors; u++) {
    const vu rows = bits<vu>(iota()) + uint32_t(d.row + row + u * LANES);
    // One Philox gives each row the numbers of four successive keys.
    for (int64_t j = 0; j < n; j += 4) {
      vu words[4];
      philox(uint32_t((key + j) / 4) - vu{}, rows, number, uint64_t(d.seed), words);
      for (int64_t i = 0; i < 4 && j + i < n; i++) {
        const vi is_kept = bits<vi>(words[i] >= uint32_t(d.threshold));  // all bits set, or none
        store(to + (j + i) * all + u * LANES, bits<vf>(is_kept & bits<vi>(splat(stays))));
      }
    }
  }
}

}  // namespace
