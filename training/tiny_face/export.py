"""Trained parts to the files that the package carries: ``python -m training.tiny_face.export --out FOLDER``.

The LoRA takes the largest singular directions of every layer that it is on, and the base keeps the rest: merged they
are what was trained, and a base without its LoRA is not half as good.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowvram_models.dit import CausalDiT
from lowvram_models.names import vae_names
from lowvram_quantize import trained
from lowvram_quantize.lora import DEFAULT_ALPHA
from lowvram_quantize.presets import dit_config
from lowvram_quantize.slabs import sha256_file
from lowvram_quantize.synthetic import LORA_SUFFIXES
from lowvram_quantize.synthetic_encoders import vae_shapes
from training.tiny_face import latents
from training.tiny_face.run import machine
from training.tiny_face.shapes import SETTINGS, new_dit, text_tensors
from training.tiny_face.train_ears import Ears, published
from training.tiny_face.vae import BASE_DIM, TrainableVAE

RANK = 8
HERE = Path(__file__).parents[2] / "models" / trained.FOLDER
TRAININGS = ("ears", "vae", "dit")

Tensors = dict[str, Tensor]


def split_lora(dit: CausalDiT, rank: int = RANK) -> tuple[Tensors, Tensors]:
    """(base, LoRA), bfloat16, under the published names; ``base + alpha / rank * B @ A`` is the trained weight."""
    base = {name: tensor.detach().float() for name, tensor in dit.state_dict().items()}
    lora: Tensors = {}
    factor = DEFAULT_ALPHA / rank
    for name, layer in dit.named_modules():
        if not isinstance(layer, nn.Linear) or not f".{name}".endswith(tuple(f".{last}" for last in LORA_SUFFIXES)):
            continue
        weight = base[f"{name}.weight"]
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        root = sizes[:rank].sqrt()
        up, down = (left[:, :rank] * root / factor).bfloat16(), (root[:, None] * right[:rank]).bfloat16()
        lora[f"{name}.lora_A.default.weight"] = down.contiguous()
        lora[f"{name}.lora_B.default.weight"] = up.contiguous()
        base[f"{name}.weight"] = weight - factor * up.float() @ down.float()
    return {name: tensor.bfloat16().contiguous() for name, tensor in base.items()}, lora


def vae_tensors(vae: TrainableVAE) -> Tensors:
    """Under the published names, float16."""
    state = vae.vae.state_dict()
    names = vae_names(vae_shapes(BASE_DIM))
    return {name: state[ours].detach().half().contiguous() for name, ours in names.items()}


def write(folder: Path, *, dit: CausalDiT, vae: TrainableVAE, ears: Ears, settings: dict[str, Any]) -> None:
    """Write the package's files and their manifest; the VAE's latents are on the published scale."""
    folder.mkdir(parents=True, exist_ok=True)
    base, lora = split_lora(dit)
    audio = published(ears)
    audio.config.architectures = [type(audio).__name__]
    parts = {
        trained.DIT: base,
        trained.LORA: lora,
        trained.VAE: vae_tensors(vae),
        trained.TEXT: text_tensors(),
        trained.AUDIO: {name: t.detach().half().contiguous() for name, t in audio.state_dict().items()},
    }
    files = {}
    for name, tensors in parts.items():
        save_file(tensors, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)  # the library writes files that only their owner may read
        files[name] = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    config = json.loads(audio.config.to_json_string(use_diff=False))
    manifest = {"files": files, "dit": dit_config(settings), "wav2vec2": config}
    (folder / trained.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def logs(root: Path) -> dict[str, Any]:
    """What the trainings' logs say: machine, hours, steps, and a line now and then of each."""
    found: dict[str, Any] = {"machine": machine()}
    for name in TRAININGS:
        lines = [json.loads(line) for line in (root / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        every = max(1, len(lines) // 30)
        last = lines[-1]
        hours = {key: round(last[f"{key}_s"] / 3600, 3) for key in ("cpu", "wall")}
        found[name] = {"steps": last["step"], "hours": hours, "lines": [*lines[:-1:every], last]}
    return found


def from_folder(root: Path, to: Path, settings: dict[str, Any] | None = None) -> None:
    """Write the package's files and the log from the trainings in ``root``; ``settings``: of its DiT, if not
    ``SETTINGS``."""
    settings = settings or SETTINGS
    dit = new_dit(settings)
    dit.load_state_dict(torch.load(root / "dit" / "state.pt", weights_only=True)["parts"]["dit"])
    write(to, dit=dit, vae=latents.load_vae(root), ears=latents.load_ears(root), settings=settings)
    (to / "training_log.json").write_text(json.dumps(logs(root), indent=1) + "\n", encoding="utf-8")
    print(sum(file.stat().st_size for file in to.glob("*.safetensors")), "bytes of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the trainings' folder")
    parser.add_argument("--to", type=Path, default=HERE)
    given = parser.parse_args()
    from_folder(given.out, given.to)


if __name__ == "__main__":
    main()
