"""From a prompt to a transparent clip: text encoder, a few steps of the diffusion transformer, two decoders, files.

    prompt -> context (l d) -> z (b c t h w), from noise whose mean is shifted outside an ellipse -> rgb, alpha -> files

Wan-Alpha costs nothing here: its adapters merge into the weights as these load (dora.py, merge.py), the noise gets its
mean (sampler.py), and two decoders read one latent (merge.py). Each stage loads its model once, takes all clips through
it and frees it before the next, so one model at a time is in memory; of Wan2.2's two transformers, one for high noise
and one for low, too. How a transformer fits a small GPU or spreads over many is told in kit/scale.py.

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
import math
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from kit.command import (Parser, clip_frames, end_process_group, file_and_scale, from_first, number, pixels, positive,
                         run_command, start_process_group)
from kit.export import KINDS, export
from kit.media import write_rgba
from kit.memory import choose_chunk, latent_size
from kit.request import NEGATIVE, prepare
from kit.result import folder_name, hash_weights, media, result_folder, save_record, told
from kit.scale import load_scaled
from kit.view import is_free, write_page
from merge import RGBAVAE, load_rgba_vae
from sampler import euler, guide, shift_noise, shifted_sigmas, unipc
from text import load_text_encoder


# ---- from prompt to files


@torch.inference_mode()
def generate(args: argparse.Namespace) -> Iterator[Path]:
    """The clips asked for as `make_parser` does: the folder of each, as soon as it is whole.

    FileNotFoundError or ValueError, one sentence and before any long work, for what cannot be done. What makes a clip
    fail later is raised when those before it are written (of several processes at once: they cannot go on alone).
    """
    rank, world, device = start_process_group(args.device)
    args, mask = prepare(args, rank, world, device)
    stages = {}
    with told(stages, "text", args.device):
        contexts = from_first(lambda: encode_prompts(args))
    with told(stages, "transformer", args.device):
        latents, error = sample(args, contexts, mask)
    if error and world > 1:
        raise error
    end_process_group()
    if rank == 0:
        yield from finish(args, latents, stages)
    if error:
        raise error


def encode_prompts(args: argparse.Namespace) -> dict[str, Tensor]:
    """The context (l d) of every prompt and, only where guidance asks for it, of the negative one."""
    encoder = load_text_encoder(args.text, args.dtype, args.text_device, args.base)
    texts = dict.fromkeys(prompt for prompt, _ in args.clips)
    if any(expert.guidance != 1 for expert in args.experts):
        texts[args.negative] = None
    if words := dict.fromkeys(word for prompt, _ in args.clips for word in encoder.unknown(prompt)):
        warnings.warn(f"this model does not know {', '.join(words)}")
    return {text: encoder([text])[0].cpu() for text in texts}       # one by one: alone or among others, equal bytes


def sample(args: argparse.Namespace, contexts: dict[str, Tensor],
           mask: Tensor | None) -> tuple[list[Tensor], Exception | None]:
    """The normalised latents z (1 c t h w), float32, of the clips; mask is G, or None for noise of mean 0.

    Each transformer is loaded once and takes every clip through its part of the noise levels. When a clip fails, it and
    those after it are given up: fewer latents are returned, and the error.
    """
    sigmas = shifted_sigmas(args.steps, args.shift, 1.0 if args.sampler == "euler" else 0.999)
    turn = SimpleNamespace(dit=None, guidance=1.0)      # the transformer whose turn it is, and how far it guides
    paths = [denoise(args, turn, sigmas, contexts, mask, prompt, seed) for prompt, seed in args.clips]
    latents, error, done = [None] * len(paths), None, 0
    bar = tqdm(desc="sampling", total=args.steps * len(paths), disable=args.rank > 0)
    for expert in args.experts:
        steps = int((1000 * sigmas[:-1] >= expert.least).sum()) - done
        if steps == 0 or not paths:
            continue
        turn.dit, turn.guidance = load_scaled(expert.path, expert.adapters, args.dtype, args.device, args.offload,
                                              args.fp8, args.shard), expert.guidance
        error = take_steps(paths, latents, steps, bar) or error
        done += steps
        turn.dit = None         # before the next one is loaded
        gc.collect()
    bar.close()
    return latents, error


def denoise(args: argparse.Namespace, turn: SimpleNamespace, sigmas: Tensor, contexts: dict[str, Tensor],
            mask: Tensor | None, prompt: str, seed: int) -> Iterator[Tensor]:
    """z of one clip after each step, from noise with the mean shift on, by whichever transformer's turn it is."""
    shape = 1, turn.dit.config.in_dim, *latent_size(args)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if mask is not None:
        noise = shift_noise(noise, mask, args.mean)

    def velocity(z, t):
        v = turn.dit(z, t, [contexts[prompt].to(args.device)])
        if turn.guidance == 1:
            return v
        v_negative = turn.dit(z, t, [contexts[args.negative].to(args.device)])
        return guide(v, v_negative, turn.guidance)
    solver = euler if args.sampler == "euler" else unipc
    for _, z in solver(velocity, noise.to(args.device), sigmas):
        yield z


