"""A launch on ``meta`` is told of and not made, any other one is made; and what ``meta`` stands for."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest
import torch

from lowvram_kernels import chips, choices
from lowvram_kernels import launch as launches
from lowvram_kernels.choices import FLOAT32, INT_MM, OPERATIONS, SCALED_MM, TORCH, TRITON
from lowvram_kernels.launch import launch, telling
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.stand_ins import meta_as
from lowvram_kernels.trace import trace_kernels

META, CPU = torch.device("meta"), torch.device("cpu")
INT8, FP8 = "linear_w8a8 int8", "linear_w8a8 fp8"


class Kernel:
    """As Triton's: ``kernel[grid](...)``."""

    __name__ = "_some_kernel"

    def __init__(self) -> None:
        self.made: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.made.append((grid, args, options))


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.delenv("LOWVRAM_TRITON", raising=False)
    monkeypatch.setattr(chips, "has_triton", lambda: True)


def test_a_launch_on_meta_is_told_of_and_not_made():
    kernel, outer, inner = Kernel(), [], []
    x = torch.empty(3, device=META)
    launch(kernel, (1,), x)
    with telling(outer.append):
        launch(kernel, (1,), x, 2, num_warps=4)
        with telling(inner.append):
            launch(kernel, (1,), x)
        launch(kernel, (1,), x)
    launch(kernel, (1,), x)
    assert (outer, inner, kernel.made) == (["_some_kernel"] * 3, ["_some_kernel"], [])


def test_any_other_launch_is_made_as_it_was_asked_for():
    kernel, told, x = Kernel(), [], torch.zeros(3)
    with telling(told.append), meta_as(89):
        launch(kernel, (2, 3), x, 7, first=1, kernel=2, num_warps=4)
    assert kernel.made == [((2, 3), (x, 7), {"first": 1, "kernel": 2, "num_warps": 4})]
    assert not told


def test_another_thread_launches_meanwhile():
    kernel, told, x = Kernel(), [], torch.zeros(3)

    def other() -> None:
        launch(kernel, (1,), x)
        launch(kernel, (1,), x.to(META))

    with telling(told.append), meta_as(89):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert len(kernel.made) == 1
    assert not told


def test_nothing_else_launches():
    """Else a run on ``meta`` would compile, and fail."""
    folder = Path(launches.__file__).parent
    found = []
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("kernel"):
                found.append(path.stem)
    assert found == ["launch"]


@pytest.mark.usefixtures("with_triton")
def test_meta_stands_for_a_gpu_and_for_itself_again():
    names = [name for name in OPERATIONS if name != "attention"]
    before = {name: choices.backends(name, META) for name in names}
    assert not [name for name, able in before.items() if TRITON in able]
    with meta_as(89):
        assert choices.choose("norm_rope", META) == TRITON
        assert choices.backends(INT8, META) == (TRITON, INT_MM, FLOAT32)
        assert choices.backends(FP8, META) == (SCALED_MM, TRITON, FLOAT32)
        assert (chips.generation(META), chips.known_generation(META), chips.name_of(META)) == (89, 89, "sm_89")
        with meta_as(75):
            assert choices.choose("norm_rope", META) == TORCH
            assert not chips.has_fp8_units(META)
        assert choices.choose("norm_rope", META) == TRITON
        assert choices.choose("norm_rope", CPU) == TORCH
    assert {name: choices.backends(name, META) for name in names} == before
    assert choices.choose("norm_rope", META) == TORCH
    assert (chips.generation(META), chips.has_fp8_units(META), chips.counts_as_cuda(META)) == (0, True, False)


@pytest.mark.usefixtures("with_triton")
def test_what_is_off_on_a_card_stays_so():
    card = torch.device("cuda", 0)
    choices.switch_off("norm_rope", TRITON, card, "returned NaN")
    with meta_as(90):
        assert choices.choose("norm_rope", META) == TRITON
    assert [note.reason for note in choices.noted() if note.device == str(card)] == ["returned NaN"]


def test_an_error_leaves_meta_as_it_was():
    with pytest.raises(KeyError), meta_as(86):
        raise KeyError
    assert not chips.counts_as_cuda(META)


@pytest.mark.parametrize(("generation", "known"), [(75, 86), (80, 80), (87, 86), (100, 86), (120, 120)])
def test_generations_that_meta_stands_for(generation, known):
    with meta_as(generation):
        assert chips.known_generation(META) == known
        assert chips.has_fp8_units(META) is (generation >= 89)


def test_why_triton_does_not_serve(monkeypatch, caplog):
    monkeypatch.delenv("LOWVRAM_TRITON", raising=False)
    monkeypatch.setattr(chips, "has_triton", lambda: False)
    with meta_as(89):
        found = chips.without_triton(META)
        assert found is not None
        assert found.why == "triton is not installed"
        assert not chips.triton_serves(META)
        monkeypatch.setattr(chips, "has_triton", lambda: True)
        monkeypatch.setattr(chips, "missing_to_build", lambda: "a C compiler")
        assert chips.without_triton(META) is None
        monkeypatch.setenv("LOWVRAM_TRITON", "0")
        found = chips.without_triton(META)
        assert found is not None
        assert found.why == "LOWVRAM_TRITON=0"
    with meta_as(75):
        monkeypatch.delenv("LOWVRAM_TRITON")
        found = chips.without_triton(META)
        assert found is not None
        assert found.why == "sm_75 is older than sm_80"
    assert not caplog.records  # who asked for a simulation says it


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("generation", [75, 80, 89])
def test_products_without_triton_take_the_gpus_way(monkeypatch, generation, dtype):
    """Rows, depths and widths are padded as cuBLAS wants them, or fp8 weights are dequantized."""
    monkeypatch.setenv("LOWVRAM_TRITON", "0")
    x, weight = torch.empty(5, 30, device=META), torch.empty(9, 30, dtype=dtype, device=META)
    with meta_as(generation), trace_kernels() as counts:
        out = linear_w8a8(x, weight, torch.empty(9, device=META), torch.empty(9, device=META))
    assert (out.shape, out.dtype) == ((5, 9), torch.float32)
    (ran,) = [name for operation, name in counts if operation == "linear_w8a8"]
    expected = f"fp8: {SCALED_MM}" if generation == 89 else "fp8: dequantized weight, no FP8 units"
    assert ran == (f"int8: {INT_MM}" if dtype is torch.int8 else expected)


def test_rows_are_quantized_by_the_kernel():
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be launched")
    told: list[str] = []
    with meta_as(86), telling(told.append), trace_kernels() as counts:
        q, scale = quantize_rows(torch.empty(5, 32, device=META), torch.int8)
    assert (q.shape, q.dtype, scale.shape) == ((5, 32), torch.int8, (5, 1))
    assert told == ["_quantize_rows_kernel"]
    assert {name for _, name in counts} == {"int8: triton"}
