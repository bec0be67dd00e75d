"""Train Wan-Alpha's RGBA autoencoder on a frozen base VAE: a merge block and two LoRA decoders (paper, section 3.2).

    python train_vae.py data/                                       # tiny/ as the base
    python train_vae.py data/ --base Wan2.1-T2V-1.3B --out runs/mine

    z = merge(features(hard render), features(alpha));  rgb, alpha = the two decoders of z        merge.RGBAVAE
    L_vae = L_alpha + L_soft + L_hard + 0.1 L_TABD                                               `rgba_step`

L_TABD asks the base's own diffusion transformer, frozen, with an empty prompt. What stands around the loop (workers,
exact resume, signals, processes) is kit/run.py, what a batch holds kit/batches.py; a base VAE from nothing is
kit/pretrain.py, scores are kit/evaluate.py.
dtype rule: parameters, losses and optimiser in float32; with --bf16 the autoencoder runs under autocast and the frozen
transformer is held in bfloat16 (times, norms and modulation in float32).
Differs from the official code: TABD's clamp (losses.py), a merge block that starts as the base's own head, warm-up and
clipping of the gradient; each flag's help names the official way.
"""
import sys
from functools import partial
from pathlib import Path

import torch

from kit.batches import batch_sizes, draw_clips, parse_schedule
from kit.command import Parser, end_process_group, number, positive, run_command
from kit.data import open_data
from kit.evaluate import evaluate_vae, load_judge, mean_scores, reconstruct
from kit.files import TINY, VAE_ADAPTER, find_start, find_vae, read_section, save_tensors, stored
from kit.media import contact_sheet
from kit.run import Run, add_run_flags, begin, finish, is_first, learning_rate
from kit.scale import prepare_blocks
from losses import VGG, random_colors, raw_loss, rgba_loss, tabd_loss, tabd_mask
from merge import FeatureMerge, RGBAVAE
from sampler import flow_target, interpolate, sample_noise, sample_sigma
from vae import ResidualBlock, load_vae

OFFICIAL = "75000:17:272:2"


def rgba_step(rgba: RGBAVAE, rgb, alpha, generators, vgg=None, perceptual=0.0, own_alpha=False, tabd=0.0,
              tabd_clamp=(-1, 1), tabd_strict=False, dit=None, empty=None, naive=False) -> dict:
    """L_alpha + L_soft + L_hard + tabd L_TABD, as "loss" and in parts, of rgb (b, 3, t, h, w) in [-1, 1] and alpha
    (b, 1, t, h, w) in [0, 1]. generators: one a sample, for its colours, time and noise.

    vgg, perceptual: the distance of the perceptual term and its weight. dit, empty: the frozen base transformer and its
    context of the empty prompt (l, d), for L_TABD. own_alpha, tabd_strict: see losses.py. naive: without any render,
    the paper's point of comparison."""
    color, _ = random_colors(generators)
    z = rgba.encode(rgb, alpha, None if naive else color, chunk=None)
    rgb_hat, alpha_hat = (x.float() for x in rgba.decode(z, chunk=None))
    with torch.autocast(z.device.type, enabled=False):
        compare = raw_loss if naive else partial(rgba_loss, colors=random_colors(generators), own_alpha=own_alpha)
        parts = compare(rgb_hat, alpha_hat, rgb, alpha, vgg=vgg, perceptual=perceptual)
        loss = sum(parts.values())
        if tabd:
            mask = tabd_mask(alpha, tabd_strict)
            parts["tabd"] = judge_latent(z.float(), mask, generators, dit, empty, tabd_clamp)
            loss = loss + tabd * parts["tabd"]
    return dict(loss=loss, **parts)


def judge_latent(z, mask, generators, dit, empty, clamp):
    """L_TABD of normalised latents z: noise each at one time, ask the frozen transformer, compare cell by cell."""
    sigma, weight = (x.to(z) for x in sample_sigma(generators))
    noise = sample_noise(z.shape[1:], generators).to(z)
    v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, [empty] * len(z))
    return tabd_loss(v_hat, flow_target(z, noise), mask, weight, clamp)


def make_model(args) -> RGBAVAE:
    """The frozen base, its merge block and two decoders with LoRA; what trains is in float32."""
    vae = load_vae(find_vae(args.base))
    dim = vae.encoder.head[2].weight.shape[1]
    middle = FeatureMerge(2 * dim, vae.config.z_dim, dim)
    middle.start_as_rgb(vae)
    rgba = RGBAVAE(vae, middle).add_adapters(args.rank).to(args.device)
    prepare_blocks(rgba, ResidualBlock, args)
    return rgba


def train(args, dataset, phases) -> None:
    """phases: (steps, frames, side, batch) each. Writes the adapter into --out, the run's records beside it."""
    rgba, sizes = make_model(args), batch_sizes(phases)
    names = "perceptual", "own_alpha", "tabd", "tabd_clamp", "tabd_strict", "naive"
    options = {name: getattr(args, name) for name in names}
    if args.perceptual:
        options |= dict(vgg=VGG(args.vgg).to(args.device))
    if args.tabd:
        options |= load_judge(args.judge or args.base, torch.bfloat16 if args.bf16 else torch.float32, args.device)
    held_out = [dataset.clip(i) for i in dataset.held_out()]
    draw = partial(draw_clips, dataset, phases, args.size)
    folder = Path(args.out) / "vae-rgba"

    with Run(args, folder, rgba, draw, sizes, dataset.fingerprint, rgba.load_adapter) as run:
        for step, passes in run.steps():
            for batch in passes:
                rgb, alpha = (batch[name].to(args.device, memory_format=torch.channels_last_3d)
                              for name in ("rgb", "alpha"))
                with torch.autocast(rgb.device.type, torch.bfloat16, enabled=args.bf16):
                    losses = rgba_step(rgba, rgb, alpha, batch["generators"], **options)
                run.backward(losses)
            if run.update(learning_rate(step, len(sizes), args.lr, args.warmup)):
                results = [reconstruct(rgba, *clip, args.naive) for clip in held_out[:4]]
                contact_sheet(run.sheet, [clip for pair in zip(held_out, results) for clip in pair])

    summary = run.summary()
    if is_first():
        save_tensors(Path(args.out) / VAE_ADAPTER, stored(rgba.adapter_state(), args.half))
        summary["held_out"] = mean_scores(evaluate_vae(rgba, held_out, args.naive))
    finish(folder, summary, "python", "train_dit.py", args.data, "--base", args.base, "--vae-adapter",
           Path(args.out) / VAE_ADAPTER, "--out", args.out)


def make_parser() -> Parser:
    parser = Parser(prog="train_vae.py", usage="train_vae.py data/ [flags]", epilog="""
        Train the RGBA autoencoder on a frozen base VAE.
        Defaults in [brackets] are the official ones but where "(ours)" says otherwise.""")
    add = parser.add_argument_group("the method").add_argument
    add("data", help="folder of RGBA clips (python -m kit.data FOLDER says what is in it)")
    add("--base", default=str(TINY), metavar="DIR", help="checkpoint folder with the frozen base [tiny/]")
    add("--out", default="runs/vae", metavar="DIR", help="where the adapter and the run's records go [runs/vae]")
    add("--schedule", metavar="S:F:P:B,...", help="phases of S steps, F frames, crops of P pixels, B clips a step over "
        f"all GPUs [{OFFICIAL}; officially 2 a GPU; for a base of smaller clips 300 steps of these (ours)]")
    add("--size", type=positive, metavar="N", help="pixels that a clip's shorter side is scaled to before it is "
        "cropped [a random one to two times the crop]")
    add("--rank", type=positive, metavar="R", help="of the decoders' LoRA [that of --start, or else 128]")
    add("--perceptual", type=number(0), default=1.0, metavar="W", help="weight of the VGG term; 0 trains without [1]")
    add("--vgg", default="vgg16-397923af.pth", metavar="FILE", help="ImageNet weights of VGG-16 for it")
    add("--tabd", type=number(0), default=0.1, metavar="W", help="weight of L_TABD; 0 trains without [0.1]")
    add("--tabd-clamp", type=number(-1e6, 1e6), nargs=2, default=(-1.0, 1.0), metavar="X",
        help="its bounds [-1 1, the paper's formula; officially 0 1]")
    add("--unbled", action="store_true", help="leave the colour under alpha 0 as it is stored, else that around is "
        "spread")
    add("--judge", metavar="DIR", help="folder of the frozen transformer that L_TABD asks [--base; officially the 1.3B "
        "model's]")
    add("--tabd-strict", action="store_true", help="its mask has two values (the paper), not three")
    add("--own-alpha", action="store_true", help="the hard render of an output is cut by its own alpha, as officially, "
        "not by the target's")
    add("--naive", action="store_true", help="without renders: the paper's point of comparison")
    add_run_flags(parser)
    return parser


def settle(args) -> None:
    """What the command line left open."""
    args.start, rank = find_start(args.start, VAE_ADAPTER)
    args.rank = args.rank or rank or 128
    said = read_section(args.base)
    side = min(said.get("size", [272]))
    args.schedule = args.schedule or (OFFICIAL if side >= 272 else f"300:{said.get('frames', 17)}:{side}:2")


def check(args) -> list[tuple[int, int, int, int]]:
    """The phases of --schedule. ValueError for sizes that do not go together."""
    phases = parse_schedule(args.schedule)
    sides, multiple = [side for _, _, side, _ in phases], 16 if args.tabd else 8
    if any(side % multiple for side in sides):
        raise ValueError(f"--schedule {args.schedule}: the sides must be multiples of {multiple}")
    if args.size and (args.size % 16 or args.size < max(sides)):
        raise ValueError(f"--size {args.size} must be a multiple of 16 and no smaller than the schedule's largest "
                         f"side, {max(sides)}")
    if args.tabd_clamp[0] >= args.tabd_clamp[1]:
        raise ValueError("--tabd-clamp wants the lower bound first, such as -1 1")
    return phases


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    settle(args)
    phases = check(args)
    begin(args, batch_sizes(phases))
    size, frames = args.size or max(side for _, _, side, _ in phases), max(frames for _, frames, _, _ in phases)
    train(args, open_data(args.data, size, frames, args.workers, bled=not args.unbled), phases)
    end_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main, "train_vae.py"))
