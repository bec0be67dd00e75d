"""How much memory a model will take, told before a run begins: estimates from names and shapes alone.

All are bytes. Letters: d width, f hidden width of the feed-forward network, n tokens. Pinned by
test_memory_estimates_at_known_sizes, test_training_memory_is_what_a_step_allocates.
"""
import argparse
import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import nn

from dit import WAN_14B, DiTConfig, WanDiT, resident_dtype
from kit.command import free_memory
from vae import VAEConfig

SMALLER = "a smaller --size or fewer --frames"
FLAGS = {       # what makes a model fit, best first
    "--dtype bfloat16": dict(dtype=torch.bfloat16), "--vae-dtype bfloat16": dict(vae_dtype=torch.bfloat16),
    "--text-device cpu": dict(text_device="cpu"), "--offload": dict(offload=True), "--shard": dict(shard=True),
    "--fp8": dict(fp8=True), SMALLER: dict(size=(16, 16), frames=1)}


def weight_memory(model: nn.Module, dtype: torch.dtype, fp8: bool = False) -> int:
    """The transformer's parameters, or those of a part; fp8: matrices at a byte a number."""
    def size(name, p):
        return 1 if fp8 and p.ndim == 2 else resident_dtype(name, dtype).itemsize
    return sum(p.numel() * size(name, p) for name, p in model.named_parameters())


def dit_memory(model: WanDiT | DiTConfig, tokens: int, dtype: torch.dtype, offload: bool = False, fp8: bool = False,
               ranks: int = 1, shard: bool = False) -> tuple[int, int]:
    """On the device, and on the host beside it, for the weights and the work of one call.

    tokens: of one latent. The work is that of a block at its widest, per token: the residual stream before and after,
    its modulated copy, and q, k, v rotated in float32 and cast, or the hidden layer before and after its activation;
    split tokens are whole again for the head. Streaming holds two blocks, sharding gathers up to two."""
    if isinstance(model, DiTConfig):
        with torch.device("meta"):
            model = WanDiT(model)
    config, size = model.config, dtype.itemsize
    d, f = config.dim, config.ffn_dim
    blocks = weight_memory(model.blocks, dtype, fp8)
    outside = weight_memory(model, dtype) - weight_memory(model.blocks, dtype)
    two_blocks = 2 * blocks // config.num_layers
    resident = blocks
    if offload:
        resident = two_blocks
    elif shard:
        resident = blocks // ranks + two_blocks
    attention, feed_forward = 12 * d + 5 * d * size, 2 * f * size
    own_tokens = math.ceil(tokens / ranks)
    work = own_tokens * (16 * d + max(attention, feed_forward)) + tokens * 4 * d * min(ranks, 4)
    unpacked = d * f * size if fp8 else 0           # a matrix in the dtype of its product
    merging = 12 * d * f                            # the largest matrix, its adapter's and their sum, float32
    return outside + resident + work + unpacked, merging + (blocks if offload else 0)


def training_memory(config: DiTConfig, tokens: int, rank: int = 32, ranks: int = 1, shard: bool = False,
                    checkpoint: bool = True, offload: bool = False, batch: int = 1) -> dict[str, int]:
    """On one GPU, by what takes it, and on the host, for training a DoRA of all the blocks' matrices on frozen bfloat16
    weights, each GPU on `batch` latents of so many tokens.

    adapters: float32, with gradients and AdamW's two moments, whole on every GPU. kept, between the blocks: the float32
    residual stream, of which offload leaves two on the GPU; without checkpoint, all that the blocks keep for backward,
    about 54 d + 6 f bytes a token (`python -m kit.bench train 14B --blocks 1` prints 360,292; flash attention). block:
    the same of the one that is computed again, and its gradients at their most, 2 d + 4 f, or, if that is more, its
    last matrix twice in float32 for DoRA's norm."""
    with torch.device("meta"):
        model = WanDiT(config)
    d, f, n = config.dim, config.ffn_dim, batch * tokens
    stream, saved = 4 * d * n, (54 * d + 6 * f) * n
    gradients = max((2 * d + 4 * f) * n, 4 * d * n + 8 * d * f)
    kept, block = (stream, saved + gradients) if checkpoint else (stream + saved, gradients)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    adapters = sum((o + i) * rank + o for o, i in (p.shape for p in matrices))      # A, B and the magnitude
    parts = dict(weights=dit_memory(model, 0, torch.bfloat16, ranks=ranks, shard=shard)[0], adapters=16 * adapters,
                 kept=kept * (2 if offload else config.num_layers), block=block)
    return parts | dict(total=sum(parts.values()), host=kept * config.num_layers if offload else 0)


