"""Whether ``make setup`` resolves where users are: against the package index alone, with a CUDA and with a CPU build of
torch, on every Python of the supported range that is here. Nothing is installed: pip only says what it would take.

    python tests/install/check_install.py [--python 3.11] [--build cuda] [--skip-offline]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUILDS = ("cuda", "cpu")
# How the index is reached; everything else of pip's settings (local wheels, other indexes, limits) is this machine's.
KEPT = ("PIP_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT", "PIP_CACHE_DIR")
OUT_OF_REACH = re.compile(r"connection broken|Could not fetch URL|NewConnectionError|Name or service not known", re.I)
# What torch's CUDA build brings: pinned by its own metadata, not by ours.
OF_CUDA = re.compile(r"^(nvidia-|cuda-)")
# What a CPU build of torch requires, beside nothing of CUDA and no triton.
CPU_REQUIRES = ("filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec")


class Unresolved(Exception):
    """pip finds no set of versions, or one that is not what it should be."""


class OutOfReach(Exception):
    """The package index does not answer."""


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which pip sees the package index alone."""
    kept = {name: value for name, value in environ.items() if not name.startswith("PIP_") or name in KEPT}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def pinned(constraints: str) -> set[str]:
    """Normalised names that constraints hold to a version."""
    return {_normal(found[1]) for line in constraints.splitlines() if (found := re.match(r"([\w.-]+)==", line))}


def torch_version(constraints: str) -> str:
    """Raises: ValueError where torch is not held to one version."""
    found = re.search(r"^torch==([\d.]+)$", constraints, re.M)
    if found is None:
        raise ValueError(f"{CONSTRAINTS.name} holds torch to no version; expected a line torch==X.Y.Z")
    return found[1]


def problems(report: Mapping[str, Any], build: str, constraints: str) -> Iterator[str]:
    """What is wrong with what pip would take; ``report`` is pip's installation report."""
    taken = {_normal(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    torch = taken["torch"]
    if ("+cpu" in torch["version"]) != (build == "cpu"):
        yield f"torch {torch['version']} is not the {build} build"
    wanted = [line for line in torch.get("requires_dist", []) if re.match(r"triton\b", line)]
    there = taken.get("triton", {}).get("version")
    if build == "cuda" and not any(re.match(rf"triton\s*==\s*{re.escape(str(there))}(\s*;|$)", w) for w in wanted):
        yield f"triton is {there}, torch {torch['version']} asks for {wanted or 'none'}"
    if there is None:
        yield "triton is not there: kernels could not be tested"
    if loose := sorted(
        name for name in taken if name not in pinned(constraints) | {"lowvram"} and not OF_CUDA.match(name)
    ):
        yield f"{', '.join(loose)} held to no version in {CONSTRAINTS.name}"


def resolve(python: str, build: str, folder: Path) -> dict[str, Any]:
    """pip's report of what ``make setup`` would take.

    Raises:
        OutOfReach: the index does not answer.
        Unresolved: there is no such set; with pip's words.
    """
    environment = clean_environment(os.environ)
    report = folder / f"{build}.json"
    pip = [python, "-m", "pip"]
    command = [*pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
    if build == "cpu":
        command += ["--find-links", str(cpu_torch(folder, torch_version(CONSTRAINTS.read_text())))]
    _run([*pip, "install", "--quiet", "--upgrade", "pip"], environment)
    _run([*command, "--constraint", str(CONSTRAINTS), "torch", "setuptools", f"{ROOT}[dev]"], environment)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def cpu_torch(folder: Path, version: str) -> Path:
    """A folder with a wheel of nothing but the metadata of a CPU build, which the index does not carry for Linux."""
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    name = f"torch-{version}+cpu"
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}+cpu\n"
    metadata += "".join(f"Requires-Dist: {name}\n" for name in CPU_REQUIRES)
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return wheels


def interpreter(version: str) -> str | None:
    """A Python of this version that runs; None where there is none."""
    candidates = [shutil.which(f"python{version}"), *map(str, _of_pyenv(version))]
    for candidate in filter(None, candidates):
        asked = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True
        )
        if asked.stdout.decode().strip() == version:
            return candidate
    return None


def _of_pyenv(version: str) -> list[Path]:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return sorted(root.glob(f"versions/{version}.*/bin/python"))


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        unreached = [line for line in said.splitlines() if OUT_OF_REACH.search(line)]
        raise OutOfReach(unreached[-1].strip()) if unreached else Unresolved(said)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check(version: str, options: argparse.Namespace) -> Iterator[str]:
    """Resolve on one Python and print what came of it: "passed", "failed" or "skipped" for each build."""
    python = interpreter(version)
    if python is None:
        print(f"Python {version}: NOT CHECKED, no interpreter of this version is here")
        # Whoever asks for a version by name wants to know.
        yield "failed" if options.python else "skipped"
        return
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([python, "-m", "venv", f"{temporary}/venv"], check=True)
        for build in options.build or BUILDS:
            try:
                report = resolve(f"{temporary}/venv/bin/python", build, Path(temporary))
                wrong = "; ".join(problems(report, build, CONSTRAINTS.read_text(encoding="utf-8")))
            except OutOfReach as error:
                print(f"Python {version}, {build}: NOT CHECKED, the package index is out of reach: {error}", flush=True)
                yield "skipped" if options.skip_offline else "failed"
                continue
            except Unresolved as error:
                wrong = str(error)
            print(f"Python {version}, {build}: {f'FAILED: {wrong}' if wrong else _summary(report)}", flush=True)
            yield "failed" if wrong else "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", choices=PYTHONS, action="append", help="default: all of them that are here")
    parser.add_argument("--build", choices=BUILDS, action="append", help="of torch; default: both")
    parser.add_argument("--skip-offline", action="store_true", help="an index out of reach is said and is no failure")
    options = parser.parse_args()
    outcomes = [outcome for version in options.python or PYTHONS for outcome in check(version, options)]
    passed, failed, skipped = (outcomes.count(kind) for kind in ("passed", "failed", "skipped"))
    print(f"{passed} resolved, {failed} failed, {skipped} not checked")
    return 1 if failed else 0


def _summary(report: Mapping[str, Any]) -> str:
    versions = {_normal(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    return f"{len(versions)} packages, torch {versions['torch']} with triton {versions['triton']}"


if __name__ == "__main__":
    sys.exit(main())
