"""Train the VAE: a base VAE on RGB from scratch (--stage base), or the RGBA autoencoder of Wan-Alpha on a frozen base.

    python data.py data/ --clips 2000
    python train_vae.py data/ --stage base --out base       # what Wan2.1's VAE is to Wan-Alpha
    python train_dit.py data/ --stage base --base base --out base       # L_TABD needs its transformer
    python train_vae.py data/ --base base --out base --schedule 1000:17:64:4 --perceptual 0
                                                            # merge block and two LoRA decoders (paper, section 3.2)
    python train_vae.py --eval --base base                  # scores on unseen clips

RGBA stage:  z = merge(features(hard render), features(alpha));  rgb, alpha = the two decoders of z;
             L_vae = L_alpha + L_soft + L_hard + 0.1 L_TABD.
The loop, with its workers, checkpoints, exact resume and many processes, is `fit` in scale.py.
dtype rule: parameters, losses and optimiser in float32; with --bf16 the autoencoder runs under autocast and the frozen
transformer, for L_TABD, is held in bfloat16 (times, norms and modulation in float32).
"""

import argparse
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from data import (RGBADataset, bleed, cache_key, contact_sheet, over, premultiply, procedural_clip, resize,
                  save_tensors, save_text, to_and_fro, unpremultiply, write_rgba)
from dit import load_dit
from losses import PALETTE, VGG, hard_render, random_colors, raw_loss, rgba_loss, soft_render, tabd_loss, tabd_mask
from merge import WHITE, FeatureMerge, RGBAVAE, load_rgba_vae
from sampler import flow_target, interpolate, sample_sigma
from scale import (add_loop_flags, average, end_process_group, finish, fit, make_optimizers, number, positive,
                   prepare_blocks, ranks, shares, start_process_group, step_generator)
from text import load_text_encoder
from vae import ResidualBlock, VAEConfig, WanVAE, load_vae

TINY = Path(__file__).parent / "tiny"


# ---- what both training commands do first and last


def one_sentence(main) -> int:
    """Run main; a ValueError or OSError (wrong input from outside) becomes one sentence on stderr and exit code 2, as
    do too little memory and the end of another process. SIGTERM counts as Ctrl-C: 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        return 0
    except (ValueError, OSError) as error:
        said, code = f"error: {error}", 2
    except KeyboardInterrupt:
        said, code = "stopped", 130
    except RuntimeError as error:
        if "memory" not in str(error) and (ranks()[1] == 1 or "peer" not in str(error)):
            raise
        said, code = "error: " + ("another process ended, its message says why" if "peer" in str(error) else
                                  "not enough memory: try a smaller batch, --accumulate, --checkpoint"), 2
    finally:
        signal.signal(signal.SIGTERM, before)
    print(said, file=sys.stderr)
    return code


def check_run(args):
    """What both trainings can tell from their arguments alone."""
    if not args.eval and not args.data:
        raise ValueError("give a folder of clips to train on, or --eval")
    if not Path(args.base).is_dir():
        raise FileNotFoundError(f"there is no folder {args.base}: give --base the folder of a checkpoint")
    try:
        if "RANK" not in os.environ:        # torchrun's processes get their devices later
            torch.empty(0, device=args.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {args.device} is not to be had here; try cpu") from None


def checked(dataset: RGBADataset, args) -> RGBADataset:
    """Reads every clip once before a training begins and drops what cannot be read; what was found is kept in the
    folder as .checked.json, so that only new and changed files are read the next time."""
    file, known, rows = Path(args.data) / ".checked.json", [], [None]
    if ranks()[0] == 0:
        with suppress(OSError, ValueError, TypeError):      # no such file yet, or a damaged one
            known = json.loads(file.read_text(encoding="utf-8"))
            known = [row for row in known if {"name", "bytes", "changed", "frames", "error"} <= {*row}]
        rows = dataset.check(args.workers, known)
        with suppress(OSError):                             # a folder that cannot be written is read again
            save_text(file, json.dumps(rows))
    if ranks()[1] > 1:
        rows = [rows]
        torch.distributed.broadcast_object_list(rows)
        rows = rows[0]
    dataset.drop_bad(rows)
    dataset.fingerprint = cache_key(*(f"{row['name']} {row['bytes']}" for row in rows if not row["error"]))
    return dataset


def find_vae(base) -> Path:
    """The VAE of a checkpoint folder, .safetensors or Wan's .pth."""
    file = Path(base) / "Wan2.1_VAE.safetensors"
    return file if file.exists() else file.with_suffix(".pth")


