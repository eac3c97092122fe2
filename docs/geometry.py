"""Draws docs/geometry.png, the CT conventions: python docs/geometry.py"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Arc, Circle, Rectangle

THETA = math.radians(30)
U, ACROSS, INK, RAY = (math.cos(THETA), math.sin(THETA)), (-math.sin(THETA), math.cos(THETA)), "#222222", "#c1440e"
ARROW = {"arrowstyle": "-|>", "lw": 1.4, "shrinkA": 0, "shrinkB": 0}


def at(u: float, depth: float) -> tuple[float, float]:
    """World point u along the detector and depth towards it from the rotation centre."""
    return u * U[0] + depth * ACROSS[0], u * U[1] + depth * ACROSS[1]


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """A straight arrow."""
    axes.annotate("", end, start, arrowprops={**ARROW, "color": colour})


def scene(axes: Axes, title: str) -> None:
    """The image, its pixels' order, the world axes and the angle."""
    axes.add_patch(Rectangle((-3, -2.4), 6, 4.8, fc="#eef2f6", ec="#8899aa"))
    axes.text(-2.95, 2.48, "row 0, column 0", fontsize=7, va="bottom", color="#556677")
    axes.add_patch(Rectangle((-3, 2.0), 0.4, 0.4, fc="#b8c7d6", ec="#8899aa"))
    for end, name in (((4.6, 0), "x"), ((0, 3.6), "y")):
        arrow(axes, (0, 0), end)
        axes.text(end[0] + 0.12, end[1] + 0.12, name, style="italic")
    axes.plot([0, 4.2 * U[0]], [0, 4.2 * U[1]], color="#556677", lw=0.9, ls="--")
    axes.add_patch(Arc((0, 0), 4.4, 4.4, theta1=0, theta2=math.degrees(THETA), color=INK))
    axes.text(2.35, 0.5, "θ", fontsize=12)
    axes.set(title=title, xlim=(-7.5, 7.5), ylim=(-6.5, 7), aspect="equal")
    axes.axis("off")


def detector(axes: Axes, depth: float, half: float) -> None:
    """The detector with u = 0 and the direction of u."""
    (x0, y0), (x1, y1) = at(-half, depth), at(half, depth)
    axes.plot([x0, x1], [y0, y1], color=INK, lw=3, solid_capstyle="butt")
    arrow(axes, at(half, depth), at(half + 1.1, depth))
    axes.text(*at(half + 1.35, depth - 0.15), "u", style="italic", fontsize=12)
    axes.add_patch(Circle(at(0, depth), 0.13, fc="white", ec=INK, zorder=3))
    axes.text(*at(-0.25, depth + 0.45), "u = 0", fontsize=8, ha="center")
    axes.text(*at(-half - 0.1, depth + 0.5), "element 0", fontsize=7, ha="center", color="#556677")


def main() -> None:
    """Both beams, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    scene(left, "ParallelBeam")
    for u in (-3, -2, -1, 0, 1, 2, 3):
        arrow(left, at(u, 5.2), at(u, -4.6), RAY if u == 2 else "#d8a48f")
    detector(left, 5.2, 3.6)
    left.text(*at(2.2, -4.9), "x cos θ + y sin θ = u", color=RAY, fontsize=9)
    scene(right, "FanBeam")
    for u in (-3.6, -1.8, 0, 1.8, 3.6):
        right.plot(*zip(at(0, -5.6), at(u, 5), strict=True), color="#d8a48f" if u else RAY, lw=1.4)
    detector(right, 5, 4)
    right.plot(*at(0, -5.6), "o", color=RAY, ms=8)
    right.text(*at(0.5, -5.9), "source at\nsource_origin_mm (sin θ, -cos θ)", color=RAY, fontsize=8, va="top")
    right.text(
        *at(-0.35, -3.4), "source_origin_mm", rotation=math.degrees(THETA) - 90, fontsize=7, ha="center", va="center"
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
