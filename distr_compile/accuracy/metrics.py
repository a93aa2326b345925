"""What a model's outputs are worth: against labels, or against the outputs of the exact model.

Every metric makes rows of numbers, one row for each example, batch by batch, and its value from
all rows together. So outputs need not be kept, rows can be saved, and examples can be drawn anew.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distr_compile.accuracy.batch import Batch
from distr_compile.policy.errors import check_type, sentence, shown

IGNORED = -100
"""The label of a position at which nothing is asked."""

Statistic = Callable[[Any, Any, Batch], Tensor]
Score = Callable[[Any, Batch], Any]


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
        name: in tables and baselines.
        better: "higher" or "lower".
        ideal: what the exact model has by definition, for metrics that compare with its outputs;
            None for those that compare with labels.
        statistic: (output, output of the exact model, batch) -> ``(examples, width)``, fp64, CPU;
            examples of which nothing is asked may be left out.
        result: all rows, ``(any number of examples, width)`` -> the value.
    """

    name: str
    better: Literal["higher", "lower"]
    ideal: float | None
    statistic: Statistic
    result: Callable[[Tensor], float]

    def __post_init__(self) -> None:
        """Refuse what no value can be made of.

        Raises:
            ValueError: ``better`` is another word.
            TypeError: ``name`` is no string, ``ideal`` no number, or a function cannot be called.
        """
        check_type("name", self.name, str, "a string", "say what it is called in tables")
        if self.better not in ("higher", "lower"):
            advice = "say which values are better"
            raise ValueError(sentence("better", shown(self.better), "'higher' or 'lower'", advice))
        if self.ideal is not None:
            advice = "leave it None for a metric that compares with labels"
            check_type("ideal", self.ideal, (int, float), "a number or None", advice)
        for name in ("statistic", "result"):
            if not callable(given := getattr(self, name)):
                raise TypeError(sentence(name, shown(given), "a function", "see Metric"))

    def loss(self, exact: float, value: float) -> float:
        """Say how much worse ``value`` is than ``exact``; negative where it is better.

        A share of ``exact`` for metrics with labels. Else the distance from the ideal, and for an
        infinite one (dB) the noise over the signal as a ratio of norms, 10^(-value / 20).
        """
        if self.ideal is not None:
            return 10 ** (-value / 20) if math.isinf(self.ideal) else abs(self.ideal - value)
        worse = exact - value if self.better == "higher" else value - exact
        if exact == 0:
            return worse if math.isnan(worse) or not worse else math.copysign(math.inf, worse)
        return worse / abs(exact)


def main_output(output: Any) -> Tensor:
    """The tensor that a metric looks at.

    It is the output itself; its ``logits``, or else its ``last_hidden_state``; or else the first
    floating-point tensor of a mapping, tuple or list. One number for each example, ``(B,)``, is
    taken as ``(B, 1)``.

    Raises:
        ValueError: there is none, or it is a single number.
    """
    found = _floating(output)
    if found is None:
        raise ValueError(
            f"output: got {type(output).__name__}; accepted: a tensor, something with logits or "
            "last_hidden_state, or a mapping or sequence with a floating-point tensor; wrap the "
            "model in a module that returns one"
        )
    if found.dim() == 0:
        raise ValueError(
            "output: got a single number; accepted: one row or more for each example; wrap the "
            "model in a module that returns those"
        )
    return found[:, None] if found.dim() == 1 else found


def has_logits(output: Any, batch: Batch) -> bool:
    """Whether the last dimension of the main output is known to be scores of two classes or more.

    It is where it is called ``logits``, ``(B, C)`` or ``(B, N, C)``; of other shapes nobody knows
    which dimension is of the classes. And it is where there is an integer label for each position.
    One score for each position, as of a reranker, is of no class.
    """
    scores = main_output(output)
    if scores.shape[-1] < 2:
        return False
    is_called_so = isinstance(_part(output, "logits"), Tensor) and scores.dim() in (2, 3)
    return is_called_so or _classes(batch, scores.shape[:-1]) is not None


