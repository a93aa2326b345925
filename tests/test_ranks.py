"""Processes that share batches: what they find is what one process finds, batch for batch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distr_compile
from distr_compile import Batch
from distr_compile.accuracy import ranks
from distr_compile.accuracy.evaluate import evaluate
from distr_compile.bases import Bases
from distr_compile.policy import Policy
from distr_compile.tuning.cost import Clock
from tests.processes import together

WORLD = 2
POLICIES = {
    "half": {"default": {"group_size": 2, "min_seq_len": 0}},
    "mean": {"default": {"group_size": 2, "min_seq_len": 0, "estimator": "lsh-mean"}},
}
METRICS = ("f1", "top1", "perplexity", "rank-correlation", "kl", "sqnr")
CANDIDATES = [{"group_size": 2}, {"group_size": 2, "estimator": "lsh-mean"}]


class Tagger(nn.Module):
    """Scores of five classes for every token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(3 * x))
        return scores


def tagger() -> nn.Module:
    torch.manual_seed(1)
    return Tagger().eval()


def five() -> Iterator[Batch]:
    """Five batches, which two processes cannot share evenly.

    All are of one size: torch 2.11 leaves an encoder layer exact where the batch becomes symbolic,
    and processes would meet another size at different places.
    """
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 48, 64, generator=g)
        yield Batch((x,), labels=torch.randint(5, x.shape[:2], generator=g))


def one() -> Iterator[Batch]:
    """Fewer batches than processes."""
    yield next(five())


def regressed(batches: Any, **options: Any) -> dict[str, Any]:
    found = distr_compile.regress(
        tagger(), batches, POLICIES, metrics=METRICS, progress=False, **options
    )
    return found.to_dict()


def tuned(path: Path | None = None) -> dict[str, Any]:
    options: dict[str, Any] = {"time": "products", "candidates": CANDIDATES, "progress": False}
    return distr_compile.tune(tagger(), five, 0.2, metric="kl", path=path, **options).to_dict()


def calibrated(path: Path) -> dict[str, Any]:
    """A B^T of every layer and key head at rank 16, the numbers of rows."""
    return products(distr_compile.calibrate(tagger(), five, path=path, progress=False).bases.layers)


def products(layers: Any) -> dict[str, Any]:
    return {
        name: [(of.basis_q[..., :16] @ of.basis_k[..., :16].mT).tolist(), of.rows]
        for name, of in layers.items()
    }


def rows_of(limit: int) -> dict[str, list[list[float]]]:
    """The rows of each metric, example by example."""
    policies: dict[str, Policy | None] = {
        "exact": None,
        "half": Policy(POLICIES["half"]["default"]),
    }
    found = evaluate(tagger(), five, METRICS, policies, limit=limit)
    return {f"{p}/{m}": x.tolist() for p, of in found.items() for m, x in of.rows.items()}


def dealt(count: int) -> list[list[int]]:
    """What this process worked on, and what it was told in the end."""
    own: list[int] = []

    def work(batch: Batch) -> list[Tensor]:
        own.append(batch.args[0])
        return [torch.tensor([batch.args[0] ** 2])]

    batches = [Batch((number,)) for number in range(count)]
    told = [int(x) for _, (x,) in ranks.dealt(batches, work)]
    share = list(ranks.Share(batches))
    assert [batch.args[0] for batch in share] == own
    return [own, told]


def failing(where: int) -> str:
    """What is said where the process ``where`` fails."""

    def work(batch: Batch) -> list[Tensor]:
        if ranks.rank() == where:
            raise ValueError("no memory")
        return [torch.zeros(1)]

    try:
        list(ranks.dealt([Batch((number,)) for number in range(3)], work))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def shuffled() -> str:
    """What is said where every process has data of its own."""
    g = torch.Generator().manual_seed(ranks.rank())
    batches = [Batch((torch.randn(2, 40, 64, generator=g),)) for _ in range(2)]
    try:
        distr_compile.calibrate(tagger(), batches, path="unused", progress=False)
    except ValueError as error:
        return str(error)
    return "nothing"


