"""Charts: a picture of panels, each with lines through points; the curves of a training."""
import math
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

from kit.files import replacing

CURVE = (16, 42, 120)
COLORS = CURVE, (178, 34, 34), (46, 139, 87), (255, 140, 0), (105, 105, 105)
Series = dict[str, list[tuple[float, float]]]           # name -> points (x, y) from left to right


def draw_curves(path: Path, rows: list[dict]) -> None:
    """A PNG with a panel for each scalar of log.jsonl over the steps, on a log axis where it spans more than 20 times.
    A number that is missing or not finite leaves a gap. No scalar, no file."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")))
    if names:
        draw_charts(path, {name: {"": [(row["step"], row.get(name, math.nan)) for row in rows]} for name in names})


def draw_charts(path: Path, panels: dict[str, Series], columns: int = 3, width: int = 360, height: int = 200) -> None:
    """panels: title -> lines, which share its axes."""
    columns = min(columns, len(panels))
    picture = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    for i, (title, series) in enumerate(panels.items()):
        corner = i % columns * width + 70, i // columns * height + 24
        draw_panel(ImageDraw.Draw(picture), title, series, *corner, width - 84, height - 48)
    with replacing(path) as temporary:
        picture.save(temporary)


def draw_panel(draw: ImageDraw.ImageDraw, title: str, series: Series, left, top, width, height) -> None:
    points = [point for line in series.values() for point in line]
    finite = [y for _, y in points if math.isfinite(y)] or [0.0]
    low, high, first, last = min(finite), max(finite), min(points)[0], max(points)[0]
    log = 0 < 20 * low < high
    scale = math.log if log else float

    def place(x, y):
        right = (x - first) / ((last - first) or 1)
        up = (scale(y) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return left + right * width, top + (1 - up) * height
    draw.rectangle((left - 4, top - 4, left + width + 4, top + height + 4), outline="silver")
    for (x, y), text in {(0, -20): title + (", log" if log else ""), (-66, -6): f"{high:.3g}",
                         (-66, height - 6): f"{low:.3g}", (0, height + 8): f"{first:.3g}",
                         (width - 30, height + 8): f"{last:.4g}"}.items():
        draw.text((left + x, top + y), text, "dimgray")
    for i, (name, line) in enumerate(series.items()):
        draw.text((left + 8, top + 4 + 14 * i), name, COLORS[i])
        for one, two in pairwise([line[0], *line]):     # the first to itself: a dot
            if math.isfinite(one[1] + two[1]):
                draw.line((*place(*one), *place(*two)), COLORS[i], 2)
