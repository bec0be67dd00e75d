"""What a trained model scores.

    python -m kit.evaluate vae                  # PSNR and SSIM of unseen procedural clips through the autoencoder
    python -m kit.evaluate vae data/            # of a folder of clips of your own, or with --frames 1 of pictures
    python -m kit.evaluate dit                  # does the transformer show what 200 unseen prompts name?

Tables on stdout; in --out eval.json (and of vae eval.jsonl, a clip a line as it comes) and eval.png: the first eight
clips, each under its target (they are also in eval/), or the clips of the first ten prompts. All in float32. Noise
depends on --seed and a clip's number alone.
"""
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit import load_dit
from kit.clips import COMBINATIONS, UNSEEN_SENTENCES, caption_of, draw_wording, held_out, procedural_clip
from kit.command import Parser, check_device, choose_threads, clip_frames, number, pixels, positive, run_command, whole
from kit.data import open_data
from kit.files import (TINY, find_adapter, find_dit, find_vae, read_checkpoint, read_section, read_trained,
                       save_json)
from kit.lpips import LPIPS
from kit.media import bleed, checkerboard, contact_sheet, over, tile, to_clip, to_video, write_rgba
from kit.score import (chance_of, compare_clips, mean_scores, measure_clip, print_scores, score_by, score_clip,
                       score_table, shares_of)
from losses import PALETTE, as_grey, soft_render, tabd_mask
from merge import WHITE, load_rgba_vae
from sampler import ellipse_mask, euler, flow_target, interpolate, sample_noise, shift_noise, shifted_sigmas
from text import load_text_encoder

BATCH = 20              # prompts at a time
USUAL = dict(vae=dict(size=[64, 64], frames=17), dit=dict(size=[640, 624], frames=81, mean=0.05, shift=5.0))


def eval_generator(seed: int, i: int) -> torch.Generator:
    """All the noise of sample i; the published scores were made with these seeds."""
    return torch.Generator().manual_seed(2 * (seed * 1_000_003 + i))


@torch.no_grad()
def reconstruct(rgba, rgb, alpha, naive=False) -> tuple:
    """uint8 clip (t, h, w, 3), (t, h, w) -> the same through the autoencoder. naive: hidden colour is not rendered."""
    device = rgba.vae_fgr.conv2.weight.device
    rgb, alpha = (x.to(device) for x in to_video(rgb, alpha))
    rgb, alpha = rgba.decode(rgba.encode(rgb, alpha, None if naive else WHITE), clamp=True)
    return to_clip(rgb[0], alpha[0])


def evaluate_vae(rgba, clips, naive=False, lpips=None, note=lambda row: None) -> list[dict]:
    """`compare_clips` of each (rgb, alpha) uint8 clip and what the autoencoder makes of it; lpips: asked, too; note:
    gets each row as it comes."""
    rows = []
    for clip in tqdm(clips, desc="autoencode"):
        result = reconstruct(rgba, *clip, naive)
        rows.append(compare_clips(*clip, *result))
        if lpips:
            rows[-1]["LPIPS"] = perceptual_distances(lpips, clip, result)
        note(rows[-1])
    return rows


@torch.no_grad()
def perceptual_distances(lpips, clip, result) -> dict:
    """LPIPS of soft renders, the mean over the palette, and of alpha as grey, frame by frame."""
    (rgb, alpha), (rgb_hat, alpha_hat) = to_video(*clip), to_video(*result)
    pairs = {"soft render": [(soft_render(rgb, alpha, c), soft_render(rgb_hat, alpha_hat, c)) for c in PALETTE],
             "alpha": [(as_grey(alpha), as_grey(alpha_hat))]}
    return {name: float(np.mean([lpips(x[0].movedim(1, 0), y[0].movedim(1, 0)).mean() for x, y in videos]))
            for name, videos in pairs.items()}


@torch.no_grad()
def load_judge(base, dtype=torch.float32, device="cpu") -> dict:
    """For L_TABD: the frozen base transformer, and its context of the empty prompt (l, d)."""
    dit = load_dit(base, dtype=dtype, device=device).requires_grad_(False)
    return dict(dit=dit, empty=load_text_encoder(base)([""])[0].to(device))


