"""Train the diffusion transformer: from scratch on RGB latents (--stage base), or Wan-Alpha's DoRA on a frozen base.

    python train_dit.py data/ --stage base --base base --out base   # text encoder and DiT: what Wan2.1 is to Wan-Alpha
    python train_dit.py data/ --base base --out base                # DoRA with the mean shift (paper, section 3.3)
    python train_dit.py --eval --base base                          # scores of 200 unseen prompts

Both stages learn rectified flow: z_t = sigma noise + (1 - sigma) z, loss = w(t) |v_hat - (noise - z)|^2. Latents are
encoded once and kept in a cache, one file each; so is the text's context where the encoder is frozen. Stage rgba
trains on RGBA latents and draws its noise with a mean of mu outside the Gaussian ellipse of the clip's alpha. The loop,
with its workers, checkpoints, exact resume and many processes, is `fit` in scale.py.
dtype rule: what trains, times and losses in float32; with --bf16 the frozen base of stage rgba is held in bfloat16, and
stage base computes under autocast.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from data import (COLORS, MATERIALS, MOTIONS, SHAPES, RGBADataset, cache_key, caption_of, contact_sheet,
                  distance_table, file_key, held_out, save_tensors, save_text)
from dit import Block, DiTConfig, WanDiT, load_dit, open_dit, read_json
from dora import adapter_state, add_dora, add_lora
from losses import PALETTE, soft_render
from merge import load_rgba_vae
from sampler import (ellipse_mask, euler, flow_target, gaussian_mask, interpolate, sample_sigma, shift_noise,
                     shifted_sigmas)
from scale import (add_loop_flags, end_process_group, finish, fit, make_optimizers, number, place_dit, positive,
                   prepare_blocks, ranks, shares, start_process_group, step_generator)
from text import T5Config, TextEncoder, UMT5, encoder_file, load_text_encoder, make_tokenizer
from train_vae import (TINY, check_run, checked, find_vae, held_out_clips, one_sentence, precision, stored, to_clip,
                       to_video, trained_on)
from vae import load_vae

DORA_TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2"]      # of every block, both attentions
CHUNK = 16                  # frames encoded or decoded at a time: bounds memory, changes no result
BACKGROUNDS = dict(zip(("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white"), PALETTE))


# ---- what is learnt from: latents, encoded once


def encoded(folder: Path, n: int, item) -> list[Path]:
    """The files of n items; item(i) -> (key, function that makes the tensors). A file's name is its key, which names
    all that they depend on; it is made only where there is none. Several processes share the work."""
    (rank, world), files = ranks(), {}
    for i in tqdm(range(rank, n, world), desc="latents", disable=rank > 0):
        key, make = item(i)
        files[i] = folder / f"{key}.safetensors"
        if not is_whole(files[i]):
            tensors = make()
            try:
                save_tensors(files[i], tensors)
            except OSError as error:
                raise OSError(f"cannot write latents into {folder} ({error.strerror}): make room or choose another "
                              "--cache") from None
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, files)
        files = {i: file for part in parts for i, file in part.items()}
    return [files[i] for i in range(n)]


def is_whole(file: Path) -> bool:
    """A file of tensors of which nothing is missing."""
    try:
        with safe_open(file, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def on_background(caption: str, color: str) -> str:
    """The caption of an RGB clip: its background is named where the RGBA caption says that there is none."""
    return caption.replace("transparent background", f"{color} background")


@torch.no_grad()
def rgb_latents(args, dataset) -> tuple[list, list[str], int]:
    """Stage base: every clip rendered on white and on another palette colour -> one file and caption for each, and how
    many of them are of clips that train. A caption that names no background is always on white."""
    vae = cache(lambda: load_vae(find_vae(args.base), device=args.device))
    weights, names, pairs = file_key(find_vae(args.base)), list(BACKGROUNDS), []
    for i in range(len(dataset)):
        other = names[i % 7] if "transparent background" in dataset.caption(i) else "white"
        pairs += [(i, color) for color in dict.fromkeys(("white", other))]

    def item(k):
        i, color = pairs[k]

        def make():
            video = soft_render(*to_video(*dataset.clip(i)), BACKGROUNDS[color]).to(args.device)
            with precision(args):
                return {"z": vae().encode(video, CHUNK).float()[0].cpu()}
        return cache_key(dataset.content(i), dataset.geometry(i), weights, args.bf16, color), make
    files = encoded(Path(args.cache), len(pairs), item)
    captions = [on_background(dataset.caption(i), color) for i, color in pairs]
    return files, captions, sum(i < trained_on(dataset) for i, _ in pairs)


@torch.no_grad()
def rgba_latents(args, dataset) -> list[Path]:
    """Stage rgba: --variants files a clip, each z (16, t', h', w'), G (t', h', w') of its alpha as "mask", and the
    context (l, d) of its caption. Variant 0 is the whole clip on white, the others are crops on other palette colours.
    The VAE and the text encoder are loaded only if a file is missing."""
    rgba = cache(lambda: load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device))
    text = cache(lambda: load_text_encoder(args.base, device=args.device))
    weights = [file_key(file) for file in (find_vae(args.base), args.vae_adapter, encoder_file(args.base),
                                           Path(args.base) / "google/umt5-xxl/tokenizer.json")]

    def item(k):
        i, variant = divmod(k, args.variants)
        caption, color = dataset.caption(i), PALETTE[7 - variant % 8]

        def make():
            rgb, alpha = to_video(*dataset.clip(i, variant))
            with precision(args):
                z = rgba().encode(*(x.to(args.device) for x in (rgb, alpha)), color, CHUNK).float()[0].cpu()
            return {"z": z, "mask": gaussian_mask(alpha[0, 0]), "context": text()([caption])[0].float().cpu()}
        geometry = dataset.geometry(i, variant)
        return cache_key(dataset.content(i), geometry, color.tolist(), caption, *weights, args.bf16), make
    return encoded(Path(args.cache), args.variants * len(dataset), item)


def latent_shape(file) -> tuple:
    with safe_open(file, "pt") as tensors:
        return tuple(tensors.get_slice("z").get_shape())


def of_one_shape(files: list) -> list[list[int]]:
    """For each file the numbers of all whose latents have its shape: a batch is drawn from such a group."""
    groups = {}
    found = [groups.setdefault(latent_shape(file), []) for file in files]
    for i, group in enumerate(found):
        group.append(i)
    return found


def draw_latents(files, groups, names, batch, seed, accumulate, rank, world, step) -> list[dict]:
    """This process's part of the batch of a step, one dict a pass: what the files hold, latents and masks stacked."""
    generator = step_generator(seed, step, data=True)
    group = groups[int(torch.randint(len(files), (), generator=generator))]
    picks = [group[k] for k in torch.randint(len(group), (batch,), generator=generator)]
    passes = []
    for mine in shares(batch, rank, world, accumulate):
        items = [load_file(files[i]) for i in picks[mine]]
        tensors = {name: [item[name] for item in items] for name in items[0]}
        stacked = {name: torch.stack(tensors[name]) for name in ("z", "mask") if name in tensors}
        passes.append(dict(tensors | stacked, picks=picks, n=batch, mine=mine, names=[names[i] for i in picks]))
    return passes


