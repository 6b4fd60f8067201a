import asyncio
import json
from typing import Any

import fake_engine
import httpx
import pytest
from engine_thread import EngineThread

from morphserve.quantize.manifest import Variant
from morphserve.runtime.request import Demands, Slo
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio


def events(body: str) -> list[Any]:
    """JSON of each server-sent event; the last must be [DONE]."""
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def post(api: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await api.post(path, json=body)


async def complete(api: httpx.AsyncClient, **body: Any) -> Any:
    answer = await post(api, "/v1/completions", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_completion_has_text_reason_and_usage(api: httpx.AsyncClient) -> None:
    answer = await complete(api, model="demo", prompt="import os\n", max_tokens=6)
    assert answer["object"] == "text_completion" and answer["model"] == "demo"
    assert answer["choices"] == [
        {"index": 0, "text": "import os\n" * 2, "finish_reason": "length", "logprobs": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
        "morph": {"full": 6, "int8": 0, "int4": 0, "queue_s": fake_engine.QUEUED_S},
    }


async def test_max_tokens_is_16_unless_given(api: httpx.AsyncClient) -> None:
    assert (await complete(api, prompt="a"))["usage"]["completion_tokens"] == 16


async def test_without_max_tokens_what_fits_is_enough(api: httpx.AsyncClient) -> None:
    answer = await complete(api, prompt=[[5] * 2040, [5]])
    assert answer["usage"]["completion_tokens"] == 8 + 16
    answer = await complete(api, prompt=[5] * 2047)
    assert answer["usage"]["completion_tokens"] == 1
    refused = await post(api, "/v1/completions", prompt=[5] * 2048)
    assert refused.status_code == 400
    assert "2048 tokens and one of output together exceed" in refused.json()["error"]["message"]


async def test_several_prompts_are_several_choices(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    answer = await complete(api, prompt=["import os", "def"], max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["import os", "defdef"]
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 4
    ids = [tokenizer.encode(text, 10) for text in ("import os", "def")]
    answer = await complete(api, prompt=ids, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["import os", "defdef"]
    answer = await complete(api, prompt=ids[0], max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["import os"]


async def test_tokens_made_with_int4_layers_are_counted_apart(api: httpx.AsyncClient) -> None:
    answer = await complete(api, prompt=[fake_engine.INT4], max_tokens=3)
    told = answer["usage"]["morph"]
    assert [told[name] for name in ("full", "int8", "int4")] == [0, 0, 3]


async def test_usage_tells_the_longest_wait_of_the_choices(api: httpx.AsyncClient) -> None:
    answer = await complete(api, prompt=["import os", "def"], max_tokens=2)
    assert answer["usage"]["morph"]["queue_s"] == fake_engine.QUEUED_S


async def test_a_stream_joins_to_the_whole(api: httpx.AsyncClient) -> None:
    whole = await complete(api, prompt="x = 'née 🦉'\n", max_tokens=25)
    answer = await post(api, "/v1/completions", prompt="x = 'née 🦉'\n", max_tokens=25, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == whole["choices"][0]["text"] and "🦉" in "".join(texts)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_stream_of_several_prompts_keeps_them_apart(api: httpx.AsyncClient) -> None:
    answer = await post(
        api,
        "/v1/completions",
        prompt=["import os", "def"],
        max_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = events(answer.text)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["import os", "defdef"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


async def test_a_stop_string_ends_the_text_before_it(
    api: httpx.AsyncClient, engine_thread: EngineThread
) -> None:
    answer = await complete(api, prompt="import os, re\n", max_tokens=500, stop=["e\ni", "zz"])
    assert answer["choices"][0]["text"] == "import os, r"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 20
    while len(engine_thread.engine.aborted) != 1:
        await asyncio.sleep(0.001)


async def test_a_stop_token_is_not_part_of_the_text(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    first, second = tokenizer.encode("import os", 10)
    answer = await complete(api, prompt=[first, second], stop_token_ids=[second])
    assert answer["choices"][0]["text"] == "import"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


async def test_a_chat_fills_what_fits_unless_told(api: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = await post(api, "/v1/chat/completions", messages=messages)
    usage = answer.json()["usage"]
    assert usage["total_tokens"] == fake_engine.MAX_MODEL_LEN
    for limit in ({"max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}):
        answer = await post(api, "/v1/chat/completions", messages=messages, **limit)
        choice = answer.json()["choices"][0]
        assert choice["message"]["role"] == "assistant"
        assert "user: hi\nassistant:".startswith(choice["message"]["content"])
        assert answer.json()["usage"]["completion_tokens"] == 7


async def test_a_chat_stream_opens_with_the_role_and_closes_with_usage(
    api: httpx.AsyncClient,
) -> None:
    answer = await post(
        api,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *chunks, last = events(answer.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "user: h"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 3


async def test_a_request_the_engine_refuses_is_a_400_with_its_numbers(
    api: httpx.AsyncClient,
) -> None:
    for stream in (False, True):
        answer = await post(
            api, "/v1/completions", prompt=[fake_engine.REFUSE], max_tokens=3, stream=stream
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "it would need 99 blocks, there are 42"


async def test_an_engine_that_dies_is_told_to_everyone(
    api: httpx.AsyncClient, serving: Serving
) -> None:
    streaming = asyncio.create_task(
        post(api, "/v1/completions", prompt=[5], max_tokens=1000, stream=True)
    )
    while serving.engine.snapshot.num_generated < 20:  # its first piece has been sent
        await asyncio.sleep(0.001)
    answer = await post(api, "/v1/completions", prompt=[fake_engine.CRASH])
    assert answer.status_code == 503 and "told to crash" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers
    last = (await streaming).text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    for answer in (await api.get("/health"), await post(api, "/v1/completions", prompt="a")):
        assert answer.status_code == 503
        assert "told to crash" in answer.json()["error"]["message"]


async def test_a_draining_server_finishes_and_takes_nothing_new(
    api: httpx.AsyncClient, serving: Serving
) -> None:
    running = asyncio.create_task(complete(api, prompt="a", max_tokens=50))
    while not serving.engine.num_requests:
        await asyncio.sleep(0.001)
    serving.stopping.set()
    refused = await post(api, "/v1/completions", prompt="a")
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert (await api.get("/health")).status_code == 200
    assert (await api.get("/ready")).status_code == 503
    assert (await running)["usage"]["completion_tokens"] == 50
    await serving.idle()


async def test_a_full_queue_is_a_503_and_counts_every_prompt(
    api: httpx.AsyncClient, serving: Serving
) -> None:
    serving.admission.max_requests = 4
    running = asyncio.create_task(
        post(api, "/v1/completions", prompt=[[fake_engine.MUTE]] * 3, max_tokens=5)
    )
    while serving.engine.num_requests < 3:
        await asyncio.sleep(0.001)
    refused = await post(api, "/v1/completions", prompt=["a", "b"])
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    message = refused.json()["error"]["message"]
    assert message == "the queue is full: 4 of 4 prompts are in flight"
    assert (await post(api, "/v1/completions", prompt="a")).status_code == 200
    serving.admission.max_requests = 3
    assert (await api.post("/v1/completions", content=b"not read")).status_code == 503
    assert (await api.get("/ready")).status_code == 200
    serving.engine.abort_all()
    await running
    assert serving.admission.num_prompts == serving.admission.num_calls == 0
    assert (await post(api, "/v1/completions", prompt=["a", "b", "c", "d"])).status_code == 400


async def test_an_aborted_request_is_a_503_or_an_error_event(
    api: httpx.AsyncClient, serving: Serving
) -> None:
    requests = [
        asyncio.create_task(
            post(api, "/v1/completions", prompt=[5], max_tokens=1000, stream=stream)
        )
        for stream in (False, True)
    ]
    while serving.engine.num_requests < 2 or serving.engine.snapshot.num_generated < 20:
        await asyncio.sleep(0.001)
    serving.engine.abort_all()
    whole, stream = await asyncio.gather(*requests)
    assert whole.status_code == 503 and "aborted" in whole.json()["error"]["message"]
    assert "aborted" in stream.text.split("\n\n")[-2] and "[DONE]" not in stream.text


async def test_the_state_is_the_snapshot_and_latencies(api: httpx.AsyncClient) -> None:
    await complete(api, prompt="a")
    state = (await api.get("/morph/v1/state")).json()
    assert state["layers"] == ["full", "int4", "full", "full"] and state["blocks_max"] == 80
    assert state["events"][0]["kind"] == "demote"
    assert state["latency"]["ttft_s"].keys() == state["latency"]["tpot_s"].keys()
    assert state["latency"]["ttft_s"].keys() == {"p50", "p95", "p99"}


async def test_the_small_endpoints(api: httpx.AsyncClient) -> None:
    models = (await api.get("/v1/models")).json()
    assert models["object"] == "list" and models["data"][0]["id"] == "demo"
    assert models["data"][0]["max_model_len"] == fake_engine.MAX_MODEL_LEN
    assert set((await api.get("/version")).json()) == {"version"}
    metrics = await api.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "morph:num_requests_running 0.0" in metrics.text


async def test_a_model_is_found_by_its_name(api: httpx.AsyncClient) -> None:
    listed = (await api.get("/v1/models")).json()["data"][0]
    assert (await api.get("/v1/models/demo")).json() == listed
    for name in ("other", "a/b", ""):
        missing = await api.get(f"/v1/models/{name}")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_text_becomes_tokens_and_text_again(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    answer = (await post(api, "/tokenize", model="demo", prompt="import os")).json()
    assert answer["tokens"] == tokenizer.encode("import os", 10)
    assert answer["count"] == 2 and answer["max_model_len"] == fake_engine.MAX_MODEL_LEN
    text = (await post(api, "/detokenize", tokens=answer["tokens"])).json()
    assert text == {"prompt": "import os"}
    chat = (await post(api, "/tokenize", messages=[{"role": "user", "content": "hi"}])).json()
    assert tokenizer.decode(chat["tokens"]) == "user: hi\nassistant:"
    neither = await post(api, "/tokenize")
    assert neither.status_code == 400 and neither.json()["error"]["param"] == "prompt"


async def test_request_ids_are_echoed_if_they_are_clean(api: httpx.AsyncClient) -> None:
    echoed = await api.get("/health", headers={"x-request-id": "mine-1"})
    assert echoed.headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200):
        replaced = await api.get("/nowhere", headers={"x-request-id": bad})
        assert len(replaced.headers["x-request-id"]) == 32


async def test_cached_tokens_and_prompts_count_once_per_prompt(api: httpx.AsyncClient) -> None:
    usage = (await complete(api, prompt=[fake_engine.CACHED, 5, 6], n=3, max_tokens=2))["usage"]
    assert usage["prompt_tokens"] == 3 and usage["completion_tokens"] == 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_the_engine_is_told_what_was_asked(
    api: httpx.AsyncClient, engine_thread: EngineThread
) -> None:
    headers = {"x-morph-min-precision": "int8", "x-slo-ttft-ms": "250", "x-slo-tpot-ms": "40"}
    body = {"prompt": [5], "n": 2, "seed": 7, "cache_salt": "mine", "logit_bias": {"9": -1}}
    assert (await api.post("/v1/completions", json=body, headers=headers)).status_code == 200
    first, second = engine_thread.engine.submitted
    assert first.demands == second.demands == Demands(Variant.INT8, Slo(0.25, 0.04), "mine")
    assert (first.params.seed, second.params.seed) == (7, 8)
    assert first.params.logit_bias == {9: -1}
    await complete(api, prompt="a")
    assert engine_thread.engine.submitted[-1].demands == Demands()


async def test_logprobs_tell_the_bytes_of_a_part_of_a_character(
    api: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    owl = tokenizer.encode("🦉", 10)
    assert len(owl) > 1
    answer = await complete(api, prompt=owl, max_tokens=len(owl), logprobs=1)
    told = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "🦉" and told["tokens"][0].startswith("\ufffd")
    assert told["text_offset"] == [0] * len(owl)
    fields = {"max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    messages = [{"role": "user", "content": "hi"}]
    chat = (await post(api, "/v1/chat/completions", messages=messages, **fields)).json()
    content = chat["choices"][0]["logprobs"]["content"]
    told_bytes = b"".join(bytes(entry["bytes"]) for entry in content)
    assert told_bytes.decode() == chat["choices"][0]["message"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 8