@torch.no_grad()
def judge_cells(rgba, clip, i, dit, empty, naive=False) -> tuple:
    """(v_hat - v)^2 of the frozen base transformer without a prompt, (t', h', w') for the latent cells of uint8 clip i,
    the mean of the times 250, 500, 750; and L_TABD's mask of them."""
    sigma = torch.tensor([0.25, 0.5, 0.75], device=empty.device)
    rgb, alpha = (x.to(empty.device) for x in to_video(*clip))
    z = rgba.encode(rgb, alpha, None if naive else WHITE)
    noise = torch.randn(3, *z.shape[1:], generator=eval_generator(0, i)).to(empty.device)
    z = z.expand_as(noise)
    v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, [empty] * 3)
    return (v_hat - flow_target(z, noise)).square().mean((0, 1)), tabd_mask(alpha)[0, 0]


def cell_losses(rgba, dit, empty, clips, naive=False) -> dict:
    """The mean of `judge_cells` over the opaque and over the transparent cells. L_TABD is to pull them apart."""
    pairs = [judge_cells(rgba, clip, i, dit, empty, naive) for i, clip in enumerate(tqdm(clips, desc="cells"))]
    errors, masks = (torch.cat([x.flatten() for x in column]) for column in zip(*pairs))
    found = dict(opaque=errors[masks == 1], transparent=errors[masks == -1])
    return {name: float(error.mean()) if len(error) else None for name, error in found.items()}


def unseen_prompts(n=200, seed=0) -> list[tuple[str, dict]]:
    """(prompt, attributes) of n different held-out combinations: shuffled, then always one whose values came least.
    Wan-Alpha's template and the short wording take turns. ValueError for more than there are."""
    pool = [attributes for attributes in COMBINATIONS if held_out(**attributes)]
    if n > len(pool):
        raise ValueError(f"{n} prompts were asked for, but only {len(pool)} combinations are held out; ask for fewer")
    pool = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))]
    count, prompts = Counter(), []
    for i in range(n):
        rarest = min(pool, key=lambda attributes: sum(count[value] for value in attributes.values()))
        pool.remove(rarest)
        count.update(rarest.values())
        prompts.append((caption_of(rarest, dict(frame=1 - i % 2)), rarest))
    return prompts


def unseen_wordings(prompts: list) -> list[tuple[str, dict]]:
    """The same combinations in sentences that no training clip has."""
    rng = np.random.default_rng(0)
    return [(caption_of(attributes, draw_wording(rng) | dict(sentence=i % 3), sentences=UNSEEN_SENTENCES), attributes)
            for i, (_, attributes) in enumerate(prompts)]


@torch.no_grad()
def sample(dit, rgba, contexts, masks, mean=0.05, shift=5.0, steps=4, seed=0, device="cpu") -> list:
    """Clips (rgb, alpha), uint8, one a context (l, d), by Euler steps without guidance; masks: G (b, t', h', w')."""
    shape = (dit.config.in_dim, *masks.shape[1:])
    noise = sample_noise(shape, [eval_generator(seed, i) for i in range(len(contexts))])
    noise = shift_noise(noise, masks, mean).to(device)
    contexts = [context.to(device) for context in contexts]
    *_, (_, z) = euler(lambda z, t: dit(z, t, contexts), noise, shifted_sigmas(steps, shift))
    pairs = zip(*rgba.decode(z, 4, clamp=True))                            # 4 frames of z at a time bound memory
    return [to_clip(*pair) for pair in pairs]


def evaluate_dit(text, dit, rgba, prompts, mask, seed=0, **options) -> tuple[list, list[dict]]:
    """Clips of (prompt, attributes) pairs, and their scores. mask: G (t', h', w') of all; options: those of sample."""
    clips = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="sample", leave=False):
        part = prompts[start:start + BATCH]
        contexts = text([prompt for prompt, _ in part])
        clips += sample(dit, rgba, contexts, mask.expand(len(part), -1, -1, -1), seed=seed + start, **options)
    return clips, [score_clip(*clip, attributes) for clip, (_, attributes) in zip(clips, prompts)]


def centres(alpha):
    """Centre of mass (t, 2) of an alpha clip (t, h, w), x and y in widths and heights; the middle where it is empty."""
    t, h, w = alpha.shape
    x = alpha.sum(1, dtype=float) @ (np.arange(w) + 0.5) / w
    y = alpha.sum(2, dtype=float) @ (np.arange(h) + 0.5) / h
    mass = alpha.sum((1, 2), dtype=float)[:, None]
    return np.where(mass > 0, np.stack([x, y], -1) / np.maximum(mass, 1), 0.5)


