"""Every example runs, says what it promises, and so do the sections of the README."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distr_compile import Policy
from distr_compile.cli import main
from tests import readme

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    """As in a process of its own, but for what is loaded: that takes longer than most examples."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)


def run_example(name: str) -> str:
    """An example whose graphs are rewritten but not compiled by Inductor, which takes its time."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(f"examples/{name}.py")["main"](compiler="eager")
    return out.getvalue()


def run_command(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> str:
    """``python -m examples.NAME WORDS``."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module(f"examples.{name}", run_name="__main__")
    return out.getvalue()


def test_timm_vit() -> None:
    out = run_example("timm_vit")
    assert "12 attentions in 1 graph; 11 distr, 1 exact; 91.7 %" in out
    assert re.search(r"blocks\.\{1\.\.8\}\.attn +x8 .* distr +2 ", out)
    assert re.search(r"blocks\.\{9\.\.11\}\.attn +x3 .* distr +4 ", out)


def test_hf_encoder() -> None:
    out = run_example("hf_encoder")
    assert re.search(r"encoder\.layer\.\{0\.\.5\}\.attention\.self +x6 .* bool +distr", out)


def test_hf_decoder_approximates_the_prompt_and_decodes_exactly() -> None:
    out = run_example("hf_decoder")
    assert re.search(r"x2 .* q \[1,4,64,32\] +float32 +causal +distr +2 ", out)
    one_row = [line for line in out.splitlines() if "q [1,4,1,32]" in line]
    assert one_row
    assert all("decode" in line and " exact " in line for line in one_row)


def test_own_module_keeps_one_layer_exact_across_graph_breaks() -> None:
    out = run_example("own_module")
    assert "4 attentions in 4 graphs; 3 distr, 1 exact; 75.0 %" in out
    assert re.search(r"layers\.2 .* exact, sdpa +1 ", out)


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_command(monkeypatch, "demo", "minilm", "--texts", "4", "--compiler", "eager")
    cosines = {
        name: float(cosine)
        for name, cosine in re.findall(r"(\S+, block \w+) .* embeddings (\d\.\d+)", out)
    }
    assert len(cosines) == 3
    assert 0.7 < cosines["lsh-mean, block auto"] < 0.95 < cosines["projection, block auto"] < 1


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_command(monkeypatch, "speed", "llama", "--rounds", "1", "--compiler", "eager")
    lines = re.findall(r"(float32|bfloat16) .* (\d of \d) +(\d\.\d+)$", out, re.MULTILINE)
    # Nothing may be measured in tests: all is exact.
    assert [line[:2] for line in lines] == [("float32", "0 of 2"), ("bfloat16", "0 of 2")]
    assert all(float(cosine) > 0.999 for *_, cosine in lines)


def run_training(
    monkeypatch: pytest.MonkeyPatch, name: str, steps: int
) -> tuple[str, float, float]:
    """The output of a recipe, and what the approximated model was worth before and after."""
    out = run_command(monkeypatch, name, "--steps", str(steps), "--compiler", "eager")
    assert " distr, 0 exact; 100.0 %" in out
    assert "backward distr-cpu" in out
    (line,) = (line for line in out.splitlines() if line.startswith("distr "))
    before, after = map(float, re.findall(r"\d\.\d{3}", line))
    return out, before, after


def test_finetune_vit_wins_back_some_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    out, before, after = run_training(monkeypatch, "finetune_vit", 12)
    (line,) = (line for line in out.splitlines() if line.startswith("loss"))
    first, last = map(float, re.findall(r"\d\.\d{3}", line))
    assert last < 0.7 * first
    assert after > before + 0.1


def test_finetune_llama_wins_back_some_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, after = run_training(monkeypatch, "finetune_llama", 12)
    assert after < before - 0.03


def test_distill_wins_back_some_f1(monkeypatch: pytest.MonkeyPatch) -> None:
    out, before, after = run_training(monkeypatch, "distill", 8)
    (line,) = (line for line in out.splitlines() if line.startswith("KL"))
    first, last = map(float, re.findall(r"\d\.\d{3}", line))
    assert last < 0.9 * first
    assert after > before + 0.05


def test_tour_of_the_readme(tmp_path: Path) -> None:
    code = readme.tour()
    assert len(code.splitlines()) <= 30
    (tmp_path / "tour.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "tour.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "distr, 1 exact" in done.stdout


def test_tuning_section_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word by word: the file, then the commands."""
    file, commands = readme.tuning()
    (tmp_path / "mine.py").write_text(file, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [main(shlex.split(line, comments=True)[1:]) for line in commands] == [0, 0, 0]
    out = capsys.readouterr().out
    assert "Held-out half, looked at once" in out
    assert out.count("mine:model  distr     4/4") == 2
    assert not Policy.load("distr.toml").resolve("0.layers.0").is_exact
