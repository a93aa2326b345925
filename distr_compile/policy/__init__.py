"""What the user wants for each layer: the policy file, checked, resolved and saved.

A policy is a value. It is read from TOML, a dict or arguments, checked as a whole before anything
compiles, compared and hashed by content, and answers one question: the :class:`LayerPlan` of a
layer. :class:`LayerPlan` is also the one table of fields: the checks, the JSON schema and the error
messages are made from it, so a new field is one entry there. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from distr_compile.policy import document
from distr_compile.policy.audit import Attended, RuleAudit
from distr_compile.policy.edit import text_with_bases, text_with_default, text_with_rule
from distr_compile.policy.errors import (
    KeyPath,
    PolicyError,
    collected,
    place_of,
    sentence,
    shown,
)
from distr_compile.policy.plan import (
    OPTIONS,
    BasesFile,
    LayerPlan,
    Rule,
    key_of_rounds,
    overridden,
    plain_data,
    refused_rounds,
    rounds_fault,
)
from distr_compile.policy.source import Source, parse

__all__ = [
    "ENV_VAR",
    "Attended",
    "BasesFile",
    "LayerPlan",
    "Policy",
    "PolicyError",
    "Rule",
    "RuleAudit",
]

ENV_VAR = "DISTR_POLICY"
"""Environment variable with the path of the policy file to use when none is given."""


_TIMELESS = {"min_seq_len": 0, "exact": "sdpa"}
"""What stands for "auto" where a result must not depend on the machine."""


@dataclass(frozen=True, init=False)
class Policy:
    """Which plan every layer gets: a default and an ordered list of rules.

    A value: frozen, compared and hashed by what it says, not by where it came from or how it is
    written (``Policy() == Policy(default={"group_size": 2})``).

    Attributes:
        default: the plan of a layer that no rule names.
        rule: the rules in order; a later one overrides an earlier one field by field.
        bases: the file with the bases of calibrated layers.
    """

    default: LayerPlan
    rule: tuple[Rule, ...]
    bases: BasesFile | None = None
    _source: Source | None = dataclasses.field(default=None, compare=False, repr=False)
    _folder: str = dataclasses.field(default="", compare=False, repr=False)

    def __init__(
        self,
        default: Mapping[str, object] | LayerPlan | None = None,
        rule: Sequence[Mapping[str, object] | Rule] = (),
        bases: Mapping[str, object] | BasesFile | None = None,
    ) -> None:
        """Check and keep a policy.

        Args:
            default: fields for every layer; what is left out has the default of :class:`LayerPlan`.
            rule: tables with ``layers`` and at least one field, or rules of another policy.
            bases: ``file`` and ``sha256`` of a file that ``distr calibrate`` wrote.

        Raises:
            PolicyError: anything unknown or not accepted; all errors at once.
        """
        data = {"default": {} if default is None else default, "rule": rule}
        self._fill(data if bases is None else {**data, "bases": bases}, None)

    def _fill(self, data: Mapping[str, Any], source: Source | None) -> None:
        content = document.checked(data, source)
        rules = [
            Rule(r["layers"], tuple((name, r[name]) for name in OPTIONS if name in r))
            for r in content.get("rule", ())
        ]
        object.__setattr__(self, "default", LayerPlan(**content.get("default", {})))
        object.__setattr__(self, "rule", tuple(rules))
        bases = content.get("bases")
        object.__setattr__(self, "bases", None if bases is None else BasesFile(**bases))
        object.__setattr__(self, "_source", source)
        # Whole, so that the bases are found from any working directory.
        folder = os.path.dirname(os.path.abspath(source.name)) if source and source.name else ""
        object.__setattr__(self, "_folder", folder)
        if faults := refused_rounds(self.default, self.rule):
            raise collected([f"{self._place(path)}: {text}" for path, text in faults.items()])

    @classmethod
    def _build(cls, data: Mapping[str, Any], source: Source | None = None) -> Policy:
        policy = cls.__new__(cls)
        policy._fill(data, source)
        return policy

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a TOML file.

        Raises:
            PolicyError: the file cannot be read, is not TOML, or is not a policy.
        """
        return cls._load(path, "")

    @classmethod
    def _load(cls, path: str | os.PathLike[str], named_by: str) -> Policy:
        name = os.fspath(path)
        try:
            # bytes, because reading text would change the line ends that save() writes back; the
            # mark that some editors put in front of UTF-8 is no part of the text
            text = Path(name).read_bytes().decode("utf-8-sig")
        except (OSError, ValueError) as error:
            got = getattr(error, "strerror", None) or str(error)
            message = sentence("file", got, "a TOML file in UTF-8", "check the path and the file")
            raise PolicyError(f"{name}{named_by}: {message}") from None
        source = Source(name, text)
        return cls._build(parse(source), source)

    @classmethod
    def from_any(cls, policy: str | os.PathLike[str] | Mapping[str, Any] | Policy | None) -> Policy:
        """Make a policy of whatever the user gave: a path, a dict, a policy, or nothing.

        Args:
            policy: a path is loaded; a dict has the shape of the file, ``{"default": {...}, "rule":
                [{...}]}``; None means the file named by the environment variable ``DISTR_POLICY``,
                and without that the defaults.

        Raises:
            PolicyError: as :meth:`load`; also for anything of another type.
        """
        if isinstance(policy, Policy):
            return policy
        if policy is None:
            path = os.environ.get(ENV_VAR)
            return (
                cls._load(path, f" (named by the environment variable {ENV_VAR})")
                if path
                else cls()
            )
        if isinstance(policy, (str, os.PathLike)):
            return cls.load(policy)
        if isinstance(policy, Mapping):
            return cls._build(policy)
        accepted = "a path, a dict, a Policy or None"
        raise PolicyError(sentence("policy", shown(policy), accepted, "give one of these"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as TOML, whole or not at all.

        A policy that came from a file is written as it stood there, comments included.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(self.to_toml().encode("utf-8"))
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def to_toml(self) -> str:
        """Return the text that :meth:`save` writes."""
        if self._source is not None:
            return self._source.text
        return tomlkit.dumps({key: value for key, value in self.to_dict().items() if value})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with every default spelled out; :meth:`from_any` reads it back."""
        tables: dict[str, Any] = {
            "default": plain_data(self.default),
            "rule": [rule.to_dict() for rule in self.rule],
        }
        return tables if self.bases is None else {**tables, "bases": plain_data(self.bases)}

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the content as canonical JSON: the same in every process."""
        content = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def with_default(self, **fields: object) -> Policy:
        """Return a copy with changed fields in the default; a file's comments and layout are kept.

        Raises:
            PolicyError: an unknown field or a value that is not accepted.
        """
        changed = Policy(overridden(plain_data(self.default), fields), self.rule, self.bases)
        return changed._edited_from(self, lambda text: text_with_default(text, fields))

    def with_rule(self, layers: str, **fields: object) -> Policy:
        """Return a copy with one more rule; a file's comments and layout are kept.

        Raises:
            PolicyError: a bad pattern, no field, an unknown field or a value that is not accepted.
        """
        rule = {"layers": layers, **fields}
        changed = Policy(self.default, (*self.rule, rule), self.bases)
        return changed._edited_from(self, lambda text: text_with_rule(text, rule))

    def without_timing(self) -> Policy:
        """Return the same policy where nothing hangs on how fast a machine is.

        ``min_seq_len = "auto"`` becomes 0, and ``exact = "auto"`` "sdpa"; in its own file nothing
        changes.
        """

        def timeless(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: _TIMELESS[name] if value == "auto" and name in _TIMELESS else value
                for name, value in fields.items()
            }

        rules = [{"layers": rule.layers, **timeless(dict(rule.fields))} for rule in self.rule]
        changed = Policy(timeless(plain_data(self.default)), rules, self.bases)
        object.__setattr__(changed, "_source", self._source)  # errors name its lines
        object.__setattr__(changed, "_folder", self._folder)
        return changed

    @property
    def asks_for_times(self) -> bool:
        """Whether the length from which a layer is approximated is left to how fast it is."""
        lengths: list[object] = [self.default.min_seq_len]
        lengths += [dict(rule.fields).get("min_seq_len") for rule in self.rule]
        return "auto" in lengths

    @property
    def forces_approximation(self) -> bool:
        """Whether a plan asks for fewer columns from a length on that is written down."""
        default = plain_data(self.default)
        tables = [default, *(overridden(default, dict(rule.fields)) for rule in self.rule)]
        return any(t.get("group_size") != 1 and t["min_seq_len"] != "auto" for t in tables)

    def with_bases(self, path: str | os.PathLike[str], sha256: str) -> Policy:
        """Return a copy with the table ``[bases]``; a file's comments and layout are kept.

        Args:
            path: of the bases, as seen from the working directory; what is written is relative to
                the folder of the policy file.
            sha256: of the bases' bytes, in hex.

        Raises:
            PolicyError: not a SHA-256.
        """
        relative = os.path.relpath(path, self._folder or os.curdir)
        bases = BasesFile(Path(relative).as_posix(), sha256)
        changed = Policy(self.default, self.rule, bases)
        return changed._edited_from(self, lambda text: text_with_bases(text, plain_data(bases)))

    @property
    def bases_path(self) -> Path | None:
        """Where the file of bases is; None without one."""
        return None if self.bases is None else Path(self._folder, self.bases.file)

    def read_bases(self) -> bytes:
        """Read the file of bases, which must have the checksum that the policy says.

        Raises:
            PolicyError: there is no ``[bases]``, no such file, or one of another checksum.
        """
        advice = "run distr calibrate and copy the lines it prints"
        if self.bases is None:
            raise PolicyError(
                f'{self._place(("bases",))}: bases: got estimator = "calibrated" and no table '
                f"[bases]; accepted: [bases] with file and sha256; {advice}"
            )
        place, path = self.place_of_bases(), Path(self._folder, self.bases.file)
        try:
            data = path.read_bytes()
        except OSError as error:
            got = f"{path}: {error.strerror or error}"
            message = sentence("file", got, document.BASES_ACCEPTED["file"], advice)
            raise PolicyError(f"{place}: {message}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != self.bases.sha256:
            got = f"{path} with SHA-256 {found}"
            accepted = f"the file of SHA-256 {self.bases.sha256}"
            advice = f"it was changed or replaced: restore it, or {advice}"
            raise PolicyError(f"{place}: {sentence('file', got, accepted, advice)}")
        return data

    def _edited_from(self, before: Policy, edit: Callable[[str], str]) -> Policy:
        """The same policy with the edited text of the file that ``before`` came from, if any."""
        edited = self if before._source is None else self._written(edit(before._source.text))
        object.__setattr__(edited, "_folder", before._folder)
        return edited

    def _written(self, text: str) -> Policy:
        """The same policy, to be saved as ``text``, which is in no file yet."""
        if "\r\n" in text:
            text = re.sub("\r?\n", "\r\n", text)
        source = Source("", text)
        written = self._build(parse(source), source)
        if written != self:
            raise RuntimeError(f"the edited text says {written}, not {self}; report this:\n{text}")
        return written

    def rules_matching(self, layer: str) -> tuple[int, ...]:
        """Return the 0-based indices of the rules that name the module ``layer``, in order."""
        return tuple(i for i, rule in enumerate(self.rule) if rule.matches(layer))

    def resolve(self, layer: str) -> LayerPlan:
        """Return the plan of the module ``layer``, a full dotted name as in ``named_modules()``.

        Raises:
            PolicyError: the rules that name the layer come to rounds its estimator does not take.
        """
        matching = self.rules_matching(layer)
        fields = plain_data(self.default)
        path: KeyPath = ("default", "rounds")
        for index in matching:
            set_here = dict(self.rule[index].fields)
            fields = overridden(fields, set_here)
            if key := key_of_rounds(set_here):
                path = ("rule", index, key)
        if fault := rounds_fault(fields["estimator"], fields["rounds"]):
            raise PolicyError(f"{self._place(path)}: layer {layer!r}: {fault}")
        return LayerPlan(**fields, rule=matching)

    def where(self, index: int) -> str:
        """Say where ``rule[index]`` stands: ``distr.toml:7 (rule 2)``, or ``rule 2``."""
        return self._place(("rule", index))

    def place_of_bases(self) -> str:
        """Say where the file of bases is named: ``distr.toml:9 (bases)``, or ``bases``."""
        return self._place(("bases", "file"))

    def _place(self, path: KeyPath) -> str:
        return self._source.place(path) if self._source else place_of(path)

    def check_layers(self, module_names: Iterable[str]) -> None:
        """Check that every rule names at least one module.

        Args:
            module_names: full dotted names as in ``named_modules()``, with or without the root, "".

        Raises:
            PolicyError: every rule that names none, each with up to three of the nearest names.
        """
        self.audit(module_names).check_names()

    def check_ambiguous(self, ambiguous: Mapping[str, tuple[str, str]]) -> None:
        """Check that no rule means one of two layers that have one name without their wrappers.

        Args:
            ambiguous: such names -> the whole names of both.

        Raises:
            PolicyError: a rule names such a name, and not both whole names.
        """
        for index, rule in enumerate(self.rule):
            for short, wholes in ambiguous.items():
                if rule.matches(short) and not all(map(rule.matches, wholes)):
                    got = f'"{rule.layers}", which without wrappers is both {" and ".join(wholes)}'
                    accepted = "the whole name of one of them, as in named_modules()"
                    advice = "write the one that is meant"
                    message = sentence("layers", got, accepted, advice)
                    raise PolicyError(f"{self.where(index)}: {message}")

    def audit(self, module_names: Iterable[str] | None = None) -> RuleAudit:
        """What the rules do to a model of which no graph was seen yet.

        Args:
            module_names: as for :meth:`check_layers`; None where they are not known.
        """
        rules = ((self.where(index), rule) for index, rule in enumerate(self.rule))
        modules = None if module_names is None else tuple(module_names)
        return RuleAudit(tuple(rules), modules)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON schema (draft 2020-12) of the policy file, for TOML editors."""
        return document.json_schema()
