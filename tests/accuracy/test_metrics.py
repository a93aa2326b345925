"""Every metric against a number from elsewhere: scikit-learn, scipy, or a few lines by hand."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn import metrics as sklearn
from torch import Tensor

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import (
    METRICS,
    Metric,
    as_metric,
    as_metrics,
    counted_positions,
    has_logits,
    main_output,
)

EXAMPLES, TOKENS, CLASSES = 8, 12, 7
TASK = ("top1", "top5", "perplexity", "f1")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS = noise(0, EXAMPLES, TOKENS, CLASSES) * 2
EXACT = LOGITS + 0.5 * noise(1, EXAMPLES, TOKENS, CLASSES)
LABELS = noise(2, EXAMPLES, TOKENS, CLASSES).argmax(-1)
LABELS[noise(3, EXAMPLES, TOKENS) > 0.5] = -100
MASK = (torch.arange(TOKENS) < torch.arange(5, 5 + EXAMPLES)[:, None]).long()
BATCH = Batch(kwargs={"attention_mask": MASK}, labels=LABELS)
COUNTED = (LABELS != -100) & (MASK == 1)


def value(name: str, output: Any, exact: Any, batch: Batch, parts: int = 1) -> float:
    """The metric, with the examples in so many batches."""
    metric = METRICS[name]
    rows = []
    for i in torch.arange(len(main_output(exact))).chunk(parts):
        kwargs = {name: x[i] for name, x in batch.kwargs.items()}
        labels = None if batch.labels is None else batch.labels[i]
        ours, theirs = ({"logits": x[i]} for x in (output, exact))
        rows.append(metric.statistic(ours, theirs, Batch((), kwargs, labels)))
    together = torch.cat(rows)
    assert together.dtype == torch.float64
    assert len(together) == len(exact)
    return metric.result(together)


def by_hand(name: str) -> float:
    logits, exact = (x[COUNTED].double().numpy() for x in (LOGITS, EXACT))
    labels = LABELS[COUNTED].numpy()
    if name == "top1":
        return float(sklearn.accuracy_score(labels, logits.argmax(-1)))
    if name == "top5":
        return float(sklearn.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(CLASSES)))
    if name == "perplexity":
        p = special.softmax(logits, -1)
        return math.exp(sklearn.log_loss(labels, p, labels=np.arange(CLASSES)))
    if name == "f1":
        return float(sklearn.f1_score(labels, logits.argmax(-1), average="macro"))
    if name == "kl":
        p, q = special.softmax(exact, -1), special.softmax(logits, -1)
        return float(stats.entropy(p, q, axis=-1).mean())
    if name == "agreement":
        return float((logits.argmax(-1) == exact.argmax(-1)).mean())
    if name == "cosine":
        return float(np.diag(sklearn.pairwise.cosine_similarity(logits, exact)).mean())
    assert name == "sqnr"
    return float(10 * np.log10((exact**2).sum() / ((logits - exact) ** 2).sum()))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", [*TASK, "kl", "agreement", "cosine", "sqnr"])
def test_numbers(name: str, parts: int) -> None:
    assert value(name, LOGITS, EXACT, BATCH, parts) == pytest.approx(by_hand(name), rel=1e-9)


@pytest.mark.parametrize("name", ["top1", "top5", "perplexity", "f1"])
def test_one_label_for_each_example(name: str) -> None:
    labels = LABELS[:, 0].clamp(min=0)
    logits = LOGITS[:, 0]
    expected = {
        "top1": sklearn.accuracy_score(labels, logits.argmax(-1)),
        "top5": sklearn.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(CLASSES)),
        "perplexity": math.exp(torch.nn.functional.cross_entropy(logits.double(), labels)),
        "f1": sklearn.f1_score(labels, logits.argmax(-1), average="macro"),
    }
    got = value(name, logits, logits, Batch(labels=labels))
    assert got == pytest.approx(float(expected[name]), rel=1e-9)


def test_top5_of_fewer_classes_is_always_right() -> None:
    assert value("top5", LOGITS[..., :4], LOGITS, Batch(labels=LABELS.clamp(0, 3))) == 1


def test_rank_correlation_of_embeddings() -> None:
    ours, exact = noise(4, 20, 16), noise(5, 20, 16)
    ours = exact + 0.5 * ours
    pairs = np.triu_indices(20, 1)
    similar = [sklearn.pairwise.cosine_similarity(x.double())[pairs] for x in (ours, exact)]
    expected = stats.spearmanr(*similar).statistic
    assert value("rank-correlation", ours, exact, Batch(), 3) == pytest.approx(expected, rel=1e-9)


def test_rank_correlation_takes_the_mean_of_the_positions_that_count() -> None:
    mask = Batch(kwargs={"attention_mask": MASK})
    means = [(x * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True) for x in (LOGITS, EXACT)]
    expected = value("rank-correlation", *means, Batch())
    assert value("rank-correlation", LOGITS, EXACT, mask) == pytest.approx(expected, rel=1e-6)


def test_what_the_exact_model_itself_has() -> None:
    for name, metric in METRICS.items():
        if name not in TASK:
            got = value(name, EXACT, EXACT, BATCH)
            assert got == pytest.approx(metric.ideal, abs=1e-12)
            assert metric.loss(got, got) == pytest.approx(0, abs=1e-12)
        else:
            assert metric.ideal is None


def test_a_class_that_is_ruled_out_costs_nothing() -> None:
    ruled_out = EXACT.clone()
    ruled_out[..., 0] = -torch.inf
    assert value("kl", ruled_out, ruled_out, BATCH) == 0
    fewer = value("kl", LOGITS[..., 1:], EXACT[..., 1:], Batch())
    out = LOGITS.clone()
    out[..., 0] = -torch.inf
    assert value("kl", out, ruled_out, Batch()) == pytest.approx(fewer, rel=1e-9)


def test_low_precision_outputs_are_compared_in_fp64() -> None:
    low = EXACT.bfloat16()
    noise_power = (low.double() - EXACT.double()).square().sum()
    expected = 10 * math.log10(EXACT.double().square().sum() / noise_power)
    assert value("sqnr", low, EXACT, Batch()) == pytest.approx(expected, rel=1e-9)


def test_nan_is_not_hidden() -> None:
    broken = LOGITS.clone()
    broken[0, 0] = math.nan
    for name in ("kl", "agreement", "cosine", "sqnr"):
        assert math.isnan(value(name, broken, EXACT, Batch()))
        assert math.isnan(METRICS[name].loss(METRICS[name].ideal or 0.0, math.nan))
    labels = LABELS.clamp(min=0)
    for name in TASK:
        assert math.isnan(value(name, broken, EXACT, Batch(labels=labels)))
        assert math.isnan(METRICS[name].loss(0, math.nan))
        assert math.isnan(METRICS[name].loss(0.5, math.nan))
    # At a position of which nothing is asked it is no matter.
    labels[0, 0] = -100
    for name in TASK:
        assert not math.isnan(value(name, broken, EXACT, Batch(labels=labels)))


def test_losses() -> None:
    assert METRICS["top1"].loss(0.8, 0.6) == pytest.approx(0.25)
    assert METRICS["top1"].loss(0.8, 0.9) == pytest.approx(-0.125)
    assert METRICS["perplexity"].loss(10, 12) == pytest.approx(0.2)
    assert METRICS["perplexity"].loss(10, 9) == pytest.approx(-0.1)
    assert METRICS["kl"].loss(0, 0.3) == pytest.approx(0.3)
    assert METRICS["cosine"].loss(1, 0.9) == pytest.approx(0.1)
    assert METRICS["sqnr"].loss(math.inf, 20) == pytest.approx(0.1)
    assert METRICS["top1"].loss(0, 0) == 0
    assert METRICS["top1"].loss(0, 0.1) == -math.inf


def test_which_tensor_of_an_output() -> None:
    x, y = noise(0, 2, 3), noise(1, 2, 3)
    assert main_output(x) is x
    assert main_output(SimpleNamespace(logits=x, last_hidden_state=y)) is x
    assert main_output({"last_hidden_state": y, "other": x}) is y
    assert main_output((torch.ones(2, dtype=torch.long), {"a": x})) is x
    assert main_output(SimpleNamespace(logits=None, last_hidden_state=y)) is y
    with pytest.raises(ValueError, match="got str; accepted: a tensor, something with logits"):
        main_output("text")


def test_which_outputs_are_scores_of_classes() -> None:
    x = noise(0, 2, 3)
    assert has_logits({"logits": x}, Batch())
    assert has_logits(x, Batch(labels=[0, 2]))
    assert not has_logits(x, Batch())
    assert not has_logits(x, Batch(labels=x))
    assert not has_logits({"last_hidden_state": x}, Batch(labels=torch.zeros(5).long()))
    assert has_logits({"logits": noise(0, 2, 4, 3)}, Batch())
    # One score for each example is of no class; of pictures nobody knows which dimension it is.
    assert not has_logits({"logits": x[:, :1]}, Batch())
    assert not has_logits(x[:, :1], Batch(labels=[0, 0]))
    assert not has_logits({"logits": noise(0, 2, 3, 4, 5)}, Batch())
    assert has_logits({"logits": noise(0, 2, 3, 4, 5)}, Batch(labels=torch.ones(2, 3, 4).long()))


@pytest.mark.parametrize("name", ["kl", "agreement"])
def test_distributions_are_asked_of_scores_of_classes_only(name: str) -> None:
    accepted = r"accepted: something with logits, .*; give cosine, sqnr or rank-correlation"
    for output in (EXACT, {"logits": EXACT[:, 0, :1]}, {"logits": EXACT[None]}):
        shape = tuple(main_output(output).shape)
        with pytest.raises(
            ValueError, match=rf"{name}: got .* {re.escape(str(shape))}.*{accepted}"
        ):
            METRICS[name].statistic(output, output, Batch())
    assert METRICS[name].statistic(EXACT, EXACT, Batch(labels=LABELS)).shape == (EXAMPLES, 2)


def test_one_number_for_each_example() -> None:
    ours, exact = noise(0, 8), noise(1, 8)
    expected = 10 * math.log10(
        exact.double().square().sum() / (ours - exact).double().square().sum()
    )
    got = METRICS["sqnr"].result(METRICS["sqnr"].statistic(ours, exact, Batch()))
    assert got == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"top1: got .* shape \(8, 1\), one score for each"):
        METRICS["top1"].statistic(ours, exact, Batch(labels=torch.zeros(8).long()))
    with pytest.raises(ValueError, match="output: got a single number; accepted"):
        METRICS["sqnr"].statistic(ours[0], exact[0], Batch())


def test_an_example_that_is_masked_as_a_whole_has_no_embedding() -> None:
    mask = MASK.clone()
    mask[2] = 0
    others = [0, 1, *range(3, EXAMPLES)]
    metric = METRICS["rank-correlation"]
    rows = metric.statistic(LOGITS, EXACT, Batch(kwargs={"attention_mask": mask}))
    assert rows.shape == (EXAMPLES - 1, 2 * CLASSES)
    kept = Batch(kwargs={"attention_mask": MASK[others]})
    assert metric.result(rows) == value("rank-correlation", LOGITS[others], EXACT[others], kept)
    nothing = Batch(kwargs={"attention_mask": 0 * mask})
    assert metric.statistic(LOGITS, EXACT, nothing).shape == (0, 2 * CLASSES)


def test_the_mask_of_an_encoder_is_not_of_what_a_decoder_puts_out() -> None:
    output = SimpleNamespace(logits=EXACT, encoder_last_hidden_state=LOGITS)
    batch = Batch(kwargs={"attention_mask": MASK, "labels": LABELS})  # as T5 may be called
    for name in ("kl", "cosine"):
        rows = METRICS[name].statistic(output, output, batch)
        assert rows[:, 1].tolist() == [TOKENS] * EXAMPLES
    both = Batch(kwargs={**batch.kwargs, "decoder_attention_mask": MASK})
    assert METRICS["kl"].statistic(output, output, both)[:, 1].tolist() == MASK.sum(1).tolist()


def test_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics: got two called <lambda>; accepted: one of"):
        as_metrics([lambda output, batch: output, "kl", lambda output, batch: -output])
    assert [metric.name for metric in as_metrics(["kl", "top1"])] == ["kl", "top1"]


def test_which_positions_count() -> None:
    shape = torch.Size((2, 4, 5))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert counted_positions(shape, Batch()).all()
    assert counted_positions(shape, Batch(kwargs={"attention_mask": mask})).equal(mask.bool())
    # That of the encoder is not for what the decoder puts out.
    decoder = {"attention_mask": mask, "decoder_input_ids": mask}
    assert counted_positions(shape, Batch(kwargs=decoder)).all()
    decoder["decoder_attention_mask"] = mask
    assert counted_positions(shape, Batch(kwargs=decoder)).equal(mask.bool())
    # A mask of tokens says nothing about pooled outputs.
    assert counted_positions(torch.Size((2, 5)), Batch(kwargs={"attention_mask": mask})).all()


def test_a_function_of_the_user() -> None:
    def mean_score(output: Tensor, batch: Batch) -> Tensor:
        return (output * batch.labels).sum(-1)

    metric = as_metric(mean_score)
    assert (metric.name, metric.better, metric.ideal) == ("mean_score", "higher", None)
    rows = metric.statistic(torch.eye(2), None, Batch(labels=torch.tensor([3.0, 5.0])))
    assert rows.tolist() == [[3.0], [5.0]]
    assert metric.result(rows) == 4
    with pytest.raises(ValueError, match=r"mean_score: got scores of shape \(\); accepted: \(ex"):
        metric.statistic(torch.ones(2), None, Batch(labels=torch.ones(())))


def test_names_and_mistakes() -> None:
    assert all(as_metric(name) is metric for name, metric in METRICS.items())
    assert as_metric(METRICS["f1"]) is METRICS["f1"]
    with pytest.raises(ValueError, match=r"got .perplexty.; accepted: top1, .* did you mean .perp"):
        as_metric("perplexty")
    for name in TASK:
        with pytest.raises(ValueError, match=rf"{name}: got labels of NoneType for an output of"):
            METRICS[name].statistic(LOGITS, LOGITS, Batch())
    with pytest.raises(ValueError, match=r"top1: got labels of shape \(8,\).*of shape \(8, 12\)"):
        METRICS["top1"].statistic(LOGITS, LOGITS, Batch(labels=LABELS[:, 0]))
    nothing = Batch(labels=torch.full_like(LABELS, -100))
    for name in ("top1", "f1", "perplexity"):
        metric: Metric = METRICS[name]
        with pytest.raises(ValueError, match="no position that counts"):
            metric.result(metric.statistic(LOGITS, LOGITS, nothing))


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"better": "Higher"}, ValueError, "better: got 'Higher' (str); accepted: 'higher' or"),
        ({"ideal": "1"}, TypeError, "ideal: got '1' (str); accepted: a number or None"),
        ({"name": None}, TypeError, "name: got None (NoneType); accepted: a string"),
        ({"result": 3}, TypeError, "result: got 3 (int); accepted: a function"),
    ],
)
def test_metrics_that_are_none(change: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=re.escape(told)):
        dataclasses.replace(METRICS["top1"], **change)
