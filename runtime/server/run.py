"""Runs a server: starts its engine process first, and imports the HTTP side meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvloop

from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.runtime.server.files import bind, open_standard_files
from morphserve.runtime.server.logs import start_logging
from morphserve.runtime.supervisor import ENGINE_COMMAND, Supervisor

if TYPE_CHECKING:
    from morphserve.runtime.server.serving import Serving

Watch = Callable[["Serving"], Coroutine[Any, Any, None]]


def run_server(
    engine: EngineConfig,
    server: ServerConfig,
    watch: Watch,
    command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Serves until a signal, or until the engine cannot be kept alive.

    Returns the exit code: 0, 1 for the engine, 128 + signal while it still loads. `watch` runs
    beside the server from when it serves to its end; what hides the log ends with
    `Serving.stopping`. Raises MorphError if it cannot start.
    """
    open_standard_files()
    start_logging(server.log_format)
    engine = replace(engine, log_format=server.log_format)
    with bind(server.host, server.port) as listener:
        supervisor = Supervisor(engine, server.engine_timeout_s, command)
        # The engine process imports torch now, which takes longer than all that comes here.
        from morphserve.runtime.server.lifetime import live

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(live(supervisor, engine, server, watch, listener))
