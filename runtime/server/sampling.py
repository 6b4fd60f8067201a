"""How tokens are chosen and when to stop: the fields that completions and chats share."""

from typing import Annotated

from msgspec import Meta, Struct

from morphserve.runtime.request import SamplingParams
from morphserve.runtime.server.errors import bad_request
from morphserve.runtime.server.unsupported import Unsupported, refuse

MAX_N = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_SALT_CHARS = 256
_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_GREEDY_BELOW = 1e-5  # temperatures under this would overflow the softmax and mean greedy anyway

Count = Annotated[int, Meta(ge=1, le=_MAX_INT32)]
TokenId = Annotated[int, Meta(ge=0, le=_MAX_INT32)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # in every chunk: the request's usage so far


class SamplingFields(Unsupported, kw_only=True):
    """null means the default."""

    model: str | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Meta(ge=-1, le=_MAX_INT64)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_MAX_INT32)] | None = None
    ignore_eos: bool | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None  # in the output's text; null: yes
    return_token_ids: Annotated[
        bool | None,
        Meta(
            description="Whether the answer tells the ids of the prompt's and the output's tokens, "
            "and the precision that each of the latter was made at."
        ),
    ] = None
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_CHARS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each chosen one; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def wants_usage_always(self) -> bool:
        options = self.stream_options
        return options is not None and options.continuous_usage_stats is True

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        refuse("best_of", self.best_of, self.num_choices)

    def sampling(self, max_tokens: int, num_ids: int) -> SamplingParams:
        """For a vocabulary of `num_ids` tokens. Raises ApiError if the fields contradict it."""
        temperature = 1.0 if self.temperature is None else self.temperature
        penalty = self.repetition_penalty
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),  # -1 means all, too
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if penalty is None else penalty,
            logit_bias=_biases(self.logit_bias or {}, num_ids),
            logprobs=self.num_logprobs,
            seed=None if self.seed == -1 else self.seed,  # -1 means any, too
            min_tokens=self._least(max_tokens),
            ignore_eos=self.ignore_eos is True,
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )

    def _least(self, max_tokens: int) -> int:
        least = self.min_tokens or 0
        if least > max_tokens:
            raise bad_request(
                f"min_tokens ({least}) is larger than max_tokens ({max_tokens})", "min_tokens"
            )
        return least


def _biases(given: dict[str, float], num_ids: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < num_ids):
            raise bad_request(
                f"logit_bias: {key[:40]!r} is no token id of this model, which are 0 to "
                f"{num_ids - 1}",
                "logit_bias",
            )
        if not abs(bias) <= MAX_BIAS:
            raise bad_request(
                f"logit_bias: {bias} for token {key} must lie between -{MAX_BIAS} and {MAX_BIAS}",
                "logit_bias",
            )
        biases[int(key)] = bias
    return biases
