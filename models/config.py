"""Configuration of the DiT as the published ``config.json`` states it, validated once."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowvram_models.constants import LATENT_CHANNELS

# What the published file may state but only one value of which is implemented: anything else would compute
# something different from what the checkpoint was trained for, so it is refused.
_FIXED: dict[str, Any] = {
    "cross_attn_type": "t2v_cross_attn",
    "num_audio_token": 4,
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "add_last_motion": True,
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
    "model_type": "s2v",
    "patch_size": [1, 2, 2],
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
}
_WITHOUT_EFFECT = ("motion_token_num", "zero_init")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shapes of the causal S2V DiT. Widths and lengths are counts of channels and tokens."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int
    text_len: int
    audio_dim: int
    audio_inject_layers: tuple[int, ...]
    in_dim: int = LATENT_CHANNELS
    out_dim: int = LATENT_CHANNELS
    cond_dim: int = LATENT_CHANNELS
    text_dim: int = 4096
    eps: float = 1e-6
    audio_layers: int = 25

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"DiT config has dim {self.dim} and num_heads {self.num_heads}; dim must be num_heads times an even "
                "head width of at least 6"
            )
        if self.dim % 4:
            raise ValueError(f"DiT config has dim {self.dim}; the audio encoder needs a multiple of 4")
        beyond = [i for i in self.audio_inject_layers if not 0 <= i < self.num_layers]
        if beyond or len(set(self.audio_inject_layers)) != len(self.audio_inject_layers):
            raise ValueError(
                f"DiT config lists audio_inject_layers {list(self.audio_inject_layers)}; expected different layers "
                f"from 0 to {self.num_layers - 1}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiTConfig:
        """Read the published ``config.json``'s dictionary.

        Raises:
            ValueError: a field is unknown, is missing, or asks for something that is not implemented.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"audio_layers"}
        given = {k: v for k, v in values.items() if not k.startswith("_") and k not in _WITHOUT_EFFECT}
        for name, expected in _FIXED.items():
            got = given.pop(name, expected)
            if (list(got) if isinstance(got, tuple) else got) != expected:
                raise ValueError(f"DiT config has {name} = {got!r}; only {expected!r} is implemented")
        if unknown := sorted(set(given) - known):
            raise ValueError(f"DiT config has unknown fields {unknown}; known are {sorted(known | set(_FIXED))}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(given)):
            raise ValueError(f"DiT config lacks the fields {missing}; is it the config.json of Wan2.2-S2V-14B?")
        for name, value in given.items():
            _check_type(name, value)
        given["audio_inject_layers"] = tuple(given["audio_inject_layers"])
        return cls(**given)


def _check_type(name: str, value: Any) -> None:
    if name == "audio_inject_layers":
        ok = isinstance(value, (list, tuple)) and all(isinstance(i, int) for i in value)
    elif name == "eps":
        ok = isinstance(value, float) and value > 0
    else:
        ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not ok:
        raise ValueError(f"DiT config has {name} = {value!r}, which is not a usable value for it")
