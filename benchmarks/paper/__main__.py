"""Every table and figure of the paper that is measured without training.

python -m benchmarks.paper            # all cells that the results do not have yet
python -m benchmarks.paper --quick    # two small cells of each, kept nowhere
python -m benchmarks.paper --docs     # put the tables of the results into docs/paper.md
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.paper import (
    attention_time,
    block_sizes,
    exact_time,
    grouping_share,
    hard_patterns,
    score_errors,
    without_tuning,
)
from benchmarks.paper.page import write
from benchmarks.paper.script import Script

SCRIPTS: tuple[Script, ...] = tuple(
    module.SCRIPT
    for module in (
        exact_time,
        block_sizes,
        score_errors,
        hard_patterns,
        without_tuning,
        grouping_share,
        attention_time,
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description="the paper's tables")
    parser.add_argument("--quick", action="store_true", help="two small cells of each script")
    parser.add_argument("--docs", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.docs:
        flags = ["--quick"] if options.quick else []
        for script in SCRIPTS:
            script.main([*flags, "--threads", str(options.threads)])
    if not options.quick:
        write(SCRIPTS)


if __name__ == "__main__":
    main()
