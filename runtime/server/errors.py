"""Refusals and failures as the API tells them: one envelope, OpenAI's."""

import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from morphserve.configs.errors import MorphError
from morphserve.runtime.engine_client import EngineDead
from morphserve.runtime.request import FinishReason
from morphserve.runtime.server.refusal import Refusal

_MAX_RETRY_AFTER_S = 60


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None  # the field at fault
    code: str | None = None


class ErrorEnvelope(msgspec.Struct):
    error: ErrorDetail


class ApiError(Exception):
    """Answered with this status and envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, _type_of(status), param, code)
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorEnvelope(self.detail))

    def response(self) -> Response:
        return Refusal(self.body(), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after_s: float = 1.0) -> ApiError:
    """Not now; the client may try again."""
    return ApiError(503, message, headers={"Retry-After": whole_seconds(retry_after_s)})


def whole_seconds(seconds: float) -> str:
    """As `Retry-After` has it: at least 1, at most a minute."""
    return str(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(seconds))))


def broken_off(reason: FinishReason) -> ApiError:
    """A request that the server ended before it was done."""
    if reason is FinishReason.ABORT:
        return unavailable("the server is shutting down; the request was aborted")
    return ApiError(500, "the engine failed while it worked on this request")


def _type_of(status: int) -> str:
    match status:
        case 404:
            return "not_found_error"
        case 429 | 503:
            return "service_unavailable_error"
        case _:
            return "invalid_request_error" if status < 500 else "server_error"


def as_api_error(error: ApiError | MorphError) -> ApiError:
    """How an error of the layers below reaches the client: it is about the request, mostly."""
    if isinstance(error, ApiError):
        return error
    return unavailable(str(error)) if isinstance(error, EngineDead) else bad_request(str(error))


async def on_known_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError | MorphError)
    return as_api_error(error).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def on_crash(_request: Request, _error: Exception) -> Response:
    """A fault of ours; the traceback is in the log."""
    return ApiError(500, "internal error; the server's log has the details").response()
