"""Layout of the page, and what its buttons do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from lowvram.serve import page_parts as parts
from lowvram.serve.page_actions import FIELDS, Actions

if TYPE_CHECKING:
    from lowvram.serve.api import Api

_EVERY_S = 1.0
_SIZES = ["384*256", "512*320", "704*384", "720*400", "832*480", "1280*720"]


def build(api: Api, **options: Any) -> gr.Blocks:
    """The page; ``options`` are those of ``gradio.Blocks``."""
    actions = Actions(api)
    with gr.Blocks(title="lowvram", analytics_enabled=False, fill_width=True, **options) as page:
        shown, seen = gr.State(""), gr.State(("", ""))
        gr.HTML("<h1>lowvram</h1><p>A portrait that speaks.</p>", elem_id="lv-title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=360):
                fields, make, cancel = _form(api)
            with gr.Column(scale=6, min_width=400):
                player = gr.HTML(parts.player(None), elem_id="lv-player")
                progress = gr.HTML(parts.progress(None, None), elem_id="lv-progress")
                memory = gr.HTML(parts.memory([]), elem_id="lv-memory")
        with gr.Row(equal_height=False):
            chosen, buttons, compare, a, b, link = _history()
        history = gr.HTML(parts.history(api.store.jobs()), elem_id="lv-history")

        live = [shown, seen, player, progress, memory, history, cancel, chosen, a, b]
        every: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        view, inputs = [shown, seen], list(fields.values())
        gr.Timer(_EVERY_S).tick(actions.look, view, live, **every)
        page.load(actions.opened, view, live, **every)
        quiet = {**every, "show_progress": "minimal"}
        make.click(actions.make, [*view, *inputs], live, **quiet)
        cancel.click(actions.cancel, view, live, **every)
        buttons["show"].click(actions.show, [*view, chosen], live, **every)
        buttons["take"].click(actions.take_up, chosen, inputs, **quiet)
        buttons["delete"].click(actions.delete, [*view, chosen], live, **every)
        compare.click(actions.compare, [a, b], link, **quiet)
        fields["preset"].change(actions.preset, fields["preset"], [fields["size"], fields["infer_frames"]], **every)
    return page


def _form(api: Api) -> tuple[dict[str, Any], Any, Any]:
    """What is to be made, in the order of ``FIELDS``, and the two buttons."""
    fields: dict[str, Any] = {}
    with gr.Row(equal_height=True):
        fields["image"] = _picture("Portrait", "lv-image")
        fields["audio"] = _voice("Voice", "lv-audio")
    fields["prompt"] = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="lv-prompt")
    found = api.presets_now()
    fields["preset"] = gr.Radio(parts.presets(found), label="Preset", info=found.note, elem_id="lv-preset")
    with gr.Row():
        fields["size"] = gr.Dropdown(
            _SIZES, value="704*384", allow_custom_value=True, label="Size (area)", elem_id="lv-size"
        )
        fields["base_seed"] = gr.Number(420, precision=0, label="Seed (-1 draws one)", elem_id="lv-seed")
    with gr.Accordion("More settings", open=False, elem_id="lv-more"):
        _more(fields)
    with gr.Accordion("A second person, poses", open=False, elem_id="lv-second"):
        _second(fields)
    with gr.Row():
        make = gr.Button("Make", variant="primary", elem_id="lv-make")
        cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="lv-cancel")
    return {name: fields[name] for name in FIELDS}, make, cancel


def _more(fields: dict[str, Any]) -> None:
    with gr.Row():
        fields["infer_frames"] = gr.Number(48, precision=0, label="Frames a clip", elem_id="lv-infer-frames")
        fields["sample_steps"] = gr.Number(4, precision=0, label="Steps", elem_id="lv-steps")
        fields["num_clip"] = gr.Number(None, precision=0, label="Clips at most", elem_id="lv-num-clip")
    with gr.Row():
        fields["audio_start"] = gr.Number(0, label="Voice from, s", elem_id="lv-audio-start")
        fields["audio_duration"] = gr.Number(None, label="Voice for, s", elem_id="lv-audio-duration")
        fields["cond_rope_distance"] = gr.Textbox("30", label="Sees the portrait from", max_lines=1)
    with gr.Row():
        fields["upscale"] = gr.Checkbox(False, label="Scale a small portrait up")
        fields["online_decode"] = gr.Checkbox(True, label="Decode each block at once")


def _second(fields: dict[str, Any]) -> None:
    gr.Markdown(
        "With a second voice two people speak: the left and the right one of the portrait, or those whose masks are "
        "white where they are, or one in each of two portraits."
    )
    with gr.Row(equal_height=True):
        fields["image2"] = _picture("Second portrait", "lv-image2")
        fields["audio2"] = _voice("Second voice", "lv-audio2")
    with gr.Row(equal_height=True):
        fields["mask"] = _picture("Mask of the first", "lv-mask")
        fields["mask2"] = _picture("Mask of the second", "lv-mask2")
    pose: Any = gr.File(label="Pose video", type="filepath", height=120, elem_id="lv-pose-video")
    pose.preprocess = _as_it_is
    fields["pose_video"] = pose


def _picture(label: str, name: str) -> Any:
    picture: Any = gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], height=220, min_width=160, elem_id=name
    )
    # Handed on as it is: ``media`` reads more than Pillow alone, and refuses with a reason. No class of our own, beside
    # whose file Gradio would write another.
    picture.preprocess = _as_it_is
    return picture


def _voice(label: str, name: str) -> Any:
    return gr.Audio(label=label, type="filepath", sources=["upload", "microphone"], editable=False, elem_id=name)


def _history() -> tuple[Any, dict[str, Any], Any, Any, Any, Any]:
    with gr.Column(scale=5, min_width=360):
        chosen = gr.Dropdown([], label="Video", elem_id="lv-chosen")
        with gr.Row():
            buttons = {
                "show": gr.Button("Show", size="sm", elem_id="lv-show"),
                "take": gr.Button("Take up settings", size="sm", elem_id="lv-take"),
                "delete": gr.Button("Delete", size="sm", elem_id="lv-delete"),
            }
    with gr.Column(scale=6, min_width=400):
        with gr.Row():
            a = gr.Dropdown([], label="Compare", elem_id="lv-a")
            b = gr.Dropdown([], label="with the baseline", elem_id="lv-b")
        with gr.Row():
            compare = gr.Button("Compare", size="sm", elem_id="lv-compare")
            link = gr.HTML("", elem_id="lv-compared")
    return chosen, buttons, compare, a, b, link


def _as_it_is(payload: Any) -> Any:
    """The path of what was uploaded, None where nothing was."""
    return None if payload is None else payload.path
