"""Train the VAE: a base VAE on RGB from scratch (--stage base), or the RGBA autoencoder of Wan-Alpha on a frozen base.

    python data.py data/ --clips 2000
    python train_vae.py data/ --stage base --out base       # what Wan2.1's VAE is to Wan-Alpha
    python train_dit.py data/ --stage base --base base --out base       # L_TABD needs its transformer
    python train_vae.py data/ --base base --out base --schedule 1000:17:64:4 --perceptual 0
                                                            # merge block and two LoRA decoders (paper, section 3.2)
    python train_vae.py --eval --base base                  # scores on unseen clips

RGBA stage:  z = merge(features(hard render), features(alpha));  rgb, alpha = the two decoders of z;
             L_vae = L_alpha + L_soft + L_hard + 0.1 L_TABD.
The loop at the top (`fit`) serves train_dit.py too. Step k draws all its random numbers from one generator seeded with
(seed, k), so a run that was stopped and resumed makes the same steps: test_all_four_trainings_resume_bit_for_bit.
dtype rule: parameters, losses and optimiser in float32; with --bf16 the forward passes run under autocast.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data import RGBADataset, contact_sheet, over, procedural_clip, replacing, save_tensors, save_text
from dit import load_dit
from losses import PALETTE, VGG, hard_render, random_colors, rgba_loss, soft_render, tabd_loss, tabd_mask
from merge import FeatureMerge, RGBAVAE, load_rgba_vae
from sampler import flow_target, interpolate, sample_sigma
from text import load_text_encoder
from vae import ResidualBlock, VAEConfig, WanVAE, load_vae

TINY = Path(__file__).parent / "tiny"


# ---- the loop and the records of all four trainings


def one_sentence(main) -> int:
    """Run main; a ValueError or OSError (wrong input from outside) becomes one sentence on stderr and exit code 2."""
    try:
        main()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def record_run(run: Path, args):
    """run/run.json: the arguments, seed and versions of a run."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads())
    save_text(run / "run.json", json.dumps(dict(arguments=vars(args), versions=versions), indent=1) + "\n")


def add_loop_flags(add):
    """The flags that `fit` and `make_optimizers` read, for both training commands; defaults are the paper's."""
    add("--lr", type=float, default=1e-4,
        help="learning rate, after a warm-up of 100 steps falling to zero at the last")
    add("--muon", action="store_true", help="Muon for matrices and kernels, AdamW for the rest; without: AdamW for all")
    add("--lora-plus", type=float, default=1.0, help="how many times larger the steps of LoRA's B are")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ...")
    add("--bf16", action="store_true", help="forward passes in bfloat16: faster where the processor has it")
    add("--compile", action="store_true",
        help="torch.compile the blocks: faster after a minute or so, needs a C++ compiler")
    add("--half", action="store_true", help="store the result in float16")
    add("--seed", type=int, default=0, help="of weights, batches and noise")
    add("--start", help="checkpoint.pt of another run whose weights this run starts from")
    add("--resume", action="store_true", help="go on from the last checkpoint of the same run")
    add("--log-every", type=positive, default=50, help="steps between lines of log.jsonl")
    add("--save-every", type=positive, default=500, help="steps between checkpoints and contact sheets")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def check_run(args):
    """What both trainings can tell from their arguments alone."""
    if not args.eval and not args.data:
        raise ValueError("give a folder of clips to train on, or --eval")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device} is not to be had here; try cpu") from None


def find_vae(base) -> Path:
    """The VAE of a checkpoint folder, .safetensors or Wan's .pth."""
    file = Path(base) / "Wan2.1_VAE.safetensors"
    return file if file.exists() else file.with_suffix(".pth")


