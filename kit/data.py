"""The data set: captioned RGBA clips of any folder, its files as they are, also mixed and in sub-folders.

    NAME.mp4, NAME_seg.mp4          colour and matte (or _alpha, _pha, _mask, _matte), of any kind below; the colour may
                                    be NAME_rgb.mp4, too (or _fgr, _fg, _color)
    metadata.csv                    video,alpha,prompt, or as others call them (COLUMNS); no alpha: the file's own
    NAME.mov .webm .webp .gif .png .apng .zip, or a sub-folder NAME of PNGs: with an alpha of their own; also stills

Each caption is in NAME.txt, several with an empty line between; a csv may have labels, too. The official loader
replaces a file it cannot read by another sample without a word: here it is named and left out, more than one in ten are
an error (test_bad_clips_are_named_and_left_out).

    python -m kit.data data/ --workers 8        # what is in a folder, and what is wrong with it
"""
import csv
import json
import os
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from kit.command import Parser, from_first, processes, run_command, whole
from kit.files import cache_key, file_key, save_text
from kit.media import (MATTES, MEDIA, UNEQUAL, area_size, by_number, cover, files_of, name_of, random_crop, read_pair,
                       slide, to_and_fro, to_video, words)

COLOURS = ("rgb", "fgr", "fg", "color")
COLUMNS = dict(video=("video", "video_fgr", "fgr", "rgb", "file_name", "file", "path"),             # of a metadata.csv
               alpha=("alpha", "video_pha", "pha", "mask", "matte"), prompt=("prompt", "caption", "text"),
               labels=("labels", "tags"))                                 # in their known spellings
ROW = dict(name=str, bytes=int, changed=float, frames=int, height=int, width=int, opaque=float, semi=float,
           transparent=float, caption=bool, error=str)                            # of a check, see Sample.examine


@dataclass(frozen=True)
class Sample:
    path: Path                                                            # a file or a folder of PNGs
    matte: Path | None = None                                             # None: the medium's own alpha
    caption: str | None = None                                            # of a csv
    root: Path = Path()
    labels: str = ""

    @property
    def name(self):
        return Path(os.path.relpath(self.path, self.root)).as_posix()

    @property
    def title(self):
        """The file's name without its ending and, if it has a matte, without _rgb."""
        name = name_of(self.path)
        ends = (f"_{kind}" for kind in COLOURS if self.matte and name.endswith(f"_{kind}"))
        return name.removesuffix(next(ends, ""))

    @property
    def text(self):
        files = [self.path.with_name(f"{name}.txt") for name in (name_of(self.path), self.title)]
        return next((file for file in files if file.exists()), files[0])

    @property
    def files(self):
        return [file for path in (self.path, self.matte) if path for file in files_of(path)]

    def written_caption(self) -> str:
        """The csv's prompt, or else NAME.txt; "" without either. ValueError if that is not UTF-8."""
        if self.caption or not self.text.exists():
            return self.caption or ""
        try:
            return self.text.read_text("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.text} is not UTF-8; save the caption in that encoding.") from error

    def identity(self) -> dict:
        """Name, bytes and newest time of the files, caption included: as long as they stay, so does their row."""
        info = [os.stat(file) for file in (*self.files, self.text) if os.path.exists(file)]
        return dict(name=self.name, bytes=sum(s.st_size for s in info), changed=max([0.0, *(s.st_mtime for s in info)]))

    def examine(self) -> dict:
        """Read the files: a row of a check."""
        row = {name: kind() for name, kind in ROW.items()} | dict(error=None) | self.identity()
        try:
            caption, alpha = self.written_caption(), read_pair(self.path, self.matte)[1]
        except (ValueError, OSError) as error:
            return row | dict(error=str(error))
        row |= zip(("frames", "height", "width"), alpha.shape)
        shares = dict(opaque=alpha == 255, semi=(alpha > 0) & (alpha < 255), transparent=alpha == 0)
        return row | {name: float(x.mean()) for name, x in shares.items()} | dict(caption=bool(caption))


