"""Every table and figure of the paper.

python -m benchmarks.paper            # all cells without training that the results do not have yet
python -m benchmarks.paper --train    # those of the trained models, which take hours
python -m benchmarks.paper --quick    # two small cells of each, kept nowhere
python -m benchmarks.paper --docs     # put the tables of the results into docs/paper.md
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import finetune
from benchmarks.paper import (
    attention_time,
    block_sizes,
    exact_time,
    grouping_share,
    hard_patterns,
    llama_finetuned,
    prefill_time,
    score_errors,
    several_devices,
    vit_finetuned,
    without_tuning,
)
from benchmarks.paper.page import PAGE, write
from benchmarks.paper.script import Script
from benchmarks.store import ROOT

SCRIPTS: tuple[Script, ...] = tuple(
    module.SCRIPT
    for module in (
        exact_time,
        block_sizes,
        score_errors,
        hard_patterns,
        prefill_time,
        without_tuning,
        grouping_share,
        attention_time,
        several_devices,
    )
)


TRAINED = (vit_finetuned.SCRIPT, llama_finetuned.SCRIPT, finetune.SCRIPT)
"""Those that train; they go on where they stopped."""

PAGES = {PAGE: (*SCRIPTS, *TRAINED[:2]), ROOT / "docs" / "training.md": TRAINED[2:]}
"""Where the tables stand."""


def main() -> None:
    parser = argparse.ArgumentParser(description="the paper's tables")
    parser.add_argument("--quick", action="store_true", help="two small cells of each script")
    parser.add_argument("--train", action="store_true", help="the scripts that train, only")
    parser.add_argument("--docs", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.docs:
        flags = ["--quick"] if options.quick else []
        asked = (*SCRIPTS, *TRAINED) if options.quick else TRAINED if options.train else SCRIPTS
        for script in asked:
            script.main([*flags, "--threads", str(options.threads)])
    if not options.quick:
        for page, scripts in PAGES.items():
            write(scripts, page)


if __name__ == "__main__":
    main()
