"""Absent files: what a path that leads nowhere may have been meant to be."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

# Names of models on Hugging Face: an owner and a name, with a revision behind an "@" at most.
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?", flags=re.ASCII)
_ADDRESS = re.compile(r"(https?|hf|s3|gs):/", re.IGNORECASE)
# Who publishes this model, its parts and editions of them.
_OWNERS = {
    "wan-ai",
    "quark-vision",
    "alibaba-quark",
    "comfy-org",
    "kijai",
    "city96",
    "quantstack",
    "calcuis",
    "google",
    "facebook",
    "jonatasgrosman",
    "lightx2v",
}
_FILES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".json")
_ALIKE = 0.8


def is_there(path: Path) -> bool:
    """Whether anything is; what may not be looked at counts as there, and opening it says why."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def absent(path: Path) -> str:
    """In a clause, how it is that nothing is there, and what to do."""
    if said := elsewhere(path):
        return said
    if path.is_symlink():
        return (
            f"is a link to {path.readlink()}, which is not there (an unfinished download, a cache that was cleaned, a "
            "disk that is not mounted); check it"
        )
    missing = next((above for above in reversed(path.parents) if not is_there(above)), None)
    if missing is not None:
        return f"is not there, and neither is {missing}; check the path"
    return f"is not there{_near(path)}; check the path"


def elsewhere(path: Path) -> str:
    """The same of what is no path of this machine as it stands: an address, a model's name on a hub, a home that no
    shell has put in; "" of any other."""
    text = str(path)
    if _ADDRESS.match(text):
        return f"is an address, and nothing is fetched here; fetch {_whole_address(text)}, then name what was fetched"
    if text.startswith("~"):
        return f"is not there: within quotes no shell makes a home of ~; write {path.expanduser()}"
    if not _HUB.fullmatch(text) or path.suffix.lower() in _FILES or is_there(path.parent):
        return ""
    owner, name = path.parts[0], text.partition("@")[0]
    if owner.lower() in _OWNERS:
        return (
            "is the name of a model on Hugging Face, and nothing is fetched here: fetch it (huggingface-cli download "
            f"{name} --local-dir DIR), then name what was fetched"
        )
    # A name on a hub, or a folder seen from elsewhere: "ckpt/Wan2.2-S2V-14B" is mostly that.
    return (
        f"is not there, and neither is {owner}; check the path, or fetch it first where it is a name on Hugging Face: "
        "nothing is fetched here"
    )


def _whole_address(text: str) -> str:
    """With both slashes, of which a path keeps one."""
    return re.sub(r"^(\w+):/+", r"\1://", text)


def _near(path: Path) -> str:
    try:
        names = sorted(other.name for other in path.parent.iterdir() if not other.name.startswith("."))
    except OSError:
        return ""
    same = [name for name in names if name.lower() == path.name.lower()]
    close = same or difflib.get_close_matches(path.name, names, n=2, cutoff=_ALIKE)
    return f"; {path.parent / close[0]} is" if len(close) == 1 else ""
