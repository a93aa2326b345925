"""Cycles of one program of a kernel of ``projection``, counted in its machine code.

    python -m benchmarks.kernel_cycles [--kernel _solve_kernel] [--shapes 128/64 64/32]
        [--l1] [--functions] [--json FILE]

Nothing is run. The kernel is compiled for sm_90, and its code is walked as the warps of one
scheduler would: in order, with the stall counts and barriers that the assembler wrote into each
instruction, latencies and rates of the tables below for what has none, and loops unrolled by
following the integers that are known. The four schedulers of a multiprocessor do the same at the
same time, and what they share is shared. Not in it: conflicts of banks, misses of the instruction
cache, misses of L2.

Latencies and rates are published measurements of Hopper, or plain guesses where there is none, so
the sum may be a quarter off; what is compared are two versions of a kernel.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compile_only import compiling
from benchmarks.store import commit, version

ARCHITECTURE = "sm_90"
SCHEDULERS = 4
TRACE_LIMIT = 3_000_000

L2_CYCLES = 270
L1_CYCLES = 40

LATENCY = {
    "LDS": 30, "LDSM": 33, "LDL": L1_CYCLES, "STL": 20, "STS": 20, "STG": 20,
    "SHFL": 24, "MUFU": 24, "S2R": 30, "S2UR": 30, "LDC": 40, "R2UR": 12, "REDUX": 24,
    "HMMA": 33, "I2F": 20, "I2FP": 12, "F2F": 20, "MEMBAR": 30, "FENCE": 20, "POPC": 12,
}  # fmt: skip
"""From issue until a barrier of the instruction is released; others 20."""

SHARED_PIPES = {"LDS", "STS", "LDSM", "LDG", "STG", "LDL", "STL", "LDGSTS", "SHFL", "ATOM", "RED"}
"""The four schedulers take turns: 32 lanes of four bytes a cycle."""

SLOW = {"MUFU": 8, "F2F": 8, "I2F": 8, "POPC": 8}
"""Cycles in which a scheduler starts one of these."""

FULL_RATE = {"FFMA", "FADD", "FMUL", "HADD2", "HFMA2", "HMUL2", "MOV", "CS2R", "UMOV", "NOP", "BRA"}
"""One a cycle; of all others one in two cycles."""

READ_CYCLES = 15
"""Until an instruction of a shared pipe has read its registers."""

REGISTERS, SHARED_BYTES = 65536, 228 * 1024
"""Of a multiprocessor."""

BARRIER_CYCLES = 20
WGMMA_CYCLES = 20
"""Beyond the time in the tensor core, until its sums can be read."""


@dataclass(frozen=True)
class Instruction:
    """One of the code.

    Attributes:
        opcode: without modifiers.
        text: all of it.
        guard: predicate such as "!P0", or empty.
        operands: text of each.
        stall: cycles until the next one may start.
        sets: barrier that is released when the result is there, if any.
        read: barrier that is released when the sources were read, if any.
        waits: barriers to wait for.
        where: functions of the source, the innermost first.
    """

    opcode: str
    text: str
    guard: str
    operands: tuple[str, ...]
    stall: int
    sets: tuple[int, ...]
    read: tuple[int, ...]
    waits: tuple[int, ...]
    where: tuple[str, ...]


def disassembled(cubin: bytes) -> str:
    """The code with its encoding and the lines of the source."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-gi", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Lines:
    """Which function a line of a file belongs to."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, int, str]]] = {}

    def __call__(self, path: str, line: int) -> str:
        if path not in self.found:
            # What another tree has compiled comes out of Triton's cache with that tree's paths.
            text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
            tree = ast.parse(text)
            self.found[path] = [
                (node.lineno, node.end_lineno or node.lineno, node.name)
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
            ]
        return next((n for a, b, n in reversed(self.found[path]) if a <= line <= b), "?")


_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\.L\w+):")


def read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and the place of each label."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    function_at, where, fresh = _Lines(), (), True
    pending: tuple[str, ...] | None = None
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif at := _LINE.search(line):
            function = function_at(at[1], int(at[2]))
            where = (*(() if fresh else where), function)
            fresh = False
        elif found := _INSTRUCTION.search(line):
            pending = (found[2] or "", found[3], found[4].strip())
            fresh = True
        elif pending is not None and (second := _SECOND.match(line)):
            control = int(second[1], 16) >> 41
            guard, opcode, operands = pending
            sets, read = ((b,) if b != 7 else () for b in (control >> 5 & 7, control >> 8 & 7))
            mask = (control >> 11) & 63
            code.append(
                Instruction(
                    opcode.partition(".")[0],
                    f"{opcode} {operands}",
                    guard,
                    tuple(o.strip() for o in operands.split(",")),
                    control & 15,
                    sets,
                    read,
                    tuple(i for i in range(6) if mask >> i & 1),
                    where,
                )
            )
            pending = None
    return code, labels


# --- which instructions are executed -------------------------------------------------------------


class _Integers:
    """Registers and predicates whose values follow from constants alone; None is unknown."""

    def __init__(self) -> None:
        self.value: dict[str, int | None] = {}
        self.bits: dict[str, tuple[int, int]] = {}  # where some are known: they, and which

    def _bits_of(self, operand: str) -> tuple[int, int]:
        whole = self.of(operand)
        if whole is not None:
            return whole % 2**32, 2**32 - 1
        return self.bits.get(operand.replace(".reuse", ""), (0, 0))

    def _bitwise(self, i: Instruction) -> None:
        """A function of each bit of three numbers; a predicate says whether the result is not 0."""
        operands = list(i.operands)
        predicate = operands.pop(0) if re.match(r"U?P", operands[0]) else ""
        target, table = operands[0], int(operands[4], 16)
        given = [self._bits_of(o) for o in operands[1:4]]
        value = known = 0
        for bit in range(32):
            inputs = [(v >> bit & 1,) if mask >> bit & 1 else (0, 1) for v, mask in given]
            possible = {
                table >> (4 * a + 2 * b + c) & 1
                for a in inputs[0] for b in inputs[1] for c in inputs[2]
            }  # fmt: skip
            if len(possible) == 1:
                value, known = value | possible.pop() << bit, known | 1 << bit
        if predicate:
            self.value[predicate] = 1 if value else 0 if known == 2**32 - 1 else None
        if target not in ("RZ", "URZ"):
            self._set_bits(target, value, known)

    def _set_bits(self, target: str, value: int, known: int) -> None:
        self.value[target] = _signed(value) if known == 2**32 - 1 else None
        self.bits[target] = value & known, known

    def _stack(self, i: Instruction, kind: str) -> None:
        """Registers that are put away, and taken back."""
        register, place = i.operands[::-1] if i.opcode == "STL" else i.operands
        at = int((re.findall(r"0x[0-9a-f]+", place) or ["0"])[0], 16)
        name, number = re.match(r"(U?R)(\d+|Z)", register).groups()  # type: ignore[union-attr]
        for k in range(4 if ".128" in kind else 2 if ".64" in kind else 1):
            here = "RZ" if number == "Z" else f"{name}{int(number) + k}"
            if i.opcode == "STL":
                self.bits[f"[{at + 4 * k}]"] = self._bits_of(here)
            else:
                self._set_bits(here, *self.bits.get(f"[{at + 4 * k}]", (0, 0)))

    def maybe(self, i: Instruction) -> None:
        """An instruction whose guard is not known: what is the same either way stays known."""
        names = [o for o in i.operands[:2] if re.match(r"U?[RP]\d", o)]
        before = {n: self._bits_of(n) for n in names}
        flags = {n: self.value.get(n) for n in names}
        self.run(i)
        for n in names:
            if "P" in n:
                self.value[n] = flags[n] if flags[n] == self.value.get(n) else None
            else:
                (a, known_a), (b, known_b) = before[n], self._bits_of(n)
                self._set_bits(n, a, known_a & known_b & ~(a ^ b))

    def of(self, operand: str) -> int | None:
        operand = operand.replace(".reuse", "")
        negative = operand.startswith("-")
        name = operand.lstrip("-")
        if name in ("RZ", "URZ"):
            return 0
        if name in ("PT", "UPT"):
            return 1
        if name in ("!PT", "!UPT"):
            return 0
        if name.startswith("!"):
            known = self.value.get(name[1:])
            return None if known is None else 1 - known
        if re.fullmatch(r"0x[0-9a-f]+", name):
            found: int | None = int(name, 16)
        else:
            found = self.value.get(name)
        return None if found is None else (-found if negative else found)

    def run(self, i: Instruction) -> None:
        """Keep up with one instruction that is executed."""
        given = [self.of(o) for o in i.operands]
        result: int | None = None
        kind = i.text.partition(" ")[0]
        if i.opcode in ("ISETP", "UISETP"):
            self._compare(i, kind, given)
            return
        if i.opcode in ("PLOP3", "UPLOP3"):
            self._logic(i, given)
            return
        if i.opcode in ("LOP3", "ULOP3"):
            self._bitwise(i)
            return
        if i.opcode in ("STL", "LDL"):
            self._stack(i, kind)
            return
        if not i.operands or not re.match(r"U?R\d", i.operands[0]):
            if i.operands and re.match(r"U?P\d", i.operands[0]):
                self.value[i.operands[0]] = None
            return
        sources = given[1:]
        if i.opcode in ("MOV", "UMOV", "R2UR"):
            result = sources[-1] if i.opcode != "R2UR" else sources[0]
        elif kind.startswith("IMAD.MOV"):
            result = sources[2]
        elif i.opcode in ("IADD3", "UIADD3", "VIADD"):
            result = self._add(i, sources)
        elif kind == "IMAD.X":
            result = _sum_of(_product(sources), sources[3])
        elif kind in ("IMAD.IADD", "IMAD", "IMAD.SHL.U32", "UIMAD"):
            result = _product(sources)
        elif i.opcode in ("SEL", "USEL") and len(sources) == 3 and sources[2] is not None:
            result = sources[0] if sources[2] else sources[1]
        wide = ".64" in kind or ".WIDE" in kind or kind == "CS2R"
        width = 4 if ".128" in kind else 2 if wide else 1
        name, number = re.match(r"(U?R)(\d+)", i.operands[0]).groups()  # type: ignore[union-attr]
        for k in range(width):
            self.value[f"{name}{int(number) + k}"] = 0 if kind == "CS2R" else None
            self.bits.pop(f"{name}{int(number) + k}", None)
        if result is not None:
            self.value[i.operands[0]] = _signed(result)

    def _add(self, i: Instruction, sources: list[int | None]) -> int | None:
        """A sum, its carry kept in the predicates that are written; those at the end come in."""
        texts = list(i.operands[1:])
        carries = []
        while texts and re.fullmatch(r"!?U?PT?\d*", texts[0]):
            carries.append(texts.pop(0))
        given = sources[len(carries) :]
        numbers = [v for o, v in zip(texts, given, strict=True) if not re.match(r"!?U?P", o)]
        incoming = [v for o, v in zip(texts, given, strict=True) if re.match(r"!?U?P", o)]
        if carries:
            total = _sum_of(*(None if v is None else v % 2**32 for v in numbers))
            self.value[carries[0]] = None if total is None else total >> 32
        return _sum_of(*numbers, *incoming)

    def _compare(self, i: Instruction, kind: str, given: list[int | None]) -> None:
        parts = kind.split(".")
        left, right, last = given[2:5]
        found: int | None = None
        if left is not None and right is not None:
            change = (lambda v: v % 2**32) if "U32" in parts else _signed
            left, right = change(left), change(right)
            compare = {
                "LT": left < right, "LE": left <= right, "GT": left > right,
                "GE": left >= right, "EQ": left == right, "NE": left != right,
            }  # fmt: skip
            name = next(p for p in parts if p in compare)
            found = int(compare[name])
            if "EX" in parts and left == right:  # the lower halves decide
                found = given[5]
        if found is None or last is None:
            known = 0 if 0 in (found, last) and "AND" in parts else None
            self.value[i.operands[0]] = known
        else:
            self.value[i.operands[0]] = found | last if "OR" in parts else found & last

    def _logic(self, i: Instruction, given: list[int | None]) -> None:
        table, inputs = given[-2], given[2:-2]
        if i.opcode == "UPLOP3":
            inputs = given[2:-2]
        found: int | None = None
        if table is not None and len(inputs) >= 3:
            possible = {
                table >> (4 * a + 2 * b + c) & 1
                for a in _either(inputs[0]) for b in _either(inputs[1]) for c in _either(inputs[2])
            }  # fmt: skip
            found = possible.pop() if len(possible) == 1 else None
        self.value[i.operands[0]] = found


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _sum_of(*values: int | None) -> int | None:
    return None if None in values else sum(v for v in values if v is not None)


def _product(sources: list[int | None]) -> int | None:
    a, b, c = sources[:3]
    return None if a is None or b is None or c is None else a * b + c


def _either(bit: int | None) -> tuple[int, ...]:
    return (0, 1) if bit is None else (bit,)


def executed(code: list[Instruction], labels: dict[str, int]) -> Iterator[Instruction]:
    """The instructions one after another; a branch that depends on data falls through.

    Raises:
        RuntimeError: a loop's end depends on what is not known, or no end is in sight.
    """
    known, place = _Integers(), 0
    for _ in range(TRACE_LIMIT):
        i = code[place]
        guard = known.of(i.guard) if i.guard else 1
        yield i
        place += 1
        if i.opcode == "EXIT" and guard != 0:
            return
        if i.opcode == "BRA":
            target = labels[re.findall(r"\.L\w+", i.text)[0]]
            takes = guard
            first = i.operands[0]
            if re.fullmatch(r"!?U?P\w+", first):
                also = known.of(first)
                takes = None if takes is None or also is None else takes & also
            if takes is None and target < place:
                raise RuntimeError(f"the end of a loop is not known: {i.guard} {i.text} {i.where}")
            if takes:
                place = target
            continue
        if guard == 0:
            continue
        if guard is None:
            known.maybe(i)
        else:
            known.run(i)
    raise RuntimeError(f"no end after {TRACE_LIMIT} instructions")


# --- how long they take --------------------------------------------------------------------------


def _rate(i: Instruction) -> tuple[str, int]:
    """Which pipe an instruction takes and for how many cycles."""
    kind = i.text.partition(" ")[0]
    if i.opcode in SHARED_PIPES and i.guard not in ("", "PT") and i.opcode != "LDGSTS":
        return "memory", SCHEDULERS
    if i.opcode in SHARED_PIPES:
        width = 4 if ".128" in kind or ".4" in kind else 2 if ".64" in kind or ".2" in kind else 1
        return "memory", SCHEDULERS * (1 if i.opcode == "SHFL" else width)
    if i.opcode == "HGMMA":
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", kind).groups())  # type: ignore[union-attr]
        return "tensor", m * n * k // (1024 if ".TF32" in kind else 2048)
    if i.opcode == "HMMA":
        shape = re.search(r"\.(1688|16816|1684)", kind)
        cycles = {"1684": 4, "1688": 8, "16816": 16}[shape[1] if shape else "16816"]
        return "tensor", cycles if ".TF32" in kind else cycles // 2
    if i.opcode in SLOW:
        return "slow", SLOW[i.opcode]
    if i.opcode.startswith("U") or i.opcode in ("WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR"):
        return "uniform", 1
    return ("float", 1) if i.opcode in FULL_RATE else ("integer", 2)


class Warp:
    """Where one warp is: the next instruction, and when what was started will be done."""

    def __init__(self, program: int) -> None:
        self.program = program
        self.place = 0
        self.free = 0
        self.barriers = [0] * 6
        self.copies: list[int] = []
        self.matrices = 0
        self.arrived = -1

    def ready(self, i: Instruction) -> int:
        """When it can start its next instruction, by what it has to wait for."""
        ready = max([self.free, *(self.barriers[b] for b in i.waits)])
        if i.opcode == "DEPBAR" and self.copies:
            left = int(re.findall(r"0x[0-9a-f]+", i.text)[-1], 16)
            ready = max([ready, *self.copies[: max(0, len(self.copies) - left)]])
        if i.opcode == "WARPGROUP" and "DEPBAR" in i.text:
            ready = max(ready, self.matrices)
        return ready

    def start(self, i: Instruction, now: int, cycles: int, load_cycles: int) -> None:
        """Start it, and note when its results will be there."""
        latency = load_cycles if i.opcode in ("LDG", "LDGSTS") else LATENCY.get(i.opcode, 20)
        for barriers, wait in ((i.sets, latency), (i.read, READ_CYCLES)):
            for b in barriers:
                self.barriers[b] = max(self.barriers[b], now + cycles + wait)
        if i.opcode == "LDGSTS":
            self.copies.append(now + latency)
        if i.opcode == "HGMMA":
            self.matrices = now + cycles + WGMMA_CYCLES
        self.free = now + max(1, i.stall)
        self.place += 1


def simulate(
    trace: list[Instruction], warps: int, load_cycles: int, programs: int = 1
) -> tuple[int, Counter[str]]:
    """Cycles until all programs are done, and those of each function in the first one's first warp.

    Args:
        trace: of a warp; all do the same.
        warps: of a program on one scheduler.
        load_cycles: latency of a load from memory.
        programs: that share the multiprocessor.
    """
    running = [Warp(p) for p in range(programs) for _ in range(warps)]
    pipes: Counter[str] = Counter()
    by_function: Counter[str] = Counter()
    issue, before = 0, 0
    while waiting := [w for w in running if w.place < len(trace) and w.arrived < 0]:
        starts = []
        for w in waiting:
            i = trace[w.place]
            starts.append(max(w.ready(i), issue, pipes[_rate(i)[0]]))
        first = min(range(len(waiting)), key=lambda n: (starts[n], waiting[n].place))
        w, now = waiting[first], starts[first]
        i = trace[w.place]
        pipe, cycles = _rate(i)
        issue, pipes[pipe] = now + 1, now + cycles
        w.start(i, now, cycles, load_cycles)
        if w is running[0]:
            by_function[_named(i.where)] += now - before
            before = now
        if i.opcode == "BAR":
            w.arrived = w.free
            together = [x for x in running if x.program == w.program]
            if all(x.arrived >= 0 for x in together):
                last = max(x.arrived for x in together) + BARRIER_CYCLES
                for x in together:
                    x.free, x.arrived = last, -1
    return max(w.free for w in running), by_function


def _named(where: tuple[str, ...]) -> str:
    ours = [name for name in where if name.startswith("_") and name != "_solve_kernel"]
    return ours[0] if ours else (where[-1] if where else "?")


def compiled(kernel: str, head_dim: int, rank: int, dtype: str = "float16") -> Any:
    """What a call of ``projection`` compiles of a kernel of this name."""
    import torch

    from distr_compile.kernels.projection.launch import projection_factors

    Q = torch.empty(2, 8, 4096, head_dim, dtype=getattr(torch, dtype), device="meta")
    found: list[Any] = []
    with compiling(ARCHITECTURE, found.append, lambda k, arguments: k.__name__ == kernel):
        projection_factors(Q, torch.empty_like(Q), rank=rank, grouping_block=1024, seed=0)
    (one,) = found
    return one


def fitting(code: list[Instruction], threads: int, shared_bytes: int) -> int:
    """Programs that a multiprocessor has registers and shared memory for."""
    named = (int(n) for i in code for n in re.findall(r"\bR(\d+)", i.text))
    registers = -(-(max(named) + 2) // 8) * 8  # a pair may begin at the last one
    by_memory = SHARED_BYTES // max(1024, shared_bytes + 1024)
    return max(1, min(REGISTERS // (min(registers, 256) * threads), by_memory))


def count(kernel: Any, load_cycles: int) -> dict[str, Any]:
    """Cycles of a program alone on a multiprocessor, and of each where as many as fit share it."""
    code, labels = read(disassembled(kernel.asm["cubin"]))
    trace = list(executed(code, labels))
    warps = max(1, kernel.metadata.num_warps // SCHEDULERS)
    programs = fitting(code, 32 * kernel.metadata.num_warps, kernel.metadata.shared)
    alone, functions = simulate(trace, warps, load_cycles)
    shared = alone if programs == 1 else simulate(trace, warps, load_cycles, programs)[0]
    return {
        "alone": alone,
        "programs": programs,
        "each": shared // programs,
        "instructions of a warp": len(trace),
        "functions": dict(functions.most_common()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", default="_solve_kernel")
    parser.add_argument("--shapes", nargs="+", default=["128/64", "64/32"], help="d/r")
    parser.add_argument("--l1", action="store_true", help="loads hit the first cache, not L2")
    parser.add_argument("--functions", action="store_true", help="also print cycles by function")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    counted = {}
    for shape in options.shapes:
        head_dim, rank = map(int, shape.split("/"))
        found = count(
            compiled(options.kernel, head_dim, rank), L1_CYCLES if options.l1 else L2_CYCLES
        )
        counted[shape] = found
        print(
            f"{options.kernel} {shape}: {found['alone']} cycles alone, {found['each']} each of "
            f"{found['programs']} on a multiprocessor",
            flush=True,
        )
        if options.functions:
            for name, cycles in found["functions"].items():
                print(f"  {name:24} {cycles:8}")
    if options.json:
        told = {"architecture": ARCHITECTURE, "triton": version("triton"), "commit": commit()}
        told |= {"kernel": options.kernel, "loads": "L1" if options.l1 else "L2"}
        options.json.write_text(json.dumps(told | {"shapes": counted}, indent=1) + "\n")


if __name__ == "__main__":
    main()
