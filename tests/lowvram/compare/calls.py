"""The commands that record and score, called as from a shell."""

from __future__ import annotations

from click.testing import CliRunner

from lowvram.cli import main

PROMPT = "A person speaks"
SETTINGS = ["--size", "128*128", "--infer_frames", "16", "--num_clip", "2", "--sample_steps", "2", "--base_seed", "7"]
RUNS = ["--device", "cpu", "--no-selftest"]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(done, *parts):
    assert done.exit_code == 2, (done.output, done.exception)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("lowvram: error: ")]
    assert all(part in said for part in parts), said


def record(tiny, out, *more, image=None, audio=None, prompt=PROMPT):
    inputs = ["--image", image or tiny.portrait, "--audio", audio or tiny.voice, "--prompt", prompt]
    return run("compare", "record", "--model", tiny.artifact("fp32"), *inputs, "--out", out, *more)


def there(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"mine")
    return folder


def score(reference, model, *more):
    return run("compare", "--reference", reference, "--model", model, *RUNS, *more)
