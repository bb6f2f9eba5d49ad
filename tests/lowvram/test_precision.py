"""float32 is not rounded to TF32 while a run computes, and what a program had set is as before behind it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from lowvram.pipeline import AvatarPipeline
from lowvram.precision import exact_float32

OPERATIONS = [
    torch.backends.cudnn.conv,
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.matmul,
]


def in_effect() -> list[object]:
    reductions = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return [operation.fp32_precision for operation in OPERATIONS] + [reductions]


EXACT = ["ieee"] * 4 + [False]


def test_convolutions_are_tf32_unless_told_otherwise():
    """What all this is for: where a new PyTorch begins with something else, its comments have to change."""
    assert in_effect()[0] == "tf32"
    with exact_float32():
        assert in_effect() == EXACT
    assert in_effect()[0] == "tf32"


def test_a_run_that_fails_leaves_settings_as_they_were(tiny, monkeypatch):
    before = in_effect()

    def fail(*_args, **_kwargs):
        assert in_effect() == EXACT
        raise RuntimeError("no")

    monkeypatch.setattr("lowvram.encode.conditions.encode_text", fail)
    frames = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu").stream(tiny.request())
    with pytest.raises(RuntimeError, match="no"):
        next(frames)
    assert in_effect() == before


def test_two_runs_in_two_threads_end_in_any_order():
    before = in_effect()
    entered, may_leave = threading.Event(), threading.Event()
    late: list[object] = []

    def other() -> None:
        with exact_float32():
            entered.set()
            may_leave.wait(10)
            late.extend(in_effect())

    thread = threading.Thread(target=other)
    with exact_float32():
        thread.start()
        assert entered.wait(10)
    assert in_effect() == EXACT  # the other one is still in
    may_leave.set()
    thread.join(10)
    assert late == EXACT
    assert in_effect() == before


WALK = """
    import itertools, random, warnings
    import torch
    from lowvram.precision import exact_float32

    warnings.simplefilter("ignore")
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    KEYS = [(b, o) for b in ("cuda", "mkldnn") for o in ("all", "conv", "matmul", "rnn")]

    def asked(question):
        try:
            return question()
        except RuntimeError:
            return "contradicts"

    def everything():
        "All that can be seen of the settings, also what would be inherited."
        generic, seen = get("generic", "all"), []
        old = (torch._C._get_cudnn_allow_tf32, torch._C._get_cublas_allow_tf32, torch.get_float32_matmul_precision)
        for above in (generic, "none", "ieee", "tf32", "bf16"):
            put("generic", "all", above)
            seen.append([get(*key) for key in KEYS] + [asked(question) for question in old])
        put("generic", "all", generic)
        return seen, generic, torch._C._get_cublas_allow_bf16_reduced_precision_reduction()

    matmul = torch.backends.cuda.matmul
    settings = [lambda k=k, v=v: put(*k, v) for k in [*KEYS, ("generic", "all")] for v in ("none", "ieee", "tf32")]
    settings += [lambda v=v: put("mkldnn", "matmul", v) for v in ("bf16", "tf32", "none")]
    settings += [lambda v=v: torch.set_float32_matmul_precision(v) for v in ("highest", "high", "medium")] * 3
    settings += [lambda v=v: setattr(torch.backends.cudnn, "allow_tf32", v) for v in (True, False)] * 3
    settings += [lambda v=v: setattr(matmul, "allow_tf32", v) for v in (True, False)] * 2
    settings += [lambda v=v: setattr(matmul, "allow_bf16_reduced_precision_reduction", v)
                 for v in ((True, True), (False, True), (False, False))]
    dice = random.Random(3)
    for number in range(300):
        before = everything()
        with exact_float32():
            assert all(get(*key) == "ieee" for key in KEYS), number
            assert torch.get_float32_matmul_precision() == "highest", number
            assert torch.backends.cuda.matmul.allow_tf32 is False, number  # PyTorch's profiler asks it
            assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
        assert everything() == before, (number, before, everything())
        dice.choice(settings)()
    print("as before")
"""


def test_whatever_was_set_in_either_way_is_set_back():
    """300 settings in a row, of the newer and of the older switches, beginning with what PyTorch begins with."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WALK)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "as before\n", done.stderr
