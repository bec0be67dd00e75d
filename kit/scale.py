"""One transformer with little memory or on many GPUs, wrapped from outside: dit.py knows nothing of it.

    --offload   blocks stay in host memory and stream through two buffers: one is filled while the other computes
    --fp8       the blocks' matrices are one byte a number, float8_e4m3fn, with one float32 scale a row
    torchrun    tokens are split over the processes; in self-attention they trade tokens for heads and back
                (Ulysses, arXiv 2309.14509): every process sees all tokens of its heads
    --shard     each process keeps its part of every block's matrices and gathers a block to compute it (FSDP2)

All of them put something in place of `dit.blocks` or of a layer inside, so one forward serves all. Streamed and
resident results are the same bits (test_streamed_blocks_give_the_same_bits); two processes equal one to 1e-5
(test_two_processes_equal_one); float8 is close (test_float8_is_close_and_one_byte).

Letters: b batch, n tokens, d width, a heads, p processes, o output rows, i inputs.
dtype rule: as in dit.py; a float8 product runs in the dtype of its input, and its rows are scaled after it.
"""
import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dit import DiTConfig, WanDiT, load_dit, open_dit, resident_dtype
from kit.command import processes, ranks
from kit.files import TINY

LARGEST_FLOAT8 = 448.0      # of float8_e4m3fn


class BlockStream(nn.ModuleList):
    """Blocks in host memory. Iterating yields them one by one in two buffers on the device, in turns; on a GPU the next
    block is copied while this one computes."""

    def __init__(self, blocks: Iterable[nn.Module], device):
        super().__init__(blocks)
        self.device = torch.device(device)
        self.slots = [copy.deepcopy(self[0]).to(self.device).requires_grad_(False) for _ in range(2)]   # not submodules

    def fill(self, i: int) -> None:
        slot = self.slots[i % 2].state_dict()
        for name, tensor in self[i].state_dict().items():
            slot[name].copy_(tensor, non_blocking=True)

    def __iter__(self) -> Iterator[nn.Module]:
        if self.device.type == "cuda":
            yield from self.iterate_cuda()
            return
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
        piece, self.free = self.free[:length], self.free[256 * math.ceil(length / 256):]
        return piece.view(dtype).view(shape)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (o i) as float8 with float32 scales (o 1): the largest number of each row becomes float8's largest."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FLOAT8
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