def counted_positions(shape: torch.Size, batch: Batch, *, has_decoder: bool = False) -> Tensor:
    """Which positions of an output count, bool of its shape without the last dimension.

    Those with the label -100 do not, nor those whose ``attention_mask`` is 0. Where an encoder
    reads and a decoder puts out, only ``decoder_attention_mask`` counts: if ``has_decoder``, or if
    an argument is called ``decoder_...``. Masks and labels of another shape are of something else.
    """
    positions = shape[:-1]
    counted = torch.ones(positions, dtype=torch.bool, device="cpu")
    labels = _classes(batch, positions)
    if labels is not None:
        counted &= labels != IGNORED
    has_decoder |= any(name.startswith("decoder_") for name in batch.kwargs)
    mask = batch.kwargs.get("decoder_attention_mask" if has_decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.shape == positions:
        counted &= mask.cpu() != 0
    return counted


def as_metrics(given: Iterable[Metric | str | Score] | Metric | str | Score) -> list[Metric]:
    """``as_metric`` of each; one that is in no list counts as a list of one.

    Raises:
        ValueError: as ``as_metric``; or two have one name.
        TypeError: there is nothing to walk through.
    """
    if isinstance(given, str | Metric) or (callable(given) and not isinstance(given, Iterable)):
        given = (given,)
    accepted = f"a list of {', '.join(METRICS)}, Metrics, or functions (output, batch) -> scores"
    check_type("metrics", given, Iterable, accepted, "leave it out for what goes with the model")
    metrics = [as_metric(metric) for metric in given]
    names = [metric.name for metric in metrics]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"metrics: got two called {', '.join(twice)}; accepted: one of each name; for "
            "functions of one name, such as lambdas, write def, or give Metric(name, ...)"
        )
    return metrics


