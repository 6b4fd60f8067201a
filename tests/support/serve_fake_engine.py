"""A real server process on a fake engine process; `python serve_fake_engine.py [host [port]]`."""

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
    host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    server = ServerConfig(host=host, port=port, served_model_name="demo", shutdown_timeout_s=20.0)
    try:
        code = run_server(EngineConfig(DEMO_MODEL, load_policy("balanced")), server, watch, COMMAND)
    except MorphError as error:
        print(error)
        return error.exit_code
    print(f"torch imported: {'torch' in sys.modules}")
    return code


if __name__ == "__main__":
    sys.exit(main())
