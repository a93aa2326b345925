"""What the tests of the policy share: the fields, a file with comments, policies to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import Policy, PolicyError

PLAIN: dict[str, Any] = {
    "group_size": 2,
    "rank": None,
    "estimator": "projection",
    "rounds": 1,
    "grouping_block": "auto",
    "min_seq_len": "auto",
    "causal": "block",
    "exact": "auto",
    "training": "exact",
}
"""The fields in their order, with their defaults."""
FIELDS = tuple(PLAIN)
PROJECTION = {"estimator": "projection", "rounds": 2}
MEAN = {"estimator": "lsh-mean"}

COMMENTED = """\
# tuned on Monday
[default]  # everywhere
group_size = 4      # fast
# a remark at the end of the table

# the first block is sensitive
[[rule]]
layers = "blocks.0.attn"  # here
group_size = 1

[[rule]]   # the rest
layers = 're:blocks\\.[1-3]\\..*'
exact = 'keep'
"""

PATTERNS = st.lists(st.sampled_from(list("ab01.*?")), min_size=1, max_size=5).map("".join)
VALUES = {
    "group_size": st.integers(1, 9),
    "rank": st.integers(16, 99),
    "estimator": st.sampled_from(sorted(ESTIMATORS)),
    "rounds": st.integers(1, 1),
    "grouping_block": st.integers(1, 9) | st.just("auto"),
    "min_seq_len": st.integers(0, 9) | st.just("auto"),
    "causal": st.sampled_from(["block", "strict"]),
    "exact": st.sampled_from(["auto", "sdpa", "keep"]),
    "training": st.sampled_from(["exact", "approximate"]),
}
DEFAULTS = st.fixed_dictionaries({}, optional=VALUES).filter(
    lambda fields: not {"group_size", "rank"} <= fields.keys()
)
RULES = st.lists(
    st.tuples(PATTERNS, DEFAULTS.filter(bool)).map(lambda r: {"layers": r[0], **r[1]}), max_size=4
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.toml"
    path.write_bytes(text.encode())
    return path


def error_of(source: Any) -> str:
    with pytest.raises(PolicyError) as raised:
        Policy.from_any(source)
    return str(raised.value)
