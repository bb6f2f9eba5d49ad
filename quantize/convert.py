"""``convert``: a published checkpoint to an artifact, tensor by tensor, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowvram_quantize.activations import Measured
from lowvram_quantize.allocation import Budget
from lowvram_quantize.asked import COMPONENTS, budget_of, lora_sources, precisions_of, wanted_of
from lowvram_quantize.checkpoint import Checkpoint, Named
from lowvram_quantize.claims import writing
from lowvram_quantize.components import ComponentPlan, Item
from lowvram_quantize.copied import (
    AUDIO_ENCODER,
    TOKENIZER,
    check_audio_encoder,
    check_tokenizer,
    copy_audio_encoder,
    copy_tokenizer,
)
from lowvram_quantize.digests import NOTES, SourceDigests
from lowvram_quantize.layout import lay_out, metadata_of
from lowvram_quantize.lora import LoraSource
from lowvram_quantize.meter import Meter, Progress
from lowvram_quantize.mixed import choose
from lowvram_quantize.places import real
from lowvram_quantize.plans import Settings, fingerprint_of, plans_of
from lowvram_quantize.provenance import component_facts, manifest_of, tensor_origin
from lowvram_quantize.publish import check_inputs, check_target, partial_of, publish
from lowvram_quantize.slabs import Slab, sha256_file, sha256_range
from lowvram_quantize.smoothing import factors_of
from lowvram_quantize.store import write_item
from lowvram_quantize.units import units_of
from lowvram_quantize.writer import SlabWriter, disk_errors

log = logging.getLogger(__name__)

Tensor = torch.Tensor


def convert(
    ckpt_dir: str | Path | None,
    out: str | Path,
    *,
    dit_file: str | Path | None = None,
    vae_file: str | Path | None = None,
    text_encoder_file: str | Path | None = None,
    audio_encoder_dir: str | Path | None = None,
    tokenizer_dir: str | Path | None = None,
    precision: str = "int8",
    dit: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    lora: str | Path | Sequence[str | Path | LoraSource] | None = None,
    lora_alpha: float | None = None,
    rotate: bool | int | None = None,
    smooth: bool | None = None,
    activations: str | Path | None = None,
    apart: Mapping[str, str] | None = None,
    target_bytes: int | None = None,
    max_error: float | None = None,
    error_parts: Mapping[str, float] | None = None,
    components: Iterable[str] = COMPONENTS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a published checkpoint to an artifact folder and return its path.

    Everything is written to ``<out>.partial``, which becomes ``out`` when it is complete; run again after an
    interruption, it goes on with the slabs that are not finished. Peak memory is that of a few tensors. The source is
    read once, in the order of its files, and their checksums made of what is read; what is read again are the few rows
    that smoothing looks at beforehand, a LoRA that lies in another order, what auto measures, and, after an
    interruption, what was converted of a file that was not finished.

    Args:
        ckpt_dir: folder of the published checkpoint (Wan2.2-S2V-14B or its parent), a Hugging Face cache of it, or a
            folder of repackaged files, found by what they hold; None where every part is named.
        dit_file, vae_file, text_encoder_file, audio_encoder_dir, tokenizer_dir: parts that go before ``ckpt_dir``'s;
            safetensors, scaled fp8, GGUF or .pth.
        out: folder to make; its parent has to exist.
        precision: int8, fp8, bf16 or fp32, for every component not set apart by ``dit``, ``vae`` or
            ``text_encoder`` (which also takes nf4). With auto, which ``dit`` takes too, each of the DiT's Linears is
            int8, fp8 or bf16, whatever does most against the error within ``target_bytes`` or ``max_error``; the other
            components are int8.
        lora: files or folders, as ``"path"`` or ``"path:weight"``, merged in float32 as
            ``W += weight * alpha / r * B @ A`` before quantizing; also whole differences, LoHa and LoKr.
        lora_alpha: for LoRAs that state none; by default 64, LiveAvatar's, or the rank where factors are called
            lora_down and lora_up.
        rotate: the most input channels of the DiT's int8 Linears (16, 32, 64, 128 or 256; True: 256) that are turned
            together by a Hadamard matrix before quantizing, which outliers then disturb less; the runtime turns
            activations alike, see ``lowvram_kernels.rotation``. False: none; by default 256 where the DiT is int8.
            Linears of fewer inputs than 256 have groups of 16 at most.
        smooth: whether to give the input channels of the DiT's int8 Linears behind norms factors, so that weights do
            not have large columns where activations have small ones, or the other way; see
            ``lowvram_quantize.smoothing``. By default so where they are rotated.
        activations: an artifact of the same model that was calibrated, as ``lowvram convert --calibrate`` does it: how
            large the channels are that its Linears were given decides the factors too, of more Linears.
        apart: weights of the DiT's Linears by name -> int8, fp8 or bf16, where that is not its precision: a mixed DiT
            chosen by hand. Those that share one input have to be alike.
        target_bytes: what dit.safetensors may take, and takes but for 1 %, with auto.
        max_error: the relative error of the DiT's output that is predicted at the most, with auto: the fewest bytes.
        error_parts: by unit of Linears the part of its int8 in the square of that error, as
            ``lowvram.calibrate.contributions`` measures it; for those that are not there it is taken from a table.
        components: which parts to convert; a runtime needs all of them.
        overwrite: replace a finished artifact.
        progress: called with input bytes done, input bytes in all and what is being converted.

    Raises:
        CheckpointError: the checkpoint or the LoRA is missing something, damaged, or of another shape.
        ConfigError: an unknown precision or component, ``rotate`` of another size or with nothing to rotate,
            ``smooth`` or ``activations`` with nothing to smooth, auto with a budget that it cannot meet or without one,
            a budget without auto, or ``out`` exists.
        InputError: the folder of ``out`` does not exist, or ``out`` is, lies in, or holds what is read.
        OutputError: the disk is full or cannot be written; what is done stays for the next run.
    """
    named = Named.of(dit_file, vae_file, text_encoder_file, audio_encoder_dir, tokenizer_dir)
    folder, out, wanted = None if ckpt_dir is None else Path(ckpt_dir), Path(out), wanted_of(components)
    checkpoint, chosen = Checkpoint(folder, named), precisions_of(precision, dit, vae, text_encoder)
    loras = lora_sources(lora, lora_alpha)
    given: dict[str, Path | None] = {"--ckpt-dir": folder, **named.by_option}
    given["--activations"] = None if activations is None else Path(activations)
    check_inputs(out, [*given.items(), *(("--lora", source.path) for source in loras)])
    check_target(out, overwrite=overwrite)
    settings = Settings(
        wanted=wanted,
        precisions=chosen,
        loras=loras,
        rotate=rotate,
        smooth=smooth,
        measured=Measured.of(activations),
        apart=apart or {},
        budget=budget_of(chosen["dit"], wanted, target_bytes, max_error),
        error_parts=error_parts,
    )
    return _make(out, checkpoint, settings, progress, overwrite=overwrite)


