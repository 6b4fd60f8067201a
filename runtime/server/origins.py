"""Keeps web pages of other hosts away from the API.

A browser lets any page send requests to any address, this machine's included. What it cannot hide
is where the page came from (`Origin`) and by which name it calls (`Host`):

- A server that listens on loopback answers to the names of this machine alone. A page whose own
  name was pointed at 127.0.0.1 (DNS rebinding) calls by that name, and is refused.
- Whatever may change something, every method but GET, HEAD and OPTIONS, is refused if it comes
  from a page of another host. Pages can send the others too, but not read the answers.
"""

import ipaddress
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from morphserve.runtime.server.errors import ApiError
from morphserve.runtime.server.turned_away import TurnedAway

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def normal_origin(origin: str) -> str:
    """An origin as browsers write it: in lower case, without the port that its scheme implies."""
    origin = origin.lower()
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))


class Origins:
    """Checks `Host`, where the server is `on_loopback`, and `Origin` before anything else."""

    def __init__(
        self,
        app: ASGIApp,
        allowed: Iterable[str],
        host: str,
        on_loopback: bool,
        turned_away: TurnedAway,
    ) -> None:
        """`allowed` are as `normal_origin` has them, `host` is what the server listens on."""
        self._app = app
        self._turned_away = turned_away
        self._allowed = frozenset(allowed)
        # A proxy on this machine may pass its own name on: it is in the origins of its pages.
        named = {_name(_host_of(origin)) for origin in self._allowed}
        self._names = frozenset({"localhost", host.lower(), *named}) - {"*"}
        self._on_loopback = on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            self._turned_away.add(refusal, scope)
            return await refusal.response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        hosts = _values(scope, b"host")
        # Browsers always send one; what sends none, such as a health check, is no browser.
        if self._on_loopback and not all(self._is_ours(_name(host)) for host in hosts):
            return _forbidden(
                "this server listens on loopback and answers to localhost only: call it by that "
                "name, or name the page's origin with --allowed-origins"
            )
        origins = _values(scope, b"origin")
        if scope["method"] in _READING or all(self._may_call(o, hosts) for o in origins):
            return None
        return _forbidden(
            "pages of this origin may not call this server: allow them with --allowed-origins"
        )

    def _is_ours(self, name: str) -> bool:
        return name in self._names or _is_loopback(name)

    def _may_call(self, origin: str, hosts: list[str]) -> bool:
        if origin in self._allowed or "*" in self._allowed:
            return True
        return bool(host := _host_of(origin)) and hosts == [host]  # a page of ours


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]


def _host_of(origin: str) -> str:
    """`host:port` of an origin, as the Host header has it."""
    return origin.partition("://")[2]


def _name(host: str) -> str:
    """A host without its port; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="forbidden_origin")
