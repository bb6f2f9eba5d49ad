"""Command ``join``: segments of a take into one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lowvram.media.join import join
from lowvram.outputs import Outputs
from lowvram_kernels.errors import OutputError
from lowvram_quantize.places import real


def join_as_asked(segments: Sequence[Path], out: Path, *, overwrite: bool, unfinished: bool) -> Path:
    """Join, under another name until it is whole; what cannot be made whole leaves nothing. Returns ``out``.

    Raises:
        InputError: segments that cannot be joined, or ``out`` is one of them, or cannot be.
        OutputError: it cannot be written.
    """
    outputs = Outputs(video=out, overwrite=overwrite)
    outputs.check({f"segment {place}": path for place, path in enumerate(segments, 1)})
    with outputs.claimed("lowvram join"):
        partial = outputs.partial
        try:
            join(segments, partial, unfinished=unfinished)
            os.replace(partial, real(out))
        except OSError as error:
            raise OutputError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error
        finally:
            partial.unlink(missing_ok=True)
    return out