# ---- batches


def to_video(rgb, alpha):
    """uint8 (t, h, w, 3), (t, h, w) -> rgb (1, 3, t, h, w) in [-1, 1], alpha (1, 1, t, h, w) in [0, 1]."""
    return rearrange(torch.as_tensor(rgb), "t h w c -> 1 c t h w") / 127.5 - 1, torch.as_tensor(alpha)[None, None] / 255


def to_clip(rgb, alpha=None):
    """The way back: rgb (3, t, h, w), alpha (1, t, h, w) or None for opaque -> uint8 arrays, rounded."""
    alpha = torch.ones_like(rgb[:1]) if alpha is None else alpha
    pair = rearrange((rgb + 1) / 2, "c t h w -> t h w c"), alpha[0]
    return tuple((255 * x).round().clamp(0, 255).byte().cpu().numpy() for x in pair)


def parse_schedule(text: str) -> list[tuple[int, int, int, int]]:
    """"4000:1:40:64,800:17:64:6" -> phases of (steps, frames, side in pixels, batch)."""
    try:
        phases = [tuple(map(int, phase.split(":"))) for phase in text.split(",")]
        assert all(len(p) == 4 and min(p) > 0 and p[1] % 4 == 1 and p[2] % 8 == 0 and p[2] > 8 for p in phases)
    except (ValueError, AssertionError):
        raise ValueError(f"--schedule {text!r} is not steps:frames:side:batch,... with 4k+1 frames and sides in "
                         "multiples of 8 from 16 on") from None
    return phases


def phase_at(phases, step: int) -> tuple[int, int, int]:
    """Frames, side and batch of a step."""
    for steps, *phase in phases:
        if step < steps:
            return phase
        step -= steps


