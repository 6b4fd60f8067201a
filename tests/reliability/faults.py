"""What breaks servers, tried on `morph serve demo`: one line per rule, exit code 1 if one breaks.

    python tests/reliability/faults.py [--only NAME ...] [--seconds N]

Takes a few minutes; everything stays on this machine. Load and process faults are in overload.py.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import json
import multiprocessing
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from harness import Answer, Rules, Server, complete, connect, gather, percentile, serving

from morphserve.morphcli.bench.server import get

SILENT_S = 20.0  # until the server closes a connection that says nothing


def stalled(rules: Rules, folder: Path, seconds: float) -> None:
    """L4: connections that stop in the middle of a head or a body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with serving(["--policy", "off"], log=folder / "stalled.log") as server:
        for name, part in (("head", head), ("body", body)):
            connections = [connect(server) for _ in range(400)]
            for connection in connections:
                connection.sendall(part)
            probes = [server.probe() for _ in range(50)]
            started = time.monotonic()
            answers = [_until_closed(connection) for connection in connections]
            took = time.monotonic() - started
            right = sum(answer.startswith(b"HTTP/1.1 408") for answer in answers)
            p99 = percentile(probes, 0.99) * 1000
            rules.check(
                "L4",
                f"400 stalled in the {name}: a probe takes ≤ 100 ms",
                f"{p99:.0f} ms",
                p99 <= 100,
            )
            rules.check(
                "L4",
                f"400 stalled in the {name}: closed within 20 s with 408",
                f"{right} with 408, after {took:.1f} s",
                right == len(connections) and took <= SILENT_S + 2,
            )


def _until_closed(connection: socket.socket) -> bytes:
    connection.settimeout(60.0)
    received = b""
    with connection:
        try:
            while part := connection.recv(65536):
                received += part
        except OSError as error:
            return f"{error}".encode()
    return received


