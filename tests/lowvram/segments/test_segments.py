"""Videos in segments: the next one goes on as if nothing had been cut, in the same process or in another."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram.infer import infer
from lowvram.media.join import join
from lowvram.media.samples import synth_voice, write_wav
from lowvram.media.video import probe
from lowvram.offload.placement import MemoryOptions
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.recorder import TensorRecorder
from lowvram.schedule import Extent, blocks_of, ticks
from lowvram.segments.store import FACTS, State, folder_of, latest, save
from lowvram.segments.take import Take
from lowvram_kernels.errors import ConfigError, InputError, OutputError

PLACES = {
    "resident": MemoryOptions(),
    "streamed": MemoryOptions(offload_model=True, wave=2),
    "int8 rings on the host": MemoryOptions(offload_kv_cache=True, kv="int8"),
}


@pytest.fixture(scope="module")
def voice(tiny) -> Path:
    """Two seconds: three clips of the tiny request, and a little more."""
    path = tiny.root / "two_seconds.wav"
    write_wav(path, synth_voice(2.0), 16000)
    return path


@pytest.fixture(scope="module")
def request_of(tiny, voice):
    def made(**changes: object) -> Request:
        return tiny.request(**{"audio": voice, "num_clip": None} | changes)

    return made


def opened(tiny, place: str = "resident", **options: object) -> AvatarPipeline:
    return AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu", memory=PLACES[place], **options)


def whole(pipeline: AvatarPipeline, request: Request) -> dict[str, torch.Tensor]:
    recorder = TensorRecorder()
    for _ in pipeline.stream(request, recorder=recorder):
        pass
    return recorder.tensors()


def states_of(pipeline: AvatarPipeline, request: Request) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """A state for each cut; of a segment after every block that may end one."""
    recorder, states = TensorRecorder(), {}
    for _ in pipeline.stream(request, recorder=recorder, take=Take(segment_frames=1)):
        if (coming := recorder.blocks[-1].block + 1) in pipeline.cuts:
            states[coming] = {
                name: {key: tensor.clone() for key, tensor in part.items()} for name, part in pipeline.state()
            }
    return states


@pytest.mark.parametrize("place", PLACES)
def test_a_fresh_process_goes_on_bit_by_bit(tiny, request_of, place):
    expected = whole(opened(tiny, place), request_of())
    states = states_of(opened(tiny, place), request_of())
    assert set(states) >= {1, 2, 3, 4}  # within the first clip, before and behind the refreshed sink, in the third clip
    for coming, state in states.items():
        if place != "resident" and coming not in (1, 4):
            continue
        recorder, pipeline = TensorRecorder(), opened(tiny, place)
        take = Take(segment_frames=1, next_block=coming, state=state.__getitem__)
        for _ in pipeline.stream(request_of(), recorder=recorder, take=take):
            pass
        got, blocks = recorder.tensors(), range(coming, len(recorder.blocks) + coming)
        assert recorder.earlier_frames + got["frames"].shape[1] == expected["frames"].shape[1]
        assert torch.equal(got["frames"], expected["frames"][:, recorder.earlier_frames :])
        for index, block in enumerate(blocks):
            assert torch.equal(got[f"latents.block{index}"], expected[f"latents.block{block}"])


def test_clip_by_clip_a_take_is_cut_between_clips(tiny, request_of):
    pipeline = opened(tiny)
    assert set(states_of(pipeline, request_of(online_decode=False))) == {2, 4, 6}


def test_a_cut_of_a_wave_lets_it_run_dry():
    blocks = list(blocks_of(3, 12))
    for wave in (1, 2, 4):
        items = [(block.index, step) for tick in ticks(blocks, 4, wave, cuts={3, 7}) for block, step in tick.items]
        assert sorted(items) == [(block.index, step) for block in blocks for step in range(4)]
        for cut in (3, 7):
            before = [place for place, (index, _) in enumerate(items) if index < cut]
            behind = [place for place, (index, _) in enumerate(items) if index >= cut]
            assert max(before) < min(behind)


def test_the_sink_is_refreshed_once_wherever_a_take_goes_on():
    blocks = list(blocks_of(3, 12))
    refreshes = {
        first: [tick.starts.index for tick in ticks(blocks[first:], 4, 2) if tick.refresh and tick.starts]
        for first in range(len(blocks))
    }
    assert refreshes == {first: [4] if first <= 4 else [] for first in range(12)}


@pytest.mark.parametrize("frames", [1, 5, 12, 13, 40, 10_000])
@pytest.mark.parametrize("within_clips", [True, False])
def test_segments_are_as_long_as_they_are_to_be(frames, within_clips):
    extent = Extent.of(5 * 48 + 12, 48)
    cuts = list(extent.cuts(frames, within_clips=within_clips, needed=200))
    firsts = [0, *(block.first_video_frame for block in cuts)]
    assert all(after - before >= frames for before, after in itertools.pairwise(firsts))
    assert all(first < 200 for first in firsts)
    assert within_clips or all(block.slot == 0 for block in cuts)
    blocks = list(extent.blocks())
    possible = [b for b in blocks if frames <= b.first_video_frame < 200 and (within_clips or b.slot == 0)]
    assert bool(cuts) == bool(possible)


def segments_of(pipeline: AvatarPipeline, request: Request, video: Path, **options: object) -> dict:
    outputs = Outputs(video=video, **{"segment_minutes": 0.008} | options)  # 12 frames
    return infer(pipeline, request, outputs, quiet=True)


def test_segments_join_to_the_video_of_one_run(tiny, request_of, tmp_path):
    pipeline = opened(tiny, resident=True)
    report = segments_of(pipeline, request_of(), tmp_path / "a.mp4")
    paths = [Path(path) for path in report["segments"]]
    assert [path.name for path in paths] == [f"a-00{number}.mp4" for number in range(4)]
    assert not folder_of(tmp_path / "a.mp4").exists()
    once = infer(pipeline, request_of(), Outputs(video=tmp_path / "once.mp4"), quiet=True)
    assert join(paths, tmp_path / "joined.mp4") == once["frames_written"] == report["frames_written"]
    joined, single = probe(tmp_path / "joined.mp4"), probe(tmp_path / "once.mp4")
    assert joined["frames"] == single["frames"]
    assert abs(joined["audio_duration_s"] - single["audio_duration_s"]) < 0.03


class Enough(Exception):
    """Somebody ends the run."""


def stopped_behind(block: int):
    from lowvram.infer import Watching

    def written(recorder) -> None:
        if recorder.blocks[-1].block == block:
            raise Enough

    return Watching(written=written)


@pytest.mark.parametrize("block", [0, 1, 2, 3, 5])
def test_what_was_stopped_goes_on(tiny, request_of, tmp_path, block):
    video, pipeline = tmp_path / "a.mp4", opened(tiny, resident=True)
    outputs = Outputs(video=video, segment_minutes=0.008)
    with pytest.raises(Enough):
        infer(pipeline, request_of(), outputs, quiet=True, watching=stopped_behind(block))
    report = segments_of(pipeline, request_of(), video, resume=True, dump_tensors=tmp_path / "dump.safetensors")
    assert (report["resumed_at_block"] or 0) <= block + 1
    assert bool(report["resumed_at_block"]) == (block > 0)
    paths = [Path(path) for path in report["segments"]]
    again = segments_of(pipeline, request_of(), video, resume=True)
    assert [Path(path) for path in again["segments"]] == paths  # and nothing was made
    assert again["frames"] == 0
    from safetensors.torch import load_file

    got, expected = load_file(tmp_path / "dump.safetensors")["frames"], whole(pipeline, request_of())["frames"]
    assert torch.equal(got, expected[:, expected.shape[1] - got.shape[1] :])
    assert join(paths, tmp_path / "joined.mp4") == report["frames_written"]


CHANGED = {
    "prompt": {"prompt": "A pirate sings"},
    "seed": {"base_seed": 3},
    "size": {"size": "192*128"},
    "steps": {"sample_steps": 1},
    "clip": {"infer_frames": 20},
}


def test_another_take_is_not_gone_on_with(tiny, request_of, tmp_path):
    video, pipeline = tmp_path / "a.mp4", opened(tiny, resident=True)
    outputs = Outputs(video=video, segment_minutes=0.008)
    with pytest.raises(Enough):
        infer(pipeline, request_of(), outputs, quiet=True, watching=stopped_behind(2))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for change in CHANGED.values():
        with pytest.raises(InputError, match="is of another take"):
            segments_of(pipeline, request_of(**change), video, resume=True)
        # What was unfinished got another name, and nothing else changed.
        left = sorted(path.name for path in tmp_path.rglob("*"))
        assert [name for name in left if "partial" not in name] == [name for name in before if "partial" not in name]


def test_a_missing_segment_is_said(tiny, request_of, tmp_path):
    video, pipeline = tmp_path / "a.mp4", opened(tiny, resident=True)
    outputs = Outputs(video=video, segment_minutes=0.008)
    with pytest.raises(Enough):
        infer(pipeline, request_of(), outputs, quiet=True, watching=stopped_behind(2))
    (tmp_path / "a-000.mp4").unlink()
    with pytest.raises(InputError, match=r"a-000\.mp4 is missing"):
        segments_of(pipeline, request_of(), video, resume=True)


def test_segments_that_are_there_are_replaced_only_where_that_is_asked(tiny, request_of, tmp_path):
    video, pipeline = tmp_path / "a.mp4", opened(tiny, resident=True)
    request = request_of(infer_frames=12, sample_steps=1)
    segments_of(pipeline, request, video)
    with pytest.raises(InputError, match="a segment of an earlier take"):
        segments_of(pipeline, request, video)
    report = segments_of(pipeline, request, video, overwrite=True, segment_minutes=0.016)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [Path(path).name for path in report["segments"]]  # those of the longer list are gone
    (tmp_path / "a-007.mp4").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"a-007\.mp4 is in the way"):
        segments_of(pipeline, request, video, overwrite=True)


@pytest.mark.parametrize("name", ["image", "pose_video"])
def test_a_segment_that_is_read_is_not_replaced(tiny, request_of, tmp_path, name):
    video, pipeline = tmp_path / "a.mp4", opened(tiny, resident=True)
    request = request_of(infer_frames=12, sample_steps=1, num_clip=1)
    segments_of(pipeline, request, video)
    before = (tmp_path / "a-000.mp4").read_bytes()
    with pytest.raises(InputError, match=r"a-000\.mp4.*one would destroy the other"):
        segments_of(pipeline, dataclasses.replace(request, **{name: tmp_path / "a-000.mp4"}), video, overwrite=True)
    assert (tmp_path / "a-000.mp4").read_bytes() == before


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_that_cannot_be(minutes, tmp_path):
    with pytest.raises(ConfigError, match="--segment-minutes is"):
        Outputs(video=tmp_path / "a.mp4", segment_minutes=minutes)


def test_resume_is_of_segments(tmp_path):
    with pytest.raises(ConfigError, match="give --segment-minutes as before"):
        Outputs(video=tmp_path / "a.mp4", resume=True)


def stored(place: Path, number: int) -> State:
    return State(folder=place / f"{number:03d}", take="t", next_block=number, segments=("a",), frames=9)


def test_the_newest_whole_state_counts(tmp_path):
    place = tmp_path / "a.state"
    assert latest(place) is None
    save(place, stored(place, 1), [("x", {"y": torch.arange(3)})])
    save(place, stored(place, 2), [("x", {"y": torch.arange(4)})])
    found = latest(place)
    assert found == stored(place, 2)
    assert torch.equal(found.part("x")["y"], torch.arange(4))
    assert [path.name for path in place.iterdir()] == ["002"]
    (place / "003").mkdir()  # of a process that was killed
    (place / "003" / "x.safetensors").write_bytes(b"half")
    assert latest(place) == found


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    place = tmp_path / "a.state"
    save(place, stored(place, 1), [("x", {"y": torch.arange(3)})])

    def parts():
        yield "x", {"y": torch.arange(3)}
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        save(place, stored(place, 2), parts())
    assert latest(place) == stored(place, 1)


DAMAGES = {
    "no JSON": b"{",
    "a list": b"[]",
    "another version": json.dumps({"version": 99}).encode(),
    "too little": json.dumps({"version": 1, "take": "t"}).encode(),
    "nothing": b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_said(tmp_path, damage):
    place = tmp_path / "a.state"
    save(place, stored(place, 1), [("x", {"y": torch.arange(3)})])
    (place / "001" / FACTS).write_bytes(DAMAGES[damage])
    with pytest.raises(InputError, match="begin again without --resume"):
        latest(place)


def test_a_damaged_part_is_said(tmp_path):
    place = tmp_path / "a.state"
    save(place, stored(place, 1), [("x", {"y": torch.arange(3)})])
    (place / "001" / "x.safetensors").write_bytes(b"half")
    found = latest(place)
    assert found is not None
    with pytest.raises(InputError, match=r"x\.safetensors cannot be read"):
        found.part("x")


def test_killed_in_the_middle_it_goes_on(tiny, request_of, tmp_path):
    video, request = tmp_path / "a.mp4", request_of(num_clip=3)
    command = [
        *(sys.executable, "-m", "lowvram", "infer", "--model", str(tiny.artifact("int8")), "--device", "cpu"),
        *("--image", str(request.image), "--audio", str(request.audio), "--prompt", request.prompt),
        *("--size", request.size, "--infer-frames", "16", "--num-clip", "3", "--sample-steps", "2"),
        *("--out", str(video), "--segment-minutes", "0.008", "-q"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waited = time.monotonic() + 120
    while latest(folder_of(video)) is None and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    dump = tmp_path / "dump.safetensors"
    rest = subprocess.run(
        [*command, "--resume", "--dump-tensors", str(dump)], capture_output=True, text=True, check=True
    )
    paths = [Path(line) for line in rest.stdout.split()]
    assert [path.name for path in paths] == [f"a-{number:03d}.mp4" for number in range(len(paths))]
    from safetensors.torch import load_file

    # A process of its own, too: with as many threads, sums are added up alike.
    once = [*command[: command.index("--out")], "--out", str(tmp_path / "once.mp4"), "-q"]
    subprocess.run([*once, "--dump-tensors", str(tmp_path / "once.safetensors")], capture_output=True, check=True)
    got, expected = (load_file(path)["frames"] for path in (dump, tmp_path / "once.safetensors"))
    assert got.shape[1] < expected.shape[1]
    assert np.array_equal(got.numpy(), expected[:, expected.shape[1] - got.shape[1] :].numpy())
    assert join(paths, tmp_path / "joined.mp4") == min(expected.shape[1], 50)


def test_a_state_is_of_a_video_that_is_being_made(tiny):
    with pytest.raises(RuntimeError, match="nothing is being made"):
        opened(tiny).state()


def test_segments_are_for_one_rank(tiny, request_of):
    pipeline = opened(tiny)
    pipeline.team.layout = ParallelLayout(num_gpus_dit=2)
    with pytest.raises(ConfigError, match="segments are to be made of 2 ranks"):
        pipeline.stream(request_of(), take=Take(segment_frames=1))


def test_a_finished_take_is_not_replaced_by_another_that_resumes(tiny, request_of, tmp_path):
    """Its state is gone, so that nothing but its segments says whose they are."""
    video, pipeline = tmp_path / "a.mp4", opened(tiny, resident=True)
    settings = {"infer_frames": 12, "sample_steps": 2, "num_clip": 1}
    segments_of(pipeline, request_of(**settings), video)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change in CHANGED.values():
        with pytest.raises(InputError, match="a segment of another take"):
            segments_of(pipeline, request_of(**settings | change), video, resume=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
