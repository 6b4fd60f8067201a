"""The API's documentation: as an OpenAPI document, and as a page made from it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import msgspec
from jinja2 import Environment, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from morphserve.configs.version import version
from morphserve.runtime.server.endpoint import JSON, Endpoint
from morphserve.runtime.server.openapi import document

HTML = "text/html; charset=utf-8"
_PAGE = "docs.html"
_HEADERS = {  # the page needs nothing from anywhere
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
}


class Documentation:
    """The endpoints that describe all endpoints of a table, these included."""

    def __init__(self, *, keys_wanted: bool) -> None:
        self._keys_wanted = keys_wanted
        self.table: Sequence[Endpoint] = ()  # set once it is complete

    async def openapi(self, _request: Request) -> Response:
        return Response(msgspec.json.encode(self._document), media_type=JSON)

    async def page(self, _request: Request) -> Response:
        return Response(self._html, headers=_HEADERS, media_type=HTML)

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self.table, version(), keys_wanted=self._keys_wanted)

    @cached_property
    def _html(self) -> str:
        return render(self._document)


def render(api: Mapping[str, Any]) -> str:
    """An OpenAPI document of ours as one page of HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"type": type_text, "bounds": bounds_text, "bare": _without_null}
    source = resources.files(__package__).joinpath(_PAGE).read_text("utf-8")
    return environment.from_string(source).render(api=api)


def type_text(schema: Mapping[str, Any]) -> str:
    """A schema's type in words: `string or list of integer`."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema:
        return " or ".join(msgspec.json.encode(value).decode() for value in schema["enum"])
    if "const" in schema:
        return msgspec.json.encode(schema["const"]).decode()
    if "anyOf" in schema:
        return " or ".join(map(type_text, schema["anyOf"]))
    if schema.get("type") == "array":
        return _list_text(schema)
    if "additionalProperties" in schema:
        return f"object of {type_text(schema['additionalProperties'])}"
    return str(schema.get("type", "anything"))


def _list_text(schema: Mapping[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"[{', '.join(map(type_text, schema['prefixItems']))}]"
    return f"list of {type_text(schema.get('items', {}))}"


def bounds_text(schema: Mapping[str, Any]) -> str:
    """What a value must keep to, "" where there is nothing: `1 to 64 items`."""
    parts = [_range(schema, "minimum", "maximum", "")]
    if "exclusiveMinimum" in schema:
        parts = [f"above {schema['exclusiveMinimum']}", *parts]
    parts.append(_range(schema, "minLength", "maxLength", " characters"))
    parts.append(_range(schema, "minItems", "maxItems", " items"))
    inner = [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]
    parts += [bounds_text(part) for part in inner if isinstance(part, Mapping)]
    return ", ".join(dict.fromkeys(part for part in parts if part))


def _range(schema: Mapping[str, Any], low: str, high: str, unit: str) -> str:
    least, most = schema.get(low), schema.get(high)
    if least is not None and most is not None:
        return f"{least} to {most}{unit}"
    if least is not None:
        return f"at least {least}{unit}"
    return "" if most is None else f"at most {most}{unit}"


def _without_null(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a value that is given; null means the default everywhere."""
    given = [part for part in schema.get("anyOf", []) if part != {"type": "null"}]
    if not given:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    return rest | (dict(given[0]) if len(given) == 1 else {"anyOf": given})
