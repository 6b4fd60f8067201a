"""What a run has to show, for scripts: `--assert "morph.slo_attainment>=0.95"`."""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args, get_origin, get_type_hints

import msgspec

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import Summary

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
    if not _is_number(path):
        raise ConfigError(
            f"--assert {text!r}: {'.'.join(path)} is no number in summary.json; a latency has p50, "
            "p95 and p99, as ttft_s.p95<=0.5"
        )
    return Assertion(text.strip(), policy, path, _COMPARE[sign], float(number))


def _is_number(path: Sequence[str]) -> bool:
    """Whether a policy's figures can have a number there; told before hours of measuring."""
    kinds: set[object] = {PolicySummary}
    for name in path:
        kinds = {found for kind in kinds for found in _kinds_below(kind, name)}
    return bool(kinds & {int, float})


def _kinds_below(kind: object, name: str) -> set[object]:
    if get_origin(kind) is dict:  # of numbers by name
        return {get_args(kind)[1]}
    if not isinstance(kind, type) or not issubclass(kind, msgspec.Struct):
        return set()
    hint = get_type_hints(kind).get(name)
    return {hint} if get_origin(hint) is dict else {hint, *get_args(hint)}


def broken(summary: Summary, assertions: Sequence[Assertion]) -> Iterator[str]:
    """A sentence for each assertion that does not hold, with the figure.

    Of a policy whose run proves nothing, none holds.
    """
    for wanted in assertions:
        for policy in summary.policies:
            if wanted.policy not in (None, policy.policy):
                continue
            if policy.faults:
                why = "; ".join(policy.faults)
                yield f"{wanted.text} cannot be told: the run of {policy.policy} is invalid ({why})"
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
