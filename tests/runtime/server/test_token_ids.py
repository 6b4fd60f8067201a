"""`return_token_ids`: the ids of tokens beside their text, as vLLM tells them, and precisions."""

import json
from typing import Any

import fake_engine
import httpx
import pytest

from morphserve.quantize.manifest import Variant
from morphserve.runtime.deliveries import Chunk
from morphserve.runtime.server.token_ids import token_ids
from morphserve.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

TEXT = "x = 'née 🦉'\n"
CHAT = [{"role": "user", "content": "hi"}]


async def post(api: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await api.post(path, json=body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(api: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    answer = await api.post(path, json=body | {"return_token_ids": True, "stream": True})
    *lines, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_completion_tells_the_ids_of_its_prompt_and_output(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    answer = await post(api, "/v1/completions", prompt=[TEXT, "def"], max_tokens=5)
    for text, choice in zip((TEXT, "def"), answer["choices"], strict=True):
        ids = tokenizer.encode(text, 100)
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == (ids * 5)[:5]  # this engine repeats its prompt
        assert choice["token_precisions"] == [["full", 5]]


async def test_a_streams_ids_join_to_those_of_the_whole_answer(api: httpx.AsyncClient) -> None:
    fields = {"prompt": TEXT, "max_tokens": 25, "n": 2}
    whole = await post(api, "/v1/completions", **fields)
    firsts: dict[int, Any] = {}
    ids: list[list[int]] = [[], []]
    for chunk in await stream(api, "/v1/completions", **fields):
        (choice,) = chunk["choices"]
        firsts.setdefault(choice["index"], choice)
        assert ("prompt_token_ids" in choice) is (firsts[choice["index"]] is choice)
        ids[choice["index"]] += choice["token_ids"]
        assert choice["token_precisions"] == [["full", len(choice["token_ids"])]]
    assert ids == [choice["token_ids"] for choice in whole["choices"]]
    assert [firsts[i]["prompt_token_ids"] for i in range(2)] == [
        choice["prompt_token_ids"] for choice in whole["choices"]
    ]


async def test_tokens_without_a_text_of_their_own_are_streamed_too(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    owl = tokenizer.encode("🦉", 100)
    assert len(owl) > 1  # all but the last of them are part of a character
    chunks = await stream(api, "/v1/completions", prompt=owl, max_tokens=len(owl))
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == owl
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "🦉"


async def test_a_chat_tells_the_ids_of_its_prompt_once(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    fields = {"messages": CHAT, "max_tokens": 4, "n": 2}
    whole = await post(api, "/v1/chat/completions", **fields)
    assert tokenizer.decode(whole["prompt_token_ids"]) == "user: hi\nassistant:"
    for choice in whole["choices"]:
        assert choice["token_ids"] == whole["prompt_token_ids"][:4]
        assert choice["token_precisions"] == [["full", 4]]
    first, *chunks = await stream(api, "/v1/chat/completions", **fields)
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks)
    told = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", ())]
    assert sorted(told) == sorted(2 * whole["prompt_token_ids"][:4])


async def test_a_token_that_ends_the_answer_is_among_its_ids(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    first, second = tokenizer.encode("import os", 10)
    answer = await post(api, "/v1/completions", prompt=[first, second], stop_token_ids=[second])
    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"]) == ("import", [first, second])
    assert answer["usage"]["completion_tokens"] == 2


async def test_tokens_made_with_int4_layers_say_so(api: httpx.AsyncClient) -> None:
    answer = await post(api, "/v1/completions", prompt=[fake_engine.INT4], max_tokens=3)
    assert answer["choices"][0]["token_precisions"] == [["int4", 3]]


@pytest.mark.parametrize("value", [False, None])
async def test_nobody_is_told_ids_unasked(api: httpx.AsyncClient, value: bool | None) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        (
            "/v1/chat/completions",
            {"messages": CHAT},
        ),
    ):
        for streamed in (False, True):
            fields = body | {"max_tokens": 3, "stream": streamed, "return_token_ids": value}
            answer = await api.post(path, json=fields)
            assert answer.status_code == 200 and "token_" not in answer.text.replace("_tokens", "")


async def test_a_wish_for_ids_that_is_no_boolean_is_refused(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/completions", json={"prompt": "a", "return_token_ids": 1})
    assert answer.status_code == 400 and "return_token_ids" in answer.text


async def test_ids_are_described(api: httpx.AsyncClient) -> None:
    schemas = (await api.get("/openapi.json")).json()["components"]["schemas"]
    for request in ("CompletionRequest", "ChatRequest"):
        asked = schemas[request]["properties"]["return_token_ids"]
        assert {"type": "boolean"} in asked["anyOf"] and "precision" in asked["description"]
    for answer in ("CompletionChoice", "ChatChoice", "ChatChunkChoice"):
        told = schemas[answer]
        assert told["properties"]["token_ids"]["items"] == {"type": "integer"}
        assert "runs" in told["properties"]["token_precisions"]["description"]
        assert "token_ids" not in told["required"]


def test_pieces_join_with_neighbouring_runs_made_one() -> None:
    steps = [(Variant.FULL, [1]), (Variant.FULL, [2, 3]), (Variant.INT8, [4]), (Variant.FULL, [5])]
    joined = token_ids(Chunk([9], Variant.INT4), prompt=[7])
    for precision, tokens in steps:
        joined.add(token_ids(Chunk(tokens, precision), None))
    joined.add(token_ids(Chunk([], Variant.FULL), None))
    assert (joined.ids, joined.prompt) == ([9, 1, 2, 3, 4, 5], [7])
    assert joined.precisions == [
        (Variant.INT4, 1), (Variant.FULL, 3), (Variant.INT8, 1), (Variant.FULL, 1)
    ]  # fmt: skip