def crop(rgb, alpha, frames: int, side: int, size: int | None, u):
    """A part of a clip, uint8 (t, h, w, 3), (t, h, w) -> (frames, side, side, 3), (frames, side, side).

    size: what the clip's shorter side counts as, pixels; None: side times a random 1 to 2, as in the paper. u: four
    numbers in [0, 1). The window's middle is a place of the object; over a still it slides from one to another.
    Clips too short are played to and fro."""
    t, h, w = alpha.shape
    start = int(u[0] * max(1, t - frames + 1))
    window = max(1, round(min(h, w) * side / (size or side * (1 + u[1]))))
    inside = np.argwhere(alpha[min(t - 1, start + frames // 2)])
    places = [inside[int(v * len(inside))] if len(inside) else (v * h, v * w) for v in u[2:]]
    y, x = (np.linspace(*(np.clip(place[axis] - window // 2, 0, full - window) for place in places),
                        frames if t == 1 else 1).round().astype(int) for axis, full in ((0, h), (1, w)))
    pick = list(np.broadcast(to_and_fro(t, frames, start), y, x))
    rgb, alpha = (np.stack([video[i, a:a + window, b:b + window] for i, a, b in pick])
                  for video in (rgb, alpha))
    if window == side:
        return bleed(rgb, alpha), alpha
    return unpremultiply(resize(premultiply(rgb, alpha), (side, side)))


def draw_clips(dataset, indices, frames: int, side: int, size: int | None, u, mine=slice(None)) -> dict:
    """The clips of a batch: rgb (n, 3, frames, side, side) in [-1, 1], alpha (n, 1, ...) in [0, 1], of the part
    `mine` of the batch, which alone is read; and the names of the whole. u (n, 4): `crop`'s numbers for each."""
    clips = [crop(*dataset.source(int(i)), frames, side, size, v) for i, v in zip(indices[mine], u[mine].tolist())]
    rgb, alpha = (torch.from_numpy(np.stack(part)) for part in zip(*clips))
    return dict(rgb=rearrange(rgb, "b t h w c -> b c t h w").float() / 127.5 - 1,
                alpha=alpha.unsqueeze(1).float() / 255, mine=mine, n=len(indices),
                names=[dataset.name(int(i)) for i in indices])


def draw_batch(dataset, phases, size, seed: int, accumulate: int, rank: int, world: int, step: int) -> list[dict]:
    """This process's part of the batch of a step, one dict a pass."""
    frames, side, batch = phase_at(phases, step)
    generator = step_generator(seed, step, data=True)
    indices = torch.randint(trained_on(dataset), (batch,), generator=generator)
    u = torch.rand(batch, 4, generator=generator)
    return [draw_clips(dataset, indices, frames, side, size, u, mine)
            for mine in shares(batch, rank, world, accumulate)]


def trained_on(dataset) -> int:
    """How many clips of a data set train: the last 5 %, at most 8, are held out, for the sheets and the last scores."""
    return len(dataset) - min(8, len(dataset) // 20)


def held_out_clips(dataset, n: int = 8) -> list[int]:
    """The first n of them; of a set too small to hold any out, clips that train."""
    return list(range(trained_on(dataset) % len(dataset), len(dataset)))[:n]


def rgb_views(rgb, alpha, generator, n: int, mine=slice(None)):
    """What a base VAE learns from: each clip rendered softly (40 %) or hard (35 %) on a colour, or its alpha as grey
    (25 %). Half of the colours are corners of the RGB cube, half are any. n: of the batch that rgb is the part
    `mine` of."""
    corner, any_color = random_colors(n, generator)[0], torch.rand(n, 3, generator=generator) * 2 - 1
    color = torch.where(torch.rand(n, 1, generator=generator) < 0.5, corner, any_color)[mine]
    view = torch.rand(n, 1, 1, 1, 1, generator=generator)[mine].to(rgb.device)
    grey = (2 * alpha - 1).expand_as(rgb)
    return torch.where(view < 0.4, soft_render(rgb, alpha, color),
                       torch.where(view < 0.75, hard_render(rgb, alpha, color), grey))


# ---- stage base: an RGB VAE from scratch


def base_step(vae: WanVAE, video, generator, kl_weight: float, n: int, mine=slice(None)) -> dict:
    """Autoencode (b, 3, t, h, w), the part `mine` of a batch of n, with the latent sampled:
    L1 + 0.5 MSE + kl_weight * KL(latent || N(0, 1))."""
    mean, logvar = vae.moments(vae.features(video))
    mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
    noise = torch.randn(n, *mean.shape[1:], generator=generator)[mine].to(mean)
    z = mean + noise * (0.5 * logvar).exp()
    error = vae.decode(vae.normalize(z), chunk=None).float() - video
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
    l1, mse = error.abs().mean(), error.square().mean()
    return dict(loss=l1 + 0.5 * mse + kl_weight * kl, l1=l1, mse=mse, kl=kl)


@torch.no_grad()
def measure_statistics(vae: WanVAE, draw, steps: range) -> WanVAE:
    """Mean and deviation of the raw latent over the views of some steps, per channel: MEAN and STD of this VAE."""
    total, square, count = 0, 0, torch.zeros(1, dtype=torch.float64, device=vae.conv1.weight.device)
    for step in tqdm(steps, desc="latent statistics"):
        for batch in draw(step):
            video = rgb_views(batch["rgb"], batch["alpha"], step_generator(0, step), batch["n"], batch["mine"])
            raw = vae.moments(vae.features(video.to(vae.conv1.weight.device)))[0].double()
            total, square = total + raw.sum((0, 2, 3, 4)), square + raw.square().sum((0, 2, 3, 4))
            count += raw[:, 0].numel()
    average([total, square, count])
    mean, std = total / count, (square / count - (total / count) ** 2).clamp(min=1e-8).sqrt()
    vae.config = replace(vae.config, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    return vae


# ---- stage rgba: merge block and two LoRA decoders on the frozen base


def rgba_step(rgba: RGBAVAE, rgb, alpha, generator, vgg=None, perceptual=0.0, tabd=0.0, tabd_clamp=(-1, 1), dit=None,
              empty=None, naive=False, n: int | None = None, mine=slice(None)) -> dict:
    """L_alpha + L_soft + L_hard + tabd * L_TABD of rgb (b, 3, t, h, w) in [-1, 1], alpha (b, 1, t, h, w) in [0, 1],
    the part `mine` of a batch of n. dit: the frozen base transformer, empty: its context of the empty prompt (l, d);
    needed when tabd is not 0. naive: without any render, the paper's point of comparison."""
    n = n or len(rgb)
    color, colors = random_colors(n, generator)[0][mine], [c[mine] for c in random_colors(n, generator)]
    z = rgba.encode(rgb, alpha, None if naive else color, chunk=None)
    rgb_hat, alpha_hat = (x.float() for x in rgba.decode(z, chunk=None))
    z = z.float()
    with torch.autocast(z.device.type, enabled=False):
        compare = raw_loss if naive else partial(rgba_loss, colors=colors)
        parts = compare(rgb_hat, alpha_hat, rgb, alpha, vgg=vgg, perceptual=perceptual)
        loss = sum(parts.values())
        if tabd:
            sigma, weight = (x[mine].to(z.device) for x in sample_sigma(n, generator))
            noise = torch.randn(n, *z.shape[1:], generator=generator)[mine].to(z)
            v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, [empty] * len(z))
            parts["tabd"] = tabd_loss(v_hat, flow_target(z, noise), tabd_mask(alpha), weight, tabd_clamp)
            loss = loss + tabd * parts["tabd"]
    return dict(loss=loss, **parts)


# ---- scores


def masked_mean(x, mask):
    """Over the pixels where mask (t, h, w) is true, all channels; nan without any."""
    x = x if mask is None else x[mask]
    return float(x.mean()) if x.size else float("nan")


def psnr(x, y, mask=None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays (peak 255), where mask is true: (t, h, w) for all channels."""
    square = masked_mean((x.astype(np.float32) - y.astype(np.float32)) ** 2, mask)
    return float(10 * np.log10(255 ** 2 / max(square, 1e-3))) if square == square else square


def ssim_map(x, y):
    """Structural similarity of uint8 (t, h, w) or (t, h, w, c), at least 11 x 11 pixels, at every place that its window
    fits into: (t, h - 10, w - 10, c). As published (Wang et al. 2004): a Gaussian window of 11 x 11 pixels with
    deviation 1.5, K 0.01 and 0.03, peak 255, each channel by itself."""
    window = torch.exp(-torch.arange(-5.0, 6.0).double() ** 2 / (2 * 1.5 ** 2))
    window, channels = window / window.sum(), x.shape[3] if x.ndim == 4 else 1
    x, y = (torch.from_numpy(v.reshape(*v.shape[:3], -1)).double() for v in (x, y))
    x, y = (rearrange(v, "t h w c -> (t c) 1 h w") for v in (x, y))
    stacked = torch.cat([x, y, x * x, y * y, x * y])
    mx, my, xx, yy, xy = F.conv2d(F.conv2d(stacked, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11)).chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / (
        (mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2))
    return rearrange(similar, "(t c) 1 h w -> t h w c", c=channels).numpy()


def ssim(x, y, mask=None) -> float:
    """The mean of `ssim_map`, with a mask (t, h, w) of the places whose middle is true; nan without any."""
    return masked_mean(ssim_map(x, y), None if mask is None else mask[:, 5:-5, 5:-5])


def object_region(alpha):
    """The pixels with alpha > 0 and those up to two pixels from one, (t, h, w)."""
    seen = torch.as_tensor(alpha > 0).float().unsqueeze(1)
    return F.max_pool2d(seen, 5, stride=1, padding=2)[:, 0].bool().numpy()


@torch.no_grad()
def reconstruct(rgba: RGBAVAE, rgb, alpha, naive=False):
    """uint8 clip (t, h, w, 3), (t, h, w) -> the same through the autoencoder."""
    device = rgba.vae.conv2.weight.device
    z = rgba.encode(*(x.to(device) for x in to_video(rgb, alpha)), None if naive else WHITE)
    return to_clip(*(x[0] for x in rgba.decode(z)))


def compare_clips(rgb, alpha, rgb_hat, alpha_hat) -> dict:
    """PSNR in dB and SSIM of a result against its target, uint8: soft renders, their mean over the 8 palette colours,
    and alpha, over the whole frame and in the object's region (alpha > 0, two pixels wider); colour where alpha > 0."""
    def scores(x, y, *masks):
        similar = ssim_map(x, y)
        pairs = list(zip(*(np.split(v, max(1, v.shape[-1] // 3), -1) if v.ndim == 4 else [v] for v in (x, y))))
        for mask in masks:
            yield dict(psnr=float(np.mean([psnr(*pair, mask) for pair in pairs])),
                       ssim=masked_mean(similar, None if mask is None else mask[:, 5:-5, 5:-5]))
    renders = [np.concatenate([over(x, a, (c + 1) / 2 * 255) for c in PALETTE.numpy()], -1)     # 24 channels
               for x, a in ((rgb, alpha), (rgb_hat, alpha_hat))]
    names = ("soft render", "soft render, region", "alpha", "alpha, region", "colour, alpha > 0")
    region = object_region(alpha)
    return dict(zip(names, (*scores(*renders, None, region), *scores(alpha, alpha_hat, None, region),
                            *scores(rgb, rgb_hat, alpha > 0))))


def evaluate(rgba: RGBAVAE, clips, naive=False) -> list[dict]:
    """`compare_clips` of each (rgb, alpha) uint8 clip and what the autoencoder makes of it."""
    return [compare_clips(*clip, *reconstruct(rgba, *clip, naive)) for clip in tqdm(clips, desc="autoencode")]


@torch.no_grad()
def cell_losses(rgba: RGBAVAE, dit, empty, clips, naive=False) -> dict:
    """(v_hat - v)^2 of the frozen base transformer without a prompt, over the opaque and over the transparent latent
    cells of uint8 clips: the mean of the times 250, 500, 750. L_TABD is to pull them apart."""
    device, found = empty.device, {"opaque": [], "transparent": []}
    sigma = torch.tensor([0.25, 0.5, 0.75], device=device)
    for i, clip in enumerate(tqdm(clips, desc="cells")):
        rgb, alpha = (x.to(device) for x in to_video(*clip))
        z, mask = rgba.encode(rgb, alpha, None if naive else WHITE), tabd_mask(alpha)
        noise = torch.randn(3, *z.shape[1:], generator=step_generator(0, i)).to(device)
        z = z.expand_as(noise)
        v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, [empty] * 3)
        error = (v_hat - flow_target(z, noise)).square().mean((0, 1))
        for name, value in (("opaque", 1), ("transparent", -1)):
            found[name].append(error[mask[0, 0] == value])
    found = {name: torch.cat(errors) for name, errors in found.items()}
    return {name: float(errors.mean()) if len(errors) else None for name, errors in found.items()}


def mean_scores(rows: list[dict]) -> dict:
    return {name: {kind: float(np.nanmean([row[name][kind] for row in rows])) for kind in ("psnr", "ssim")}
            for name in rows[0]}


def print_scores(title: str, rows: list[dict]):
    print(f"\n{title}: {len(rows)} clips".ljust(27) + "PSNR, dB: mean  lowest   SSIM: mean  lowest")
    for name, mean in mean_scores(rows).items():
        low = {kind: np.nanmin([row[name][kind] for row in rows]) for kind in mean}
        print(f"  {name:<24}{mean['psnr']:13.2f}{low['psnr']:8.2f}{mean['ssim']:13.4f}{low['ssim']:8.4f}")


# ---- the command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("data", nargs="?", help="folder of captioned RGBA clips (python data.py makes one)")
    add("--stage", choices=("rgba", "base"), default="rgba",
        help="RGBA autoencoder on a frozen base, or a base VAE from scratch")
    add("--base", default=str(TINY), help="checkpoint folder with the frozen base (stage rgba, --eval)")
    add("--out", default="runs/vae", help="folder that the result and the run's records go to")
    add("--vae-adapter", help="RGBA adapter that --eval scores; default: Wan-Alpha-v2-VAE.safetensors in --base")
    add("--eval", action="store_true",
        help="score the clips of the folder, or without one unseen procedural clips, instead of training")
    add("--clips", type=positive, default=64, help="how many procedural clips --eval scores")
    add("--stills", help="folder of RGBA pictures that --eval scores as stills")
    add("--schedule", help="phases steps:frames:side:batch,... ; default: the paper's 75000:17:272:2 for rgba")
    add("--size", type=positive, help="pixels that a clip's shorter side is scaled to before it is cropped; default: a "
        "random one to two times the crop, as in the paper; for --eval 64")
    add("--rank", type=positive, default=128, help="rank of the decoders' LoRA")
    add("--perceptual", type=number(0), default=1.0, help="weight of the VGG term; 0 trains without it")
    add("--vgg", default="vgg16-397923af.pth", help="ImageNet weights of VGG-16 for the perceptual term")
    add("--tabd", type=number(0), default=0.1, help="weight of L_TABD; 0 trains without a transformer")
    add("--tabd-clamp", type=number(-1e6, 1e6), nargs=2, default=(-1.0, 1.0),
        help="-1 1 as in the paper, 0 1 as in the official code")
    add("--naive", action="store_true", help="without renders: raw colour and alpha in, raw colour and alpha compared")
    add("--dim", type=positive, default=16, help="stage base: channels at full resolution (Wan: 96)")
    add("--res-blocks", type=positive, default=1, help="stage base: residual blocks a level (Wan: 2)")
    add("--kl", type=number(0), default=3e-5, help="stage base: weight of the KL term")
    add_loop_flags(add)
    args = parser.parse_args(argv)
    check_run(args)
    args.schedule = args.schedule or {"rgba": "75000:17:272:2",
                                      "base": "3000:1:40:64,1600:5:40:16,500:17:64:6"}[args.stage]
    sides = [side for _, _, side, _ in parse_schedule(args.schedule)]
    step = 16 if args.stage == "rgba" and args.tabd else 8
    if args.size and args.size % 16:
        raise ValueError(f"--size {args.size} must be a multiple of 16")
    if not args.eval and any(side % step for side in sides):
        raise ValueError(f"--schedule {args.schedule}: the sides must be multiples of {step}")
    if args.size and not args.eval and max(sides) > args.size:
        raise ValueError(f"--size {args.size} must be no smaller than the schedule's largest side, {max(sides)}")
    if args.tabd_clamp[0] >= args.tabd_clamp[1]:
        raise ValueError("--tabd-clamp wants the lower bound first, such as -1 1")
    return args


def precision(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def stored(state: dict, half: bool) -> dict:
    return {k: v.detach().to(torch.float16 if half else torch.float32).contiguous() for k, v in state.items()}


def load_judge(args) -> dict:
    """The frozen base transformer and its context of the empty prompt, for L_TABD."""
    with torch.no_grad():
        dit = load_dit(args.base, dtype=torch.bfloat16 if args.bf16 else torch.float32, device=args.device)
        return dict(dit=dit.requires_grad_(False), empty=load_text_encoder(args.base)([""])[0].to(args.device))


def train_base(args, dataset, run: Path, draw) -> dict:
    vae = WanVAE(VAEConfig(args.dim, num_res_blocks=args.res_blocks, mean=(0.0,) * 16, std=(1.0,) * 16))
    vae.init_weights()
    vae.to(args.device)
    prepare_blocks(vae, ResidualBlock, args)

    def views(batch, generator):
        return rgb_views(batch["rgb"].to(args.device, memory_format=torch.channels_last_3d),
                         batch["alpha"].to(args.device), generator, batch["n"], batch["mine"])

    def loss(batch, generator):
        with precision(args):
            return base_step(vae, views(batch, generator), generator, args.kl, batch["n"], batch["mine"])

    @torch.no_grad()
    def sheet(path):
        rgb, alpha = (torch.cat(x).to(args.device) for x in zip(*(to_video(*dataset.clip(i)) for i in held)))
        video = rgb_views(rgb, alpha, step_generator(args.seed, -2), len(rgb))
        result = vae.decode(vae.encode(video, chunk=None), chunk=None)
        contact_sheet(path, [to_clip(x) for pair in zip(video, result) for x in pair])

    held, steps = held_out_clips(dataset, 4), sum(p[0] for p in parse_schedule(args.schedule))
    summary = fit(args, run, vae, make_optimizers(vae, args), steps, draw, loss, sheet, dataset.fingerprint)
    vae.requires_grad_(False)
    measure_statistics(vae, draw, range(max(0, steps - 32), steps))
    if ranks()[0] == 0:
        statistics = {name: json.dumps(getattr(vae.config, name)) for name in ("mean", "std")}
        save_tensors(Path(args.out) / "Wan2.1_VAE.safetensors", stored(vae.state_dict(), args.half), statistics)
    return summary


def train_rgba(args, dataset, run: Path, draw) -> dict:
    vgg = VGG(args.vgg).to(args.device) if args.perceptual else None
    vae = load_vae(find_vae(args.base))
    dim = vae.encoder.head[2].weight.shape[1]
    middle = FeatureMerge(2 * dim, vae.config.z_dim, dim)
    middle.start_as_rgb(vae)
    rgba = RGBAVAE(vae, middle).add_adapters(args.rank).to(args.device)
    options = dict(vgg=vgg, perceptual=args.perceptual, tabd=args.tabd, tabd_clamp=args.tabd_clamp, naive=args.naive)
    if args.tabd:
        options |= load_judge(args)
    prepare_blocks(rgba, ResidualBlock, args)

    def loss(batch, generator):
        rgb, alpha = (batch[name].to(args.device, memory_format=torch.channels_last_3d) for name in ("rgb", "alpha"))
        with precision(args):
            return rgba_step(rgba, rgb, alpha, generator, **options, n=batch["n"], mine=batch["mine"])

    held = [dataset.clip(i) for i in held_out_clips(dataset)]
    sheet = lambda path: contact_sheet(
        path, [row for clip in held[:4] for row in (clip, reconstruct(rgba, *clip, args.naive))])
    steps = sum(p[0] for p in parse_schedule(args.schedule))
    summary = fit(args, run, rgba, make_optimizers(rgba, args), steps, draw, loss, sheet, dataset.fingerprint)
    if ranks()[0] == 0:
        save_tensors(Path(args.out) / "Wan-Alpha-v2-VAE.safetensors", stored(rgba.adapter_state(), args.half))
        summary["held_out"] = mean_scores(evaluate(rgba, held, args.naive))
    return summary


def unseen_clip(i: int, size: int):
    clip = procedural_clip(10 ** 9 + i, size, 17, split="test")
    return clip.rgb, clip.alpha


def write_comparison(path: Path, target, result):
    """Target and result, colour and alpha: four clips that play anywhere."""
    for kind, (rgb, alpha) in (("target", target), ("result", result)):
        write_rgba(path.with_name(f"{path.name}-{kind}-colour.mp4"), rgb)
        write_rgba(path.with_name(f"{path.name}-{kind}-alpha.mp4"), np.repeat(alpha[..., None], 3, -1))


def run_eval(args):
    """Tables on stdout, OUT/eval.json, and the four clips of each of the first eight as OUT/eval/."""
    adapter, out = args.vae_adapter or Path(args.base) / "Wan-Alpha-v2-VAE.safetensors", Path(args.out)
    rgba, size, sets = load_rgba_vae(find_vae(args.base), adapter, device=args.device), args.size or 64, {}
    if args.data:
        dataset = RGBADataset(args.data, size)
        sets["clips"] = {dataset.name(i): partial(dataset.clip, i) for i in range(len(dataset))}
    else:
        sets["unseen clips"] = {f"{i:02d}": partial(unseen_clip, i, size) for i in range(args.clips)}
    if args.stills:
        stills = RGBADataset(args.stills, size, frames=1)
        sets["stills"] = {stills.name(i): partial(stills.clip, i) for i in range(len(stills))}
    record = dict(arguments=vars(args))
    for title, clips in sets.items():
        rows = evaluate(rgba, (read() for read in clips.values()), args.naive)
        print_scores(title, rows)
        record[title] = dict(mean=mean_scores(rows), clips=dict(zip(clips, rows)))
    first = next(iter(sets.values()))
    for name, read in list(first.items())[:8]:
        clip = read()
        write_comparison(out / "eval" / Path(name).with_suffix(""), clip, reconstruct(rgba, *clip, args.naive))
    try:
        judge = load_judge(args)
    except FileNotFoundError:
        print("\nno transformer in --base: its loss on opaque and transparent cells was not measured")
    else:
        record["cells"] = cell_losses(rgba, **judge, clips=(read() for read in first.values()), naive=args.naive)
        print("\nloss of the frozen transformer on {}: ".format(next(iter(sets))), ", ".join(
            f"{name} cells {value:.3f}" for name, value in record["cells"].items() if value is not None))
    save_text(out / "eval.json", json.dumps(record, indent=1) + "\n")
    print(f"written: {out}/eval.json, {out}/eval/")


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.eval:
        return run_eval(args)
    rank, world, device = start_process_group(args.device)
    args.device, phases = device or args.device, parse_schedule(args.schedule)
    for _, _, _, batch in phases:
        shares(batch, rank, world, args.accumulate)     # an error now, not after clips were read
    size, frames, room = args.size or max(p[2] for p in phases), max(p[1] for p in phases), 4 / world
    dataset = checked(RGBADataset(args.data, size, frames, cache_gb=room / max(1, args.workers)), args)
    run = Path(args.out) / f"vae-{args.stage}"
    draw = partial(draw_batch, dataset, phases, args.size, args.seed, args.accumulate, rank, world)
    summary = (train_base if args.stage == "base" else train_rgba)(args, dataset, run, draw)
    if rank == 0:
        finish(run, summary)
    end_process_group()


if __name__ == "__main__":
    sys.exit(one_sentence(main))
