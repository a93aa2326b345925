"""``distr measure`` as users call it, with real clocks and small models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distr_compile.cli import OK, USAGE, main
from distr_compile.lowering import stored
from distr_compile.measuring import pinned
from distr_compile.policy import Policy
from distr_compile.reporting import GraphReport, Reason, Report, SiteRow

CALL = "q=1x2x64x32 k=1x2x64 v=32 dtype=float32 estimator=projection rank=16"

MODEL = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def model():
    return nn.Sequential(Attention(), Attention()).eval(), (torch.randn(1, 64, 64),)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "measured_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("measured_model", None)
    return "measured_model:model"


@pytest.mark.usefixtures("may_measure")
def test_a_call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert main(["measure", "--call", CALL, "--json", str(path)]) == OK
    out = capsys.readouterr().out
    assert "sdpa" in out
    assert "chosen" in out
    ((text, found),) = json.loads(path.read_text()).items()
    assert text.startswith("q=1x2x64x32 k=1x2x64 v=32 dtype=float32 device=cpu")
    assert found["distr"]["rounds"] >= 7
    assert found["chosen"].startswith(("sdpa", "exact", "distr"))


@pytest.mark.usefixtures("may_measure")
def test_what_a_compile_could_not_measure(capsys: pytest.CaptureFixture[str]) -> None:
    """A reason that is stored gives way to what this command finds."""
    from distr_compile.lowering.spelling import read_call

    shape, approximation = read_call(CALL)
    for how in (None, approximation):
        stored.store(shape, how, "sdpa", "it takes too long")
    assert main(["measure", "--call", CALL]) == OK
    assert "not measured" not in capsys.readouterr().out


@pytest.mark.usefixtures("may_measure")
def test_a_model_and_a_pinned_policy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: str
) -> None:
    policy = tmp_path / "distr.toml"
    policy.write_text("# mine\n[default]\ngroup_size = 2\n")
    fresh = tmp_path / "new.toml"  # is written where there is none yet
    assert main(["measure", target, "--pin", str(fresh)]) == OK
    capsys.readouterr()
    assert main(["measure", target, "--pin", str(policy)]) == OK
    out = capsys.readouterr().out
    assert out.count("q=1x2x64x32") == 1, "both layers make the same call"
    kept = Policy.load(policy)
    assert policy.read_text().startswith("# mine\n")
    for layer in ("0", "1"):
        length = kept.resolve(layer).min_seq_len
        assert length == Policy.load(fresh).resolve(layer).min_seq_len
        assert length in (64, 65)
        assert (length == 64) == (" distr (" in out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "TARGET, --call: got neither; accepted: one of the two"),
        (["timm:x", "--call", CALL], "TARGET, --call: got both"),
        (["--call", CALL, "--pin", "x.toml"], "--pin: got no TARGET"),
        (["--call", "q=1"], "call: got no k, v, dtype; must be there"),
        (["--call", CALL, "--json", "/no/such/x.json"], "--json: got '/no/such/x.json'; accepted:"),
    ],
)
def test_what_is_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["measure", *arguments]) == USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "least"),
    [
        ({1024: True, 300: True}, 300),
        ({1024: True, 300: False}, 1024),
        ({1024: False, 300: True}, 1025),
        ({1024: True, 500: False, 300: True}, 1024),
        ({1024: False, 300: False}, 1025),
    ],
)
def test_a_layer_that_is_called_at_several_lengths(found: dict[int, bool], least: int) -> None:
    rows = []
    for length, is_chosen in found.items():
        shapes = dict.fromkeys("qkv", (1, 2, length, 64))
        decision = "distr" if is_chosen else "exact"
        reasons = () if is_chosen else (Reason("not-faster", "as measured"),)
        times = {"sdpa": 2e-3, "distr": 1e-3 if is_chosen else 3e-3}
        given = {"site": len(rows), "reasons": reasons, "measured": times}
        rows.append(SiteRow("a", "sdpa", shapes, "float32", "none", decision, **given))
    report = Report((GraphReport(0, "Model", tuple(rows)),), "Model")
    assert pinned(Policy(), report).resolve("a").min_seq_len == least
