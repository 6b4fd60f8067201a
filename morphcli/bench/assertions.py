"""What a run has to show, for scripts: `--assert "morph.slo_attainment>=0.95"`."""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import PolicySummary

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_FORM = re.compile(r"\s*([\w:.]+?)\s*(>=|<=|==|>|<)\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class Assertion:
    """A figure of `summary.json` under `policies`, compared with a number."""

    text: str
    policy: str | None  # None: of every policy
    path: tuple[str, ...]  # of the figure
    compare: Callable[[float, float], bool]
    wanted: float


def parse_assertions(texts: Sequence[str], policies: Sequence[str]) -> list[Assertion]:
    """Raises ConfigError for one that cannot be understood."""
    return [_parse(text, policies) for text in texts]


def _parse(text: str, policies: Sequence[str]) -> Assertion:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--assert {text!r}: write [POLICY.]FIGURE>=NUMBER, as morph.slo_attainment>=0.95 or "
            "ttft_s.p95<=0.5; figures are named as in summary.json"
        )
    named, sign, number = match.groups()
    policy = next((p for p in policies if named.startswith(f"{p}.")), None)
    path = tuple((named if policy is None else named.removeprefix(f"{policy}.")).split("."))
    if path[0] not in PolicySummary.__struct_fields__:
        known = ", ".join(PolicySummary.__struct_fields__[1:])
        raise ConfigError(
            f"--assert {text!r}: a policy of this run is one of {', '.join(policies)}; a figure is "
            f"one of {known}"
        )
    return Assertion(text.strip(), policy, path, _COMPARE[sign], float(number))


def broken(summary: Summary, assertions: Sequence[Assertion]) -> Iterator[str]:
    """A sentence for each assertion that does not hold, with the figure."""
    for wanted in assertions:
        for policy in summary.policies:
            if wanted.policy not in (None, policy.policy):
                continue
            value = _figure(policy, wanted.path)
            if value is None or not wanted.compare(value, wanted.wanted):
                shown = "unknown" if value is None else f"{value:.6g}"
                yield f"{wanted.text} does not hold: {policy.policy} has {shown}"


def _figure(policy: PolicySummary, path: Sequence[str]) -> float | None:
    found = msgspec.to_builtins(policy)
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return float(found) if is_number else None
