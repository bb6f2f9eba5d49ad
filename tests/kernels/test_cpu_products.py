"""Which 8-bit product runs on a processor: the right ones only, and of those the fastest."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_kernels import choices, cpu_products
from lowvram_kernels.cpu_products import FLOAT32, INT_MM, PRODUCTS, SCALED_MM, examine, fault, random_operands
from lowvram_kernels.wide_product import wide_product

CPU = torch.device("cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = [INT8, FP8]


def slow(product, seconds=0.2):
    """The same, after some work where it is timed: what is measured is a processor's time, and sleeping takes none."""

    def slowed(q, weight):
        begin = time.thread_time()
        while q.shape == cpu_products.TIMED[:2] and time.thread_time() - begin < seconds:
            pass
        return product(q, weight)

    return slowed


def saturated(q, weight):
    """As oneDNN without VNNI: activations moved into 0 to 255, neighbouring products added in 16 bits."""
    pairs = ((q.int() + 128)[:, None] * weight.int()).unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - 128 * weight.int().sum(-1)).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_taken_here_meets_the_exact_product(dtype):
    name = "int8" if dtype is INT8 else "fp8"
    able = choices.backends(f"linear_w8a8 {name}", CPU)
    assert FLOAT32 in able
    assert {backend: fault(PRODUCTS[dtype][backend], dtype) for backend in able} == dict.fromkeys(able, "")


def test_a_product_that_saturates_is_found_wrong():
    shape = (4, 64, 3)
    q, weight = (t.clamp(-40, 40) for t in random_operands(shape, INT8))
    assert torch.equal(saturated(q, weight), wide_product(q, weight))  # right where values are small
    assert "products are wrong on this processor" in fault(lambda q, w: saturated(_even(q), _even(w)), INT8)


def _even(rows):
    return torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))