def ellipse_control(clips_of) -> dict:
    """How the object obeys the ellipse: correlation of their x and of their y; of half axis and root of the area, the
    mean over prompts; mean distance of the centres of a moving ellipse and of the object, in sides of the frame.
    clips_of(keys, still) -> clips, always of the same prompts and noise; without motion in the prompt if not still."""
    def paired(values, ellipse_of, measure):
        return np.array([[measure(alpha) for _, alpha in clips_of([ellipse_of(value)])] for value in values])

    places, sizes = (0.3, 0.4, 0.5, 0.6, 0.7), (0.16, 0.23, 0.3, 0.37)
    x = paired(places, lambda x: (0, x, 0.5, 0.22, 0.22, 0), lambda alpha: centres(alpha)[:, 0].mean())
    y = paired(places, lambda y: (0, 0.5, y, 0.22, 0.22, 0), lambda alpha: centres(alpha)[:, 1].mean())
    area = paired(sizes, lambda r: (0, 0.5, 0.5, r, r, 0), lambda alpha: (alpha > 25).mean() ** 0.5)
    distances = []
    for start, end in (((0.3, 0.3), (0.7, 0.7)), ((0.7, 0.4), (0.3, 0.6)), ((0.5, 0.7), (0.5, 0.3))):
        for _, alpha in clips_of([(0, *start, 0.22, 0.22, 0), (1, *end, 0.22, 0.22, 0)], still=False):
            latent = np.r_[0, 1 + np.arange(len(alpha) - 1) // 4][:, None] / max(1, (len(alpha) - 1) // 4)
            asked = np.array(start) + latent * np.subtract(end, start)
            distances.append(np.linalg.norm(centres(alpha) - asked, axis=1).mean())
    return dict(x=correlation(np.repeat(places, x.shape[1]), x.ravel()),
                y=correlation(np.repeat(places, y.shape[1]), y.ravel()),
                size=float(np.mean([correlation(sizes, column) for column in area.T])),
                distance=float(np.mean(distances)))


def spread(clips) -> float:
    """How far from each other the objects of clips stand: the deviation of their centres, in sides of the frame."""
    places = np.array([centres(alpha).mean(0) for _, alpha in clips])
    return float(np.sqrt(places.var(0).mean()))


def correlation(a, b) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0


@torch.no_grad()
def held_out_mse(step, files: list, rounds: int = 4) -> float:
    """Mean squared error of v on clips that do not train, with noise and levels that are always the same.
    step(item, generators) -> a training step's result for the tensors of item["file"], as a batch of one."""
    items = [{name: x[None] for name, x in read_checkpoint(file)[0].items()} | {"file": file} for file in files]
    errors = [step(item, [eval_generator(k, i)])["mse"] for i, item in enumerate(items) for k in range(rounds)]
    return round(float(torch.stack(errors).mean()), 4)


def run_vae(args) -> None:
    out, size = Path(args.out), args.size[::-1]
    if args.data:
        dataset = open_data(args.data, size, args.frames, 0, opaque=True, bled=not args.unbled)
        title, names, clip = "clips", [dataset.name(i) for i in range(len(dataset))], dataset.clip
    else:
        title, names = "unseen clips", [f"{i:02d}" for i in range(args.clips)]

        def clip(i):
            rgb, alpha = procedural_clip(10 ** 9 + i, size, args.frames, split="test")[:2]
            return (rgb if args.unbled else bleed(rgb, alpha)), alpha
    rgba = load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device)
    choose_threads(rgba)
    lpips, left = LPIPS(*args.lpips) if args.lpips else None, iter(names)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "eval.jsonl", "w") as log:                            # a line for each clip as it comes
        rows = evaluate_vae(rgba, map(clip, range(len(names))), args.naive, lpips,
                            lambda row: print(json.dumps(dict(clip=next(left)) | row), file=log, flush=True))
    print_scores(title, rows)
    record = {"arguments": vars(args), title: dict(mean=mean_scores(rows), clips=dict(zip(names, rows))), "cells": None}
    shown = [(clip(i), reconstruct(rgba, *clip(i), args.naive)) for i in range(len(names[:8]))]
    for name, pair in zip(names, shown):
        for kind, one in zip(("target", "result"), pair):
            write_rgba(f"{(out / 'eval' / name).with_suffix('')}-{kind}.webp", *one)
    contact_sheet(out / "eval.png", [one for pair in shown for one in pair], min(6, args.frames))
    if find_dit(args.base)[0].is_file():
        judge = load_judge(args.base, device=args.device)
        record["cells"] = cell_losses(rgba, **judge, clips=map(clip, range(len(names))), naive=args.naive)
        said = [f"{name} cells {value:.3f}" for name, value in record["cells"].items() if value is not None]
        print(f"\nloss of the frozen transformer on {title}: {', '.join(said)}")
    save_json(out / "eval.json", record)
    print(f"written: {out}/eval.json, {out}/eval/")


