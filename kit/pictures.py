"""Pictures of the method for REPORT.md, each drawn by a command into --out.

    python -m kit.pictures mean                             # mu against what can be told from noise, at two grid sizes
    python -m kit.pictures cells ADAPTER [ADAPTER ...]      # alpha, TABD's mask, the frozen transformer's error
    python -m kit.pictures autoencoders runs/ablations      # target and result of each autoencoder
    python -m kit.pictures rows runs/ablations              # no TABD, no shift; no shift; full: one prompt and seed
    python -m kit.pictures steps                            # one prompt and seed in 1, 2, 4, 8, 20 steps
    python -m kit.pictures seeds                            # three prompts, four seeds each
    python -m kit.pictures preview                          # the README's

Renders are drawn by `python losses.py`, ellipses by `python sampler.py`, prompts by `python -m kit.evaluate dit`.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit import load_dit
from kit.clips import procedural_clip
from kit.command import Parser, run_command, whole
from kit.curves import draw_charts
from kit.evaluate import judge_cells, load_judge, reconstruct, sample, unseen_prompts
from kit.files import TINY, find_adapter, find_vae, read_section, replacing
from kit.media import checkerboard, contact_sheet, heat, over, premultiply, resize, tile, unpremultiply
from merge import load_rgba_vae
from sampler import ellipse_mask, mean_for_grid
from text import load_text_encoder

# ---- the mean shift


def told_from_noise(grid: tuple, mean: float, trials=300, places=33) -> float:
    """How well mu can be heard on a latent grid (t, h, w) of one channel: the correlation of an ellipse's x with the x
    of that, among so many, which fits the shifted noise best (a matched filter)."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(0)
    xs = torch.linspace(0.3, 0.7, places)
    masks = [ellipse_mask(4 * t - 3, 8 * h, 8 * w, [(0, float(x), 0.5, 0.3, 0.3, 0)]) for x in xs]
    outside = mean * (1 - torch.stack(masks).flatten(1))                   # (places, cells): mu (1 - G)
    asked = torch.randint(places, (trials,), generator=generator)
    found = torch.empty_like(asked)
    for i, k in enumerate(asked):
        noise = torch.randn(outside.shape[1], generator=generator) + outside[k]
        found[i] = (outside @ noise - outside.square().sum(1) / 2).argmax()
    return float(np.corrcoef(xs[asked], xs[found])[0, 1])


def draw_mean(args) -> None:
    """The figure of `sampler.mean_for_grid`."""
    grids, means = {"5 x 8 x 8 cells": (5, 8, 8), "5 x 24 x 24 cells": (5, 24, 24)}, np.geomspace(0.02, 2, 15)
    found = {name: [(mean, told_from_noise(grid, mean)) for mean in means] for name, grid in grids.items()}
    lines = {name: [(np.log10(mean), value) for mean, value in points] for name, points in found.items()}
    ruled = {name: [(np.log10(mean * np.sqrt(np.prod(grids[name]))), value) for mean, value in points]
             for name, points in found.items()}
    draw_charts(args.out / "mean.png", {"correlation of the ellipse's x with what noise tells, over log10 mu": lines,
                                        "over log10 (mu sqrt(cells))": ruled}, width=460, height=280)
    for name, (t, h, w) in grids.items():
        print(f"{name}: mu {mean_for_grid(4 * t - 3, 8 * h, 8 * w):.2f} by the rule;",
              ", ".join(f"{mean:.2f}: {value:.2f}" for mean, value in found[name][::2]))


# ---- what a model does


