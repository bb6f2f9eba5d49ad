"""Placement of a run's weights and rings, how many steps go through a layer together, and what a user asks of both.

The planner decides it, the runtime obeys it. Nothing here changes what is computed, except ``kv``.
"""

from __future__ import annotations

import dataclasses
import logging

from lowvram_kernels.errors import ConfigError

log = logging.getLogger(__name__)

KV_SCHEMES = ("plain", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """One way to lay a rollout out over device and host.

    ``streamed_layers``: layers whose weights stay on the host and are copied into one of ``weight_slots`` staging
    slots before they run. ``host_rings``: (step, layer) pairs whose KV ring stays on the host and is copied into one
    of ``ring_slots`` staging slots. ``kv`` "plain" keeps keys and values in the dtype that is computed in, "int8"
    in 8 bit with a scale a token and head. ``wave``: steps of different blocks that go through a layer together.
    ``text_on_host``: the text encoder computes on the host, which was asked for, or the device is too small for it.
    ``wide_vae``: the 8-bit weights of the VAE's decoder are widened once, as it is loaded, and not at every use.
    ``later_text_on_host``: the text encoder computes on the host once weights of an earlier video lie on the device.
    """

    streamed_layers: tuple[int, ...] = ()
    host_rings: tuple[tuple[int, int], ...] = ()
    weight_slots: int = 2
    ring_slots: int = 2
    kv: str = "plain"
    wave: int = 1
    text_on_host: bool = False
    wide_vae: bool = False
    later_text_on_host: bool = False

    def __post_init__(self) -> None:
        if self.kv not in KV_SCHEMES:
            raise ConfigError(f"rings are to be kept as {self.kv!r}; expected {' or '.join(KV_SCHEMES)}")
        if self.wave < 1 or self.weight_slots < 1 or self.ring_slots < 1:
            raise ConfigError(
                f"wave {self.wave}, weight slots {self.weight_slots}, ring slots {self.ring_slots}; expected 1 or more"
            )
        for name in ("streamed_layers", "host_rings"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ConfigError(f"{name} has to be sorted and without repetitions: {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a user asks of the plan, from the command line to the planner; "auto" leaves it to the plan. Validated at
    construction.

    ``kv`` is how rings and sink are kept: auto (int8 where the DiT is 8-bit), int8, or bf16 (which stands for the dtype
    that is computed in, float32 on a CPU). ``wave``: steps of different blocks that share a pass over the layers, 1 to
    the number of steps. ``offload_model``: all layers on the host, ``offload_kv_cache``: all rings. ``cuda_graphs``
    replays layers that stay on the GPU from the third clip on, and takes memory for it; None: where the card was seen
    to replay right, and where that memory moves nothing to the host. ``t5_cpu`` lets the text encoder compute on the
    host, whether or not it fits on the device. ``resident``: weights stay where they are for the next video of the same
    process, whose portrait, voice and prompt are encoded beside them.
    """

    kv: str = "auto"
    wave: int | str = "auto"
    offload_model: bool = False
    offload_kv_cache: bool = False
    cuda_graphs: bool | None = None
    t5_cpu: bool = False
    resident: bool = False

    def __post_init__(self) -> None:
        if self.kv not in ("auto", "int8", "bf16"):
            raise ConfigError(f"--kv is {self.kv!r}; expected auto, int8 or bf16")
        if self.wave != "auto" and not (isinstance(self.wave, int) and self.wave >= 1):
            raise ConfigError(f"--wave is {self.wave!r}; expected auto, or 1 up to the number of steps")
        for name in ("offload_model", "offload_kv_cache"):
            if self.cuda_graphs and getattr(self, name):
                raise ConfigError(
                    f"--cuda-graphs are of layers whose weights and KV rings stay on the GPU, and --{name} takes all "
                    "of them to the host; expected one of both at most"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryOptions(PlanOptions):
    """What a user says of a run's memory. ``vram_budget`` and ``ram_budget`` are bytes, None for what is free.
    ``fallback`` allows to give up speed when memory runs out, ``allow_quality_loss`` also length, size and steps.
    ``placement`` lays a run out by hand, without a plan.
    """

    vram_budget: int | None = None
    ram_budget: int | None = None
    fallback: bool = True
    allow_quality_loss: bool = False
    placement: Placement | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow_quality_loss and not self.fallback:
            raise ConfigError(
                "--allow-quality-loss and --no-fallback contradict each other; expected one of them at most"
            )
        for name in ("vram_budget", "ram_budget"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name} is {value} bytes; expected more than 0")


def placement_on_cpu(options: MemoryOptions, layers: int, steps: range, sample_steps: int) -> Placement:
    """On a CPU host and device are the same memory: nothing is to be planned, and layers and rings that are to be
    offloaded are copied all the same. ``steps`` are those of ``sample_steps`` that run here.

    Raises:
        ConfigError: more steps in a pass than there are.
    """
    if options.vram_budget or options.ram_budget:
        log.warning("--vram-budget and --ram-budget have no effect on a CPU: there is one memory, and it is the host's")
    if isinstance(options.wave, int) and options.wave > sample_steps:
        raise ConfigError(f"--wave is {options.wave}; expected auto, or 1 to the number of steps, {sample_steps}")
    cells = tuple((step, layer) for step in steps for layer in range(layers))
    return Placement(
        streamed_layers=tuple(range(layers)) if options.offload_model else (),
        host_rings=cells if options.offload_kv_cache else (),
        kv="int8" if options.kv == "int8" else "plain",
        wave=1 if isinstance(options.wave, str) else max(1, min(options.wave, len(steps))),
    )
