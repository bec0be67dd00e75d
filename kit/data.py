"""The data set: captioned RGBA clips of any folder, its files as they are, also mixed and in sub-folders.

    NAME.mp4, NAME_seg.mp4          colour and matte (or _alpha, _pha, _mask, _matte), of any kind below
    metadata.csv                    video_fgr,video_pha,prompt or video,alpha,prompt; no alpha: the file's own
    NAME.mov .webm .webp .gif .png .apng .zip, or a sub-folder NAME of PNGs: with an alpha of their own; also stills

Each caption is in NAME.txt. Differs from the official loader, which replaces a file it cannot read by another sample
without a word: here it is named and left out, more than one in ten are an error (test_bad_clips_are_named_and_left_out)

    python -m kit.data data/ --workers 8        # what is in a folder, and what is wrong with it
"""
import csv
import json
import math
import os
import sys
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
from kit.media import (MATTES, MEDIA, UNEQUAL, area_size, by_number, cover, files_of, frames_of, in_parts, name_of,
                       random_crop, read_pair, slide, to_and_fro, to_video, words)

COLUMNS = ("video_fgr", "video_pha", "prompt"), ("video", "alpha", "prompt")      # of a metadata.csv
ROW = dict(name=str, bytes=int, changed=(int, float), frames=int, height=int, width=int, opaque=(int, float),
           semi=(int, float), transparent=(int, float), caption=bool, error=(str, type(None)))      # see examine

# ---- what a folder holds


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
    faults = {"columns": not columns, "rows": not rows, "a video in a row": not all(video for video, _, _ in rows)}
    lacks = next((name for name, missing in faults.items() if missing), None)
    if lacks:
        raise ValueError(f"{path} lacks {lacks}; its first line is to be {' or '.join(map(','.join, COLUMNS))}, each "
                         "other line a clip.")
    return [Sample(path.parent / video, path.parent / matte if matte else None, caption or None, root)
            for video, matte, caption in rows]


def walk(root):
    """(folder, names of its files) of a folder and its sub-folders, hidden ones not; a link back up is not followed."""
    def refuse(error):
        raise error

    seen = set()
    for top, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(top))
        folders[:] = sorted(name for name in folders if name[0] != "." and
                            os.path.realpath(os.path.join(top, name)) not in seen)
        yield Path(top), [name for name in files if name[0] != "."]


def find_samples(folder) -> list[Sample]:
    """The clips of a folder and its sub-folders, in natural order: the rows of each metadata.csv, and what is found by
    looking: videos, pictures, .zip, the PNGs of a sub-folder (one clip), each with the matte beside it if there is one.
    What a csv names is not found again. FileNotFoundError, ValueError, OSError."""
    root, media, found = Path(folder), [], []
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; `python -m kit.clips {root}` makes one.")
    for top, names in walk(root):
        kinds = MEDIA
        if top != root and frames_of(names):
            media.append(top)
            kinds = [kind for kind in MEDIA if kind != ".png"]
        media += [top / name for name in names if Path(name).suffix.lower() in kinds]
        if "metadata.csv" in names:
            found += read_csv(top / "metadata.csv", root)
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


# ---- what is wrong with it


def written_caption(sample) -> str:
    """The csv's prompt, or else NAME.txt; "" without either. ValueError if that is not UTF-8."""
    if sample.caption or not sample.text.exists():
        return sample.caption or ""
    try:
        return sample.text.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{sample.text} is not UTF-8; save the caption in that encoding.") from error


def identity(sample) -> dict:
    """Name, bytes and newest time of a sample's files, caption included: as long as they stay, so does its row."""
    stats = [os.stat(file) for file in (*sample.files, sample.text) if os.path.exists(file)]
    return dict(name=sample.name, bytes=sum(s.st_size for s in stats), changed=max([0.0, *(s.st_mtime for s in stats)]))


