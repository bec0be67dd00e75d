"""A finished clip in the forms that games, editors and web pages ask for, beside its other files.

    python -m kit.export out/a-red-glass-ball-bouncing-0 sheet apng [--trim] [--fps 24]

    sheet               sprites.png, all frames in a grid, and sprites.json, which says where (as TexturePacker's hash)
    apng                rgba.apng, moving
    premultiplied       premultiplied/0000.png ...: colour times alpha, as compositors with that setting want it
    premultiplied-mov   premultiplied.mov, ProRes 4444

They are made from frames/, which is lossless. --trim leaves out the margin that no frame's object touches; sprites.json
and the record say where the rest lay. generate.py does the same by --also and --trim.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

from kit.command import Parser, number, run_command
from kit.files import read_json, save_text
from kit.media import decode, write_rgba

KINDS = ("sheet", "apng", "premultiplied", "premultiplied-mov")


def object_box(alpha, least=3) -> tuple[int, int, int, int]:
    """x, y, width, height of what is more opaque than least / 255 in any frame; the whole frame where nothing is. Sizes
    are even if the frame has room for it, for videos."""
    touched = (alpha > least).any(axis=0)
    box = []
    for axis, room in enumerate(touched.shape[::-1]):
        where = np.flatnonzero(touched.any(axis))
        start, size = (int(where[0]), int(np.ptp(where)) + 1) if len(where) else (0, room)
        box.append((start, min(size + size % 2, room - start)))
    (x, w), (y, h) = box
    return x, y, w, h


def premultiplied(rgb, alpha):
    """Colour times alpha, rounded, uint8."""
    return ((rgb.astype(np.uint16) * alpha[..., None] + 127) // 255).astype(np.uint8)


def write_sheet(folder: Path, rgb, alpha, fps, box, whole) -> None:
    """All frames in one picture, about as wide as high, and a table of their places."""
    n, h, w = alpha.shape
    columns = min(n, math.ceil(math.sqrt(n * h / w)))
    lines = math.ceil(n / columns)
    sheet = np.zeros((1, lines * h, columns * w, 4), np.uint8)
    frames, (x0, y0), (full_w, full_h) = {}, box[:2], whole
    for i in range(n):
        y, x = i // columns * h, i % columns * w
        sheet[0, y:y + h, x:x + w] = np.concatenate([rgb[i], alpha[i, ..., None]], -1)
        frames[f"{i:04d}.png"] = dict(frame=dict(x=x, y=y, w=w, h=h), rotated=False, trimmed=(w, h) != whole,
                                      spriteSourceSize=dict(x=x0, y=y0, w=w, h=h),
                                      sourceSize=dict(w=full_w, h=full_h), duration=round(1000 / fps))
    meta = dict(image="sprites.png", format="RGBA8888", size=dict(w=columns * w, h=lines * h), scale=1)
    write_rgba(folder / "sprites.png", sheet[..., :3], sheet[..., 3])
    save_text(folder / "sprites.json", json.dumps(dict(frames=frames, meta=meta), indent=1))


def export(folder: Path, kinds, trim=False, fps=None) -> list[str]:
    """Writes the kinds asked for into a clip's folder; the names of the files. ValueError if there is no clip."""
    folder = Path(folder)
    if not (folder / "frames").is_dir():
        raise ValueError(f"{folder} holds no frames/, so it is no clip of generate.py")
    frames = decode(folder / "frames")
    rgb, alpha = frames[..., :3], frames[..., 3]
    whole = alpha.shape[2], alpha.shape[1]
    x, y, w, h = box = object_box(alpha) if trim else (0, 0, *whole)
    rgb, alpha = rgb[:, y:y + h, x:x + w], alpha[:, y:y + h, x:x + w]
    fps, before = fps or clip_rate(folder), {path.name for path in folder.iterdir()}
    if "sheet" in kinds:
        write_sheet(folder, rgb, alpha, fps, box, whole)
    if "apng" in kinds:
        write_rgba(folder / "rgba.apng", rgb, alpha, fps)
    for kind, name in ("premultiplied", "premultiplied"), ("premultiplied-mov", "premultiplied.mov"):
        if kind in kinds:
            write_rgba(folder / name, premultiplied(rgb, alpha), alpha, fps)
    return sorted({path.name for path in folder.iterdir()} - before)


def clip_rate(folder: Path) -> float:
    """Frames a second of its run.json; 16 without one."""
    said = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    fps = said.get("arguments", {}).get("fps", 16) if isinstance(said.get("arguments"), dict) else 16
    return fps if isinstance(fps, (int, float)) and fps > 0 else 16


def main(argv=None) -> None:
    parser = Parser(prog="kit.export", description="Write a finished clip in other forms, beside its files.")
    parser.add_argument("folder", type=Path, help="of a clip that generate.py wrote")
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--trim", action="store_true", help="leave out the margin that no frame's object touches")
    parser.add_argument("--fps", type=number(0.01, 1000), metavar="N", help="frames a second [the clip's]")
    args = parser.parse_args(argv)
    print(*(args.folder / name for name in export(args.folder, args.kinds, args.trim, args.fps)), sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.export"))