def step_generator(seed: int, step: int) -> torch.Generator:
    """All the randomness of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def make_optimizers(module: nn.Module, args) -> list:
    """AdamW for what trains in `module`; with --muon, matrices and kernels (seen as c_out x rest) get
    Muon, whose step has AdamW's size. LoRA's B, which starts at zero behind a scale of 1/rank, takes
    steps --lora-plus times as large (arXiv 2402.12354)."""
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    matrices = [k for k, p in trained.items() if args.muon and p.dim() >= 2 and min(p.shape[0], p[0].numel()) >= 8
                and "token_embedding" not in k]
    views = {k: nn.Parameter(trained[k].detach().flatten(1)) for k in matrices}       # the same memory, two axes

    def groups(parameters):
        by_scale = {}
        for name, p in parameters.items():
            by_scale.setdefault(args.lora_plus if name.endswith("lora_B") else 1, []).append(p)
        return [dict(params=params, scale=scale) for scale, params in by_scale.items()]

    def hand_over_gradients(*_):
        for name, view in views.items():
            grad = trained[name].grad
            view.grad = None if grad is None else grad.flatten(1)
    optimizers = [torch.optim.AdamW(groups({k: p for k, p in trained.items() if k not in views}), args.lr)]
    if views:
        optimizers.append(torch.optim.Muon(groups(views), args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        optimizers[-1].register_step_pre_hook(hand_over_gradients)
    return optimizers


def learning_rate(step: int, steps: int, lr: float, warmup: int = 100) -> float:
    """Linear warm-up, then linear towards zero."""
    return lr * min((step + 1) / warmup, (steps - step) / steps)


def read_run(file, trained: dict) -> dict:
    """A checkpoint.pt that `fit` wrote for a model with the same trained tensors."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        fits = {k: v.shape for k, v in saved["model"].items()} == {k: p.shape for k, p in trained.items()}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is not a checkpoint of a training here ({type(error).__name__})") from None
    if not fits:
        raise ValueError(f"{file} is of a model with other sizes or of another stage; give the flags it was made with")
    return saved


def ranks() -> tuple[int, int]:
    """This process's number and how many torchrun started; (0, 1) without it."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def share(n: int) -> slice:
    """This process's part of a batch of n. All processes draw the random numbers of the whole batch, so that several
    make the same steps as one."""
    rank, world = ranks()
    if n % world:
        raise ValueError(f"a batch of {n} cannot be shared by {world} processes: give --batch a multiple of {world}")
    return slice(rank * n // world, (rank + 1) * n // world)


def average(tensors: list[Tensor]) -> None:
    """Each tensor becomes its mean over all processes, in place: one message for all."""
    if ranks()[1] > 1:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, mean in zip(tensors, (together / ranks()[1]).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def fit(args, run: Path, model: nn.Module, optimizers, steps: int, loss_fn, sheet_fn):
    """Train `model` for `steps` steps.

    loss_fn(step, generator) -> dict of scalars with "loss"; sheet_fn(path) draws what is learnt. Writes run/log.jsonl,
    run/sheet-STEP.png, run/checkpoint.pt (trained tensors, optimisers, step). --resume goes on from there; --start
    takes another run's weights only. Of several processes, each brings its share's loss; the first one writes."""
    run.mkdir(parents=True, exist_ok=True)
    first = ranks()[0] == 0
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    checkpoint, start, rows = run / "checkpoint.pt", 0, []
    if args.resume or args.start:
        saved = read_run(checkpoint if args.resume else args.start, trained)
        with torch.no_grad():
            for name, value in saved["model"].items():
                trained[name].copy_(value)
    if args.resume:
        start = saved["step"]
        rows = [row for row in (run / "log.jsonl").read_text().splitlines() if json.loads(row)["step"] <= start]
        for optimizer, value in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(value)
    if first:
        save_text(run / "log.jsonl", "".join(row + "\n" for row in rows))

    def save(step):
        state = dict(step=step, model=trained, optimizers=[o.state_dict() for o in optimizers])
        with replacing(checkpoint) as temporary:
            torch.save(state, temporary)

    with open(run / "log.jsonl" if first else os.devnull, "a") as log:
        began, sums, count = time.time(), {}, 0
        bar = tqdm(range(start, steps), initial=start, total=steps, mininterval=5, disable=not first)
        for step in bar:
            parts = loss_fn(step, step_generator(args.seed, step))
            model.zero_grad()           # not the optimisers': Muon's hold views of the parameters
            parts["loss"].backward()
            parts = {name: value.detach() for name, value in parts.items()}
            average([p.grad for p in trained.values() if p.grad is not None] + list(parts.values()))
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
            if not math.isfinite(parts["loss"].item() + norm.item()):
                good = checkpoint if checkpoint.exists() else "the start"
                raise ValueError(f"loss or gradient is not finite at step {step}: try a smaller --lr; good is {good}")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * learning_rate(step, steps, args.lr)
                optimizer.step()
            sums = {k: sums.get(k, 0) + v.item() for k, v in parts.items()}
            count += 1
            if (step + 1) % args.log_every == 0 or step + 1 == steps:
                row = dict(step=step + 1, seconds=round(time.time() - began, 1),
                           **{k: round(v / count, 5) for k, v in sums.items()})
                print(json.dumps(row), file=log, flush=True)
                bar.set_postfix({k: v for k, v in row.items() if k not in ("step", "seconds")})
                sums, count = {}, 0
            if first and ((step + 1) % args.save_every == 0 or step + 1 == steps):
                save(step + 1)
                sheet_fn(run / f"sheet-{step + 1:06d}.png")


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
        assert all(len(p) == 4 and min(p) > 0 and p[1] % 4 == 1 and p[2] % 8 == 0 for p in phases)
    except (ValueError, AssertionError):
        raise ValueError(f"--schedule {text!r} is not steps:frames:side:batch,... with 4k+1 frames and sides in "
                         "multiples of 8") from None
    return phases


def phase_at(phases, step: int) -> tuple[int, int, int]:
    """Frames, side and batch of a step."""
    for steps, *phase in phases:
        if step < steps:
            return phase
        step -= steps


def draw_clips(dataset, n: int, frames: int, side: int, generator):
    """n random clips -> rgb (n, 3, frames, side, side) in [-1, 1], alpha (n, 1, ...) in [0, 1].
    Crops hold a part of the object."""
    pick = lambda high: int(torch.randint(high, (), generator=generator))
    clips = []
    for _ in range(n):
        rgb, alpha = map(torch.as_tensor, dataset.clip(pick(len(dataset))))
        t, h, w = alpha.shape
        if t < frames or h < side or w < side:
            raise ValueError(f"the clips are {t} frames of {w}x{h}; "
                             f"the schedule asks for {frames} frames of {side}x{side}")
        start = pick(t - frames + 1)
        rgb, alpha = rgb[start:start + frames], alpha[start:start + frames]
        inside = alpha[frames // 2].nonzero()
        y, x = inside[pick(len(inside))].tolist() if len(inside) else (pick(h), pick(w))
        y, x = (min(max(at - side // 2, 0), full - side) for at, full in ((y, h), (x, w)))
        clips.append((rgb[:, y:y + side, x:x + side], alpha[:, y:y + side, x:x + side]))
    rgb, alpha = (torch.stack(part) for part in zip(*clips))
    return rearrange(rgb, "b t h w c -> b c t h w").float() / 127.5 - 1, alpha.unsqueeze(1).float() / 255


def rgb_views(rgb, alpha, generator):
    """What a base VAE learns from: each clip rendered softly (40 %) or hard (35 %) on a colour, or its alpha as grey
    (25 %). Half of the colours are corners of the RGB cube, half are any."""
    n = len(rgb)
    corner, any_color = random_colors(n, generator)[0], torch.rand(n, 3, generator=generator) * 2 - 1
    color = torch.where(torch.rand(n, 1, generator=generator) < 0.5, corner, any_color)
    view = torch.rand(n, 1, 1, 1, 1, generator=generator)
    grey = (2 * alpha - 1).expand_as(rgb)
    return torch.where(view < 0.4, soft_render(rgb, alpha, color),
                       torch.where(view < 0.75, hard_render(rgb, alpha, color), grey))


# ---- stage base: an RGB VAE from scratch


def base_step(vae: WanVAE, video, generator, kl_weight: float) -> dict:
    """Autoencode (b, 3, t, h, w) with the latent sampled: L1 + 0.5 MSE + kl_weight * KL(latent || N(0, 1))."""
    mean, logvar = vae.moments(vae.features(video))
    mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
    z = mean + torch.randn(mean.shape, generator=generator).to(mean) * (0.5 * logvar).exp()
    error = vae.decode(vae.normalize(z), chunk=None).float() - video
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
    l1, mse = error.abs().mean(), error.square().mean()
    return dict(loss=l1 + 0.5 * mse + kl_weight * kl, l1=l1, mse=mse, kl=kl)


@torch.no_grad()
def measure_statistics(vae: WanVAE, dataset, frames: int, side: int, seed: int) -> WanVAE:
    """Mean and deviation of the raw latent over the data, per channel: MEAN and STD of a VAE trained here."""
    generator, total, square, count = step_generator(seed, -1), 0, 0, 0
    for _ in tqdm(range(min(32, 1 + len(dataset) // 8)), desc="latent statistics"):
        video = rgb_views(*draw_clips(dataset, 8, frames, side, generator), generator)
        raw = vae.moments(vae.features(video.to(vae.conv1.weight.device)))[0].double()
        total, square = total + raw.sum((0, 2, 3, 4)), square + raw.square().sum((0, 2, 3, 4))
        count += raw[:, 0].numel()
    mean, std = total / count, (square / count - (total / count) ** 2).clamp(min=1e-8).sqrt()
    vae.config = replace(vae.config, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    return vae


# ---- stage rgba: merge block and two LoRA decoders on the frozen base


def rgba_step(rgba: RGBAVAE, rgb, alpha, generator, vgg=None, perceptual=0.0,
              tabd=0.0, tabd_clamp=(-1, 1), dit=None, empty=None) -> dict:
    """L_alpha + L_soft + L_hard + tabd * L_TABD of rgb (b, 3, t, h, w) in [-1, 1], alpha (b, 1, t, h, w) in [0, 1].
    dit: the frozen base transformer, empty: its context of the empty prompt (l, d); needed when tabd is not 0."""
    color, _ = random_colors(len(rgb), generator)
    z = rgba.encode(rgb, alpha, color, chunk=None)
    rgb_hat, alpha_hat = (x.float() for x in rgba.decode(z, chunk=None))
    with torch.autocast(z.device.type, enabled=False):
        parts = rgba_loss(rgb_hat, alpha_hat, rgb, alpha, generator, vgg=vgg, perceptual=perceptual)
    loss = sum(parts.values())
    if tabd:
        sigma, weight = (x.to(z.device) for x in sample_sigma(len(z), generator))
        noise = torch.randn(z.shape, generator=generator).to(z)
        v_hat = dit(interpolate(z.float(), noise, sigma), 1000 * sigma, [empty] * len(z))
        parts["tabd"] = tabd_loss(v_hat, flow_target(z.float(), noise), tabd_mask(alpha), weight, tabd_clamp)
        loss = loss + tabd * parts["tabd"]
    return dict(loss=loss, **parts)


# ---- scores


def psnr(x, y, mask=None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays (peak 255), where mask is true: (t, h, w) for all channels."""
    square = (x.astype(np.float32) - y.astype(np.float32)) ** 2
    square = square if mask is None else square[mask]
    return float(10 * np.log10(255 ** 2 / max(square.mean(), 1e-3))) if square.size else float("nan")


def object_region(alpha):
    """The pixels with alpha > 0 and those up to two pixels from one, (t, h, w)."""
    seen = torch.as_tensor(alpha > 0).float().unsqueeze(1)
    return F.max_pool2d(seen, 5, stride=1, padding=2)[:, 0].bool().numpy()

@torch.no_grad()
def reconstruct(rgba: RGBAVAE, rgb, alpha):
    """uint8 clip (t, h, w, 3), (t, h, w) -> the same through the autoencoder."""
    device = rgba.vae.conv2.weight.device
    z = rgba.encode(*(x.to(device) for x in to_video(rgb, alpha)))
    return to_clip(*(x[0] for x in rgba.decode(z)))


def evaluate(rgba: RGBAVAE, clips) -> list[dict]:
    """PSNR in dB of each (rgb, alpha) uint8 clip through the autoencoder: soft renders over the 8 palette colours and
    alpha, over the whole frame and in the object's region (alpha > 0, two pixels wider), and colour where alpha > 0."""
    rows = []
    for rgb, alpha in tqdm(clips, desc="autoencode"):
        rgb_hat, alpha_hat = reconstruct(rgba, rgb, alpha)
        region = object_region(alpha)
        renders = [[over(x, a, (c + 1) / 2 * 255) for c in PALETTE.numpy()]
                   for x, a in ((rgb, alpha), (rgb_hat, alpha_hat))]
        rows.append({
            "soft render": np.mean([psnr(x, y) for x, y in zip(*renders)]), "alpha": psnr(alpha, alpha_hat),
            "soft render, region": np.mean([psnr(x, y, region) for x, y in zip(*renders)]),
            "alpha, region": psnr(alpha, alpha_hat, region), "colour, alpha > 0": psnr(rgb, rgb_hat, alpha > 0)})
    return rows


