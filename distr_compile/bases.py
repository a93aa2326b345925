"""The file of bases for the estimator ``calibrated``: written, read, and held against a model.

One safetensors file with, for every calibrated attention, ``basis_q`` and ``basis_k``: A and B of
``(H_k, d, d)``, whose first r columns are the bases of rank r; and ``singular_values``
``(H_k, d)``. What else there is to know is JSON in its metadata. The same content gives the same
bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

# Private, but the way PyTorch's own backends look at real tensors while a graph is compiled.
from torch.utils._python_dispatch import _disable_current_modes

from distr_compile.naming import canonical, of_layer
from distr_compile.policy import Policy, PolicyError

FORMAT = "distr-bases 1"

SAMPLE = 64
"""Elements of every parameter that a fingerprint looks at."""

_PARTS = ("basis_q", "basis_k", "singular_values")
_ADVICE = "run distr calibrate on this model and copy the lines it prints"


@dataclass(frozen=True)
class LayerBases:
    """The bases of one attention, on the CPU, fp32.

    Attributes:
        basis_q: A, ``(H_k, d, d)``: Qhat = Q A[..., :r].
        basis_k: B, likewise: Khat = K B[..., :r].
        singular_values: ``(H_k, d)``, falling: those of QK^T over the calibration data, divided by
            the root of (rows of Q times rows of K). The best rank r leaves a share
            sqrt(sum of the squares from r on / sum of all squares) of the scores.
        rows: query rows of a head that were looked at.
    """

    basis_q: Tensor
    basis_k: Tensor
    singular_values: Tensor
    rows: int


@dataclass(frozen=True)
class Bases:
    """The content of a file.

    Attributes:
        layers: by the name of the attention; see ``site_name``.
        fingerprint: of the model that was calibrated.
        torch_version: that it ran with.
    """

    layers: Mapping[str, LayerBases]
    fingerprint: str
    torch_version: str

    def to_bytes(self) -> bytes:
        """The file."""
        tensors, about = {}, {}
        for name, layer in sorted(self.layers.items()):
            for part in _PARTS:
                tensors[f"{part}:{name}"] = getattr(layer, part).contiguous()
            key_heads, head_dim = layer.singular_values.shape
            about[name] = {"head_dim": head_dim, "key_heads": key_heads, "rows": layer.rows}
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "torch": self.torch_version,
            "layers": about,
        }
        # One entry: the library writes several in any order.
        return save(tensors, {"distr": json.dumps(content, sort_keys=True)})

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def from_bytes(data: bytes) -> Bases:
        """Read a file's bytes.

        Raises:
            ValueError: not such a file.
        """
        try:
            size = int.from_bytes(data[:8], "little")
            content = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["distr"])
            tensors = load(data)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            layers = {}
            for name, about in content["layers"].items():
                A, B, singular_values = (tensors[f"{part}:{name}"] for part in _PARTS)
                layers[name] = LayerBases(A, B, singular_values, about["rows"])
        except Exception as error:  # of safetensors, JSON, or a missing key
            raise ValueError(f"not a file of format {FORMAT!r}: {error}") from error
        return Bases(layers, content["fingerprint"], content["torch"])


def site_name(layer: str, index: int, count: int) -> str:
    """The name of one attention in the file: its layer's, numbered where a graph has several.

    Args:
        layer: full dotted name of the module.
        index: 0-based place among the ``count`` attentions that the graph has of that layer.
        count: see ``index``; part of the name, so that a graph cut otherwise finds nothing.
    """
    return layer if count == 1 else f"{layer}#{index + 1}of{count}"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and dtypes of the parameters and a sample of their numbers.

    The same on every device, and through wrappers. A cast or a training step changes it; buffers do
    not count. Of a model with DTensors all processes that hold a part have to ask for it.
    """
    digest, shown = hashlib.sha256(), canonical(model)
    with _disable_current_modes(), torch.no_grad():
        named = ((of_layer(name, shown), p) for name, p in model.named_parameters())
        for name, parameter in sorted(named, key=lambda item: item[0]):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            # Of a DTensor every process has a part.
            whole = getattr(parameter, "full_tensor", parameter.detach)()
            digest.update(_sample(whole.detach()))
    return digest.hexdigest()


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _sample(parameter: Tensor) -> bytes:
    count = parameter.numel()
    if not count or parameter.device.type == "meta":
        return b""
    exact: Any = {"dtype": torch.float64, "device": "cpu"}
    places = torch.linspace(0, count - 1, min(count, SAMPLE), **exact).round().long()
    index = torch.unravel_index(places, parameter.shape) if parameter.dim() else ()
    chosen = parameter[tuple(i.to(parameter.device) for i in index)]
    return chosen.reshape(-1).cpu().view(torch.uint8).numpy().tobytes()


