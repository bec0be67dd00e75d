"""Speed and memory on this machine, measured, with random weights of the real sizes: nothing to download.

    python -m kit.bench load                    both adapters merged while loading, beside the official procedure
    python -m kit.bench forward 14B             passes of the transformer
    python -m kit.bench clip 14B --offload      a clip without text and files: sampling, then both decoders
    python -m kit.bench train 14B --blocks 1    a training step of a DoRA; what a block keeps, what all would take

A row holds seconds and peaks in MiB: of host memory; of its anonymous part, which leaves out mapped files, since the
system takes these back when it needs to; of what PyTorch allocated on the GPU. The anonymous peak is sampled every
10 ms. Both of the host count Python and PyTorch in. "-" where the system does not tell.

dtype: the transformer is held in --dtype as `load_dit` does it, the decoders too, but in float32 on the CPU.
"""
import argparse
import math
import multiprocessing
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from dit import Block, DiTConfig, WAN_14B, WAN_1_3B, WanDiT, load_dit, open_dit
from dora import adapter_state, add_dora, merge_adapter
from kit.command import Parser, check_device, free_memory, kernel_says, measured, pixels, positive, run_command
from kit.files import Checkpoint, find_dit, read_checkpoint, save_json, save_tensors
from kit.memory import dit_memory, training_memory
from kit.scale import checkpoint_blocks, load_scaled, place_dit
from merge import RGBAVAE
from sampler import euler, shifted_sigmas
from vae import VAEConfig, WanVAE

TINY = DiTConfig(dim=96, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16)
SIZES = {"tiny": (TINY, VAEConfig(dim=8)), "1.3B": (WAN_1_3B, VAEConfig()), "14B": (WAN_14B, VAEConfig())}
ADAPTERS = "dora.safetensors", "lightx2v.safetensors"
COLUMNS = dict(seconds="seconds", host_mib="host MiB", anonymous_mib="anonymous MiB", device_mib="GPU MiB")

# ---- rows


@contextmanager
def row_of(what: str, device: str) -> Iterator[dict]:
    """A row of the table, filled in after the block."""
    row, sizes, done = dict(what=what), [], threading.Event()

    def watch(ended=False):
        while not ended:
            ended = done.wait(0.01)
            sizes.append(kernel_says("/proc/self/status", "RssAnon") or 0)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with measured({}, what, device) as stage:
            yield row
    finally:
        done.set()
        watcher.join()
    row |= stage
    if any(sizes):
        row["anonymous_mib"] = max(sizes) // 2 ** 20


def line(row: dict) -> str:
    """A row as it is printed; the titles are one too."""
    return f"{row['what']:42}" + "".join(f"{row.get(column, '-'):>15}" for column in COLUMNS)


def machine(device: str) -> str:
    cpu = platform.processor()
    with suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    gpu = f"{torch.cuda.get_device_name(device)}, " if torch.device(device).type == "cuda" else ""
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def check_memory(args: argparse.Namespace, tokens: int, spare: float = 0) -> None:
    """ValueError unless the transformer fits, `tokens` of work and on the host `spare` bytes with it."""
    device, host = dit_memory(args.config, tokens, args.dtype, args.offload, args.fp8)
    if args.command == "train":
        device = training_memory(args.config, tokens)["total"]
    needs = {args.device: device, "cpu": host + spare}
    if args.device == "cpu":
        needs["cpu"] += device
    for place, need in needs.items():
        if need > free_memory(place):
            raise ValueError(f"the transformer takes about {need / 1e9:.1f} GB of memory on {place}, more than is "
                             "free; give fewer --blocks or --frames, a smaller --size, --offload or --fp8")


# ---- random weights, in memory and on disk


def on_meta(kind: type, *arguments) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(*arguments)


def random_tensors(meta: dict[str, Tensor], device="cpu") -> Iterator[tuple[str, Tensor]]:
    """Float32, one by one. Gains and magnitudes are near 1, rows of matrices about 1 long."""
    for name, like in meta.items():
        x = torch.randn(like.shape, device=device)
        if "magnitude" in name or name.endswith("gamma") or (name.endswith(".weight") and x.ndim == 1):
            yield name, 1 + 0.1 * x
        else:
            yield name, x.mul_(0.1 if x.ndim == 1 else x[0].numel() ** -0.5)


