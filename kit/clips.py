"""Procedural clips: captioned RGBA clips (see kit.media) out of nothing but a seed, to learn from without a download.

A clip shows an object of one shape, colour, material and motion, sometimes a second, small one, and is described in
one of 40 wordings. One combination in eight is kept for testing. Letters: t frames, h w height and width; u v an
object's coordinates in radii, x y the frame's in heights; sd signed distance to the outline, negative inside.

    python -m kit.clips data/ --clips 2000                          # to disk, with captions
    python -m kit.clips data/ --clips 2000 --sprites pictures/      # pictures of your own, moved the same way
    python -m kit.clips                                             # draws out/procedural.png
"""
import json
import sys
import zlib
from collections import namedtuple
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kit.command import Parser, clip_frames, positive, run_command, whole
from kit.files import save_text
from kit.media import PICTURES, contact_sheet, decode, premultiply, resize, unpremultiply, words, write_rgba

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
COMBINATIONS = [dict(shape=s, color=c, material=m, motion=v)
                for s, c, m, v in product(SHAPES, COLORS, MATERIALS, MOTIONS)]
REACH = 1.6                                                               # half width of a distance table, in radii
Clip = namedtuple("Clip", "rgb alpha caption attributes")                 # uint8 (t, h, w, 3) straight and (t, h, w)
Place = namedtuple("Place", "u v unit sd depth facing spot body pixel")


@cache
def held_out(shape, color, material, motion) -> bool:
    """One combination in eight is kept for testing, by a rule that never changes."""
    return zlib.crc32(f"{shape} {color} {material} {motion}".encode()) % 8 == 0


def choose(rng, split, fixed):
    """Attributes of one clip of a split; with all four pinned, of either."""
    pool = COMBINATIONS if len(fixed) == 4 else [c for c in COMBINATIONS if held_out(**c) == (split == "test")]
    left = [c for c in pool if fixed.items() <= c.items()]
    if not left:
        raise ValueError(f"no clip of the {split} split is {fixed}; pin other attributes, or fewer.")
    return left[rng.integers(len(left))]


