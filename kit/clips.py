"""Procedural clips: captioned RGBA clips (see kit.media) out of nothing but a seed, to learn from without a download.

A clip shows an object of one shape, colour, material and motion, of any size and anywhere in the frame, sometimes a
second, small one; one clip in eight has a path of its own, which its caption does not name. Where alpha is 0 its colour
is that of a scene behind it, as in matting sets (kit.data bleeds the object's colour there unless it is told not to).
With --scenes the clips are opaque: the object before that scene, among others, for a base model to learn from.
One combination in eight and three sentences in nine are kept for testing.

    python -m kit.clips data/ --clips 2000                          # to disk, with captions
    python -m kit.clips scenes/ --clips 2000 --scenes               # opaque video for python -m kit.pretrain
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
from kit.drawing import BACKGROUNDS, COLORS, MATERIALS, SHAPES, background, draw, stack
from kit.files import save_text
from kit.media import PICTURES, contact_sheet, decode, over, premultiply, resize, unpremultiply, words, write_rgba

PHRASES = {"solid": ("{c} {s}", "solid {c} {s}", "{s} in solid {c}"),
           "glass": ("{c} glass {s}", "{s} made of {c} glass", "{s} of {c} glass"),
           "glow": ("glowing {c} {s}", "{c} glowing {s}", "{s} of glowing {c} light"),
           "smoke": ("smoky {c} {s}", "{c} {s} made of smoke", "{s} of {c} smoke"),
           "bubble": ("{c} soap bubble {s}", "{c} soap bubble shaped like a {s}", "{s} of {c} soap bubble")}
MOTIONS = {"moving from left to right": ("moves from left to right", "travels from left to right"),
           "moving from right to left": ("moves from right to left", "travels from right to left"),
           "rising": ("rises", "goes up"), "falling": ("falls", "drops down"),
           "bouncing": ("bounces", "jumps up and down"), "growing": ("grows", "gets bigger"),
           "spinning": ("spins", "turns around"), "orbiting": ("orbits", "goes around in a circle")}
SENTENCES = ("{a} {ing}", "{a} is {ing}", "{a} {does}", "{bare}, {ing}", "there is {a} {ing}", "we see {a}, it {does}")
UNSEEN_SENTENCES = ("{bare} {does}", "there is {a}, it {does}", "we see {a} {ing}")       # never trained on
WITHOUT_MOTION = ("{a}", "{bare}", "there is {a}")
SHOTS, STYLES = ("Close-up shot.", "Medium shot."), ("Realistic style.", "Cartoon style.")
FRAMES = ("{sentence}", "This video has a {ground} background. {shot} {Sentence}. {style}",
          "A {ground} background. {Sentence}.", "{Sentence}. {style} {shot} This video has a {ground} background.")
COMBINATIONS = [dict(shape=s, color=c, material=m, motion=v)
                for s, c, m, v in product(SHAPES, COLORS, MATERIALS, MOTIONS)]
RADIUS = 0.16, 0.30                                                       # of an object, in the frame's shorter side
Clip = namedtuple("Clip", "rgb alpha caption attributes")                 # uint8 (t, h, w, 3) straight and (t, h, w)


# ---- what a clip shows, in words


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


def draw_wording(rng) -> dict:
    """How a caption is put; all 0 is the shortest."""
    choices = dict(sentence=len(SENTENCES), phrase=3, verb=2, shot=2, style=2)
    frame = int(rng.choice(4, p=(0.4, 0.3, 0.15, 0.15)))
    return dict(frame=frame) | {name: int(rng.integers(n)) for name, n in choices.items()}


def with_article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def worded(bare, motion, wording, beside="", ground="transparent", sentences=SENTENCES) -> str:
    """A caption of what is called `bare` and moves so (None: its motion is not named), beside another object."""
    w = dict(frame=0, sentence=0, verb=0, shot=0, style=0) | wording
    form = (sentences if motion else WITHOUT_MOTION)[w["sentence"] % (len(sentences) if motion else 3)]
    does = MOTIONS[motion][w["verb"]] if motion else ""
    sentence = form.format(a=with_article(bare), bare=bare, ing=motion, does=does) + beside
    return FRAMES[w["frame"]].format(sentence=sentence, Sentence=sentence[0].upper() + sentence[1:], ground=ground,
                                     shot=SHOTS[w["shot"]], style=STYLES[w["style"]])


def caption_of(attributes, wording=None, **options) -> str:
    """Prompt of a clip in a wording of `draw_wording` (None: its own, or the shortest). options: those of `worded`."""
    wording = attributes.get("wording", {}) if wording is None else wording
    phrase = PHRASES[attributes["material"]][wording.get("phrase", 0)]
    bare, beside = phrase.format(c=attributes["color"], s=attributes["shape"]), ""
    if attributes.get("second"):
        beside = f" beside a small {attributes['second_color']} {attributes['second_shape']}"
    return worded(bare, attributes["motion"], wording, beside, **options)


# ---- where it goes


def wander(rng, s, room):
    """A path with one bend, about as long as the room (x, y) allows: (2, t) around the middle."""
    points = rng.uniform(-0.5, 0.5, (3, 2)) * room
    return np.stack([(1 - s) ** 2 * a + 2 * s * (1 - s) * b + s * s * c for a, b, c in points.T])


def trajectory(rng, motion, frames, width, radius, pad, spread=1.0):
    """Centre, in frame heights, and scale, (2, t) each, x and y. The object, `pad` around it, stays in the frame: as
    near to its middle as `spread` says (at most so many heights away), or anywhere where the motion leaves room."""
    s = np.linspace(0, 1, frames) if frames > 1 else np.array([0.5])
    amount, phase, direction = rng.uniform(0.2, 0.48), rng.uniform(-1, 1), rng.choice([-1, 1])
    room_x, room_y = width - 2 * (radius + pad), 1 - 2 * (radius + pad)
    move, scale = np.zeros((2, frames)), np.ones((2, frames))
    ease = 0.8 * s + 0.2 * s * s * (3 - 2 * s) - 0.5
    if motion is None:
        move = wander(rng, s, (room_x, room_y))
    elif motion.startswith("moving"):
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
    elif motion == "growing":
        scale[:] = 0.55 + (1.15 - 0.55) * (ease + 0.5)
    elif motion == "spinning":                                            # about the vertical axis, like a coin
        turn = 2 * np.pi * s * direction + 0.3 * phase
        scale[0] = np.sqrt(np.cos(turn) ** 2 + 0.25 ** 2 * np.sin(turn) ** 2)
    else:                                                                 # orbiting
        turn = 2 * np.pi * (s * direction + phase)
        move[:] = min(0.38 * amount, room_x / 2, room_y / 2) * np.stack([np.cos(turn), np.sin(turn)])
    half, reach = np.array([[width / 2], [0.5]]), radius * scale + pad
    low, high = (reach - half - move).max(1), (half - reach - move).min(1)
    low, high = np.minimum(low, high), np.maximum(low, high)              # without room: about the middle
    place = rng.uniform(np.maximum(low, np.minimum(-spread, high)), np.minimum(high, np.maximum(spread, low)))
    return half + move + place[:, None], scale


# ---- clips


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


def draw_moving(rng, looks, size, frames, attributes, radius, spread=1.0):
    """(rgb, alpha, distance) of an object, its radius in the frame's shorter side; looks: draws the material."""
    shape, color, material = (attributes[name] for name in ("shape", "color", "material"))
    width = size[1] / size[0]
    radius = radius * min(1, width) * {"glow": 0.76, "smoke": 0.93}.get(material, 1)
    pad = 1.5 / size[0] + radius * {"glow": 0.42, "smoke": 0.12}.get(material, 0)
    track = trajectory(rng, attributes["motion"], frames, width, radius * 1.04, pad, spread)
    return draw(looks, size, shape, color, material, radius, track)


