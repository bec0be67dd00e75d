"""RGBA media in and out (videos, animations, pictures, .zip and folders of PNGs), and what is done to their pixels.

A clip is rgb (t, h, w, 3), *straight* colour (never multiplied by alpha), and alpha (t, h, w): frames, height, width.
Straight colour means nothing where alpha is 0, yet hard rendering and filters look at it, so it is bled out of the
object. dtype rule: uint8 at rest, float32 for arithmetic, rounded (not truncated) back to uint8.
"""
import io
import re
import subprocess
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
ENCODERS = {".mov": "prores_ks -pix_fmt yuva444p10le -profile:v 4444 -alpha_bits 16 -vendor apl0",
            ".webm": "libvpx-vp9 -pix_fmt yuva420p -crf 8 -b:v 0 -deadline realtime -cpu-used 6 -auto-alt-ref 0",
            ".mp4": "libx264 -pix_fmt yuv420p -crf 12 -preset veryfast -movflags +faststart"}


def by_number(name):
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name       # 2 before 10


def frames_of(names):
    return sorted((n for n in names if n.lower().endswith(".png") and Path(n).name[0] != "."), key=by_number)


def files_of(path):
    """The file itself, or the PNGs of a folder in their order."""
    return [path / name for name in frames_of(file.name for file in path.iterdir())] if path.is_dir() else [path]


def name_of(path):
    return path.name if path.is_dir() else path.stem


def words(name):
    return re.sub("[_-]+", " ", name)


def decode_video(path):
    """Frames. ffmpeg's own VP9 and VP8 decoders drop alpha, so a file that names these codecs is given to libvpx."""
    with open(path, "rb") as file:
        head = file.read(65536)
    decoder = ["-c:v", "libvpx-vp9"] if b"V_VP9" in head else ["-c:v", "libvpx"] if b"V_VP8" in head else []
    reader = imageio_ffmpeg.read_frames(str(path.absolute()), pix_fmt="rgba", bits_per_pixel=32, input_params=decoder)
    meta = next(reader)
    frames = [np.frombuffer(frame, np.uint8).reshape(*meta["size"][::-1], 4) for frame in reader]
    if "audio_codec" not in meta and len(frames) < 0.8 * meta["fps"] * meta["duration"] - 2:    # sound may be longer
        raise ValueError("the video is cut short")
    return frames


def decode_picture(file):
    """Frames at a constant rate: a frame shown twice as long as the others comes back twice."""
    frames, times = [], []
    with Image.open(file) as picture:
        for i in range(getattr(picture, "n_frames", 1)):
            picture.seek(i)
            deep = picture.mode[0] == "I"                                 # 16-bit grey, which Pillow would clip
            frame = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if deep else picture
            frames.append(np.asarray(frame.convert("RGBA")))              # first: only then is its duration known
            times.append(round(1000 * (picture.info.get("duration") or 100)))
    common = np.gcd.reduce(times)
    step = common if 4 * common >= min(times) else min(times)             # 33, 33, 34 ms is rounding, not a rate
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
                frames = [decode_picture(file.open(name))[0] for name in frames_of(file.namelist())]
        else:
            frames = decode_video(path) if path.suffix.lower() in VIDEOS else decode_picture(path)
        return np.stack(frames)
    except Exception as error:                                            # decoders raise whatever they like
        raise ValueError(f"{path} cannot be read as a video, an animation or a folder of PNGs of one size; "
                         f"is it empty, damaged or of another kind?") from error


def read_rgba(path) -> tuple[np.ndarray, np.ndarray]:
    """The (rgb, alpha) of a medium, with the matte NAME_alpha.* (see MATTES) beside it if there is one."""
    path = Path(path)
    beside = (path.with_name(f"{name_of(path)}_{kind}{ending}") for kind in MATTES for ending in (*MEDIA, ""))
    return read_pair(path, next((matte for matte in beside if matte.exists()), None))


def read_pair(path, matte):
    """The (rgb, alpha) of a medium; without a matte its own alpha, or 255. FileNotFoundError; ValueError."""
    frames = decode(path)
    rgb, alpha = np.ascontiguousarray(frames[..., :3]), np.ascontiguousarray(frames[..., 3])
    if matte:
        alpha = decode(matte)[..., :3].mean(-1, dtype=np.float32).round().astype(np.uint8)
        if alpha.shape != rgb.shape[:3]:
            raise ValueError(f"{path} has (frames, height, width) {rgb.shape[:3]} but its matte {matte.name} has "
                             f"{alpha.shape}; {UNEQUAL}.")
    return rgb, alpha


