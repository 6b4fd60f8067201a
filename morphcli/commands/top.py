"""`morph top`: a running server, live in a terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from morphserve.morphcli.settings import first_key

if TYPE_CHECKING:
    from morphserve.morphcli.top.feeds import Feed
    from morphserve.morphcli.top.source import Keys


def top(
    target: Annotated[
        str, typer.Argument(metavar="[URL|FILE]", help="A server, or a recorded session.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="MORPH_API_KEY", help="The server's key, if it wants one.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="MORPH_ADMIN_KEY", help="Allows to step, pin and free the rung."),
    ] = None,
) -> None:
    """Watch a server: layers, KV cache, queue, latency.

    Off a terminal it prints the server's state as a JSON line four times a second;
    `morph top URL > FILE` records, `morph top FILE` plays the recording.
    """
    import os
    import sys

    from morphserve.morphcli.top.source import Keys

    keys = Keys(first_key(api_key), admin_key or None)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        try:
            return _print_lines(target, keys)
        except BrokenPipeError:  # nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None
    from morphserve.morphcli.top.app import Top

    raise typer.Exit(Top(_feed(target, keys)).run() or 0)


def _is_file(target: str) -> bool:
    return "://" not in target and Path(target).is_file()


def _feed(target: str, keys: "Keys") -> "Feed":
    from morphserve.morphcli.top.feeds import LiveFeed, ReplayFeed
    from morphserve.morphcli.top.recording import Recording

    return ReplayFeed(Recording(Path(target))) if _is_file(target) else LiveFeed(target, keys)


def _print_lines(target: str, keys: "Keys") -> None:
    import sys

    from morphserve.morphcli.top.lines import write_recording, write_states
    from morphserve.morphcli.top.recording import Recording
    from morphserve.morphcli.top.source import Server

    if _is_file(target):
        write_recording(Recording(Path(target)), sys.stdout)
    else:
        write_states(Server(target, keys), 0.25, sys.stdout)
