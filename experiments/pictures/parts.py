"""What several experiments draw and print alike. Legend: S seeds, X places along an axis, B images, H W their sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fnet.report.plots import new_figure

DOTTED = {"color": "gray", "linestyle": ":", "linewidth": 1}  # a line that curves are held against
BESIDE = {"rotation": 0, "ha": "right", "va": "center"}  # the name of a row of images, upright


def mean_and_spread(values, form: str = ".3f", ddof: int = 0) -> str:
    """Mean ± standard deviation, which divides by N − ``ddof``; of fewer values than it needs the mean alone."""
    spread = f" ± {np.std(values, ddof=ddof):{form}}" if len(values) > ddof else ""
    return f"{np.mean(values):{form}}{spread}"


# --- curves and bars -------------------------------------------------------------------------------------------------


def draw_range(ax, x, values: np.ndarray, style: str = "-", alpha: float = 0.2, **line) -> None:
    """The mean of ``values (S, X)`` as a line, and a shade from the least of them to the greatest."""
    (mean,) = ax.plot(x, values.mean(0), style, **line)
    ax.fill_between(x, values.min(0), values.max(0), color=mean.get_color(), alpha=alpha)


def draw_bars(ax, groups: Sequence[str], values: Mapping[str, np.ndarray], apart: float, width: float) -> None:
    """Bars of the means of ``values (S, groups)`` by name, side by side in each group, with their deviations."""
    for i, (name, each) in enumerate(values.items()):
        places = np.arange(len(groups)) + apart * (i - (len(values) - 1) / 2)
        ax.bar(places, each.mean(0), width, yerr=each.std(0), label=name)
    ax.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])


# --- axes and legends ------------------------------------------------------------------------------------------------


def only_ticks(ax, values: Sequence[int]) -> None:
    """Only these numbers stand below the panel, whose axis is logarithmic."""
    ax.set_xticks(values, [str(value) for value in values])
    ax.set_xticks([], minor=True)


def grid_and_legend(*axes, **options) -> None:
    """A faint grid and a small legend for each panel; the options are the legend's."""
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", **options)


def legend_below(figure, ax, columns: int, **options) -> None:
    """One legend for all panels, that of ``ax``, beneath them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, **options)


# --- images ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Images beside one another, under one name."""

    name: str
    images: np.ndarray  # (B, H, W)
    signed: bool = False  # red above 0 and blue below; else from 0, white, to 1, black


def draw_rows(rows: Sequence[Row], height: float, width: float, **names):
    """A figure of rows of images, and its axes ``(rows, B)``; ``names`` say how the rows' names are written."""
    figure, axes = new_figure(len(rows[0].images), height=height, width=width, rows=len(rows))
    axes = np.reshape(axes, (len(rows), -1))
    for row, (name, images, signed) in zip(axes, rows, strict=True):
        for ax, image in zip(row, images, strict=True):
            most = np.quantile(np.abs(image), 0.995) or 1.0
            low, high, colours = (-most, most, "RdBu_r") if signed else (0, 1, "gray_r")
            ax.imshow(image, cmap=colours, vmin=low, vmax=high)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, **names)
    return figure, axes


def first_of_each(labels: np.ndarray) -> list[int]:
    """Where the first image of each of ten classes stands; of a class without one there is none."""
    return [int(np.argmax(labels == k)) for k in range(10) if (labels == k).any()]
