"""Speed and memory on this machine, measured, with random weights of the real sizes: nothing to download.

    python -m kit.bench load                    both adapters merged while loading, beside the official procedure
    python -m kit.bench forward 14B             passes of the transformer
    python -m kit.bench clip 14B --offload      a clip without text and files: sampling, then both decoders
    python -m kit.bench train 14B --blocks 1    a training step of a DoRA; what a block keeps, what all would take

A row holds seconds and peaks in MiB: of host memory, with Python and PyTorch; of what PyTorch allocated on the GPU.
dtype: the models are held in --dtype, as `load_dit` does it, but the decoders in float32 on the CPU.
"""
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dit import Block, DiTConfig, WAN_14B, WAN_1_3B, WanDiT, open_dit
from dora import adapter_state, add_dora, merge_adapter
from kit.command import Parser, check_device, clip_frames, free_memory, measured, pixels, positive, run_command
from kit.files import Checkpoint, find_dit, read_checkpoint, save_json, save_tensors
from kit.memory import dit_memory, latent_size, training_memory
from kit.scale import checkpoint_blocks, load_scaled, place_dit
from merge import RGBAVAE
from sampler import euler, shifted_sigmas
from vae import VAEConfig, WanVAE

TINY = DiTConfig(dim=96, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16)
SIZES = {"tiny": (TINY, VAEConfig(dim=8)), "1.3B": (WAN_1_3B, VAEConfig()), "14B": (WAN_14B, VAEConfig())}
ADAPTERS = "dora.safetensors", "lightx2v.safetensors"
COLUMNS = dict(seconds="seconds", host_mib="host MiB", device_mib="GPU MiB")


def show(what: str, **row) -> None:
    print(f"{what:42}" + "".join(f"{row.get(column, '-'):>12}" for column in COLUMNS), flush=True)


@contextmanager
def row_of(what: str, device: str) -> Iterator[dict]:
    with measured({}, what, device) as row:
        yield row
    show(what, **row)


def on_meta(kind: type, *arguments) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(*arguments)


