"""The two scripts about the small algebra of ``projection``: its cycles, and its arithmetic."""

from __future__ import annotations

import torch

from benchmarks import kernel_cycles, solve_conditioning
from benchmarks.kernel_cycles import Instruction
from distr_compile.kernels.projection import reference
from distr_compile.kernels.random import start_columns


def instruction(text: str, guard: str = "", stall: int = 1, **barriers: tuple) -> Instruction:
    opcode, _, operands = text.partition(" ")
    named = {"sets": (), "read": (), "waits": (), **barriers}
    parts = tuple(o.strip() for o in operands.split(","))
    name = opcode.partition(".")[0]
    return Instruction(name, text, guard, parts, stall, where=("_f",), **named)


LOOP = [
    instruction("UMOV UR4, 0x8"),
    instruction("IADD3 R2, P0, R2, 0x4, RZ"),
    instruction("UIADD3 UR4, UR4, -0x1, URZ"),
    instruction("UISETP.NE.AND UP0, UPT, UR4, URZ, UPT"),
    instruction("PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0"),
    instruction("BRA `(.L_x_0)", guard="P1"),
    instruction("EXIT"),
]


def test_loops_are_followed_to_their_end() -> None:
    trace = list(kernel_cycles.executed(LOOP, {".L_x_0": 1}))
    assert [i.opcode for i in trace].count("IADD3") == 8
    assert len(trace) == 1 + 8 * 5 + 1


def test_numbers_of_64_bits_carry() -> None:
    code = [
        instruction("IMAD.MOV.U32 R2, RZ, RZ, -0x10"),
        instruction("IMAD.MOV.U32 R3, RZ, RZ, -0x1"),
        instruction("IADD3 R2, P0, R2, 0x10, RZ"),
        instruction("IMAD.X R3, RZ, RZ, R3, P0"),
        instruction("ISETP.GE.U32.AND P0, PT, R2, 0x30, PT"),
        instruction("ISETP.GE.U32.AND.EX P0, PT, R3, RZ, PT, P0"),
        instruction("BRA `(.L_x_0)", guard="!P0"),
        instruction("EXIT"),
    ]
    trace = list(kernel_cycles.executed(code, {".L_x_0": 2}))
    assert [i.opcode for i in trace].count("IADD3") == 4  # 0, 16, 32, 48


def test_cycles_are_those_of_the_longest_way() -> None:
    load = instruction("LDG.E R2, desc[UR4][R4.64]", stall=4, sets=(0,))
    add = instruction("FADD R3, R2, R2", stall=4, waits=(0,))
    alone, functions = kernel_cycles.simulate([load, add, instruction("EXIT")], 1, 270)
    # The pipe of memory is taken for 4 cycles, the load takes 270, the sum 4, the end 1.
    assert alone == 4 + 270 + 4 + 1
    assert functions == {"_f": 4 + 270 + 4}
    both, _ = kernel_cycles.simulate([load, add, instruction("EXIT")], 1, 270, programs=2)
    assert alone < both < alone + 10


def test_programs_wait_at_their_own_barrier_only() -> None:
    trace = [instruction("BAR.SYNC 0x0"), instruction("EXIT")]
    (alone, _), (shared, _) = (kernel_cycles.simulate(trace, 2, 270, n) for n in (1, 2))
    assert alone >= kernel_cycles.BARRIER_CYCLES
    assert shared < 2 * alone


def test_control_codes_are_read() -> None:
    """An addition as nvdisasm prints it: stall of 4, waits for barriers 0 and 2, sets none."""
    control = 4 | 7 << 5 | 7 << 8 | 0b101 << 11
    text = (
        '\t//## File "/no/such/file.py", line 3\n.L_x_0:\n'
        f"        /*0010*/  @!P0 FADD R3, R2, R2 ;  /* 0x{0:016x} */\n"
        f"                                          /* 0x{control << 41:016x} */\n"
    )
    (code,), labels = kernel_cycles.read(text)
    assert labels == {".L_x_0": 0}
    assert (code.opcode, code.guard, code.operands) == ("FADD", "!P0", ("R3", "R2", "R2"))
    assert (code.stall, code.waits, code.sets, code.read) == (4, (0, 2), (), ())


def test_three_products_are_nearly_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 96, 96, generator=g)
    exact = a.double() @ b.double()
    one = solve_conditioning.tf32(a) @ solve_conditioning.tf32(b)
    three = solve_conditioning.product(a, b)
    size = a.abs().double() @ b.abs().double()
    assert ((three - exact).abs() / size).max() < 2.0**-19
    assert ((one - exact).abs() / size).max() > 2.0**-14


def test_every_way_is_the_definition_where_nothing_is_hard() -> None:
    g = torch.Generator().manual_seed(0)
    Q, K = torch.randn(2, 2, 100, 32, generator=g, dtype=torch.float64)
    case = solve_conditioning.Case("easy", Q, K)
    Cq, _ = reference.gram(Q, None, ridge=reference.RIDGE)
    Ck, _ = reference.gram(K, None, ridge=0)
    A, B = reference.projection_bases(Cq, Ck, start_columns(32, 16, seed=0), rounds=1)
    S = Q @ K.mT
    want = (Q @ A @ (K @ B).mT - S).norm(dim=(1, 2)) / S.norm(dim=(1, 2))
    for name, way in solve_conditioning.WAYS.items():
        plain, rounded = solve_conditioning.errors(case, 16, way)
        tolerance = 0.2 if name == "Newton-Schulz" else 1e-5
        assert torch.allclose(plain, want, rtol=tolerance), name
        assert torch.allclose(rounded, plain, rtol=1e-3), name
