"""RGBA media in and out (videos, animations, pictures, .zip and folders of PNGs), and what is done to their pixels.

A clip is uint8: rgb (t, h, w, 3), *straight* colour (never multiplied by alpha), and alpha (t, h, w). Straight colour
means nothing where alpha is 0, yet hard rendering and filters look at it, so it is bled out of the object. Models take
what `to_video` makes of it. Letters: t frames, h w height and width, c channels.
dtype rule: uint8 at rest, float32 for arithmetic, rounded (not truncated) back to uint8.
"""
import io
import os
import re
import zipfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image

from kit.files import replacing

PICTURES = (".png", ".apng", ".webp", ".gif")                             # still or moving
VIDEOS = (".mov", ".webm", ".mp4", ".mkv", ".avi")
MEDIA = (*VIDEOS, *PICTURES, ".zip")
MATTES = ("alpha", "pha", "mask", "seg", "matte")
UNEQUAL = "make them equal"                                               # in the sentence on a matte that does not fit


def by_number(name):
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def frames_of(names):
    return sorted((n for n in names if n.lower().endswith(".png") and Path(n).name[0] != "."), key=by_number)


def files_of(path):
    """The file itself, or the PNGs of a folder in their order."""
    return [path / name for name in frames_of(os.listdir(path))] if path.is_dir() else [path]


def name_of(path):
    return path.name if path.is_dir() else path.stem


def words(path):
    return re.sub("[_-]+", " ", name_of(path))


# ---- reading


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


def rgba_of(picture):
    """An open picture as it stands, uint8 (h, w, 4); of 16-bit grey, which Pillow would clip, the upper byte."""
    if picture.mode[0] == "I":
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return np.asarray(picture.convert("RGBA"))


def decode_picture(file):
    """Frames at a constant rate: a frame shown twice as long as the others comes back twice."""
    frames, times = [], []
    with Image.open(file) as picture:
        for i in range(getattr(picture, "n_frames", 1)):
            picture.seek(i)
            frames.append(rgba_of(picture))                               # first: only then is its duration known
            times.append(round(1000 * (picture.info.get("duration") or 100)))
    step = np.gcd.reduce(times)
    if 4 * step < min(times):                                             # 33, 33, 34 ms is rounding, not a rate
        step = min(times)
    return [frame for frame, time in zip(frames, times) for _ in range(round(time / step))]


def decode(path):
    """All frames of a medium, uint8 (t, h, w, 4); alpha 255 where it has none. ValueError if it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    try:
        if path.is_dir():
            frames = [decode_picture(file)[0] for file in files_of(path)]
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as file:
                frames = [decode_picture(io.BytesIO(file.read(name)))[0] for name in frames_of(file.namelist())]
        elif path.suffix.lower() in VIDEOS:
            frames = decode_video(path)
        else:
            frames = decode_picture(path)
        return np.stack(frames)
    except Exception as error:                                            # decoders raise whatever they like
        raise ValueError(f"{path} cannot be read as a video, an animation or a folder of PNGs of one size; "
                         f"is it empty, damaged or of another kind?") from error


def read_rgba(path, matte=None) -> tuple[np.ndarray, np.ndarray]:
    """(rgb (t, h, w, 3), alpha (t, h, w)), uint8 and straight, of a folder or .zip of PNGs, a video or a picture.
    Its alpha is `matte`, or else NAME_alpha.* (or _pha, _mask, _seg, _matte) beside it, or else its own, or 255.
    FileNotFoundError; ValueError for a medium that cannot be read, is empty, or whose matte does not fit."""
    path = Path(path)
    beside = (path.with_name(f"{name_of(path)}_{kind}{ending}") for kind in MATTES for ending in (*MEDIA, ""))
    return read_pair(path, Path(matte) if matte else next((m for m in beside if m.exists()), None))


def read_pair(path, matte):
    """read_rgba without looking for a matte: None is the medium's own alpha."""
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


def encode_picture(frames, kind=".png", **options):
    """The bytes of a picture of one frame (h, w, 4) or more."""
    first, *others = map(Image.fromarray, frames)
    if others:
        options |= dict(save_all=True, append_images=others)
    buffer = io.BytesIO()
    first.save(buffer, {".gif": "GIF", ".webp": "WEBP"}.get(kind, "PNG"), compress_level=1, **options)
    return buffer.getvalue()


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
    stills = [encode_picture([frame], ".webp", lossless=True, exact=True, quality=0, method=0) for frame in frames]
    moving = [chunk(b"ANMF", head, still[12:]) for still in stills]
    return chunk(b"RIFF", b"WEBP", chunk(b"VP8X", b"\x12\0\0\0", size), chunk(b"ANIM", bytes(6)), *moving)


def write_folder(path, frames):
    for i, frame in enumerate(frames):
        with replacing(path / f"{i:04d}.png") as temporary:
            temporary.write_bytes(encode_picture([frame]))
    for stale in path.glob("[0-9][0-9][0-9][0-9].png"):
        if int(stale.stem) >= len(frames):
            stale.unlink()


