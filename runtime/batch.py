"""What one step computes."""

from dataclasses import dataclass, field

from morphserve.runtime.request import Request


@dataclass(slots=True)  # not frozen: that takes longer, and each step makes one per request
class Slice:
    """Tokens start..end of one request in this step."""

    request: Request
    start: int
    end: int
    samples: bool = field(init=False)  # it reaches the request's last token: a new one follows

    def __post_init__(self) -> None:
        self.samples = self.end == self.request.num_tokens


Batch = list[Slice]
