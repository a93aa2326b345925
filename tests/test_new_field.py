"""A field that is added to the policy, by two edits of a copy of the package, reaches everything.

The field is ``seed``, which the op has and the policy has not: another seed is another grouping.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

EDITS = {
    "policy/plan.py": (
        "    rule: tuple[int, ...] = ()\n\n    def __post_init__",
        '    seed: int = _option(0, "Names the random numbers.", at_least=0)\n'
        "    rule: tuple[int, ...] = ()\n\n    def __post_init__",
    ),
    "passes/decide.py": (
        "        rounds=plan.rounds,\n",
        "        rounds=plan.rounds,\n        seed=plan.seed,\n",
    ),
}
"""File -> what is there, and what stands there instead: all that the field takes."""

PROGRAM = """
import json
import sys

import torch

import distr_compile
from distr_compile import Batch, Policy, regress, tune
from distr_compile.accuracy.instrument import layer_errors
from distr_compile.lowering import measure
from distr_compile.lowering.call import Shape
from distr_compile.passes.decide import decide_bare
from distr_compile.tuning.candidates import candidate_fields
from tests.tiny_models import noise, stack

PLAN = {"estimator": "lsh-mean", "group_size": 2, "min_seq_len": 0}
SEEDS = (0, 1)
model, batches = stack(), [Batch((noise(seed, 2, 48),)) for seed in range(4)]
policies = {str(seed): Policy({**PLAN, "seed": seed}) for seed in SEEDS}
found = {"file": distr_compile.__file__}

def outputs():
    for policy in policies.values():
        torch.compiler.reset()
        options = {"policy": policy, "compiler": "eager"}
        with torch.no_grad():
            yield torch.compile(model, backend="distr", options=options)(*batches[0].args)

first, second = outputs()
found["compiled"] = float((first - second).norm() / first.norm())

found["layers"] = layer_errors(model, batches, policies)

item = regress(model, batches, policies, metrics=["sqnr"], progress=False).result.policies
found["gate"] = {name: dict(item[name].layers) for name in policies}
found["metrics"] = {name: item[name].metrics["sqnr"].value for name in policies}

keywords = []
made = measure.op_arguments
measure.op_arguments = lambda *args: keywords.append(made(*args)) or keywords[-1]
cpu = torch.device("cpu")
shape = Shape(2, 4, 2, 48, 48, 32, 32, True, None, torch.float32, cpu)
measure.race(shape, decide_bare(shape, policies["1"].default))
found["timed"] = [given.get("seed") for given in keywords if given["rank"] == 16][0]

candidates = [{**PLAN, "seed": seed} for seed in SEEDS]
options = {"metric": "sqnr", "time": "products", "progress": False}
tuned = tune(model, batches, 100.0, candidates=candidates[1:], **options)
found["tuned"] = [tuned.policy.resolve(layer).seed for layer in ("layers.0", "layers.1")]
found["labels"] = list(candidate_fields(Policy(), candidates))
found["losses"] = [tune(model, batches, 100.0, candidates=[c], **options).tuning.loss
                   for c in candidates]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program prints when it runs on the edited copy."""
    folder = tmp_path_factory.mktemp("new_field")
    package = folder / "distr_compile"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "distr_compile", package, ignore=ignored)
    for name, (before, after) in EDITS.items():
        text = (package / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, name
        (package / name).write_text(text.replace(before, after), encoding="utf-8")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(folder / "program.py")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert Path(result["file"]).parent == package
    return result


def test_the_errors_of_attentions_see_it(found: dict[str, Any]) -> None:
    assert list(found["layers"]) == ["layers.0", "layers.1"]
    for errors in found["layers"].values():
        assert errors["0"] != pytest.approx(errors["1"], rel=1e-3)


def test_the_gate_sees_it(found: dict[str, Any]) -> None:
    for layer, errors in found["layers"].items():
        for seed in "01":
            assert found["gate"][seed][layer] == pytest.approx(errors[seed], rel=1e-6)


def test_what_is_timed_has_it(found: dict[str, Any]) -> None:
    assert found["timed"] == 1


def test_tune_measures_it_and_writes_it(found: dict[str, Any]) -> None:
    assert found["tuned"] == [1, 1]
    first, second = found["losses"]
    assert first != pytest.approx(second, rel=1e-3)


def test_candidates_that_differ_in_it_are_two(found: dict[str, Any]) -> None:
    assert found["labels"] == ["lsh-mean G=2", "lsh-mean G=2 seed=1"]


def test_the_compiled_model_has_it(found: dict[str, Any]) -> None:
    assert found["compiled"] > 1e-3
    assert found["metrics"]["0"] != pytest.approx(found["metrics"]["1"], rel=1e-3)
