"""What ``lowvram plan`` does: options to a plan, for one GPU or for several, printed as a table or JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import psutil
import torch
from rich.console import Console

from lowvram.byte_sizes import gib, parse_bytes
from lowvram.commands.shared_options import seconds_of
from lowvram.devices import choose_dtype, cuda_is_here
from lowvram.planning.card_names import DEFAULT_CARD, card_named
from lowvram.planning.card_table import CARDS
from lowvram.planning.cards import GIGA, TERA, Card
from lowvram.planning.layout_choice import Compared, Machines, Wishes, alternatives, choose_team
from lowvram.planning.measure import card_at_hand
from lowvram.planning.memory_costs import GIB
from lowvram.planning.model_sizes import facts_of
from lowvram.planning.planner import plan
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram.planning.report import print_plan, to_json
from lowvram.planning.team_report import compared_to_json, print_team
from lowvram.planning.workload import Workload
from lowvram.simulate.dry_run import dry_run, dry_run_team
from lowvram_kernels.errors import ConfigError
from lowvram_models.voice_lengths import WHOLE_FILE_S
from lowvram_quantize.format import Artifact


def show_plan(path: Path, options: PlanOptions, *, dry: bool, as_json: bool) -> bool:
    """Print the plan for the artifact in ``path``, with ``dry`` also what it takes on a simulated GPU. Returns whether
    there is one; where there is none, ``as_json`` prints what comes nearest, and why it does not do.

    Raises:
        DoesNotFit: nothing fits on one GPU, and it is not asked for ``as_json``.
        LowvramError: an artifact or an option that cannot be used.
    """
    show = _show_one if options.gpus is None else _show_several
    return show(path, options, dry=dry, as_json=as_json)


def show_cards(*, as_json: bool) -> None:
    """Print the cards that are known by name."""
    if as_json:
        click.echo(json.dumps({name: dataclasses.asdict(card) for name, card in CARDS.items()}, indent=1))
        return
    click.echo(f"{'card':26} {'memory':>10} {'for us':>10}   int8    fp8   bf16  own GB/s  PCIe GB/s  sm")
    for card in CARDS.values():
        rates = card.rates
        tops = " ".join(
            f"{'-' if rate is None else f'{rate / TERA:.0f}':>6}" for rate in (rates.int8, rates.fp8, rates.bf16)
        )
        beside = f"{(rates.memory or 0) / GIGA:9.0f} {rates.h2d / GIGA:10g} {card.generation:>3}"
        click.echo(f"{card.name:26} {gib(card.vram_bytes):>10} {gib(card.usable_bytes):>10} {tops} {beside}")
    click.echo("Rates are dense tera operations a second, from data sheets; for us is what a process is taken to get.")


def _show_one(path: Path, options: PlanOptions, *, dry: bool, as_json: bool) -> bool:
    try:
        result = plan_for(path, options)
        simulated = dry_run(path, result) if dry else None
    except DoesNotFit as refused:
        if not as_json:
            raise
        click.echo(json.dumps(to_json(refused.plan) | {"refused": str(refused)}, indent=1))
        return False
    if as_json:
        extra = {"dry_run": dataclasses.asdict(simulated)} if simulated else {}
        click.echo(json.dumps(to_json(result) | extra, indent=1))
    else:
        print_plan(result, Console(), simulated)
    return True


def _show_several(path: Path, options: PlanOptions, *, dry: bool, as_json: bool) -> bool:
    compared = plan_team_for(path, options)
    team = compared.team
    simulated = dry_run_team(path, team) if dry and team else []
    if not as_json:
        print_team(compared, Console(), simulated)
        return True
    extra = {"dry_run": [dataclasses.asdict(run) for run in simulated]} if simulated else {}
    click.echo(json.dumps(compared_to_json(compared) | extra, indent=1))
    return team is not None


# For a card that is not here, whose host is not here either.
DEFAULT_RAM_BYTES = 64 * GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """As they come from the command line. ``vram`` (of each card) and ``ram`` are texts as "22.15GiB", None for what
    the card, and the host, have; ``gpu`` is a card's name, ``custom:...``, or "auto". ``gpus`` None: a plan for one,
    without ranks; the last three say how several share the work, None leaves it to the choice. Validated at
    construction.

    ``audio_duration`` is how long the voice is, as "90" or "1:30". None plans for a voice of any length, so that what
    fits here fits when it is run: above 60 s the audio encoder stays on the host, beside everything else there. That
    the plan of a short voice then names more of the host than it takes is said in a note.
    """

    vram: str | None = None
    ram: str | None = None
    size: str = "704*384"
    infer_frames: int = 48
    sample_steps: int = 4
    gpu: str = "auto"
    kv: str = "auto"
    wave: str = "auto"
    dtype: str = "auto"
    offload_model: bool = False
    offload_kv_cache: bool = False
    t5_cpu: bool = False
    audio_duration: str | None = None
    gpus: int | None = None
    num_gpus_dit: int | None = None
    ulysses_size: int | None = None
    enable_vae_parallel: bool | None = None

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise ConfigError(f"--gpus is {self.gpus}; expected 1 or more")
        for name in ("num_gpus_dit", "ulysses_size", "enable_vae_parallel"):
            if self.gpus is None and getattr(self, name) is not None:
                raise ConfigError(f"--{name} has an effect on several GPUs only; expected --gpus N beside it")
        for name, text in (("--vram", self.vram), ("--ram", self.ram)):
            if text is not None:
                parse_bytes(text, name)
        if self.gpu != "auto":
            card_named(self.gpu)
        if self.audio_duration is not None and not seconds_of(self.audio_duration, "--audio-duration"):
            raise ConfigError("--audio-duration is 0; expected how long the voice is, or none for any")

    @property
    def workload(self) -> Workload:
        dtype = choose_dtype(self.dtype, torch.device("cuda"))
        found = Workload.of_size(self.size, infer_frames=self.infer_frames, sample_steps=self.sample_steps, dtype=dtype)
        given = self.audio_duration
        long = given is None or seconds_of(given, "--audio-duration") > WHOLE_FILE_S
        return dataclasses.replace(found, voice_on_host=long)

    @property
    def notes(self) -> list[str]:
        """What was taken for granted."""
        if self.audio_duration is not None:
            return []
        return [
            f"the host's memory is that of a voice above {WHOLE_FILE_S} s, whose audio encoder stays there; "
            "--audio-duration plans for a shorter one"
        ]


def plan_for(model: Path, options: PlanOptions) -> Plan:
    """Plan a run of the artifact in ``model``.

    Raises:
        CheckpointError: no artifact.
        ConfigError, InputError: an option that cannot be used.
        DoesNotFit: nothing fits.
    """
    at_hand = options.gpu == "auto" and cuda_is_here()
    card = _card(options.gpu)
    result = plan(
        Artifact.open(model),
        options.workload,
        vram_bytes=_vram_bytes(options.vram, card),
        ram_bytes=_ram_bytes(options.ram, at_hand),
        card=card,
        kv=options.kv,
        wave=_wave(options.wave),
        offload_model=options.offload_model,
        offload_kv=options.offload_kv_cache,
        t5_cpu=options.t5_cpu,
    )
    said = [_not_here(card)] if options.gpu == "auto" and not at_hand else []
    said += _beyond(card, result.vram_budget_bytes)
    return dataclasses.replace(result, notes=(*said, *result.notes, *options.notes))


def plan_team_for(model: Path, options: PlanOptions) -> Compared:
    """Plan a run of the artifact in ``model`` on ``options.gpus`` cards of one machine, and all layouts beside it.

    Raises:
        CheckpointError: no artifact.
        ConfigError, InputError: an option that cannot be used.
    """
    facts, gpus = facts_of(Artifact.open(model)), options.gpus or 1
    at_hand = options.gpu == "auto" and cuda_is_here()
    cards = _cards(options.gpu, gpus)
    there = Machines(
        cards=cards,
        vram_bytes=[_vram_bytes(options.vram, card) for card in cards],
        machines=[0] * gpus,
        ram_bytes=[_ram_bytes(options.ram, at_hand)],
    )
    wishes = Wishes(
        kv=options.kv,
        wave=_wave(options.wave),
        offload_model=options.offload_model,
        offload_kv=options.offload_kv_cache,
        t5_cpu=options.t5_cpu,
        num_gpus_dit=options.num_gpus_dit,
        ulysses_size=options.ulysses_size,
        vae_rank=options.enable_vae_parallel,
    )
    team, refusal = None, None
    try:
        team = choose_team(facts, options.workload, there, wishes)
    except DoesNotFit as error:
        refusal = error
    if team is not None:
        said = [_not_here(cards[0])] if options.gpu == "auto" and not at_hand else []
        said += _beyond(cards[0], there.vram_bytes[0])
        team = dataclasses.replace(team, notes=(*said, *team.notes, *options.notes))
    return Compared(team=team, refusal=refusal, alternatives=alternatives(facts, options.workload, there, wishes))


def _cards(name: str, gpus: int) -> list[Card]:
    """Those at hand, one after the other; where more are asked for, more of the first."""
    if name != "auto" or not cuda_is_here():
        return [_card(name)] * gpus
    here = [card_at_hand(torch.device("cuda", index)) for index in range(min(gpus, torch.cuda.device_count()))]
    return here + [here[0]] * (gpus - len(here))


def _beyond(card: Card, budget: int) -> list[str]:
    if budget <= card.vram_bytes:
        return []
    return [f"--vram is {gib(budget)}, more than the {gib(card.vram_bytes)} that {card.name} has"]


def _not_here(card: Card) -> str:
    return f"no CUDA device is here: speeds are those of {card.name}; another is named with --gpu"


def _card(name: str) -> Card:
    if name != "auto":
        return card_named(name)
    return card_at_hand(torch.device("cuda")) if cuda_is_here() else card_named(DEFAULT_CARD)


def _vram_bytes(text: str | None, card: Card) -> int:
    return card.usable_bytes if text is None else parse_bytes(text, "--vram")


def _ram_bytes(text: str | None, at_hand: bool) -> int:
    if text is not None:
        return parse_bytes(text, "--ram")
    return int(psutil.virtual_memory().total) if at_hand else DEFAULT_RAM_BYTES


def _wave(text: str) -> str | int:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ConfigError(f"--wave is {text!r}; expected auto, or 1 to the number of steps")
    return int(text)
