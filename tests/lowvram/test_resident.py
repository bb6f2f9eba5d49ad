"""Several videos in one process: what stays, what is read again, and that nothing of one is seen in the next."""

from __future__ import annotations

import gc
from collections.abc import Callable

import psutil
import pytest
import torch

from lowvram.encode import conditions
from lowvram.infer import infer
from lowvram.offload.kept import PROMPTS, Kept
from lowvram.offload.placement import MemoryOptions
from lowvram.outputs import Outputs
from lowvram.parallel.team import SingleRank
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import ConfigError

OTHERS = {
    "the same": {},
    "another seed": {"base_seed": 7},
    "another prompt": {"prompt": "A pirate sings"},
    "another size": {"size": "192*128"},
    "longer clips": {"infer_frames": 20},
    "fewer steps": {"sample_steps": 1},
    "one clip": {"num_clip": 1},
    "clip by clip": {"online_decode": False},
}
PLACES = {
    "resident": MemoryOptions(),
    "streamed": MemoryOptions(offload_model=True),
    "int8 rings on the host": MemoryOptions(offload_kv_cache=True, kv="int8"),
}


def tensors_of(pipeline: AvatarPipeline, request: Request) -> dict[str, torch.Tensor]:
    recorder = TensorRecorder()
    for _ in pipeline.stream(request, recorder=recorder):
        pass
    return recorder.tensors()


def opened(tiny, *, resident: bool, memory: MemoryOptions | None = None) -> AvatarPipeline:
    return AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu", memory=memory, resident=resident)


@pytest.fixture(scope="module")
def fresh(tiny) -> Callable[[str, str], dict[str, torch.Tensor]]:
    """The tensors of a video that a process makes first."""
    made: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def tensors(place: str, name: str) -> dict[str, torch.Tensor]:
        if (place, name) not in made:
            pipeline = opened(tiny, resident=False, memory=PLACES[place])
            made[place, name] = tensors_of(pipeline, tiny.request(**OTHERS[name]))
        return made[place, name]

    return tensors


@pytest.mark.parametrize("place", PLACES)
def test_videos_of_one_process_equal_those_of_fresh_ones(tiny, fresh, place):
    pipeline = opened(tiny, resident=True, memory=PLACES[place])
    for name in ("another seed", *OTHERS) if place == "resident" else ("another size", "the same", "another prompt"):
        expected, got = fresh(place, name), tensors_of(pipeline, tiny.request(**OTHERS[name]))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), name


@pytest.mark.parametrize("place", PLACES)
def test_a_second_video_reads_no_weights(tiny, place, tmp_path):
    pipeline = opened(tiny, resident=True, memory=PLACES[place])
    read = []
    for number, seed in enumerate((1, 2)):
        report = infer(pipeline, tiny.request(base_seed=seed), Outputs(video=tmp_path / f"{number}.mp4"), quiet=True)
        read.append(report["memory"]["weight_bytes_read"])
    artifact = pipeline.runtime.artifact
    whole = sum(artifact.component(name).slab_nbytes(slab) for name in ("dit", "vae", "text_encoder") for slab in
                artifact.component(name).slab_names)  # fmt: skip
    assert read[0] > whole  # and the audio encoder's
    assert read[1] == 0


def test_without_being_resident_weights_are_read_again(tiny, tmp_path):
    pipeline = opened(tiny, resident=False)
    read = [
        infer(pipeline, tiny.request(), Outputs(video=tmp_path / f"{number}.mp4"), quiet=True)["memory"]
        for number in range(2)
    ]
    assert read[0]["weight_bytes_read"] == read[1]["weight_bytes_read"] > 0


def test_another_size_reads_no_weights_either(tiny):
    pipeline = opened(tiny, resident=True)
    tensors_of(pipeline, tiny.request())
    before = pipeline.runtime.artifact.read_bytes
    for name in ("another size", "longer clips", "fewer steps"):
        tensors_of(pipeline, tiny.request(**OTHERS[name]))
    assert pipeline.runtime.artifact.read_bytes == before


