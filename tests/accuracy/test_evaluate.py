"""Evaluation against the same model, compiled and compared by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.evaluate import compiled, evaluate
from distr_compile.accuracy.metrics import METRICS
from distr_compile.policy import Policy, PolicyError
from tests.tiny_models import noise, stack

FORCED = {"min_seq_len": 0, "group_size": 2}
POLICIES = {
    name: Policy(default={**FORCED, "estimator": name}) for name in ("projection", "lsh-mean")
}
BATCHES = [noise(seed, 2, 48) for seed in range(3)]


def test_numbers_under_several_policies_at_once() -> None:
    model = stack()
    got = evaluate(model, BATCHES, ["cosine", "sqnr"], {"none": None, **POLICIES})
    assert got["none"].values["cosine"] == pytest.approx(1)
    with torch.no_grad():
        exact = torch.cat([model(x) for x in BATCHES])
        for name, policy in POLICIES.items():
            torch.compiler.reset()
            options = {"policy": policy, "compiler": "eager"}
            run = torch.compile(model, backend="distr", options=options)
            ours = torch.cat([run(x) for x in BATCHES])
            cosine = F.cosine_similarity(ours.double(), exact.double(), dim=-1)
            assert got[name].values["cosine"] == pytest.approx(cosine.mean().item(), abs=1e-9)
            rows = cosine.sum(1)
            assert got[name].rows["cosine"][:, 0].allclose(rows, atol=1e-6)
    assert got["projection"].values["sqnr"] > got["lsh-mean"].values["sqnr"] + 1


def test_the_limit_and_what_the_pass_did() -> None:
    got = evaluate(stack(), BATCHES, ["cosine"], {"none": None}, limit=2)
    assert len(got["none"].rows["cosine"]) == 4
    with compiled(stack(), POLICIES) as run:
        run.rows(Batch.of(BATCHES[0]), [METRICS["cosine"]])
    assert run.reports.keys() == POLICIES.keys()
    for report in run.reports.values():
        assert [row.layer for row in report.rows] == ["layers.0", "layers.1"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="batches: got none"):
        evaluate(stack(), [], ["cosine"], {"none": None})
    with pytest.raises(
        ValueError, match=r"batches: got None \(NoneType\); accepted: a list, a data"
    ):
        evaluate(stack(), lambda: None, ["cosine"], {"none": None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in training mode"):
        evaluate(stack().train(), BATCHES, ["cosine"], {"none": None})
    wrong = Policy(rule=[{"layers": "nowhere", "group_size": 2}])
    with pytest.raises(PolicyError, match="nowhere"):
        evaluate(stack(), BATCHES, ["cosine"], {"wrong": wrong})
