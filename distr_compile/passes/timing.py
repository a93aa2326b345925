"""Whether a call that is about to be written is faster, asked with what it would be given."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from distr_compile.lowering import choose, training
from distr_compile.lowering.call import Approximation, Scores, Shape
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import Measured
from distr_compile.lowering.sharded import told
from distr_compile.lowering.spelling import spelled
from distr_compile.passes.site import RefusedError
from distr_compile.passes.vocabulary import hint, tensor_of


@dataclass
class Stopwatch:
    """Asks the judge about one site, once its operands are laid out.

    Attributes:
        judge: None where nothing hangs on how fast it is.
        ours: whether exact attention would run in our kernel, if that is faster than SDPA.
        measured: what was found, if anything was asked.
        kernel, refused, backward, sharding: of the call, as in a :class:`.reporting.SiteRow`.
    """

    judge: Judge | None = None
    ours: bool = True
    measured: Measured | None = None
    kernel: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    backward: str | None = None
    sharding: str | None = None

    def see_shards(self, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> None:
        """Note how the processes of a mesh share the call.

        Raises:
            RefusedError: it hangs on what is faster, which nobody times of DTensors.
        """
        if q is None or k is None or v is None:
            raise RefusedError("tensor-subclass", "how the operands are sharded is not known")
        self.sharding = told(q, k, v)
        if self.judge is not None:
            text = "DTensors are not timed; min_seq_len = 0, or another number, forces it"
            raise RefusedError("not-measured", text)

    def least_length(
        self,
        shape: Shape | None,
        approximation: Approximation,
        moving: list[str],
        *,
        mask_grad: bool = False,
    ) -> int:
        """The length from which on to approximate; 0 for any.

        Args:
            shape: of the call, with hints in the place of symbolic sizes; None if unknown.
            approximation: of the call.
            moving: which of ``num_queries`` and ``num_keys`` is symbolic.
            mask_grad: whether a gradient is recorded of its mask.

        Raises:
            RefusedError: exact attention is faster, or nobody knows.
        """
        if shape is not None:
            self._name(shape, approximation, mask_grad)
        if self.judge is None:
            return 0
        if shape is None:
            raise RefusedError("not-measured", "the shapes of the operands are not known")
        length = 0
        found: Measured | str
        if moving:
            least = self.judge.break_even(shape, approximation, moving, ours=self.ours)
            length, found = least if isinstance(least, tuple) else (0, least)
        else:
            found = self.judge(shape, approximation, ours=self.ours)
        if isinstance(found, str):
            raise _not_measured(found, shape, approximation)
        self.measured = found
        if not found.prefers_distr:
            text = f"measured on this machine: {found}; min_seq_len = 0 forces it"
            raise RefusedError("not-faster", text)
        return length

    def prefer_ours(self, shape: Shape | None) -> None:
        """Let exact attention run in our kernel, if that is faster.

        Raises:
            RefusedError: SDPA is faster, or nobody knows.
        """
        if shape is None:
            raise RefusedError("not-measured", "the shapes of the operands are not known")
        self._name(shape, Approximation.none(shape.head_dim))
        if self.kernel == choose.EXACT:
            raise RefusedError("not-faster", "no implementation of ours computes it")
        if self.judge is not None and (self.measured is None or self.measured.exact is None):
            found = self.judge(shape, None)
            if isinstance(found, str):
                self._give_way(_not_measured(found, shape, None))
            self.measured = found
        if self.measured is None or not self.measured.prefers_ours:
            self._give_way(RefusedError("not-faster", f"SDPA is as fast: {self.measured}"))

    def _give_way(self, why: RefusedError) -> NoReturn:
        self.refused[str(self.kernel)] = f"{why.code}: {why.text}"
        raise why

    def _name(self, shape: Shape, approximation: Approximation, mask_grad: bool = False) -> None:
        found = training.who_computes(shape, approximation, mask_grad=mask_grad)
        self.kernel, self.backward, refused = found
        self.refused = dict(refused)


def _not_measured(why: str, shape: Shape, approximation: Approximation | None) -> RefusedError:
    if shape.is_empty:
        return RefusedError("not-measured", why)
    command = f"distr measure --call {shlex.quote(spelled(shape, approximation))}"
    return RefusedError("not-measured", f"{why}; to measure it: {command}")


def shape_of_call(
    operands: tuple[fx.Node, fx.Node, fx.Node],
    mask: fx.Node | None,
    scores: Scores,
    dtype: torch.dtype,
    *,
    sinks: bool,
    trained: bool,
) -> Shape | None:
    """The shape of a call with these nodes as arguments; symbolic sizes by their hints.

    None where they have no fake values, as behind a scale that is a symbol.

    ``dtype`` is that of the attention, to which autocast may bring the operands; ``trained`` says
    whether it records gradients.
    """
    q, k, v, bias = map(tensor_of, (*operands, mask))
    if q is None or k is None or v is None:
        return None
    with _disable_current_modes():
        shape = Shape.of(
            _known(q),
            _known(k),
            _known(v),
            None if bias is None else _known(bias),
            scores.is_causal,
            hint(scores.offset or 0),
            softcap=scores.softcap > 0,
            sinks=sinks,
            dropout=scores.dropout_p > 0,
        )
    return shape._replace(device=q.device, dtype=dtype, trained=trained)


def _known(value: Tensor) -> Tensor:
    sizes, strides = ([max(hint(n), 0) for n in ns] for ns in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
