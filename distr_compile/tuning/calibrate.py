"""Bases for the estimator ``calibrated``: run a model over data once and keep what Q and K span.

Every attention of the model becomes an observer, which adds up the Gram matrices of Q and K and
returns exact attention: what later layers see is exact, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from distr_compile.accuracy import ranks
from distr_compile.accuracy.batch import Batches, walk
from distr_compile.accuracy.checkpoint import write_whole
from distr_compile.accuracy.evaluate import device_of
from distr_compile.accuracy.given import check_folder, check_limit
from distr_compile.accuracy.instrument import Call, Instrument, Site
from distr_compile.accuracy.progress import progress_bar, total
from distr_compile.bases import Bases, LayerBases, fingerprint
from distr_compile.estimators import MIN_QUERIES, NoArithmeticError, estimator_named
from distr_compile.kernels.counted import counted_rows
from distr_compile.kernels.projection.reference import RIDGE
from distr_compile.naming import canonical
from distr_compile.policy import Policy, Rule
from distr_compile.policy.errors import check_type
from distr_compile.restoring import Repeatable

COMPUTES = ("calibrated",)
"""The estimators whose bases are made here, of those that need bases."""

_SMALLEST_SCALE = 2.0**-12
"""Relative to the largest singular value; what the data hardly has must not blow up K B."""


@dataclass(frozen=True)
class Calibration:
    """Bases that ``calibrate`` has made, and the file that holds them.

    Attributes:
        path: of the file of bases.
        sha256: of its bytes, in hex, as a policy needs it.
        bases: the file's content.
        refused: the attentions that have no bases -> why not.
    """

    path: Path
    sha256: str
    bases: Bases
    refused: Mapping[str, str]

    def policy_lines(self, policy_folder: str | os.PathLike[str] = os.curdir) -> str:
        """Return the table ``[bases]`` for a policy file in ``policy_folder``."""
        file = Path(os.path.relpath(self.path, policy_folder or os.curdir)).as_posix()
        return tomlkit.dumps({"bases": {"file": file, "sha256": self.sha256}})


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Batches,
    policy: str | os.PathLike[str] | Policy | Mapping[str, Any] | None = None,
    *,
    path: str | os.PathLike[str],
    layers: str | Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Run ``model`` over ``batches`` and write the bases of its attentions to ``path``.

    The model runs exactly, once, under ``torch.no_grad()``. Rows that a mask hides do not count
    (``kernels.counted.counted_rows``), and neither do calls with fewer than 16 query
    rows, which are always exact. The Gram matrices are summed in fp64 where the device has it.

    Args:
        model: the module that will be compiled: that very object's names and weights are in the
            file. Usually in eval mode; batches are moved to its device.
        batches: a list, a data loader, or a function that returns an iterable, of calls: a
            ``Batch``, a dict of keywords such as a tokenizer's encoding, a tuple or list of
            positional arguments, or one argument.
        policy: bases are made for the layers to which it gives the estimator "calibrated"; its
            ``[bases]`` are not looked at. None: for all layers.
        path: the safetensors file to write, whole or not at all.
        layers: further limits the layers to those that one of these patterns names, globs or
            regular expressions as in a rule of a policy.
        limit: so many batches at most.
        progress: show a bar on the terminal's stderr.

    Returns:
        The bases, and the attentions without any.

    Raises:
        ValueError: no batch, batches that can be walked only once, a path that cannot be written,
            or no attention for which bases could be made: no row of finite numbers counts.
        TypeError: no module.
        PolicyError: the policy or a pattern is wrong, or a pattern names no module.
        NoArithmeticError: the policy gives a layer an estimator that needs other bases than these.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module", "give the one to be compiled")
    check_folder(path)
    limit = check_limit(limit)
    wanted = _wanted(model, policy, layers)
    observer = _Observer()
    instrument = Instrument(observer, wanted)
    count = 0
    device = device_of(model)
    share = ranks.Share(walk(batches, limit))

    def own() -> bytes:
        nonlocal count
        with instrument.on(model) as run, progress_bar(progress) as bar:
            task = bar.add_task("calibrating", total=total(batches, limit))
            again = Repeatable(model)
            for count, batch in enumerate(share, 1):
                moved = batch.to(device)
                again.once(run, moved.args, moved.kwargs)
                bar.update(task, completed=count * ranks.world())
        return b"" if ranks.world() == 1 else observer.told(instrument)

    if ranks.world() > 1:
        ranks.require_same({"model": fingerprint(model)})
    found = ranks.exchange(own)
    share.require_same()
    if ranks.world() > 1:
        count = sum(ranks.of_all(lambda: count))
        observer, instrument = _Observer(), Instrument(observer, wanted)
        for each in found:
            observer.add(each, instrument)
    if not count:
        raise ValueError("batches: got none; give at least one: bases are made from data")
    made = {
        name: observer.statistics[name].bases()
        for name in instrument.usable
        if name in observer.statistics and observer.statistics[name].are_counted
    }
    unseen = dict.fromkeys(instrument.sites, "no finite row of the data was counted")
    refused = {**unseen, **instrument.exact, **instrument.mixed}
    refused = {name: why for name, why in refused.items() if name not in made}
    if not made:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"calibrate: got no attention to make bases for ({why or 'none was found'}); accepted: "
            "a model with attention that can be approximated, and a policy that gives some layer "
            'estimator = "calibrated" (or none)'
        )
    bases = Bases(made, fingerprint(model), torch.__version__)
    data = bases.to_bytes()
    if ranks.is_first():
        write_whole(Path(path), data)
    return Calibration(Path(path), hashlib.sha256(data).hexdigest(), bases, refused)


def _wanted(
    model: nn.Module, policy: Any, layers: str | Sequence[str] | None
) -> Callable[[str], bool]:
    checked = None if policy is None else Policy.from_any(policy)
    patterns = [layers] if isinstance(layers, str) else list(layers or ("*",))
    # As a policy, so that a bad pattern is told as everywhere.
    given = Policy(rule=[{"layers": p, "rounds": 1} for p in patterns])
    if layers is not None:
        names = canonical(model)
        given.check_layers({*names, *names.values()})
    rules: tuple[Rule, ...] = given.rule

    def wanted(layer: str) -> bool:
        if not any(rule.matches(layer) for rule in rules):
            return False
        if checked is None:
            return True
        plan = checked.resolve(layer)
        if plan.is_exact or estimator_named(plan.estimator).needs == "nothing":
            return False
        if plan.estimator not in COMPUTES:
            raise NoArithmeticError(
                f"estimator: got {plan.estimator!r}, whose bases nothing makes, for layer "
                f"{layer!r}; accepted: {', '.join(COMPUTES)}; take it, or write what makes them "
                "and list the estimator in COMPUTES of distr_compile/tuning/calibrate.py"
            )
        return True

    return wanted


@dataclass(eq=False)
class _Observer:
    """Adds up the rows of every call and answers it exactly."""

    statistics: dict[str, Statistics] = field(default_factory=dict)

    def __call__(self, call: Call) -> Tensor:
        statistics = self.statistics.setdefault(call.site.name, Statistics())
        if call.q.shape[2] >= MIN_QUERIES:
            statistics.add(call.q, call.k, call.mask)
        return call.exact()

    def told(self, instrument: Instrument) -> bytes:
        """What this process has seen, for ``add`` in another."""
        about = {
            "sites": [[site.name, site.layer] for site in instrument.sites.values()],
            **{name: getattr(instrument, name) for name in ("exact", "mixed")},
            "repeated": {name: of._rep for name, of in self.statistics.items()},
        }
        sums = {
            f"{part} {name}": sum_of
            for name, of in self.statistics.items()
            for part in SUMS
            if (sum_of := getattr(of, part)) is not None
        }
        sums["about"] = torch.tensor(
            list(json.dumps(about).encode()), dtype=torch.uint8, device="cpu"
        )
        return save({name: each.cpu().contiguous() for name, each in sums.items()})

    def add(self, data: bytes, instrument: Instrument) -> None:
        """Add what a process has seen."""
        sums = load(data)
        about = json.loads(bytes(sums.pop("about").tolist()))
        for name, layer in about["sites"]:
            instrument.sites.setdefault(name, Site(name, layer))
        for name in ("exact", "mixed"):
            getattr(instrument, name).update(about[name])
        for name, rep in about["repeated"].items():
            of = self.statistics.setdefault(name, Statistics())
            of._rep = rep if of.Cq is None else of._rep
            for part in SUMS:
                if (more := sums.get(f"{part} {name}")) is not None:
                    known = getattr(of, part)
                    setattr(of, part, more if known is None else known + more)


SUMS = ("Cq", "Ck", "query_rows", "key_rows")
"""Attributes of ``Statistics`` that add up over calls."""


class Statistics:
    """The Gram matrices of one attention, Cq = sum of q^T q and Ck, of the rows that count.

    Attributes:
        Cq: ``(H_k, d, d)``, fp64 where the device has it: of the query heads of each key head.
        Ck: likewise.
        query_rows: ``(H_k,)``, how many rows Cq is the sum over; those of all its query heads.
        key_rows: likewise of Ck.
        rows: query rows of one query head, the mean over the heads.
    """

    def __init__(self) -> None:
        self.Cq: Tensor | None = None
        self.Ck: Tensor | None = None
        self.query_rows: Tensor | None = None
        self.key_rows: Tensor | None = None
        self._rep = 1

    @property
    def rows(self) -> int:
        """See the class."""
        if self.query_rows is None:
            return 0
        return round(self.query_rows.cpu().double().mean().item() / self._rep)

    @property
    def are_counted(self) -> bool:
        """Whether there is a row of Q and one of K."""
        counts = (self.query_rows, self.key_rows)
        return all(count is not None and bool(count.any()) for count in counts)

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Add one call of the op.

        Args:
            q: ``(B, H, N, d)``; entries that are not finite count as 0, and rows of nothing else
                not at all.
            k: ``(B or 1, H_k, M, d)``.
            mask: as the op takes it.
        """
        key_heads, rep = k.shape[1], q.shape[1] // k.shape[1]
        queries, keys = counted_rows(mask, q.shape[2], k.shape[2], key_heads, rep)
        stacked = q.unflatten(1, (key_heads, rep))
        Cq, query_rows = _gram(stacked, queries)
        Ck, key_rows = _gram(k[:, :, None], None if keys is None else keys[:, :, None])
        self._rep = rep
        self.Cq = Cq if self.Cq is None else self.Cq + Cq
        self.Ck = Ck if self.Ck is None else self.Ck + Ck
        self.query_rows = query_rows + (0 if self.query_rows is None else self.query_rows)
        self.key_rows = key_rows + (0 if self.key_rows is None else self.key_rows)

    def bases(self) -> LayerBases:
        """The bases of every rank, on the CPU."""
        assert self.Cq is not None
        assert self.Ck is not None
        assert self.query_rows is not None
        assert self.key_rows is not None
        # Per row, so that Qhat and Khat come out equally large.
        Cq, Ck = (
            C.cpu().double() / n.cpu().double().clamp(min=1)[:, None, None]
            for C, n in ((self.Cq, self.query_rows), (self.Ck, self.key_rows))
        )
        A, B, singular_values = nested_bases(Cq, Ck)
        return LayerBases(A.float(), B.float(), singular_values.float(), self.rows)


