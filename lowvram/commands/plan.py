"""Command ``plan``: a request to a plan, for one GPU or for several, printed as a table or JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console

from lowvram.byte_sizes import gib
from lowvram.commands.shared_options import fields_of, seconds_of, settled_memory
from lowvram.devices import choose_dtype, cuda_is_here
from lowvram.offload.placement import PlanOptions
from lowvram.planning.card_names import DEFAULT_CARD, card_named
from lowvram.planning.card_table import CARDS
from lowvram.planning.cards import GIGA, TERA, Card
from lowvram.planning.layout_choice import Compared, alternatives, choose_team
from lowvram.planning.measure import card_at_hand
from lowvram.planning.members import Machines
from lowvram.planning.memory_costs import GIB
from lowvram.planning.model_sizes import model_sizes
from lowvram.planning.planner import plan
from lowvram.planning.rank_layout import LayoutOptions
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram.planning.report import print_plan, to_json
from lowvram.planning.team_report import compared_to_json, print_team
from lowvram.planning.workload import Workload
from lowvram.simulate.dry_run import dry_run, dry_run_team
from lowvram_kernels.errors import ConfigError
from lowvram_models.constants import WHOLE_FILE_S
from lowvram_quantize.format import Artifact


def show_plan(path: Path, request: PlanRequest, *, dry: bool, as_json: bool) -> bool:
    """Print the plan for the artifact in ``path``, with ``dry`` also what it takes on a simulated GPU. Returns whether
    there is one; where there is none, ``as_json`` prints what comes nearest, and why it does not do.

    Raises:
        DoesNotFit: nothing fits on one GPU, and it is not asked for ``as_json``.
        LowvramError: an artifact or an option that cannot be used.
    """
    show = _show_one if request.gpus is None else _show_several
    return show(path, request, dry=dry, as_json=as_json)


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


def _show_one(path: Path, request: PlanRequest, *, dry: bool, as_json: bool) -> bool:
    try:
        result = plan_for(path, request)
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


def _show_several(path: Path, request: PlanRequest, *, dry: bool, as_json: bool) -> bool:
    compared = plan_team_for(path, request)
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
class PlanRequest:
    """What is to be planned. Validated at construction.

    ``vram_budget`` (of each card) and ``ram_budget`` are bytes, None for what the card, and the host, have; ``gpu`` is
    a card's name, ``custom:...``, or "auto". ``gpus`` None: a plan for one, without ranks; ``layout`` says how several
    share the work.

    ``audio_duration`` is how long the voice is, as "90" or "1:30". None plans for a voice of any length, so that what
    fits here fits when it is run: above 60 s the audio encoder stays on the host, beside everything else there. That
    the plan of a short voice then names more of the host than it takes is said in a note.
    """

    vram_budget: int | None = None
    ram_budget: int | None = None
    size: str = "704*384"
    infer_frames: int = 48
    sample_steps: int = 4
    gpu: str = "auto"
    dtype: str = "auto"
    audio_duration: str | None = None
    gpus: int | None = None
    options: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    layout: LayoutOptions = dataclasses.field(default_factory=LayoutOptions)

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise ConfigError(f"--gpus is {self.gpus}; expected 1 or more")
        for name, value in dataclasses.asdict(self.layout).items():
            if self.gpus is None and value is not None:
                raise ConfigError(f"--{name} has an effect on several GPUs only; expected --gpus N beside it")
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


def make_plan_request(options: dict[str, Any]) -> PlanRequest:
    """What the command line's options ask."""
    settled = options | settled_memory(options)
    return PlanRequest(
        **fields_of(PlanRequest, settled),
        options=PlanOptions(**fields_of(PlanOptions, settled)),
        layout=LayoutOptions(**fields_of(LayoutOptions, settled)),
    )


def plan_for(model: Path, request: PlanRequest) -> Plan:
    """Plan a run of the artifact in ``model``.

    Raises:
        CheckpointError: no artifact.
        ConfigError, InputError: an option that cannot be used.
        DoesNotFit: nothing fits.
    """
    at_hand = request.gpu == "auto" and cuda_is_here()
    card = _card(request.gpu)
    result = plan(
        Artifact.open(model),
        request.workload,
        request.options,
        vram_bytes=request.vram_budget or card.usable_bytes,
        ram_bytes=_ram_bytes(request, at_hand),
        card=card,
    )
    said = [_not_here(card)] if request.gpu == "auto" and not at_hand else []
    said += _beyond(card, result.vram_budget_bytes)
    return dataclasses.replace(result, notes=(*said, *result.notes, *request.notes))


def plan_team_for(model: Path, request: PlanRequest) -> Compared:
    """Plan a run of the artifact in ``model`` on ``request.gpus`` cards of one machine, and all layouts beside it.

    Raises:
        CheckpointError: no artifact.
        ConfigError, InputError: an option that cannot be used.
    """
    sizes, gpus = model_sizes(Artifact.open(model)), request.gpus or 1
    at_hand = request.gpu == "auto" and cuda_is_here()
    cards = _cards(request.gpu, gpus)
    there = Machines(
        cards=cards,
        vram_bytes=[request.vram_budget or card.usable_bytes for card in cards],
        machines=[0] * gpus,
        ram_bytes=[_ram_bytes(request, at_hand)],
    )
    work, options = request.workload, request.options
    team, refusal = None, None
    try:
        team = choose_team(sizes, work, there, options, request.layout)
    except DoesNotFit as error:
        refusal = error
    if team is not None:
        said = [_not_here(cards[0])] if request.gpu == "auto" and not at_hand else []
        said += _beyond(cards[0], there.vram_bytes[0])
        team = dataclasses.replace(team, notes=(*said, *team.notes, *request.notes))
    return Compared(team=team, refusal=refusal, alternatives=alternatives(sizes, work, there, options))


def _cards(name: str, gpus: int) -> list[Card]:
    """Those at hand, one after the other; where more are asked for, more of the first."""
    if name != "auto" or not cuda_is_here():
        return [_card(name)] * gpus
    here = [card_at_hand(torch.device("cuda", index)) for index in range(min(gpus, torch.cuda.device_count()))]
    return here + [here[0]] * (gpus - len(here))


def _beyond(card: Card, budget: int) -> list[str]:
    if budget <= card.vram_bytes:
        return []
    return [f"--vram-budget is {gib(budget)}, more than the {gib(card.vram_bytes)} that {card.name} has"]


def _not_here(card: Card) -> str:
    return f"no CUDA device is here: speeds are those of {card.name}; another is named with --gpu"


def _card(name: str) -> Card:
    if name != "auto":
        return card_named(name)
    return card_at_hand(torch.device("cuda")) if cuda_is_here() else card_named(DEFAULT_CARD)


def _ram_bytes(request: PlanRequest, at_hand: bool) -> int:
    return request.ram_budget or (int(psutil.virtual_memory().total) if at_hand else DEFAULT_RAM_BYTES)
