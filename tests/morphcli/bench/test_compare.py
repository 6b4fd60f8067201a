"""Policies by name, servers under test, and a whole benchmark of a running server."""

import sys
import time
from pathlib import Path

import pytest
from fake_server import fake_server
from rich.console import Console

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.compare import parse_policies, served_policy
from morphserve.morphcli.bench.run import BenchRequest, run_bench
from morphserve.morphcli.bench.schedule import Shape
from morphserve.morphcli.bench.server import (
    Sampler,
    ServerFailed,
    ServerOptions,
    free_port,
    get,
    running_server,
    served_model,
)
from morphserve.morphcli.bench.summary import Slo

SERVE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STATE = {
    "layers": ["full", "full"], "order": [1, 0], "blocks_used": 1, "blocks_capacity": 8,
    "blocks_full": 8, "block_tokens": 16, "running": 1, "waiting": 0, "preemptions": 0,
    "generated_tokens": 5, "generated_tokens_int4": 0, "swaps": 0, "latency": {},
}  # fmt: skip


def test_policies_are_parsed_in_order_and_named_as_serve_knows_them() -> None:
    names = parse_policies("full, static:all,static:8,morph,morph:performance")
    assert [served_policy(name) for name in names] == [
        "off", "static:all", "static:8", "balanced", "performance",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "full,full", "fast", "static:x", "morph:slow"])
def test_policies_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_policies(text)


def test_int4_without_a_bundle_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="morph needs INT4 layers: give --bundle"):
        BenchRequest("demo", Path("t"), Shape(), ("full", "morph"), Slo(), Path("o"))


def test_a_server_is_started_with_the_options_that_were_given() -> None:
    options = ServerOptions(Path("m"), Path("b"), "9MiB", None)
    assert options.arguments("off", 81)[3:] == [
        "serve", "m", "--bundle", "b", "--policy", "off", "--memory-budget", "9MiB",
        "--port", "81", "--no-monitor",
    ]  # fmt: skip


def test_a_server_runs_until_the_block_ends(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(port)]
    with running_server(command, port, tmp_path / "log") as url:
        assert get(url, "/health")[0] == 200
    with pytest.raises(OSError):
        get(url, "/health")


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the budget is too small')"]
    with pytest.raises(ServerFailed, match="exit code 1: \nthe budget is too small"):
        with running_server(command, free_port(), tmp_path / "log"):
            pass


def test_a_url_without_a_server_is_one_sentence() -> None:
    with pytest.raises(ServerFailed, match="nothing answers at"):
        served_model(f"http://127.0.0.1:{free_port()}")


def test_states_are_read_while_the_sampler_is_open() -> None:
    with fake_server() as (url, server):
        server.state = STATE
        with Sampler(url) as sampler:
            while len(sampler.states) < 3:
                time.sleep(0.02)
        taken = len(sampler.states)
    assert taken >= 3 and sampler.states[0].layers == ["full", "full"]
    assert sampler.states[0].time < sampler.states[-1].time


def test_a_running_server_is_benched_from_trace_to_report(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:46.{i}00,{5 + i},{3 + i}" for i in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "x"]))
    with fake_server() as (url, server):
        server.state = STATE
        console = Console(file=(tmp_path / "out").open("w"))
        request = BenchRequest(
            "demo", trace, Shape(), ("server",), Slo(60.0, 60.0), tmp_path / "run", url=url
        )
        summary = run_bench(request, console)
        console.file.close()
    (policy,) = summary.policies
    assert (policy.offered, policy.finished, policy.slo_misses) == (5, 5, 0)
    assert policy.wrong_lengths == 0 and policy.server is not None
    assert policy.server.int4_layers_max == 0
    assert len(server.bodies) == 6  # a warm-up and the trace
    assert [body["max_tokens"] for body in server.bodies[1:]] == [3, 4, 5, 6, 7]
    assert len({body["prompt"] for body in server.bodies[1:]}) == 5
    assert "skipped 1 of 6 rows" in (tmp_path / "out").read_text().replace("\n", " ")
    assert 5 < summary.perplexities[0] < 50
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"summary.json", "requests.jsonl", "timeline.jsonl", "report.html"}