def encode_video(path, frames, fps):
    if path.suffix.lower() == ".mp4":                                     # its codec wants even sizes
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    h, w = frames.shape[1:3]
    command = (f"-y -v quiet -f rawvideo -pix_fmt rgba -s {w}x{h} -r {fps} -i - -c:v {ENCODERS[path.suffix.lower()]} "
               "-vf scale=out_color_matrix=bt709:out_range=tv,"
               "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709 -fflags +bitexact")
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *command.split(), path.absolute()],      # "a:b" is no URL
                          input=frames.ravel().data)
    if done.returncode:
        raise OSError(f"cannot write a {path.suffix} of {w} x {h} pixels to {path.parent}; is the folder writable?")


def encode_webp(frames, fps):
    """Lossless animated WebP (layout: its container specification): a list of stills, so that equal frames and colour
    under alpha 0 stay as they are; the usual encoder merges the former and blackens the latter."""
    size = b"".join((n - 1).to_bytes(3, "little") for n in frames.shape[2:0:-1])
    head = bytes(6) + size + round(1000 / fps).to_bytes(3, "little") + b"\2"            # x, y, w, h, ms, no blending
    chunks = [(b"VP8X", b"\x12\0\0\0" + size), (b"ANIM", bytes(6))]
    for frame in frames:
        still = io.BytesIO()
        Image.fromarray(frame).save(still, "WEBP", lossless=True, exact=True, quality=0, method=0)
        chunks.append((b"ANMF", head + still.getvalue()[12:]))
    body = b"".join(name + len(content).to_bytes(4, "little") + content for name, content in chunks)
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


def write_folder(path, frames):
    for i, frame in enumerate(frames):
        with replacing(path / f"{i:04d}.png") as temporary:
            Image.fromarray(frame).save(temporary, compress_level=1)
    for stale in path.glob("[0-9][0-9][0-9][0-9].png"):
        if int(stale.stem) >= len(frames):
            stale.unlink()


def write_rgba(path, rgb, alpha=None, fps=16) -> None:
    """Write a clip by the ending of `path`; alpha None: opaque. Exact: .png .apng .webp, .zip of PNGs, and, without an
    ending, a folder of PNGs. Nearly: .mov (ProRes 4444), .webm (VP9). .gif keeps one bit of alpha, .mp4 none."""
    path, kind = Path(path), Path(path).suffix.lower()
    if kind not in ("", ".zip", *ENCODERS, *PICTURES):
        raise ValueError(f"{path} has an unknown ending; use {' '.join((*ENCODERS, *PICTURES))} .zip or none.")
    alpha = np.full(rgb.shape[:3], 255, np.uint8) if alpha is None else alpha
    if not alpha.size or alpha.shape != rgb.shape[:3]:
        raise ValueError(f"cannot write {path}: its colour is {rgb.shape} and its alpha {alpha.shape}.")
    frames = np.concatenate([rgb, alpha[..., None]], -1)
    if not kind:
        return write_folder(path, frames)
    with replacing(path) as temporary:
        if kind in ENCODERS:
            encode_video(temporary, frames, fps)
        elif kind == ".zip":
            with zipfile.ZipFile(temporary, "w") as file:
                for i, frame in enumerate(frames):                        # ZipInfo: a fixed date, so the same bytes
                    with file.open(zipfile.ZipInfo(f"{i:04d}.png"), "w") as picture:
                        Image.fromarray(frame).save(picture, "PNG", compress_level=1)
        elif kind == ".webp":
            temporary.write_bytes(encode_webp(frames, fps))
        else:                                                             # disposal 0 1 0 1 keeps equal frames apart
            first, *others = map(Image.fromarray, frames)
            first.save(temporary, save_all=True, append_images=others, duration=1000 / fps, loop=0, compress_level=1,
                       disposal=2 if kind == ".gif" else [i % 2 for i in range(len(frames))])


def bleed(rgb, alpha):
    """The colour, where alpha is 0 that around: 2x2 means weighted by alpha, down to one pixel and up again."""
    def fill(x):                                                          # sums of colour * alpha and of alpha
        h, w = x.shape[2:]
        mean = x[:, :3] / x[:, 3:].clamp(min=1e-6)
        if max(h, w) == 1 or x[:, 3].all():
            return mean
        coarse = fill(F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=1))
        return torch.where(x[:, 3:] > 0, mean, F.interpolate(coarse, scale_factor=2)[..., :h, :w])

    weight = torch.as_tensor(alpha)[..., None] / 255
    filled = fill(torch.cat([torch.as_tensor(rgb) * weight, weight], -1).movedim(-1, 1)).movedim(1, -1)
    return np.where(alpha[..., None] > 0, rgb, (filled + 0.5).clamp(max=255).byte())


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


