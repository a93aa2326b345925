"""How near approximated models are to the exact ones, held against the committed numbers.

    OMP_NUM_THREADS=1 python -m tests.regression [minilm ...] [--update-baseline] [--plot FILE]

prints a table for each model, then what is not as in ``baseline.json``; the exit code says whether
anything is not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from distr_compile import Regression
from distr_compile.accuracy.baseline import failure_table
from distr_compile.accuracy.regress import held_against
from tests.regression.gate import BASELINE, MODELS, TOLERANCE, measure


def main(argv: list[str] | None = None) -> int:
    """Measure, compare or write, plot; 1 if a number moved."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.regression", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--update-baseline", action="store_true", help=f"write {BASELINE.name}")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--plot", metavar="FILE", help="the loss of every model and policy")
    options = parser.parse_args(argv)
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"got {', '.join(sorted(unknown))}; accepted: {', '.join(MODELS)}")
    results = []
    start = time.perf_counter()
    with ThreadPoolExecutor(options.workers) as threads:
        for measured in threads.map(_in_a_process, options.models or MODELS):
            results.append(
                held_against(BASELINE, measured.result, options.update_baseline, TOLERANCE)
            )
            print(results[-1].table(), *results[-1].notes, "", sep="\n", flush=True)
    print(f"{len(results)} models in {time.perf_counter() - start:.0f} s")
    if options.plot:
        from tests.regression.plot import plot

        plot([regression.result for regression in results], Path(options.plot))
    failures = tuple(failure for regression in results for failure in regression.failures)
    if failures:
        print(f"\n{failure_table(failures)}\nif this is meant to be: make baseline")
    return 1 if failures else 0


def _in_a_process(name: str) -> Regression:
    """``measure`` in a process of its own, which gives back all memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, name).result()


if __name__ == "__main__":
    sys.exit(main())
