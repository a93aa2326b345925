"""Expected and found decisions in one small language, and how far they agree.

``distr:4; exact[cross-head-mix]:2; not_attention[no-qk-product]:1`` says: four sites are
approximated, two exact because heads are mixed, one softmax is no attention. A found site may have
several reasons, ``exact[decode+rank]:1``, and a label may accept several,
``exact[decode|banded]:1``, where two are true and either may be met first. They agree when they
share one.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distr_compile.reporting import Report

LABELS = Path(__file__).with_name("labels.csv")
TERM = re.compile(r"(distr|exact|not_attention)(?:\[([a-z0-9+|-]+)\])?:(\d+)")

Decision = tuple[str, frozenset[str]]
Census = Counter[Decision]


def read_labels(path: Path = LABELS) -> dict[tuple[str, str, str], str]:
    """The expected census of every labelled case, by (source, name, variant)."""
    with path.open(newline="") as file:
        return {
            (line["source"], line["name"], line["variant"]): line["expected"]
            for line in csv.DictReader(file)
        }


def parse(text: str) -> Census:
    """Read a census; raises ValueError for a term that is none."""
    census: Census = Counter()
    for term in filter(None, (part.strip() for part in text.split(";"))):
        match = TERM.fullmatch(term)
        if match is None:
            raise ValueError(
                f"{term!r} in {text!r}; accepted: distr:N, exact[code]:N, not_attention[code]:N"
            )
        decision, codes, count = match.groups()
        census[decision, frozenset(re.split(r"[+|]", codes or "")) - {""}] += int(count)
    return census


def census(report: Report) -> Census:
    """What the pass decided."""
    sites: Iterable[Decision] = (
        (row.decision, frozenset(reason.code for reason in row.reasons)) for row in report.rows
    )
    others = (("not_attention", frozenset({entry.reason.code})) for entry in report.not_attention)
    return Counter([*sites, *others])


def spell(counts: Census) -> str:
    """The census as text, in a fixed order."""
    terms = []
    for (decision, codes), count in sorted(
        counts.items(), key=lambda item: (item[0][0] != "distr", item[0][0], sorted(item[0][1]))
    ):
        reasons = f"[{'+'.join(sorted(codes))}]" if codes and decision != "distr" else ""
        terms.append(f"{decision}{reasons}:{count}")
    return "; ".join(terms)


def agreement(expected: Census, found: Census) -> tuple[int, int]:
    """How many sites are decided as labelled, of how many labelled or found (the larger).

    The most pairs that fit, by augmenting paths: a label may accept several reasons, a site may
    carry several.
    """
    labels, sites = list(expected.elements()), list(found.elements())
    holder: dict[int, int] = {}  # site -> the label it is paired with

    def pair(label: int, seen: set[int]) -> bool:
        for site in range(len(sites)):
            if site in seen or not _fits(labels[label], sites[site]):
                continue
            seen.add(site)
            if site not in holder or pair(holder[site], seen):
                holder[site] = label
                return True
        return False

    right = sum(pair(label, set()) for label in range(len(labels)))
    return right, max(len(labels), len(sites))


def _fits(label: Decision, site: Decision) -> bool:
    return label[0] == site[0] and (not label[1] or bool(label[1] & site[1]))