# ---- one step


def attention(args):
    """Plain attention on the CPU: for short clips its backward is several times faster than the fused one's."""
    return sdpa_kernel(SDPBackend.MATH) if torch.device(args.device).type == "cpu" else nullcontext()


def flow_step(dit, z, context, generator, mask=None, mean=0.05, shift=5.0, weighted=True, n: int | None = None,
              mine=slice(None)) -> dict:
    """Rectified flow on latents z (b, 16, t, h, w); context: (b, l, d) or a list of (l, d); mask: G (b, t, h, w), where
    the noise keeps mean 0, outside it gets `mean`. weighted: by w(t) as the official code, else all levels alike.
    z, context and mask are the part `mine` of a batch of n, whose random numbers are all drawn."""
    n = n or len(z)
    sigma, weight = (x[mine].to(z.device) for x in sample_sigma(n, generator, shift))
    noise = torch.randn(n, *z.shape[1:], generator=generator)[mine].to(z)
    if mask is not None:
        noise = shift_noise(noise, mask, mean)
    v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, context)
    error = (v_hat.float() - flow_target(z, noise)).square().mean(dim=(1, 2, 3, 4))
    return dict(loss=(weight * error).mean() if weighted else error.mean(), mse=error.mean())


@torch.no_grad()
def held_out_mse(step, files: list, rounds: int = 4) -> float:
    """Mean squared error of v on clips that do not train, with noise and levels that are always the same.
    step(item, i, generator) -> `flow_step`'s result for the tensors of files[i], as a batch of one."""
    errors = [step({name: x[None] for name, x in load_file(file).items()}, i, step_generator(k, i))["mse"]
              for i, file in enumerate(files) for k in range(rounds)]
    return round(float(torch.stack(errors).mean()), 4)


