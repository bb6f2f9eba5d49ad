"""Runs a few opcodes of inline PTX with their exact 32-bit semantics (PTX ISA, "Instruction Set")."""

from __future__ import annotations

import re

import numpy as np

WORD = 0xFFFFFFFF


def run(text: str, inputs: list[int], outputs: int) -> list[int]:
    """What ``text`` leaves in $0, $1, ... as 32-bit words; ``inputs`` are the operands behind the outputs.

    Raises:
        ValueError: an opcode that is not known here, or a register that was read before it was written.
    """
    words = {f"${outputs + index}": value for index, value in enumerate(inputs)}
    declared = {f"${index}" for index in range(outputs)}
    for statement in (part.strip() for part in text.strip().strip("{}").split(";")):
        if not statement:
            continue
        head, _, rest = statement.partition(" ")
        operands = [part.strip() for part in rest.split(",")]
        if head == ".reg":
            operands[0] = operands[0].removeprefix(".b32").strip()
            declared |= set(operands)
            continue
        if head not in OPCODES or operands[0] not in declared:
            raise ValueError(f"{statement!r}: expected one of {sorted(OPCODES)} into a declared register")
        words[operands[0]] = OPCODES[head](*(_word(operand, words) for operand in operands[1:]))
    return [words[f"${index}"] for index in range(outputs)]


def _word(operand: str, words: dict[str, int]) -> int:
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):  # a float32 by its bits
        return int(operand[2:], 16)
    if re.fullmatch(r"0x[0-9A-Fa-f]+", operand):
        return int(operand, 16)
    if operand not in words:
        raise ValueError(f"{operand} is read before it is written")
    return words[operand]


def permute(a: int, b: int, selector: int) -> int:
    """prmt.b32, the general mode: each nibble picks one of the eight bytes of b:a; its top bit spreads the sign."""
    out = 0
    for place in range(4):
        nibble = selector >> (4 * place) & 15
        byte = ((b << 32 | a) >> (8 * (nibble & 7))) & 255
        out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << (8 * place)
    return out


def subtract(a: int, b: int) -> int:
    """sub.f32: rounded to the nearest even, subnormals kept."""
    left, right = (np.array(word, dtype=np.uint32).view(np.float32) for word in (a, b))
    return int((left - right).view(np.uint32))


OPCODES = {"xor.b32": lambda a, b: (a ^ b) & WORD, "prmt.b32": permute, "sub.f32": subtract}
