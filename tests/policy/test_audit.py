"""What the rules of a policy did, in one graph and in several."""

from __future__ import annotations

import pytest

from distr_compile.policy import Attended, Policy, PolicyError

MODULES = ["", "a", "a.attn", "b", "b.attn", "head"]

POLICY = Policy(
    rule=[
        {"layers": "*.attn", "rank": 32},
        {"layers": "b.*", "estimator": "lsh-mean"},
        {"layers": "head", "group_size": 4},
    ]
)


def test_a_rule_matched_attention_or_only_other_modules() -> None:
    audit = POLICY.audit(MODULES).of_graph([Attended("a.attn")], ["", "a", "a.attn", "head"])
    assert audit.matched == ("*.attn",)
    assert audit.unmatched == ("head",), "nothing of b ran here"
    with pytest.raises(PolicyError) as raised:
        audit.check_use()
    first, second = str(raised.value).splitlines()
    assert first.startswith('rule 2: layers: got "b.*", which names modules without attention')
    assert second.startswith('rule 3: layers: got "head", ')
    assert second.endswith("accepted: a pattern for one of a.attn")


def test_what_one_graph_lacks_another_may_have() -> None:
    begun = POLICY.audit(MODULES)
    first = begun.of_graph([Attended("a.attn", "too wide")], ["a.attn", "b"])
    second = begun.of_graph([Attended("b.attn"), Attended("head")], ["b.attn", "head"])
    both = begun + first + second
    assert both.matched == ("*.attn", "b.*", "head")
    assert both.unmatched == ()
    assert [each.layer for each in both.attention] == ["a.attn", "b.attn", "head"]
    both.check_names()
    both.check_use()
    both.check_sizes()
    with pytest.raises(PolicyError, match=r"^rule 1: too wide; no layer of '\*\.attn'$"):
        first.check_sizes()


def test_a_size_is_of_the_rule_that_sets_it() -> None:
    misfits = [Attended("b.attn", "rank 32 is not less"), Attended("b.x", "32 again")]
    audit = POLICY.audit(MODULES).of_graph(misfits, ["b"])
    with pytest.raises(PolicyError, match=r"^rule 1: rank 32 is not less; no layer of "):
        audit.check_sizes()


def test_names_are_refused_only_where_the_modules_are_known() -> None:
    Policy(rule=[{"layers": "c", "group_size": 1}]).audit().check_names()
    known = Policy(rule=[{"layers": "c", "group_size": 1}]).audit(MODULES)
    with pytest.raises(PolicyError, match="names no module of the model"):
        known.check_names()
    assert (Policy().audit() + Policy().audit(MODULES)).modules == tuple(MODULES)
