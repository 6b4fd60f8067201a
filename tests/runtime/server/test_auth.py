"""Who is served: keys, and pages of other hosts."""

import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import ServerConfig
from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.endpoint import Access
from morphserve.runtime.server.errors import ApiError
from morphserve.runtime.server.keys import AdminRate, Keys
from morphserve.runtime.server.routes import endpoints
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.turned_away import LOG_INTERVAL_S, TurnedAway

pytestmark = pytest.mark.anyio
ALICE, BOB, ADMIN = "sk-alice-1", "sk-bob-2", "sk-admin-3"
GUARDED = ServerConfig("demo", api_keys=(ALICE, BOB), admin_key=ADMIN)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def client_of(app: Any, host: str = "127.0.0.1:8000") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")


@pytest.fixture
async def guarded(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(serving, GUARDED)) as api:
        yield api


@pytest.fixture
async def local(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    """A server that listens on loopback and serves the pages of one other origin."""
    config = ServerConfig("demo", allowed_origins=("https://chat.example.com",))
    async with client_of(make_app(serving, config, on_loopback=True)) as api:
        yield api


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    assert "x-request-id" in answer.headers
    return answer.json()["error"]


async def test_every_route_but_the_public_ones_wants_a_key(
    guarded: httpx.AsyncClient, serving: Serving
) -> None:
    public = {
        e.path for e in endpoints(serving, 15.0, keys_wanted=True) if e.access is Access.PUBLIC
    }
    assert public == {"/", "/page.js", "/health", "/ready", "/docs", "/openapi.json"}
    for endpoint in endpoints(serving, 15.0, keys_wanted=True):
        answer = await guarded.request(endpoint.method, endpoint.path)
        if endpoint.path in public:
            assert answer.status_code == 200, endpoint.path
        else:
            assert error_of(answer, 401)["code"] == "invalid_api_key", endpoint.path
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/unknown", "http://test//health", "/health/", "/v1/health", "/ready%2f"]
)
async def test_paths_that_are_not_there_want_a_key_too(
    guarded: httpx.AsyncClient, path: str
) -> None:
    error_of(await guarded.get(path), 401)
    error_of(await guarded.get(path, headers=bearer(ALICE)), 404)


@pytest.mark.parametrize("host", ["x/health?", "127.0.0.1/health#", "health", "a@/ready", ""])
async def test_what_headers_say_of_the_address_opens_nothing(
    guarded: httpx.AsyncClient, host: str
) -> None:
    told = {"Host": host, "X-Forwarded-Host": "/health", "X-Forwarded-Prefix": "/health"}
    told |= {"X-Original-URL": "/health", "X-Rewrite-URL": "/ready"}
    error_of(await guarded.get("/v1/models", headers=told), 401)


@pytest.mark.parametrize("key", [ALICE, BOB, ADMIN])
async def test_any_key_opens_ordinary_routes(guarded: httpx.AsyncClient, key: str) -> None:
    answer = await guarded.post("/v1/completions", json={"prompt": "a"}, headers=bearer(key))
    assert answer.status_code == 200
    assert (await guarded.get("/metrics", headers=bearer(key))).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": ALICE},
        {"Authorization": f"Basic {ALICE}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {ALICE}x"},
        {"Authorization": f"Bearer {ALICE[:-1]}"},
        {"Authorization": f"Bearer {ALICE} {BOB}"},
        {"Authorization": b"Bearer \xff\xfe"},
        [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {BOB}")],
        {"X-Api-Key": ALICE},
    ],
)
async def test_nothing_but_a_whole_key_will_do(guarded: httpx.AsyncClient, headers: Any) -> None:
    answer = await guarded.get("/v1/models", headers=headers)
    assert ALICE[:-1] not in json.dumps(error_of(answer, 401))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, given: bytes) -> bool:
        compared.append((ours, given))
        return ours == given

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys((ALICE, BOB), ADMIN)
    for key in (ALICE, ADMIN, "wrong", ""):
        compared.clear()
        keys.caller(key)
        assert len(compared) == 3
        assert {len(part) for pair in compared for part in pair} == {32}  # digests, not keys


def test_keys_have_namespaces_of_their_own() -> None:
    keys = Keys((ALICE, BOB), ADMIN)
    callers = [keys.caller(key) for key in (ALICE, BOB, ADMIN)]
    assert len({caller.namespace for caller in callers if caller}) == 3
    assert [caller.is_admin for caller in callers if caller] == [False, False, True]
    assert keys.caller("wrong") is None


def test_keys_are_not_shown_with_the_settings() -> None:
    assert "sk-" not in repr(GUARDED) and "sk-" not in str(Keys((ALICE,), ADMIN).__dict__)


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_keys": ("",)},
        {"api_keys": ("two words",)},
        {"admin_key": "né"},
        {"api_keys": ("same-key",), "admin_key": "same-key"},
        {"allowed_origins": ("chat.example.com",)},
        {"allowed_origins": ("https://chat.example.com/",)},
    ],
)
def test_keys_and_origins_that_could_never_match_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        ServerConfig("demo", **wrong)
    assert "same-key" not in str(raised.value) and "words" not in str(raised.value)


