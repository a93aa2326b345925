"""Calls for implementations, of the keywords of the definition."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.lowering.call import Call, read_arguments


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    out: Tensor,
    lse: Tensor | None = None,
    bases: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
    **options: Any,
) -> Call:
    """The call with ``options`` as ``reference.attention`` takes them; exact without a rank."""
    defaults = {"rank": q.shape[3], "estimator": "lsh-mean", "grouping_block": 0}
    given = read_arguments(defaults | options)
    return Call(
        q,
        k,
        v,
        mask,
        sinks,
        given.scores,
        given.approximation,
        bases,
        out,
        dropout=dropout,
        lse=lse,
    )
