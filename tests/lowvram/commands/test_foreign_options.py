"""Command lines of the reference's scripts: every option is used, or answered in one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from lowvram.cli import main
from lowvram.commands.shared_options import read_prompt
from lowvram_kernels.errors import InputError

# Every option of Live Avatar's s2v_streaming_interact.py, gradio_app.py and batch_eval.py and of Wan 2.2's generate.py,
# with a value as their scripts or defaults have it (None: a switch alone). Used here:
USED = {
    "size": "704*384",
    "offload_model": "True",
    "ulysses_size": "1",
    "t5_cpu": None,
    "save_file": "here.mp4",
    "save_dir": "./output/",
    "base_seed": "420",
    "sample_solver": "euler",
    "sample_steps": "4",
    "num_clip": "10000",
    "infer_frames": "48",
    "num_gpus_dit": "1",
    "enable_vae_parallel": "False",
    "offload_kv_cache": None,
    "enable_online_decode": None,
    "task": "s2v-14B",
    "sample_shift": "3",
    "sample_guide_scale": "0",
    "single_gpu": None,
    "start_from_ref": None,
    "drop_motion_noisy": None,
    "using_merged_ckpt": None,
}
# Answered, with what the answer has to name:
ANSWERED = {
    "ckpt_dir": ("ckpt/Wan2.2-S2V-14B/", "lowvram convert --ckpt-dir ckpt/Wan2.2-S2V-14B/"),
    "load_lora": (None, "--lora liveavatar.safetensors"),
    "lora_path": ("some.safetensors", "--lora some.safetensors"),
    "lora_path_dmd": ("Quark-Vision/Live-Avatar", "liveavatar.safetensors is in Quark-Vision/Live-Avatar"),
    "training_config": ("liveavatar/configs/s2v_causal_sft.yaml", "lowvram convert"),
    "fp8": (None, "--dit fp8"),
    "convert_model_dtype": (None, "lowvram convert"),
    "t5_fsdp": (None, "--gpus N"),
    "dit_fsdp": (None, "--gpus N"),
    "frame_num": ("81", "--num_clip"),
    "use_prompt_extend": (None, "--prompt @FILE"),
    "prompt_extend_method": ("local_qwen", "--prompt"),
    "prompt_extend_model": ("Qwen", "--prompt"),
    "prompt_extend_target_lang": ("zh", "--prompt"),
    "enable_tts": (None, "--audio"),
    "tts_prompt_audio": ("zero_shot_prompt.wav", "--audio"),
    "tts_prompt_text": ("words", "--audio"),
    "tts_text": ("words", "--audio"),
    "use_dataset": (None, "--image and --audio"),
    "dataset_sample_idx": ("0", "--image and --audio"),
    "sample_list": ("samples.yaml", "call infer once for each"),
    "server_port": ("7860", "infer writes a file"),
    "server_name": ("0.0.0.0", "infer writes a file"),
    "src_root_path": ("process_results", "speech-to-video"),
    "refert_num": ("77", "speech-to-video"),
    "replace_flag": (None, "speech-to-video"),
    "use_relighting_lora": (None, "speech-to-video"),
}
# Of both kinds, with values that cannot be:
REFUSED = {
    "task": ("t2v-A14B", "s2v-14B"),
    "sample_solver": ("unipc", "euler"),
    "sample_shift": ("5.0", "trained for 3"),
    "sample_guide_scale": ("4.5", "no guidance"),
    "fp8": ("maybe", "neither True nor False"),
    "seed": ("7", "--base_seed 7"),
    "prompt_file": ("p.txt", "--prompt @p.txt"),
    "fps": ("30", "25 frames"),
    "enable_compile": (None, "--cuda-graphs"),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def words(name: str, value: str | None) -> list[str]:
    return [f"--{name}"] if value is None else [f"--{name}", value]


def line(result: Result) -> str:
    """The one line that it ended with."""
    assert result.exit_code == 2, result.output
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("lowvram: error: ")]
    return said.removeprefix("lowvram: error: ")


@pytest.fixture
def nearly(tiny, tmp_path, monkeypatch) -> Iterator[list[object]]:
    """What runs but for the portrait, which is not there: the error of a command line with nothing else to say."""
    monkeypatch.chdir(tmp_path)
    given = ["--model", tiny.artifact("int8"), "--audio", tiny.voice, "--prompt", "A person speaks", "--device", "cpu"]
    yield ["infer", *given, "--image", tmp_path / "gone.png"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("spelling", [str, lambda word: word.replace("_", "-")])
def test_what_is_used_is_accepted_in_both_spellings(nearly, name, spelling):
    out = [] if name in ("save_file", "save_dir") else ["--out", "a.mp4"]
    option, *value = words(name, USED[name])
    assert "gone.png" in line(run(*nearly, *out, spelling(option), *value))


@pytest.mark.parametrize("name", USED)
def test_a_value_may_stand_behind_an_equals_sign(nearly, name):
    out = [] if name in ("save_file", "save_dir") else ["--out", "a.mp4"]
    assert "gone.png" in line(run(*nearly, *out, f"--{name}={USED[name] or True}"))


@pytest.mark.parametrize(("name", "value", "part"), [(n, *rest) for n, rest in (ANSWERED | REFUSED).items()])
@pytest.mark.parametrize("spelling", [str, lambda word: word.replace("_", "-")])
def test_what_is_not_is_answered_in_one_line(nearly, name, value, part, spelling):
    option, *rest = words(name, value)
    said = line(run(*nearly, "--out", "a.mp4", spelling(option), *rest))
    assert said.startswith(f"--{name}: ")
    assert part in said
    assert "gone.png" not in said


@pytest.mark.parametrize("name", [name for name, (value, _) in ANSWERED.items() if value is None])
def test_a_switch_that_says_no_asks_for_nothing(nearly, name):
    assert "gone.png" in line(run(*nearly, "--out", "a.mp4", f"--{name}", "False"))


@pytest.mark.parametrize("name", ["offload_model", "single_gpu"])
@pytest.mark.parametrize("value", ["True", "yes", "t", "1", "False", "no", "n", "0"])
def test_switches_take_values_as_the_reference_has_them(nearly, name, value):
    assert "gone.png" in line(run(*nearly, "--out", "a.mp4", f"--{name}", value))


def test_a_script_of_the_reference_is_answered_at_once():
    given = {name: value for name, value in USED.items() if name not in ("save_file", "save_dir")}
    given |= {name: ANSWERED[name][0] for name in ("ckpt_dir", "load_lora", "lora_path_dmd", "training_config", "fp8")}
    given |= {"convert_model_dtype": None, "dit_fsdp": None, "sample_shift": "8", "smaple_steps": "4"}
    said = line(run("infer", *[word for name, value in given.items() for word in words(name, value)]))
    parts = said.split("; ")
    assert len(parts) == 5
    weights = "--ckpt_dir, --load_lora, --lora_path_dmd, --training_config, --fp8, --convert_model_dtype: "
    assert any(part.startswith(weights) for part in parts)
    assert parts[-2:] == [
        "--smaple_steps: unknown, --sample_steps is known",
        "--model, --image, --audio, --prompt, --out or --save_dir are missing",
    ]


def test_an_artifact_given_as_checkpoint_is_named(tiny):
    folder = tiny.artifact("int8")
    said = line(run("infer", "--ckpt_dir", folder))
    assert f"{folder} is converted already, give it as --model" in said


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["infer", "--smaple_steps", "4"], "--smaple_steps: unknown, --sample_steps is known"),
        (["infer", "--save_files=x"], "--save_files: unknown, --save_file is known"),
        (["infer", "--numclip", "4"], "--numclip: unknown, --num_clip is known"),
        (["plan", "--infer-frame", "48"], "--infer-frame: unknown, --infer_frames is known"),
        (["convert", "--ckptdir", "x"], "--ckptdir: unknown, --ckpt_dir is known"),
        # Names that share a word with something else get no hint.
        (["infer", "--image_size", "4"], "--image_size: unknown, lowvram infer --help has all"),
        (["infer", "--frames", "4"], "--frames: unknown, lowvram infer --help"),
        (["infer", "--gpu_ids", "4"], "--gpu_ids: unknown, lowvram infer --help"),
        (["plan", "--fp16"], "--fp16: unknown, lowvram plan --help"),
        (["convert", "--quant", "q8"], "--quant: unknown, lowvram convert --help"),
        (["demo", "-x"], "-x: unknown, lowvram demo --help"),
        (["inspect", "--verbose", "folder"], "--verbose: unknown, lowvram inspect --help"),
        (["compare", "a.json", "b.json", "--psnr"], "--psnr: unknown, lowvram compare --help"),
    ],
)
def test_hints_are_for_slips_alone(arguments, part):
    assert part in line(run(*arguments))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["infer", "--lora", "x"], "--lora: for lowvram convert, not for infer"),
        (
            ["infer", "--rotate", "--dit=int8", "--vae", "x"],
            "--rotate, --dit, --vae: for lowvram convert, not for infer",
        ),
        (
            ["plan", "--image", "x", "--audio", "y"],
            "--image, --audio: for lowvram batch, compare, compare record, demo and infer, not",
        ),
        (
            ["convert", "--size", "704*384"],
            "--size: for lowvram batch, compare, compare record, infer and plan, not for convert",
        ),
        (
            ["convert", "--model", "x"],
            "--model: for lowvram batch, compare, compare record, doctor, infer, plan and serve, not for convert",
        ),
        (["doctor", "--preset", "14b"], "--preset: for lowvram plan, not for doctor"),
    ],
)
def test_options_of_other_commands_are_named_with_them(arguments, part):
    assert part in line(run(*arguments))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "--ckpt_dir", "x"], "--preset 14b"),
        (["plan", "--fp8"], "--precision int8, fp8 or bf16"),
        (["plan", "--task", "i2v-A14B"], "s2v-14B"),
        (["plan", "--single_gpu", "--gpus", "4"], "--single_gpu: contradicts --gpus 4"),
        (["convert", "--fp8"], "--dit fp8"),
        (["convert", "--load_lora"], "--lora liveavatar.safetensors"),
        (["convert", "--training_config", "x.yaml"], "--lora-alpha"),
        (["convert", "--convert_model_dtype"], "--precision bf16"),
        (["convert", "--using_merged_ckpt", "--lora", "x"], "leave --lora out"),
        (["compare", "--fp8"], "lowvram convert"),
    ],
)
def test_other_commands_answer_too(arguments, part):
    assert part in line(run(*arguments))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "x"], "--model stands before a command; expected it behind one, as lowvram infer --model"),
        (["--model", "x", "plan"], "as lowvram plan --model"),
        (["--ckpt_dir", "x"], "as lowvram convert --ckpt-dir"),
        (["--fp8", "infer"], "as lowvram infer --fp8"),
        (["--sample_list=x"], "--sample-list stands before a command"),
        (["--colour"], "--colour: unknown, lowvram --help has the commands"),
        (["-x"], "-x: unknown"),
    ],
)
def test_options_before_any_command(arguments, part):
    assert part in line(run(*arguments))


@pytest.mark.parametrize("option", ["--lora", "--lora_path", "--lora-path-dmd"])
def test_convert_takes_the_reference_s_names_of_a_lora(tiny, tmp_path, option):
    files = ["--ckpt_dir", tiny.checkpoint, "--out", tmp_path / "out"]
    result = run("convert", *files, "--task", "s2v-14B", "--load_lora", option, tmp_path / "gone.safetensors")
    assert "gone.safetensors is missing" in line(result)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["infer", "--prompt", "x"], "--model, --image, --audio, --out or --save_dir are missing"),
        (["infer", "--save-dir", "x", "--prompt=x", "--model=x", "--audio=x"], "--image is missing"),
        (["convert"], "--out is missing"),
    ],
)
def test_all_that_is_missing_is_named(arguments, part):
    assert line(run(*arguments)) == part


def test_options_of_other_programs_are_not_in_the_help():
    said = run("infer", "--help", "--fp8").stdout
    assert "--base-seed" in said
    assert not any(f"--{name.replace('_', '-')} " in said for name in ANSWERED)
    assert isinstance(main.commands["infer"], click.Command)


@pytest.mark.slow
def test_a_run_with_all_that_is_used(tiny, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("\ufeffA person speaks\n", encoding="utf-8")
    folder, report = tmp_path / "a" / "b", tmp_path / "r.json"
    used = {name: value for name, value in USED.items() if name not in ("save_file", "save_dir", "num_clip")}
    used |= {"size": "128*128", "sample_steps": "1", "infer_frames": "12", "num_clip": "1", "base_seed": "-1"}
    given = [word for name, value in used.items() for word in words(name, value)]
    files = ["--model", tiny.artifact("int8"), "--image", tiny.portrait, "--audio", tiny.voice]
    files += ["--prompt", f"@{prompt}", "--save_dir", folder, "--report", report]
    result = run("infer", *given, *files, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.output
    settings = json.loads(report.read_text())["settings"]
    assert settings["prompt"] == "A person speaks"
    assert settings["base_seed"] >= 0
    (video,) = folder.iterdir()
    assert result.stdout.strip() == str(video)
    assert video.name == f"portrait_voice_128x128_1step_seed{settings['base_seed']}.mp4"
    said = "".join(result.stderr.split())
    assert f"drawnis{settings['base_seed']}" in said
    assert f"thepromptiswhatstandsin{prompt}" in said


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "a.mp4", "--save_dir", "there"], "expected one of them"),
        (["--save_dir", "{portrait}"], "is no folder"),
        (["--save_dir", "{portrait}/below"], "is no folder"),
        (["--out", "a.mp4", "--base_seed", "-2"], "--base_seed is -2"),
        (["--out", "{tmp}/p.mp4", "--prompt", "@{tmp}/p.mp4"], "--out and --prompt are both"),
        (["--out", "a.mp4", "--prompt", "@nowhere"], "--prompt is @nowhere"),
    ],
)
def test_what_contradicts_or_is_no_place(tiny, tmp_path, arguments, part):
    (tmp_path / "p.mp4").write_text("A person")
    files = ["--model", tiny.artifact("int8"), "--image", tiny.portrait, "--audio", tiny.voice, "--prompt", "x"]
    filled = [argument.format(portrait=tiny.portrait, tmp=tmp_path) for argument in arguments]
    assert part in line(run("infer", *files, "--device", "cpu", *filled))
    assert (tmp_path / "p.mp4").read_text() == "A person"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("A person speaks", "A person speaks"),
        ("@prompt.txt", "One line\nand another"),
        ("prompt.txt", "One line\nand another"),
        ("notes", "Without an ending"),
        ("", ""),
        ("She reads prompt.txt aloud", "She reads prompt.txt aloud"),
        ("word " * 2000, "word " * 2000),
        ("a\0b", "a\0b"),
    ],
)
def test_prompts_are_text_or_files(tmp_path, monkeypatch, text, prompt):
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("One line\nand another\n\n")
    Path("notes").write_text("Without an ending")
    assert read_prompt(text) == prompt


@pytest.mark.parametrize(
    ("text", "content", "part"),
    [
        ("@gone.txt", None, "is no file"),
        ("gone.txt", None, "looks like a file and is not there"),
        ("@", None, "is no file"),
        ("@empty.txt", b" \n", "holds no text"),
        ("@latin.txt", "für".encode("latin-1"), "UTF-8"),
        ("@large.txt", b"word " * 20000, "100000 bytes"),
        ("@video.mp4", b"\0\0\0\1ftyp", "holds no text"),
    ],
)
def test_files_that_hold_no_prompt(tmp_path, monkeypatch, text, content, part):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(text.removeprefix("@")).write_bytes(content)
    with pytest.raises(InputError, match=part):
        read_prompt(text)
