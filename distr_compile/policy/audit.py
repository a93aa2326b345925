"""What each rule of a policy did to a model, and which of its rules that makes errors.

A rule names modules with attention, or only modules without, or nothing at all; and the attention
that it names may have a width that its group size or rank does not fit. A backend call fills one
:class:`RuleAudit` for its graph; those of several graphs are put together by ``+``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from distr_compile.policy.errors import PolicyError, collected, sentence
from distr_compile.policy.plan import LAYERS_ACCEPTED, Rule


@dataclass(frozen=True)
class Attended:
    """One attention, as the rules see it.

    Attributes:
        layer: name of its module.
        misfit: why it cannot take the group size or rank of its plan; None where it can.
        wholes: its names with the segments of wrappers, which rules may name as well.
    """

    layer: str
    misfit: str | None = None
    wholes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RuleAudit:
    """What the rules of one policy met, in one graph or in several; ``Policy.audit`` begins it.

    Attributes:
        rules: those of the policy, in order, each with its place for messages.
        modules: names of all modules of the model, with or without the root, ""; None where they
            are not known.
        ran: names of the modules whose code is in the graphs.
        attention: every attention of the graphs.
    """

    rules: tuple[tuple[str, Rule], ...] = ()
    modules: tuple[str, ...] | None = None
    ran: frozenset[str] = frozenset()
    attention: tuple[Attended, ...] = ()

    def of_graph(self, attention: Iterable[Attended], ran: Iterable[str]) -> RuleAudit:
        """The same rules and modules with what was found in a graph."""
        return replace(self, ran=frozenset(ran), attention=tuple(attention))

    def __add__(self, other: RuleAudit) -> RuleAudit:
        """What the rules met in the graphs of both, which are of one policy and model."""
        return replace(
            self,
            modules=self.modules if other.modules is None else other.modules,
            ran=self.ran | other.ran,
            attention=self.attention + other.attention,
        )

    @property
    def matched(self) -> tuple[str, ...]:
        """Patterns of the rules that name attention."""
        return tuple(rule.layers for _, rule in self.rules if self._named_by(rule))

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Patterns of the rules that name modules of the graphs, but no attention there."""
        return tuple(
            rule.layers
            for _, rule in self.rules
            if not self._named_by(rule) and any(map(rule.matches, self.ran))
        )

    def check_names(self) -> None:
        """Refuse rules that name no module, where the modules are known.

        Raises:
            PolicyError: every such rule, each with up to three of the nearest names.
        """
        if self.modules is None:
            return
        below_root = [name for name in self.modules if name]
        errors = []
        for place, rule in self.rules:
            if any(map(rule.matches, self.modules)):
                continue
            wanted = rule.layers.removeprefix("re:").replace("\\", "")
            near = difflib.get_close_matches(wanted, below_root, n=3, cutoff=0.0)
            advice = (
                f"nearest modules: {', '.join(near)}" if near else "the model has no submodules"
            )
            got = f'"{rule.layers}", which names no module of the model'
            errors.append(f"{place}: {sentence('layers', got, LAYERS_ACCEPTED, advice)}")
        if errors:
            raise collected(errors)

    def check_sizes(self) -> None:
        """Refuse rules whose group size or rank none of the attention that they name can take.

        Only where the graphs are all of the model does that say anything.

        Raises:
            PolicyError: every such rule, each with the reason of the first attention.
        """
        errors = []
        for place, rule in self.rules:
            if not {"group_size", "rank"} & dict(rule.fields).keys():
                continue
            misfits = [each.misfit for each in self._named_by(rule)]
            if misfits and None not in misfits:
                errors.append(f"{place}: {misfits[0]}; no layer of {rule.layers!r}")
        if errors:
            raise PolicyError("\n".join(errors))

    def check_use(self) -> None:
        """Refuse rules that name no attention; here, too, the graphs must be all of the model.

        Raises:
            PolicyError: every such rule, with the layers that have attention.
        """
        layers = list(dict.fromkeys(each.layer for each in self.attention))
        errors = [
            f'{place}: layers: got "{rule.layers}", which names modules without '
            f"attention; accepted: a pattern for one of {', '.join(layers) or 'no layer at all'}"
            for place, rule in self.rules
            if not self._named_by(rule)
        ]
        if errors:
            raise PolicyError("\n".join(errors))

    def _named_by(self, rule: Rule) -> list[Attended]:
        return [
            each for each in self.attention if any(map(rule.matches, (each.layer, *each.wholes)))
        ]
