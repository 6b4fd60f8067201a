"""The engine process's loop in a thread of the test, over a real socket."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fake_engine import FakeEngine

from morphserve.configs.schema import EngineConfig
from morphserve.runtime.engine_process import run_engine


@dataclass
class EngineThread:
    sock: socket.socket  # the client's end
    engines: list[FakeEngine] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    def make_engine(self, config: EngineConfig) -> FakeEngine:
        self.engines.append(FakeEngine(config))
        return self.engine

    def run(self, sock: socket.socket) -> None:
        with sock:
            self.exit_codes.append(run_engine(sock, self.make_engine))


@contextmanager
def running_engine() -> Iterator[EngineThread]:
    ours, theirs = socket.socketpair()
    running = EngineThread(ours)
    thread = threading.Thread(target=running.run, args=[theirs])
    thread.start()
    yield running
    ours.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
