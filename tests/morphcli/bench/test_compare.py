"""Policies by name, servers under test, and a whole benchmark of a running server."""

import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from fake_server import fake_server
from rich.console import Console
from typer.testing import CliRunner

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import Slo
from morphserve.morphcli.app import app
from morphserve.morphcli.bench.compare import (
    Bench,
    parse_policies,
    run_policy,
    served_policy,
)
from morphserve.morphcli.bench.prompts import Prompts
from morphserve.morphcli.bench.replay import ReplayFailed
from morphserve.morphcli.bench.request import BenchRequest
from morphserve.morphcli.bench.run import run_bench
from morphserve.morphcli.bench.server import (
    Sampler,
    ServerFailed,
    ServerOptions,
    ended_by_signals,
    free_port,
    get,
    running_server,
    served_model,
)
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.morphcli.traces.schedule import Schedule, Shape

SERVE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STATE = {
    "layers": ["full", "full"], "ladder": [], "blocks_used": 1, "blocks_capacity": 8,
    "blocks_full": 8, "block_tokens": 16, "running": 1, "waiting": 0, "preemptions": 0,
    "generated_tokens": {"full": 5}, "swaps": 0, "latency": {},
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


def test_a_comparison_without_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="give --memory-budget"):
        BenchRequest(
            "demo", Path("t"), Shape(), ("full", "morph"), Slo(), Path("o"), bundle=Path("b")
        )


def test_a_wrong_url_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        BenchRequest("demo", Path("t"), Shape(), ("server",), Slo(), Path("o"), url="host")


def test_a_url_with_a_password_is_refused_without_telling_it() -> None:
    url = "http://user:secret@127.0.0.1:8000"
    with pytest.raises(ConfigError, match="--api-key") as error:
        BenchRequest("demo", Path("t"), Shape(), ("server",), Slo(), Path("o"), url=url)
    assert "secret" not in str(error.value)


def test_int4_without_a_bundle_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="morph needs INT4 layers: give --bundle"):
        BenchRequest("demo", Path("t"), Shape(), ("full", "morph"), Slo(), Path("o"))


def test_a_server_is_started_with_the_options_that_were_given() -> None:
    options = ServerOptions(Path("m"), Path("b"), "9MiB", None)
    assert options.arguments("balanced", 81)[3:] == [
        "serve", "m", "--bundle", "b", "--policy", "balanced", "--memory-budget", "9MiB",
        "--port", "81", "--no-monitor",
    ]  # fmt: skip


def test_a_server_that_never_morphs_gets_no_bundle() -> None:
    options = ServerOptions(Path("m"), Path("b"), "9MiB", None)
    assert "--bundle" not in options.arguments("off", 81)


def test_a_server_that_dies_during_the_run_is_reported(tmp_path: Path) -> None:
    port = free_port()
    quitting = SERVE.replace("self.end_headers()", "self.end_headers(); print('bye', flush=True)")
    quitting = quitting.replace(".serve_forever()", ".handle_request()")
    with pytest.raises(ServerFailed, match="the server ended with exit code 0: \n.*\nbye"):
        with running_server([sys.executable, "-c", quitting, str(port)], port, tmp_path / "log"):
            while _is_open(port):
                time.sleep(0.02)
            time.sleep(0.5)


