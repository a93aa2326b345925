// softmax(scale * Qhat Khat^T + mask) V on a CPU, FlashAttention's order, one plain C call.
//
// The lanes of a vector are query rows. A task is one tile of QUERY_TILE rows of one head: its rows
// are transposed once, then every product reads one operand by lanes and broadcasts the other:
//
//     scores   S[j][rows] = sum_c K[j][c] * Q^T[c][rows]      K read as it lies, row by row
//     output   O[c][rows] += sum_j V[j][c] * P[j][rows]       V packed in panels of columns
//     factors  Qhat^T = A^T Q^T and Khat = K B                the same product once more
//
// So softmax works up and down columns (no sum across lanes), and K need not be transposed. Sums
// over keys start anew in every key tile, which keeps fp32 errors at those of a blocked product.
// bf16 inputs are multiplied as such where the CPU has tiles (amx.h) or bf16 dot products (AVX-512);
// otherwise bf16 and fp16 are converted to fp32 when they are packed. Nothing here depends on the
// number of threads but the order in which tasks run: results have equal bits.

#include "backward.h"
#include "engine.h"
#include "projection.h"

namespace {

// Twelve chains of multiplications and additions in registers, and nothing else.
template <bool PAIRS> __attribute__((noinline)) float chains(int64_t rounds, float start) {
  const vf x = splat(start), y = splat(1 - start);
  const int32_t pair = bits<int32_t>(start);
  vf a = x, b = a + x, c = b + x, d = c + x, e = d + x, f = e + x;  // no two alike
  vf g = f + x, h = g + x, i = h + x, j = i + x, k = j + x, l = k + x;
  auto next = [&](vf& sum) { sum = PAIRS ? multiply_add<PAIRS>(sum, pair, y) : sum * x + y; };
  for (int64_t round = 0; round < rounds; round++) {
    next(a), next(b), next(c), next(d), next(e), next(f);
    next(g), next(h), next(i), next(j), next(k), next(l);
  }
  return ((a + b) + (c + d) + (e + f) + (g + h) + (i + j) + (k + l))[0];
}

// Calls `act` with the engine of a call: of bf16 products where the CPU has them.
template <class F> int64_t with_engine(const Call& call, const F& act) {
  auto on = [&](auto&& engine) { return act(engine); };
  if (call.dtype == BF16) {
    if constexpr (TAKES_PAIRS) return on(Engine<true, false>(call));
    if constexpr (MAY_HAVE_TILES)
      if (has_tiles()) return on(Engine<true, true>(call));
  }
  return on(Engine<false, false>(call));
}

template <class F> int64_t with_backward(const Gradients& call, const F& act) {
  auto on = [&](auto&& backward) { return act(backward); };
  if constexpr (HAS_BF16_DOT)
    if (call.dtype == BF16 && (TAKES_PAIRS || has_tiles())) return on(Backward<true>(call));
  return on(Backward<false>(call));
}

}  // namespace

extern "C" {

// -1: the caller's struct has another size.
__attribute__((visibility("default"))) int64_t distr_workspace(const Call* call) {
  if (call->size != int64_t(sizeof(Call))) return -1;
  return with_engine(*call, [](auto& engine) { return engine.workspace(); });
}

__attribute__((visibility("default"))) int64_t distr_attention(const Call* call) {
  if (call->size != int64_t(sizeof(Call))) return -1;
  return with_engine(*call, [](auto& engine) { return engine.run(), 0; });
}

__attribute__((visibility("default"))) int64_t distr_bases_workspace(const Bases* call) {
  return call->size == int64_t(sizeof(Bases)) ? Projection(*call).workspace() : -1;
}

__attribute__((visibility("default"))) int64_t distr_bases(const Bases* call) {
  if (call->size != int64_t(sizeof(Bases))) return -1;
  Projection(*call).run();
  return 0;
}

__attribute__((visibility("default"))) int64_t distr_backward_workspace(const Gradients* call) {
  if (call->size != int64_t(sizeof(Gradients))) return -1;
  return with_backward(*call, [](auto& backward) { return backward.workspace(); });
}

__attribute__((visibility("default"))) int64_t distr_backward(const Gradients* call) {
  if (call->size != int64_t(sizeof(Gradients))) return -1;
  return with_backward(*call, [](auto& backward) { return backward.run(), 0; });
}

// What the machine's peak is measured with: returns the floating point operations that were done.
__attribute__((visibility("default"))) int64_t distr_peak(int64_t bf16, int64_t rounds) {
  if (bf16 && has_tiles()) return tile_chains(rounds);
  const bool pairs = HAS_BF16_DOT && bf16;
  const volatile float kept =
      pairs ? chains<HAS_BF16_DOT>(rounds, .5f) : chains<false>(rounds, .5f);
  (void)kept;
  // Of each lane a multiplication and an addition, or two of both.
  return rounds * 12 * LANES * (pairs ? 4 : 2);
}

}  // extern "C"
