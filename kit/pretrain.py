"""A base of one's own from nothing: what Wan2.1 is to Wan-Alpha, small. So tiny/ was made; it is not the method.

    python -m kit.clips scenes/ --scenes              # opaque video
    python -m kit.pretrain vae scenes/ --out base     # a VAE: L1 + 0.5 MSE + KL
    python -m kit.pretrain dit scenes/ --out base     # text encoder and transformer on its latents, rectified flow

Clips with transparency are shown on colours, and to the VAE their alpha as grey: a base of such views has seen all that
the two RGBA stages will ask for (tiny/), one of opaque video has it to learn (the paper's case). Both show their loop,
as the two trainings of the method do. The result is a checkpoint folder for their --base.
dtype rule: parameters and losses in float32; with --bf16 the models run under autocast, times in float32.
"""
import json
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dit import Block, DiTConfig, WanDiT
from kit.batches import batch_sizes, draw_clips, draw_latents, encoded, latent_shape, of_one_shape, parse_schedule
from kit.command import Parser, average, clip_frames, end_process_group, is_first, number, pixels, positive, run_command
from kit.data import open_data
from kit.evaluate import held_out_mse
from kit.files import cache_key, file_key, find_tokenizer, find_vae, save_json, save_tensors, save_text, stored
from kit.media import contact_sheet, to_clip, to_video
from kit.run import Batches, Run, add_run_flags, begin, finish, learning_rate, sample_generator
from kit.scale import plain_attention, prepare_blocks
from losses import PALETTE, as_grey, hard_render, random_colors, soft_render
from sampler import euler, flow_target, interpolate, mean_for_grid, sample_noise, sample_sigma, shifted_sigmas
from text import T5Config, TextEncoder, UMT5, make_tokenizer
from vae import ResidualBlock, VAEConfig, WanVAE, load_vae

BACKGROUNDS = dict(zip(("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white"), PALETTE))
RGBA_WORDS = "transparent"      # of the captions of RGBA clips: those that a base learns from do not hold it
CHUNK = 16              # frames encoded at a time: bounds memory, changes no result
EMPTY_SHARE = 0.1       # of the samples that train get the empty prompt


def rgb_views(rgb, alpha, generators):
    """What a base VAE learns from: opaque clips as they are, others rendered softly (40 %) or hard (35 %) on a colour
    or their alpha as grey (25 %). Half of the colours are corners of the RGB cube, half are any."""
    corner, _ = random_colors(generators)
    u = torch.stack([torch.rand(5, generator=generator) for generator in generators])
    color = torch.where(u[:, :1] < 0.5, corner, 2 * u[:, 1:4] - 1)
    view, opaque = u[:, 4].view(-1, 1, 1, 1, 1).to(rgb.device), alpha.amin((1, 2, 3, 4), keepdim=True) == 1
    rendered = torch.where(view < 0.4, soft_render(rgb, alpha, color), hard_render(rgb, alpha, color))
    return torch.where((view < 0.75) | opaque, rendered, as_grey(alpha))


def vae_step(vae: WanVAE, video, generators) -> dict:
    """Autoencode (b, 3, t, h, w) with the latent sampled: L1 + 0.5 MSE + 3e-5 KL(latent || N(0, 1))."""
    mean, logvar = vae.moments(vae.features(video))
    mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
    z = mean + sample_noise(mean.shape[1:], generators).to(mean) * (0.5 * logvar).exp()
    error = vae.decode(vae.normalize(z), chunk=None).float() - video
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
    l1, mse = error.abs().mean(), error.square().mean()
    return dict(loss=l1 + 0.5 * mse + 3e-5 * kl, l1=l1, mse=mse, kl=kl)


