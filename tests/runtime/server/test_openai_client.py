"""Every parameter of a request by its effect: the `openai` client against the demo model."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import AutoModelForCausalLM, AutoTokenizer

from morphserve.runtime.tokenizer import Tokenizer

PROMPT = "def add(a, b):\n    return"
DEMO_MODEL = Path(str(resources.files("morphserve.morphcli").joinpath("demo_model")))
EOS = 0


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    command = [sys.executable, "-P", "-m", "morphserve.morphcli", "serve", "demo"]
    options = ["--policy", "off", "--port", "0", "--no-monitor"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(m[0] for line in process.stderr if (m := re.search(r"http://\S+:\d+", line)))
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                yield client
        finally:
            process.terminate()
            process.communicate()


def complete(client: openai.OpenAI, **fields: Any) -> Completion:
    """A greedy completion of 12 tokens, unless told otherwise; ours and vLLM's fields as well."""
    known = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
    own = {"min_p", "top_k", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"}
    own |= {"include_stop_str_in_output", "skip_special_tokens", "add_special_tokens"}
    own |= {"return_token_ids"}
    extra = {name: known.pop(name) for name in list(known) if name in own}
    answer: Completion = client.completions.create(**known, extra_body=extra)
    return answer


def text(client: openai.OpenAI, **fields: Any) -> str:
    return complete(client, **fields).choices[0].text


def chat(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    messages = [{"role": "user", "content": "Write a function."}]
    known = {"model": "demo", "messages": messages, "max_tokens": 12, "temperature": 0} | fields
    answer: ChatCompletion = client.chat.completions.create(**known)
    return answer


def tokens_of(tokenizer: Tokenizer, words: str) -> list[int]:
    return tokenizer.encode(words, 1000)


@pytest.mark.parametrize("fields", [{}, {"seed": 4, "temperature": 1.2}, {"n": 3, "logprobs": 2}])
def test_a_stream_joins_to_the_whole(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    texts = [""] * len(whole.choices)
    logprobs: list[list[float]] = [[] for _ in texts]
    for chunk in complete(client, stream=True, **fields):  # type: ignore[attr-defined]
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    if "logprobs" in fields:
        assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]


def test_a_chat_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    fields = {"n": 2, "seed": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **fields)
    texts, entries = ["", ""], [[], []]  # type: ignore[var-annotated]
    roles = []
    for chunk in chat(client, stream=True, **fields):  # type: ignore[attr-defined]
        choice = chunk.choices[0]
        roles += [choice.delta.role] if choice.delta.role else []
        texts[choice.index] += choice.delta.content or ""
        entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1] and roles == ["assistant"] * 2
    assert entries == [choice.logprobs.content for choice in whole.choices]


def test_the_logprobs_are_those_of_transformers(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    told = complete(client, logprobs=3, repetition_penalty=1.3).choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs
    new = tokens_of(tokenizer, "".join(told.tokens))
    prompt = tokens_of(tokenizer, PROMPT)
    assert len(new) == 12
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for place, token in enumerate(new):
        assert told.token_logprobs[place] == pytest.approx(float(rows[place, token]), abs=0.05)
        likeliest = rows[place].topk(3).values.tolist()
        top = sorted(told.top_logprobs[place].values(), reverse=True)  # type: ignore[index]
        assert top[:3] == pytest.approx(likeliest, abs=0.05)
        assert told.tokens[place] in told.top_logprobs[place]  # type: ignore[index]
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(12)]


def test_token_ids_are_those_of_the_prompt_and_of_the_text(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    whole: Any = complete(client, return_token_ids=True).choices[0]
    assert whole.prompt_token_ids == tokens_of(tokenizer, PROMPT)
    assert tokenizer.decode(whole.token_ids) == whole.text
    assert whole.token_precisions == [["full", 12]]
    chunks: Any = complete(client, return_token_ids=True, stream=True)
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == whole.token_ids


def test_a_chats_logprobs_tell_token_bytes_and_rivals(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=4).choices[0]
    entries = choice.logprobs.content  # type: ignore[union-attr]
    assert entries is not None and len(entries) == 12
    assert b"".join(bytes(e.bytes or ()) for e in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy takes the likeliest
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []  # type: ignore
    assert chat(client).choices[0].logprobs is None


@pytest.mark.parametrize("penalty", [1.2, 2.5])
def test_repetition_penalty_gives_the_tokens_of_transformers(
    client: openai.OpenAI, tokenizer: Tokenizer, penalty: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    prompt = torch.tensor([tokens_of(tokenizer, PROMPT)])
    with torch.inference_mode():
        theirs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=EOS,
            max_new_tokens=8,
            do_sample=False,
            repetition_penalty=penalty,
        )
    expected = tokenizer.decode(theirs[0, prompt.shape[1] :].tolist())
    assert text(client, max_tokens=8, repetition_penalty=penalty) == expected


@pytest.mark.parametrize("fields", [{"presence_penalty": 2.0}, {"frequency_penalty": 0.7}])
def test_penalties_are_off_the_tokens_of_the_output(
    client: openai.OpenAI, fields: dict[str, float]
) -> None:
    told = complete(client, max_tokens=30, logprobs=20, **fields).choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs
    presence, frequency = (fields.get(f"{kind}_penalty", 0) for kind in ("presence", "frequency"))
    for place, token in enumerate(told.tokens):
        seen = told.tokens[:place]
        scores = {
            other: logprob - presence * (other in seen) - frequency * seen.count(other)
            for other, logprob in (told.top_logprobs[place] or {}).items()
        }
        assert scores[token] == pytest.approx(max(scores.values()), abs=1e-5)
    usual = complete(client, max_tokens=30, logprobs=0).choices[0].logprobs
    assert usual is not None and usual.tokens != told.tokens


def test_a_bias_forces_or_forbids_a_token(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    token = tokens_of(tokenizer, "x")[0]
    assert text(client, max_tokens=3, logit_bias={str(token): 100}) == "xxx"
    first = complete(client, max_tokens=1, logprobs=0).choices[0]
    likeliest = tokens_of(tokenizer, first.text)[0]
    assert text(client, max_tokens=1, logit_bias={str(likeliest): -100}) != first.text


def test_what_keeps_only_the_likeliest_is_greedy(client: openai.OpenAI) -> None:
    greedy = text(client)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert text(client, temperature=1.5, seed=1, **narrow) == greedy
    assert len({text(client, temperature=2, seed=i) for i in range(4)}) > 1


def test_choices_differ_by_their_seeds(client: openai.OpenAI) -> None:
    several = complete(client, prompt=["import os", PROMPT], n=3, seed=10, temperature=1.5)
    assert [choice.index for choice in several.choices] == list(range(6))
    for i in range(3):
        alone = text(client, seed=10 + i, temperature=1.5)
        assert several.choices[3 + i].text == alone
    assert len({choice.text for choice in several.choices}) == 6
    usage = several.usage
    assert usage is not None and usage.completion_tokens == 72
    assert usage.prompt_tokens == sum(
        complete(client, prompt=prompt).usage.prompt_tokens  # type: ignore[union-attr]
        for prompt in ("import os", PROMPT)
    )


def test_stop_strings_and_tokens_end_the_text(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    whole = text(client)
    stop = whole[3:6]
    before = whole[: whole.index(stop)]
    stopped = complete(client, stop=[stop]).choices[0]
    assert stopped.text == before and stopped.finish_reason == "stop"
    assert text(client, stop=stop, include_stop_str_in_output=True) == before + stop
    tokens = complete(client, logprobs=0).choices[0].logprobs.tokens  # type: ignore[union-attr]
    assert tokens is not None
    ids = tokens_of(tokenizer, tokens[2])
    assert len(ids) == 1
    cut = complete(client, stop_token_ids=ids).choices[0]
    assert cut.text == "".join(tokens[: tokens.index(tokens[2])]) and cut.finish_reason == "stop"


def test_the_end_of_sequence_can_be_held_back(client: openai.OpenAI) -> None:
    ending = {"logit_bias": {str(EOS): 100}, "max_tokens": 5}
    ended = complete(client, **ending)
    assert ended.choices[0].text == "" and ended.choices[0].finish_reason == "stop"
    assert ended.usage is not None and ended.usage.completion_tokens == 1
    later = complete(client, min_tokens=3, **ending)
    assert later.usage is not None and later.usage.completion_tokens == 4
    ignored = complete(client, ignore_eos=True, **ending)
    assert ignored.choices[0].finish_reason == "length" and ignored.choices[0].text == ""
    special = text(client, ignore_eos=True, skip_special_tokens=False, **ending)
    assert special == AutoTokenizer.from_pretrained(DEMO_MODEL).decode([EOS] * 5)


def test_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    assert text(client, echo=True) == PROMPT + text(client)
    chunks = complete(client, echo=True, stream=True, stop="zzz")
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + text(client)  # type: ignore


def test_usage_comes_last_or_with_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    *chunks, last = complete(client, stream=True, stream_options=options)
    assert all(chunk.usage is None for chunk in chunks)  # type: ignore[attr-defined]
    assert last.choices == [] and last.usage.completion_tokens == 12  # type: ignore[attr-defined]
    assert last.usage.morph["full"] == 12  # type: ignore[attr-defined]
    assert last.usage.prompt_tokens_details.cached_tokens >= 0  # type: ignore[attr-defined]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, stream=True, stream_options=options))  # type: ignore[arg-type]
    counts = [chunk.usage.completion_tokens for chunk in chunks]  # type: ignore[attr-defined]
    assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 12


def test_limits_of_a_chat_go_by_both_names(client: openai.OpenAI) -> None:
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9}):
        answer = chat(client, **fields)
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_headers_and_salt_are_taken(client: openai.OpenAI) -> None:
    headers = {"x-morph-min-precision": "full", "x-slo-ttft-ms": "500", "x-slo-tpot-ms": "50.5"}
    answer = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        extra_headers=headers,
        extra_body={"cache_salt": "mine"},
    )
    assert answer.choices[0].text == text(client)


def test_a_refusal_is_the_clients_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as caught:
        complete(client, presence_penalty=3)
    assert caught.value.param == "presence_penalty"
    with pytest.raises(openai.BadRequestError, match="x-slo-ttft-ms"):
        client.completions.create(
            model="demo", prompt="a", extra_headers={"x-slo-ttft-ms": str(math.nan)}
        )
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
