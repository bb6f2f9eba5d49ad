"""Commands that answer for every option at once: those of other programs, unknown ones, and those that are missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import click

from lowvram.commands.foreign_options import BY_COMMAND, Foreign
from lowvram_kernels.errors import ConfigError

# A hint is for a slip of the keys. A name that shares a word is another option, and no hint is better than that one.
_ALIKE, _SHORT = 0.85, 5
# So many options may be meant by a beginning.
_BEGUN = 3
# Of these, one is enough.
_EITHER = {"infer": [("out", "save_dir")]}


class Answering(click.Command):
    """A command that knows the options of the reference's scripts: what it cannot use is answered in one line, all of
    it together, before anything else is looked at."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        own = {param.name for param in self.params}
        self._foreign = BY_COMMAND.get(self.name or "", {})
        self.params += [_hidden(foreign) for foreign in self._foreign.values() if foreign.name not in own]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, once everything that was given can be used.

        Raises:
            ConfigError: an answer for every option that cannot be, and the names of those that are missing.
        """
        if not ctx.resilient_parsing and not set(args) & set(ctx.help_option_names):
            self._answer(ctx, args)
        return super().parse_args(ctx, args)

    def _answer(self, ctx: click.Context, args: list[str]) -> None:
        parser = self.make_parser(ctx)
        parser.ignore_unknown_options = True
        found, rest, _ = parser.parse_args(args=list(args))
        names = [option.name or "" for option in _options_of(self)]
        given = {name: _text(found[name]) for name in names if name in found}
        answers: dict[str, list[str]] = {}
        for name, foreign in self._foreign.items():
            if name in given and (answer := foreign.answer(given)):
                answers.setdefault(answer, []).append(f"--{name}")
        places = [found.get(param.name or "") for param in self.params if isinstance(param, click.Argument)]
        for word in _unknown([*(place for place in places if isinstance(place, str)), *rest], args):
            answers.setdefault(self._words_for(ctx, word), []).append(word)
        said = [f"{', '.join(dict.fromkeys(options))}: {answer}" for answer, options in answers.items()]
        if missing := self._missing(given):
            said.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        if said:
            raise ConfigError("; ".join(said))

    def _missing(self, given: dict[str, str]) -> list[str]:
        needed = [(option.name or "",) for option in _options_of(self) if option.required]
        groups = [*needed, *_EITHER.get(self.name or "", [])]
        return [" or ".join(f"--{name}" for name in group) for group in groups if not given.keys() & set(group)]

    def _words_for(self, ctx: click.Context, word: str) -> str:
        name = _bare(word)
        if others := _commands_with(ctx, name):
            return f"for lowvram {_listed(others)}, not for {self.name}"
        names = _shown(self)
        # Argparse, which the reference's scripts use, takes any beginning that is one option's alone.
        every = names | {_bare(each) for each in self._foreign}
        begun = sorted(known for known in every if word.startswith("--") and known.startswith(name))
        if len(name) > 1 and 1 <= len(begun) <= _BEGUN:
            whole = " and ".join(f"--{known.replace('-', '_')}" for known in begun)
            return f"unknown, {whole} {'is' if len(begun) == 1 else 'are'} known"
        near = difflib.get_close_matches(name, names, n=2, cutoff=_ALIKE) if len(name) >= _SHORT else []
        if len(near) == 1:
            return f"unknown, --{near[0].replace('-', '_')} is known"
        return f"unknown, lowvram {self.name} --help has all that are known"


def before_a_command(group: click.Group, option: str, args: list[str]) -> str:
    """What to say of an option that stands before any command, where few are known."""
    name = _bare(option)
    shown = [command for command, each in group.commands.items() if name in _shown(each)]
    owners = shown or [command for command, each in group.commands.items() if name in _known(each)]
    if not owners:
        return f"{option}: unknown, lowvram --help has the commands, which have the options"
    meant = next((command for command in (*args, "infer") if command in owners), owners[0])
    return f"{option} stands before a command; expected it behind one, as lowvram {meant} {option}"


def _hidden(foreign: Foreign) -> click.Option:
    shape: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if foreign.switch else {}
    return click.Option([f"--{foreign.name}", foreign.name], type=str, hidden=True, expose_value=False, **shape)


def _text(value: object) -> str:
    """As it was written; "true" of a switch alone, the last one of an option that may be repeated."""
    if isinstance(value, (list, tuple)):
        return _text(value[-1])
    return value if isinstance(value, str) else "true"


def _unknown(words: Iterable[str], args: list[str]) -> list[str]:
    """Those that begin as an option does and stand before a "--"; without what follows a "="."""
    before = args[: args.index("--")] if "--" in args else args
    return [word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1 and word in before]


def _bare(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


def _shown(command: click.Command) -> set[str]:
    """Names that a command's --help has."""
    return {_bare(name) for option in _options_of(command) if not option.hidden for name in option.opts}


def _known(command: click.Command) -> set[str]:
    """Those of other programs with them."""
    return {_bare(name) for option in _options_of(command) for name in option.opts}


def _options_of(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option)]


def _listed(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _commands_with(ctx: click.Context, name: str) -> list[str]:
    group = ctx.parent.command if ctx.parent else None
    commands = group.commands if isinstance(group, click.Group) else {}
    return sorted(other for other, command in commands.items() if name in _shown(command))