async def test_refused_keys_are_counted_and_told_once_a_minute(
    guarded: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("wrong-1", "wrong-2", "wrong-3"):
        error_of(await guarded.get("/v1/models", headers=bearer(key)), 401)
    error_of(await guarded.post("/morph/v1/free", headers=bearer(ALICE)), 403)
    metrics = (await guarded.get("/metrics", headers=bearer(ALICE))).text
    assert 'morph:admission_rejections_total{reason="invalid_api_key"} 3.0' in metrics
    assert 'morph:admission_rejections_total{reason="forbidden"} 1.0' in metrics
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("1 request was refused, the latest from 127.0.0.1 (401: this key is not")
    assert "wrong" not in line


def test_the_next_line_says_how_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    now, refused = 100.0, Counter[str]()
    turned_away = TurnedAway(refused, lambda: now)
    for _ in range(5):
        turned_away.add(ApiError(403, "no", code="forbidden_origin"), {"client": None})
        now += LOG_INTERVAL_S / 4
    assert refused == {"forbidden_origin": 5}
    assert [record.getMessage() for record in caplog.records] == [
        "1 request was refused, the latest from an unknown address (403: no)",
        "4 requests were refused, the latest from an unknown address (403: no)",
    ]


def test_admin_calls_are_a_few_per_second() -> None:
    now = 100.0
    rate = AdminRate(lambda: now)
    assert [rate.take() for _ in range(7)] == [True] * 5 + [False] * 2
    now += 0.5
    assert [rate.take() for _ in range(4)] == [True, True, False, False]
    now += 1000
    assert [rate.take() for _ in range(7)] == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "chat.example.com"]
)
async def test_a_server_on_loopback_answers_to_this_machines_names(
    local: httpx.AsyncClient, host: str
) -> None:
    assert (await local.get("/health", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost.", "10.0.0.1", "[::2]"]
)
async def test_a_server_on_loopback_answers_to_no_other_name(
    local: httpx.AsyncClient, host: str
) -> None:
    answer = await local.get("/health", headers={"Host": host})
    assert "listens on loopback" in error_of(answer, 403)["message"]


async def test_a_server_for_others_answers_to_any_name(api: httpx.AsyncClient) -> None:
    assert (await api.get("/health", headers={"Host": "gpu7.example.com"})).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),  # the same as Host
        ("https://chat.example.com", 200),
        ("https://evil.com", 403),
        ("http://127.0.0.1:9000", 403),
        ("http://chat.example.com", 403),
        ("null", 403),
        ("", 403),
    ],
)
async def test_pages_of_other_origins_may_not_post(
    local: httpx.AsyncClient, origin: str, status: int
) -> None:
    headers = {"Origin": origin, "Content-Type": "text/plain"}  # what a form can send
    answer = await local.post("/v1/completions", content='{"prompt": "a"}', headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "--allowed-origin" in error_of(answer, 403)["message"]
    # Reading changes nothing, and without CORS headers the page does not get the answer.
    read = await local.get("/v1/models", headers=headers)
    assert read.status_code == 200
    allowed = read.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://chat.example.com" else None)


@pytest.mark.parametrize(
    ("allowed", "origin"),
    [
        ("https://Chat.Example.com:443", "https://chat.example.com"),
        ("http://chat.example.com:80", "http://chat.example.com"),
        ("https://chat.example.com:80", "https://chat.example.com:80"),
        ("http://[::1]:8443", "http://[::1]:8443"),
    ],
)
async def test_origins_are_compared_as_browsers_write_them(
    serving: Serving, allowed: str, origin: str
) -> None:
    config = ServerConfig("demo", allowed_origins=(allowed,))
    async with client_of(make_app(serving, config)) as api:
        body, headers = {"prompt": "a"}, {"Origin": origin}
        answer = await api.post("/v1/completions", json=body, headers=headers)
        asked = {**headers, "Access-Control-Request-Method": "POST"}
        preflight = await api.options("/v1/completions", headers=asked)
    for told in (answer, preflight):
        assert told.status_code == 200
        assert told.headers["access-control-allow-origin"] == origin


async def test_an_allowed_page_may_ask_first(local: httpx.AsyncClient) -> None:
    asked = {
        "Origin": "https://chat.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = await local.options("/v1/completions", headers=asked)
    assert answer.status_code == 200
    assert "authorization" in answer.headers["access-control-allow-headers"]


async def test_there_is_no_cors_unless_asked_for(api: httpx.AsyncClient) -> None:
    asked = {"Origin": "https://a.com", "Access-Control-Request-Method": "POST"}
    answer = await api.options("/v1/completions", headers=asked)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers
