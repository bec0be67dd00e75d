"""From a prompt to a transparent clip: text encoder, a few steps of the diffusion transformer, two decoders, files.

    prompt -> context (l d) -> z (b c t h w), from noise whose mean is shifted outside an ellipse -> rgb, alpha -> files

Wan-Alpha costs nothing here: its adapters merge into the weights as these load (dora.py, merge.py), the noise gets its
mean (sampler.py), and two decoders read one latent (merge.py). Each stage loads its model, runs it and frees it before
the next, so one model at a time is in memory.

Colour is straight (never multiplied by alpha). Noise is drawn on the CPU in float32: a seed is the same noise on every
machine, and the same bytes on one (test_same_seed_same_bytes).
Letters: b batch, c channels, t frames, h w height and width, l text tokens, d width.
Differs from the official code: Euler by default, its UniPC by a flag; 8-bit values are rounded, not truncated
(test_pixels_are_rounded); a negative prompt is only encoded for guidance (test_guidance_reads_the_negative_prompt).
dtype rule: models run in --dtype, the sampler's state is float32, pixels become uint8 as they are decoded.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from data import PICTURES, VIDEOS, checkerboard, over, read_rgba, save_text, write_rgba
from dit import load_dit, read_deltas, read_json, weight_files
from merge import load_rgba_vae
from sampler import euler, guide, load_mask, mask_from_alpha, mask_from_tensor, shift_noise, shifted_sigmas, unipc
from text import clean_prompt, load_text_encoder
from vae import read_checkpoint

try:
    import resource
except ImportError:     # there is none on Windows
    resource = None

WAN = dict(size=(832, 480), frames=81, fps=16.0, steps=4, shift=5.0, guidance=1.0, mean=0.05)
ADAPTERS = ("vae_adapter", "dora", "distill")
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
            "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
NO_MEMORY = "out of memory|allocate memory|not enough memory"       # as PyTorch says it on a GPU, Linux, Windows
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "einops", "imageio", "imageio-ffmpeg")


# ---- what is asked for


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """What the command line left open, from section "generate" of the base folder's config.json, else Wan's numbers."""
    base = Path(args.base)
    if not (base / "config.json").is_file():
        raise FileNotFoundError(f"there is no {base / 'config.json'}; give --base a folder like Wan2.1-T2V-14B")
    said = WAN | dict.fromkeys(ADAPTERS) | read_section(base / "config.json")
    said |= {name: str(base / said[name]) for name in ADAPTERS if said[name]}
    args = argparse.Namespace(**{k: said.get(k) if v is None else v for k, v in (said | vars(args)).items()})
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    args.base, args.out = base, Path(args.out)
    args.prompt, args.negative = clean_prompt(args.prompt), clean_prompt(args.negative)
    args.text, args.vae = (either(base, name) for name in ("models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"))
    args.adapters = [(file, 1.0) for file in (args.dora, args.distill) if file]     # in this order: they do not commute
    return args


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
    """ValueError or FileNotFoundError, before any long work, for numbers out of range and for weights that do not fit:
    all models are loaded onto the meta device, where they are names and shapes."""
    raise_first([
        (not args.prompt, 'the prompt is empty; describe the clip, as in "a red glass ball bouncing"'),
        (not 0 <= args.seed < 2 ** 63, f"--seed {args.seed} is not between 0 and 2^63 - 1"),
        (args.frames < 1 or args.frames % 4 != 1, f"--frames {args.frames} is not 4k+1; give 1, 5, 9, ... frames"),
        (args.steps < 1, f"--steps {args.steps} is below 1"),
        (not 0 < args.fps < math.inf, f"{args.base / 'config.json'}: fps {args.fps} is not a finite number above 0"),
        (not 0 < args.shift < math.inf, f"--shift {args.shift} is not a finite number above 0"),
        (not math.isfinite(args.mean), f"--mean {args.mean} is not a finite number"),
        (not math.isfinite(args.guidance), f"--guidance {args.guidance} is not a finite number"),
        (args.device == "cuda" and not torch.cuda.is_available(), "there is no CUDA device; use --device cpu"),
        (not args.vae_adapter, f"{args.base} names no VAE adapter; give --vae-adapter, for example decoder.bin")])
    text = load_text_encoder(args.text, device="meta").model.config
    dit = load_dit(args.base, device="meta")
    for file, scale in args.adapters:
        read_deltas(file, dit.state_dict(), scale)
    vae = load_rgba_vae(args.vae, args.vae_adapter, device="meta").vae.config
    (w, h), (step_h, step_w) = args.size, (8 * p for p in dit.config.patch_size[1:])
    raise_first([
        (text.dim != dit.config.text_dim, f"{args.base}: text encoder and transformer do not belong together"),
        (vae.z_dim != dit.config.in_dim, f"{args.base}: VAE and transformer do not belong together"),
        (min(w, h) < 1 or w % step_w or h % step_h, f"--size {w}x{h}: width must be a multiple of {step_w} pixels, "
                                                    f"height of {step_h}")])


def raise_first(problems: list[tuple[bool, str]]) -> None:
    for wrong, sentence in problems:
        if wrong:
            raise ValueError(sentence)


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


# ---- the stages


def encode_prompt(args: argparse.Namespace) -> list[Tensor]:
    """Contexts (l d): the prompt's and, only where guidance asks for it, the negative prompt's."""
    encoder = load_text_encoder(args.text, args.dtype, args.device)
    return encoder([args.prompt] if args.guidance == 1 else [args.prompt, args.negative])


def sample(args: argparse.Namespace, contexts: list[Tensor], mask: Tensor | None) -> Tensor:
    """The normalised latent z (1 c t h w), float32, of one clip; mask is G, or None for noise of mean 0."""
    dit = load_dit(args.base, args.adapters, args.dtype, args.device)
    shape = 1, dit.config.in_dim, (args.frames + 3) // 4, args.size[1] // 8, args.size[0] // 8
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    noise = (noise if mask is None else shift_noise(noise, mask, args.mean)).to(args.device)

    def model(z, t):
        v, *v_negative = (dit(z, t, [context]) for context in contexts)
        return guide(v, *v_negative, args.guidance) if v_negative else v

    if args.sampler == "euler":
        steps = euler(model, noise, shifted_sigmas(args.steps, args.shift))
    else:
        steps = unipc(model, noise, args.steps, args.shift)
    for _, z in tqdm(steps, "sampling", args.steps):
        pass
    return z


def decode(args: argparse.Namespace, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Straight rgb (t, h, w, 3) and alpha (t, h, w), uint8, decoded one latent frame at a time."""
    vae = load_rgba_vae(args.vae, args.vae_adapter, args.dtype, args.device)

    def pieces(decoder, name):
        return map(Tensor.float, tqdm(decoder.decode_stream(z.to(args.dtype)), f"decoding {name}", z.shape[2]))
    rgb = to_bytes((x + 1) / 2 for x in pieces(vae.vae_fgr, "colour"))
    alpha = to_bytes(vae.to_alpha(x) for x in pieces(vae.vae_pha, "alpha"))
    return rgb, alpha[..., 0]