def take_steps(paths: list[Iterator[Tensor]], latents: list[Tensor], steps: int, bar: tqdm) -> Exception | None:
    """Takes every clip so many steps on. The first that fails ends this: it and those after it leave both lists, and
    its error is returned."""
    for i, path in enumerate(paths):
        try:
            for z in islice(path, steps):
                latents[i] = z
                bar.update()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)         # they hold tensors
            del paths[i:], latents[i:]
            return error
    return None


def decode(args: argparse.Namespace, vae: RGBAVAE, z: Tensor) -> Iterator[np.ndarray | None]:
    """Straight rgb (t, h, w, 3), then alpha (t, h, w) or None, uint8: one can be written while the other is made."""
    def pieces(decoder, name):
        stream = decoder.decode_stream(z.to(args.vae_dtype), args.vae_chunk)
        for piece in tqdm(stream, f"decoding {name}", math.ceil(z.shape[2] / args.vae_chunk)):
            yield piece.float()
    yield to_bytes((piece + 1) / 2 for piece in pieces(vae.vae_fgr, "colour"))
    yield None if vae.vae_pha is None else to_bytes(
        vae.to_alpha(piece.clamp(-1, 1)) for piece in pieces(vae.vae_pha, "alpha"))[..., 0]


def to_bytes(pieces: Iterable[Tensor]) -> np.ndarray:
    """Pieces (1 c t h w) of about [0, 1] -> uint8 (t, h, w, c), rounded."""
    pieces = [(255 * x).round().clamp(0, 255).byte().cpu() for x in pieces]
    return rearrange(torch.cat(pieces, dim=2), "1 c t h w -> t h w c").numpy()


def finish(args: argparse.Namespace, latents: list[Tensor], stages: dict) -> Iterator[Path]:
    """Decodes and writes clip by clip. Meanwhile the files of the models are hashed, which can take a minute."""
    vae, done = None, []
    with ThreadPoolExecutor() as background:
        weights = background.submit(hash_weights, args)
        for (prompt, seed), z in zip(args.clips, latents):
            final = args.out / folder_name(prompt, seed)
            with result_folder(final) as folder, ThreadPoolExecutor() as pool:      # the encoders are processes
                with told(stages, "decode", args.device):
                    vae = vae or load_rgba_vae(args.vae, args.vae_adapter, args.vae_dtype, args.device)
                    args.vae_chunk = args.vae_chunk or choose_chunk(args, vae.vae_fgr.config)
                    frames = decode(args, vae, z)
                    rgb = next(frames)
                    jobs = [pool.submit(write_rgba, folder / "rgb.mp4", rgb, None, args.fps)]
                    alpha = next(frames)
                with told(stages, "write", args.device):
                    jobs += [pool.submit(write_rgba, folder / name, *clip, args.fps)
                             for name, clip in media(rgb, alpha).items()]
                    for job in tqdm(jobs, "writing"):
                        job.result()
                save_record(folder / "run.json", args, prompt, seed, stages, weights.result())
                export(folder, args.also, args.trim)
                write_page(folder / "index.html", [folder])
            done.append(final)
            yield final
    if len(done) > 1 and is_free(args.out / "index.html"):
        write_page(args.out / "index.html", done)


# ---- the command


