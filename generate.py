"""From a prompt to a transparent clip: text encoder, a few steps of the diffusion transformer, two decoders, files.

    prompt -> context (l d) -> z (b c t h w), from noise whose mean is shifted outside an ellipse -> rgb, alpha -> files

Wan-Alpha costs nothing here: its adapters merge into the weights as these load (dora.py, merge.py), the noise gets its
mean (sampler.py), and two decoders read one latent (merge.py). Each stage loads its model once, takes all clips through
it and frees it before the next, so one model at a time is in memory; of Wan2.2's two transformers, one for high noise
and one for low, too. How a transformer fits a small GPU or spreads over many is told in scale.py.

Colour is straight (never multiplied by alpha). Noise is drawn on the CPU in float32: a seed is the same noise on every
machine, and the same bytes on one (test_same_seed_same_bytes).
Letters: b batch, c channels, t frames, h w height and width, l text tokens, d width.
Differs from the official code: Euler by default, its UniPC by a flag; 8-bit values are rounded, not truncated
(test_pixels_are_rounded); a negative prompt is only encoded for guidance (test_guidance_reads_the_negative_prompt).
dtype rule: text encoder and transformer run in --dtype, the decoders in --vae-dtype, the sampler's state is float32,
pixels become uint8 as they are decoded.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from data import PICTURES, VIDEOS, checkerboard, over, read_rgba, save_text, write_rgba
from dit import WanDiT, open_dit, read_json, weight_files
from merge import RGBAVAE, load_rgba_vae
from sampler import euler, guide, load_mask, mask_from_alpha, mask_from_tensor, shift_noise, shifted_sigmas, unipc
from scale import check_ways, dit_memory, end_process_group, free_memory, load_scaled, start_process_group
from text import UMT5, clean_prompt, load_text_encoder
from vae import VAEConfig, read_checkpoint

try:
    import resource
except ImportError:     # there is none on Windows
    resource = None

WAN = dict(size=(832, 480), frames=81, fps=16.0, steps=4, shift=5.0, guidance=1.0, mean=0.05)
WAN_2_2 = dict(steps=40, shift=12.0, guidance=[4.0, 3.0])       # instead, where there is no distilled LoRA
EXPERTS = dict(high_noise_model=875, low_noise_model=0)         # folders of Wan2.2: the lowest model time of each
ADAPTERS = ("vae_adapter", "dora", "distill")
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
            "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
NO_MEMORY = "out of memory|allocate memory|not enough memory"       # as PyTorch says it on a GPU, Linux, Windows
# what makes a model fit, best first
FLAGS = {"--dtype bfloat16": dict(dtype=torch.bfloat16), "--vae-dtype bfloat16": dict(vae_dtype=torch.bfloat16),
         "--text-device cpu": dict(text_device="cpu"), "--offload": dict(offload=True), "--shard": dict(shard=True),
         "--fp8": dict(fp8=True), "a smaller --size or fewer --frames": dict(size=(16, 16), frames=1)}
PACKAGES = ("numpy", "safetensors", "tokenizers", "einops", "imageio", "imageio-ffmpeg")


@dataclass
class Expert:
    """A transformer and the noise levels that are its own: model times t from `least` (of 1000) on."""

    path: Path
    least: int
    adapters: list              # (file, scale), merged in this order: DoRA and LoRA do not commute
    guidance: float


# ---- what is asked for


def settle(args: argparse.Namespace, rank: int = 0, world: int = 1, device=None) -> argparse.Namespace:
    """What the command line left open, from section "generate" of the base folder's config.json, else Wan's numbers.

    rank, world, device: which of how many processes this is, and the GPU that is its own."""
    folders = find_experts(Path(args.base))
    base, config = Path(args.base), Path(args.base) / "config.json"
    if base in folders and not config.is_file():
        raise FileNotFoundError(f"there is no {config}; give --base a folder like Wan2.1-T2V-14B")
    said = dict.fromkeys(ADAPTERS) | (read_section(config) if config.is_file() else {})
    said |= {name: [str(base / said[name])] for name in ADAPTERS if said[name]}
    asked = {name: value for name, value in vars(args).items() if value is not None}
    distilled = any(asked.get("distill", said["distill"]) or ())
    family = WAN | (WAN_2_2 if len(folders) == 2 and not distilled else {})
    args = argparse.Namespace(**vars(args) | family | said | asked | dict(rank=rank, world=world))
    args.device = str(device or args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.text_device = args.text_device or args.device
    args.dtype, args.vae_dtype = (getattr(torch, dtype or ("float32" if args.device == "cpu" else "bfloat16"))
                                  for dtype in (args.dtype, args.vae_dtype))
    args.base, args.out = base, Path(args.out)
    args.clips = [(prompt, seed) for prompt in read_prompts(args) for seed in args.seed]
    args.prompt, args.negative = args.clips[0][0], clean_prompt(args.negative)
    args.text, args.vae = (either(base, name) for name in ("models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"))
    args.experts = share_out(args, folders)
    return args


def find_experts(base: Path) -> dict[Path, int]:
    """Folders of the transformers and the lowest model time of each: Wan2.1 has one, Wan2.2 two."""
    folders = {base / name: least for name, least in EXPERTS.items()}
    return folders if any(folder.is_dir() for folder in folders) else {base: 0}


def share_out(args: argparse.Namespace, folders: dict[Path, int]) -> list[Expert]:
    """Each transformer's share of the flags that take one value for all or one each."""
    values = [args.dora or [""], args.distill or [""], args.guidance]
    values = [value if isinstance(value, list) else [value] for value in values]
    for name, value in zip(("dora", "distill", "guidance"), values):
        if len(value) > len(folders):
            raise ValueError(f"--{name} has {len(value)} values, but {args.base} has {len(folders)} transformers to "
                             "take one each")
    shares = zip(*(value * (len(folders) // len(value)) for value in values))
    return [Expert(path, least, [(file, 1.0) for file in files if file], guidance)
            for (path, least), (*files, guidance) in zip(folders.items(), shares)]


def read_prompts(args: argparse.Namespace) -> list[str]:
    """PROMPT, or the lines of the file --prompts that are not blank."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either a PROMPT, before the flags, or --prompts FILE")
    if args.prompts is None:
        return [clean_prompt(args.prompt)]
    try:
        text = Path(args.prompts).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError):
        text = "\0"
    if "\0" in text:
        raise ValueError(f"--prompts {args.prompts} cannot be read; give a text file (UTF-8), one prompt a line")
    prompts = [prompt for line in text.split("\n") if (prompt := clean_prompt(line))]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} is empty; write one prompt a line into it")
    return prompts


def read_section(file: Path) -> dict:
    """Section "generate" of a config.json. ValueError unless all is text or of the type that WAN shows."""
    def alike(value, example):
        if isinstance(example, tuple):
            return isinstance(value, list) and len(value) == len(example) and all(map(alike, value, example))
        return type(value) in {int: (int,), float: (int, float), str: (str, type(None))}[type(example)]
    section = read_json(file).get("generate", {})
    if not isinstance(section, dict):
        raise ValueError(f'{file}: section "generate" is not an object, such as {{"size": [832, 480], "frames": 81}}')
    if wrong := {name: value for name, value in section.items() if not alike(value, WAN.get(name, ""))}:
        raise ValueError(f'{file}: values of section "generate" are of the wrong type: {json.dumps(wrong)}')
    return section


def either(folder: Path, name: str) -> Path:
    """name.safetensors in that folder, or else Wan's own name.pth."""
    file = folder / f"{name}.safetensors"
    return file if file.is_file() else file.with_suffix(".pth")


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, before any long work, for numbers out of range, for weights that do not fit
    together and for too little memory: all models are loaded onto the meta device, where they are names and shapes."""
    seeds = [seed for seed in args.seed if not 0 <= seed < 2 ** 63]
    names = [folder_name(*clip) for clip in args.clips]
    twice = [name for name, count in Counter(names).items() if count > 1]
    foreign = [str(folder) for folder in map(args.out.joinpath, names)
               if folder.exists() and not (folder / "run.json").is_file()]
    raise_first([
        (not args.prompt, 'the prompt is empty; describe the clip, as in "a red glass ball bouncing"'),
        (seeds, f"--seed {max(seeds, key=abs, default=0)} is not between 0 and 2^63 - 1"),
        (twice, f"{', '.join(twice)} would be written twice; leave out what repeats among prompts and seeds"),
        (foreign, f"{', '.join(foreign)} exists and is no result of generate.py; move it away or choose another --out"),
        (args.frames < 1 or args.frames % 4 != 1, f"--frames {args.frames} is not 4k+1; give 1, 5, 9, ... frames"),
        (args.steps < 1, f"--steps {args.steps} is below 1"),
        (not 0 < args.fps < math.inf, f"{args.base / 'config.json'}: fps {args.fps} is not a finite number above 0"),
        (not 0 < args.shift < math.inf, f"--shift {args.shift} is not a finite number above 0"),
        (not math.isfinite(args.mean), f"--mean {args.mean} is not a finite number"),
        (not all(math.isfinite(expert.guidance) for expert in args.experts),
         f"--guidance {args.guidance} is not finite"),
        ("cuda" in args.device + args.text_device and not torch.cuda.is_available(),
         "there is no CUDA device; use --device cpu"),
        (not args.vae_adapter, f"{args.base} names no VAE adapter; give --vae-adapter, for example decoder.bin"),
        (args.vae_chunk is not None and args.vae_chunk < 1, f"--vae-chunk {args.vae_chunk} is below 1")])
    text = load_text_encoder(args.text, device="meta").model
    for expert in args.experts:
        dit, _ = open_dit(expert.path, expert.adapters)
    check_ways(dit.config, args.offload, args.fp8, args.shard)
    vae = load_rgba_vae(args.vae, args.vae_adapter, device="meta")
    (w, h), (step_h, step_w) = args.size, (8 * p for p in dit.config.patch_size[1:])
    raise_first([
        (text.config.dim != dit.config.text_dim, f"{args.base}: text encoder and transformer do not belong together"),
        (vae.vae.config.z_dim != dit.config.in_dim, f"{args.base}: VAE and transformer do not belong together"),
        (min(w, h) < 1 or w % step_w or h % step_h, f"--size {w}x{h}: width must be a multiple of {step_w} pixels, "
                                                    f"height of {step_h}")])
    check_memory(args, text, dit, vae)


def make_mask(args: argparse.Namespace) -> Tensor | None:
    """G (t, h, w) in latent cells from --mask: nothing, an ellipse, a clip or a saved tensor. None if --mean is 0."""
    (w, h), name = args.size, args.mask or ""
    ending = Path(name).suffix.lower()
    if args.mean == 0:
        return None
    if os.path.isdir(name) or ending in (*PICTURES, *VIDEOS, ".zip"):
        rgb, alpha = read_rgba(name)
        matte = alpha if alpha.min() < 255 else rgb.mean(-1).round().astype(np.uint8)
        return mask_from_alpha(matte, args.frames, h, w)
    if ending == ".safetensors":
        tensors, _ = read_checkpoint(name)
        return mask_from_tensor(next(iter(tensors.values()), None), args.frames, h, w)
    return load_mask(args.mask, args.frames, h, w)


def raise_first(problems: list[tuple[object, str]]) -> None:
    for wrong, sentence in problems:
        if wrong:
            raise ValueError(sentence)


# ---- does it fit


def check_memory(args: argparse.Namespace, text: UMT5, dit: WanDiT, vae: RGBAVAE) -> None:
    """ValueError that names the fewest flags that help, if a stage would need more memory than is free."""
    short = lacking(args, text, dit, vae)
    if not short:
        return
    choices = [flags for count in range(1, len(FLAGS) + 1) for flags in combinations(FLAGS, count)]
    for flags in sorted(choices, key=lambda flags: list(FLAGS)[-1] in flags):   # a smaller clip last
        changes = {name: value for flag in flags for name, value in FLAGS[flag].items()}
        changed = argparse.Namespace(**vars(args) | changes)
        if not (changed.shard and (changed.offload or changed.fp8)) and not lacking(changed, text, dit, vae):
            raise ValueError(f"{short[0]}; give {' '.join(flags)}")
    raise ValueError(f"{short[0]}, and no flag changes that; take a smaller model or a larger machine")


def lacking(args: argparse.Namespace, text: UMT5, dit: WanDiT, vae: RGBAVAE) -> list[str]:
    """A sentence for every stage that needs more than is free, estimated from the models' sizes."""
    tokens = math.prod(n // p for n, p in zip(latent_size(args), dit.config.patch_size))
    on_device, on_host = dit_memory(dit, tokens, args.dtype, args.offload, args.fp8, args.world, args.shard)
    n, weights = dit.config.text_len, {model: sum(p.numel() for p in model.parameters()) for model in (text, vae)}
    need = Counter()
    need["text encoder", args.text_device] += (weights[text] * args.dtype.itemsize          # and logits, and more
                                               + 16 * n * (n * text.config.num_heads + text.config.dim_ffn))
    need["transformer", args.device] += on_device * (args.world if args.device == "cpu" else 1)
    need["transformer", "cpu"] += on_host * args.world
    need["VAE", args.device] += weights[vae] * args.vae_dtype.itemsize + decode_memory(vae.vae.config, args, 1)
    free = {device: free_memory(device) for _, device in need}
    return [f"the {stage} needs {size / 2 ** 30:.1f} GiB on {device}, where {free[device] / 2 ** 30:.1f} are free"
            for (stage, device), size in need.items() if size > free[device]]


def latent_size(args: argparse.Namespace) -> tuple[int, int, int]:
    """t h w of the latent."""
    return (args.frames + 3) // 4, args.size[1] // 8, args.size[0] // 8


def decode_memory(config: VAEConfig, args: argparse.Namespace, chunk: int) -> int:
    """Bytes that one decoder works with, `chunk` latent frames at a time. Counted for Wan's at 832 x 480: in frames of
    `dim` channels, what streaming keeps is 25 and the peak 51, 73, 121 in bfloat16 and 47, 61, 93 in float32 for a
    chunk of 1, 2, 4."""
    return (30 + 24 * chunk) * config.dim * math.prod(args.size) * args.vae_dtype.itemsize


def choose_chunk(config: VAEConfig, args: argparse.Namespace) -> int:
    """Latent frames to decode at a time. On a GPU 1, 2, 4, ... or all, what half of the free memory holds and what
    keeps the widest tensor, 8 chunk frames of dim channels, within 2^31 elements, up to which kernels count. On the
    CPU 1: there more is slower (measured: 5 at a time by a fifth to two fifths)."""
    if args.device == "cpu":
        return 1
    frames, chunk, free = latent_size(args)[0], 1, free_memory(args.device) // 2
    while (chunk < frames and decode_memory(config, args, 2 * chunk) <= free
           and 16 * chunk * config.dim * math.prod(args.size) < 2 ** 31):
        chunk *= 2
    return min(chunk, frames)


# ---- the stages


def encode_prompts(args: argparse.Namespace) -> dict[str, Tensor]:
    """The context (l d) of every prompt and, only where guidance asks for it, of the negative one."""
    encoder = load_text_encoder(args.text, args.dtype, args.text_device)
    guided = any(expert.guidance != 1 for expert in args.experts)
    texts = dict.fromkeys([prompt for prompt, _ in args.clips] + [args.negative] * guided)
    return {text: encoder([text])[0].cpu() for text in texts}       # one by one: alone or among others, equal bytes


def sample(args: argparse.Namespace, contexts: dict[str, Tensor],
           mask: Tensor | None) -> tuple[list[Tensor], Exception | None]:
    """The normalised latents z (1 c t h w), float32, of the clips; mask is G, or None for noise of mean 0.

    Each transformer is loaded once and takes every clip through its part of the noise levels. When a clip fails, it and
    those after it are given up: fewer latents are returned, and the error.
    """
    solver, start = (euler, 1.0) if args.sampler == "euler" else (unipc, 0.999)
    sigmas = shifted_sigmas(args.steps, args.shift, start)
    dit = guidance = None       # of the transformer in turn

    def path(prompt, seed):
        """z step by step, by whichever transformer is in turn."""
        noise = torch.randn(1, dit.config.in_dim, *latent_size(args), generator=torch.Generator().manual_seed(seed))
        noise = noise if mask is None else shift_noise(noise, mask, args.mean)

        def velocity(z, t):
            v, *v_negative = (dit(z, t, [contexts[text].to(args.device)])
                              for text in ([prompt] if guidance == 1 else [prompt, args.negative]))
            return guide(v, *v_negative, guidance) if v_negative else v
        for _, z in solver(velocity, noise.to(args.device), sigmas):
            yield z

    paths, latents, error = [path(*clip) for clip in args.clips], [None] * len(args.clips), None
    steps = [int((1000 * sigmas[:-1] >= expert.least).sum()) for expert in args.experts]    # done after each expert
    bar = tqdm(desc="sampling", total=args.steps * len(paths), disable=args.rank > 0)
    for expert, begin, end in zip(args.experts, [0, *steps], steps):
        if not paths or begin == end:
            continue
        dit, guidance = load_scaled(expert.path, expert.adapters, args.dtype, args.device, args.offload, args.fp8,
                                    args.shard), expert.guidance
        for i, own_path in enumerate(paths):
            try:
                for latents[i] in islice(own_path, end - begin):
                    bar.update()
            except Exception as problem:
                error = problem
                traceback.clear_frames(error.__traceback__)         # they hold tensors
                del paths[i:], latents[i:]
                break
        dit = None
        gc.collect()
    bar.close()
    return latents, error


def decode(args: argparse.Namespace, vae: RGBAVAE, z: Tensor) -> Iterator[np.ndarray]:
    """Straight rgb (t, h, w, 3), then alpha (t, h, w), uint8: the one can be written while the other is made."""
    def pieces(decoder, name):
        stream = decoder.decode_stream(z.to(args.vae_dtype), args.vae_chunk)
        return map(Tensor.float, tqdm(stream, f"decoding {name}", math.ceil(z.shape[2] / args.vae_chunk)))
    yield to_bytes((x + 1) / 2 for x in pieces(vae.vae_fgr, "colour"))
    yield to_bytes(map(vae.to_alpha, pieces(vae.vae_pha, "alpha")))[..., 0]


def to_bytes(pieces: Iterable[Tensor]) -> np.ndarray:
    """Pieces (1 c t h w) of about [0, 1] -> uint8 (t, h, w, c), rounded."""
    pieces = [(255 * x).round().clamp(0, 255).byte().cpu() for x in pieces]
    return rearrange(torch.cat(pieces, dim=2), "1 c t h w -> t h w c").numpy()


def media(rgb: np.ndarray, alpha: np.ndarray) -> dict[str, tuple]:
    """The files of a clip that need its alpha: name -> what `write_rgba` takes."""
    preview = over(rgb, alpha, checkerboard(*alpha.shape[1:]))
    return {"rgba.mov": (rgb, alpha), "rgba.webm": (rgb, alpha), "frames": (rgb, alpha),
            "alpha.mp4": (repeat(alpha, "t h w -> t h w 3"), None),
            "preview.mp4": (preview, None), "preview.webp": (preview, None)}


# ---- the record, and where everything goes


@contextmanager
def measured(stages: dict, name: str, args: argparse.Namespace) -> Iterator[None]:
    """Notes and tells seconds and peak memory in MiB: the process's so far and, on a GPU, the stage's own."""
    start, cuda = time.perf_counter(), args.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if cuda:
        torch.cuda.synchronize()
    stages[name] = stage = dict(seconds=round(time.perf_counter() - start, 2))
    if resource:
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        stage["host_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    if cuda:
        stage["device_mib"] = torch.cuda.max_memory_allocated() // 2 ** 20
    if args.rank == 0:
        print(f"{name}:", ", ".join(f"{what} {value}" for what, value in stage.items()), file=sys.stderr)


def hash_weights(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of every file that the models are made of: config.json, tokenizer, weights, adapters."""
    def digest(file):
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    files = [args.base / "google/umt5-xxl/tokenizer.json", args.text, args.vae, *args.vae_adapter]
    configs = {folder / "config.json" for folder in (args.base, *(expert.path for expert in args.experts))}
    for expert in args.experts:
        files += [*weight_files(expert.path), *(file for file, _ in expert.adapters)]
    return {str(file): digest(file) for file in [*files, *filter(Path.is_file, configs)]}


def save_record(file: Path, args: argparse.Namespace, prompt: str, seed: int, stages: dict, weights: dict) -> None:
    """run.json: all that it takes to make the clip again, and what it took."""
    experts = [vars(expert) for expert in args.experts]
    arguments = vars(args) | dict(prompt=prompt, seed=seed, clips=len(args.clips), experts=experts)
    versions = dict(python=platform.python_version(), torch=torch.__version__)      # with its +cpu or +cu130
    versions |= {name: version(name) for name in PACKAGES}
    record = dict(arguments=arguments, seed=seed, versions=versions, weights=weights, stages=stages)
    save_text(file, json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")


def folder_name(prompt: str, seed: int) -> str:
    """The prompt's words, lower case, letters of any script, and the seed. Long prompts often begin alike: one that is
    cut gets some digits of its hash. The limit is in bytes too, for file systems count those."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))
    short = words[:50].encode()[:150].decode(errors="ignore").strip("-") or "clip"
    return f"{short}-{seed}" if short == words else f"{short}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}-{seed}"


def check_out(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}); choose another --out") from None


@contextmanager
def result_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place, whole, if the block succeeds."""
    temporary, earlier = (final.with_name(f".{os.getpid()}-{final.name}{end}") for end in ("", "~"))
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        if final.exists():
            final.rename(earlier)
        temporary.rename(final)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- the command


@torch.inference_mode()
def generate(args: argparse.Namespace) -> Iterator[Path]:
    """The clips asked for as `make_parser` does: the folder of each, as soon as it is whole.

    FileNotFoundError or ValueError, one sentence and before any long work, for what cannot be done. What makes a clip
    fail later is raised when those before it are written (of several processes at once: they cannot go on alone).
    """
    rank, world, device = start_process_group(args.device)
    (args, mask), stages = prepare(args, rank, world, device), {}
    with measured(stages, "text", args):
        contexts = [encode_prompts(args) if rank == 0 else None]
        if world > 1:
            torch.distributed.broadcast_object_list(contexts)
    with measured(stages, "transformer", args):
        latents, error = sample(args, contexts[0], mask)
    if world > 1 and error:
        raise error
    end_process_group()
    if rank == 0:
        yield from finish(args, latents, stages)
    if error:
        raise error


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


def finish(args: argparse.Namespace, latents: list[Tensor], stages: dict) -> Iterator[Path]:
    """Decodes and writes clip by clip. Meanwhile the files of the models are hashed, which can take a minute."""
    with ThreadPoolExecutor() as background:
        weights = background.submit(hash_weights, args)
        vae = None
        for (prompt, seed), z in zip(args.clips, latents):
            final, stages = args.out / folder_name(prompt, seed), dict(stages)
            with result_folder(final) as folder, ThreadPoolExecutor() as pool:      # the encoders are processes
                with measured(stages, "decode", args):
                    vae = vae or load_rgba_vae(args.vae, args.vae_adapter, args.vae_dtype, args.device)
                    args.vae_chunk = args.vae_chunk or choose_chunk(vae.vae.config, args)
                    frames = decode(args, vae, z)
                    rgb = next(frames)
                    jobs = [pool.submit(write_rgba, folder / "rgb.mp4", rgb, None, args.fps)]
                    alpha = next(frames)
                with measured(stages, "write", args):
                    for name, clip in media(rgb, alpha).items():
                        jobs.append(pool.submit(write_rgba, folder / name, *clip, args.fps))
                    for job in tqdm(jobs, "writing"):
                        job.result()
                save_record(folder / "run.json", args, prompt, seed, stages, weights.result())
            yield final


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def pixels(text: str) -> tuple[int, int]:
    try:
        w, h = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 832x480") from None
    return w, h


def make_parser() -> Parser:
    parser = Parser(prog="generate.py", description="Write transparent clips from text prompts.", epilog="""
        Numbers in (parentheses) are Wan's; section "generate" of the base folder's config.json goes before them.
        Files go to OUT/WORDS-OF-THE-PROMPT-SEED: rgba.webm, rgba.mov and frames/0000.png ... with straight alpha,
        preview.mp4 and preview.webp over a checkerboard, rgb.mp4, alpha.mp4, and run.json, which says how. Where --base
        is Wan2.2's, with high_noise_model and low_noise_model, a flag of one or two values takes them in this order.
        Many GPUs: torchrun --nproc_per_node=N generate.py PROMPT ...""")
    clip = parser.add_argument_group("the clip").add_argument
    clip("prompt", metavar="PROMPT", nargs="?", help="what to show; cut at the token limit")
    clip("--prompts", metavar="FILE", help="instead: a text file of prompts, one a line")
    clip("--size", type=pixels, metavar="WxH", help="width x height in pixels, multiples of 16 (832x480)")
    clip("--frames", type=int, metavar="N", help="length, 4k+1 frames (81)")
    clip("--seed", type=int, nargs="+", default=[0], metavar="N", help="of the noise: same seed, same clip; several: "
         "so many clips of each prompt [0]")
    clip("--out", default="out", metavar="DIR", help="where each clip's own folder goes [out]")
    steps = parser.add_argument_group("sampling").add_argument
    steps("--steps", type=int, metavar="N", help="from noise to clip (4; without --distill take 50; "
          "Wan2.2 without: 40)")
    steps("--shift", type=float, metavar="K", help="above 1, more of the steps are at high noise (5; Wan2.2 without "
          "--distill: 12)")
    steps("--guidance", type=float, nargs="+", metavar="G", help="1: none; else each step is taken G times as far away "
          "from the negative prompt, at twice the time (1; without --distill take 5; Wan2.2 without: 4 3)")
    steps("--negative", default=NEGATIVE, metavar="TEXT", help="negative prompt for guidance [Wan's, in Chinese]")
    steps("--sampler", choices=("euler", "unipc"), default="euler", help="unipc is the official code's [euler]")
    where = parser.add_argument_group("where the object is").add_argument
    where("--mask", metavar="MASK", help="x,y,a,b[,angle]: an ellipse's centre in widths and heights, half axes in "
          "shorter sides, degrees clockwise; '0:x,y,a,b; 1:x,y,a,b': moving, 0 the first and 1 the last frame; a clip "
          "with alpha or a matte; a saved tensor (t,h,w) of 0 to 1 [a centred circle]")
    where("--mean", type=float, metavar="MU", help="mean of the noise outside the mask; 0 is off, which weights of "
          "Wan-Alpha v1 need (0.05)")
    weights = parser.add_argument_group("weights").add_argument
    weights("--base", default=Path(__file__).with_name("tiny"), metavar="DIR",
            help="checkpoint folder laid out like Wan2.1-T2V-14B or Wan2.2-T2V-A14B [tiny, beside generate.py]")
    weights("--vae-adapter", nargs="+", metavar="FILE", help="Wan-Alpha's decoder.bin or *-VAE.bin, or what "
            "train_vae.py wrote; or two merged decoders, of colour and of alpha")
    weights("--dora", nargs="+", metavar="FILE", help="Wan-Alpha's t2v.safetensors, or what train_dit.py wrote")
    weights("--distill", nargs="+", metavar="FILE", help="LightX2V's LoRA for 4 steps without guidance, merged after "
            "--dora")
    machine = parser.add_argument_group("machine").add_argument
    machine("--device", choices=("cuda", "cpu"), help="[cuda where there is one]")
    machine("--text-device", choices=("cuda", "cpu"), help="of the text encoder [--device]")
    machine("--dtype", choices=("bfloat16", "float32"), help="of text encoder and transformer [float32 on the "
            "CPU, else bfloat16]")
    machine("--vae-dtype", choices=("bfloat16", "float32"), help="of the decoders [likewise, whatever --dtype]")
    machine("--vae-chunk", type=int, metavar="N", help="latent frames decoded at a time; more take memory, and bits at "
            "the rounding limit may differ [1 on the CPU, else what free memory holds]")
    machine("--offload", action="store_true", help="keep the transformer in host memory, a block or two at a time on "
            "the GPU; same result, slower")
    machine("--fp8", action="store_true", help="keep the transformer's blocks in 8 bits, half of bfloat16's memory")
    machine("--shard", action="store_true", help="with torchrun: on each GPU a part of the transformer, not all")
    return parser


def main(argv: list[str] | None = None) -> None:
    try:
        for folder in generate(make_parser().parse_args(argv)):
            print(folder, flush=True)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, sentence):
            sentence = "not enough memory; give --offload, --fp8, a smaller --size or fewer --frames"
        elif isinstance(error, RuntimeError):
            raise
        print("generate.py:", sentence, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"generate.py: {message}\n"
    main()
