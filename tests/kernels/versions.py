"""Runs tests/kernels under every supported version of Triton, each in an environment of its own: ``make test-triton``.

An environment has that wheel (and what ``OTHERS`` names), and everything else from the environment that runs this. A
version that the package index does not give is a failure like any other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# What PyTorch's CUDA wheels ask for, by their metadata, and the newest.
VERSIONS = {
    "3.6.0": "torch 2.10 and 2.11",
    "3.7.0": "torch 2.12.0",
    "3.7.1": "torch 2.12.1 and 2.13",
    "3.9.0": "the newest",
}
# The interpreter of 3.6 converts arrays of one element to numbers, which NumPy took out in 2.4.
OTHERS = {"3.6.0": ("numpy<2.4",)}
ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venv-triton"


def main(wanted: list[str]) -> int:
    """Returns the number of versions that failed; ``wanted`` are versions to run instead of all."""
    failed = []
    for version in wanted or VERSIONS:
        print(f"== Triton {version} ({VERSIONS.get(version, 'asked for')})", file=sys.stderr, flush=True)
        try:
            python = environment(version)
            subprocess.run([python, "-m", "pytest", "tests/kernels"], cwd=ROOT, env=run_environment(), check=True)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            print(f"Triton {version}: {error}", file=sys.stderr, flush=True)
            failed.append(version)
    ran = ", ".join(version for version in wanted or VERSIONS if version not in failed)
    print(f"passed under Triton: {ran or 'none'}; failed under: {', '.join(failed) or 'none'}")
    return len(failed)


def environment(version: str) -> Path:
    """Python of an environment with this version of Triton, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip found no such version.
        RuntimeError: another version is imported in it.
    """
    folder = HOME / version
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        # As a folder of packages, so that the editable install in there counts too; behind this environment's own.
        (packages / "others.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, f"triton=={version}", *OTHERS.get(version, ())], check=True)
        (folder / ".made").touch()
    command = [str(python), "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    if found != version:
        raise RuntimeError(f"{folder} imports Triton {found}; delete the folder and run this again")
    return python


def run_environment() -> dict[str, str]:
    """This one, with all cases compiled and without what would bring in another Triton."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"LOWVRAM_AOT_CASES": "all"}


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
