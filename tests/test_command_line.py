"""The command as people meet it: data for ``explain``, exit code 3, what errors and helps say."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distr_compile.cli import FOUND_ERROR, OK, USAGE, main
from distr_compile.commands.common import IDLE
from distr_compile.policy import Policy

MINE = """
import torch
import torch.nn.functional as F
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def model():
    torch.manual_seed(0)
    return Model().eval()

def pair():
    return model(), (torch.randn(2, 24, 64),)

def wide():
    return model(), (torch.randn(2, 24, 65),)

def data():
    for seed in range(4):
        yield (torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(seed)),)

def nothing():
    return []

def wide_data():
    for seed in range(4):
        width = 65 if seed == 1 else 64
        yield (torch.randn(2, 24, width, generator=torch.Generator().manual_seed(seed)),)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def write(text: str, name: str = "distr.toml") -> str:
    Path(name).write_text(text)
    return name


# --- explain and data ----------------------------------------------------------------------------


def test_explain_takes_a_module_and_a_loader(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "explain", "mine:model", "--data", "mine:data")
    assert (code, err) == (OK, "")
    assert "[2,2,40,32]" in out
    code, out, _ = said(capsys, "explain", "mine:pair")
    assert code == OK
    assert "[2,2,24,32]" in out
    code, out, _ = said(capsys, "explain", "mine:pair", "--data", "mine:data")
    assert code == OK
    assert "[2,2,40,32]" in out, "the data has a say over the factory's arguments"