def rescale(rgb, alpha, size, bled=True):
    """A clip at size (h, w), colour weighed by alpha. Where alpha is 0 the colour is bled, or else as it was stored."""
    if alpha.shape[1:] == tuple(size):
        return (bleed(rgb, alpha) if bled else rgb), alpha
    small, matte = unpremultiply(resize(premultiply(rgb, alpha), size))
    if not bled:
        hidden = resize(torch.from_numpy(rgb).movedim(-1, 1).float(), size).round().byte().movedim(1, -1).numpy()
        small = np.where(matte[..., None] > 0, small, hidden)
    return small, matte


def cover(rgb, alpha, size, bled=True):
    """Scale a clip until it covers size (h, w) and keep its middle; of a clip of that size only hidden colour moves."""
    old, n = alpha.shape[1:], max(1, 2 ** 20 // alpha[0].size)
    if len(rgb) > n:                                                      # all as float32 may not fit into memory
        parts = [cover(rgb[k:k + n], alpha[k:k + n], size, bled) for k in range(0, len(rgb), n)]
        return tuple(map(np.concatenate, zip(*parts)))
    scale = max(size[0] / old[0], size[1] / old[1])
    h, w = (max(new, round(was * scale)) for new, was in zip(size, old))
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return tuple(x[:, top:top + size[0], left:left + size[1]] for x in rescale(rgb, alpha, (h, w), bled))


def area_size(h, w, area) -> tuple[int, int]:
    """The size (h, w) of about this area and aspect; both sides the nearest multiples of 16, at least 16."""
    return tuple(max(16, 16 * round((area * ratio) ** 0.5 / 16)) for ratio in (h / w, w / h))


def to_and_fro(n, count, start=0) -> list[int]:
    """The numbers of `count` frames of a clip of n, from `start` on, turning round at its ends."""
    way = [*range(n), *range(n - 2, 0, -1)]
    return [way[(start + k) % len(way)] for k in range(count)]


def slide(rgb, alpha, size, frames, rng, bled=True):
    """A clip of a still: a window of 0.8 of it goes in a straight line from one corner to the opposite one."""
    whole = [round(n / 0.8) for n in size]
    room = np.subtract(whole, size)
    start = room * rng.choice(2, 2)
    corners = np.linspace(start, room - start, frames).round().astype(int)
    return tuple(np.stack([x[0, top:top + size[0], left:left + size[1]] for top, left in corners])
                 for x in cover(rgb, alpha, whole, bled))


def random_crop(rgb, alpha, rng):
    """A window of 0.8 to 1 of the frame's size, the same for all frames."""
    old, share = np.array(alpha.shape[1:]), rng.uniform(0.8, 1)
    h, w = window = (share * old).round().astype(int).clip(1)
    top, left = rng.integers(old - window + 1)
    return rgb[:, top:top + h, left:left + w], alpha[:, top:top + h, left:left + w]


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
    """Draw clips (rgb, alpha) of one frame size, one a row: `columns` frames over a checkerboard, then their alpha."""
    sheet = np.zeros((len(rows), 2, columns, *rows[0][0].shape[1:]), np.uint8)
    for row, (rgb, alpha) in zip(sheet, rows):
        pick = np.linspace(0, len(rgb) - 1, min(columns, len(rgb))).round().astype(int)
        row[0, :len(pick)] = over(rgb[pick], alpha[pick], checkerboard(*alpha.shape[1:]))
        row[1, :len(pick)] = alpha[pick, ..., None]
    tile(path, rearrange(sheet, "r s t h w c -> r (s t) h w c"), scale)


def tile(path, rows, scale=2) -> None:
    """A row of pictures for each of rows, uint8 (n, h, w, 3), the same n, h, w."""
    with replacing(path) as temporary:
        sheet = repeat(np.stack(rows), "r n h w c -> (r h i) (n w j) c", i=scale, j=scale)
        Image.fromarray(sheet).save(temporary)


def heat(x, low, high):
    """(t, h, w) as uint8 (t, h, w, 3), from dark blue over red to yellow."""
    share = np.clip((np.asarray(x, dtype=float) - low) / (high - low), 0, 1)[..., None]
    stops = np.array([[20, 20, 70], [190, 40, 60], [255, 235, 90]], dtype=float)
    lower, upper = stops[0] + 2 * share * (stops[1] - stops[0]), stops[1] + (2 * share - 1) * (stops[2] - stops[1])
    return np.where(share < 0.5, lower, upper).astype(np.uint8)
