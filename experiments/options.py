"""The options of the experiments: the kinds of numbers that they take, and those that several experiments have.

An experiment's Config is made of those that do something in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

import fnet


class Kind(NamedTuple):
    """Numbers that an option takes."""

    read: type
    sign: str  # in --help
    fits: Callable[[Any], bool]
    words: str


def read_numbers(kind: Kind, words: Sequence[str], expected: str, least: int, different: bool = False) -> tuple:
    """The numbers that the words stand for; ValueError says what was ``expected``."""
    try:
        numbers = tuple(map(kind.read, words))
    except ValueError:
        numbers = None
    if (
        numbers is None
        or len(numbers) < least
        or not all(map(kind.fits, numbers))
        or (different and len({*numbers}) < len(numbers))
    ):
        raise ValueError(f"{' '.join(words)!r}; expected {expected}")
    return numbers


def one(kind: Kind, none: bool = False) -> PrimitiveConstructorSpec:
    """How tyro reads a number of this kind, or the word None for ``none``; others are refused."""

    def read(words: list[str]):
        return None if none and words == ["None"] else read_numbers(kind, words, kind.words + " or None" * none, 1)[0]

    def fits(value) -> bool:
        return isinstance(value, int | float) or (none and value is None)

    return PrimitiveConstructorSpec(1, "{None}|" * none + kind.sign, read, fits, lambda value: [str(value)])


def some(kind: Kind, least: int = 1, different: bool = False) -> PrimitiveConstructorSpec:
    """How tyro reads numbers of this kind, at least so many and if need be ``different`` ones; others are refused."""
    expected = f"{least} or more, {'all different, ' * different}each {kind.words}"

    def fits(value) -> bool:
        return isinstance(value, tuple) and all(isinstance(number, int | float) for number in value)

    return PrimitiveConstructorSpec(
        "*",
        kind.sign + " ...",
        lambda words: read_numbers(kind, words, expected, least, different),
        fits,
        lambda value: [*map(str, value)],
    )


COUNT = Kind(int, "INT>=1", lambda n: n >= 1, "a whole number of at least 1")
WHOLE = Kind(int, "INT>=0", lambda n: n >= 0, "a whole number of at least 0")
SEED = Kind(int, "INT>=0", lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647")
AMOUNT = Kind(float, "FLOAT>=0", lambda x: 0 <= x < math.inf, "a number of at least 0")
POSITIVE = Kind(float, "FLOAT>0", lambda x: 0 < x < math.inf, "a number above 0")
SHARE = Kind(float, "0..1", lambda x: 0 <= x <= 1, "a number from 0 to 1")

Count = Annotated[int, one(COUNT)]
CountOrNone = Annotated[int | None, one(COUNT, none=True)]
Counts = Annotated[tuple[int, ...], some(COUNT)]
Widths = Annotated[tuple[int, ...], some(COUNT, least=0)]
Whole = Annotated[int, one(WHOLE)]
Wholes = Annotated[tuple[int, ...], some(WHOLE)]
Seed = Annotated[int, one(SEED)]
Seeds = Annotated[tuple[int, ...], some(SEED, different=True)]
Amount = Annotated[float, one(AMOUNT)]
AmountOrNone = Annotated[float | None, one(AMOUNT, none=True)]
Amounts = Annotated[tuple[float, ...], some(AMOUNT)]
Positive = Annotated[float, one(POSITIVE)]
Share = Annotated[float, one(SHARE)]
Shares = Annotated[tuple[float, ...], some(SHARE)]

RESUME = {(): True, ("yes",): True, ("no",): False, ("auto",): "auto"}  # by the words after --resume


def read_resume(words: list[str]) -> bool | str:
    """What ``--resume WORDS`` means; ValueError for words that it has no meaning for."""
    if tuple(words) not in RESUME:
        raise ValueError(f"{' '.join(words)!r}; expected auto, yes, no or nothing, which is yes")
    return RESUME[tuple(words)]


def is_resume(value) -> bool:
    return value in RESUME.values()


def show_resume(value: bool | str) -> list[str]:
    return ["auto" if value == "auto" else "yes" if value else "no"]


Resume = Annotated[bool | Literal["auto"], PrimitiveConstructorSpec("*", "[auto]", read_resume, is_resume, show_resume)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every experiment."""

    quiet: bool = False  # print nothing but errors
    explain: bool = False  # print what is compiled, and why
    cache: Path | None = Path("~/.cache/fnet/jax")  # jax's compilation cache; None compiles everything anew


@dataclasses.dataclass(frozen=True, kw_only=True)
class InFolder(Options):
    """Of an experiment that writes a folder."""

    run_dir: Path = Path("runs")  # the run's folder is RUN_DIR/EXPERIMENT/NAME
    name: str | None = None  # None takes the time of day


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded(Options):
    """Of an experiment that draws from one seed."""

    seed: Seed = 0  # of everything that is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByEngine(Options):
    """Of an experiment that either gradient engine can run."""

    engine: Literal["autodiff", "backprop"] | None = None  # None takes backprop, or both where they are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumable(InFolder):
    """Of an experiment that keeps checkpoints."""

    steps: CountOrNone = None  # the updates at which training ends; None takes the experiment's epochs
    resume: Resume = False  # go on with the run of --name, or the latest, if it was stopped; auto: or begin one


ENGINES = {"autodiff": fnet.autodiff, "backprop": fnet.backprop}


def engine_of(config: ByEngine):
    """The gradient engine of ``--engine``; by hand where none is given."""
    return ENGINES[config.engine or "backprop"]
