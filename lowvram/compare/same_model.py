"""Whether two runs are of one model: what differs then is how it was made smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowvram_kernels.errors import InputError
from lowvram_quantize.format import Artifact


def check_model(artifact: Artifact, dit: Mapping[str, Any], name: str) -> None:
    """Compare the config of an artifact's DiT with that of the baseline's, ``dit``; ``name`` says whose it is.

    Raises:
        InputError: they are of different models.
    """
    ours = artifact.component("dit").config
    for key in dict.fromkeys([*ours, *dit]):
        if (here := ours.get(key)) != (there := dit.get(key)):
            raise InputError(
                f"{artifact.path} is of another model than {name}: its DiT's {key} is {here}, the baseline's {there}; "
                "compare artifacts of one checkpoint"
            )
