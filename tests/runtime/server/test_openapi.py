"""The API's documentation says what the API does."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from morphserve.configs.schema import ServerConfig
from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.documentation import bounds_text, render, type_text
from morphserve.runtime.server.endpoint import Access
from morphserve.runtime.server.routes import endpoints
from morphserve.runtime.server.serving import Serving

pytestmark = pytest.mark.anyio
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/tokenize": {"prompt": "a b c"},
    "/detokenize": {"tokens": [5, 6]},
    "/morph/v1/pin": {"rung": 1},
    "/morph/v1/step": {"by": 1},
}


async def document_of(api: httpx.AsyncClient, **headers: str) -> Any:
    answer = await api.get("/openapi.json", headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    return answer.json()


def references(value: Any) -> set[str]:
    return set(re.findall(r'"\$ref": "(#[^"]+)"', json.dumps(value)))


def check(schema: Any, value: Any, api: Any, path: str) -> None:
    """Whether a value has the fields and types that a schema of ours promises."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return check(api["components"]["schemas"][name], value, api, path)
    if "anyOf" in schema:
        kinds = [
            kind for kind in schema["anyOf"] if value is not None or kind.get("type") == "null"
        ]
        return check(kinds[0], value, api, path)
    if "enum" in schema:
        assert value in schema["enum"], path
    elif schema.get("type") == "object" and "properties" in schema:
        assert set(schema.get("required", [])) <= set(value) <= set(schema["properties"]), path
        for name, part in value.items():
            check(schema["properties"][name], part, api, f"{path}.{name}")
    elif schema.get("type") == "array":
        for i, part in enumerate(value):
            check(schema["items"], part, api, f"{path}[{i}]")
    else:
        kinds_of = {"string": str, "integer": int, "number": (int, float), "object": dict}
        kinds_of |= {"null": type(None), "boolean": bool}
        assert isinstance(value, kinds_of[schema["type"]]), path
    return None


async def test_every_route_is_described_once(api: httpx.AsyncClient, serving: Serving) -> None:
    document = await document_of(api)
    assert document["openapi"] == "3.1.0"
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    table = endpoints(serving, 15.0, keys_wanted=False)
    assert described == {(e.method, e.path.replace(":path}", "}")) for e in table}
    ids = [op["operationId"] for ops in document["paths"].values() for op in ops.values()]
    assert len(ids) == len(set(ids)) == len(table)


async def test_references_lead_somewhere(api: httpx.AsyncClient) -> None:
    document = await document_of(api)
    for reference in references(document):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


async def test_answers_have_the_shape_that_is_described(serving: Serving) -> None:
    key = {"Authorization": "Bearer sk-admin"}
    app = make_app(serving, ServerConfig("demo", admin_key="sk-admin"))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=key) as api:
        document = await document_of(api)
        for endpoint in endpoints(serving, 15.0, keys_wanted=False):
            path = endpoint.path.replace("{name:path}", "demo")
            if endpoint.answers is None:
                continue
            answer = await api.request(endpoint.method, path, json=BODIES.get(path))
            assert answer.status_code == 200, (path, answer.text)
            operation = document["paths"][endpoint.path.replace(":path}", "}")]
            content = operation[endpoint.method.lower()]["responses"]["200"]["content"]
            check(content["application/json"]["schema"], answer.json(), document, path)


async def test_errors_have_the_shape_and_status_that_are_described(api: httpx.AsyncClient) -> None:
    document = await document_of(api)
    for path in BODIES:
        for body in (b"{", b'{"model": "x"}', b"[]"):
            answer = await api.post(path, content=body)
            responses = document["paths"][path]["post"]["responses"]
            response = responses[str(answer.status_code)]
            assert answer.status_code >= 400
            schema = response["content"]["application/json"]["schema"]
            check(schema, answer.json(), document, path)


async def test_bounds_and_what_is_not_done_are_in_the_schema(api: httpx.AsyncClient) -> None:
    schemas = (await document_of(api))["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in fields["temperature"]["anyOf"]
    assert fields["suffix"] == {"enum": ["", None], "default": "", "x-not-done": True}
    assert "prompt" in schemas["CompletionRequest"]["required"]


async def test_keys_are_described_as_they_are_asked_for(
    api: httpx.AsyncClient, serving: Serving
) -> None:
    free = (await document_of(api))["paths"]
    config = ServerConfig("demo", api_keys=("sk-1",))
    transport = httpx.ASGITransport(make_app(serving, config), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as guarded:
        keyed = (await document_of(guarded, Authorization="Bearer sk-1"))["paths"]
    for endpoint in endpoints(serving, 15.0, keys_wanted=True):
        path, method = endpoint.path.replace(":path}", "}"), endpoint.method.lower()
        with_key, without = keyed[path][method], free[path][method]
        wanted = {Access.PUBLIC: set(), Access.ADMIN: {"adminKey"}}
        asked = wanted.get(endpoint.access, {"apiKey", "adminKey"})
        assert {name for choice in with_key["security"] for name in choice} == asked
        assert ("401" in with_key["responses"]) == bool(asked)
        assert without["security"] == (
            [{"adminKey": []}] if endpoint.access is Access.ADMIN else []
        )


async def test_headers_that_are_read_are_described(api: httpx.AsyncClient) -> None:
    paths = (await document_of(api))["paths"]
    named = {p["name"] for p in paths["/v1/chat/completions"]["post"]["parameters"]}
    assert named == {"X-Request-Id", "x-morph-min-precision", "x-slo-ttft-ms", "x-slo-tpot-ms"}


class Links(HTMLParser):
    """What a page links to, has, and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.ids: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if found := given.get("id"):
            self.ids.append(found)
        if tag == "a":
            self.targets.add(given["href"] or "")
        else:
            self.loads += [str(given[name]) for name in ("src", "href") if name in given]


async def test_the_page_shows_every_route_and_type_and_loads_nothing(
    api: httpx.AsyncClient,
) -> None:
    document, answer = await document_of(api), await api.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Links()
    page.feed(answer.text)
    operations = [op["operationId"] for ops in document["paths"].values() for op in ops.values()]
    assert page.ids == [*operations, *document["components"]["schemas"]]
    assert page.targets <= {f"#{name}" for name in page.ids} | {"/openapi.json"}
    assert {f"#{name}" for name in operations} <= page.targets
    assert page.loads == ["data:,"]


async def test_the_page_escapes_what_it_is_given(api: httpx.AsyncClient) -> None:
    document = await document_of(api)
    document["info"]["title"] = "<script>alert(1)</script>"
    assert "<script>" not in render(document)


@pytest.mark.parametrize(
    ("schema", "kind", "bounds"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 9}, "integer", "1 to 9"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number", "above 0, at most 1"),
        (
            {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
            "list of string",
            "at most 2 items, at most 4 characters",
        ),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/a/B"}]}, "string or B", ""),
        ({"enum": [1, "a", None]}, '1 or "a" or null', ""),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "object of integer", ""),
        ({}, "anything", ""),
    ],
)
def test_types_and_bounds_are_told_in_words(schema: Any, kind: str, bounds: str) -> None:
    assert (type_text(schema), bounds_text(schema)) == (kind, bounds)
