"""Options of other programs' scripts: what each means here, or what takes its place.

From Live Avatar's ``s2v_streaming_interact.py``, ``gradio_app.py`` and ``batch_eval.py``, the shell scripts that call
them, and Wan 2.2's ``generate.py``: names, values and defaults as their ``--help`` has them. Those that lowvram has
under the same name are not here, unless some of their values need an answer.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import click

Given = Mapping[str, str]
"""Options of a command line as they were written, "true" for a switch that stands alone."""
Answer = Callable[[str, Given], str]
"""From an option's value and all that was given to what is said of it, "" where there is nothing to say."""

TASK, SHIFT = "s2v-14B", 3.0
MANIFEST = "manifest.json"
_LORA_FILE = "liveavatar.safetensors"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """``switch``: it stands alone, or with a value that says yes or no, and "no" is what happens anyway."""

    name: str
    said: str | Answer
    switch: bool = False

    def answer(self, given: Given) -> str:
        """What is to be said of it, "" where it asks for nothing that would not happen."""
        value = given[self.name]
        if self.switch:
            try:
                wanted = click.BOOL.convert(value, None, None)
            except click.BadParameter:
                return f"{value!r} is neither True nor False"
            if not wanted:
                return ""
        return self.said if isinstance(self.said, str) else self.said(value, given)


def _only(expected: str, otherwise: str) -> Answer:
    """Of an option with one value that means what happens here."""
    return lambda value, given: "" if value.lower() == expected.lower() else f"{value!r} cannot be, {otherwise}"


def _numbers(expected: tuple[float, ...], otherwise: str) -> Answer:
    """The same of numbers, however they are written."""

    def answer(value: str, given: Given) -> str:
        try:
            return "" if float(value) in expected else f"{value} cannot be, {otherwise}"
        except ValueError:
            return f"{value!r} is no number, {otherwise}"

    return answer


def _convert_first(value: str, given: Given) -> str:
    """One answer to all that say which weights to load and how: the command that does it."""
    folder, lora = given.get("ckpt_dir", "Wan2.2-S2V-14B"), given.get("lora_path_dmd") or given.get("lora_path")
    if (Path(folder) / MANIFEST).is_file():
        return f"{folder} is converted already, give it as --model and leave these out"
    words, fetch = ["lowvram", "convert", "--ckpt-dir", folder], ""
    if lora and not Path(lora).suffix and not Path(lora).exists():  # a name on a hub
        lora, fetch = _LORA_FILE, f" ({_LORA_FILE} is in {lora}, fetch it first)"
    if lora or "load_lora" in given:
        words += ["--lora", lora or _LORA_FILE]
    if "fp8" in given:
        words += ["--dit", "fp8"]
    then = "--model is then all of it" if "model" in given else "--model DIR is then all of it"
    return f"weights are converted once, with {shlex.join([*words, '--out'])} DIR{fetch}, and {then}"


def _one_voice(value: str, given: Given) -> str:
    """The reference takes several voices, joined with "+", for several people in the picture."""
    if "+" not in value or Path(value).exists() or not all(Path(part).suffix for part in value.split("+")):
        return ""
    return f"{value} names several voices, which infer and batch take, and one person speaks here, give one file"


def _single(value: str, given: Given) -> str:
    gpus = given.get("gpus", "1")
    return "" if gpus == "1" else f"contradicts --gpus {gpus}, leave one of them out"


def _merged(value: str, given: Given) -> str:
    return "a merged checkpoint holds its LoRA, leave --lora out" if "lora" in given else ""


def _lora_named(value: str, given: Given) -> str:
    return "" if "lora" in given else "a LoRA is named by its file, as --lora liveavatar.safetensors"


_TTS = "no speech is made here, make it with another program and give the file as --audio"
_PROMPT = "no language model rewrites the prompt, give it as it is to be: --prompt TEXT, or --prompt @FILE"
_DATA = "no data set is read here, give --image and --audio"
_SHARDED = "nothing is sharded here, --gpus N shares the work and --offload_model keeps weights on the host"
_WEB = "infer writes a file, lowvram serve has a page, with --host and --port"
_AREA = 'here it is --size "704*384", an area that the portrait gives its shape'
_ANIMATE = "it is of Wan's animate model, and speech-to-video is all that runs here"