def read_csv(path, root) -> list[Sample]:
    """The clips of a metadata.csv, one a row; its paths are relative to its own folder. ValueError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, restval="")
            lines, names = list(table), table.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table in UTF-8; save it as one.") from error
    columns = [next((name for name in spellings if name in names), None) for spellings in COLUMNS.values()]
    rows = [row for row in ([line[c].strip() if c else "" for c in columns] for line in lines) if any(row)]
    faults = {"a column of videos": not columns[0], "rows": not rows,
              "a video in a row": not all(row[0] for row in rows)}
    lacks = next((name for name, missing in faults.items() if missing), None)
    if lacks:
        raise ValueError(f"{path} lacks {lacks}; its first line names columns, video and, if there are, alpha and "
                         "prompt (or as others call them, such as video_fgr,video_pha), each other line is a clip.")
    if any(None in line for line in lines):
        raise ValueError(f"{path} has a line of more cells than its first one; put text with a comma in quotes.")
    return [Sample(path.parent / video, path.parent / matte if matte else None, caption or None, root, labels)
            for video, matte, caption, labels in rows]


def walk(root):
    """All files below, but hidden ones; a folder that a link leads back to is not entered again. OSError."""
    def refuse(error):
        raise error
    seen = set()
    for top, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(top))
        folders[:] = [name for name in folders if name[0] != "." and os.path.realpath(Path(top, name)) not in seen]
        yield from (Path(top, name) for name in files if name[0] != ".")


def find_samples(folder) -> list[Sample]:
    """The clips of a folder and its sub-folders, in natural order: the rows of each metadata.csv; videos, pictures,
    .zip and sub-folders of PNGs that none names, each with the matte beside it. FileNotFoundError, ValueError."""
    root, media, folders, found = Path(folder), {}, {}, []                # media: path -> path without its ending
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; `python -m kit.clips {root}` makes one.")
    for path in walk(root):
        if path.name == "metadata.csv":
            found += read_csv(path, root)
        elif path.suffix.lower() == ".png" and path.parent != root:
            folders.setdefault(path.parent, []).append(path)
        elif path.suffix.lower() in MEDIA and path.is_file():
            media[path] = path.with_suffix("")
    for top, pictures in folders.items():
        media |= {top: top} if are_frames(pictures) else {path: path.with_suffix("") for path in pictures}
    named = {path.resolve() for sample in found for path in (sample.path, sample.matte) if path}
    named |= {path.parent for path in named}                              # then its PNGs are stills, not one clip
    found += [Sample(*pair, root=root) for pair in with_mattes(media) if pair[0].resolve() not in named]
    if not found:
        raise ValueError(f"{root} holds no clip; put videos, pictures, folders of PNGs there, each with a NAME.txt.")
    return sorted(found, key=lambda sample: by_number(sample.name))


def are_frames(pictures: list[Path]) -> bool:
    """Whether the PNGs of a folder are one clip: named alike but for numbers, and of one size. If not, they are stills,
    and a warning says so."""
    names = {re.sub(r"\d+", "", path.name.lower()) for path in pictures}
    if len(names) == 1 and len({picture_size(path) for path in pictures}) == 1:
        return True
    warnings.warn(f"{pictures[0].parent}: its {len(pictures)} pictures are taken as stills, for frames of a clip would "
                  "have numbers as names and one size")
    return False


def picture_size(path: Path) -> tuple[int, int] | None:
    """Of a PNG, from its head; None of what is none, which is told when it is read."""
    with open(path, "rb") as file:
        head = file.read(24)
    return (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) if head[:8] == b"\x89PNG\r\n\x1a\n" else None


def with_mattes(media):
    """(medium, the matte beside it or None), of those that are no mattes. ValueError: a matte without its colour."""
    paths = {stem: path for path, stem in sorted(media.items(), reverse=True)}

    def beside(stem):
        names = [stem.name, *(stem.name.removesuffix(f"_{kind}") for kind in COLOURS if stem.name.endswith(f"_{kind}"))]
        return [stem.with_name(f"{name}_{kind}") for name in names for kind in MATTES]
    pairs = {path: next((paths[matte] for matte in beside(stem) if matte in paths), None)
             for path, stem in media.items()}
    mattes = {*pairs.values()}
    for path, stem in media.items():
        if paths[stem] in mattes:
            continue
        kind = next((kind for kind in MATTES if stem.name.endswith(f"_{kind}")), None)
        if kind and path.suffix.lower() in (".mp4", ".avi"):              # they have no alpha of their own
            raise ValueError(f"{path} is named as a matte, but there is no colour {stem.name.removesuffix(f'_{kind}')} "
                             f"beside it; rename or remove it.")
        yield path, pairs[path]


class RGBADataset(Dataset):
    """Clips: dict(rgb float32 (3, t, h, w) in [-1, 1], alpha float32 (1, t, h, w) in [0, 1], caption, name). They are
    scaled to cover `size` (side or (h, w), pixels; keep_aspect: to its area, in their own aspect), and cut to `frames`
    or played to and fro if shorter; over a still a window slides. bled: where alpha is 0 the colour around is spread,
    else it stays as stored. Up to cache_gb of decoded files stay in memory."""

    def __init__(self, folder, size=64, frames=17, cache_gb=4.0, keep_aspect=False, bled=True):
        self.folder, self.samples, self.frames, self.keep_aspect = folder, find_samples(folder), frames, keep_aspect
        self.bled = bled
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.lengths, self.cache = {}, cache_gb * 2 ** 30
        self.release()

    def __len__(self):
        return len(self.samples)

    @property
    def training(self) -> int:
        """How many clips train: the last 5 % do not, at most 8, and none that is of the same file as one that does."""
        n = len(self) - min(8, len(self) // 20)
        while 0 < n < len(self) and self.samples[n].path == self.samples[n - 1].path:
            n -= 1
        return n or len(self)

    def held_out(self, n: int = 8) -> list[int]:
        """The first n that do not train; of a set too small to hold any out, clips that train."""
        return list((range(self.training, len(self)) or range(len(self)))[:n])

    def name(self, i) -> str:
        return self.samples[i].name

    def caption(self, i, variant=0) -> str:
        """Of several captions, with an empty line between them, each variant takes the next; a csv's labels come before
        or after it, at random, as the paper's."""
        sample = self.samples[i]
        several = re.split(r"\n\s*\n", sample.written_caption() or words(sample.title))
        parts = [several[variant % len(several)].strip(), sample.labels]
        return " ".join(filter(None, parts[::np.random.default_rng([i, variant, 1]).choice((1, -1))]))

    def source(self, i):
        """uint8 (rgb (t, h, w, 3), alpha (t, h, w)) of the whole clip at its own size, its hidden colour as stored."""
        sample = self.samples[i]
        if sample in self.kept:
            return self.kept[sample]
        rgb, alpha = read_pair(sample.path, sample.matte)
        if self.room >= rgb.nbytes + alpha.nbytes:
            self.room -= rgb.nbytes + alpha.nbytes
            self.kept[sample] = rgb, alpha
        return rgb, alpha

    def release(self) -> None:
        self.kept, self.room = {}, self.cache

    def clip(self, i, variant=0):
        """The clip in the data set's size and length; variant > 0: another window, of 0.8 to 1 of a video's frame, from
        any place of a longer one."""
        (rgb, alpha), rng = self.source(i), np.random.default_rng([i, variant])
        size = area_size(*alpha.shape[1:], self.size[0] * self.size[1]) if self.keep_aspect else self.size
        if len(rgb) == 1 < self.frames:
            return slide(rgb, alpha, size, self.frames, rng, self.bled)
        if variant and len(rgb) > 1:
            rgb, alpha = random_crop(rgb, alpha, rng)
        start = rng.integers(len(rgb) - self.frames + 1) if variant and len(rgb) > self.frames else 0
        pick = slice(None) if len(rgb) >= self.frames else to_and_fro(len(rgb), self.frames)
        part = slice(start, start + self.frames)
        return tuple(x[pick] for x in cover(rgb[part], alpha[part], size, self.bled))

    def geometry(self, i, variant=0) -> str:
        """All that clip(i, variant) depends on besides the bytes of its files."""
        frames = self.lengths.get(self.samples[i]) or len(self.source(i)[0])
        always = f"size {self.size}, frames {self.frames}, keep_aspect {self.keep_aspect}, bled {self.bled}"
        drawn = variant > 0 if frames > 1 else self.frames > 1            # only then i and variant have a say
        return f"{always}, clip {i}, variant {variant}" if drawn else always

    def content(self, i) -> str:
        return cache_key(*map(file_key, self.samples[i].files))

    def check(self, workers=0, known=()) -> list[dict]:
        """A row for each sample, read in `workers` processes, 0: in this one, or of its known rows. OSError."""
        known = {(row["name"], row["bytes"], row["changed"]): row for row in known}
        rows = {sample: known.get(tuple(sample.identity().values())) for sample in self.samples}
        todo = [sample for sample, row in rows.items() if not row]
        try:
            with ProcessPoolExecutor(workers) if workers else nullcontext() as pool:
                read = (pool.map if workers else map)(Sample.examine, todo)
                rows |= tqdm(zip(todo, read), desc=f"reading {self.folder}", total=len(todo))
        except BrokenExecutor as error:
            raise OSError(f"a process reading {self.folder} was ended, for want of memory perhaps; "
                          f"use fewer than {workers} workers.") from error
        return [rows[sample] for sample in self.samples]

    def __getitem__(self, i):
        rgb, alpha = to_video(*self.clip(i))
        return dict(rgb=rgb[0], alpha=alpha[0], caption=self.caption(i), name=self.name(i))


