"""The method told in pictures along one prompt: a page in which every picture is computed.

    python -m kit.walk "a red glass ball bouncing"        # out/walk.html; flags: --seed --steps --mean --mask --base

walk.html holds the words. Beside each picture stand the equation, the function that computed it with file and line, its
shape, and a question that one changed flag answers, with the test that grades it.
"""
import base64
import html
import importlib
import inspect
import io
import os
import re
import sys
import time
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit import load_dit
from kit.command import Parser, choose_threads, number, positive, run_command, whole
from kit.evaluate import judge_cells
from kit.files import TINY, find_adapter, find_vae, read_section, save_text
from kit.media import checkerboard, heat, over, to_clip, to_video
from losses import PALETTE, as_grey, hard_render, soft_render
from merge import WHITE, load_rgba_vae
from sampler import euler, load_mask, shift_noise, shifted_sigmas
from text import load_text_encoder

ROOT = Path(__file__).parents[1]


# ---- pictures: uint8 (h, w, 3)


def row(frames, scale=1) -> np.ndarray:
    """Frames (n, h, w, 3) side by side with white between, each pixel `scale` wide."""
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
    return np.concatenate([*frames], 1).repeat(scale, 0).repeat(scale, 1)


def rows(*strips) -> np.ndarray:
    """Strips of one width under each other, with white between."""
    return np.concatenate([np.pad(strip, ((0, 3), (0, 0), (0, 0)), constant_values=255) for strip in strips])


def grey(x) -> np.ndarray:
    """(n, h, w) in [0, 1] or uint8 -> grey frames."""
    x = np.asarray(x)
    x = x if x.dtype == np.uint8 else (255 * x.clip(0, 1)).round().astype(np.uint8)
    return np.repeat(x[..., None], 3, -1)


def cells(x, low, high, scale=8) -> np.ndarray:
    """A row of latent frames (n, h, w) from dark blue over red to yellow."""
    return row(heat(x, low, high), scale)


def clip_strip(rgb, alpha, scale=2) -> np.ndarray:
    """Five frames over a checkerboard, under them their alpha."""
    pick = np.linspace(0, len(rgb) - 1, 5).round().astype(int)
    return rows(row(over(rgb[pick], alpha[pick], checkerboard(*alpha.shape[1:])), scale), row(grey(alpha[pick]), scale))


# ---- what happens to one prompt


@torch.no_grad()
def compute(args) -> dict:
    """Everything that the page shows, in the order of generate.py."""
    said = dict(size=[64, 64], frames=17, mean=0.05, shift=5.0) | read_section(args.base)
    (w, h), frames, mean = said["size"], said["frames"], said["mean"] if args.mean is None else args.mean
    text, rgba = load_text_encoder(args.base), load_rgba_vae(find_vae(args.base), find_adapter(args.base))
    base = load_dit(args.base)
    dit = load_dit(args.base, [(f"{args.base}/{said.get('dora', 't2v.safetensors')}", 1.0)])
    choose_threads(dit, rgba)
    (context,), (ids, _) = text([args.prompt]), text.tokenize([args.prompt])
    tokens = [text.tokenizer.id_to_token(int(i)) for i in ids[0]]
    G = load_mask(args.mask, frames, h, w)
    noise = torch.randn(1, dit.config.in_dim, *G.shape, generator=torch.Generator().manual_seed(args.seed))
    shifted, sigmas, steps = shift_noise(noise, G, mean), shifted_sigmas(args.steps, said["shift"]), []

    def velocity(model, z, t):
        v = model(z, t, [context])
        steps.append(to_clip(*(x[0] for x in rgba.decode(z - t.view(-1, 1, 1, 1, 1) / 1000 * v, clamp=True))))
        return v
    *_, (_, plain) = euler(partial(velocity, base), shifted, sigmas)
    without = to_clip(*(x[0] for x in rgba.decode(plain, clamp=True)))
    steps.clear()
    *_, (_, z) = euler(partial(velocity, dit), shifted, sigmas)
    clip = to_clip(*(x[0] for x in rgba.decode(z, clamp=True)))
    rgb, alpha = to_video(clip[0], np.where(clip[1] < 6, 0, clip[1]))      # a faint film would be drawn whole, if hard
    merged = rgba.encode(rgb, alpha)
    alone = [rgba.vae.encode(x) for x in (hard_render(rgb, alpha, WHITE), as_grey(alpha))]
    error, mask = judge_cells(rgba, to_clip(rgb[0], alpha[0]), 0, base, text([""])[0])
    return dict(said=said, mean=mean, tokens=tokens, context=context, G=G, noise=noise, shifted=shifted, sigmas=sigmas,
                steps=steps, z=z, clip=clip, without=without, merged=merged, alone=alone, error=error, mask=mask,
                again=to_clip(*(x[0] for x in rgba.decode(merged, clamp=True))), rgb=rgb, alpha=alpha)


