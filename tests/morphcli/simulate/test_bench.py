"""`morph bench --simulate`: the run folder of a comparison without servers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.app import app

ROWS = "".join(f"{i / 4},300,40\n" for i in range(40))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + ROWS)
    return path


def bench(trace: Path, *options: str) -> tuple[int, Path]:
    output = trace.parent / "run"
    words = ["bench", "llama-3-8b", "--trace", str(trace), "--output", str(output), *options]
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result.exit_code, output


def test_a_simulated_comparison_has_the_run_folder_of_a_measured_one(trace: Path) -> None:
    options = ["--simulate", "L4", "--memory-budget", "18GiB", "--max-model-len", "2048"]
    code, output = bench(trace, *options, "--replicas", "2", "--rates", "1,2")
    assert code == 0
    summary = json.loads((output / "summary.json").read_text())
    assert [p["policy"] for p in summary["policies"]] == ["full", "static:all", "morph"]
    assert all(p["finished"] == 40 for p in summary["policies"])
    assert [point["rate"] for point in summary["curve"]] == [1, 1, 1, 2, 2, 2]
    simulated = summary["settings"]["simulated"]
    assert (simulated["device"], simulated["replicas"]) == ("NVIDIA L4 24 GB", 2)
    assert "all replicas together" in summary["notes"][0]
    page = (output / "report.html").read_text()
    assert "simulated: 2 × NVIDIA L4 24 GB behind a least-loaded router" in page
    assert len((output / "requests.jsonl").read_text().splitlines()) == 3 * (40 + 80)


def test_every_policy_has_the_same_memory(trace: Path) -> None:
    _, output = bench(trace, "--simulate", "h200", "--max-model-len", "2048")
    policies = json.loads((output / "summary.json").read_text())["policies"]
    full, static, morph = (p["server"]["kv_tokens_min"] for p in policies)
    assert full < static  # the freed weights are its KV cache
    assert morph == pytest.approx(full, rel=0.01)  # less the place where swaps are staged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate", "h9"], "use here, l4"),
        (["--simulate", "h100", "--router", "first"], "--router 'first' is not known"),
        (["--simulate", "h100", "--replicas", "0"], "--replicas must be at least 1"),
        (["--simulate", "h100", "--slowdown", "0"], "--slowdown must be above 0"),
        (["--simulate", "h100", "--repeat", "2"], "leave out --repeat"),
        (["--simulate", "h100", "--url", "http://x"], "stands in for servers: leave out --url"),
        (["--simulate", "h100", "--device", "cuda"], "--device is of servers that"),
        (["--url", "http://x", "--device", "cuda"], "--device is of servers that"),
        (["--simulate", "here", "--memory-budget", "9GiB"], "timed by `morph profile`"),
        (["--replicas", "2"], "--replicas is for --simulate"),
    ],
)
def test_what_cannot_be_simulated_is_refused_and_nothing_is_written(
    trace: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(trace, *options)
    assert not (trace.parent / "run").exists()


def test_a_simulation_imports_no_torch(trace: Path) -> None:
    options = ["--simulate", "l4", "--memory-budget", "18GiB", "--max-model-len", "2048"]
    words = ["bench", "llama-3-8b", "--trace", str(trace), "--output", str(trace.parent / "run")]
    program = (
        "import sys; from morphserve.morphcli.app import app; "
        f"app({words + options}, standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
