"""Speed and memory on this machine, measured, with random weights of the real sizes: nothing to download.

    python bench.py --load                  both adapters merged while loading, beside the official procedure
    python bench.py --forward 14B           one pass of the transformer
    python bench.py --clip 14B --offload    a clip without text and files: sampling, then both decoders
    python bench.py --train 14B --blocks 1  a training step of a DoRA; what a block keeps, what the whole 14B would take

A row holds seconds; the peak of host memory; how much of it was anonymous, that is, no page of a mapped file, which
the system takes back when it needs it; the peak of GPU memory. GB are 10^9 bytes. The first peak is the kernel's own,
the anonymous one is sampled every 10 ms; both count Python and PyTorch in, and are "-" where there is no /proc. The
GPU's is what PyTorch allocated there.

Letters: c channels, t frames, h height, w width, l text tokens, d width of a context, o output rows, i inputs, r rank.
dtype: the transformer is held in --dtype as `load_dit` does it, the decoders too, but in float32 on the CPU.
"""
import argparse
import gc
import json
import math
import multiprocessing
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data import save_text
from dit import Block, DiTConfig, WAN_14B, WAN_1_3B, WanDiT, load_dit, open_dit, read_json
from dora import add_dora
from generate import NO_MEMORY, Parser, pixels, raise_first, to_bytes
from merge import RGBAVAE
from sampler import euler, shifted_sigmas
from scale import checkpoint_blocks, dit_memory, free_memory, load_scaled, place_dit, training_memory
from vae import VAEConfig, WanVAE

TINY = DiTConfig(dim=96, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16)
SIZES = {"tiny": (TINY, VAEConfig(dim=8)), "1.3B": (WAN_1_3B, VAEConfig()), "14B": (WAN_14B, VAEConfig())}
ADAPTERS = "dora.safetensors", "lightx2v.safetensors"
COLUMNS = {"seconds": "seconds", "host": "host GB", "anonymous": "anonymous GB", "gpu": "GPU GB"}


def status(field: str) -> float | None:
    """A field of /proc/self/status, such as VmHWM, in GB; None where there is no such file."""
    try:
        return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / 1e9
    except (OSError, TypeError):
        return None


@contextmanager
def measured(what: str, device: str) -> Iterator[dict]:
    """Yields a row, filled in after the block. Not by ru_maxrss: a new process inherits that of its parent."""
    row, anonymous, done = dict(what=what), [status("RssAnon")], threading.Event()

    def watch():
        while not done.wait(0.01):
            anonymous.append(status("RssAnon"))
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")       # VmHWM starts anew
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield row
        if device == "cuda":
            torch.cuda.synchronize()
        row["seconds"] = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    row["host"], row["anonymous"] = status("VmHWM"), max(filter(None, [*anonymous, status("RssAnon")]), default=None)
    row["gpu"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def alone(function, *args):
    """What the function returns in a new process, whose memory is nobody else's."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise ValueError("the measuring process was ended from outside, most likely for lack of memory") from None


def line(row: dict) -> str:
    cells = [f"{row[key]:.2f}" if isinstance(row.get(key), float) else row.get(key) or "-" for key in COLUMNS]
    return f"{row['what']:38}" + "".join(f"{cell:>14}" for cell in cells)


def machine(device: str) -> str:
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def check_room(what: str, need: float, free: float, where: str, instead: str) -> None:
    if need > free:
        raise ValueError(f"{what} takes about {need / 1e9:.1f} GB of {where}, but {free / 1e9:.1f} are free; {instead}")


def check_memory(args: argparse.Namespace, tokens: int, spare: float = 0) -> None:
    """ValueError unless the transformer fits, `tokens` of work and on the host `spare` bytes with it."""
    device, host = dit_memory(args.config, tokens, args.dtype, args.offload, args.fp8)
    device = training_memory(args.config, tokens)["total"] if args.train else device
    host += spare
    for place, need in (dict(cpu=device + host) if args.device == "cpu" else dict(cuda=device, cpu=host)).items():
        check_room("the transformer", need, free_memory(place), f"memory on {place}",
                   "give fewer --blocks or --frames, a smaller --size, --offload or --fp8")


# ---- random weights, in memory and on disk


def random_tensor(name: str, shape: tuple, generator: torch.Generator) -> Tensor:
    """Float32, on the generator's device. Gains and magnitudes are near 1, rows of matrices about 1 long."""
    x = torch.randn(shape, generator=generator, device=generator.device)
    if "magnitude" in name or name.endswith("gamma") or (name.endswith(".weight") and len(shape) == 1):
        return x.mul_(0.1).add_(1)
    return x.mul_(0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)


def meta_dit(config: DiTConfig) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config)


