"""Train Wan-Alpha's DoRA on a frozen diffusion transformer, with the noise mean shifted (paper, section 3.3).

    python train_dit.py data/                                       # tiny/ as the base
    python train_dit.py data/ --base Wan2.1-T2V-14B --vae-adapter Wan-Alpha-v2-VAE.bin --bf16 --checkpoint

    z = RGBA latents, encoded once and kept; G = the Gaussian ellipse of the clip's alpha         `encode_clips`
    eps ~ N(0, I) + mu (1 - G),  z_t = sigma eps + (1 - sigma) z                                 `flow_step`
    loss = w(t) |v_hat - (eps - z)|^2

What stands around the loop (workers, exact resume, signals, processes) is kit/run.py, what a batch holds is
kit/batches.py, a base transformer from nothing kit/pretrain.py; scores are kit/evaluate.py.
dtype rule: what trains, times and losses in float32; with --bf16 the frozen base is held in bfloat16.
Differs from the official code: warm-up and clipping of the gradient; text and latents share one cache file.
"""
import sys
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from dit import Block, WanDiT, open_dit
from dora import adapter_state, add_dora, add_lora, load_adapter_state
from kit.batches import draw_latents, encoded, of_one_shape
from kit.command import Parser, clip_frames, end_process_group, is_first, number, pixels, positive, run_command
from kit.data import open_data
from kit.evaluate import held_out_mse, sample
from kit.files import (DORA, TINY, VAE_ADAPTER, cache_key, file_key, find_adapter, find_start, find_text,
                       find_tokenizer, find_trained, find_vae, read_section, save_tensors, stored)
from kit.media import contact_sheet, to_video
from kit.run import Run, add_run_flags, begin, finish, learning_rate
from kit.scale import place_dit, plain_attention, prepare_blocks
from losses import PALETTE
from merge import load_rgba_vae
from sampler import flow_target, gaussian_mask, interpolate, sample_noise, sample_sigma, shift_noise
from text import load_text_encoder, read_text_len

TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2"]       # of every block, both attentions
CHUNK = 16                  # frames encoded at a time: bounds memory, changes no result


# ---- what is learnt from


@torch.no_grad()
def encode_clips(args, dataset) -> list[Path]:
    """--variants files a clip, each z (16, t', h', w'), G (t', h', w') of its alpha as "mask", G of all its frames as
    one as "still_mask", and the context (l, d) of its caption. Variant 0 is the whole clip on white, the others are
    crops on other palette colours. Made only where there is none; VAE and text encoder are loaded only then."""
    rgba = cache(lambda: load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device))
    text = cache(lambda: load_text_encoder(args.base, device=args.device))
    files = find_vae(args.base), args.vae_adapter, find_text(args.base), find_tokenizer(args.base)
    weights = [file_key(file) for file in files] + [read_text_len(args.base), args.bf16, "two masks"]

    def item(k):
        i, variant = divmod(k, args.variants)
        caption, color = dataset.caption(i, variant), PALETTE[7 - variant % 8]

        def make():
            rgb, alpha = (x.to(args.device) for x in to_video(*dataset.clip(i, variant)))
            with torch.autocast(rgb.device.type, torch.bfloat16, enabled=args.bf16):
                z = rgba().encode(rgb, alpha, color, CHUNK)[0].float().cpu()
            mask, still = (gaussian_mask(x.cpu()) for x in (alpha[0, 0], alpha[0, 0].amax(0, keepdim=True)))
            return dict(z=z, mask=mask, still_mask=still.expand_as(mask), context=text()([caption])[0].float().cpu())
        key = cache_key(dataset.content(i), dataset.geometry(i, variant), color.tolist(), caption, *weights)
        return key, make
    files = encoded(Path(args.cache), args.variants * len(dataset), item)
    dataset.release()
    return files


# ---- one step


def choose_mask(batch, still: float, without: float):
    """G (b, t', h', w') of each sample: an ellipse a latent frame, which follows the object. For a share of the samples
    (`still`) it is one ellipse around all of its way, as `generate.py` draws it without --mask; for another (`without`)
    it is 1 everywhere: noise of mean 0, and the object may be anywhere."""
    u = torch.stack([torch.rand((), generator=g) for g in batch["generators"]]).view(-1, 1, 1, 1)
    mask = torch.where(u < still, batch["still_mask"], batch["mask"])
    return torch.where(u >= 1 - without, torch.ones_like(mask), mask)


def flow_step(dit, z, context, generators, mask=None, mean=0.05, shift=5.0, weighted=True) -> dict:
    """Rectified flow on latents z (b, 16, t, h, w); context: (b, l, d) or a list of (l, d); generators: one a sample,
    for its time and noise. mask: G (b, t, h, w); where it is 1 the noise keeps mean 0, outside it gets `mean`.
    weighted: by w(t) as the official code, else all levels alike."""
    sigma, weight = (x.to(z.device) for x in sample_sigma(generators, shift))
    noise = sample_noise(z.shape[1:], generators).to(z)
    if mask is not None:
        noise = shift_noise(noise, mask, mean)
    v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, context)
    error = (v_hat.float() - flow_target(z, noise)).square().mean(dim=(1, 2, 3, 4))
    return dict(loss=(weight * error).mean() if weighted else error.mean(), mse=error.mean())


def load_adapted(args) -> WanDiT:
    """The frozen base, in bfloat16 with --bf16, and in each block the adapters that train, in float32. With --shard
    each process keeps its part of the frozen matrices and all of the adapters."""
    add = add_lora if args.lora else add_dora

    def adapt(block):
        add(block, args.rank, args.rank, TARGETS)       # alpha = rank: scale 1
    model, tensors = open_dit(args.base)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    dit = place_dit(model.requires_grad_(False), tensors, dtype, args.device, shard=args.shard, adapt=adapt)
    prepare_blocks(dit, Block, args)
    return dit


