"""A slice of the gate: a few models and policies against the committed baseline.

``make regress`` measures them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from distr_compile.accuracy import baseline
from tests.regression.__main__ import main
from tests.regression.gate import BASELINE, POLICIES, measure
from tests.regression.plot import plot
from tests.zoo import OPTIONAL, ZOO

SLICE = {
    "minilm": ("projection",),
    "gpt2": ("exact", "projection", "lsh-mean", "calibrated"),
}


@pytest.mark.parametrize("name", SLICE)
def test_accuracy_is_the_committed_one(name: str) -> None:
    result = measure(name, SLICE[name], baseline=BASELINE)
    assert result.passed, f"\n{result}\nif this is meant to be: make baseline"
    assert result.result.policies.keys() == set(SLICE[name])


def test_the_baseline_has_every_model_and_says_what_it_must() -> None:
    models = baseline.read(BASELINE)
    assert models.keys() == {*ZOO, *OPTIONAL}
    for model in models.values():
        assert model.policies.keys() <= POLICIES.keys()
        for name, policy in model.policies.items():
            sqnr = policy.metrics["sqnr"].loss
            if name == "exact":
                assert policy.approximated == 0
                assert sqnr < 1e-6
            else:
                assert policy.approximated == policy.attentions > 0, (model.name, name)
                assert policy.layers
                assert sqnr > 1e-5  # the digits' models are of low rank


def test_the_plot(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    plot(list(baseline.read(BASELINE).values()), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["gpt3"])
    assert "got gpt3; accepted: minilm," in capsys.readouterr().err