@torch.no_grad()
def measure_statistics(vae: WanVAE, batches: Batches, steps: range) -> None:
    """Mean and deviation of the raw latent over the clips of some steps, per channel: MEAN and STD of this VAE."""
    device, sums = vae.conv1.weight.device, torch.zeros(3, vae.config.z_dim, dtype=torch.float64)
    for batch in (batch for step in tqdm(steps, desc="latent statistics") for batch in batches[step]):
        video = rgb_views(batch["rgb"], batch["alpha"], batch["generators"]).to(device)
        raw = vae.moments(vae.features(video))[0].double().cpu()
        sums += torch.stack([(raw ** power).sum((0, 2, 3, 4)) for power in range(3)])
    average([sums := sums.to(device)])
    mean, square = sums[1:] / sums[0]
    std = (square - mean ** 2).clamp(min=1e-8).sqrt()
    vae.config = replace(vae.config, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def train_vae(args, dataset, phases) -> None:
    vae = WanVAE(VAEConfig(args.dim, num_res_blocks=args.res_blocks, mean=(0.0,) * 16, std=(1.0,) * 16))
    vae.init_weights()
    prepare_blocks(vae.to(args.device), ResidualBlock, args)
    folder, sizes, held_out = Path(args.out) / "vae-base", batch_sizes(phases), dataset.held_out(4)

    draw = partial(draw_clips, dataset, phases, args.size)
    with Run(args, folder, vae, draw, sizes, dataset.fingerprint, vae.load_state_dict) as run:
        for step, passes in run.steps():
            for batch in passes:
                video = rgb_views(batch["rgb"], batch["alpha"], batch["generators"])
                video = video.to(args.device, memory_format=torch.channels_last_3d)
                with torch.autocast(video.device.type, torch.bfloat16, enabled=args.bf16):
                    losses = vae_step(vae, video, batch["generators"])
                run.backward(losses)
            if run.update(learning_rate(step, len(sizes), args.lr, args.warmup)):
                draw_views(run.sheet, vae, [dataset.clip(i) for i in held_out], args)

    measure_statistics(vae, run.batches, range(max(0, len(sizes) - 32), len(sizes)))
    if is_first():
        statistics = {name: json.dumps(getattr(vae.config, name)) for name in ("mean", "std")}
        save_tensors(find_vae(args.out).with_suffix(".safetensors"), stored(vae.state_dict(), args.half), statistics)
    finish(folder, run.summary(), "python", "-m", "kit.pretrain", "dit", args.data, "--out", args.out)


@torch.no_grad()
def draw_views(path: Path, vae: WanVAE, clips: list, args) -> None:
    """Views of held-out clips, each above what the VAE makes of it."""
    rgb, alpha = (torch.cat(x).to(args.device) for x in zip(*(to_video(*clip) for clip in clips)))
    video = rgb_views(rgb, alpha, [sample_generator(args.seed, 0, -2 - i) for i in range(len(clips))])
    result = vae.decode(vae.encode(video, chunk=None), chunk=None)
    contact_sheet(path, [to_clip(x) for pair in zip(video, result) for x in pair])


def plan_renders(dataset) -> list[tuple[int, str]]:
    """(clip, background): every clip on white, which an opaque one hides, and once more on another palette colour if
    its caption speaks of a transparent background."""
    pairs = []
    for i in range(len(dataset)):
        pairs.append((i, "white"))
        if "transparent background" in dataset.caption(i):
            pairs.append((i, list(BACKGROUNDS)[i % 7]))
    return pairs


@torch.no_grad()
def encode_renders(args, dataset) -> tuple[list[Path], list[str], int]:
    """A latent file and a caption for each planned render, and how many of them are of clips that train."""
    vae, weights = cache(lambda: load_vae(find_vae(args.base), device=args.device)), file_key(find_vae(args.base))
    pairs = plan_renders(dataset)

    def item(k):
        i, color = pairs[k]

        def make():
            video = soft_render(*to_video(*dataset.clip(i)), BACKGROUNDS[color]).to(args.device)
            with torch.autocast(video.device.type, torch.bfloat16, enabled=args.bf16):
                return {"z": vae().encode(video, CHUNK).float()[0].cpu()}
        return cache_key(dataset.content(i), dataset.geometry(i), weights, args.bf16, color), make
    files = encoded(Path(args.cache), len(pairs), item)
    dataset.release()
    captions = [dataset.caption(i).replace("transparent background", f"{color} background") for i, color in pairs]
    return files, captions, sum(i < dataset.training for i, _ in pairs)


def flow_step(dit, z, context, generators, shift: float) -> dict:
    """Rectified flow on latents z (b, 16, t, h, w), all noise levels alike."""
    sigma, noise = sample_sigma(generators, shift)[0].to(z.device), sample_noise(z.shape[1:], generators).to(z)
    v_hat = dit(interpolate(z, noise, sigma), 1000 * sigma, context)
    mse = (v_hat.float() - flow_target(z, noise)).square().mean()
    return dict(loss=mse, mse=mse)


def read_captions(text: TextEncoder, ids, mask, picks: list[int], generators=()):
    """Contexts of captions by their number among ids and mask; the last is the empty prompt, which a share
    of the samples that train get, for guidance."""
    words = torch.tensor(picks)
    for i, generator in enumerate(generators):
        if torch.rand((), generator=generator) < EMPTY_SHARE:
            words[i] = len(ids) - 1
    longest = int(mask[words].sum(1).max())
    return text.model(ids[words, :longest], mask[words, :longest]) * mask[words, :longest, None]


def keep_float32(*modules: nn.Module) -> None:
    """Times, modulation and head are computed in float32, under autocast too."""
    def forward(inner, x):
        with torch.autocast(x.device.type, enabled=False):
            return inner(x.float())
    for module in modules:
        module.forward = partial(forward, module.forward)


def make_models(args, captions: list[str]) -> tuple[TextEncoder, nn.ModuleDict]:
    tokenizer = make_tokenizer(captions)
    d = args.text_dim
    sizes = T5Config(tokenizer.get_vocab_size(), d, d, 2 * d, 4, args.text_layers, 32)
    config = DiTConfig(args.dim, 4 * args.dim, args.heads, args.layers, text_dim=args.text_dim, text_len=args.text_len)
    both = nn.ModuleDict(dict(text=UMT5(sizes), dit=WanDiT(config))).to(args.device)
    keep_float32(both["dit"].time_embedding, both["dit"].time_projection, both["dit"].head.head)
    prepare_blocks(both["dit"], Block, args)
    return TextEncoder(tokenizer, both["text"], args.text_len), both


def train_dit(args, dataset) -> None:
    files, names, training = encode_renders(args, dataset)
    text, both = make_models(args, [*names, RGBA_WORDS])
    dit, folder, sizes = both["dit"], Path(args.out) / "dit-base", [args.batch] * args.steps
    captions = partial(read_captions, text, *text.tokenize([*names, ""]))
    draw = partial(draw_latents, files[:training], of_one_shape(files[:training]), names, args.seed)

    with Run(args, folder, both, draw, sizes, dataset.fingerprint) as run, plain_attention(args.device):
        for step, passes in run.steps():
            for batch in passes:
                z, generators = batch["z"].to(args.device), batch["generators"]
                with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
                    losses = flow_step(dit, z, captions(batch["picks"], generators), generators, args.shift)
                run.backward(losses)
            if run.update(learning_rate(step, args.steps, args.lr, args.warmup)):
                draw_samples(run.sheet, dit, text, names[-6:], latent_shape(files[-1]), args)

    summary = run.summary()
    if training < len(files):
        def step_of(item, generators):
            z, caption = item["z"].to(args.device), captions([files.index(item["file"])])
            return flow_step(dit, z, caption, generators, args.shift)
        summary["held_out_mse"] = held_out_mse(step_of, files[training:])
    if is_first():
        write_base(args, both, text)
    finish(folder, summary, "python", "train_vae.py", args.data, "--base", args.out, "--out", args.out)


@torch.no_grad()
def draw_samples(path: Path, dit, text, prompts: list[str], shape: tuple, args) -> None:
    """What the base makes of some prompts in eight steps, the prompts beside it."""
    vae = load_vae(find_vae(args.base), device=args.device)
    noise = sample_noise(shape, [sample_generator(args.seed, 0, -2 - i) for i in range(len(prompts))]).to(args.device)
    *_, (_, z) = euler(lambda z, t: dit(z, t, text(prompts)), noise, shifted_sigmas(8, args.shift))
    contact_sheet(path, [to_clip(video) for video in vae.decode(z)])
    save_text(path.with_suffix(".txt"), "\n".join(prompts))


def write_base(args, both, text: TextEncoder) -> None:
    out = Path(args.out)
    save_tensors(out / "diffusion_pytorch_model.safetensors", stored(both["dit"].state_dict(), args.half))
    save_tensors(out / "models_t5_umt5-xxl-enc-bf16.safetensors", stored(both["text"].state_dict(), args.half))
    find_tokenizer(out).parent.mkdir(parents=True, exist_ok=True)
    text.tokenizer.save(str(find_tokenizer(out)))
    mean = round(mean_for_grid(args.frames, *args.size[::-1]), 2) if args.mean is None else args.mean
    section = dict(size=[*args.size], frames=args.frames, fps=16, steps=4, shift=args.shift, guidance=1.0,
                   mean=mean, vae_adapter="Wan-Alpha-v2-VAE.safetensors", dora="t2v.safetensors")
    described = dict(_class_name="WanModel", model_type="t2v") | asdict(both["dit"].config)
    save_json(out / "config.json", described | dict(generate=section))     # it names what the two trainings will add


def make_parser() -> Parser:
    parser = Parser(prog="kit.pretrain", description="Train a base VAE, or a base transformer and its text encoder.")
    stages = parser.add_subparsers(dest="stage", required=True, parser_class=Parser)
    vae, dit = (stages.add_parser(name, help=what) for name, what in (
        ("vae", "the VAE"), ("dit", "text encoder and transformer, on the VAE of --base")))
    for stage in (vae, dit):
        stage.add_argument("data", help="folder of captioned RGBA clips")
        stage.add_argument("--out", default="base", metavar="DIR", help="the checkpoint folder to write [base]")
    add = vae.add_argument_group("the model").add_argument
    add("--schedule", default="3000:1:40:64,1600:5:40:16,500:17:64:6", metavar="S:F:P:B,...",
        help="phases of S steps, F frames, crops of P pixels, batch B [3000:1:40:64,1600:5:40:16,500:17:64:6]")
    add("--size", type=positive, metavar="N", help="pixels of a clip's shorter side [1 to 2 times the crop, random]")
    add("--dim", type=positive, default=16, metavar="D", help="channels at full resolution [16; Wan: 96]")
    add("--res-blocks", type=positive, default=1, metavar="N", help="residual blocks a level [1; Wan: 2]")
    add = dit.add_argument_group("the model").add_argument
    add("--base", metavar="DIR", help="folder with the VAE [--out]")
    add("--cache", default="runs/cache", metavar="DIR", help="encoded latents [runs/cache]")
    add("--size", type=pixels, default=(64, 64), metavar="WxH", help="area of the clips [64]")
    add("--frames", type=clip_frames, default=17, metavar="N", help="of a clip, 4k+1 [17]")
    add("--steps", type=positive, default=3000, metavar="N", help="[3000]")
    add("--batch", type=positive, default=32, metavar="B", help="latents a step [32]")
    add("--dim", type=positive, default=192, metavar="D", help="width of the transformer [192]")
    add("--heads", type=positive, default=6, metavar="N", help="[6]")
    add("--layers", type=positive, default=6, metavar="N", help="its blocks [6]")
    add("--text-dim", type=positive, default=128, metavar="D", help="width of the text encoder [128]")
    add("--text-layers", type=positive, default=2, metavar="N", help="its blocks [2]")
    add("--text-len", type=positive, default=64, metavar="N", help="tokens of a prompt at most [64]")
    add("--shift", type=number(0.01, 1000), default=5.0, metavar="K", help="of the noise levels [5]")
    add("--mean", type=number(-10, 10), metavar="MU", help="the mu that config.json will name [0.05 as it counts on "
        "this grid, by sampler.mean_for_grid: 1.01 for 17 frames of 64 x 64]")
    for stage in (vae, dit):
        add_run_flags(stage)
    return parser


def run_vae(args) -> None:
    phases = parse_schedule(args.schedule)
    largest, frames = max(side for _, _, side, _ in phases), max(frames for _, frames, _, _ in phases)
    if args.size and args.size < largest:
        raise ValueError(f"--size {args.size} must be no smaller than the schedule's largest side, {largest}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    begin(args, batch_sizes(phases))
    train_vae(args, open_data(args.data, args.size or largest, frames, args.workers, opaque=True), phases)


def run_dit(args) -> None:
    if args.dim % (2 * args.heads) or args.text_dim % 4:
        raise ValueError(f"--dim {args.dim} must be a multiple of twice --heads {args.heads}, --text-dim of 4")
    begin(args, [args.batch])
    train_dit(args, open_data(args.data, args.size[::-1], args.frames, args.workers, opaque=True, keep_aspect=True))


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    args.base = getattr(args, "base", None) or args.out
    dict(vae=run_vae, dit=run_dit)[args.stage](args)
    end_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.pretrain"))
