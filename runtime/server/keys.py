"""Who may call: API keys and the admin key."""

import hmac
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from morphserve.runtime.latency import Clock
from morphserve.runtime.server.endpoint import Access
from morphserve.runtime.server.errors import ApiError
from morphserve.runtime.server.turned_away import TurnedAway

ADMIN_CALLS_PER_S = 5


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key belongs to."""

    namespace: str  # hex digits, one per key: callers with different keys share no prefix cache
    is_admin: bool = False


class Keys:
    """The digests of a server's keys; the keys themselves are not kept."""

    def __init__(self, api_keys: Sequence[str] = (), admin_key: str | None = None) -> None:
        self._callers = [(digest, Caller(digest.hex())) for digest in map(_digest, api_keys)]
        self.wanted = bool(api_keys)  # whether ordinary endpoints ask for one
        self.has_admin = admin_key is not None
        if admin_key is not None:
            digest = _digest(admin_key)
            self._callers.append((digest, Caller(digest.hex(), is_admin=True)))

    def caller(self, key: str) -> Caller | None:
        """Whose key this is. Takes as long for every key, right or wrong."""
        given, found = _digest(key), None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, given):
                found = caller
        return found


def _digest(key: str) -> bytes:
    return sha256(key.encode("latin-1")).digest()


class AdminRate:
    """Lets so many calls through per second."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._left = float(ADMIN_CALLS_PER_S)
        self._seen = clock()

    def take(self) -> bool:
        """Whether one more call may be made now."""
        now = self._clock()
        regained = (now - self._seen) * ADMIN_CALLS_PER_S
        self._left = min(float(ADMIN_CALLS_PER_S), self._left + regained)
        self._seen = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class KeyCheck:
    """Asks for a key on every path that is not public, known or not.

    `access` lists paths as the router compares them, and so they are compared here: with the
    path of the request line, percent-decoded, and nothing that headers say. The request's state
    gets `cache_namespace`: the caller's, or "" where no API key is asked for.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, access: Mapping[str, Access], turned_away: TurnedAway
    ) -> None:
        self._app = app
        self._turned_away = turned_away
        self._keys = keys
        self._access = access
        self._rate = AdminRate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        key = _bearer(scope)
        caller = None if key is None else self._keys.caller(key)
        if refusal := self._refusal(scope["path"], key, caller):
            self._turned_away.add(refusal, scope)
            return await refusal.response()(scope, receive, send)
        namespace = caller.namespace if caller and self._keys.wanted else ""
        scope.setdefault("state", {})["cache_namespace"] = namespace
        await self._app(scope, receive, send)

    def _refusal(self, path: str, key: str | None, caller: Caller | None) -> ApiError | None:
        access = self._access.get(path, Access.KEY)
        if access is Access.ADMIN:
            return self._admin_refusal(key, caller)
        if access is Access.PUBLIC or not self._keys.wanted or caller is not None:
            return None
        return _unauthorized(key, "an API key")

    def _admin_refusal(self, key: str | None, caller: Caller | None) -> ApiError | None:
        if not self._keys.has_admin:
            return _forbidden("admin routes are off: start the server with --admin-key")
        if caller is None:
            return _unauthorized(key, "the admin key")
        if not caller.is_admin:
            return _forbidden("this route needs the admin key, not an API key")
        if not self._rate.take():
            return ApiError(
                429,
                f"at most {ADMIN_CALLS_PER_S} admin calls per second are taken",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        return None


def _bearer(scope: Scope) -> str | None:
    """The key that a request brings, "" if it is in no shape of ours; None if there is none."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if not given:
        return None
    scheme, _, key = given[0].partition(b" ")
    one_bearer = len(given) == 1 and scheme.lower() == b"bearer"
    return str(key.strip().decode("latin-1")) if one_bearer else ""


def _unauthorized(key: str | None, wanted: str) -> ApiError:
    """The key itself is not repeated: answers end up in logs."""
    fault = "this key is not known" if key else "no key was sent"
    return ApiError(
        401,
        f"{fault}: this server asks for {wanted} as `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="forbidden")
