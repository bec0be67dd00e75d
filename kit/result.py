"""The folder that a clip is written to: its name, its files, its record. It appears whole or not at all.

Colour is straight: never multiplied by alpha. The record, run.json, holds all that it takes to make the clip again.
"""
import argparse
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from einops import repeat

from kit.command import is_first, measured
from kit.files import file_key, find_dit, find_tokenizer, save_json
from kit.media import checkerboard, over

FILES = ("rgba.webm", "rgba.mov", "rgba.apng", "preview.webp", "preview.mp4", "rgb.mp4", "alpha.mp4", "frames",
         "sprites.png", "sprites.json", "premultiplied", "premultiplied.mov", "run.json", "index.html")   # of a clip
PACKAGES = ("numpy", "safetensors", "tokenizers", "einops", "imageio", "imageio-ffmpeg")


def folder_name(prompt: str, seed: int) -> str:
    """The prompt's words, lower case, letters of any script, and the seed. Long prompts often begin alike: one that is
    cut gets some digits of its hash. The limit is in bytes too, for file systems count those."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))
    short = words[:50].encode()[:150].decode(errors="ignore").strip("-") or "clip"
    if short == words:
        return f"{short}-{seed}"
    return f"{short}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}-{seed}"


def check_names(out: Path, clips: list[tuple[str, int]]) -> None:
    """ValueError if one folder would be of two clips, or is there and no clip's."""
    names = [folder_name(*clip) for clip in clips]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} would be written twice; leave out what repeats among prompts and seeds")
    foreign = [str(out / name) for name in names if (out / name).exists() and not (out / name / "run.json").is_file()]
    if foreign:
        raise ValueError(f"{', '.join(foreign)} exists and is no result of generate.py; move it away or choose another "
                         "--out")


def check_out(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}); choose another --out") from None


@contextmanager
def result_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place, whole, if the block succeeds. What somebody else put into
    the earlier one stays."""
    temporary = final.with_name(f".{os.getpid()}-{final.name}")
    earlier = final.with_name(f".{os.getpid()}-{final.name}~")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        if final.exists():
            final.rename(earlier)
        temporary.rename(final)
        for path in earlier.iterdir() if earlier.exists() else ():
            if path.name not in FILES:
                path.rename(final / path.name)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def told(stages: dict, name: str, device: str) -> Iterator[None]:
    """Notes in stages[name] what the block takes, seconds and memory in MiB, and tells it."""
    with measured(stages, name, device):
        yield
    if is_first():
        numbers = [f"{what} {stages[name][what]}" for what in ("seconds", "host_mib", "device_mib")
                   if what in stages[name]]
        print(f"{name}:", ", ".join(numbers), file=sys.stderr)


def media(rgb: np.ndarray, alpha: np.ndarray | None) -> dict[str, tuple]:
    """The files of a clip beside rgb.mp4: name -> what `write_rgba` takes. alpha None: a plain Wan has none."""
    if alpha is None:
        return {"frames": (rgb, None)}
    preview = over(rgb, alpha, checkerboard(*alpha.shape[1:]))
    return {"rgba.mov": (rgb, alpha), "rgba.webm": (rgb, alpha), "frames": (rgb, alpha),
            "alpha.mp4": (repeat(alpha, "t h w -> t h w 3"), None),
            "preview.mp4": (preview, None), "preview.webp": (preview, None)}


def hash_weights(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of every file that the models are made of: config.json, tokenizer, weights, adapters."""
    files = [find_tokenizer(args.base), args.text, args.vae, *(args.vae_adapter or [])]
    for expert in args.experts:
        files += [*find_dit(expert.path), *(file for file, _ in expert.adapters)]
    configs = {folder / "config.json" for folder in (args.base, *(expert.path for expert in args.experts))}
    files += [file for file in configs if file.is_file()]
    return {str(file): file_key(file) for file in files}


def save_record(file: Path, args: argparse.Namespace, prompt: str, seed: int, stages: dict, weights: dict) -> None:
    """run.json: all that it takes to make the clip again, and what it took."""
    arguments = dict(vars(args), prompt=prompt, seed=seed, clips=len(args.clips),
                     experts=[vars(expert) for expert in args.experts])
    versions = dict(python=platform.python_version(), torch=torch.__version__)      # with its +cpu or +cu130
    versions |= {name: version(name) for name in PACKAGES}
    save_json(file, dict(arguments=arguments, seed=seed, versions=versions, weights=weights, stages=stages))
