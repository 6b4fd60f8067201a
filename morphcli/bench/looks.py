"""How each policy looks in every drawing of a report: by colour, marker and line."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Look:
    colour: str  # its name among the drawings' colours
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]


_LOOKS = {
    "full": Look("ink", "o", "-"),
    "static:all": Look("orange", "s", "--"),
    "morph": Look("green", "^", "-"),
    "morph:performance": Look("blue", "v", "-."),
    "morph:accuracy": Look("pink", "D", ":"),
}
_OTHERS = (
    Look("yellow", "P", (0, (5, 1))),
    Look("blue", "X", (0, (1, 1))),
    Look("muted", "*", (0, (3, 1, 1, 1))),
    Look("orange", "h", (0, (4, 2, 1, 2))),
)


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """Of each policy; those without a look of their own take what is left, in order."""
    others = [policy for policy in policies if policy not in _LOOKS]
    found = {policy: _OTHERS[i % len(_OTHERS)] for i, policy in enumerate(others)}
    return {policy: _LOOKS.get(policy) or found[policy] for policy in policies}
