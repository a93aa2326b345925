"""The short runs on a GPU: small calls, compiling ahead, the cache that travels, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    arms,
    cells,
    compile_ahead,
    gpu,
    measure,
    smoke,
    stages,
    targets,
    timing,
    triton_cache,
    wheels,
)
from benchmarks.session import Session
from benchmarks.store import ROOT, Store, describe
from distr_compile.kernels.attention.triton_fwd import Tile
from distr_compile.lowering import cuda
from distr_compile.lowering.call import Approximation
from distr_compile.lowering.choose import Implementation

ENVIRONMENT = {"device": "no such device", "commit": "0", "torch": "0"}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes on a GPU")


# --- the first stage, tiny ------------------------------------------------------------------------


@on_cpu
def test_the_first_stage_runs_without_a_gpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--stages", "first", "--results", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.json", "report.txt"]
    found = json.loads((tmp_path / "first.json").read_text())["cells"]
    kinds = [cell["kind"] for cell in found.values()]
    assert kinds.count("smoke") == len(smoke.cases("cpu")) == 22
    assert {"ceilings", "attention", "tiles", "prologue"} < set(kinds)
    for cell in found.values():
        for name, arm in cell["arms"].items():
            assert arm.get("is_right", True), name
    (prologue,) = (cell for cell in found.values() if cell["kind"] == "prologue")
    assert set(prologue["prologue_percent"]) == set(stages.ESTIMATORS)
    kernels = {name for name in prologue["arms"] if name.startswith("projection: _")}
    assert len(kernels) == 5
    lines = capfd.readouterr().out.splitlines()
    last = lines[-targets.MOST_LINES :]
    (start,) = (i for i, line in enumerate(last) if line.startswith("--- first: "))
    assert (tmp_path / "report.txt").read_text().splitlines()[-3:] == last[-3:]
    assert f"22 of {kinds.count('smoke')} right" in "\n".join(last[start:])
    assert any(targets.NOTHING in line for line in last[start:])


def test_small_calls_that_fail_are_tried_by_pointers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tmp_path, tmp_path / "doing.json", "a run", time.time() + 60)
    exact, lsh = (smoke.cases("cpu")[i] for i in (0, 13))
    monkeypatch.setattr(smoke, "cases", lambda device: [exact, lsh])

    def fail(call: Any) -> None:
        raise RuntimeError("no descriptors")

    assert session.work_through(stages._small_calls(session))
    assert not session.by_pointers
    assert len(session.store("first").current()) == 2
    fallback = cuda.IMPLEMENTATION.fallback
    monkeypatch.setattr(cuda, "IMPLEMENTATION", Implementation("x", str, fail, fallback))
    session.results = tmp_path / "again"
    session.stores.clear()
    assert session.work_through(stages._small_calls(session))
    assert session.by_pointers
    found = session.store("first").current()
    assert len(found) == 4
    assert "no descriptors" in found["smoke: exact"]["arms"]["exact"]["error"]
    assert found["smoke: exact, by pointers"]["arms"]["exact, by pointers"]["is_right"]


def test_a_wrong_small_call_is_seen() -> None:
    case = replace(smoke.cases("cpu")[0], how=Approximation("calibrated", 16))
    arm, inputs, _ = smoke.run(case, "cpu")
    assert arm.bases is not None
    A, B = arm.bases
    scores = (inputs.q.double() @ A.half().double()) @ (inputs.k.double() @ B.half().double()).mT
    right = ((scores * case.cell.scale).softmax(-1) @ inputs.v.double()).half()
    assert smoke.check(case, arm, inputs, right)["is_right"]
    for wrong in (right * 1.1, right.clone()):
        wrong[0, 0, -1] = wrong[0, 0, -1] * 1.1
        assert not smoke.check(case, arm, inputs, wrong)["is_right"]


def test_draws_are_the_same_on_every_device() -> None:
    cell = replace(smoke.PLAIN, tokens=40)
    here, same = (arms.make_inputs(cell, "cpu", drawn_on="cpu").q for _ in range(2))
    assert torch.equal(here, same)
    assert arms.make_inputs(cell, "meta").q.stride() == here.stride()


def test_launches_are_timed_by_name() -> None:
    cell = cells.short_run("cpu", cells.FIRST)[0]
    call = arms.our_arm(cell, arms.make_inputs(cell, "cpu"), Approximation("lsh-mean", 16)).call
    kernels = ("_project_kernel", "_order_kernel", "_group_kernel", "_attention_fwd")
    times = timing.time_launches("cpu", call, rounds=2)
    assert set(times) == {*kernels, timing.WHOLE}
    for i in range(2):
        assert 0 < sum(times[name][i] for name in kernels) < times[timing.WHOLE][i]


class FakeEvent:
    """Of a device whose clock is the host's."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


