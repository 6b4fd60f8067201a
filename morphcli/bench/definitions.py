"""What the words of a report mean: its table's rows and its drawings' axes."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Definition:
    """One word, and the labels of the rows that it explains."""

    word: str
    meaning: str
    labels: str = "$^"  # a regular expression, searched for in lower case

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return "is-" + re.sub(r"[^a-z0-9]+", "-", self.word.lower()).strip("-")


DEFINITIONS = (
    Definition(
        "full precision",
        "The model as it was trained. With few requests it is all anyone needs.",
    ),
    Definition(
        "INT4, INT8 layer",
        "A layer whose weights take 4 or 8 bits each: a quarter or half of the memory of 16-bit "
        "ones, at some loss of quality. The memory it frees becomes KV cache.",
        r"int4 layers|int8 layers",
    ),
    Definition(
        "morph",
        "Full precision until memory runs short; then the least important layers become INT8 or "
        "INT4, one after another, and go back when the pressure is gone.",
    ),
    Definition(
        "missed the target",
        "Requests that were slower than the target, refused, failed, or not finished in time, out "
        "of all requests offered. The rest is the attainment.",
        r"missed|attainment",
    ),
    Definition(
        "time to first token",
        "From the moment a request was due to its first streamed token (TTFT). Percentiles are "
        "nearest-rank over all requests offered; one that was never answered counts as infinitely "
        "slow.",
        r"first token",
    ),
    Definition(
        "time per further token",
        "(last token − first token) / (tokens − 1) of one request (TPOT), over the requests that "
        "were answered to the end.",
        r"further token",
    ),
    Definition(
        "gap between tokens",
        "Every gap between two streamed pieces of an answer (ITL), all answers in one list; a "
        "piece may hold several tokens.",
        r"gap|piece|inter-token|itl",
    ),
    Definition(
        "whole answer",
        "From the moment a request was due to its last token (E2E); one that was never answered "
        "counts as infinitely slow.",
        r"whole answer|last token|end to end|e2e",
    ),
    Definition(
        "queue time",
        "From the arrival of a request in the server to the first step that worked on it, as the "
        "server tells.",
        r"queue|queued",
    ),
    Definition(
        "throughput",
        "Output tokens of the requests that were answered to the end, per second from the first "
        "request to the last token.",
        r"tokens per second|tokens/s|requests per second$|finished per second",
    ),
    Definition(
        "goodput",
        "Requests within the target, per second from the first request to the last token.",
        r"within the target",
    ),
    Definition(
        "refused, unfinished, failed",
        "Answered with an HTTP error; given up after the time-out; anything else that brought no "
        "whole answer.",
        r"refused|unfinished|failed",
    ),
    Definition(
        "KV cache",
        "Memory of what each running request has read and written so far. When it is full, new "
        "requests wait and running ones may be preempted. Capacity: the tokens that it has room "
        "for; it grows as layers are swapped.",
        r"kv cache",
    ),
    Definition(
        "preemption",
        "A running request was stopped to free its memory; its work is done again later.",
        r"preempt",
    ),
    Definition(
        "swap",
        "A layer takes another precision while requests run; moving: its bytes are on their way.",
        r"swaps|layer swaps",
    ),
    Definition(
        "full precision again",
        "Counted from the end of the burst (the last second in which the 5 s mean of arrivals was "
        "over twice its median, by more than chance) to the first sample of the server in which "
        "every layer that was swapped by then had come back. Layers that were swapped later are "
        "counted on their own.",
        r"full precision again|swapped again",
    ),
    Definition(
        "tokens below full precision",
        "Share of output tokens made while at least one layer was INT8 or INT4, counted by the "
        "server; a token counts as made at the lowest precision of any layer in its step.",
        r"tokens made|below full",
    ),
    Definition(
        "perplexity",
        "How surprised the model is by text it has never seen; lower is better. Measured for each "
        "mix of layers that was served, then averaged (geometrically) over the tokens that it "
        "generated, as seen in samples of the server's state. Quality loss is its rise over full "
        "precision.",
        r"perplexity",
    ),
    Definition(
        "KL divergence",
        "How far the distribution of the next token is from that at full precision, in nats per "
        "token on held-out text, weighted like perplexity; 0: the same model.",
        r"\bkl\b|divergence",
    ),
    Definition(
        "same text, same tokens",
        "Of requests answered under both policies: the share with the same greedy text; the share "
        "of tokens that are the same at their place; the mean number of tokens before the first "
        "that differs. After one different token an answer goes its own way, so a low agreement "
        "is no measure of worth.",
        r"same text|agree|same token|prefix|first that differs|first difference",
    ),
    Definition(
        "F1, ROUGE-L",
        "Answers held against the data set's references: F1 of the words in common, wherever they "
        "stand, and of the longest sequence of words in one order, with gaps; 100 is best.",
        r"\bf1\b|rouge",
    ),
    Definition(
        "95 % interval",
        "Where policies ran several times: whiskers and [brackets] are the 95 % confidence "
        "interval of the mean over repeats of a run's figure (Student's t). The figure beside it "
        "is of all their requests together, and can lie elsewhere. Repeats differ by chance and "
        "by the machine, not by the requests sent.",
        r"interval|repeat",
    ),
)  # fmt: skip


OF_ANSWERS = [d for d in DEFINITIONS if d.word in ("KL divergence", "same text, same tokens")]


def definition_of(label: str) -> Definition | None:
    """The first definition that explains a row with this label."""
    text = label.lower()
    return next((d for d in DEFINITIONS if re.search(d.labels, text)), None)