def examine(sample) -> dict:
    """Read a sample: a row of RGBADataset.check."""
    row = dict.fromkeys(ROW, 0) | dict(caption=False, error=None) | identity(sample)
    try:
        row["caption"] = bool(written_caption(sample))
        alpha = read_pair(sample.path, sample.matte)[1]
    except (ValueError, OSError) as error:
        return row | dict(error=str(error))
    frames, height, width = alpha.shape
    shares = dict(opaque=alpha == 255, semi=(alpha > 0) & (alpha < 255), transparent=alpha == 0)
    return row | dict(frames=frames, height=height, width=width) | {k: float(x.mean()) for k, x in shares.items()}


def known_rows(file) -> list[dict]:
    """The rows that a file keeps; what is none, whoever wrote it, is passed over."""
    def fits(row):
        return isinstance(row, dict) and row.keys() == ROW.keys() and all(isinstance(row[k], ROW[k]) for k in ROW)

    rows = None
    with suppress(OSError, ValueError, RecursionError):                   # no such file yet, or a damaged one
        rows = json.loads(file.read_text(encoding="utf-8"))
    return list(filter(fits, rows)) if isinstance(rows, list) else []


# ---- the data set


class RGBADataset(Dataset):
    """Captioned RGBA clips of a folder, see find_samples.

    An item: dict(rgb float32 (3, t, h, w) in [-1, 1], alpha float32 (1, t, h, w) in [0, 1], caption, name). Clips are
    scaled to cover `size` (side or (h, w), pixels; keep_aspect: to its area, in their own aspect), and cut to `frames`
    or played to and fro if shorter; over a still a window slides. The caption is the csv's prompt, or NAME.txt, or else
    the words of the name. Up to cache_gb of decoded files stay in memory. The last 5 %, at most 8, do not train.
    """

    def __init__(self, folder, size=64, frames=17, cache_gb=4.0, keep_aspect=False):
        self.folder, self.samples, self.frames, self.keep_aspect = folder, find_samples(folder), frames, keep_aspect
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.kept, self.lengths, self.cache = {}, {}, cache_gb * 2 ** 30
        self.room = self.cache

    def __len__(self):
        return len(self.samples)

    @property
    def training(self) -> int:
        """How many clips train: the first ones."""
        return len(self) - min(8, len(self) // 20)

    def held_out(self, n: int = 8) -> list[int]:
        """The first n that do not train; of a set too small to hold any out, clips that train."""
        first = self.training if self.training < len(self) else 0
        return list(range(first, len(self)))[:n]

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

    def release(self) -> None:
        """Forget the decoded files: their memory is free again."""
        self.kept.clear()
        self.room = self.cache

    def clip(self, i, variant=0):
        """uint8 (rgb (t, h, w, 3), alpha (t, h, w)) in the data set's size and length.
        variant > 0: another window, of 0.8 to 1 of a video's frame; the same i and variant, the same clip."""
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
        always = f"size {self.size}, frames {self.frames}, keep_aspect {self.keep_aspect}"
        drawn = variant > 0 if frames > 1 else self.frames > 1            # only then i and variant have a say
        return f"{always}, clip {i}, variant {variant}" if drawn else always

    def content(self, i) -> str:
        """SHA-256 (hex) over the bytes of the medium and then of its matte."""
        return cache_key(*map(file_key, self.samples[i].files))

    def check(self, workers=0, known=()) -> list[dict]:
        """A row for each sample, see examine; read in `workers` processes, 0: in this one. OSError.
        known: earlier rows; a sample whose name, bytes and changed stand in one of them is not read again."""
        known = {(row["name"], row["bytes"], row["changed"]): row for row in known}
        rows = [known.get(tuple(identity(sample).values())) for sample in self.samples]
        todo = [i for i, row in enumerate(rows) if row is None]
        try:
            with ProcessPoolExecutor(workers) if workers else nullcontext() as pool:
                read = (pool.map if workers else map)(examine, [self.samples[i] for i in todo])
                for i, row in tqdm(zip(todo, read), desc=f"reading {self.folder}", total=len(todo)):
                    rows[i] = row
        except BrokenExecutor as error:
            raise OSError(f"a process reading {self.folder} was ended, for want of memory perhaps; "
                          f"use fewer than {workers} workers.") from error
        return rows

    def drop_bad(self, rows) -> None:
        """Leave out samples whose row has an error, and name them on stderr. ValueError if more than one in ten has."""
        refuse_many(self.folder, rows)
        errors = [row["error"] for row in rows if row["error"]]
        if errors:
            said = [f"skipped: {error}" for error in errors] + [f"skipped {len(errors)} of {len(self)} clips"]
            print("\n".join(said), file=sys.stderr)
        self.lengths |= {sample: row["frames"] for sample, row in zip(self.samples, rows)}
        self.samples = [sample for sample, row in zip(self.samples, rows) if not row["error"]]

    def __getitem__(self, i):
        rgb, alpha = to_video(*self.clip(i))
        return dict(rgb=rgb[0], alpha=alpha[0], caption=self.caption(i), name=self.name(i))


def refuse_many(folder, rows) -> None:
    bad = [row["name"] for row in rows if row["error"]]
    if 10 * len(bad) > len(rows):
        raise ValueError(f"{len(bad)} of {len(rows)} clips in {folder} cannot be used, for instance "
                         f"{', '.join(bad[:3])}; `python -m kit.data {folder}` says why.")


def open_data(folder, size, frames, workers, cache_gb=4.0, keep_aspect=False) -> RGBADataset:
    """The data set of a training: every clip was read once, what cannot be read is left out. What was found is kept as
    .checked.json, so that only new and changed files are read the next time; `fingerprint` is its key. cache_gb: of all
    processes and their workers together."""
    dataset = RGBADataset(folder, size, frames, cache_gb / processes() / max(1, workers), keep_aspect)
    file = Path(folder) / ".checked.json"

    def check():
        rows = dataset.check(workers, known_rows(file))
        with suppress(OSError):                                           # a folder that cannot be written: read again
            save_text(file, json.dumps(rows))
        return rows
    rows = from_first(check)
    dataset.drop_bad(rows)
    dataset.fingerprint = cache_key(*(f"{row['name']} {row['bytes']}" for row in rows if not row["error"]))
    return dataset


# ---- the command


def summarize(rows) -> dict:
    """What the rows of a check come to, name -> text."""
    good, errors = [row for row in rows if not row["error"]], [row["error"] for row in rows if row["error"]]
    unequal, blank = sum(UNEQUAL in error for error in errors), sum(row["opaque"] == 1 for row in good)
    table = {"clips": len(rows), "captions missing": sum(not row["caption"] for row in good),
             "pairs of unequal length or size": unequal, "cannot be read": len(errors) - unequal,
             "no transparency at all": f"{blank}  (warning: they teach nothing about alpha)" if blank else 0}
    if not good:
        return table
    frames, h, w = (np.array([row[key] for row in good]) for key in ("frames", "height", "width"))
    sizes = Counter(zip(h.tolist(), w.tolist())).most_common(5)
    table["height x width (clips)"] = ", ".join(f"{a} x {b} ({n})" for (a, b), n in sizes)
    for name, numbers in (("frames", frames), ("width / height", w / h)):
        table[f"{name}: min, median, max"] = "  ".join(f"{x:.4g}" for x in np.quantile(numbers, (0, 0.5, 1)))
    for key, name in (("opaque", "opaque"), ("semi", "semi-transparent"), ("transparent", "transparent")):
        table[f"{name} pixels"] = f"{np.average([row[key] for row in good], weights=frames * h * w):.1%}"
    return table


def main(argv=None):
    parser = Parser(prog="kit.data", description="Read all clips of a folder; say what is in it and what is wrong.")
    parser.add_argument("folder", help="clips with captions, see above")
    parser.add_argument("--workers", type=whole, default=0, help="processes that read; 0: this one")
    args = parser.parse_args(argv)
    rows = RGBADataset(args.folder).check(args.workers)
    table = [f"{name:36}{value}" for name, value in summarize(rows).items()]
    print("\n".join(table + [row["error"] for row in rows if row["error"]]))
    refuse_many(args.folder, rows)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.data"))
