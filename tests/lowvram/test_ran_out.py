"""Which errors say that a device's memory ran out, and that all of them lead to the same places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.distributed import DistBackendError

from lowvram import infer as infer_module
from lowvram.cli import main
from lowvram.denoise.cuda_graphs import LayerGraphs
from lowvram.devices import allocator_refusals, is_out_of_memory
from lowvram.infer import infer
from lowvram.loading import encoders
from lowvram.offload.copy_engine import Engine
from lowvram.offload.oom import Attempt, Ladder, Rung, first_sentences
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import DeviceError, OutOfMemoryError
from lowvram_models.dit import CausalDiT
from lowvram_quantize.format import Artifact
from tests.lowvram.offload.test_oom import frames_of

HINTS = (
    "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/ for more information.\nCUDA kernel "
    "errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.\nFor "
    "debugging consider passing CUDA_LAUNCH_BLOCKING=1\nDevice-side assertion tracking was not enabled by user."
)
CUDA = torch.AcceleratorError("CUDA error: out of memory" + HINTS)
TRITON = RuntimeError("Triton Error [CUDA]: out of memory")
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")
RAN_OUT = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    CUDA,
    RuntimeError("CUDA error: out of memory" + HINTS),  # torch before it had a class for it
    RuntimeError("CUDA driver error: out of memory"),
    TRITON,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL "
        "version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of "
        "memory'"
    ),
]
OTHERS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + HINTS.replace("Memory", "X")),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77\nLast error:\nCuda failure 1 'invalid argument'"),
    OutOfMemoryError("5 GiB of host memory needed"),  # our own: somebody has tried everything
    MemoryError("CUDA error: out of memory"),
    NO_ENGINE,
]


@pytest.mark.parametrize("error", RAN_OUT, ids=lambda error: str(error)[:40])
def test_memory_that_ran_out_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_nothing_else_is_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_a_code_says_it_whatever_the_words_are():
    error = torch.AcceleratorError("CUDA error: speicher voll")
    assert not is_out_of_memory(error)
    error.error_code = 2
    assert is_out_of_memory(error)
    error.error_code = 700
    assert not is_out_of_memory(error)


def test_a_convolution_without_an_engine_ran_out_where_the_allocator_has_refused(monkeypatch):
    assert allocator_refusals() == 0
    refused = [3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": refused[0]})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def convolve(refusals: int) -> None:
        refused[0] += refusals
        raise NO_ENGINE

    with Attempt() as attempt:
        convolve(2)
    assert attempt.reason == str(NO_ENGINE)
    with pytest.raises(RuntimeError, match="unable to find an engine"), Attempt():
        convolve(0)


def test_hints_are_left_out_of_what_is_said():
    assert first_sentences(CUDA) == "CUDA error: out of memory"


@pytest.mark.parametrize("error", [CUDA, TRITON])
def test_a_run_goes_on_slower_whoever_ran_out(tiny, monkeypatch, error):
    plain, _ = frames_of(tiny)
    real, calls = CausalDiT.layer, []

    def layer(self, *args):
        calls.append(1)
        if len(calls) == 10:
            raise error
        return real(self, *args)

    monkeypatch.setattr(CausalDiT, "layer", layer)
    frames, pipeline = frames_of(tiny)
    assert np.array_equal(frames, plain)
    assert pipeline.run.ladder.events == ["denoise: 1 of 4 layers are streamed now"]


def ladder(**more) -> Ladder:
    rung = Rung(placement=Placement(), online_decode=True)
    return Ladder(rung, layers=4, steps=range(1), allowed=True, **more)


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("broken", ["synchronize", "empty_cache"])
def test_a_device_that_does_not_answer_any_more_is_said_and_not_tried_again(monkeypatch, broken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", dict)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, broken, lambda: fail(OTHERS[0]))
    tried = []

    words = r"ran out in denoise .*does not answer since .*illegal memory.*start again"
    with pytest.raises(DeviceError, match=words):  # noqa: PT012
        for attempt in ladder().attempts("denoise"):
            with attempt:
                tried.append(1)
                raise CUDA
    assert tried == [1]


@pytest.mark.parametrize("error", [TRITON, CUDA])
def test_ranks_that_work_together_step_down_for_it_too(error):
    told, left, done = [], [1], []

    def any_ran_out(here: bool) -> bool:
        told.append(here)
        return here

    together = ladder().attempts_together("denoise", lambda _: 0, keep_up=lambda: None, any_ran_out=any_ran_out)
    for attempt in together:
        with attempt:
            if left and left.pop():
                raise error
            done.append(1)
    assert (done, told) == ([1], [True, False])


def test_what_can_run_on_the_host():
    tried = []
    for where, attempt in ladder().devices("encode_text", torch.device("meta")):
        with attempt:
            tried.append(where.type)
            if where.type == "meta":
                raise CUDA
    assert tried == ["meta", "cpu"]
    with pytest.raises(torch.AcceleratorError):  # noqa: PT012
        for _, attempt in ladder().devices("encode_text", torch.device("meta")):
            with attempt:
                raise CUDA


def test_a_copy_without_memory_is_no_failed_copy(monkeypatch):
    engine, a = Engine(torch.device("cpu")), torch.zeros(4)
    monkeypatch.setattr(engine, "_copy_in", lambda *_: fail(CUDA))
    with pytest.raises(torch.AcceleratorError):
        engine.copy_in(a, a)
    monkeypatch.setattr(engine, "_copy_in", lambda *_: fail(OTHERS[0]))
    with pytest.raises(DeviceError):
        engine.copy_in(a, a)


def test_a_capture_without_memory_gives_graphs_up():
    gave_up = []
    graphs = LayerGraphs(lambda: lambda work: fail(TRITON), Engine(torch.device("cpu")), gave_up.append)
    assert graphs._captured(None, (0, 0), lambda: None) is None
    assert gave_up == [str(TRITON)]


def test_an_encoder_without_room_is_no_damaged_encoder(tiny, monkeypatch):
    monkeypatch.setattr(Artifact, "read_tensors", lambda artifact, name: fail(CUDA))
    with pytest.raises(torch.AcceleratorError):
        encoders.load_audio_encoder(Artifact.open(tiny.artifact("fp32")), torch.device("cpu"))


def test_what_nothing_could_relieve_still_makes_a_smaller_video_where_that_is_allowed(tiny, tmp_path, monkeypatch):
    real, tried = infer_module._make, []

    def make(pipeline, request, *rest):
        tried.append(request.infer_frames)
        return fail(CUDA) if len(tried) == 1 else real(pipeline, request, *rest)

    monkeypatch.setattr(infer_module, "_make", make)
    memory = MemoryOptions(allow_quality_loss=True)
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu", memory=memory)
    report = infer(pipeline, tiny.request(num_clip=1), Outputs(video=tmp_path / "out.mp4"), quiet=True)
    assert tried == [16, 12]
    assert report["quality_lost"]


@pytest.mark.parametrize(("error", "words"), [(CUDA, "memory ran out"), (OTHERS[0], "the GPU failed")])
def test_the_command_line_says_which_it_was(monkeypatch, error, words):
    from lowvram.commands import plan as shown

    monkeypatch.setattr(shown, "plan_for", lambda *_: fail(error))
    result = CliRunner().invoke(main, ["plan", "--preset", "tiny"])
    assert (result.exit_code, words in result.stderr) == (1, True)


def test_what_failed_is_given_back_before_it_is_tried_again():
    done: list[str] = []
    for attempt in ladder(empty_cache=lambda: done.append("freed")).attempts("denoise"):
        with attempt:
            done.append("tried")
            if len(done) == 1:
                raise CUDA
    assert done == ["tried", "freed", "tried"]
