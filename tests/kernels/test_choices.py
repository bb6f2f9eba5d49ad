"""Which backend an operation takes, how that is changed, and that every dispatcher listens."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest
import torch

from lowvram_kernels import chips, choices
from lowvram_kernels.choices import FLOAT32, INT_MM, ONE_BY_ONE, OPERATIONS, SCALED_MM, TORCH, TRITON
from lowvram_kernels.errors import ConfigError, DeviceError
from lowvram_kernels.linear import linear_w8a8, reference_w8a8
from lowvram_kernels.rows import reference_rows
from lowvram_kernels.trace import trace_kernels

CPU = torch.device("cpu")
CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
INT8, FP8 = "linear_w8a8 int8", "linear_w8a8 fp8"


@pytest.fixture(autouse=True)
def nothing_noted():
    """Whatever tests before it have found out of this processor; it is set back behind it."""
    choices.reset()


@pytest.fixture
def ada(monkeypatch):
    """Two cards of sm_89, with Triton."""
    monkeypatch.setattr(chips, "_capability", lambda device: 89)
    monkeypatch.setattr(chips, "has_triton", lambda: True)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(chips, "_capability", lambda device: 86)
    monkeypatch.setattr(chips, "has_triton", lambda: True)


def test_every_operation_ends_with_plain_pytorch_or_with_its_parts():
    assert {order[-1] for order in OPERATIONS.values()} == {TORCH, FLOAT32, ONE_BY_ONE}
    assert {name for name, order in OPERATIONS.items() if order[-1] == ONE_BY_ONE} == {
        "linears_w8a8 int8",
        "attend_projected",
    }


@pytest.mark.usefixtures("ada")
def test_order_on_a_card_with_fp8_units():
    assert choices.backends(INT8, CARD) == (TRITON, INT_MM, FLOAT32)
    assert choices.backends(FP8, CARD) == (SCALED_MM, TRITON, FLOAT32)
    assert choices.backends(f"{FP8} gelu", CARD) == (TRITON, SCALED_MM, FLOAT32)
    assert {choices.choose(name, CARD) for name in OPERATIONS if "linear" not in name} == {TRITON, TORCH}


@pytest.mark.usefixtures("ampere")
def test_without_fp8_units_no_kernel_makes_fp8():
    fp8 = [name for name in OPERATIONS if name.endswith("fp8")]
    assert len(fp8) == 4
    assert all(not {TRITON, SCALED_MM} & set(choices.backends(name, CARD)) for name in fp8)
    assert choices.choose("norm_rows int8", CARD) == TRITON


def test_the_cpu_has_no_triton():
    assert all(TRITON not in choices.backends(name, CPU) for name in OPERATIONS)


@pytest.mark.usefixtures("ada")
def test_one_backend_of_one_operation_is_off_on_one_card():
    before = {name: choices.choose(name, CARD) for name in OPERATIONS}
    choices.switch_off("norm_rope", TRITON, CARD, "returned NaN")
    assert {name for name in OPERATIONS if choices.choose(name, CARD) != before[name]} == {"norm_rope"}
    assert choices.choose("norm_rope", CARD) == TORCH
    assert choices.choose("norm_rope", OTHER) == TRITON
    assert [str(note) for note in choices.noted()] == ["norm_rope: triton is off on cuda:0: returned NaN"]


@pytest.mark.usefixtures("ada")
def test_a_device_without_an_index_stands_for_all_of_its_type():
    choices.switch_off("norm_rope", TRITON, torch.device("cuda"), "does not compile")
    assert {choices.choose("norm_rope", card) for card in (CARD, OTHER)} == {TORCH}


@pytest.mark.usefixtures("ada")
def test_another_backend_is_preferred_until_it_is_off():
    choices.prefer(INT8, INT_MM, CARD, "3 times as fast")
    assert choices.backends(INT8, CARD) == (INT_MM, TRITON, FLOAT32)
    assert choices.choose(INT8, OTHER) == TRITON
    choices.switch_off(INT8, INT_MM, CARD, "wrong")
    assert choices.choose(INT8, CARD) == TRITON
    assert [(note.backend, note.verdict, note.reason) for note in choices.noted()] == [
        (INT_MM, "off", "wrong"),
        (INT_MM, "preferred", "3 times as fast"),
    ]


@pytest.mark.usefixtures("ada")
def test_changes_are_set_back():
    choices.switch_off("norm_rope", TRITON, CARD, "kept")
    with choices.restored():
        choices.switch_off("add_gated", TRITON, CARD, "for now")
        choices.reset()
        assert choices.choose("norm_rope", CARD) == TRITON
        choices.prefer(INT8, FLOAT32, CARD, "for now")
        assert choices.choose(INT8, CARD) == FLOAT32
    assert [note.reason for note in choices.noted()] == ["kept"]
    assert [choices.choose(name, CARD) for name in ("norm_rope", "add_gated", INT8)] == [TORCH, TRITON, TRITON]


@pytest.mark.usefixtures("ada")
def test_the_switch_for_all_triton_kernels(monkeypatch):
    monkeypatch.setenv("LOWVRAM_TRITON", "0")
    assert not [name for name in OPERATIONS if choices.choose(name, CARD) == TRITON]
    choices.reset()
    monkeypatch.setenv("LOWVRAM_TRITON", "off")
    with pytest.raises(ConfigError, match="LOWVRAM_TRITON is 'off'"):
        choices.choose("norm_rope", CPU)


def test_what_cannot_be_changed_is_refused():
    for change in (choices.switch_off, choices.prefer):
        with pytest.raises(ValueError, match=r"no operation is called 'norm'; known are .*norm_rope"):
            change("norm", TRITON, CARD, "why")
        with pytest.raises(ValueError, match=r"'norm_rope' has no backend 'cudnn'; it has triton, torch"):
            change("norm_rope", "cudnn", CARD, "why")
    for operation, order in OPERATIONS.items():
        with pytest.raises(ValueError, match="reference, which cannot be switched off"):
            choices.switch_off(operation, order[-1], CPU, "why")
    with pytest.raises(ValueError, match="preferred on cpu, which it does not serve"):
        choices.prefer("norm_rope", TRITON, CPU, "why")
    with pytest.raises(ValueError, match="no operation is called"):
        choices.choose("norm", CPU)
    assert choices.noted() == ()


def test_where_nothing_is_left_an_error_says_so(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "lonely", (TRITON,))
    with pytest.raises(DeviceError, match="nothing is left that could run 'lonely' on cpu: of triton all are off"):
        choices.choose("lonely", CPU)


def test_a_choice_is_made_once(monkeypatch):
    asked = []
    monkeypatch.setattr(choices, "triton_serves", lambda device: asked.append(device))
    for _ in range(3):
        choices.choose("norm_rope", CPU)
    assert asked == [CPU]
    choices.switch_off("add_gated", TRITON, CPU, "why")
    choices.choose("norm_rope", CPU)
    assert len(asked) == 2


@pytest.mark.usefixtures("ada")
def test_a_thread_that_decides_while_one_is_switched_off_leaves_no_old_answer(monkeypatch):
    deciding, changed = threading.Event(), threading.Event()
    decide = choices.backends

    def slow(operation, device):
        found = decide(operation, device)
        if threading.current_thread() is not threading.main_thread():
            deciding.set()
            assert changed.wait(10)
        return found

    monkeypatch.setattr(choices, "backends", slow)
    thread = threading.Thread(target=choices.choose, args=("norm_rope", CARD))
    thread.start()
    assert deciding.wait(10)
    choices.switch_off("norm_rope", TRITON, CARD, "failed")
    changed.set()
    thread.join(10)
    assert choices.choose("norm_rope", CARD) == TORCH


def operands(dtype, shape=(19, 1300, 33)):
    m, k, n = shape
    weight, scale = reference_rows(torch.randn(n, k), dtype)
    return torch.randn(m, k), weight, scale[:, 0].contiguous(), torch.randn(n)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "usual"), [(torch.int8, INT_MM), (torch.float8_e4m3fn, SCALED_MM)])
def test_a_product_goes_around_what_is_off_and_names_what_ran(dtype, usual, gelu):
    kind = "int8" if dtype is torch.int8 else "fp8"
    given = operands(dtype)
    choices.prefer(f"linear_w8a8 {kind}{' gelu' if gelu else ''}", usual, CPU, "to know what runs")
    with trace_kernels() as counts:
        first = linear_w8a8(*given, gelu=gelu)
        choices.switch_off(f"linear_w8a8 {kind}{' gelu' if gelu else ''}", usual, CPU, "failed")
        second = linear_w8a8(*given, gelu=gelu)
    assert {name: calls for (operation, name), calls in counts.items() if operation == "linear_w8a8"} == {
        f"{kind}: {usual}": 1,
        f"{kind}: {FLOAT32}": 1,
    }
    expected = reference_w8a8(*given, gelu=gelu)
    for out in (first, second):
        assert (out.double() - expected).norm() / expected.norm() < 1e-5


def asked_by_the_dispatchers() -> set[str]:
    """The operations whose names, or the first words of them, stand in the dispatchers."""
    folder = Path(choices.__file__).parent
    texts = set()
    for path in folder.glob("[!t]*.py"):
        if path.stem not in ("choices", "aot"):
            tree = ast.walk(ast.parse(path.read_text()))
            texts |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {name for name in OPERATIONS if any(name == text or name.split()[0] == text.strip() for text in texts)}


def test_every_operation_has_a_dispatcher():
    assert asked_by_the_dispatchers() == set(OPERATIONS)
