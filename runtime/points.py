"""At which sizes the parts of a step are timed."""

from dataclasses import dataclass

from morphserve.configs.schema import SchedulerConfig

# Of CPUs, then what GPUs add: their steps are larger.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GPU_TOKENS = (1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64)  # requests that decode at once
GPU_ROWS = (128, 256)
# (sequences, query tokens, context tokens); what goes beyond the model's context is cut to it
ATTENTION = (
    *((1, 1, 64), (1, 1, 1024), (8, 1, 256), (32, 1, 64), (8, 1, 512), (32, 1, 128)),
    *((8, 1, 1024), (32, 1, 256), (16, 1, 1024), (32, 1, 512)),
    *((1, 32, 64), (1, 64, 256), (1, 64, 1024), (4, 64, 256), (1, 256, 1024), (1, 512, 512)),
)
GPU_ATTENTION = (
    *((1, 1, 8192), (64, 1, 1024), (256, 1, 256), (64, 1, 4096), (256, 1, 1024)),
    *((1, 512, 4096), (2, 1024, 1024), (1, 2048, 2048), (8, 256, 2048)),
)


@dataclass(frozen=True, slots=True)
class Points:
    """What is measured on a device."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    attention: tuple[tuple[int, int, int], ...]

    @property
    def kv_tokens(self) -> int:
        return max(num_seqs * context for num_seqs, _, context in self.attention)

    def limits(self, max_position: int) -> SchedulerConfig:
        longest = max(context for *_, context in self.attention)
        return SchedulerConfig(max(self.rows), max(self.tokens), min(longest, max_position))

    def attention_of(self, max_position: int, max_queries: int) -> list[tuple[int, int, int]]:
        """Those in the model's context, with at most so many queries in the batch."""
        cut = [(n, min(q, max_position), min(c, max_position)) for n, q, c in self.attention]
        return [(n, q, c) for n, q, c in dict.fromkeys(cut) if n * q <= max_queries]


def points_of(kind: str) -> Points:
    """Of a device of this kind, cpu or cuda."""
    if kind == "cpu":
        return Points(TOKENS, ROWS, ATTENTION)
    return Points(TOKENS + GPU_TOKENS, ROWS + GPU_ROWS, ATTENTION + GPU_ATTENTION)