def latent_size(args: argparse.Namespace) -> tuple[int, int, int]:
    """t h w of the latent of a clip of --size and --frames."""
    return (args.frames + 3) // 4, args.size[1] // 8, args.size[0] // 8


def decode_memory(args: argparse.Namespace, config: VAEConfig, chunk: int = 1) -> int:
    """What one decoder works with, `chunk` latent frames at a time. Counted for Wan's at 832 x 480: in frames of `dim`
    channels, what streaming keeps is 25 and the peak 51, 73, 121 in bfloat16 and 47, 61, 93 in float32 for a chunk of
    1, 2, 4."""
    return (30 + 24 * chunk) * config.dim * math.prod(args.size) * args.vae_dtype.itemsize


def choose_chunk(args: argparse.Namespace, config: VAEConfig) -> int:
    """Latent frames to decode at a time. On a GPU 1, 2, 4, ... or all, what half of the free memory holds and what
    keeps the widest tensor, 8 chunk frames of dim channels, within 2^31 elements, up to which kernels count. On the
    CPU 1: there more is slower (measured: 5 at a time by a fifth to two fifths)."""
    if args.device == "cpu":
        return 1
    t, chunk, free = latent_size(args)[0], 1, free_memory(args.device) // 2

    def fits(chunk):
        elements = 8 * chunk * config.dim * math.prod(args.size)
        return decode_memory(args, config, chunk) <= free and elements < 2 ** 31
    while chunk < t and fits(2 * chunk):
        chunk *= 2
    return min(chunk, t)


def check_memory(args: argparse.Namespace, text: nn.Module, dit: WanDiT, vae: nn.Module) -> None:
    """ValueError that names the fewest flags that help, if a stage would need more memory than is free."""
    problem = next(lacking(args, text, dit, vae), None)
    if not problem:
        return
    choices = [flags for count in range(1, len(FLAGS) + 1) for flags in combinations(FLAGS, count)]
    choices.sort(key=lambda flags: SMALLER in flags)        # those last; else the fewest first, as they are
    for flags in choices:
        changed = argparse.Namespace(**vars(args))
        for flag in flags:
            vars(changed).update(FLAGS[flag])
        allowed = not (changed.shard and (changed.offload or changed.fp8))
        if allowed and not any(lacking(changed, text, dit, vae)):
            raise ValueError(f"{problem}; give {' '.join(flags)}")
    raise ValueError(f"{problem}, and no flag changes that; take a smaller model or a larger machine")


def lacking(args: argparse.Namespace, text: nn.Module, dit: WanDiT, vae: nn.Module) -> Iterator[str]:
    """A sentence for every stage that needs more than is free."""
    need = needed(args, text, dit, vae)
    free = {device: free_memory(device) for _, device in need}
    for (stage, device), size in need.items():
        if size > free[device]:
            yield (f"the {stage} needs {size / 2 ** 30:.1f} GiB on {device}, "
                   f"where {free[device] / 2 ** 30:.1f} are free")


def needed(args: argparse.Namespace, text: nn.Module, dit: WanDiT, vae: nn.Module) -> Counter:
    """The need of each (stage, device). One stage is in memory at a time; processes on a CPU share it."""
    patches = zip(latent_size(args), dit.config.patch_size)
    tokens, n = math.prod(cells // patch for cells, patch in patches), dit.config.text_len
    on_device, on_host = dit_memory(dit, tokens, args.dtype, args.offload, args.fp8, args.world, args.shard)
    sharing = args.world if args.device == "cpu" else 1
    numbers = {model: sum(p.numel() for p in model.parameters()) for model in (text, vae)}
    logits_and_more = 16 * n * (n * text.config.num_heads + text.config.dim_ffn)
    need = Counter()
    need["text encoder", args.text_device] += numbers[text] * args.dtype.itemsize + logits_and_more
    need["transformer", args.device] += on_device * sharing
    need["transformer", "cpu"] += on_host * args.world
    need["VAE", args.device] += numbers[vae] * args.vae_dtype.itemsize + decode_memory(args, vae.vae_fgr.config)
    return need


if __name__ == "__main__":
    for way in ({}, dict(offload=True), dict(fp8=True), dict(ranks=8, shard=True)):
        device, host = dit_memory(WAN_14B, 21 * 30 * 52, torch.bfloat16, **way)
        print(f"14B, 81 frames of 832x480, {way}: device {device / 1e9:.1f} GB, host {host / 1e9:.1f} GB")
