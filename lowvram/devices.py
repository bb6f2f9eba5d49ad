"""Names of devices and dtypes, as options give them."""

from __future__ import annotations

import torch

from lowvram_kernels.errors import ConfigError, HardwareError


def choose_device(name: str) -> torch.device:
    """Raises: HardwareError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HardwareError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise HardwareError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HardwareError(f"--device is {name!r}, but {torch.cuda.device_count()} CUDA devices are here; try cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of everything that is not 8-bit: bfloat16 on GPUs; float32 on CPUs, most of which compute bf16 slower."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"--dtype is {name!r}; expected auto, float32 or bfloat16")
    return known[name]
