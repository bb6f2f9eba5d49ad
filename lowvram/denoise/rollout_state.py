"""State of a rollout between two blocks: what another one, in another process too, goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from lowvram.denoise.rollout import Rollout
from lowvram_kernels.errors import ConfigError

Tensor = torch.Tensor


def state_of(rollout: Rollout) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What a later rollout of the same settings goes on from, in parts by name: sink and rings, uint8, as they lie.

    Raises:
        RuntimeError: a block is under way.
    """
    if under_way := list(rollout.latents()):
        raise RuntimeError(f"blocks {under_way} are under way; expected all that began to be finished")
    yield "sink", {"sink": rollout.sink.content}
    for layer in range(rollout.layers.count):
        cells = ((step, layer) for step in rollout.steps)
        yield f"rings.{layer}", {f"step.{step}": rollout.rings.content((step, layer)) for step, layer in cells}


def restore(rollout: Rollout, part: Callable[[str], Mapping[str, Tensor]], filled_from: tuple[Tensor, Tensor]) -> None:
    """Let ``rollout`` go on from a state, of which ``part`` gives the parts by their names; ``filled_from`` are
    reference and motion latents that the sink was filled from.

    Raises:
        ConfigError: keys and values are kept otherwise here.
    """
    rollout.filled_from = filled_from
    _copy(part("sink")["sink"], rollout.sink.content)
    for layer in range(rollout.layers.count):
        found = part(f"rings.{layer}")
        for step in rollout.steps:
            _copy(found[f"step.{step}"], rollout.rings.content((step, layer)))


def _copy(kept: Tensor, there: Tensor) -> None:
    if there.shape != kept.shape:
        raise ConfigError(
            f"keys and values of the state have {kept.nbytes} bytes, and here {there.nbytes}: it was made with another "
            "--kv or --dtype; give those of before"
        )
    there.copy_(kept)
