"""What a capture leaves behind, however it ends."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from morphserve.runtime.cuda import gpu
from morphserve.runtime.cuda.gpu import CudaGpu


class Graph:
    """torch.cuda.CUDAGraph, of which one call fails."""

    made: "list[Graph]"
    fails = ""

    def __init__(self) -> None:
        self.made.append(self)
        self.calls: list[str] = []

    def capture_begin(self, **_: object) -> None:
        self._call("begin")

    def capture_end(self) -> None:
        self._call("end")

    def replay(self) -> None:
        self._call("replay")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError(f"{name} failed")


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    monkeypatch.setattr(Graph, "made", [], raising=False)
    monkeypatch.setattr(gpu, "_broken", [])
    for name, stand_in in {
        "CUDAGraph": Graph,
        "current_device": lambda: 0,
        "Stream": lambda: None,
        "stream": lambda _: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return CudaGpu().capture


def test_what_was_captured_can_be_replayed(capture: Callable[..., Callable[[], None]]) -> None:
    ran: list[int] = []
    replay = capture(lambda: ran.append(1))
    replay()
    assert ran == [1] and Graph.made[0].calls == ["begin", "end", "replay"]
    assert not gpu._broken


@pytest.mark.parametrize("fails", ["begin", "run", "end"])
def test_a_graph_whose_capture_failed_stays(
    capture: Callable[..., Callable[[], None]], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "fails", fails)

    def run() -> None:
        if fails == "run":
            raise RuntimeError("run failed")

    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        capture(run)
    assert gpu._broken == Graph.made
    assert Graph.made[0].calls[-1] == "end"