def worded(template, look, subject, bare, noun, motion):
    """A content in one of 5 templates and 4 looks; all but the short ones name transparency as Wan-Alpha's prompts."""
    shot, style = ("Close-up shot.", "Medium shot.")[look % 2], ("Realistic style.", "Cartoon style.")[look // 2]
    sentence = f"{subject[0].upper()}{subject[1:]} {motion}."
    return (f"This video has a transparent background. {shot} {sentence} {style}", f"{subject} {motion}",
            f"A transparent background. {sentence}", f"{bare}, {motion}", f"{noun} is {motion}")[template]


def caption_of(attributes, wording=None) -> str:
    """Prompt of a clip. wording 0: Wan-Alpha's template, 1: short, up to 39: others; None: the clip's own."""
    wording = attributes.get("wording", 0) if wording is None else wording
    phrases = [p.format(c=attributes["color"], s=attributes["shape"]) for p in PHRASES[attributes["material"]]]
    bare, motion = phrases[wording // 5 % 2], attributes["motion"]
    subject = f"an {bare}" if bare[0] in "aeiou" else f"a {bare}"
    if attributes.get("second"):
        motion += f" and a small {attributes['second_color']} {attributes['second_shape']}"
    return worded(wording % 5, wording // 10, subject, bare, phrases[2], motion)


def outline(shape):
    """Closed polygon of a shape: complex numbers, x right and y down, within about the unit circle."""
    a = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if shape == "cube":
        return np.exp(1j * (np.arange(6) * np.pi / 3 + np.pi / 6))
    if shape == "star":
        radii = np.where(np.arange(10) % 2, 0.47, 1.04)
        return radii * np.exp(1j * (np.arange(10) * np.pi / 5 - np.pi / 2)) + 0.06j
    if shape == "heart":
        height = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a) + 2.4
        return 16 * np.sin(a) ** 3 / 17 - 1j * height / 16
    if shape == "drop":
        return 0.86 * np.sin(a) * np.sin(a / 2) ** 1.3 - 0.98j * np.cos(a)
    if shape == "leaf":
        s = np.linspace(-1, 1, 49)
        side = 0.56j * (1 - s ** 2) ** 0.9 * (1 - 0.25 * s)
        return np.concatenate([s + side, (s - side)[-2:0:-1]]) * np.exp(-1j * np.radians(48))
    dome, hem = np.linspace(np.pi, 2 * np.pi, 40), np.linspace(0.74, -0.74, 60)         # of a ghost, wavy below
    waves = 0.72 - 0.17 * np.cos(hem / 0.74 * 3 * np.pi)
    return np.concatenate([0.74 * np.exp(1j * dome) - 0.18j, hem + 1j * waves])


@cache
def distance_table(shape, n=192):
    """Signed distance (negative inside) and its gradient on a grid over [-REACH, REACH]^2: (n, n, 3), in radii."""
    axis = np.linspace(-REACH, REACH, n)
    p = axis + 1j * axis[:, None]
    if shape == "ball":
        sd = np.abs(p) - 0.96
    elif shape == "ring":
        sd = np.abs(np.abs(p) - 0.74) - 0.26
    else:
        a = outline(shape)[:, None, None]                                 # each side goes from a to b
        b = np.roll(a, -1, 0)
        along = np.clip(((p - a) / (b - a)).real, 0, 1)
        far = np.abs(p - a - along * (b - a)).min(0)
        turned = np.angle((p - b) / (p - a)).sum(0)                       # seen from inside, it goes all the way round
        sd = np.where(np.abs(turned) > np.pi, -far, far)
    gy, gx = np.gradient(sd, axis, axis)
    return np.stack([sd, gx, gy], -1).astype(np.float32)


def distance(shape, u, v):
    """Signed distance (bilinear) and its gradient (nearest) at points u, v: three arrays shaped like u."""
    n = len(distance_table(shape))
    x, y = (np.clip((k + REACH) * ((n - 1) / (2 * REACH)), 0, n - 1.001) for k in (u, v))
    i, j = y.astype(np.int32), x.astype(np.int32)
    fy, fx, k = y - i, x - j, i * n + j
    sd, gx, gy = distance_table(shape).reshape(-1, 3).T
    top, low = sd[k] * (1 - fx) + sd[k + 1] * fx, sd[k + n] * (1 - fx) + sd[k + n + 1] * fx
    return top * (1 - fy) + low * fy, gx[k], gy[k]


def trajectory(rng, motion, frames, width, radius, pad):
    """Centre, in frame heights, and scale, (2, t) each, x and y. The object, `pad` around it, stays in the frame."""
    s = np.linspace(0, 1, frames) if frames > 1 else np.array([0.5])
    jitter = rng.uniform(-0.08, 0.08, 2)
    amount, phase, direction = rng.uniform(0.42, 0.48), rng.uniform(-1, 1), rng.choice([-1, 1])
    room_x, room_y = width - 2 * (radius + pad), 1 - 2 * (radius + pad)
    move, scale = np.zeros((2, frames)), np.ones((2, frames))
    ease = 0.8 * s + 0.2 * s * s * (3 - 2 * s) - 0.5
    if motion.startswith("moving"):
        move[0] = min(amount * width, room_x) * ease * (1 if motion.endswith("right") else -1)
    elif motion == "rising":
        move[1] = -min(amount, room_y) * ease
    elif motion == "falling":
        move[1] = min(amount, room_y) * (0.6 * s + 0.4 * s * s - 0.5)
    elif motion == "bouncing":                                            # two hops, flatter on the ground
        height = np.abs(np.sin(2 * np.pi * s + 0.15 * phase))
        scale[1] = 1 - 0.15 * np.exp(-(height / 0.3) ** 2)
        scale[0] = 1 / scale[1] ** 0.6
        move[1] = min(0.85 * amount, room_y) * (0.5 - height) + radius * (1 - scale[1])
        jitter[1] = 0
    elif motion == "growing":
        scale[:] = 0.55 + (1.15 - 0.55) * (ease + 0.5)
    elif motion == "spinning":                                            # about the vertical axis, like a coin
        turn = 2 * np.pi * s * direction + 0.3 * phase
        scale[0] = np.sqrt(np.cos(turn) ** 2 + 0.25 ** 2 * np.sin(turn) ** 2)
    else:                                                                 # orbiting
        turn = 2 * np.pi * (s * direction + phase)
        move[:] = 0.18 * min(1, width) * np.stack([np.cos(turn), np.sin(turn)])
        jitter[:] = 0
    half, reach = np.array([[width / 2], [0.5]]), radius * scale + pad
    low, high = (reach - half - move).max(1), (half - reach - move).min(1)
    jitter = np.clip(jitter, np.minimum(low, 0), np.maximum(high, 0))     # as far as the border allows
    return half + move + jitter[:, None], scale


def smoothstep(x, low, high):
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def noise(rng, u, v):
    """Smooth noise in [0, 1] that drifts with time: eight random waves over points u, v (t, h, w)."""
    total, s = 0, np.linspace(0, 1, len(u), dtype=np.float32)[:, None, None]
    for length, angle, drift, start in rng.uniform((2.2, 0, 2, 0), (5.5, 2 * np.pi, 5, 2 * np.pi), (8, 4)).tolist():
        total = total + np.sin(length * (np.cos(angle) * u + np.sin(angle) * v) + drift * s + start, dtype=np.float32)
    return smoothstep(total, -3.0, 3.0)


def place(shape, radius, track, h, w):
    """Where each pixel lies in the object: distance in radii (unit) and heights (sd), ..., (t, h, w) each."""
    (x, y), (sx, sy) = np.asarray(track, np.float32)[..., None, None]
    u = ((np.arange(w, dtype=np.float32) + 0.5) / h - x) / (radius * sx)
    v = ((np.arange(h, dtype=np.float32)[:, None] + 0.5) / h - y) / (radius * sy)
    u, v = np.broadcast_arrays(u, v)                                      # (t, h, w)
    unit, nx, ny = distance(shape, u, v)
    sd = unit * (radius / np.sqrt((nx / sx) ** 2 + (ny / sy) ** 2 + 1e-4))
    sd += radius * np.hypot(np.maximum(np.abs(u) - REACH, 0) * sx, np.maximum(np.abs(v) - REACH, 0) * sy)
    depth = np.clip(unit / -0.45, 0, 1)
    facing = (1 - depth) * -(0.55 * nx + 0.75 * ny)                       # towards a light from above left
    spot_u, spot_v = {"ring": (-0.52, -0.52), "drop": (-0.24, 0.22), "leaf": (0.18, -0.44)}.get(shape, (-0.30, -0.34))
    spot = np.exp(-((u - spot_u) ** 2 + (v - spot_v) ** 2 * 1.6) / 0.022, dtype=np.float32) * smoothstep(-unit, 0, 0.1)
    return Place(u, v, unit, sd, depth, facing, spot, body=np.clip(0.5 - sd * h, 0, 1), pixel=1 / (radius * h))


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


def draw(rng, size, shape, color, material, radius, track):
    """One object: straight colour (t, h, w, 3) and alpha (t, h, w), float32 in [0, 1], and its distance (t, h, w)."""
    p = place(shape, radius, track, *size)
    base = np.array(COLORS[color], np.float32)
    rgb, line = shaded(shape, base, p)
    if material == "solid":
        alpha, rgb = p.body, rgb + 0.45 * p.spot[..., None] * (1 - rgb)
    elif material == "glass":
        edge = smoothstep(64 * p.sd, -2.6, -1.2)                          # in pixels of a frame 64 high
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
        edge = np.maximum(smoothstep(64 * p.sd, -2.2, -0.6), 0.5 * line)
        alpha = p.body * np.maximum(0.24 + 0.56 * edge, 0.85 * smoothstep(p.spot, 0.35, 0.8))
        phase = (3.2 * p.unit + 1.8 * p.u - 1.1 * p.v + rng.uniform(0, 6))[..., None]
        tint = np.cos(phase + np.array([0, 2.1, 4.2], np.float32), dtype=np.float32)
        rgb = rgb + (0.09 + 0.09 * p.depth[..., None]) * tint
        rgb = rgb + 0.9 * smoothstep(p.spot, 0.2, 0.8)[..., None] * (1 - rgb)
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
    across, along = (width, 1) if upright else (1, width)
    border = across / 2 + side * (across / 2 - 1.04 * radius - 1.5 / size[0])
    centre = [border + 0 * sway, (where + sway) * along]
    track = centre if upright else centre[::-1], np.ones((2, frames))
    return draw(rng, size, shape, color, "solid", radius, track), shape, color


def procedural_clip(seed: int, size=64, frames=17, split="train", two=0.12, **fixed) -> Clip:
    """Same arguments, same bytes. size: side or (h, w); split: "train" shows no held-out combination, "test" no other;
    two: share of clips with a second, small object; fixed pins shape=, color=, material=, motion=. ValueError."""
    size = (size, size) if isinstance(size, int) else size
    rng, material_rng = np.random.default_rng([seed, 64]), np.random.default_rng([seed, 65])
    attributes = choose(rng, split, fixed) | dict(second=False, wording=int(rng.integers(40)))
    material, width = attributes["material"], size[1] / size[0]
    radius = rng.uniform(0.225, 0.26) * min(1, width) * {"glow": 0.76, "smoke": 0.93}.get(material, 1)
    pad = 1.5 / size[0] + radius * {"glow": 0.42, "smoke": 0.12}.get(material, 0)
    pair = rng.random() < two
    track = trajectory(rng, attributes["motion"], frames, width, radius * 1.04, pad)
    rgb, alpha, sd = draw(material_rng, size, attributes["shape"], attributes["color"], material, radius, track)
    if pair:
        (rgb2, alpha2, sd2), shape, color = second_object(rng, size, frames, attributes)
        front, back = alpha + 1e-3 * (sd < sd2), alpha2 * (1 - alpha) + 1e-3 * (sd2 <= sd)
        rgb = (rgb * front[..., None] + rgb2 * back[..., None]) / (front + back)[..., None]
        alpha = alpha + alpha2 * (1 - alpha)
        attributes |= dict(second=True, second_shape=shape, second_color=color)
    rgb, alpha = ((255 * k + 0.5).astype(np.uint8) for k in (rgb, alpha))
    return Clip(rgb, alpha, caption_of(attributes), attributes)


def sprite_clip(seed: int, picture, name, size=64, frames=17) -> Clip:
    """A square clip of a picture, uint8 (h, w, 4), moved as the procedural objects are and captioned by its name."""
    rng = np.random.default_rng([seed, 66])
    motion, wording, radius = str(rng.choice(MOTIONS)), int(rng.integers(20)), rng.uniform(0.24, 0.29)
    track = trajectory(rng, motion, frames, 1, radius, 1.5 / size)
    centre, scale = torch.tensor(np.array(track), dtype=torch.float32).mT                    # (t, 2) each
    half = radius * torch.tensor(picture.shape[1::-1]) / max(picture.shape)                  # width and height, halved
    still = premultiply(picture[None, ..., :3], picture[None, ..., 3])
    still = resize(still, [round(max(1, 2 * size * n)) for n in half.flip(0).tolist()])
    theta = torch.cat([torch.diag_embed(0.5 / scale / half), ((0.5 - centre) / scale / half)[..., None]], -1)
    grid = F.affine_grid(theta, (frames, 4, size, size), align_corners=False)
    rgb, alpha = unpremultiply(F.grid_sample(still.expand(frames, -1, -1, -1), grid, align_corners=False))
    caption = worded(wording % 5, wording // 5, name, name, name, motion)
    return Clip(rgb, alpha, caption, dict(name=name, motion=motion, wording=wording))


def load_sprites(folder):
    """[(uint8 (h, w, 4), name)] of the pictures in a folder that have transparency."""
    files = [path for path in sorted(Path(folder).glob("[!.]*")) if path.suffix.lower() in PICTURES]
    pictures = [(decode(path)[0], words(path)) for path in files]
    sprites = [(picture, name) for picture, name in pictures if picture[..., 3].min() < 255]
    if not sprites:
        raise ValueError(f"there is no picture with transparency in {folder}; give pictures with alpha, as PNG say.")
    return sprites


def write_clips(folder, args):
    """Clips NNNNN.apng with captions NNNNN.txt, metadata.jsonl, and data.json, the record of how they were made."""
    sprites = load_sprites(args.sprites) if args.sprites else []
    record = json.dumps({name: value for name, value in vars(args).items() if name != "folder"}, indent=1)
    if (folder / "data.json").exists() and (folder / "data.json").read_text() != record:
        raise ValueError(f"{folder} already holds clips made with other arguments (data.json); choose another folder.")
    try:
        save_text(folder / "data.json", record)
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}); choose another folder.") from error
    lines = []
    for i in tqdm(range(args.clips), desc=f"clips to {folder}"):
        seed, name = args.seed * 1_000_000 + i, f"{i:05d}"
        clip = (sprite_clip(seed, *sprites[i % len(sprites)], args.size, args.frames) if sprites else
                procedural_clip(seed, args.size, args.frames))
        write_rgba(folder / f"{name}.apng", clip.rgb, clip.alpha)
        save_text(folder / f"{name}.txt", clip.caption + "\n")
        lines.append(json.dumps(dict(file=f"{name}.apng", caption=clip.caption, seed=seed, **clip.attributes)) + "\n")
    save_text(folder / "metadata.jsonl", "".join(lines))


def main(argv=None):
    parser = Parser(prog="kit.clips", description="Write captioned RGBA clips; without a folder, draw a figure.")
    add = parser.add_argument
    add("folder", nargs="?", help="where to write")
    add("--clips", type=positive, default=2000, help="how many")
    add("--size", type=positive, default=64, help="height and width, pixels, a multiple of 16")
    add("--frames", type=clip_frames, default=17, help="per clip, 4k+1")
    add("--seed", type=whole, default=0, help="same seed, same bytes")
    add("--sprites", help="folder of pictures to animate instead; their names are the captions")
    args = parser.parse_args(argv)
    if args.size % 16:
        raise ValueError(f"--size {args.size} must be a multiple of 16.")
    if args.folder:
        return write_clips(Path(args.folder), args)
    clips = [procedural_clip(i, shape=SHAPES[i], color=list(COLORS)[i], motion=MOTIONS[i]) for i in range(8)]
    contact_sheet("out/procedural.png", [clip[:2] for clip in clips])
    print(*(clip.caption for clip in clips), "drawn in out/procedural.png", sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.clips"))