@pytest.mark.parametrize(("change", "found"), [(lambda out: out + 1, "wrong"), (lambda out: out * torch.nan, "wrong")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_value_is_found(dtype, change, found):
    assert found in fault(lambda q, weight: change(wide_product(q, weight)), dtype)


def test_a_product_that_does_not_run_is_off_with_its_reason():
    def refuse(q, weight):
        raise RuntimeError("could not create a primitive\nmore of it")

    made = examine({INT_MM: refuse, FLOAT32: wide_product}, INT8, torch.get_num_threads())
    assert made.wrong == {INT_MM: "it does not run on this processor: could not create a primitive"}
    assert made.preferred == FLOAT32


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_faster_one_comes_first_and_the_first_one_at_a_tie(dtype):
    threads = torch.get_num_threads()
    for products, first in (
        ({"a": slow(wide_product), "b": wide_product}, "b"),
        ({"a": wide_product, "b": slow(wide_product)}, "a"),
    ):
        made = examine(products, dtype, threads)
        assert made.preferred == first
        assert "64 x 512 x 512 in one thread: a" in made.reason
    assert torch.get_num_threads() == threads


def test_one_as_fast_but_for_noise_stays_first(monkeypatch):
    monkeypatch.setattr(cpu_products, "milliseconds", lambda able, dtype: {"a": 1.2, "b": 1.0})
    assert examine({"a": wide_product, "b": wide_product}, INT8, torch.get_num_threads()).preferred == "a"
    monkeypatch.setattr(cpu_products, "milliseconds", lambda able, dtype: {"a": 1.3, "b": 1.0})
    assert examine({"a": wide_product, "b": wide_product}, INT8, torch.get_num_threads()).preferred == "b"


def test_a_very_slow_one_is_not_timed_for_long():
    calls = []
    times = cpu_products.milliseconds({"a": slow(lambda q, weight: calls.append(q)), "b": wide_product}, INT8)
    assert len(calls) == 2  # to warm up, and once to be timed
    assert times["a"] > 200 > times["b"]


@pytest.fixture
def fresh():
    """As in a process that has not examined its processor yet."""
    choices.reset()
    cpu_products.findings.cache_clear()
    yield
    cpu_products.findings.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_processor_is_examined_once(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_products, "examine", lambda *args: asked.append(args[1]) or examine(*args))
    for _ in range(2):
        choices.choose("linear_w8a8 int8", CPU)
        choices.choose("linear_w8a8 int8 gelu", CPU)
        choices.reset()
    assert asked == [INT8]
    choices.choose("linear_w8a8 fp8", CPU)
    assert asked == [INT8, FP8]


@pytest.mark.usefixtures("fresh")
def test_what_is_found_is_noted_and_said_once(monkeypatch, caplog):
    monkeypatch.setitem(PRODUCTS, INT8, {INT_MM: lambda q, weight: wide_product(q, weight) + 3, FLOAT32: wide_product})
    choices._say_once.cache_clear()
    for name in ("linear_w8a8 int8", "linear_w8a8 int8 gelu"):
        assert choices.backends(name, CPU) == (FLOAT32,)
    assert [record.getMessage() for record in caplog.records] == [
        "torch._int_mm is not used: its products are wrong on this processor, by up to 3 for (1, 64, 16); "
        "torch float32 runs instead"
    ]
    assert {(note.operation, note.backend) for note in choices.noted() if note.verdict == "off"} == {
        ("linear_w8a8 int8", INT_MM),
        ("linear_w8a8 int8 gelu", INT_MM),
    }


@pytest.mark.usefixtures("fresh")
def test_what_somebody_prefers_goes_before_what_is_found(monkeypatch):
    monkeypatch.setitem(PRODUCTS, INT8, {INT_MM: wide_product, FLOAT32: slow(wide_product)})
    assert choices.choose("linear_w8a8 int8", CPU) == INT_MM
    choices.reset()
    choices.prefer("linear_w8a8 int8", FLOAT32, CPU, "said so")
    assert choices.choose("linear_w8a8 int8", CPU) == FLOAT32


@pytest.mark.usefixtures("fresh")
def test_examining_is_unseen_by_what_surrounds_it():
    """Neither modes nor devices of the caller reach it, nor does it move the caller's random numbers."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was seen")

    state = torch.random.get_rng_state()
    with Nothing(), torch.device("meta"):
        found = choices.choose("linear_w8a8 int8", CPU)
    assert found in (INT_MM, FLOAT32)
    assert torch.equal(torch.random.get_rng_state(), state)


CHOSEN = """
import json, torch
from lowvram_kernels import choices
from lowvram_kernels.linear import linear_q8
q, weight = (torch.randint(-127, 128, (n, 512), dtype=torch.int8) for n in (40, 24))
one = torch.ones(1)
out = linear_q8(q, one.expand(40, 1), weight, one.expand(24).contiguous(), None, dtype=torch.float32)
exact = torch.equal(out.double(), q.double() @ weight.double().t())
print(json.dumps([choices.choose("linear_w8a8 int8", q.device), exact]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are for x86 processors")
def test_without_vnni_the_product_is_exact_and_not_the_one_that_saturates():
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", CHOSEN], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [FLOAT32, True]


@pytest.mark.skipif(
    not torch.cpu._is_vnni_supported() or "ONEDNN_MAX_CPU_ISA" in os.environ, reason="no AVX512-VNNI, or held back"
)
@pytest.mark.usefixtures("fresh")
def test_with_vnni_the_int8_product_runs():
    assert choices.choose("linear_w8a8 int8", CPU) == INT_MM


def test_names_are_those_of_the_dispatcher():
    assert (set(PRODUCTS[INT8]), set(PRODUCTS[FP8])) == ({INT_MM, FLOAT32}, {SCALED_MM, FLOAT32})
    for dtype, name in ((INT8, "int8"), (FP8, "fp8")):
        assert set(PRODUCTS[dtype]) == set(choices.OPERATIONS[f"linear_w8a8 {name}"]) - {choices.TRITON}
