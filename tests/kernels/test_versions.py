"""``make test-triton`` covers what is installed here, and says what it could not have."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("versions", Path(__file__).parent / "versions.py")
versions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(versions)


def test_the_constraints_version_and_both_ends_of_the_range_are_covered():
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned[1] in versions.VERSIONS
    least, most = re.search(r"triton>=([\d.]+),<([\d.]+)", (ROOT / "pyproject.toml").read_text()).groups()
    covered = [tuple(int(part) for part in version.split(".")[:2]) for version in versions.VERSIONS]
    assert min(covered) == tuple(int(part) for part in least.split("."))
    assert max(covered)[1] + 1 == int(most.split(".")[1])


def test_a_version_that_cannot_be_had_fails_aloud_and_the_others_still_run(monkeypatch, capsys):
    ran = []

    def environment(version):
        if version == "3.7.0":
            raise subprocess.CalledProcessError(1, ["pip"])
        return Path(version)

    monkeypatch.setattr(versions, "environment", environment)
    monkeypatch.setattr(versions.subprocess, "run", lambda command, **_: ran.append(str(command[0])))
    assert versions.main([]) == 1
    assert ran == [version for version in versions.VERSIONS if version != "3.7.0"]
    assert "failed under: 3.7.0" in capsys.readouterr().out


def test_an_environment_with_another_triton_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "HOME", tmp_path)
    (tmp_path / "3.6.0").mkdir()
    (tmp_path / "3.6.0" / ".made").touch()
    other = subprocess.CompletedProcess([], 0, stdout="3.9.0\n")
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: other)
    with pytest.raises(RuntimeError, match=r"imports Triton 3\.9\.0; delete"):
        versions.environment("3.6.0")
