"""Errors of the DiT's Linears at their outputs, in the form that an artifact stores them in and in others.

First the artifact makes a few blocks of a video as ``infer`` does, layers streamed where they do not fit, and of what
every Linear is given some hundred rows are kept on the host. Then, Linear by Linear, the product of these rows with the
full-precision weight is compared with what is made of it in 8 bit, activations quantized too. One full-precision weight
is there at a time, and never a second model.

For whoever chooses a precision for each layer:

>>> source = original_of("ckpt/Wan2.2-S2V-14B", lora=lora)   # lowvram_quantize.original; or whatever is a ``Source``
>>> found = measure(Artifact.open(path), source, inputs, schemes=("int8", "fp8", "bf16"))
>>> one = found["blocks.0.ffn.2.weight"]
>>> one.error_energy["int8"], one.error_energy["fp8"], one.output_energy, math.prod(one.shape)

Energies are sums of squares over the same rows and all outputs, so that those of one Linear can be compared with each
other, and their ratio is a squared relative error: ``one.relative_error("int8")``. The artifact may be of any
precision, also a mixed one: it decides what the inputs are. Shapes: M rows, K input and N output channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from lowvram.calibrate.activations import Activations, Watched
from lowvram.calibrate.observe import observe, watchable
from lowvram.devices import choose_device, computing_on
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline, Inputs, Request
from lowvram.progress import BlockProgress
from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rows import quantize_rows
from lowvram_models.names import dit_slab
from lowvram_quantize.format import SMOOTH_SCALE, Artifact, Component

Tensor = torch.Tensor
STORED = "stored"
SCHEMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


class Source(Protocol):
    """What an artifact was made from."""

    def merged(self, name: str) -> Tensor:
        """The tensor of the DiT called ``name`` in full precision, LoRAs merged: float32, in its own shape."""
        ...

    def int8(self, name: str) -> tuple[int, Tensor | None]:
        """How ``convert`` prepares that weight for int8: how many input channels it rotates together, and the factors
        [K] that it divides them by before; None where it does not."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearError:
    """One Linear: its weight's ``shape`` [N, K], how many ``rows`` were multiplied, the squared norm of what the
    full-precision weight gives (bias included), and by scheme that of the difference from it; ``"stored"`` is the form
    that the artifact has it in, ``scheme`` that form's name. ``channel_rms`` [K]: the root mean square of each input
    channel."""

    shape: tuple[int, int]
    scheme: str
    rows: int
    output_energy: float
    error_energy: dict[str, float]
    activations: Activations
    channel_rms: Tensor

    def relative_error(self, scheme: str = STORED) -> float:
        """Norm of the difference over the norm of the output; infinite where that is zero and the difference is not."""
        error = self.error_energy[scheme]
        return math.sqrt(error / self.output_energy) if self.output_energy else (math.inf if error else 0.0)


def measure(
    artifact: Artifact,
    source: Source,
    inputs: Request | Inputs,
    *,
    schemes: Sequence[str] = ("int8", "fp8"),
    device: str = "auto",
    memory: MemoryOptions | None = None,
    quiet: bool = False,
) -> dict[str, LinearError]:
    """Run the artifact on ``inputs``, as a whole, and measure every Linear of the DiT's layers and of its audio
    injection: by its weight's name, in the model's order.

    Args:
        source: the full-precision weights; those that the artifact was made from.
        inputs: what to make; a block or two are enough.
        schemes: beside the stored form: "int8" (smoothed and rotated as ``source`` says), "fp8", "bf16".
        device: auto, cpu, cuda or cuda:N; what fits is planned as for ``infer``, within the budgets of ``memory``.
        quiet: show no progress on stderr.

    Raises:
        ConfigError: a scheme that is not known.
        CheckpointError: the artifact lacks a component, the source's tensors are of other shapes, or activations are
            NaN or infinite.
        InputError: a portrait or voice that cannot be used.
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    if strange := sorted(set(schemes) - set(SCHEMES)):
        raise ConfigError(f"schemes are {', '.join(schemes)}; {strange[0]} is none of {', '.join(SCHEMES)}")
    if artifact.shape_values is not None:
        raise CheckpointError(
            f"{artifact.path} is a shape artifact ({artifact.shape_values}), which has no weights to measure; convert "
            "a checkpoint"
        )
    where = choose_device(device)
    watched = observe(AvatarPipeline(artifact, where, memory=memory), inputs, quiet=quiet)
    component, found = artifact.component("dit"), dict[str, LinearError]()
    with (
        BlockProgress("measuring", len(watched), where, enabled=not quiet, units="Linears") as bar,
        computing_on(where),
        torch.inference_mode(),
    ):
        for name in watchable(component):
            found[name] = _measured(name, watched.pop(name), _Stored(component, name), source, schemes, where)
            bar.update(len(found))
    return found


class _Stored:
    """A Linear as the artifact has it, mapped."""

    def __init__(self, component: Component, name: str):
        self.scheme, self.group = component.tensor_scheme(name), component.tensor_group(name)
        stem, slab = name.removesuffix("weight"), dit_slab(name, component.config["audio_inject_layers"])
        views = component.views(slab, component.read_slab(slab))
        self.weight, self.bias = views[name], views[f"{stem}bias"]
        self.scale, self.smooth = views.get(f"{name}_scale"), views.get(f"{stem}{SMOOTH_SCALE}")

    def product(self, x_MK: Tensor) -> Tensor:
        weight, bias = self.weight.to(x_MK.device), self.bias.to(x_MK)
        if self.scale is None:
            return F.linear(x_MK, weight.to(x_MK), bias)
        smooth = None if self.smooth is None else self.smooth.to(x_MK.device)
        return linear_w8a8(x_MK, weight, self.scale.to(x_MK.device), bias, group=self.group, smooth_K=smooth)


def _measured(
    name: str,
    watched: Watched,
    stored: _Stored,
    source: Source,
    schemes: Sequence[str],
    where: torch.device,
) -> LinearError:
    activations = watched.statistics(name)
    weight, bias = source.merged(name), source.merged(f"{name.removesuffix('weight')}bias")
    if weight.shape != stored.weight.shape:
        raise CheckpointError(
            f"{name} is {list(stored.weight.shape)} in the artifact and {list(weight.shape)} in the source; expected "
            "the checkpoint that it was converted from"
        )
    x, weight, bias = watched.rows().to(where, torch.float32), weight.to(where), bias.to(where)
    exact = F.linear(x, weight, bias)
    wrong = {STORED: _energy(stored.product(x) - exact)}
    for scheme in schemes:
        prepared = source.int8(name) if scheme == "int8" else (1, None)
        wrong[scheme] = _energy(_product(x, weight, bias, SCHEMES[scheme], *prepared) - exact)
    return LinearError(
        shape=(weight.shape[0], weight.shape[1]),
        scheme=stored.scheme,
        rows=len(x),
        output_energy=_energy(exact),
        error_energy=wrong,
        activations=activations,
        channel_rms=watched.channel_rms(),
    )


def _product(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor, dtype: torch.dtype, group: int, factors_K: Tensor | None
) -> Tensor:
    """What a weight gives that is stored as ``convert`` does it, but for the order of two roundings."""
    if dtype is torch.bfloat16:
        return F.linear(x_MK, weight_NK.to(dtype).float(), bias_N)
    smooth = None if factors_K is None else factors_K.to(x_MK)
    q, scale = quantize_rows(weight_NK if smooth is None else weight_NK / smooth, dtype, group=group)
    return linear_w8a8(x_MK, q, scale[:, 0], bias_N, group=group, smooth_K=smooth)


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())
