"""What ``lowvram plan`` prints: a table or JSON, of one GPU or of several."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console

from lowvram.dry_run import dry_run, dry_run_team
from lowvram.planning.command import PlanOptions, plan_for, plan_team_for
from lowvram.planning.planner import DoesNotFit
from lowvram.planning.table import print_plan, to_json
from lowvram.planning.team_table import compared_to_json, print_team


def show_plan(path: Path, options: PlanOptions, *, dry: bool, as_json: bool) -> bool:
    """Print the plan for the artifact in ``path``, with ``dry`` also what it takes on a simulated GPU. Returns whether
    there is one; where there is none, ``as_json`` prints what comes nearest, and why it does not do.

    Raises:
        DoesNotFit: nothing fits on one GPU, and it is not asked for ``as_json``.
        LowvramError: an artifact or an option that cannot be used.
    """
    show = _show_one if options.gpus is None else _show_several
    return show(path, options, dry=dry, as_json=as_json)


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
