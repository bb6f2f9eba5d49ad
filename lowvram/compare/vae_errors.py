"""The VAE alone: what a candidate's decoder makes of the baseline's latents, and how a portrait comes back from it.

Nothing of this went through the candidate's DiT, so that what both do to the frames can be told apart.
Shapes: C latent channels, F frames, h x w latent size, H x W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import torch

from lowvram.compare.metrics import mean_psnr, pixels_of, psnr, ssim
from lowvram.compare.sources import BlockDump, Dump, Source
from lowvram.decode import BlockDecoder
from lowvram.devices import choose_dtype, computing_on
from lowvram.loading.encoders import load_vae
from lowvram.pipeline import AvatarPipeline, Request, read_inputs
from lowvram.progress import BlockProgress
from lowvram.schedule import Extent
from lowvram_kernels.errors import InputError
from lowvram_models.constants import FRAMES_PER_LATENT

Tensor = torch.Tensor

VAE_BLOCKS = 4
"""So many of the baseline's blocks are decoded again: two seconds of video."""
_MOTION = "motion_latents"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likeness:
    """Of a picture to another: ``psnr`` in dB at 8 bits, infinite for identical ones, and ``ssim`` up to 1."""

    psnr: float
    ssim: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeErrors:
    """``frames``: each of the first ``blocks`` of ``of_blocks``, as the candidate's decoder makes it of the baseline's
    latents, to what the baseline's made of them. ``portrait`` encoded and decoded to itself, by the candidate's VAE and
    by the baseline's, None where that is not known. ``seconds`` it took, loading with it."""

    frames: tuple[Likeness, ...]
    blocks: int
    of_blocks: int
    portrait: Likeness
    baseline_portrait: Likeness | None
    seconds: float

    @property
    def values(self) -> dict[str, float]:
        """The single figures: mean PSNR of the frames that differ and the worst frame's, mean and worst SSIM, and those
        of the candidate's portrait."""
        ssims = [frame.ssim for frame in self.frames]
        return {
            "vae_psnr": mean_psnr(frame.psnr for frame in self.frames),
            "vae_psnr_min": min(frame.psnr for frame in self.frames),
            "vae_ssim": sum(ssims) / len(ssims),
            "vae_ssim_min": min(ssims),
            "vae_portrait_psnr": self.portrait.psnr,
            "vae_portrait_ssim": self.portrait.ssim,
        }

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def vae_errors(
    candidate: AvatarPipeline,
    baseline: Source,
    request: Request,
    baseline_portrait: Likeness | None,
    *,
    blocks: int = VAE_BLOCKS,
    quiet: bool = False,
) -> VaeErrors | None:
    """Decode the first ``blocks`` of the baseline's latents with the candidate's VAE, and take the portrait of
    ``request`` through it. ``candidate`` has made a video already, whose layout its decoder keeps. None where the
    baseline has kept no latents or no frames.

    Raises:
        InputError: the baseline's latents are not those of ``request``, or the decoder gave NaN or infinity.
        OutOfMemoryError: as of a run's own decoding.
    """
    begin = time.perf_counter()
    dump = baseline.dump
    if dump is None or not (shapes := dump.block_shapes()) or dump.frames() is None or _MOTION not in dump.shapes:
        return None
    with computing_on(candidate.runtime.device):
        frames = _frames(candidate, dump, shapes[:blocks], request, quiet=quiet)
        portrait = portrait_there_and_back(candidate, request)
    return VaeErrors(
        frames=frames,
        blocks=min(blocks, len(shapes)),
        of_blocks=len(shapes),
        portrait=portrait,
        baseline_portrait=baseline_portrait,
        seconds=time.perf_counter() - begin,
    )


def portrait_there_and_back(pipeline: AvatarPipeline, request: Request) -> Likeness:
    """The portrait of ``request``, encoded and decoded by the pipeline's VAE, to itself; on the host where the device
    has no room for it. The pipeline has made a video already.

    Raises:
        InputError: the VAE gave NaN or infinity.
        LowvramError: the portrait cannot be used, or memory ran out.
    """
    runtime, portrait = pipeline.runtime, read_inputs(request).portrait[:, None]
    with computing_on(runtime.device):
        for where, attempt in pipeline.run.ladder.devices("encode_image", runtime.device):
            with attempt, torch.inference_mode():
                vae = load_vae(runtime.artifact, where, choose_dtype(runtime.dtype_name, where))
                back = vae.start_decoder().decode(vae.encode(portrait.to(where)))
    return _likeness(_finite(back, "the portrait"), pixels_of(portrait))[0]


def _frames(
    candidate: AvatarPipeline,
    dump: Dump | BlockDump,
    shapes: list[tuple[int, ...]],
    request: Request,
    *,
    quiet: bool,
) -> tuple[Likeness, ...]:
    count, device = len(shapes), candidate.runtime.device
    extent = Extent.of(FRAMES_PER_LATENT * sum(shape[1] for shape in dump.block_shapes()), request.infer_frames)
    decoder = BlockDecoder(candidate.run, _motion(dump), None)
    found: list[Likeness] = []
    source = dump.frames()
    assert source is not None  # as of the caller
    with (
        BlockProgress("VAE alone", count, device, enabled=not quiet) as progress,
        contextlib.closing(source.source.read()) as theirs,
    ):
        for block, shape in zip(extent.blocks(), shapes, strict=False):
            if block.frames != shape[1]:
                raise InputError(
                    f"{dump.path} has a block of {shape[1]} latent frames, and one of {request.infer_frames} frames a "
                    f"clip has {block.frames} there: they are of different requests; make the baseline's again"
                )
            frames, _ = decoder.decode(block, dump.block(block.index))
            mine = _finite(frames, f"block {block.index}")
            found += _likeness(mine, [next(theirs) for _ in range(mine.shape[1])])
            progress.update(block.index + 1)
    return tuple(found)


def _motion(dump: Dump | BlockDump) -> Tensor:
    """The baseline's motion latents [C, 19, h, w], which both decoders are primed with."""
    shape = dump.shapes[_MOTION]
    return torch.cat(list(dump.pieces(_MOTION)), dim=shape.index(max(shape)))[0]


def _likeness(mine_CFHW: Tensor, theirs: Any) -> list[Likeness]:
    pairs = zip(pixels_of(mine_CFHW), theirs, strict=True)
    return [Likeness(psnr=psnr(ours, other), ssim=ssim(ours, other)) for ours, other in pairs]


def _finite(frames_CFHW: Tensor, what: str) -> Tensor:
    if not frames_CFHW.isfinite().all():
        raise InputError(f"the candidate's VAE makes NaN or infinity of {what}: look at the artifact, or convert again")
    return frames_CFHW
