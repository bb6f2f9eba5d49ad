"""Holds that mypy sees across the packages' borders, by the wrong calls of ``planted.py``. ``make typecheck``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PLANTED = Path(__file__).with_name("planted.py")
ROOT = Path(__file__).parents[2]


def main() -> int:
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(PLANTED)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = {int(line) for line in re.findall(r"planted\.py:(\d+): error", said)}
    lines = PLANTED.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    if found == wrong:
        print(f"mypy finds the {len(wrong)} wrong calls that are planted across the packages' borders")
        return 0
    print(f"mypy finds lines {sorted(found)} of {PLANTED.name}, expected {sorted(wrong)}:\n{said}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