def checkpoint_shapes(config: DiTConfig) -> tuple[dict, dict, dict]:
    """Names and shapes of Wan's tensors; of Wan-Alpha's DoRA, rank 32: every matrix of the blocks, in peft's names; and
    of LightX2V's LoRA, rank 64: every matrix, bias and norm, but neither modulation nor the patch kernel."""
    base, dora, light = {name: tuple(p.shape) for name, p in meta_dit(config).state_dict().items()}, {}, {}
    for name, shape in base.items():
        layer, _, field = name.rpartition(".")
        if len(shape) == 2 and name.startswith("blocks."):
            for part, size in dict(A=(32, shape[1]), B=(shape[0], 32), magnitude_vector=shape[:1]).items():
                dora[f"{layer}.lora_{part}.default.weight"] = size
        if len(shape) == 2:
            light[f"diffusion_model.{layer}.lora_down.weight"] = (64, shape[1])
            light[f"diffusion_model.{layer}.lora_up.weight"] = (shape[0], 64)
        elif len(shape) == 1:
            light[f"diffusion_model.{layer}.{'diff_b' if field == 'bias' else 'diff'}"] = shape
    return base, dora, light


def count(shapes: dict) -> int:
    return sum(map(math.prod, shapes.values()))


def write_tensors(path: Path, shapes: dict, dtype: torch.dtype) -> None:
    """A .safetensors file of random tensors; one of them at a time is in memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        header[name] = dict(dtype=kind, shape=shape, data_offsets=(start, end))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(random_tensor(name, shape, generator).to(dtype).flatten().view(torch.uint8).numpy())


def released_config(config: DiTConfig) -> dict:
    sizes = {name: value for name, value in asdict(config).items() if name not in ("text_dim", "patch_size")}
    return dict(_class_name="WanModel", model_type="t2v") | sizes


def write_checkpoint(folder: Path, config: DiTConfig) -> None:
    """Wan's layout, float32, in one file, and both adapters; config.json last: a folder that has it is complete."""
    base, dora, light = checkpoint_shapes(config)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", base, torch.float32)
    write_tensors(folder / ADAPTERS[0], dora, torch.float32)
    write_tensors(folder / ADAPTERS[1], light, torch.bfloat16)
    save_text(folder / "config.json", json.dumps(released_config(config)))


@contextmanager
def checkpoint_folder(args: argparse.Namespace) -> Iterator[Path]:
    """--folder, written if it is empty, or a temporary one. ValueError without space, or if it holds something else."""
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            base, dora, light = checkpoint_shapes(args.config)
            check_room("the checkpoint", 4 * count(base) + 4 * count(dora) + 2 * count(light),
                       shutil.disk_usage(folder).free, f"disk space at {folder}", "give another --folder")
            write_checkpoint(folder, args.config)
        file = folder / "config.json"
        if not file.is_file() or read_json(file) != released_config(args.config):
            raise ValueError(f"{folder} holds no finished checkpoint of this size by bench.py; give an empty --folder")
        yield folder


# ---- --load


def merge_plainly(state: dict, adapter: dict) -> dict:
    """W + B A, DoRA's rows then set to their magnitudes; weights and biases plus their differences. New tensors."""
    key, layers = re.compile(r"(?:diffusion_model\.)?(.+?)\.(lora_\w+|diff\w*)(?:\.default)?(?:\.weight)?"), {}
    for name, tensor in adapter.items():
        layer, part = key.fullmatch(name).groups()
        layers.setdefault(layer, {})[part] = tensor
    for layer, parts in layers.items():
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        for up, down in (("lora_B", "lora_A"), ("lora_up", "lora_down")):
            if up in parts:
                state[weight] = state[weight] + parts[up].float() @ parts[down].float()
        if "lora_magnitude_vector" in parts:
            norm = state[weight].norm(dim=1, keepdim=True)
            state[weight] = parts["lora_magnitude_vector"][:, None] / norm * state[weight]
        for name, part in ((weight, "diff"), (bias, "diff_b")):
            if part in parts:
                state[name] = state[name] + parts[part]
    return state


def load_official(folder: Path, dtype: torch.dtype, device: str) -> WanDiT:
    """The procedure of the official code (commit 5804410): the whole model in float32; for each adapter a state dict of
    new tensors, loaded back; last the cast of everything."""
    model = open_dit(folder)[0].to_empty(device="cpu")
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    for file in ADAPTERS:
        model.load_state_dict(merge_plainly(model.state_dict(), load_file(folder / file)))
    return model.to(device, dtype)


def load_here(folder: Path, dtype: torch.dtype, device: str, **how) -> WanDiT:
    return (load_scaled if how else load_dit)(folder, [(folder / file, 1.0) for file in ADAPTERS], dtype, device, **how)


