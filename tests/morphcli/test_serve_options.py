"""Settings of `morph serve`: flag before environment before file before default."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer.main
from typer.testing import CliRunner

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import EngineConfig, ServerConfig, Slo
from morphserve.morphcli.app import app
from morphserve.morphcli.bench.server import ServerFailed, free_port, running_server
from morphserve.runtime.server import run

SECTIONS = ["Arguments", "Model", "Memory", "Scheduler", "Morphing", "HTTP", "Observability"]
Started = Callable[..., tuple[EngineConfig, ServerConfig]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What the server is told by `morph serve demo --policy off ...`, with these variables."""
    told: list[tuple[EngineConfig, ServerConfig]] = []

    def run_server(engine: EngineConfig, server: ServerConfig, watch: object) -> int:
        told.append((engine, server))
        return 0

    def start(*words: str | Path, **environment: str) -> tuple[EngineConfig, ServerConfig]:
        arguments = ["serve", "demo", "--policy", "off", *map(str, words)]
        result = CliRunner().invoke(app, arguments, env=environment)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.stderr
        return told.pop()

    monkeypatch.setattr(run, "run_server", run_server)
    return start


def write(folder: Path, text: str) -> Path:
    file = folder / "serve.toml"
    file.write_text(text, "utf-8")
    return file


def test_a_flag_counts_before_the_environment_that_before_the_file(
    start: Started, tmp_path: Path
) -> None:
    file = write(tmp_path, "port = 1001\nmax-num-seqs = 11\nblock_size = 32\n")
    engine, server = start("--config", file, "--port", "1003", MORPH_PORT="1002")
    assert server.port == 1003
    engine, server = start("--config", file, MORPH_PORT="1002", MORPH_MAX_NUM_SEQS="12")
    assert (server.port, engine.scheduler.max_num_seqs) == (1002, 12)
    engine, server = start("--config", file)
    assert (server.port, engine.scheduler.max_num_seqs) == (1001, 11)
    assert engine.cache.block_tokens == 32
    assert start()[1].port == 8000


def test_the_file_can_be_named_by_the_environment(start: Started, tmp_path: Path) -> None:
    file = write(tmp_path, 'slo = "ttft=1s,tpot=100ms"\nenable-prefix-caching = false\n')
    engine, _ = start(MORPH_CONFIG=str(file))
    assert engine.slo == Slo(1.0, 0.1)
    assert not engine.cache.enable_prefix_caching


def test_the_file_may_name_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[EngineConfig] = []
    monkeypatch.setattr(run, "run_server", lambda engine, *_: told.append(engine) or 0)
    file = write(tmp_path, 'model = "demo"\npolicy = "off"\n')
    assert CliRunner().invoke(app, ["serve", "--config", str(file)]).exit_code == 0
    assert Path(told[0].model).name == "demo_model"


def test_every_flag_reaches_the_setting_it_names(start: Started) -> None:
    words = (
        "--dtype float32 --threads 3 --device cpu --kernels reference --seed 7 "
        "--served-model-name nice "
        "--memory-budget 64MiB --max-model-len 128 --no-enable-prefix-caching --block-size 8 "
        "--max-num-seqs 4 --max-num-batched-tokens 99 --max-num-queued-reqs 5 "
        "--max-num-queued-tokens 600 --queue-timeout 2.5 --slo ttft=1s --order back-to-front "
        "--host 127.0.0.2 --port 0 --allowed-origins https://a --allowed-origins https://b "
        "--overload-status 429 --shutdown-timeout 3 --engine-timeout 9 --log-format json"
    )
    engine, server = start(*words.split(), MORPH_API_KEY="one two", MORPH_ADMIN_KEY="root")
    cache, scheduler = engine.cache, engine.scheduler
    assert (engine.dtype, engine.threads, engine.kernels) == ("float32", 3, "reference")
    assert (engine.device, engine.unset) == ("cpu", {"min_run_bytes"})
    assert (engine.seed, engine.order, engine.slo) == (7, "back-to-front", Slo(1.0))
    assert (cache.memory_budget, cache.block_tokens) == (64 * 2**20, 8)
    assert not cache.enable_prefix_caching
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (4, 99)
    assert (scheduler.max_model_len, scheduler.queue_timeout_s) == (128, 2.5)
    assert server == ServerConfig(
        served_model_name="nice",
        host="127.0.0.2",
        port=0,
        max_queued=5,
        max_queued_tokens=600,
        overload_status=429,
        engine_timeout_s=9.0,
        shutdown_timeout_s=3.0,
        log_format="json",
        api_keys=("one", "two"),
        admin_key="root",
        allowed_origins=("https://a", "https://b"),
    )


