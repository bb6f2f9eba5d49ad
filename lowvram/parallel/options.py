"""Options of several GPUs, checked before any rank starts."""

from __future__ import annotations

import dataclasses

import torch

from lowvram.devices import cuda_is_here
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.rank_env import RankEnv
from lowvram.planning.rank_layout import LayoutOptions, ParallelLayout, chosen_layout
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.format import Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOptions(LayoutOptions):
    """As they come from the command line; None leaves the choice to ``chosen_layout``."""

    gpus: int | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None and self.gpus < 1:
            raise ConfigError(f"--gpus is {self.gpus}; expected 1 or more")
        if self.port is not None and (self.gpus or 1) < 2:
            raise ConfigError("--port has an effect with --gpus 2 or more only; torchrun has --master-port")

    def layout(self, env: RankEnv | None, artifact: Artifact, sample_steps: int) -> ParallelLayout:
        """The layout of the ranks that were started, or are to be.

        Raises:
            ConfigError: the options do not fit them.
        """
        if env is not None and self.gpus not in (None, env.world_size):
            raise ConfigError(
                f"--gpus is {self.gpus}, but {env.world_size} ranks were started; leave --gpus out{env.hint}"
            )
        if env is not None and self.port not in (None, 0, env.port):
            raise ConfigError(f"--port is {self.port}, but the ranks were told {env.port}; leave --port out{env.hint}")
        world = env.world_size if env else self.gpus or 1
        if env is None and self.gpus is None and (self.num_gpus_dit or 1) + bool(self.enable_vae_parallel) > 1:
            wanted = (self.num_gpus_dit or 1) + bool(self.enable_vae_parallel)
            vae = " and one for the VAE" if self.enable_vae_parallel else ""
            raise ConfigError(
                f"--num_gpus_dit {self.num_gpus_dit or 1}{vae} needs {wanted} ranks, and one was started; add --gpus "
                f"{wanted}, or start them with torchrun --nproc_per_node={wanted} -m lowvram infer ..."
            )
        try:
            return chosen_layout(
                world, self, sample_steps=sample_steps, heads=artifact.component("dit").config["num_heads"]
            )
        except ConfigError as error:
            raise ConfigError(f"{error}{env.hint if env else ''}") from error


def check_for_ranks(layout: ParallelLayout, memory: MemoryOptions) -> None:
    """Raises: ConfigError for an option that means nothing to several ranks."""
    if layout.world_size > 1 and memory.allow_quality_loss:
        raise ConfigError("--allow-quality-loss begins a video again, which several ranks cannot; leave it out")


def check_gpus(device: str, ranks: int) -> None:
    """Raises: ConfigError where fewer GPUs are here than ranks are to be started."""
    if device == "cpu" or (device == "auto" and not cuda_is_here()):
        return
    if (count := torch.cuda.device_count()) < ranks:
        raise ConfigError(f"--gpus is {ranks}, but {count} GPUs are here; give --gpus {max(count, 1)} or --device cpu")
