"""What a command line asks of generate.py: settled, checked, shared out among transformers.

Whatever can be wrong is found here, in one sentence and before any long work: FileNotFoundError or ValueError.
"""
import argparse
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit import open_dit
from kit.command import check_device, choose_threads
from kit.files import TINY, Checkpoint, file_key, find_text, find_vae, read_section, read_trained
from kit.media import MEDIA, read_rgba
from kit.memory import check_memory
from kit.result import check_names, check_out
from kit.scale import check_ways
from merge import load_rgba_vae
from sampler import load_mask, mask_from_alpha
from text import clean_prompt, load_text_encoder

WAN = dict(size=(832, 480), frames=81, fps=16.0, steps=4, shift=5.0, guidance=1.0, mean=0.05)
WAN_2_2 = dict(steps=40, shift=12.0, guidance=[4.0, 3.0])       # instead, where there is no distilled LoRA
EXPERTS = dict(high_noise_model=875, low_noise_model=0)         # folders of Wan2.2: the lowest model time of each
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
            "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


@dataclass
class Expert:
    """A transformer and the noise levels that are its own: model times t from `least` (of 1000) on."""
    path: Path
    least: int
    adapters: list              # (file, scale), merged in this order: DoRA and LoRA do not commute
    guidance: float


def prepare(args: argparse.Namespace, rank: int, world: int, device) -> tuple[argparse.Namespace, Tensor | None]:
    """All that is asked for, settled and checked, and the mask. If that fails in one of several processes, none goes on
    to wait for the others: all end, and the first says why."""
    mask = error = None
    try:
        args = settle(args, rank, world, device)
        check(args)
        mask = make_mask(args)
        if rank == 0:
            check_out(args.out)
    except (ValueError, OSError) as problem:
        error = problem
    errors = [error] * world
    if world > 1:
        torch.distributed.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error if rank == 0 else SystemExit(2)
    return args, mask


