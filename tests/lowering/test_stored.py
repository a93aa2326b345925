"""How the answers of races are kept."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distr_compile.lowering import stored
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.measure import DISTR, SDPA, Race
from distr_compile.lowering.spelling import spelled

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 200, 160, 64, 48, False, None, torch.float32, CPU)
HALF = Approximation("projection", 32)

FAST = Race({SDPA: 4e-3, DISTR: 2e-3}, "d", 1.4, 7, 4)
SLOW = dataclasses.replace(FAST, gain=0.8)


def test_a_file_says_what_it_is_of(may_measure: Path) -> None:
    stored.store(SHAPE, HALF, SDPA, FAST)
    (path,) = may_measure.glob("*.json")
    said = json.loads(path.read_text())
    assert said["key"]["call"] == spelled(SHAPE, HALF)
    assert said["key"]["torch"] == torch.__version__
    assert said["race"]["seconds"] == dict(FAST.seconds)


WRONG = ("", "{}", '{"key": 1, "race": {}}', "[" * 9, "[" * 100_000)
GAINS = ('"0.8"', "NaN", "true")


@pytest.mark.parametrize("spoil", [*WRONG, *GAINS], ids=lambda text: text[:9])
def test_what_is_no_answer_is_written_anew(may_measure: Path, spoil: str) -> None:
    stored.store(SHAPE, HALF, SDPA, SLOW)
    (path,) = may_measure.glob("*.json")
    text = path.read_text()
    path.write_text(text.replace("0.8", spoil, 1) if spoil in GAINS else spoil)
    stored.forget()
    assert stored.load(SHAPE, HALF, SDPA) is None
    assert stored.store(SHAPE, HALF, SDPA, FAST) == FAST
    stored.forget()
    assert stored.load(SHAPE, HALF, SDPA) == FAST


def test_an_error_of_reading_costs_no_answer(
    may_measure: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.store(SHAPE, HALF, SDPA, FAST)
    stored.forget()

    def fail(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(stored.build, "refuse_others", fail)
        assert stored.load(SHAPE, HALF, SDPA) is None
        assert stored.store(SHAPE, HALF, SDPA, SLOW) == SLOW
    stored.forget()
    assert stored.load(SHAPE, HALF, SDPA) == FAST


def test_others_may_not_write_an_answer(may_measure: Path) -> None:
    stored.store(SHAPE, HALF, SDPA, FAST)
    (path,) = may_measure.glob("*.json")
    path.chmod(0o666)
    stored.forget()
    assert stored.load(SHAPE, HALF, SDPA) is None


def test_without_a_folder_the_process_decides_once(
    may_measure: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "folder", lambda: None)
    assert stored.store(SHAPE, HALF, SDPA, FAST) == FAST
    assert stored.store(SHAPE, HALF, SDPA, SLOW) == FAST
    assert stored.load(SHAPE, HALF, SDPA) == FAST


def _race(folder: Path, number: int, results: Any) -> None:
    stored.folder = lambda: folder
    stored.forget()
    mine = dataclasses.replace(FAST, rounds=number)
    while time.time() < results["start"]:
        pass
    results[number] = stored.store(SHAPE, HALF, SDPA, mine).rounds


def test_the_first_process_that_writes_wins(may_measure: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict({"start": time.time() + 0.5})
        racers = [context.Process(target=_race, args=(may_measure, n, results)) for n in range(8)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        found = dict(results)
    del found["start"]
    assert len(found) == 8
    (winner,) = set(found.values())
    stored.forget()
    kept = stored.load(SHAPE, HALF, SDPA)
    assert kept is not None
    assert kept.rounds == winner
    assert len(list(may_measure.glob("*.json"))) == 1
    assert not list(may_measure.glob("*.tmp"))


def test_the_folder_is_ours_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    folder = stored.build.cache_folder(stored.FOLDER)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    os.chmod(folder, 0o777)
    with pytest.raises(stored.build.UnavailableError, match="others may write"):
        stored.build.cache_folder(stored.FOLDER)
