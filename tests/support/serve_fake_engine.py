"""A real server process on a fake engine process; `python serve_fake_engine.py --help`."""

import argparse
import asyncio
import ctypes
import signal
import sys
from functools import partial
from importlib import resources
from pathlib import Path

import fake_engine

from morphserve.configs.errors import MorphError
from morphserve.configs.load import load_policy
from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.morphcli.monitor import watch_log
from morphserve.runtime.server.run import run_server
from morphserve.runtime.server.serving import Serving

DEMO_MODEL = str(resources.files("morphserve.morphcli").joinpath("demo_model"))
COMMAND = (sys.executable, str(Path(fake_engine.__file__)))


def stand_still(seconds: int) -> None:
    """Without letting go of Python's lock."""
    ctypes.PyDLL(None).sleep(seconds)


async def watch(seconds: int, serving: Serving) -> None:
    """Logs as `morph serve` does; SIGUSR1 blocks the event loop for so long."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stand_still, seconds)
    await watch_log(serving, interval_s=3600.0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--shutdown-timeout", type=float, default=20.0)
    parser.add_argument("--engine-timeout", type=float, default=300.0)
    parser.add_argument("--max-queued", type=int, default=512)
    parser.add_argument("--block-on-usr1", type=int, default=0, help="seconds")
    flags = parser.parse_args()
    watching = partial(watch, flags.block_on_usr1)
    server = ServerConfig(
        served_model_name="demo",
        host=flags.host,
        port=flags.port,
        max_queued=flags.max_queued,
        shutdown_timeout_s=flags.shutdown_timeout,
        engine_timeout_s=flags.engine_timeout,
    )
    try:
        config = EngineConfig(DEMO_MODEL, load_policy("balanced"))
        code = run_server(config, server, watching, COMMAND)
    except MorphError as error:
        print(error)
        return error.exit_code
    print(f"torch imported: {'torch' in sys.modules}")
    return code


if __name__ == "__main__":
    sys.exit(main())