def random_tensors(meta: dict, device="cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """Float32, one by one. Gains and magnitudes are near 1, rows of matrices about 1 long."""
    for name, like in meta.items():
        gain = "magnitude" in name or name.endswith("gamma") or (name.endswith(".weight") and like.ndim == 1)
        spread = 0.1 if gain or like.ndim == 1 else like[0].numel() ** -0.5
        x = torch.randn(like.shape, device=device).mul_(spread)
        yield name, x.add_(1) if gain else x


def checkpoint_meta(config: DiTConfig) -> tuple[dict, dict, dict]:
    """Names and shapes of Wan's tensors, of Wan-Alpha's DoRA and of LightX2V's LoRA, biases and norms."""
    model, light = on_meta(WanDiT, config), {}
    base = model.state_dict()
    for name, p in base.items():
        layer, _, parameter = name.rpartition(".")
        if p.ndim == 2:
            light[f"diffusion_model.{layer}.lora_down.weight"] = p.new_empty(64, p.shape[1])
            light[f"diffusion_model.{layer}.lora_up.weight"] = p.new_empty(p.shape[0], 64)
        elif p.ndim == 1:
            light[f"diffusion_model.{layer}.{'diff_b' if parameter == 'bias' else 'diff'}"] = p
    return base, adapter_state(add_dora(model, 32, 32, r"blocks\..+")), light


def write_checkpoint(folder: Path, config: DiTConfig) -> None:
    """Wan's layout, float32, a shard a block, and both adapters."""
    base, dora, light = checkpoint_meta(config)
    shards = {name: f"diffusion_pytorch_model-{name.split('.')[1]}.safetensors" for name in base}
    for shard in set(shards.values()):
        part = {name: p for name, p in base.items() if shards[name] == shard}
        save_tensors(folder / shard, dict(random_tensors(part)))
    save_json(folder / "diffusion_pytorch_model.safetensors.index.json", dict(weight_map=shards))
    save_tensors(folder / ADAPTERS[0], dict(random_tensors(dora)))
    save_tensors(folder / ADAPTERS[1], {name: x.bfloat16() for name, x in random_tensors(light)})
    save_json(folder / "config.json", dict(_class_name="WanModel", model_type="t2v") | asdict(config))


def load_official(folder: Path, adapters: list, dtype: torch.dtype, device: str) -> WanDiT:
    """As commit 5804410: the whole model in float32, for each adapter a state dict of new tensors, last the cast."""
    model = open_dit(folder)[0].to_empty(device="cpu")
    model.load_state_dict(Checkpoint(*find_dit(folder)).read())
    for file, scale in adapters:
        model.load_state_dict(merge_adapter(model.state_dict(), read_checkpoint(file)[0], scale))
    return model.to(device, dtype)


@torch.inference_mode()
def measure_load(name: str, load, folder: Path, args) -> None:
    with row_of(name, args.device):
        load(folder, [(folder / file, 1.0) for file in ADAPTERS], args.dtype, args.device)


def bench_load(args) -> None:
    """As generate.py loads, and the official procedure if it fits, each in a new process: its peaks are its own."""
    ways = dict(load_scaled=partial(load_scaled, offload=args.offload, fp8=args.fp8))
    if 8 * sum(p.numel() for p in on_meta(WanDiT, args.config).parameters()) < free_memory("cpu"):
        ways["load_official"] = load_official
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        write_checkpoint(Path(folder), args.config)
        for name, load in ways.items():
            pool.submit(measure_load, name, load, Path(folder), args).result()


def random_dit(args) -> tuple[WanDiT, torch.Tensor, torch.Tensor]:
    """With z (1 c t h w) and a context (1 l d), float32. ValueError if the host has no room; a GPU says so itself."""
    config, grid = args.config, latent_size(args)
    need = sum(dit_memory(config, math.prod(grid) // math.prod(config.patch_size), args.dtype, args.offload, args.fp8))
    if args.device == "cpu" and need > free_memory("cpu"):
        raise ValueError(f"this takes {need / 1e9:.1f} GB of memory on cpu, more than is free; give fewer --blocks")
    with row_of("transformer: random weights", args.device):
        model = on_meta(WanDiT, config)
        tensors = random_tensors(model.state_dict(), args.device)
        model = place_dit(model, tensors, args.dtype, args.device, offload=args.offload, fp8=args.fp8)
    z = torch.randn(1, config.in_dim, *grid, device=args.device)
    return model, z, torch.randn(1, config.text_len, config.text_dim, device=args.device)


def bench_forward(args) -> torch.Tensor:
    model, z, context = random_dit(args)
    steps = euler(lambda z, t: model(z, t, context), z, shifted_sigmas(args.steps))
    for i in range(args.steps):
        with row_of(f"transformer: pass {i + 1} of {args.steps}", args.device):
            _, z = next(steps)
    return z


def bench_clip(args) -> None:
    z = bench_forward(args)
    dtype = torch.float32 if args.device == "cpu" else args.dtype
    with row_of("decoders: random weights", args.device):
        rgba = on_meta(RGBAVAE, on_meta(WanVAE, args.vae))
        tensors = random_tensors(rgba.state_dict(), args.device)
        rgba.load_state_dict({name: x.to(dtype) for name, x in tensors}, assign=True)
    for name, decoder in (("colour", rgba.vae_fgr), ("alpha", rgba.vae_pha)):
        with row_of(f"decoders: {name}", args.device):
            for piece in decoder.decode_stream(z.to(dtype)):
                (127.5 * (piece.float() + 1)).round().clamp(0, 255).byte().cpu()


def saved_bytes(block: Block, config: DiTConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a block keeps for backward, each storage once, beside the tokens and their rotation."""
    d, saved = config.dim, []
    shapes = (1, tokens, d), (1, 6, d), (1, config.text_len, d), (2, tokens, d // config.num_heads // 2)
    x, e, context, rope = (torch.randn(shape, device=block.modulation.device) for shape in shapes)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, saved.append):
        block(x.requires_grad_(), e, context.to(dtype), rope)
    kept = {k.untyped_storage().data_ptr(): k.untyped_storage().nbytes() for k in (x, rope, *saved)}
    return sum(kept.values()) - x.nbytes - rope.nbytes


def bench_train(args) -> None:
    """A DoRA of rank 32, every block computed again in backward; estimates of all blocks, 81 frames of 832x480."""
    model, z, context = random_dit(args)
    add_dora(model, 32, 32, r"blocks\..+")
    fewer, more = (saved_bytes(model.blocks[0], args.config, tokens, args.dtype) for tokens in (512, 1024))
    show(f"a block keeps {(more - fewer) // 512:,} bytes a token")
    checkpoint_blocks(model, Block)
    for i in range(args.steps):
        with row_of(f"training: step {i + 1} of {args.steps}", args.device):
            model.zero_grad()
            model(z, torch.full((1,), 500.0, device=args.device), context).square().mean().backward()
    ways = {"1 GPU": {}, "1 GPU, offload": dict(offload=True), "8 GPUs, shard": dict(ranks=8, shard=True)}
    for gpus, way in ways.items():
        mib = {k: n // 2 ** 20 for k, n in training_memory(SIZES[args.model][0], 21 * 30 * 52, **way).items()}
        show(f"{args.model} in all, {gpus}: an estimate", host_mib=mib["host"], device_mib=mib["total"])


COMMANDS = dict(load=bench_load, forward=bench_forward, clip=bench_clip, train=bench_train)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m kit.bench", description="Measure speed and memory with random weights.")
    flag = parser.add_argument
    flag("command", choices=COMMANDS, help="load writes a checkpoint first, 1.3B: 6 GB, where TMPDIR says")
    flag("model", nargs="?", choices=SIZES, default="1.3B", help="[1.3B]; tiny is a dry run")
    flag("--blocks", type=positive, metavar="N", help="only so many blocks of the transformer [all]")
    flag("--size", type=pixels, metavar="WxH", help="in pixels, multiples of 16 [416x240; clip 832x480]")
    flag("--frames", type=clip_frames, metavar="N", help="4k+1 [17; clip 81]")
    flag("--steps", type=positive, metavar="N", help="passes or steps; a GPU warms up in the first [1; clip 4]")
    flag("--offload", action="store_true", help="stream the blocks from host memory")
    flag("--fp8", action="store_true", help="linear weights of the blocks in 8 bits")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the models [bfloat16]")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda where there is one]")
    args = parser.parse_intermixed_args(argv)
    size, frames, steps = ((832, 480), 81, 4) if args.command == "clip" else ((416, 240), 17, 1)
    args.size, args.frames, args.steps = args.size or size, args.frames or frames, args.steps or steps
    check_device(args.device)
    if args.command == "train" and (args.offload or args.fp8):
        raise ValueError("train goes with neither --offload nor --fp8")
    config, args.vae = SIZES[args.model]
    args.config = replace(config, num_layers=args.blocks or config.num_layers)
    args.dtype = getattr(torch, args.dtype)
    gpu = f"{torch.cuda.get_device_name(args.device)}, " if torch.device(args.device).type == "cuda" else ""
    print(f"{gpu}{torch.get_num_threads()} threads of the CPU, torch {torch.__version__}")
    show("", **COLUMNS)
    with torch.inference_mode(args.command != "train"):
        COMMANDS[args.command](args)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.bench", "a smaller --size, fewer --frames or fewer --blocks"))
