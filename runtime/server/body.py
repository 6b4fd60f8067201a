"""Reads a request's body: its size, its time, its JSON, and the type of each field."""

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from morphserve.runtime.server.errors import ApiError, bad_request

MAX_BODY_BYTES = 2 * 1024 * 1024
BODY_TIMEOUT_S = 20.0
_CLOSE = {"Connection": "close"}  # what is left of the body will not be read

T = TypeVar("T")


async def read_body(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type. Raises ApiError (400, 408, 413) with one sentence."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _read(request)
            request.state.body_is_read = True
    except TimeoutError:
        raise ApiError(
            408, f"the request body did not arrive within {BODY_TIMEOUT_S:.0f} s", headers=_CLOSE
        ) from None
    except ClientDisconnect:
        raise bad_request("the client left before the request body was complete") from None
    return _decode(body, decoder)


async def _read(request: Request) -> bytearray:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return body


def _too_large() -> ApiError:
    return ApiError(
        413, f"the request body is larger than {MAX_BODY_BYTES // 1024**2} MiB", headers=_CLOSE
    )


def _decode(body: bytearray, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise bad_request(*_name_field(str(error))) from None
    except RecursionError:
        raise bad_request("the request body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}") from None


def _name_field(message: str) -> tuple[str, str | None]:
    """msgspec's sentence, and the field it is about without the `$.`."""
    if match := re.search(r" - at `\$\.?(.*)`$", message):
        return f"{match[1]}: {message[: match.start()]}", match[1]
    if match := re.search(r"missing required field `(\w+)`", message):
        return message, match[1]
    return message, None
