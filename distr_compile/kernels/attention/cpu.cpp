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
// bf16 inputs are multiplied by AVX-512's bf16 dot products where the CPU has them; otherwise bf16
// and fp16 are converted to fp32 when they are packed. Nothing here depends on the number of
// threads but the order in which tasks run: results have equal bits.

#include "engine.h"
#include "projection.h"

extern "C" {

__attribute__((visibility("default"))) int64_t distr_workspace(const Call* call) {
  if (call->size != int64_t(sizeof(Call))) return -1;
  if (HAS_BF16_DOT && call->dtype == BF16) return Engine<true>(*call).workspace();
  return Engine<false>(*call).workspace();
}

__attribute__((visibility("default"))) int64_t distr_attention(const Call* call) {
  if (call->size != int64_t(sizeof(Call))) return -1;
  if (HAS_BF16_DOT && call->dtype == BF16) Engine<true>(*call).run();
  else Engine<false>(*call).run();
  return 0;
}

__attribute__((visibility("default"))) int64_t distr_bases_workspace(const Bases* call) {
  return call->size == int64_t(sizeof(Bases)) ? Projection(*call).workspace() : -1;
}

__attribute__((visibility("default"))) int64_t distr_bases(const Bases* call) {
  if (call->size != int64_t(sizeof(Bases))) return -1;
  Projection(*call).run();
  return 0;
}

}  // extern "C"
