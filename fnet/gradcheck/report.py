"""What an audit found: one `LeafCheck` per leaf, in a `Report` that prints itself, in text, JSON, HTML and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

VERDICTS = ("ok", "kink", "imprecise", "unverified", "wrong")
FINE = ("ok", "kink", "imprecise")


class Rung(NamedTuple):
    """One rung of the precision ladder: errors relative to the leaf's largest entry in float64."""

    dtype: str
    error: float  # of the claimed gradient
    expected: float  # of autodiff at the same precision: what rounding makes of a right gradient
    note: str = ""  # why the rung could not be measured

    @property
    def erred(self) -> str:
        """Which of the two errs, ``claimed`` or ``autodiff``: by 10 times the rounding and the other's error."""
        eps = float(jnp.finfo(self.dtype).eps)
        for name, mine, other in (("claimed", self.error, self.expected), ("autodiff", self.expected, self.error)):
            if math.isfinite(other) and not mine <= 10 * max(eps, other):
                return name
        return ""


class LeafCheck(NamedTuple):
    """One leaf of the gradient.

    Errors are those of the claimed gradient against the expected one in float64; relative ones are relative to the
    largest entry of the leaf's own expected gradient, whatever its size.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str  # that the caller gave the parameter
    verdict: str  # "ok", "wrong", "kink", "imprecise" or "unverified"
    absolute: float  # the largest absolute error
    relative: float  # the same, relative to the largest entry
    worst: tuple[int, ...]  # its index
    claimed: float  # the claimed value there
    expected: float  # the expected one: autodiff's, or the measured slope
    ulps: float  # the error there in units in the last place of the expected value in float64
    cause: str = ""  # in plain words
    evidence: tuple[str, ...] = ()
    power: float = math.inf  # the smallest fault in one entry that would have been seen, relative to the largest entry
    taylor: tuple[tuple[float, float], ...] = ()  # (t, |f(t) - f(0) - t slope|) along one direction
    order: float | None = None  # in which that remainder vanishes: 2 when right, 1 when wrong
    ladder: tuple[Rung, ...] = ()
    errors: np.ndarray | None = None  # |claimed - expected| / scale as a matrix of at most 64 x 64 blocks

    def describe(self) -> str:
        """The verdict in one line."""
        values = f"{self.claimed:.6g}", f"{self.expected:.6g}"
        shown = self.verdict == "wrong" and values[0] != values[1] and not math.isnan(self.expected)
        at = f" at {list(self.worst)}: {values[0]}, expected {values[1]}" if shown else ""
        return self.verdict + at + (f" ({self.cause})" if self.cause else "")


class Intermediate(NamedTuple):
    """A tapped value: its gradient by the caller against the true one."""

    name: str
    shape: tuple[int, ...]
    verdict: str  # "ok" or "wrong"
    agreement: str  # "exact", "13 digits", or "wrong"
    relative: float
    worst: tuple[int, ...]
    claimed: float
    expected: float
    cause: str = ""

    def describe(self) -> str:
        """The verdict in one line."""
        at = (
            f" at {list(self.worst)}: {self.claimed:.6g}, expected {self.expected:.6g}"
            if self.verdict == "wrong"
            else ""
        )
        return self.agreement + at + (f" ({self.cause})" if self.cause else "")


class Cost(NamedTuple):
    """What one gradient costs at the caller's precision, as its compiled program says.

    ``seconds`` are the median of five calls, or of as many more as take 50 ms together, at most 1,000.
    """

    name: str
    flops: float
    bytes: float  # read and written
    peak: float  # bytes of arguments, results and temporary buffers together
    seconds: float

    def row(self) -> tuple[str, ...]:
        """Its cells in a table; what the compiler does not say is a dash."""
        counts = ("–" if math.isnan(n) else f"{n:,.0f}" for n in (self.flops, self.bytes, self.peak))
        return self.name, *counts, f"{self.seconds * 1e3:.3f} ms"


class Report(NamedTuple):
    """The result of an audit. Printing it gives a row per leaf; ``ok`` is one boolean."""

    leaves: tuple[LeafCheck, ...]
    intermediates: tuple[Intermediate, ...] = ()  # in the order of the backward pass
    costs: tuple[Cost, ...] = ()
    notes: tuple[str, ...] = ()  # the settings in force, and what was seen besides
    settings: Mapping[str, str] = {}

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and nothing is left unverified."""
        return all(leaf.verdict in FINE for leaf in self.leaves) and all(i.verdict == "ok" for i in self.intermediates)

    @property
    def first_wrong(self) -> str:
        """The first fault that the backward pass meets: the first wrong intermediate, or the last wrong row."""
        for intermediate in self.intermediates:
            if intermediate.verdict != "ok":
                return intermediate.name
        return next((leaf.path for leaf in reversed(self.leaves) if leaf.verdict == "wrong"), "")

    def raise_if_wrong(self) -> Report:
        """The report itself; raises AssertionError with the table unless it is ``ok``."""
        if not self.ok:
            wrong = any(x.verdict == "wrong" for x in (*self.leaves, *self.intermediates))
            raise AssertionError(f"the gradient is {'wrong' if wrong else 'not verified'}\n{self}")
        return self

    def __str__(self) -> str:
        rows = [("leaf", "shape", "dtype", "error", "sees", "order", "verdict")]
        for leaf in self.leaves:
            order = "" if leaf.order is None else f"{leaf.order:.1f}"
            rows.append(
                (
                    leaf.path,
                    str(leaf.shape),
                    leaf.dtype,
                    "" if math.isnan(leaf.relative) else f"{leaf.relative:.1e}",
                    f"{leaf.power:.0e}",
                    order,
                    leaf.describe(),
                )
            )
        parts = [columns(rows)]
        if self.intermediates:
            rows = [("intermediate", "shape", "error", "agrees")]
            rows += [(i.name, str(i.shape), f"{i.relative:.1e}", i.describe()) for i in self.intermediates]
            parts.append(columns(rows))
        ladders = [leaf for leaf in self.leaves if leaf.ladder]
        if ladders:
            dtypes = list(dict.fromkeys(rung.dtype for leaf in ladders for rung in leaf.ladder))
            rows = [("error (of autodiff)", *dtypes)]
            for leaf in ladders:
                rungs = {rung.dtype: rung for rung in leaf.ladder}
                rows.append((leaf.path, *(show_rung(rungs.get(dtype)) for dtype in dtypes)))
            erred = any(rung.erred for leaf in ladders for rung in leaf.ladder if not rung.note)
            parts.append(columns(rows) + (f"\n{ERRED}" if erred else ""))
        if self.costs:
            rows = [("cost", "flops", "bytes", "peak", "median")]
            rows += [cost.row() for cost in self.costs]
            parts.append(columns(rows))
        if self.notes:
            parts.append("\n".join(self.notes))
        return "\n\n".join(parts)

    def to_dict(self) -> dict:
        """The report as plain data: numbers, texts, lists and dicts; what is not finite is given as text."""
        return {
            "ok": self.ok,
            "first_wrong": self.first_wrong,
            "leaves": [plain(leaf._asdict()) for leaf in self.leaves],
            "intermediates": [plain(i._asdict()) for i in self.intermediates],
            "costs": [plain(c._asdict()) for c in self.costs],
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """The same as JSON text (RFC 8259: NaN and infinities are strings)."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Write a picture: errors per leaf, Taylor remainders, precision ladder. Needs matplotlib."""
        from fnet.report.audit_picture import plot_audit

        plot_audit(self, path)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page with the tables and the pictures. Needs matplotlib."""
        from fnet.report.audit import audit_page

        Path(path).write_text(audit_page(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        from fnet.report.audit import audit_tables

        return audit_tables(self)


ERRED = "✗ errs: by 10 times its dtype's rounding and the other's error"


def show_rung(rung: Rung | None) -> str:
    """``1e-07 (2e-07)``: the claimed gradient's error and autodiff's; ``✗`` behind the one that errs."""
    if rung is None or rung.note:
        return "" if rung is None else rung.note
    marks = {"": ("", ""), "claimed": (" ✗", ""), "autodiff": ("", " ✗")}[rung.erred]
    return f"{rung.error:.0e}{marks[0]} ({rung.expected:.0e}{marks[1]})"


def columns(rows) -> str:
    """Rows of texts as aligned columns, the last one ragged."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plain(value):
    """Arrays, tuples and numbers as JSON knows them."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