def test_launches_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(0))
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    cell = cells.short_run("cpu", cells.FIRST)[0]
    call = arms.our_arm(cell, arms.make_inputs(cell, "cpu"), Approximation("calibrated", 16)).call
    times = timing.time_launches("cuda", call, rounds=3)
    assert set(times) == {"_attention_fwd", timing.WHOLE}
    assert all(0 < t < whole for t, whole in zip(*times.values(), strict=True))
    naps = [wait for wait in waits if wait]
    assert len(naps) == 3
    # Longer than the host took to queue the call, by the fastest clock there is.
    assert min(naps) / timing.CYCLES_PER_S > max(times[timing.WHOLE]) / 1e3 / 2
    assert 9 < timing.sustained_ms(lambda: time.sleep(0.01), seconds=0.2) < 30


def test_six_tiles_at_most_are_tried() -> None:
    for width in (64, 128):
        tried = measure.candidates(Tile(use_tma=True), width)
        assert len(tried) == len(set(tried)) == 6
        assert [tile.warp_specialize for tile in tried] == [False] * 5 + [True]
        assert not any(t.warp_specialize for t in measure.candidates(Tile(), width))


# --- compiling ahead ------------------------------------------------------------------------------


def test_kernels_are_compiled_once_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, one small kernel of each kind; a third finds all of them claimed."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks import arms, compile_ahead\n"
        "from benchmarks.cells import Cell\n"
        "from distr_compile.lowering.call import Approximation\n"
        "cell = Cell(1, 2, 2, 64, 32)\n"
        "inputs = arms.make_inputs(cell, 'meta')\n"
        "made = arms.our_arm(cell, inputs, Approximation('lsh-mean', 16)).call\n"
        "compile_ahead.calls = lambda stages, architecture: iter([('one', made), ('two', made)])\n"
        "compile_ahead.work(['first'], 'sm_90', Path(sys.argv[1]), 0.5)\n"
    )
    claims = tmp_path / "claims"
    claims.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def work() -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-c", script, str(claims)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    told = work()
    names = [line["kernel"].partition("-")[0] for line in told]
    assert names == ["_project_kernel", "_order_kernel", "_group_kernel", "_attention_fwd"]
    assert all(line["s"] > 0 for line in told)
    assert not work()
    (cubin,) = (tmp_path / "cache").glob("*/_attention_fwd.cubin")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    packed = triton_cache.pack(tmp_path)
    assert packed is not None

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    triton_cache.unpack(packed, elsewhere)
    moved = elsewhere / cubin.parent.name / cubin.name
    assert moved.read_bytes() == cubin.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in elsewhere.glob("*/*.cubin")}
    assert len(before) == 4
    for claim in claims.iterdir():
        claim.unlink()
    environment["TRITON_CACHE_DIR"] = str(elsewhere)
    assert len(work()) == 4  # asked for again, and found there: nothing was written anew
    assert {path: path.stat().st_mtime_ns for path in elsewhere.glob("*/*.cubin")} == before


def test_what_the_interpreter_runs_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.compile_only import compiling

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"), compiling("sm_90", print):
        pass