class FP8Linear(nn.Module):
    """nn.Linear whose matrix takes a byte a number; the product runs in the dtype of its input."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        scale = torch.empty_like(weight[:, :1], dtype=torch.float32)
        if not weight.is_meta:      # there, arithmetic would import torch's compiler, a second of work
            numbers, scale = quantize(weight)
        self.register_buffer("weight", numbers)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

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


def trade(x: Tensor, send: str, receive: str) -> Tensor:
    """x rearranged to parts (p ...), of which part j goes to process j; what comes from process j becomes part j."""
    x = rearrange(x, send, p=processes()).contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return rearrange(received, receive)


class SplitBlocks(nn.Module):
    """All blocks as one, each process on its share of the tokens. Takes and returns all tokens, as a block does."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks, self.tokens = blocks, 0
        for block in blocks.slots if isinstance(blocks, BlockStream) else blocks:
            block.self_attn.attend = self.attend

    def fill_up(self, x: Tensor) -> Tensor:
        """Zeros after the tokens (... n d), so that all shares are equal."""
        return F.pad(x, (0, 0, 0, -self.tokens % processes()))

    def forward(self, x: Tensor, e: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        rank, p = ranks()
        self.tokens = x.shape[1]
        x, rope = (self.fill_up(y).chunk(p, dim=1)[rank] for y in (x, rope))
        for block in self.blocks:
            x = block(x, e, context, rope)
        parts = [torch.empty_like(x) for _ in range(p)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)[:, :self.tokens]

    def attend(self, *qkv: Tensor) -> Tensor:
        """q, k, v (b a n/p d) -> (b a n/p d). Tokens that only fill up the last share are cut off before."""
        q, k, v = (trade(y, "b (p a) n d -> p b a n d", "p b a n d -> b a (p n) d")[:, :, :self.tokens] for y in qkv)
        y = self.fill_up(F.scaled_dot_product_attention(q, k, v))
        return trade(y, "b a (p n) d -> p b a n d", "p b a n d -> b (p a) n d")


def shard_block(block: nn.Module, training: bool = False) -> nn.Module:
    """The block with each process keeping its rows of the matrices; the few float32 parameters, and in training the
    adapters, stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard      # a second of imports, for this alone
    whole = {p for name, p in block.named_parameters() if resident_dtype(name, torch.bfloat16) == torch.float32}
    if training:
        whole |= {p for p in block.parameters() if p.requires_grad}
    mesh = init_device_mesh(next(block.parameters()).device.type, (processes(),))
    return fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def place_dit(model: WanDiT, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32, device="cpu",
              offload: bool = False, fp8: bool = False, shard: bool = False, adapt: Callable | None = None) -> WanDiT:
    """Fills a model on the meta device with (name, tensor) pairs in the order of its state dict, one by one, ready to
    be called. Without offload, fp8 and shard, in one process, it is what `load_dit` makes. adapt: for training, gives
    a block its adapters; then every process runs the whole model, on a batch of its own."""
    check_ways(model.config, offload, fp8, shard, split=adapt is None)
    if fp8:
        use_fp8(model.blocks)
    expected = model.state_dict()
    pages = PinnedPages() if offload and torch.device(device).type == "cuda" else None

    def part_of(pair):      # "blocks.7", or "" outside the blocks
        return re.match(r"(blocks\.\d+)?", pair[0])[0]
    for part, pairs in groupby(tensors, key=part_of):
        state = {}
        for name, tensor in pairs:
            for key, value, kind in held_as(name, tensor, expected[name].dtype, dtype, device):
                if part and pages:
                    place = pages.empty(value.shape, kind)
                else:
                    place = torch.empty(value.shape, dtype=kind, device=device)
                state[key] = place.copy_(value)
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


def held_as(name: str, tensor: Tensor, expected: torch.dtype, dtype: torch.dtype, device) -> list[tuple]:
    """(name, values, dtype) of the tensor itself or, where float8 is expected, of the float8 numbers and the scales."""
    if expected != torch.float8_e4m3fn:
        return [(name, tensor, resident_dtype(name, dtype))]
    numbers, scale = quantize(tensor.to(device))
    return [(name, numbers, numbers.dtype), (name.removesuffix("weight") + "scale", scale, scale.dtype)]


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


def checkpoint_blocks(module: nn.Module, kind: type, offload: bool = False) -> None:
    """Every block of a kind keeps its inputs alone, in host memory if offload, and is computed again in backward."""
    def checkpointed(forward, trains, first, *others):
        if not (trains or first.requires_grad):
            return forward(first, *others)
        if not offload:
            return checkpoint(forward, first, *others, use_reentrant=False)
        if not first.requires_grad:
            first = first.detach().requires_grad_()
        with torch.autograd.graph.save_on_cpu(pin_memory=first.is_cuda):    # reentrant: its inputs count as saved
            return checkpoint(forward, first, *others, use_reentrant=True)
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


def plain_attention(device):
    """For training on the CPU, where the fused product's backward is several times slower for short clips."""
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()


if __name__ == "__main__":
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 16, 5, 8, 8, generator=random), torch.tensor([937.5]), torch.randn(1, 9, 128)
    with torch.inference_mode():
        v = load_dit(TINY)(*inputs)
        for way in (dict(offload=True), dict(fp8=True), dict(dtype=torch.bfloat16)):
            print(f"{way}: v differs by {(load_scaled(TINY, **way)(*inputs) - v).norm() / v.norm():.2%}")