def checkpoint_meta(config: DiTConfig) -> tuple[dict, dict, dict]:
    """Wan's tensors; of Wan-Alpha's DoRA, rank 32: every matrix of the blocks, in peft's names; of LightX2V's LoRA,
    rank 64: every matrix, bias and norm, but neither modulation nor the patch kernel. Names and shapes alone."""
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
    """Wan's layout, float32, a shard a block, and both adapters; config.json last: a folder that has it is complete."""
    base, dora, light = checkpoint_meta(config)
    shards = {name: f"diffusion_pytorch_model-{name.split('.')[1]}.safetensors" for name in base}
    for shard in set(shards.values()):
        part = {name: p for name, p in base.items() if shards[name] == shard}
        save_tensors(folder / shard, dict(random_tensors(part)))
    save_json(folder / "diffusion_pytorch_model.safetensors.index.json", dict(weight_map=shards))
    save_tensors(folder / ADAPTERS[0], dict(random_tensors(dora)))
    save_tensors(folder / ADAPTERS[1], {name: x.bfloat16() for name, x in random_tensors(light)})
    save_json(folder / "config.json", dict(_class_name="WanModel", model_type="t2v") | asdict(config))


# ---- load


def load_official(folder: Path, adapters: list, dtype: torch.dtype, device: str) -> WanDiT:
    """The procedure of the official code (commit 5804410): the whole model in float32; for each adapter a state dict of
    new tensors, loaded back; last the cast of everything."""
    model = open_dit(folder)[0].to_empty(device="cpu")
    model.load_state_dict(Checkpoint(*find_dit(folder)).read())
    for file, scale in adapters:
        model.load_state_dict(merge_adapter(model.state_dict(), read_checkpoint(file)[0], scale))
    return model.to(device, dtype)


@torch.inference_mode()
def measure_load(load, folder: Path, dtype: torch.dtype, device: str, how: dict) -> dict:
    adapters = [(folder / file, 1.0) for file in ADAPTERS]
    with row_of(load.__name__, device) as row:
        load(folder, adapters, dtype, device, **how)
    return row


