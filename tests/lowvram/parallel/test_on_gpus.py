"""Two cards give what one gives: over NCCL, with streamed layers in one host copy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.golden_cases import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("ulysses_size", [1, 2])
@pytest.mark.parametrize("offload", [False, True])
def test_two_cards_give_what_one_gives(tiny, tmp_path, ulysses_size, offload):
    def latents(name: str, *options: str) -> torch.Tensor:
        files = ("--model", tiny.artifact("bf16"), "--image", tiny.portrait, "--audio", tiny.voice, "--prompt", "A")
        made = ("--out", tmp_path / f"{name}.mp4", "--dump-tensors", tmp_path / f"{name}.safetensors")
        size = ("--size", "128*128", "--infer-frames", "24", "--num-clip", "1", "--dtype", "float32")
        report = tmp_path / f"{name}.json"
        subprocess.run(
            [sys.executable, "-m", "lowvram", "infer", *files, *made, *size, "--report", report, "-q", *options],
            check=True,
            timeout=300,
        )
        assert json.loads(report.read_text())["device"].startswith("cuda")
        return load_file(tmp_path / f"{name}.safetensors")["latents"]

    options = ("--offload-model", "--offload-kv-cache") if offload else ()
    several = latents("several", "--gpus", "2", "--num-gpus-dit", "2", "--ulysses-size", str(ulysses_size), *options)
    assert relative_error(several, latents("one", *options)) < 1e-4
