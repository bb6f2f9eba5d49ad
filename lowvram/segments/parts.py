"""Parts of a rank that make one video, and their state between two blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import TracebackType

import torch

from lowvram.decode import BlockDecoder
from lowvram.denoise.denoiser import Denoiser
from lowvram.denoise.rollout_state import state_of
from lowvram.parallel.team import Chain

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What makes one video: ``denoiser`` and ``chain`` where this rank denoises, ``decoder`` where it decodes. Behind
    what is done with them, what they hold is for a next video; also where nobody wants more of this one."""

    denoiser: Denoiser | None = None
    chain: Chain | None = None
    decoder: BlockDecoder | None = None

    def denoises(self) -> Denoiser:
        if self.denoiser is None:
            raise RuntimeError("nothing is denoised on this rank; expected one that denoises")
        return self.denoiser

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """See ``AvatarPipeline.state``."""
        if self.chain is None or self.decoder is None:
            raise RuntimeError("a part of the video is made on other ranks; expected one rank")
        yield "start", {"reference": self.chain.reference()}
        yield "decoder", self.decoder.state()
        yield from state_of(self.denoises().rollout)

    def __enter__(self) -> None:
        """Nothing is to be begun."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, GeneratorExit):
            for part in (self.decoder, self.denoiser):
                if part is not None:
                    part.end()
