"""Pages that hold everything in themselves: rendering of a template, with what all of them share, and writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from lowvram_kernels.errors import OutputError


def rendered(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[[Any], str]]) -> str:
    """A template filled in; it may import ``parts.html.j2``, which lies here."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= filters
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def write_text(text: str, path: Path) -> None:
    """Write ``path``, which may be replaced, whole or not at all.

    Raises:
        OutputError: a full disk, or no right to write there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}), {len(text)} bytes: free some space, or choose "
            "another place"
        ) from error


def for_script(facts: dict[str, Any]) -> str:
    """JSON that can stand in a <script>: no path or prompt in it can end the element."""
    return json.dumps(facts, indent=1, allow_nan=False).replace("<", "\\u003c")
