"""What ``lowvram plan`` prints: a table or JSON, of one GPU or of several."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console

from lowvram.byte_sizes import gib
from lowvram.commands.plan import PlanOptions, plan_for, plan_team_for
from lowvram.planning.card_table import CARDS
from lowvram.planning.cards import GIGA, TERA
from lowvram.planning.planner import DoesNotFit
from lowvram.planning.report import print_plan, to_json
from lowvram.planning.team_report import compared_to_json, print_team
from lowvram.simulate.dry_run import dry_run, dry_run_team


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
