"""Checkpoint, and where its parts lie: in the published folder, in one of repackaged files, or named one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_quantize.absent import absent, is_there
from lowvram_quantize.gguf_parts import part_files
from lowvram_quantize.recognise import FETCH, WANTED, parts_of, said
from lowvram_quantize.source import (
    AUDIO_ENCODER_FOLDER,
    BASE_FOLDER,
    DIT_STEM,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
)
from lowvram_quantize.strange import UNFINISHED
from lowvram_quantize.tables import INDEX_SUFFIX, open_table

_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".sft")
_SHARD = "-of-"
_DEPTH = 3
# Where the tokenizer lies under other names: diffusers' layout, a folder of tokenizers, the folder itself.
_TOKENIZER_FOLDERS = (TOKENIZER_FOLDER, "umt5-xxl", "tokenizer", "tokenizers/umt5-xxl", "")
_OPTIONS = {"dit": "--dit-file", "vae": "--vae-file", "text_encoder": "--text-encoder-file"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """What was named beside, or instead of, a folder."""

    dit: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    audio_encoder: Path | None = None
    tokenizer: Path | None = None

    @classmethod
    def of(cls, *parts: str | Path | None) -> Named:
        """Of ``parts`` in the order of the fields."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: None if part is None else Path(part) for name, part in zip(names, parts, strict=True)})

    @property
    def by_option(self) -> dict[str, Path | None]:
        """The same by the names of the command line."""
        files = {option: getattr(self, kind) for kind, option in _OPTIONS.items()}
        return {**files, "--audio-encoder-dir": self.audio_encoder, "--tokenizer-dir": self.tokenizer}


class Checkpoint:
    """Finds each part when it is asked for: what was named, then the published name, then what a file holds.

    Args:
        folder: the published folder, its parent, a folder of repackaged files, or a Hugging Face cache; None where
            every part is named.
        named: files and folders that go before what lies in ``folder``.

    Raises:
        CheckpointError: the folder is none, or its layout is that of another model.
        ConfigError: nothing was given.
    """

    def __init__(self, folder: Path | None, named: Named):
        files = [path for path in vars(named).values() if path]
        if folder is None and not files:
            raise ConfigError("no checkpoint was given; expected --ckpt-dir, or --dit-file and the like for each part")
        self._named = named
        self._folder = None if folder is None else _published(folder)
        self._held: dict[Path, list[str]] | None = None
        self._notes: list[str] = []
        self.base = self._folder or next(iter(files)).absolute().parent
        """What paths in the manifest start from."""

    def file(self, kind: str) -> Path:
        """The file (or index of shards) of a component: "dit", "vae" or "text_encoder".

        Raises:
            CheckpointError: it is not there, or there are several.
        """
        named = getattr(self._named, kind)
        if named is not None:
            return named if named.is_file() else self._file_in(named, kind)
        if self._folder is None:
            raise CheckpointError(
                f"no file of {WANTED[kind]} was given; name it with {_OPTIONS[kind]}, or {FETCH[kind]}"
            )
        published = self._published_file(kind)
        return published if published is not None else self._found(kind)

    def config(self, dit: Path) -> Path | None:
        """The DiT's config.json: beside its file, or in the folder; None where there is none."""
        folders = [dit.parent, *([self._folder] if self._folder else [])]
        return next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)

    def audio_encoder(self) -> Path:
        """wav2vec2's folder."""
        if self._named.audio_encoder is not None:
            return hugging_face_snapshot(self._named.audio_encoder)
        if self._folder is None:
            raise CheckpointError(f"no audio encoder was given; name its folder, {FETCH['audio_encoder']}")
        published = self._folder / AUDIO_ENCODER_FOLDER
        if published.is_dir():
            return published
        for config in sorted(_walk(self._folder, ("config.json",))):
            if (config.parent / "preprocessor_config.json").is_file():
                return config.parent
        return published

    def tokenizer(self) -> Path:
        """The folder with tokenizer.json."""
        if self._named.tokenizer is not None:
            return self._named.tokenizer
        roots = [self._folder] if self._folder else []
        with contextlib.suppress(CheckpointError):  # it also lies where the text encoder does
            roots.append(self.file("text_encoder").parent)
        for root in roots:
            for name in _TOKENIZER_FOLDERS:
                if (root / name / "tokenizer.json").is_file():
                    return root / name
        return (self._folder or self.base) / TOKENIZER_FOLDER

    def _published_file(self, kind: str) -> Path | None:
        assert self._folder is not None
        index, single = (self._folder / f"{DIT_STEM}{end}" for end in (INDEX_SUFFIX, ".safetensors"))
        names = {"dit": [index, single], "vae": [self._folder / VAE_FILE]}
        for path in names.get(kind, [self._folder / TEXT_ENCODER_FILE]):
            unfinished = any(path.with_name(path.name + ending).exists() for ending in UNFINISHED)
            if path.is_file() or path.is_symlink() or unfinished:
                return path
        return None

    def _found(self, kind: str) -> Path:
        """The one file of the folder that holds the component."""
        assert self._folder is not None
        return self._one(self._folder, kind, self._holdings())

    def _file_in(self, folder: Path, kind: str) -> Path:
        """A folder was named where a file was expected: the one in it that holds the component."""
        if not folder.is_dir():
            return folder  # opening it says what is wrong
        folder = hugging_face_snapshot(folder)
        return self._one(folder, kind, _holdings(folder, self._notes))

    def _one(self, folder: Path, kind: str, held: dict[Path, list[str]]) -> Path:
        own = [path for path, kinds in held.items() if kind in kinds]
        if len(own) == 1:
            return own[0]
        if own:
            names = ", ".join(str(path.relative_to(folder)) for path in own[:4])
            raise CheckpointError(
                f"{folder} holds {WANTED[kind]} {len(own)} times ({names}); name one: {_OPTIONS[kind]}"
            )
        seen = f" (seen: {'; '.join(self._notes[:4])})" if self._notes else ""
        raise CheckpointError(
            f"{folder} holds no file of {WANTED[kind]}{seen}; name it with {_OPTIONS[kind]}, or {FETCH[kind]}"
        )

    def _holdings(self) -> dict[Path, list[str]]:
        if self._held is None:
            assert self._folder is not None
            self._held = _holdings(self._folder, self._notes)
        return self._held


