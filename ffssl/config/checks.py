"""Checks of option values, as fastargs' checkers. None of them imports torch."""

import math
from typing import Any, TypeAlias

from fastargs.validation import Checker


class Number(Checker):
    """A number of type `kind` between two bounds.

    Unlike fastargs' own check it takes neither 1.5 nor true for an integer.
    """

    def __init__(self, kind: type[int] | type[float], low: float, high: float = float("inf")):
        self.kind, self.low, self.high = kind, low, high

    def check(self, value: Any) -> float:
        number = self.kind(value)
        in_bounds = self.low <= number <= self.high and math.isfinite(number)
        if isinstance(value, bool) or not in_bounds or number != float(value):
            raise ValueError
        return number

    def help(self) -> str:
        kind = "an integer" if self.kind is int else "a number"
        if self.high == float("inf"):
            return f"{kind} of {self.low:g} or more"
        return f"{kind} from {self.low:g} to {self.high:g}"


class Switch(Checker):
    """true or false. fastargs' own check takes the word "false" for true."""

    def check(self, value: object) -> bool:
        return {"true": True, "false": False}[str(value).lower()]

    def help(self) -> str:
        return "true or false"


class Choice(Checker):
    """One of the given words, listed in their order."""

    def __init__(self, *words: str):
        self.words = words

    def check(self, value: Any) -> str:
        if value is False and "off" in self.words:  # as YAML reads a bare off
            return "off"
        if value not in self.words:
            raise ValueError
        return value

    def help(self) -> str:
        return f"one of {', '.join(self.words)}"


class Stages(Checker):
    """Sides in pixels and their shares of the epochs: 112:0.75, 224:0.25."""

    def check(self, value: object) -> str:
        sides, shares = zip(*read_stages(str(value)), strict=True)
        if min(sides) < 1 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "sides and shares that sum to 1, as 112:0.75, 224:0.25"


def read_stages(text: str) -> list[tuple[int, float]]:
    """Return the side in pixels and the share of the epochs of each stage, in order."""
    stages = (stage.split(":") for stage in text.split(","))
    return [(int(side), float(share)) for side, share in stages]


class Files(Checker):
    """Paths or patterns, in a text with commas or a list. A path in a list has no comma."""

    def check(self, value: object) -> str:
        if not isinstance(value, list):
            return str(value)
        if not value or any(not isinstance(path, str) or "," in path for path in value):
            raise ValueError
        return ",".join(value)

    def help(self) -> str:
        return "a path, several with commas or in a list, or a pattern"


class Text(Checker):
    """Any text."""

    def check(self, value: object) -> str:
        return str(value)

    def help(self) -> str:
        return "a string"


def integer(low: int) -> Number:
    return Number(int, low)


def number(low: float, high: float = float("inf")) -> Number:
    return Number(float, low, high)


# The types of the options that methods declare, and what their values must be.
Size: TypeAlias = int
Count: TypeAlias = int
Weight: TypeAlias = float
Temperature: TypeAlias = float
Fraction: TypeAlias = float
CHECKS: dict[str, Checker] = {
    "Size": integer(1),
    "Count": integer(0),
    "Weight": number(0),
    "Temperature": number(1e-6),
    "Fraction": number(0, 1),
    "bool": Switch(),
}
