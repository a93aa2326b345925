"""Tuning: going on later, from what an earlier run has measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.accuracy.batch import Batch
from distr_compile.tuning.halves import Halves
from distr_compile.tuning.sensitivity import Bench
from distr_compile.tuning.tuned import Tuning
from tests.tiny_models import noise, stack
from tests.tuning.classifier import CANDIDATES, classifier, task, tuned


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    batches = [b.args[0] for b in task(model, 4)]
    path = tmp_path / "p.toml"
    passes = []
    rows = Bench.rows

    def counting(self: Bench, batches: Any, settings: Any, *rest: Any) -> Any:
        passes.append(len(settings))
        if limit is not None and len(passes) > limit:
            raise StoppedError
        return rows(self, batches, settings, *rest)

    monkeypatch.setattr(Bench, "rows", counting)
    limit: int | None = None
    whole = tuned(model, batches, 1e-3, metric="cosine")
    all_passes = len(passes)
    limit = 2
    passes.clear()
    with pytest.raises(StoppedError):
        tuned(model, batches, 1e-3, metric="cosine", path=path)
    assert not path.exists()
    assert {"errors", "gains"} <= json.loads((tmp_path / "p.toml.state.json").read_text())[
        "found"
    ].keys()
    limit = None
    passes.clear()
    rest = tuned(model, batches, 1e-3, metric="cosine", path=path)
    assert len(passes) == all_passes - 2
    assert rest.text == whole.text
    passes.clear()
    tuned(model, batches, 1e-3, metric="cosine", path=path)
    assert passes == []
    tuned(model, batches, 1e-3, metric="cosine", path=path, resume=False)
    assert len(passes) == all_passes


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuning]:
    """A folder with what ``tuned`` leaves behind, and what it found."""
    folder = tmp_path_factory.mktemp("kept")
    batches = [noise(seed, 1, 32) for seed in range(2)]
    found = tuned(stack(), batches, 1e-3, metric="cosine", path=folder / "p.toml")
    assert found.notes == () or "Begun" not in found.notes[0]
    return folder, found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metric": "sqnr"}, "another metric"),
        ({"confidence": 0.9}, "another confidence"),
        ({"candidates": CANDIDATES[:1]}, "another set of candidates"),
        ({"time": "model"}, "another clock"),
        ({"policy": {"default": {"causal": "strict"}}}, "another policy"),
        ({"batches": 3}, "another data"),
        ({"weights": True}, "another model"),
        ({"file": "{"}, "cannot be read"),
        ({"file": '{"format": "distr-tuning 0"}'}, "has the format 'distr-tuning 0'"),
    ],
)
def test_a_stale_state_is_told_and_dropped(
    change: dict[str, Any], told: str, kept: tuple[Path, Tuning], tmp_path: Path
) -> None:
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    model, path = stack(), tmp_path / "p.toml"
    state = tmp_path / "p.toml.state.json"
    batches = [noise(seed, 1, 32) for seed in range(2)]
    change = dict(change)
    if change.pop("weights", False):
        with torch.no_grad():
            model.layers[0].q.weight.mul_(2)  # type: ignore[index,union-attr,operator]
    if "file" in change:
        state.write_text(change.pop("file"))
    if "batches" in change:
        batches.append(noise(9, 1, 32))
        del change["batches"]
    result = tuned(model, batches, 1e-3, **{"metric": "cosine", "path": path, **change})
    assert result.notes[0].startswith("Begun anew: ")
    assert told in result.notes[0]
    assert json.loads(state.read_text())["found"]["errors"]


def test_a_state_of_another_version_is_dropped(
    kept: tuple[Path, Tuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [noise(seed, 1, 32) for seed in range(2)]
    for name, value in (
        ("measurements.versions", "another"),
        ("measurements.sameness.of_sources", "another"),
        ("measurements.sameness.of_device", "another"),
    ):
        path = shutil.copytree(kept[0], tmp_path / name) / "p.toml"
        with monkeypatch.context() as patch:
            patch.setattr(f"distr_compile.tuning.{name}", lambda *of, value=value: value)
            result = tuned(stack(), batches, 1e-3, metric="cosine", path=path)
        told = "another device" if name.endswith("device") else "another version"
        assert told in result.notes[0]


def test_other_batches_held_out_are_another_part(tmp_path: Path) -> None:
    """As many as before, but not the same ones."""
    batches = [noise(seed, 1, 32) for seed in range(10)]
    path = tmp_path / "p.toml"
    halves = [Halves(batches, share) for share in (0.5, 0.59)]
    assert len({half.held_out_count for half in halves}) == 1
    tuned(stack(), batches, 1e-3, metric="cosine", path=path)
    result = tuned(stack(), batches, 1e-3, metric="cosine", path=path, held_out=0.59)
    assert "another held-out part" in result.notes[0]


def test_every_compiler_is_looked_at(tmp_path: Path) -> None:
    batches = [noise(seed, 1, 32) for seed in range(2)]
    model, path = stack(), tmp_path / "p.toml"
    first = tuned(model, batches, 0.5, metric="cosine", path=path)
    assert (first.looks, first.fits) == (1, True)
    with pytest.raises(ValueError, match="no-such-compiler"):
        tuned(model, batches, 0.5, metric="cosine", path=path, compiler="no-such-compiler")
    second = tuned(model, batches, 0.5, metric="cosine", path=path, compiler="aot_eager")
    assert second.looks == 2
    assert second.notes[0].startswith(f"Measurements taken from {path}.state.json")


class Scorer:
    """Nobody can tell what it computes from its code."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        return 1 + self.weight * output.abs().mean((1, 2))


def test_losses_in_a_metric_that_nobody_knows_are_measured_anew(tmp_path: Path) -> None:
    batches = [noise(seed, 1, 32) for seed in range(4)]
    path = tmp_path / "p.toml"
    results = {w: tuned(stack(), batches, 0.9, metric=Scorer(w), path=path) for w in (1, 2)}
    fresh = tuned(stack(), batches, 0.9, metric=Scorer(2))
    assert results[2].tuning == fresh.tuning != results[1].tuning
    assert any("measured anew: nobody can tell" in note for note in results[2].notes)
    assert results[2].looks == 2  # of the same data, whatever the metric


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: found["losses"]["{}"].pop("examples"), "losses.{}.examples: Field required"),
        (lambda found: found.update(errors=[1]), "errors: Input should be a valid dict"),
        (lambda found: found.pop("costs"), "costs: missing"),
        (lambda found: found["costs"]["layers.0"].pop("exact"), "costs of layers.0: exact missing"),
        (lambda found: found.update(smooth="x"), "smooth: Input should be 'kl' or 'noise'"),
        (lambda found: found.update(gains=None), "a measurement is null"),
        (lambda found: found.update(other=1), "other: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_state_is_told_and_dropped(
    change: Any, told: str, kept: tuple[Path, Tuning], tmp_path: Path
) -> None:
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    batches = [noise(seed, 1, 32) for seed in range(2)]
    path, state = tmp_path / "p.toml", tmp_path / "p.toml.state.json"
    content = json.loads(state.read_text())
    change(content["found"])
    state.write_text(json.dumps(content))
    result = tuned(stack(), batches, 1e-3, metric="cosine", path=path)
    assert result.notes[0].startswith("Begun anew: ")
    assert f"is damaged ({told}" in result.notes[0]
    assert result.tuning == kept[1].tuning
