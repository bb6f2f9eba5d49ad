"""Forms in which options come: cut short, with "=", negative, twice; each is used or answered in one line."""

from __future__ import annotations

import pytest

from tests.lowvram.commands.test_foreign_options import ANSWERED, USED, line, nearly, run

__all__ = ["nearly"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["--sample_st", "4"], "--sample_st: unknown, --sample_steps is known"),
        (["--infer", "48"], "--infer: unknown, --infer_frames is known"),
        (["--ckpt=x"], "--ckpt: unknown, --ckpt_dir is known"),
        (["--num-cl", "1"], "--num-cl: unknown, --num_clip is known"),
        (["--offload"], "--offload: unknown, --offload_kv_cache and --offload_model are known"),
        (["--enable_onl"], "--enable_onl: unknown, --enable_online_decode is known"),
        (["--prompt_extend_t", "zh"], "--prompt_extend_t: unknown, --prompt_extend_target_lang is known"),
        (["--sample_s", "4"], "--sample_s: unknown, --sample_shift and --sample_solver and --sample_steps are known"),
        (["--s", "4"], "--s: unknown, lowvram infer --help"),
        (["-s", "4"], "-s: unknown, lowvram infer --help"),
    ],
)
def test_a_name_cut_short_is_answered_with_the_whole_one(nearly, given, part):
    assert part in line(run(*nearly, "--out", "a.mp4", *given))


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_answered_is_with_an_equals_sign_too(nearly, name):
    value, part = ANSWERED[name]
    said = line(run(*nearly, "--out", "a.mp4", f"--{name}={value or True}"))
    assert part in said
    assert said.startswith(f"--{name}: ")


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_answered_twice_is_answered_once(nearly, name):
    value, part = ANSWERED[name]
    said = line(run(*nearly, "--out", "a.mp4", *[f"--{name}={value or True}"] * 2))
    assert part in said
    assert said.count(f"--{name}: ") == 1


@pytest.mark.parametrize("name", USED)
def test_of_what_is_given_twice_the_last_counts(nearly, name):
    out = [] if name in ("save_file", "save_dir") else ["--out", "a.mp4"]
    first = {"sample_shift": "5", "task": "t2v-A14B", "sample_guide_scale": "4.5", "sample_solver": "euler"}
    given = [f"--{name}={first.get(name, USED[name] or True)}", f"--{name}={USED[name] or True}"]
    assert "gone.png" in line(run(*nearly, *out, *given))


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("--sample_shift", "-1", "trained for 3"),
        ("--sample_guide_scale", "-1", "no guidance"),
        ("--base_seed", "-2", "--base_seed is -2; expected"),
        ("--num_clip", "-1", "--num_clip is -1; expected"),
        ("--audio-start", "-3", "--audio-start is '-3'; expected"),
        ("--audio-duration", "-0.5", "--audio-duration is '-0.5'; expected"),
        ("--infer_frames", "-48", "--infer_frames is -48; expected"),
        ("--base_seed", "-1", "gone.png"),
    ],
)
def test_negative_numbers_are_values(nearly, form, name, value, part):
    assert part in line(run(*nearly, "--out", "a.mp4", *form.format(name, value).split()))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["--num_clip="], "'' is not a valid integer"),
        (["--base_seed", "1e3"], "'1e3' is not a valid integer"),
        (["--overwrite=true"], "does not take a value"),
        (["--no_fallback=True"], "does not take a value"),
        (["--kv", "int4"], "'int4' is not one of"),
        (["--size"], "requires an argument"),
    ],
)
def test_what_no_option_takes_is_one_line(nearly, given, part):
    done = run(*nearly, "--out", "a.mp4", *given)
    assert part in line(done)
    assert "Usage" not in done.stderr
