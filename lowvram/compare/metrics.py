"""How far one result is from another: tensors by relative error and cosine, frames by PSNR and SSIM.

The baseline is always the second argument.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from lowvram.media.talking import LUMA
from lowvram_kernels.errors import InputError

Tensor = torch.Tensor
Frame = NDArray[np.uint8]

PEAK = 255.0
_MOVING_SHARE = 0.1
# The Gaussian window of the paper that defines SSIM (Wang et al. 2004): sigma 1.5, 11 px wide.
_SSIM_SIGMA = 1.5
_SSIM_WINDOW_PX = 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorScore:
    """``relative_error`` = |a - b| / |b| in the Euclidean norm, ``cosine`` = a . b / (|a| |b|)."""

    name: str
    relative_error: float
    cosine: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameScore:
    """One frame: ``psnr`` in dB at 8 bits, infinite where the frames are identical; ``ssim`` up to 1; ``moving_psnr``
    of the pixels that move most in the baseline (``moving_pixels``); ``flicker``, by how many of 255 levels the
    difference of the two changes from the frame before to this one, on average: an error that stands still has none."""

    index: int
    time_s: float
    psnr: float
    ssim: float
    moving_psnr: float
    flicker: float


def pixels_of(frames_CFHW: Tensor) -> NDArray[np.uint8]:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3], as a video has them."""
    scaled = frames_CFHW.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    found: NDArray[np.uint8] = scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return found


def moving_pixels(frames: Iterable[Frame]) -> NDArray[np.bool_]:
    """Which pixels [H, W] move most over frames uint8 [H, W, 3]: the tenth whose luma varies most; all, where nothing
    moves. Of a talking portrait that is the mouth, with the eyes, and no detector of faces has to find it."""
    mean = squares = np.zeros(())
    for count, frame in enumerate(frames, 1):  # Welford's sums, so that no frame has to be kept
        luma = frame.astype(np.float64) @ LUMA
        far = luma - mean
        mean = mean + far / count
        squares = squares + far * (luma - mean)
    found: NDArray[np.bool_] = (squares >= np.quantile(squares, 1 - _MOVING_SHARE)) & (squares > 0)
    return found if found.any() else np.ones_like(found)


class TensorSums:
    """Sums in float64 over pieces of a pair of tensors, so that neither has to be in memory as a whole."""

    def __init__(self) -> None:
        self._aa = self._bb = self._ab = self._dd = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a piece, both of the same shape.

        Raises:
            ValueError: a piece holds NaN or infinity, of which nothing can be said.
        """
        a, b = a.reshape(-1).double(), b.reshape(-1).double()
        difference = a - b
        self._aa += float(a @ a)
        self._bb += float(b @ b)
        self._ab += float(a @ b)
        self._dd += float(difference @ difference)
        if not math.isfinite(self._aa + self._bb):
            raise ValueError("a tensor holds NaN or infinity")

    def merge(self, other: TensorSums) -> None:
        self._aa += other._aa
        self._bb += other._bb
        self._ab += other._ab
        self._dd += other._dd

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """All that is known, which can be added to that of other sums; see ``of``."""
        return self._aa, self._bb, self._ab, self._dd

    @classmethod
    def of(cls, parts: Iterable[float]) -> TensorSums:
        """Sums with these ``parts``."""
        sums = cls()
        sums._aa, sums._bb, sums._ab, sums._dd = (float(part) for part in parts)
        return sums

    def score(self, name: str) -> TensorScore:
        """Against a baseline of zeros the error is 0 for zeros and infinite for all else."""
        if self._dd == 0:
            return TensorScore(name=name, relative_error=0.0, cosine=1.0)
        error = math.sqrt(self._dd / self._bb) if self._bb else math.inf
        norms = math.sqrt(self._aa) * math.sqrt(self._bb)
        # Rounding may carry a quotient beyond 1 by a few last bits.
        cosine = max(-1.0, min(1.0, self._ab / norms)) if norms else 0.0
        return TensorScore(name=name, relative_error=error, cosine=cosine)


def psnr(a: Frame, b: Frame, where: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two frames uint8 [H, W, 3], or of as many [..., H, W, 3] taken together, of
    all pixels or ``where`` [H, W]; infinite for identical ones."""
    squares = np.square(a.astype(np.float64) - b.astype(np.float64))
    error = np.mean(squares if where is None else squares[..., where, :])
    return 10.0 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(a: Frame, b: Frame) -> float:
    """Structural similarity of two frames uint8 [H, W, 3]: Gaussian window, mean of the three channels.

    Raises:
        InputError: frames smaller than the window.
    """
    if min(a.shape[:2]) < _SSIM_WINDOW_PX:
        raise InputError(f"frames are {a.shape[1]}x{a.shape[0]}; SSIM needs {_SSIM_WINDOW_PX} px each way at least")
    return float(
        structural_similarity(
            a,
            b,
            channel_axis=2,
            data_range=PEAK,
            gaussian_weights=True,
            sigma=_SSIM_SIGMA,
            use_sample_covariance=False,
        )
    )


class FrameScorer:
    """Scores frames one after the other, against ``moving`` pixels [H, W] of the baseline."""

    def __init__(self, fps: float, moving: NDArray[np.bool_]):
        self._fps, self._moving = fps, moving
        self._index = 0
        self._before: NDArray[np.int16] | None = None

    def score(self, a: Frame, b: Frame) -> FrameScore:
        """The next frame of both, uint8 [H, W, 3]."""
        index, difference = self._index, a.astype(np.int16) - b
        before = difference if self._before is None else self._before
        self._index, self._before = index + 1, difference
        same = not difference.any()
        return FrameScore(
            index=index,
            time_s=index / self._fps,
            psnr=math.inf if same else psnr(a, b),
            ssim=1.0 if same else ssim(a, b),
            moving_psnr=math.inf if same else psnr(a, b, self._moving),
            flicker=float(np.abs(difference - before).mean()),
        )


def mean_psnr(values: Iterable[float]) -> float:
    """Mean in dB over the frames that differ, as identical ones have no finite value; infinite where none differs."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf
