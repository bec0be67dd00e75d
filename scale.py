"""What serves scale and is not the method: a transformer with little memory or on many GPUs, and the training loop.

The first half wraps the transformer of dit.py from outside:

    --offload   blocks stay in host memory and stream through two buffers: one is filled while the other computes
    --fp8       the blocks' matrices are one byte a number, float8_e4m3fn, with one float32 scale a row
    torchrun    tokens are split over the processes; in self-attention they trade tokens for heads and back
                (Ulysses, arXiv 2309.14509): every process sees all tokens of its heads
    --shard     each process keeps its part of every block's matrices and gathers a block to compute it (FSDP2)

All of them put something in place of `dit.blocks` or of a layer inside, so one forward serves all. Streamed and
resident results are the same bits (test_streamed_blocks_give_the_same_bits); two processes equal one to 1e-5
(test_two_processes_equal_one); float8 is close (test_float8_is_close_and_one_byte).

The second half is `fit`, which runs all four trainings. Every step draws its random numbers from generators seeded with
(seed, step), those of the whole batch in every process, so that a run may be stopped, killed, resumed, cut into passes
or shared by processes and still makes the same steps (test_killed_ten_times_it_ends_with_the_same_bits,
test_processes_and_passes_train_as_one). Data parallel: each process has its share of the batch, gradients are averaged.
With --shard the frozen matrices are cut up as above, and gathered block by block.

Letters: b batch, n tokens, d width, a heads, p processes, o output rows, i inputs.
dtype: as in dit.py; a float8 product runs in the dtype of its input, and its rows are scaled after it.
"""
import argparse
import copy
import io
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import replacing, save_text
from dit import DiTConfig, WAN_14B, WanDiT, load_dit, open_dit, resident_dtype

try:
    import resource         # not on Windows
except ImportError:
    resource = None

LARGEST_FLOAT8 = 448.0      # of float8_e4m3fn


# ---- blocks that stream

class BlockStream(nn.ModuleList):
    """Blocks in host memory. Iterating yields them one by one in two buffers on the device, in turns; on a GPU the next
    block is copied while this one computes."""

    def __init__(self, blocks: Iterable[nn.Module], device):
        super().__init__(blocks)
        self.device = torch.device(device)
        self.slots = [copy.deepcopy(self[0]).to(self.device).requires_grad_(False) for _ in range(2)]   # not submodules

    def fill(self, i: int) -> None:
        tensors = ([*block.parameters(), *block.buffers()] for block in (self.slots[i % 2], self[i]))
        for place, tensor in zip(*tensors):
            place.copy_(tensor, non_blocking=True)

    def __iter__(self) -> Iterator[nn.Module]:
        if self.device.type == "cuda":
            yield from self.iterate_cuda()
        else:
            for i in range(len(self)):
                self.fill(i)
                yield self.slots[i % 2]

    def iterate_cuda(self) -> Iterator[nn.Module]:
        compute, copies = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        copies.wait_stream(compute)         # the call before this one may still compute in the buffers
        copied, used = {}, {}

        def start_copy(i):
            with torch.cuda.stream(copies):
                if i >= 2:
                    copies.wait_event(used[i - 2])
                self.fill(i)
                copied[i] = copies.record_event()
        start_copy(0)
        for i in range(len(self)):
            if i + 1 < len(self):
                start_copy(i + 1)
            compute.wait_event(copied[i])
            yield self.slots[i % 2]
            used[i] = compute.record_event()


