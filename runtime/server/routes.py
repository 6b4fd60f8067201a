"""The table of routes: what is served, to whom, with which bodies."""

from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Event
from morphserve.runtime.server.about import PROMETHEUS, About, Health, Ready, Version
from morphserve.runtime.server.admin import Admin, PinRequest, StepRequest, Target
from morphserve.runtime.server.completions import Completions
from morphserve.runtime.server.demands import MIN_PRECISION, SLO_TPOT, SLO_TTFT
from morphserve.runtime.server.documentation import HTML, Documentation
from morphserve.runtime.server.endpoint import Access, Endpoint, Header
from morphserve.runtime.server.events import LAST_EVENT_ID, EventLog
from morphserve.runtime.server.page import page, script
from morphserve.runtime.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from morphserve.runtime.server.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    DetokenizeReply,
    Model,
    ModelList,
    Tokens,
)
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.state import State
from morphserve.runtime.server.texts import Texts

_MILLISECONDS = {"type": "number", "exclusiveMinimum": 0}
_DEMANDS = (
    Header(
        MIN_PRECISION,
        {"enum": [variant.value for variant in Variant]},
        "The lowest precision of any layer that may serve this request; it waits for it.",
    ),
    Header(SLO_TTFT, _MILLISECONDS, "Milliseconds to the first token that are fine."),
    Header(SLO_TPOT, _MILLISECONDS, "Milliseconds per further token that are fine."),
)


def endpoints(serving: Serving, sse_keep_alive_s: float, *, keys_wanted: bool) -> list[Endpoint]:
    """Every endpoint, in the order of the documentation."""
    documentation = Documentation(keys_wanted=keys_wanted)
    documentation.table = table = [
        *_generating(Completions(serving, sse_keep_alive_s)),
        *_tokenizing(Texts(serving)),
        *_telling(About(serving)),
        *_following(EventLog(serving, sse_keep_alive_s)),
        *_administering(Admin(serving)),
        *_describing(documentation),
    ]
    return table


def _generating(api: Completions) -> list[Endpoint]:
    tag = "Generation"
    return [
        Endpoint(
            "POST",
            "/v1/completions",
            api.completions,
            tag,
            "Continue a prompt, or several.",
            takes=CompletionRequest,
            answers=Completion,
            streams=Completion,
            headers=_DEMANDS,
            errors=[404],
        ),
        Endpoint(
            "POST",
            "/v1/chat/completions",
            api.chat,
            tag,
            "Answer a conversation.",
            takes=ChatRequest,
            answers=ChatCompletion,
            streams=ChatChunk,
            headers=_DEMANDS,
            errors=[404],
        ),
    ]


def _tokenizing(api: Texts) -> list[Endpoint]:
    tag = "Tokens"
    return [
        Endpoint(
            "POST",
            "/tokenize",
            api.tokenize,
            tag,
            "Token ids of a prompt or a chat.",
            takes=TokenizeRequest,
            answers=Tokens,
            errors=[404],
        ),
        Endpoint(
            "POST",
            "/detokenize",
            api.detokenize,
            tag,
            "The text of token ids.",
            takes=DetokenizeRequest,
            answers=DetokenizeReply,
            errors=[404],
        ),
    ]


def _telling(api: About) -> list[Endpoint]:
    models, server, public = "Models", "Server", Access.PUBLIC
    return [
        Endpoint("GET", "/v1/models", api.models, models, "The served model.", answers=ModelList),
        Endpoint(
            "GET",
            "/v1/models/{name:path}",
            api.model,
            models,
            "A model by name.",
            answers=Model,
            errors=[404],
        ),
        Endpoint("GET", "/health", api.health, server, "Whether it lives.", public, answers=Health),
        Endpoint(
            "GET",
            "/ready",
            api.ready,
            server,
            "Whether it takes requests.",
            public,
            answers=Ready,
            errors=[503],
        ),
        Endpoint("GET", "/version", api.version, server, "Its version.", answers=Version),
        Endpoint(
            "GET", "/metrics", api.metrics, server, "Numbers for Prometheus.", media=PROMETHEUS
        ),
        Endpoint(
            "GET",
            "/morph/v1/state",
            api.state,
            server,
            "Layers, memory, queue, latency and the latest events at one moment.",
            answers=State,
        ),
    ]


def _following(api: EventLog) -> list[Endpoint]:
    return [
        Endpoint(
            "GET",
            "/morph/v1/events",
            api.events,
            "Server",
            "Swaps, decisions, preemptions and errors as they happen.",
            streams=Event,
            headers=[
                Header(
                    LAST_EVENT_ID,
                    {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
                    "Events after this one are sent, as far as they are kept.",
                )
            ],
            errors=[400],
        )
    ]


def _administering(api: Admin) -> list[Endpoint]:
    tag, admin = "Administration", Access.ADMIN
    return [
        Endpoint(
            "POST",
            "/morph/v1/pin",
            api.pin,
            tag,
            "Hold a rung, whatever the traffic.",
            admin,
            takes=PinRequest,
            answers=Target,
        ),
        Endpoint(
            "POST",
            "/morph/v1/step",
            api.step,
            tag,
            "Hold the rung beside the one that is wanted now.",
            admin,
            takes=StepRequest,
            answers=Target,
        ),
        Endpoint(
            "POST",
            "/morph/v1/free",
            api.free,
            tag,
            "Leave the rung to the controller again.",
            admin,
            answers=Target,
        ),
    ]


def _describing(api: Documentation) -> list[Endpoint]:
    tag, public = "Documentation", Access.PUBLIC
    return [
        Endpoint("GET", "/", page, tag, "This server live in a browser.", public, media=HTML),
        Endpoint("GET", "/page.js", script, tag, "Its script.", public, media="text/javascript"),
        Endpoint("GET", "/docs", api.page, tag, "This page.", public, media=HTML),
        Endpoint("GET", "/openapi.json", api.openapi, tag, "This document.", public),
    ]