_OWN: dict[int, tuple[weakref.ref[Any], set[tuple[int, str]]]] = {}
"""By the id of what compiles: it, and ids of modules with the files that were once theirs."""


class BasesOfModel:
    """What a policy's file of bases has for the attentions of one model; read when first asked.

    Args:
        policy: names the file.
        module: the model.
        compiled: what compiles it, the same object in every compile of one ``torch.compile``: there
            the bases stay good while the model is trained. None: they are of the model as it is.

    Attributes:
        notes: what is to be known of the bases that were given.
    """

    def __init__(
        self, policy: Policy, module: nn.Module | None, compiled: object | None = None
    ) -> None:
        self._policy, self._module, self._compiled = policy, module, compiled
        self.notes: list[str] = []

    def __call__(
        self, name: str, *, rank: int, head_dim: Any, key_heads: Any
    ) -> tuple[Tensor, Tensor]:
        """A and B of rank r for one attention, ``(H_k, d, r)`` fp32 on the CPU.

        Args:
            name: from ``site_name``.
            rank: r.
            head_dim: d of the model.
            key_heads: H_k of the model; not looked at where it is symbolic.

        Raises:
            PolicyError: no file, a wrong one, one of another model, or without these bases.
        """
        found = self._bases.layers.get(name)
        if found is None:
            known = ", ".join(repr(n) for n in self._bases.layers) or "none"
            raise self._error(f"no bases for the attention {name!r}; it has: {known}", _ADVICE)
        heads, width = found.singular_values.shape
        if width != head_dim or (isinstance(key_heads, int) and heads != key_heads):
            raise self._error(
                f"bases for {heads} key heads of width {width} at {name!r}, where the model has "
                f"{key_heads} of width {head_dim}",
                _ADVICE,
            )
        return found.basis_q[..., :rank], found.basis_k[..., :rank]

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """H_k and d by the name of each attention in the file. The model is not looked at.

        Raises:
            PolicyError: no file, or a wrong one.
        """
        return {name: tuple(b.singular_values.shape) for name, b in self._file.layers.items()}

    @functools.cached_property
    def _file(self) -> Bases:
        data = self._policy.read_bases()
        try:
            return Bases.from_bytes(data)
        except ValueError as error:
            raise self._error(str(error), "give a file that distr calibrate wrote") from error

    @functools.cached_property
    def _bases(self) -> Bases:
        bases = self._file
        if self._module is None:
            raise self._error(
                "bases, and a compiled function that belongs to no module",
                "compile the module that was calibrated",
            )
        own = _own_files(self._compiled)
        if (id(self._module), bases.fingerprint) in own and _is_sharded(self._module):
            return bases  # a process may compile anew alone, and all would have to be asked
        now = fingerprint(self._module)
        if now == bases.fingerprint:
            own.add((id(self._module), now))
        elif (id(self._module), bases.fingerprint) in own:
            self.notes.append(
                "the bases are of this model before its parameters changed: as calibrated when it "
                "was compiled first"
            )
        else:
            raise self._error(
                f"bases of a model with fingerprint {bases.fingerprint[:12]}, while that of the "
                f"compiled {type(self._module).__name__} is {now[:12]}: other parameters, dtype or "
                "module",
                f"{_ADVICE}, or compile the very module that was calibrated",
            )
        return bases

    def _error(self, got: str, advice: str) -> PolicyError:
        where = self._policy.place_of_bases()
        return PolicyError(f"{where}: file: got {got}; accepted: the bases of this model; {advice}")


def _own_files(compiled: object | None) -> set[tuple[int, str]]:
    """What ``_OWN`` has of one ``torch.compile``; nothing that lasts where that is not known."""
    key = id(compiled)
    known = _OWN.get(key)
    if known is None or known[0]() is not compiled:
        try:
            known = weakref.ref(compiled, lambda _: _OWN.pop(key, None)), set()
        except TypeError:  # None
            return set()
        _OWN[key] = known
    return known[1]
