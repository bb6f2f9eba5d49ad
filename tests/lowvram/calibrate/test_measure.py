"""Errors at a Linear's output, against what is computed by hand; and that looking on changes nothing."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from lowvram.calibrate.activations import Watched
from lowvram.calibrate.measure import STORED, LinearError, measure
from lowvram.calibrate.observe import observe, watch, watchable
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_kernels.linear import reference_w8a8
from lowvram_kernels.rotation import rotated
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.original import original_of
from lowvram_quantize.shape_artifact import write_shape_artifact
from tests.quantize.checkpoints import base_of, change_dit, clone, quantized_rows

ALL = ("int8", "fp8", "bf16")


def pipeline(tiny) -> AvatarPipeline:
    return AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu")


def latents(made: AvatarPipeline, request, watched=None) -> torch.Tensor:
    def begun(rollout, _blocks: int) -> None:
        if watched is not None:
            watch(rollout.dit, watched)

    return torch.cat([latent.flatten() for _, latent in made.denoise(request, begun)])


@pytest.fixture(scope="module")
def one_clip(tiny):
    return tiny.request(num_clip=1)


@pytest.fixture(scope="module")
def errors(tiny, original, one_clip) -> dict[str, LinearError]:
    return measure(Artifact.open(tiny.artifact("int8")), original, one_clip, schemes=ALL, device="cpu")


@pytest.fixture(scope="module")
def watched(tiny, one_clip) -> dict[str, Watched]:
    return observe(pipeline(tiny), one_clip, quiet=True)


def test_a_watched_run_is_the_run(tiny, one_clip):
    made = pipeline(tiny)
    watched = {name: Watched() for name in watchable(made.runtime.artifact.component("dit"))}
    plain = latents(made, one_clip)
    seen = latents(pipeline(tiny), one_clip, watched)
    assert (seen - plain).norm() < 1e-4 * plain.norm()


def test_every_linear_of_the_layers_is_measured(tiny, errors):
    facts = Artifact.open(tiny.artifact("int8")).component("dit").facts["tensors"]
    assert list(errors) == [name for name, each in facts.items() if each["scheme"] == "int8"]
    assert {name.split(".")[0] for name in errors} == {"blocks", "audio_injector"}
    assert all(set(error.error_energy) == {STORED, *ALL} for error in errors.values())
    assert all(error.scheme == "int8" and error.rows > 0 for error in errors.values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.self_attn.q.weight",
        "blocks.1.self_attn.o.weight",
        "blocks.2.cross_attn.k.weight",
        "blocks.3.ffn.0.weight",
        "blocks.3.ffn.2.weight",
        "audio_injector.injector.0.v.weight",
        "audio_injector.injector_adain_layers.1.linear.weight",
    ],
)
def test_an_error_is_that_of_the_product(tiny, original, watched, errors, name, dtype):
    x, weight, bias = watched[name].rows(), original.merged(name), original.merged(name[: -len("weight")] + "bias")
    exact = x.double() @ weight.double().t() + bias.double()
    group, factors = original.int8(name) if dtype is torch.int8 else (1, None)
    weight = weight if factors is None else weight / factors
    q, scale = quantized_rows(rotated(weight, group), dtype)
    wrong = reference_w8a8(x, q, scale, bias, group=group, smooth_K=factors) - exact
    one, scheme = errors[name], "int8" if dtype is torch.int8 else "fp8"
    assert one.rows == len(x)
    assert one.output_energy == pytest.approx(float(exact.square().sum()), rel=1e-4)
    assert one.error_energy[scheme] == pytest.approx(float(wrong.square().sum()), rel=2e-2)
    if scheme == "int8":
        assert one.error_energy[STORED] == pytest.approx(one.error_energy["int8"], rel=2e-2)


def test_the_model_is_gone_before_weights_are_read(tiny, original, one_clip, monkeypatch):
    """So that there is never a whole copy of it beside the source's."""
    seen: list[weakref.ref] = []

    def watch_and_note(dit, watched) -> None:
        seen.append(weakref.ref(dit))
        watch(dit, watched)

    class Read(Exception):
        pass

    def merged(_name: str) -> torch.Tensor:
        raise Read(seen[0]())

    monkeypatch.setattr("lowvram.calibrate.observe.watch", watch_and_note)
    monkeypatch.setattr(original, "merged", merged)
    with pytest.raises(Read) as read:
        measure(Artifact.open(tiny.artifact("int8")), original, one_clip, device="cpu", quiet=True)
    assert len(seen) == 1
    assert read.value.args == (None,)


