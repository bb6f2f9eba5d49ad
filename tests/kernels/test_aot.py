"""Every Triton kernel compiles for every chip without a GPU: no spilled registers, shared memory that is there."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")

from lowvram_kernels.aot import Case, Usage, cases, compile_all, compile_case
from lowvram_kernels.chips import GENERATIONS
from lowvram_kernels.machine_code import Pipeline

# The seldom sizes too, where there is time: `make test-triton`.
MORE = os.environ.get("LOWVRAM_AOT_CASES") == "all"
# Its machine code has bars of its own where it needs them; all others stand for every version.
OF_3_6 = version("triton").startswith("3.6.")


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """Even where Triton's kernels are interpreted. Its cache may serve: keys hold source, options and compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def usages() -> dict[int, dict[str, Usage]]:
    found = compile_all(GENERATIONS, more=MORE)
    return {chip: {usage.name: usage for usage in found if usage.generation == chip} for chip in GENERATIONS}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_case_has_a_name_of_its_own_and_says_all_its_kernel_takes(generation):
    """Those too that only `make test-triton` compiles."""
    found = cases(generation, more=True)
    assert len({case.name for case in found}) == len(found) > len(cases(generation))
    for case in found:
        told = {**case.types, **case.constants}
        assert set(case.kernel.arg_names) <= set(told), (case.name, set(case.kernel.arg_names) - set(told))


# Two registers behind the loop, of fp8 under Triton 3.7.1 and of int8 under 3.9: GELU over a float32 bias into float32,
# which no 14B layer asks for.
FEW_SPILLS = {(90, "linear fp8 gelu odd"), (90, "linear int8 gelu odd")}


def spills_within_the_loop(usage: Usage) -> int:
    """How many are let pass: two, places of keys in their tile, of attention into float32 on sm_120 under Triton 3.6:
    computed once and read again in each step, of a thousand instructions. Into bfloat16, as the 14B runs, there is none
    there either."""
    attends = usage.name.startswith("ring_attention") and usage.name.endswith(("odd", "*fp32"))
    return 2 if OF_3_6 and usage.generation == 120 and attends else 0


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_spills_and_shared_memory_within_the_limit(usages, generation):
    found = usages[generation].values()
    assert len(found) == len(cases(generation, more=MORE))
    assert [usage for usage in found if usage.loop and usage.loop.spills > spills_within_the_loop(usage)] == []
    few = {name for chip, name in FEW_SPILLS if chip == generation}
    few |= {usage.name for usage in found if spills_within_the_loop(usage) and usage.stack_bytes <= 8}
    assert [usage for usage in found if not usage.fits() and usage.name not in few] == []
    assert all(usage.stack_bytes <= 16 and usage.shared_bytes <= usage.shared_limit for usage in found)
    assert all(0 < usage.registers <= 255 for usage in found)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_products_run_on_the_tensor_cores_with_full_sums(usages, generation):
    """Opcode, shape and accumulator: 8-bit products in int32, fp8 ones in float32. Attention has only 8-bit ones."""
    found = usages[generation]
    groups = generation == 90  # of four warps, each program two of them: the columns of a tile are their n
    int8 = "IGMMA.64x128x32.S8.S8" if groups else "IMMA.16832.S8.S8"
    fp8 = "QGMMA.64x{}x32.F32.E4M3.E4M3" if groups else "QMMA.16832.F32.E4M3.E4M3"
    attention = {int8, "IGMMA.64x64x32.S8.S8"} if groups else {int8}
    linears = {name: usage.matrix_instructions for name, usage in found.items() if name.startswith("linear")}
    for name, opcodes in linears.items():
        assert opcodes == (int8 if "int8" in name else fp8.format(128 if "few" in name else 256),), name
    assert ("linear fp8" in linears) == (generation >= 89)
    for name in ("ring_attention", "ring_attention odd"):
        assert set(found[name].matrix_instructions) == attention, name
    assert {name for name in found if found[name].matrix_instructions} >= {*linears, "ring_attention"}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_loads_run_ahead_into_other_buffers(usages, generation):
    """After the first wait copies are still under way, and each tile has room for one that comes and one in use."""
    looped = {name: usage.pipeline for name, usage in usages[generation].items() if usage.loop}
    assert len(looped) >= 6
    for name, pipeline in looped.items():
        assert pipeline.waits[0] > 0, name
        assert len(pipeline.buffers) >= 2, name
        assert min(pipeline.buffers) >= 2, name


