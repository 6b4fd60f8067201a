"""A server on a fake engine that shows itself, as `morph serve` does on a terminal."""

import sys

import serve_fake_engine

from morphserve.configs.load import load_policy
from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.morphcli.view import choose_watch
from morphserve.runtime.server.run import run_server

if __name__ == "__main__":
    watch = choose_watch(no_monitor=False, log_interval_s=0.1, keys={"MORPH_API_KEY": "secret"})
    engine = EngineConfig(serve_fake_engine.DEMO_MODEL, load_policy("balanced"))
    server = ServerConfig(host="127.0.0.1", port=0, served_model_name="demo")
    sys.exit(run_server(engine, server, watch, serve_fake_engine.COMMAND))