def test_what_is_left_out_is_the_devices_to_choose(start: Started) -> None:
    engine, _ = start()
    assert (engine.device, engine.kernels) == ("auto", "auto")
    names = {"block_tokens", "min_run_bytes", "max_num_seqs", "max_num_batched_tokens"}
    assert engine.unset == names
    engine, _ = start("--max-num-seqs", "8", "--gpu-memory-utilization", "0.5")
    assert engine.unset == names - {"max_num_seqs"}
    assert engine.cache.gpu_memory_utilization == 0.5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot = 1", "unknown key 'prot': did you mean 'port'?"),
        ("max-num-seq = 1", "unknown key 'max-num-seq': did you mean 'max-num-seqs'?"),
        ("dry-run = true", "unknown key 'dry-run': did you mean"),
        ('port = "8001"', "'port' must be int, not str"),
        ("port = 8001.5", "'port' must be int, not float"),
        ("threads = true", "'threads' must be int, not bool"),
        ("port = 70000", "'port': Input should be less than or equal to 65535"),
        ("dtype = 32", "'dtype' must be str, not int"),
        ("no-monitor = 1", "'no-monitor' must be bool, not int"),
        ('log-interval = "1s"', "'log-interval' must be int or float, not str"),
        ('api-key = "secret"', "'api-key' must be a list, not str"),
        ("api-key = [1]", "'api-key' must be str, not int"),
        ("[memory]\nblock-size = 8", "'memory' is a table: write the flags' names at top level"),
        ("block-size = 8\nblock_size = 8", "'block_size' is there twice"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_key(
    start: Started, tmp_path: Path, text: str, sentence: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        start("--config", file)
    assert str(file) in str(raised.value) and sentence in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(start: Started) -> None:
    with pytest.raises(ConfigError, match=r"cannot read no\.toml: No such file"):
        start("--config", "no.toml")


def test_a_wrong_value_names_the_variable_it_came_from() -> None:
    result = CliRunner().invoke(app, ["serve", "demo"], env={"MORPH_PORT": "many"})
    assert result.exit_code == 2
    assert "MORPH_PORT" in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--queue-timeout 0", "--queue-timeout must be above 0 seconds, not 0: leave it out for"),
        ("--overload-status 500", "--overload-status must be 503 or 429, not 500"),
        (
            "--memory-budget 1GiB --gpu-memory-utilization 0.8",
            "--memory-budget and --gpu-memory-utilization both say how much memory is used",
        ),
        ("--gpu-memory-utilization 1.1", "a share above 0 and at most 1, not 1.1"),
        ("--json", "--json prints the memory plan: add --dry-run"),
        ("--log-format xml", "--log-format must be text or json, not 'xml'"),
        (
            "--max-num-seqs 9 --max-num-batched-tokens 8",
            "--max-num-batched-tokens (8) must be at l",
        ),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(start: Started, words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        start(*words.split())
    assert sentence in str(raised.value)


def test_help_announces_no_range_that_is_refused() -> None:
    shown = " ".join(CliRunner().invoke(app, ["serve", "--help"]).stdout.split())
    assert "x>=0" not in shown.partition("--queue-timeout")[2].partition("Morphing:")[0]
    assert "429<=x" not in shown


def test_a_key_on_the_command_line_is_warned_of_and_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "run_server", lambda *_: 0)
    words = ["serve", "demo", "--policy", "off"]
    result = CliRunner().invoke(app, [*words, "--api-key", "sk-1", "--admin-key", "sk-2"])
    assert "can see --api-key in the list of processes: set MORPH_API_KEY instead" in result.stderr
    assert "can see --admin-key in the list of processes" in result.stderr
    assert "sk-" not in result.output
    environment = {"MORPH_API_KEY": "sk-1", "MORPH_ADMIN_KEY": "sk-2"}
    assert "warning" not in CliRunner().invoke(app, words, env=environment).output


def test_a_dry_run_tells_where_each_setting_comes_from_and_no_key(tmp_path: Path) -> None:
    file = write(tmp_path, "max-num-seqs = 4\n")
    words = ["serve", "demo", "--policy", "off", "--config", str(file), "--dry-run", "--json"]
    environment = {"MORPH_BLOCK_SIZE": "8", "MORPH_API_KEY": "sk-1"}
    result = CliRunner().invoke(app, words, env=environment)
    settings = msgspec.json.decode(result.stdout)["settings"]
    assert {entry["name"]: (entry["value"], entry["origin"]) for entry in settings} == {
        "model": ("demo", "command line"),
        "policy": ("off", "command line"),
        "max-num-seqs": ("4", f"file {file}"),
        "block-size": ("8", "environment, MORPH_BLOCK_SIZE"),
        "api-key": ("(not shown)", "environment, MORPH_API_KEY"),
    }


def test_the_servers_of_a_comparison_know_no_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORPH_MAX_NUM_SEQS", "1")
    log = tmp_path / "log"
    with pytest.raises(ServerFailed), running_server(["sh", "-c", "env; exit 1"], free_port(), log):
        pass
    assert "PATH=" in log.read_text() and "MORPH_" not in log.read_text()


def test_help_has_a_section_for_each_panel_in_order() -> None:
    lines = CliRunner().invoke(app, ["serve", "--help"]).stdout.splitlines()
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [*SECTIONS, "Options"]


def test_a_misspelt_variable_is_told_once_and_those_of_other_programs_are_not() -> None:
    words = ["serve", "demo", "--policy", "off", "--dry-run"]
    environment = {"MORPH_PROT": "1", "MORPH_RATE_SCALE": "1", "MORPH_ZZZ": "1", "MORPH_": "1"}
    result = CliRunner().invoke(app, words, env=environment)
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: MORPH_PROT is no setting of morph: did you mean MORPH_PORT?\n"
    )


def test_a_variable_that_asks_for_json_is_no_mistake(start: Started) -> None:
    start(MORPH_JSON="1")


def test_every_option_of_every_command_has_its_variable() -> None:
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            if option.param_type_name == "option":
                assert option.envvar == f"MORPH_{option.name.upper()}"