def keep_float32(*modules: nn.Module) -> None:
    """Times, modulation and head are computed in float32, under autocast too."""
    def forward(inner, x):
        with torch.autocast(x.device.type, enabled=False):
            return inner(x.float())
    for module in modules:
        module.forward = partial(forward, module.forward)


def train_base(args, dataset, run: Path) -> dict:
    files, captions, training = rgb_latents(args, dataset)
    text = TextEncoder(make_tokenizer(captions), None, args.text_len)
    vocab = text.tokenizer.get_vocab_size()
    text.model = UMT5(T5Config(vocab, args.text_dim, args.text_dim, 2 * args.text_dim, 4, args.text_layers, 32))
    config = DiTConfig(args.dim, 4 * args.dim, args.heads, args.layers, text_dim=args.text_dim, text_len=args.text_len)
    both = nn.ModuleDict(dict(text=text.model, dit=WanDiT(config))).to(args.device)
    keep_float32(both["dit"].time_embedding, both["dit"].time_projection, both["dit"].head.head)
    prepare_blocks(both["dit"], Block, args)
    ids, mask = (x.to(args.device) for x in text.tokenize(captions + [""]))

    def context_of(words):
        longest = int(mask[words].sum(1).max())
        return both["text"](ids[words, :longest], mask[words, :longest]) * mask[words, :longest, None]

    def loss(batch, generator):
        n, mine = batch["n"], batch["mine"]
        empty = torch.rand(n, generator=generator) < args.drop_text
        words = torch.where(empty, len(captions), torch.tensor(batch["picks"]))[mine]
        with precision(args):
            return flow_step(both["dit"], batch["z"].to(args.device), context_of(words), generator, shift=args.shift,
                             weighted=False, n=n, mine=mine)

    def held_out_step(item, i, generator):
        return flow_step(both["dit"], item["z"].to(args.device), context_of(torch.tensor([training + i])), generator,
                         shift=args.shift, weighted=False)

    @torch.no_grad()
    def sheet(path):
        vae, names = load_vae(find_vae(args.base), device=args.device), captions[-6:]
        shape = latent_shape(files[-1])
        noise = torch.randn(len(names), *shape, generator=step_generator(args.seed, -2)).to(args.device)
        *_, (_, z) = euler(lambda z, t: both["dit"](z, t, text(names)), noise, shifted_sigmas(8, args.shift))
        contact_sheet(path, [to_clip(video) for video in vae.decode(z)])
        save_text(path.with_suffix(".txt"), "\n".join(names))

    summary = fit_latents(args, run, both, files[:training], captions, loss, sheet, dataset.fingerprint)
    summary["held_out_mse"] = held_out_mse(held_out_step, files[training:]) if training < len(files) else None
    if ranks()[0] == 0:
        write_base(args, both, text, config)
    return summary


def fit_latents(args, run: Path, model, files, names, loss, sheet, clips) -> dict:
    draw = partial(draw_latents, files, of_one_shape(files), names, args.batch, args.seed, args.accumulate, *ranks())
    with attention(args):
        return fit(args, run, model, make_optimizers(model, args), args.steps, draw, loss, sheet, clips)


