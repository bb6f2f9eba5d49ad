from __future__ import annotations

import pytest

from lowvram.doctor import machine as smi
from lowvram.doctor.probes import CardState

CARDS = """GPU-aa, Enabled, [N/A], 4, 16
GPU-bb, Disabled, Enabled, 5, [N/A]
"""
PROCESSES = """GPU-aa, 11, 2900, /opt/odd, name/blender
GPU-aa, 12, [N/A], python
GPU-bb, 13, 500, python
"""


def test_states():
    states = smi.parse_states(CARDS, PROCESSES, own_pid=13)
    others = ("/opt/odd, name/blender (pid 11) 2900 MiB", "python (pid 12)")
    assert states == {
        "GPU-aa": CardState(display=True, ecc=None, link_gen=4, link_lanes=16, processes=others),
        "GPU-bb": CardState(display=False, ecc=True, link_gen=5, link_lanes=None),
    }


def test_a_table_that_is_none():
    with pytest.raises(ValueError, match="unpack"):
        smi.parse_states("Unable to determine the device handle", "", own_pid=1)


def test_without_the_program(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert smi.card_states() == {}
