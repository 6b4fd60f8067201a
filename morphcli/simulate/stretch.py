"""Steps in which nothing happens but a token for each request, as one piece of time."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decode steps in which nothing happens but a token for each request."""

    steps: int
    start_s: float
    first_s: float  # duration of the first one
    growth_s: float  # by which each is longer than the one before

    def end_s(self, steps: int) -> float:
        """When so many of them are done."""
        growth_s = self.growth_s * steps * (steps - 1) / 2
        return self.start_s + steps * self.first_s + growth_s

    def begun_before(self, time_s: float) -> int:
        """How many have begun, and so are carried to their end, by this time."""
        wanted = time_s - self.start_s
        if self.growth_s > 0:
            linear = self.first_s - self.growth_s / 2
            steps = (math.sqrt(linear**2 + 2 * self.growth_s * wanted) - linear) / self.growth_s
        else:
            steps = wanted / self.first_s
        return min(self.steps, math.ceil(steps - 1e-9))
