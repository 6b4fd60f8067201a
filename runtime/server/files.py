"""The files a server holds from its start: the listening socket, standard input and output."""

import logging
import os
import socket
import sys

from morphserve.configs.errors import ConfigError

_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Port 0: a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on host {host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another with --port (0: any free one)"
        ) from error
    return listener


def listen(listener: socket.socket) -> str:
    """Lets clients connect; returns the server's URL."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # another process has taken the port since it was bound
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_standard_files() -> None:
    """Closed ones lead nowhere from now on.

    A socket would take their numbers, and whatever is printed would go into it.
    """
    logging.raiseExceptions = False  # a log that cannot be written is no reason to stop
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout = sys.stdout or open(os.devnull, "w")
