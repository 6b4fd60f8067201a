"""The OpenAPI document, made from the table of routes and the types of its bodies."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from morphserve.runtime.server.endpoint import EVENTS, JSON, Access, Endpoint
from morphserve.runtime.server.errors import ErrorEnvelope
from morphserve.runtime.server.unsupported import Unsupported, neutral_values

Json = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request is wrong: param names the field, message says why.",
    401: "No key, or one that is not known.",
    403: "Not allowed: the page's origin, the name the server was called by, or the key.",
    404: "There is no such path or model.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests; Retry-After says in how many seconds to come again.",
    431: "The head is too large.",
    500: "A fault of the server; its log has the details.",
    503: "Not now; Retry-After says in how many seconds to come again.",
}
_DESCRIPTION = """\
OpenAI's API with vLLM's additions, and under /morph/v1 what concerns morphing. Unknown fields of a
body are ignored; null means the default. Every error has the same envelope, and every response
X-Request-Id: the request's own, or a new one. A stream is server-sent events; one that is silent
for a while carries comments, and an error after its beginning is an event with the envelope."""
_REQUEST_ID = (
    "Comes back with the response. One that is no 1 to 128 visible ASCII characters is replaced."
)
NOT_DONE = "x-not-done"  # marks fields of a schema that are refused unless they ask for nothing


def document(table: Sequence[Endpoint], version: str, *, keys_wanted: bool) -> Json:
    """OpenAPI 3.1; `keys_wanted` says whether ordinary endpoints ask for one."""
    paths: dict[str, Json] = {}
    for endpoint in table:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", endpoint.path)
        operation = _operation(endpoint, path, keys_wanted=keys_wanted)
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "MorphServe", "version": version, "description": _DESCRIPTION},
        "tags": [{"name": tag} for tag in dict.fromkeys(endpoint.tag for endpoint in table)],
        "paths": paths,
        "components": {
            "schemas": _schemas(table),
            "securitySchemes": {
                "apiKey": _bearer("Of --api-key; the admin key does, too."),
                "adminKey": _bearer("Of --admin-key."),
            },
            "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
        },
    }


def _bearer(description: str) -> Json:
    return {"type": "http", "scheme": "bearer", "description": description}


def _operation(endpoint: Endpoint, path: str, *, keys_wanted: bool) -> Json:
    operation: Json = {
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{path}").strip("_"),
        "parameters": _parameters(endpoint, path),
        "responses": _responses(endpoint, keys_wanted=keys_wanted),
        "security": _security(endpoint.access, keys_wanted=keys_wanted),
    }
    if endpoint.takes is not None:
        content = {JSON: {"schema": _reference(endpoint.takes)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _security(access: Access, *, keys_wanted: bool) -> list[dict[str, list[str]]]:
    if access is Access.ADMIN:
        return [{"adminKey": []}]
    return [{"apiKey": []}, {"adminKey": []}] if access is Access.KEY and keys_wanted else []


def _parameters(endpoint: Endpoint, path: str) -> list[Json]:
    text: Json = {"type": "string"}
    names = re.findall(r"\{(\w+)\}", path)
    found: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": text} for name in names
    ]
    found.append(_header("X-Request-Id", text, _REQUEST_ID))
    return found + [_header(h.name, h.schema, h.description) for h in endpoint.headers]


def _header(name: str, schema: Mapping[str, Any], description: str) -> Json:
    return {"name": name, "in": "header", "schema": schema, "description": description}


def _responses(endpoint: Endpoint, *, keys_wanted: bool) -> dict[str, Json]:
    content: Json = {}
    if endpoint.answers is not None:
        content[JSON] = {"schema": _reference(endpoint.answers)}
    if endpoint.streams is not None:
        content[EVENTS] = {"schema": _event(endpoint)}
    if not content:
        media = endpoint.media.partition(";")[0]
        content[media] = {"schema": {"type": "object" if media == JSON else "string"}}
    answers = {"200": _with_id({"description": "Done.", "content": content})}
    for status in sorted(_statuses(endpoint, keys_wanted=keys_wanted)):
        error = {"schema": _reference(ErrorEnvelope)}
        answers[str(status)] = _with_id({"description": _ERRORS[status], "content": {JSON: error}})
    return answers


def _event(endpoint: Endpoint) -> Json:
    """The schema of each server-sent event of a stream, as tools that read streams take it."""
    last = ", the last is [DONE]" if endpoint.answers else ""
    data = {"contentMediaType": JSON, "contentSchema": _reference(endpoint.streams)}
    return {
        "type": "object",
        "description": f"Server-sent events; data is a {endpoint.streams.__name__}{last}.",
        "properties": {"data": {"type": "string", **data}},
        "required": ["data"],
    }


def _with_id(response: Json) -> Json:
    return response | {"headers": {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}}


def _statuses(endpoint: Endpoint, *, keys_wanted: bool) -> Iterable[int]:
    statuses = {403, 431, 500, *endpoint.errors}
    if endpoint.takes is not None:
        statuses |= {400, 408, 413, 429, 503}
    if endpoint.access is Access.ADMIN:
        statuses |= {401, 429, 503}
    elif endpoint.access is Access.KEY and keys_wanted:
        statuses.add(401)
    return statuses


def _schemas(table: Sequence[Endpoint]) -> Json:
    types = [
        kind
        for endpoint in table
        for kind in (endpoint.takes, endpoint.answers, endpoint.streams)
        if kind is not None
    ]
    types = list(dict.fromkeys([*types, ErrorEnvelope]))
    _, schemas = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    for kind in types:
        if issubclass(kind, Unsupported):
            _narrow(schemas[kind.__name__]["properties"], neutral_values(kind))
    return schemas


def _narrow(properties: Json, neutral: Mapping[str, Any]) -> None:
    """Fields that are known but not done here: the only values that are taken."""
    for name, value in neutral.items():
        properties[name] = {
            "enum": [value] if value is None else [value, None],
            "default": value,
            NOT_DONE: True,
        }


def _reference(kind: type) -> Json:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}
