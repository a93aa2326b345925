"""What ``min_seq_len = "auto"`` and ``exact = "auto"`` ask: is it faster here, as measured?"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from distr_compile.estimators import MIN_QUERIES
from distr_compile.lowering import choose, measure, stored
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.measure import EXACT, SDPA, Measured, Race

COMPILE_S = 20.0
"""Most seconds that one compiled graph spends on measuring."""

SWITCH = "DISTR_MEASURE"
"""An environment variable; 0 forbids measuring: what is stored holds, all else is exact."""

LENGTHS = (0, 1, -1, -2)
"""Powers of two beside the hint of a symbolic length that are tried, as exponents of two."""


@dataclass
class Judge:
    """Answers from what is stored, and measures where nothing is.

    That something could not be measured is an answer, too, and stored: what a model computes must
    not hang on how busy the machine was. Only a judge without limits asks again.

    Attributes:
        may_measure: whether it may; the environment and a process group may forbid it besides.
        call_limit: most seconds for one race; None for any.
        limit: most seconds for all of them together; None for any.
        spent: seconds that went by in races; what compiles kernels does not count.
    """

    may_measure: bool = True
    call_limit: float | None = measure.CALL_S
    limit: float | None = COMPILE_S
    spent: float = field(default=0.0, init=False)

    def __call__(
        self, shape: Shape, approximation: Approximation | None, *, ours: bool = True
    ) -> Measured | str:
        """What was measured of a call, now or before; or why nothing was.

        Args:
            shape: of the call.
            approximation: the candidate beside exact attention; None without one. Its seed does not
                matter.
            ours: whether exact attention would run in our kernel, if that is faster than SDPA.
        """
        if shape.is_empty:
            return "it has no elements"
        has_ours = choose.name_of(shape, Approximation.none(shape.head_dim)) != choose.EXACT
        exact: Race | None = None
        if shape.softcap or shape.sinks:
            # Beyond SDPA, and how fast the model's own code is nobody knows.
            if approximation is None or not has_ours:
                return "nothing is known of the speed of soft caps and sinks without our kernel"
            against = EXACT
        else:
            if has_ours and ours and not shape.trained:
                found = self._race(shape, None, SDPA)
                if isinstance(found, str):
                    return found
                exact = found
            against = Measured(exact).best_exact
        if approximation is None or choose.name_of(shape, approximation) == choose.EXACT:
            return Measured(exact)
        distr = self._race(shape, approximation, against)
        return distr if isinstance(distr, str) else Measured(exact, distr)

    def _race(self, shape: Shape, approximation: Approximation | None, against: str) -> Race | str:
        what = (shape, approximation, against)
        known = stored.load(*what)
        if isinstance(known, Race) or (known is not None and self.call_limit is not None):
            return known
        if why := self._why_not():
            return why
        left = math.inf if self.limit is None else self.limit - self.spent
        found: Race | str
        if left <= 0:
            found = f"measuring has taken the {self.limit:.0f} s that a compile spends on it"
            return stored.store(*what, found)
        limit = min(left, math.inf if self.call_limit is None else self.call_limit)
        bound = None if limit == math.inf else limit
        try:
            why = measure.warm_up(*what, bound) or ""
            started = time.perf_counter()
            found = why or measure.race(*what, bound)
            self.spent += time.perf_counter() - started
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not choose.is_out_of_memory(error):
                raise
            found = "there is not enough memory to measure it"
        return stored.store(*what, found)

    def _why_not(self) -> str:
        if not self.may_measure or os.environ.get(SWITCH) == "0":
            return "measuring is switched off"
        if _is_in_a_group():
            return "nothing is measured in a group of processes, which have to agree"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being recorded"
        return ""

    def break_even(
        self,
        shape: Shape,
        approximation: Approximation,
        moving: Collection[str],
        *,
        ours: bool = True,
    ) -> tuple[int, Measured] | Measured | str:
        """The least length from which on the approximation was measured to be faster.

        Powers of two around the length of ``shape`` are measured; a longer call is taken to be like
        the longest of them that could be.

        Args:
            shape: with hints in the place of symbolic sizes.
            approximation: the candidate.
            moving: which of ``num_queries`` and ``num_keys`` is symbolic.
            ours: as above.

        Returns:
            min(N, M) and what was found there; or what was found where it is slower, at the longest
            call that was measured or at one that ``min(N, M)`` does not tell from it; or why
            nothing is known.
        """
        hint = max(1, min(getattr(shape, name) for name in moving))
        found: dict[int, tuple[Shape, Measured]] = {}
        why = ""
        for exponent in LENGTHS:
            length = 2 ** max(round(math.log2(hint)) + exponent, 0)
            at = shape.resized(
                {name: max(1, getattr(shape, name) * length // hint) for name in moving}
            )
            if at.num_queries >= MIN_QUERIES:
                now = self(at, approximation, ours=ours)
                if isinstance(now, str):
                    why = why or f"at {length} tokens {now}"
                else:
                    found[length] = at, now
        best: tuple[int, Measured] | None = None
        for length in sorted(found, reverse=True):
            at, now = found[length]
            shortest = min(at.num_queries, at.num_keys)
            if not now.prefers_distr:
                # The op compares min(N, M): it has to tell this call from the longer one.
                return best if best is not None and best[0] > shortest else now
            best = shortest, now
        return best or why or "no length was measured"


def _is_in_a_group() -> bool:
    distributed = torch.distributed
    is_ready = distributed.is_available() and distributed.is_initialized()
    return is_ready and distributed.get_world_size() > 1
