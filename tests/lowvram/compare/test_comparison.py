"""Comparisons whose answers are known by construction."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from lowvram.compare.comparison import compare
from lowvram.compare.result import Comparison, parse_fail_under
from lowvram.compare.tables import print_comparison
from lowvram.media.video import VideoWriter
from lowvram_kernels.errors import ConfigError, InputError

HEIGHT, WIDTH = 32, 48
GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline_tiny" / "outputs.safetensors"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(count: int = 5, *, low: int = 40, high: int = 200) -> np.ndarray:
    """[F, H, W, 3], with room for an offset at both ends."""
    return np.random.default_rng(3).integers(low, high, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def dump(path: Path, *, frames: np.ndarray | None = None, metadata: dict[str, str] | None = None, **tensors) -> Path:
    if frames is not None:
        tensors["frames"] = torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2).contiguous()
    save_file({name.replace("_block", ".block"): t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def video(path: Path, frames: np.ndarray, fps: int = 25) -> Path:
    with VideoWriter(path, height=frames.shape[1], width=frames.shape[2], fps=fps) as writer:
        writer.write(frames)
    return path


def report(path: Path, **facts) -> Path:
    path.write_text(json.dumps(facts))
    return path


def strict(comparison: Comparison) -> dict:
    return json.loads(json.dumps(comparison.to_json(), allow_nan=False))


def table(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_comparison(comparison, console)
    return console.file.getvalue()


def test_a_constant_offset_has_the_psnr_of_its_square(tmp_path):
    base = pixels()
    result = compare(dump(tmp_path / "a.safetensors", frames=base + 4), dump(tmp_path / "b.safetensors", frames=base))
    expected = 10 * math.log10(255**2 / 16)
    assert [frame.psnr for frame in result.frames] == pytest.approx([expected] * 5)
    assert result.values["psnr"] == pytest.approx(expected)
    assert 0.9 < result.values["ssim_min"] <= result.values["ssim"] < 1


def test_ssim_of_a_constant_offset_is_the_luminance_term(tmp_path):
    flat = np.full((1, HEIGHT, WIDTH, 3), 100, dtype=np.uint8)
    a, b = dump(tmp_path / "a.safetensors", frames=flat + 20), dump(tmp_path / "b.safetensors", frames=flat)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 120 * 100 + c1) / (120**2 + 100**2 + c1)
    assert compare(a, b).frames[0].ssim == pytest.approx(expected, abs=1e-6)


def test_identical_dumps_are_identical_in_every_figure(tmp_path):
    path = dump(tmp_path / "a.safetensors", frames=pixels(), latents=random(2, 16, 3, 4, 6), zeros=torch.zeros(3))
    result = compare(path, path)
    assert result.values == {
        "psnr": math.inf, "psnr_min": math.inf, "moving_psnr": math.inf, "ssim": 1, "ssim_min": 1, "flicker": 0,
        "cosine": 1, "latent_error": 0, "latent_error_max": 0,
    }  # fmt: skip
    assert result.worst_frame is None
    written = strict(result)
    assert written["values"]["psnr"] == written["frames"][0]["psnr"] == "inf"
    assert written["identical_frames"] == 5
    assert written["tensors"]["zeros"] == {"relative_error": 0, "cosine": 1}
    assert result.check({"psnr": 99, "ssim": 1, "cosine": 1, "latent_error": 0}) == []
    assert "all frames are identical" in table(result)


def test_the_worst_frame_is_found_and_identical_ones_do_not_lift_the_mean(tmp_path):
    base = pixels(30)
    changed = base.copy()
    changed[7] += 2
    changed[26] += 30
    a, b = dump(tmp_path / "a.safetensors", frames=changed), dump(tmp_path / "b.safetensors", frames=base)
    result = compare(a, b)
    assert result.worst_frame.index == 26
    assert result.worst_frame.time_s == pytest.approx(26 / 25)
    low, high = (10 * math.log10(255**2 / offset**2) for offset in (30, 2))
    assert result.values["psnr"] == pytest.approx((low + high) / 2)
    assert result.values["psnr_min"] == pytest.approx(low)
    assert strict(result)["identical_frames"] == 28
    assert f"worst frame: 26 at 1.04 s, PSNR {low:.2f} dB" in table(result)


def test_latent_error_and_cosine_by_construction(tmp_path):
    base = random(2, 16, 3, 4, 6)
    scaled = torch.stack([base[0] * 1.1, base[1] * -1])
    a, b = dump(tmp_path / "a.safetensors", latents=scaled), dump(tmp_path / "b.safetensors", latents=base)
    result = compare(a, b)
    assert [block.relative_error for block in result.blocks] == pytest.approx([0.1, 2], rel=1e-5)
    assert [block.cosine for block in result.blocks] == pytest.approx([1, -1])
    assert result.values["latent_error_max"] == pytest.approx(2, rel=1e-5)
    assert result.values["latent_error"] == pytest.approx(((scaled - base).norm() / base.norm()).item(), rel=1e-5)
    assert result.values["cosine"] == pytest.approx(-1)
    assert "block 1" in table(result)


def test_the_error_is_relative_to_the_second_input(tmp_path):
    a = dump(tmp_path / "a.safetensors", context=torch.full((4,), 3.0))
    b = dump(tmp_path / "b.safetensors", context=torch.full((4,), 2.0))
    assert compare(a, b).tensors[0].relative_error == pytest.approx(0.5)
    assert compare(b, a).tensors[0].relative_error == pytest.approx(1 / 3)


def test_a_baseline_of_zeros_gives_strict_json(tmp_path):
    a = dump(tmp_path / "a.safetensors", context=torch.ones(4))
    b = dump(tmp_path / "b.safetensors", context=torch.zeros(4))
    assert strict(compare(a, b))["tensors"]["context"] == {"relative_error": "inf", "cosine": 0}


def test_shorter_last_blocks_are_stored_apart(tmp_path):
    tensors = {f"latents_block{i}": random(16, 2 if i == 10 else 3, 4, 6, seed=i) for i in range(11)}
    b = dump(tmp_path / "b.safetensors", **tensors)
    a = dump(tmp_path / "a.safetensors", **tensors | {"latents_block10": tensors["latents_block10"] * 1.5})
    result = compare(a, b)
    assert [round(block.relative_error, 5) for block in result.blocks] == [0.0] * 10 + [0.5]
    assert result.tensors == ()


def test_stacked_and_separate_blocks_of_the_same_shape_compare(tmp_path):
    latents = random(2, 16, 3, 4, 6)
    a = dump(tmp_path / "a.safetensors", latents_block0=latents[0], latents_block1=latents[1])
    result = compare(a, dump(tmp_path / "b.safetensors", latents=latents))
    assert result.values["latent_error_max"] == 0


def test_a_missing_block_is_refused(tmp_path):
    a = dump(tmp_path / "a.safetensors", latents_block0=random(16, 3, 4, 6), latents_block2=random(16, 3, 4, 6))
    with pytest.raises(InputError, match=r"\[0, 2\]"):
        compare(a, a)


def test_the_golden_outputs_compare_with_themselves():
    result = compare(GOLDEN, GOLDEN)
    assert len(result.blocks) == 6
    assert {"frames_first9", "frames_last12", "audio_emb", "context"} <= {score.name for score in result.tensors}
    assert all(score.relative_error == 0 for score in result.tensors)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("lowvram.compare.sources._PIECE", 100)
    base = random(7, 5, 19)
    a, b = dump(tmp_path / "a.safetensors", x=base * 1.25), dump(tmp_path / "b.safetensors", x=base)
    result = compare(a, b)
    assert result.tensors[0].relative_error == pytest.approx(0.25)
    assert result.tensors[0].cosine == pytest.approx(1)


def test_videos_of_the_same_frames_are_identical_and_noise_is_not(tmp_path):
    base = pixels(6)
    a, b = video(tmp_path / "a.mp4", base), video(tmp_path / "b.mp4", base)
    assert compare(a, b).values["psnr"] == math.inf
    other = compare(video(tmp_path / "c.mp4", 255 - base), b)
    assert len(other.frames) == 6
    assert other.values["psnr"] < 20
    assert other.warnings == ()


@pytest.mark.parametrize(
    ("frames", "fps", "said"),
    [
        (pixels(9), 25, "has 9 frames, .*b.mp4 5; make both of one length"),
        (pixels(4), 25, "has 4 frames, .*b.mp4 5; make both of one length"),
        (pixels(5), 30, "has 30 frames a second, .*b.mp4 25; make both at one rate"),
        (pixels(5)[:, :, :32], 25, "has frames of 32x32, .*b.mp4 of 48x32; make both of one size"),
        (pixels(5)[:, :16], 25, "has frames of 48x16, .*b.mp4 of 48x32; make both of one size"),
    ],
)
def test_videos_that_do_not_lie_frame_on_frame_are_refused(tmp_path, frames, fps, said):
    a, b = video(tmp_path / "a.mp4", frames, fps), video(tmp_path / "b.mp4", pixels(5))
    with pytest.raises(InputError, match=said):
        compare(a, b)


def test_a_difference_that_stands_still_does_not_flicker(tmp_path):
    base = pixels(6)
    still, alternating = base + 6, base.copy()
    alternating[::2] += 6
    b = dump(tmp_path / "b.safetensors", frames=base)
    found = [
        compare(dump(tmp_path / "a.safetensors", frames=frames), b).values["flicker"] for frames in (still, alternating)
    ]
    assert found == pytest.approx([0, 6 * 5 / 6])


def test_where_the_baseline_moves_has_a_figure_of_its_own(tmp_path):
    """A tenth of the picture moves; only there, or only elsewhere, is the candidate different."""
    base = np.full((8, 20, 30, 3), 100, dtype=np.uint8)
    mouth = (slice(None), slice(10, 16), slice(10, 20))
    base[mouth] += np.arange(8, dtype=np.uint8)[:, None, None, None] * 10
    b = dump(tmp_path / "b.safetensors", frames=base)
    inside, outside = base.copy(), base + 8
    inside[mouth] += 8
    outside[mouth] = base[mouth]
    level = 10 * math.log10(255**2 / 64)
    found = [compare(dump(tmp_path / "a.safetensors", frames=frames), b).values for frames in (inside, outside)]
    assert [values["moving_psnr"] for values in found] == pytest.approx([level, math.inf])
    assert found[0]["psnr"] == pytest.approx(level + 10)  # a tenth of the pixels
    stands = dump(tmp_path / "s.safetensors", frames=np.full((3, 20, 30, 3), 9, dtype=np.uint8))
    other = dump(tmp_path / "o.safetensors", frames=np.full((3, 20, 30, 3), 17, dtype=np.uint8))
    assert compare(other, stands).values["moving_psnr"] == pytest.approx(level)  # nothing moves: all pixels


def test_a_dump_with_frames_compares_with_a_video_and_says_what_that_costs(tmp_path):
    frames = np.repeat(np.full((1, HEIGHT, WIDTH, 3), 120, dtype=np.uint8), 5, axis=0)
    result = compare(dump(tmp_path / "a.safetensors", frames=frames), video(tmp_path / "b.mp4", frames))
    assert result.values["psnr_min"] > 40
    assert "b.mp4 went through video coding" in result.warnings[0]


def test_reports_lead_to_their_files_and_compare_stages_and_settings(tmp_path):
    frames, reports = pixels(4), []
    for name, seed, seconds in (("a", 1, 2.0), ("b", 2, 4.0)):
        dump(tmp_path / f"{name}.safetensors", frames=frames, latents=random(1, 16, 3, 4, 6))
        video(tmp_path / f"{name}.mp4", frames if name == "a" else 255 - frames)
        stages = [{"name": "denoise", "seconds": seconds, "peak_bytes": 2**20}]
        settings = {"base_seed": seed, "size": "32*48", "image": f"/{name}/portrait.png"}
        facts = {"dump_tensors": f"{name}.safetensors", "video": f"{name}.mp4", "stages": stages, "settings": settings}
        reports.append(report(tmp_path / f"{name}.json", **facts))
    result = compare(*reports)
    assert result.values["latent_error"] == 0
    assert result.values["psnr"] == math.inf  # of the dumps; the videos differ
    assert [warning.split()[0] for warning in result.warnings] == ["base_seed"]
    assert strict(result)["stages"] == [
        {"name": "denoise", "seconds_a": 2.0, "seconds_b": 4.0, "peak_bytes_a": 2**20, "peak_bytes_b": 2**20}
    ]
    assert "denoise" in table(result)


def test_a_report_without_a_dump_is_compared_by_its_video(tmp_path):
    frames = pixels(3)
    video(tmp_path / "a.mp4", frames)
    a = report(tmp_path / "a.json", video=str(tmp_path / "a.mp4"), dump_tensors=None)
    b = report(tmp_path / "b.json", video="a.mp4", dump_tensors=str(dump(tmp_path / "b.safetensors", frames=frames)))
    result = compare(a, b)
    assert result.values["psnr"] == math.inf
    assert result.warnings == ()


def test_settings_in_a_dump_are_compared_with_a_report(tmp_path):
    b = dump(tmp_path / "b.safetensors", metadata={"base_seed": "7", "size": "32*48"}, context=torch.ones(2))
    a = report(tmp_path / "a.json", dump_tensors=b.name, settings={"base_seed": 7, "size": "64*64"})
    assert [warning.split()[0] for warning in compare(a, b).warnings] == ["size"]


def test_tensors_that_only_one_side_has_are_named(tmp_path):
    a = dump(tmp_path / "a.safetensors", context=torch.ones(2), audio_emb=torch.ones(3))
    b = dump(tmp_path / "b.safetensors", context=torch.ones(2), latents=random(1, 16, 3, 4, 6))
    result = compare(a, b)
    assert result.warnings == ("only a.safetensors has audio_emb", "only b.safetensors has latents")
    assert [score.name for score in result.tensors] == ["context"]


def test_fail_under_bounds_figures_from_below_and_errors_from_above(tmp_path):
    base, latents = pixels(), random(2, 16, 3, 4, 6)
    a = dump(tmp_path / "a.safetensors", frames=base + 4, latents=latents * 1.01)
    result = compare(a, dump(tmp_path / "b.safetensors", frames=base, latents=latents))
    assert result.check(parse_fail_under(["psnr=36", "ssim=0.5", "cosine=0.999", "latent_error=0.0101"])) == []
    missed = result.check(parse_fail_under(["psnr=36.1", "psnr_min=40", "latent_error=0.0099", "ssim_min=1"]))
    assert [line.split()[0] for line in missed] == ["psnr", "psnr_min", "latent_error", "ssim_min"]
    assert missed[0] == "psnr is 36.0896, under 36.1"
    assert "above" in missed[2]


def test_a_bound_on_what_was_not_compared_is_refused(tmp_path):
    path = dump(tmp_path / "a.safetensors", context=torch.ones(2))
    with pytest.raises(ConfigError, match="psnr"):
        compare(path, path).check({"psnr": 30})


@pytest.mark.parametrize("text", ["psnr", "psnr=", "psnr=much", "psnr=nan", "=3", "beauty=3", "psnr:3"])
def test_a_malformed_bound_is_refused(text):
    with pytest.raises(ConfigError, match="--fail-under"):
        parse_fail_under([text])


def test_a_bound_given_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        parse_fail_under(["psnr=30", "psnr=40"])


def test_different_shapes_are_refused_with_both_sizes(tmp_path):
    b = dump(tmp_path / "b.safetensors", latents=random(2, 16, 3, 4, 6), frames=pixels(3))
    more = dump(tmp_path / "more.safetensors", latents=random(3, 16, 3, 4, 6))
    with pytest.raises(InputError, match=r"3 x \[16, 3, 4, 6\].*2 x \[16, 3, 4, 6\]"):
        compare(more, b)
    longer = dump(tmp_path / "longer.safetensors", frames=pixels(4))
    with pytest.raises(InputError, match=r"\[3, 4, 32, 48\].*\[3, 3, 32, 48\]"):
        compare(longer, b)
    wide = video(tmp_path / "wide.mp4", np.zeros((3, HEIGHT, 64, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"64x32.*48x32"):
        compare(wide, b)


def test_a_video_and_a_dump_without_frames_have_nothing_in_common(tmp_path):
    a, b = video(tmp_path / "a.mp4", pixels(2)), dump(tmp_path / "b.safetensors", context=torch.ones(2))
    for one, other in ((a, b), (b, a)):
        with pytest.raises(InputError, match="nothing in common") as caught:
            compare(one, other)
        assert "a dump of context" in str(caught.value)


@pytest.mark.parametrize("tensor", ["context", "latents", "frames"])
def test_values_that_are_not_finite_are_refused(tmp_path, tensor):
    whole = {"context": torch.ones(2), "latents": random(1, 16, 3, 4, 6), "frames": random(3, 2, HEIGHT, WIDTH)}
    broken = {name: t.clone() for name, t in whole.items()}
    broken[tensor].view(-1)[1] = math.nan
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(broken, a)
    save_file(whole, b)
    with pytest.raises(InputError, match=f"{tensor}.*NaN"):
        compare(a, b)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, "not there"),
        ("none.mp4", None, "not there"),
        ("none.json", None, "not there"),
        ("broken.safetensors", b"\x08\x00", "safetensors"),
        ("broken.mp4", b"no video", "broken.mp4"),
        ("broken.json", b"{", "JSON"),
        ("empty.json", b"{}", "no run report"),
        ("list.json", b"[1]", "no run report"),
        ("stages.json", b'{"stages": [{"seconds": 1}]}', "damaged"),
        ("names.json", b'{"video": 3}', "damaged"),
        ("lost.json", b'{"video": "gone.mp4"}', "gone.mp4 is not there"),
        ("picture.png", b"", "expected .safetensors"),
        ("none.mov", None, "none.mov is not there; check the path"),
        ("nothing", None, "nothing is not there"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        compare(path, path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is a folder: expected"),
        (("a.txt",), "is a folder: expected"),
        (("a.mp4", "a.json"), "is a folder, with a.json, a.mp4 in it: .*name the file"),
        (("manifest.json", "dit.safetensors"), "is an artifact, .*--model and --baseline"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_folders_are_no_files_to_compare(tmp_path, names, message, suffix):
    folder = tmp_path / f"run{suffix}"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(InputError, match=message):
        compare(folder, folder)
