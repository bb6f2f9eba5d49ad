"""Page of the API's operations, from its schema; it asks nobody else for scripts or styles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowvram.pages.document import rendered

_TEMPLATE = Path(__file__).with_name("docs.html.j2")
_METHODS = ("get", "post", "delete")


def docs_page(schema: dict[str, Any]) -> str:
    """The page as text, of a schema as OpenAPI has it."""
    operations = [
        {
            "method": method.upper(),
            "path": path,
            "text": operation.get("description", operation.get("summary", "")),
            "fields": _fields(operation, schema) + _query(operation),
            "answer": next((status for status in operation["responses"] if status.startswith("2")), "200"),
        }
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
        if method in _METHODS
    ]
    return rendered(_TEMPLATE, {"info": schema["info"], "operations": operations}, {})


def _fields(operation: dict[str, Any], schema: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of a request's body: name, kind, default, description."""
    content = operation.get("requestBody", {}).get("content", {})
    found = []
    for body in content.values():
        form = _resolved(body["schema"], schema)
        for name, facts in form["properties"].items():
            default = "required" if name in form.get("required", ()) else _default(facts)
            found.append((name, _kind(facts), default, facts.get("description", "")))
    return found


def _query(operation: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (each["name"], _kind(each["schema"]), _default(each["schema"]), "in the query")
        for each in operation.get("parameters", ())
        if each["in"] == "query"
    ]


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in part:
        found: Any = schema
        for step in part["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        part = found
    return part


def _kind(facts: dict[str, Any]) -> str:
    if "anyOf" in facts:
        return " or ".join(_kind(each) for each in facts["anyOf"] if each.get("type") != "null")
    if "const" in facts:
        return repr(facts["const"])
    return "file" if facts.get("format") == "binary" else str(facts.get("type", "any"))


def _default(facts: dict[str, Any]) -> str:
    default = facts.get("default")
    return "" if default is None else str(default)