def scene(seed, size, frames, others=0):
    """A background's kind, and uint8 (t, h, w, 3) of it with as many objects of any look."""
    rng = np.random.default_rng([seed, 67])
    kind = str(rng.choice(list(BACKGROUNDS), p=list(BACKGROUNDS.values())))
    rgb = background(rng, kind, frames, size)
    for _ in range(others):
        attributes = COMBINATIONS[rng.integers(len(COMBINATIONS))]
        front, alpha, _ = draw_moving(rng, rng, size, frames, attributes, rng.uniform(0.08, 0.22))
        rgb = rgb + alpha[..., None] * (front - rgb)
    return kind, (255 * rgb + 0.5).astype(np.uint8)


def procedural_clip(seed: int, size=64, frames=17, split="train", two=0.12, radius=RADIUS, spread=1.0, wander=0.12,
                    **fixed) -> Clip:
    """Same arguments, same bytes. size: side or (h, w); split: "train" shows no held-out combination, "test" no other;
    two: share of clips with a second, small object; radius: least and most; spread: see `trajectory`; wander: share of
    clips with a path that no caption names; fixed pins shape=, color=, material=, motion=. ValueError."""
    size = (size, size) if isinstance(size, int) else size
    rng, looks = np.random.default_rng([seed, 64]), np.random.default_rng([seed, 65])
    attributes = choose(rng, split, fixed) | dict(second=False, wording=draw_wording(rng))
    pair, wanders, radius = rng.random() < two, rng.random() < wander, rng.uniform(*radius)
    if wanders and "motion" not in fixed:
        attributes["motion"] = None
    shown = draw_moving(rng, looks, size, frames, attributes, radius, spread)
    rgb, alpha = shown[:2]
    if pair:
        second, shape, color = second_object(rng, size, frames, attributes)
        rgb, alpha = stack(shown, second)
        attributes |= dict(second=True, second_shape=shape, second_color=color)
    rgb, alpha = ((255 * k + 0.5).astype(np.uint8) for k in (rgb, alpha))
    rgb = np.where(alpha[..., None] > 0, rgb, scene(seed, size, frames)[1])
    return Clip(rgb, alpha, caption_of(attributes), attributes)


