"""The transformer of dit.py with little memory or on many GPUs: it is wrapped from outside, the method is not here.

    --offload   blocks stay in host memory and stream through two buffers: one is filled while the other computes
    --fp8       the blocks' matrices are one byte a number, float8_e4m3fn, with one float32 scale a row
    torchrun    tokens are split over the processes; in self-attention they trade tokens for heads and back
                (Ulysses, arXiv 2309.14509): every process sees all tokens of its heads
    --shard     each process keeps its part of every block's matrices and gathers a block to compute it (FSDP2)

All of them put something in place of `dit.blocks` or of a layer inside, so one forward serves all. Streamed and
resident results are the same bits (test_streamed_blocks_give_the_same_bits); two processes equal one to 1e-5
(test_two_processes_equal_one); float8 is close (test_float8_is_close_and_one_byte).

Letters: b batch, n tokens, d width, a heads, p processes, o output rows, i inputs.
dtype: as in dit.py; a float8 product runs in the dtype of its input, and its rows are scaled after it.
"""
import copy
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit import DiTConfig, WanDiT, load_dit, open_dit, resident_dtype

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
        dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def end_process_group() -> None:
    """All wait for each other, then part: one that left early would cut off what another still reads."""
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


def shard_block(block: nn.Module) -> nn.Module:
    """The block with each process keeping its rows of the matrices; the few float32 parameters stay whole."""
    from torch.distributed.fsdp import fully_shard      # a second of imports, for this alone
    whole = {p for name, p in block.named_parameters() if resident_dtype(name, torch.bfloat16) == torch.float32}
    return fully_shard(block, reshard_after_forward=True, ignored_params=whole)


# ---- loading

def place_dit(model: WanDiT, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32, device="cpu",
              offload: bool = False, fp8: bool = False, shard: bool = False) -> WanDiT:
    """Fills a model on the meta device with (name, tensor) pairs in the order of its state dict, one by one, ready to
    be called. Without offload, fp8 and shard, in one process, it is what `load_dit` makes."""
    check_ways(model.config, offload, fp8, shard)
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
        if part and shard:
            shard_block(model.get_submodule(part))
    if offload:
        model.blocks = BlockStream(model.blocks, device)
    if processes() > 1:
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


def check_ways(config: DiTConfig, offload: bool, fp8: bool, shard: bool) -> None:
    if shard and (offload or fp8):
        raise ValueError("--shard keeps a part of each matrix on every GPU; it does not go with --offload or --fp8")
    if shard and processes() == 1:
        raise ValueError("--shard needs several processes: start it with torchrun --nproc_per_node=N")
    if config.num_heads % processes():
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


if __name__ == "__main__":
    config = DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=32, text_len=16)
    dit, z, t, context = WanDiT(config), torch.randn(1, 16, 3, 8, 12), torch.tensor([750.0]), torch.randn(1, 7, 32)
    nn.init.normal_(dit.head.head.weight, std=0.02)
    with torch.no_grad():
        v = dit(z, t, context)
        streamed = place_dit(copy.deepcopy(dit).to("meta"), dit.state_dict().items(), offload=True)
        print(f"streamed: differs by {(streamed(z, t, context) - v).abs().max():.0f}")
        small = place_dit(copy.deepcopy(dit).to("meta"), dit.state_dict().items(), fp8=True)
        print(f"float8: differs by {(small(z, t, context) - v).norm() / v.norm():.1%}")
    for way in ({}, dict(offload=True), dict(fp8=True)):
        print(f"14B, 81 frames of 832x480, {way}:", "device {:.1f} GB, host {:.1f} GB".format(*(
            x / 1e9 for x in dit_memory(DiTConfig(5120, 13824, 40, 40), 21 * 30 * 52, torch.bfloat16, **way))))
