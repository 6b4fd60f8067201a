"""A real server process on a fake engine process; `python serve_fake_engine.py --help`."""

import argparse
import asyncio
import sys
from importlib import resources
from pathlib import Path

import fake_engine

from morphserve.configs.errors import MorphError
from morphserve.configs.load import load_policy
from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.runtime.server.run import run_server
from morphserve.runtime.server.serving import Serving

DEMO_MODEL = str(resources.files("morphserve.morphcli").joinpath("demo_model"))
COMMAND = (sys.executable, str(Path(fake_engine.__file__)))


async def watch(serving: Serving) -> None:
    await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--shutdown-timeout", type=float, default=20.0)
    parser.add_argument("--engine-timeout", type=float, default=300.0)
    parser.add_argument("--max-queued", type=int, default=512)
    flags = parser.parse_args()
    server = ServerConfig(
        served_model_name="demo",
        host=flags.host,
        port=flags.port,
        max_queued=flags.max_queued,
        shutdown_timeout_s=flags.shutdown_timeout,
        engine_timeout_s=flags.engine_timeout,
    )
    try:
        code = run_server(EngineConfig(DEMO_MODEL, load_policy("balanced")), server, watch, COMMAND)
    except MorphError as error:
        print(error)
        return error.exit_code
    print(f"torch imported: {'torch' in sys.modules}")
    return code


if __name__ == "__main__":
    sys.exit(main())
