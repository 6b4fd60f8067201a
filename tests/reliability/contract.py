"""Holds the API against its own OpenAPI document: requests that fit it, and requests that do not.

    PYTHONPATH=tests/support python tests/reliability/contract.py [EXAMPLES_PER_OPERATION [SEED]]

Needs schemathesis. Starts a server with keys on a fake engine; exit code 0 if no answer was a 5xx
but an honest 503, or late, or of a status, type or shape that the document lacks, or given without
a key. The event stream is left out: it does not end.
"""

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

from morphserve.configs.load import load_policy, resolve_model
from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.runtime.server.run import run_server
from morphserve.runtime.server.serving import Serving

ADMIN_KEY = "sk-contract-admin"
SETTINGS = """
[generation]
allow-extra-parameters = false  # unknown headers are ignored, as everywhere

[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", 503]
# 400: what fits the schema may still be too long for the model, or name a token that it lacks.
positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 403, 404, 429, 503]
"""
LATE_S = "15"
# A fake engine whose longest answer takes a tenth of a second.
ENGINE = """
import sys, fake_engine, msgspec
fake_engine.HELLO = msgspec.structs.replace(fake_engine.HELLO, max_model_len=64)
sys.exit(fake_engine.main(fake_engine.FakeEngine))
"""


class Contract:
    """Runs beside the server, and ends it."""

    def __init__(self, examples: str, seed: str) -> None:
        self._examples = examples
        self._seed = seed
        self.code = 1

    async def watch(self, serving: Serving) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = Path(folder, "schemathesis.toml")
            settings.write_text(SETTINGS)
            flags = ["--checks", "all", "--phases", "coverage,fuzzing", "--no-color"]
            flags += ["--max-examples", self._examples, "--seed", self._seed]
            flags += ["--request-timeout", LATE_S, "--exclude-path", "/morph/v1/events"]
            flags += ["--header", f"Authorization: Bearer {ADMIN_KEY}"]
            process = await asyncio.create_subprocess_exec(
                *(str(Path(sys.executable).with_name("schemathesis")), "--config-file"),
                *(str(settings), "run", f"{serving.url}/openapi.json", *flags),
                cwd=folder,
            )
            self.code = await process.wait()
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    contract = Contract(*[*sys.argv[1:], *("20", "1")[len(sys.argv) - 1 :]])
    server = ServerConfig(
        "demo", port=0, api_keys=("sk-contract-user",), admin_key=ADMIN_KEY, shutdown_timeout_s=1.0
    )
    engine = EngineConfig(str(resolve_model("demo")), load_policy("balanced"))
    run_server(engine, server, contract.watch, (sys.executable, "-c", ENGINE))
    return contract.code


if __name__ == "__main__":
    sys.exit(main())