class PinnedPages:
    """Empty host tensors that a GPU can copy from while it computes. They share pages of one size: PyTorch rounds
    pinned memory up to powers of two; tensor by tensor, that would make 41 GB of the 28 of a 14B."""

    def __init__(self, size: int = 2 ** 30, pin: bool = True):
        self.size, self.pin, self.free = size, pin, torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        length = math.prod(shape) * dtype.itemsize
        if length > len(self.free):
            self.free = torch.empty(max(self.size, length), dtype=torch.uint8, pin_memory=self.pin)
        piece, self.free = self.free[:length], self.free[-(-length // 256) * 256:]
        return piece.view(dtype).view(shape)


# ---- weights of one byte

def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (o i) as float8 with float32 scales (o 1): the largest number of each row becomes float8's largest."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FLOAT8
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


class FP8Linear(nn.Module):
    """nn.Linear whose matrix takes a byte a number; the product runs in the dtype of its input."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        shape, device = linear.weight.shape, linear.weight.device
        self.register_buffer("weight", torch.empty(shape, dtype=torch.float8_e4m3fn, device=device))
        self.register_buffer("scale", torch.empty(shape[0], 1, device=device))
        self.bias = linear.bias
        if not linear.weight.is_meta:
            for place, tensor in zip((self.weight, self.scale), quantize(linear.weight.detach())):
                place.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale[:, 0].to(x.dtype) + self.bias.to(x.dtype)


def use_fp8(module: nn.Module) -> nn.Module:
    """Every nn.Linear inside `module` becomes an `FP8Linear`, in place, quantised if it has numbers; returns it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, FP8Linear(child))
        else:
            use_fp8(child)
    return module


# ---- several processes

def start_process_group(device: str | None = None) -> tuple[int, int, str | None]:
    """This process's rank, the number of processes, and its device, as torchrun's environment says; (0, 1, None)
    without torchrun. A GPU each and NCCL, or gloo where there is none or `device` is cpu. ValueError: too few GPUs."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, None
    cuda, local = torch.cuda.is_available() and device != "cpu", int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs; give torchrun at most as many processes")
    device = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))     # one may prepare for hours
    return dist.get_rank(), dist.get_world_size(), device


def end_process_group() -> None:
    """All wait for each other, then part: one that left early would cut off what another still reads."""
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()


def ranks() -> tuple[int, int]:
    """This process's number and how many torchrun started; (0, 1) without it."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def processes() -> int:
    return ranks()[1]


def trade(x: Tensor) -> Tensor:
    """Part j of x (p ...) goes to process j; what comes from process j becomes part j."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


class SplitBlocks(nn.Module):
    """All blocks as one, each process on its share of the tokens. Takes and returns all tokens, as a block does."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks, self.tokens = blocks, 0
        for block in blocks.slots if isinstance(blocks, BlockStream) else blocks:
            block.self_attn.attend = self.attend

    def forward(self, x: Tensor, e: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        self.tokens, p = x.shape[1], dist.get_world_size()
        x, rope = (F.pad(y, (0, 0, 0, -self.tokens % p)).chunk(p, dim=1)[dist.get_rank()] for y in (x, rope))
        for block in self.blocks:
            x = block(x, e, context, rope)
        parts = [torch.empty_like(x) for _ in range(p)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)[:, :self.tokens]

    def attend(self, *qkv: Tensor) -> Tensor:
        """q, k, v (b a n/p d) -> (b a n/p d). Tokens that only fill up the last share are cut off before."""
        p = dist.get_world_size()
        q, k, v = (rearrange(trade(rearrange(y, "b (p a) n d -> p b a n d", p=p)), "p b a n d -> b a (p n) d")
                   [:, :, :self.tokens] for y in qkv)
        y = F.pad(F.scaled_dot_product_attention(q, k, v), (0, 0, 0, -self.tokens % p))
        return rearrange(trade(rearrange(y, "b a (p n) d -> p b a n d", p=p)), "p b a n d -> b (p a) n d")


def shard_block(block: nn.Module, training: bool = False) -> nn.Module:
    """The block with each process keeping its rows of the matrices; the few float32 parameters, and in training the
    adapters, stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard      # a second of imports, for this alone
    whole = {p for name, p in block.named_parameters()
             if training and p.requires_grad or resident_dtype(name, torch.bfloat16) == torch.float32}
    mesh = init_device_mesh(next(block.parameters()).device.type, (processes(),))
    return fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


# ---- loading

def place_dit(model: WanDiT, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32, device="cpu",
              offload: bool = False, fp8: bool = False, shard: bool = False, adapt=None) -> WanDiT:
    """Fills a model on the meta device with (name, tensor) pairs in the order of its state dict, one by one, ready to
    be called. Without offload, fp8 and shard, in one process, it is what `load_dit` makes. adapt: for training, gives
    a block its adapters; then every process runs the whole model, on a batch of its own."""
    check_ways(model.config, offload, fp8, shard, split=adapt is None)
    if fp8:
        use_fp8(model.blocks)
    shapes, pages = model.state_dict(), PinnedPages()
    for part, pairs in groupby(tensors, key=lambda pair: re.match(r"blocks\.\d+|", pair[0])[0]):
        host, state = bool(part) and offload, {}
        for name, tensor in pairs:
            if shapes[name].dtype == torch.float8_e4m3fn:
                scale = name.removesuffix("weight") + "scale"
                kinds = {name: torch.float8_e4m3fn, scale: torch.float32}
                values = quantize(tensor.to(device))
            else:
                kinds, values = {name: resident_dtype(name, dtype)}, [tensor]
            for (key, kind), value in zip(kinds.items(), values):
                state[key] = (pages.empty(value.shape, kind) if host and torch.device(device).type == "cuda" else
                              torch.empty(value.shape, dtype=kind, device="cpu" if host else device))
                state[key].copy_(value)
        model.load_state_dict(state, strict=False, assign=True)
        if part and adapt:
            adapt(model.get_submodule(part))
        if part and shard:
            shard_block(model.get_submodule(part), training=adapt is not None)
    if offload:
        model.blocks = BlockStream(model.blocks, device)
    if processes() > 1 and not adapt:
        model.blocks = nn.ModuleList([SplitBlocks(model.blocks)])
    return model


def load_scaled(path: str | Path, adapters=(), dtype: torch.dtype = torch.float32, device="cpu",
                offload: bool = False, fp8: bool = False, shard: bool = False) -> WanDiT:
    """`load_dit` for the ways above: path, adapters, dtype and errors are its own. ValueError too for ways that do not
    go together. Several processes (`start_process_group`) call it, and then the model, all together."""
    if not (offload or fp8 or shard) and processes() == 1:
        return load_dit(path, adapters, dtype, device)
    model, tensors = open_dit(path, adapters)
    return place_dit(model, tensors, dtype, device, offload, fp8, shard)


def check_ways(config: DiTConfig, offload: bool, fp8: bool, shard: bool, split: bool = True) -> None:
    if shard and (offload or fp8):
        raise ValueError("--shard keeps a part of each matrix on every GPU; it does not go with --offload or --fp8")
    if shard and processes() == 1:
        raise ValueError("--shard needs several processes: start it with torchrun --nproc_per_node=N")
    if split and config.num_heads % processes():
        raise ValueError(f"{config.num_heads} attention heads cannot be split over {processes()} processes; "
                         "start as many as divide them")


# ---- how much memory

def free_memory(device) -> int:
    """Bytes that are free now on a GPU, or that the system says a program can take from the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return sys.maxsize      # unknown outside Linux: taken as enough


def dit_memory(model: WanDiT | DiTConfig, tokens: int, dtype: torch.dtype, offload: bool = False, fp8: bool = False,
               ranks: int = 1, shard: bool = False) -> tuple[int, int]:
    """Bytes on the device, and on the host beside it, for the weights and the work of one call. An estimate.

    tokens: of one latent. The work is that of a block at its widest, in self-attention or in the feed-forward network,
    per token: the residual stream before and after, its modulated copy, and q, k, v rotated in float32 and cast, or the
    hidden layer before and after its activation; split tokens are whole again for the head. Streaming holds two blocks,
    sharding gathers up to two."""
    if isinstance(model, DiTConfig):
        with torch.device("meta"):
            model = WanDiT(model)
    config, size = model.config, torch.finfo(dtype).bits // 8

    def held(name, p):
        return p.numel() * (1 if fp8 and p.ndim == 2 else torch.finfo(resident_dtype(name, dtype)).bits // 8)
    blocks = sum(held(name, p) for name, p in model.blocks.named_parameters())
    outside = sum(p.numel() * (torch.finfo(resident_dtype(name, dtype)).bits // 8)
                  for name, p in model.named_parameters() if not name.startswith("blocks."))
    pair = 2 * blocks // config.num_layers
    here = pair if offload else blocks // ranks + pair if shard else blocks
    d, f = config.dim, config.ffn_dim
    work = -(-tokens // ranks) * (16 * d + max(12 * d + 5 * d * size, 2 * f * size)) + tokens * 4 * d * min(ranks, 4)
    matrix = d * f * (size if fp8 else 0)
    return outside + here + work + matrix, (blocks if offload else 0) + 12 * d * f


def training_memory(config: DiTConfig, tokens: int, rank: int = 32, ranks: int = 1, shard: bool = False,
                    checkpoint: bool = True, offload: bool = False, batch: int = 1) -> dict[str, int]:
    """Bytes on one GPU, by what takes them, and on the host, for training a DoRA of all the blocks' matrices on frozen
    bfloat16 weights, each GPU on `batch` latents of so many tokens. An estimate.

    adapters: float32, with gradients and AdamW's two moments, whole on every GPU. kept, between the blocks: the float32
    residual stream, of which offload leaves two on the GPU; without checkpoint, all that the blocks keep for backward,
    about 54 d + 6 f bytes a token (`python bench.py --train 14B --blocks 1` prints 360,292; flash attention). block:
    the same of the one that is computed again, and its gradients at their most, 2 d + 4 f, or, if that is more, its
    last matrix twice in float32 for DoRA's norm."""
    with torch.device("meta"):
        model = WanDiT(config)
    d, f, n = config.dim, config.ffn_dim, batch * tokens
    stream, saved = 4 * d * n, (54 * d + 6 * f) * n
    kept = stream if checkpoint else stream + saved
    work = max((2 * d + 4 * f) * n, 4 * d * n + 8 * d * f)
    parts = dict(weights=dit_memory(model, 0, torch.bfloat16, ranks=ranks, shard=shard)[0],
                 adapters=16 * sum(sum(p.shape) * rank + len(p) for p in model.blocks.parameters() if p.ndim == 2),
                 kept=kept * (2 if offload else config.num_layers), block=work + (saved if checkpoint else 0))
    return parts | dict(total=sum(parts.values()), host=kept * config.num_layers if offload else 0)


# ---- a training run: one process or many, stopped and resumed at any step

def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def number(low: float, high: float = math.inf):
    """An argparse type: a finite number from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= float(text) <= high and math.isfinite(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number " + (f"from {low:g} to {high:g}" if high < math.inf
                                                                         else f"of at least {low:g}"))
    return parse


def add_loop_flags(add) -> None:
    """The flags that `fit` and `make_optimizers` read, for both training commands; defaults are the paper's."""
    add("--lr", type=number(1e-12), default=1e-4,
        help="learning rate, after the warm-up falling to zero at the last step")
    add("--warmup", type=positive, default=100, help="steps in which the learning rate rises to --lr")
    add("--betas", type=number(0, 0.999999), nargs=2, default=(0.9, 0.999),
        help="AdamW's averages of gradient and square")
    add("--weight-decay", type=number(0), default=0.01, help="of AdamW and Muon")
    add("--clip", type=number(1e-6), default=1.0, help="largest norm of the gradient")
    add("--muon", action="store_true", help="Muon for matrices and kernels, AdamW for the rest; without: AdamW for all")
    add("--lora-plus", type=number(1e-6), default=1.0, help="how many times larger the steps of LoRA's B are")
    add("--accumulate", type=positive, default=1, help="passes that a batch is cut into: less memory, the same step")
    add("--checkpoint", action="store_true", help="compute each block again in the backward pass: less memory, slower")
    add("--checkpoint-offload", action="store_true", help="the same, what is kept between blocks in host memory")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ...")
    add("--bf16", action="store_true", help="compute in bfloat16, train float32: faster where the processor has it")
    add("--compile", action="store_true",
        help="torch.compile the blocks: faster after a minute or so, needs a C++ compiler")
    add("--half", action="store_true", help="store the result in float16")
    add("--seed", type=whole, default=0, help="of weights, batches and noise")
    add("--workers", type=whole, default=min(4, max(1, (os.cpu_count() or 1) // 2)),
        help="processes that read clips while the model trains; 0: none")
    add("--start", help="checkpoint.pt of another run whose weights this run starts from")
    add("--resume", action="store_true", help="go on from the last checkpoint of the same run")
    add("--log-every", type=positive, default=50, help="steps between lines of log.jsonl")
    add("--save-every", type=positive, default=500, help="steps between checkpoints and contact sheets")


FREE = ("resume", "start", "device", "data", "out", "cache", "workers", "log_every", "save_every", "eval", "checkpoint",
        "checkpoint_offload", "accumulate", "compile", "shard", "half")       # may change when a run is resumed


def record_run(run: Path, args) -> None:
    """run/run.json: the arguments, seed and versions of a run."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads(),
                    processes=processes())
    save_text(run / "run.json", json.dumps(dict(arguments=vars(args), versions=versions), indent=1) + "\n")


def step_generator(seed: int, step: int, data: bool = False) -> torch.Generator:
    """All the randomness of one step: of its noise, or of the choice of its data."""
    return torch.Generator().manual_seed(2 * (seed * 1_000_003 + step) + data)


def shares(n: int, rank: int, world: int, accumulate: int = 1) -> list[slice]:
    """A process's parts of a batch of n, one a pass. All processes draw the random numbers of the whole batch, so that
    any number of processes and passes makes the same steps. ValueError if n cannot be cut so."""
    if n % (world * accumulate):
        raise ValueError(f"a batch of {n} cannot be cut into {world * accumulate} equal parts ({world} processes, "
                         f"--accumulate {accumulate}): make the batch a multiple of that")
    size, begin = n // (world * accumulate), rank * n // world
    return [slice(begin + k * size, begin + (k + 1) * size) for k in range(accumulate)]


def average(tensors: list[Tensor]) -> None:
    """Each tensor becomes its mean over all processes, in place: one message for all."""
    if processes() > 1:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, mean in zip(tensors, (together / processes()).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def make_optimizers(module: nn.Module, args) -> list:
    """AdamW for what trains in `module`; with --muon, matrices and kernels (seen as c_out x rest) get
    Muon, whose step has AdamW's size. LoRA's B, which starts at zero behind a scale of 1/rank, takes
    steps --lora-plus times as large (arXiv 2402.12354)."""
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    matrices = [k for k, p in trained.items() if args.muon and p.dim() >= 2 and min(p.shape[0], p[0].numel()) >= 8
                and "token_embedding" not in k]
    views = {k: nn.Parameter(trained[k].detach().flatten(1)) for k in matrices}       # the same memory, two axes

    def groups(parameters):
        by_scale = {}
        for name, p in parameters.items():
            by_scale.setdefault(args.lora_plus if name.endswith("lora_B") else 1, []).append(p)
        return [dict(params=params, scale=scale) for scale, params in by_scale.items()]

    def hand_over_gradients(*_):
        for name, view in views.items():
            grad = trained[name].grad
            view.grad = None if grad is None else grad.flatten(1)
    others = {k: p for k, p in trained.items() if k not in views}
    optimizers = []
    if others:
        optimizers.append(torch.optim.AdamW(groups(others), args.lr, tuple(args.betas), weight_decay=args.weight_decay))
    if views:
        optimizers.append(torch.optim.Muon(groups(views), args.lr, args.weight_decay, adjust_lr_fn="match_rms_adamw"))
        optimizers[-1].register_step_pre_hook(hand_over_gradients)
    return optimizers


def learning_rate(step: int, steps: int, lr: float, warmup: int = 100) -> float:
    """Linear warm-up, then linear towards zero."""
    return lr * min((step + 1) / warmup, (steps - step) / steps)


def checkpoint_blocks(module: nn.Module, kind: type, offload: bool = False) -> None:
    """Every block of a kind keeps its inputs alone, in host memory if offload, and is computed again in backward."""
    def checkpointed(forward, trains, *inputs):
        if not (trains or inputs[0].requires_grad):
            return forward(*inputs)
        if not offload:
            return checkpoint(forward, *inputs, use_reentrant=False)
        first = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        with torch.autograd.graph.save_on_cpu(pin_memory=first.is_cuda):    # reentrant: its inputs count as saved
            return checkpoint(forward, first, *inputs[1:], use_reentrant=True)
    for block in module.modules():
        if isinstance(block, kind):
            trains = any(p.requires_grad for p in block.parameters())
            block.forward = partial(checkpointed, block.forward, trains)


def compile_blocks(module: nn.Module, kind: type) -> None:
    """Fuses what lies between the products in all blocks of a kind; every shape and width is compiled anew."""
    torch._dynamo.config.recompile_limit = 256
    for block in module.modules():
        if isinstance(block, kind):
            block.compile(dynamic=False)


def prepare_blocks(module: nn.Module, kind: type, args) -> None:
    """As --checkpoint, --checkpoint-offload and --compile say."""
    if args.checkpoint or args.checkpoint_offload:
        checkpoint_blocks(module, kind, args.checkpoint_offload)
    if args.compile:
        compile_blocks(module, kind)


class Batches(Dataset):
    """What draw(step) makes, in workers. Their errors travel as values, for they would arrive as tracebacks."""

    def __init__(self, draw):
        self.draw = draw

    def __getitem__(self, step):
        try:
            return self.draw(step)
        except (ValueError, OSError) as error:
            return error


def ignore_signals(_) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):      # they reach workers too, but the run ends its step
        signal.signal(number, signal.SIG_IGN)


def load_batches(draw, steps: range, args) -> Iterator:
    """draw(step) of every step in order, some steps ahead of the training."""
    ahead = dict(worker_init_fn=ignore_signals, prefetch_factor=4) if args.workers else {}
    loader = DataLoader(Batches(draw), batch_size=None, sampler=steps, num_workers=args.workers,
                        pin_memory=torch.device(args.device).type == "cuda", **ahead)
    for batches in loader:
        if isinstance(batches, Exception):
            raise ValueError(f"{batches} (the run stopped there; --resume goes on from its last checkpoint)")
        yield batches


@contextmanager
def caught_signals() -> Iterator[list]:
    """A list that takes the number of the first SIGINT or SIGTERM; the second one ends the process at once."""
    caught, before = [], {}

    def catch(number, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_run(file, trained: dict) -> dict:
    """A checkpoint.pt that `fit` wrote for a model with the same trained tensors."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        fits = {k: v.shape for k, v in saved["model"].items()} == {k: p.shape for k, p in trained.items()} and (
            {"step", "optimizers", "losses", "arguments"} <= saved.keys())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file} to go on from; start without --resume or --start") from None
    except Exception as error:
        raise ValueError(f"{file} is not a checkpoint of a training here ({type(error).__name__})") from None
    if not fits:
        raise ValueError(f"{file} is of a model with other sizes or of another stage; give the flags it was made with")
    return saved


def go_on(args, run: Path, trained: dict, optimizers, clips: str) -> tuple[int, list, list]:
    """Takes up --resume or --start: the first step, the losses and the lines of log.jsonl so far."""
    file = run / "checkpoint.pt"
    if not args.resume and file.exists():
        raise ValueError(f"{run} holds a run already: --resume goes on with it; or choose another --out, or delete it")
    if not (args.resume or args.start):
        return 0, [], []
    saved = read_run(file if args.resume else args.start, trained)
    with torch.no_grad():
        for name, value in saved["model"].items():
            trained[name].copy_(value)
    if not args.resume:
        return 0, [], []
    if other := [name for name, value in fixed_arguments(args, clips).items() if saved["arguments"].get(name) != value]:
        raise ValueError(f"{file} is of a run with other {', '.join(other)}: give what it was made with, "
                         "or begin a new run from its weights by --start")
    for optimizer, value in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(value)
    rows = []
    for row in (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []:
        with suppress(ValueError):          # a line that was cut
            rows += [row] if (row := json.loads(row))["step"] <= saved["step"] else []
    return saved["step"], saved["losses"], rows


def fixed_arguments(args, clips: str) -> dict:
    """What a run that goes on must have in common with the one before; clips: the data's fingerprint."""
    fixed = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items() if k not in FREE}
    return fixed | dict(data=clips)


def check_loss(loss: float, norm: float, losses: list, step: int, names: list, file: Path) -> None:
    """ValueError if a step must not be taken: nothing of it is in the weights yet."""
    usual = statistics.median(losses) if len(losses) >= 100 else 0
    wild = 0 < 50 * usual < loss
    if wild or not math.isfinite(loss + norm):
        what = f"the loss {loss:.4g} is over 50 times its median {usual:.4g}" if wild else \
            f"loss ({loss:.4g}) or gradient ({norm:.4g}) is not finite"
        good = f"{file} holds the last good state" if file.exists() else "nothing was saved before"
        raise ValueError(f"{what} at step {step}, clips {', '.join(map(str, names))}: look at these clips, or try a "
                         f"smaller --lr; {good}")


def fit(args, run: Path, model: nn.Module, optimizers, steps: int, draw, loss_fn, sheet_fn, clips: str = "") -> dict:
    """Train `model` for `steps` steps; returns the summary, steps a second, peak of memory and so on.

    draw(step) -> list of this process's batches of a step, one a pass, dicts with "names" of the clips; it runs in
    workers. loss_fn(batch, generator) -> dict of scalars with "loss"; sheet_fn(path) draws what is learnt. clips
    names the data. Writes run/log.jsonl, curves.png, sheet-STEP.png, summary.json, checkpoint.pt (trained tensors,
    optimisers, step, losses). --resume goes on from there; --start takes another run's weights only. Of several
    processes, each brings its share's loss; the first one writes. SIGINT and SIGTERM end the step, save and stop."""
    first, file = ranks()[0] == 0, run / "checkpoint.pt"
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    start, losses, rows = go_on(args, run, trained, optimizers, clips)
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        if first:
            record_run(run, args)
            save_text(run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    earlier, waited, began, sums, count = rows[-1]["seconds"] if rows else 0, 0.0, time.perf_counter(), {}, 0
    with (open(run / "log.jsonl" if first else os.devnull, "a") as log, caught_signals() as caught,
          closing(load_batches(draw, range(start, steps), args)) as batches):
        for step in (bar := tqdm(range(start, steps), initial=start, total=steps, mininterval=5, disable=not first)):
            asked = time.perf_counter()
            passes = next(batches)
            waited += time.perf_counter() - asked
            parts, stop = gradients(model, trained, passes, step, loss_fn, args.seed, bool(caught))
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
            check_loss(parts["loss"], norm.item(), losses, step, passes[0]["names"], file)
            losses = losses[-999:] + [parts["loss"]]
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * learning_rate(step, steps, args.lr, args.warmup)
                optimizer.step()
            sums, count = {k: sums.get(k, 0) + v for k, v in parts.items()}, count + 1
            last = stop or step + 1 == steps
            if (step + 1) % args.log_every == 0 or last:
                means = {k: round(v / count, 5) for k, v in sums.items()}
                rows.append(dict(step=step + 1, seconds=round(earlier + time.perf_counter() - began, 1), **means))
                with writing(run):
                    print(json.dumps(rows[-1]), file=log, flush=True)
                bar.set_postfix(means)
                sums, count = {}, 0
            if (step + 1) % args.save_every == 0 or last:
                save_run(args, run, step + 1, trained, optimizers, losses, clips, rows, sheet_fn)
            if stop:
                stopped(step + 1, file)
    seconds = time.perf_counter() - began
    return dict(steps=steps, seconds=round(earlier + seconds, 1), steps_a_second=round((steps - start) / seconds, 3),
                waited_for_data=round(waited / seconds, 4), peak_memory_gb=peak_memory(args.device))


def gradients(model, trained: dict, passes: list, step: int, loss_fn, seed: int, stop: bool) -> tuple[dict, bool]:
    """The gradients of one step in `trained`, and the means over all passes and processes: losses; whether to stop."""
    model.zero_grad()           # not the optimisers': Muon's hold views of the parameters
    parts = {}
    for batch in passes:
        some = loss_fn(batch, step_generator(seed, step))
        (some["loss"] / len(passes)).backward()
        parts = {name: parts.get(name, 0) + value.detach().float() / len(passes) for name, value in some.items()}
    parts["stop"] = torch.tensor(float(stop), device=parts["loss"].device)
    average([p.grad for p in trained.values() if p.grad is not None] + list(parts.values()))
    parts = {name: value.item() for name, value in parts.items()}
    return parts, parts.pop("stop") > 0


def save_run(args, run: Path, step: int, trained, optimizers, losses, clips, rows, sheet_fn) -> None:
    """The first process writes; a sharded model needs all of them to draw the sheet."""
    file, buffer = run / "checkpoint.pt", io.BytesIO()      # torch.save to a full disk is no OSError
    with writing(run):
        if ranks()[0] == 0:
            torch.save(dict(step=step, model=trained, optimizers=[o.state_dict() for o in optimizers], losses=losses,
                            arguments=fixed_arguments(args, clips)), buffer)
            with replacing(file) as temporary:
                temporary.write_bytes(buffer.getbuffer())
            draw_curves(run / "curves.png", rows)
        if ranks()[0] == 0 or getattr(args, "shard", False):
            sheet_fn(run / f"sheet-{step:06d}.png")


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written becomes one sentence."""
    try:
        yield
    except OSError as error:
        file = run / "checkpoint.pt"
        kept = f"{file} is the last good state" if file.exists() else "nothing was saved before"
        raise OSError(f"cannot write into {run} ({error.strerror or error}): make room or choose another --out; "
                      f"{kept}") from None


def stopped(step: int, file: Path) -> None:
    if ranks()[0] == 0:
        print(f"stopped after step {step}; {file} holds it, --resume goes on", file=sys.stderr)
    end_process_group()
    sys.exit(130)


def peak_memory(device) -> float:
    """GB at the peak so far: of the GPU, or of this process's host memory."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    if resource is None:
        return float("nan")
    kilo = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9, 2)


def finish(run: Path, summary: dict) -> None:
    """run/summary.json, and the same on stdout; scores by name a line."""
    save_text(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in summary.items() if type(value) is not dict))
    for title, scores in summary.items():
        for name, values in scores.items() if type(scores) is dict else ():
            print(f"{title.replace('_', ' ')}: {name:<24}" + ", ".join(f"{kind} {x:.3f}" for kind, x in values.items()))


# ---- the curves of a training, drawn with numpy alone

INK, CURVE, FAINT, FRAME = (60, 60, 60), (16, 42, 120), (232, 232, 236), (150, 150, 156)
GLYPHS = dict(zip("abcdefghijklmnopqrstuvwxyz0123456789.-_,:", (int(bits, 16) for bits in (     # 5 rows of 3 pixels
    "2bed 6bae 3923 6b6e 79a7 79a4 396b 5bed 7497 126a 5bad 4927 5f6d 6b6d 2b6a 6ba4 2b7b 6bad 388e 7492 5b6f "
    "5b6a 5b7d 5aad 5a92 72a7 7b6f 2c97 73e7 72cf 5bc9 79cf 79ef 7252 7bef 7bcf 0002 01c0 0007 0014 0410").split())))


def draw_text(panel, text, y, right) -> None:
    """Text on a panel (h w 3), its upper right corner at y, right: 10 pixels high, 8 a character, cut at the left."""
    bits = np.array([GLYPHS.get(c, 0) for c in text.lower()])[:, None] >> np.arange(14, -1, -1) & 1
    dots = np.pad(bits.reshape(-1, 5, 3), ((0, 0), (0, 0), (1, 0))).astype(bool)
    dots = repeat(dots, "n h w -> (h i) (n w j)", i=2, j=2)[:, -min(right, panel.shape[1]):]
    panel[y:y + 10, :right][:, -dots.shape[1]:][dots] = INK


def unit(x):
    """Numbers moved and stretched to [0, 1], 0.5 where all are alike; their lowest, their highest. Nan stays."""
    finite = x[np.isfinite(x)]
    low, high = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
    return (x - low) / (high - low) if low < high else 0 * x + 0.5, low, high


def draw_curve(name, steps, values, width, height):
    """One panel (height width 3): a scalar over steps, on a log axis if it is above 0 and spans more than 20 times."""
    panel, h, w = np.full((height, width, 3), 255, np.uint8), height - 50, width - 88
    values = np.where(np.isfinite(values), values, np.nan)
    (x, _, last), (y, low, high) = unit(steps), unit(values)
    if log := bool(0 < 20 * low < high):
        y = unit(np.log10(values))[0]
    plot = panel[26:26 + h, 76:76 + w]
    plot[np.linspace(0, h - 1, 5).astype(int)] = plot[:, np.linspace(0, w - 1, 5).astype(int)] = FAINT
    plot[[0, -1]] = plot[:, [0, -1]] = FRAME
    x, y = 3 + x * (w - 8), 3 + (1 - y) * (h - 8)
    n = int(np.nanmax(np.hypot(np.diff(x), np.diff(y)), initial=0)) + 1     # points a segment, so that it has no holes
    x, y = (np.interp(np.arange((len(x) - 1) * n + 1) / n, np.arange(len(x)), k) for k in (x, y))
    x, y = (k[np.isfinite(y)].round().astype(int) for k in (x, y))
    for down, right in np.ndindex(2, 2):
        plot[y + down, x + right] = CURVE
    draw_text(panel, title := name + ", log" * log, 8, 74 + 8 * len(title))
    draw_text(panel, f"{high:.3g}".replace("e+", "e"), 26, 68)
    draw_text(panel, f"{low:.3g}".replace("e+", "e"), 16 + h, 68)
    draw_text(panel, f"step {last:.0f}", 32 + h, 76 + w)
    return panel


def draw_curves(path, rows, width=360, height=200) -> None:
    """A PNG with a panel of width x height pixels for each scalar of a training's log over the steps. rows: those
    of log.jsonl; a number that is missing or not finite leaves a gap. No scalar, no file."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds"))
    steps = np.array([row["step"] for row in rows], float)
    panels = [draw_curve(name, steps, np.array([row.get(name, np.nan) for row in rows], float), width, height)
              for name in names]
    if panels:
        columns = min(3, len(panels))
        panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
        with replacing(path) as temporary:
            iio.imwrite(temporary, rearrange(panels, "(r c) h w k -> (r h) (c w) k", c=columns), plugin="pillow")


if __name__ == "__main__":
    base, latent = Path(__file__).with_name("tiny"), torch.Generator().manual_seed(0)
    resident, streamed, float8, half = (load_scaled(base, [(base / "t2v.safetensors", 1.0)], **way) for way in (
        {}, dict(offload=True), dict(fp8=True), dict(dtype=torch.bfloat16)))
    z, context = torch.randn(1, 16, 5, 8, 8, generator=latent), torch.randn(1, 9, 128, generator=latent)
    for level in (1000.0, 937.5, 833.3, 625.0):
        t = torch.tensor([level])
        with torch.no_grad():
            v, *others = (dit(z, t, context) for dit in (resident, streamed, float8, half))
        print(f"t {level}: v differs " + ", ".join(f"{way} {(other - v).norm() / v.norm():.2%}" for way, other in zip(
            ("streamed", "float8", "bfloat16"), others)))
    for way in ({}, dict(offload=True), dict(fp8=True), dict(ranks=8, shard=True)):
        print(f"14B, 81 frames of 832x480, {way}:", "device {:.1f} GB, host {:.1f} GB".format(*(
            x / 1e9 for x in dit_memory(WAN_14B, 21 * 30 * 52, torch.bfloat16, **way))))