def write_base(args, both, text, config) -> None:
    out = Path(args.out)
    save_tensors(out / "diffusion_pytorch_model.safetensors", stored(both["dit"].state_dict(), args.half))
    save_tensors(out / "models_t5_umt5-xxl-enc-bf16.safetensors", stored(both["text"].state_dict(), args.half))
    (out / "google/umt5-xxl").mkdir(parents=True, exist_ok=True)
    text.tokenizer.save(str(out / "google/umt5-xxl/tokenizer.json"))
    generate = dict(size=[*args.size[::-1]], frames=args.frames, fps=16,
                    steps=4, shift=args.shift, guidance=1.0, mean=args.mean,
                    vae_adapter="Wan-Alpha-v2-VAE.safetensors", dora="t2v.safetensors")  # what the rgba stages will add
    described = {"_class_name": "WanModel", "model_type": "t2v"} | asdict(config) | {"generate": generate}
    save_text(out / "config.json", json.dumps(described, indent=2) + "\n")


def load_adapted(args) -> WanDiT:
    """The frozen base, in bfloat16 with --bf16, and in each block the adapters that train, in float32. With --shard
    each process keeps its part of the frozen matrices and all of the adapters."""
    def adapt(block):
        (add_lora if args.lora else add_dora)(block, args.rank, args.rank, DORA_TARGETS)
    torch.manual_seed(args.seed)
    model, tensors = open_dit(args.base)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return place_dit(model.requires_grad_(False), tensors, dtype, args.device, shard=args.shard, adapt=adapt)


