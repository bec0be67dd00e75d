"""RGBA clips: media in and out, the data set, the latent cache, and procedural clips to learn from without a download.

Media are numpy uint8: rgb (t, h, w, 3), *straight* colour (never multiplied by alpha), and alpha (t, h, w). RGBADataset
turns them into what is trained on: rgb (3, t, h, w) in [-1, 1], alpha (1, t, h, w) in [0, 1]. Straight colour means
nothing where alpha is 0, yet hard rendering and filters look at it, so it is bled out of the object.

Letters: t frames, h w height and width, c channels; u v an object's coordinates in radii, x y the frame's in heights.
Differs from the official loader, which replaces a file it cannot read by another sample without a word: here it is
named and left out, and more than one in ten is an error (test_bad_clips_are_named_and_left_out).
dtype rule: uint8 at rest, float32 for arithmetic, rounded (not truncated) back to uint8.

A data set is any folder, its files as they are, also mixed and in sub-folders; each caption in NAME.txt:
    NAME.mp4, NAME_seg.mp4          colour and matte (or _alpha, _pha, _mask, _matte), of any kind below
    metadata.csv                    video_fgr,video_pha,prompt or video,alpha,prompt; no alpha: the file's own
    NAME.mov .webm .webp .gif .png .apng .zip, or a sub-folder NAME of PNGs: with an alpha of their own; also stills

    python data.py data/ --clips 2000                       # procedural clips with captions
    python data.py data/ --clips 2000 --sprites pictures/   # pictures of your own, moved the same way
    python data.py data/ --check --workers 8                # what is in a folder, and what is wrong with it
    python data.py                                          # draws out/procedural.png
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save
from torch.utils.data import Dataset
from tqdm import tqdm


# ---- files


@contextmanager
def replacing(path):
    """A temporary name beside `path`, with its ending, that becomes `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_key(*parts) -> str:
    """Name of cached tensors: SHA-256 (hex) of all they depend on, bytes or strings; no stale cache is ever found."""
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def file_key(path) -> str:
    """SHA-256 (hex) of a file's bytes, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2 ** 20):
            digest.update(piece)
    return digest.hexdigest()


def save_tensors(path, tensors: dict, metadata: dict | None = None) -> None:
    """One safetensors file, complete or not there at all; metadata: str -> str."""
    with replacing(path) as temporary:
        temporary.write_bytes(save({name: x.contiguous() for name, x in tensors.items()}, metadata))


# ---- reading

PICTURES = (".png", ".apng", ".webp", ".gif")                             # still or moving
VIDEOS = (".mov", ".webm", ".mp4", ".mkv", ".avi")
MEDIA = (*VIDEOS, *PICTURES, ".zip")
MATTES = ("alpha", "pha", "mask", "seg", "matte")
UNEQUAL = "make them equal"                                               # in the sentence on a matte that does not fit


def by_number(name):
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def frames_of(names):
    return sorted((n for n in names if n.lower().endswith(".png") and Path(n).name[0] != "."), key=by_number)


def files_of(path):
    """The file itself, or the PNGs of a folder in their order."""
    return [path / name for name in frames_of(os.listdir(path))] if path.is_dir() else [path]


def name_of(path):
    return path.name if path.is_dir() else path.stem


def decode_video(path):
    """Frames. ffmpeg's own VP9 and VP8 decoders drop alpha, so a file that names these codecs is given to libvpx."""
    with open(path, "rb") as file:
        head = file.read(65536)
    decoder = ["-c:v", "libvpx-vp9"] if b"V_VP9" in head else ["-c:v", "libvpx"] if b"V_VP8" in head else []
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgba", bits_per_pixel=32, input_params=decoder)
    meta = next(reader)
    frames = [np.frombuffer(frame, np.uint8).reshape(*meta["size"][::-1], 4) for frame in reader]
    if "audio_codec" not in meta and len(frames) < 0.8 * meta["fps"] * meta["duration"] - 2:    # sound may be longer
        raise ValueError("the video is cut short")
    return frames


def read_picture(file, i):
    """Frame i of an open picture, uint8 (h, w, 4); of 16-bit grey, which Pillow would clip, the upper byte."""
    if file.metadata(index=i)["mode"][0] != "I":
        return file.read(index=i, mode="RGBA")
    grey = file.read(index=i) >> 8
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], -1).astype(np.uint8)


def decode_picture(path):
    """Frames at a constant rate: a frame shown twice as long as the others comes back twice."""
    frames, times = [], []
    with iio.imopen(path, "r", plugin="pillow") as file:
        for i in range(file.properties(index=...).n_images):
            frames.append(read_picture(file, i))
            times.append(round(1000 * (file.metadata(index=i, exclude_applied=False).get("duration") or 100)))
    step = np.gcd.reduce(times)
    step = step if 4 * step >= min(times) else min(times)                 # 33, 33, 34 ms is rounding, not a rate
    return [frame for frame, time in zip(frames, times) for _ in range(round(time / step))]


def decode(path):
    """All frames of a medium, uint8 (t, h, w, 4); alpha 255 where it has none. ValueError if it cannot be read."""
    def png(source):
        with iio.imopen(source, "r", extension=".png", plugin="pillow") as file:
            return read_picture(file, 0)

    try:
        if path.is_dir():
            frames = [png(file) for file in files_of(path)]
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as file:
                frames = [png(file.read(name)) for name in frames_of(file.namelist())]
        else:
            frames = (decode_video if path.suffix.lower() in VIDEOS else decode_picture)(path)
        return np.stack(frames)
    except Exception as error:                                            # decoders raise whatever they like
        raise ValueError(f"{path} cannot be read as a video, an animation or a folder of PNGs of one size; "
                         f"is it empty, damaged or of another kind?") from error


def read_rgba(path, matte=None) -> tuple[np.ndarray, np.ndarray]:
    """(rgb (t, h, w, 3), alpha (t, h, w)), uint8 and straight, of a folder or .zip of PNGs, a video or a picture.

    Its alpha is `matte`, or else NAME_alpha.* (or _pha, _mask, _seg, _matte) beside it, or else its own, or 255.
    FileNotFoundError; ValueError for a medium that cannot be read, is empty, or whose matte does not fit.
    """
    path = Path(path)
    beside = (path.with_name(f"{name_of(path)}_{kind}{ending}") for kind in MATTES for ending in (*MEDIA, ""))
    return read_pair(path, Path(matte) if matte else next((m for m in beside if m.exists()), None))


def read_pair(path, matte):
    """read_rgba without looking for a matte: None is the medium's own alpha."""
    for file in (path, matte or path):
        if not file.exists():
            raise FileNotFoundError(f"there is no file or folder {file}.")
    frames = decode(path)
    rgb, alpha = np.ascontiguousarray(frames[..., :3]), np.ascontiguousarray(frames[..., 3])
    if matte:
        alpha = decode(matte)[..., :3].mean(-1, dtype=np.float32).round().astype(np.uint8)
        if alpha.shape != rgb.shape[:3]:
            raise ValueError(f"{path} has (frames, height, width) {rgb.shape[:3]} but its matte {matte.name} has "
                             f"{alpha.shape}; {UNEQUAL}.")
    return rgb, alpha


# ---- writing

ENCODERS = {".mov": ("prores_ks", "yuva444p10le", "-profile:v 4444 -alpha_bits 16 -vendor apl0"),
            ".webm": ("libvpx-vp9", "yuva420p", "-crf 8 -b:v 0 -deadline realtime -cpu-used 6 -auto-alt-ref 0"),
            ".mp4": ("libx264", "yuv420p", "-crf 12 -preset veryfast -movflags +faststart")}
BT709 = ("-vf scale=out_color_matrix=bt709:out_range=tv -colorspace bt709 -color_primaries bt709 -color_trc bt709 "
         "-color_range tv -fflags +bitexact")


def encode_video(path, frames, fps):
    codec, pixels, options = ENCODERS[path.suffix.lower()]
    if codec == "libx264":                                                # wants even sizes
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    t, h, w, c = frames.shape
    writer = imageio_ffmpeg.write_frames(
        str(path), (w, h), "rgba" if c == 4 else "rgb24", pixels, fps, quality=None, codec=codec, macro_block_size=1,
        ffmpeg_log_level="quiet", output_params=f"{options} {BT709}".split())
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        written = path.stat().st_size
    except OSError:                                                       # its text is ffmpeg's whole command line
        written = 0
    if not written:
        raise OSError(f"cannot write a {path.suffix} of {w} x {h} pixels to {path.parent}; is the folder writable?")


def encode_picture(frames, ending=".png", **options):
    options |= dict(lossless=True, exact=True, quality=0, method=0) if ending == ".webp" else dict(compress_level=1)
    return iio.imwrite("<bytes>", frames, extension=ending, plugin="pillow", is_batch=frames.ndim == 4, **options)


def encode_webp(frames, fps):
    """Lossless animated WebP (layout: its container specification): a list of stills, so that equal frames and colour
    under alpha 0 stay as they are; the usual encoder merges the former and blackens the latter."""
    def number(n, size=3):
        return int(n).to_bytes(size, "little")

    def chunk(name, *parts):
        body = b"".join(parts)
        return name + number(len(body), 4) + body + bytes(len(body) % 2)

    size = number(frames.shape[2] - 1) + number(frames.shape[1] - 1)
    head = number(0) + number(0) + size + number(round(1000 / fps)) + b"\2"             # x, y, w, h, ms, no blending
    stills = [chunk(b"ANMF", head, encode_picture(frame, ".webp")[12:]) for frame in frames]
    return chunk(b"RIFF", b"WEBP", chunk(b"VP8X", b"\x12\0\0\0", size), chunk(b"ANIM", bytes(6)), *stills)


def write_rgba(path, rgb, alpha=None, fps=16) -> None:
    """Write a clip, uint8 and straight, by the ending of `path`; alpha None = opaque. ValueError, OSError.

    Exact: .png .apng .webp, .zip of PNGs, and, without an ending, a folder of PNGs. Nearly: .mov (ProRes 4444) and
    .webm (VP9). .gif keeps one bit of alpha, .mp4 none; an .mp4 of odd size repeats its last row or column.
    """
    path, kind = Path(path), Path(path).suffix.lower()
    if kind not in ("", ".zip", *ENCODERS, *PICTURES):
        raise ValueError(f"{path} has an unknown ending; use {' '.join((*ENCODERS, *PICTURES))} .zip or none.")
    alpha = np.full(rgb.shape[:3], 255, np.uint8) if alpha is None else alpha
    if not alpha.size or alpha.shape != rgb.shape[:3]:
        raise ValueError(f"cannot write {path}: its colour is {rgb.shape} and its alpha {alpha.shape}.")
    frames = rgb if kind == ".mp4" else np.concatenate([rgb, alpha[..., None]], -1)
    if not kind:
        for i, frame in enumerate(frames):
            with replacing(path / f"{i:04d}.png") as temporary:
                temporary.write_bytes(encode_picture(frame))
        for stale in path.glob("[0-9]" * 4 + ".png"):
            if int(stale.stem) >= len(frames):
                stale.unlink()
        return
    with replacing(path) as temporary:
        if kind in ENCODERS:
            encode_video(temporary, frames, fps)
        elif kind == ".webp":
            temporary.write_bytes(encode_webp(frames, fps))
        elif kind == ".zip":
            with zipfile.ZipFile(temporary, "w") as file:
                for i, frame in enumerate(frames):                        # ZipInfo: a fixed date, so the same bytes
                    file.writestr(zipfile.ZipInfo(f"{i:04d}.png"), encode_picture(frame))
        else:                                                             # disposal 0 1 0 1 keeps equal frames apart
            disposal = 2 if kind == ".gif" else [i % 2 for i in range(len(frames))]
            temporary.write_bytes(encode_picture(frames, kind, duration=1000 / fps, loop=0, disposal=disposal))


# ---- pixels


def bleed(rgb, alpha):
    """Give pixels of alpha 0 the colour around them: 2x2 means weighted by alpha, down to one pixel and up again.

    uint8 (t, h, w, 3), (t, h, w) -> uint8 (t, h, w, 3); every other pixel stays as it is.
    """
    def fill(x):                                                          # sums of colour * alpha and of alpha
        h, w = x.shape[1:3]
        mean = x[..., :3] / np.maximum(x[..., 3:], 1e-6)
        if max(h, w) > 1 and not x[..., 3].all():
            even = np.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
            coarse = fill(sum(even[:, i::2, j::2] for i in (0, 1) for j in (0, 1)))
            mean = np.where(x[..., 3:] > 0, mean, repeat(coarse, "t h w c -> t (h i) (w j) c", i=2, j=2)[:, :h, :w])
        return mean

    weight = alpha[..., None].astype(np.float32) / 255
    filled = np.minimum(fill(np.concatenate([rgb * weight, weight], -1)) + 0.5, 255).astype(np.uint8)
    return np.where(weight > 0, rgb, filled)


def premultiply(rgb, alpha):
    """uint8 (t, h, w, 3), (t, h, w) -> float32 (t, 4, h, w) in [0, 1], colour times alpha: what may be resized."""
    x = torch.from_numpy(np.concatenate([rgb, alpha[..., None]], -1)).movedim(-1, 1) / 255
    return torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)


def unpremultiply(x):
    """The way back, with colour bled under alpha 0."""
    x = torch.cat([x[:, :3] / x[:, 3:].clamp(min=1e-6), x[:, 3:]], 1)
    x = (255 * x.clamp(0, 1)).round().byte().movedim(1, -1).numpy()
    return bleed(x[..., :3], x[..., 3]), x[..., 3].copy()


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def cover(rgb, alpha, size):
    """Scale a clip until it covers size (h, w) and keep its middle; of a clip of that size only hidden colour moves."""
    old = alpha.shape[1:]
    if old == tuple(size):
        return bleed(rgb, alpha), alpha
    scale = max(size[0] / old[0], size[1] / old[1])
    h, w = (max(new, round(n * scale)) for new, n in zip(size, old))
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return unpremultiply(resize(premultiply(rgb, alpha), (h, w))[:, :, top:top + size[0], left:left + size[1]])


def area_size(h, w, area) -> tuple[int, int]:
    """The size (h, w) of about this area and aspect; both sides the nearest multiples of 16, at least 16."""
    return tuple(max(16, 16 * round((area * ratio) ** 0.5 / 16)) for ratio in (h / w, w / h))


def to_and_fro(n, count, start=0) -> list[int]:
    """The numbers of `count` frames of a clip of n, from `start` on, turning round at its ends."""
    way = [*range(n), *range(n - 2, 0, -1)]
    return [way[(start + k) % len(way)] for k in range(count)]


def slide(rgb, alpha, size, frames, rng):
    """A clip of a still: a window of 0.8 of it goes in a straight line from one corner to the opposite one."""
    whole = tuple(round(n / 0.8) for n in size)
    rgb, alpha = cover(rgb, alpha, whole)
    ends = [(0, m - n)[::rng.choice([1, -1])] for n, m in zip(size, whole)]
    way = np.linspace(*zip(*ends), frames).round().astype(int)            # top and left of each frame
    return tuple(np.stack([x[0, top:top + size[0], left:left + size[1]] for top, left in way]) for x in (rgb, alpha))


def random_crop(rgb, alpha, rng):
    """A window of 0.8 to 1 of the frame's size, the same for all frames."""
    old, share = np.array(alpha.shape[1:]), rng.uniform(0.8, 1)
    window = (share * old).round().astype(int).clip(1)
    (top, left), (h, w) = rng.integers(old - window + 1), window
    return rgb[:, top:top + h, left:left + w], alpha[:, top:top + h, left:left + w]


def in_parts(function, rgb, alpha):
    """function(rgb, alpha) of some frames at a time: the float32 of a whole clip may not fit into memory."""
    n = max(1, 2 ** 20 // alpha[0].size)
    parts = [function(rgb[k:k + n], alpha[k:k + n]) for k in range(0, len(rgb), n)]
    return parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts)))


def checkerboard(h, w, cell=8):
    """uint8 (h, w, 3): light and dark grey squares of `cell` pixels, to show transparency on."""
    odd = (np.arange(h)[:, None] // cell + np.arange(w) // cell) % 2
    return repeat(np.where(odd, 176, 226).astype(np.uint8), "h w -> h w c", c=3)


def over(rgb, alpha, background):
    """Soft rendering, uint8: rgb * alpha + background * (1 - alpha); background: a colour or a picture, 0..255."""
    alpha = alpha[..., None].astype(np.float32) / 255
    return (rgb * alpha + np.asarray(background, np.float32) * (1 - alpha) + 0.5).astype(np.uint8)


def contact_sheet(path, rows, columns=6, scale=2) -> None:
    """Draw clips, one a row: `columns` frames over a checkerboard, then their alpha as grey.

    rows: (rgb (t, h, w, 3), alpha (t, h, w)) each, uint8, all of one frame size; scale: whole number.
    """
    lines = []
    for rgb, alpha in rows:
        pick = np.linspace(0, len(rgb) - 1, min(columns, len(rgb))).round().astype(int)
        colour = over(rgb[pick], alpha[pick], checkerboard(*alpha.shape[1:]))
        blank = ((0, 0), (0, columns - len(pick)), (0, 0), (0, 0), (0, 0))
        pair = np.pad(np.stack([colour, repeat(alpha[pick], "t h w -> t h w c", c=3)]), blank)
        lines.append(rearrange(pair, "s t h w c -> h (s t w) c"))
    sheet = repeat(np.concatenate(lines), "h w c -> (h i) (w j) c", i=scale, j=scale)
    with replacing(path) as temporary:
        iio.imwrite(temporary, sheet, plugin="pillow")


# ---- the data set


COLUMNS = ("video_fgr", "video_pha", "prompt"), ("video", "alpha", "prompt")      # of a metadata.csv


@dataclass(frozen=True)
class Sample:
    path: Path                                                            # a file or a folder of PNGs
    matte: Path | None = None                                             # None: the medium's own alpha
    caption: str | None = None                                            # of a csv
    root: Path = Path()

    @property
    def name(self):
        return Path(os.path.relpath(self.path, self.root)).as_posix()

    @property
    def text(self):
        return self.path.with_name(name_of(self.path) + ".txt")

    @property
    def files(self):
        return [file for path in (self.path, self.matte) if path for file in files_of(path)]


def read_csv(path, root) -> list[Sample]:
    """The clips of a metadata.csv, one a row; its paths are relative to its own folder. ValueError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = next((c for c in COLUMNS if {*c} <= {*(table.fieldnames or ())}), None)
            lines = list(table) if columns else []
            rows = [[(row[c] or "").strip() for c in columns] for row in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table in UTF-8; save it as one.") from error
    if any(None in row for row in lines):
        raise ValueError(f"{path} has a line of more cells than its first one; put text with a comma in quotes.")
    rows = [row for row in rows if any(row)]
    if not rows or not all(row[0] for row in rows):
        raise ValueError(f"{path} lacks {'a video in a row' if rows else 'rows' if columns else 'columns'}; its first "
                         f"line is to be {' or '.join(map(','.join, COLUMNS))}, each other line a clip.")
    return [Sample(path.parent / video, path.parent / matte if matte else None, caption or None, root)
            for video, matte, caption in rows]


def find_samples(folder) -> list[Sample]:
    """The clips of a folder and its sub-folders, in natural order: the rows of each metadata.csv, and what is found by
    looking: videos, pictures, .zip, the PNGs of a sub-folder (one clip), each with the matte beside it if there is one.

    What a csv names is not found again; hidden names are passed over. FileNotFoundError, ValueError, OSError.
    """
    def refuse(error):
        raise error

    root, media, found = Path(folder), [], []
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; `python data.py {root} --clips 2000` makes one.")
    seen = set()                                                          # a link may lead back up
    for top, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(top))
        folders[:] = sorted(name for name in folders if name[0] != "." and
                            os.path.realpath(os.path.join(top, name)) not in seen)
        one_clip = Path(top) != root and bool(frames_of(files))
        kinds = {*MEDIA} - {".png"} if one_clip else MEDIA
        media += [Path(top)] * one_clip
        media += [Path(top, name) for name in files if name[0] != "." and Path(name).suffix.lower() in kinds]
        found += read_csv(Path(top, "metadata.csv"), root) if "metadata.csv" in files else []
    named = {path.resolve() for sample in found for path in (sample.path, sample.matte) if path}
    named |= {path.parent for path in named}                              # then its PNGs are stills, not one clip
    found += [Sample(*pair, root=root) for pair in with_mattes(media) if pair[0].resolve() not in named]
    if not found:
        raise ValueError(f"{root} holds no clip; put videos, pictures, folders of PNGs there, each with a NAME.txt.")
    return sorted(found, key=lambda sample: by_number(sample.name))


def with_mattes(media):
    """(medium, the matte beside it or None), of those that are no mattes."""
    stems = {path.with_name(name_of(path)): path for path in sorted(media, reverse=True)}
    beside = {stem: [stem.with_name(f"{stem.name}_{kind}") for kind in MATTES] for stem in stems}
    mattes = set().union(*beside.values())
    for path in media:
        stem = path.with_name(name_of(path))
        if stem not in mattes:
            yield path, next((stems[matte] for matte in beside[stem] if matte in stems), None)


def words(path):
    return re.sub("[_-]+", " ", name_of(path))


def written_caption(sample) -> str:
    """The csv's prompt, or else NAME.txt; "" without either. ValueError if that is not UTF-8."""
    try:
        return sample.caption or (sample.text.read_text("utf-8-sig").strip() if sample.text.exists() else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{sample.text} is not UTF-8; save the caption in that encoding.") from error


def identity(sample) -> dict:
    """Name, bytes and newest time of a sample's files, caption included: as long as they stay, so does its row."""
    stats = [os.stat(file) for file in (*sample.files, sample.text) if os.path.exists(file)]
    return dict(name=sample.name, bytes=sum(s.st_size for s in stats), changed=max([0.0, *(s.st_mtime for s in stats)]))


def examine(sample) -> dict:
    """Read a sample: a row of RGBADataset.check."""
    keys = ("frames", "height", "width", "opaque", "semi", "transparent", "caption", "error")
    row = identity(sample) | dict.fromkeys(keys, 0) | dict(caption=False, error=None)
    try:
        row["caption"] = bool(written_caption(sample))
        alpha = read_pair(sample.path, sample.matte)[1]
        shares = [float(share.mean()) for share in (alpha == 255, (alpha > 0) & (alpha < 255), alpha == 0)]
        return row | dict(zip(keys, (*alpha.shape, *shares)))
    except (ValueError, OSError) as error:
        return row | dict(error=str(error))


class RGBADataset(Dataset):
    """Captioned RGBA clips of a folder, see find_samples.

    An item: dict(rgb float32 (3, t, h, w) in [-1, 1], alpha float32 (1, t, h, w) in [0, 1], caption, name). Clips are
    scaled to cover `size` (side or (h, w), pixels; keep_aspect: to its area, in their own aspect), and cut to `frames`
    or played to and fro if shorter; over a still a window slides. The caption is the csv's prompt, or NAME.txt, or else
    the words of the name. Up to cache_gb of decoded files stay in memory.
    """

    def __init__(self, folder, size=64, frames=17, cache_gb=4.0, keep_aspect=False):
        self.folder, self.samples, self.frames, self.keep_aspect = folder, find_samples(folder), frames, keep_aspect
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.kept, self.lengths, self.room = {}, {}, cache_gb * 2 ** 30

    def __len__(self):
        return len(self.samples)

    def name(self, i) -> str:
        return self.samples[i].name

    def caption(self, i) -> str:
        return written_caption(self.samples[i]) or words(self.samples[i].path)

    def source(self, i):
        """uint8 (rgb (t, h, w, 3), alpha (t, h, w)) of the whole clip at its own size, its hidden colour as stored."""
        sample = self.samples[i]
        if sample in self.kept:
            return self.kept[sample]
        rgb, alpha = read_pair(sample.path, sample.matte)
        self.lengths[sample] = len(rgb)
        if self.room >= rgb.nbytes + alpha.nbytes:
            self.room -= rgb.nbytes + alpha.nbytes
            self.kept[sample] = rgb, alpha
        return rgb, alpha

    def clip(self, i, variant=0):
        """uint8 (rgb (t, h, w, 3), alpha (t, h, w)) in the data set's size and length.

        variant > 0: another window, of 0.8 to 1 of a video's frame; the same i and variant, the same clip.
        """
        (rgb, alpha), rng = self.source(i), np.random.default_rng([i, variant])
        size = area_size(*alpha.shape[1:], math.prod(self.size)) if self.keep_aspect else self.size
        if len(rgb) == 1 < self.frames:
            return slide(rgb, alpha, size, self.frames, rng)
        if variant and len(rgb) > 1:
            rgb, alpha = random_crop(rgb, alpha, rng)
        rgb, alpha = in_parts(lambda *pair: cover(*pair, size), rgb[:self.frames], alpha[:self.frames])
        if len(rgb) == self.frames:
            return rgb, alpha
        pick = to_and_fro(len(rgb), self.frames)
        return rgb[pick], alpha[pick]

    def geometry(self, i, variant=0) -> str:
        """All that clip(i, variant) depends on besides the bytes of its files."""
        frames = self.lengths.get(self.samples[i]) or len(self.source(i)[0])
        drawn = variant > 0 if frames > 1 else self.frames > 1            # only then i and variant have a say
        return (f"size {self.size}, frames {self.frames}, keep_aspect {self.keep_aspect}"
                f"{f', clip {i}, variant {variant}' * drawn}")

    def content(self, i) -> str:
        """SHA-256 (hex) over the bytes of the medium and then of its matte, read 1 MiB at a time."""
        return cache_key(*map(file_key, self.samples[i].files))

    def check(self, workers=0, known=None) -> list[dict]:
        """A row for each sample, see examine; read in `workers` processes, 0: in this one. OSError.

        known: earlier rows; a sample whose name, bytes and changed stand in one of them is not read again.
        """
        known = {(row["name"], row["bytes"], row["changed"]): row for row in known or ()}
        rows = [known.get(tuple(identity(sample).values())) for sample in self.samples]
        todo = [i for i, row in enumerate(rows) if row is None]
        try:
            with ProcessPoolExecutor(workers) if workers else nullcontext() as pool:
                read = (pool.map if workers else map)(examine, [self.samples[i] for i in todo])
                for i, row in zip(todo, tqdm(read, desc=f"reading {self.folder}", total=len(todo))):
                    rows[i] = row
        except BrokenExecutor as error:
            raise OSError(f"a process reading {self.folder} was ended, for want of memory perhaps; "
                          f"use fewer than {workers} workers.") from error
        return rows

    def drop_bad(self, rows) -> None:
        """Leave out samples whose row has an error, and name them on stderr. ValueError if more than one in ten has."""
        self.lengths |= {sample: row["frames"] for sample, row in zip(self.samples, rows)}
        bad = {row["name"]: row["error"] for row in rows if row["error"]}
        if 10 * len(bad) > len(self):
            raise ValueError(f"{len(bad)} of {len(self)} clips in {self.folder} cannot be used, for instance "
                             f"{', '.join([*bad][:3])}; `python data.py {self.folder} --check` says why.")
        if bad:
            skipped = [f"skipped: {error}" for error in bad.values()]
            print("\n".join(skipped + [f"skipped {len(bad)} of {len(self)} clips"]), file=sys.stderr)
        self.samples = [sample for sample in self.samples if sample.name not in bad]

    def __getitem__(self, i):
        rgb, alpha = map(torch.from_numpy, self.clip(i))
        return dict(rgb=rearrange(rgb, "t h w c -> c t h w") / 127.5 - 1, alpha=alpha[None] / 255,
                    caption=self.caption(i), name=self.name(i))


# ---- procedural clips: what they show, and their captions

SHAPES = ("ball", "cube", "star", "ring", "heart", "drop", "leaf", "ghost")
COLORS = {"red": (0.90, 0.08, 0.10), "orange": (1.00, 0.50, 0.02), "yellow": (1.00, 0.90, 0.08),
          "green": (0.10, 0.68, 0.20), "cyan": (0.10, 0.85, 0.95), "blue": (0.10, 0.22, 0.92),
          "purple": (0.52, 0.10, 0.72), "pink": (1.00, 0.48, 0.74), "white": (0.96, 0.96, 0.97),
          "black": (0.07, 0.07, 0.09)}                                    # no two nearer than 0.4
PHRASES = {"solid": ("{c} {s}", "solid {c} {s}", "a {s} in solid {c}"),    # two ways as adjectives, one as a noun
           "glass": ("{c} glass {s}", "{c} glass {s}", "a {s} of {c} glass"),
           "glow": ("glowing {c} {s}", "glowing {c} {s}", "a {s} of glowing {c} light"),
           "smoke": ("smoky {c} {s}", "{c} {s} made of smoke", "a {s} of {c} smoke"),
           "bubble": ("{c} soap bubble {s}", "{c} soap bubble shaped like a {s}", "a {s} of {c} soap bubble")}
MATERIALS = tuple(PHRASES)
MOTIONS = ("moving from left to right", "moving from right to left", "rising", "falling",
           "bouncing", "growing", "spinning", "orbiting")


@dataclass
class Clip:
    rgb: np.ndarray                                                       # uint8 (t, h, w, 3), straight colour
    alpha: np.ndarray                                                     # uint8 (t, h, w)
    caption: str
    attributes: dict


def held_out(shape, color, material, motion) -> bool:
    """One combination in eight is kept for testing, by a rule that never changes."""
    return zlib.crc32(f"{shape} {color} {material} {motion}".encode()) % 8 == 0


@lru_cache
def combinations(split):
    names = ("shape", "color", "material", "motion")
    every = [dict(zip(names, values)) for values in product(SHAPES, COLORS, MATERIALS, MOTIONS)]
    return [c for c in every if split == "both" or held_out(**c) == (split == "test")]


def choose(rng, split, fixed):
    """Attributes of one clip of a split; with all four pinned, of either."""
    left = [c for c in combinations("both" if len(fixed) == 4 else split) if fixed.items() <= c.items()]
    if not left:
        raise ValueError(f"no clip of the {split} split is {fixed}; pin other attributes, or fewer.")
    return left[rng.integers(len(left))]


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def worded(wording, subject, bare, noun, motion):
    """One of 20 wordings of one content; all but the short ones name transparency as Wan-Alpha's prompts do."""
    shot = ("Close-up shot.", "Medium shot.")[wording // 5 % 2]
    style = ("Realistic style.", "Cartoon style.")[wording // 10 % 2]
    sentence = f"{subject[0].upper()}{subject[1:]} {motion}."
    return (f"This video has a transparent background. {shot} {sentence} {style}", f"{subject} {motion}",
            f"A transparent background. {sentence}", f"{bare}, {motion}", f"{noun} is {motion}")[wording % 5]


def caption_of(attributes, wording=None) -> str:
    """Prompt of a clip. wording 0: Wan-Alpha's template, 1: short, up to 39: others; None: the clip's own."""
    wording = attributes.get("wording", 0) if wording is None else wording
    phrases = [p.format(c=attributes["color"], s=attributes["shape"]) for p in PHRASES[attributes["material"]]]
    bare, motion = phrases[wording // 5 % 2], attributes["motion"]
    if attributes.get("second"):
        motion += " and " + article(f"small {attributes['second_color']} {attributes['second_shape']}")
    return worded(wording // 5 // 2 * 5 + wording % 5, article(bare), bare, phrases[2], motion)


# ---- shapes: outlines, and tables of their signed distance

REACH = 1.6                                                               # half width of a distance table, in radii


def outline(shape):
    """Closed polygon of a shape, (n, 2), x right and y down, within about the unit circle."""
    a = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if shape == "cube":
        a = np.arange(6) * np.pi / 3 + np.pi / 6
        x, y = np.cos(a), np.sin(a)
    elif shape == "star":
        a = np.arange(10) * np.pi / 5 - np.pi / 2
        r = np.where(np.arange(10) % 2, 0.47, 1.04)
        x, y = r * np.cos(a), r * np.sin(a) + 0.06
    elif shape == "heart":
        x = 16 * np.sin(a) ** 3 / 17
        y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a) + 2.4) / 16
    elif shape == "drop":
        x, y = 0.86 * np.sin(a) * np.sin(a / 2) ** 1.3, 0.98 * -np.cos(a)
    elif shape == "leaf":
        s, turn = np.linspace(-1, 1, 49), np.radians(-48)
        side = 0.56 * (1 - s ** 2) ** 0.9 * (1 - 0.25 * s)
        p = np.concatenate([np.stack([s, side], 1), np.stack([s, -side], 1)[::-1][1:-1]])
        x, y = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ p.T
    else:                                                                 # ghost: a dome and a wavy hem
        dome, hem = np.linspace(np.pi, 2 * np.pi, 40), np.linspace(0.74, -0.74, 60)
        x = np.concatenate([0.74 * np.cos(dome), hem])
        y = np.concatenate([0.74 * np.sin(dome) - 0.18, 0.72 + 0.17 * np.cos(hem / 0.74 * 3 * np.pi) * -1])
    return np.stack([x, y], 1)


@lru_cache
def distance_table(shape, n=192):
    """Signed distance (negative inside) and its gradient on a grid over [-REACH, REACH]^2: (n, n, 3), in radii."""
    axis = np.linspace(-REACH, REACH, n)
    p = np.stack(np.meshgrid(axis, axis), -1)                             # (n, n, 2) as x, y
    r = np.linalg.norm(p, axis=-1)
    if shape == "ball":
        sd = r - 0.96
    elif shape == "ring":
        sd = np.abs(r - 0.74) - 0.26
    else:
        vertices, far, inside = outline(shape), np.full((n, n), np.inf), np.zeros((n, n), bool)
        for a, b in zip(vertices, np.roll(vertices, -1, 0)):
            d, e = p - a, b - a
            along = np.clip(d @ e / (e @ e), 0, 1)
            far = np.minimum(far, np.linalg.norm(d - along[..., None] * e, axis=-1))
            cross = d[..., 0] * e[1] - d[..., 1] * e[0]                   # does a ray to the right cross this side?
            inside ^= ((a[1] > p[..., 1]) != (b[1] > p[..., 1])) & ((cross < 0) if e[1] > 0 else (cross > 0))
        sd = np.where(inside, -far, far)
    gy, gx = np.gradient(sd, axis, axis)
    return np.stack([sd, gx, gy], -1).astype(np.float32)


def distance(shape, u, v):
    """Signed distance (bilinear) and its gradient (nearest) at points u, v: three arrays shaped like u."""
    n = len(distance_table(shape))
    x = np.clip((u + REACH) * ((n - 1) / (2 * REACH)), 0, n - 1.001)
    y = np.clip((v + REACH) * ((n - 1) / (2 * REACH)), 0, n - 1.001)
    i, j = y.astype(np.int32), x.astype(np.int32)
    fy, fx, k = y - i, x - j, i * n + j
    sd, gx, gy = distance_table(shape).reshape(-1, 3).T
    top, low = sd[k] * (1 - fx) + sd[k + 1] * fx, sd[k + n] * (1 - fx) + sd[k + n + 1] * fx
    return top * (1 - fy) + low * fy, gx[k], gy[k]


# ---- motion: where the object is, and how large, at every frame


def trajectory(rng, motion, frames, width, radius, pad):
    """Centre x, y (frame heights) and scales sx, sy, each (t,). The object, `pad` around it, stays inside the frame."""
    s, one, reach = np.linspace(0, 1, frames) if frames > 1 else np.array([0.5]), np.ones(frames), radius + pad
    jitter = rng.uniform(-0.08, 0.08, 2)
    amount, phase, direction = rng.uniform(0.42, 0.48), rng.uniform(-1, 1), rng.choice([-1, 1])
    dx, dy, sx, sy = 0 * s, 0 * s, one, one
    ease = 0.8 * s + 0.2 * s * s * (3 - 2 * s) - 0.5
    if motion in ("moving from left to right", "moving from right to left"):
        dx = min(amount * width, width - 2 * reach) * ease * (1 if motion.endswith("right") else -1)
    elif motion == "rising":
        dy = -min(amount, 1 - 2 * reach) * ease
    elif motion == "falling":
        dy = min(amount, 1 - 2 * reach) * (0.6 * s + 0.4 * s * s - 0.5)
    elif motion == "bouncing":                                            # two hops, flatter on the ground
        height = np.abs(np.sin(2 * np.pi * s + 0.15 * phase))
        sy = 1 - 0.15 * np.exp(-(height / 0.3) ** 2)
        sx = 1 / sy ** 0.6
        dy = min(0.85 * amount, 1 - 2 * reach) * (0.5 - height) + radius * (1 - sy)
        jitter[1] = 0
    elif motion == "growing":
        sx = sy = 0.55 + (1.15 - 0.55) * (ease + 0.5)
    elif motion == "spinning":                                            # about the vertical axis, like a coin
        turn = 2 * np.pi * s * direction + 0.3 * phase
        sx = np.sqrt(np.cos(turn) ** 2 + 0.25 ** 2 * np.sin(turn) ** 2)
    else:                                                                 # orbiting
        turn, orbit = 2 * np.pi * (s * direction + phase), 0.18 * min(1, width)
        dx, dy, jitter = orbit * np.cos(turn), orbit * np.sin(turn), 0 * jitter

    def centre(length, d, scale, shift):                                  # shifted as far as the border allows
        reach = radius * scale + pad
        low, high = (reach - length / 2 - d).max(), (length / 2 - reach - d).min()
        return length / 2 + d + np.clip(shift, min(low, 0), max(high, 0))

    return centre(width, dx, sx, jitter[0]), centre(1, dy, sy, jitter[1]), sx, sy


# ---- materials: colour and alpha of one object


def smoothstep(x, low, high):
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def noise(rng, u, v):
    """Smooth noise in [0, 1] that drifts with time: eight random waves over points u, v (t, h, w)."""
    total, s = 0, np.linspace(0, 1, len(u), dtype=np.float32)[:, None, None]
    for _ in range(8):
        length, angle = rng.uniform(2.2, 5.5), rng.uniform(0, 2 * np.pi)
        drift, start = rng.uniform(2, 5), rng.uniform(0, 2 * np.pi)
        total = total + np.sin(length * (np.cos(angle) * u + np.sin(angle) * v) + drift * s + start, dtype=np.float32)
    return smoothstep(total, -3.0, 3.0)


def place(shape, radius, track, h, w):
    """Where each pixel lies in the object: u, v, distance in radii (unit) and heights (sd), ..., (t, h, w) each."""
    x, y, sx, sy = (np.asarray(k, np.float32)[:, None, None] for k in track)
    u = ((np.arange(w, dtype=np.float32) + 0.5) / h - x) / (radius * sx) + 0 * y
    v = ((np.arange(h, dtype=np.float32)[:, None] + 0.5) / h - y) / (radius * sy)
    u, v = np.broadcast_arrays(u, v)                                      # (t, h, w)
    unit, nx, ny = distance(shape, u, v)
    sd = unit * (radius / np.sqrt((nx / sx) ** 2 + (ny / sy) ** 2 + 1e-4))
    sd += radius * np.hypot(np.maximum(np.abs(u) - REACH, 0) * sx, np.maximum(np.abs(v) - REACH, 0) * sy)
    depth = np.clip(unit / -0.45, 0, 1)
    facing = (1 - depth) * -(0.55 * nx + 0.75 * ny)                       # towards a light from above left
    spot_u, spot_v = {"ring": (-0.52, -0.52), "drop": (-0.24, 0.22), "leaf": (0.18, -0.44)}.get(shape, (-0.30, -0.34))
    spot = np.exp(-((u - spot_u) ** 2 + (v - spot_v) ** 2 * 1.6) / 0.022, dtype=np.float32) * smoothstep(-unit, 0, 0.1)
    return SimpleNamespace(u=u, v=v, unit=unit, sd=sd, depth=depth, facing=facing, spot=spot,
                           body=np.clip(0.5 - sd * h, 0, 1), pixel=1 / (radius * h))


def shaded(shape, base, p):
    """Body colour (t, h, w, 3) under a soft light, and lines drawn on it (t, h, w): a cube's edges, a leaf's veins."""
    u, v = p.u, p.v
    shade = 1 + 0.2 * p.facing - 0.08 * np.clip(0.5 * u + 0.7 * v, -1, 1)
    gloss, line = 0.10 * np.maximum(p.facing, 0), np.zeros_like(p.unit)
    if shape == "cube":
        slope = np.float32(np.tan(np.pi / 6))
        top, left = np.clip((-v - slope * np.abs(u)) / p.pixel + 0.5, 0, 1), np.clip(0.5 - u / p.pixel, 0, 1)
        shade = 0.70 + 0.22 * left + top * (1.14 - 0.70 - 0.22 * left)
        gloss = 0.10 * top + 0.03 * left * (1 - top)
        spokes = np.minimum(np.where(v > 0, np.abs(u), 9), np.abs(v + slope * np.abs(u)) * np.float32(0.866))
        line = np.clip(1.2 - spokes / (1.3 * p.pixel), 0, 1)
    elif shape == "leaf":
        along, across = 0.669 * u - 0.743 * v, 0.743 * u + 0.669 * v
        vein = np.minimum(np.abs(across), 0.05 + np.abs((along - np.abs(across)) % 0.42 - 0.21))
        line = np.clip(1.4 - vein / (1.1 * p.pixel), 0, 1) * (np.abs(along) < 0.84) * (p.unit < p.pixel)
        shade = shade * (1 - 0.28 * line) + 0.06 * np.sign(across)
    return base * shade[..., None] + gloss[..., None], line


def draw(rng, size, frames, shape, color, material, radius, track):
    """One object: straight colour (t, h, w, 3) and alpha (t, h, w), float32 in [0, 1], and its distance (t, h, w)."""
    p = place(shape, radius, track, *size)
    base = np.array(COLORS[color], np.float32)
    rgb, line = shaded(shape, base, p)

    def rim(outer, inner):                                                # in pixels of a frame 64 high
        return smoothstep(p.sd * size[0], -outer * size[0] / 64, -inner * size[0] / 64)

    def whiten(amount):
        return rgb + amount[..., None] * (1 - rgb)

    if material == "solid":
        alpha, rgb = p.body, whiten(0.45 * p.spot)
    elif material == "glass":
        edge = rim(2.6, 1.2)
        alpha = p.body * np.maximum(0.38 + 0.52 * np.maximum(edge, 0.6 * line), 0.9 * p.spot)
        rgb = rgb * (1 - 0.12 * edge[..., None]) + 0.9 * p.spot[..., None] * (1 - rgb)
    elif material == "glow":
        alpha = np.maximum(p.body, 0.75 * np.clip(1 - p.sd / (0.5 * radius), 0, 1) ** 2)
        heat = 0.5 * base.max() * smoothstep(-p.unit, 0, 0.5) * (1 - 0.45 * line)
        rgb = base * (0.92 + 0.1 * p.body[..., None]) + heat[..., None] * (1 - base)
    elif material == "smoke":
        cloud = noise(rng, np.clip(p.u, -1.2, 1.2), np.clip(p.v, -1.2, 1.2))
        alpha = smoothstep(-p.sd / radius, -0.12, 0.16) * (0.38 + 0.44 * cloud)
        rgb = rgb * (0.84 + 0.22 * cloud[..., None]) + 0.05 * cloud[..., None]
    else:                                                                 # a soap bubble
        alpha = p.body * np.maximum(0.24 + 0.56 * np.maximum(rim(2.2, 0.6), 0.5 * line),
                                    0.85 * smoothstep(p.spot, 0.35, 0.8))
        phase = (3.2 * p.unit + 1.8 * p.u - 1.1 * p.v + rng.uniform(0, 6))[..., None]
        tint = np.cos(phase + np.array([0, 2.1, 4.2], np.float32), dtype=np.float32)
        rgb = rgb + (0.09 + 0.09 * p.depth[..., None]) * tint
        rgb = whiten(0.9 * smoothstep(p.spot, 0.2, 0.8))
    if shape == "ghost":
        eyes = np.hypot((np.abs(p.u) - 0.28) / 0.13, (p.v + 0.22) / 0.19).astype(np.float32)
        eyes = np.clip(0.5 + (1 - eyes) * 0.15 / p.pixel, 0, 1)
        dark = np.float32(0.93 if color == "black" else 0.06)             # dark eyes; on a black ghost, light ones
        rgb, alpha = rgb + eyes[..., None] * (dark - rgb), np.maximum(alpha, eyes * p.body)
    return np.clip(rgb, 0, 1), alpha, p.sd


def second_object(rng, size, frames, main):
    """A small solid object of another shape and colour near the frame's border, at rest or swaying."""
    width = size[1] / size[0]
    shape = str(rng.choice([s for s in SHAPES if s != main["shape"]]))
    color = str(rng.choice([c for c in COLORS if c != main["color"]]))
    radius, side, where = rng.uniform(0.095, 0.12) * min(1, width), rng.choice([-1, 1]), rng.uniform(0.3, 0.7)
    sway = rng.choice([0, 0.12]) * np.sin(np.linspace(0, 2 * np.pi, frames) + rng.uniform(0, 6))
    upright = main["motion"] in ("rising", "falling", "bouncing")
    length, other = (width, 1) if upright else (1, width)
    border = length / 2 + side * (length / 2 - 1.04 * radius - 1.5 / size[0]) + 0 * sway
    x, y = (border, (where + sway) * other) if upright else ((where + sway) * other, border)
    drawn = draw(rng, size, frames, shape, color, "solid", radius, (x, y, np.ones(frames), np.ones(frames)))
    return drawn, dict(second=True, second_shape=shape, second_color=color)


def procedural_clip(seed: int, size=64, frames=17, split="train", two=0.12, **fixed) -> Clip:
    """A captioned RGBA clip out of nothing but a seed: same arguments, same bytes.

    size: side or (h, w), pixels; two: share of clips with a second, small object; split: "train" never shows a held-out
    combination, "test" only those; fixed pins shape=, color=, material=, motion=. ValueError for what does not exist.
    """
    size = (size, size) if isinstance(size, int) else size
    rng, material_rng = np.random.default_rng([seed, 64]), np.random.default_rng([seed, 65])
    attributes = choose(rng, split, fixed) | dict(second=False, wording=int(rng.integers(40)))
    material, width = attributes["material"], size[1] / size[0]
    radius = rng.uniform(0.225, 0.26) * min(1, width) * {"glow": 0.76, "smoke": 0.93}.get(material, 1)
    pad = 1.5 / size[0] + radius * {"glow": 0.42, "smoke": 0.12}.get(material, 0)
    pair = rng.random() < two
    track = trajectory(rng, attributes["motion"], frames, width, radius * 1.04, pad)
    rgb, alpha, sd = draw(material_rng, size, frames, attributes["shape"], attributes["color"], material, radius, track)
    if pair:
        (rgb2, alpha2, sd2), more = second_object(rng, size, frames, attributes)
        front, back = alpha + 1e-3 * (sd < sd2), alpha2 * (1 - alpha) + 1e-3 * (sd2 <= sd)
        rgb = (rgb * front[..., None] + rgb2 * back[..., None]) / (front + back)[..., None]
        alpha, attributes = alpha + alpha2 * (1 - alpha), attributes | more
    rgb, alpha = ((255 * k + 0.5).astype(np.uint8) for k in (rgb, alpha))
    return Clip(rgb, alpha, caption_of(attributes), attributes)


def sprite_clip(seed: int, picture, name, size=64, frames=17) -> Clip:
    """A clip of a picture, uint8 (h, w, 4), moved as the procedural objects are and captioned by its name."""
    h, w = (size, size) if isinstance(size, int) else size
    rng, width, long = np.random.default_rng([seed, 66]), w / h, max(picture.shape[:2])
    motion, wording, radius = str(rng.choice(MOTIONS)), int(rng.integers(20)), rng.uniform(0.24, 0.29) * min(1, width)
    track = trajectory(rng, motion, frames, width, radius, 1.5 / h)
    x, y, sx, sy = (torch.tensor(k, dtype=torch.float32) for k in track)
    square = np.pad(picture, [((long - n) // 2, (long - n + 1) // 2) for n in picture.shape[:2]] + [(0, 0)])[None]
    square = resize(premultiply(square[..., :3], square[..., 3]), (round(2 * radius * h),) * 2)
    zero = torch.zeros(frames)
    theta = torch.stack([width / 2 / sx, zero, (width / 2 - x) / sx, zero, 0.5 / sy, (0.5 - y) / sy], 1) / radius
    grid = F.affine_grid(theta.view(frames, 2, 3), (frames, 4, h, w), align_corners=False)
    rgb, alpha = unpremultiply(F.grid_sample(square.expand(frames, -1, -1, -1), grid, align_corners=False))
    return Clip(rgb, alpha, worded(wording, name, name, name, motion), dict(name=name, motion=motion, wording=wording))


# ---- the command


def load_sprites(folder):
    """[(name, uint8 (h, w, 4))] of the pictures of a folder that have transparency."""
    sprites = []
    for sample in find_samples(folder):
        rgb, alpha = read_pair(sample.path, sample.matte)
        if alpha[0].min() < 255:
            sprites.append((words(sample.path), np.dstack([rgb[0], alpha[0]])))
    if not sprites:
        raise ValueError(f"no picture in {folder} has transparency; give pictures with alpha, PNG for instance.")
    return sprites


def make_data_set(args):
    """Clips NNNNN.apng with captions NNNNN.txt, metadata.jsonl, and data.json, the record of how they were made."""
    if args.size < 16 or args.size % 16:
        raise ValueError(f"--size {args.size} must be a positive multiple of 16.")
    if args.frames < 1 or args.frames % 4 != 1 or args.clips < 1:
        raise ValueError(f"--frames {args.frames} must be 4k+1 (1, 5, 9, ...) and --clips {args.clips} at least 1.")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is below 0.")
    sprites = load_sprites(args.sprites) if args.sprites else []
    record = json.dumps({k: v for k, v in vars(args).items() if k not in ("folder", "check", "workers")}, indent=1)
    folder, lines = Path(args.folder), []
    if (folder / "data.json").exists() and (folder / "data.json").read_text() != record:
        raise ValueError(f"{folder} already holds clips made with other arguments (data.json); choose another folder.")
    try:
        save_text(folder / "data.json", record)
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}); choose another folder.") from error
    for i in tqdm(range(args.clips), desc=f"clips to {folder}"):
        seed, name = args.seed * 1_000_000 + i, f"{i:05d}"
        if sprites:
            subject, picture = sprites[i % len(sprites)]
            clip = sprite_clip(seed, picture, subject, args.size, args.frames)
        else:
            clip = procedural_clip(seed, args.size, args.frames, args.split)
        write_rgba(folder / f"{name}.apng", clip.rgb, clip.alpha)
        save_text(folder / f"{name}.txt", clip.caption + "\n")
        lines.append(json.dumps(dict(file=f"{name}.apng", caption=clip.caption, seed=seed, **clip.attributes)))
    save_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def check_folder(folder, workers) -> int:
    """Print what a folder holds, then a sentence for each clip that is bad; exit code 2 if more than one in ten is."""
    if not folder or workers < 0:
        raise ValueError("--check needs a folder, and --workers a number that is not below 0.")
    rows = RGBADataset(folder).check(workers)
    good, errors = [row for row in rows if not row["error"]], [row["error"] for row in rows if row["error"]]
    unequal, blank = sum(UNEQUAL in error for error in errors), sum(row["opaque"] == 1 for row in good)
    table = {"clips": len(rows), "captions missing": sum(not row["caption"] for row in good),
             "pairs of unequal length or size": unequal, "cannot be read": len(errors) - unequal,
             "no transparency at all": f"{blank}{'  (warning: they teach nothing about alpha)' * bool(blank)}"}
    if good:
        frames, h, w = (np.array([row[key] for row in good]) for key in ("frames", "height", "width"))
        sizes = Counter(zip(h.tolist(), w.tolist())).most_common(5)
        table["height x width (clips)"] = ", ".join(f"{a} x {b} ({n})" for (a, b), n in sizes)
        for name, numbers in (("frames", frames), ("width / height", w / h)):
            table[f"{name}: min, median, max"] = "  ".join(f"{x:.4g}" for x in np.quantile(numbers, (0, 0.5, 1)))
        for key, name in (("opaque", "opaque"), ("semi", "semi-transparent"), ("transparent", "transparent")):
            table[f"{name} pixels"] = f"{np.average([row[key] for row in good], weights=frames * h * w):.1%}"
    print("\n".join([f"{name:36}{value}" for name, value in table.items()] + errors))
    return 2 if 10 * len(errors) > len(rows) else 0


def draw_figure(path="out/procedural.png"):
    clips = [procedural_clip(i, shape=shape, color=color, material=material, motion=motion)
             for i, (shape, color, material, motion) in enumerate(zip(SHAPES, COLORS, MATERIALS * 2, MOTIONS))]
    contact_sheet(path, [(clip.rgb, clip.alpha) for clip in clips])
    print("\n".join([clip.caption for clip in clips] + [f"drawn in {path}"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write captioned RGBA clips, or check a folder; or draw a figure.")
    parser.add_argument("folder", nargs="?", help="where to write, or what to check")
    parser.add_argument("--check", action="store_true", help="read all clips of the folder and say what is in it")
    parser.add_argument("--workers", type=int, default=0, help="processes that read for --check; 0: this one")
    parser.add_argument("--clips", type=int, default=2000, help="how many")
    parser.add_argument("--size", type=int, default=64, help="height and width, pixels, a multiple of 16")
    parser.add_argument("--frames", type=int, default=17, help="per clip, 4k+1")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="test: only held-out combinations")
    parser.add_argument("--sprites", help="folder of pictures to animate instead; their names are the captions")
    args = parser.parse_args(argv)
    try:
        if args.check:
            sys.exit(check_folder(args.folder, args.workers))
        make_data_set(args) if args.folder else draw_figure()
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