def few_descriptors(rules: Rules, folder: Path, seconds: float) -> None:
    """L5: more connections than the process may have."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    with serving(["--policy", "off"], log=folder / "fds.log", before=limit) as server:
        connections = []
        for _ in range(2000):
            try:
                connections.append(connect(server))
            except OSError:
                break
        used = _cpu_seconds(server.process.pid)
        time.sleep(2.0)
        used = _cpu_seconds(server.process.pid) - used
        for connection in connections:
            connection.close()
        started = time.monotonic()
        answer = _eventually(lambda: asyncio.run(complete(server.url, max_tokens=4)))
        took = time.monotonic() - started
    seen = f"answers again after {took:.2f} s, {used:.2f} s of CPU in 2 s"
    promise = f"256 descriptors, {len(connections)} connections: no busy loop, answers after"
    rules.check("L5", promise, seen, answer.status == 200 and took < 2.0 and used < 1.0)


def _eventually(work: Callable[[], Answer]) -> Answer:
    for _ in range(100):
        answer = work()
        if answer.status == 200:
            break
        time.sleep(0.1)
    return answer


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fairness(rules: Rules, folder: Path, seconds: float) -> None:
    """L6, L7: small requests beside a flood, and beside long prompts."""
    with serving(["--policy", "off"], log=folder / "fairness.log") as server:
        alone = asyncio.run(_short(server, 10))
        gaps = asyncio.run(_beside_long_prompts(server))
    p50, p99 = percentile(gaps, 0.5) * 1000, percentile(gaps, 0.99) * 1000
    rules.check(
        "L7",
        "beside 8 prompts of 900 tokens: gaps between tokens of a short answer, p99",
        f"{p99:.0f} ms (p50 {p50:.0f} ms; alone the first token takes {alone * 1000:.0f} ms)",
        p99 <= max(3 * p50, 150),
    )


async def _short(server: Server, count: int) -> float:
    answers = [await complete(server.url, max_tokens=4) for _ in range(count)]
    return percentile([answer.first_s or 60.0 for answer in answers], 0.99)


async def _beside_long_prompts(server: Server) -> list[float]:
    short = asyncio.create_task(complete(server.url, max_tokens=200, ignore_eos=True))
    await asyncio.sleep(0.3)
    long = [complete(server.url, prompt=[7 + i] * 900, max_tokens=2) for i in range(8)]
    await gather(*long)
    return (await short).gaps_s


def removed_bundle(rules: Rules, folder: Path, seconds: float) -> None:
    """F10: bundle and checkpoint change on disk while they are served."""
    bundle = _bundle(folder)
    arguments = ["--bundle", str(bundle), "--memory-budget", "27MiB", "--max-model-len", "640"]
    with serving(arguments, log=folder / "removed.log") as server:
        for path in bundle.glob("layer-*"):
            os.truncate(path, 100)
        shutil.rmtree(bundle)
        answers = asyncio.run(_burst(server, 24))
        state = server.await_idle()
        swaps = state["swaps"]
    finished = sum(answer.finished and answer.status == 200 for answer in answers)
    rules.check(
        "F10",
        "a bundle truncated and removed while served: swaps go on, all requests end",
        f"{finished} of {len(answers)} finished, {swaps} swaps",
        finished == len(answers) and swaps > 0,
    )


def _bundle(folder: Path) -> Path:
    bundle = folder / "demo.morph"
    command = [sys.executable, "-m", "morphserve.morphcli", "quantize", "demo", "-o", str(bundle)]
    subprocess.run([*command, "--method", "rtn", "--force"], check=True, capture_output=True)
    return bundle


async def _burst(server: Server, count: int) -> list[Answer]:
    works = [
        complete(server.url, prompt=[5 + i] * 200, max_tokens=60, ignore_eos=True)
        for i in range(count)
    ]
    return await gather(*works)


def little_memory(rules: Rules, folder: Path, seconds: float) -> None:
    """F12: a budget that cannot hold the model, and a process limit below the budget."""
    command = [sys.executable, "-m", "morphserve.morphcli", "serve", "demo", "--policy", "off"]
    small = subprocess.run(
        [*command, "--memory-budget", "8MiB", "--port", "0"], capture_output=True, text=True
    )
    seen = small.stderr.strip().splitlines()[-1][:90]
    holds = small.returncode == 5 and "raise --memory-budget to" in small.stderr
    rules.check("F12", "a budget too small is refused at start with the number", seen, holds)


def busy_neighbour(rules: Rules, folder: Path, seconds: float) -> None:
    """F13: another program on both cores."""
    with serving(["--policy", "off"], log=folder / "neighbour.log") as server:
        quiet = asyncio.run(_throughput(server, seconds))
        stop = multiprocessing.Event()
        burners = [multiprocessing.Process(target=_burn, args=[stop]) for _ in range(2)]
        for burner in burners:
            burner.start()
        shared = asyncio.run(_throughput(server, seconds))
        stop.set()
        for burner in burners:
            burner.join()
    rules.check(
        "F13",
        "two busy neighbours on two cores: throughput keeps at least a third",
        f"{quiet:.0f} tok/s alone, {shared:.0f} beside them ({shared / quiet:.0%})",
        shared >= quiet / 3,
    )


def _burn(stop: "multiprocessing.synchronize.Event") -> None:
    while not stop.is_set():
        sum(range(10_000))


async def _throughput(server: Server, seconds: float) -> float:
    """Tokens per second of 16 streams in a closed loop."""
    deadline, tokens = time.monotonic() + seconds, 0

    async def client(i: int) -> int:
        made = 0
        while time.monotonic() < deadline:
            answer = await complete(server.url, prompt=[9 + i] * 32, max_tokens=64, ignore_eos=True)
            made += answer.num_chunks
        return made

    started = time.monotonic()
    tokens = sum(await gather(*(client(i) for i in range(16))))
    return tokens / (time.monotonic() - started)


def watchers(rules: Rules, folder: Path, seconds: float) -> None:
    """F17: metrics and state read a hundred times a second."""
    with serving(["--policy", "off"], log=folder / "watchers.log") as server:
        asyncio.run(_throughput(server, 2.0))
        plain, watched = [], []
        for _ in range(3):  # in turns: other work on the machine meets both
            plain += asyncio.run(_gaps(server, seconds / 2))
            stop = threading.Event()
            thread = threading.Thread(target=_scrape, args=[server, stop])
            thread.start()
            watched += asyncio.run(_gaps(server, seconds / 2))
            stop.set()
            thread.join()
        fds = server.num_fds()
    before, after = percentile(plain, 0.5) * 1000, percentile(watched, 0.5) * 1000
    rules.check(
        "F17",
        "scrapes every 10 ms: the median gap between tokens grows by at most 5 %",
        f"{before:.2f} ms, {after:.2f} ms scraped; {fds} descriptors after",
        after <= 1.05 * before and fds < 80,
    )


def _scrape(server: Server, stop: threading.Event) -> None:
    while not stop.wait(0.01):
        get(server.url, "/metrics")


async def _gaps(server: Server, seconds: float) -> list[float]:
    deadline, gaps = time.monotonic() + seconds, []
    while time.monotonic() < deadline:
        works = [
            complete(server.url, prompt=[9 + i] * 32, max_tokens=64, ignore_eos=True)
            for i in range(4)
        ]
        for answer in await gather(*works):
            gaps += answer.gaps_s
    return gaps


def bad_inputs(rules: Rules, folder: Path, seconds: float) -> None:
    """5.6: wrong requests are refused quickly, in one envelope, and harm nobody."""
    with serving(["--policy", "off"], log=folder / "bad.log") as server:
        asyncio.run(complete(server.url, max_tokens=4))
        slow, wrong, worst = [], [], 0.0
        for body in BAD_BODIES:
            answer = asyncio.run(_post(server, body))
            worst = max(worst, answer.total_s)
            if not 400 <= answer.status < 500 or not _is_envelope(answer.error):
                wrong.append((body[:60], answer.status, answer.error))
            if answer.total_s > 0.05:
                slow.append((body[:60], answer.total_s))
            assert asyncio.run(complete(server.url, max_tokens=2)).finished
    count = len(BAD_BODIES)
    rules.check(
        "bad input", f"{count} bodies: a 4xx in the envelope", f"{wrong or 'all'}", not wrong
    )
    seen = f"slowest {worst * 1000:.0f} ms"
    rules.check("bad input", f"{count} bodies: refused within 50 ms", f"{slow or seen}", not slow)


async def _post(server: Server, body: bytes) -> Answer:
    from morphserve.morphcli.bench.http import post_stream

    started = time.monotonic()
    async with post_stream(server.url, "/v1/completions", body) as response:
        text = (await response.read()).decode(errors="replace")
        return Answer(response.status, error=text, total_s=time.monotonic() - started)


def _is_envelope(text: str | None) -> bool:
    try:
        return {"message", "type", "param", "code"} <= json.loads(text or "")["error"].keys()
    except (ValueError, TypeError, LookupError):
        return False


def _fields(**fields: object) -> bytes:
    return json.dumps({"prompt": "a"} | fields).encode()


BAD_BODIES = [
    b"", b"{", b"[]", b"null", b"{}", b"a=1&b=2", b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}',
    b'{"prompt":"a","temperature":NaN}', b'{"prompt":"a","temperature":1e999}',
    b'{"prompt":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    _fields(max_tokens="abc"), _fields(max_tokens=-1), _fields(max_tokens=0),
    _fields(max_tokens=10**18), _fields(max_tokens=1.5), _fields(prompt="word " * 3000),
    _fields(prompt="x" * 1_900_000), _fields(prompt=""), _fields(prompt=[]), _fields(prompt=None),
    _fields(prompt=True), _fields(prompt=["a", 1]), _fields(prompt=[10**9]),
    _fields(prompt=[-5]), _fields(prompt=[2**70]), _fields(prompt=["a"] * 5000),
    _fields(model="gpt-4"), _fields(model="../../etc/passwd"), _fields(model="a\r\nb"),
    _fields(temperature=-1), _fields(temperature=1e9), _fields(top_p=0), _fields(top_p=2),
    _fields(top_k=-5), _fields(stop=["x"] * 100_000), _fields(stop=""), _fields(n=10**6),
    _fields(n=0), _fields(logprobs=10**6), _fields(logprobs=-1), _fields(seed=2**70),
    _fields(seed=-2), _fields(logit_bias={"1": 1e308}), _fields(logit_bias={"99999999": 1.0}),
    _fields(logit_bias={"a": 1.0}), _fields(stream="x"), _fields(presence_penalty=9.0),
    _fields(repetition_penalty=-1.0), _fields(min_p=2.0), _fields(tools=[{"type": "function"}]),
    _fields(response_format={"type": "json_schema", "json_schema": {"schema": {"type": 7}}}),
    _fields(guided_regex="(a+)+$"), _fields(min_tokens=17), _fields(stop_token_ids=[-1]),
]  # fmt: skip

ALL = {
    "stalled": stalled,
    "descriptors": few_descriptors,
    "fairness": fairness,
    "bundle": removed_bundle,
    "memory": little_memory,
    "neighbour": busy_neighbour,
    "watchers": watchers,
    "input": bad_inputs,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(ALL), default=list(ALL))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each throughput run")
    arguments = parser.parse_args()
    rules = Rules()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            print(f"{name}: {(ALL[name].__doc__ or '').strip()}", flush=True)
            ALL[name](rules, Path(folder), arguments.seconds)
    return rules.show()


if __name__ == "__main__":
    sys.exit(main())