def _gram(rows: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """X^T X per key head, and its number of rows; of ``(b, H_k, rep, n, d)``."""
    b = rows.shape[0]
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    kept = rows.isfinite()
    if counted is not None:
        # A mask may have the batch size where K, shared by all entries, has not.
        b = max(b, counted.shape[0])
        kept = kept & counted[..., None]
    count = kept.any(-1).sum((0, 2, 3))
    X = rows.to(exact).where(kept, 0).expand(b, -1, -1, -1, -1).transpose(0, 1).flatten(1, 3)
    return X.mT @ X, count


def nested_bases(Cq: Tensor, Ck: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of every rank: the first r columns give the least-squares Q A B^T K^T of rank r.

    For Cq = Rq^T Rq and Ck = Rk^T Rk, the norm of Q X K^T is that of Rq X Rk^T, whose truncated SVD
    U s V^T is the best of rank r. Qhat = Q Rq^-1 U has orthonormal columns and Khat = K Rq^T U is
    the least-squares match, which never divides by the small directions of K; both then are scaled
    by roots of s, so that rounding treats them alike. A ridge as in ``gram`` of ``projection``
    keeps Rq away from singular.

    Args:
        Cq: ``(..., d, d)`` fp64, symmetric, not negative.
        Ck: likewise.

    Returns:
        A and B, ``(..., d, d)`` with A B^T = I, and s ``(..., d)``, falling. The largest entry of
        each column of A is positive.
    """
    identity_matrix = torch.eye(Cq.shape[-1], dtype=Cq.dtype, device=Cq.device)
    norm = torch.linalg.matrix_norm(Cq)[..., None, None]
    Cq = torch.where(norm > 0, Cq + RIDGE * norm * identity_matrix, identity_matrix)
    values, W = torch.linalg.eigh(Cq)
    root = values.clamp(min=RIDGE / 2 * norm[..., 0]).sqrt()[..., None, :]
    Rq, inverse = (W * root) @ W.mT, (W / root) @ W.mT
    values, W = torch.linalg.eigh(Ck)
    U, s, _ = torch.linalg.svd(Rq @ (W * values.clamp(min=0).sqrt()[..., None, :]))
    scale = s.clamp(min=_SMALLEST_SCALE * s[..., :1]).sqrt()
    scale = torch.where(scale > 0, scale, 1)[..., None, :]
    A = inverse @ U
    largest = A.gather(-2, A.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(A.dtype)
    return A * (scale * sign), Rq @ U / scale * sign, s
