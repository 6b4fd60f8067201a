"""What a careless or hostile client may send: each gets one clear 4xx, and harms nobody else."""

import json
from typing import Any

import fake_engine
import httpx
import pytest

pytestmark = pytest.mark.anyio

# Fields of a completion, the field at fault, and a part of the sentence.
FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": "abc"}, "max_tokens", "Expected `int"),
    ({"max_tokens": -1}, "max_tokens", ">= 1"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": 10**18}, "max_tokens", "<= 2147483647"),
    ({"max_tokens": 1.5}, "max_tokens", "got `float`"),
    ({"max_tokens": 5000}, "prompt", "5000 together exceed the model's limit of 2048 tokens"),
    ({"prompt": "word " * 3000}, "prompt", "model's limit of 2048 tokens"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": []}, "prompt", "must not be empty"),
    ({"prompt": [[]]}, "prompt", "no tokens"),
    ({"prompt": None}, "prompt", "got `null`"),
    ({"prompt": True}, "prompt", "got `bool`"),
    ({"prompt": {"a": 1}}, "prompt", "got `object`"),
    ({"prompt": ["a", 1]}, "prompt", "must not mix"),
    ({"prompt": [[1], "a"]}, "prompt", "must not mix"),
    ({"prompt": [10**9]}, "prompt", "token id 1000000000; the largest of this model is 4095"),
    ({"prompt": [1, -5]}, "prompt[1]", ">= 0"),
    ({"prompt": [2**70]}, "prompt[0]", "<= 2147483647"),
    ({"prompt": [[3, 2**70]]}, "prompt[0][1]", "<= 2147483647"),
    ({"prompt": ["a"] * 5000}, "prompt", "5000 entries, at most 64"),
    ({"temperature": -1}, "temperature", ">= 0"),
    ({"temperature": 1e9}, "temperature", "<= 2"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_p": 2}, "top_p", "<= 1"),
    ({"top_k": -5}, "top_k", ">= -1"),
    ({"seed": -2}, "seed", ">= -1"),
    ({"seed": 2**70}, "seed", "<= 9223372036854775807"),
    ({"stop": ["x"] * 100_000}, "stop", "length <= 16"),
    ({"stop": ""}, "stop", "length >= 1"),
    ({"stop": ["a", "b" * 1000]}, "stop[1]", "length <= 256"),
    ({"stop": 7}, "stop", "got `int`"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", ">= 0"),
    ({"min_tokens": 17}, "min_tokens", "larger than max_tokens (16)"),
    ({"n": 10**6}, "n", "<= 16"),
    ({"n": 100}, "n", "<= 16"),
    ({"n": 17}, "n", "<= 16"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 1.5}, "n", "got `float`"),
    ({"n": 2, "prompt": ["a"] * 33}, "n", "33 prompts with n=2 choices each are more than the 64"),
    ({"best_of": 2}, "best_of", "only best_of=1, or leave"),
    ({"best_of": 3, "n": 2}, "best_of", "only best_of=2, or leave"),
    ({"echo": 1}, "echo", "got `int`"),
    ({"echo": True, "logprobs": 1}, "echo", "echo with logprobs is not supported"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"use_beam_search": 0}, "use_beam_search", "not supported"),
    ({"length_penalty": True}, "length_penalty", "not supported"),
    ({"logprobs": 10**6}, "logprobs", "<= 20"),
    ({"logprobs": 21}, "logprobs", "<= 20"),
    ({"logprobs": -1}, "logprobs", ">= 0"),
    ({"logprobs": True}, "logprobs", "got `bool`"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
    ({"logit_bias": {"1": 100.5}}, "logit_bias", "100.5 for token 1 must lie between -100 and"),
    ({"logit_bias": {"1": -1e308}}, "logit_bias", "for token 1 must lie between -100 and 100"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "'4096' is no token id of this model, which are"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is no token id"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "'the' is no token id"),
    ({"logit_bias": {"\u0661": 1}}, "logit_bias", "is no token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "is no token id"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "length <= 1024"),
    ({"logit_bias": {"1": "2"}}, "logit_bias[...]", "got `str`"),
    ({"logit_bias": [1]}, "logit_bias", "got `array`"),
    ({"presence_penalty": 2.1}, "presence_penalty", "<= 2"),
    ({"presence_penalty": -2.1}, "presence_penalty", ">= -2"),
    ({"presence_penalty": "1"}, "presence_penalty", "got `str`"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "<= 2"),
    ({"frequency_penalty": -1e308}, "frequency_penalty", ">= -2"),
    ({"frequency_penalty": []}, "frequency_penalty", "got `array`"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
    ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
    ({"repetition_penalty": -1}, "repetition_penalty", ">= 0.01"),
    ({"repetition_penalty": 10.5}, "repetition_penalty", "<= 10"),
    ({"repetition_penalty": True}, "repetition_penalty", "got `bool`"),
    ({"min_p": -0.1}, "min_p", ">= 0"),
    ({"min_p": 1.1}, "min_p", "<= 1"),
    ({"min_p": "a"}, "min_p", "got `str`"),
    ({"guided_json": {}}, "guided_json", "not supported"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"skip_special_tokens": 0}, "skip_special_tokens", "got `int`"),
    ({"add_special_tokens": "no"}, "add_special_tokens", "got `str`"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "got `int`"),
    (
        {"stream_options": {"continuous_usage_stats": 1}},
        "stream_options.continuous_usage_stats",
        "got `int`",
    ),
    ({"cache_salt": "x" * 257}, "cache_salt", "length <= 256"),
    ({"cache_salt": 5}, "cache_salt", "got `int`"),
    ({"length_penalty": 2}, "length_penalty", "not supported"),
    ({"stream": "x"}, "stream", "got `str`"),
    ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage", "got `int`"),
    ({"model": 3}, "model", "got `int`"),
]

# Bodies as they are, and a part of the sentence.
BODIES: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "Expected `object`, got `array`"),
    (b"null", "got `null`"),
    (b"{}", "missing required field `prompt`"),
    (b'{"prompt":"a","temperature":NaN}', "not valid JSON"),
    (b'{"prompt":"a","temperature":1e999}', "out of range"),
    (b'{"prompt":"\\ud800"}', "not valid JSON"),
    (b'{"prompt":"\xff"}', "not valid JSON"),
    (b'{"prompt":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b"a=1&b=2", "not valid JSON"),
]

CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0]"),
    ({"messages": [{"role": 1, "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "hi " * 4000}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"echo": True}, "echo"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"add_special_tokens": True}, "add_special_tokens"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"n": 17}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"min_p": 2}, "min_p"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
]


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The envelope's inside; everything about its shape is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 400
    return error


async def assert_still_serving(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/completions", json={"prompt": "import os", "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "import os"


@pytest.mark.parametrize(("fields", "param", "sentence"), FIELDS)
async def test_a_wrong_field_is_named_with_its_bound(
    api: httpx.AsyncClient, fields: dict[str, Any], param: str, sentence: str
) -> None:
    error = error_of(await api.post("/v1/completions", json={"prompt": "a"} | fields))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and sentence in error["message"]
    await assert_still_serving(api)


@pytest.mark.parametrize(("body", "sentence"), BODIES, ids=range(len(BODIES)))
async def test_a_body_that_is_no_request_is_refused(
    api: httpx.AsyncClient, body: bytes, sentence: str
) -> None:
    error = error_of(await api.post("/v1/completions", content=body))
    assert sentence in error["message"]
    await assert_still_serving(api)


@pytest.mark.parametrize(("fields", "param"), CHATS)
async def test_a_wrong_chat_is_refused_by_field(
    api: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    error = error_of(await api.post("/v1/chat/completions", json=body))
    assert error["param"] == param
    await assert_still_serving(api)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-morph-min-precision", "best"),
        ("x-morph-min-precision", ""),
        ("x-slo-ttft-ms", "0"),
        ("x-slo-ttft-ms", "-5"),
        ("x-slo-ttft-ms", "fast"),
        ("x-slo-tpot-ms", "nan"),
        ("x-slo-tpot-ms", "inf"),
        ("x-slo-tpot-ms", "1e999"),
        ("x-slo-tpot-ms", ""),
    ],
)
async def test_a_wrong_header_is_named(api: httpx.AsyncClient, header: str, value: str) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        error = error_of(await api.post(path, json=body, headers={header: value}))
        assert error["param"] == header and header in error["message"]
    await assert_still_serving(api)


@pytest.mark.parametrize("model", ["gpt-4", "../../etc/passwd", "a\r\nb", "", "x" * 10_000])
async def test_an_unknown_model_is_a_404(api: httpx.AsyncClient, model: str) -> None:
    error = error_of(await api.post("/v1/completions", json={"prompt": "a", "model": model}), 404)
    assert error["param"] == "model" and error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v1/../../etc/passwd", 404),
        ("GET", "//v1/models", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/%00", 404),
        ("POST", "/health", 405),
    ],
)
async def test_odd_paths_and_methods_get_the_same_envelope(
    api: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    error_of(await api.request(method, path), status)


async def test_a_large_body_is_refused_by_its_announcement(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/completions", content=b"x" * (2 * 1024 * 1024 + 1))
    assert "larger than 2 MiB" in error_of(answer, 413)["message"]
    assert answer.headers["connection"] == "close"


async def test_a_large_body_without_an_announcement_is_cut_off(api: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield b"x" * 100_000

    error_of(await api.post("/v1/completions", content=endless()), 413)
    await assert_still_serving(api)


async def test_too_many_headers_are_refused(api: httpx.AsyncClient) -> None:
    many = {f"x-{i}": "1" for i in range(300)}
    error_of(await api.get("/health", headers=many), 431)
    error_of(await api.get("/health", headers={"x": "1" * 100_000}), 431)


@pytest.mark.parametrize("text", ["x" * 60_000, "word " * 1500])
async def test_a_prompt_that_is_too_long_is_told_the_same_way_before_and_after_tokenising(
    api: httpx.AsyncClient, text: str
) -> None:
    error = error_of(await api.post("/v1/completions", json={"prompt": text}))
    assert error["param"] == "prompt" and error["code"] == "context_length_exceeded"
    body = {"messages": [{"role": "user", "content": text}]}
    error = error_of(await api.post("/v1/chat/completions", json=body))
    assert error["param"] == "messages" and error["code"] == "context_length_exceeded"
    assert "max_tokens" not in error["message"]


async def test_what_is_odd_but_right_is_served(api: httpx.AsyncClient) -> None:
    for fields in (
        {"prompt": "a\x00b"},
        {"logit_bias": {"0": 100, "4095": -100}, "min_p": 1, "repetition_penalty": 10},
        {"logit_bias": None, "min_p": None, "repetition_penalty": None, "echo": None},
        {"presence_penalty": -2, "frequency_penalty": 2, "logprobs": 20, "n": 16, "best_of": 16},
        {"cache_salt": "x" * 256, "skip_special_tokens": None, "add_special_tokens": None},
        {"temperature": 1e-300},
        {"temperature": 1, "top_k": -1, "unknown_field": {"deep": [1]}},
        {"logit_bias": {}, "n": 1, "presence_penalty": 0, "stop": []},
        {"max_tokens": None, "stop": None, "stream": None, "n": None, "seed": -1},
        {"min_tokens": None, "ignore_eos": None, "logprobs": None},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"repetition_penalty": 1.0, "min_p": 0.0, "echo": False, "tools": [], "best_of": 1},
        {"prompt": "a", "max_tokens": fake_engine.MAX_MODEL_LEN - 1},
    ):
        answer = await api.post("/v1/completions", content=json.dumps({"prompt": "a"} | fields))
        assert answer.status_code == 200, answer.text