def tell(x: dict) -> tuple[dict, dict]:
    """Pictures and values by the names that walk.html has for them; a picture may be several with captions."""
    G, (rgb, alpha), limit = x["G"], x["clip"], float(x["context"].abs().max())
    busy = int(x["merged"][0].flatten(1).std(1).argmax())                   # the channel that varies most
    renders = [[f(x["rgb"], x["alpha"], c)[0, :, len(rgb) // 2] for c in PALETTE] for f in (soft_render, hard_render)]
    renders = [row(to_clip(torch.stack(line, 1))[0]) for line in renders]
    both = x["noise"][0], x["shifted"][0]
    pictures = {
        "context": heat(x["context"], -limit, limit).repeat(6, 0).repeat(4, 1),
        "G": row(grey(G), 8),
        "noise": rows(*(cells(noise[0], -3, 3) for noise in both)),
        "channels": rows(*(cells(noise.mean(0), -1, 1.5) for noise in both)),
        "steps": [(f"expected at sigma {sigma:.3f}", clip_strip(*clip))
                  for sigma, clip in zip(x["sigmas"], x["steps"])],
        "with DoRA": clip_strip(rgb, alpha),
        "without DoRA": clip_strip(*x["without"]),
        "latent": row(heat(x["z"][0, :, len(G) // 2], -4, 4), 5),
        "decoded": rows(row(rgb[::4], 2), row(grey(alpha[::4]), 2)),
        "merged": rows(*(cells(z[0, busy], -4, 4) for z in (*x["alone"], x["merged"]))),
        "again": clip_strip(*x["again"]),
        "renders": rows(*renders),
        "mask": cells(x["mask"], -1, 1),
        "error": cells(x["error"].log(), -1, 2.5)}
    values = {
        "tokens": " | ".join(x["tokens"]), "mean": x["mean"],
        "levels": ", ".join(f"{sigma:.3f}" for sigma in x["sigmas"].tolist()),
        "context shape": f"{len(x['tokens'])} tokens x {x['context'].shape[1]}",
        "noise shape": f"G {tuple(G.shape)}, noise {tuple(x['noise'].shape[1:])}",
        "z shape": f"z {tuple(x['z'].shape[1:])}",
        "decoded shape": f"z {tuple(x['z'].shape[1:])} to rgb {rgb.shape}, alpha {alpha.shape}"}
    return pictures, values


# ---- the page: walk.html with what stands in braces filled in

BLANK = re.compile(r"\{(picture|value|function|test): ([^}|]+?)(?: \| ([^}]+))?\}")


def fill(kind: str, name: str, caption: str | None, page: Path, pictures: dict, values: dict) -> str:
    name = " ".join(name.split())
    if kind == "picture":
        several = pictures[name] if isinstance(pictures[name], list) else [(caption, pictures[name])]
        return "".join(figure(*one) for one in several)
    if kind == "value":
        return html.escape(str(values[name]))
    if kind == "function":
        module, *path = name.split(".")
        function = reduce(getattr, path, importlib.import_module(module))
        return link(Path(inspect.getsourcefile(function)), inspect.getsourcelines(function)[1], ".".join(path), page)
    for file in (ROOT / "test_all.py", ROOT / "kit/test_kit.py"):
        before, found, _ = file.read_text(encoding="utf-8").partition(f"\ndef {name}(")
        if found:
            return link(file, before.count("\n") + 2, name, page)
    raise ValueError(f"walk.html names {name}, a test that is not there")


def link(file: Path, line: int, name: str, page: Path) -> str:
    target = Path(os.path.relpath(file, page.parent)).as_posix()
    return f'<a href="{html.escape(target)}">{name}</a> ({file.relative_to(ROOT).as_posix()}:{line})'


def figure(caption: str, picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def main(argv=None) -> None:
    parser = Parser(prog="kit.walk", description="Tell the method in pictures along one prompt.")
    parser.add_argument("prompt", nargs="?", default="a red glass ball bouncing", help="[a red glass ball bouncing]")
    add, finite = parser.add_argument, number(-1e6, 1e6)
    add("--base", default=str(TINY), metavar="DIR", help="checkpoint folder of a small model [tiny/]")
    add("--out", default="out", type=Path, metavar="DIR", help="where walk.html goes [out]")
    add("--seed", type=whole, default=0, metavar="N", help="of the noise [0]")
    add("--steps", type=positive, default=4, metavar="N", help="from noise to clip [4]")
    add("--mean", type=finite, metavar="MU", help="of the noise outside the ellipse [config.json's]")
    add("--mask", metavar="MASK", help="the ellipse, as generate.py takes it [a centred circle]")
    args, start = parser.parse_args(argv), time.time()
    page, found = args.out / "walk.html", compute(args)
    pictures, values = tell(found)
    facts = f"seed {args.seed}, {args.steps} steps, mu {found['mean']}, {time.time() - start:.1f} s"
    values |= dict(prompt=args.prompt, base="tiny/" if args.base == str(TINY) else args.base, facts=facts)
    template = Path(__file__).with_name("walk.html").read_text(encoding="utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    save_text(page, BLANK.sub(lambda blank: fill(*blank.groups(), page, pictures, values), template))
    print(f"{page}: {facts}")


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.walk"))