def as_metric(given: Metric | str | Score) -> Metric:
    """A metric from what users write.

    Args:
        given: a metric; a name in ``METRICS``; or a function (output, batch) -> one score for each
            example, of which the mean is the value, higher is better.

    Raises:
        ValueError: an unknown name, or none of these.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str) and given in METRICS:
        return METRICS[given]
    if callable(given):
        return _from_scores(given)
    near = difflib.get_close_matches(str(given), METRICS, n=1)
    raise ValueError(
        f"metric: got {given!r}; accepted: {', '.join(METRICS)}, a Metric, or a function (output, "
        f"batch) -> one score for each example{f'; did you mean {near[0]!r}?' if near else ''}"
    )


# --- parts of outputs and batches ---------------------------------------------------------------


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _floating(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    for name in ("logits", "last_hidden_state"):
        if isinstance(part := _part(output, name), Tensor):
            return part
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return None
    return next((found for part in parts if (found := _floating(part)) is not None), None)


def _classes(batch: Batch, positions: torch.Size) -> Tensor | None:
    """The labels, if there is an integer for each position."""
    if batch.labels is None:
        return None
    try:
        labels = torch.as_tensor(batch.labels, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    is_integer = not labels.is_floating_point() and labels.dtype != torch.bool
    return labels if is_integer and labels.shape == positions else None


def _labels(name: str, logits: Tensor, batch: Batch) -> Tensor:
    labels = _classes(batch, logits.shape[:-1])
    if labels is None:
        got = getattr(batch.labels, "shape", None)
        got = f"shape {tuple(got)}" if got is not None else type(batch.labels).__name__
        raise ValueError(
            f"{name}: got labels of {got} for an output of shape {tuple(logits.shape)}; accepted: "
            f"integers of shape {tuple(logits.shape[:-1])}, {IGNORED} where nothing is asked; give "
            "Batch(args, kwargs, labels)"
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"{name}: got an output of shape {tuple(logits.shape)}, one score for each position; "
            "accepted: scores of two classes or more; give a function (output, batch) -> one score "
            "for each example"
        )
    return labels


def _need_logits(name: str, output: Any, batch: Batch) -> None:
    if not has_logits(output, batch):
        raise ValueError(
            f"{name}: got an output of shape {tuple(main_output(output).shape)}, not known to be "
            "scores of classes; accepted: something with logits, (B, C) or (B, N, C) with C >= 2, "
            "or a batch whose labels are an integer for each position; give cosine, sqnr or "
            "rank-correlation, or return {'logits': ...}"
        )


def _counted(output: Any, batch: Batch) -> Tensor:
    """``counted_positions`` of a whole output, which tells whether a decoder made it."""
    has_decoder = _part(output, "encoder_last_hidden_state") is not None
    return counted_positions(main_output(output).shape, batch, has_decoder=has_decoder)


def _examples(x: Tensor, counted: Tensor) -> list[Tensor]:
    """The rows of every example that count, fp64 on the CPU, ``(rows, width)`` each.

    Example by example: with a large vocabulary one batch in fp64 is large.
    """
    return [
        one.reshape(-1, x.shape[-1])[keep.flatten().to(one.device)].cpu().double()
        for one, keep in zip(x.detach(), counted, strict=True)
    ]


def _ratio(rows: Tensor) -> float:
    """Sum of the first column over the sum of the second."""
    total, count = rows.sum(0).tolist()
    if count == 0:
        raise ValueError(
            "metric: got no position that counts; accepted: one label other than -100, or one "
            "position whose attention_mask is not 0"
        )
    return float(total / count)


def _mean_over_positions(
    score: Callable[[Tensor, Tensor], Tensor], classes_of: str = ""
) -> Statistic:
    """Rows (sum, count) of a score of rows of the output and of the exact output.

    Args:
        score: of ``(rows, width)`` each, one number for each row.
        classes_of: name of the metric, if the rows must be scores of classes.
    """

    def statistic(output: Any, reference: Any, batch: Batch) -> Tensor:
        if classes_of:
            _need_logits(classes_of, reference, batch)
        ours, exact = main_output(output), main_output(reference)
        counted = _counted(reference, batch)
        pairs = zip(_examples(ours, counted), _examples(exact, counted), strict=True)
        return _stacked([(score(a, b).sum().item(), len(a)) for a, b in pairs])

    return statistic


def _mean_over_labels(name: str, score: Callable[[Tensor, Tensor], Tensor]) -> Statistic:
    """Rows (sum, count) of a score of logits and their labels."""

    def statistic(output: Any, reference: Any, batch: Batch) -> Tensor:
        logits = main_output(output)
        labels = _labels(name, logits, batch)
        counted = _counted(output, batch)
        asked = [label[keep] for label, keep in zip(labels, counted, strict=True)]
        pairs = zip(_examples(logits, counted), asked, strict=True)
        return _stacked([(score(a, b.flatten()).sum().item(), len(a)) for a, b in pairs])

    return statistic


def _stacked(rows: list[tuple[float, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, 2)


# --- with labels --------------------------------------------------------------------------------


def _hits(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    def hits(logits: Tensor, labels: Tensor) -> Tensor:
        best = logits.topk(min(count, logits.shape[-1])).indices
        return _known((best == labels[:, None]).any(-1), logits)

    return hits


def _known(right: Tensor, *scores: Tensor) -> Tensor:
    """``right`` as numbers, NaN where a score is NaN: of those the best one means nothing."""
    unknown = torch.stack([x.isnan().any(-1) for x in scores]).any(0)
    return right.double().masked_fill(unknown, math.nan)


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.long(), reduction="none")


def _perplexity(rows: Tensor) -> float:
    mean = _ratio(rows)
    return math.inf if mean >= 700 else math.exp(mean)


def _confusion(output: Any, reference: Any, batch: Batch) -> Tensor:
    """Rows of true positives, false positives and false negatives of every class."""
    logits = main_output(output)
    labels = _labels("f1", logits, batch)
    classes = logits.shape[-1]
    rows = []
    for logit, label, keep in zip(logits.detach(), labels, _counted(output, batch), strict=True):
        guess, truth = logit.argmax(-1).cpu()[keep], label[keep]
        right = truth[guess == truth]
        hit, guessed, true = (torch.bincount(x, minlength=classes) for x in (right, guess, truth))
        row = torch.cat([hit, guessed - hit, true - hit]).double()
        is_known = not bool(logit.isnan().any(-1).cpu()[keep].any())
        rows.append(row if is_known else torch.full_like(row, math.nan))
    return torch.stack(rows)


def _macro_f1(rows: Tensor) -> float:
    if rows.isnan().any():
        return math.nan
    hit, wrong, missed = rows.sum(0).view(3, -1)
    seen = hit + wrong + missed > 0
    if not seen.any():
        _ratio(rows.new_zeros(1, 2))
    return float((2 * hit / (2 * hit + wrong + missed))[seen].mean())


def _from_scores(score: Score) -> Metric:
    name = getattr(score, "__name__", type(score).__name__)

    def statistic(output: Any, reference: Any, batch: Batch) -> Tensor:
        found = score(output, batch)
        if not isinstance(found, Tensor):  # whatever the default dtype is
            found = torch.as_tensor(found, dtype=torch.float64, device="cpu")
        scores = found.detach().cpu().double()
        if scores.dim() != 1:
            raise ValueError(
                f"{name}: got scores of shape {tuple(scores.shape)}; accepted: (examples,), one "
                "score for each example of the batch"
            )
        return scores[:, None]

    return Metric(name, "higher", None, statistic, lambda rows: float(rows.mean()))


# --- against the exact model --------------------------------------------------------------------


def _divergence(ours: Tensor, exact: Tensor) -> Tensor:
    p, q = exact.log_softmax(-1), ours.log_softmax(-1)
    # 0 log 0 = 0: a class that a model rules out has the logit -inf.
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0).sum(-1)


def _same_choice(ours: Tensor, exact: Tensor) -> Tensor:
    return _known(ours.argmax(-1) == exact.argmax(-1), ours, exact)


def _cosine(ours: Tensor, exact: Tensor) -> Tensor:
    return F.cosine_similarity(ours, exact, dim=-1)


def _powers(output: Any, reference: Any, batch: Batch) -> Tensor:
    """Rows of the squared norms of the exact output and of what is added to it."""
    ours, exact = main_output(output), main_output(reference)
    counted = _counted(reference, batch)
    pairs = zip(_examples(ours, counted), _examples(exact, counted), strict=True)
    rows = [(b.square().sum().item(), (a - b).square().sum().item()) for a, b in pairs]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _decibels(rows: Tensor) -> float:
    signal, noise = rows.sum(0)
    return math.inf if noise == 0 else float(10 * torch.log10(signal / noise))


def _embeddings(output: Any, reference: Any, batch: Batch) -> Tensor:
    """Rows of our embedding, then the exact one: the mean of an example's positions that count.

    Without such a position an example has no embedding, and no row.
    """
    ours, exact = main_output(output), main_output(reference)
    counted = _counted(reference, batch)
    pairs = zip(_examples(ours, counted), _examples(exact, counted), strict=True)
    rows = [torch.cat([a.mean(0), b.mean(0)]) for a, b in pairs if len(b)]
    width = 2 * exact.shape[-1]
    return torch.stack(rows) if rows else torch.empty(0, width, dtype=torch.float64, device="cpu")


def _rank_correlation(rows: Tensor) -> float:
    from scipy.stats import spearmanr

    if len(rows) < 3:
        raise ValueError(
            f"rank-correlation: got {len(rows)} examples; accepted: 3 or more, so that there are "
            "similarities to rank"
        )
    first, second = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    ours, exact = (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT for x in rows.chunk(2, -1))
    return float(spearmanr(ours[first, second], exact[first, second]).statistic)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # with labels
        Metric("top1", "higher", None, _mean_over_labels("top1", _hits(1)), _ratio),
        Metric("top5", "higher", None, _mean_over_labels("top5", _hits(5)), _ratio),
        Metric(
            "perplexity", "lower", None, _mean_over_labels("perplexity", _surprise), _perplexity
        ),
        Metric("f1", "higher", None, _confusion, _macro_f1),
        # against the exact model
        Metric("kl", "lower", 0.0, _mean_over_positions(_divergence, "kl"), _ratio),
        Metric("agreement", "higher", 1.0, _mean_over_positions(_same_choice, "agreement"), _ratio),
        Metric("cosine", "higher", 1.0, _mean_over_positions(_cosine), _ratio),
        Metric("sqnr", "higher", math.inf, _powers, _decibels),
        Metric("rank-correlation", "higher", 1.0, _embeddings, _rank_correlation),
    )
}
"""The metrics by their names.

``top1``, ``top5``: share of the labels that are the best class, or one of the best five.
``perplexity``: exp of the mean cross-entropy, nats; labels[t] is the answer to logits[t].
``f1``: macro F1 over the classes that are a label or a guess somewhere, argmax of the logits.
``kl``: mean KL divergence of our distribution from the exact one, nats for each position.
``agreement``: share of the positions whose best class is the exact model's.
``cosine``: mean cosine similarity of the rows of the main output.
``sqnr``: power of the exact main output over that of the difference, dB.
``rank-correlation``: Spearman's, of the cosine similarities of all pairs of examples; an example
is the mean of its positions that count, and is left out if there are none.

A NaN among the scores of a position that counts makes the value NaN, not a wrong guess. ``kl`` and
``agreement`` are of outputs that ``has_logits`` knows for scores of classes.
"""