def run_dit(args) -> None:
    out, prompts = Path(args.out), unseen_prompts(args.prompts)
    ellipse = partial(ellipse_mask, args.frames, *args.size[::-1])
    dit = load_dit(args.base, [(args.dora, 1.0)], device=args.device)
    rgba = load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device)
    choose_threads(dit, rgba)
    options = dict(mean=args.mean, shift=args.shift, seed=args.seed, device=args.device)
    evaluate = partial(evaluate_dit, load_text_encoder(args.base), dit, rgba, **options)
    record = dict(arguments=vars(args), scores={}, measures={})

    def report(title, name, prompts, **options) -> tuple[list, list[dict]]:
        clips, rows = evaluate(prompts, ellipse(), **options)
        asked = [attributes for _, attributes in prompts]
        record["scores"][name], record["measures"][name] = shares_of(rows), mean_measures(clips, asked)
        print(f"\n{title}\n{score_table(rows, chance_of(clips, asked))}")
        measured = record["measures"][name].items()
        print(", ".join(f"{name} {value:.2f}" for name, value in measured if value is not None))
        return clips, rows

    for steps in (*args.steps, 4):
        title = f"{len(prompts)} unseen prompts, {steps} Euler steps, shift {args.shift}, mean {args.mean}"
        clips, rows = report(title, str(steps), prompts, steps=steps)
    print(score_by(rows, prompts, "shape", "shape"), score_by(rows, prompts, "shape", "motion"), sep="\n")
    contact_sheet(out / "eval.png", clips[:10])
    print("\neval.png shows, after 4 steps:", *(prompt for prompt, _ in prompts[:10]), sep="\n  ")
    record["clips"] = [dict(prompt=prompt, **row) for (prompt, _), row in zip(prompts, rows)]
    if not args.brief:
        report("wordings that were never trained on", "wordings", unseen_wordings(prompts))
        free, _ = report("without an ellipse: mean 0", "mean 0", prompts, mean=0.0)
        record["ellipse"] = dict(spread=spread(clips), spread_without=spread(free))
    if args.control:
        control = evaluate_control(evaluate, ellipse, prompts[:args.control], out / "ellipse.png")
        record["ellipse"] = control | record.get("ellipse", {})
        print("\nellipse and object:", ", ".join(f"{name} {value:.3f}" for name, value in record["ellipse"].items()))
    save_json(out / "eval.json", record)


def evaluate_control(evaluate, ellipse, prompts, picture: Path) -> dict:
    """`ellipse_control` of a few prompts, and its picture. ellipse(keys) -> G."""
    unmoved = [(caption_of(attributes | dict(motion=None), {}), attributes) for _, attributes in prompts]

    def clips_of(keys, still=True):
        return evaluate(prompts if still else unmoved, ellipse(keys))[0]
    draw_ellipses(picture, ellipse, lambda mask: evaluate(unmoved[:1], mask)[0])
    return ellipse_control(clips_of)