def train_rgba(args, dataset, run: Path) -> dict:
    files = rgba_latents(args, dataset)
    dit = load_adapted(args)
    prepare_blocks(dit, Block, args)

    def loss(batch, generator):
        context = [context.to(args.device) for context in batch["context"]]
        z, mask = (batch[name].to(args.device) for name in ("z", "mask"))
        return flow_step(dit, z, context, generator, mask, args.mean, args.shift, not args.unweighted,
                         batch["n"], batch["mine"])

    def held_out_step(item, i, generator):
        z, context, mask = (item[name].to(args.device) for name in ("z", "context", "mask"))
        return flow_step(dit, z, context, generator, mask, args.mean, args.shift)

    def sheet(path):
        items = [load_file(files[args.variants * i]) for i in held_out_clips(dataset)]
        items = [item for item in items if item["z"].shape == items[0]["z"].shape][:4]
        rgba = load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device)
        contact_sheet(path, [clip for item in items for clip in sample(
            dit, rgba, [item["context"]], item["mask"][None], args)])

    names = [dataset.name(k // args.variants) for k in range(len(files))]
    training = args.variants * trained_on(dataset)
    summary = fit_latents(args, run, dit, files[:training], names, loss, sheet, dataset.fingerprint)
    if training < len(files):
        summary["held_out_mse"] = held_out_mse(held_out_step, files[training::args.variants])
    if ranks()[0] == 0:
        save_tensors(Path(args.out) / "t2v.safetensors", stored(adapter_state(dit), args.half))
    return summary


# ---- does a clip show what its prompt names? rgb uint8 (t, h, w, 3) straight, alpha uint8 (t, h, w); 1 px = h/64


def grow(mask, px):
    """Bool (t, h, w), widened by px in every frame, diagonals too."""
    n = max(1, round(px * mask.shape[1] / 64))
    return F.max_pool2d(torch.from_numpy(mask)[:, None].float(), 2 * n + 1, 1, n)[:, 0].bool().numpy()


def body(alpha):
    """Where the object surely is, bool (t, h, w): alpha > 0.1, less a margin of 3 px."""
    return ~grow(alpha <= 25, 3)


def body_alpha(alpha) -> float:
    """Median alpha of the body over all frames, in [0, 1]; 0 without a body."""
    inside = alpha[body(alpha)]
    return float(np.median(inside)) / 255 if len(inside) else 0.0


def silhouette(alpha):
    """Where alpha is above half the body's, or above the body's less 0.35 if that is more: bool (t, h, w), no halo."""
    level = body_alpha(alpha)
    return alpha > 255 * max(level / 2, level - 0.35, 0.1)


def halo_alpha(alpha) -> float:
    """Mean alpha of the third pixel outside the silhouette, in [0, 1]."""
    inside = silhouette(alpha)
    third = grow(inside, 3) & ~grow(inside, 2)
    return float(alpha[third].sum() / max(1, third.sum())) / 255


def corner_alpha(alpha) -> float:
    """Mean alpha of the four corners, squares of an eighth of the height, over all frames, in [0, 1]."""
    edges = np.r_[:alpha.shape[1] // 8, -(alpha.shape[1] // 8):0]
    return float(alpha[:, edges][:, :, edges].mean()) / 255


def has_holes(alpha) -> bool:
    """Some frame encloses a place with alpha < 0.8: no path of such pixels leads from it to the frame's border."""
    free = F.pad(torch.from_numpy(alpha < 204).float(), (1, 1, 1, 1), value=1)[:, None]
    reached = F.pad(torch.zeros(free[..., 1:-1, 1:-1].shape), (1, 1, 1, 1), value=1)
    while not reached.equal(more := F.max_pool2d(reached, 3, 1, 1) * free):
        reached = more
    return bool((free > reached).any())


def named_color(rgb, alpha) -> str:
    """The nearest of the ten colours, in RGB, to the silhouette's median colour over all frames."""
    inside = rgb[silhouette(alpha)]
    if not len(inside):
        return "none"
    away = np.array(list(COLORS.values())) - np.median(inside, 0) / 255
    return list(COLORS)[(away ** 2).sum(1).argmin()]


def moments(mask):
    """Area (t,), centre and standard deviation (t, 2) as x, y of bool (t, h, w), in frame heights from the middle."""
    h, w = mask.shape[1:]
    axes = (torch.arange(w) + 0.5 - w / 2) / h, (torch.arange(h)[:, None] + 0.5 - h / 2) / h
    area = mask.sum((1, 2))
    mean, square = (torch.stack([(mask * a ** p).sum((1, 2)) / area for a in axes], 1) for p in (1, 2))
    return area, mean, (square - mean ** 2).clamp(min=1e-8).sqrt()


def named_motion(alpha) -> str:
    """The first rule that holds of the silhouette's area, proportion (width / height) and centre, in frame heights."""
    area, centre, deviation = moments(torch.from_numpy(silhouette(alpha)))
    proportion, reach, net = deviation[:, 0] / deviation[:, 1], centre.amax(0) - centre.amin(0), centre[-1] - centre[0]
    across, back = reach[0] > reach[1], (net.abs() < 0.5 * reach)[int(reach.argmax())]
    rules = (("none", area.min() == 0),
             ("growing", area[-1] > 2 * area[0]),
             ("spinning", proportion.min() < 0.5 * proportion.max()),
             ("none", reach.max() < 0.1),
             ("orbiting", reach.min() > 0.5 * reach.max()),
             ("bouncing", back and not across),
             ("none", back),
             ("moving from left to right", across and net[0] > 0),
             ("moving from right to left", across),
             ("falling", net[1] > 0),
             ("rising", True))
    return next(name for name, holds in rules if holds)


def aligned(mask, n=48):
    """Bool (t, h, w) moved and stretched to one centre and one standard deviation in x and in y: bool (t, n, n)."""
    _, centre, deviation = moments(mask)
    unit = 2 / torch.tensor([mask.shape[2] / mask.shape[1], 1])            # affine_grid counts from -1 to 1
    theta = torch.cat([torch.diag_embed(2.6 * deviation * unit), (centre * unit)[..., None]], -1)
    grid = F.affine_grid(theta, (len(mask), 1, n, n), align_corners=False)
    return F.grid_sample(mask[:, None].float(), grid, align_corners=False)[:, 0] > 0.5


def named_shape(alpha) -> str:
    """The shape whose outline overlaps the silhouette best, both stretched to one centre, width and height: the largest
    intersection over union, mean over the frames of at least median area; none if that is below 0.75."""
    mask = torch.from_numpy(silhouette(alpha))
    area = mask.sum((1, 2))
    if area.max() == 0:
        return "none"
    mask = aligned(mask[area >= area.median().clamp(min=1)])[:, None]
    outlines = aligned(torch.stack([torch.from_numpy(distance_table(shape)[..., 0] < 0) for shape in SHAPES]))
    overlap = ((mask & outlines).sum((2, 3)) / (mask | outlines).sum((2, 3))).mean(0)
    return SHAPES[overlap.argmax()] if overlap.max() >= 0.75 else "none"


def score_clip(rgb, alpha, attributes: dict) -> dict:
    """Name of a score -> whether the clip passes, None where it does not apply; besides "material" one per material.

    corners: corner_alpha < 0.01. solid: body_alpha > 0.95. glass, smoke, bubble: 0.15 < body_alpha < 0.85.
    glow: body_alpha > 0.7 and halo_alpha > 0.05. no_holes: of solid bodies, except the ring.
    """
    material, level = attributes["material"], body_alpha(alpha)
    right = {"solid": level > 0.95, "glow": level > 0.7 and halo_alpha(alpha) > 0.05}.get(material, 0.15 < level < 0.85)
    whole = material == "solid" and attributes["shape"] != "ring"
    return dict(color=named_color(rgb, alpha) == attributes["color"],
                motion=named_motion(alpha) == attributes["motion"],
                shape=named_shape(alpha) == attributes["shape"],
                corners=corner_alpha(alpha) < 0.01, material=right,
                **{name: right if name == material else None for name in MATERIALS},
                no_holes=not has_holes(alpha) if whole else None)


def score_table(rows: list[dict]) -> str:
    """A line for each score: the percentage that passes, and counts, of the clips it applies to; materials indented."""
    lines = []
    for name in rows[0]:
        got = [row[name] for row in rows if row[name] is not None]
        share = f"{100 * sum(got) / len(got):6.1f} %" if got else "     - %"
        lines.append(f"{'  ' * (name in MATERIALS) + name:<12}{share}  {sum(got):4d} of {len(got):4d}")
    return "\n".join(lines)


def score_by(rows: list[dict], prompts: list, name: str, attribute: str) -> str:
    """One line: how many clips pass a score, for every value of an attribute of their prompts."""
    passed = {}
    for row, (_, attributes) in zip(rows, prompts):
        passed.setdefault(attributes[attribute], []).append(row[name])
    return f"{name} by {attribute}: " + ", ".join(f"{value} {sum(got)} of {len(got)}" for value, got in passed.items())


def unseen_prompts(n=200, seed=0) -> list[tuple[str, dict]]:
    """(prompt, attributes) of n different held-out combinations: shuffled, then always one whose values came least.

    Wan-Alpha's template and the short wording take turns. ValueError for more than there are.
    """
    pool, count = [c for c in product(SHAPES, COLORS, MATERIALS, MOTIONS) if held_out(*c)], Counter()
    if n > len(pool):
        raise ValueError(f"{n} prompts were asked for, but only {len(pool)} combinations are held out; ask for fewer.")
    pool, prompts = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))], []
    for i in range(n):
        values = min(pool, key=lambda c: sum(count[value] for value in c))
        pool.remove(values)
        count.update(values)
        attributes = dict(zip(("shape", "color", "material", "motion"), values))
        prompts.append((caption_of(attributes, i % 2), attributes))
    return prompts