def make_parser() -> Parser:
    parser = Parser(prog="generate.py", description="Write transparent clips from text prompts.", epilog="""
        Numbers in (parentheses) are Wan's; section "generate" of the base folder's config.json goes before them.
        Files go to OUT/WORDS-OF-THE-PROMPT-SEED: rgba.webm, rgba.mov and frames/0000.png ... with straight alpha,
        previews over a checkerboard, rgb.mp4, alpha.mp4, run.json, which says how, and index.html to look at it; many
        clips get one more. Where --base is Wan2.2's, with high_noise_model and low_noise_model, a flag of one or two
        values takes them in this order. Many GPUs: torchrun --nproc_per_node=N generate.py PROMPT ...""")
    finite, devices, dtypes = number(-1e6, 1e6), ("cuda", "cpu"), ("bfloat16", "float32")
    clip = parser.add_argument_group("the clip").add_argument
    clip("prompt", metavar="PROMPT", nargs="?", help="what to show; cut at the token limit")
    clip("--prompts", metavar="FILE", help="instead: a text file of prompts, one a line")
    clip("--size", type=pixels, metavar="WxH", help="width x height in pixels, multiples of 16 (832x480)")
    clip("--frames", type=clip_frames, metavar="N", help="length, 4k+1 frames (81)")
    clip("--seed", type=int, nargs="+", default=[0], metavar="N", help="of the noise; several: as many clips [0]")
    clip("--fps", type=number(0.01, 1000), metavar="N", help="frames a second that files are played at (16)")
    clip("--out", default="out", metavar="DIR", help="where each clip's own folder goes [out]")
    clip("--also", nargs="+", default=[], choices=KINDS, metavar="KIND", help=f"more files: {', '.join(KINDS)}")
    clip("--trim", action="store_true", help="these without the margin that no frame's object touches")
    steps = parser.add_argument_group("sampling").add_argument
    steps("--steps", type=positive, metavar="N", help="from noise to clip (4; without --distill 50; Wan2.2's: 40)")
    steps("--shift", type=number(1e-6), metavar="K", help="above 1: more steps at high noise (5; Wan2.2's: 12)")
    steps("--guidance", type=finite, nargs="+", metavar="G", help="1: none; else each step is taken G times as far "
          "away from the negative prompt, at twice the time (1; without --distill take 5; Wan2.2 without: 4 3)")
    steps("--negative", default=NEGATIVE, metavar="TEXT", help="negative prompt for guidance [Wan's, in Chinese]")
    steps("--sampler", choices=("euler", "unipc"), default="euler", help="unipc is the official code's [euler]")
    where = parser.add_argument_group("where the object is").add_argument
    where("--mask", metavar="MASK", help="x,y,a,b[,angle]: an ellipse's centre in widths and heights, half axes in "
          "shorter sides, degrees clockwise; '0:x,y,a,b; 1:x,y,a,b': moving, 0 the first and 1 the last frame; a clip "
          "with alpha or a matte; a saved tensor (t,h,w) of 0 to 1 [a centred circle]")
    where("--mean", type=finite, metavar="MU", help="mean of the noise outside the mask; 0 for Wan-Alpha v1 (0.05)")
    weights = parser.add_argument_group("weights").add_argument
    weights("--base", metavar="DIR", help="checkpoint folder laid out like Wan2.1-T2V-14B or Wan2.2-T2V-A14B [--run's, "
            "or else tiny, beside generate.py]")
    for name in ("dit", "text", "vae"):
        weights(f"--{name}", metavar="FILE", help="instead of the one in --base; also as diffusers or ComfyUI have it")
    weights("--run", metavar="DIR", help="--out of your trainings: their base, adapters, size, length and mu")
    weights("--vae-adapter", nargs="+", metavar="FILE", help="Wan-Alpha's decoder.bin or *-VAE.bin, or what "
            "train_vae.py wrote; or two merged decoders, of colour and of alpha")
    weights("--dora", nargs="+", metavar="FILE", help="Wan-Alpha's t2v.safetensors, or what train_dit.py wrote")
    weights("--distill", nargs="+", metavar="FILE", help="LightX2V's LoRA for 4 unguided steps, merged after --dora")
    weights("--lora", nargs="+", type=file_and_scale, default=[], metavar="FILE[:SCALE]",
            help="more adapters, merged last, in this order")
    machine = parser.add_argument_group("machine").add_argument
    machine("--device", choices=devices, help="[cuda where there is one]")
    machine("--text-device", choices=devices, help="of the text encoder [--device]")
    machine("--dtype", choices=dtypes, help="of text encoder and transformer [float32 on the CPU, else bfloat16]")
    machine("--vae-dtype", choices=dtypes, help="of the decoders [likewise, whatever --dtype]")
    machine("--vae-chunk", type=positive, metavar="N", help="latent frames decoded at a time; more take memory, and "
            "bits at the rounding limit may differ [1 on the CPU, else what free memory holds]")
    machine("--offload", action="store_true", help="transformer in host memory, streamed to the GPU: slower")
    machine("--fp8", action="store_true", help="the transformer's blocks in 8 bits, half of bfloat16's memory")
    machine("--shard", action="store_true", help="with torchrun: on each GPU a part of the transformer, not all")
    return parser


def main(argv: list[str] | None = None) -> None:
    for folder in generate(make_parser().parse_args(argv)):
        print(folder, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, "generate.py", "--offload, --fp8, a smaller --size or fewer --frames"))