def mean_measures(clips, asked) -> dict[str, float | None]:
    """Of the clips that have them; None without any."""
    rows = [measure_clip(*clip, attributes) for clip, attributes in zip(clips, asked)]
    known = {name: [row[name] for row in rows if not np.isnan(row[name])] for name in rows[0]}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def draw_ellipses(path: Path, ellipse, clips_of) -> None:
    """G, the clip that it makes of one prompt and noise, its alpha, three frames each: at four places, in two sizes,
    moving."""
    keys = [[(0, x, y, r, r, 0)] for x, y, r in ((0.3, 0.3, 0.2), (0.7, 0.3, 0.2), (0.3, 0.7, 0.2), (0.7, 0.7, 0.2),
                                                 (0.5, 0.5, 0.16), (0.5, 0.5, 0.36))]
    keys.append([(0, 0.25, 0.25, 0.2, 0.2, 0), (1, 0.75, 0.75, 0.2, 0.2, 0)])
    rows = []
    for mask in map(ellipse, keys):
        (rgb, alpha), = clips_of(mask)
        shown = np.linspace(0, len(alpha) - 1, 3).round().astype(int)
        cells = mask[(shown + 3) // 4].repeat_interleave(8, 1).repeat_interleave(8, 2)
        greys = np.stack([(255 * cells).round().byte().numpy(), alpha[shown]])
        drawn, matte = np.repeat(greys[..., None], 3, -1)
        rows.append(np.concatenate([drawn, over(rgb[shown], alpha[shown], checkerboard(*alpha.shape[1:])), matte]))
    tile(path, rows)


def parse_args(argv=None):
    parser = Parser(prog="kit.evaluate", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="model", required=True)
    vae = commands.add_parser("vae", help="the RGBA autoencoder").add_argument
    dit = commands.add_parser("dit", help="the transformer with its DoRA").add_argument
    for name, add in (("vae", vae), ("dit", dit)):
        add("--base", metavar="DIR", help="checkpoint folder [that of --run, else tiny/]")
        add("--run", metavar="DIR", help="--out of your trainings: score what they made")
        add("--out", default=f"runs/{name}", metavar="DIR", help="for eval.json and clips to look at [%(default)s]")
        add("--vae-adapter", metavar="FILE", help="of the VAE [Wan-Alpha-v2-VAE.safetensors in --base]")
        add("--size", type=pixels, metavar="WxH", help="multiples of 16 [this and --frames: as --base's config.json]")
        add("--frames", type=clip_frames, metavar="N", help="of a clip, 4k+1")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 [%(default)s]")
    vae("data", nargs="?", help="folder of RGBA clips; without one unseen procedural clips are scored")
    vae("--clips", type=positive, default=64, metavar="N", help="how many procedural clips [64]")
    vae("--lpips", nargs=2, metavar="FILE", help="vgg16-397923af.pth and LPIPS's vgg.pth: that distance, too")
    vae("--unbled", action="store_true", help="leave the colour under alpha 0 as it is stored")
    vae("--naive", action="store_true", help="hand the encoder hidden colour as it is, without a render")
    dit("--dora", metavar="FILE", help="the adapter [t2v.safetensors in --base]")
    dit("--prompts", type=positive, default=200, metavar="N", help="how many unseen prompts [200]")
    dit("--steps", type=positive, nargs="*", default=[1, 2, 8, 20], metavar="N", help="to try besides 4 [1 2 8 20]")
    dit("--brief", action="store_true", help="without other wordings, without the mean shift off")
    dit("--control", type=whole, metavar="N", help="prompts whose ellipse is moved [20; 0 with --brief]")
    dit("--mean", type=number(-10, 10), metavar="MU", help="mean of noise outside the ellipse [as --size, or 0.05]")
    dit("--shift", type=number(0.01, 1000), metavar="S", help="of the noise levels [as --size, or 5]")
    dit("--seed", type=whole, default=0, metavar="N", help="of the noise [0]")
    return settle(parser.parse_args(argv))


def settle(args):
    """Defaults that depend on --base, and what can be told from the arguments alone. ValueError."""
    check_device(args.device)
    trained = read_trained(args.run) if args.run else {}
    args.base = args.base or trained.get("base") or str(TINY)
    said = USUAL[args.model] | read_section(args.base) | trained
    for name in USUAL[args.model]:
        if getattr(args, name) is None:
            setattr(args, name, said[name])
    args.vae_adapter = args.vae_adapter or trained.get("vae_adapter") or str(find_adapter(args.base))
    if args.model == "dit":
        args.control = (0 if args.brief else 20) if args.control is None else args.control
        args.dora = args.dora or trained.get("dora") or f"{args.base}/t2v.safetensors"
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    dict(vae=run_vae, dit=run_dit)[args.model](args)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.evaluate", room="a smaller --size, fewer --frames"))
