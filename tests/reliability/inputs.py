"""Wrong requests."""

import asyncio
import json
import time

from clients import Answer, complete
from harness import Given, Rules, Server, serving

from morphserve.morphcli.bench.http import post_stream


def bad_inputs(rules: Rules, given: Given) -> None:
    """5.6: wrong requests are refused quickly, in one envelope, and harm nobody."""
    with serving(["--policy", "off"], log=given.folder / "bad.log") as server:
        asyncio.run(complete(server.url, max_tokens=4))
        slow, wrong, worst = [], [], 0.0
        for body in BAD_BODIES:
            answer = asyncio.run(_post(server, body))
            worst = max(worst, answer.total_s)
            if not 400 <= answer.status < 500 or not _is_envelope(answer.error):
                wrong.append((body[:60], answer.status, answer.error))
            if answer.total_s > 0.05:
                slow.append((body[:60], answer.total_s))
            assert asyncio.run(complete(server.url, max_tokens=2)).finished
    count = len(BAD_BODIES)
    rules.check(
        "bad input", f"{count} bodies: a 4xx in the envelope", f"{wrong or 'all'}", not wrong
    )
    seen = f"slowest {worst * 1000:.0f} ms"
    rules.check("bad input", f"{count} bodies: refused within 50 ms", f"{slow or seen}", not slow)


async def _post(server: Server, body: bytes) -> Answer:
    started = time.monotonic()
    async with post_stream(server.url, "/v1/completions", body) as response:
        text = (await response.read()).decode(errors="replace")
        return Answer(response.status, error=text, total_s=time.monotonic() - started)


def _is_envelope(text: str | None) -> bool:
    try:
        return {"message", "type", "param", "code"} <= json.loads(text or "")["error"].keys()
    except (ValueError, TypeError, LookupError):
        return False


def _fields(**fields: object) -> bytes:
    return json.dumps({"prompt": "a"} | fields).encode()


BAD_BODIES = [
    b"", b"{", b"[]", b"null", b"{}", b"a=1&b=2", b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}',
    b'{"prompt":"a","temperature":NaN}', b'{"prompt":"a","temperature":1e999}',
    b'{"prompt":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    _fields(max_tokens="abc"), _fields(max_tokens=-1), _fields(max_tokens=0),
    _fields(max_tokens=10**18), _fields(max_tokens=1.5), _fields(prompt="word " * 3000),
    _fields(prompt="x" * 1_900_000), _fields(prompt=""), _fields(prompt=[]), _fields(prompt=None),
    _fields(prompt=True), _fields(prompt=["a", 1]), _fields(prompt=[10**9]),
    _fields(prompt=[-5]), _fields(prompt=[2**70]), _fields(prompt=["a"] * 5000),
    _fields(model="gpt-4"), _fields(model="../../etc/passwd"), _fields(model="a\r\nb"),
    _fields(temperature=-1), _fields(temperature=1e9), _fields(top_p=0), _fields(top_p=2),
    _fields(top_k=-5), _fields(stop=["x"] * 100_000), _fields(stop=""), _fields(n=10**6),
    _fields(n=0), _fields(logprobs=10**6), _fields(logprobs=-1), _fields(seed=2**70),
    _fields(seed=-2), _fields(logit_bias={"1": 1e308}), _fields(logit_bias={"99999999": 1.0}),
    _fields(logit_bias={"a": 1.0}), _fields(stream="x"), _fields(presence_penalty=9.0),
    _fields(repetition_penalty=-1.0), _fields(min_p=2.0), _fields(tools=[{"type": "function"}]),
    _fields(response_format={"type": "json_schema", "json_schema": {"schema": {"type": 7}}}),
    _fields(guided_regex="(a+)+$"), _fields(min_tokens=17), _fields(stop_token_ids=[-1]),
]  # fmt: skip
