"""What happens to every HTTP request before an endpoint sees it."""

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from morphserve.runtime.server.errors import ApiError
from morphserve.runtime.server.serving import Serving

MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """Every response carries `X-Request-Id`: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        own = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", own)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class Gate:
    """Refuses what is not to be worked on, and counts what is: the POSTs of these paths."""

    def __init__(self, app: ASGIApp, serving: Serving, counted: frozenset[str]) -> None:
        self._app = app
        self._serving = serving
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope.setdefault("state", {})["received"] = self._serving.metrics.clock()
        if refusal := self._refusal(scope):
            return await refusal.response()(scope, receive, send)
        if not self._counts(scope):
            return await self._app(scope, receive, send)
        try:
            ticket = self._serving.enter()
        except ApiError as refusal:
            return await refusal.response()(scope, receive, send)
        scope["state"]["ticket"] = ticket
        try:
            await self._app(scope, receive, send)
        finally:
            self._serving.admission.leave(ticket)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        if (
            len(headers) > MAX_HEADERS
            or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES
        ):
            limits = f"{MAX_HEADERS} headers, {MAX_HEADER_BYTES // 1024} KiB"
            return ApiError(431, f"the request's headers are too large: at most {limits}")
        return None

    def _counts(self, scope: Scope) -> bool:
        return scope["method"] == "POST" and scope["path"] in self._counted