def refuse_many(folder, rows) -> None:
    bad = [row["name"] for row in rows if row["error"]]
    if 10 * len(bad) > len(rows):
        raise ValueError(f"{len(bad)} of {len(rows)} clips in {folder} cannot be used, for instance "
                         f"{', '.join(bad[:3])}; `python -m kit.data {folder}` says why.")


def check_again(dataset, file, workers) -> list[dict]:
    """dataset.check that reads only what is new since its rows were kept in a file; damaged rows are passed over."""
    known, kinds = [], (ROW, ROW | dict(error=type(None)))
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError):
        rows = json.loads(file.read_text(encoding="utf-8"))
        known = [row for row in rows if {name: type(value) for name, value in row.items()} in kinds]
    rows = dataset.check(workers, known)
    with suppress(OSError):                                               # a folder that cannot be written: read again
        save_text(file, json.dumps(rows))
    return rows


def refuse_opaque(folder, rows) -> None:
    """ValueError if most clips have no transparency: a training of alpha learns nothing from them."""
    opaque = [row["name"] for row in rows if not row["error"] and row["opaque"] == 1]
    if 2 * len(opaque) > len(rows):
        raise ValueError(f"{len(opaque)} of {len(rows)} clips in {folder} have no transparency at all, for instance "
                         f"{', '.join(opaque[:3])}; put mattes beside them, such as NAME_alpha.mp4.")


