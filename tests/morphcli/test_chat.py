"""`morph chat` and `morph complete`, as a user meets them, against a small server."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import fake_server
from typer.testing import CliRunner, Result

from morphserve.configs.errors import MorphError
from morphserve.morphcli.app import app
from morphserve.morphcli.conversation import Reply, Usage, printable


@pytest.fixture
def server() -> Iterator[tuple[str, Any]]:
    with fake_server() as found:
        yield found


def morph(*words: str, said: str = "", **environment: str) -> Result:
    result = CliRunner().invoke(app, words, input=said, env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*words: str, **environment: str) -> str:
    with pytest.raises(MorphError) as raised:
        morph(*words, **environment)
    assert raised.value.exit_code in (1, 2)
    return str(raised.value)


def test_a_completion_is_all_of_standard_output(server: tuple[str, Any]) -> None:
    url, fake = server
    result = morph("complete", url, "def f", "--max-tokens", "5")
    assert (result.stdout, result.stderr) == ("ab" * 5, "")
    assert (fake.bodies[0]["model"], fake.bodies[0]["prompt"]) == ("fake", "def f")
    assert "temperature" not in fake.bodies[0] and "stop" not in fake.bodies[0]


def test_options_of_a_completion_reach_the_server(server: tuple[str, Any]) -> None:
    url, fake = server
    options = "--model other --temperature 0 --stop a --stop b --max-tokens 1"
    morph("complete", url, "x", *options.split())
    body = fake.bodies[0]
    assert (body["model"], body["temperature"], body["stop"]) == ("other", 0, ["a", "b"])
    assert fake.gets == []  # a model that is named is not looked up


def test_a_prompt_comes_from_standard_input_too(server: tuple[str, Any]) -> None:
    url, fake = server
    morph("complete", url, "-", said="two\nlines\n")
    assert fake.bodies[0]["prompt"] == "two\nlines\n"


def test_the_whole_response_is_one_json_document(server: tuple[str, Any]) -> None:
    result = morph("complete", server[0], "x", "--max-tokens", "2", "--json")
    assert json.loads(result.stdout) == {"choices": [{"text": "abab"}]}


def test_a_chat_remembers_what_was_said(server: tuple[str, Any]) -> None:
    url, fake = server
    result = morph("chat", url, said="hello\n\nand then?\n/quit\nnever sent\n")
    assert result.exit_code == 0
    assert result.stdout == "abababababab\n" * 2
    assert [message["content"] for message in fake.bodies[1]["messages"]] == [
        *("hello", "ab" * 6, "and then?")
    ]
    assert "6 tokens" in result.stderr
    assert "83% full, 17% int4" in result.stderr


def test_a_chat_ends_where_its_input_does(server: tuple[str, Any]) -> None:
    assert morph("chat", server[0], said="hello\n").exit_code == 0


def heed_interrupts() -> None:
    """What shells start in the background ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: tuple[str, Any]) -> None:
    url, fake = server
    command = [sys.executable, "-m", "morphserve.morphcli", "chat", url]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as chat:
        assert chat.stdin is not None and chat.stderr is not None
        chat.stdin.write("stuck\n")
        chat.stdin.flush()
        while not fake.bodies:
            assert chat.poll() is None
        chat.send_signal(signal.SIGINT)
        chat.stderr.readline()  # the greeting
        assert chat.stderr.readline() == "[stopped]\n"
        output, _ = chat.communicate("hello\n/quit\n", timeout=60)
    assert chat.returncode == 0
    assert output == "\nabababababab\n"


def test_a_key_comes_from_flag_or_environment(server: tuple[str, Any]) -> None:
    url, fake = server
    fake.api_key = "sk-1"
    assert "wants an API key: set MORPH_API_KEY" in refusal("complete", url, "x")
    assert morph("complete", url, "x", "--api-key", "sk-1").exit_code == 0
    assert morph("complete", url, "x", MORPH_API_KEY="sk-1 sk-2").exit_code == 0


def test_what_went_wrong_is_one_sentence(server: tuple[str, Any]) -> None:
    url = server[0]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert f"no server answers at {closed}" in refusal("complete", closed, "x")
    assert "takes no request now: the queue is full" in refusal("complete", url, "refuse")
    assert "ended the connection before" in refusal("complete", url, "drop")
    assert "write http://HOST:PORT" in refusal("complete", "ftp://a", "x")
    assert "put the prompt into quotes" in refusal("complete", url, "two", "words")


def test_a_summary_tells_length_speed_and_shares() -> None:
    usage = Usage(11, {"full": 8, "int8": 0, "int4": 3})
    assert Reply("", usage, [1.0, 2.0]).summary() == "11 tokens, 10 tok/s, 73% full, 27% int4"
    assert Reply("", Usage(1), [1.0]).summary() == "1 token"
    assert Reply("half", None, [1.0]).summary() == "stopped"


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\x07\rb\n\té 漢") == "a[2Jb\n\té 漢"