# ---- sampling and scores


@torch.no_grad()
def sample(dit, rgba, contexts, masks, args, steps: int = 4, seed: int = 0) -> list:
    """Clips (rgb, alpha), uint8, one a context (l, d); masks: G (b, t', h', w')."""
    shape = (dit.config.in_dim, *masks.shape[1:])
    noise = torch.stack([torch.randn(shape, generator=step_generator(seed, i)) for i in range(len(contexts))])
    noise = shift_noise(noise, masks, args.mean).to(args.device)
    contexts = [context.to(args.device) for context in contexts]
    *_, (_, z) = euler(lambda z, t: dit(z, t, contexts), noise, shifted_sigmas(steps, args.shift))
    return [to_clip(*pair) for pair in zip(*rgba.decode(z, CHUNK // 4))]


def evaluate(dit, rgba, text, args, prompts, steps: int = 4, mean: float | None = None,
             mask=None) -> tuple[list, list[dict]]:
    """Clips of (prompt, attributes) pairs and the scores of each. mask: G (t', h', w'), default the centred ellipse."""
    mask = ellipse_mask(args.frames, *args.size) if mask is None else mask
    args = argparse.Namespace(**vars(args) | dict(mean=args.mean if mean is None else mean))
    clips = []
    for start in tqdm(range(0, len(prompts), 20), desc=f"{steps} steps", leave=False):
        part = prompts[start:start + 20]
        contexts = text([prompt for prompt, _ in part])
        clips += sample(dit, rgba, contexts, mask.expand(len(part), -1, -1, -1), args, steps, args.seed + len(clips))
    return clips, [score_clip(*clip, attributes) for clip, (_, attributes) in zip(clips, prompts)]


def ellipse_control(dit, rgba, text, args, prompts) -> dict:
    """Does the object follow the ellipse? Correlation of the ellipse's x (0.3, 0.5, 0.7) with the
    mean x of the clip's alpha, and of the ellipse's half axis (0.25, 0.45) with the root of its
    mean area, over the same prompts and noise."""
    found = {"position": ([], []), "size": ([], [])}
    for x, half in ((0.3, 0.35), (0.5, 0.35), (0.7, 0.35), (0.5, 0.25), (0.5, 0.45)):
        mask = ellipse_mask(args.frames, *args.size, [(0, x, 0.5, half, half, 0)])
        for _, alpha in evaluate(dit, rgba, text, args, prompts, mask=mask)[0]:
            share = alpha.astype(np.float64).sum((0, 1))
            name, asked, got = (("position", x, share @ np.arange(len(share)) / max(share.sum(), 1)) if half == 0.35
                                else ("size", half, alpha.mean() ** 0.5))
            found[name][0].append(asked)
            found[name][1].append(got)
    return {name: float(np.corrcoef(*pair)[0, 1]) for name, pair in found.items()}


def shares_of(rows: list[dict]) -> dict:
    """The share of the clips that pass, of those a score applies to."""
    found = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: sum(got) / len(got) if got else None for name, got in found.items()}


def run_eval(args):
    """Tables on stdout and OUT/eval.json; the clips of the first ten prompts as OUT/eval.png."""
    text = load_text_encoder(args.base)
    dit = load_dit(args.base, [(args.dora or Path(args.base) / "t2v.safetensors", 1.0)], device=args.device)
    rgba = load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device)
    prompts = unseen_prompts(args.prompts)
    clips, rows = evaluate(dit, rgba, text, args, prompts)
    contact_sheet(Path(args.out) / "eval.png", clips[:10])
    print("eval.png shows:", *(prompt for prompt, _ in prompts[:10]), sep="\n  ")
    print(f"\n{len(prompts)} unseen prompts, 4 Euler steps, shift {args.shift}, mean {args.mean}\n{score_table(rows)}")
    print(score_by(rows, prompts, "shape", "shape"), score_by(rows, prompts, "shape", "motion"), sep="\n")
    record = dict(arguments=vars(args), scores={"4": shares_of(rows)}, clips=[
        dict(prompt=prompt, **row) for (prompt, _), row in zip(prompts, rows)])
    for steps in args.eval_steps:
        rows = evaluate(dit, rgba, text, args, prompts, steps)[1]
        record["scores"][str(steps)] = shares_of(rows)
        print(f"\n{steps} steps\n{score_table(rows)}")
    if not args.brief:
        print(f"\n4 steps, mean shift off\n{score_table(evaluate(dit, rgba, text, args, prompts, mean=0.0)[1])}")
        record["ellipse"] = ellipse_control(dit, rgba, text, args, prompts[:20])
        for name, value in record["ellipse"].items():
            print(f"correlation of the ellipse's {name} with the object's: {value:.2f}")
    save_text(Path(args.out) / "eval.json", json.dumps(record, indent=1) + "\n")


# ---- the command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("data", nargs="?", help="folder of captioned RGBA clips (python data.py makes one)")
    add("--stage", choices=("rgba", "base"), default="rgba",
        help="DoRA on RGBA latents, or transformer and text encoder from scratch")
    add("--base", default=str(TINY), help="checkpoint folder with the frozen base; stage base: with the VAE")
    add("--vae-adapter", help="RGBA adapter of the VAE; default: Wan-Alpha-v2-VAE.safetensors in --base")
    add("--dora", help="the adapter that --eval scores; default: t2v.safetensors in --base")
    add("--out", default="runs/dit", help="folder that the result and the run's records go to")
    add("--cache", default="runs/cache",
        help="folder of encoded latents, reused where nothing they depend on has changed")
    add("--eval", action="store_true", help="score unseen prompts instead of training")
    add("--prompts", type=positive, default=200, help="how many unseen prompts --eval scores")
    add("--eval-steps", type=positive, nargs="*", default=[1, 2, 8, 20], help="Euler steps that --eval tries besides 4")
    add("--brief", action="store_true", help="--eval without the mean shift off and without moving the ellipse")
    add("--steps", type=positive, default=1750, help="training steps")
    add("--batch", type=positive, default=8, help="clips a step")
    add("--rank", type=positive, default=32, help="rank of the DoRA; its scale is 1")
    add("--lora", action="store_true", help="LoRA in place of DoRA")
    add("--shard", action="store_true", help="several GPUs (torchrun): each keeps its part of the frozen matrices")
    add("--variants", type=positive, default=1,
        help="latents of each clip: the whole on white, then crops on other palette colours")
    add("--mean", type=number(-10, 10), default=0.05, help="mu: mean of the noise outside the ellipse")
    add("--shift", type=number(0.01, 1000), default=5.0, help="shift of the noise levels")
    add("--unweighted", action="store_true", help="all noise levels weigh alike, not by w(t)")
    add("--dim", type=positive, default=192, help="stage base: width of the transformer")
    add("--heads", type=positive, default=6, help="stage base: its heads")
    add("--layers", type=positive, default=6, help="stage base: its blocks")
    add("--text-dim", type=positive, default=128, help="stage base: width of the text encoder")
    add("--text-layers", type=positive, default=2, help="stage base: its layers")
    add("--text-len", type=positive, default=64, help="stage base: tokens of a prompt at most")
    add("--drop-text", type=number(0, 1), default=0.1,
        help="stage base: share of samples trained with the empty prompt")
    add("--size", type=pixels, help="area that clips are scaled to, in their own aspect, WxH or one side, pixels; "
        "default: what config.json of --base says, or else the paper's 640x624 (stage base: 64)")
    add("--frames", type=positive, help="frames of a clip, 4k+1; default: as for --size, 81 (stage base: 17)")
    add_loop_flags(add)
    args = parser.parse_args(argv)
    args.vae_adapter = args.vae_adapter or str(Path(args.base) / "Wan-Alpha-v2-VAE.safetensors")
    check_run(args)
    if args.dim % (2 * args.heads) or args.text_dim % 4:
        raise ValueError(f"--dim {args.dim} must be a multiple of twice --heads {args.heads}, --text-dim of 4")
    said = dict(size=[64, 64], frames=17) if args.stage == "base" else generate_section(args.base)
    args.size = tuple(args.size or said.get("size", [640, 624])[::-1])
    args.frames = args.frames or said.get("frames", 81)
    if args.frames % 4 != 1 or any(side % 16 for side in args.size):
        raise ValueError(f"--frames {args.frames} must be 4k+1 and both sides of --size multiples of 16, not "
                         f"{args.size[1]}x{args.size[0]}")
    return args


def generate_section(base) -> dict:
    """Size and frames that a model was made for, where its config.json says so."""
    config = Path(base) / "config.json"
    section = read_json(config).get("generate", {}) if config.is_file() else {}
    return section if isinstance(section, dict) else {}


def pixels(text: str) -> tuple[int, int]:
    """"640x624" (width x height) or "64" -> (h, w)."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT or one side in pixels")
    return int(sides[-1]), int(sides[0])


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.eval:
        return run_eval(args)
    rank, world, device = start_process_group(args.device)
    args.device = device or args.device
    shares(args.batch, rank, world, args.accumulate)        # an error now, not after clips were encoded
    dataset = checked(RGBADataset(args.data, args.size, args.frames, keep_aspect=True), args)
    run = Path(args.out) / f"dit-{args.stage}"
    summary = (train_base if args.stage == "base" else train_rgba)(args, dataset, run)
    if rank == 0:
        finish(run, summary)
    end_process_group()


if __name__ == "__main__":
    sys.exit(one_sentence(main))
