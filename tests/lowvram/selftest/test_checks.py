"""The checks themselves: right kernels pass them, in the interpreter too, and wrong ones do not."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from lowvram.selftest.checks import kernel_check, kernel_checks, makers
from lowvram.selftest.trials import FULL, SMALL, Measured, sampled
from lowvram_kernels.choices import OPERATIONS
from lowvram_kernels.triton_linear import FEW_ROWS, TILES

CPU = torch.device("cpu")
MAKERS = dict(makers())


def test_every_operation_of_the_dispatchers_has_a_check():
    assert set(OPERATIONS) - set(MAKERS) == {"conv"}  # weights dequantized at use: no kernel of ours


@pytest.mark.parametrize("check", list(kernel_checks(CPU)), ids=lambda check: check.subject.name)
def test_what_a_processor_computes_is_right(check):
    result = check.run()
    assert result.status == "passed", result.message
    assert result.seconds > 0


@pytest.mark.parametrize("operation", MAKERS)
@pytest.mark.parametrize("change", [lambda t: t * 1.5, lambda t: torch.zeros_like(t), lambda t: t.roll(1, 0)])
def test_a_result_that_is_off_fails_in_every_output(operation, change):
    torch.manual_seed(0)
    trial = MAKERS[operation](SMALL, CPU)
    out = dict(trial.backends[OPERATIONS[operation][-1]]())
    for name in trial.judge(out):
        wrong = out | {name: change(out[name].float()).to(out[name].dtype)}
        assert not all(one.right for one in trial.judge(wrong).values()), name


@pytest.mark.parametrize("operation", MAKERS)
def test_nan_in_any_output_fails(operation):
    backend = OPERATIONS[operation][-1]

    def with_nan(sizes, device):
        trial = MAKERS[operation](sizes, device)

        def run():
            out = dict(trial.backends[backend]())
            name = next(name for name, t in out.items() if t.dtype in (torch.float32, torch.bfloat16, torch.float64))
            out[name].view(-1)[-1] = float("nan")
            return out

        return dataclasses.replace(trial, backends={backend: run})

    result = kernel_check(operation, backend, SMALL, CPU, with_nan).run()
    assert result.status == "failed"
    assert "NaN" in result.message


def test_an_error_that_is_no_number_is_not_within_any_bound():
    assert not Measured(error=float("nan"), bound=1.0).right
    assert Measured(error=0.0, bound=0.0).right


def test_every_tile_has_rows_that_are_compared():
    rows = sampled(FULL.tokens)
    assert rows[-1] == FULL.tokens - 1
    assert rows.diff().max() <= min(tile.m for tile in (*TILES.values(), FEW_ROWS)) // 2


@pytest.mark.slow
def test_kernels_pass_in_the_interpreter():
    """But for fp8, whose conversion the interpreter gets wrong: of that, the checks have to notice."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be checked")
    code = (
        "import json, torch; from lowvram.selftest import checks; from lowvram.selftest.checks import kernel_checks\n"
        "checks.REPEATS = 1\n"
        "for check in kernel_checks(torch.device('cpu')):\n"
        "    if check.subject.backend == 'triton': print(json.dumps(check.run().to_json()))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["subject"]["operation"] for result in results} == {
        name for name, backends in OPERATIONS.items() if "triton" in backends
    }
    failed = {result["subject"]["operation"] for result in results if result["status"] != "passed"}
    assert failed <= {"quantize_rows fp8", "norm_rows fp8", "add_gated_norm_rows fp8"}, results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_card_has_every_check():
    names = {check.subject.name for check in kernel_checks(torch.device("cuda", 0))}
    assert {"ring_attention: triton, small", "ring_attention: triton, 14B"} <= names


def test_operands_are_the_same_each_time():
    one, two = (functools.partial(kernel_check, "norm_rope", "torch", SMALL, CPU, MAKERS["norm_rope"])() for _ in "ab")
    assert one.run().error == two.run().error


def test_every_check_has_a_name_of_its_own():
    names = [check.subject.name for check in kernel_checks(CPU)]
    assert len(set(names)) == len(names)