def in_scene(seed: int, clip: Clip) -> Clip:
    """The clip as opaque video: before a background that its caption names, and up to two objects that it does not."""
    rng = np.random.default_rng([seed, 68])
    kind, behind = scene(seed, clip.alpha.shape[1:], len(clip.alpha), others=int(rng.choice(3, p=(0.5, 0.3, 0.2))))
    caption = clip.caption.replace("transparent background", f"{kind} background")
    rgb = over(clip.rgb, clip.alpha, behind)
    return Clip(rgb, np.full_like(clip.alpha, 255), caption, clip.attributes | dict(background=kind))


def sprite_clip(seed: int, picture, name, size=64, frames=17) -> Clip:
    """A square clip of a picture, uint8 (h, w, 4), moved as the procedural objects are and captioned by its name."""
    rng = np.random.default_rng([seed, 66])
    motion, wording, radius = str(rng.choice(list(MOTIONS))), draw_wording(rng), rng.uniform(0.16, 0.29)
    track = trajectory(rng, motion, frames, 1, radius, 1.5 / size)
    centre, scale = torch.tensor(np.array(track), dtype=torch.float32).mT                    # (t, 2) each
    half = radius * torch.tensor(picture.shape[1::-1]) / max(picture.shape)                  # width and height, halved
    still = premultiply(picture[None, ..., :3], picture[None, ..., 3])
    still = resize(still, [round(max(1, 2 * size * n)) for n in half.flip(0).tolist()])
    theta = torch.cat([torch.diag_embed(0.5 / scale / half), ((0.5 - centre) / scale / half)[..., None]], -1)
    grid = F.affine_grid(theta, (frames, 4, size, size), align_corners=False)
    rgb, alpha = unpremultiply(F.grid_sample(still.expand(frames, -1, -1, -1), grid, align_corners=False))
    rgb = np.where(alpha[..., None] > 0, rgb, scene(seed, (size, size), frames)[1])
    return Clip(rgb, alpha, worded(name, motion, wording), dict(name=name, motion=motion, wording=wording))


# ---- to disk


def load_sprites(folder):
    """[(uint8 (h, w, 4), name)] of the pictures in a folder that have transparency."""
    files = [path for path in sorted(Path(folder).glob("[!.]*")) if path.suffix.lower() in PICTURES]
    pictures = [(decode(path)[0], words(path.stem)) for path in files]
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
    if not (folder / "data.json").exists() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; choose a new folder for procedural clips.")
    try:
        save_text(folder / "data.json", record)
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}); choose another folder.") from error
    lines = []
    for i in tqdm(range(args.clips), desc=f"clips to {folder}"):
        seed, name = args.seed * 1_000_000 + i, f"{i:05d}"
        clip = (sprite_clip(seed, *sprites[i % len(sprites)], args.size, args.frames) if sprites else
                procedural_clip(seed, args.size, args.frames))
        clip = in_scene(seed, clip) if args.scenes else clip
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
    add("--scenes", action="store_true", help="opaque video: the objects before backgrounds")
    add("--sprites", help="folder of pictures to animate instead; their names are the captions")
    args = parser.parse_args(argv)
    if args.size % 16:
        raise ValueError(f"--size {args.size} must be a multiple of 16.")
    if args.folder:
        return write_clips(Path(args.folder), args)
    clips = [procedural_clip(i, shape=SHAPES[i], color=list(COLORS)[i], motion=list(MOTIONS)[i]) for i in range(8)]
    rows = [row for i, clip in enumerate(clips) for row in (clip, in_scene(i, clip))]
    contact_sheet("out/procedural.png", [row[:2] for row in rows])
    print(*(row.caption for row in rows), "drawn in out/procedural.png", sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.clips"))
