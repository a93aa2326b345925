"""The benchmarks' script: what it writes, that it goes on where it stopped, what is made of it."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    arms,
    bars,
    cells,
    cpu_plot,
    gpu,
    peer_calls,
    peers,
    plot,
    resumable,
    rows,
    timing,
)
from benchmarks.cells import Cell
from benchmarks.session import DEVICE_LOST, Session
from benchmarks.store import ROOT, TESTED, Store, describe
from distr_compile.kernels.attention import reference

TINY = Cell(1, 2, 2, 40, 32, "float32")
ENVIRONMENT = {"device": "no such device", "architecture": "sm_00", "commit": "0"}


def cells_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["cells"] if path.exists() else {}


# --- the whole script, on tiny shapes -----------------------------------------------------------

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes on a GPU")


@on_cpu
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", "tiles", "--results", tmp_path]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while len(cells_of(tmp_path / "tiles.json")) < 2 and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    early = cells_of(tmp_path / "tiles.json")
    assert first.returncode == 128 + signal.SIGTERM, said.decode()
    assert 2 <= len(early) < 12

    assert gpu.main(["--stages", "tiles", "--results", str(tmp_path)]) == 0
    late = cells_of(tmp_path / "tiles.json")
    assert len(late) == 12
    assert {key: late[key] for key in early} == early
    assert len(cells_of(tmp_path / "ceilings.json")) == 2  # of each run
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == ["ceilings.json", "report.txt", "tiles.json"]
    for cell in late.values():
        assert cell["tile"] in cell["arms"]
        for arm in cell["arms"].values():
            assert arm["is_right"]
            assert arm["max_error"] <= arm["allowed_error"] < 0.05
            lower, upper = arm["quartiles_ms"]
            assert 0 < lower <= arm["median_ms"] <= upper


@on_cpu
def test_the_deciding_cells_compare_every_arm(tmp_path: Path) -> None:
    assert gpu.main(["--stages", "deciding", "--results", str(tmp_path)]) == 0
    found = cells_of(tmp_path / "attention.json")
    assert list(found) == ["float16 B1 H2 N64 d64"]
    ceiling = cells_of(tmp_path / "ceilings.json")
    for cell in found.values():
        peak = ceiling[cell["run"]]["arms"]["matmul float16"]["tflops"]
        names = {arms.EXACT, *arms.ESTIMATED, *arms.SDPA, arms.DEFAULT, arms.FLEX}
        assert set(cell["arms"]) == names
        assert "No viable backend" in cell["arms"]["sdpa cudnn"]["error"]
        assert cell["arms"][arms.DEFAULT]["picked"] == "FLASH_ATTENTION"
        d = cell["head_dim"]
        for arm in cell["arms"].values():
            if "error" not in arm:
                exact = 4 * 2 * 64 * 64 * d / 1e9 / arm["median_ms"]
                assert arm["exact_tflops"] == pytest.approx(exact, rel=1e-4)
                percent = 100 * arm["done_tflops"] / peak
                assert arm["percent_of_peak"] == pytest.approx(percent, rel=1e-3)
        assert cell["arms"][arms.EXACT]["done_tflops"] == cell["arms"][arms.EXACT]["exact_tflops"]


@on_cpu
def test_the_budget_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.time()
    budget = gpu.TAIL_S + 1  # ends while the measuring process is still importing
    arguments = ["--budget-s", str(budget), "--stages", "sweep", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 0
    assert time.time() - start < budget
    assert "nothing" in capfd.readouterr().out


@on_cpu
def test_tests_with_a_result_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "tests/lowering/test_choose.py"
    chosen = "out_of_memory_is_raised or memory_that_a_cpu"
    monkeypatch.setattr(gpu, "CPU_TESTS", (file, "-k", chosen))
    path = tmp_path / "tests.json"
    known = f"{file}::test_out_of_memory_is_raised_and_not_remembered"
    environment = describe("cpu", TESTED)
    monkeypatch.setattr(gpu, "describe", lambda device, sources: environment)
    Store(path, environment).put(known, {"outcome": "passed", "seconds": 1234.0})
    assert gpu.run_tests("cpu", tmp_path, time.time() + 120)
    text = (tmp_path / "tests.txt").read_text()
    assert text.startswith("2 passed; no test is left\n")
    assert cells_of(path)[known]["seconds"] == 1234.0
    monkeypatch.setattr(gpu, "start_python", None)  # is not called when no test is left
    assert gpu.run_tests("cpu", tmp_path, time.time() + 120)


@on_cpu
def test_a_pytest_that_cannot_start_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CPU_TESTS", ("--no-such-option",))
    assert not gpu.run_tests("cpu", tmp_path, time.time() + 120)
    text = (tmp_path / "tests.txt").read_text()
    assert "not finished" in text
    assert "unrecognized arguments: --no-such-option" in text


# --- its parts ----------------------------------------------------------------------------------


def test_a_store_keeps_cells_and_knows_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    Store(path, ENVIRONMENT).put("a", {"time": 1.23456789, "nan": float("nan"), "list": (1, 2.0)})
    other_commit = Store(path, ENVIRONMENT | {"commit": "1"})
    assert other_commit.is_finished("a")
    assert other_commit.cells["a"]["time"] == 1.2346
    assert other_commit.cells["a"]["nan"] == "nan"
    other_device = Store(path, ENVIRONMENT | {"device": "another"})
    assert not other_device.is_finished("a")
    other_device.put("b", {"unfinished": True})
    assert not other_device.is_finished("b")
    assert set(Store(path, ENVIRONMENT).cells) == {"a", "b"}
    assert len(Store(path, ENVIRONMENT).environments) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_hang_or_are_late_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = tmp_path / "never"
    late = gpu.start_python(["-c", "import time; time.sleep(60)"])
    assert gpu.watch(late, never, time.time() + 0.3) is None
    monkeypatch.setattr(gpu, "START_S", 0.3)
    monkeypatch.setattr(gpu, "HANG_S", 0.2)
    hanging = gpu.start_python(["-c", "import time; time.sleep(60)"])
    assert gpu.watch(hanging, never, time.time() + 60) is None
    monkeypatch.setattr(gpu, "START_S", 60)
    alive = tmp_path / "alive"
    begun = gpu.start_python(["-c", f"open({str(alive)!r}, 'w'); import time; time.sleep(60)"])
    assert gpu.watch(begun, alive, time.time() + 60) is None, "it began, and then was silent"
    assert late.returncode == hanging.returncode == begun.returncode == -signal.SIGKILL
    assert gpu.watch(gpu.start_python(["-c", "exit(7)"]), never, time.time() + 60) == 7


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path, tmp_path / "doing.json", "a run", time.time() + 60)


def test_what_killed_a_process_is_noted_and_left_out(session: Session) -> None:
    session.mark("attention", "cell", "bad")
    doing = json.loads(session.marker.read_text())
    gpu.note_failure(session.device, session.results, doing, -6)
    calls = {"good": lambda: 1, "bad": lambda: pytest.fail("was called")}
    session.stores.clear()
    found = session.first_calls("attention", "cell", calls)
    assert found == {"good": {}, "bad": {"error": "process ended: -6"}}
    gpu.note_failure(session.device, session.results, doing | {"arm": None}, None)
    assert Store(session.results / "attention.json", session.environment).is_finished("cell")


def test_nothing_is_begun_that_would_end_too_late(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)

    def measure(file: str, key: str) -> dict[str, Any]:
        nonlocal now
        now += 0.2
        return {"arms": {}}

    session.until = now + 1
    assert not session.work_through(("x", str(n), measure) for n in range(9))
    assert now < session.until
    assert 1 <= len(session.store("x").cells) <= 4
    session.until = now + 60
    assert session.work_through(("x", str(n), measure) for n in range(6))
    assert len(session.store("x").cells) == 6


def test_errors_are_results_too(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        warnings.warn("because of\nthe mask", stacklevel=1)
        raise RuntimeError("no kernel")

    found = session.compare("attention", "cell", {"bad": refuse, "good": lambda: 1})
    assert found["bad"] == {"error": "RuntimeError: no kernel | because of the mask"}
    assert found["good"]["rounds"] == timing.MIN_ROUNDS["cpu"] or session.device == "cuda"

    def lost() -> None:
        raise RuntimeError("illegal address")

    monkeypatch.setattr(session, "synchronize", lost)
    with pytest.raises(SystemExit) as stopped:
        session.compare("attention", "lost", {"bad": refuse})
    assert stopped.value.code == DEVICE_LOST
    assert not session.store("attention").is_finished("lost")
    assert "no kernel" in session.store("attention").cells["lost"]["arms"]["bad"]["error"]


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.time_calls("cpu", calls, seconds=0.0)
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    slow = timing.time_calls("cpu", {"slow": lambda: time.sleep(0.01)}, seconds=0.0)["slow"]
    assert statistics.median(slow) >= 10
    assert timing.summary([4.0, 1.0, 2.0, 3.0]) == {
        "median_ms": 2.5,
        "quartiles_ms": [1.75, 3.25],
        "rounds": 4,
    }


CASES = {
    "plain": TINY,
    "causal": replace(TINY, is_causal=True),
    "shared keys": replace(TINY, heads=4),
    "padding": replace(TINY, batch=2, mask="padding"),
    "bias": replace(TINY, mask="bias"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [16, 32])
def test_a_wrong_result_is_seen(name: str, rank: int) -> None:
    cell = CASES[name]
    inputs = arms.make_inputs(cell, "cpu")
    out: Tensor = reference.attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.mask,
        scale=cell.scale,
        is_causal=cell.is_causal,
        rank=rank,
    )

    def check(out: Tensor) -> dict[str, Any]:
        return arms.errors(arms.samples(cell, inputs, rank, "lsh-mean"), out, scale=cell.scale)

    right = check(out)
    assert right["is_right"]
    assert right["max_error"] < 1e-5
    assert not check(out * 1.001)["is_right"]
    out[-1, -1, -1, 0] = torch.nan
    assert not check(out)["is_right"]


def test_the_work_of_a_cell() -> None:
    cell = Cell(2, 4, 4, 8192, 64)
    scores = 2 * 4 * 8192**2
    assert cell.exact_flops == 4 * scores * 64 == cell.flops(64)
    column = 2 * 4 * 8192 * 64
    grouping = 2 * 16 * column + 2 * 32 * column + 4 * 2 * 32 * column  # four blocks of 2048
    assert cell.flops(32) == 2 * scores * (32 + 64) + grouping
    assert replace(cell, is_causal=True).exact_flops == cell.exact_flops / 2
    assert cell.bytes == 4 * column * 2
    shared = replace(cell, key_heads=1, mask="bias", tokens=128)
    assert shared.bytes == 2 * (2 * 2 * (4 + 1) * 128 * 64 + 4 * 128 * 128)
    assert cells.speedup_limit(64, 2) == pytest.approx(4 / 3)
    assert cells.speedup_limit(128, 4) == pytest.approx(1.6)


def test_the_grid_begins_with_what_decides() -> None:
    assert len(cells.deciding("cuda")) == 12
    assert {(c.batch, c.heads) for c in cells.deciding("cuda")} == {(4, 32), (1, 10)}
    for stage in (cells.deciding, cells.variants, cells.prologue, cells.sweep, cells.tiles):
        for device in ("cuda", "cpu"):
            keys = [cell.key for cell in stage(device)]
            assert len(keys) == len(set(keys)) > 0
    assert {c.tokens for c in cells.sweep("cuda")} == set(cells.LENGTHS)
    assert len(cells.sweep("cpu")) < 5
    # The same shape has one name in all stages, so that nothing is measured twice.
    assert set(cells.deciding("cuda")) < set(cells.sweep("cuda"))


def test_failed_tests_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "tests.json", ENVIRONMENT)
    store.put("a", {"outcome": "passed", "seconds": 1.0})
    store.put("b", {"outcome": "failed", "seconds": 1.0, "text": "assert 1 == 2"})
    text, is_green = resumable.summarise(store)
    assert text.startswith("1 passed, 1 failed; not finished: goes on next time\n")
    assert "--- failed: b\nassert 1 == 2" in text
    assert not is_green


# --- what is made of the results; all numbers are invented --------------------------------------


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    """Flash takes N^2 / 1e6 ms, cuDNN 0.8 of it; G = 4 wins from 4096 on, causal nowhere."""
    store = Store(tmp_path / "attention.json", ENVIRONMENT)
    old = Store(tmp_path / "attention.json", ENVIRONMENT | {"device": "an older one"})
    old.put("old", {"run": "2000", "arms": {}})
    store.cells = old.cells

    def arm(ms: float, is_right: bool = True) -> dict[str, Any]:
        return {"median_ms": ms, "is_right": is_right}

    for is_causal in (False, True):
        for n in (1024, 2048, 4096, 8192):
            flash = n**2 / 1e6
            ours = 0.75 * flash if n >= 4096 and not is_causal else 1.5 * flash
            cell = Cell(1, 10, 10, n, 128, is_causal=is_causal)
            times = {
                "sdpa flash": arm(flash),
                "sdpa cudnn": arm(0.8 * flash),
                "sdpa efficient": {"error": "refused"},
                "flex": arm(0.7 * flash),
                "ours, rank d": arm(0.1 * flash, is_right=False),
                "projection G=2": arm(0.5 * flash),  # faster than all, and not exact
                "lsh-mean G=2": arm(1.1 * flash),
                "lsh-mean G=4": arm(ours),
            }
            shape = {name: getattr(cell, name) for name in cell.__dataclass_fields__}
            store.put(cell.key, {**shape, "run": "2001", "arms": times})
    store.put("failed", {"error": "process ended: -6", "arms": {}})
    return tmp_path


def test_table(invented: Path) -> None:
    lines = rows.table(rows.load(invented / "attention.json")[1]).splitlines()
    assert len(lines) == 2 + 8
    assert lines[5] == (
        "| float16 | 1, 10 | 8192 | 128 |  | 67.109 | 46.976 (flex) "
        "| 2.00, 1.40 | -, - | -, - | -, - | 0.91, 0.64 | 1.33, 0.93 | 1.33, 1.60 |"
    )


def test_plots(invented: Path) -> None:
    written = plot.plot(invented)
    assert [path.name for path in written] == [
        "time-float16-B1-H10.png",
        "speedup-float16-B1-H10.png",
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_speedups_are_drawn_beside_their_limit(invented: Path) -> None:
    import matplotlib.pyplot as plt

    _, measured = rows.load(invented / "attention.json")
    figure, ax = plt.subplots()
    plot.draw_speedups(ax, [r for r in measured if not r.cell["is_causal"]], 128)
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn["lsh-mean, G = 4, over flash"] == pytest.approx(
        [1 / 1.5] * 2 + [1 / 0.75] * 2, rel=1e-4
    )
    over_best = [0.7 / 1.5] * 2 + [0.7 / 0.75] * 2
    assert drawn["lsh-mean, G = 4, over best exact"] == pytest.approx(over_best, rel=1e-4)
    assert set(drawn["limit 2d / (d/G + d), G = 4"]) == {1.6}
    plt.close(figure)


# --- on a CPU: other libraries beside ours, and the plot ------------------------------------------


def test_a_peer_without_a_time_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)

    def refuse(cell: Cell, inputs: arms.Inputs, threads: int) -> peer_calls.Call:
        raise NotImplementedError("no kernel\nfor this")

    def zeros(cell: Cell, inputs: arms.Inputs, threads: int) -> peer_calls.Call:
        return peer_calls.Call(lambda: None, lambda: torch.zeros_like(inputs.q))

    tried = {name: peers.ARMS[name] for name in (peers.SDPA, *peers.RUNTIMES)}
    tried |= {"refuses": peer_calls.Arm(refuse), "errs": peer_calls.Arm(zeros)}
    cell = peers.measure(Cell(1, 2, 2, 64, 32, "float32"), 1, 2, 0.0, tried)
    found = cell["arms"]
    assert list(found) == list(tried)
    assert found["ONNX Runtime"] == {"reason": "not installed: onnxruntime"}
    assert found["OpenVINO"] == {"reason": "not installed: openvino"}
    assert found["refuses"] == {"reason": "NotImplementedError: no kernel"}
    assert found["errs"]["reason"].startswith("errs by 1, at most ")
    assert list(peers.times(cell)) == [peers.SDPA]
    assert len(found[peers.SDPA]["ms"]) == 2
    assert 0 < found[peers.SDPA]["max_error"] <= found[peers.SDPA]["allowed_error"] < 1e-5
    assert len(cell["load"]) == 2


@pytest.fixture
def beside_peers() -> list[dict[str, Any]]:
    """In fp32 OpenVINO is the better runtime; in bf16 neither runs."""

    def cell(dtype: str, **told: Any) -> dict[str, Any]:
        told = {
            name: {"ms": t} if isinstance(t, list) else {"reason": t} for name, t in told.items()
        }
        told = {name.replace("_", " "): arm for name, arm in told.items()}
        shape = {"dtype": dtype, "head_dim": 64, "tokens": 1024, "kind": "full"}
        return {**shape, "arms": told}

    return [
        cell("float32", SDPA=[8.0, 16.0, 8.0], ONNX_Runtime=[6.0] * 3, OpenVINO=[5.0, 10.0, 5.0]),
        cell("bfloat16", SDPA=[8.0] * 3, ONNX_Runtime="no kernel", OpenVINO="not installed: x"),
    ]


def test_ours_is_compared_with_the_better_runtime(beside_peers: list[dict[str, Any]]) -> None:
    single, half = beside_peers
    for cell in beside_peers:
        cell["arms"]["rank d"] = {"ms": [4.0, 8.0, 2.0]}
    assert peers.better_runtime(single) == "OpenVINO"
    assert peers.better_runtime(half) is None
    assert peers.speed(single, "rank d", peers.SDPA) == 2.0  # of 2, 2 and 4, each within its round
    assert peers.speed(single, "rank d", "OpenVINO") == 1.25
    assert peers.speed(half, "rank d", None) is None
    assert peers.speed(half, "OpenVINO", peers.SDPA) is None
    lines = peers.table(beside_peers).splitlines()
    words = [[word.strip() for word in line.split("|")[1:-1]] for line in lines]
    assert dict(zip(words[0], words[2], strict=True)) == {
        **dict.fromkeys(peer_calls.ARMS.keys() - {peers.SDPA}, "-"),
        "dtype": "float32", "d": "64", "N": "1024", "kind": "full",
        "ONNX Runtime": "1.33", "OpenVINO": "1.60", "rank d": "2.00",
        "rank d / runtime": "1.25", "projection G=2 / runtime": "-", "runtime": "OpenVINO",
    }  # fmt: skip
    assert words[3][-1] == words[3][-3] == "-"
    assert peers.refusals(beside_peers) == [
        "ONNX Runtime: no kernel (bfloat16 d=64 N=1024 full)",
        "OpenVINO: not installed: x (bfloat16 d=64 N=1024 full)",
    ]
    same = [half, half | {"tokens": 4096}]
    assert peers.refusals(same)[0].endswith(
        "(bfloat16 d=64 N=1024 full, bfloat16 d=64 N=4096 full)"
    )


@pytest.mark.parametrize("kind", peers.KINDS)
def test_our_arms_compute_what_they_say(kind: str) -> None:
    """768 tokens: two blocks of the strict form, and more rows that count in each than are wide."""
    cell = Cell(1, 2, 2, 768, 32, "float32", **peers.KINDS[kind])
    others = ("compiled SDPA", "FlexAttention", *peer_calls.RUNTIMES)
    ours = {name: arm for name, arm in peer_calls.ARMS.items() if name not in others}
    found = peers.measure(cell, 1, 2, 0.0, ours)
    assert found["kind"] == kind
    assert {name: arm.get("reason") for name, arm in found["arms"].items()} == {
        name: None
        for name in ours
        if "G=4" not in name and ("strict" not in name or kind == "causal")
    }


def test_bars_are_about_the_cells_that_were_measured(beside_peers: list[dict[str, Any]]) -> None:
    single = beside_peers[0]
    single["arms"]["rank d"] = {"ms": [4.0, 8.0, 4.0]}
    lines = bars.held(map(peers.timed, beside_peers))
    shape = ["rank d", "SDPA", "float32", 64, 1024, "full"]
    assert lines[0] == [*shape, 1.6, "2.00", "held"]
    assert lines[1][2:] == ["bfloat16", 64, 1024, "full", 2.8, "-", "not measured"]
    assert len(lines) == 2


def test_grids_of_the_cpu() -> None:
    def cells(**asked: Any) -> list[Cell]:
        unset = {"grid": "full", "kinds": None, "widths": None, "tokens": None}
        asked = {**unset, "dtypes": peers.DTYPES, **asked}
        return peers.grid(argparse.Namespace(**asked))

    assert len(cells()) == len(set(cells())) == 4 * 5 * 4 * 2
    assert len(cells(grid="quick")) == 2 * 2 * 2 * 2
    (only,) = cells(kinds=["bias"], widths=[80], tokens=[197], dtypes=["bfloat16"])
    assert only == Cell(1, 16, 16, 197, 80, "bfloat16", mask="bias")


@pytest.fixture
def measured_on_cpu() -> dict[str, Any]:
    """G = 2 is 1.25 times as fast as rank d, rank d twice as fast as SDPA."""
    ms = {"SDPA": [2.0] * 3, "rank d": [1.0] * 3, "projection G=2": [0.5, 0.8, 1.0]}
    shapes = [(64, 4096, False), (64, 1024, False), (128, 1024, False), (128, 1024, True)]
    told = [
        {"dtype": dtype, "d": d, "tokens": n, "causal": is_causal, "ms": ms}
        for dtype in ("bfloat16", "float32")
        for d, n, is_causal in shapes
    ]
    return {"cpu": "a CPU", "torch": "2", "threads": 1, "cells": told}


def test_cpu_plot_has_a_panel_for_each_width_and_dtype(measured_on_cpu: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure = cpu_plot.figure_of(measured_on_cpu)
    above, below = figure.axes[:4], figure.axes[4:]
    titles = ["float32, d = 64", "float32, d = 128", "bfloat16, d = 64", "bfloat16, d = 128"]
    assert [ax.get_title() for ax in above] == titles
    assert len(below) == 4

    def drawn(ax: Any) -> dict[str, Any]:
        return {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}

    assert drawn(above[0]) == {"projection, G = 2": [[1024, 1.25], [4096, 1.25]]}
    assert drawn(below[1]) == {
        "projection, G = 2": [[1024, 2.5]],
        "rank d (exact, ours)": [[1024, 2.0]],
    }
    limits = {line.get_label(): line.get_ydata()[0] for line in above[0].lines}
    assert limits["limit 2d / (d/G + d), G = 2"] == pytest.approx(4 / 3)
    plt.close(figure)


def test_cpu_plot_is_a_file(measured_on_cpu: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text(json.dumps(measured_on_cpu))
    cpu_plot.plot(tmp_path / "measured.json", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_cpu_plot_is_small() -> None:
    assert cpu_plot.PICTURE.stat().st_size <= 120_000