def test_a_session_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [sys.executable, "-c", 'import time; print(\'{"kernel": "k", "s": 1.5}\', flush=True);'
            "time.sleep(60)"]  # fmt: skip
    real, begin = subprocess.Popen, time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, **options: real(slow, **options))
        pool = compile_ahead.Pool(["first"], "sm_90", 2)
    monkeypatch.setattr(compile_ahead, "WAIT_S", 2.0)
    session = Session(tmp_path, tmp_path / "doing.json", "a run", time.time() + 60)
    found = compile_ahead.cell(session, pool, "first", "compiling")
    assert time.monotonic() - begin < 50
    assert found["arms"] == {"k": {"median_s": 1.5}}
    assert found["processes"] == 2
    assert all(process.poll() is not None for process in pool.processes)


def test_a_cache_that_travels_is_small_and_stays_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    for n in range(4):
        kernel = folder / f"kernel{n}"
        kernel.mkdir(parents=True)
        (kernel / "f.cubin").write_bytes(os.urandom(1000))
        (kernel / "f.llir").write_bytes(os.urandom(100_000))
        os.utime(kernel, (n, n))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(triton_cache, "LIMIT_BYTES", 4000)
    packed = triton_cache.pack(tmp_path)
    assert packed is not None
    assert packed.stat().st_size <= 4000
    with tarfile.open(packed) as tar:
        assert tar.getnames() == [f"kernel{n}/f.cubin" for n in (3, 2, 1)]

    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(triton_cache.tempfile, "gettempdir", lambda: str(tmp_path / "new"))
    used = triton_cache.use(packed)
    assert os.environ["TRITON_CACHE_DIR"] == str(used)
    assert sorted(p.parent.name for p in used.glob("*/f.cubin")) == [
        f"kernel{n}" for n in (1, 2, 3)
    ]
    assert triton_cache.use(tmp_path / "none there") == used

    hostile = tmp_path / "hostile.tgz"
    with tarfile.open(hostile, "w:gz") as tar:
        tar.add(packed, "../outside")
        tar.add(packed, "a/b/c")
    inner = tmp_path / "inner"
    inner.mkdir()
    assert triton_cache.unpack(hostile, inner) == 0
    assert not list(inner.iterdir())
    assert not (tmp_path / "outside").exists()


# --- carried wheels -------------------------------------------------------------------------------


