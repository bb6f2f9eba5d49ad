"""Training of the tiny model at test size: the loss falls, it goes on where it was, and writes a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from lowvram.media.samples import Expression, Person, draw_portrait, synth_voice
from lowvram.media.talking import at_frames, correlation, envelope, mouth_opening
from lowvram_kernels.errors import CheckpointError
from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_quantize import trained
from lowvram_quantize.convert import convert
from training.tiny_face import (
    components,
    everything,
    export,
    faces,
    latents,
    motion,
    run,
    train_dit,
    train_ears,
    train_vae,
)
from training.tiny_face.vae import BASE_DIM, TrainableVAE

STEPS, VAE_STEPS, SIZE, PEOPLE = 24, 15, 64, 8
SMALL = everything.TEST_SIZE.settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All trainings, a few steps each, at 64 x 64 pixels, and the files that a package would carry."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LOG_EVERY_S", 0.0)
        patch.setattr(train_vae, "PEOPLE", 4)
        few = {"ears_steps": STEPS, "vae_steps": VAE_STEPS, "dit_steps": STEPS, "people": 3, "sequences": 2}
        everything.train(folder, folder / "weights", dataclasses.replace(everything.TEST_SIZE, **few))
    return folder


@pytest.mark.parametrize(
    ("name", "steps", "share"), [("ears", STEPS, 0.5), ("vae", VAE_STEPS, 0.9), ("dit", STEPS, 0.95)]
)
def test_the_loss_falls(root, name, steps, share):
    lines = [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert np.mean(losses[-(steps // 3) :]) < share * np.mean(losses[: steps // 3])


@pytest.mark.parametrize("name", export.TRAININGS)
@pytest.mark.parametrize("whose", ["the package's", "these"])
def test_the_log_says_machine_hours_and_steps(root, name, whose):
    folder = export.HERE if whose == "the package's" else root / "weights"
    log = json.loads((folder / "training_log.json").read_text())
    assert "cores, torch " in log["machine"]
    assert log[name]["steps"] == log[name]["lines"][-1]["step"] >= (600 if folder == export.HERE else VAE_STEPS)
    assert 0 <= log[name]["hours"]["cpu"] <= 6
    assert log[name]["lines"][-1]["loss"] < log[name]["lines"][0]["loss"]
    assert folder == export.HERE or everything.falls(root)[name][0] == log[name]["lines"][0]["loss"]


def test_the_packages_weights_are_small_and_undamaged(tmp_path):
    assert sum(file.stat().st_size for file in export.HERE.iterdir()) < 10e6
    assert trained.write_trained(tmp_path / "ckpt") == tmp_path / "ckpt"


def test_cut_short_it_goes_on_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOG_EVERY_S", 0.0)
    for steps in (2, 3):
        train_ears.train(tmp_path, steps=steps, batch=2, seconds=1.0)
    lines = (tmp_path / "ears" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("name", export.TRAININGS)
def test_the_same_seed_computes_the_same(root, tmp_path, monkeypatch, name):
    monkeypatch.setattr(train_vae, "PEOPLE", 2)
    begin = {
        "ears": lambda folder: train_ears.train(folder, steps=3, batch=2, seconds=1.0, seed=5),
        "vae": lambda folder: train_vae.train(folder, steps=2, size=SIZE, seed=5),
        "dit": lambda folder: train_dit.train(folder, steps=3, count=3, seed=5, config=SMALL),
    }[name]
    kept = []
    for folder in (tmp_path / "once", tmp_path / "twice"):
        folder.mkdir()
        shutil.copyfile(root / latents.FILE, folder / latents.FILE)
        kept.append(begin(folder).state_dict())
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_what_has_its_steps_is_not_trained_again(root):
    gone_on = train_ears.train(root, steps=STEPS, batch=2, seconds=1.0).state_dict()
    kept = torch.load(root / "ears" / "state.pt", weights_only=True)["parts"]["ears"]
    assert all(torch.equal(gone_on[name], kept[name]) for name in kept)


def test_the_published_vae_computes_what_was_trained(root):
    trainable = latents.load_vae(root)
    names = {name: tensor.float() for name, tensor in trainable.vae.state_dict().items()}
    vae = build_vae(BASE_DIM)
    vae.load_state_dict(names)
    streaming = StreamingVAE(vae)
    clip = train_vae.clip_of(3, SIZE)[0].float() / 127.5 - 1
    with torch.no_grad():
        raw = trainable.encode(clip[None])
        decoded = trainable.decode(raw)[0].clamp(-1, 1)
    # In norm: where channels of a pixel all but cancel, their norm makes the last bits of float32 large.
    assert off(streaming.denormalise(streaming.encode(clip)), raw[0]) < 1e-4
    found = streaming.start_decoder().decode(streaming.normalise(raw[0]))
    assert off(found, decoded) < 1e-4


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def vae():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "PEOPLE", PEOPLE)
        return train_vae.new_vae(SIZE).requires_grad_(False)


def test_the_made_encoder_keeps_most_of_a_patch(vae):
    clips = (
        torch.stack([train_vae.clip_of(number, SIZE)[0] for number in range(PEOPLE, PEOPLE + 4)]).float() / 127.5 - 1
    )
    with torch.no_grad():
        latents_ = vae.encode(clips)[:, :, 1:]
    assert latents_.std(dim=(0, 2, 3, 4)).max() < 2
    values = latents_.permute(0, 2, 3, 4, 1).reshape(-1, 16)
    patches = clips[:, :, 1:].unflatten(2, (-1, 4)).unflatten(4, (-1, 8)).unflatten(6, (-1, 8))
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(values), -1)
    inputs = torch.cat([values, torch.ones(len(values), 1)], dim=1)
    found = inputs @ torch.linalg.lstsq(inputs, patches).solution
    assert (found - patches).square().mean() < 0.1 * patches.var(dim=0).mean()


def test_one_frame_is_encoded_about_as_a_still_video(vae):
    frame = train_vae.clip_of(3, SIZE)[0][:, :1].float()[None] / 127.5 - 1
    with torch.no_grad():
        one, *_, last = vae.encode(frame.expand(-1, -1, 9, -1, -1)).unbind(2)
        alone = vae.encode(frame)[:, :, 0]
    assert torch.equal(one, alone)
    # What differences of frames have in a video is something else in one frame: the rest is the same.
    assert (one - last)[:, : components.MEANS[1]].square().mean() < 0.5 * last[:, : components.MEANS[1]].square().mean()


def test_latents_are_on_the_published_scale_and_pictures_stay():
    torch.manual_seed(0)
    vae = TrainableVAE().requires_grad_(False)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latent = vae.encode(clip)
    decoded = vae.decode(latent)
    mean, std = latent.mean(dim=(0, 2, 3, 4)), latent.std(dim=(0, 2, 3, 4))
    vae.normalise(mean, std)
    wanted_mean, wanted_std = latents.statistics(vae)
    scaled = (latent - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1) * wanted_std[None] + wanted_mean[None]
    torch.testing.assert_close(vae.encode(clip), scaled, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(vae.decode(scaled), decoded, atol=1e-4, rtol=1e-3)


def test_the_lora_takes_a_part_and_merged_they_are_what_was_trained(root):
    dit = train_dit.train(root, steps=STEPS, count=3, config=SMALL)
    base, lora = export.split_lora(dit)
    names = [name.removesuffix(".lora_A.default.weight") for name in lora if "lora_A" in name]
    assert {name.split(".")[0] for name in names} == {"blocks", "audio_injector"}
    for name in names:
        whole = dit.state_dict()[f"{name}.weight"]
        a, b = (lora[f"{name}.lora_{which}.default.weight"].float() for which in "AB")
        merged = base[f"{name}.weight"].float() + 64 / export.RANK * b @ a
        assert (merged - whole).norm() < 0.01 * whole.norm()
        assert (base[f"{name}.weight"].float() - whole).norm() > 0.2 * whole.norm()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_is_written_converts(root, tmp_path, precision):
    checkpoint = trained.write_trained(tmp_path / "ckpt", source=root / "weights")
    lora = checkpoint / "LiveAvatar" / "liveavatar.safetensors"
    artifact = convert(checkpoint, tmp_path / "artifact", precision=precision, lora=lora)
    assert (artifact / "manifest.json").is_file()
    trained.write_trained(tmp_path / "ckpt", source=root / "weights")  # it may be replaced


@pytest.mark.parametrize("file", trained.FILES)
def test_a_damaged_file_is_found_by_its_checksum(root, tmp_path, file):
    copy = shutil.copytree(root / "weights", tmp_path / "weights")
    data = bytearray((copy / file).read_bytes())
    data[-3] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file} is damaged: its sha256 is"):
        trained.write_trained(tmp_path / "ckpt", source=copy)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda folder: (folder / "vae.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "lacks 'files'"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda folder: drop(folder, "dit"), "lacks 'dit'"),
        (lambda folder: drop(folder, "files", "lora.safetensors"), "lacks 'lora.safetensors'"),
    ],
)
def test_missing_parts_are_named(root, tmp_path, what, said):
    copy = shutil.copytree(root / "weights", tmp_path / "weights")
    what(copy)
    with pytest.raises(CheckpointError, match=said):
        trained.write_trained(tmp_path / "ckpt", source=copy)


def drop(folder, *keys: str) -> None:
    path = folder / "manifest.json"
    manifest = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("number", [None, 0, 1, faces.HELD_OUT, faces.HELD_OUT + 1, faces.HELD_OUT + 2])
def test_a_mouth_follows_the_voice_and_is_read_off(number):
    voice = synth_voice(3.0, speech=None if number is None else faces.speech(number))
    who = Person() if number is None else faces.person(number)
    shown = motion.expressions(motion.controls(voice), 0, 70)
    frames = np.stack([faces.picture(who, expression, 96) for expression in shown])
    assert correlation(mouth_opening(frames), at_frames(envelope(voice), 70, 25)) > 0.9


@pytest.mark.parametrize(
    "change", [{"mouth": 0.9}, {"mouth_width": 0.8}, {"eyes_closed": 1.0}, {"eyes_closed": 0.5}, {"nod": 2.0}]
)
def test_an_expression_changes_its_part_of_the_face_only(change):
    rest, moved = (np.asarray(draw_portrait(128, 128, None, e)) for e in (Expression(), Expression(**change)))
    rows = np.nonzero((rest != moved).any(axis=(1, 2)))[0]
    reach = {"mouth": (78, 112), "mouth_width": (82, 100), "eyes_closed": (58, 74), "nod": (15, 125)}
    first, last = reach[next(iter(change))]
    assert len(rows)
    assert first <= rows.min()
    assert rows.max() <= last


def test_people_and_voices_differ_and_are_the_same_each_time():
    numbers = [0, 1, 2, faces.HELD_OUT, faces.HELD_OUT + 1]
    pictures = [faces.picture(faces.person(number), faces.at_rest(number), 64).tobytes() for number in numbers]
    assert len(set(pictures)) == len(numbers)
    assert len({faces.speech(number) for number in numbers}) == len(numbers)
    assert faces.person(1) == faces.person(1)
    assert faces.speech(1) == faces.speech(1)
