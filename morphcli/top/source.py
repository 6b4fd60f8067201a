"""A server asked over HTTP, one connection kept open."""

import contextlib
import http.client
import socket
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.top.look import clean

_TIMEOUT_S = 5.0
_LONGEST = 16 << 20  # bytes of an answer


class Away(Exception):
    """The server did not answer as hoped; the message says what is wrong, in a few words."""


class WantsKey(Away):
    """The server takes another key than this one, or none came."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What the user may ask with; None: no key."""

    api: str | None = None
    admin: str | None = None


class Server:
    """Blocking; one thread at a time."""

    def __init__(self, url: str, keys: Keys) -> None:
        """Raises ConfigError for what is no URL of a server."""
        self.url = url
        self.keys = keys
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or host is None:
            raise ConfigError(f"{url!r} is no URL of a server: write http://HOST:PORT")
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = connect(host, port, timeout=_TIMEOUT_S)
        self._path = parts.path.rstrip("/")
        self._asking = threading.Lock()

    def state(self) -> bytes:
        """Raises Away."""
        return self._ask("GET", "/morph/v1/state", self.keys.api or self.keys.admin)

    def act(self, action: str, body: dict[str, int]) -> None:
        """Pins, steps or frees the rung. Raises Away with the server's own words."""
        self._ask("POST", f"/morph/v1/{action}", self.keys.admin, msgspec.json.encode(body))

    def close(self) -> None:
        """Ends a request that is under way in another thread, too."""
        if (sock := self._connection.sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._asking:  # closed under it, the connection would fail in ways of its own
            self._connection.close()

    def _ask(self, method: str, path: str, key: str | None, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        with self._asking:
            status, answer = self._exchange(method, path, headers, body)
        if status >= 400:
            refused = WantsKey if status == 401 else Away
            raise refused(_refusal(status, answer, path))
        return answer

    def _exchange(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[int, bytes]:
        try:
            self._connection.request(method, self._path + path, body, headers)
            response = self._connection.getresponse()
            return response.status, response.read(_LONGEST)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise Away(f"{self.url} does not answer ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(clean(getattr(error, "strerror", None) or str(error) or type(error).__name__))


def _refusal(status: int, answer: bytes, path: str) -> str:
    if status == 401:
        return "the server wants a key: --api-key or MORPH_API_KEY (admin: --admin-key)"
    if status == 404:
        return f"there is no {path} on this server"
    try:
        message = str(clean(msgspec.json.decode(answer)["error"]["message"]))
    except (msgspec.DecodeError, KeyError, TypeError):
        message = "no reason was given"
    return f"{message} (HTTP {status})"