def test_the_printed_line_runs_in_bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wheel of one module in the place of all of them."""
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("benchmarks/__init__.py", "")
        wheel.writestr("benchmarks/gpu.py", "import os, sys; print(*sys.argv[1:], os.environ)")
    monkeypatch.setattr(wheels, "SITE", str(site))
    line = wheels.line(folder)
    for results, told in (("", "--stages first environ"), ("r", "--stages first --results r env")):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RESULTS": results},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(told), done.stderr
        assert "DISTR_COMMIT" in done.stdout
    (folder / "broken.whl").write_text("no zip")
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True).returncode


def test_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTR_COMMIT", "abc")
    assert describe("cpu")["commit"] == "abc"


# --- what is printed; all numbers are invented ----------------------------------------------------


def test_the_tables_of_the_docs_are_those_of_the_targets() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    nothing = targets.Found([])
    for table in (targets.targets_table(nothing), targets.paper_table(nothing)):
        assert "\n".join(table) in page
    readme = (ROOT / "README.md").read_text()
    for words in targets.README:
        assert words in readme


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    """Flash takes 10 ms, the best exact kernel 8, projection 5 and calibrated 4."""
    store = Store(tmp_path / "first.json", ENVIRONMENT)

    def arm(ms: float, **told: Any) -> dict[str, Any]:
        return {"median_ms": ms, "is_right": True, **told}

    for cell in (*cells.FIRST, replace(cells.FIRST[0], is_causal=True)):
        shape = {name: getattr(cell, name) for name in cell.__dataclass_fields__}
        faster = 0.5 if cell.is_causal else 1.0  # which must not get into the table
        times = {
            "sdpa flash": arm(10.0),
            "sdpa cudnn": arm(8.0),
            arms.EXACT: arm(9.0),
            "projection G=2": arm(5.0 * faster, sustained_ms=5.5),
            "calibrated G=2": arm(4.0 * faster),
            "lsh-mean G=2": arm(1.0, is_right=False),
        }
        told = {"kind": "attention", **shape, "run": "2001", "arms": times}
        store.put(f"attention: {cell.key}", told)
    big = cells.FIRST[0]
    shape = {name: getattr(big, name) for name in big.__dataclass_fields__}
    told = {"kind": "prologue", **shape, "rank": 64, "run": "2001"}
    times = {"projection: _solve_kernel": arm(0.16), "projection: whole call": arm(5.0)}
    percent = {"projection": 31.0, "calibrated": 9.5}
    store.put("prologue", {**told, "prologue_percent": percent, "arms": times})
    times = {"128x64/4/3/use_tma": arm(3.0), "128x128/8/2/use_tma": arm(4.0), "bad": {"error": "x"}}
    told = {"kind": "tiles", **shape, "rank": 64, "tile": "128x128/8/2/use_tma", "run": "2001"}
    store.put("tiles", {**told, "arms": times})
    ceiling = {"copy": {"gb_per_s": 4000.0}, "matmul float16": {"tflops": 700.0}}
    store.put("ceilings", {"kind": "ceilings", "run": "2001", "arms": ceiling})
    store.put("smoke: a", {"kind": "smoke", "run": "2001", "arms": {"a": arm(1.0)}})
    store.put("smoke: b", {"kind": "smoke", "run": "2001", "arms": {"b": {"error": "boom"}}})
    return tmp_path


def test_targets_are_filled_in(invented: Path) -> None:
    page = targets.page(invented, ENVIRONMENT)
    assert (
        "| over SDPA flash, d = 128, G = 2 | 1.37 | - | projection 2.00, calibrated 2.50 |" in page
    )
    over_best = "| over the best exact kernel, d = 128, G = 2 | 1.0 | - "
    assert f"{over_best}| projection 1.60, calibrated 2.00 |" in page
    assert "| over SDPA flash, d = 64, G = 2 | 1.37 | - | not measured |" in page
    told = "projection 31.0 %, calibrated 9.5 %"
    assert f"| share of grouping, N = 8k | <= 5 % | - | {told} |" in page
    assert "| share of grouping, N = 4k | <= 10 % | - | not measured |" in page
    changed = [line for line in page if line.startswith("README.md: +")]
    assert len(changed) == len(targets.README)
    assert all("projection 2.00, calibrated 2.50 times" in line for line in changed)
    other = targets.page(invented, ENVIRONMENT | {"device": "another"})
    assert not any("2.50" in line for line in other)


def test_the_last_lines_say_what_decides(invented: Path) -> None:
    lines = targets.deciding_lines(invented, ENVIRONMENT)
    assert len(lines) <= targets.MOST_LINES
    text = "\n".join(lines)
    assert "small calls against fp64: 1 of 2 right; not: b (boom)" in text
    assert "copy 4000 GB/s, matmul float16 700 TFLOP/s" in text
    assert "projection: G=2 5.000 ms, 2.00 x flash, 1.60 x best, 5.500 ms without a pause" in text
    assert "lsh-mean: not measured" in text
    assert (
        "tiles d128 r64 (table 128x128/8/2/use_tma), ms: 128x64/4/3 3.000, 128x128/8/2 4.000"
        in text
    )
    assert "failed: bad" in text
    assert "projection G=2 N8192: 31.0 % before attention; _solve_kernel 0.160" in text
    assert "compiling ahead: not measured" in text
    assert not targets.deciding_lines(invented / "nowhere", ENVIRONMENT)


def test_the_budget_of_the_short_stages() -> None:
    assert stages.SHORT == {"first": 200.0, "second": 380.0}
    order = [*stages.STAGES]
    assert order[:2] == ["first", "second"]
