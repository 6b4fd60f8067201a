"""Addresses of servers, and servers behind TLS."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from fake_server import fake_server

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.client import Plan, PlannedRequest
from morphserve.morphcli.bench.http import Address, address, tls_context
from morphserve.morphcli.bench.replay import replay
from morphserve.morphcli.bench.server import ServerFailed, served_model


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host", Address("host", 80, False, "")),
        ("http://host:8000/", Address("host", 8000, False, "")),
        ("http://host:8000/v1", Address("host", 8000, False, "")),
        ("https://host/v1/", Address("host", 443, True, "")),
        ("https://host/llm/v1", Address("host", 443, True, "/llm")),
        ("http://[::1]:8000", Address("::1", 8000, False, "")),
    ],
)
def test_a_url_may_be_that_of_the_server_or_of_its_api(url: str, expected: Address) -> None:
    assert address(url) == expected


def test_an_address_of_ipv6_is_named_in_brackets() -> None:
    assert address("http://[::1]:8000").name == "[::1]:8000"


@pytest.mark.parametrize(
    "url", ["ftp://host:1", "host:80", "http:///v1", "http://h:x", "http://h?a=b", ""]
)
def test_a_url_that_cannot_be_benched_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        address(url)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that nobody trusts yet, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    path, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=test"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(path)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return path, key


def test_a_server_behind_tls_is_measured_if_the_system_trusts_it(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with fake_server(context) as (url, _):
        tls_context.cache_clear()
        with pytest.raises(ServerFailed, match="certificate verify failed"):
            served_model(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        tls_context.cache_clear()
        assert served_model(url) == "fake"
        plan = Plan(f"{url}/v1", "fake", 20.0, [PlannedRequest(0, 0.0, "plain", 4, 5)])
        _, (outcome,) = replay(plan, lambda _: None)
    tls_context.cache_clear()
    assert (outcome.error, outcome.output_tokens) == (None, 5)
