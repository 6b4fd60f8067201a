"""The `morph` command: what it lists, what it imports, and how it fails."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from morphserve.configs import load
from morphserve.morphcli.app import main

COMMANDS = (
    *("profile", "quantize", "inspect", "verify", "export"),
    *("serve", "top", "chat", "complete"),
    *("bench", "plan", "demo", "doctor"),
    "trace",
)


def morph(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "morphserve.morphcli", *arguments]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def fail(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of `morph ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["morph", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_help_lists_the_commands() -> None:
    result = morph("--help")
    assert result.returncode == 0
    listed = result.stdout.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in listed if line.strip()] == list(COMMANDS)


@pytest.mark.parametrize("command", set(COMMANDS) - {"serve"})
def test_the_list_of_commands_cuts_no_sentence(command: str) -> None:
    first = morph("--help").stdout.partition(f"  {command} ")[2].partition("\n")[0]
    assert first.endswith(".") and not first.endswith("...")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_tells_its_usage(command: str) -> None:
    result = morph(command, "--help")
    assert result.returncode == 0
    assert f" {command} [OPTIONS]" in result.stdout


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'rich', 'starlette', 'tokenizers', 'torch', 'transformers'}"
    code = f"import sys, morphserve.morphcli.app; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_the_installed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"morph {version('morphserve')}\n"


def test_a_users_mistake_is_one_line_on_stderr_with_its_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(monkeypatch, "serve", "demo", "--policy", "[bold]nonesuch") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: unknown policy '[bold]nonesuch': choose one of accuracy,")
    assert shown.err.count("\n") == 1


def test_an_unknown_option_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(monkeypatch, "serve", "demo", "--polcy", "off") == 2
    assert "--polcy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no/such"], "there is no model folder no/such: give a Hugging Face folder, or `demo`"),
        (
            ["demo"],
            "policy balanced swaps layers and needs a bundle: `morph quantize demo -o demo.morph`, "
            "then `morph serve demo --bundle demo.morph`; or serve at full precision with "
            "`--policy off`",
        ),
        (
            ["demo", "--bundle", "no.morph"],
            "there is no bundle no.morph: `morph quantize demo -o no.morph` makes it",
        ),
    ],
)
def test_what_a_server_lacks_is_said_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert fail(monkeypatch, "serve", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_ctrl_c_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "load_policy", interrupt)
    assert fail(monkeypatch, "serve", "demo") == 130
    assert "Traceback" not in capsys.readouterr().err