def test_products_of_warp_groups_run_on_into_the_next_step(usages):
    found = usages[90]
    linears = {name: usage.pipeline.pendings for name, usage in found.items() if name.startswith("linear")}
    for name, pendings in linears.items():
        # Missing: Triton waits for each product with an int32 sum. Where that ends, this says so: hold it from then on.
        assert (pendings[0] >= 1) == ("fp8" in name), name
    # Missing too: attention's softmax reads each product at once.
    assert set(found["ring_attention"].pipeline.pendings) == {0}
    assert not any(usage.pipeline.pendings for chip in (80, 86, 89, 120) for usage in usages[chip].values())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_attention_converts_nothing_in_its_loop_but_sums_and_keeps_nan(usages, generation):
    """A thread has two rows, of whose weights it converts the sums; a maximum without NaN would hide a broken key."""
    found = [usage for name, usage in usages[generation].items() if name in ("ring_attention", "ring_attention odd")]
    assert len(found) == 2
    for usage in found:
        assert usage.loop.conversions == 2
        assert usage.loop.nan_maxima > 60 > usage.loop.plain_maxima == 0


def test_no_kernel_has_assembly_of_its_own():
    """Nothing here could execute it: the interpreter leaves it out."""
    folder = Path(sys.modules["lowvram_kernels.aot"].__file__).parent
    texts = [path.read_text() for path in sorted(folder.glob("*.py"))]
    assert len(texts) > 20
    assert not any("inline_asm" in text for text in texts)


# Most instructions of the inner loop, and those on matrices among them. About a twentieth above the larger count of
# Triton 3.7.1 and 3.9; those of sm_90's few rows were set from another tile's count.
CEILINGS = {
    "linear int8": {80: (234, 128), 86: (234, 128), 89: (234, 128), 90: (112, 8), 120: (222, 128)},
    "linear fp8": {89: (328, 128), 90: (100, 4), 120: (222, 128)},
    "linears int8": {80: (234, 128), 86: (234, 128), 89: (234, 128), 90: (112, 8), 120: (222, 128)},
    "linears int8 few rows": {80: (150, 64), 86: (150, 64), 89: (150, 64), 90: (106, 4), 120: (141, 64)},
    "linear int8 few rows": {80: (146, 64), 86: (146, 64), 89: (146, 64), 90: (106, 4), 120: (141, 64)},
    "linear fp8 few rows": {89: (189, 64), 90: (106, 4), 120: (142, 64)},
    "ring_attention": {80: (1024, 128), 86: (1022, 128), 89: (1022, 128), 90: (936, 12), 120: (1034, 128)},
}


# Triton 3.6 makes a third more instructions of products on sm_120, and a twentieth more of attention.
CEILINGS_OF_3_6 = {
    **{kind: {120: 322} for kind in ("linear int8", "linear fp8", "linears int8")},
    **{f"{kind} few rows": {120: 188} for kind in ("linear int8", "linear fp8", "linears int8")},
    "ring_attention": {90: 986, 120: 1117},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_instructions_of_the_inner_loop(usages, generation):
    older = CEILINGS_OF_3_6 if OF_3_6 else {}
    checked = 0
    for name, usage in usages[generation].items():
        kind = max((kind for kind in CEILINGS if name.replace(" gelu", "").startswith(kind)), key=len, default=None)
        if kind is None or usage.loop is None:
            continue
        most, matrix = CEILINGS[kind][generation]
        most = older.get(kind, {}).get(generation, most)
        assert usage.loop.matrix == matrix, name
        assert usage.loop.instructions <= most, name
        checked += 1
    assert checked >= (11 if generation >= 89 else 7)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rotating_groups_moves_nothing_through_shared_memory(usages, generation):
    """Not even groups of 256, over 16 threads of a warp: they add what threads hand to each other. So as many programs
    are on a multiprocessor as without."""
    found = usages[generation]
    pairs = {
        name: name.partition(" by ")[0].replace(" smoothed", "").replace(" rotated", "")
        for name in found
        if "rotated" in name
    }
    assert len(pairs) == (14 if MORE else 5)
    assert all(found[name].shared_bytes == found[plain].shared_bytes for name, plain in pairs.items())
    assert all(resident(found[name]) >= resident(found[plain]) for name, plain in pairs.items())
    more = 8 if version("triton").startswith("3.7.") else 10
    assert all(found[name].registers <= found[plain].registers + more for name, plain in pairs.items())


def resident(usage: Usage) -> int:
    """Programs for which a multiprocessor's 65,536 registers suffice, of which a warp gets 256 at a time."""
    return 65536 // (-(-usage.registers * 32 // 256) * 256 * usage.num_warps)


def test_a_tile_too_large_is_seen(usages):
    from lowvram_kernels.triton_linear import Tile, aot_case

    usage = compile_case(aot_case("too large", "*i8", Tile(256, 256, 64, 8, 3)), 86)
    assert usage.stack_bytes > 0
    assert not usage.fits()


def test_limits_count():
    usage = Usage(
        name="x", generation=86, registers=1, stack_bytes=0, shared_bytes=9, shared_limit=8, num_warps=1,
        matrix_instructions=(), loop=None, pipeline=Pipeline(waits=(), buffers=(), pendings=()),
    )  # fmt: skip
    assert not usage.fits()
    assert Case(name="x", kernel=None, types={}, constants={}, num_warps=4).fp_fusion
