"""Inner loops of compiled kernels, read off SASS (nvdisasm's listing) and Triton's TTGIR."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

# IMMA int8, HMMA 16 bits, QMMA fp8; with a G before MMA those of a group of four warps (wgmma).
MATRIX = re.compile(r"\b([IHQ]G?MMA\.[\w.]+)")
LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The innermost loop that multiplies matrices: instructions in all, those on matrices, spilled registers,
    conversions between kinds of numbers, and maxima that keep NaN and that drop it."""

    instructions: int
    matrix: int
    spills: int
    conversions: int = 0
    nan_maxima: int = 0
    plain_maxima: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How loads and products of a kernel overlap.

    ``waits`` are the groups of copies that may still be under way after each wait, loops first; ``buffers`` the copies
    of each tile in shared memory; ``pendings`` the products of a group of warps that may be under way after each wait.
    """

    waits: tuple[int, ...]
    buffers: tuple[int, ...]
    pendings: tuple[int, ...]


def matrix_opcodes(sass: str) -> tuple[str, ...]:
    """Instructions on matrices with shape, accumulator and operands, such as "HMMA.16816.F32.BF16"."""
    # Integer sums say SAT where PTX has .satfinite: the same product.
    return tuple(sorted({opcode.removesuffix(".SAT") for opcode in MATRIX.findall(sass)}))


def inner_loop(sass: str) -> Loop | None:
    """The shortest loop with an instruction on matrices, by its branch backwards; None where there is none."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
            back = BRANCH.search(found[1])
            # A label that is known already lies before its branch.
            if back and back[1] in labels:
                loops.append(_count(instructions[labels[back[1]] :]))
    return min((loop for loop in loops if loop.matrix), key=lambda loop: loop.instructions, default=None)


def _count(body: Sequence[str]) -> Loop:
    return Loop(
        instructions=len(body),
        matrix=sum(bool(MATRIX.search(line)) for line in body),
        spills=_lines(body, r"\b(LDL|STL)\b"),
        conversions=_lines(body, r"\b([IF]2[IF]P?)\b"),
        nan_maxima=_lines(body, r"\bFMNMX3?\.NAN\b"),
        plain_maxima=_lines(body, r"\bFMNMX3?(?!\.NAN)\b(?!\.NAN)"),
    )


def _lines(body: Sequence[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in body)


def pipeline(ttgir: str) -> Pipeline:
    def numbers(pattern: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(pattern, ttgir))

    return Pipeline(
        waits=numbers(r"ttg\.async_wait\b.*?\bnum = (\d+)"),
        buffers=numbers(r"ttg\.local_alloc\s*:\s*\(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x"),
        pendings=numbers(r"warp_group_dot_wait\b.*?\bpendings = (\d+)"),
    )
