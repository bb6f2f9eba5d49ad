"""The arrows between the packages point one way; see "The house" in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "kernels": "lowvram_kernels",
    "models": "lowvram_models",
    "quantize": "lowvram_quantize",
    "lowvram": "lowvram",
}
ALLOWED = {
    "kernels": {"lowvram_kernels"},
    "models": {"lowvram_models"},
    "quantize": {"lowvram_quantize", "lowvram_models", "lowvram_kernels"},
    "lowvram": {
        "lowvram",
        *(f"lowvram_quantize.{name}" for name in ("format", "slabs", "claims", "places")),
        "lowvram_models",
        "lowvram_kernels",
    },
}
# The door: what offers the whole job to a person also calls the offline half.
DOORS = {"lowvram/cli.py", "lowvram/__init__.py", "lowvram/demo.py"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {n for n in names if n.split(".")[0] in FOLDERS.values()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str):
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[folder] | ({"lowvram_quantize"} if name in DOORS else set())
        wrong += [
            f"{name} imports {i}" for i in imports(path) if not any((i + ".").startswith(a + ".") for a in allowed)
        ]
    assert not wrong


def test_models_import_no_files_or_ranks():
    banned = {"safetensors", "os", "pathlib", "torch.distributed", "shutil"}
    for path in (ROOT / "models").glob("*.py"):
        tree = ast.parse(path.read_text())
        found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        if path.name == "text_encoder.py":  # a tokenizer is a folder of files and nothing else
            found -= {"pathlib", "os"}
        assert not found & banned, path.name


# Inside lowvram: what each room, and each file of the root, imports of the others. Who is asked stands further down.
ROOMS = {
    "cli": {
        "calibrate", "commands", "compare", "demo", "devices", "doctor", "memory_log", "outputs", "planning",
        "progress", "selftest",
    },
    "commands": {
        "batch", "byte_sizes", "calibrate", "compare", "devices", "fetch", "infer", "media", "offload", "outputs",
        "parallel", "pipeline", "planning", "request", "selftest", "serve", "simulate",
    },
    "selftest": {
        "demo", "denoise", "devices", "encode", "loading", "offload", "parallel", "pipeline", "planning", "request",
        "schedule", "simulate",
    },
    "serve": {
        "byte_sizes", "compare", "devices", "infer", "media", "memory_log", "outputs", "pages", "parallel",
        "pipeline", "planning", "recorder", "request", "schedule",
    },
    "demo": {"compare", "infer", "media", "outputs", "pipeline", "request"},
    "simulate": {"encode", "offload", "parallel", "pipeline", "planning", "schedule"},
    "fetch": {"byte_sizes"},
    "batch": {"infer", "media", "outputs", "pipeline", "request", "segments"},
    "infer": {"devices", "media", "memory_log", "offload", "outputs", "pipeline", "progress", "recorder", "segments"},
    "memory_log": {"offload", "pages", "runtime"},
    "compare": {
        "decode", "denoise", "devices", "infer", "loading", "media", "offload", "outputs", "pages", "pipeline",
        "progress", "recorder", "schedule",
    },
    "calibrate": {
        "compare", "denoise", "devices", "media", "offload", "pages", "pipeline", "progress", "request", "schedule",
    },
    "pipeline": {
        "decode", "denoise", "devices", "encode", "offload", "parallel", "planning", "recorder", "request", "runtime",
        "schedule", "segments",
    },
    "segments": {"decode", "denoise", "media", "parallel"},
    "denoise": {"devices", "encode", "loading", "offload", "parallel", "request", "runtime", "schedule"},
    "doctor": {"byte_sizes", "devices", "offload", "parallel", "planning"},
    "parallel": {"devices", "encode", "offload", "planning", "request", "runtime", "schedule"},
    "decode": {"loading", "offload", "runtime", "schedule"},
    "encode": {"devices", "loading", "media", "precision", "recorder", "request", "runtime", "schedule"},
    "runtime": {"byte_sizes", "devices", "offload", "planning"},
    "planning": {"byte_sizes", "devices", "media", "offload", "schedule"},
    "offload": {"byte_sizes", "devices", "loading", "media"},
    "loading": {"devices"},
    "progress": {"byte_sizes", "recorder"},
    "request": {"media", "schedule"},
    "recorder": {"schedule"},
    "devices": {"precision"},
    "__main__": {"cli"},
    "__init__": {"offload", "pipeline"},
}  # fmt: skip
RUNTIME = sorted((ROOT / "lowvram").rglob("*.py"))


def room_of(module: str) -> str:
    """Of ``lowvram.offload.layers`` it is offload, of ``lowvram.pipeline`` the file itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_asked(path: Path) -> set[str]:
    """Modules of ``lowvram`` that a file imports, of ``from lowvram.room import module`` the module."""
    known, found = {module_of(each) for each in RUNTIME}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowvram":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found


def test_rooms_import_those_below():
    found: dict[str, set[str]] = {}
    for path in RUNTIME:
        room = room_of(module_of(path)) if path.parent.name != "lowvram" or path.stem != "__init__" else "__init__"
        found.setdefault(room, set()).update(room_of(asked) for asked in modules_asked(path))
    arrows = {room: asked - {room} for room, asked in found.items() if asked - {room}}
    assert arrows == ROOMS


def test_no_room_asks_one_that_asks_it():
    def below(room: str, seen: frozenset[str] = frozenset()) -> set[str]:
        assert room not in seen, f"{room} asks itself by way of {sorted(seen)}"
        asked = ROOMS.get(room, set())
        return asked.union(*(below(each, seen | {room}) for each in asked))

    for room in ROOMS:
        assert room not in below(room)


def test_no_two_files_import_each_other():
    asked = {module_of(path): modules_asked(path) for path in RUNTIME}
    pairs = {(a, b) for a in asked for b in asked[a] if a != b and a in asked.get(b, ())}
    assert not pairs


def test_every_room_is_installed():
    stated = re.search(r"\npackages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    rooms = {module_of(path.parent / "__init__.py") for path in RUNTIME}
    assert stated
    assert rooms == set(re.findall(r'"(lowvram(?:\.\w+)*)"', stated[1]))


def test_the_root_is_for_those_who_pass_through_it():
    assert len([path for path in (ROOT / "lowvram").glob("*.py") if not path.stem.startswith("__")]) <= 14
