"""The table of estimators: what each one is, what it needs, looks at and costs.

A new estimator is a row of ``ESTIMATORS`` and the modules that the row names: policies, the op, the
report and the cost model read the row, and ``arithmetic`` loads a module when a call needs it. This
module imports no torch, so that a policy can be checked without loading it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

Implementation = Literal["definition", "cpu", "gpu"]
"""What computes an estimator: the definition, plain PyTorch and the CPU kernel, or Triton."""

MIN_RANK = 16
"""Fewest columns an estimator may leave: the least inner width of a tensor-core product."""

MIN_QUERIES = 16
"""Calls with fewer query rows (decode steps) are always exact: there is nothing to group over."""

AUTO_BLOCK_LIMIT = 4096
AUTO_BLOCK_MIN = 2048
AUTO_BLOCK_TILE = 128
PREFIX_BLOCK = 512
"""Of the prefix form: Khat of every block then costs r / 1024 of causal attention's FLOPs."""

MOST_AUTO_BLOCKS = 8
"""Grouping blocks that "auto" makes of any number of rows, at most, but for the prefix form."""


NUM_PROJECTIONS = 16
"""N' of section 3.2: random projections of every column of Q, one bit of its hash value each."""


@dataclass(frozen=True)
class Cost:
    """What making Qhat and Khat takes for one key head and the query heads that share it.

    Attributes:
        flops: floating-point operations, a product and a sum counting two.
        bytes: the least that has to go from and to memory.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Estimator:
    """One way to turn (Q, K) of width d into (Qhat, Khat) of width r, the rank.

    Every one of them is Qhat = Q A, Khat = K B with A and B of d x r, made per head and per
    grouping block of query rows.

    Attributes:
        name: the name used in a policy.
        summary: how Qhat and Khat come from Q and K, in one line.
        needs: what has to be there before the model runs: nothing, or bases from calibration data.
        sees: which tokens the approximation of one row depends on.
        source: where the method is described.
        divides: the rank must divide d; if not, any rank from ``MIN_RANK`` on will do.
        rounds: the values of ``rounds`` it takes.
        strict: whether it may stand where ``causal = "strict"``: "always", as no row depends on
            later ones; "prefix", in a form of its own; or "never". In the prefix form the basis of
            a grouping block comes from the rows and keys before it, and only scores of those keys
            are approximated: the block's own keys, and all of the first block, are exact.
        adjoint: how gradients flow from Qhat and Khat to Q and K.
        cost: ``(num_queries, num_keys, head_dim, rank, block, rounds=1, rep=1, element_bytes=2)``
            -> :class:`Cost`: rows of Q per query head, rows of K, d, r, query rows per grouping
            block, rounds, query heads per key head, bytes of an element of Q and K.
        auto_block: N query rows -> rows per grouping block, where the policy says "auto"; at most
            ``MOST_AUTO_BLOCKS`` of them. For kernels with masks it takes a tensor of N too, with
            functions of two arguments in the place of ``min`` and ``max``.
        definition: dotted name of the module that defines the estimator, ``reference.py`` in its
            folder; ``kernels/roles.py`` says what each of the three modules has. Each lists in
            ``COMPUTES`` the estimators it computes; where a name is empty, calls of this estimator
            raise.
        cpu: of the one that makes A and B in PyTorch and for the CPU kernel, ``cpu.py``.
        gpu: of the one that launches kernels, ``launch.py``.
        prefix_sees: as ``sees``, of the prefix form.
        prefix_cost: as ``cost``, of the prefix form in a causal call of offset 0, what its exact
            scores cost more than those of width r counted in.
    """

    name: str
    summary: str
    sees: str
    source: str
    divides: bool
    adjoint: str
    cost: Callable[..., Cost]
    auto_block: Callable[..., Any]
    definition: str = ""
    cpu: str = ""
    gpu: str = ""
    needs: Literal["nothing", "bases"] = "nothing"
    rounds: tuple[int, ...] = (1,)
    strict: Literal["always", "prefix", "never"] = "never"
    prefix_sees: str = ""
    prefix_cost: Callable[..., Cost] | None = None


def _lsh_block(num_queries: Any, least: Any = min, most: Any = max) -> Any:
    """All rows up to 4096, then ``max(2048, N / 8)`` rounded up to a multiple of 128."""
    several = _whole_tiles(most(AUTO_BLOCK_MIN, -(-num_queries // 8)))
    is_long = num_queries > AUTO_BLOCK_LIMIT
    return is_long * several + (num_queries <= AUTO_BLOCK_LIMIT) * most(1, num_queries)


def _projection_block(num_queries: Any, least: Any = min, most: Any = max) -> Any:
    """``min(N / 4, max(2048, N / 8))`` rounded up to a multiple of 128, but at most N.

    Fewer rows than LSH takes, because a basis fits them better and the block's own cost, some small
    matrices, stays below a tenth of the attention's from 4096 rows on.
    """
    quarter, eighth = -(-num_queries // 4), -(-num_queries // 8)
    return most(1, least(num_queries, _whole_tiles(least(quarter, most(AUTO_BLOCK_MIN, eighth)))))


def _whole_tiles(rows: Any) -> Any:
    return -(-rows // AUTO_BLOCK_TILE) * AUTO_BLOCK_TILE


def _lsh_cost(
    num_queries: int,
    num_keys: int,
    head_dim: int,
    rank: int,
    block: int,
    rounds: int = 1,
    rep: int = 1,
    element_bytes: int = 2,
) -> Cost:
    """The hash, then columns summed by products with 0/1 matrices, as on tensor cores."""
    rows, blocks = num_queries * rep, -(-num_queries // block)
    hashing = 2 * NUM_PROJECTIONS * rows * head_dim
    sums = 2 * (rows + blocks * num_keys) * head_dim * rank
    moved = (rows + num_keys) * head_dim + (rows + blocks * num_keys) * rank
    return Cost(hashing + sums, element_bytes * moved)


def _projection_cost(
    num_queries: int,
    num_keys: int,
    head_dim: int,
    rank: int,
    block: int,
    rounds: int = 1,
    rep: int = 1,
    element_bytes: int = 2,
) -> Cost:
    """Gram matrices, the small products and the inverse per block, then Qhat and Khat.

    Q and K are read twice, because no number of Qhat is known before the whole block was seen; the
    Gram matrices are written and read once, in fp32.
    """
    rows, blocks = num_queries * rep, -(-num_queries // block)
    gram = 2 * head_dim**2 * (rows + num_keys)
    factors = 2 * (rows + blocks * num_keys) * head_dim * rank
    moved = 2 * (rows + num_keys) * head_dim + (rows + blocks * num_keys) * rank
    return Cost(
        gram + blocks * _solve_flops(head_dim, rank, rounds) + factors,
        element_bytes * moved + 8 * head_dim**2 * (blocks + 1),
    )


def _prefix_cost(
    num_queries: int,
    num_keys: int,
    head_dim: int,
    rank: int,
    block: int,
    rounds: int = 1,
    rep: int = 1,
    element_bytes: int = 2,
) -> Cost:
    """Count as ``_projection_cost``, but each block after the first has only the keys before it.

    And what the scores of every block's own keys take at width d, beyond what they would at r.
    """
    flops = moved = known = 0
    for start in range(0, num_queries, block):
        rows = min(block, num_queries - start) * rep
        keys, end = min(start, num_keys), min(start + block, num_keys)
        flops += 2 * rows * (end - keys) * (head_dim - rank)
        if start:
            new_rows = block * rep + keys - known
            flops += 2 * head_dim**2 * new_rows + _solve_flops(head_dim, rank, rounds)
            flops += 2 * (rows + keys) * head_dim * rank
            moved += (new_rows + rows + keys - known) * head_dim + (rows + keys) * rank
            known = keys
    blocks = -(-num_queries // block)
    return Cost(flops, element_bytes * moved + 8 * head_dim**2 * 2 * max(blocks - 1, 0))


def _solve_flops(head_dim: int, rank: int, rounds: int) -> int:
    """The operations from the Gram matrices to A and B.

    A further round is two products with the Gram matrices and what makes the columns orthonormal:
    one r x r Gram matrix, its inverse, and a product with that.
    """
    first = 6 * head_dim**2 * rank + 4 * head_dim * rank**2 + rank**3
    further = 4 * head_dim**2 * rank + 4 * head_dim * rank**2 + rank**3
    return first + (rounds - 1) * further


def _calibrated_cost(
    num_queries: int,
    num_keys: int,
    head_dim: int,
    rank: int,
    block: int,
    rounds: int = 1,
    rep: int = 1,
    element_bytes: int = 2,
) -> Cost:
    """Two products with fixed matrices, which are read in fp32, whatever the block."""
    rows = num_queries * rep + num_keys
    moved = element_bytes * rows * (head_dim + rank) + 2 * 4 * head_dim * rank
    return Cost(2 * rows * head_dim * rank, moved)


ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator(
            name="lsh-sample",
            summary="Qhat takes the first column of each group of Q, Khat sums the group's columns",
            sees="all query rows of the grouping block",
            source="arXiv 2507.17245, eq. 2 and section 3.2",
            divides=True,
            adjoint="the groups held constant: a column of Khat passes its gradient to each column"
            " of its group, one of Qhat to the first",
            cost=_lsh_cost,
            auto_block=_lsh_block,
            definition="distr_compile.kernels.lsh.reference",
            cpu="distr_compile.kernels.lsh.cpu",
            gpu="distr_compile.kernels.lsh.launch",
        ),
        Estimator(
            name="lsh-mean",
            summary="Qhat averages the columns of each group of Q, Khat sums the group's columns",
            sees="all query rows of the grouping block",
            source="arXiv 2507.17245, eq. 2 with the group's mean as the estimate",
            divides=True,
            adjoint="the groups held constant: a column of Khat passes its gradient to each column"
            " of its group, one of Qhat 1/G of it",
            cost=_lsh_cost,
            auto_block=_lsh_block,
            definition="distr_compile.kernels.lsh.reference",
            cpu="distr_compile.kernels.lsh.cpu",
            gpu="distr_compile.kernels.lsh.launch",
        ),
        Estimator(
            name="lsh-signed",
            summary="as lsh-mean, after turning the columns of Q and K where Q's sum is negative",
            sees="all query rows of the grouping block",
            source="arXiv 2507.17245, eq. 2 and section 3.2, with columns turned to one side first",
            divides=True,
            adjoint="the groups and signs held constant: a column of Khat passes its gradient to"
            " each column of its group, one of Qhat 1/G of it, turned back",
            cost=_lsh_cost,
            auto_block=_lsh_block,
            definition="distr_compile.kernels.lsh.reference",
            cpu="distr_compile.kernels.lsh.cpu",
            gpu="distr_compile.kernels.lsh.launch",
        ),
        Estimator(
            name="projection",
            summary="Qhat is Q times a randomised basis of the strongest directions of QK^T, Khat"
            " is K times the best match to it",
            sees="all query rows of the grouping block and all keys",
            source="randomised range finder: arXiv 0909.4061, algorithm 4.4; the least-squares"
            " match given the range",
            divides=False,
            adjoint="A and B held constant: dQ = dQhat A^T, dK = dKhat B^T",
            cost=_projection_cost,
            auto_block=_projection_block,
            definition="distr_compile.kernels.projection.reference",
            cpu="distr_compile.kernels.projection.cpu",
            gpu="distr_compile.kernels.projection.launch",
            rounds=(1, 2),
            strict="prefix",
            prefix_sees="earlier rows and keys only",
            prefix_cost=_prefix_cost,
        ),
        Estimator(
            name="calibrated",
            summary="Qhat and Khat are Q and K times fixed bases, the best for the scores of"
            " calibration data",
            sees="nothing but the row itself",
            source="truncated SVD (Eckart and Young 1936) of QK^T over the calibration data, from"
            " the Gram matrices of Q and of K",
            divides=False,
            adjoint="A and B are constants: dQ = dQhat A^T, dK = dKhat B^T",
            cost=_calibrated_cost,
            auto_block=lambda num_queries, least=min, most=max: most(1, num_queries),
            definition="distr_compile.kernels.calibrated.reference",
            cpu="distr_compile.kernels.calibrated.cpu",
            gpu="distr_compile.kernels.calibrated.launch",
            needs="bases",
            strict="always",
        ),
    )
}

DEFAULT_ESTIMATOR = "projection"


class NoArithmeticError(NotImplementedError):
    """An estimator stands in the table and the implementation asked for does not compute it."""


def estimator_named(name: str) -> Estimator:
    """The row of an estimator.

    Raises:
        ValueError: there is no such row.
    """
    if name not in ESTIMATORS:
        raise ValueError(
            f"estimator: got {name!r}; must be one of {', '.join(ESTIMATORS)}: take one of them, "
            "or add a row to distr_compile/estimators.py"
        )
    return ESTIMATORS[name]


def arithmetic(name: str, implementation: Implementation, *functions: str) -> ModuleType:
    """The module that computes an estimator, loaded now if it was not yet.

    Args:
        name: of a row of ``ESTIMATORS``.
        implementation: which of its modules.
        functions: what the caller needs to find in the module.

    Raises:
        ValueError: there is no such row.
        NoArithmeticError: the row names no module, or one that does not exist, does not list the
            estimator in ``COMPUTES``, or lacks one of ``functions``.
    """
    place: str = getattr(estimator_named(name), implementation)
    fault = f"it has no entry {implementation!r}" if not place else ""
    module = None
    if place:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not error.name or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there and imports one that is not
            fault = f"its {implementation!r} names {place}, which is no module"
    if module is not None:
        missing = [f for f in functions if not hasattr(module, f)]
        if name not in getattr(module, "COMPUTES", ()):
            fault = f"COMPUTES of {place}, its {implementation!r}, does not list it"
        elif missing:
            fault = f"{place}, its {implementation!r}, has no {' and no '.join(missing)}"
    if module is None or fault:
        able = [
            e.name for e in ESTIMATORS.values() if getattr(e, implementation) and e.name != name
        ]
        raise NoArithmeticError(
            f"estimator: got {name!r}, a row of ESTIMATORS without arithmetic here: {fault}; "
            f"accepted: {', '.join(able)}; take one of them, or write the module and name it in "
            "the row, as docs/extending.md says"
        )
    return module


def auto_grouping_block(num_queries: int, estimator: str, strict: bool = False) -> int:
    """Query rows that share one grouping when the policy says ``grouping_block = "auto"``.

    A function of the sequence length and the estimator only, so that a policy means the same on
    every device; see ``Estimator.auto_block``. In the prefix form (``strict``) not even of the
    length: a token more at the end must not move the edges of earlier blocks.
    """
    row = estimator_named(estimator)
    if strict and row.strict == "prefix":
        return PREFIX_BLOCK
    block: int = row.auto_block(num_queries)
    return block


@functools.lru_cache(maxsize=256)
def most_blocks(num_queries: int, estimator: str) -> tuple[int, int]:
    """How many grouping blocks "auto" makes of at most so many rows, and of how many rows each.

    The most of either; not of the prefix form.
    """
    block_of = estimator_named(estimator).auto_block
    rows = {*range(1, min(num_queries, 2 * AUTO_BLOCK_LIMIT) + 1), max(1, num_queries)}
    most = max(-(-n // block_of(n)) for n in rows)
    is_long = num_queries > 2 * AUTO_BLOCK_LIMIT
    return (MOST_AUTO_BLOCKS if is_long else most), max(block_of(n) for n in rows)


def possible_group_sizes(head_dim: int) -> tuple[int, ...]:
    """Group sizes that divide ``head_dim`` and leave ``MIN_RANK`` columns or more; 1 is exact."""
    return (1, *(g for g in range(2, head_dim // MIN_RANK + 1) if head_dim % g == 0))
