"""``.pth`` files of torch.save's older form, and of forms that are not read: nothing in them is run."""

from __future__ import annotations

import collections
import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import convert
from lowvram_quantize.pickled import open_pth
from lowvram_quantize.source import TEXT_ENCODER_FILE, VAE_FILE
from lowvram_quantize.tables import open_table
from tests.quantize.checkpoints import base_of, clone, contents, refusal

Tensor = torch.Tensor
WHOLE = torch.randn(6, 4)


def legacy(value: object, path: Path) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


DICTIONARIES = {
    "several dtypes": {
        "a": WHOLE, "b": WHOLE.bfloat16(), "c": WHOLE.half(), "d": torch.arange(3), "e": WHOLE.to(torch.float8_e4m3fn),
        "f": torch.tensor(2.5, dtype=torch.float64), "g": torch.zeros(0, 3), "h": torch.ones(5, dtype=torch.int8),
    },
    "views of one storage": {"head": WHOLE[:2], "tail": WHOLE[3:], "all": WHOLE, "last": WHOLE[5, 1:]},
    "in order": collections.OrderedDict((f"w{i}", torch.full((2, i), float(i))) for i in range(1, 30)),
    "parameters": {"w": torch.nn.Parameter(WHOLE.clone())},
    "a module's": torch.nn.Linear(4, 3).state_dict(),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a"])
def test_each_tensor_is_read_as_it_was_saved(tmp_path, kind, name):
    path = legacy(dict(DICTIONARIES[kind]), tmp_path / name)
    table, expected = open_table(path), DICTIONARIES[kind]
    assert list(table) == list(expected)
    for key, tensor in expected.items():
        assert (table[key].dtype, table[key].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(table[key].read().float(), tensor.float()), key


def test_a_wrapped_one(tmp_path):
    table = open_table(legacy({"epoch": 3, "state_dict": {"w": WHOLE}}, tmp_path / "a.ckpt"))
    assert torch.equal(table["w"].read(), WHOLE)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_one_that_is_cut_off(tmp_path, share):
    path = legacy({"w": torch.ones(1000), "v": torch.ones(10)}, tmp_path / "a.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with refusal(CheckpointError, "a.pth", "fetch"):
        open_pth(path)


def a_bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1.0]}))


def a_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def a_text(path: Path) -> None:
    path.write_text("no weights at all")


def counts_that_do_not_add_up(path: Path) -> None:
    whole = bytearray(legacy({"w": torch.ones(4)}, path).read_bytes())
    place = whole.rindex((4).to_bytes(8, "little"))
    whole[place : place + 8] = (3).to_bytes(8, "little")
    path.write_bytes(whole)


def no_dictionary(path: Path) -> None:
    legacy([WHOLE], path)


def not_contiguous(path: Path) -> None:
    legacy({"w": WHOLE.t()}, path)


def sparse(path: Path) -> None:
    legacy({"w": WHOLE.to_sparse()}, path)


def a_module(path: Path) -> None:
    legacy(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (a_bare_pickle, "a pickle that torch.save did not write"),
        (a_tar, "before 0.4"),
        (a_text, "no .pth file"),
        (counts_that_do_not_add_up, "truncated or damaged"),
        (no_dictionary, "holds a list"),
        (not_contiguous, "no contiguous tensor"),
        (sparse, "fetch"),
        (a_module, "nothing in a file is run"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, make, said):
    make(tmp_path / "a.pth")
    with refusal(CheckpointError, "a.pth", said, "fetch"):
        open_table(tmp_path / "a.pth")


def test_encoders_of_the_older_form_are_the_same_artifact(tiny, tmp_path):
    folder = clone(tiny.checkpoint, tmp_path / "ckpt")
    for name in (VAE_FILE, TEXT_ENCODER_FILE):
        tensors = torch.load(base_of(folder) / name, weights_only=True)
        (base_of(folder) / name).unlink()
        legacy(tensors, base_of(folder) / name)
    wanted = {"precision": "bf16", "components": ("vae", "text_encoder")}
    ours = contents(convert(folder, tmp_path / "ours", **wanted))
    theirs = contents(convert(tiny.checkpoint, tmp_path / "theirs", **wanted))
    assert {n: b for n, b in ours.items() if n.endswith(".safetensors")} == {
        n: b for n, b in theirs.items() if n.endswith(".safetensors")
    }