def train(args, dataset) -> None:
    """Writes the adapter into --out, the run's records beside it."""
    files, training = encode_clips(args, dataset), args.variants * dataset.training
    names = [dataset.name(k // args.variants) for k in range(len(files))]
    dit, folder = load_adapted(args), Path(args.out) / "dit-rgba"
    draw = partial(draw_latents, files[:training], of_one_shape(files[:training]), names, args.seed)
    options, sizes = dict(mean=args.mean, shift=args.shift), [args.batch] * args.steps

    load = partial(load_adapter_state, dit)
    with Run(args, folder, dit, draw, sizes, dataset.fingerprint, load) as run, plain_attention(args.device):
        for step, passes in run.steps():
            for batch in passes:
                z = batch["z"].to(args.device)
                mask = choose_mask(batch, args.still_ellipse, args.without_ellipse).to(args.device)
                context = [context.to(args.device) for context in batch["context"]]
                run.backward(flow_step(dit, z, context, batch["generators"], mask, weighted=not args.unweighted,
                                       **options))
            if run.update(learning_rate(step, args.steps, args.lr, args.warmup)):
                shown = [files[args.variants * i] for i in dataset.held_out()]
                contact_sheet(run.sheet, draw_held_out(args, dit, shown))

    summary = run.summary()
    if training < len(files):
        def step_of(item, generators):
            z, context, mask = (item[name].to(args.device) for name in ("z", "context", "mask"))
            return flow_step(dit, z, context, generators, mask, **options)
        summary["held_out_mse"] = held_out_mse(step_of, files[training::args.variants])
    if is_first():
        save_tensors(Path(args.out) / DORA, stored(adapter_state(dit), args.half),
                     dict(vae_adapter=file_key(args.vae_adapter)))
    finish(folder, summary, "python", "generate.py", dataset.caption(0), "--run", args.out)


def draw_held_out(args, dit, files) -> list:
    """What the transformer makes of the captions and masks of up to four latents of one shape, as clips."""
    items = [load_file(file) for file in files]
    items = [item for item in items if item["z"].shape == items[0]["z"].shape][:4]
    rgba = load_rgba_vae(find_vae(args.base), args.vae_adapter, device=args.device)
    contexts, masks = [item["context"] for item in items], torch.stack([item["mask"] for item in items])
    return sample(dit, rgba, contexts, masks, args.mean, args.shift, device=args.device)


# ---- the command


def make_parser() -> Parser:
    parser = Parser(prog="train_dit.py", usage="train_dit.py data/ [flags]", epilog="""
        Train Wan-Alpha's DoRA on a frozen transformer.
        Defaults in [brackets] are the official ones but where "(ours)" says otherwise.""")
    add = parser.add_argument_group("the method").add_argument
    add("data", help="folder of captioned RGBA clips (python -m kit.data FOLDER says what is in it)")
    add("--base", default=str(TINY), metavar="DIR", help="checkpoint folder with the frozen base [tiny/]")
    add("--vae-adapter", metavar="FILE", help="RGBA adapter of the VAE, or a training's folder with one [that in "
        "--base]")
    add("--out", default="runs/dit", metavar="DIR", help="where the adapter and the run's records go [runs/dit]")
    add("--cache", default="runs/cache", metavar="DIR", help="encoded latents, made where missing [runs/cache]")
    add("--steps", type=positive, default=1750, metavar="N", help="[1750]")
    add("--batch", type=positive, default=8, metavar="B", help="clips a step [8]")
    add("--rank", type=positive, metavar="R", help="of the DoRA; its scale is 1 [that of --start, or else 32]")
    add("--lora", action="store_true", help="LoRA in place of DoRA")
    add("--mean", type=number(-10, 10), metavar="MU", help="of the noise outside the ellipse [what the base's "
        "config.json says, or else 0.05]")
    add("--still-ellipse", type=number(0, 1), default=0.0, metavar="P", help="share of the samples whose "
        "ellipse stands still, around all of the object's way: what a sampler without --mask has (ours) [0]")
    add("--without-ellipse", type=number(0, 1), default=0.0, metavar="P", help="share without one, so that the sampler "
        "may go without by --mean 0 (ours) [0]")
    add("--shift", type=number(0.01, 1000), default=5.0, metavar="K", help="of the noise levels [5]")
    add("--unweighted", action="store_true", help="all noise levels weigh alike (the paper), not by w(t)")
    add("--size", type=pixels, metavar="WxH", help="area that clips are scaled to, in their own aspect "
        "[what the base's config.json says, or else 640x624]")
    add("--frames", type=clip_frames, metavar="N", help="of a clip, 4k+1 [likewise, or else 81]")
    add("--variants", type=positive, default=1, metavar="N", help="latents of each clip: the whole on white, then "
        "crops on other palette colours (ours) [1]")
    add("--shard", action="store_true", help="with torchrun: each GPU keeps its part of the frozen matrices")
    add_run_flags(parser)
    return parser


def settle(args) -> None:
    """What the command line left open."""
    args.start, rank = find_start(args.start, DORA)
    args.rank = args.rank or rank or 32
    said = read_section(args.base)
    args.size = tuple(args.size or said.get("size", (640, 624)))
    args.frames = args.frames or said.get("frames", 81)
    args.mean = said.get("mean", 0.05) if args.mean is None else args.mean
    args.vae_adapter = str(find_trained(args.vae_adapter or find_adapter(args.base), VAE_ADAPTER))


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    settle(args)
    begin(args, [args.batch])
    train(args, open_data(args.data, args.size[::-1], args.frames, args.workers, keep_aspect=True))
    end_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main, "train_dit.py"))