def draw_cells(args) -> None:
    """Of a few unseen clips alpha, mask, and the errors by cell of each adapter; histograms of these."""
    judge, frames, panels = load_judge(args.base), 17, {}
    clips = [procedural_clip(10 ** 9 + i, 64, frames, "test", material="solid")[:2] for i in range(12)]
    maps = {}
    for adapter in args.adapters:
        rgba = load_rgba_vae(find_vae(args.base), adapter)
        cells = [judge_cells(rgba, clip, k, **judge) for k, clip in enumerate(clips)]
        errors, masks = (torch.stack(x) for x in zip(*cells))
        maps[adapter] = errors.log()
        edges = np.linspace(-1, 3, 33)
        counts = {f"{name} cells": np.histogram(maps[adapter][masks == sign], edges, density=True)[0]
                  for name, sign in (("opaque", 1), ("transparent", -1))}
        lines = {name: list(zip(edges[:-1].tolist(), values.tolist())) for name, values in counts.items()}
        panels[f"log of the frozen transformer's error, {Path(adapter).parent.name}"] = lines
    draw_charts(args.out / "cells.png", panels, width=460, height=280)

    def large(x):
        return np.kron(x.numpy()[np.r_[0, 1 + np.arange(frames - 1) // 4]], np.ones((1, 8, 8)))[::4]
    rows = []
    for i in range(2):
        rows += [np.repeat(clips[i][1][::4, ..., None], 3, -1), heat(large(masks[i]), -1, 1)]
        rows += [heat(large(errors[i]), -1, 2.5) for errors in maps.values()]
    tile(args.out / "cells-map.png", rows)


def draw_autoencoders(args) -> None:
    """Targets, and under each what the autoencoders of an ablation make of it."""
    clips = [procedural_clip(10 ** 9 + i, 64, 17, "test")[:2] for i in range(4)]
    files = args.folder.glob(f"vae-*/{args.seed}/*-VAE.safetensors")
    rows, results, names = [], [], sorted(file.parent.parent.name for file in files)
    for name in names:
        rgba = load_rgba_vae(find_vae(args.base), args.folder / name / str(args.seed) / "Wan-Alpha-v2-VAE.safetensors")
        results.append([reconstruct(rgba, *clip, naive=name == "vae-naive") for clip in clips])
    for i, clip in enumerate(clips):
        rows += [clip] + [result[i] for result in results]
    contact_sheet(args.out / "autoencoders.png", rows)
    print("autoencoders.png: from above target,", ", ".join(names))


def draw_rows(args) -> None:
    """Three transformers of an ablation, two prompts, one seed."""
    rows = []
    for prompt, _ in unseen_prompts(2):
        for name in ("dit-render-0", "dit-tabd-0", "dit-tabd"):
            run, latent = args.folder / name / str(args.seed), "vae-tabd" if "tabd" in name else "vae-render"
            vae_adapter = args.folder / latent / str(args.seed) / "Wan-Alpha-v2-VAE.safetensors"
            mean = 0.0 if name.endswith("-0") else None
            rows += sampled(args.base, run / "t2v.safetensors", vae_adapter, [prompt], mean=mean)
    contact_sheet(args.out / "rows.png", rows)


def draw_steps(args) -> None:
    """One prompt and noise in so many Euler steps."""
    dora, vae_adapter, prompts = f"{args.base}/t2v.safetensors", find_adapter(args.base), dict(unseen_prompts(3))
    clips = [sampled(args.base, dora, vae_adapter, list(prompts), steps=steps) for steps in (1, 2, 4, 8, 20)]
    contact_sheet(args.out / "steps.png", [clip for of_prompt in zip(*clips) for clip in of_prompt])


def draw_seeds(args) -> None:
    """Three prompts, four seeds each, without an ellipse."""
    dora, vae_adapter, prompts = f"{args.base}/t2v.safetensors", find_adapter(args.base), dict(unseen_prompts(3))
    clips = [sampled(args.base, dora, vae_adapter, list(prompts), mean=0.0, seed=100 * seed) for seed in range(4)]
    contact_sheet(args.out / "seeds.png", [clip for of_prompt in zip(*clips) for clip in of_prompt])


def draw_preview(args) -> None:
    """The moving picture of the README: clips of assets/prompts.txt side by side, over their alpha."""
    prompts = (Path(__file__).parents[1] / "assets/prompts.txt").read_text(encoding="utf-8").splitlines()
    columns = []
    for rgb, alpha in sampled(args.base, f"{args.base}/t2v.safetensors", find_adapter(args.base), prompts):
        rgb, alpha = unpremultiply(resize(premultiply(rgb, alpha), (128, 128)))
        grey = np.repeat(alpha[..., None], 3, -1)
        columns.append(np.concatenate([over(rgb, alpha, checkerboard(128, 128, 16)), grey], 1))
    first, *others = map(Image.fromarray, np.concatenate(columns, 2))
    with replacing(args.out / "preview.webp") as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=83, loop=0, quality=85)


def sampled(base, dora, vae_adapter, prompts, mean=None, **options) -> list:
    """Clips of prompts by a base with these adapters, at the size and mu of its config.json (mean: another mu)."""
    said = dict(size=[64, 64], frames=17, mean=0.05, shift=5.0) | read_section(base)
    dit, rgba = load_dit(base, [(str(dora), 1.0)]), load_rgba_vae(find_vae(base), vae_adapter)
    masks = ellipse_mask(said["frames"], *said["size"][::-1]).expand(len(prompts), -1, -1, -1)
    mean = said["mean"] if mean is None else mean
    return sample(dit, rgba, load_text_encoder(base)(prompts), masks, mean, said["shift"], **options)


PICTURES = dict(mean=draw_mean, cells=draw_cells, autoencoders=draw_autoencoders, rows=draw_rows, steps=draw_steps,
                seeds=draw_seeds, preview=draw_preview)


def main(argv=None) -> None:
    parser = Parser(prog="kit.pictures", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="picture", required=True, parser_class=Parser)
    for name, draw in PICTURES.items():
        add = commands.add_parser(name, help=draw.__doc__.split("\n")[0]).add_argument
        add("--out", type=Path, default=Path("out"), metavar="DIR", help="where to draw [out]")
        add("--base", default=str(TINY), metavar="DIR", help="checkpoint folder [tiny/]")
        if name == "cells":
            add("adapters", nargs="+", metavar="ADAPTER", help="of the VAE")
        if name in ("autoencoders", "rows"):
            add("folder", type=Path, help="of python -m kit.ablate")
            add("--seed", type=whole, default=0, metavar="N", help="which of its runs [0]")
    args = parser.parse_args(argv)
    PICTURES[args.picture](args)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.pictures"))