def interrupted(out: Path) -> None:
    """A run of one process that stops when it has the metrics of three batches."""
    walks: list[int] = []

    def breaking() -> Iterator[Batch]:
        walks.append(1)
        for number, batch in enumerate(five()):
            if number == 3 and len(walks) == 2:  # the first walk is for the errors of layers
                raise KeyError("no more")
            yield batch

    with contextlib.suppress(KeyError):
        regressed(breaking, out=out)


def resumed(out: Path) -> list[Any]:
    """What goes on from there, and what it says."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return [regressed(five, out=out), said.getvalue()]


def of_two(folder: str) -> dict[str, Any]:
    """All that one of two processes finds."""
    timed: list[int] = []
    original = Clock.of_sites

    def of_sites(self: Clock, *args: Any, **options: Any) -> float:
        timed.append(1)
        return original(self, *args, **options)

    mine = Path(folder) / str(dist.get_rank())
    mine.mkdir()
    Clock.of_sites = of_sites  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        interrupted(mine / "resumed.json")
    with ranks.dealing():
        found: dict[str, Any] = {
            "dealt": [dealt(count) for count in range(6)],
            "failing": [failing(0), failing(1)],
            "shuffled": shuffled(),
            "rows": rows_of(5),
            "five": regressed(five, out=mine / "five.json"),
            "resumed": resumed(mine / "resumed.json"),
            "one": regressed(one, limit=1),
            "tuned": tuned(mine / "distr.toml"),
            "calibrated": calibrated(mine / "bases.safetensors"),
        }
        found["timed"] = len(timed)
        found["written"] = sorted(path.name for path in mine.iterdir())
    return found


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()  # torch 2.11 counts what was compiled before


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("files")
    return together(of_two, WORLD, tmp_path_factory.mktemp("processes"), str(folder))


def assert_same(got: Any, wanted: Any, within: float = 1e-6) -> None:
    """Numbers within a share of themselves, all else equal."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_same(got[key], wanted[key], within)
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b, within)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=within, abs=within, nan_ok=True)
    else:
        assert got == wanted


def test_batches_are_dealt_in_turn_none_twice_and_none_dropped(found: list[Any]) -> None:
    for count in range(6):
        for number, process in enumerate(found):
            own, told = process["dealt"][count]
            assert own == list(range(number, count, WORLD))
            assert told == [i**2 for i in range(count)]


def test_the_rows_are_those_of_one_process(found: list[Any]) -> None:
    alone = rows_of(5)
    assert len(alone["half/f1"]) == 15
    for process in found:
        assert_same(process["rows"], alone)


@pytest.mark.parametrize("batches", [five, one])
def test_regress_finds_what_one_process_finds(found: list[Any], batches: Any) -> None:
    options = {} if batches is five else {"limit": 1}
    alone = json.loads(json.dumps(regressed(batches, **options)))
    assert {"f1", "rank-correlation"} <= alone["policies"]["half"]["metrics"].keys()
    for process in found:
        assert_same(process[batches.__name__], alone)


def test_what_one_process_began_two_go_on_with(found: list[Any]) -> None:
    alone = json.loads(json.dumps(regressed(five)))
    for process in found:
        assert_same(process["resumed"][0], alone)
    first, second = (process["resumed"][1] for process in found)
    assert "goes on after 3 batches" in first
    assert second == ""


def test_tune_decides_what_one_process_decides(found: list[Any]) -> None:
    alone = json.loads(json.dumps(tuned()))
    for process in found:
        assert_same(process["tuned"], alone)
    first, second = (process["timed"] for process in found)
    assert first > 0
    assert second == 0, "only the first process times"