def test_of_a_new_prompt_the_text_encoder_alone_is_read(tiny):
    pipeline = opened(tiny, resident=True)
    tensors_of(pipeline, tiny.request())
    text = pipeline.runtime.artifact.component("text_encoder")
    others = pipeline.runtime.artifact.read_bytes - text.read_bytes
    before = text.read_bytes
    tensors_of(pipeline, tiny.request(prompt="A pirate sings"))
    assert text.read_bytes - before == sum(text.slab_nbytes(slab) for slab in text.slab_names)
    assert pipeline.runtime.artifact.read_bytes - text.read_bytes == others


def test_the_prompt_that_was_not_used_for_longest_is_forgotten():
    kept = Kept()
    for number in range(PROMPTS):
        kept.remember(str(number), torch.tensor([number]), torch.zeros(1))
    assert kept.prompt("0") is not None  # used now
    kept.remember("one more", torch.tensor([0]), torch.zeros(1))
    assert kept.prompt("1") is None
    known = kept.prompt("0")
    assert known is not None
    assert known[0].item() == 0


def test_a_video_that_nobody_wants_more_of_leaves_all_in_order(tiny, fresh):
    pipeline = opened(tiny, resident=True)
    for blocks in (1, 3):
        stream = pipeline.stream(tiny.request(base_seed=9))
        for _ in range(blocks):
            next(stream)
        stream.close()
        before = pipeline.runtime.artifact.read_bytes
        got = tensors_of(pipeline, tiny.request())
        assert pipeline.runtime.artifact.read_bytes == before
        assert torch.equal(got["frames"], fresh("resident", "the same")["frames"])


@pytest.mark.parametrize("where", ["encoding", "denoising", "decoding"])
def test_of_a_video_that_failed_nothing_stays(tiny, fresh, monkeypatch, where):
    pipeline = opened(tiny, resident=True)
    tensors_of(pipeline, tiny.request())

    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("broken")

    place = {
        "encoding": "lowvram.encode.conditions.encode_audio",
        "denoising": "lowvram.denoise.rollout.Rollout.advance",
        "decoding": "lowvram.decode.to_pixels",
    }[where]
    with monkeypatch.context() as broken:
        broken.setattr(place, fails)
        with pytest.raises(RuntimeError, match="broken"):
            tensors_of(pipeline, tiny.request())
    assert pipeline.runtime.kept is not None
    assert pipeline.runtime.kept.model is None
    assert torch.equal(tensors_of(pipeline, tiny.request())["frames"], fresh("resident", "the same")["frames"])


def test_let_go_gives_back_what_stays(tiny):
    pipeline = opened(tiny, resident=True)
    tensors_of(pipeline, tiny.request())
    pipeline.let_go()
    before = pipeline.runtime.artifact.read_bytes
    tensors_of(pipeline, tiny.request())
    read, dit = pipeline.runtime.artifact.read_bytes - before, pipeline.runtime.artifact.component("dit")
    assert 0 < read < sum(dit.slab_nbytes(slab) for slab in dit.slab_names)  # what is held on the host, is


def test_many_videos_take_no_more_memory(tiny):
    request = tiny.request(num_clip=1, infer_frames=12, sample_steps=1)
    pipeline, seen = opened(tiny, resident=True), []
    for seed in range(10):
        tensors_of(pipeline, Request(**{**vars(request), "base_seed": seed}))
        gc.collect()
        seen.append(psutil.Process().memory_info().rss)
    assert max(seen[3:]) <= 1.01 * min(seen[3:])


def test_conditions_of_a_known_prompt_are_not_encoded(tiny, monkeypatch):
    pipeline = opened(tiny, resident=True)
    calls: list[str] = []
    encode = conditions.encode_text

    def counted(artifact, prompt, *rest):
        calls.append(prompt)
        return encode(artifact, prompt, *rest)

    monkeypatch.setattr(conditions, "encode_text", counted)
    for prompt in ("a", "b", "a", "b", "a"):
        tensors_of(pipeline, tiny.request(prompt=prompt, num_clip=1))
    assert calls == ["a", "b"]


def test_several_ranks_are_refused(tiny):
    class Two(SingleRank):
        def __init__(self) -> None:
            super().__init__()
            self.layout = ParallelLayout(num_gpus_dit=2)

    with pytest.raises(ConfigError, match="2 ranks share the work; expected one"):
        AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu", team=Two(), resident=True)