def test_sigterm_stops_the_server_too(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        with running_server([sys.executable, "-c", SERVE, str(port)], port, tmp_path / "log"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not _is_open(port)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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


def test_a_server_without_state_is_asked_once() -> None:
    with fake_server() as (url, server):
        with Sampler(url) as sampler:
            while not server.gets:
                time.sleep(0.02)
            time.sleep(0.4)
    assert sampler.states == [] and server.gets == ["/morph/v1/state"]


def test_a_server_that_refuses_the_warm_up_is_not_benched(tmp_path: Path) -> None:
    bench = Bench(
        ("server",), Schedule((Arrival(0.0, 1, 1),), 1.0), Prompts(("plain",), "refuse"), 9.0, 0.0,
        tmp_path,
    )  # fmt: skip
    with fake_server() as (url, server):
        with pytest.raises(ReplayFailed, match="the queue is full"):
            run_policy(replace(bench, url=url), "server", lambda _: None)
    assert len(server.bodies) == 1


def test_a_server_that_wants_a_key_is_benched_with_it(tmp_path: Path) -> None:
    bench = Bench(
        ("server",), Schedule((Arrival(0.0, 1, 1),), 1.0), Prompts(("plain",), "plain"), 9.0, 0.0,
        tmp_path,
    )  # fmt: skip
    with fake_server() as (url, server):
        server.api_key, server.state = "sk-1", STATE
        with pytest.raises(ServerFailed, match="wants an API key: set MORPH_API_KEY, or give"):
            run_policy(replace(bench, url=url), "server", lambda _: None)
        run = run_policy(replace(bench, url=url, api_key="sk-1"), "server", lambda _: None)
    assert [outcome.error for outcome in run.outcomes] == [None]
    assert run.states


def test_the_command_sends_the_first_of_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BenchRequest] = []

    def run_bench(request: BenchRequest, console: Console) -> None:
        asked.append(request)
        raise ConfigError("enough")

    monkeypatch.setattr("morphserve.morphcli.bench.run.run_bench", run_bench)
    words = ["bench", "demo", "--trace", "t", "--output", str(tmp_path)]
    environment = {"MORPH_API_KEY": "sk-1 sk-2"}
    runner = CliRunner()
    runner.invoke(app, [*words, "--url", "http://127.0.0.1:1"], env=environment)
    started = ["--bundle", "b", "--memory-budget", "9MiB"]
    runner.invoke(app, [*words, *started], env=environment)
    assert [request.api_key for request in asked] == ["sk-1", None]
    assert "sk-1" not in repr(asked)


def test_a_running_server_is_benched_from_trace_to_report(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:46.{i}00,{5 + i},{3 + i}" for i in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "x"]))
    with fake_server() as (url, server):
        server.state = STATE | {"device": "a card", "kernels": "fast"}
        console = Console(file=(tmp_path / "out").open("w"))
        request = BenchRequest(
            "demo", trace, Shape(), ("server",), Slo(60.0, 60.0), tmp_path / "run", url=url
        )
        summary = run_bench(request, console)
        console.file.close()
    (policy,) = summary.policies
    assert (policy.offered, policy.finished, policy.slo_misses) == (5, 5, 0)
    assert policy.faults == [] and policy.server is not None
    assert policy.server.quantized_layers_max == 0
    sent = server.bodies[-5:]  # after the warm-up
    assert [body["max_tokens"] for body in sent] == [3, 4, 5, 6, 7]
    assert len({body["prompt"] for body in sent}) == 5
    assert "skipped 1 of 6 rows" in (tmp_path / "out").read_text().replace("\n", " ")
    assert summary.served_by == ["fast kernels on a card"]
    assert "fast kernels on a card" in (tmp_path / "run" / "report.html").read_text()
    assert summary.perplexities == []  # nobody knows which weights it serves
    files = {path.name for path in (tmp_path / "run").iterdir()}
    recorded = {"config.json", "summary.json", "requests.jsonl", "timeline.jsonl"}
    assert files == recorded | {"report.html", "plots"}


def test_a_sweep_with_repeats_is_told_at_every_load_and_in_full_at_one(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:46.{i}00,{5 + i},3" for i in range(4)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    with fake_server() as (url, _):
        request = BenchRequest(
            "demo", trace, Shape(), ("server",), Slo(60.0), tmp_path / "run", url=url, repeat=2,
            rates=(1.0, 2.0),
        )  # fmt: skip
        summary = run_bench(request, Console(quiet=True))
    assert [p.offered for p in summary.policies] == [8]  # both repeats at the schedule's own rate
    assert summary.policies[0].repeats is not None and summary.policies[0].repeats.count == 2
    assert [(point.rate, point.repeats) for point in summary.curve] == [(1.0, 2), (2.0, 2)]
    assert sorted(run.offered for run in summary.runs) == [4, 4, 8, 8]
    lines = (tmp_path / "run" / "requests.jsonl").read_bytes().splitlines()
    assert {(r["repeat"], r["rate"]) for r in map(msgspec.json.decode, lines)} == {
        (0, 1.0), (1, 1.0), (0, 2.0), (1, 2.0),
    }  # fmt: skip