@torch.inference_mode()
def measure_load(what: str, load, folder: Path, dtype: torch.dtype, device: str, how: dict) -> dict:
    with measured(what, device) as row:
        load(folder, dtype, device, **how)
    return row


def bench_load(args: argparse.Namespace) -> Iterator[dict]:
    """Each way in a process of its own: `load_dit`, unless a flag asks for what it cannot; `load_scaled`, which
    generate.py calls; the official procedure, where it fits."""
    how = dict(offload=args.offload, fp8=args.fp8)
    official, free = 8 * count(checkpoint_shapes(args.config)[0]) + 1.5e9, free_memory("cpu")
    check_memory(args, 0, 1.5e9)
    with checkpoint_folder(args) as folder:
        common = folder, args.dtype, args.device
        if not any(how.values()):
            yield alone(measure_load, "load_dit", load_here, *common, {})
        yield alone(measure_load, "load_scaled", load_here, *common, how)
        if official < free:
            yield alone(measure_load, "official procedure", load_official, *common, {})
        else:
            yield dict(what=f"official procedure: not run, {official / 1e9:.0f} GB")


# ---- --forward and --clip


def random_inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """z (1 c t h w) and a context (1 l d), float32. ValueError if the transformer would find no room for them."""
    config, generator = args.config, torch.Generator(args.device).manual_seed(0)
    shape = 1, config.in_dim, (args.frames + 3) // 4, args.size[1] // 8, args.size[0] // 8
    check_memory(args, math.prod(shape[2:]) // math.prod(config.patch_size))
    return tuple(torch.randn(s, generator=generator, device=args.device)
                 for s in (shape, (1, config.text_len, config.text_dim)))


def random_dit(args: argparse.Namespace) -> WanDiT:
    model, generator = meta_dit(args.config), torch.Generator(args.device).manual_seed(0)
    tensors = ((name, random_tensor(name, p.shape, generator)) for name, p in model.state_dict().items())
    return place_dit(model, tensors, args.dtype, args.device, offload=args.offload, fp8=args.fp8)


def random_decoders(args: argparse.Namespace, dtype: torch.dtype) -> RGBAVAE:
    with torch.device("meta"):
        rgba = RGBAVAE(WanVAE(args.vae)).to(dtype)
    rgba, generator = rgba.to_empty(device=args.device), torch.Generator(args.device).manual_seed(0)
    for name, p in rgba.named_parameters():
        p.copy_(random_tensor(name, p.shape, generator))
    return rgba


def bench_transformer(args: argparse.Namespace) -> Generator[dict, None, Tensor]:
    """Passes of the transformer, each an Euler step; returns z."""
    z, context = random_inputs(args)
    with measured("transformer: random weights", args.device) as row:
        model = random_dit(args)
    yield row
    steps = euler(lambda z, t: model(z, t, context), z, shifted_sigmas(args.steps))
    for i in range(args.steps):
        with measured(f"transformer: pass {i + 1} of {args.steps}", args.device) as row:
            _, z = next(steps)
        yield row
    return z


def bench_decoders(args: argparse.Namespace, z: Tensor) -> Iterator[dict]:
    dtype = torch.float32 if args.device == "cpu" else args.dtype
    with measured("decoders: random weights", args.device) as row:
        rgba = random_decoders(args, dtype)
    yield row
    for decoder, to_unit in ((rgba.vae_fgr, lambda x: (x + 1) / 2), (rgba.vae_pha, rgba.to_alpha)):
        with measured(f"decoders: {'colour' if decoder is rgba.vae_fgr else 'alpha'}", args.device) as row:
            to_bytes(to_unit(piece.float()) for piece in decoder.decode_stream(z.to(dtype)))
        yield row


def bench_run(args: argparse.Namespace) -> Iterator[dict]:
    z = yield from bench_transformer(args)
    if args.clip:
        yield from bench_decoders(args, z)


# ---- --train


def saved_bytes(block: Block, config: DiTConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a block keeps for backward, each storage once, beside its parameters and its inputs."""
    def make(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, device=block.modulation.device)
    d, kept = config.dim, {}
    inputs = (make(1, tokens, d).requires_grad_(), make(1, 6, d), make(1, config.text_len, d, dtype=dtype),
              make(2, tokens, d // config.num_heads // 2))

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        block(*inputs)
    for x in (*inputs, *block.parameters()):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@torch.inference_mode(False)
def bench_train(args: argparse.Namespace) -> Iterator[dict]:
    """Forward and backward with a rank-32 DoRA, every block computed again in backward; then what `training_memory`
    expects of all blocks and 81 frames of 832x480."""
    z, context = random_inputs(args)
    with measured("training: random weights, DoRA", args.device) as row:
        model = add_dora(random_dit(args), 32, 32, r"blocks\..+")
    yield row
    fewer, more = (saved_bytes(model.blocks[0], args.config, tokens, args.dtype) for tokens in (512, 1024))
    yield dict(what=f"a block keeps {(more - fewer) // 512:,} bytes a token")
    checkpoint_blocks(model, Block)
    for i in range(args.steps):
        with measured(f"training: step {i + 1} of {args.steps}", args.device) as row:
            model.zero_grad()
            model(z, torch.full((1,), 500.0, device=args.device), context).square().mean().backward()
        yield row
    for what, way in (("1 GPU", {}), ("1 GPU, offload", dict(offload=True)),
                      ("8 GPUs, shard", dict(ranks=8, shard=True))):
        clip = training_memory(SIZES[args.train][0], 21 * 30 * 52, **way)
        yield dict(what=f"{args.train} in all, {what}: an estimate", gpu=clip["total"] / 1e9, host=clip["host"] / 1e9)


# ---- the command


def make_parser() -> Parser:
    parser = Parser(prog="bench.py", description="Measure speed and memory with random weights.")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--load", nargs="?", const="1.3B", choices=SIZES, help="write a checkpoint (1.3B: 6 GB) and load it [1.3B]")
    what("--forward", choices=SIZES, help="the transformer alone; tiny is a dry run")
    what("--clip", choices=SIZES, help="sampling and both decoders")
    what("--train", choices=SIZES, help="forward and backward of a DoRA, gradient checkpointing, rank 32")
    flag = parser.add_argument
    flag("--blocks", type=int, metavar="N", help="only so many blocks of the transformer [all]")
    flag("--size", type=pixels, metavar="WxH", help="in pixels, multiples of 16 [416x240; --clip 832x480]")
    flag("--frames", type=int, metavar="N", help="4k+1 [17; --clip 81]")
    flag("--steps", type=int, metavar="N", help="passes, or training steps; on a GPU the first warms up [1; --clip 4]")
    flag("--offload", action="store_true", help="stream the blocks from host memory")
    flag("--fp8", action="store_true", help="linear weights of the blocks in 8 bits")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the models [bfloat16]")
    flag("--device", choices=("cuda", "cpu"), help="[cuda where there is one]")
    flag("--folder", type=Path, metavar="DIR", help="where --load writes its files and leaves them [temporary]")
    flag("--json", type=Path, metavar="FILE", help="write the table there too")
    return parser


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """What the command line left open. ValueError for numbers out of range."""
    given = vars(args) | dict(dtype=getattr(torch, args.dtype))
    given["device"] = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = dict(size=(832, 480), frames=81, steps=4) if args.clip else dict(size=(416, 240), frames=17, steps=1)
    given |= {name: value for name, value in defaults.items() if given[name] is None}
    config, given["vae"] = SIZES[args.load or args.forward or args.clip or args.train]
    args = argparse.Namespace(**given)
    args.blocks = config.num_layers if args.blocks is None else args.blocks
    raise_first([
        (args.device == "cuda" and not torch.cuda.is_available(), "there is no CUDA device; use --device cpu"),
        (args.train and (args.offload or args.fp8), "--train goes with neither --offload nor --fp8"),
        (min(args.blocks, args.steps) < 1, "--blocks and --steps must be at least 1"),
        (args.frames < 1 or args.frames % 4 != 1, f"--frames {args.frames} is not 4k+1; give 1, 5, 9, ... frames"),
        (min(args.size) < 1 or any(side % 16 for side in args.size), "--size must be multiples of 16 pixels")])
    args.config = replace(config, num_layers=args.blocks)
    return args


@torch.inference_mode()
def bench(args: argparse.Namespace) -> list[dict]:
    """Measures what `make_parser` took, prints each row once it is known, returns them all."""
    args, rows = settle(args), []
    print(machine(args.device), line(dict(what="") | COLUMNS), sep="\n", flush=True)
    for row in (bench_load if args.load else bench_train if args.train else bench_run)(args):
        print(line(row), flush=True)
        rows.append(row)
    if args.json:
        arguments = {name: str(value) for name, value in vars(args).items()}
        record = dict(machine=machine(args.device), arguments=arguments, rows=rows)
        save_text(args.json, json.dumps(record, indent=1) + "\n")
    return rows


def main(argv: list[str] | None = None) -> None:
    try:
        bench(make_parser().parse_args(argv))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, sentence):
            sentence = "not enough memory; give a smaller --size, fewer --frames or fewer --blocks"
        elif isinstance(error, RuntimeError):
            raise
        print("bench.py:", sentence, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
