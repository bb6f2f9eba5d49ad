"""Every Triton kernel compiles for every chip without a GPU: no spilled registers, shared memory that is there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")

from lowvram_kernels.aot import Case, Usage, cases, compile_all, compile_case
from lowvram_kernels.chips import GENERATIONS


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """Even where Triton's kernels are interpreted. Its cache may serve: keys hold source, options and compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def usages() -> dict[int, dict[str, Usage]]:
    found = compile_all(GENERATIONS)
    return {chip: {usage.name: usage for usage in found if usage.generation == chip} for chip in GENERATIONS}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_spills_and_shared_memory_within_the_limit(usages, generation):
    found = usages[generation].values()
    assert len(found) == len(cases(generation))
    assert [usage for usage in found if not usage.fits()] == []
    assert all(0 < usage.registers <= 255 for usage in found)


@pytest.mark.parametrize(("generation", "prefix"), [(80, "mma"), (86, "mma"), (89, "mma"), (90, "wgmma"), (120, "mma")])
def test_products_run_on_the_tensor_cores_in_eight_bits(usages, generation, prefix):
    found = usages[generation]
    assert found["linear int8"].matrix_instructions == (f"{prefix} s8 s8",)
    assert set(found["ring_attention"].matrix_instructions) == {f"{prefix} s8 s8", f"{prefix} bf16 bf16"}
    if generation >= 89:
        assert found["linear fp8"].matrix_instructions == (f"{prefix} e4m3 e4m3",)
    else:
        assert not [name for name in found if "fp8" in name]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rotating_groups_moves_nothing_through_shared_memory(usages, generation):
    found = usages[generation]
    pairs = {name: name.replace(" rotated", "") for name in found if "rotated" in name}
    assert len(pairs) == 3
    assert all(found[name].shared_bytes == found[plain].shared_bytes for name, plain in pairs.items())


def test_a_tile_too_large_is_seen(usages):
    from lowvram_kernels.triton_linear import Tile, aot_case

    usage = compile_case(aot_case("too large", "*i8", Tile(256, 256, 64, 8, 3)), 86)
    assert usage.stack_bytes > 0
    assert not usage.fits()


def test_limits_count():
    usage = Usage(
        name="x", generation=86, registers=1, stack_bytes=0, shared_bytes=9, shared_limit=8, num_warps=1,
        matrix_instructions=(),
    )  # fmt: skip
    assert not usage.fits()
    assert Case(name="x", kernel=None, types={}, constants={}, num_warps=4).fp_fusion
