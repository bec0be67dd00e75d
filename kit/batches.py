"""The batches that trainings draw: crops of clips, or latents that were encoded once and kept as files.

A draw gets a random generator for each sample of its part of the batch (kit.run) and takes that sample's numbers from
it alone, so that a sample is the same whatever part of a batch it is drawn in.
"""
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Generator
from tqdm import tqdm

from kit.command import ranks
from kit.data import RGBADataset
from kit.files import save_tensors
from kit.media import rescale, to_and_fro, to_video
from kit.run import sample_generator


def parse_schedule(text: str) -> list[tuple[int, int, int, int]]:
    """"4000:1:40:64,800:17:64:6" -> phases of (steps, frames, side in pixels, batch)."""
    def fits(steps, frames, side, batch):
        return min(steps, frames, batch) > 0 and frames % 4 == 1 and side >= 16 and side % 8 == 0

    with suppress(ValueError, TypeError):               # no numbers, or not four of them
        phases = [tuple(map(int, phase.split(":"))) for phase in text.split(",")]
        if all(fits(*phase) for phase in phases):
            return phases
    raise ValueError(f"--schedule {text!r} is not steps:frames:side:batch,... with 4k+1 frames and sides in multiples "
                     "of 8 from 16 on")


def batch_sizes(phases: list) -> list[int]:
    return [batch for steps, _, _, batch in phases for _ in range(steps)]


def crop(rgb, alpha, frames: int, side: int, size: int | None, u, bled=True):
    """A part of a clip, uint8 (t, h, w, 3), (t, h, w) -> (frames, side, side, 3), (frames, side, side); bled: as
    `RGBADataset` says.
    size: what the clip's shorter side counts as, pixels; None: side times a random 1 to 2, as in the paper. u: four
    numbers in [0, 1). The window's middle is a place of the object; over a still it slides from one to another. Clips
    too short are played to and fro."""
    t, h, w = alpha.shape
    start = int(u[0] * max(1, t - frames + 1))
    window = max(1, round(min(h, w) * side / (size or side * (1 + u[1]))))
    inside = np.argwhere(alpha[min(t - 1, start + frames // 2)])
    corners = []                                        # of the window, at the first and the last frame
    for v in u[2:]:
        middle = inside[int(v * len(inside))] if len(inside) else (v * h, v * w)
        corners.append([np.clip(m - window // 2, 0, full - window) for m, full in zip(middle, (h, w))])
    places = np.linspace(*corners, frames if t == 1 else 1).round().astype(int)
    where = [(i, slice(y, y + window), slice(x, x + window))
             for i, (y, x) in zip(to_and_fro(t, frames, start), np.broadcast_to(places, (frames, 2)))]
    rgb, alpha = (np.stack([video[place] for place in where]) for video in (rgb, alpha))
    return rescale(rgb, alpha, (side, side), bled)


def draw_clips(dataset: RGBADataset, phases: list, size: int | None, step: int, generators: list[Generator]) -> dict:
    """rgb (n, 3, frames, side, side) in [-1, 1], alpha (n, 1, ...) in [0, 1] and names of n clips that train, one a
    generator; size as for `crop`."""
    _, frames, side, _ = [phase for phase in phases for _ in range(phase[0])][step]
    names, clips = [], []
    for generator in generators:
        i = int(torch.randint(dataset.training, (), generator=generator))
        u = torch.rand(4, generator=generator).tolist()
        names.append(dataset.name(i))
        clips.append(to_video(*crop(*dataset.source(i), frames, side, size, u, dataset.bled)))
    rgb, alpha = map(torch.cat, zip(*clips))
    return dict(rgb=rgb, alpha=alpha, names=names)


def encoded(folder: Path, n: int, item: Callable) -> list[Path]:
    """The files of n items; item(i) -> (key, function that makes the tensors). A file's name is its key, which names
    all that they depend on; it is made only where there is none. Several processes share the work."""
    (rank, world), files = ranks(), {}
    for i in tqdm(range(rank, n, world), desc="latents", disable=rank > 0):
        key, make = item(i)
        files[i] = folder / f"{key}.safetensors"
        with suppress(FileNotFoundError, SafetensorError), safe_open(files[i], "pt"):
            continue                                    # it is there, and nothing of it is missing
        tensors = make()
        try:
            save_tensors(files[i], tensors)
        except OSError as error:
            raise OSError(f"cannot write latents into {folder} ({error.strerror}): make room or choose another "
                          "--cache") from None
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, files)
        files = {i: file for part in parts for i, file in part.items()}
    return [files[i] for i in range(n)]


def latent_shape(file: Path) -> tuple:
    with safe_open(file, "pt") as tensors:
        return tuple(tensors.get_slice("z").get_shape())


def of_one_shape(files: list[Path]) -> list[list[int]]:
    """For each file the numbers of all whose latents have its shape: a batch is drawn from such a group."""
    groups = {}
    found = [groups.setdefault(latent_shape(file), []) for file in files]
    for i, group in enumerate(found):
        group.append(i)
    return found


def draw_latents(files: list, groups: list, names: list, seed: int, step: int, generators: list[Generator]) -> dict:
    """What files of one shape hold, one a generator: z and masks stacked, other tensors as lists; picks, their numbers,
    and names. The whole batch of a step is of one group, in all processes."""
    group = groups[int(torch.randint(len(files), (), generator=sample_generator(seed, step, -1)))]
    picks = [group[int(torch.randint(len(group), (), generator=generator))] for generator in generators]
    items = [load_file(files[i]) for i in picks]
    tensors = {name: [item[name] for item in items] for name in items[0]}
    stacked = {name: torch.stack(tensors[name]) for name in ("z", "mask", "still_mask") if name in tensors}
    return tensors | stacked | dict(picks=picks, names=[names[i] for i in picks])