def test_calibrate_makes_the_bases_of_one_process(found: list[Any], tmp_path: Path) -> None:
    alone = calibrated(tmp_path / "bases.safetensors")
    assert all(rows == 15 * 48 for _, rows in alone.values())
    for process in found:
        assert_same(process["calibrated"], alone)


def test_only_the_first_process_writes(found: list[Any]) -> None:
    first, second = (process["written"] for process in found)
    files = "bases.safetensors distr.toml distr.toml.state.json five.json resumed.json"
    assert first == files.split()
    assert second == []


def test_where_one_fails_all_do(found: list[Any]) -> None:
    own, other = "ValueError: no memory", "OtherProcessError: process {}: ValueError: no memory"
    assert found[0]["failing"] == [own, other.format(1)]
    assert found[1]["failing"] == [other.format(0), own]


def test_data_that_differs_is_an_error(found: list[Any]) -> None:
    for process in found:
        assert process["shuffled"].startswith("batches: got others in other processes; accepted: ")


def torchrun(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *command, "-m", "distr_compile", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )


DATA = ("tests.test_ranks:tagger", "--data", "tests.test_ranks:five")


def test_regress_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "half.toml").write_text("[default]\ngroup_size = 2\nmin_seq_len = 0\n")
    given = ["regress", *DATA, "--metric", "f1", "--policy", "half.toml", "--json", "out.json"]
    done = torchrun(*given, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("half") == 1, "one process speaks"
    found = json.loads((tmp_path / "out.json").read_text())
    alone = json.loads(json.dumps(regressed(five)))["policies"]["half"]["metrics"]["f1"]
    assert_same(found["policies"]["half"]["metrics"]["f1"], alone)


def test_tune_under_torchrun(tmp_path: Path) -> None:
    given = ["--budget", "0.2", "--metric", "kl", "--time", "products", "--out", "two.toml"]
    done = torchrun("tune", *DATA, *given, folder=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    options: dict[str, Any] = {"time": "products", "metric": "kl", "progress": False}
    distr_compile.tune(tagger(), five, 0.2, path=tmp_path / "one.toml", **options)
    two, one = (Policy.load(tmp_path / name) for name in ("two.toml", "one.toml"))
    assert two == one
    assert two != Policy()


def test_calibrate_under_torchrun(tmp_path: Path) -> None:
    done = torchrun("calibrate", *DATA, "--out", "two.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = calibrated(tmp_path / "one.safetensors")
    found = Bases.from_bytes((tmp_path / "two.safetensors").read_bytes()).layers
    assert_same(products(found), alone)


def test_a_command_that_cannot_be_shared_says_so(monkeypatch: Any, capsys: Any) -> None:
    from distr_compile.__main__ import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["explain", "timm:x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("distr: explain: got several processes; accepted: calibrate, regress")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, ""),
        ({"WORLD_SIZE": ""}, ""),
        ({"RANK": "0"}, ""),
        (
            {"WORLD_SIZE": "abc", "RANK": "0"},
            "distr: WORLD_SIZE: got 'abc'; accepted: a number",
        ),
        ({"WORLD_SIZE": "", "RANK": "0"}, "distr: WORLD_SIZE: got ''; accepted: a number, as"),
        (
            {"WORLD_SIZE": "2", "RANK": "-1"},
            "distr: RANK: got '-1'; accepted: a number",
        ),
    ],
)
def test_what_a_scheduler_sets_is_no_group(
    variables: dict[str, str], told: str, monkeypatch: Any, capsys: Any
) -> None:
    from distr_compile.__main__ import main

    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["policy", "schema"]) == (2 if told else 0)
    assert capsys.readouterr().err.startswith(told)


def test_a_group_that_cannot_meet_is_told(monkeypatch: Any, capsys: Any) -> None:
    from distr_compile.__main__ import main

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["regress", "mine:model"]) == 2
    said = capsys.readouterr().err
    assert "environment variable MASTER_ADDR expected" in said
    assert said.endswith("accepted: what torchrun sets; start torchrun\n")