def to_bytes(pieces: Iterable[Tensor]) -> np.ndarray:
    """Pieces (1 c t h w) of about [0, 1] -> uint8 (t, h, w, c), rounded."""
    pieces = [(255 * x).round().clamp(0, 255).byte().cpu() for x in pieces]
    return rearrange(torch.cat(pieces, dim=2), "1 c t h w -> t h w c").numpy()


def write_outputs(folder: Path, rgb: np.ndarray, alpha: np.ndarray, fps: float) -> None:
    """All media of one clip, side by side: the encoders are processes of their own."""
    preview = over(rgb, alpha, checkerboard(*alpha.shape[1:]))
    clips = {"rgba.mov": (rgb, alpha), "rgba.webm": (rgb, alpha), "frames": (rgb, alpha), "rgb.mp4": (rgb, None),
             "alpha.mp4": (repeat(alpha, "t h w -> t h w 3"), None),
             "preview.mp4": (preview, None), "preview.webp": (preview, None)}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(write_rgba, folder / name, *clip, fps) for name, clip in clips.items()]
        for job in tqdm(jobs, "writing"):
            job.result()


# ---- the record, and where everything goes


@contextmanager
def measured(stages: dict, name: str, device: str) -> Iterator[None]:
    """Notes seconds and peak memory in MiB: the process's so far and, on a GPU, the stage's own."""
    start, cuda = time.perf_counter(), device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if cuda:
        torch.cuda.synchronize()
    stages[name] = dict(seconds=round(time.perf_counter() - start, 2))
    if resource:
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        stages[name]["host_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    if cuda:
        stages[name]["device_mib"] = torch.cuda.max_memory_allocated() // 2 ** 20


def hash_weights(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of every file that the models are made of: config.json, tokenizer, weights, adapters."""
    def digest(file):
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    files = [args.base / "config.json", args.base / "google/umt5-xxl/tokenizer.json", args.text,
             *weight_files(args.base), args.vae, args.vae_adapter, *(file for file, _ in args.adapters)]
    return {str(file): digest(file) for file in files}


def folder_name(prompt: str, seed: int) -> str:
    """The prompt's words, lower case, letters of any script, and the seed. Long prompts often begin alike: one that is
    cut gets some digits of its hash. The limit is in bytes too, for file systems count those."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))
    short = words[:50].encode()[:150].decode(errors="ignore").strip("-") or "clip"
    return f"{short}-{seed}" if short == words else f"{short}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}-{seed}"


@contextmanager
def result_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place, whole, if the block succeeds."""
    if final.exists() and not (final / "run.json").is_file():
        raise ValueError(f"{final} exists and is no result of generate.py; move it away or choose another --out")
    temporary, earlier = (final.with_name(f".{os.getpid()}-{final.name}{end}") for end in ("", "~"))
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {final.parent} ({error.strerror}); choose another --out") from None
    try:
        yield temporary
        if final.exists():
            final.rename(earlier)
        temporary.rename(final)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- the command


@torch.inference_mode()
def generate(args: argparse.Namespace) -> Path:
    """One clip, asked for as `make_parser` does; returns the folder of its files. FileNotFoundError or ValueError, one
    sentence and before any long work, for what cannot be done."""
    args, stages = settle(args), {}
    check(args)
    mask, final = make_mask(args), args.out / folder_name(args.prompt, args.seed)
    with result_folder(final) as folder:
        with measured(stages, "text", args.device):
            contexts = encode_prompt(args)
        with measured(stages, "transformer", args.device):
            z = sample(args, contexts, mask)
        with measured(stages, "decode", args.device):
            rgb, alpha = decode(args, z)
        with measured(stages, "write", args.device):
            write_outputs(folder, rgb, alpha, args.fps)
            weights = hash_weights(args)
        versions = dict(python=platform.python_version()) | {name: version(name) for name in PACKAGES}
        record = dict(arguments=vars(args), seed=args.seed, versions=versions, weights=weights, stages=stages)
        save_text(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
    return final


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
    parser = Parser(prog="generate.py", description="Write a transparent clip from a text prompt.", epilog="""
        Numbers in (parentheses) are Wan's; section "generate" of the base folder's config.json goes before them.
        Files go to OUT/WORDS-OF-THE-PROMPT-SEED: rgba.webm, rgba.mov and frames/0000.png ... with straight alpha,
        preview.mp4 and preview.webp over a checkerboard, rgb.mp4, alpha.mp4, and run.json, which says how.""")
    clip = parser.add_argument_group("the clip").add_argument
    clip("prompt", metavar="PROMPT", help="what to show; cut at the token limit")
    clip("--size", type=pixels, metavar="WxH", help="width x height in pixels, multiples of 16 (832x480)")
    clip("--frames", type=int, metavar="N", help="length, 4k+1 frames (81)")
    clip("--seed", type=int, default=0, metavar="N", help="of the noise: same seed, same clip [0]")
    clip("--out", default="out", metavar="DIR", help="where the clip's own folder goes [out]")
    steps = parser.add_argument_group("sampling").add_argument
    steps("--steps", type=int, metavar="N", help="from noise to clip (4; without --distill take 50)")
    steps("--shift", type=float, metavar="K", help="above 1, more of the steps are at high noise (5)")
    steps("--guidance", type=float, metavar="G", help="1: none; else each step is taken G times as far away from the "
          "negative prompt, at twice the time (1; without --distill take 5)")
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
            help="checkpoint folder laid out like Wan2.1-T2V-14B [tiny, beside generate.py]")
    weights("--vae-adapter", metavar="FILE", help="Wan-Alpha's decoder.bin or *-VAE.bin, or what train_vae.py wrote")
    weights("--dora", metavar="FILE", help="Wan-Alpha's t2v.safetensors, or what train_dit.py wrote")
    weights("--distill", metavar="FILE", help="LightX2V's LoRA for 4 steps without guidance, merged after --dora")
    machine = parser.add_argument_group("machine").add_argument
    machine("--device", choices=("cuda", "cpu"), help="[cuda where there is one]")
    machine("--dtype", choices=("bfloat16", "float32"), help="of the models [float32 on the CPU, else bfloat16]")
    return parser


def main(argv: list[str] | None = None) -> None:
    try:
        print(generate(make_parser().parse_args(argv)))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, sentence):
            sentence = "not enough memory; give a smaller --size or fewer --frames"
        elif isinstance(error, RuntimeError):
            raise
        print("generate.py:", sentence, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"generate.py: {message}\n"
    main()
