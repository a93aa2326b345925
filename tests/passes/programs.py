"""Random programs around attention: views, in-place writes, casts, masks built and then written.

    python -m tests.passes.programs --count 2000 --compiler eager --seed 0

A :class:`Program` is the source of a function, so that a failure prints as code that runs. Every
line works on the same few names and keeps their shapes, so that a failing program shrinks by
leaving lines out. What must hold: where eager runs and PyTorch alone compiles it to the same, the
rewritten program runs and is within the bounds of ``distr_compile.verify``; with static and with
symbolic sizes.
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distr_compile
from distr_compile.comparing import bound_of, named_tensors, relative_error
from distr_compile.lowering.exactly import computing_exactly

BATCH, HEADS, WIDTH = 2, 4, 32
COMPILERS = ("eager", "inductor")

# --- what programs may call ---------------------------------------------------------------------


@torch.library.custom_op("distr_programs::rotate", mutates_args=("t",))
def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding, in place."""
    half = t.shape[-1] // 2
    t.copy_(t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin)


@torch.library.custom_op("distr_programs::show", mutates_args=("mask",))
def show(mask: Tensor, count: int) -> None:
    """Let every row of a boolean mask see the first ``count`` keys, in place."""
    mask[..., :count] = True


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / WIDTH**0.5).softmax(-1) @ v


WEIGHT = torch.ones(WIDTH, requires_grad=True)


def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        return plain(q * WEIGHT, k, v)


NAMES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "B": BATCH,
    "H": HEADS,
    "d": WIDTH,
    "inf": float("inf"),
    "plain": plain,
    "recorded": recorded,
    "checkpoint": checkpoint,
    "ops": torch.ops.distr_programs,
}
ARGUMENTS = ("x", "q", "k", "v", "bias", "keep", "keys", "cos", "sin", "turn", "warm")