def open_data(folder, size, frames, workers, cache_gb=4.0, opaque=False, **options) -> RGBADataset:
    """The data set of a training, without what cannot be read; cache_gb: of all processes and workers together. opaque:
    clips without any transparency may be the most."""
    dataset = RGBADataset(folder, size, frames, cache_gb / processes() / max(1, workers), **options)
    rows = from_first(lambda: check_again(dataset, Path(folder) / ".checked.json", workers))
    refuse_many(folder, rows)
    if not opaque:
        refuse_opaque(folder, rows)
    skipped = [f"skipped: {row['error']}" for row in rows if row["error"]]
    if skipped:
        print(*skipped, f"skipped {len(skipped)} of {len(rows)} clips", sep="\n", file=sys.stderr)
    dataset.lengths = {sample: row["frames"] for sample, row in zip(dataset.samples, rows) if not row["error"]}
    dataset.samples = [sample for sample, row in zip(dataset.samples, rows) if not row["error"]]
    dataset.fingerprint = cache_key(*(f"{row['name']} {row['bytes']}" for row in rows if not row["error"]))
    return dataset


def summarize(rows) -> dict:
    """What the rows of a check come to, name -> text."""
    good, errors = [row for row in rows if not row["error"]], [row["error"] for row in rows if row["error"]]
    unequal, blank = sum(UNEQUAL in error for error in errors), sum(row["opaque"] == 1 for row in good)
    table = {"clips": len(rows), "captions missing": sum(not row["caption"] for row in good),
             "pairs of unequal length or size": unequal, "cannot be read": len(errors) - unequal,
             "no transparency at all": f"{blank}  (warning: they teach nothing about alpha)" if blank else 0}
    if not good:
        return table
    sizes = Counter(f"{row['height']} x {row['width']}" for row in good).most_common(5)
    table["height x width (clips)"] = ", ".join(f"{size} ({n})" for size, n in sizes)
    frames, h, w = (np.array([row[key] for row in good]) for key in ("frames", "height", "width"))
    for name, numbers in (("frames", frames), ("width / height", w / h)):
        table[f"{name}: min, median, max"] = "  ".join(f"{x:.4g}" for x in np.quantile(numbers, (0, 0.5, 1)))
    for key, name in (("opaque", "opaque"), ("semi", "semi-transparent"), ("transparent", "transparent")):
        table[f"{name} pixels"] = f"{np.average([row[key] for row in good], weights=frames * h * w):.1%}"
    return table


