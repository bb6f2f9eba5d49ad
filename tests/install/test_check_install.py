"""What ``make check-install`` makes of pip's report and environment; pip itself is asked by ``make check-install``."""

from __future__ import annotations

import re
import zipfile
from importlib.metadata import requires

import pytest

from tests.install.check_install import CONSTRAINTS, clean_environment, cpu_torch, pinned, problems, torch_version

HELD = 'torch==2.13.0\ntriton==3.7.1\nnumpy==2.2.6; python_version < "3.11"\nnumpy==2.4.6; python_version >= "3.11"\n'


def report(**versions: str) -> dict:
    """pip's report of packages, torch's CUDA build asking for triton 3.7.1."""
    wanted = [] if "+cpu" in versions["torch"] else ['triton==3.7.1; platform_system == "Linux"', "numpy; extra == 'x'"]
    return {
        "install": [
            {"metadata": {"name": name, "version": version, "requires_dist": wanted if name == "torch" else []}}
            for name, version in versions.items()
        ]
    }


@pytest.mark.parametrize(
    ("build", "versions"),
    [
        ("cuda", {"torch": "2.13.0", "triton": "3.7.1", "nvidia-cublas": "13.1"}),
        ("cpu", {"torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.6"}),
    ],
)
def test_a_right_set(build, versions):
    assert list(problems(report(**versions), build, HELD)) == []


@pytest.mark.parametrize(
    ("build", "versions", "word"),
    [
        ("cuda", {"torch": "2.13.0", "triton": "3.9.0"}, "asks for"),
        ("cuda", {"torch": "2.13.0", "triton": "3.7.10"}, "asks for"),
        ("cuda", {"torch": "2.13.0+cpu", "triton": "3.7.1"}, "not the cuda build"),
        ("cpu", {"torch": "2.13.0", "triton": "3.7.1"}, "not the cpu build"),
        ("cpu", {"torch": "2.13.0+cpu"}, "kernels could not be tested"),
        ("cuda", {"torch": "2.13.0", "triton": "3.7.1", "left_pad": "1.0"}, "left-pad held to no version"),
    ],
)
def test_a_wrong_set_is_named(build, versions, word):
    assert word in "; ".join(problems(report(**versions), build, HELD))


def test_pip_sees_the_index_alone():
    before = {
        "PIP_FIND_LINKS": "/wheels",
        "PIP_EXTRA_INDEX_URL": "x",
        "PIP_NO_INDEX": "1",
        "PIP_CERT": "c",
        "HOME": "/",
    }
    after = clean_environment(before)
    assert {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"}.isdisjoint(after)
    assert after["PIP_CERT"] == "c"
    assert after["PIP_CONFIG_FILE"] == "/dev/null"


def test_the_cpu_builds_metadata(tmp_path):
    (wheel,) = cpu_torch(tmp_path, "2.13.0").iterdir()
    with zipfile.ZipFile(wheel) as file:
        text = file.read("torch-2.13.0+cpu.dist-info/METADATA").decode()
    assert "Version: 2.13.0+cpu" in text
    assert "triton" not in text


def test_the_installed_torch_wants_the_triton_that_is_held():
    """CUDA builds say it; a CPU build wants none, and then this holds that it does not ask for another one."""
    held = re.search(r"^triton==(\S+)$", CONSTRAINTS.read_text(), re.M)
    wanted = [found[1] for line in requires("torch") or () if (found := re.match(r"triton\s*==\s*([\d.]+)", line))]
    assert held is not None
    assert set(wanted) <= {held[1]}


def test_constraints_and_project_agree():
    # The tests' extra names the others.
    extras = re.compile(r"extra == ['\"](dev|ui|ray)['\"]")
    wanted = [line for line in requires("lowvram") or () if "extra ==" not in line or extras.search(line)]
    wanted = [line for line in wanted if not line.startswith("lowvram[")]
    text = CONSTRAINTS.read_text()
    assert {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted} <= pinned(text)
    assert torch_version(text).startswith(("2.10.", "2.11.", "2.12.", "2.13."))
    assert {"torch<2.14,>=2.10", "torch>=2.10,<2.14"} & set(wanted)
