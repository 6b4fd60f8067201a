"""`morph complete`: one completion by a running server."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from morphserve.morphcli.settings import first_key

if TYPE_CHECKING:
    from morphserve.morphcli.conversation import Server


def complete(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[URL] PROMPT", help="PROMPT - is read from standard input."),
    ],
    model: Annotated[
        str | None, typer.Option(help="As the server calls it. [default: its first]")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="If the server wants one.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the completion.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: greedy. [default: the server's]")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end at; may be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole response.")] = False,
) -> None:
    """Complete a prompt by a running server.

    Standard output gets the text and nothing else. The URL is http://127.0.0.1:8000 if not given.
    """
    import asyncio

    from morphserve.configs.errors import ConfigError
    from morphserve.morphcli.conversation import DEFAULT_URL, Server

    if len(words) > 2:
        raise ConfigError(f"{len(words)} words are too many: put the prompt into quotes")
    url = words[0] if len(words) == 2 else DEFAULT_URL
    optional = {"model": model, "temperature": temperature, "stop": stop or None}
    fields: dict[str, Any] = {"prompt": _prompt(words[-1]), "max_tokens": max_tokens}
    fields |= {name: value for name, value in optional.items() if value is not None}
    asyncio.run(_complete(Server(url, first_key(api_key)), fields, json))


def _prompt(word: str) -> str:
    import sys

    return sys.stdin.read() if word == "-" else word


async def _complete(server: "Server", fields: dict[str, Any], json: bool) -> None:
    import sys

    from morphserve.morphcli.conversation import Reply, printable

    fields = {"model": fields.get("model") or await server.first_model()} | fields
    if json:
        typer.echo((await server.complete(fields)).decode())
        return
    show = printable if sys.stdout.isatty() else str
    async for text in server.stream("/v1/completions", fields, Reply()):
        typer.echo(show(text), nl=False)
    if sys.stdout.isatty():
        typer.echo()