def became(sample, row) -> str:
    """One line on a clip: what it was taken as."""
    if row["error"]:
        return f"{sample.name}: left out"
    kind = f"clip of {row['frames']} frames" if row["frames"] > 1 else "still"
    matte = f", matte {sample.matte.name}" if sample.matte else ", opaque" if row["opaque"] == 1 else ""
    return f"{sample.name}: {kind}, {row['width']}x{row['height']}{matte}{'' if row['caption'] else ', no caption'}"


def ignored(folder, samples) -> list[str]:
    """Files below a folder that no clip is made of."""
    used = {path.resolve() for sample in samples for path in (*sample.files, sample.text)}
    ours = ("metadata.csv", "metadata.jsonl", "data.json")
    paths = (path for path in walk(folder) if path.resolve() not in used and path.name not in ours)
    return sorted(Path(os.path.relpath(path, folder)).as_posix() for path in paths)


def main(argv=None):
    parser = Parser(prog="kit.data", description="Read all clips of a folder; say what is in it and what is wrong.")
    parser.add_argument("folder", help="clips with captions, see above")
    parser.add_argument("--workers", type=whole, default=0, help="processes that read; 0: this one")
    args = parser.parse_args(argv)
    dataset = RGBADataset(args.folder)
    rows = dataset.check(args.workers)
    lines = [became(sample, row) for sample, row in zip(dataset.samples, rows)]
    lines += [f"ignored: {path}" for path in ignored(args.folder, dataset.samples)]
    lines += [f"{name:36}{value}" for name, value in summarize(rows).items()]
    print("\n".join(lines + [row["error"] for row in rows if row["error"]]))
    refuse_many(args.folder, rows)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.data"))