# Whatever the command.
_ANYWHERE = (
    Foreign("task", _only(TASK, f"{TASK} is all that runs here")),
    Foreign("frame_num", "it is of text-to-video, here --infer_frames and --num_clip say how much is made"),
    Foreign("t5_fsdp", _SHARDED, switch=True),
    Foreign("dit_fsdp", _SHARDED, switch=True),
    Foreign("use_prompt_extend", _PROMPT, switch=True),
    Foreign("prompt_extend_method", _PROMPT),
    Foreign("prompt_extend_model", _PROMPT),
    Foreign("prompt_extend_target_lang", _PROMPT),
    Foreign("enable_tts", _TTS, switch=True),
    Foreign("tts_prompt_audio", _TTS),
    Foreign("tts_prompt_text", _TTS),
    Foreign("tts_text", _TTS),
    Foreign("pose_video", "poses are followed by infer, here the voice alone moves the portrait: leave it out"),
    # The reference's causal pipeline takes both and does the same with and without: every video begins from the
    # portrait, and motion frames are given at every step. So it is here.
    Foreign("start_from_ref", "", switch=True),
    Foreign("drop_motion_noisy", "", switch=True),
    Foreign("use_dataset", _DATA, switch=True),
    Foreign("dataset_sample_idx", _DATA),
    Foreign("prompt_file", lambda value, given: f"give it as --prompt @{value}"),
    Foreign("sample_list", "a run makes one video, lowvram batch takes the list; or call infer once for each sample"),
    Foreign("single_gpu", _single, switch=True),
    Foreign("enable_compile", "nothing is compiled ahead, --cuda-graphs replays layers instead", switch=True),
    Foreign("server_port", _WEB),
    Foreign("server_name", _WEB),
    Foreign("src_root_path", _ANIMATE),
    Foreign("refert_num", _ANIMATE),
    Foreign("replace_flag", _ANIMATE, switch=True),
    Foreign("use_relighting_lora", _ANIMATE, switch=True),
    Foreign("sample_solver", _only("euler", "the model is trained for euler")),
    # The reference takes this option, and computes with 3 all the same.
    Foreign("sample_shift", _numbers((SHIFT,), "the model is trained for 3, leave it out")),
    # One call a step: what guidance of 0, as in the reference's scripts, and of 1, as the formula has it, come to.
    Foreign(
        "sample_guide_scale",
        _numbers((0.0, 1.0), "the model is trained to need no guidance, leave it out"),
    ),
)
# Where an artifact is run.
_RUN = (
    Foreign("ckpt_dir", _convert_first),
    Foreign("load_lora", _convert_first, switch=True),
    Foreign("lora_path", _convert_first),
    Foreign("lora_path_dmd", _convert_first),
    Foreign("using_merged_ckpt", "", switch=True),  # as every artifact is
    Foreign("training_config", _convert_first),
    Foreign("fp8", _convert_first, switch=True),
    Foreign("convert_model_dtype", _convert_first, switch=True),
    Foreign("audio", _one_voice),
)
_SIZES = "plan knows weights by --model DIR, or by --preset 14b with --precision int8, fp8 or bf16"
_PLAN = tuple(Foreign(each.name, _SIZES, switch=each.switch) for each in _RUN if each.said is _convert_first)
_CONVERT = (
    Foreign("load_lora", _lora_named, switch=True),
    Foreign("using_merged_ckpt", _merged, switch=True),
    Foreign("training_config", "of it lora_alpha alone matters: --lora-alpha, 64 for a LoRA that states none"),
    Foreign("fp8", "--dit fp8 quantizes what the reference does, --precision fp8 all", switch=True),
    Foreign(
        "convert_model_dtype",
        "--precision bf16 converts all to bfloat16, --dit, --vae and --text-encoder one part",
        switch=True,
    ),
)

# What other programs call things, where the difference matters.
_ELSEWHERE = (
    Foreign("seed", lambda value, given: f"here it is --base_seed {value}"),
    Foreign("steps", lambda value, given: f"here it is --sample_steps {value}"),
    Foreign("output", lambda value, given: f"here it is --out {value}"),
    Foreign("fps", "videos have the 25 frames a second that the model is trained for, leave it out"),
    Foreign("width", _AREA),
    Foreign("height", _AREA),
    Foreign("negative_prompt", "without guidance there is nothing that a negative prompt could do, leave it out"),
    Foreign("gpu", "--device cuda:N names a card, --gpus N takes several"),
)

_IN_THE_LIST = "a job of the list has it, as pose_video beside its image and audio"
# What a command has under the same name, with all values.
_OWN = {"batch": {"sample_list", "audio"}, "infer": {"audio", "pose_video"}}

BY_COMMAND = {
    command: {foreign.name: foreign for foreign in (*_ANYWHERE, *own) if foreign.name not in _OWN.get(command, set())}
    for command, own in {
        "infer": (*_RUN, *_ELSEWHERE),
        "batch": (*_RUN, *_ELSEWHERE, Foreign("pose_video", _IN_THE_LIST)),
        "compare": (*_RUN, *_ELSEWHERE),
        "compare record": (*_RUN, *_ELSEWHERE),
        "plan": _PLAN,
        "convert": _CONVERT,
    }.items()
}
