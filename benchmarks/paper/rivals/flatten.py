"""Focused linear attention of the FLatten transformer (arXiv 2308.00442).

Before heads are split, over all C features: k += P; x <- (relu(x) + 1e-6) / softplus(sigma); then
phi(x) = |x| x^3 / |x^3| with the cube element by element. In each head O_i is the quotient of
phi(q_i) sum_j phi(k_j) v_j^T and phi(q_i) sum_j phi(k_j) + eps, where eps is 1e-6 for each key in
the sum, plus a depthwise 5 x 5 convolution of V on the grid of patches, whose d channels all heads
share.

Ours: tokens before the patches get no convolution; text has no P and a convolution of width 5 over
a token and the four before it; causal sums go over j <= i; the convolution starts at zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.rivals.layer import Layer, Rival

EPSILON = 1e-6
KERNEL = 5
CHUNK = 128
"""Rows of causal attention whose scores are made at once."""


def focused(x: Tensor, sigma: Tensor) -> Tensor:
    """phi of ``(B, N, C)``, in fp32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = (x.relu() + EPSILON) / F.softplus(sigma.to(x.dtype))
    cubed = x**3
    length, of_cubed = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, cubed))
    return cubed * (length / of_cubed)


def linear_attention(fq: Tensor, fk: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """The quotient at the top of this file, ``(B, H, N, d)``.

    Args:
        fq: phi(q), ``(B, H, N, d)``.
        fk: phi(k), ``(B, H, M, d)``; M = N if causal.
        v: ``(B, H, M, d)``.
        causal: row i sums the keys j <= i only.
    """
    v = F.pad(v, (0, 1), value=1.0)  # the last column becomes the denominator
    if not causal:
        return _quotient(fq @ (fk.mT @ v), torch.tensor(v.shape[2], device=v.device))
    parts = []
    total = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3])
    for q, k, values in zip(*(t.split(CHUNK, dim=2) for t in (fq, fk, v)), strict=True):
        parts.append(q @ total + (q @ k.mT).tril() @ values)
        total = total + k.mT @ values
    keys = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    return _quotient(torch.cat(parts, 2), keys)


def _quotient(sums: Tensor, keys: Tensor) -> Tensor:
    return sums[..., :-1] / (sums[..., -1:] + EPSILON * keys)


class Flatten(Rival):
    """Focused linear attention of one layer: N C + C + 26 d parameters, of text C + 6 d."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        width, head_dim = layer.width, layer.head_dim
        self.sigma = nn.Parameter(torch.zeros(width))
        self.positions: nn.Parameter | None = None
        self.convolution: nn.Conv1d | nn.Conv2d
        if layer.grid is None:
            self.convolution = nn.Conv1d(head_dim, head_dim, KERNEL, groups=head_dim)
        else:
            self.positions = nn.Parameter(torch.zeros(layer.tokens, width))
            self.convolution = nn.Conv2d(
                head_dim, head_dim, KERNEL, groups=head_dim, padding=KERNEL // 2
            )
        for parameter in self.convolution.parameters():
            nn.init.zeros_(parameter)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Rival.attend`.

        Raises:
            ValueError: an image with another number of tokens than the layer's.
        """
        if self.layer.grid is not None and q.shape[2] != self.layer.tokens:
            raise ValueError(
                f"query: got {q.shape[2]} tokens; accepted: {self.layer.tokens}, those of the "
                f"{self.layer.grid} patches and before them; give images of one size, unpadded"
            )
        joined_q, joined_k = (t.transpose(1, 2).flatten(2) for t in (q, k))
        if self.positions is not None:
            joined_k = joined_k + self.positions
        heads = (self.layer.heads, self.layer.head_dim)
        fq, fk = (
            focused(t, self.sigma).unflatten(2, heads).transpose(1, 2) for t in (joined_q, joined_k)
        )
        out = linear_attention(fq, fk, v.to(fk.dtype), causal=self.layer.is_causal)
        return out.to(v.dtype) + self._convolved(v)

    def _convolved(self, v: Tensor) -> Tensor:
        channels = v.flatten(0, 1).mT  # (B H, d, N)
        if self.layer.grid is None:
            found = self.convolution(F.pad(channels, (KERNEL - 1, 0)))
        else:
            prefix = self.layer.prefix
            patches = channels[..., prefix:].unflatten(2, self.layer.grid)
            found = F.pad(self.convolution(patches).flatten(2), (prefix, 0))
        return found.mT.unflatten(0, v.shape[:2])