def hugging_face_snapshot(folder: Path, model: str = "s2v") -> Path:
    """The files behind a Hugging Face cache: ``models--org--name/snapshots/<revision>`` by ``refs/main``, also from its
    ``snapshots``, and from the cache's root where one model's name has ``model`` in it, whatever the case and without
    dashes. Any other folder comes back as it is.

    Raises:
        CheckpointError: a cache without a snapshot, or with several and no ``refs/main``.
    """
    if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
        folder = folder.parent
    if not (folder / "snapshots").is_dir():
        models = sorted(folder.glob("models--*")) or sorted(folder.glob("hub/models--*"))
        own = [each for each in models if model in each.name.lower().replace("-", "")]
        if not models:
            return folder
        if len(own) != 1:
            names = ", ".join(each.name for each in models[:4])
            raise CheckpointError(
                f"{folder} is a Hugging Face cache of {len(models)} models ({names}); name one of them"
            )
        return hugging_face_snapshot(own[0]) if (own[0] / "snapshots").is_dir() else own[0]
    main = folder / "refs" / "main"
    if main.is_file() and (revision := main.read_text(encoding="utf-8", errors="replace").strip()):
        snapshot = folder / "snapshots" / revision
        if snapshot.is_dir():
            return snapshot
        raise CheckpointError(f"{main} names {snapshot.name}, which snapshots/ does not hold; fetch the model again")
    snapshots = [path for path in sorted((folder / "snapshots").iterdir()) if path.is_dir()]
    if len(snapshots) != 1:
        raise CheckpointError(f"{folder} holds {len(snapshots)} snapshots and no refs/main; name one of snapshots/*")
    return snapshots[0]


def _published(folder: Path) -> Path:
    """The folder that the parts lie in: ``folder``, its ``Wan2.2-S2V-14B``, or a snapshot of it."""
    if not folder.is_dir():
        if not is_there(folder):
            raise CheckpointError(f"{folder} {absent(folder)}; expected the folder of the published checkpoint")
        what = "a file; name it with --dit-file" if folder.is_file() else "no folder, so it holds no config.json"
        raise CheckpointError(f"{folder} is {what}; expected the folder of the published checkpoint")
    folder = hugging_face_snapshot(folder)
    if (folder / BASE_FOLDER).is_dir() and not (folder / "config.json").is_file():
        return hugging_face_snapshot(folder / BASE_FOLDER)
    if (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} is in diffusers' layout (it holds model_index.json), whose transformer has other names; fetch "
            f"{BASE_FOLDER} itself, the edition without -Diffusers"
        )
    if (folder / "high_noise_model").is_dir():
        raise CheckpointError(
            f"{folder} is a T2V or I2V model of Wan 2.2 (it holds high_noise_model/); fetch {BASE_FOLDER}"
        )
    return folder


def _holdings(folder: Path, notes: list[str]) -> dict[Path, list[str]]:
    """Files of weights below a folder and the kinds of parts in each; ``notes`` gets what else was seen."""
    held = {}
    for path in sorted(_walk(folder, (*_SUFFIXES, INDEX_SUFFIX, *UNFINISHED))):
        first = part_files(path)[0]
        if first != path and first.is_file():
            continue  # the first part of a split GGUF speaks for all
        if _SHARD in path.name and not path.name.lower().endswith((INDEX_SUFFIX, ".gguf")):
            if not any(path.parent.glob(f"*{INDEX_SUFFIX}")):
                notes.append(f"{path.relative_to(folder)} is a shard without its index")
            continue  # else its index speaks for it
        try:
            parts = parts_of(open_table(path))
        except CheckpointError as error:
            notes.append(str(error))
            continue
        held[path] = [part.kind for part in parts]
        if not set(held[path]) & set(WANTED):
            notes.append(f"{path.relative_to(folder)} holds {said(parts)}")
    return held


def _walk(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, followlinks=True):  # no deeper than _DEPTH, so a circle of links ends
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth < _DEPTH else []
        yield from (Path(root, name) for name in files if name.endswith(endings))