def alone(function, *args):
    """What the function returns in a new process, whose memory is nobody else's."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenExecutor:
        raise ValueError("the measuring process was ended from outside, most likely for lack of memory") from None


def bench_load(args: argparse.Namespace) -> Iterator[dict]:
    """Each way in a process of its own: `load_dit`, unless a flag asks for what it cannot; `load_scaled`, which
    generate.py calls; the official procedure, where it fits."""
    official, free = 8 * sum(p.numel() for p in on_meta(WanDiT, args.config).parameters()) + 1.5e9, free_memory("cpu")
    check_memory(args, 0, 1.5e9)
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            write_checkpoint(folder, args.config)
        if not (folder / "config.json").is_file() or open_dit(folder)[0].config != args.config:
            raise ValueError(f"{folder} holds no finished checkpoint of this size by kit.bench; give an empty --folder")
        common = folder, args.dtype, args.device
        if not (args.offload or args.fp8):
            yield alone(measure_load, load_dit, *common, {})
        yield alone(measure_load, load_scaled, *common, dict(offload=args.offload, fp8=args.fp8))
        if official < free:
            yield alone(measure_load, load_official, *common, {})
        else:
            yield dict(what=f"load_official: not run, {official / 1e9:.0f} GB")


# ---- forward and clip


def random_dit(args: argparse.Namespace) -> WanDiT:
    model = on_meta(WanDiT, args.config)
    tensors = random_tensors(model.state_dict(), args.device)
    return place_dit(model, tensors, args.dtype, args.device, offload=args.offload, fp8=args.fp8)


def random_inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """z (1 c t h w) and a context (1 l d), float32. ValueError if the transformer would find no room for them."""
    config, grid = args.config, ((args.frames + 3) // 4, args.size[1] // 8, args.size[0] // 8)
    check_memory(args, math.prod(grid) // math.prod(config.patch_size))
    return (torch.randn(1, config.in_dim, *grid, device=args.device),
            torch.randn(1, config.text_len, config.text_dim, device=args.device))


def bench_transformer(args: argparse.Namespace) -> Generator[dict, None, Tensor]:
    """Passes of the transformer, each an Euler step; returns z."""
    z, context = random_inputs(args)
    with row_of("transformer: random weights", args.device) as row:
        model = random_dit(args)
    yield row
    steps = euler(lambda z, t: model(z, t, context), z, shifted_sigmas(args.steps))
    for i in range(args.steps):
        with row_of(f"transformer: pass {i + 1} of {args.steps}", args.device) as row:
            _, z = next(steps)
        yield row
    return z


def bench_clip(args: argparse.Namespace) -> Iterator[dict]:
    z = yield from bench_transformer(args)
    dtype = torch.float32 if args.device == "cpu" else args.dtype
    with row_of("decoders: random weights", args.device) as row:
        rgba = on_meta(RGBAVAE, on_meta(WanVAE, args.vae))
        tensors = random_tensors(rgba.state_dict(), args.device)
        rgba.load_state_dict({name: x.to(dtype) for name, x in tensors}, assign=True)
    yield row
    for name, decoder in (("colour", rgba.vae_fgr), ("alpha", rgba.vae_pha)):
        with row_of(f"decoders: {name}", args.device) as row:
            for piece in decoder.decode_stream(z.to(dtype)):
                (127.5 * (piece.float() + 1)).round().clamp(0, 255).byte().cpu()
        yield row


# ---- train


def saved_bytes(block: Block, config: DiTConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a block keeps for backward, each storage once, beside its parameters and its inputs."""
    d, kept = config.dim, {}
    shapes = (1, tokens, d), (1, 6, d), (1, config.text_len, d), (2, tokens, d // config.num_heads // 2)
    x, e, context, rope = (torch.randn(shape, device=block.modulation.device) for shape in shapes)
    inputs = x.requires_grad_(), e, context.to(dtype), rope

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        block(*inputs)
    for x in (*inputs, *block.parameters()):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def bench_train(args: argparse.Namespace) -> Iterator[dict]:
    """Forward and backward with a rank-32 DoRA, every block computed again in backward; then what `training_memory`
    expects of all blocks and 81 frames of 832x480 on one GPU; for other ways see there."""
    z, context = random_inputs(args)
    with row_of("training: random weights, DoRA", args.device) as row:
        model = add_dora(random_dit(args), 32, 32, r"blocks\..+")
    yield row
    fewer, more = (saved_bytes(model.blocks[0], args.config, tokens, args.dtype) for tokens in (512, 1024))
    yield dict(what=f"a block keeps {(more - fewer) // 512:,} bytes a token")
    checkpoint_blocks(model, Block)
    for i in range(args.steps):
        with row_of(f"training: step {i + 1} of {args.steps}", args.device) as row:
            model.zero_grad()
            model(z, torch.full((1,), 500.0, device=args.device), context).square().mean().backward()
        yield row
    whole = training_memory(SIZES[args.model][0], 21 * 30 * 52)["total"]
    yield dict(what=f"{args.model} in all, 1 GPU: an estimate", device_mib=whole // 2 ** 20)


# ---- the command

COMMANDS = dict(load=bench_load, forward=bench_transformer, clip=bench_clip, train=bench_train)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """With all that the command line left open. ValueError for what does not go."""
    parser = Parser(prog="python -m kit.bench", description="Measure speed and memory with random weights.")
    flag = parser.add_argument
    flag("command", choices=COMMANDS, help="write a checkpoint (1.3B: 6 GB) and load it; the transformer alone; "
         "sampling and both decoders; training steps of a rank-32 DoRA")
    flag("model", nargs="?", choices=SIZES, default="1.3B", help="[1.3B]; tiny is a dry run")
    flag("--blocks", type=positive, metavar="N", help="only so many blocks of the transformer [all]")
    flag("--size", type=pixels, metavar="WxH", help="in pixels, multiples of 16 [416x240; clip 832x480]")
    flag("--frames", type=positive, metavar="N", help="4k+1 [17; clip 81]")
    flag("--steps", type=positive, metavar="N", help="passes or steps; a GPU warms up in the first [1; clip 4]")
    flag("--offload", action="store_true", help="stream the blocks from host memory")
    flag("--fp8", action="store_true", help="linear weights of the blocks in 8 bits")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the models [bfloat16]")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda where there is one]")
    flag("--folder", type=Path, metavar="DIR", help="where `load` writes its files and leaves them [temporary]")
    flag("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_intermixed_args(argv)
    size, frames, steps = ((832, 480), 81, 4) if args.command == "clip" else ((416, 240), 17, 1)
    args.size, args.frames, args.steps = args.size or size, args.frames or frames, args.steps or steps
    check_device(args.device)
    if args.command == "train" and (args.offload or args.fp8):
        raise ValueError("train goes with neither --offload nor --fp8")
    if args.frames % 4 != 1 or any(side % 16 for side in args.size):
        raise ValueError(f"--frames {args.frames} must be 4k+1 and both sides of --size multiples of 16")
    config, args.vae = SIZES[args.model]
    args.config = replace(config, num_layers=args.blocks or config.num_layers)
    args.dtype = getattr(torch, args.dtype)
    return args


def main(argv: list[str] | None = None) -> None:
    """Prints each row once it is known; all of them go to --json."""
    args, rows = parse_args(argv), []
    print(machine(args.device), line(dict(what="") | COLUMNS), sep="\n", flush=True)
    with torch.inference_mode(args.command != "train"):
        for row in COMMANDS[args.command](args):
            print(line(row), flush=True)
            rows.append(row)
    if args.json:
        save_json(args.json, dict(machine=machine(args.device), arguments=vars(args), rows=rows))


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.bench", "a smaller --size, fewer --frames or fewer --blocks"))