def print_scores(title: str, rows: list[dict]):
    print(f"\n{title}: PSNR in dB, {len(rows)} clips" + " " * 4 + "mean  lowest")
    for name in rows[0]:
        values = [float(row[name]) for row in rows]
        print(f"  {name:<24}{np.nanmean(values):8.2f}{np.nanmin(values):8.2f}")


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
        help="score 64 unseen procedural clips, and the pictures of --stills, instead of training")
    add("--stills", help="folder of RGBA pictures that --eval scores as stills")
    add("--schedule", help="phases steps:frames:side:batch,... ; default: the paper's 75000:17:272:2 for rgba")
    add("--rank", type=positive, default=128, help="rank of the decoders' LoRA")
    add("--perceptual", type=float, default=1.0, help="weight of the VGG term; 0 trains without it")
    add("--vgg", default="vgg16-397923af.pth", help="ImageNet weights of VGG-16 for the perceptual term")
    add("--tabd", type=float, default=0.1, help="weight of L_TABD; 0 trains without a transformer")
    add("--tabd-clamp", type=float, nargs=2, default=(-1.0, 1.0),
        help="-1 1 as in the paper, 0 1 as in the official code")
    add("--dim", type=positive, default=16, help="stage base: channels at full resolution (Wan: 96)")
    add("--res-blocks", type=positive, default=1, help="stage base: residual blocks a level (Wan: 2)")
    add("--kl", type=float, default=3e-5, help="stage base: weight of the KL term")
    add("--size", type=positive, help="side that clips are scaled to, pixels; default: the largest of --schedule; 64")
    add_loop_flags(add)
    args = parser.parse_args(argv)
    check_run(args)
    args.schedule = args.schedule or {"rgba": "75000:17:272:2",
                                      "base": "3000:1:40:64,1600:5:40:16,500:17:64:6"}[args.stage]
    sides = [side for _, _, side, _ in parse_schedule(args.schedule)]
    args.size = args.size or (64 if args.eval else max(sides))
    step = 16 if args.stage == "rgba" and args.tabd else 8
    if args.size % 8 or not args.eval and (max(sides) > args.size or any(side % step for side in sides)):
        raise ValueError(f"--size {args.size} must be a multiple of 8, the schedule's sides of {step} and no larger")
    return args


