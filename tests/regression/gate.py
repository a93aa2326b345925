"""What the gate measures: models, policies, and how much data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distr_compile import Regression, calibrate, regress
from distr_compile.accuracy.baseline import Tolerance
from distr_compile.accuracy.batch import Batch
from distr_compile.policy import Policy
from distr_compile.targets import cast
from tests.zoo import OPTIONAL, ZOO, ZooModel, load, reactions

BASELINE = Path(__file__).with_name("baseline.json")
MODELS = (*ZOO, *(OPTIONAL if reactions.is_fetched() else ()))
"""What is measured here: those that are shipped, and the optional one where it was fetched."""
CAUSAL = ("gpt2", "llama")

POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"group_size": 1},
    "projection": {"estimator": "projection"},
    "projection, 2 rounds": {"estimator": "projection", "rounds": 2},
    "projection, G = 4": {"estimator": "projection", "group_size": 4},
    "strict projection": {"causal": "strict", "grouping_block": 128},
    "calibrated": {"estimator": "calibrated"},
    "lsh-signed": {"estimator": "lsh-signed"},
    "lsh-mean": {"estimator": "lsh-mean"},
    "lsh-sample": {"estimator": "lsh-sample"},
}
"""Fields of ``[default]``; G = 2 where nothing else is said, and at any length."""

BATCHES = 4
"""Of a model's data: enough to see a change, few enough for ten minutes. Of MiniLM all eight, as it
finds the texts of the later ones by their summaries in the first.
"""


TOLERANCE = Tolerance(relative=1e-3, absolute=1e-5)
"""In fp64, with the same weights and data. Where the data differ, ``baseline.OTHER`` holds."""


def policies_of(subject: ZooModel, names: Sequence[str], folder: Path) -> dict[str, Policy]:
    """Those of ``POLICIES`` that the model can take; bases are written to ``folder``."""
    found = {}
    for name, fields in POLICIES.items():
        if name not in names:
            continue
        fixed = {"group_size": 2, "min_seq_len": 0, "exact": "sdpa"}
        policy = Policy(default={**fixed, **fields})
        plan = policy.resolve("")
        if subject.head_dim // plan.group_size < 16:
            continue
        if plan.causal == "strict" and subject.name not in CAUSAL:
            continue
        if plan.estimator == "calibrated":
            path = folder / f"{subject.name}.safetensors"
            made = calibrate(subject.model, subject.train_batches, path=path, progress=False)
            policy = policy.with_bases(path, made.sha256)
        found[name] = policy
    return found


def measure(name: str, policies: tuple[str, ...] = tuple(POLICIES), **options: Any) -> Regression:
    """One model under the policies of these names, as far as it can take them.

    In float64: rounding then moves no bit of a hash, so that the numbers of a model with given
    weights and data are the same on every machine.

    Args:
        name: of a model of the zoo.
        policies: names in ``POLICIES``.
        **options: of ``regress``.
    """
    torch.manual_seed(0)
    subject = load(name)
    subject.model.double()
    measured, calibration = subject.batches, subject.train_batches
    if name != "minilm":
        # Not what it was trained on: that text differs from one version of Python to the next.
        measured, calibration = measured[:BATCHES], measured[BATCHES : BATCHES + 2]
    subject = replace(
        subject,
        batches=[_double(batch) for batch in measured],
        train_batches=[_double(batch) for batch in calibration],
    )
    options = {"progress": False, "layer_batches": 1, "tolerance": TOLERANCE, **options}
    with tempfile.TemporaryDirectory() as folder:
        chosen = policies_of(subject, policies, Path(folder))
        return regress(
            subject.model, subject.batches, chosen, metrics=subject.metrics, name=name, **options
        )


def _double(batch: Batch) -> Batch:
    kwargs = cast(dict(batch.kwargs), torch.float64)
    return Batch(cast(batch.args, torch.float64), kwargs, batch.labels)