def _make(out: Path, checkpoint: Checkpoint, settings: Settings, progress: Progress | None, *, overwrite: bool) -> Path:
    """Write beside ``out``, alone, what comes there once it is complete."""
    place = real(out)  # what is unfinished lies beside a link's target, on the same disk
    with writing(place, "lowvram convert"):
        check_target(place, overwrite=overwrite)  # another run may just have finished it
        plans = plans_of(checkpoint, settings)
        folders = _check_folders(checkpoint, settings.wanted)
        # Where what was named holds links, it is what they lead to that must not go.
        files = [file for each in plans for file in each.source_files]
        files += [file for folder in folders for file in folder.iterdir() if file.is_file()]
        check_inputs(out, [("the checkpoint", real(file)) for file in files])
        partial = partial_of(place)
        with disk_errors(partial, 0):
            partial.mkdir(exist_ok=True)
        if settings.budget is not None:
            plans = [_chosen(plans[0], settings, settings.budget, partial, progress), *plans[1:]]
        publish(partial, place, _write(plans, checkpoint, partial, settings.wanted, progress))
    return place


def _write(
    plans: list[ComponentPlan],
    checkpoint: Checkpoint,
    partial: Path,
    wanted: tuple[str, ...],
    progress: Progress | None,
) -> dict[str, Any]:
    """Write everything but the manifest, which is returned."""
    meter = Meter(sum(item.ref.nbytes for plan in plans for item in plan.items), progress)
    with SourceDigests((file for plan in plans for file in plan.source_files), partial / NOTES) as digests:
        facts = {plan.name: _convert_component(plan, partial, meter, checkpoint.base, digests) for plan in plans}
        files = _copy_folders(checkpoint, partial, wanted)
        hashes = digests.finish(meter.checksum)
    return manifest_of(plans, facts, files, hashes, checkpoint.base)


