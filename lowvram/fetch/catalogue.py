"""What can be fetched: repositories and files as Live Avatar's README names them, and no more of them than convert
reads."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A repository, the folder that its files go to, and which they are: all of ``needed``, each a pattern that some
    file fits, and with them those of ``also``, where they are there. ``left_out`` goes before both."""

    repo: str
    folder: str
    needed: tuple[str, ...]
    also: tuple[str, ...] = ("LICENSE*", "README*")
    left_out: tuple[str, ...] = ()

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Those of a repository's files, sorted; of weights that are there as safetensors no other format."""
        every = set(names)
        kept = {name for name in every if _fits(name, (*self.needed, *self.also)) and not _fits(name, self.left_out)}
        doubled = {name for name in kept if name.endswith("pytorch_model.bin") and _as_safetensors(name) in kept}
        return sorted(kept - doubled)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Patterns that none of these files fits."""
        every = list(names)
        return [pattern for pattern in self.needed if not fnmatch.filter(every, pattern)]


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _as_safetensors(name: str) -> str:
    return name.removesuffix("pytorch_model.bin") + "model.safetensors"


LIVE_AVATAR = "live-avatar"
CATALOGUE = {
    LIVE_AVATAR: (
        Source(
            repo="Wan-AI/Wan2.2-S2V-14B",
            folder="Wan2.2-S2V-14B",
            needed=(
                "config.json",
                "diffusion_pytorch_model*.safetensors",
                "models_t5_umt5-xxl-enc-bf16.pth",
                "google/umt5-xxl/tokenizer.json",
                "Wan2.1_VAE.pth",
                "wav2vec2-large-xlsr-53-english/config.json",
                "wav2vec2-large-xlsr-53-english/*",
            ),
            also=("diffusion_pytorch_model*.json", "google/umt5-xxl/*", "LICENSE*", "README*"),
            left_out=("*.msgpack", "wav2vec2-large-xlsr-53-english/language_model/*", "*/.gitattributes"),
        ),
        Source(repo="Quark-Vision/Live-Avatar", folder="LiveAvatar", needed=("liveavatar.safetensors",)),
    )
}