def settle(args: argparse.Namespace, rank: int = 0, world: int = 1, device=None) -> argparse.Namespace:
    """What the command line left open: from --run's trainings, section "generate" of the base folder's config.json, or
    else Wan's numbers.

    rank, world, device: which of how many processes this is, and the GPU that is its own."""
    trained = read_trained(args.run) if args.run else {}
    base = Path(args.base or trained.get("base") or TINY)
    folders = {Path(args.dit): 0} if args.dit else find_experts(base)
    configs = base / "config.json", base / "transformer/config.json"        # the second: a folder of diffusers
    if base in folders and not any(config.is_file() for config in configs):
        raise FileNotFoundError(f"there is no {configs[0]}; give --base a folder like Wan2.1-T2V-14B")
    said = read_section(base)
    for name in ("vae_adapter", "dora", "distill"):
        said[name] = [str(base / said[name])] if said.get(name) else None
    said |= {name: [value] if name in ("vae_adapter", "dora") else value for name, value in trained.items()}
    said |= {name: value for name, value in vars(args).items() if value is not None}
    distilled = any(said["distill"] or [])
    wan = WAN if distilled or len(folders) == 1 else WAN | WAN_2_2
    if not said["vae_adapter"]:
        wan = wan | dict(mean=0.0)                              # a plain Wan knows no shifted noise
    args = argparse.Namespace(**vars(args) | wan | said, rank=rank, world=world)
    args.device = str(device or args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.text_device = args.text_device or args.device
    usual = "float32" if args.device == "cpu" else "bfloat16"
    args.dtype, args.vae_dtype = getattr(torch, args.dtype or usual), getattr(torch, args.vae_dtype or usual)
    args.base, args.out = base, Path(args.out)
    args.clips = [(prompt, seed) for prompt in read_prompts(args) for seed in args.seed]
    args.prompt, args.negative = args.clips[0][0], clean_prompt(args.negative)
    args.text, args.vae = Path(args.text or find_text(base)), Path(args.vae or find_vae(base))
    args.experts = share_out(args, folders)
    return args


def find_experts(base: Path) -> dict[Path, int]:
    """Folders of the transformers and the lowest model time of each: Wan2.1 has one, Wan2.2 two."""
    folders = {base / name: least for name, least in EXPERTS.items()}
    return folders if any(folder.is_dir() for folder in folders) else {base: 0}


def share_out(args: argparse.Namespace, folders: dict[Path, int]) -> list[Expert]:
    """The transformers, each with its share of the flags that take one value for all or one each."""
    def shares(name, values):
        values = values if isinstance(values, list) else [values]
        if len(values) > len(folders):
            raise ValueError(f"--{name} has {len(values)} values, but {args.base} has {len(folders)} transformers to "
                             "take one each")
        return values if len(values) == len(folders) else [values[0] for _ in folders]
    rows = zip(folders.items(), shares("dora", args.dora or ""), shares("distill", args.distill or ""),
               shares("guidance", args.guidance))
    return [Expert(path, least, [(file, 1.0) for file in (dora, distill) if file] + args.lora, guidance)
            for (path, least), dora, distill, guidance in rows]


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, before any long work, for numbers out of range, for weights that do not fit
    together and for too little memory: all models are loaded onto the meta device, where they are names and shapes."""
    if min(args.seed) < 0 or max(args.seed) >= 2 ** 63:
        raise ValueError(f"--seed {' '.join(map(str, args.seed))} is not between 0 and 2^63 - 1")
    if args.trim and not args.also:
        raise ValueError("--trim is about the files of --also; name some, such as --also sheet")
    if not args.vae_adapter:
        warnings.warn("no VAE adapter is named, so this is a plain Wan: rgb.mp4 and frames, without alpha")
    check_names(args.out, args.clips)
    check_device(args.device)
    check_device(args.text_device)
    text = load_text_encoder(args.text, device="meta", folder=args.base).model
    for expert in args.experts:
        dit, _ = open_dit(expert.path, expert.adapters)
    check_ways(dit.config, args.offload, args.fp8, args.shard)
    vae = load_rgba_vae(args.vae, args.vae_adapter, device="meta")
    (w, h), (step_h, step_w) = args.size, [8 * p for p in dit.config.patch_size[1:]]
    if text.config.dim != dit.config.text_dim:
        raise ValueError(f"{args.base}: text encoder and transformer do not belong together")
    if vae.vae_fgr.config.z_dim != dit.config.in_dim:
        raise ValueError(f"{args.base}: VAE and transformer do not belong together")
    if w % step_w or h % step_h:
        raise ValueError(f"--size {w}x{h}: width must be a multiple of {step_w} pixels, height of {step_h}")
    warn_of_strangers(args)
    check_memory(args, text, dit, vae)
    choose_threads(text, dit, vae)


def make_mask(args: argparse.Namespace) -> Tensor | None:
    """G (t, h, w) in latent cells from --mask: nothing, an ellipse, a clip or a saved tensor. None if --mean is 0."""
    (w, h), name = args.size, args.mask or ""
    if args.mean == 0:
        return None
    if not os.path.isdir(name) and not name.lower().endswith(MEDIA):
        return load_mask(args.mask, args.frames, h, w)
    rgb, alpha = read_rgba(name)
    matte = alpha if alpha.min() < 255 else rgb.mean(-1).round().astype(np.uint8)
    return mask_from_alpha(matte, args.frames, h, w)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """PROMPT, or the lines of the file --prompts that are neither blank nor begin with #."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either a PROMPT, before the flags, or --prompts FILE")
    lines = [args.prompt] if args.prompts is None else [
        line for line in read_lines(Path(args.prompts)) if not line.lstrip().startswith("#")]
    source = "the prompt" if args.prompts is None else f"--prompts {args.prompts}"
    prompts = list(filter(None, map(clean_prompt, lines)))
    if not prompts:
        raise ValueError(f'{source} is empty; describe the clip, as in "a red glass ball bouncing"')
    return prompts


def read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeError
    except (OSError, UnicodeError):
        raise ValueError(f"--prompts {file} cannot be read; give a text file (UTF-8), one prompt a line") from None
    return text.split("\n")


def warn_of_strangers(args: argparse.Namespace) -> None:
    """Warnings: a size or length far from what the model was trained with; a DoRA that was trained on another adapter's
    latents."""
    said = read_section(args.base)
    size, frames = said.get("size", args.size), said.get("frames", args.frames)
    if not 0.5 <= args.size[0] * args.size[1] / (size[0] * size[1]) <= 2 or not 0.5 <= args.frames / frames <= 2:
        warnings.warn(f"{args.base} was trained with {frames} frames of {size[0]}x{size[1]}, far from {args.frames} of "
                      f"{args.size[0]}x{args.size[1]}; expect little of it")
    for expert in args.experts:
        for file, _ in expert.adapters:
            digest = Checkpoint(file).metadata.get("vae_adapter")
            if digest and args.vae_adapter and digest != file_key(args.vae_adapter[0]):
                warnings.warn(f"{file} was trained on the latents of another adapter than {args.vae_adapter[0]}")