def _chosen(
    plan: ComponentPlan, settings: Settings, budget: Budget, partial: Path, progress: Progress | None
) -> ComponentPlan:
    """Measure each Linear in each scheme, which reads its weight once more, and choose within the budget."""
    meter = Meter(sum(item.ref.nbytes for items in units_of(plan.items).values() for item in items), progress)
    return choose(
        plan,
        budget,
        settings.int8,
        partial,
        fingerprint_of(plan),
        lambda nbytes, slab: meter.add(nbytes, f"measuring {slab}"),
        settings.error_parts,
    )


def _convert_component(
    plan: ComponentPlan, folder: Path, meter: Meter, base: Path, digests: SourceDigests
) -> dict[str, Any]:
    """Write one component's file; returns its entry in the manifest."""
    by_slab, slabs = lay_out(plan)
    path = folder / f"{plan.name}.safetensors"
    errors: dict[str, float] = {}
    with SlabWriter(path, slabs, metadata_of(plan.name), fingerprint_of(plan)) as writer:
        for slab in slabs:
            if slab.name in writer.finished:
                meter.add(sum(item.ref.nbytes for item in by_slab[slab.name]), f"{plan.name} {slab.name}")
        _convert_slabs(plan, by_slab, slabs, writer, meter, digests)
        for slab in slabs:
            errors |= writer.finished[slab.name]["relative_errors"]
        finished, header_nbytes = writer.finished, writer.header_nbytes
    checksums = {name: note["sha256"] for name, note in finished.items()}
    facts = component_facts(plan, path, slabs, sha256_range(path, 0, header_nbytes), checksums, errors)
    for item in plan.items:
        facts["tensors"][item.name]["from"] = tensor_origin(item.ref, base)
    return facts


def _convert_slabs(
    plan: ComponentPlan,
    by_slab: dict[str, list[Item]],
    slabs: list[Slab],
    writer: SlabWriter,
    meter: Meter,
    digests: SourceDigests,
) -> None:
    """Write what is not finished, in the order in which the source has it, and note each slab once all of it is there:
    so the source is read from end to end once, and its checksum made of that. Smoothing looks at some rows before."""
    places = {slab.name: {spec.name: spec for spec in slab.tensors} for slab in slabs}
    left = {slab.name: len(by_slab[slab.name]) for slab in slabs if slab.name not in writer.finished}
    factors: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, dict[str, float]] = {name: {} for name in left}
    for item in sorted((item for name in left for item in by_slab[name]), key=_as_read):
        name = item.slab
        if name not in factors:
            factors[name] = factors_of(plan, by_slab[name])

        def write(spec: str, start: int, values: Tensor, slab: str = name) -> None:
            writer.write(slab, places[slab][spec].offset + start, values)

        with digests.following():
            error = write_item(item, plan.deltas.get(item.name), write, factors[name].get(item.name))
        if error is not None:
            errors[name][item.name] = error
        left[name] -= 1
        if not left[name]:
            writer.finish(name, relative_errors=errors.pop(name))
            del factors[name]
        meter.add(item.ref.nbytes, f"{plan.name} {name}")


def _as_read(item: Item) -> tuple[Path, int]:
    return item.ref.file, item.ref.offset


def _check_folders(checkpoint: Checkpoint, wanted: tuple[str, ...]) -> list[Path]:
    """Look for what is copied last before the long work begins, and say where it is; raises as the copying would."""
    folders = []
    if AUDIO_ENCODER in wanted:
        folders.append(checkpoint.audio_encoder())
        check_audio_encoder(folders[-1])
    if TOKENIZER in wanted:
        folders.append(checkpoint.tokenizer())
        check_tokenizer(folders[-1])
    return folders


def _copy_folders(checkpoint: Checkpoint, folder: Path, wanted: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    copied: list[Path] = []
    with disk_errors(folder, 0):
        if AUDIO_ENCODER in wanted:
            copied += copy_audio_encoder(checkpoint.audio_encoder(), folder)
        if TOKENIZER in wanted:
            copied += copy_tokenizer(checkpoint.tokenizer(), folder)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in copied
    }


__all__ = ["COMPONENTS", "convert"]
