"""The curves of a training: a picture with a panel for each scalar of its log."""
import math
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

from kit.files import replacing

CURVE = (16, 42, 120)


def draw_curves(path: Path, rows: list[dict], width: int = 360, height: int = 200) -> None:
    """A PNG with a panel for each scalar of log.jsonl over the steps, on a log axis where it spans more than 20 times.
    A number that is missing or not finite leaves a gap. No scalar, no file."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")))
    if not names:
        return
    columns = min(3, len(names))
    picture = Image.new("RGB", (columns * width, -(-len(names) // columns) * height), "white")
    for i, name in enumerate(names):
        points = [(row["step"], row.get(name, math.nan)) for row in rows]
        corner = i % columns * width + 70, i // columns * height + 24
        draw_curve(ImageDraw.Draw(picture), name, points, *corner, width - 84, height - 48)
    with replacing(path) as temporary:
        picture.save(temporary)


def draw_curve(draw: ImageDraw.ImageDraw, name: str, points: list, left, top, width, height) -> None:
    finite = [y for _, y in points if math.isfinite(y)] or [0.0]
    low, high, first, last = min(finite), max(finite), points[0][0], points[-1][0]
    log = 0 < 20 * low < high
    scale = math.log if log else float

    def place(x, y):
        right = (x - first) / max(1, last - first)
        up = (scale(y) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return left + right * width, top + (1 - up) * height
    draw.rectangle((left - 4, top - 4, left + width + 4, top + height + 4), outline="silver")
    for (x, y), text in {(0, -20): name + (", log" if log else ""), (-66, -6): f"{high:.3g}",
                         (-66, height - 6): f"{low:.3g}", (width - 60, height + 8): f"step {last}"}.items():
        draw.text((left + x, top + y), text, "dimgray")
    for one, two in pairwise([points[0], *points]):         # the first to itself: a dot
        if math.isfinite(one[1] + two[1]):
            draw.line((*place(*one), *place(*two)), CURVE, 2)
