"""Primal attention (arXiv 2305.19798): an asymmetric kernel SVD in primal form; V is not used.

With phi(x) = x / |x| in each head, X' n = min(N, 10 s) evenly spaced rows of the layer's input X,
split by heads, and W_e, W_r of n x s per head, orthogonal at first: e = phi(q) X'^T W_e and
r = phi(k) X'^T W_r. O = [e; r] W_c + b is one linear map from 2 s to d that all heads share.

In training, eta times the mean over layers of J^2 is added to the loss, where J is E |e L|^2 / 2 +
E |r L|^2 / 2 minus the mean over heads of tr(W_e^T W_r), and L has s numbers for each head.

The causal form is that of its authors' language code: q and k are replaced by running means before
phi, and W_e and W_r are d x s, whatever the data. Ours: of a sequence shorter than n, rows are
taken more than once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.paper.rivals.layer import Layer, Rival

RANK = 20
"""s of the authors' vision code."""
ROWS_PER_RANK = 10
EPSILON = 1e-12


class Primal(Rival):
    """Primal attention of one layer.

    Attributes:
        objective: J of the last call; ``penalty`` makes a loss of it.
    """

    def __init__(self, layer: Layer, rank: int = RANK) -> None:
        super().__init__(layer)
        self.rows = min(layer.tokens, ROWS_PER_RANK * rank)
        shape = (layer.heads, layer.head_dim if layer.is_causal else self.rows, rank)
        self.W_e, self.W_r = (nn.Parameter(torch.empty(shape)) for _ in range(2))
        for weight in (*self.W_e, *self.W_r):
            nn.init.orthogonal_(weight)
        self.L = nn.Parameter(torch.rand(layer.heads, rank))
        self.output = nn.Linear(2 * rank, layer.head_dim)
        self._squares: list[tuple[Tensor, int]] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Rival.forward`."""
        self._squares = []
        return super().forward(q, k, v, x, keep)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Rival.attend`.

        Raises:
            ValueError: X is not as wide as all heads together, and the layer is not causal.
        """
        maps: list[Tensor] = [self.W_e, self.W_r]
        if self.layer.is_causal:
            q, k = _running_mean(q), _running_mean(k)
        else:
            if x.shape[2] != self.layer.width:
                raise ValueError(
                    f"input of the layer: got a width of {x.shape[2]}; accepted: "
                    f"{self.layer.width}, that of all heads; take a model whose heads share it out"
                )
            at = torch.linspace(0, x.shape[1] - 1, self.rows, device=x.device).long()
            chosen = x[:, at].unflatten(2, (self.layer.heads, -1)).transpose(1, 2)
            maps = [chosen.mT @ weight for weight in maps]
        e, r = (_unit(t) @ weight for t, weight in zip((q, k), maps, strict=True))
        scaled = ((t * self.L[:, None]).square().sum() for t in (e, r))
        self._squares.append((sum(scaled, torch.zeros((), device=e.device)) / 2, e[..., 0].numel()))
        found: Tensor = self.output(torch.cat([e, r], -1))
        return found

    @property
    def objective(self) -> Tensor:
        """J of the last call, a scalar.

        Raises:
            RuntimeError: there was no call.
        """
        if not self._squares:
            raise RuntimeError("objective: got no call; accepted: one before it; call the model")
        squares, counts = zip(*self._squares, strict=True)
        traces = (self.W_e * self.W_r).sum((1, 2)).mean()
        return torch.stack(squares).sum() / sum(counts) - traces


def penalty(model: nn.Module, eta: float) -> Tensor:
    """What is added to the loss: eta times the mean over the Primal layers of J^2.

    Raises:
        ValueError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, Primal)]
    if not layers:
        raise ValueError("model: got no Primal layer; accepted: one or more; call dropin.replace")
    return eta * torch.stack([layer.objective.square() for layer in layers]).mean()


def _unit(t: Tensor) -> Tensor:
    return t / torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(EPSILON)


def _running_mean(t: Tensor) -> Tensor:
    return t.cumsum(2) / torch.arange(1, t.shape[2] + 1, device=t.device)[:, None]
