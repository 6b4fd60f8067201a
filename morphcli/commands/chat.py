"""`morph chat`: a conversation with a running server."""

from typing import TYPE_CHECKING, Annotated

import typer

from morphserve.morphcli.settings import first_key

if TYPE_CHECKING:
    from morphserve.morphcli.conversation import Reply, Server


def chat(
    url: Annotated[str, typer.Argument(help="Of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="As the server calls it. [default: its first]")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="If the server wants one.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. [default: as many as fit]")
    ] = None,
) -> None:
    """Talk to a running server.

    Ctrl-C stops an answer, /quit or Ctrl-D leaves. After each answer come its length, its speed,
    and the share of its tokens made at each precision.
    """
    import asyncio

    from morphserve.morphcli.conversation import Server

    server = Server(url, first_key(api_key))
    name = model or asyncio.run(server.first_model())
    typer.secho(f"{name} at {url}; /quit or Ctrl-D leaves", err=True, dim=True)
    messages: list[dict[str, str]] = []
    fields = {"model": name} | ({} if max_tokens is None else {"max_tokens": max_tokens})
    while (said := _ask()) is not None:
        messages.append({"role": "user", "content": said})
        reply = _answer(server, {**fields, "messages": messages})
        messages.append({"role": "assistant", "content": reply.text})


def _ask() -> str | None:
    """What the user says next; None: nothing more."""
    import sys

    while True:
        if sys.stdin.isatty():
            typer.secho("> ", nl=False, bold=True, err=True)
        try:
            said = input().strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if said == "/quit":
            return None
        if said:
            return said


def _answer(server: "Server", fields: dict[str, object]) -> "Reply":
    """Prints the answer as it comes; Ctrl-C ends it, with what has been said until then."""
    import asyncio

    from morphserve.morphcli.conversation import Reply, printable

    reply = Reply()

    async def show() -> None:
        async for text in server.stream("/v1/chat/completions", fields, reply):
            typer.echo(printable(text), nl=False)

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        reply.usage = None
    typer.echo()
    typer.secho(f"[{reply.summary()}]", err=True, dim=True)
    return reply
