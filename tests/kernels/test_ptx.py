"""The inline assembly, executed opcode by opcode: four int8 to four bfloat16, for all values at all places."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be imported")

from lowvram_kernels.triton_attention import TO_BF16

KERNELS = Path(sys.modules["lowvram_kernels.triton_attention"].__file__).parent
_spec = importlib.util.spec_from_file_location("ptx", Path(__file__).parent / "ptx.py")
ptx = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ptx)


def as_bfloat16(text: str, bytes_4: list[int]) -> list[float]:
    packed = sum((byte & 255) << (8 * place) for place, byte in enumerate(bytes_4))
    halves = [half for word in ptx.run(text, [packed], 2) for half in (word & 0xFFFF, word >> 16)]
    return torch.from_numpy(np.array(halves, dtype=np.uint16).view(np.int16)).view(torch.bfloat16).tolist()


@pytest.mark.parametrize("place", range(4))
def test_every_value_at_every_place(place):
    for value in range(-128, 128):
        # Its neighbours differ from it and among themselves, so that a byte from another place shows.
        given = [(value * 5 + 37 * other) % 256 - 128 for other in range(4)]
        given[place] = value
        assert as_bfloat16(TO_BF16.value, given) == given


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("0x7441", "0x7442"), ("0f4B000080", "0f4B000000"), ("0x80808080", "0x80800080"), ("0x7632", "0x5410")],
)
def test_a_slip_in_the_assembly_shows(right, wrong):
    broken = TO_BF16.value.replace(right, wrong, 1)
    assert broken != TO_BF16.value
    assert any(as_bfloat16(broken, [v, v + 1, v - 1, -v]) != [v, v + 1, v - 1, -v] for v in range(-127, 127))


def test_all_inline_assembly_is_checked_here():
    """Counts the places, so that another one gets its check."""
    found = [
        (path.name, name)
        for path in sorted(KERNELS.glob("*.py"))
        for name in re.findall(r"inline_asm_elementwise\(\s*(\w+)", path.read_text())
    ]
    assert found == [("triton_attention.py", "TO_BF16")]


def test_opcodes():
    assert ptx.permute(0x33221100, 0x77665544, 0x7410) == 0x77441100
    assert ptx.permute(0x80, 0, 0x8888) == WORD_OF_ONES
    assert ptx.subtract(0x4B0000FF, 0x4B000080) == 0x42FE0000  # 127
    with pytest.raises(ValueError, match="expected one of"):
        ptx.run(".reg .b32 a; add.f32 a, 0f00000000, 0f00000000", [], 0)
    with pytest.raises(ValueError, match="before it is written"):
        ptx.run(".reg .b32 a, b; xor.b32 a, b, 0x1", [], 0)


WORD_OF_ONES = 0xFFFFFFFF