def test_schemes_are_as_good_as_they_are(errors):
    for name, one in errors.items():
        # A weight that no LoRA touches was bf16 from the start.
        assert 0 <= one.relative_error("bf16") < one.relative_error("int8") < one.relative_error("fp8") < 0.1, name


@pytest.mark.parametrize("precision", ["bf16"])
def test_artifacts_of_other_precisions(tiny, original, one_clip, errors, precision):
    found = measure(Artifact.open(tiny.artifact(precision)), original, one_clip, device="cpu", schemes=(precision,))
    assert list(found) == list(errors)
    for one in found.values():
        assert one.scheme == precision
        assert one.error_energy[STORED] == pytest.approx(one.error_energy[precision], rel=2e-2, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"rotate": False, "smooth": True}])
def test_what_is_stored_is_what_would_be(tiny, tmp_path, one_clip, options):
    """Where input channels stand out, so that it matters how they are smoothed and rotated."""
    checkpoint = clone(tiny.checkpoint, tmp_path / "ckpt")
    for name in ("self_attn.q", "self_attn.k", "cross_attn.q", "ffn.0"):
        change_dit(base_of(checkpoint), f"blocks.1.{name}.weight", lambda t: t * torch.logspace(-1, 1, t.shape[1]))
    artifact = Artifact.open(convert(checkpoint, tmp_path / "out", **options))
    found = measure(artifact, original_of(checkpoint, **options), one_clip, schemes=("int8",), device="cpu", quiet=True)
    for name, one in found.items():
        assert one.error_energy[STORED] == pytest.approx(one.error_energy["int8"], rel=5e-2), name
        assert one.relative_error() < 0.1


def test_inputs_do_not_depend_on_where_layers_are(tiny, original, one_clip, errors):
    streamed = MemoryOptions(offload_model=True, wave=2)
    found = measure(Artifact.open(tiny.artifact("int8")), original, one_clip, schemes=(), memory=streamed, device="cpu")
    for name, one in found.items():
        assert set(one.error_energy) == {STORED}
        assert one.output_energy == pytest.approx(errors[name].output_energy, rel=1e-3)
        assert one.activations.amax == pytest.approx(errors[name].activations.amax, rel=1e-3)


@pytest.mark.parametrize(
    ("schemes", "said"), [(("int4",), "int4"), (("int8", "nf4"), "nf4"), (("INT8",), "INT8"), (("",), "none of")]
)
def test_a_scheme_that_is_not_known(tiny, original, one_clip, schemes, said):
    with pytest.raises(ConfigError, match=said):
        measure(Artifact.open(tiny.artifact("int8")), original, one_clip, schemes=schemes, device="cpu")


def test_a_shape_artifact_has_nothing_to_measure(original, one_clip, tmp_path):
    shapes = write_shape_artifact(tmp_path / "shapes", preset="tiny", precision="int8")
    with pytest.raises(CheckpointError, match="shape artifact"):
        measure(Artifact.open(shapes), original, one_clip, device="cpu")


class Other:
    def __init__(self, original):
        self._original = original

    def merged(self, name: str) -> torch.Tensor:
        return self._original.merged(name)[:-1]

    def int8(self, name: str) -> tuple[int, torch.Tensor | None]:
        return self._original.int8(name)


def test_another_models_weights(tiny, original, one_clip, watched, monkeypatch):
    monkeypatch.setattr("lowvram.calibrate.measure.observe", lambda *_args, **_options: dict(watched))
    with pytest.raises(CheckpointError, match=r"in the artifact and .* in the source"):
        measure(Artifact.open(tiny.artifact("int8")), Other(original), one_clip, device="cpu")


def test_what_is_watched_is_what_may_be_stored_in_8_bit(tiny):
    names = {p: watchable(Artifact.open(tiny.artifact(p)).component("dit")) for p in ("int8", "fp8", "bf16")}
    assert names["int8"] == names["fp8"] == names["bf16"]


def test_an_output_of_zeros():
    none = LinearError(
        shape=(1, 1),
        scheme="int8",
        rows=1,
        output_energy=0.0,
        error_energy={STORED: 0.0, "fp8": 1.0},
        activations=None,
        channel_rms=torch.ones(1),
    )
    assert (none.relative_error(), none.relative_error("fp8")) == (0.0, math.inf)