def write_rgba(path, rgb, alpha=None, fps=16) -> None:
    """Write a clip, uint8 and straight, by the ending of `path`; alpha None = opaque. Exact: .png .apng
    .webp, .zip of PNGs, and, without an ending, a folder of PNGs. Nearly: .mov (ProRes 4444) and .webm (VP9). .gif
    keeps one bit of alpha, .mp4 none; an .mp4 of odd size repeats its last row or column. ValueError, OSError."""
    path, kind = Path(path), Path(path).suffix.lower()
    if kind not in ("", ".zip", *ENCODERS, *PICTURES):
        raise ValueError(f"{path} has an unknown ending; use {' '.join((*ENCODERS, *PICTURES))} .zip or none.")
    alpha = np.full(rgb.shape[:3], 255, np.uint8) if alpha is None else alpha
    if not alpha.size or alpha.shape != rgb.shape[:3]:
        raise ValueError(f"cannot write {path}: its colour is {rgb.shape} and its alpha {alpha.shape}.")
    frames = rgb if kind == ".mp4" else np.concatenate([rgb, alpha[..., None]], -1)
    if not kind:
        return write_folder(path, frames)
    with replacing(path) as temporary:
        if kind in ENCODERS:
            encode_video(temporary, frames, fps)
        elif kind == ".zip":
            with zipfile.ZipFile(temporary, "w") as file:
                for i, frame in enumerate(frames):                        # ZipInfo: a fixed date, so the same bytes
                    file.writestr(zipfile.ZipInfo(f"{i:04d}.png"), encode_picture([frame]))
        elif kind == ".webp":
            temporary.write_bytes(encode_webp(frames, fps))
        else:                                                             # disposal 0 1 0 1 keeps equal frames apart
            disposal = 2 if kind == ".gif" else [i % 2 for i in range(len(frames))]
            temporary.write_bytes(encode_picture(frames, kind, duration=1000 / fps, loop=0, disposal=disposal))


# ---- pixels


def bleed(rgb, alpha):
    """Give pixels of alpha 0 the colour around them: 2x2 means weighted by alpha, down to one pixel and up again. Every
    other pixel stays as it is. uint8 (t, h, w, 3), (t, h, w) -> uint8 (t, h, w, 3)."""
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
    whole, ways = [round(n / 0.8) for n in size], []                      # ways: of the window's top, then of its left
    for n, m in zip(size, whole):
        ends = (0, m - n) if rng.choice([1, -1]) > 0 else (m - n, 0)
        ways.append(np.linspace(*ends, frames).round().astype(int))
    return tuple(np.stack([x[0, top:top + size[0], left:left + size[1]] for top, left in zip(*ways)])
                 for x in cover(rgb, alpha, whole))


def random_crop(rgb, alpha, rng):
    """A window of 0.8 to 1 of the frame's size, the same for all frames."""
    old, share = np.array(alpha.shape[1:]), rng.uniform(0.8, 1)
    h, w = window = (share * old).round().astype(int).clip(1)
    top, left = rng.integers(old - window + 1)
    return rgb[:, top:top + h, left:left + w], alpha[:, top:top + h, left:left + w]


def in_parts(function, rgb, alpha):
    """function(rgb, alpha) of some frames at a time: the float32 of a whole clip may not fit into memory."""
    n = max(1, 2 ** 20 // alpha[0].size)
    parts = [function(rgb[k:k + n], alpha[k:k + n]) for k in range(0, len(rgb), n)]
    return parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts)))


def to_video(rgb, alpha):
    """uint8 (t, h, w, 3), (t, h, w) -> rgb (1, 3, t, h, w) in [-1, 1], alpha (1, 1, t, h, w) in [0, 1]."""
    return rearrange(torch.as_tensor(rgb), "t h w c -> 1 c t h w") / 127.5 - 1, torch.as_tensor(alpha)[None, None] / 255


def to_clip(rgb, alpha=None):
    """The way back: rgb (3, t, h, w), alpha (1, t, h, w) or None for opaque -> uint8 arrays, rounded."""
    alpha = torch.ones_like(rgb[:1]) if alpha is None else alpha
    pair = rearrange((rgb + 1) / 2, "c t h w -> t h w c"), alpha[0]
    return tuple((255 * x).round().clamp(0, 255).byte().cpu().numpy() for x in pair)


def checkerboard(h, w, cell=8):
    """uint8 (h, w, 3): light and dark grey squares of `cell` pixels, to show transparency on."""
    odd = (np.arange(h)[:, None] // cell + np.arange(w) // cell) % 2
    return repeat(np.where(odd, 176, 226).astype(np.uint8), "h w -> h w c", c=3)


def over(rgb, alpha, background):
    """Soft rendering, uint8: rgb * alpha + background * (1 - alpha); background: a colour or a picture, 0..255."""
    alpha = alpha[..., None].astype(np.float32) / 255
    return (rgb * alpha + np.asarray(background, np.float32) * (1 - alpha) + 0.5).astype(np.uint8)


def contact_sheet(path, rows, columns=6, scale=2) -> None:
    """Draw clips, one a row: `columns` frames over a checkerboard, then their alpha as grey. rows:
    (rgb (t, h, w, 3), alpha (t, h, w)) each, uint8, all of one frame size; scale: whole number."""
    lines = []
    for rgb, alpha in rows:
        pick = np.linspace(0, len(rgb) - 1, min(columns, len(rgb))).round().astype(int)
        colour = over(rgb[pick], alpha[pick], checkerboard(*alpha.shape[1:]))
        blank = ((0, 0), (0, columns - len(pick)), (0, 0), (0, 0), (0, 0))
        pair = np.pad(np.stack([colour, repeat(alpha[pick], "t h w -> t h w c", c=3)]), blank)
        lines.append(rearrange(pair, "s t h w c -> h (s t w) c"))
    sheet = repeat(np.concatenate(lines), "h w c -> (h i) (w j) c", i=scale, j=scale)
    with replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary)