def inputs(dtype: torch.dtype, rows: int, keys: int) -> list[Tensor]:
    """The arguments, in the order of ``ARGUMENTS``."""
    generator = torch.Generator().manual_seed(rows * 100 + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keep = normal(rows, keys) > -0.5
    keep[:, 0] = True
    angles = normal(rows, WIDTH)
    return [
        normal(BATCH, rows, 3 * HEADS * WIDTH).to(dtype),
        normal(BATCH, HEADS, rows, WIDTH).to(dtype),
        normal(BATCH, HEADS, keys, WIDTH).to(dtype),
        normal(BATCH, HEADS, keys, WIDTH).to(dtype),
        normal(rows, keys).to(dtype),
        keep,
        normal(keys).to(dtype),
        angles.cos(),
        angles.sin(),
        torch.polar(torch.ones(rows, WIDTH // 2), normal(rows, WIDTH // 2)),
        normal(HEADS, 1, 1).abs() + 0.5,
    ]


# --- lines, {t} being q, k or v -----------------------------------------------------------------

START = (
    "",
    "q, k, v = x.unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4)",
    "q, k, v = x.view(B, -1, 3, H, d).transpose(1, 3).unbind(2)",
    "q, k, v = (t.unflatten(-1, (H, d)).transpose(1, 2) for t in x.chunk(3, -1))",
    "q, k, v = (t.unflatten(-1, (H, d)).transpose(1, 2).contiguous() for t in x.chunk(3, -1))",
    "q, k, v = q.clone(), k.clone(), v.clone()",
    "q, k = q.contiguous(), k * d**-0.5",
    "k = v = k.clone()",
    "k, v = torch.stack([k, v])",
    "q, k = q * cos, k * cos",
    "q, k = q.float() * cos, k.float()",
    "q, k = (F.layer_norm(t.float(), (d,)) for t in (q, k))",
)
VIEWS = (
    "{t} = {t}.contiguous()",
    "{t} = {t} * 0.6",
    "{t} = {t}.clone()",
    "{t} = {t}.transpose(1, 2).contiguous().transpose(1, 2)",
    "{t} = {t}.flatten(0, 1).unflatten(0, (B, H))",
    "{t} = {t}.flip(1)",
    "{t} = {t}.roll(1, 2)",
    "{t} = torch.cat((-{t}[..., d // 2 :], {t}[..., : d // 2]), -1)",
    "{t} = torch.stack({t}.unbind(1), 1)",
    "{t} = {t}.detach()",
    "{t} = {t}.unsqueeze(0).squeeze(0)",
    "{t} = {t}[:, :1].expand(-1, H, -1, -1)",
    "{t} = {t}[:, ::2].repeat_interleave(2, 1)",
    "{t} = {t}[:, :2].repeat(1, 2, 1, 1)",
    "{t} = {t} * cos",
    "{t} = ({t} * cos).to({t}.dtype)",
    "{t} = {t}.float()",
    "{t} = {t}.to(x.dtype)",
    "{t} = ({t}.double() * 0.5).to({t}.dtype)",
    "{t} = F.layer_norm({t}.float(), (d,))",
)
WRITES = {
    "in place": (
        "{t}.mul_(0.7)",
        "{t}.neg_()",
        "{t} *= 0.7",
        "{t} += 0.3",
        "{t}.copy_({t} * cos)",
        "{t}.clamp_(-1.0, 1.0)",
        "x.mul_(0.8)",
    ),
    "through a view": (
        "{t}[:, 1:].mul_(0.5)",
        "{t}[..., ::2] = {t}[..., 1::2]",
        "{t}[:, :, :4] = 0.5",
        "{t}.transpose(1, 2).mul_(0.9)",
        "{t}.detach().mul_(0.6)",
        "{t}.unbind(1)[0].mul_(0.3)",
        "{t}.chunk(2, -1)[0].neg_()",
        "{t}.mT[..., 3].fill_(0.2)",
        "{t}.index_fill_(2, torch.tensor([1, 3]), 0.1)",
        "{t}.diagonal(dim1=-2, dim2=-1).add_(1.0)",
        "{t}.transpose_(1, 2).transpose_(1, 2)",
    ),
    "by a function": (
        "torch.mul({t}, 0.8, out={t})",
        "torch.add({t}, {t}, alpha=0.5, out={t})",
        "torch.neg({t}, out={t})",
        "torch.relu_({t})",
        "F.leaky_relu({t}, 0.1, inplace=True)",
        "torch.Tensor.mul_({t}, 0.5)",
        "torch.ops.aten.mul_.Scalar({t}, 0.5)",
        "torch.ops.aten.copy_.default({t}, {t} * 0.5)",
    ),
    "foreach": (
        "torch._foreach_mul_([q, k], 0.7)",
        "torch._foreach_mul_([{t}], [0.6])",
        "torch._foreach_copy_([{t}], [{t}.flip(1)])",
        "torch._foreach_neg_([{t}[:, 1:]])",
    ),
    "by a custom op": (
        "ops.rotate({t}, cos, sin)",
        "ops.rotate({t}[:, 1:], cos, sin)",
    ),
    "through another dtype": (
        "torch.view_as_complex({t}.unflatten(-1, (-1, 2))).mul_(turn)",
        "torch.view_as_real(torch.view_as_complex({t}.unflatten(-1, (-1, 2)))).mul_(0.5)",
        "{t}.view(torch.int32).bitwise_and_(-1024)",
    ),
    "through an alias": (
        "alias = {t}.view(B, H, -1)",
        "alias = {t}[:, :2]",
        "alias = {t}.transpose(1, 2)",
        "alias.mul_(0.5)",
        "alias[:, 0] = 0.1",
    ),
}
MASKS = (
    "mask = torch.ones(n, m, dtype=torch.bool).tril()",
    "mask = torch.tril(torch.ones(n, m)).bool()",
    "mask = torch.ones(n, m, dtype=torch.bool).triu(1).logical_not()",
    "mask = torch.full((n, m), True).tril(diagonal=0)",
    "mask = torch.ones((n, m), dtype=torch.uint8).tril_() == 1",
    "mask = torch.arange(m) <= torch.arange(n)[:, None]",
    "mask = torch.arange(n).unsqueeze(1) >= torch.arange(end=m)",
    "mask = torch.arange(2, end=n + 2)[:, None] >= torch.arange(m)",
    "mask = torch.arange(start=1, end=n + 1)[:, None] > torch.arange(m)",
    "mask = torch.arange(0, 2 * n, 2)[:, None] >= torch.arange(m)",
    "mask = torch.arange(0, 2 * n, step=2)[:, None] >= torch.arange(m) * 2",
    "mask = torch.arange(n).flip(0)[:, None] >= torch.arange(m)",
    "mask = torch.ones(m, n, dtype=torch.bool).triu().T",
    "mask = torch.ones(n, m).bool().tril() & torch.ones(n, m).bool().triu(-9)",
    "mask = torch.ones(n, m, dtype=torch.bool).tril() | keep",
    "mask = torch.arange(m) < m - 3",
    "mask = (torch.arange(m) // 4)[None] <= (torch.arange(n) // 4)[:, None]",
    "mask = torch.zeros(n, m).masked_fill_(keep, 1.0).bool()",
    "mask = keep.clone()",
    "mask = torch.ones(n, m, dtype=torch.bool).expand(B, 1, n, m).tril()",
)
MASK_WRITES = (
    "mask[:, :8] = True",
    "mask[..., 0] = True",
    "mask[..., 3] = False",
    "mask.fill_(True)",
    "mask |= keep",
    "mask.logical_or_(keep)",
    "mask.T[:3] = True",
    "mask.view(-1)[::7] = True",
    "mask.diagonal()[:] = True",
    "mask.masked_fill_(keep, True)",
    "mask.unsqueeze(0)[0, :, 1] = True",
    "mask.index_fill_(-1, torch.tensor([2]), True)",
    "torch.logical_or(mask, keep, out=mask)",
    "torch._foreach_copy_([mask], [keep])",
    "torch.ops.aten.fill_.Scalar(mask[..., :5], True)",
    "ops.show(mask, 8)",
    "part = mask[..., :6]",
    "part.fill_(True)",
    "mask = mask.clone()",
    "mask = ~mask.logical_not()",
)
BIASES = (
    "add = torch.zeros(n, m, dtype=q.dtype).masked_fill(~mask, -inf)",
    "add = torch.full((n, m), -inf, dtype=q.dtype).triu(1)",
    "add = torch.full((n, m), torch.finfo(q.dtype).min, dtype=q.dtype).triu_(1)",
    "add = torch.where(mask, 0.0, -inf).to(q.dtype)",
    "add = bias.clone()",
    "add = bias * 1.0",
    "add = keys.expand(n, m).clone()",
)
BIAS_WRITES = (
    "add[:, :8] = 0.0",
    "add += bias",
    "add.mul_(0.5)",
    "add.masked_fill_(keep, 0.0)",
    "add.view(-1)[::5] = 0.0",
    "torch.add(add, bias, out=add)",
    "torch._foreach_add_([add], 0.3)",
    "add.T[:3].fill_(0.0)",
    "add = add[None, None]",
    "add = add.float()",
)
PRODUCTS = (
    "scores = q @ k.mT / d**0.5",
    "scores = torch.matmul(q, k.transpose(-2, -1)) * d**-0.5",
    "scores = torch.einsum('bhid,bhjd->bhij', q, k) / d**0.5",
    "scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, n, m) * 0.2",
    "scores = (q * d**-0.5) @ k.mT",
)
SCORES = (
    "scores = scores * 0.7",
    "scores.mul_(0.7)",
    "scores = scores + bias",
    "scores += bias",
    "scores.add_(keys)",
    "scores = scores + keys",
    "scores = scores + 0.5",
    "scores = scores + bias.float()",
    "scores = scores + add",
    "scores = scores + add.to(scores.dtype)",
    "torch.add(scores, add, out=scores)",
    "scores = scores.masked_fill(~mask, -inf)",
    "scores.masked_fill_(~mask, -inf)",
    "scores = scores.masked_fill(~mask, -1e4)",
    "scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)",
    "scores = torch.where(mask, scores, -inf)",
    "scores = scores.masked_fill(torch.arange(m) > m - 4, -inf)",
    "scores = scores.float()",
    "scores = scores * warm",
    "scores = scores * warm.to(scores.dtype)",
    "scores = scores - scores.amax(-1, keepdim=True)",
    "scores = 5.0 * torch.tanh(scores / 5.0)",
    "scores[..., 0] = 0.0",
    "scores.view(-1).mul_(0.9)",
    "scores[:, 1].mul_(0.5)",
    "torch._foreach_mul_([scores], 0.5)",
    "other = scores.view(B * H, n, m)",
    "other.mul_(0.5)",
    "q.mul_(0.5)",
    "k.zero_()",
    "bias.mul_(2.0)",
    "mask.fill_(True)",
)
SOFTMAX = (
    "weights = scores.softmax(-1)",
    "weights = F.softmax(scores, dim=-1)",
    "weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)",
    "weights = scores.float().softmax(-1).type_as(v)",
    "weights = scores.softmax(-1).to(v.dtype)",
    "weights = scores.softmax(1)",
)
WEIGHTS = (
    "weights = weights.to(v.dtype)",
    "weights = F.dropout(weights, 0.3, False)",
    "weights.mul_(0.5)",
    "weights[..., 0] = 0.0",
    "weights = weights.masked_fill(~keep, 0.0)",
    "weights.masked_fill_(~keep, 0.0)",
    "v.mul_(0.5)",
    "v[:, :, :3] = 0.0",
    "v = v.flip(1)",
    "scores.zero_()",
    "scores += 1.0",
    "torch.mul(weights, 0.5, out=weights)",
)
FUSED = (
    "out = F.scaled_dot_product_attention(q, k, v)",
    "out = F.scaled_dot_product_attention(q, k, v, mask)",
    "out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])",
    "out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)",
    "out = F.scaled_dot_product_attention(q, k, v, attn_mask=add)",
    "out = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
    "out = F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)",
    "out = plain(q, k, v)",
    "out = torch.vmap(plain)(q, k, v)",
    "out = recorded(q, k, v)",
    "out = checkpoint(plain, q, k, v, use_reentrant=False)",
)
OUTPUTS = (
    "out = out * 0.5",
    "out.mul_(0.5)",
    "out = out.float()",
    "out = out.to(torch.float32).to(x.dtype)",
    "out = out.view(B * H, n, d).view(B, H, n, d)",
    "out = out.view(B, -1).view(B, H, n, d)",
    "out = out.double().view(B * H, n, d).view(B, H, n, d)",
    "out = (out * 0.5).view(B * H, n, d).view(B, H, n, d)",
    "out = out.transpose(1, 2).flatten(2).unflatten(-1, (H, d)).transpose(1, 2)",
    "out = out.transpose(1, 2).reshape(B, n, H * d).view(B, n, H, d).transpose(1, 2)",
    "out = out.relu()",
    "out[:, :, 0] = 0.0",
    "out.transpose(1, 2)[:, 3].fill_(0.5)",
    "torch.add(out, 1.0, out=out)",
    "torch._foreach_mul_([out], 0.5)",
    "out = out.contiguous()",
    "out = out.clone()",
    "q.zero_()",
    "v.mul_(3.0)",
    "weights.zero_()",
    "part = out[:, 1:]",
    "part.mul_(0.4)",
)
SECOND = ("q = out", "q = out.to(k.dtype)", "q = q + out", "q.copy_(out)")
ENDS = (
    *("return out",) * 8,
    "return out, q",
    "return out, k, v",
    "return out, mask",
    "return out.square().sum(-1), out",
    "return out * 0.0",
)


# --- a program ----------------------------------------------------------------------------------

Choose = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Program:
    """The lines of a function of ``ARGUMENTS`` and how it is compiled; prints as code."""

    lines: tuple[str, ...]
    dtype: str = "float32"
    rows: int = 20
    keys: int = 20
    group_size: int = 2

    def __str__(self) -> str:
        head = f"def program({', '.join(ARGUMENTS)}):"
        told = f"# {self.dtype}, {self.rows} rows, {self.keys} keys, group_size {self.group_size}"
        return "\n    ".join((head, told, *self.lines))

    __repr__ = __str__

    def function(self) -> Callable[..., Any]:
        """A fresh function, which Dynamo has not seen."""
        names = dict(NAMES)
        exec(compile(str(self), "<program>", "exec"), names)
        function: Callable[..., Any] = names["program"]
        return function

    def inputs(self) -> list[Tensor]:
        """Its arguments."""
        return inputs(getattr(torch, self.dtype), self.rows, self.keys)

    @property
    def policy(self) -> dict[str, Any]:
        """Approximates, or leaves exact, every attention."""
        return {"default": {"group_size": self.group_size, "min_seq_len": 0}}

    def runs(self) -> bool:
        """Whether eager can run it at all."""
        try:
            with torch.no_grad():
                self.function()(*self.inputs())
        except Exception:  # shapes, strides or dtypes that do not fit: no program
            return False
        return True


def written(choose: Choose) -> Program:
    """A program, drawn line by line."""

    def some(lines: Sequence[str], *counts: int) -> list[str]:
        return [choose(lines) for _ in range(choose(counts))]

    def operands(*counts: int) -> list[str]:
        kinds = [choose((VIEWS, *WRITES.values())) for _ in range(choose(counts))]
        return [choose(kind).format(t=choose(("q", "q", "k", "k", "v"))) for kind in kinds]

    def attention() -> list[str]:
        if choose((True, False, False)):
            return [choose(FUSED)]
        return [
            choose(PRODUCTS),
            *some([line for line in SCORES if "(~mask" in line or "(mask" in line], 0, 1),
            *some(SCORES, 0, 0, 1, 2),
            choose(SOFTMAX),
            *some(WEIGHTS, 0, 0, 0, 1, 2),
            "out = weights @ v",
        ]

    lines = [choose(START), "n, m = q.shape[-2], k.shape[-2]", *operands(0, 0, 1, 2)]
    lines += [choose(MASKS), *some(MASK_WRITES, 0, 1, 1, 2)]
    lines += [choose(BIASES), *some(BIAS_WRITES, 0, 0, 1)] if choose((True, False)) else []
    lines += [choose((*("",) * 9, "q = q[:, :, :1]"))]
    lines += [*operands(0, 0, 1), *attention(), *some(OUTPUTS, 0, 0, 1, 2)]
    if choose((True, False, False)):
        lines += [choose(SECOND), *operands(0, 1), *attention(), *some(OUTPUTS, 0, 1)]
    rows = choose((20, 20, 17, 24))
    return Program(
        tuple(line for line in (*lines, choose(ENDS)) if line),
        dtype=choose(("float32", "float32", "float32", "bfloat16", "float16")),
        rows=rows,
        keys=choose((rows, rows, rows, 33)),
        group_size=choose((2, 2, 1)),
    )


# --- what must hold -----------------------------------------------------------------------------


def failure(program: Program, compiler: str, dynamic: bool) -> str:
    """What is wrong with the rewritten program, in a line; empty if nothing is.

    Empty too where PyTorch alone does no better: then nobody is owed a result.
    """
    found, excuse = judged(program, compiler, dynamic)
    return "" if excuse else found


def judged(program: Program, compiler: str, dynamic: bool) -> tuple[str, str]:
    """What is wrong with the rewritten program, and what PyTorch alone does wrong with it, too."""
    warnings.filterwarnings("ignore")
    check = _verified if compiler == "eager" else _compiled
    try:
        with torch.no_grad():
            found, raises = check(program, dynamic), False
    except Exception as error:
        cause = getattr(error, "inner_exception", None) or error
        text = (str(cause).strip() or "no message").splitlines()[0]
        found, raises = f"raises {type(cause).__name__}: {text[:120]}", True
    finally:
        torch._dynamo.reset()
    return found, _excuse(program, compiler, dynamic, raises) if found else ""


def _symbolic(dynamic: bool) -> Any:
    return torch._dynamo.config.patch(assume_static_by_default=not dynamic)


def _verified(program: Program, dynamic: bool) -> str:
    with _symbolic(dynamic):
        found = distr_compile.verify(program.function(), *program.inputs(), policy=program.policy)
    told = [(f"attention {row.site}, {row.decision}", row) for row in found.rows]
    told += [(out.name, out) for out in found.outputs]
    return "; ".join(
        f"{name}: error {check.error:.1e} {check.why}".strip()
        for name, check in told
        if check.status == "wrong"
    )


def _compiled(program: Program, dynamic: bool) -> str:
    options = {"policy": program.policy, "compiler": "inductor"}
    compiled = torch.compile(
        program.function(), backend="distr", dynamic=dynamic or None, options=options
    )
    with computing_exactly():
        return _differs(program, compiled)


def _differs(program: Program, compiled: Callable[..., Any]) -> str:
    """How far the compiled program's outputs are from eager's, where that is beyond the bound."""
    expected, got = program.function()(*program.inputs()), compiled(*program.inputs())
    bound = bound_of({getattr(torch, program.dtype), torch.float32})
    errors = [
        relative_error(a, b.masked_fill(a.isnan(), torch.nan) if a.shape == b.shape else b)
        for (_, a), (_, b) in zip(named_tensors(expected), named_tensors(got), strict=True)
    ]
    return "" if max(errors, default=0.0) <= bound else f"outputs: error {max(errors):.1e}"


def _excuse(program: Program, compiler: str, dynamic: bool, raises: bool) -> str:
    """What PyTorch alone does wrong with the program, of the same kind: it raises, or it errs.

    Inductor's attention patterns are off: that they go wrong is no excuse, the backend reports such
    attention as exact. What is left are faults that have nothing to do with attention, such as
    ``q.copy_(q.flip(1))`` on a view of an input, which torch 2.14 reads while it writes.
    """
    torch._dynamo.reset()
    try:
        with (
            _symbolic(dynamic),
            torch.no_grad(),
            torch._inductor.config.patch(pattern_matcher=False),
        ):
            compiled = torch.compile(program.function(), backend=compiler, dynamic=dynamic or None)
            found = _differs(program, compiled)
    except Exception as error:
        return f"raises {type(error).__name__}"
    finally:
        torch._dynamo.reset()
    return "" if raises else found


def shrunk(program: Program, compiler: str, dynamic: bool) -> Program:
    """The program with every line left out that its failure does not need."""
    is_crash = failure(program, compiler, dynamic).startswith("raises")

    def fails(other: Program) -> bool:
        found = other.runs() and failure(other, compiler, dynamic)
        return bool(found) and found.startswith("raises") == is_crash

    before = None
    while program != before:
        before, i = program, 0
        while i < len(program.lines) - 1:
            without = replace(program, lines=(*program.lines[:i], *program.lines[i + 1 :]))
            program, i = (without, i) if fails(without) else (program, i + 1)
    simpler = replace(program, dtype="float32")
    return simpler if fails(simpler) else program


def drawn(seed: int) -> Program:
    """The program of a seed that eager can run."""
    numbers = random.Random(seed)
    while True:
        program = written(numbers.choice)
        if program.runs():
            return program


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, metavar="N")
    parser.add_argument("--compiler", choices=COMPILERS, default="eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-shrink", action="store_true", help="print failures as drawn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the failures there")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    counts: collections.Counter[str] = collections.Counter()
    progress = tqdm(range(options.count), unit="program", smoothing=0)
    for index in progress:
        seed = options.seed * 10**6 + index
        program = drawn(seed)
        for dynamic in (False, True):
            found, excuse = judged(program, options.compiler, dynamic)
            if found and excuse:
                counts["PyTorch alone fails, too"] += 1
                progress.write(f"seed {seed}: {found}; PyTorch alone: {excuse}\n{program}\n")
                continue
            counts["failed" if found else "held"] += 1
            if not found:
                continue
            kind = re.sub(r"\d.*", "", found)[:60]
            counts[kind] += 1
            small = program
            if not options.no_shrink and not (counts[kind] > 3 and kind.startswith("raises")):
                small = shrunk(program, options.compiler, dynamic)
                found = failure(small, options.compiler, dynamic) or found
            text = f"seed {seed}, {'dynamic' if dynamic else 'static'}: {found}\n{small}\n"
            progress.write(text)
            if options.out:
                with options.out.open("a") as file:
                    file.write(text + "\n")
            break
        progress.set_postfix(failed=counts["failed"])
    progress.close()
    for text, count in counts.most_common():
        print(f"{count:6d}  {text}")


if __name__ == "__main__":
    main()