def precision(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def stored(state: dict, half: bool) -> dict:
    return {k: v.detach().to(torch.float16 if half else torch.float32).contiguous() for k, v in state.items()}


def compile_blocks(module: nn.Module, kind: type):
    """Fuses what lies between the products in all blocks of a kind; every shape and width is compiled anew."""
    torch._dynamo.config.recompile_limit = 256
    for block in module.modules():
        if isinstance(block, kind):
            block.compile(dynamic=False)


def train_base(args, dataset, run: Path):
    vae = WanVAE(VAEConfig(args.dim, num_res_blocks=args.res_blocks, mean=(0.0,) * 16, std=(1.0,) * 16))
    vae.init_weights()
    vae.to(args.device)
    if args.compile:
        compile_blocks(vae, ResidualBlock)
    phases = parse_schedule(args.schedule)

    def loss(step, generator):
        frames, side, batch = phase_at(phases, step)
        video = rgb_views(*draw_clips(dataset, batch, frames, side, generator), generator)
        with precision(args):
            return base_step(vae, video.to(args.device, memory_format=torch.channels_last_3d), generator, args.kl)

    @torch.no_grad()
    def sheet(path):
        generator = step_generator(args.seed, -2)
        video = rgb_views(*draw_clips(dataset, 4, phases[-1][1], args.size, generator), generator).to(args.device)
        result = vae.decode(vae.encode(video, chunk=None), chunk=None)
        contact_sheet(path, [to_clip(x) for pair in zip(video, result) for x in pair])

    fit(args, run, vae, make_optimizers(vae, args), sum(p[0] for p in phases), loss, sheet)
    vae.requires_grad_(False)
    measure_statistics(vae, dataset, phases[-1][1], args.size, args.seed)
    statistics = {name: json.dumps(getattr(vae.config, name)) for name in ("mean", "std")}
    save_tensors(Path(args.out) / "Wan2.1_VAE.safetensors", stored(vae.state_dict(), args.half), statistics)


def train_rgba(args, dataset, run: Path):
    vgg = VGG(args.vgg).to(args.device) if args.perceptual else None
    vae = load_vae(find_vae(args.base))
    dim = vae.encoder.head[2].weight.shape[1]
    middle = FeatureMerge(2 * dim, vae.config.z_dim, dim)
    middle.start_as_rgb(vae)
    rgba = RGBAVAE(vae, middle).add_adapters(args.rank).to(args.device)
    options = dict(vgg=vgg, perceptual=args.perceptual, tabd=args.tabd, tabd_clamp=args.tabd_clamp)
    if args.tabd:
        with torch.no_grad():
            options |= dict(dit=load_dit(args.base, device=args.device).requires_grad_(False),
                            empty=load_text_encoder(args.base)([""])[0].to(args.device))
    if args.compile:
        compile_blocks(rgba, ResidualBlock)
    phases = parse_schedule(args.schedule)

    def loss(step, generator):
        frames, side, batch = phase_at(phases, step)
        clips = draw_clips(dataset, batch, frames, side, generator)
        rgb, alpha = (x.to(args.device, memory_format=torch.channels_last_3d) for x in clips)
        with precision(args):
            return rgba_step(rgba, rgb, alpha, generator, **options)

    def sheet(path):
        clips = [dataset.clip(i) for i in range(min(4, len(dataset)))]
        contact_sheet(path, [row for clip in clips for row in (clip, reconstruct(rgba, *clip))])

    fit(args, run, rgba, make_optimizers(rgba, args), sum(p[0] for p in phases), loss, sheet)
    save_tensors(Path(args.out) / "Wan-Alpha-v2-VAE.safetensors", stored(rgba.adapter_state(), args.half))


def run_eval(args):
    adapter = args.vae_adapter or Path(args.base) / "Wan-Alpha-v2-VAE.safetensors"
    rgba = load_rgba_vae(find_vae(args.base), adapter, device=args.device)
    clips = [procedural_clip(10 ** 9 + i, args.size, 17, split="test") for i in range(64)]
    scores = {"unseen clips": evaluate(rgba, [(clip.rgb, clip.alpha) for clip in clips])}
    if args.stills:
        stills = RGBADataset(args.stills, args.size, frames=1)
        scores["stills"] = evaluate(rgba, [stills.clip(i) for i in range(len(stills))])
    for title, rows in scores.items():
        print_scores(title, rows)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.eval:
        return run_eval(args)
    dataset = RGBADataset(args.data, args.size, max(p[1] for p in parse_schedule(args.schedule)))
    run = Path(args.out) / f"vae-{args.stage}"
    record_run(run, args)
    (train_base if args.stage == "base" else train_rgba)(args, dataset, run)


if __name__ == "__main__":
    sys.exit(one_sentence(main))