WRONG = {
    "both": (["--data", "mine:data", "--text", "x"], USAGE, "--data, --text: got both"),
    "shape": (["--data", "mine:data", "--shape", "2,8"], USAGE, "--shape, --attn: got one beside"),
    "no data": (["--pretrained"], USAGE, "--pretrained: got no --data or --text; accepted: with"),
    "sizes": (["--batch-size", "3"], USAGE, "--batch-size, --tokens: got one without --data or"),
    "tokens": (["--tokens", "77"], USAGE, "--batch-size, --tokens: got one without --data or"),
    "unread": (
        ["--data", "mine:data", "--tokens", "7"],
        USAGE,
        "--tokens: got one beside --data mine:data, which does not read it; accepted: with --text;",
    ),
    "unread size": (
        ["--data", "mine:data", "--batch-size", "7"],
        USAGE,
        "--batch-size: got one beside --data mine:data, which does not read it; accepted: with "
        "--text or a folder of pictures; leave it out",
    ),
    "folder": (["--json", "."], USAGE, "--json: got '.'; accepted: a file in a folder that"),
    "empty": (["--data", "mine:nothing"], FOUND_ERROR, "--data: got no batch; accepted: at least"),
    "no loader": (["--data", "mine:dato"], FOUND_ERROR, "--data: got 'mine:dato'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_explain_refuses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, code, message = WRONG[name]
    assert said(capsys, "explain", "mine:model", *options)[0] == code
    assert main(["explain", "mine:model", *options]) == code
    assert message in capsys.readouterr().err


ON_DATA = ["mine:model", "--data", "mine:wide_data"]
WIDE = {
    "explain": ["mine:wide"],
    "regress": [*ON_DATA, "--metric", "cosine"],
    "calibrate": [*ON_DATA, "--out", "bases.safetensors"],
    "tune": [
        *ON_DATA,
        "--time",
        "products",
        "--metric",
        "cosine",
        "--budget",
        "1",
        "--out",
        "out.toml",
    ],
}


@pytest.mark.parametrize("command", WIDE)
def test_a_wrong_shape_is_told_in_the_models_own_words(
    command: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And in no frames of Dynamo, neither in the message nor in a log."""
    code, out, err = said(capfd, command, *WIDE[command])
    assert (code, out) == (FOUND_ERROR, "")
    line = err.splitlines()[-1]
    target = WIDE[command][0]
    inputs = "these inputs" if command == "explain" else "batch 1 (--data, --text)"
    assert line.startswith(f"distr: {target}: Model does not run on {inputs}: RuntimeError: mat1")
    assert "48x65 and 64x192" in line
    advice = {"explain": "give other sizes (--shape), or another batch (--data)"}
    assert line.endswith(advice.get(command, "give other data, or another model"))
    assert len(err.splitlines()) == 1
    assert not [each for each in caplog.records if each.name.startswith("torch._subclasses")]


def test_debug_shows_where_a_model_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="48x65 and 64x192") as caught:
        main(["regress", *WIDE["regress"], "--debug"])
    assert caught.value.__cause__ is not None
    capsys.readouterr()


# --- files ---------------------------------------------------------------------------------------

MISSING = {
    "text": (["regress", "hf:bert", "--text", "no.txt"], "--text: got 'no.txt', which is no file;"),
    "folder": (["regress", "timm:x", "--data", "no"], "--data: got 'no', which is no folder; acc"),
    "baseline": (
        ["regress", "mine:model", "--data", "mine:data", "--baseline", "no.json"],
        "--baseline: got 'no.json', there is no file of that name; accepted: one that --update-b",
    ),
    "policy": (
        ["explain", "mine:pair", "--policy", "no.toml"],
        "no.toml: file: got No such file or directory; accepted: a TOML file in UTF-8; check the",
    ),
}


UNWRITABLE = {
    "calibrate": (["mine:model", "--data", "mine:data", "--out", "."], "--out: got '.'; accepted:"),
    "explain": (["mine:pair", "--json", "no/out.json"], "--json: got 'no/out.json'; accepted: a"),
    "tune": (
        ["mine:model", "--data", "mine:data", "--budget", "1", "--out", "o", "--plot", "o.xyz"],
        "--plot: got 'o.xyz'; accepted: a file whose name ends with .",
    ),
}


@pytest.mark.parametrize("command", UNWRITABLE)
def test_what_cannot_be_written_is_told_first(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = UNWRITABLE[command]
    code, out, err = said(capsys, command, *arguments)
    assert (code, out) == (USAGE, "")
    assert f"distr: {message}" in err


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_says_which(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = MISSING[name]
    code, _, err = said(capsys, *argv)
    assert code == FOUND_ERROR
    assert f"distr: {message}" in err


def test_calibrate_without_calibrated_layers(capsys: pytest.CaptureFixture[str]) -> None:
    policy = write("[default]\ngroup_size = 2\n")
    argv = ["calibrate", "mine:model", "--data", "mine:data", "--out", "b.safetensors"]
    code, _, err = said(capsys, *argv, "--policy", policy)
    assert code == FOUND_ERROR
    assert 'distr.toml, which gives no layer estimator = "calibrated"; accepted: a policy' in err
    assert not Path("b.safetensors").exists()


# --- exit code 3 ---------------------------------------------------------------------------------

ASKS = {
    "a length": ("[default]\nmin_seq_len = 100\n", True),
    "a rank": ("[default]\nmin_seq_len = 100\nrank = 16\n", True),
    "a rule": ('[[rule]]\nlayers = "*"\nmin_seq_len = 100\n', True),
    "auto": ("[default]\ngroup_size = 2\n", False),
    "exact": ("[default]\ngroup_size = 1\nmin_seq_len = 0\n", False),
    "a rule on exact": (
        '[default]\ngroup_size = 1\n[[rule]]\nlayers = "*"\nmin_seq_len = 9\n',
        False,
    ),
}


@pytest.mark.parametrize("name", ASKS)
def test_which_policies_ask_outright(name: str) -> None:
    text, asks = ASKS[name]
    assert Policy.load(write(text)).forces_approximation == asks


@pytest.mark.parametrize("command", ["regress", "tune"])
def test_a_policy_that_asks_in_vain(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its length is beyond the data's."""
    text = '[[rule]]\nlayers = "*"\ngroup_size = 2\nmin_seq_len = 100\n'
    argv = [command, "mine:model", "--data", "mine:data", "--metric", "cosine"]
    argv += ["--policy", write(text)]
    if command == "tune":
        argv += ["--budget", "1", "--out", "out.toml", "--time", "products", "--no-resume"]
    code, _, err = said(capsys, *argv)
    assert code == IDLE == 3
    assert (
        "got a group_size >= 2 or a rank with an explicit min_seq_len, and no call took it" in err
    )
    assert said(capsys, *argv, "--allow-exact")[0] == OK


def test_a_policy_that_is_taken_or_leaves_it_open(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["regress", "mine:model", "--data", "mine:data", "--metric", "cosine", "--policy"]
    assert said(capsys, *argv, write("[default]\nmin_seq_len = 0\n"))[0] == OK
    assert said(capsys, *argv, write("[default]\ngroup_size = 4\n"))[0] == OK, "auto, 8 columns"


# --- what is printed -----------------------------------------------------------------------------


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version")[:2] == (
        OK,
        f"distr {importlib.metadata.version('distr-compile')}\n",
    )


MODEL_AND_DATA = ("model and data:",)
HELPS = {
    "explain": MODEL_AND_DATA,
    "measure": ("what is timed:", "model and inputs:", "what is written:"),
    "calibrate": MODEL_AND_DATA,
    "tune": (*MODEL_AND_DATA, "how it runs:"),
    "regress": (*MODEL_AND_DATA, "how it runs:"),
    "policy": (),
    "policy check": (),
    "policy schema": (),
}


@pytest.mark.parametrize("command", HELPS)
def test_each_help_has_a_description_an_example_and_groups(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(capsys, *command.split(), "--help")
    assert code == OK
    paragraphs = out.split("\n\n")
    assert paragraphs[0].startswith(f"usage: distr {command} ")
    assert paragraphs[1].endswith(".")
    assert f"example:\n  distr {command} " in out
    starts = [paragraph.splitlines()[0] for paragraph in paragraphs]
    assert [group for group in HELPS[command] if group in starts] == list(HELPS[command])


def test_the_form_of_fused_attention_is_a_short_word(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "explain", "mine:pair")
    (row,) = (line for line in out.splitlines() if "[2,2,24,32]" in line)
    assert " sdpa " in row
    assert "product" not in out


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_progress_without_a_terminal_is_lines(
    seconds: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distr_compile.accuracy import progress

    monkeypatch.setattr(progress, "LINE_S", seconds)
    with progress.progress_bar(True) as bar:
        task = bar.add_task("calibrating", total=3)
        for count in (1, 2, 3):
            bar.update(task, completed=count)
        assert list(bar.track([7, 8], description="measuring")) == [7, 8]
    lines = capsys.readouterr().err.splitlines()
    wanted = [f"calibrating: {count} of 3, 0 s" for count in (1, 2, 3)]
    assert lines[:3] == (wanted if seconds == 0 else [])
    assert ("measuring: 2 of 2, 0 s" in lines) == (seconds == 0)


def test_progress_says_what_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distr_compile.accuracy import progress

    monkeypatch.setattr(progress, "LINE_S", 0.0)
    argv = ["tune", "mine:model", "--data", "mine:data", "--metric", "cosine", "--budget", "1"]
    _, _, err = said(capsys, *argv, "--out", "out.toml", "--time", "products", "--no-resume")
    assert "policies on the tuning half: 2 of 2" in err
