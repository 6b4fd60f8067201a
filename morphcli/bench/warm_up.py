"""Before a measurement: the form of request that a server takes is found, and it is made warm."""

from collections.abc import Iterator, Sequence

import msgspec

from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest
from morphserve.morphcli.bench.dialect import Dialect, dialects
from morphserve.morphcli.bench.prompts import Prompts
from morphserve.morphcli.bench.replay import ReplayFailed, replay

_TOKENS = 8  # of each answer
_CONCURRENT = 4  # short requests, beside the long one
_REFUSED = (400, 404, 405, 422)  # this form; another one may do


def warm_up(plan: Plan, prompts: Prompts) -> Plan:
    """`plan` in the form that its server takes, after a long prompt and a few short ones.

    Raises ReplayFailed if the server answers in no form.
    """
    dialect = _find_dialect(plan, prompts)
    requests = plan.requests
    if not dialect.takes_ids:
        requests = [
            msgspec.structs.replace(request, prompt=prompts.as_text(request.prompt))
            for request in requests
        ]
    plan = msgspec.structs.replace(plan, dialect=dialect, requests=requests)
    _ask(plan, [_unlike_longest(plan), *[prompts.as_text(prompts.warm_up)] * _CONCURRENT])
    return plan


def notes(plan: Plan, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What a reader of the figures must know of how the server was asked, and answered."""
    if plan.dialect.is_chat:
        yield "prompts are longer than planned: as chats, they have a template around them"
    if not plan.dialect.takes_ids:
        yield "all prompts are sent as text: a few have some tokens more or less than planned"
    if not plan.dialect.forces_length and not plan.graded:
        yield "output lengths are not forced: the server refuses ignore_eos and min_tokens"
    if any(outcome.counts_pieces for outcome in outcomes if outcome.error is None):
        yield "streamed pieces are counted as tokens: the server sends no usage"


def _find_dialect(plan: Plan, prompts: Prompts) -> Dialect:
    refusals: list[Outcome] = []
    for dialect in dialects():
        asked = msgspec.structs.replace(plan, dialect=dialect)
        (answer,) = _ask(asked, [prompts.as_text(prompts.warm_up)])
        if answer.error is None:
            return msgspec.structs.replace(dialect, takes_ids=_takes_ids(asked))
        refusals.append(answer)
        if answer.status not in _REFUSED:
            break
    known = [answer for answer in refusals if answer.status != 404] or refusals
    raise ReplayFailed(f"{plan.url} did not answer the warm-up request: {known[-1].error}")


def _takes_ids(plan: Plan) -> bool:
    """True also where no prompt is of token ids."""
    ids = next((r.prompt for r in plan.requests if not isinstance(r.prompt, str)), None)
    if ids is None:
        return True
    if plan.dialect.is_chat:
        return False
    (answer,) = _ask(plan, [ids])
    return answer.status not in _REFUSED


def _unlike_longest(plan: Plan) -> str | list[int]:
    """The longest prompt without its beginning: no server knows the original by it."""
    prompt = max(plan.requests, key=lambda request: request.prompt_tokens).prompt
    return prompt[len(prompt) // 16 + 1 :] or prompt


def _ask(plan: Plan, prompts: Sequence[str | list[int]]) -> list[Outcome]:
    """All at once."""
    requests = [PlannedRequest(i, 0.0, prompt, 0, _TOKENS) for i, prompt in enumerate(prompts)]
    asked = msgspec.structs.replace(plan, requests=requests, graded=False, token_ids=False)
    return replay(asked, lambda _: None)[1]
