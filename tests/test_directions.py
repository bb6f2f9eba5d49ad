"""The arrows between the packages point one way; see "The house" in CONTRIBUTING.md."""

from __future__ import annotations

import ast
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
        *(f"lowvram_quantize.{name}" for name in ("format", "claims", "places")),
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
