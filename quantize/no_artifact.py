"""No artifact: what was given in place of one, and what makes one of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.absent import absent, is_there
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.lora_alpha import ADAPTER_CONFIG
from lowvram_quantize.recognise import parts_of, said
from lowvram_quantize.source import BASE_FOLDER, DIT_STEM, TEXT_ENCODER_FILE, VAE_FILE
from lowvram_quantize.strange import UNFINISHED, refuse_strange
from lowvram_quantize.tables import INDEX_SUFFIX, open_table

_WEIGHTS = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
# Of these the names of tensors can be had without the tensors.
_READ = (".safetensors", ".sft", ".gguf")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".zst", ".xz", ".bz2")
_OWN = ("dit.safetensors", "vae.safetensors", "text_encoder.safetensors")
_EXPECTED = "expected the folder that lowvram convert makes"
_PARTS = {"dit": "--dit-file", "vae": "--vae-file", "text_encoder": "--text-encoder-file"}


def why_no_artifact(path: Path) -> str:
    """A message: what ``path``, in which no manifest lies, is, and what to do."""
    try:
        if not is_there(path):
            return f"{path} {_unfinished(path) or absent(path)}; {_EXPECTED}"
        return f"{path} is {_folder(path) if path.is_dir() else _file(path)}"
    except OSError as error:
        return f"{path!s:.200} cannot be looked at ({error.strerror}); check its name and permissions, {_EXPECTED}"


def _unfinished(path: Path) -> str:
    """Where convert was on the way to that place."""
    if not path.with_name(f"{path.name}.partial").is_dir():
        return ""
    return (
        f"is not finished ({path.name}.partial is what it has so far); run the same convert again, which goes on there"
    )


def _file(path: Path) -> str:
    above = next((folder for folder in path.absolute().parents if (folder / MANIFEST).is_file()), None)
    if above is not None:
        return f"a file of the artifact {above}; give that folder"
    if path.suffix.lower() in _ARCHIVES:
        return f"an archive; unpack it and give the folder in it, {_EXPECTED}"
    if path.suffix.lower() not in _WEIGHTS:
        return f"a file, and no artifact; {_EXPECTED}"
    try:
        refuse_strange(path)
        parts = parts_of(open_table(path)) if path.suffix.lower() in _READ else []
    except CheckpointError as error:
        return f"a file, and no artifact ({error}); {_EXPECTED}"
    kinds = {part.kind for part in parts}
    option = next((option for kind, option in _PARTS.items() if kind in kinds), None)
    if "lora" in kinds:
        how = f"merge it: lowvram convert --ckpt-dir {BASE_FOLDER} --lora {path} --out DIR"
    elif option is not None:
        how = f"convert it with the other parts: lowvram convert --ckpt-dir DIR {option} {path} --out DIR"
    else:
        how = "make one with lowvram convert"
    return f"a file{f' of {said(parts)}' if parts else ' of weights'}, and no artifact; {_EXPECTED}: {how}"


def _folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return f"an empty folder, and no artifact: it has no {MANIFEST}; {_EXPECTED}"
    if path.name.endswith(".partial") and any(name.endswith(".journal") for name in names):
        return "what an unfinished convert has made so far; run the same convert again, which goes on there"
    inside = [entry.parent for entry in islice(_manifests(path), 4)]
    if inside:
        which = "that" if len(inside) == 1 else "one of them"
        return f"no artifact, but holds {', '.join(map(str, inside))}; give {which}"
    if any(name in names for name in _OWN):
        return f"no artifact without its {MANIFEST}, copied in part perhaps; copy it whole, or lowvram convert again"
    convert = f"make an artifact of it: lowvram convert --ckpt-dir {path} --out DIR, then give DIR"
    if (what := _checkpoint(path, names)) is not None:
        return f"{what}, and no artifact: it has no {MANIFEST}; {convert}"
    if under_way := [name for name in names if name.endswith(UNFINISHED) and (path / name).is_file()]:
        return f"an unfinished download ({_some(under_way)}), and no artifact; let it finish, then {convert}"
    weights = [name for name in names if name.lower().endswith(_WEIGHTS)]
    if ADAPTER_CONFIG in names or "liveavatar.safetensors" in names:
        merge = f"lowvram convert --ckpt-dir {BASE_FOLDER} --lora {path} --out DIR"
        return f"a folder with a LoRA, and no artifact; merge it: {merge}, then give DIR"
    if weights:
        return f"a folder of weights ({_some(weights)}), and no artifact: it has no {MANIFEST}; {convert}"
    return f"no artifact: it has no {MANIFEST}, but {_some(names)}; {_EXPECTED}"


def _manifests(path: Path) -> Iterator[Path]:
    """Of artifacts one and two folders down."""
    for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}"):
        yield from (
            found for found in sorted(path.glob(pattern)) if any((found.parent / name).exists() for name in _OWN)
        )


def _checkpoint(path: Path, names: list[str]) -> str | None:
    """A layout that models are published in."""
    if "model_index.json" in names:
        return "a model in diffusers' layout"
    if "snapshots" in names or any(name.startswith("models--") for name in names):
        return "a Hugging Face cache"
    published = (VAE_FILE, TEXT_ENCODER_FILE, f"{DIT_STEM}{INDEX_SUFFIX}", BASE_FOLDER)
    if any(name in names for name in published) or any(name.startswith(DIT_STEM) for name in names):
        return "a published checkpoint"
    if any((path / name / "diffusion_models").is_dir() for name in (".", "models")) or "unet" in names:
        return "a folder of models as ComfyUI has them"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
