"""Where the checks of the Triton kernels run: on the CUDA device that is there, otherwise in Triton's interpreter."""

from __future__ import annotations

import os

import torch

from lowvram.selftest.trials import relative_error as relative_error

DEVICE = torch.device(os.environ["LOWVRAM_CHECK_DEVICE"])
FP8_UNITS = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
FP8 = [torch.float8_e4m3fn] if FP8_UNITS else []

if DEVICE.type == "cpu":
    import bounds

    bounds.install()

torch.manual_seed(0)
torch.set_num_threads(1)
