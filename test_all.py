"""Tests that read like the specification: parity with the official numbers, properties, learning, resume, wrong input.

`official` holds what the official code (commit 5804410) returned for small models, whose weights `named` rebuilds from
their names.
"""

import argparse
import copy
import errno
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zipfile
import zlib
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import dora
import generate
import scale
import train_dit
import train_vae
from data import (COLORS, MATERIALS, MOTIONS, RGBADataset, SHAPES, bleed, cache_key, caption_of, checkerboard,
                  contact_sheet, held_out, over, procedural_clip, read_rgba, save_tensors, write_rgba)
from dit import (Block, DiTConfig, WAN_14B, WAN_1_3B, WanDiT, load_dit, open_dit, read_config, rope_table, rotate,
                 sinusoids)
from dora import (adapted_layers, adapter_state, add_dora, add_lora, load_adapter_state, merge_adapter, merge_tensor,
                  parse_adapter, read_adapter)
from losses import (PALETTE, VGG, edge_loss, gradient_magnitude, hard_render, random_colors, reconstruction_loss,
                    rgba_loss, soft_render, tabd_loss, tabd_mask)
from merge import FeatureMerge, RGBAVAE, load_rgba_vae
from sampler import (ellipse_mask, euler, filled_ellipse, fit_ellipse, flow_target, gaussian, gaussian_mask, guide,
                     interpolate, load_mask, mask_from_alpha, parse_ellipse, sample_sigma, shift_noise,
                     shifted_sigmas, training_sigmas, training_weights, unipc)
from text import T5Config, TextEncoder, UMT5, clean_prompt, distance_buckets, load_text_encoder, make_tokenizer
from train_dit import has_holes, named_color, named_motion, named_shape, score_clip, score_table, unseen_prompts
from train_vae import evaluate as evaluate_vae, object_region, psnr
from vae import VAEConfig, WanVAE, load_vae, vae_config

ROOT = Path(__file__).parent
official = load_file(ROOT / "assets/official.safetensors")
KINDS = ["appear", "dot", "ellipse", "empty", "full", "glass", "two"]     # of alpha clips in the file


def named(key, shape):
    """The tensor that the parity file's weights and inputs are made of: every name gives its own numbers."""
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape), dtype=np.float32)
    last = key.split(".")[-1]
    if last == "gamma" or "magnitude" in key or (last == "weight" and len(shape) == 1):
        x = 1 + 0.1 * x
    elif last in ("bias", "modulation"):
        x = 0.1 * x
    elif len(shape) >= 2:
        x = x / np.float32(np.sqrt(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def named_like(module, prefix=""):
    return {k: named(prefix + k, v.shape) for k, v in module.state_dict().items()}


def close(a, b, tol=1e-4):
    assert a.shape == b.shape, (a.shape, b.shape)
    error = (a.float() - b.float()).abs().max() / b.float().std()
    assert error <= tol, f"off by {error:.2e} of the deviation"


def smooth_video(key, shape):
    """The parity file's video inputs: its rule for weights, smoothed and bounded."""
    return torch.tanh(F.avg_pool3d(3 * named(key, shape), (1, 5, 5), 1, (0, 2, 2)))


# ---- the VAE, the merge block, the RGBA VAE


def tiny_vae():
    vae = WanVAE(VAEConfig(dim=8)).eval().requires_grad_(False)
    vae.load_state_dict(named_like(vae))
    return vae


def official_videos():
    rgb, alpha = (smooth_video(f"vae_tiny.{name}", (1, c, 9, 32, 48)) for name, c in (("rgb", 3), ("alpha", 1)))
    return rgb, alpha.repeat(1, 3, 1, 1, 1)


def official_adapter(vae, rank=4):
    """The merge block and both LoRAs of the parity file, in the layout of *-VAE.bin."""
    middle = FeatureMerge(64, 16, 32)
    rgba = RGBAVAE(vae, middle).add_adapters(rank)
    return {k: named(k, v.shape) * (3 if ".lora_B." in k else 1) for k, v in rgba.adapter_state().items()}


def test_vae_parity():
    vae, (rgb, _) = tiny_vae(), official_videos()
    close(vae.features(rgb), official["vae_tiny.features"])
    close(vae.encode(rgb), official["vae_tiny.encode"])
    close(vae.decode(official["vae_tiny.encode"]), official["vae_tiny.decode"])


def test_vae_has_the_keys_of_wan():
    with torch.device("meta"):
        state = WanVAE().state_dict()
    assert len(state) == 194 and sum(v.numel() for v in state.values()) == 126_892_531
    assert state["decoder.upsamples.3.time_conv.weight"].shape == (768, 384, 3, 1, 1)
    assert vae_config(state) == VAEConfig()


@pytest.mark.parametrize("chunk", [4, 8, 12, None])
def test_vae_encoding_is_the_same_in_any_chunks(chunk):
    vae, video = tiny_vae(), named("stream", (1, 3, 17, 16, 16))
    close(vae.encode(video, chunk), vae.encode(video, 4), 1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_vae_decoding_is_the_same_in_any_chunks(chunk):
    vae, z = tiny_vae(), named("stream", (1, 16, 5, 2, 2))
    close(vae.decode(z, chunk), vae.decode(z, None), 1e-5)


def test_vae_is_causal():
    vae, video, z = tiny_vae(), named("causal", (1, 3, 13, 16, 16)), named("causal", (1, 16, 4, 2, 2))
    later, later_z = video.clone(), z.clone()
    later[:, :, 9:] = 0
    later_z[:, :, 3:] = 0
    same, changed = vae.encode(video, None) - vae.encode(later, None), vae.decode(z, None) - vae.decode(later_z, None)
    assert same[:, :, :3].abs().max() == 0 and same[:, :, 3:].abs().max() > 0
    assert changed[:, :, :9].abs().max() == 0 and changed[:, :, 9:].abs().max() > 0


def test_vae_memory_does_not_grow_with_the_clip():
    """What a streamed decoding keeps between two pieces is the cache: as large after 3 as after 12 latent frames."""
    def kept(t):
        vae, cache = tiny_vae(), {}
        for frame in named("memory", (1, 16, t, 2, 2)).split(1, dim=2):
            vae.decoder(vae.conv2(frame), cache)
        tensors = [v for v in cache.values() if isinstance(v, torch.Tensor)]
        assert all(v.untyped_storage().nbytes() == v.nbytes for v in tensors)       # copies, not views of whole chunks
        return sum(v.nbytes for v in tensors)
    assert kept(3) == kept(12) > 0


def test_vae_second_latent_frame_starts_its_history_anew():
    """Upsampling in time sees zeros, not the first frame, before the second one."""
    up = tiny_vae().decoder.upsamples[3]
    x = named("history", (1, 32, 3, 4, 4))
    other = x.clone()
    other[:, :, 0] = 0
    assert torch.equal(up(x)[:, :, 1:], up(other)[:, :, 1:])
    down = tiny_vae().encoder.downsamples[5]
    x = named("history", (1, 16, 5, 4, 4))
    other = x.clone()
    other[:, :, 0] = 0
    assert not torch.equal(down(x)[:, :, 1:], down(other)[:, :, 1:])       # downsampling does see it


def test_vae_refuses_wrong_sizes_and_files(tmp_path):
    with pytest.raises(ValueError, match="4k.1"):
        tiny_vae().encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match="divisible by 8"):
        tiny_vae().encode(torch.zeros(1, 3, 5, 12, 16))
    for name, content in {"text.pth": b"not a checkpoint", "cut.safetensors": b"\x10\0\0\0\0\0\0\0{"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_vae(tmp_path / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a Wan VAE"):
        load_vae(tmp_path / "other.pth")
    state = named_like(WanVAE(VAEConfig(dim=8)))
    del state["conv1.bias"]
    torch.save(state | {"extra": torch.ones(1)}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="missing conv1.bias; unexpected extra"):
        load_vae(tmp_path / "short.pth")


def test_vae_loads_pth_and_safetensors_with_their_statistics(tmp_path):
    vae = WanVAE(VAEConfig(dim=8, num_res_blocks=1))
    torch.save(vae.state_dict(), tmp_path / "Wan2.1_VAE.pth")
    assert load_vae(tmp_path / "Wan2.1_VAE.pth").config == vae.config
    mean, std = tuple(map(float, range(16))), tuple(map(float, range(1, 17)))
    save_file(vae.state_dict(), tmp_path / "v.safetensors", dict(mean=json.dumps(mean), std=json.dumps(std)))
    again = load_vae(tmp_path / "v.safetensors")
    assert again.config.mean == mean and again.config.std == std
    assert torch.equal(again.decoder.conv1.weight, vae.decoder.conv1.weight)


def test_merge_block_and_both_decoders_are_official(tmp_path):
    vae, (rgb, alpha) = tiny_vae(), official_videos()
    torch.save(vae.state_dict(), tmp_path / "Wan2.1_VAE.pth")
    torch.save(official_adapter(vae), tmp_path / "VAE.bin")
    rgba = load_rgba_vae(tmp_path / "Wan2.1_VAE.pth", tmp_path / "VAE.bin")
    raw = rgba.merged(rgb, alpha)
    close(raw, official["vae_tiny.merged_raw"])
    close(vae.normalize(raw), official["vae_tiny.merged"])
    colour, matte = rgba.decode(official["vae_tiny.merged"])
    close(colour, official["vae_tiny.vae_fgr.decode"])
    close(matte, (official["vae_tiny.vae_pha.decode"].mean(1, keepdim=True) + 1) / 2)


def test_rgba_streaming_is_exact():
    vae = tiny_vae()
    middle = FeatureMerge(64, 16, 32)
    middle.load_state_dict(named_like(middle, "middle."))
    rgba, rgb = RGBAVAE(vae, middle), named("rgb", (1, 3, 17, 16, 16))
    alpha = named("alpha", (1, 1, 17, 16, 16)).sigmoid()
    with torch.no_grad():
        close(rgba.encode(rgb, alpha, chunk=8), rgba.encode(rgb, alpha, chunk=None), 1e-5)


def test_merge_block_starts_as_the_base_encoder():
    vae, (rgb, alpha) = tiny_vae(), official_videos()
    middle = FeatureMerge(64, 16, 32)
    middle.load_state_dict(named_like(middle, "middle."))
    middle.start_as_rgb(vae)
    with torch.no_grad():
        close(vae.normalize(RGBAVAE(vae, middle).merged(rgb, alpha)), vae.encode(rgb))


def test_decoder_bin_decodes_only_and_frozen_copies_are_skipped(tmp_path):
    vae = tiny_vae()
    adapter = official_adapter(vae)
    torch.save(vae.state_dict(), tmp_path / "v.pth")
    torch.save({k: v for k, v in adapter.items() if not k.startswith("middle")}, tmp_path / "decoder.bin")
    rgba = load_rgba_vae(tmp_path / "v.pth", tmp_path / "decoder.bin")
    with pytest.raises(ValueError, match="decoders only"):
        rgba.encode(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 1, 1, 16, 16))
    copies = ("vae_fgr.decoder.conv1.conv3D.base_layer.weight", "vae_pha.encoder.conv1.weight")
    frozen = {name: torch.zeros(3) for name in copies}
    torch.save(adapter | frozen, tmp_path / "VAE.bin")
    z = named("z", (1, 16, 1, 2, 2))
    assert torch.equal(load_rgba_vae(tmp_path / "v.pth", tmp_path / "VAE.bin").decode(z)[0], rgba.decode(z)[0])
    torch.save(adapter | {"surprise.weight": torch.zeros(3)}, tmp_path / "VAE.bin")
    with pytest.raises(ValueError, match="surprise.weight"):
        load_rgba_vae(tmp_path / "v.pth", tmp_path / "VAE.bin")
    for lost in ("middle.block.head.2.weight", "middle.block.head.0.gamma"):
        torch.save({k: v for k, v in adapter.items() if k != lost}, tmp_path / "VAE.bin")
        with pytest.raises(ValueError, match=f"VAE.bin does not fit FeatureMerge: .*{lost[7:]}"):
            load_rgba_vae(tmp_path / "v.pth", tmp_path / "VAE.bin")


# ---- LoRA and DoRA


class TwoFrameConv(nn.Conv3d):
    """A causal convolution with a forward of its own: pads on the left in time, or continues from cached frames."""

    def forward(self, x, cache=None):
        x = F.pad(x, (1, 1, 1, 1, 2 if cache is None else 0, 0))
        return super().forward(x if cache is None else torch.cat([F.pad(cache, (1, 1, 1, 1)), x], 2))


DORA_LAYERS = {"linear": (lambda: nn.Linear(6, 10), (2, 5, 6)),
               "square": (lambda: nn.Linear(8, 8, bias=False), (2, 5, 8)),
               "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
               "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (1, 4, 3, 5, 5)),
               "causal": (lambda: TwoFrameConv(4, 6, 3), (1, 4, 3, 5, 5))}


def adapted_toy(kind, add, seed=0):
    """A plain model of one layer, the same with an adapter whose B and m are not at their start, and an input."""
    torch.manual_seed(seed)
    make, shape = DORA_LAYERS[kind]
    plain = nn.Sequential(make())
    adapted = add(copy.deepcopy(plain), 3, 6.0, ".*")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.5 * torch.rand_like(parameter)
    return plain, adapted, torch.randn(shape)


def dora_toy_block():
    """The block weights of the parity file's small DiT, by name."""
    state = {}
    for p in ("blocks.0", "blocks.1"):
        shapes = {f"{p}.{a}.{layer}": (48, 48) for a in ("self_attn", "cross_attn") for layer in "qkvo"}
        shapes |= {f"{p}.ffn.0": (96, 48), f"{p}.ffn.2": (48, 96), f"{p}.norm3": (48,)}
        for layer, shape in shapes.items():
            state[f"{layer}.weight"] = named(f"{layer}.weight", shape)
            state[f"{layer}.bias"] = named(f"{layer}.bias", shape[:1])
        norms = [f"{p}.{a}.{norm}.weight" for a in ("self_attn", "cross_attn") for norm in ("norm_q", "norm_k")]
        state |= {norm: named(norm, (48,)) for norm in norms}
        state[f"{p}.modulation"] = named(f"{p}.modulation", (1, 6, 48))
    return state


def dora_file(state):
    adapter = {}
    for layer in [name[:-7] for name, weight in state.items() if weight.ndim == 2]:
        o, i = state[layer + ".weight"].shape
        for part, shape in (("lora_A", (4, i)), ("lora_B", (o, 4)), ("lora_magnitude_vector", (o,))):
            adapter[f"{layer}.{part}.default.weight"] = named(f"{layer}.{part}.default.weight", shape)
    return adapter


def lightx2v_file(state):
    adapter = {}
    for name, weight in state.items():
        layer = "diffusion_model." + name.rpartition(".")[0]
        if weight.ndim == 2:
            adapter[f"{layer}.lora_down.weight"] = named(f"{layer}.lora_down.weight", (3, weight.shape[1]))
            adapter[f"{layer}.lora_up.weight"] = 0.5 * named(f"{layer}.lora_up.weight", (weight.shape[0], 3))
            adapter[f"{layer}.diff_b"] = named(f"{layer}.bias", weight.shape[:1])
        elif "norm" in name and name.endswith("weight"):
            adapter[f"{layer}.diff"] = 0.05 * named(f"{layer}.diff", weight.shape)
    return adapter


def test_dora_merge_equals_official():
    state = dora_toy_block()
    first = merge_adapter(state, dora_file(state))
    close(first["blocks.0.self_attn.q.weight"], official["dit_tiny.q0_dora"])
    both = merge_adapter(first, lightx2v_file(state))
    close(both["blocks.0.ffn.0.weight"], official["dit_tiny.ffn0_all"])
    close(both["blocks.0.self_attn.q.bias"], official["dit_tiny.qb_all"])
    swapped = merge_adapter(merge_adapter(state, lightx2v_file(state)), dora_file(state))
    with pytest.raises(AssertionError):
        close(swapped["blocks.0.ffn.0.weight"], official["dit_tiny.ffn0_all"], tol=0.1)


@pytest.mark.parametrize("add", [add_lora, add_dora])
@pytest.mark.parametrize("kind", DORA_LAYERS)
def test_dora_merged_equals_unmerged(kind, add):
    plain, adapted, x = adapted_toy(kind, add)
    before, unmerged = plain(x), adapted(x)
    merged = merge_adapter(plain.state_dict(), adapter_state(adapted), scale=2.0)     # alpha / rank = 6 / 3
    assert (unmerged - before).std() > 0.1 * before.std()
    close(torch.func.functional_call(plain, merged, x), unmerged, tol=1e-5)


@pytest.mark.parametrize("kind", DORA_LAYERS)
def test_dora_starts_as_the_base_and_keeps_its_names(kind):
    make, shape = DORA_LAYERS[kind]
    plain, x = nn.Sequential(make()), torch.randn(shape)
    adapted = add_dora(copy.deepcopy(plain), 3, 6.0, ".*")
    close(adapted(x), plain(x), tol=1e-5)
    assert adapted[0].lora_A.std() > 0 and not adapted[0].lora_B.any()
    assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    other = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    adapted.load_state_dict(other, strict=False)
    assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in other.items())


def test_dora_adapters_keep_the_causal_cache():
    _, adapted, x = adapted_toy("causal", add_dora)
    pieces = torch.cat([adapted[0](x[:, :, :2]), adapted[0](x[:, :, 2:], cache=x[:, :, :2])], 2)
    close(pieces, adapted(x), tol=1e-5)


@pytest.mark.parametrize("shape", [(10, 6), (8, 8), (6, 4, 3, 3, 3)])
def test_dora_magnitude_is_the_length_of_each_output_row(shape):
    weight, m = torch.randn(shape), 1 + torch.rand(shape[0])
    merged = merge_tensor(weight, dora.Delta(magnitude=m, down=torch.randn(2, *shape[1:]),
                                             up=torch.randn(shape[0], 2, *[1] * (len(shape) - 2))))
    torch.testing.assert_close(merged.flatten(1).norm(dim=1), m)
    assert not torch.allclose(merged.transpose(0, 1).flatten(1).norm(dim=1), torch.ones(shape[1]), atol=0.05)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dora_norm_is_a_constant_in_backward(kind):
    _, adapted, x = adapted_toy(kind, add_dora)
    layer, down = adapted[0], adapted[0].lora_A.detach().requires_grad_()
    adapted(x).square().sum().backward()

    def gradient(constant):
        base = layer.state_dict()["weight"]
        weight = base + 2.0 * (layer.lora_B.detach().flatten(1) @ down.flatten(1)).view_as(base)
        norm = weight.flatten(1).norm(dim=1)
        norm = norm.detach() if constant else norm
        weight = weight * (layer.magnitude.detach() / norm).view(-1, *[1] * (base.ndim - 1))
        y = F.linear(x, weight, layer.bias) if base.ndim == 2 else F.conv2d(x, weight, layer.bias, stride=2, padding=1)
        return torch.autograd.grad(y.square().sum(), down)[0]

    close(layer.lora_A.grad, gradient(constant=True), tol=1e-5)
    with pytest.raises(AssertionError):
        close(layer.lora_A.grad, gradient(constant=False), tol=1e-2)


def test_dora_makes_one_dense_product_and_no_dense_gradient():
    n, i, o, r = 64, 48, 96, 2
    layer = add_dora(nn.Sequential(nn.Linear(i, o)), r, r, ".*")
    x, shapes = torch.randn(n, i, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t):
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    small = 2 * n * r * (i + o)                                    # x A^T and B, each time they are used
    assert forward.get_total_flops() == 2 * n * i * o + small + 2 * o * i * r       # the last: B A for the norm
    assert backward.get_total_flops() == 2 * n * i * o + 2 * small               # a weight gradient: 2 n i o more
    assert layer[0].weight.grad is None and not layer[0].weight.requires_grad
    assert sum(shape in [(o, i), (i, o)] for shape in shapes) <= 1                  # W itself, and never W'


def test_dora_only_adapters_train():
    model = add_lora(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3)), 2, 2, r"[02]")
    add_dora(nested := nn.ModuleDict({"a": model, "q": nn.Linear(4, 4)}), 2, 2, ["q"])
    trained = {name for name, parameter in nested.named_parameters() if parameter.requires_grad}
    assert trained == {"a.0.lora_A", "a.0.lora_B", "a.2.lora_A", "a.2.lora_B", "q.lora_A", "q.lora_B", "q.magnitude"}


def test_dora_trains_half_precision_bases_with_float32_adapters():
    model = add_dora(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).bfloat16(), 3, 3, ".*")
    y = model(torch.randn(5, 6, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model[0].lora_B.grad.dtype == model[0].magnitude.grad.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in adapter_state(model).values())


def test_dora_targets_are_a_whole_name_or_its_endings():
    def model():
        block = {"q": nn.Linear(4, 4), "norm_q": nn.Linear(4, 4), "ffn": nn.Sequential(nn.Linear(4, 8))}
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(block)]), "patch": nn.Conv3d(3, 4, 2)})

    every = {"blocks.0.q", "blocks.0.norm_q", "blocks.0.ffn.0", "patch"}
    assert set(adapted_layers(add_lora(model(), 2, 2, ".*"))) == every
    assert set(adapted_layers(add_lora(model(), 2, 2, r"blocks\.\d+\..*q"))) == {"blocks.0.q", "blocks.0.norm_q"}
    assert set(adapted_layers(add_lora(model(), 2, 2, ["q", "ffn.0"]))) == {"blocks.0.q", "blocks.0.ffn.0"}
    for bad in ("blocks", ["q", "fnn.0"]):
        with pytest.raises(ValueError, match="blocks|fnn.0"):
            add_lora(model(), 2, 2, bad)
    with pytest.raises(ValueError, match="blocks.0.q"):
        add_dora(add_lora(model(), 2, 2, ["q"]), 2, 2, ".*")


def test_dora_names_are_the_official_ones():
    decoder = nn.ModuleDict({"conv1": TwoFrameConv(16, 32, 3), "to_qkv": nn.Conv2d(32, 96, 1)})
    add_lora(vae := nn.ModuleDict({"decoder": decoder}), 4, 1.0, r"decoder\..*")
    assert {key: tuple(tensor.shape) for key, tensor in adapter_state(vae).items()} == {
        "decoder.conv1.conv3D.lora_A.default.weight": (4, 16, 3, 3, 3),
        "decoder.conv1.conv3D.lora_B.default.weight": (32, 4, 1, 1, 1),
        "decoder.to_qkv.lora_A.default.weight": (4, 32, 1, 1),
        "decoder.to_qkv.lora_B.default.weight": (96, 4, 1, 1)}
    assert adapted_layers(vae)["decoder.conv1"].lora_scale == 0.25
    attention = nn.ModuleDict({"q": nn.Linear(8, 12)})
    add_dora(dit := nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])}), 4, 4, ["q"])
    assert {key: tuple(tensor.shape) for key, tensor in adapter_state(dit).items()} == {
        "blocks.0.self_attn.q.lora_A.default.weight": (4, 8),
        "blocks.0.self_attn.q.lora_B.default.weight": (12, 4),
        "blocks.0.self_attn.q.lora_magnitude_vector.default.weight": (12,)}


@pytest.mark.parametrize("kind", DORA_LAYERS)
def test_dora_state_loads_back_strictly(kind):
    _, adapted, x = adapted_toy(kind, add_dora)
    state = {key: tensor.clone() for key, tensor in adapter_state(adapted).items()}
    _, other, _ = adapted_toy(kind, add_dora, seed=1)
    other.load_state_dict(adapted.state_dict())
    for name, parameter in other.named_parameters():
        parameter.data += 1.0 * parameter.requires_grad
    load_adapter_state(other, {"base_model.model." + key.replace(".default", ""): t for key, t in state.items()})
    assert torch.equal(other(x), adapted(x))
    key = next(iter(state))
    fewer = {k: tensor for k, tensor in state.items() if k != key}
    twice = state | {key.replace(".default", ""): state[key]}
    for bad in (fewer, twice, state | {"1.lora_A.weight": x}, state | {key: state[key][:1]}):
        with pytest.raises(ValueError, match="lora_A"):
            load_adapter_state(other, bad)


def dora_respelled(adapter, dialect):
    """The keys of `dora_file` in another dialect; scaled so that alpha / r makes up for it where there is an alpha."""
    short = {key.replace(".default", ""): tensor for key, tensor in adapter.items()}
    if dialect == "peft":
        return {"base_model.model." + key: tensor for key, tensor in short.items()}
    if dialect == "comfy":
        return {"diffusion_model." + key.replace("_vector.weight", "_vector"): tensor for key, tensor in short.items()}
    if dialect == "causal":
        return {key.replace(".lora", ".conv3D.lora").replace("lora_magn", "magn"): t for key, t in adapter.items()}
    down_up = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in short.items()}
    if dialect == "lightx2v":
        return {"diffusion_model." + key: tensor for key, tensor in down_up.items()}
    layers = {key.rpartition(".lora_")[0] for key in short}
    halved = {key: tensor * 2 if "lora_up" in key else tensor for key, tensor in down_up.items()}
    halved |= {layer + ".alpha": torch.tensor(2.0) for layer in layers}              # s = 2 / 4
    if dialect == "alpha":
        return halved
    return {f"{dialect}{layer.replace('.', '_')}.{key[len(layer) + 1:]}": tensor for layer in layers
            for key, tensor in halved.items() if key.startswith(layer + ".")}


@pytest.mark.parametrize("dialect", ["peft", "comfy", "causal", "lightx2v", "alpha", "lora_unet_", "lora_unet__"])
def test_dora_every_dialect_merges_to_the_same(dialect):
    state = dora_toy_block()
    adapter = dora_file(state)
    expected, respelled = merge_adapter(state, adapter, 0.5), dora_respelled(adapter, dialect)
    assert len(respelled) >= len(adapter) and not set(respelled) & set(adapter)
    merged = merge_adapter(state, respelled, 0.5)
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())


def test_dora_diffs_go_to_weight_bias_and_modulation():
    state = dora_toy_block()
    before = {name: weight.clone() for name, weight in state.items()}
    adapter = {"diffusion_model.blocks.0.norm3.diff": torch.full((48,), 1.0),
               "diffusion_model.blocks.0.norm3.diff_b": torch.full((48,), 2.0),
               "diffusion_model.blocks.0.diff_m": torch.full((1, 6, 48), 3.0),
               "diffusion_model.blocks.1.modulation.diff": torch.full((1, 6, 48), 4.0),
               "blocks.1.ffn.0.diff": torch.ones(96, 48), "lora_unet_blocks_1_ffn_2.diff_b": torch.ones(48)}
    added = {"blocks.0.norm3.weight": 1, "blocks.0.norm3.bias": 2, "blocks.0.modulation": 3, "blocks.1.modulation": 4,
             "blocks.1.ffn.0.weight": 1, "blocks.1.ffn.2.bias": 1}
    merged = merge_adapter(state, adapter, 0.5)
    assert all(torch.equal(merged[name], before[name] + 0.5 * added.get(name, 0)) for name in before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert all((merged[name] is state[name]) == (name not in added) for name in state)


def test_dora_diff_of_a_weight_comes_after_its_norm():
    delta = dora.Delta(down=torch.randn(2, 6), up=torch.randn(8, 2), magnitude=torch.ones(8), diff=torch.randn(8, 6))
    merged = merge_tensor(torch.randn(8, 6), delta)
    torch.testing.assert_close((merged - delta.diff).norm(dim=1), torch.ones(8))


def test_dora_merge_is_float32_inside_and_keeps_the_dtype():
    state = dora_toy_block()
    half = {name: weight.bfloat16() for name, weight in state.items()}
    exact = merge_adapter({name: weight.float() for name, weight in half.items()}, dora_file(state))
    merged = merge_adapter(half, dora_file(state))
    assert all(torch.equal(merged[name], exact[name].bfloat16()) for name in merged)


def test_dora_parses_against_meta_tensors():
    state = dora_toy_block()
    deltas = parse_adapter(lightx2v_file(state), {name: weight.to("meta") for name, weight in state.items()})
    merged = {name: merge_tensor(weight, deltas[name]) if name in deltas else weight for name, weight in state.items()}
    expected = merge_adapter(state, lightx2v_file(state))
    assert all(torch.equal(merged[name], expected[name]) for name in state)


Q = "blocks.0.self_attn.q"


@pytest.mark.parametrize("change, complaint", [
    ({"blocks.7.self_attn.q.lora_A.weight": (4, 48)}, "blocks.7.self_attn.q.lora_A.weight finds no target"),
    ({f"{Q}.lora_C.weight": (4, 48)}, f"{Q}.lora_C.weight finds no target"),
    ({f"{Q}.weight": (48, 48)}, f"{Q}.weight finds no target"),
    ({f"{Q}.lora_A.weight": (4, 48)}, f"{Q}.lora_A.weight and {Q}.lora_A.default.weight are the same"),
    ({f"{Q}.lora_A.default.weight": None}, f"{Q}.lora_B.default.weight stands without"),
    ({f"{Q}.lora_A.default.weight": (4, 47)}, f"{Q}.lora_A.default.weight has shape (4, 47), not (4, 48)"),
    ({f"{Q}.lora_B.default.weight": (48, 5)}, f"{Q}.lora_B.default.weight has shape (48, 5), not (48, 4)"),
    ({f"{Q}.lora_magnitude_vector.default.weight": (1, 48)}, "default.weight has shape (1, 48), not (48,)"),
    ({"blocks.0.norm3.diff": (49,)}, "blocks.0.norm3.diff has shape (49,), not (48,)"),
    ({"blocks.0.norm3.alpha": ()}, "blocks.0.norm3.alpha stands without"),
    ({f"{Q}.dora_scale": (1, 48)}, f"{Q}.dora_scale is a LyCORIS magnitude"),
    ({f"{Q}.dora_scale": (48, 1)}, f"{Q}.dora_scale is a LyCORIS magnitude"),
])
def test_dora_key_without_target_is_refused(change, complaint):
    state = dora_toy_block()
    adapter = dora_file(state) | {key: shape and torch.zeros(shape) for key, shape in change.items() if shape != ()}
    adapter |= {key: torch.tensor(1.0) for key, shape in change.items() if shape == ()}
    with pytest.raises(ValueError) as error:
        merge_adapter(state, {key: tensor for key, tensor in adapter.items() if tensor is not None})
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_dora_lists_ten_problems_at_most():
    state = dora_toy_block()
    other = {name: weight for name, weight in state.items() if name.startswith("blocks.0")}
    with pytest.raises(ValueError) as error:
        merge_adapter(other, dora_file(state))
    assert str(error.value).count("finds no target") == 10 and "and 20 more" in str(error.value)


class Opens:
    def __reduce__(self):
        return os.mkdir, (os.environ["DORA_TRAP"],)


def test_dora_reads_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    tensors = {"blocks.0.ffn.0.lora_A.weight": torch.randn(40, 50)}
    torch.save(tensors, tmp_path / "good.bin")
    save_file(tensors, tmp_path / "good.safetensors")
    for good in ("good.bin", "good.safetensors"):
        assert torch.equal(*(t["blocks.0.ffn.0.lora_A.weight"] for t in (read_adapter(tmp_path / good), tensors)))
        data = (tmp_path / good).read_bytes()
        (tmp_path / good.replace("good", "cut")).write_bytes(data[:len(data) // 2])
        (tmp_path / good.replace("good", "empty")).write_bytes(b"")
        (tmp_path / good.replace("good", "image")).write_bytes(b"\x89PNG\r\n\x1a\n" + data[:500])
    torch.save({"step": 3}, tmp_path / "numbers.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    monkeypatch.setenv("DORA_TRAP", str(tmp_path / "sprung"))
    torch.save(tensors | {"x": Opens()}, tmp_path / "code.pth")
    (tmp_path / "old_code.pth").write_bytes(pickle.dumps({"x": Opens()}))
    bad = [path for path in tmp_path.iterdir() if not path.name.startswith("good")]
    assert len(bad) == 10
    for path in bad:
        with pytest.raises(ValueError, match=path.name):
            read_adapter(path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(FileNotFoundError, match="gone.bin"):
        read_adapter(tmp_path / "gone.bin")


def test_dora_shows_its_stage():
    shown = subprocess.run([sys.executable, Path(dora.__file__)], capture_output=True, text=True, check=True).stdout
    assert "0.lora_magnitude_vector.default.weight" in shown and "merged and unmerged differ by" in shown


# ---- the diffusion transformer


DIT_TINY = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=16)


def tiny_dit():
    model = WanDiT(DIT_TINY)
    model.load_state_dict(named_like(model))
    return model.requires_grad_(False)


def dit_inputs():
    return named("dit_tiny.z", (16, 3, 4, 6))[None], torch.tensor([750.0]), named("dit_tiny.context", (7, 32))[None]


def dit_folder(folder, state=None, shards=1):
    """A checkpoint folder of the tiny model: config.json and one file, or shards and their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"} | asdict(DIT_TINY)))
    state = tiny_dit().state_dict() if state is None else state
    if shards == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return folder
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if weight_map[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def block_adapters(folder):
    blocks = {name: p for name, p in tiny_dit().state_dict().items() if name.startswith("blocks.")}
    save_file(dora_file(blocks), folder / "dora.safetensors")
    save_file(lightx2v_file(blocks), folder / "distill.safetensors")
    return (folder / "dora.safetensors", 1.0), (folder / "distill.safetensors", 1.0)


def test_dit_equals_official():
    model, (z, t, context) = tiny_dit(), dit_inputs()
    close(model(z, t, context)[0], official["dit_tiny.v"])
    two = model(torch.cat([torch.randn_like(z), z]), torch.tensor([20.0, 750.0]), [torch.randn(16, 32), context[0]])
    close(two[1], official["dit_tiny.v"])


def test_dit_has_the_official_names_and_sizes():
    for config, tensors, parameters in ((WAN_1_3B, 825, 1_418_996_800), (WAN_14B, 1095, 14_288_491_584)):
        with torch.device("meta"):
            state = WanDiT(config).state_dict()
        assert len(state) == tensors and sum(p.numel() for p in state.values()) == parameters
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    assert shapes["patch_embedding.weight"] == (5120, 16, 1, 2, 2) and shapes["head.modulation"] == (1, 2, 5120)
    assert shapes["text_embedding.0.weight"] == (5120, 4096) and shapes["time_embedding.0.weight"] == (5120, 256)
    assert shapes["time_projection.1.weight"] == (30720, 5120) and shapes["head.head.weight"] == (64, 5120)
    assert shapes["blocks.39.ffn.0.weight"] == (13824, 5120) and shapes["blocks.39.modulation"] == (1, 6, 5120)
    layers = {name[9:-7] for name in shapes if name.startswith("blocks.7.") and name.endswith(".weight")}
    attention = {f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "q k v o norm_q norm_k".split()}
    assert layers == attention | {"norm3", "ffn.0", "ffn.2"}


@pytest.mark.parametrize("head_dim, pairs", [(128, (22, 21, 21)), (24, (4, 4, 4)), (32, (6, 5, 5)), (64, (12, 10, 10))])
def test_dit_rope_splits_a_head_over_time_height_and_width(head_dim, pairs):
    t, h, w = 3, 4, 5
    cos, sin = rope_table(head_dim, t, h, w)
    assert cos.shape == (t * h * w, head_dim // 2)
    angle = torch.atan2(sin, cos)
    at, ah, aw = (angle[position] for position in (h * w, w, 1))     # the tokens (1, 0, 0), (0, 1, 0), (0, 0, 1)
    expected = [10000 ** (-i / k) for k in pairs for i in range(k)]
    ends = [0, pairs[0], pairs[0] + pairs[1], head_dim // 2]
    for row, first, last in zip((at, ah, aw), ends, ends[1:]):
        assert torch.allclose(row[first:last], torch.tensor(expected[first:last]), atol=1e-6)
        assert not row[:first].any() and not row[last:].any()


def test_dit_attention_sees_relative_positions():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 24)
    t, h, w = 3, 4, 5
    rope = rope_table(24, t, h, w)
    logits = (rotate(q.expand(1, 1, 60, 24), rope) @ rotate(k.expand(1, 1, 60, 24), rope).mT).view(t, h, w, t, h, w)
    close(logits[:-1, :, :, :-1], logits[1:, :, :, 1:], 1e-5)
    close(logits[:, :-1, :, :, :-1], logits[:, 1:, :, :, 1:], 1e-5)
    close(logits[:, :, :-1, :, :, :-1], logits[:, :, 1:, :, :, 1:], 1e-5)
    for axis in (3, 4, 5):
        first, second = logits[0, 0, 0].movedim(axis - 3, 0)[:2]
        assert (first - second).abs().min() > 1e-4       # every axis counts
    assert torch.allclose(rotate(q.expand(1, 1, 60, 24), rope).norm(dim=-1), q.norm(), rtol=1e-5)


def test_dit_pads_the_context_with_zeros_before_the_text_mlp_and_does_not_mask_them():
    model, (z, t, context) = tiny_dit(), dit_inputs()
    padded = torch.cat([context, torch.zeros(1, 9, 32)], dim=1)
    assert torch.equal(model(z, t, context), model(z, t, padded))
    assert not torch.allclose(model(z, t, context), model(z, t, torch.cat([context, context, context[:, :2]], dim=1)))
    seen = []
    model.text_embedding.register_forward_hook(lambda module, inputs, y: seen.append(y))
    v = model(z, t, context)
    assert seen[0].shape == (1, 16, 48) and seen[0][0, 7:].abs().min() > 0      # the MLP's answer to zeros is not zero
    model.config = DiTConfig(**asdict(DIT_TINY) | {"text_len": 8})
    assert (model(z, t, context) - v).abs().max() > 1e-3 * v.std()                # fewer zeros, another answer


def test_dit_time_is_cosines_then_sines():
    t = torch.tensor([0.0, 3.0, 750.0])
    e = sinusoids(t, 256)
    assert e.dtype == torch.float32 and torch.equal(e[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    for i in (0, 1, 64, 127):
        assert math.isclose(e[2, i], math.cos(750 * 10000 ** (-i / 128)), abs_tol=1e-6)
        assert math.isclose(e[1, 128 + i], math.sin(3 * 10000 ** (-i / 128)), abs_tol=1e-6)


def test_dit_keeps_time_in_float32(tmp_path):
    z, _, context = dit_inputs()
    near, far = torch.tensor([988.49]), torch.tensor([987.17])
    assert near.bfloat16() == far.bfloat16() == 988
    plain = tiny_dit()
    change = plain(z, near, context) - plain(z, far, context)
    for model in (load_dit(dit_folder(tmp_path / "tiny"), dtype=torch.bfloat16), tiny_dit().bfloat16()):
        v = model(z, near, context)
        assert v.dtype == torch.float32
        assert (v - plain(z, near, context)).std() < 0.05 * v.std()
        assert (v - model(z, far, context) - change).std() < 0.5 * change.std()
    rounded = plain(z, near.bfloat16().float(), context) - plain(z, far.bfloat16().float(), context)
    assert not rounded.any()


def test_dit_norms_modulation_and_stream_are_float32_for_bfloat16_weights(tmp_path):
    model, (z, t, context) = load_dit(dit_folder(tmp_path / "tiny"), dtype=torch.bfloat16), dit_inputs()
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"time_embedding.0.weight", "head.head.weight", "head.modulation", "blocks.0.modulation",
            "blocks.1.norm3.bias", "blocks.1.self_attn.norm_q.weight"} <= kept and "blocks.0.ffn.0.weight" not in kept
    dtypes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, y, name=name: dtypes.update({name: y.dtype}))
    model(z, t, context)
    float32 = [dtypes[f"blocks.{i}{norm}"] for i in (0, 1) for norm in ("", ".norm1", ".norm2", ".norm3")]
    bfloat16 = [dtypes[f"blocks.0.{layer}"] for layer in ("self_attn.q", "cross_attn.o", "ffn.0")]
    assert set(float32) == {torch.float32} and set(bfloat16) == {torch.bfloat16}


def test_dit_starts_at_zero_and_learns():
    torch.manual_seed(0)
    model, (z, t, context) = WanDiT(DIT_TINY), dit_inputs()
    assert not model(z, t, context).any() and model.head.head.bias.requires_grad
    assert model.blocks[0].norm3.weight.eq(1).all() and not model.blocks[0].ffn[0].bias.any()
    target = torch.randn_like(z)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (model(z, t, context) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_dit_blocks_can_be_checkpointed_from_outside():
    model, (z, t, context) = tiny_dit().requires_grad_(True), dit_inputs()
    model(z, t, context).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *inputs, f=forward: torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=False)
    model(z, t, context).square().sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_dit_refuses_what_it_cannot_cut_or_hold():
    model, (z, t, context) = tiny_dit(), dit_inputs()
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*patches"):
        model(z[..., :5], t, context)
    with pytest.raises(ValueError, match="16 text tokens"):
        model(z, t, torch.randn(1, 17, 32))


def test_dit_folder_shards_and_single_file_are_the_same_model(tmp_path):
    inputs = dit_inputs()
    folder, sharded = dit_folder(tmp_path / "one"), dit_folder(tmp_path / "three", shards=3)
    for path in (folder, sharded, folder / "diffusion_pytorch_model.safetensors", str(folder)):
        model = load_dit(path)
        assert model.config == DIT_TINY
        close(model(*inputs)[0], official["dit_tiny.v"])
    file = folder / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as opened:
        opened.write(b" " * file.stat().st_size)
    close(model(*inputs)[0], official["dit_tiny.v"])                        # the file is not the model's memory


def test_dit_config_comes_from_the_tensors_where_no_file_says_it(tmp_path):
    for config in (WAN_1_3B, WAN_14B):
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in WanDiT(config).state_dict().items()}
        assert read_config(tmp_path / "model.safetensors", shapes) == config
    path = dit_folder(tmp_path / "tiny") / "config.json"
    assert DiTConfig(**{k: v for k, v in json.loads(path.read_text()).items() if k in asdict(DIT_TINY)}) == DIT_TINY
    path.write_text(json.dumps({"num_heads": 2, "text_len": 16}))
    assert load_dit(tmp_path / "tiny").config == DIT_TINY
    path.unlink()
    with pytest.raises(ValueError, match="number of heads"):
        load_dit(tmp_path / "tiny")


def test_dit_config_of_impossible_numbers_is_refused(tmp_path):
    path = dit_folder(tmp_path / "tiny") / "config.json"
    said = json.loads(path.read_text())
    for wrong in (dict(num_heads=0), dict(num_heads=5), dict(num_heads=16), dict(num_heads=True), dict(dim="48"),
                  dict(text_len=None), dict(ffn_dim=-1), dict(num_layers=2.0), dict(eps="1e-6"), dict(eps=0)):
        path.write_text(json.dumps(said | wrong))
        with pytest.raises(ValueError, match=f"config.json.*{next(iter(wrong))}") as error:
            load_dit(tmp_path / "tiny")
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(said | dict(patch_size=2)))              # the tensors know better
    assert load_dit(tmp_path / "tiny").config == DIT_TINY


def test_dit_merges_adapters_in_order_while_loading(tmp_path):
    folder, (dora, distill) = dit_folder(tmp_path / "tiny", shards=2), block_adapters(tmp_path)
    inputs = dit_inputs()
    close(load_dit(folder, [dora])(*inputs)[0], official["dit_tiny.v_dora"])
    both = load_dit(folder, [dora, distill])
    close(both(*inputs)[0], official["dit_tiny.v_dora_lightx2v"])
    close(both.state_dict()["blocks.0.self_attn.q.bias"], official["dit_tiny.qb_all"])
    swapped = load_dit(folder, [distill, dora])(*inputs)[0]
    assert (swapped - official["dit_tiny.v_dora_lightx2v"]).std() > 0.1 * swapped.std()
    half = load_dit(folder, [dora, distill], torch.bfloat16).state_dict()
    exact = {name: p.to(half[name].dtype) for name, p in both.state_dict().items()}
    assert all(torch.equal(half[name], p) for name, p in exact.items())     # one rounding, after both merges
    with pytest.raises(AssertionError):
        close(load_dit(folder, [(dora[0], 0.5)])(*inputs)[0], official["dit_tiny.v_dora"])


def test_dit_refuses_adapters_that_do_not_fit(tmp_path):
    folder, adapter = dit_folder(tmp_path / "tiny"), tmp_path / "other.safetensors"
    save_file({f"blocks.{i}.self_attn.q.diff_b": torch.zeros(48) for i in range(1, 40)}, adapter)
    with pytest.raises(ValueError, match="other.safetensors.*blocks.10.self_attn.q.diff_b") as error:
        load_dit(folder, [(adapter, 1.0)])
    assert str(error.value).count("diff_b") == 10 and "28 more" in str(error.value)


def test_dit_refuses_wrong_files_in_one_sentence(tmp_path):
    def refusal(path, error=ValueError):
        with pytest.raises(error) as caught:
            load_dit(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    state = tiny_dit().state_dict()
    odd = {name: p for name, p in state.items() if name != "blocks.0.ffn.0.weight"} | {"img_emb.weight": torch.zeros(2)}
    odd["head.modulation"] = torch.zeros(1, 2, 40)
    message = refusal(dit_folder(tmp_path / "odd", odd))
    assert "3 tensors" in message and "blocks.0.ffn.0.weight is missing" in message
    assert "img_emb.weight is (2,), expected nothing" in message
    assert "head.modulation is (1, 2, 40), expected (1, 2, 48)" in message
    many = refusal(dit_folder(tmp_path / "many", state | {f"extra.{i}": torch.zeros(1) for i in range(30)}))
    assert "30 tensors" in many and many.count("extra.") == 10

    sharded = dit_folder(tmp_path / "sharded", shards=2)
    shard = sharded / "diffusion_pytorch_model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    for broken in (content[:-100], content[:50], b"", b"<!doctype html>" * 9):
        shard.write_bytes(broken)
        assert shard.name in refusal(sharded)
    shard.unlink()
    assert shard.name in refusal(sharded, FileNotFoundError)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text("[1, 2")
    assert "index.json" in refusal(sharded)

    assert "diffusion_pytorch_model.safetensors" in refusal(tmp_path / "sharded" / "..", FileNotFoundError)
    refusal(tmp_path / "nothing.safetensors", FileNotFoundError)
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    assert "not a Wan DiT" in refusal(tmp_path / "vae.safetensors")
    folder = dit_folder(tmp_path / "config")
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)


# ---- text


TEXT_TINY = T5Config(vocab=64, dim=32, dim_attn=48, dim_ffn=80, num_heads=4, num_layers=3, num_buckets=32)
UMT5_FILE = "models_t5_umt5-xxl-enc-bf16"
CAPTIONS = ["A red glass ball moving from left to right.", "A semi-transparent blue ghost, moving from right to left."]


def tiny_umt5():
    model = UMT5(TEXT_TINY)
    state = named_like(model)
    state["token_embedding.weight"] *= 32 ** 0.5
    model.load_state_dict(state)
    return model.requires_grad_(False)


def text_folder(folder, ending=".safetensors"):
    (folder / "google/umt5-xxl").mkdir(parents=True)
    make_tokenizer(CAPTIONS).save(str(folder / "google/umt5-xxl/tokenizer.json"))
    write = save_file if ending == ".safetensors" else torch.save
    write(tiny_umt5().state_dict(), folder / (UMT5_FILE + ending))
    return folder


def test_text_equals_official():
    ids = torch.tensor([[5, 9, 2, 33, 63, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    close(tiny_umt5()(ids, mask)[0, :6], official["t5_tiny.context"])


def test_text_has_the_official_names_and_sizes():
    with torch.device("meta"):
        state = UMT5(T5Config()).state_dict()
    assert len(state) == 242 and sum(p.numel() for p in state.values()) == 5_680_910_336
    block = {name[10:]: tuple(p.shape) for name, p in state.items() if name.startswith("blocks.23.")}
    assert block == {"norm1.weight": (4096,), "attn.q.weight": (4096, 4096), "attn.k.weight": (4096, 4096),
                     "attn.v.weight": (4096, 4096), "attn.o.weight": (4096, 4096), "norm2.weight": (4096,),
                     "ffn.gate.0.weight": (10240, 4096), "ffn.fc1.weight": (10240, 4096),
                     "ffn.fc2.weight": (4096, 10240), "pos_embedding.embedding.weight": (32, 64)}
    assert state["token_embedding.weight"].shape == (256384, 4096) and state["norm.weight"].shape == (4096,)


def test_text_padding_does_not_reach_valid_tokens():
    torch.manual_seed(0)
    model, ids = tiny_umt5(), torch.randint(3, 64, (2, 12))
    mask = torch.arange(12) < torch.tensor([[5], [12]])
    context = model(ids, mask)
    close(context[0, :5], model(ids[:1, :5], mask[:1, :5])[0], 1e-5)
    ids[0, 5:] = 0
    assert torch.equal(model(ids, mask)[0, :5], context[0, :5])
    assert not torch.allclose(model(ids, torch.ones_like(mask))[0, :5], context[0, :5], atol=1e-3)


def test_text_distances_fall_into_t5_buckets():
    buckets = distance_buckets(300, 32)
    expected = [(0, 0), (1, 1), (7, 7), (8, 8), (11, 8), (12, 9), (15, 9), (16, 10), (23, 11), (32, 12), (64, 14),
                (90, 14), (91, 15), (128, 15), (299, 15)]
    for distance, bucket in expected:
        assert buckets[distance, 0] == bucket                               # the key stands on the left
        assert buckets[0, distance] == bucket + 16 * (distance > 0)         # on the right
    assert all(len(set(buckets.diagonal(offset).tolist())) == 1 for offset in (-9, 0, 40))


def test_text_runs_in_bfloat16():
    ids, mask = torch.randint(3, 64, (1, 9)), torch.ones(1, 9)
    exact, model = tiny_umt5(), tiny_umt5().bfloat16()
    assert model(ids, mask).dtype == torch.bfloat16
    assert (model(ids, mask).float() - exact(ids, mask)).std() < 0.03 * exact(ids, mask).std()


def test_text_encoder_learns_word_order_at_once():
    torch.manual_seed(0)
    rng, config = random.Random(0), T5Config(32, 64, 64, 128, 4, 2, 32)
    phrases = [f"{a} {b} moving from {way}" for a in ("red", "blue", "green") for b in ("ball", "star", "cube", "ring")
               for way in ("left to right", "right to left")]
    model = TextEncoder(make_tokenizer(phrases), UMT5(config))
    head = nn.Linear(64, 1)
    optimizer = torch.optim.AdamW([*model.model.parameters(), *head.parameters()], lr=1e-3)
    right = []
    for _ in range(60):
        batch = rng.sample(phrases, 16)
        is_right = torch.tensor([float(phrase.endswith("right")) for phrase in batch])
        logits = head(torch.stack([context.mean(0) for context in model(batch)]))[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, is_right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right += [((logits > 0) == is_right.bool()).float().mean().item()]
    assert min(right[-20:]) == 1
    assert all(p.grad.abs().sum() > 0 for p in model.model.parameters())


def test_text_starts_as_t5_but_for_a_large_position_bias():
    torch.manual_seed(0)
    model = UMT5(T5Config(512, 128, 256, 512, 4, 2, 32))
    std = {name: p.std().item() for name, p in model.state_dict().items() if p.ndim == 2}
    expected = {"attn.q": (128 * 64) ** -0.5, "attn.k": 128 ** -0.5, "attn.o": 256 ** -0.5, "ffn.gate.0": 128 ** -0.5,
                "ffn.fc2": 512 ** -0.5, "pos_embedding.embedding": 2}
    assert all(abs(std[f"blocks.1.{name}.weight"] / value - 1) < 0.2 for name, value in expected.items())
    assert abs(std["token_embedding.weight"] - 1) < 0.05 and model.norm.weight.eq(1).all()
    model.init_weights(position_std=0.1)
    assert model.blocks[0].pos_embedding.embedding.weight.std() < 0.15


def test_clean_prompt():
    assert clean_prompt("  a  red\n\tball ") == "a red ball"
    assert clean_prompt("salt &amp;amp; pepper &lt;b&gt; &amp;quot;x&amp;quot;") == 'salt & pepper <b> "x"'
    assert clean_prompt("\u201cit\u2019s\u201d glass") == '"it\'s" glass'
    assert clean_prompt("a \udce9 ball") == "a ? ball"                 # what a shell makes of invalid UTF-8
    assert clean_prompt("\uff21\uff11\uff0c\u3000\u900f\u660e") == "A1, \u900f\u660e"
    assert clean_prompt("\u8272\u8c03\u8273\u4e3d \U0001f98a\u200d\U0001f525 caf\u00e9 \u00bd") == \
        "\u8272\u8c03\u8273\u4e3d \U0001f98a\u200d\U0001f525 caf\u00e9 \u00bd"     # what NFKC would change stays


def test_make_tokenizer_counts_words_and_repeats_itself(tmp_path):
    tokenizer = make_tokenizer(CAPTIONS)
    vocab = tokenizer.get_vocab()
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    twice = [".", "a", "from", "left", "moving", "right", "to"]
    once = [",", "-", "ball", "blue", "ghost", "glass", "red", "semi", "transparent"]
    assert [tokenizer.id_to_token(i) for i in range(3, len(vocab))] == twice + once
    assert tokenizer.to_str() == make_tokenizer(CAPTIONS).to_str()
    encoded = tokenizer.encode("A SEMI-transparent, red dragon.")
    assert encoded.tokens == ["a", "semi", "-", "transparent", ",", "red", "<unk>", "."]


def test_text_encoder_ends_each_prompt_once_and_cuts_contexts_to_their_length():
    encoder = TextEncoder(make_tokenizer(CAPTIONS), tiny_umt5())
    ids, mask = encoder.tokenize(["red ball", "", "a red &amp; ball moving"])
    assert mask.sum(1).tolist() == [3, 1, 6] and ids[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert all(row[valid][-1] == 1 and (row[~valid] == 0).all() for row, valid in zip(ids, mask))
    contexts = encoder(["red ball", "", "a red &amp; ball moving"])
    assert [tuple(c.shape) for c in contexts] == [(3, 32), (1, 32), (6, 32)]
    close(contexts[0], encoder(["red ball"])[0], 1e-5)
    assert not torch.allclose(contexts[0], encoder(["ball red"])[0], atol=1e-2)
    encoder.tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert torch.equal(encoder.tokenize(["red ball"])[0], ids[:1, :3])      # umT5's own file appends </s> too


def test_text_encoder_cuts_long_prompts_with_a_warning():
    encoder = TextEncoder(make_tokenizer(CAPTIONS), tiny_umt5(), text_len=8)
    with pytest.warns(UserWarning, match="3001 tokens: the last 2993"):
        ids, mask = encoder.tokenize(["red " * 3000])
    assert ids.tolist() == [[encoder.tokenizer.token_to_id("red")] * 7 + [1]] and mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encoder(["red " * 7])[0]) == 8
        assert encoder(["\u4e00\u4e2a\u7ea2\u8272\u7684\u7403 \U0001f534"])[0].isfinite().all()


def test_text_encoder_loads_from_a_folder(tmp_path):
    expected = TextEncoder(make_tokenizer(CAPTIONS), tiny_umt5())(CAPTIONS)
    for ending in (".safetensors", ".pth"):
        folder = text_folder(tmp_path / ending[1:], ending)
        (folder / "config.json").write_text(json.dumps({"text_len": 9}))
        for path in (folder, str(folder), folder / (UMT5_FILE + ending)):
            encoder = load_text_encoder(path)
            assert encoder.model.config == TEXT_TINY and encoder.text_len == 9
        (folder / "config.json").unlink()
        encoder = load_text_encoder(folder)
        assert encoder.text_len == 512 and all(torch.equal(a, b) for a, b in zip(encoder(CAPTIONS), expected))
        assert load_text_encoder(folder, torch.bfloat16)(CAPTIONS)[0].dtype == torch.bfloat16


def test_text_encoder_ignores_lengths_that_a_tokenizer_file_asks_for(tmp_path):
    folder = text_folder(tmp_path / "base")
    tokenizer = make_tokenizer(CAPTIONS)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(folder / "google/umt5-xxl/tokenizer.json"))
    assert [len(context) for context in load_text_encoder(folder)(["red", "a red ball"])] == [2, 4]


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


def test_text_encoder_refuses_wrong_files_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = text_folder(tmp_path / "base", ".pth")
    weights, tokenizer = folder / (UMT5_FILE + ".pth"), folder / "google/umt5-xxl/tokenizer.json"
    whole, words = weights.read_bytes(), tokenizer.read_bytes()

    def refusal(file, error=ValueError):
        with pytest.raises(error) as caught:
            load_text_encoder(folder)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
        return str(caught.value)

    torch.save({"token_embedding.weight": Bomb()}, weights)
    assert "was not opened" in refusal(weights)
    assert not (tmp_path / "bomb-went-off").exists()
    for broken in (whole[:-500], whole[:100], b"", b"<!doctype html>" * 99):
        weights.write_bytes(broken)
        assert "download" in refusal(weights) or "was not opened" in refusal(weights)
    for foreign in ({"conv1.weight": torch.zeros(3)}, {"token_embedding.weight": 3}, [torch.zeros(3)]):
        torch.save(foreign, weights)
        assert "not a umT5 encoder" in refusal(weights)
    torch.save(tiny_umt5().state_dict() | {"norm.weight": torch.ones(31), "lm_head.weight": torch.ones(1)}, weights)
    message = refusal(weights)
    assert "norm.weight is (31,), expected (32,)" in message and "lm_head.weight is (1,), expected nothing" in message
    weights.unlink()
    refusal(weights, FileNotFoundError)
    weights.write_bytes(whole)
    for broken in (b"{}", b"", words[:-40]):
        tokenizer.write_bytes(broken)
        refusal(tokenizer)
    make_tokenizer([f"word{i}" for i in range(99)]).save(str(tokenizer))
    assert "more tokens" in refusal(folder)
    tokenizer.unlink()
    refusal(tokenizer, FileNotFoundError)
    tokenizer.write_bytes(words)
    (folder / "config.json").write_text("{")
    refusal(folder / "config.json")


# ---- losses


def small_clip(b=2):
    rgb, alpha = smooth_video("rgb", (b, 3, 5, 16, 24)), smooth_video("alpha", (b, 1, 5, 16, 24)).clamp(0, 1)
    return rgb, alpha


def test_palette_is_the_corners_of_the_rgb_cube():
    assert PALETTE.shape == (8, 3) and (PALETTE.abs() == 1).all() and len(PALETTE.unique(dim=0)) == 8


def test_renders():
    rgb, alpha = torch.full((2, 3, 1, 1, 3), 0.5), torch.tensor([0.0, 0.25, 1.0]).expand(2, 1, 1, 1, 3)
    colors = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    soft, hard = soft_render(rgb, alpha, colors), hard_render(rgb, alpha, colors)
    assert soft[0, :, 0, 0].tolist() == [[1.0, 0.875, 0.5], [-1.0, -0.625, 0.5], [1.0, 0.875, 0.5]]
    assert hard[1, :, 0, 0].tolist() == [[-1.0, 0.5, 0.5], [-1.0, 0.5, 0.5], [1.0, 0.5, 0.5]]
    assert torch.equal(soft_render(rgb, alpha, colors[0])[0], soft[0])  # one colour for all samples


def test_straight_alpha_is_not_premultiplied_alpha():
    """A grey pixel of alpha one half on white: straight 0.5 * 0 + 0.5, and not 0 + 0.5."""
    straight = soft_render(torch.full((1, 3, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1, 1), 0.5), torch.ones(3))
    assert torch.allclose(straight, torch.tensor(0.7))


def test_edge_loss_is_official():
    a, b = (smooth_video(key, (1, 3, 5, 16, 20)) for key in ("sobel.a", "sobel.b"))
    expected = official["official_edge_loss"].item()
    assert edge_loss(a, b, "central").item() == pytest.approx(expected, rel=1e-4)
    assert abs(edge_loss(a, b).item() - expected) > 0.1 * expected  # Sobel, the default, is another operator


@pytest.mark.parametrize("operator, inner", [("sobel", 8), ("central", 2)])
def test_edges_of_a_ramp(operator, inner):
    """Grey that rises by 1 a pixel: Sobel sees 8, central differences 2, in either direction; flat grey has none."""
    ramp = torch.arange(6.0).expand(6, 6) / 0.859
    flat = torch.zeros(1, 3, 1, 6, 6)
    for image in (ramp, ramp.T):
        edges = gradient_magnitude(image.expand(1, 3, 1, 6, 6), operator)[0, 0]
        assert torch.allclose(edges[1:-1, 1:-1], torch.tensor(float(inner)), atol=1e-4)
    assert gradient_magnitude(flat, operator).max() <= 1.01e-3


def vgg_file(path, change=None):
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128)}
    state = {f"features.{i}.weight": named(f"features.{i}.weight", (*s, 3, 3)) for i, s in shapes.items()}
    state |= {f"features.{i}.bias": named(f"features.{i}.bias", s[:1]) for i, s in shapes.items()}
    state["classifier.6.bias"] = torch.zeros(1000)
    state_to_save = change(state) if change else state
    torch.save(state_to_save, path, _use_new_zipfile_serialization=False)  # the old format that torchvision publishes
    return state


def test_vgg_is_relu2_2_of_zero_to_one_images(tmp_path):
    state = vgg_file(tmp_path / "vgg.pth")
    vgg, (x, _), (y, _) = VGG(tmp_path / "vgg.pth"), small_clip(), small_clip()
    y = -y

    def features(video):
        h = (video.transpose(1, 2).flatten(0, 1) + 1) / 2  # frames into the batch
        for i in (0, 2, 5, 7):
            h = F.max_pool2d(h, 2) if i == 5 else h
            h = F.relu(F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
        return h

    assert vgg(x, y).item() == pytest.approx((features(x) - features(y)).square().mean().item(), rel=1e-5)
    assert vgg(x, x) == 0 and not any(p.requires_grad for p in vgg.parameters())


def test_vgg_wrong_files_say_so_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth does not exist.*--perceptual 0"):
        VGG(tmp_path / "none.pth")
    vgg_file(tmp_path / "other.pth", lambda state: {k: v for k, v in state.items() if "classifier" in k})
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold the weights of VGG-16.*--perceptual 0"):
            VGG(tmp_path / name)


def test_reconstruction_loss_is_the_sum_of_its_terms(tmp_path):
    vgg_file(tmp_path / "vgg.pth")
    vgg, (x, _) = VGG(tmp_path / "vgg.pth"), small_clip()
    y = 0.5 * x
    expected = (x - y).abs().mean() + 200 * vgg(x, y) + 3 * edge_loss(x, y)
    assert torch.allclose(reconstruction_loss(x, y, vgg, perceptual=200, edge=3), expected)
    assert torch.allclose(reconstruction_loss(x, y, edge=0), (x - y).abs().mean())


def test_rgba_loss_compares_alpha_as_grey_of_the_same_range_as_colour():
    rgb, alpha = small_clip()
    parts = rgba_loss(rgb, 0.5 * alpha, rgb, alpha, edge=0)
    assert torch.allclose(parts["alpha"], alpha.mean())  # |2 (a - a/2)|


def test_random_colors_are_two_different_corners_and_repeat_with_the_seed():
    soft, hard = random_colors(500, torch.Generator().manual_seed(3))
    assert (soft != hard).any(1).all() and len(soft.unique(dim=0)) == len(hard.unique(dim=0)) == 8
    again, _ = random_colors(500, torch.Generator().manual_seed(3))
    assert torch.equal(soft, again)


def test_rgba_loss_ignores_colour_that_nobody_sees():
    """Other colours under alpha 0 make the same clip; another alpha or another visible colour does not."""
    rgb, alpha = small_clip()
    hidden = torch.where(alpha == 0, -rgb, rgb)
    parts = lambda *output: rgba_loss(*output, rgb, alpha, torch.Generator().manual_seed(0))
    assert set(parts(rgb, alpha)) == {"alpha", "soft", "hard"}
    assert all(v == 0 for v in parts(hidden, alpha).values())
    paler, fainter = parts(0.9 * rgb, alpha), parts(rgb, 0.9 * alpha + 0.05)
    assert paler["alpha"] == 0 and paler["soft"] > 0 and paler["hard"] > paler["soft"]
    assert fainter["alpha"] > 0 and fainter["soft"] > 0 and fainter["hard"] == 0


def test_rgba_loss_has_gradients_where_it_should():
    rgb, alpha = small_clip()
    rgb_hat, alpha_hat = (0.9 * rgb).requires_grad_(), (0.8 * alpha + 0.1).requires_grad_()
    sum(rgba_loss(rgb_hat, alpha_hat, rgb, alpha, edge=0).values()).backward()
    seen = (alpha > 0).expand_as(rgb)
    assert (rgb_hat.grad[seen] != 0).float().mean() > 0.99 and (alpha_hat.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_tabd_mask_is_official(kind):
    mask = tabd_mask(official[f"{kind}.alpha"][None, None] / 255)
    assert torch.equal(mask[0, 0], official[f"{kind}.tabd_mask"])


def test_tabd_mask_of_every_kind_of_cell():
    """Five cells, in frame 0 and in frames 1 to 4: opaque, transparent, glass, edge, glass that turns opaque."""
    alpha = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.5]).repeat_interleave(8).expand(1, 1, 5, 8, 40).clone()
    alpha[..., 24:28] = 0
    alpha[:, :, 4, :, 32:] = 1
    assert tabd_mask(alpha)[0, 0, :, 0].tolist() == [[1, -1, -1, -1, -1], [1, -1, -1, 0, 0]]
    assert tabd_mask(alpha.expand(3, 1, 5, 8, 40)).shape == (3, 1, 2, 1, 5)
    for wrong in (alpha[:, :, :4], alpha[..., :7, :], alpha[..., :39]):
        with pytest.raises(ValueError, match="multiples of 8"):
            tabd_mask(wrong)


def test_tabd_gradient_of_a_transparent_cell():
    """Opaque cells are pulled to v; transparent ones are pushed away by the paper, left alone by the official code."""
    mask = torch.tensor([1.0, -1.0, 0.0]).view(1, 1, 1, 1, 3)
    gradient = {}
    for clamp in ((-1, 1), (0, 1)):
        v_hat = torch.full((1, 2, 1, 1, 3), 0.3, requires_grad=True)
        tabd_loss(v_hat, torch.zeros_like(v_hat), mask, torch.tensor([2.0]), clamp).backward()
        gradient[clamp] = v_hat.grad[0, 0, 0, 0] * 6  # undo the mean
    assert torch.allclose(gradient[-1, 1], torch.tensor([1.2, -1.2, 0.0]))  # 2 w (v_hat - v), and its opposite
    assert torch.allclose(gradient[0, 1], torch.tensor([1.2, 0.0, 0.0])) and gradient[0, 1][1] == 0


def test_tabd_loss_is_bounded_and_weighs_every_sample():
    v, mask = torch.zeros(2, 1, 1, 1, 2), torch.tensor([1.0, -1.0]).expand(2, 1, 1, 1, 2)
    assert tabd_loss(v + torch.tensor([10.0, 0.0]), v, mask, torch.ones(2)) == 0.5
    assert tabd_loss(v + torch.tensor([0.0, 10.0]), v, mask, torch.ones(2)) == -0.5
    assert tabd_loss(v + torch.tensor([0.5, 0.0]), v, mask, torch.tensor([0.0, 1.0])) == 0.0625


# ---- ellipse, mean shift, samplers


def last(steps):
    return list(steps)[-1][1]


def toy(x, t):
    return torch.tanh(1.3 * x - t.view(-1, 1, 1, 1, 1) / 1000) - 0.2 * x


def disc(frames=9, height=64, width=96, x=48.0, y=32.0, radius=16.0):
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((columns - x) ** 2 + (rows - y) ** 2 < radius**2).float().expand(frames, height, width)


def centre(mask):
    """Centre of mass of (t,h,w) in cells: x (t,), y (t,)."""
    h, w = mask.shape[1:]
    total = mask.sum((1, 2))
    return (mask.sum(1) @ torch.arange(w).float()) / total, (mask.sum(2) @ torch.arange(h).float()) / total


# Rectified flow


def test_sigmas_and_weights_are_official():
    assert torch.allclose(shifted_sigmas(4), torch.cat([official["euler4.sigmas"], torch.zeros(1)]), atol=1e-7)
    close(training_sigmas(), official["train.sigmas"])
    close(training_weights(training_sigmas()), official["train.weights"])
    assert torch.equal(shifted_sigmas(10, shift=1), torch.linspace(1, 0, 11)) and shifted_sigmas(4, 12)[2] > 0.9


def test_sampled_sigmas_are_even_over_the_shifted_levels_and_bring_their_weights():
    sigma, weight = sample_sigma(4000, torch.Generator().manual_seed(0))
    levels = training_sigmas()
    assert torch.isin(sigma, levels).all() and abs(sigma.mean() - levels.mean()) < 0.02
    assert torch.equal(weight, training_weights(levels)[(sigma[:, None] == levels).int().argmax(1)])


def test_flow_runs_from_data_to_noise_along_its_target():
    z, noise, sigma = named("z", (3, 4, 2, 3, 3)), named("eps", (3, 4, 2, 3, 3)), torch.tensor([0.0, 1.0, 0.3])
    z_t = interpolate(z, noise, sigma)
    assert torch.equal(z_t[0], z[0]) and torch.equal(z_t[1], noise[1])
    assert torch.allclose(z_t, z + sigma.view(-1, 1, 1, 1, 1) * flow_target(z, noise), atol=1e-6)


def test_mean_shift_is_official():
    close(shift_noise(named("shift.noise", (16, 3, 10, 14)), official["ellipse.gauss"]), official["shift.noise_out"])


def test_mean_shift_is_outside():
    noise, mask = torch.zeros(2, 16, 3, 8, 12), ellipse_mask(9, 64, 96)
    shifted = shift_noise(noise, mask, 0.05)
    i = mask[0].argmax()
    assert shifted[0, 0, 0].flatten()[i] == 0 and shifted[..., 0, 0].allclose(torch.tensor(0.05), atol=1e-4)
    batch = shift_noise(noise, torch.stack([mask, 0 * mask]), 0.05)  # one mask a sample
    assert torch.equal(batch[0], shifted[0]) and torch.equal(batch[1], torch.full_like(batch[1], 0.05))
    assert torch.equal(shift_noise(noise, mask, 0.0), noise)


# Samplers


def test_euler_is_official():
    close(last(euler(toy, named("toy.noise", (1, 16, 3, 4, 6)), shifted_sigmas(4))), official["toy.euler4"])


@pytest.mark.parametrize("steps", [4, 20])
def test_unipc_is_official(steps):
    times, sigmas = [], official[f"unipc{steps}.sigmas"]
    model = lambda x, t: times.append(t.item()) or toy(x, t)
    for levels in (steps, sigmas):
        close(last(unipc(model, named("toy.noise", (1, 16, 3, 4, 6)), levels)), official[f"toy.unipc{steps}"])
    assert times == 2 * official[f"unipc{steps}.timesteps"].tolist()
    assert torch.allclose(shifted_sigmas(steps, start=0.999), sigmas, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_exact_velocity_leads_back_to_the_data(steps):
    """Straight paths: whatever the number of steps, Euler lands on z, and so does UniPC from its own start."""
    z, noise = named("z", (2, 4, 2, 3, 3)), named("eps", (2, 4, 2, 3, 3))
    velocity = lambda x, t: flow_target(z, noise)
    states = list(euler(velocity, noise, shifted_sigmas(steps)))
    assert [i for i, _ in states] == list(range(steps)) and torch.allclose(states[-1][1], z, atol=1e-5)
    start = shifted_sigmas(steps, start=0.999)[0]
    assert torch.allclose(last(unipc(velocity, interpolate(z, noise, start), steps)), z, atol=1e-5)


def test_unipc_is_of_higher_order_than_euler():
    noise = named("eps", (1, 4, 1, 3, 3))
    exact = last(euler(toy, noise, shifted_sigmas(2000)))
    error = lambda z: (z - exact).abs().mean()
    assert error(last(unipc(toy, noise, 20))) < 0.5 * error(last(euler(toy, noise, shifted_sigmas(20))))


def test_samplers_keep_float32_state_and_a_time_a_sample():
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return x.bfloat16()

    noise = named("eps", (2, 4, 1, 3, 3)).bfloat16()
    assert last(euler(model, noise, shifted_sigmas(2))).dtype == last(unipc(model, noise, 2)).dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32, (2,))}


def test_guidance():
    cond, uncond = torch.tensor([2.0]), torch.tensor([1.0])
    assert [guide(cond, uncond, s).item() for s in (0, 1, 5)] == [1, 2, 6]


# The ellipse of an alpha clip


@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_mask_is_official(kind):
    g = gaussian_mask(official[f"{kind}.alpha"] / 255)
    assert g.shape == official[f"{kind}.gauss"].shape
    assert (g - official[f"{kind}.gauss"]).abs().mean() < 1e-4  # 0.03 would do: growth stops at the same ellipse


def test_gaussian_mask_follows_the_object():
    for x, y in ((24, 24), (72, 32), (48, 40)):
        mask = gaussian_mask(disc(x=x, y=y, radius=12))
        cx, cy = (v[0].item() for v in (mask.amax(1).argmax(1).float(), mask.amax(2).argmax(1).float()))
        assert abs(cx + 0.5 - x / 8) <= 0.5 and abs(cy + 0.5 - y / 8) <= 0.5
        assert mask.amax() == 1 and mask.amin() == 0
    small, large = (gaussian_mask(disc(radius=r)).mean() for r in (8, 24))
    assert large > 1.5 * small


def test_gaussian_mask_of_each_latent_frame_sees_its_own_frames():
    """An object in frame 0 and in frames 5 to 8: latent frames 0 and 2 hold it, latent frame 1 is empty."""
    alpha = disc().clone()
    alpha[1:5] = 0
    mask = gaussian_mask(alpha)
    assert mask[1].abs().max() == 0 and mask[0].max() == mask[2].max() == 1


def test_ellipse_turns_with_the_object():
    ellipse = gaussian((7, 5, 4, 1.5, math.radians(30)), 11, 15) > 0.4
    x, y, a, b, angle = fit_ellipse(ellipse.double())
    assert (x, y) == pytest.approx((7, 5), abs=0.2) and a > 1.5 * b
    assert math.degrees(angle) % 180 == pytest.approx(30, abs=6)  # y points down: clockwise on the screen


def test_ellipse_of_few_cells_is_their_box():
    cells = torch.zeros(8, 12).double()
    assert fit_ellipse(cells) is None
    cells[2, 3] = cells[2, 7] = cells[3, 5] = 1
    assert fit_ellipse(cells) == (5.0, 2.5, 2.0, 1.0, 0.0)


def test_a_thin_object_has_an_ellipse():
    cells = torch.zeros(8, 12).double()
    cells[2, 3:8] = 0.25
    x, y, *_ = fit_ellipse(cells)
    assert (x, y) == (5, 2)
    cells[4, 3:8] = 0.5  # where a cell is fuller than that, 0.25 no longer counts
    assert fit_ellipse(cells)[1] == 4


@pytest.mark.parametrize("a, b, degrees, rows", [
    (2, 2, 20, "......##.. ....####.. .....####. .....####. .....#...."),
    (4, 2, -70, "......##. ......### .....#### ....##### ....##### ....##### ....####. ....####. .....##..")])
def test_filled_ellipse_draws_the_polygon_of_opencv(a, b, degrees, rows):
    """Drawn by cv2.ellipse(image, (6, 6), (a, b), degrees, 0, 360, 1, -1): 4 corners below 3 cells, 12 below 10."""
    rows = torch.tensor([[c == "#" for c in row.ljust(13, ".")] for row in rows.split()])
    expected = torch.zeros(13, 13, dtype=torch.bool)
    expected[6 - (len(rows) - 1) // 2:][:len(rows)] = rows
    ellipse = filled_ellipse(torch.tensor([6.2, 5.9]), torch.tensor([a, b]) + 0.3, math.radians(degrees), 13, 13)
    assert torch.equal(ellipse, expected)


def test_gaussian_mask_takes_a_whole_clip_at_full_size():
    assert gaussian_mask(disc(81, 480, 832, x=400, y=200, radius=150)).shape == (21, 60, 104)


@pytest.mark.parametrize("shape", [(8, 64, 96), (9, 60, 96), (9, 64, 90)])
def test_gaussian_mask_refuses_other_grids(shape):
    with pytest.raises(ValueError, match="4k\\+1 frames, width and height in multiples of 8"):
        gaussian_mask(torch.ones(shape))


# The ellipse of a user


def test_default_ellipse_is_a_centred_circle():
    mask = ellipse_mask(17, 64, 96)
    assert mask.shape == (5, 8, 12) and torch.equal(mask[0], mask[4]) and mask.min() == 0 and mask.max() == 1
    assert torch.allclose(mask, mask.flip(1), atol=1e-6) and torch.allclose(mask, mask.flip(2), atol=1e-6)
    square = ellipse_mask(5, 64, 64)
    assert torch.allclose(square, square.mT, atol=1e-6)
    assert torch.equal(load_mask(None, 17, 64, 96), mask)


def test_user_ellipse_has_the_formula_of_the_fitted_one():
    """Half axes of 1/4 and 1/8 of the shorter side; the middle of the frame lies between cells 3 and 4."""
    expected = gaussian((5.5, 3.5, 2.0, 1.0, math.radians(20)), 8, 12)
    assert torch.allclose(load_mask("0.5,0.5,0.25,0.125,20", 5, 64, 96), expected.expand(2, 8, 12), atol=1e-6)


def test_moving_ellipse_passes_its_keys():
    mask = load_mask("0:0.25,0.5,0.2,0.2; 1:0.75,0.5,0.2,0.2,0", 17, 64, 192)
    x, y = centre(mask)
    assert torch.allclose(x, 24 * torch.linspace(0.25, 0.75, 5) - 0.5, atol=0.2)
    assert torch.allclose(y, torch.tensor(3.5), atol=0.1)
    assert torch.equal(mask[0], load_mask("0.25,0.5,0.2,0.2", 1, 64, 192)[0])


def test_parse_ellipse():
    assert parse_ellipse("0.5, 0.4,.3,.2") == [(0, 0.5, 0.4, 0.3, 0.2, 0)]
    assert parse_ellipse("0:1,2,3,4,5;0.5:6,7,8,9;") == [(0, 1, 2, 3, 4, 5), (0.5, 6, 7, 8, 9, 0)]


@pytest.mark.parametrize("text, message", [
    ("", "neither a file nor an ellipse"), ("0.5,0.5,0.4", "neither a file nor an ellipse"),
    ("1,2,3,4,5,6", "neither a file nor an ellipse"), ("clip.webm", "neither a file nor an ellipse"),
    ("0.5,0.5,0,0.4", "half axes"), ("0.5,0.5,nan,0.4", "finite"), ("0.5,0.5,1,1; 0.2,0.5,1,1", "rise"),
    ("0:0.5,0.5,1,1; 2:0.5,0.5,1,1", "rise")])
def test_wrong_ellipses_get_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_mask(text, 17, 64, 96)
    assert "\n" not in str(error.value)


# Masks from outside


def test_masks_fit_any_latent(tmp_path):
    """A saved mask of 21 latent frames and another size serves any clip, its time axis from end to end."""
    saved = ellipse_mask(81, 96, 160, [(0, 0.3, 0.5, 0.3, 0.4, 0), (1, 0.7, 0.5, 0.3, 0.4, 0)])
    torch.save(saved, tmp_path / "gauss_mask")
    for frames, height, width in ((1, 64, 96), (17, 64, 64), (81, 96, 160), (161, 128, 64)):
        mask = load_mask(str(tmp_path / "gauss_mask"), frames, height, width)
        assert mask.shape == ((frames + 3) // 4, height // 8, width // 8) and 0 <= mask.min() and mask.max() <= 1
        x, _ = centre(mask)
        assert frames == 1 or (x.diff() > 0).all() and x[0] < 0.4 * width / 8 < 0.6 * width / 8 - 1 < x[-1]
    assert torch.equal(load_mask(str(tmp_path / "gauss_mask"), 81, 96, 160), saved)
    with pytest.raises(ValueError, match="4k\\+1"):
        load_mask(str(tmp_path / "gauss_mask"), 16, 64, 64)


@pytest.mark.parametrize("mask", [
    torch.zeros(3, 8, 12), torch.zeros(0, 8, 12), torch.ones(8, 12), torch.full((3, 8, 12), math.nan),
    2 * torch.ones(3, 8, 12), torch.linspace(-1, 1, 96).view(1, 8, 12), {"mask": torch.ones(3, 8, 12)}])
def test_wrong_saved_masks_get_one_sentence(tmp_path, mask):
    torch.save(mask, tmp_path / "mask")
    with pytest.raises(ValueError, match="a saved mask must") as error:
        load_mask(str(tmp_path / "mask"), 9, 64, 96)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_tensor_gets_one_sentence(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="mask.png is not a tensor that torch.save wrote"):
        load_mask(str(tmp_path / "mask.png"), 9, 64, 96)


def test_an_alpha_clip_of_any_length_and_size_makes_a_mask():
    clip = (255 * disc(30, 100, 150, x=75, y=50, radius=25)).byte()
    mask = mask_from_alpha(clip.numpy(), 17, 64, 96)
    assert mask.shape == (5, 8, 12)
    assert (mask - gaussian_mask(disc(17, radius=16))).abs().mean() < 0.02
    with pytest.raises(ValueError, match="empty"):
        mask_from_alpha(np.zeros((9, 64, 96), np.uint8), 17, 64, 96)


# ---- media, data set, procedural clips


def centroid(alpha):
    """Centre x, y of every frame in fractions of the frame, and its area."""
    area, (h, w) = (alpha / 255).sum((1, 2)), alpha.shape[1:]
    x, y = (np.arange(w) + 0.5) / w, (np.arange(h)[:, None] + 0.5) / h
    return (alpha / 255 * x).sum((1, 2)) / area, (alpha / 255 * y).sum((1, 2)) / area, area


def folder_hash(folder):
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


# ---- procedural clips


def test_the_named_colour_is_the_nearest_of_ten_in_every_material_and_shape():
    palette = np.array(list(COLORS.values()))
    for i, material in enumerate(MATERIALS):
        for k, color in enumerate(COLORS):
            shape = SHAPES[(i + k) % 8]
            clip = procedural_clip(k, frames=5, shape=shape, color=color, material=material, motion="growing", two=0)
            weight = clip.alpha[..., None] / 255 * (clip.alpha[..., None] > 25)
            mean = (clip.rgb / 255 * weight).sum((0, 1, 2)) / weight.sum()
            assert np.linalg.norm(palette - mean, axis=1).argmin() == k, (material, color, shape, mean)


def test_materials_have_their_alpha():
    for shape in ("ball", "cube", "heart", "leaf"):
        for material in MATERIALS:
            clip = procedural_clip(7, shape=shape, color="red", material=material, motion="spinning", two=0, frames=5)
            x, y, alpha = *(k[0] for k in centroid(clip.alpha)[:2]), clip.alpha[0] / 255
            distance = np.hypot(*(np.mgrid[:64, :64] + 0.5 - np.array([y * 64, x * 64])[:, None, None]))
            body = np.median(alpha[distance < 7])
            assert body > 0.95 if material in ("solid", "glow") else 0.15 < body < 0.85, (shape, material, body)
            if material in ("glass", "bubble"):                           # the rim is more opaque than the body
                assert np.sort(alpha.ravel())[-40:].min() > body + 0.25
            edge = ((alpha > 0.02) & (alpha < 0.98)).mean()
            assert edge > (0.04 if material == "glow" else 0.01)          # anti-aliased, and a halo is wide


def test_objects_stay_inside_the_frame_and_leave_its_border_transparent():
    for seed in range(60):
        size = (64, (48, 80), (80, 48), 96)[seed % 4]
        alpha = procedural_clip(seed, size=size, frames=9, two=0.5).alpha
        assert max(alpha[:, 0].max(), alpha[:, -1].max(), alpha[:, :, 0].max(), alpha[:, :, -1].max()) == 0, seed
        assert alpha.max(axis=(1, 2)).min() > 25


def test_held_out_combinations_are_kept_apart():
    share = np.mean([held_out(s, c, m, v) for s in SHAPES for c in COLORS for m in MATERIALS for v in MOTIONS])
    assert 0.1 < share < 0.15
    assert held_out("leaf", "white", "smoke", "rising") and not held_out("ball", "red", "glass", "bouncing")
    for split in ("train", "test"):
        clips = [procedural_clip(seed, size=16, frames=1, split=split).attributes for seed in range(80)]
        assert {held_out(*(a[k] for k in ("shape", "color", "material", "motion"))) for a in clips} == {split == "test"}
        assert len({a["shape"] for a in clips}) == 8 and len({a["motion"] for a in clips}) == 8
    pinned = procedural_clip(0, size=16, frames=1, split="test", shape="ring", color="pink")
    assert (pinned.attributes["shape"], pinned.attributes["color"]) == ("ring", "pink")
    with pytest.raises(ValueError, match="pin other"):
        procedural_clip(0, shape="red", color="red", material="glass", motion="rising")


def test_motions_do_what_they_say():
    for seed in range(12):
        def path(motion, material=("solid", "glass", "bubble", "glow")[seed % 4]):
            return centroid(procedural_clip(seed, material=material, motion=motion, two=0).alpha)

        steps = {motion: [np.ptp(k) * np.sign(k[-1] - k[0]) for k in path(motion)[:2]] for motion in MOTIONS[:4]}
        assert steps["moving from left to right"][0] > 0.35 and abs(steps["moving from left to right"][1]) < 0.05
        assert steps["moving from right to left"][0] < -0.35 and abs(steps["moving from right to left"][1]) < 0.05
        assert steps["rising"][1] < -0.35 and abs(steps["rising"][0]) < 0.05
        assert steps["falling"][1] > 0.35 and abs(steps["falling"][0]) < 0.05
        x, y, area = path("bouncing")
        turns = np.diff(np.sign(np.diff(y[np.abs(np.diff(y, prepend=9)) > 1e-3])))
        assert np.ptp(y) > 0.2 and np.ptp(x) < 0.05 and (turns != 0).sum() == 3               # up, down, up, down
        assert path("growing")[2][-1] > 2.5 * path("growing")[2][0]
        spin = procedural_clip(seed, material="solid", motion="spinning", two=0).alpha.max(1) > 127
        assert spin.sum(1).min() < 0.5 * spin.sum(1).max()
        x, y, _ = path("orbiting")
        angle = np.unwrap(np.arctan2(y - 0.5, x - 0.5))
        assert abs(abs(angle[-1] - angle[0]) - 2 * np.pi) < 0.6 and np.hypot(x - 0.5, y - 0.5).min() > 0.12


def test_captions_name_shape_colour_material_motion_and_mostly_transparency():
    attributes = dict(shape="ball", color="red", material="glass", motion="bouncing")
    assert caption_of(attributes, 0) == ("This video has a transparent background. Close-up shot. "
                                         "A red glass ball bouncing. Realistic style.")
    assert caption_of(attributes, 1) == "a red glass ball bouncing"
    assert caption_of(attributes | dict(color="orange", second=True, second_color="blue", second_shape="cube"), 1) \
        == "an orange glass ball bouncing and a small blue cube"
    words = dict(solid="", glass="glass", glow="glowing", smoke="smok", bubble="soap bubble")
    for wording in range(40):
        for material in MATERIALS:
            text = caption_of(attributes | dict(material=material), wording).lower()
            assert all(word in text for word in ("ball", "red", "bouncing", words[material])), text
            assert ("transparent background" in text) == (wording % 5 in (0, 2))
    seen = {procedural_clip(seed, size=16, frames=1).caption for seed in range(60)}
    assert len(seen) == 60


def test_two_objects_are_both_named_and_drawn():
    clip = procedural_clip(3, two=1, material="solid", motion="moving from left to right")
    lone = procedural_clip(3, two=0, material="solid", motion="moving from left to right")
    a = clip.attributes
    assert a["second"] and a["second_shape"] != a["shape"] and a["second_color"] != a["color"]
    assert f"small {a['second_color']} {a['second_shape']}" in clip.caption and "small" not in lone.caption
    assert (clip.alpha >= lone.alpha).all() and clip.alpha.astype(int).sum() > 1.05 * lone.alpha.astype(int).sum()
    share = np.mean([procedural_clip(seed, size=16, frames=1).attributes["second"] for seed in range(300)])
    assert 0.06 < share < 0.18


def test_the_data_set_command_is_reproducible_and_reads_back(tmp_path):
    arguments = ["--clips", "4", "--size", "32", "--frames", "5"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        data.main([str(tmp_path / name), *arguments, "--seed", seed])
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b") != folder_hash(tmp_path / "c")
    lines = [json.loads(line) for line in (tmp_path / "a/metadata.jsonl").read_text().splitlines()]
    for line in lines:
        clip = procedural_clip(line["seed"], size=32, frames=5)
        rgb, alpha = read_rgba(tmp_path / "a" / line["file"])
        assert np.array_equal(rgb, clip.rgb) and np.array_equal(alpha, clip.alpha)
        assert line["caption"] == clip.caption and line["shape"] == clip.attributes["shape"]
    assert json.loads((tmp_path / "a/data.json").read_text())["clips"] == 4
    assert [item["caption"] for item in RGBADataset(tmp_path / "a", 32, 5)] == [line["caption"] for line in lines]
    with pytest.raises(SystemExit) as stop:                               # other clips into the same folder
        data.main([str(tmp_path / "a"), *arguments, "--seed", "1"])
    assert stop.value.code == 2


def test_sprites_move_and_keep_their_name(tmp_path):
    y, x = np.mgrid[:40, :60]
    alpha = np.where(np.hypot((x - 30) / 25, (y - 20) / 15) < 1, 255, 0).astype(np.uint8)
    picture = np.dstack([np.full((40, 60), 200), np.full((40, 60), 100), np.full((40, 60), 0), alpha]).astype(np.uint8)
    picture[alpha == 0, :3] = 0
    (tmp_path / "in").mkdir()
    iio.imwrite(tmp_path / "in/rubber_duck.png", picture)
    data.main([str(tmp_path / "out"), "--sprites", str(tmp_path / "in"), "--clips", "6", "--size=48", "--frames=5"])
    for line in map(json.loads, (tmp_path / "out/metadata.jsonl").read_text().splitlines()):
        rgb, alpha = read_rgba(tmp_path / "out" / line["file"])
        assert "rubber duck" in line["caption"].lower() and line["motion"] in line["caption"]
        x, y, area = centroid(alpha)
        assert np.ptp(x) + np.ptp(y) > 0.1 or area.max() > 1.4 * area.min()
        assert np.abs(rgb[alpha > 20].astype(int) - (200, 100, 0)).max() <= 8                 # no dark fringe


# ---- media


@pytest.mark.parametrize("name", ["clip.apng", "clip.png", "clip.webp", "clip.zip", "folder"])
def test_lossless_media_return_every_byte(tmp_path, name):
    clip = procedural_clip(1, size=(31, 33), frames=6, material="smoke", two=0)
    pairs = [0, 0, 1, 1, 2, 2]                                            # equal frames must not be merged
    rgb, alpha = clip.rgb[pairs], clip.alpha[pairs]
    assert (rgb[alpha == 0] > 0).any()                                    # colour under alpha 0 must not be dropped
    write_rgba(tmp_path / name, rgb, alpha)
    write_rgba(tmp_path / name, rgb[:4], alpha[:4])                       # overwriting leaves nothing behind
    back = read_rgba(tmp_path / name)
    assert np.array_equal(back[0], rgb[:4]) and np.array_equal(back[1], alpha[:4])
    first = [p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    write_rgba(tmp_path / name, rgb[:4], alpha[:4])
    assert first == [p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()]


@pytest.mark.parametrize("name", ["clip.webm", "clip.mov"])
def test_videos_return_alpha_and_straight_colour(tmp_path, name):
    clip = procedural_clip(2, size=(64, 61), frames=5, shape="cube", color="green", material="glass", motion="growing")
    write_rgba(tmp_path / name, clip.rgb, clip.alpha)
    rgb, alpha = read_rgba(tmp_path / name)
    assert rgb.shape == clip.rgb.shape and [p.name for p in tmp_path.iterdir()] == [name]
    assert np.abs(alpha.astype(float) - clip.alpha).mean() < 1
    half = (clip.alpha > 70) & (clip.alpha < 180)                         # premultiplied colour would be half as bright
    assert np.abs(rgb[half].mean(0) - clip.rgb[half].mean(0)).max() < 6
    assert np.abs(rgb[half].astype(float) - clip.rgb[half]).mean() < 12


def test_mp4_holds_colour_of_any_size(tmp_path):
    clip = procedural_clip(2, size=(33, 47), frames=3)
    write_rgba(tmp_path / "rgb.mp4", clip.rgb)
    rgb, alpha = read_rgba(tmp_path / "rgb.mp4")
    assert rgb.shape == (3, 34, 48, 3) and alpha.min() == 255
    assert np.abs(rgb[:, :33, :47].mean((0, 1, 2)) - clip.rgb.mean((0, 1, 2))).max() < 4


def test_frames_shown_longer_come_back_more_often(tmp_path):
    clip = procedural_clip(2, size=32, frames=4, motion="rising", two=0)
    frames = np.concatenate([clip.rgb, clip.alpha[..., None]], -1)
    iio.imwrite(tmp_path / "a.png", frames, plugin="pillow", is_batch=True, duration=[40, 80, 40, 120])
    assert np.array_equal(read_rgba(tmp_path / "a.png")[1], clip.alpha[[0, 1, 1, 2, 3, 3, 3]])
    iio.imwrite(tmp_path / "b.png", frames, plugin="pillow", is_batch=True, duration=[33, 33, 34, 33])
    assert len(read_rgba(tmp_path / "b.png")[1]) == 4


def test_png_of_every_mode_reads_as_eight_bits(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    write = functools.partial(iio.imwrite, plugin="pillow")
    write(tmp_path / "deep.png", grey[0].astype(np.uint16) * 257)
    write(tmp_path / "flat.png", grey[0])
    Image.fromarray(grey[0]).convert("P").save(tmp_path / "palette.png")
    write(tmp_path / "keyed.png", grey[0], transparency=7)
    write(tmp_path / "pair.png", np.stack([grey[0], 255 - grey[0]], -1), mode="LA")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/0.png").write_bytes((tmp_path / "deep.png").read_bytes())
    transparency = {"keyed.png": np.where(grey == 7, 0, 255), "pair.png": 255 - grey}
    for name in ("deep.png", "flat.png", "palette.png", "keyed.png", "pair.png", "folder"):
        rgb, alpha = read_rgba(tmp_path / name)
        assert np.array_equal(rgb, np.stack([grey] * 3, -1)), name
        assert np.array_equal(alpha, transparency.get(name, np.full_like(grey, 255))), name


def test_hidden_files_of_a_zip_are_no_frames(tmp_path):
    clip = procedural_clip(1, size=16, frames=2)
    write_rgba(tmp_path / "clip.zip", clip.rgb, clip.alpha)
    with zipfile.ZipFile(tmp_path / "clip.zip", "a") as file:
        file.writestr("__MACOSX/._0000.png", b"no picture")
    assert np.array_equal(read_rgba(tmp_path / "clip.zip")[1], clip.alpha)


def test_a_video_may_be_shorter_than_its_sound(tmp_path):
    clip = procedural_clip(1, size=32, frames=8)
    write_rgba(tmp_path / "mute.mp4", clip.rgb)
    command = "-f lavfi -i anullsrc=r=8000:cl=mono -t 3 -c:v copy -c:a aac"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "mute.mp4", *command.split(),
                    tmp_path / "sound.mp4"], check=True)
    assert len(read_rgba(tmp_path / "sound.mp4")[1]) == 8


def test_a_matte_beside_a_clip_is_its_alpha(tmp_path):
    clip = procedural_clip(4, frames=5, two=0)
    write_rgba(tmp_path / "x.mp4", clip.rgb)
    write_rgba(tmp_path / "x_pha.mp4", np.repeat(clip.alpha[..., None], 3, -1))
    (tmp_path / "x.txt").write_text("a thing\n")
    assert np.abs(read_rgba(tmp_path / "x.mp4")[1].astype(float) - clip.alpha).mean() < 3
    samples = RGBADataset(tmp_path, frames=5)
    assert len(samples) == 1 and samples[0]["caption"] == "a thing"
    write_rgba(tmp_path / "x_pha.mp4", np.repeat(clip.alpha[:3, ..., None], 3, -1))
    with pytest.raises(ValueError, match=r"x\.mp4 has .*5, 64, 64.* x_pha\.mp4 has .*3, 64, 64"):
        read_rgba(tmp_path / "x.mp4")


def test_wrong_media_is_one_sentence(tmp_path):
    clip = procedural_clip(4)
    for name in ("half.apng", "half.webm", "half.mov", "half.webp"):
        write_rgba(tmp_path / name, clip.rgb, clip.alpha)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:(tmp_path / name).stat().st_size // 2])
    for name in ("empty.png", "empty.mp4", "empty.zip"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError) as error:
            read_rgba(path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.mov"):
        read_rgba(tmp_path / "nowhere.mov")
    with pytest.raises(ValueError, match="unknown ending"):
        write_rgba(tmp_path / "clip.bmp", clip.rgb, clip.alpha)
    with pytest.raises(ValueError, match="its colour is"):
        write_rgba(tmp_path / "clip.mov", clip.rgb, clip.alpha[:2])
    with pytest.raises(ValueError, match="holds no clip"):
        RGBADataset(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no folder"):
        RGBADataset(tmp_path / "nowhere")


def test_wrong_arguments_exit_with_2_and_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "opaque").mkdir()
    iio.imwrite(tmp_path / "opaque/a.png", np.zeros((8, 8, 3), np.uint8))
    for arguments, word in ((["x", "--size=60"], "16"), (["x", "--frames=16"], "4k+1"), (["x", "--clips=0"], "--clips"),
                            (["x", "--clips=1", "--seed=-1"], "--seed"),
                            (["file/x"], "cannot write"), (["x", f"--sprites={tmp_path}/opaque"], "transparency")):
        with pytest.raises(SystemExit) as stop:
            data.main([str(tmp_path / arguments[0]), *arguments[1:]])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and word in message and message.count("\n") == 1
    assert not (tmp_path / "x").exists()


# ---- pixels, data set, cache


def test_bleed_fills_transparent_pixels_only():
    clip = procedural_clip(5, frames=2, color="green", material="glass", shape="ring", motion="rising", two=0)
    rgb = np.where(clip.alpha[..., None] > 0, clip.rgb, 0).astype(np.uint8)
    filled = bleed(rgb, clip.alpha)
    assert np.array_equal(filled[clip.alpha > 0], rgb[clip.alpha > 0])
    outside = filled[clip.alpha == 0].astype(int)
    assert np.abs(outside - np.array(COLORS["green"]) * 255).max(1).mean() < 40 and outside.sum(1).min() > 100
    assert bleed(np.zeros((1, 5, 7, 3), np.uint8), np.zeros((1, 5, 7), np.uint8)).shape == (1, 5, 7, 3)


def test_over_is_soft_rendering():
    rgb, alpha = np.full((1, 1, 3, 3), 200, np.uint8), np.array([[[0, 50, 255]]], np.uint8)
    assert over(rgb, alpha, (100, 100, 100))[0, 0, :, 0].tolist() == [100, 120, 200]
    board = checkerboard(20, 20)
    assert board.shape == (20, 20, 3) and (board[0, 0] != board[0, 8]).all() and (board[0, 0] == board[8, 8]).all()


def test_dataset_items_have_the_ranges_of_the_models(tmp_path):
    clip = procedural_clip(6, frames=5, material="bubble", two=0)
    write_rgba(tmp_path / "red-soap_bubble.webp", clip.rgb, clip.alpha)
    write_rgba(tmp_path / "still.png", clip.rgb[:1], clip.alpha[:1])
    write_rgba(tmp_path / "frames", clip.rgb, clip.alpha)
    samples = RGBADataset(tmp_path, size=64, frames=9)
    assert [s["name"] for s in samples] == ["frames", "red-soap_bubble.webp", "still.png"]
    item = samples[1]
    assert item["rgb"].shape == (3, 9, 64, 64) and item["alpha"].shape == (1, 9, 64, 64)
    assert item["rgb"].dtype == item["alpha"].dtype == torch.float32
    assert -1 <= item["rgb"].min() < -0.3 and 0.9 < item["rgb"].max() <= 1
    assert item["alpha"].min() == 0 and 0.5 < item["alpha"].max() <= 1
    assert item["caption"] == "red soap bubble"
    to_and_fro = [0, 1, 2, 3, 4, 3, 2, 1, 0]
    assert np.array_equal((item["alpha"][0] * 255).round().numpy(), clip.alpha[to_and_fro])
    rgb = np.moveaxis(bleed(clip.rgb, clip.alpha)[to_and_fro], -1, 0)
    assert np.allclose((item["rgb"].numpy() + 1) * 127.5, rgb, atol=0.01)
    assert (samples[2]["rgb"] != samples[2]["rgb"][:, :1]).any()
    frugal = RGBADataset(tmp_path, frames=3, cache_gb=0)
    assert frugal[0]["alpha"].shape[1] == 3 and not frugal.kept and len(samples.kept) == 3


def test_a_caption_is_utf_8_or_the_words_of_the_name(tmp_path):
    write_rgba(tmp_path / "red_ball.png", *(k[:1] for k in (procedural_clip(0).rgb, procedural_clip(0).alpha)))
    for content, caption in ((b"", "red ball"), (b" \n", "red ball"), ("Bällchen\n".encode(), "Bällchen")):
        (tmp_path / "red_ball.txt").write_bytes(content)
        assert RGBADataset(tmp_path).caption(0) == caption
    (tmp_path / "red_ball.txt").write_bytes("Bällchen".encode("latin-1"))
    with pytest.raises(ValueError, match="red_ball.txt is not UTF-8"):
        RGBADataset(tmp_path).caption(0)


def test_resizing_weighs_colour_by_alpha(tmp_path):
    y, x = np.mgrid[:90, :120] + 0.5
    alpha = (255 * (np.hypot(x - 60, y - 45) < 30)).astype(np.uint8)[None]
    rgb = np.repeat(np.where(alpha[..., None] > 0, 240, 60).astype(np.uint8), 3, -1)          # dark around the disc
    write_rgba(tmp_path / "disc.png", rgb, alpha)
    item = RGBADataset(tmp_path, size=(32, 32), frames=1)[0]
    assert item["alpha"].shape == (1, 1, 32, 32)
    assert ((item["alpha"] > 0) & (item["alpha"] < 1)).sum() > 20
    assert item["rgb"].min() > 2 * 237 / 255 - 1 and item["rgb"].max() < 2 * 243 / 255 - 1    # no dark or bright edge
    assert abs(item["alpha"].sum() - np.pi * (30 * 32 / 90) ** 2) < 8      # covers: scaled by the height, middle kept


def test_cached_tensors_are_named_by_all_they_depend_on(tmp_path):
    assert cache_key("ab", "c") != cache_key("a", "bc") != cache_key("a", "b", "c")
    assert cache_key(b"ab", 17) == cache_key("ab", "17") and len(cache_key("x")) == 64
    save_tensors(tmp_path / "sub" / "z.safetensors", dict(z=torch.ones(2, 3).T), dict(caption="a red ball"))
    with safe_open(tmp_path / "sub" / "z.safetensors", "pt") as file:
        assert file.get_tensor("z").shape == (3, 2) and file.metadata()["caption"] == "a red ball"
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["z.safetensors"]


def test_the_figure_shows_colour_and_alpha(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([])
    assert iio.imread("out/procedural.png").shape == (8 * 128, 2 * 6 * 128, 3)
    assert "yellow" in capsys.readouterr().out
    clip = procedural_clip(1, size=32, frames=3, material="solid", two=0)
    contact_sheet(tmp_path / "s.png", [(clip.rgb, clip.alpha)] * 2, columns=4, scale=1)
    sheet = iio.imread(tmp_path / "s.png")
    assert sheet.shape == (64, 256, 3) and np.array_equal(sheet[:32, 128:160, 0], clip.alpha[0])
    assert np.array_equal(sheet[:32, :32], over(clip.rgb[:1], clip.alpha[:1], checkerboard(32, 32))[0])


# ---- the data set as a lab has it


def grey(alpha):
    return np.repeat(alpha[..., None], 3, -1)


def lab_folder(root, csv_alpha="video_fgr,video_pha,prompt"):
    """Clips in every layout that is accepted, 64 x 64 and 5 frames; returns the captions by name."""
    clip = procedural_clip(4, frames=5, two=0)
    write_rgba(root / "pairs/x.mp4", clip.rgb)
    write_rgba(root / "pairs/x_seg.mp4", grey(clip.alpha))
    write_rgba(root / "csv/fgr/a.mp4", clip.rgb)
    write_rgba(root / "csv/fgr/a_alpha.mp4", 255 - grey(clip.alpha))      # the csv says otherwise
    write_rgba(root / "csv/pha/a.mp4", grey(clip.alpha))
    write_rgba(root / "csv/own.apng", clip.rgb, clip.alpha)
    write_rgba(root / "csv/own_mask.png", np.zeros((5, 64, 64, 3), np.uint8))
    write_rgba(root / "csv/frames/0001", clip.rgb, clip.alpha)
    (root / "csv/metadata.csv").write_bytes(
        f"\ufeffid,{csv_alpha}\r\n0,fgr/a.mp4,pha/a.mp4,\"a, b\nof a csv\"\r\n1,own.apng,,\r\n,,,\r\n"
        f"2,{(root / 'csv/frames/0001').resolve()},,frames\r\n".encode())
    (root / "csv/own.txt").write_text("own words", encoding="utf-8-sig")
    for name in ("2.webm", "10.mov", "01.webp", "1.webp", "b/frames", "still.png"):
        write_rgba(root / name, *((clip.rgb, clip.alpha) if name != "still.png" else (clip.rgb[:1], clip.alpha[:1])))
        (root / f"{name.split('.')[0]}.txt").write_text(f"caption of {name}")
    (root / ".hidden").mkdir()
    write_rgba(root / ".hidden/a.png", clip.rgb, clip.alpha)
    (root / "b/frames/._0000.png").write_bytes(b"no picture")
    names = ["01.webp", "1.webp", "2.webm", "10.mov", "b/frames", "csv/fgr/a.mp4", "csv/frames/0001", "csv/own.apng",
             "pairs/x.mp4", "still.png"]
    return clip, dict(zip(names, ["caption of 01.webp", "caption of 1.webp", "caption of 2.webm", "caption of 10.mov",
                                  "caption of b/frames", "a, b\nof a csv", "frames", "own words", "x",
                                  "caption of still.png"]))


@pytest.mark.parametrize("columns", ["video_fgr,video_pha,prompt", "video,alpha,prompt"])
def test_a_folder_is_taken_as_a_lab_has_it(columns, tmp_path):
    clip, captions = lab_folder(tmp_path, columns)
    samples = RGBADataset(tmp_path, size=64, frames=5)
    assert [samples.name(i) for i in range(len(samples))] == list(captions)                   # each once, in order
    for i, (name, caption) in enumerate(captions.items()):
        assert samples.caption(i) == caption and samples.samples[i].path == tmp_path / name
        rgb, alpha = samples.source(i)
        assert len(rgb) == (1 if name == "still.png" else 5)
        assert np.abs(alpha.astype(float) - clip.alpha[:len(rgb)]).mean() < 3, name
    own = tmp_path / "csv/own.apng"                                       # a black matte lies beside it
    assert not read_rgba(own)[1].any() and read_rgba(own, tmp_path / "csv/pha/a.mp4")[1].any()


def test_other_files_beside_the_frames_of_a_clip_are_found_too(tmp_path):
    clip = procedural_clip(4, frames=2)
    for name in ("a/0.png", "a/1.PNG", "a/x.mp4", "a/x_pha.mp4", "a/b/c.webm"):
        write_rgba(tmp_path / name, clip.rgb[:1], clip.alpha[:1])
    found = data.find_samples(tmp_path)
    mattes = {sample.name: sample.matte and sample.matte.name for sample in found}
    assert mattes == {"a": None, "a/b/c.webm": None, "a/x.mp4": "x_pha.mp4"}
    assert len(data.read_pair(found[0].path, None)[0]) == 2


def test_pictures_that_a_csv_names_singly_are_stills(tmp_path):
    clip = procedural_clip(4, frames=2)
    write_rgba(tmp_path / "stills", clip.rgb, clip.alpha)
    assert [s.name for s in data.find_samples(tmp_path)] == ["stills"]
    (tmp_path / "list").mkdir()
    (tmp_path / "list/metadata.csv").write_text(
        "video,alpha,prompt\n../stills/0001.png,,one\n../stills/0000.png,,zero\n")
    assert [(s.name, s.caption) for s in data.find_samples(tmp_path)] == [("stills/0000.png", "zero"),
                                                                         ("stills/0001.png", "one")]


@pytest.mark.parametrize("content, sentence", [
    (b"", "columns"), (b"file_name,text\na.mp4,b\n", "columns"), (b"video;alpha;prompt\na;b;c\n", "columns"),
    (b"video,alpha,prompt\n", "lacks rows"), (b"video,alpha,prompt\n,,\n\n", "lacks rows"),
    (b"video,alpha,prompt\n,a.mp4,b\n", "lacks a video in a row"),
    ("video,alpha,prompt\na,,ä\n".encode("latin-1"), "UTF-8"),
    (b"video,alpha,prompt\na,," + b"b" * 200_000, "UTF-8")])
def test_a_wrong_csv_is_one_sentence(content, sentence, tmp_path, capsys):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"metadata.csv .*{sentence}"):
        RGBADataset(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.main([str(tmp_path), "--check"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_hidden_colour_makes_no_difference(tmp_path):
    clip = procedural_clip(5, frames=3, material="glass", two=0)
    for name, colour in (("black", 0), ("red", (255, 0, 0))):
        write_rgba(tmp_path / name, np.where(clip.alpha[..., None] > 0, clip.rgb, colour).astype(np.uint8), clip.alpha)
        write_rgba(tmp_path / f"{name}_still.png", *(x[:1] for x in read_rgba(tmp_path / name)))
    for options in (dict(), dict(size=48), dict(size=(32, 80), keep_aspect=True), dict(frames=7)):
        samples = RGBADataset(tmp_path, **(dict(size=64, frames=3) | options))
        for a, b in ((0, 2), (1, 3)):
            assert [samples.name(a), samples.name(b)] in (["black", "red"], ["black_still.png", "red_still.png"])
            if a == 0:
                assert np.array_equal(samples.clip(a)[0], samples.clip(b)[0])
            crops = [train_vae.crop(*samples.source(i), 3, 32, 64, (0.5, 0.5, 0.3, 0.7)) for i in (a, b)]
            assert np.array_equal(crops[0][0], crops[1][0]) and crops[0][1].any()
            assert (samples.clip(b)[0] != samples.clip(b)[0][..., :1]).any()
    rgb, alpha = RGBADataset(tmp_path, 64, 3).clip(2)
    assert np.array_equal(rgb, bleed(*read_rgba(tmp_path / "red"))) and np.array_equal(alpha, clip.alpha)


def test_a_clip_in_parts_is_the_whole_clip(tmp_path, monkeypatch):
    write_rgba(tmp_path / "a", *(lambda c: (c.rgb, c.alpha))(procedural_clip(3, size=(300, 700), frames=9)))
    rgb, alpha = read_rgba(tmp_path / "a")
    samples = RGBADataset(tmp_path, size=(64, 48), frames=9)
    for part, whole in zip(samples.clip(0), data.cover(rgb, alpha, (64, 48))):
        assert np.array_equal(part, whole)


def test_a_window_slides_over_a_still(tmp_path):
    y, x = np.mgrid[:160, :160].astype(np.uint8)
    write_rgba(tmp_path / "a.png", np.stack([x, y, 0 * x], -1)[None], np.full((1, 160, 160), 255, np.uint8))
    samples, ways = RGBADataset(tmp_path, size=128, frames=17), set()
    for variant in range(20):
        rgb, alpha = samples.clip(0, variant)
        assert rgb.shape == (17, 128, 128, 3) and alpha.min() == 255
        left, top = rgb[:, 0, 0, 0].astype(int), rgb[:, 0, 0, 1].astype(int)
        assert {left[0], left[-1]} == {top[0], top[-1]} == {0, 32}                            # 0.8 of 160, end to end
        assert (np.abs(np.diff(left)) == 2).all() and (np.abs(np.diff(top)) == 2).all()       # a straight line, even
        assert np.array_equal(rgb[8], rgb[8, :1, :1] + np.stack([x, y, 0 * x], -1)[:128, :128])
        ways.add((left[0], top[0]))
        assert np.array_equal(rgb, samples.clip(0, variant)[0])
    assert len(ways) == 4
    samples = RGBADataset(tmp_path, size=160, frames=1)
    assert all(np.array_equal(samples.clip(0, v)[0][0], np.stack([x, y, 0 * x], -1)) for v in (0, 1))
    assert samples.geometry(0) == samples.geometry(0, 3)


def test_a_variant_is_one_window_of_a_clip(tmp_path):
    y, x = np.mgrid[:100, :200].astype(np.uint8)
    frames = np.stack([np.stack([x, y, 0 * x + 9 * t], -1) for t in range(3)])
    write_rgba(tmp_path / "a", frames, np.full((3, 100, 200), 255, np.uint8))
    write_rgba(tmp_path / "b", frames, np.full((3, 100, 200), 255, np.uint8))
    samples, widths, places = RGBADataset(tmp_path, size=(100, 200), frames=5), [], []
    assert np.array_equal(samples.clip(0)[0], frames[[0, 1, 2, 1, 0]])
    assert samples.clip(0)[0].shape == (5, 100, 200, 3)
    for variant in range(1, 60):
        rgb, _ = samples.clip(0, variant)
        assert rgb.shape == (5, 100, 200, 3)
        low, high = rgb[:, 50, 0, 0].astype(int), rgb[:, 50, -1, 0].astype(int)
        assert np.ptp(low) == np.ptp(high) == 0 and (rgb[:, 50, 50, 2] == [0, 9, 18, 9, 0]).all()
        widths.append((high - low + 1)[0] / 200)
        places.append(low[0])
    assert 0.79 < min(widths) < 0.83 and 0.97 < max(widths) <= 1 and min(places) < 3 and max(places) > 20
    assert not np.array_equal(samples.clip(0, 1)[0], samples.clip(1, 1)[0])                   # seeded with i as well
    assert np.array_equal(samples.clip(0, 1)[0], RGBADataset(tmp_path, (100, 200), 5).clip(0, 1)[0])


def test_the_aspect_can_be_kept(tmp_path):
    clip = procedural_clip(1, size=(270, 480), frames=2)
    write_rgba(tmp_path / "a", clip.rgb, clip.alpha)
    assert RGBADataset(tmp_path, 64, 2).clip(0)[1].shape == (2, 64, 64)
    assert RGBADataset(tmp_path, 64, 2, keep_aspect=True).clip(0)[1].shape == (2, 48, 80)
    assert RGBADataset(tmp_path, (40, 100), 2, keep_aspect=True).clip(0, 1)[1].shape == (2, 48, 80)
    assert data.area_size(1080, 1920, 640 * 624) == (480, 848) and data.area_size(1920, 1080, 640 * 624) == (848, 480)
    assert data.area_size(624, 640, 640 * 624) == (624, 640) and data.area_size(10, 9000, 64 * 64) == (16, 1920)


def test_content_is_the_bytes_and_geometry_the_rest(tmp_path):
    clip = procedural_clip(1, size=32, frames=2)
    for name in ("a", "b.apng", "c.png"):
        write_rgba(tmp_path / name, clip.rgb[:1 + (name < "c")], clip.alpha[:1 + (name < "c")])
    write_rgba(tmp_path / "a_pha", grey(clip.alpha))
    samples = RGBADataset(tmp_path, 32, 5)
    frames = sorted((tmp_path / "a").iterdir()) + sorted((tmp_path / "a_pha").iterdir())
    files = [frames, [tmp_path / "b.apng"], [tmp_path / "c.png"]]
    for i, paths in enumerate(files):
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        assert samples.content(i) == cache_key(*digests) and data.file_key(paths[0]) == digests[0]
    first = samples.content(0)
    write_rgba(tmp_path / "a_pha", 255 - grey(clip.alpha))
    assert samples.content(0) != first
    assert samples.geometry(0) == samples.geometry(1) != samples.geometry(1, 1) != samples.geometry(1, 2)
    assert samples.geometry(0, 1) != samples.geometry(1, 1)
    still = RGBADataset(tmp_path, 32, 5)
    still.samples.append(still.samples[2])
    assert len({still.geometry(1), still.geometry(2), still.geometry(3), still.geometry(3, 1)}) == 4
    others = [RGBADataset(tmp_path, *arguments) for arguments in ((48, 5), (32, 9), (32, 5, 4.0, True), ((32, 48), 5))]
    assert len({s.geometry(0) for s in (samples, *others)}) == 5


def test_the_cache_keeps_whole_clips_up_to_its_size(tmp_path):
    clip = procedural_clip(1, size=32, frames=6)
    for name in "abc":
        write_rgba(tmp_path / name, clip.rgb, clip.alpha)
    size = 6 * 32 * 32 * 4
    samples = RGBADataset(tmp_path, 32, 2, cache_gb=2.5 * size / 2 ** 30)
    assert [len(samples.source(i)[0]) for i in (0, 1, 2, 0)] == [6] * 4 and len(samples.kept) == 2
    assert samples.source(0)[0] is samples.source(0)[0] and samples.source(2)[0] is not samples.source(2)[0]
    assert np.shares_memory(samples.clip(0)[1], samples.source(0)[1])     # nothing changes, nothing is computed


def bad_folder(root, good=30):
    clip = procedural_clip(4, size=32, frames=5)
    for i in range(good):
        write_rgba(root / f"{i}.apng", clip.rgb, clip.alpha)
        (root / f"{i}.txt").write_text("a thing")
    write_rgba(root / "short.mp4", clip.rgb)
    write_rgba(root / "short_pha.mp4", grey(clip.alpha[:3]))
    (root / "broken.webm").write_bytes(b"no video")
    write_rgba(root / "latin.png", clip.rgb[:1], clip.alpha[:1])
    (root / "latin.txt").write_bytes("Bällchen".encode("latin-1"))
    return clip


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_are_named_and_left_out(workers, tmp_path, capsys, monkeypatch):
    clip = bad_folder(tmp_path)
    write_rgba(tmp_path / "blank.mp4", clip.rgb[:1])
    samples = RGBADataset(tmp_path, 32, 5)
    rows = samples.check(workers)
    assert [row["name"] for row in rows] == [samples.name(i) for i in range(34)]
    good, bad = [r for r in rows if not r["error"]], {r["name"]: r["error"] for r in rows if r["error"]}
    assert good[0] | dict(name="") == dict(
        name="", bytes=(tmp_path / "0.apng").stat().st_size + 7, changed=good[0]["changed"], frames=5, height=32,
        width=32, opaque=(clip.alpha == 255).mean(), semi=((clip.alpha > 0) & (clip.alpha < 255)).mean(),
        transparent=(clip.alpha == 0).mean(), caption=True, error=None)
    assert good[0]["changed"] == max((tmp_path / f"0.{k}").stat().st_mtime for k in ("apng", "txt"))
    assert good[-1]["name"] == "blank.mp4" and not good[-1]["caption"] and good[-1]["opaque"] == 1
    assert bad.keys() == {"short.mp4", "broken.webm", "latin.png"}
    assert all(sentence in bad[name] for name, sentence in (
        ("short.mp4", "make them equal"), ("broken.webm", "cannot be read"), ("latin.png", "UTF-8")))
    capsys.readouterr()
    samples.drop_bad(rows)
    lines = capsys.readouterr().err.splitlines()
    assert len(samples) == 31 and lines == [f"skipped: {error}" for error in bad.values()] + ["skipped 3 of 34 clips"]
    assert [samples.caption(i) for i in (0, 30)] == ["a thing", "blank"] and samples[30]["name"] == "blank.mp4"

    rows = json.loads(json.dumps(rows))                                   # as a file keeps them
    (tmp_path / "0.apng").write_bytes((tmp_path / "1.apng").read_bytes() + b" ")
    (tmp_path / "latin.txt").write_text("ball")
    write_rgba(tmp_path / "new.png", clip.rgb[:1], clip.alpha[:1])
    read, examine = [], data.examine
    monkeypatch.setattr(data, "examine", lambda sample: read.append(sample.name) or examine(sample))
    again = RGBADataset(tmp_path, 32, 5).check(known=rows)
    assert read == ["0.apng", "latin.png", "new.png"] and len(again) == 35
    assert [row for row in again if row["name"] not in read] == [row for row in rows if row["name"] not in read]


def test_more_than_one_bad_clip_in_ten_is_an_error(tmp_path):
    bad_folder(tmp_path, good=27)
    samples = RGBADataset(tmp_path)
    samples.drop_bad(samples.check())
    (tmp_path / "0.apng").write_bytes(b"")
    samples = RGBADataset(tmp_path)
    with pytest.raises(ValueError, match=r"4 of 30 clips in .* 0.apng, broken.webm, latin.png;.*--check"):
        samples.drop_bad(samples.check())
    for path in tmp_path.glob("*.apng"):
        path.unlink()
    samples = RGBADataset(tmp_path)
    with pytest.raises(ValueError, match="3 of 3 clips"):
        samples.drop_bad(samples.check())


def test_files_that_a_csv_misses_are_bad_clips(tmp_path, capsys):
    clip = procedural_clip(4, size=32, frames=2)
    write_rgba(tmp_path / "a.apng", clip.rgb, clip.alpha)
    rows = ["a.apng,,x"] * 20 + ["gone.mp4,,y", "a.apng,lost.mp4,z"]
    (tmp_path / "metadata.csv").write_text("\n".join(["video,alpha,prompt", *rows]))
    rows = RGBADataset(tmp_path).check()
    assert [row["error"] for row in rows if row["error"]] == [f"there is no file or folder {tmp_path / name}."
                                                              for name in ("lost.mp4", "gone.mp4")]


def test_a_process_that_ends_while_reading_is_one_sentence(tmp_path, monkeypatch):
    write_rgba(tmp_path / "a.png", np.zeros((1, 8, 8, 3), np.uint8))
    monkeypatch.setattr(data, "decode", lambda path: os._exit(1))
    with pytest.raises(OSError, match="use fewer than 2 workers"):
        RGBADataset(tmp_path).check(workers=2)


def test_check_says_what_a_folder_holds(tmp_path, capsys):
    def check(*arguments):
        with pytest.raises(SystemExit) as stop:
            data.main([*arguments, "--check"])
        return stop.value.code, *capsys.readouterr()

    clip = bad_folder(tmp_path, good=26)
    write_rgba(tmp_path / "wide.png", np.zeros((1, 16, 64, 3), np.uint8))
    os.utime(tmp_path, (0, 0))
    before = sorted((p.name, p.stat().st_mtime) for p in [tmp_path, *tmp_path.iterdir()])
    code, said, _ = check(str(tmp_path), "--workers", "1")
    assert sorted((p.name, p.stat().st_mtime) for p in [tmp_path, *tmp_path.iterdir()]) == before
    table = {line[:36].strip(): line[36:] for line in said.splitlines()[:-3]}
    assert code == 0 and table["clips"] == "30" and table["captions missing"] == "1"
    assert table["pairs of unequal length or size"] == "1" and table["cannot be read"] == "2"
    assert table["frames: min, median, max"] == "1  5  5" and table["width / height: min, median, max"] == "1  1  4"
    assert table["height x width (clips)"] == "32 x 32 (26), 16 x 64 (1)"
    pixels = 26 * clip.alpha.size + 16 * 64
    assert table["transparent pixels"] == f"{26 * (clip.alpha == 0).sum() / pixels:.1%}"
    assert table["opaque pixels"] == f"{(26 * (clip.alpha == 255).sum() + 16 * 64) / pixels:.1%}"
    assert table["no transparency at all"].startswith("1  (warning")
    assert [name in line for name, line in zip(("broken", "latin", "short"), said.splitlines()[-3:])] == [True] * 3
    (tmp_path / "0.apng").write_bytes(b"")
    assert check(str(tmp_path))[0] == 2
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "a.png").write_bytes(b"")
    code, said, _ = check(str(tmp_path))
    assert code == 2 and "a.png" in said
    for arguments in ((), (str(tmp_path), "--workers=-1")):
        code, _, message = check(*arguments)
        assert code == 2 and "--check needs" in message and message.count("\n") == 1


# ---- training


SMALL = ["--size", "32", "--seed", "3", "--save-every", "2", "--log-every", "1", "--lr", "1e-3", "--muon"]


def trained_folder(folder):
    """The four trainings, four steps each at the smallest size: a whole checkpoint folder."""
    data, out = str(folder / "data"), str(folder / "base")
    assert run_command("data.py", data, "--clips", "3", "--size", "32", "--frames", "5") == 0
    steps = {"vae-base": ["--stage", "base", "--schedule", "2:1:16:2,2:5:32:2", "--dim", "8"],
             "dit-base": ["--stage", "base", "--steps", "4", "--batch", "2", "--dim", "24", "--heads", "2",
                          "--layers", "1", "--text-dim", "16", "--text-layers", "1", "--text-len", "48",
                          "--frames", "5"],
             "vae-rgba": ["--schedule", "4:5:32:2", "--rank", "2", "--perceptual", "0"],
             "dit-rgba": ["--steps", "4", "--batch", "2", "--rank", "2", "--frames", "5"]}
    commands = {}
    for name, flags in steps.items():
        where = ["--out", out] if name == "vae-base" else ["--base", out, "--out", out]
        cache = ["--cache", str(folder / "cache")] if name.startswith("dit") else []
        commands[name] = (train_vae if name.startswith("vae") else train_dit, [data, *flags, *SMALL, *where, *cache])
    return data, Path(out), commands


def run_command(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / script, *arguments], env=environment).returncode


def test_all_four_trainings_resume_bit_for_bit(tmp_path, monkeypatch):
    """Stopped in the middle of step 3 and resumed, each run writes the same bytes as one that was never stopped."""
    _, out, commands = trained_folder(tmp_path)
    results = {"vae-base": "Wan2.1_VAE.safetensors", "dit-base": "diffusion_pytorch_model.safetensors",
               "vae-rgba": "Wan-Alpha-v2-VAE.safetensors", "dit-rgba": "t2v.safetensors"}
    torch.set_num_threads(1)
    for name, (script, arguments) in commands.items():
        script.main(arguments)
        expected = load_file(out / results[name])
        rows = [json.loads(line) for line in (out / name / "log.jsonl").open()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["loss"] == row["loss"] for row in rows)
        shutil.rmtree(out / name)
        (out / results[name]).unlink()

        generator = scale.step_generator

        def killed(seed, step):
            if step == 2:
                raise KeyboardInterrupt
            return generator(seed, step)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(scale, "step_generator", killed)
            script.main(arguments)
        assert not (out / results[name]).exists() and (out / name / "checkpoint.pt").exists()
        script.main([*arguments, "--resume"])
        result = load_file(out / results[name])
        assert result.keys() == expected.keys() and all(torch.equal(result[k], expected[k]) for k in expected), name
    adapter = load_file(out / "Wan-Alpha-v2-VAE.safetensors")
    assert adapter["vae_fgr.decoder.conv1.conv3D.lora_A.default.weight"].shape == (2, 16, 3, 3, 3)
    assert adapter["vae_pha.decoder.middle.1.to_qkv.lora_B.default.weight"].shape == (96, 2, 1, 1)
    assert "blocks.0.cross_attn.o.lora_magnitude_vector.default.weight" in load_file(out / "t2v.safetensors")


def loop_args(**changed):
    """The defaults of the flags that both training commands share."""
    parser = argparse.ArgumentParser()
    scale.add_loop_flags(parser.add_argument)
    return Namespace(**vars(parser.parse_args([])) | changed)


def small_rgba():
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=8, num_res_blocks=1))
    vae.init_weights()
    middle = FeatureMerge(64, 16, 32)
    middle.start_as_rgb(vae)
    return RGBAVAE(vae, middle).add_adapters(4)


def test_rgba_step_learns_and_leaves_the_base_alone():
    rgba = small_rgba()
    base = {k: v.clone() for k, v in rgba.state_dict().items() if "lora" not in k and not k.startswith("middle")}
    rgb, alpha = named("step.rgb", (1, 3, 5, 16, 16)).tanh(), named("step.alpha", (1, 1, 5, 16, 16)).sigmoid()
    optimizers = train_vae.make_optimizers(rgba, loop_args(lr=3e-3, muon=True, lora_plus=16))
    losses = []
    for _ in range(12):
        loss = train_vae.rgba_step(rgba, rgb, alpha, train_vae.step_generator(0, 0))["loss"]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(v, rgba.state_dict()[k]) for k, v in base.items())


def test_muon_moves_kernels_as_matrices():
    """A kernel and the same numbers as a matrix take the same step."""
    shapes = (16, 2, 3, 3), (16, 18)
    kernel, matrix = (torch.nn.Parameter(named("kernel", shapes[0]).reshape(shape)) for shape in shapes)
    for p in (kernel, matrix):
        module = torch.nn.ParameterList([p, torch.nn.Parameter(torch.ones(1))])
        _, muon = train_vae.make_optimizers(module, loop_args(lr=0.1, muon=True))
        (p * named("slope", (16, 18)).reshape(p.shape)).sum().backward()
        muon.step()
    assert torch.equal(kernel.flatten(1), matrix) and not torch.equal(matrix, named("kernel", (16, 2, 3, 3)).flatten(1))


def test_flow_step_draws_the_shifted_noise():
    """A model that answers the true velocity without the shift misses it by mean * (1 - G), squared."""
    z, mask = named("flow.z", (2, 16, 2, 4, 4)), torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def loss_of(mean):
        def model(z_t, t, context):
            sigma = (t / 1000).view(-1, 1, 1, 1, 1)
            return (z_t - z) / sigma                                # the velocity of the noise that was drawn
        return float(train_dit.flow_step(model, z, None, train_vae.step_generator(0, 0), mask, mean)["mse"])
    assert loss_of(0.05) < 1e-6
    seen = []
    for mean in (0.0, 0.5):
        train_dit.flow_step(lambda z_t, t, _: seen.append(z_t / (t / 1000).view(-1, 1, 1, 1, 1)) or z_t, z, None,
                            train_vae.step_generator(0, 0), mask, mean)
    shift = (seen[1] - seen[0]).mean(1)
    assert torch.allclose(shift, 0.5 * (1 - mask), atol=1e-3)


@pytest.mark.parametrize("script, arguments, sentence", [
    (train_vae, ["nowhere", "--schedule", "9:5:32:2"], "nowhere"),
    (train_vae, [], "give a folder"),
    (train_vae, ["{data}", "--schedule", "10:4:32:2"], "4k\\+1"),
    (train_vae, ["{data}", "--base", "nowhere", "--perceptual", "0", "--schedule", "9:5:32:2"], "nowhere"),
    (train_vae, ["{data}", "--vgg", "nowhere.pth", "--schedule", "9:5:32:2"], "nowhere.pth.*--perceptual 0"),
    (train_vae, ["{data}", "--stage", "base", "--schedule", "1:1:16:1", "--start", "{data}/0.apng"],
     "0.apng is not a checkpoint"),
    (train_vae, ["{data}", "--schedule", "9:5:64:2", "--perceptual", "0"], "--size 32 must be"),
    (train_vae, ["{data}", "--schedule", "9:5:8:2", "--tabd", "0"], "from 16 on"),
    (train_vae, ["{data}", "--schedule", "9:5:24:2"], "sides must be multiples of 16"),
    (train_vae, ["{data}", "--schedule", "9:5:32:1", "--tabd-clamp", "1", "-1"], "lower bound first"),
    (train_vae, ["{data}", "--schedule", "9:5:32:3", "--accumulate", "2", "--perceptual", "0"], "multiple of that"),
    (train_vae, ["{data}", "--resume", "--schedule", "9:5:32:1", "--perceptual", "0", "--tabd", "0"],
     "no .*checkpoint.pt to go on from"),
    (train_vae, ["{data}", "--device", "cuda:99"], "cuda:99 is not to be had"),
    (train_dit, ["{data}", "--stage", "base", "--dim", "50"], "--dim 50"),
    (train_dit, ["{data}", "--frames", "16"], "4k\\+1"),
    (train_dit, ["{data}", "--base", "nowhere"], "nowhere")])
def test_trainings_refuse_wrong_input_in_one_sentence(script, arguments, sentence, tmp_path, capsys):
    clip = procedural_clip(0, size=32, frames=5)
    write_rgba(tmp_path / "data/0.apng", clip.rgb, clip.alpha)
    arguments = [a.format(data=tmp_path / "data") for a in arguments] + ["--out", str(tmp_path / "out"), "--size", "32"]
    assert train_vae.one_sentence(lambda: script.main(arguments)) == 2
    said = capsys.readouterr().err.strip().split("error: ")[-1]
    assert re.search(sentence, said) and "\n" not in said


def a_training(folder, *flags, steps=30):
    """A short DoRA training on tiny/, whose latents are in the cache: fit for being stopped."""
    arguments = [str(folder / "data"), "--out", str(folder / "out"), "--cache", str(folder / "cache"), "--steps",
                 str(steps), "--batch", "2", "--rank", "2", "--size", "32", "--frames", "5", "--seed", "3", "--muon",
                 "--save-every", "1", "--log-every", "1", "--lr", "1e-3", *flags]
    if not (folder / "data").exists():
        data.main([str(folder / "data"), "--clips", "3", "--size", "32", "--frames", "5"])
        args = train_dit.parse_args(arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_dit, "load_rgba_vae", load_rgba_vae)
            train_dit.rgba_latents(args, RGBADataset(args.data, args.size, args.frames, keep_aspect=True))
    return arguments


@pytest.fixture
def no_sheets(monkeypatch):
    leave_out_sheets(monkeypatch)


def leave_out_sheets(patch):
    for name in ("sample", "load_rgba_vae", "contact_sheet"):
        patch.setattr(train_dit, name, lambda *_, **__: [])


def started(arguments):
    """The training in a process of its own."""
    torch.set_num_threads(1)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os.setpgrp() or sys.exit(train_vae.one_sentence(lambda: train_dit.main(arguments))))
    process.start()
    return process


def steps_done(out):
    log = out / "dit-rgba/log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition() and process.is_alive() and time.time() < end:
        time.sleep(0.002)


def killed_and_resumed(folder, arguments, kills, chance):
    """A training, ended by SIGKILL at random moments as often as `kills` says, then let run to its end; its rows."""
    out = folder / "out"
    for _ in range(kills):
        resume = ["--resume"] if (out / "dit-rgba/checkpoint.pt").exists() else []
        reached, process = steps_done(out), started([*arguments, *resume])
        wait_for(lambda: steps_done(out) > reached + chance.randint(0, 2) or not reached and steps_done(out), process)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
    assert not (out / "t2v.safetensors").exists()
    process = started([*arguments, "--resume"])
    process.join()
    assert process.exitcode == 0
    return [json.loads(row)["step"] for row in (out / "dit-rgba/log.jsonl").open()]


def unbroken(folder, arguments):
    process = started(arguments)
    process.join()
    expected = load_file(folder / "out/t2v.safetensors")
    shutil.rmtree(folder / "out")
    return expected


def test_killed_ten_times_it_ends_with_the_same_bits(tmp_path, no_sheets, kills=10, steps=30):
    """SIGKILL at a random moment: the checkpoint is always whole, and the end is that of an unbroken run.
    `python test_all.py 200` does it 200 times."""
    arguments = a_training(tmp_path, steps=steps)
    expected = unbroken(tmp_path, arguments)
    rows = killed_and_resumed(tmp_path, arguments, kills, random.Random(0))
    got = load_file(tmp_path / "out/t2v.safetensors")
    assert rows == list(range(1, steps + 1)) and all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, tmp_path, no_sheets, capfd):
    arguments = a_training(tmp_path, steps=500)
    process = started(arguments)
    wait_for(lambda: steps_done(tmp_path / "out") >= 2, process)
    os.killpg(process.pid, number)                                        # its workers too, as torchrun does
    process.join(30)
    saved = torch.load(tmp_path / "out/dit-rgba/checkpoint.pt", weights_only=True)
    assert process.exitcode == 130 and saved["step"] == steps_done(tmp_path / "out") < 500
    said = capfd.readouterr().err
    assert f"stopped after step {saved['step']}" in said and "--resume" in said and "Traceback" not in said


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, no_sheets, monkeypatch, capsys):
    arguments, replacing = a_training(tmp_path, steps=6), scale.replacing

    @contextmanager
    def full(path):
        if path.name == "checkpoint.pt" and steps_done(tmp_path / "out") == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        with replacing(path) as temporary:
            yield temporary
    monkeypatch.setattr(scale, "replacing", full)
    assert train_vae.one_sentence(lambda: train_dit.main(arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write into" in said and "No space left" in said and "checkpoint.pt is the last good state" in said
    assert torch.load(tmp_path / "out/dit-rgba/checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.undo()
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert train_vae.one_sentence(lambda: train_dit.main([*arguments, "--out", str(file / "out")])) == 2


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, no_sheets, monkeypatch, capsys):
    arguments, step = a_training(tmp_path, "--workers", "0", steps=6), train_dit.flow_step
    calls = []

    def broken(*args):
        calls.append(1)
        return {name: value * (float("nan") if len(calls) == 4 else 1) for name, value in step(*args).items()}
    monkeypatch.setattr(train_dit, "flow_step", broken)
    assert train_vae.one_sentence(lambda: train_dit.main(arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"not finite at step 3, clips 0000\d.apng, 0000\d.apng: .*checkpoint.pt holds the last good", said)
    saved = torch.load(tmp_path / "out/dit-rgba/checkpoint.pt", weights_only=True)
    assert saved["step"] == 3 and all(bool(x.isfinite().all()) for x in saved["model"].values())
    usual = [0.1] * 200
    scale.check_loss(4.9, 1.0, usual, 200, ["a"], tmp_path / "c.pt")
    scale.check_loss(9.0, 1.0, usual[:50], 50, ["a"], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="over 50 times its median 0.1 at step 200, clips a: .*nothing was saved"):
        scale.check_loss(5.1, 1.0, usual, 200, ["a"], tmp_path / "c.pt")


def test_resume_wants_the_same_run(tmp_path, no_sheets):
    arguments = a_training(tmp_path, steps=2)
    train_dit.main(arguments)
    for flags, named in ((["--lr", "2e-3"], "lr"), (["--mean", "0.1", "--seed", "4"], "seed, mean|mean, seed")):
        with pytest.raises(ValueError, match=f"of a run with other ({named}): .*--start"):
            train_dit.main([*arguments, *flags, "--resume"])
    train_dit.main([*arguments, "--resume", "--workers", "2", "--save-every", "7"])
    (tmp_path / "data/00002.apng").unlink()
    with pytest.raises(ValueError, match="of a run with other data"):
        train_dit.main([*arguments, "--resume"])


def test_summary_and_curves_are_written(tmp_path, no_sheets, capsys):
    train_dit.main(a_training(tmp_path, steps=3))
    summary = json.loads((tmp_path / "out/dit-rgba/summary.json").read_text())
    assert summary["steps"] == 3 and 0 <= summary["waited_for_data"] <= 1 and summary["peak_memory_gb"] > 0.1
    assert iio.imread(tmp_path / "out/dit-rgba/curves.png").shape[2] == 3
    assert "steps a second" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/dit-rgba/run.json").read_text())
    assert record["arguments"]["betas"] == [0.9, 0.999] and record["versions"]["processes"] == 1


def draw_number(step):
    if step == 5:
        raise ValueError("clip.mov cannot be read")
    return [dict(step=step, x=torch.full((2,), float(step)))]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_bring_batches_in_order_and_errors_as_they_are(workers):
    batches = scale.load_batches(draw_number, range(2, 8), loop_args(workers=workers, device="cpu"))
    assert [next(batches)[0]["x"].tolist() for _ in range(3)] == [[2.0] * 2, [3.0] * 2, [4.0] * 2]
    with pytest.raises(ValueError, match="^clip.mov cannot be read .the run stopped there; --resume [a-z ]+.$"):
        next(batches)


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_blocks_keep_little_and_give_the_same_gradients(offload):
    def gradients(model, *inputs):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            y = model(*inputs)
        y.square().sum().backward()
        return sum(kept), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    models = [add_dora(tiny_dit(), 2, 2, train_dit.DORA_TARGETS) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for block in models[1].blocks:
        assert any(p.requires_grad for p in block.parameters())
    scale.checkpoint_blocks(models[1], Block, offload)
    (plain, expected), (kept, got) = (gradients(model, *dit_inputs()) for model in models)
    assert kept < plain / 3 and expected.keys() == got.keys() and len(got) == 60
    for name in expected:
        assert (got[name] - expected[name]).abs().max() <= 1e-6 * max(1, expected[name].abs().max()), name


def test_shares_are_equal_parts_of_one_batch():
    parts = [scale.shares(12, rank, 2, 3) for rank in range(2)]
    assert [range(12)[part] for rank in parts for part in rank] == [range(k, k + 2) for k in range(0, 12, 2)]
    with pytest.raises(ValueError, match="batch of 10 cannot be cut into 4 equal parts .2 processes, --accumulate 2"):
        scale.shares(10, 0, 2, 2)


def test_crops_hold_the_object_scale_and_slide():
    alpha = np.zeros((9, 40, 60), np.uint8)
    alpha[:, 30:34, 50:54] = 255
    rgb = np.zeros((9, 40, 60, 3), np.uint8)
    rgb[alpha > 0] = 200
    for u in torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).tolist():
        colour, part = train_vae.crop(rgb, alpha, 5, 16, 40, u)
        assert part.shape == (5, 16, 16) and (part == 255).sum() == 5 * 16 and (colour == 200).all()     # bled
        part = train_vae.crop(rgb, alpha, 5, 32, None, u)[1]                    # scaled by 32/40 to 64/40
        assert part.shape == (5, 32, 32) and 5 * 16 * 0.5 < (part > 127).sum() < 5 * 16 * 3
    still = np.zeros((1, 40, 60), np.uint8)
    still[0, 20, 4:56] = 255
    part = train_vae.crop(np.zeros((1, 40, 60, 3), np.uint8), still, 9, 16, 40, (0, 0, 0.0, 0.99))[1]
    assert [frame.any() for frame in part] == [True] * 9 and part.shape == (9, 16, 16)
    assert part[0, :, :4].sum() == 0 and part[-1, :, -4:].sum() == 0            # from the left end to the right one
    long = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8) + 1
    played = train_vae.crop(np.zeros((3, 16, 16, 3), np.uint8), long, 9, 16, 16, (0, 0, 0.5, 0.5))[1][:, 0, 0]
    assert played.tolist() == [1, 2, 3, 2, 1, 2, 3, 2, 1]


def test_held_out_clips_never_train(tmp_path):
    data.main([str(tmp_path), "--clips", "40", "--size", "16", "--frames", "1"])
    dataset = RGBADataset(tmp_path, 16, 1)
    held = train_vae.held_out_clips(dataset)
    assert held == [38, 39] and train_vae.trained_on(dataset) == 38
    for step in range(8):
        batch, = train_vae.draw_batch(dataset, [(9, 1, 16, 8)], 16, 0, 1, 0, 1, step)
        assert not {dataset.name(i) for i in held} & {*batch["names"]} and batch["rgb"].shape == (8, 3, 1, 16, 16)


def test_two_processes_draw_the_parts_of_one_batch(tmp_path):
    data.main([str(tmp_path), "--clips", "6", "--size", "16", "--frames", "1"])
    dataset = RGBADataset(tmp_path, 16, 1)
    whole, = train_vae.draw_batch(dataset, [(9, 1, 16, 4)], None, 0, 1, 0, 1, 3)
    parts = [part for rank in range(2)
             for part in train_vae.draw_batch(dataset, [(9, 1, 16, 4)], None, 0, 2, rank, 2, 3)]
    assert torch.equal(torch.cat([part["rgb"] for part in parts]), whole["rgb"]) and len(parts) == 4
    assert all(part["names"] == whole["names"] and part["n"] == 4 for part in parts)


def test_clips_of_several_shapes_are_encoded_once_and_drawn_by_shape(tmp_path, monkeypatch):
    """Variants differ in crop and colour; a second run needs neither VAE nor text encoder; a new caption, file or
    adapter makes new latents."""
    (tmp_path / "data").mkdir()
    for i, size in enumerate(((32, 32), (32, 64), (32, 64))):
        clip = procedural_clip(i, size, 5, two=0)
        write_rgba(tmp_path / f"data/{i}.webp", clip.rgb, clip.alpha)
        (tmp_path / f"data/{i}.txt").write_text(clip.caption)
    args = train_dit.parse_args([str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--size", "32", "--frames",
                                 "5", "--variants", "3"])

    def encode():
        return train_dit.rgba_latents(args, RGBADataset(args.data, args.size, args.frames, keep_aspect=True))
    files = encode()
    assert len({*files}) == 9 and [train_dit.latent_shape(f)[2:] for f in files[::3]] == [(4, 4), (2, 6), (2, 6)]
    variants = [load_file(file)["z"] for file in files[3:6]]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(variants, variants[1:]))
    groups = train_dit.of_one_shape(files)
    for step in range(6):
        batch, = train_dit.draw_latents(files, groups, range(9), 4, 0, 1, 0, 1, step)
        assert batch["z"].shape[3:] in ((4, 4), (2, 6)) and batch["mask"].shape[1:] == batch["z"].shape[2:]
        assert len(batch["context"]) == 4

    def unwanted(*_, **__):
        raise AssertionError("loaded though everything is in the cache")
    with monkeypatch.context() as patch:
        patch.setattr(train_dit, "load_rgba_vae", unwanted)
        patch.setattr(train_dit, "load_text_encoder", unwanted)
        assert encode() == files
    (tmp_path / "data/1.txt").write_text("another caption")
    changed = encode()
    assert changed[:3] + changed[6:] == files[:3] + files[6:] and not {*changed[3:6]} & {*files[3:6]}


def test_renders_of_one_clip_are_all_held_out_or_none(tmp_path):
    data.main([str(tmp_path / "data"), "--clips", "20", "--size", "16", "--frames", "1"])
    args = train_dit.parse_args([str(tmp_path / "data"), "--stage", "base", "--base", str(ROOT / "tiny"), "--cache",
                                 str(tmp_path / "cache"), "--size", "16", "--frames", "1"])
    dataset = RGBADataset(args.data, args.size, args.frames)
    files, captions, training = train_dit.rgb_latents(args, dataset)
    assert len(files) == len(captions) > 20 and len({*files}) == len(files)
    renders = 2 if "transparent" in dataset.caption(19) else 1
    assert train_vae.trained_on(dataset) == 19 and training == len(files) - renders


def test_a_folder_of_mixed_aspects_trains_and_draws(tmp_path):
    for i, size in enumerate(((16, 32), (32, 16))):
        clip = procedural_clip(i, size, 1, two=0)
        write_rgba(tmp_path / f"data/{i}.webp", clip.rgb, clip.alpha)
    arguments = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--size",
                 "32x16", "--frames", "1", "--batch", "2", "--rank", "2", "--steps", "2", "--workers", "0"]
    train_dit.main(arguments)
    assert (tmp_path / "out/t2v.safetensors").exists() and (tmp_path / "out/dit-rgba/sheet-000002.png").exists()
    said = (tmp_path / "out/dit-rgba/run.json").read_text()
    with pytest.raises(ValueError, match="holds a run already: --resume goes on"):
        train_dit.main([*arguments, "--lr", "1e-3"])
    with pytest.raises(ValueError, match="other lr"):
        train_dit.main([*arguments, "--lr", "1e-3", "--resume"])
    assert (tmp_path / "out/dit-rgba/run.json").read_text() == said
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-100])                        # cut: made again
    (tmp_path / "data/.checked.json").write_text('[1, {"name": 2}')
    with (tmp_path / "out/dit-rgba/log.jsonl").open("a") as log:
        log.write('{"step": 3, "los')
    train_dit.main([*arguments, "--resume"])
    assert all(train_dit.is_whole(file) for file in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("script", [train_vae, train_dit])
@pytest.mark.parametrize("flags", [
    ["--lr", "nan"], ["--lr", "0"], ["--clip", "-1"], ["--betas", "2", "2"], ["--workers", "-1"], ["--warmup", "0"],
    ["--accumulate", "0"], ["--seed", "-1"], ["--lora-plus", "0"], ["--weight-decay", "inf"], ["--size", "0"]])
def test_flags_that_make_no_sense_are_refused(script, flags, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(["data", *flags])
    assert left.value.code == 2 and re.search(rf"argument {flags[0]}: '.*' is not ", capsys.readouterr().err)


def test_times_are_float32_under_autocast():
    """The base stage computes in bfloat16, which knows no difference between the times 999 and 1000."""
    model, seen = tiny_dit(), []
    train_dit.keep_float32(model.time_embedding, model.time_projection, model.head.head)
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        model(*dit_inputs())
        with torch.autocast("cpu", torch.bfloat16):
            assert model(*dit_inputs()).dtype == torch.float32
    assert seen[0].dtype == seen[1].dtype == torch.float32 and torch.equal(*seen)


def test_lora_in_place_of_dora(tmp_path, no_sheets):
    train_dit.main(a_training(tmp_path, "--lora", "--rank", "8", steps=2))          # matrices only: all for Muon
    assert {key.split(".")[-3] for key in load_file(tmp_path / "out/t2v.safetensors")} == {"lora_A", "lora_B"}


def test_naive_autoencoder_sees_hidden_colour_and_is_judged_by_it():
    rgba = small_rgba()
    alpha = torch.zeros(1, 1, 1, 16, 16)
    alpha[..., :8] = 1
    rgb, other = (torch.full((1, 3, 1, 16, 16), value) for value in (0.5, 0.5))
    other = torch.where(alpha > 0, other, -1.0)
    with torch.no_grad():
        assert torch.equal(*(rgba.encode(x, alpha) for x in (rgb, other)))
        assert not torch.equal(*(rgba.encode(x, alpha, None) for x in (rgb, other)))
        for naive, differ in ((False, False), (True, True)):
            losses = [float(train_vae.rgba_step(rgba, x, alpha, train_vae.step_generator(0, 0), naive=naive)["loss"])
                      for x in (rgb, other)]
            assert (losses[0] != losses[1]) is differ


def test_evaluation_of_a_folder_is_a_table_json_and_four_clips(tmp_path, capsys):
    clip = procedural_clip(3, 64, 17, material="solid", motion="growing", two=0)
    write_rgba(tmp_path / "data/red ball.webp", clip.rgb, clip.alpha)
    train_vae.main([str(tmp_path / "data"), "--eval", "--size", "64", "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/eval.json").read_text())
    scores = record["clips"]["clips"]["red ball.webp"]
    assert scores == record["clips"]["mean"] and 15 < scores["alpha"]["psnr"] < 60 and 0.3 < scores["alpha"]["ssim"] < 1
    assert record["cells"]["opaque"] < record["cells"]["transparent"]
    said = capsys.readouterr().out
    assert f"{scores['soft render']['psnr']:.2f}" in said and "SSIM" in said
    for kind in ("target", "result"):
        rgb, _ = read_rgba(tmp_path / f"out/eval/red ball-{kind}-colour.mp4")
        alpha, _ = read_rgba(tmp_path / f"out/eval/red ball-{kind}-alpha.mp4")
        assert np.abs(alpha[..., 0].astype(int) - clip.alpha).mean() < 12 and len(rgb) >= 5
        assert np.abs(rgb.astype(int) - clip.rgb)[clip.alpha == 255].mean() < 40


def curve_pixels(path):
    """y, x of the curve's pixels, by x."""
    y, x = np.nonzero((iio.imread(path) == scale.CURVE).all(-1))
    return y[x.argsort()], np.sort(x)


def test_curves_have_a_panel_for_each_scalar(tmp_path):
    for n, shape in ((1, (200, 360, 3)), (3, (200, 1080, 3)), (8, (600, 1080, 3))):
        rows = [{"step": step, "seconds": 1.0} | {f"scalar{i}": step for i in range(n)} for step in (50, 100)]
        scale.draw_curves(tmp_path / "curves.png", rows)
        assert iio.imread(tmp_path / "curves.png").shape == shape
    first = (tmp_path / "curves.png").read_bytes()
    scale.draw_curves(tmp_path / "curves.png", rows)
    assert (tmp_path / "curves.png").read_bytes() == first and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("values", [range(1, 9), range(-4, 4), [10.0 ** i for i in range(8)]])
def test_a_rising_curve_rises_and_has_no_holes(tmp_path, values):
    scale.draw_curves(tmp_path / "curves.png", [dict(step=i, loss=value) for i, value in enumerate(values)])
    y, x = curve_pixels(tmp_path / "curves.png")
    top = np.array([y[x == column].min() for column in np.unique(x)])
    assert np.ptp(x) > 250 and np.ptp(y) > 130
    assert (np.diff(np.unique(x)) == 1).all() and (np.diff(top) <= 0).all()
    assert np.abs(top - np.linspace(top[0], top[-1], len(top))).max() < 2      # straight: decades on a log axis


def test_curves_leave_gaps_where_there_are_no_numbers(tmp_path):
    rows = [dict(step=i, loss=1 + i % 2) for i in range(9)] + [dict(step=9)]
    rows[4]["loss"], rows[6]["loss"] = np.nan, -np.inf
    scale.draw_curves(tmp_path / "curves.png", rows)
    columns = np.unique(curve_pixels(tmp_path / "curves.png")[1])
    assert (np.diff(columns) > 20).sum() == 2 and columns[-1] < 330     # a line, the dot of step 5, a line to step 8


@pytest.mark.filterwarnings("error")
def test_curves_of_one_row_of_constants_and_of_nothing(tmp_path):
    row = dict(step=1, seconds=0, loss=0.5, tabd=np.nan, a_name_longer_than_its_panel=0)
    scale.draw_curves(tmp_path / "one.png", [row],
                width=200)
    assert len(curve_pixels(tmp_path / "one.png")[0]) == 8      # two dots of four pixels
    scale.draw_curves(tmp_path / "flat.png", [dict(step=i, loss=-3.0) for i in range(9)])
    assert len(np.unique(curve_pixels(tmp_path / "flat.png")[0])) == 2
    scale.draw_curves(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


# ---- scores


ASKED = unseen_prompts(24)
CLIPS = [procedural_clip(i, two=0, **attributes) for i, (_, attributes) in enumerate(ASKED)]


def one(motion="rising", material="solid", shape="ball"):
    return procedural_clip(5, two=0, shape=shape, color="red", material=material, motion=motion)


def smooth(x):
    """Blur with a deviation of one pixel, uint8 (t, h, w) or (t, h, w, 3)."""
    k = torch.exp(-torch.arange(-4, 5) ** 2 / 2)
    k = (k[:, None] * k / k.sum() ** 2)[None, None]
    y = torch.from_numpy(x.reshape(*x.shape[:3], -1)).movedim(-1, 1).float()
    y = F.conv2d(F.pad(y.flatten(0, 1)[:, None], (4, 4, 4, 4), mode="replicate"), k).view(y.shape)
    return y.movedim(1, -1).round().byte().numpy().reshape(x.shape)


def test_every_score_passes_on_the_truth_and_through_a_blur():
    for i, clip in enumerate(CLIPS):
        scores = score_clip(clip.rgb, clip.alpha, clip.attributes)
        assert not [name for name, passes in scores.items() if passes is False], clip.caption
        assert all(type(passes) in (bool, type(None)) for passes in scores.values())
        if i % 3 == 0:
            scores = score_clip(smooth(clip.rgb), smooth(clip.alpha), clip.attributes)
            assert not [name for name, passes in scores.items() if passes is False], clip.caption


def test_scores_of_wrong_labels_are_chance():
    truth = CLIPS[1:] + CLIPS[:1]
    got = [score_clip(clip.rgb, clip.alpha, other.attributes) for clip, other in zip(CLIPS, truth)]
    for name in ("color", "motion", "shape"):
        assert np.mean([scores[name] for scores in got]) < 0.3, name
    for name in ("shape", "color", "motion"):                              # it passes just where the labels agree
        agree = [clip.attributes[name] == other.attributes[name] for clip, other in zip(CLIPS, truth)]
        assert [scores[name] for scores in got] == agree
    assert np.mean([scores["material"] for scores in got]) < 0.7           # glass, smoke and bubble share one rule


@pytest.mark.parametrize("motion, mirrored, reversed_", [
    ("moving from left to right", "moving from right to left", "moving from right to left"),
    ("rising", "rising", "falling"), ("bouncing", "bouncing", "bouncing"), ("spinning", "spinning", "spinning"),
    ("orbiting", "orbiting", "orbiting")])
def test_left_and_right_up_and_down_are_told_apart(motion, mirrored, reversed_):
    alpha = one(motion).alpha
    assert named_motion(alpha) == motion
    assert named_motion(alpha[:, :, ::-1].copy()) == mirrored
    assert named_motion(alpha[::-1].copy()) == reversed_


def test_what_stands_still_or_comes_back_or_vanishes_has_no_motion():
    alpha = one("moving from left to right").alpha
    assert named_motion(np.repeat(alpha[:1], 17, 0)) == "none"
    assert named_motion(np.concatenate([alpha[::2], alpha[-2::-2]])) == "none"
    vanishing = alpha.copy()
    vanishing[9] = 0
    assert named_motion(vanishing) == "none"


def test_a_hole_is_caught_and_a_dent_is_not():
    clip = one("moving from left to right")
    columns = clip.alpha[8].max(0).nonzero()[0]
    middle = columns[len(columns) // 2]
    row = int(clip.alpha[8][:, middle].nonzero()[0].mean())
    hole, dent = clip.alpha.copy(), clip.alpha.copy()
    hole[8, row:row + 2, middle:middle + 2] = 150
    dent[8, :row, middle:middle + 2] = 150
    assert [has_holes(alpha) for alpha in (clip.alpha, hole, dent)] == [False, True, False]
    assert score_clip(clip.rgb, hole, clip.attributes)["no_holes"] is False
    assert has_holes(one(shape="ring").alpha) and named_shape(one(shape="ring").alpha) == "ring"
    assert score_clip(clip.rgb, hole, clip.attributes | {"shape": "ring"})["no_holes"] is None
    assert score_clip(clip.rgb, hole, clip.attributes | {"material": "glass"})["no_holes"] is None


def test_scores_fail_where_they_should():
    clip = one()
    hazy = np.maximum(clip.alpha, 4)                                       # 0.016 everywhere
    assert not score_clip(clip.rgb, hazy, clip.attributes)["corners"]
    pale = (clip.alpha * 0.9).astype(np.uint8)
    assert not score_clip(clip.rgb, pale, clip.attributes)["solid"]
    for material, as_if in (("solid", "glow"), ("solid", "glass"), ("glass", "solid"), ("smoke", "glow")):
        clip = one(material=material)
        scores = score_clip(clip.rgb, clip.alpha, clip.attributes | {"material": as_if})
        assert scores["material"] is scores[as_if] is False and scores[material] is None
    square = np.zeros((17, 64, 64), np.uint8)
    square[:, 30:34, 10:54] = square[:, 10:54, 30:34] = 255                # a thin cross is none of the shapes
    assert named_shape(square) == "none"


def test_an_empty_clip_fails_all_but_corners_and_holes():
    rgb, attributes = np.zeros((17, 64, 64, 3), np.uint8), one().attributes
    scores = score_clip(rgb, rgb[..., 0], attributes)
    assert [name for name, passes in scores.items() if passes] == ["corners", "no_holes"]
    assert named_color(rgb, rgb[..., 0]) == named_motion(rgb[..., 0]) == named_shape(rgb[..., 0]) == "none"


def test_scores_do_not_depend_on_frame_size():
    for size, frames in ((96, 9), ((64, 112), 17)):
        clip = procedural_clip(3, size, frames, split="test", two=0)
        assert False not in score_clip(clip.rgb, clip.alpha, clip.attributes).values()


def test_score_table_counts_only_what_applies():
    rows = [dict(color=True, glass=None, glow=None), dict(color=False, glass=True, glow=None)]
    assert score_table(rows) == ("color         50.0 %     1 of    2\n"
                                 "  glass      100.0 %     1 of    1\n"
                                 "  glow           - %     0 of    0")
    assert train_dit.shares_of(rows) == dict(color=0.5, glass=1, glow=None)
    prompts = [("a", dict(shape="ball")), ("b", dict(shape="ring"))]
    assert train_dit.score_by(rows, prompts, "color", "shape") == "color by shape: ball 1 of 1, ring 0 of 1"


def test_unseen_prompts_are_held_out_different_and_even():
    prompts = unseen_prompts()
    names = ("shape", "color", "material", "motion")
    combinations = [tuple(attributes[name] for name in names) for _, attributes in prompts]
    assert len(set(combinations)) == 200 and all(held_out(*c) for c in combinations)
    for values, column in zip((SHAPES, COLORS, MATERIALS, MOTIONS), zip(*combinations)):
        counts = [column.count(value) for value in values]
        assert min(counts) > 0.7 * 200 / len(values)
    assert all(prompt == caption_of(attributes, i % 2) for i, (prompt, attributes) in enumerate(prompts))
    assert unseen_prompts() == prompts and unseen_prompts(200, seed=1) != prompts and ASKED == prompts[:24]
    with pytest.raises(ValueError, match="only"):
        unseen_prompts(3000)


def test_psnr_of_known_errors():
    x = np.zeros((2, 8, 8, 3), np.uint8)
    y, mask = x.copy(), np.zeros((2, 8, 8), bool)
    y[:, :, :4], mask[:, :, :4] = 51, True
    assert round(psnr(x, y, mask), 4) == 13.9794 and round(psnr(x, y), 4) == 16.9897 and psnr(x, x) > 75


def test_ssim_of_known_pictures():
    """scikit-image 0.25: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)."""
    y, x = np.mgrid[:32, :40]
    a = ((x * 7 + y * 3 + (x * y) % 11 * 9) % 256).astype(np.uint8)[None]
    b = np.clip(a.astype(int) + ((x * 13 + y * 29) % 41 - 20), 0, 255).astype(np.uint8)
    for pair, expected in (((a, b), 0.9633062), ((a, np.roll(a, 3, 2)), 0.0922819), ((a // 4 + 90, b), 0.4380390)):
        assert abs(train_vae.ssim(*pair) - expected) < 1e-5
        colour = [np.stack([v, v, v], -1) for v in pair]
        assert abs(train_vae.ssim(*colour, np.ones(a.shape, bool)) - expected) < 1e-5
    assert train_vae.ssim(a, a) == 1
    flat = [np.full((1, 16, 16), value, np.uint8) for value in (100, 120)]
    assert abs(train_vae.ssim(*flat) - (2 * 100 * 120 + 2.55 ** 2) / (100 ** 2 + 120 ** 2 + 2.55 ** 2)) < 1e-5
    half = a.copy()
    half[:, :, 20:] = b[:, :, 20:]
    left = np.zeros(a.shape, bool)
    left[:, :, :15] = True                                              # its windows end where the halves meet
    assert train_vae.ssim(a, half, left) == 1 > train_vae.ssim(a, half)


def test_object_region_is_two_pixels_wider_than_the_object():
    alpha = np.zeros((2, 16, 16), np.uint8)
    alpha[0, 8, 8] = 1
    region = object_region(alpha)
    assert region.dtype == bool and region.sum() == 25 and region[0, 6:11, 6:11].all() and not region[1].any()


# ---- generate.py


GENERATE_FILES = ("rgba.webm", "rgba.mov", "frames", "preview.mp4", "preview.webp", "rgb.mp4", "alpha.mp4", "run.json")
UMT5_NAME, VAE_NAME = "models_t5_umt5-xxl-enc-bf16.safetensors", "Wan2.1_VAE.safetensors"
BASE_FILES = ("config.json", "google/umt5-xxl/tokenizer.json", UMT5_NAME, "diffusion_pytorch_model.safetensors",
              VAE_NAME, "Wan-Alpha-v2-VAE.safetensors", "t2v.safetensors")


def random_base(folder):
    """A complete checkpoint folder like tiny/, with random weights that all have a say in what comes out."""
    folder = Path(folder)
    torch.manual_seed(0)
    captions = ["A red glass ball moving from left to right.", "a smoky blue ghost, rising"]
    (folder / "google/umt5-xxl").mkdir(parents=True)
    make_tokenizer(captions).save(str(folder / "google/umt5-xxl/tokenizer.json"))
    text = UMT5(T5Config(vocab=64, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=2, num_buckets=32))
    save_file(text.state_dict(), folder / UMT5_NAME)
    vae = WanVAE(VAEConfig(dim=8, num_res_blocks=1))
    vae.init_weights()
    save_file(vae.state_dict(), folder / VAE_NAME, dict(mean=json.dumps([0.1] * 16), std=json.dumps([0.9] * 16)))
    rgba = RGBAVAE(vae, FeatureMerge(64, 16, 32)).add_adapters(rank=4)
    dit = WanDiT(DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=32))
    torch.nn.init.normal_(dit.head.head.weight, std=0.2)
    save_file(dit.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    add_dora(dit, 4, 4, targets=r".*_attn\.[qkvo]|.*\.ffn\.[02]")
    for module in (rgba, dit):
        for name, parameter in module.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3) if name.endswith("lora_B") else None
    save_file(rgba.adapter_state(), folder / "Wan-Alpha-v2-VAE.safetensors")
    save_file(adapter_state(dit), folder / "t2v.safetensors")
    config = dict(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=32)
    config["generate"] = dict(size=[48, 32], frames=5, fps=8, steps=2, vae_adapter=BASE_FILES[5], dora=BASE_FILES[6])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def kept():
    """A folder for all tests of this file; it goes when the object does."""
    return tempfile.TemporaryDirectory()


@functools.cache
def base():
    return random_base(Path(kept().name) / "base")


def arguments(prompt, out, *flags):
    return [prompt, "--base", str(base()), "--out", str(out), *map(str, flags)]


def make(prompt, out, *flags):
    (folder,) = generate.generate(generate.make_parser().parse_args(arguments(prompt, out, *flags)))
    return folder


@functools.cache
def clip():
    """The folder of one clip, and the alpha that its decoders gave."""
    decode, seen = generate.decode, []
    generate.decode = lambda *args: (seen.append(pixels) or pixels for pixels in decode(*args))
    try:
        return make("A red glass ball", Path(kept().name) / "out", "--seed", 3), *seen
    finally:
        generate.decode = decode


def pngs(folder):
    return [path.read_bytes() for path in sorted((folder / "frames").iterdir())]


def test_generate_writes_every_file():
    folder, rgb, alpha = clip()
    assert folder.name == "a-red-glass-ball-3"
    assert sorted(path.name for path in folder.iterdir()) == sorted(GENERATE_FILES)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]             # nothing temporary is left
    assert rgb.shape == (5, 32, 48, 3) and alpha.shape == (5, 32, 48) and alpha.dtype == np.uint8
    assert alpha.std() > 5 and rgb.std() > 5                                            # worth a test
    for name in GENERATE_FILES[:-1]:
        assert read_rgba(folder / name)[0].shape == rgb.shape, name


def test_generate_keeps_alpha():
    folder, rgb, alpha = clip()
    frames = read_rgba(folder / "frames")
    assert np.array_equal(frames[0], rgb) and np.array_equal(frames[1], alpha)
    for name in ("rgba.webm", "rgba.mov"):
        assert np.abs(read_rgba(folder / name)[1].astype(float) - alpha).mean() < 3, name
    assert np.abs(read_rgba(folder / "alpha.mp4")[0].astype(float) - alpha[..., None]).mean() < 3
    preview, _ = read_rgba(folder / "preview.webp")
    opacity = alpha[:, 0, 0] / 255                                                  # of a corner, over the light square
    assert np.abs(preview[:, 0, 0, 0] - (rgb[:, 0, 0, 0] * opacity + 226 * (1 - opacity))).max() <= 1


def test_generate_records_the_run():
    folder, *_ = clip()
    run = json.loads((folder / "run.json").read_text())
    asked = run["arguments"]
    assert run["seed"] == 3 and asked["prompt"] == "A red glass ball" and asked["size"] == [48, 32]
    assert asked["steps"] == 2 and asked["fps"] == 8 and asked["mean"] == 0.05      # from config.json, and Wan's
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["python"] == sys.version.split()[0]
    assert list(run["stages"]) == ["text", "transformer", "decode", "write"]
    assert all(stage["seconds"] >= 0 and stage["host_mib"] > 50 for stage in run["stages"].values())
    hashes = {str(base() / name): hashlib.sha256((base() / name).read_bytes()).hexdigest() for name in BASE_FILES}
    assert run["weights"] == hashes


def test_same_seed_same_bytes(tmp_path):
    folder, *_ = clip()
    assert pngs(make("A red glass ball", tmp_path, "--seed", 3)) == pngs(folder)
    assert pngs(make("A red glass ball", tmp_path, "--seed", 4)) != pngs(folder)


def settled(prompt, *flags):
    return generate.settle(generate.make_parser().parse_args(arguments(prompt, "out", *flags)))


def latent(prompt, *flags):
    args = settled(prompt, *flags)
    with torch.inference_mode():
        (z,), _ = generate.sample(args, generate.encode_prompts(args), generate.make_mask(args))
    return z


def test_every_argument_has_a_say():
    plain = latent("ball")
    assert torch.equal(plain, latent("ball")) and plain.shape == (1, 16, 2, 4, 6)
    for flags in (("--seed", 1), ("--steps", 3), ("--shift", 3), ("--guidance", 2, "--negative", "ghost"),
                  ("--mean", 0), ("--mean", 0.1), ("--mask", "0.2,0.5,0.2,0.3"), ("--dora", ""),
                  ("--distill", base() / "t2v.safetensors"), ("--sampler", "unipc"), ("--dtype", "bfloat16")):
        assert not torch.equal(plain, latent("ball", *flags)), flags
    assert not torch.equal(plain, latent("ghost"))
    assert latent("ball", "--size", "32x48", "--frames", 9).shape == (1, 16, 3, 6, 4)


def test_mean_shift_reaches_the_noise(monkeypatch):
    monkeypatch.setattr(generate, "euler", lambda model, noise, sigmas: [(0, noise)])
    flags = "--size", "64x64", "--mask", "0.25,0.5,0.2,0.2", "--mean"
    shift = (latent("ball", *flags, 5) - latent("ball", *flags, 0))[0, :, 0]                # (c h w)
    assert shift.min() >= 0 and shift[:, 4, 1].max() < 1.5 and shift[:, 4, 7].min() > 4.9   # none inside, all outside


def test_guidance_reads_the_negative_prompt(monkeypatch):
    load, read = generate.load_text_encoder, []

    def spy(*args):
        return lambda prompts: read.append(prompts) or load(*args)(prompts)
    monkeypatch.setattr(generate, "load_text_encoder", spy)
    flags = "--steps", 1, "--negative", "ghost", "--guidance"
    plain, zero, away = (latent("ball", *flags, scale) for scale in (1, 0, 3))
    assert read == [["ball"], ["ball"], ["ghost"], ["ball"], ["ghost"]]
    assert torch.allclose(away, zero + 3 * (plain - zero), atol=1e-4) and not torch.allclose(away, plain, atol=1e-3)


def test_pixels_are_rounded():
    pieces = [torch.tensor([[[[[-0.5, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 254.6 / 255, 1.5]]]]])] * 2
    assert generate.to_bytes(pieces)[..., 0].tolist() == [[[0, 0, 1, 255, 255]]] * 2


def test_masks_of_every_kind(tmp_path):
    def mask(spec, *flags):
        return generate.make_mask(settled("ball", "--size", "64x64", "--mask", spec, *flags))
    alpha = np.zeros((3, 32, 32), np.uint8)
    alpha[:, 4:28, 4:12] = 255
    rgb = np.full((3, 32, 32, 3), 90, np.uint8)
    write_rgba(tmp_path / "clip.webm", rgb, alpha)
    write_rgba(tmp_path / "frames", rgb, alpha)
    write_rgba(tmp_path / "matte.mp4", np.repeat(alpha[..., None], 3, -1))
    saved = mask(tmp_path / "frames")
    torch.save(saved, tmp_path / "gauss_mask")
    torch.save(saved, tmp_path / "mask.pt")
    save_file({"mask": saved}, tmp_path / "mask.safetensors")
    assert saved.shape == (2, 8, 8) and saved[0].argmax() % 8 in (1, 2)
    for name in ("clip.webm", "matte.mp4", "gauss_mask", "mask.pt", "mask.safetensors"):
        assert torch.allclose(mask(tmp_path / name), saved, atol=0.05), name
    moving = mask("0:0.2,0.5,0.2,0.2; 1:0.8,0.5,0.2,0.2")
    assert moving[0].argmax() % 8 < 4 <= moving[1].argmax() % 8
    assert mask("this is not read", "--mean", 0) is None


def fails(capsys, *argv):
    """The one sentence that the command ends with, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        generate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("generate.py: ") and err.count("\n") == 1, err
    return err


def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "encode_prompts", lambda args: pytest.fail("long work before the error"))
    torch.save(torch.full((2, 4, 4), float("nan")), tmp_path / "nan.pt")
    torch.save(torch.zeros(2, 4, 4), tmp_path / "zero.pt")
    write_rgba(tmp_path / "empty.webp", np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 32, 32), np.uint8))
    for name in ("text.pt", "text.safetensors", "text.webm", "file"):
        (tmp_path / name).write_text("nothing of the kind")
    (tmp_path / "ball-0").mkdir()
    text, vae, none = tmp_path / "text.safetensors", base() / VAE_NAME, tmp_path / "none"
    wrong = [
        *(("--size", size, "--size") for size in ("50x32", "0x0", "8x8", "-16x32", "64", "axb")),
        *(("--frames", frames, "--frames") for frames in (4, 0, -3, "x")), ("--steps", 0, "--steps"),
        ("--shift", 0, "--shift"), ("--shift", "inf", "--shift"), ("--mean", "nan", "--mean"),
        ("--guidance", "inf", "--guidance"), ("--seed", -1, "--seed"), ("--seed", 2 ** 70, "--seed"),
        ("--sampler", "ddim", "ddim"),
        ("--base", none, "config.json"), ("--base", tmp_path, "config.json"),
        ("--vae-adapter", none, "none"), ("--vae-adapter", base() / "t2v.safetensors", "t2v"),
        ("--dora", none, "none"), ("--dora", vae, VAE_NAME), ("--distill", text, text.name),
        ("--mask", "nowhere.webm", "nowhere.webm"), ("--mask", "a ball", "a ball"), ("--mask", "0.5,0.5,0,0.2", "0.5"),
        ("--mask", tmp_path / "nan.pt", "nan"), ("--mask", tmp_path / "zero.pt", "empty"), ("--mask", text, text.name),
        ("--mask", tmp_path / "empty.webp", "empty"), ("--mask", tmp_path / "text.pt", "text.pt"),
        ("--mask", tmp_path / "text.webm", "text.webm"),
        ("--out", tmp_path / "file", "--out"), ("--out", tmp_path, "ball-0")]
    for flag, value, word in wrong:
        argv = arguments("ball", tmp_path / "out", flag, value)
        assert word in fails(capsys, *argv), (flag, value)
    for prompt in ("", "  \n", "&nbsp;"):
        assert "prompt" in fails(capsys, *arguments(prompt, tmp_path / "out"))
    assert "PROMPT" in fails(capsys)
    assert not (tmp_path / "out").exists()


def test_broken_base_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "encode_prompts", lambda args: pytest.fail("long work before the error"))
    folder = shutil.copytree(base(), tmp_path / "base")
    command = ["ball", "--base", folder, "--out", tmp_path / "out"]
    files = {name: (base() / name).read_bytes() for name in BASE_FILES}
    another = dict(zip(BASE_FILES[2:], BASE_FILES[3:] + BASE_FILES[2:3]))                   # of another model
    for name, whole in files.items():
        stem = name.split("/")[-1].split(".")[0]
        for broken in (b"", whole[:len(whole) // 2], b"nothing of the kind", files.get(another.get(name), b"[1]")):
            (folder / name).write_bytes(broken)
            sentence = fails(capsys, *command)
            assert stem in sentence or "is not a Wan DiT" in sentence, (name, broken[:20])
        (folder / name).unlink()
        assert stem in fails(capsys, *command)
        (folder / name).write_bytes(whole)
    config = json.loads(files["config.json"])
    (folder / "config.json").write_text(json.dumps({**config, "generate": {}}))
    assert "--vae-adapter" in fails(capsys, *command)
    (folder / "config.json").write_text(json.dumps({**config, "text_dim": 48}))
    assert "text_embedding" in fails(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_generate_section_of_the_wrong_type_is_one_sentence(tmp_path, capsys):
    for section in ([], None, {"frames": "17"}, {"size": [64]}, {"size": 64}, {"size": ["64", 64]}, {"frames": 5.0},
                    {"mean": None}, {"shift": True}, {"dora": 3}):
        (tmp_path / "config.json").write_text(json.dumps({"generate": section}))
        assert "config.json: " in fails(capsys, "ball", "--base", tmp_path), section


def test_too_little_memory_is_one_sentence(monkeypatch, capsys):
    def run_out(args):
        raise error
    monkeypatch.setattr(generate, "generate", run_out)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        assert "smaller --size" in fails(capsys, "ball")
    for error in (RuntimeError("shapes differ"), RuntimeError("CUDA error: an illegal memory access was met")):
        with pytest.raises(RuntimeError):
            generate.main(["ball"])


def test_prompt_of_invalid_utf_8_has_a_name_and_a_record():
    args = settled("a \udce9 ball", "--negative", "\udce9")
    assert generate.folder_name(args.prompt, 0) == "a-ball-0"
    assert json.dumps([args.prompt, args.negative], ensure_ascii=False).encode() == b'["a ? ball", "?"]'


def test_folder_names():
    name = generate.folder_name
    assert name("A red glass ball, bouncing!", 0) == "a-red-glass-ball-bouncing-0"
    assert name("一只红色的玻璃球", 7) == "一只红色的玻璃球-7"
    assert name("Élan: 2 balls 🐉", 1) == "élan-2-balls-1"
    assert name("🐉", 0) != name("🐱", 0) and name("🐉", 0).startswith("clip-")
    assert name("../../etc", 0) == "etc-0"
    template = "This video has a transparent background. Close-up shot. A {} flying. Realistic style."
    assert name(template.format("parrot"), 0) != name(template.format("dragon"), 0)
    assert all(len(name(word * 3000, 0).encode()) <= 180 for word in ("word ", "球", "𠀀", "a"))


def test_earlier_result_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    final = tmp_path / "ball-0"
    final.mkdir()
    (final / "run.json").write_text("earlier")
    with pytest.raises(OSError), generate.result_folder(final) as folder:
        (folder / "run.json").write_text("half")
        raise OSError("the disk is full")
    assert (final / "run.json").read_text() == "earlier" and list(tmp_path.iterdir()) == [final]
    with generate.result_folder(final) as folder:
        (folder / "run.json").write_text("new")
    assert (final / "run.json").read_text() == "new" and list(tmp_path.iterdir()) == [final]


def test_generate_takes_any_prompt_from_anywhere(tmp_path):
    prompt = "一只红色的玻璃球 🐉 " + "word " * 3000
    command = [sys.executable, generate.__file__, prompt, "--base", base(), "--frames", "1", "--size", "16x16"]
    start = time.time()
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert run.stdout == f"{Path('out') / folder.name}\n" and folder.name.startswith("一只红色的玻璃球-word-word")
    cut = [line for line in run.stderr.splitlines() if "cut" in line]
    assert len(cut) == 1 and cut[0].startswith("generate.py: the prompt has") and "limit 32" in cut[0]
    assert read_rgba(folder / "frames")[1].shape == (1, 16, 16)
    print(f"cold start {time.time() - start:.1f} s")


# ---- the front door


def test_readme_file_table_is_true():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")}


def test_every_leaf_runs_by_itself(tmp_path):
    leaves = "vae merge dit text dora losses sampler data".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = {name: subprocess.Popen([sys.executable, ROOT / f"{name}.py"], cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in leaves}
    for name, run in runs.items():
        said, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
        assert said or any((tmp_path / "out").glob("*.png")), name


def test_embedded_model_shows_what_unseen_prompts_say():
    """Below the scores in the README, far above chance: wrong weights, swapped decoders, a lost mean fail here."""
    tiny = ROOT / "tiny"
    text = load_text_encoder(tiny)
    rgba = load_rgba_vae(tiny / "Wan2.1_VAE.safetensors", tiny / "Wan-Alpha-v2-VAE.safetensors")
    dit = load_dit(tiny, [(tiny / "t2v.safetensors", 1.0)])
    args = Namespace(size=(64, 64), frames=17, mean=0.05, shift=5.0, seed=0, device="cpu")
    _, rows = train_dit.evaluate(dit, rgba, text, args, train_dit.unseen_prompts(12, seed=1))
    for name, least in dict(color=10, corners=11, material=11, motion=10, shape=7).items():
        assert sum(row[name] for row in rows) >= least, name


def test_embedded_autoencoder_keeps_colour_and_alpha():
    tiny = ROOT / "tiny"
    rgba = load_rgba_vae(tiny / "Wan2.1_VAE.safetensors", tiny / "Wan-Alpha-v2-VAE.safetensors")
    clips = [procedural_clip(10 ** 9 + i, split="test") for i in range(3)]
    rows = evaluate_vae(rgba, [(clip.rgb, clip.alpha) for clip in clips])
    assert min(row[name]["psnr"] for row in rows for name in ("soft render", "alpha")) > 25
    assert min(row[name]["ssim"] for row in rows for name in ("soft render", "alpha")) > 0.9


# ---- the released files: every layout, and what is none


def released_lora(config, blocks, down="lora_A.default", up="lora_B.default", prefix="", rank=2):
    """Low-rank tensors of Wan's full width on the ten linear layers of some blocks, as Wan-Alpha's DoRA has them."""
    adapter = {}
    for i in blocks:
        sizes = {f"{a}_attn.{layer}": (config.dim, config.dim) for a in ("self", "cross") for layer in "qkvo"}
        sizes |= {"ffn.0": (config.ffn_dim, config.dim), "ffn.2": (config.dim, config.ffn_dim)}
        for layer, (o, inputs) in sizes.items():
            adapter[f"{prefix}blocks.{i}.{layer}.{down}.weight"] = torch.zeros(rank, inputs)
            adapter[f"{prefix}blocks.{i}.{layer}.{up}.weight"] = torch.zeros(o, rank)
    return adapter


def said(capsys, *arguments):
    dora.main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_dora_command_says_what_a_file_is(tmp_path, capsys):
    file = tmp_path / "t2v.safetensors"
    magnitudes = {key.replace("lora_B", "lora_magnitude_vector"): torch.ones(len(tensor))
                  for key, tensor in released_lora(WAN_14B, [0, 39]).items() if "lora_B" in key}
    save_file(released_lora(WAN_14B, [0, 39]) | magnitudes, file)
    lines = said(capsys, file).splitlines()
    assert lines[0] == f"{file}: peft (lora_A.default)" and lines[1].startswith("DoRA on 20 layers, rank [2], scale 1,")
    assert lines[2:] == ["differences: none", "Wan 1.3B: 0 of 20 layers fit", "Wan 14B: 20 of 20 layers fit",
                         "left over in Wan 14B: nothing"]

    small = released_lora(WAN_1_3B, range(29, 31), "lora_down", "lora_up", "diffusion_model.")     # it has no block 30
    small |= {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(1536), "strange": torch.zeros(1),
              "diffusion_model.blocks.29.self_attn.q.alpha": torch.tensor(1.0)}
    save_file(small, file)
    shown = said(capsys, file)
    assert "ComfyUI (lora_down)" in shown and "LoRA on 20 layers, rank [2], scale [0.5]" in shown
    assert "differences: 1 diff\nWan 1.3B: 11 of 21 layers fit\nWan 14B: 0 of 21 layers fit" in shown
    assert "left over in Wan 1.3B: 21\n  diffusion_model.blocks.30" in shown and shown.count("finds no target") == 10


def test_dora_command_says_what_a_vae_adapter_is(tmp_path, capsys):
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanVAE().state_dict().items() if name.startswith("decoder.")}
    adapter = {"middle.block.conv1.weight": torch.zeros(1), "edge_loss.kernel": torch.zeros(3)}
    for layer, (o, *inputs) in {name[:-7]: shape for name, shape in shapes.items() if name.endswith("weight")}.items():
        inner, ones = ".conv3D" * (len(inputs) == 4), [1] * len(inputs[1:])
        for branch in ("vae_fgr", "vae_pha"):
            adapter[f"{branch}.{layer}{inner}.lora_A.default.weight"] = torch.zeros(2, *inputs)
            adapter[f"{branch}.{layer}{inner}.lora_B.default.weight"] = torch.zeros(o, 2, *ones)
            adapter[f"{branch}.{layer}{inner}.base_layer.weight"] = torch.zeros(1)
    torch.save(adapter, tmp_path / "VAE.bin")
    shown = said(capsys, tmp_path / "VAE.bin")
    layers = (len(adapter) - 2) // 3
    assert layers == 2 * 38 and f"LoRA on {layers} layers, rank [2], scale 1 / rank" in shown
    assert f"merge block: 1 tensors; frozen copies, skipped: {layers + 1}" in shown
    assert f"Wan's VAE: {layers} of {layers} layers fit\nleft over in Wan's VAE: nothing" in shown


@pytest.mark.parametrize("dialect", ["comfy", "alpha", "lora_unet_"])
def test_dora_command_rewrites_and_returns(dialect, tmp_path, capsys):
    """To the other dialect and back: the tensors and what they do are the same, bit for bit."""
    state = dora_toy_block()
    adapter = {key: tensor.bfloat16() for key, tensor in dora_file(state).items()}
    files = [tmp_path / f"{name}.safetensors" for name in ("given", "peft", "comfy", "again")]
    save_file(dora_respelled(adapter, dialect), files[0])
    for source, to, out in zip(files, ("peft", "comfy", "peft"), files[1:]):
        said(capsys, source, "--to", to, out)
    given, peft, comfy, again = map(load_file, files)
    assert peft.keys() == adapter.keys() == again.keys()
    assert all(torch.equal(peft[key], tensor) and tensor.dtype == again[key].dtype for key, tensor in adapter.items())
    assert all(torch.equal(again[key], tensor) for key, tensor in peft.items())
    q = "diffusion_model.blocks.1.self_attn.q."
    assert {key for key in comfy if key.startswith(q)} == {
        q + "lora_down.weight", q + "lora_up.weight", q + "lora_magnitude_vector.weight"}
    merged, expected = merge_adapter(state, comfy), merge_adapter(state, given)
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)


def test_dora_command_keeps_differences_and_alpha_in_comfy_and_refuses_them_in_peft(tmp_path, capsys):
    file, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    state = dora_toy_block()
    adapter = lightx2v_file(state) | {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 48),
                                      "diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(2.0)}      # s = 2 / 3
    save_file(adapter, file)
    said(capsys, file, "--to", "comfy", out)
    written = load_file(out)
    assert written.keys() == adapter.keys() and all(torch.equal(written[key], adapter[key]) for key in adapter)
    out.unlink()
    for drop, sentence in ((".diff", "scale 0.666667 of blocks.0.ffn.0"), (".alpha", "peft has no name for diff")):
        save_file({key: tensor for key, tensor in adapter.items() if drop not in key}, file)
        with pytest.raises(SystemExit):
            dora.main([str(file), "--to", "peft", str(out)])
        assert sentence in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("content, sentence", [
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "cut short, unreadable or no checkpoint"),
    ({"x": Opens()}, "holds Python objects and was not opened"),
    ({"step": 3}, "not a flat dict of tensors"),
    ({"patch_embedding.weight": torch.zeros(3)}, "is no adapter"),
    ({"blocks.0.ffn.0.dora_scale": torch.ones(1, 48)}, "LyCORIS magnitude"),
    (None, "there is no adapter file")])
def test_dora_command_refuses_what_is_no_adapter(content, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DORA_TRAP", str(tmp_path / "sprung"))
    file, out = tmp_path / "given.bin", tmp_path / "out.safetensors"
    if content is not None:
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    for arguments in ([file], [file, "--to", "peft", out]):
        with pytest.raises(SystemExit) as left:
            dora.main(list(map(str, arguments)))
        streams = capsys.readouterr()
        assert left.value.code == 2 and not streams.out and streams.err.count("\n") == 1
        assert sentence in streams.err or (out in arguments and "finds no target" in streams.err)
    assert {path.name for path in tmp_path.iterdir()} <= {"given.bin"}


def test_dit_loads_both_experts_of_wan22(tmp_path):
    """Wan2.2-T2V-A14B: two folders, sharded, with all that a released config.json says."""
    said = dict(_class_name="WanModel", _diffusers_version="0.33.0", model_type="t2v", window_size=[-1, -1],
                qk_norm=True, cross_attn_norm=True) | asdict(DIT_TINY)
    state = tiny_dit().state_dict()
    for name, factor in (("high_noise_model", 1), ("low_noise_model", -1)):
        changed = state | {"head.head.bias": factor * state["head.head.bias"]}
        (dit_folder(tmp_path / name, changed, shards=3) / "config.json").write_text(json.dumps(said))
    high, low = (load_dit(tmp_path / name) for name in ("high_noise_model", "low_noise_model"))
    assert high.config == low.config == DIT_TINY
    assert torch.equal(low.head.head.bias, -state["head.head.bias"])
    close(high(*dit_inputs())[0], official["dit_tiny.v"])


def test_dit_refuses_an_index_that_does_not_fit_its_shards(tmp_path):
    folder = dit_folder(tmp_path / "sharded", shards=2)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    first, second = sorted(path.name for path in folder.glob("*-of-*"))
    for weight_map, error, sentence in ((None, ValueError, "names no shards"), ({}, ValueError, "names no shards"),
                                        ([first], ValueError, "names no shards"), ({"a": 1}, ValueError, "no shards"),
                                        ({"a": first}, ValueError, "tensors do not fit the config: .* is missing"),
                                        ({"a": first, "b": second, "c": "no.safetensors"}, FileNotFoundError, "no.s")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(error, match=sentence) as caught:
            open_dit(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_dit_refuses_foreign_adapters_before_it_reads_a_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_TRAP", str(tmp_path / "sprung"))
    folder, large = dit_folder(tmp_path / "tiny"), tmp_path / "large.safetensors"
    save_file(released_lora(DiTConfig(96, 192, 2, 40), range(40)), large)
    (tmp_path / "image.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    torch.save({"x": Opens()}, tmp_path / "code.bin")
    for name, sentence in (("large.safetensors", "shape"), ("image.safetensors", "unreadable"), ("code.bin", "Python")):
        with pytest.raises(ValueError, match=f"{name}.*{sentence}") as caught:
            open_dit(folder, [(tmp_path / name, 1.0)])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    for name in ("image.safetensors", "code.bin"):
        with pytest.raises(ValueError, match=f"{name} is no safetensors file"):
            load_dit(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def resident(folder):
    """MiB of the files in this folder that are in this process's memory."""
    mib, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            mib += int(line.split()[1]) / 1024
    return mib


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what memory holds of a file")
def test_dit_loading_keeps_one_tensor_of_its_files_in_memory(tmp_path):
    config = DiTConfig(512, 1024, 4, 3, text_dim=32, text_len=16)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanDiT(config).state_dict().items()}
    folder = dit_folder(tmp_path / "model", {name: torch.zeros(shape) for name, shape in shapes.items()})
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    adapters = [(tmp_path / f"{name}.safetensors", 1.0) for name in ("first", "second")]
    for file, _ in adapters:
        save_file(released_lora(config, range(3), rank=128), file)                          # 10 MiB each
    model, tensors = open_dit(folder, adapters)
    most = {}
    for name, tensor in tensors:
        most[name] = resident(tmp_path)
        del tensor
    assert list(most) == list(shapes) and resident(tmp_path) == 0
    largest = max(shape.numel() for shape in shapes.values()) * 4 / 2 ** 20                 # 6 MiB, of 50 MiB
    assert max(most.values()) <= 1.1 * largest + 1


def test_rgba_vae_reads_bfloat16_and_counts_what_it_skips(tmp_path):
    vae = tiny_vae()
    adapter = {name: tensor.bfloat16() for name, tensor in official_adapter(vae).items()}
    torch.save({name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}, tmp_path / "v.pth")
    frozen = {f"{branch}.{name}": torch.zeros(1) for branch in ("vae_fgr", "vae_pha") for name in vae.state_dict()}
    frozen |= {"vae_pha.decoder.conv1.conv3D.base_layer.bias": torch.zeros(1), "lpips_loss.net.w": torch.zeros(1)}
    torch.save(adapter, tmp_path / "plain.bin")
    torch.save(adapter | frozen, tmp_path / "VAE.bin")
    plain, whole = (load_rgba_vae(tmp_path / "v.pth", tmp_path / name) for name in ("plain.bin", "VAE.bin"))
    assert plain.skipped == 0 and whole.skipped == len(frozen)
    states = plain.state_dict(), whole.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    z = official["vae_tiny.merged"]
    close(plain.decode(z)[0], official["vae_tiny.vae_fgr.decode"], tol=0.1)
    half = load_rgba_vae(tmp_path / "v.pth", tmp_path / "VAE.bin", torch.bfloat16)
    assert half.decode(z.bfloat16())[1].dtype == torch.bfloat16


def test_rgba_vae_reads_two_merged_decoders(tmp_path):
    """As ComfyUI has them: two whole VAEs, the LoRA of each in its decoder, the rest as in the base."""
    vae = tiny_vae()
    torch.save(vae.state_dict(), tmp_path / "v.pth")
    torch.save(official_adapter(vae), tmp_path / "VAE.bin")
    rgba, pair = load_rgba_vae(tmp_path / "v.pth", tmp_path / "VAE.bin"), []
    for name in ("rgb", "alpha"):
        branch = rgba.vae_fgr if name == "rgb" else rgba.vae_pha
        pair.append(tmp_path / f"wan_alpha_2.1_vae_{name}_channel.safetensors")
        save_file(vae.state_dict() | branch.state_dict(), pair[-1])
    merged, z = load_rgba_vae(tmp_path / "v.pth", pair), official["vae_tiny.merged"]
    assert all(torch.equal(a, b) for a, b in zip(merged.decode(z), rgba.decode(z))) and merged.middle is None
    assert merged.skipped == 2 * sum(name.startswith(("encoder.", "conv1.")) for name in vae.state_dict())
    with pytest.raises(ValueError, match="rgb_channel.safetensors is not .* two decoders .* both files, RGB first"):
        load_rgba_vae(tmp_path / "v.pth", pair[0])
    with pytest.raises(ValueError, match="VAE.bin does not fit WanVAE"):
        load_rgba_vae(tmp_path / "v.pth", [pair[0], tmp_path / "VAE.bin"])
    with pytest.raises(ValueError, match="not 3"):
        load_rgba_vae(tmp_path / "v.pth", [*pair, pair[0]])


def test_text_encoder_reads_bfloat16_and_fp8(tmp_path):
    folder, model = text_folder(tmp_path / "base", ".pth"), tiny_umt5().state_dict()
    half = {name: p.bfloat16() for name, p in model.items()}
    linear = [name for name, p in model.items() if p.ndim == 2 and "embedding" not in name]
    scales = {name.replace("weight", "scale_weight"): model[name].abs().max() / 448 for name in linear}
    eight = half | {name: half[name].to(torch.float8_e4m3fn) for name in linear}
    scaled = half | {name: (model[name] / scales[name.replace("weight", "scale_weight")]).to(torch.float8_e4m3fn)
                     for name in linear} | scales
    marks = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} | {
        name.replace("scale_weight", "scale_input"): torch.ones(()) for name in scales}
    torch.save(half, folder / "half.pth")
    for name, state in dict(half=half, eight=eight, scaled=scaled, marked=scaled | marks).items():
        save_file(state, folder / f"{name}.safetensors")
    exact = load_text_encoder(folder)(CAPTIONS)[1]

    def context(name, dtype=torch.float32):
        encoder = load_text_encoder(folder / name, dtype)
        assert {p.dtype for p in encoder.model.parameters()} == {dtype}
        return encoder(CAPTIONS)[1]
    assert torch.equal(context("half.pth"), context("half.safetensors"))
    assert torch.equal(context("half.pth", torch.bfloat16), context("half.safetensors", torch.bfloat16))
    assert torch.equal(context("scaled.safetensors"), context("marked.safetensors"))
    close(context("half.pth"), exact, tol=0.1)
    close(context("eight.safetensors"), exact, tol=1)
    close(context("scaled.safetensors"), exact, tol=1)
    assert not torch.equal(context("scaled.safetensors"), context("eight.safetensors"))
    expected = (scaled[linear[3]].float() * scales[linear[3].replace("weight", "scale_weight")]).bfloat16()
    loaded = load_text_encoder(folder / "scaled.safetensors", torch.bfloat16).model.state_dict()
    assert torch.equal(loaded[linear[3]], expected)                                         # one rounding, at the end
    assert load_text_encoder(folder / "scaled.safetensors", device="meta").model.norm.weight.is_meta
    for odd in ("blocks.0.attn.q.scale_wait", "token_embedding.scale_weight", "lm_head.weight"):
        save_file(scaled | {odd: torch.ones(())}, folder / "odd.safetensors")
        with pytest.raises(ValueError, match=f"odd.safetensors: 1 tensors do not fit a umT5 encoder: {odd}"):
            load_text_encoder(folder / "odd.safetensors")


def test_what_training_writes_has_the_official_names(tmp_path):
    """t2v.safetensors and *-VAE.bin, names and shapes by their rules; and back through the loaders."""
    vae, folder = tiny_vae(), dit_folder(tmp_path / "base")
    written, expected = official_adapter(vae, rank=4), {}
    for name, weight in WanVAE(VAEConfig(dim=8)).decoder.state_dict().items():
        layer, (o, *inputs) = "decoder." + name.removesuffix(".weight"), weight.shape
        if weight.ndim >= 4 and name.endswith("weight"):
            layer += ".conv3D" * (weight.ndim == 5)
            for branch in ("vae_fgr", "vae_pha"):
                expected[f"{branch}.{layer}.lora_A.default.weight"] = (4, *inputs)
                expected[f"{branch}.{layer}.lora_B.default.weight"] = (o, 4, *[1] * len(inputs[1:]))
    for i in (0, 2, 4):
        for j, shape in (("0", (32, 1, 1, 1)), ("3", (32, 1, 1, 1))):
            expected[f"middle.block.middle.{i}.residual.{j}.gamma"] = shape
        for j in (2, 6):
            expected[f"middle.block.middle.{i}.residual.{j}.weight"] = (32, 32, 3, 3, 3)
            expected[f"middle.block.middle.{i}.residual.{j}.bias"] = (32,)
    for i in (1, 3):
        expected |= {f"middle.block.middle.{i}.norm.gamma": (32, 1, 1)}
        for part, o in (("to_qkv", 96), ("proj", 32)):
            expected |= {f"middle.block.middle.{i}.{part}.weight": (o, 32, 1, 1),
                         f"middle.block.middle.{i}.{part}.bias": (o,)}
    expected |= {"middle.block.conv1.weight": (32, 64, 1, 1, 1), "middle.block.conv1.bias": (32,),
                 "middle.block.head.0.gamma": (32, 1, 1, 1), "middle.block.head.2.weight": (16, 32, 3, 3, 3),
                 "middle.block.head.2.bias": (16,)}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected

    torch.manual_seed(0)
    model = add_dora(load_dit(folder), 4, 4, train_dit.DORA_TARGETS)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.normal_(std=0.1)
        layer.magnitude.data *= 1.1
    state = adapter_state(model)
    layers = {f"blocks.{i}.{a}.{x}": (48, 48) for i in (0, 1) for a in ("self_attn", "cross_attn") for x in "qkvo"}
    layers |= {f"blocks.{i}.ffn.{j}": size for i in (0, 1) for j, size in ((0, (96, 48)), (2, (48, 96)))}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        f"{layer}.{part}.default.weight": shape for layer, (o, i) in layers.items()
        for part, shape in (("lora_A", (4, i)), ("lora_B", (o, 4)), ("lora_magnitude_vector", (o,)))}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "t2v.safetensors")
    close(load_dit(folder, [(tmp_path / "t2v.safetensors", 1.0)])(*dit_inputs()), model(*dit_inputs()).detach())


# ---- scale.py: little memory, several processes


SMALL_DIT = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=32, text_len=16)


def small_checkpoint(folder):
    """A folder with a DiT of `SMALL_DIT`, weights by name, and inputs of 9 tokens (w 6) or 15 (w 10) for it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_like(WanDiT(SMALL_DIT)), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(SMALL_DIT)))
    return folder


def small_inputs(w=6):
    return named("scale.z", (2, 16, 3, 2, w)), torch.tensor([750.0, 20.0]), named("scale.context", (2, 7, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_blocks_give_the_same_bits(tmp_path, dtype):
    """Also in a second call, whose first block must not see what the first call left in the buffers."""
    folder = small_checkpoint(tmp_path)
    resident, streamed = load_dit(folder, dtype=dtype), scale.load_scaled(folder, dtype=dtype, offload=True)
    with torch.no_grad():
        for w in (6, 4):
            assert torch.equal(streamed(*small_inputs(w)), resident(*small_inputs(w)))
    slots = {p.data_ptr() for slot in streamed.blocks.slots for p in slot.parameters()}
    assert len(streamed.blocks.slots) == 2 and not slots & {p.data_ptr() for p in streamed.parameters()}


def test_tensors_that_share_a_page_do_not_overlap():
    pages = scale.PinnedPages(size=2048, pin=False)
    shapes = [((3, 50), torch.float32), ((7,), torch.bfloat16), ((1000,), torch.float32), ((), torch.float32)]
    tensors = [pages.empty(torch.Size(shape), dtype).fill_(i) for i, (shape, dtype) in enumerate(shapes)]
    assert all(bool((tensor == i).all()) and (tensor.shape, tensor.dtype) == (torch.Size(shape), dtype)
               for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes)))
    assert tensors[0].untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr()


def test_float8_is_close_and_one_byte(tmp_path):
    """Rows of very different size keep their own scale; the result moves by a few percent, and streams bit for bit."""
    weight = named("rows", (8, 64)) * 10.0 ** torch.arange(-4, 4)[:, None]
    numbers, factors = scale.quantize(weight)
    assert ((numbers.float() * factors - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.04
    folder = small_checkpoint(tmp_path)
    small, streamed = (scale.load_scaled(folder, fp8=True, offload=offload) for offload in (False, True))
    layers = [m for m in small.blocks.modules() if isinstance(m, scale.FP8Linear)]
    assert len(layers) == 10 * 3 and all(m.weight.dtype == torch.float8_e4m3fn for m in layers)
    assert not any(isinstance(m, nn.Linear) for m in small.blocks.modules())
    assert isinstance(small.head.head, nn.Linear) and small.blocks[0].modulation.dtype == torch.float32
    with torch.no_grad():
        v = load_dit(folder)(*small_inputs())
        got = small(*small_inputs())
        assert 1e-4 < (got - v).norm() / v.norm() < 0.05
        assert torch.equal(streamed(*small_inputs()), got)


def test_scaled_loading_merges_adapters_as_load_dit_does(tmp_path):
    folder = small_checkpoint(tmp_path)
    adapter = {f"diffusion_model.blocks.1.ffn.0.{end}": named(end, shape) for end, shape in
               {"lora_down.weight": (3, 48), "lora_up.weight": (96, 3), "diff_b": (96,)}.items()}
    save_file(adapter, tmp_path / "lora.safetensors")
    for ways in ({}, {"offload": True}):
        dit = scale.load_scaled(folder, [(tmp_path / "lora.safetensors", 0.5)], **ways)
        expected = load_dit(folder, [(tmp_path / "lora.safetensors", 0.5)]).state_dict()
        assert dit.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in dit.state_dict().items())


TWO = """
import sys, torch
import scale
from test_all import small_inputs
rank, world, device = scale.start_process_group()
torch.set_num_threads(1)
results, local = {}, {}
with torch.inference_mode():
    for name, ways in dict(split={}, shard={'shard': True}, streamed={'offload': True}, float8={'fp8': True}).items():
        dit = scale.load_scaled(sys.argv[1], **ways)
        for w in (6, 10):
            results[f"{name}{w}"] = dit(*small_inputs(w))
        if name == "shard":
            local = sum(p.to_local().numel() for p in dit.parameters() if hasattr(p, "to_local"))
try:
    scale.check_ways(scale.DiTConfig(dim=48, ffn_dim=96, num_heads=3, num_layers=1), False, False, False)
except ValueError as error:
    results["heads"] = str(error)
torch.save(dict(results, local=local), f"{sys.argv[1]}/rank{rank}.pt")
scale.end_process_group()
"""


def torchrun(tmp_path, code, *arguments):
    """Two processes of `code`, joined by gloo, as torchrun would start them."""
    file = tmp_path / "two.py"
    file.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
                                    PYTHONPATH=str(ROOT))
    jobs = [subprocess.Popen([sys.executable, file, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
                             env=environment | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]
    for job in jobs:
        _, errors = job.communicate(timeout=170)
        assert job.returncode == 0, errors


def test_two_processes_equal_one(tmp_path):
    """9 tokens, then 15, which two cannot halve; each process keeps half of the matrices when sharded."""
    folder = small_checkpoint(tmp_path)
    torchrun(tmp_path, TWO, folder)
    ranks = [torch.load(folder / f"rank{r}.pt") for r in range(2)]
    with torch.no_grad():
        for w in (6, 10):
            v = load_dit(folder)(*small_inputs(w))
            v8 = scale.load_scaled(folder, fp8=True)(*small_inputs(w))
            for got in ranks:
                for name in ("split", "shard", "streamed"):
                    assert (got[f"{name}{w}"] - v).abs().max() < 1e-5, (name, w)
                assert (got[f"float8{w}"] - v8).abs().max() < 1e-5
    layers = [m for m in WanDiT(SMALL_DIT).blocks.modules() if isinstance(m, nn.Linear)]
    assert [got["local"] for got in ranks] == [sum(m.weight.numel() + m.bias.numel() for m in layers) // 2] * 2
    assert "3 attention heads cannot be split over 2 processes" in ranks[0]["heads"]


def test_ways_that_do_not_go_together():
    for ways, sentence in (((True, False, True), "does not go with --offload"), ((False, False, True), "torchrun")):
        with pytest.raises(ValueError, match=sentence):
            scale.check_ways(SMALL_DIT, *ways)


def test_memory_estimates_at_known_sizes():
    """14B is 28.6 GB in bfloat16 (14.3e9 parameters); streaming keeps two of forty blocks on the device."""
    one = scale.dit_memory(WAN_14B, 1, torch.bfloat16)[0]
    assert abs(one / 1e9 - 28.8) < 0.5
    clip = 21 * 30 * 52
    whole, streamed, small = (scale.dit_memory(WAN_14B, clip, torch.bfloat16, **ways)
                              for ways in ({}, {"offload": True}, {"fp8": True}))
    assert 33e9 < whole[0] < 40e9 and streamed[0] < 11e9 and 27e9 < streamed[1] < 31e9 and small[0] < 24e9
    assert abs(scale.dit_memory(WAN_1_3B, 1, torch.float32)[0] / 5.7e9 - 1) < 0.05
    ranks = scale.dit_memory(WAN_14B, clip, torch.bfloat16, ranks=8, shard=True)
    assert 7e9 < ranks[0] < 11e9
    assert 2 ** 27 < scale.free_memory("cpu")


CLIP = 21 * 30 * 52     # tokens of 81 frames of 832 x 480
MEASURED = DiTConfig(dim=256, ffn_dim=640, num_heads=4, num_layers=6, text_dim=32, text_len=8)


def trained_dit(rank):
    model = WanDiT(MEASURED)
    for name, p in model.named_parameters():
        p.data = p.data.to(scale.resident_dtype(name, torch.bfloat16))
    return add_dora(model, rank, rank, train_dit.DORA_TARGETS)


def test_training_memory_counts_the_adapters_that_add_dora_makes():
    for rank in (4, 32):
        numbers = sum(p.numel() for p in trained_dit(rank).parameters() if p.requires_grad)
        assert scale.training_memory(MEASURED, 10, rank)["adapters"] == 16 * numbers


def test_training_memory_falls_where_a_flag_says_so():
    whole, streamed, kept, sharded, two = (scale.training_memory(WAN_14B, CLIP, **way) for way in (
        {}, dict(offload=True), dict(checkpoint=False), dict(ranks=8, shard=True), dict(batch=2)))

    def changed(other):
        return {name for name in whole if other[name] != whole[name]} - {"total"}
    assert whole["total"] == sum(whole[name] for name in ("weights", "adapters", "kept", "block"))
    assert abs(whole["weights"] / 28.95e9 - 1) < 0.01 and abs(whole["total"] / 72.2e9 - 1) < 0.01
    assert changed(streamed) == {"kept", "host"} and streamed["host"] == whole["kept"] == 20 * streamed["kept"]
    assert changed(kept) == {"kept", "block"} and kept["total"] > 6 * whole["total"]
    assert changed(sharded) == {"weights"} and sharded["weights"] < whole["weights"] / 5
    assert changed(two) == {"kept", "block"} and two["kept"] == 2 * whole["kept"]
    assert changed(scale.training_memory(WAN_14B, CLIP, ranks=8)) == set()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_training_memory_is_what_a_step_allocates(checkpoint):
    """Kept and block, and a quarter of the adapters' bytes for their gradients, against the allocator's own events."""
    model, z = trained_dit(4), torch.randn(1, 16, 4, 32, 48)
    if checkpoint:
        scale.checkpoint_blocks(model, Block)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        model(z, torch.tensor([500.0]), torch.randn(1, 8, 32)).square().mean().backward()
    changes = [(e.start_ns(), e.nbytes()) for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(accumulate(size for _, size in sorted(changes)))
    expected = scale.training_memory(MEASURED, 4 * 16 * 24, rank=4, checkpoint=checkpoint)
    assert abs(peak / (expected["kept"] + expected["block"] + expected["adapters"] / 4) - 1) < 0.03


def test_bench_train_prints_what_a_block_keeps_and_the_estimate(capsys):
    bench.main(["--train", "tiny", "--size", "32x32", "--frames", "5", "--device", "cpu"])
    printed, (d, f) = capsys.readouterr().out, (bench.TINY.dim, bench.TINY.ffn_dim)
    kept = next(int(line.split()[3].replace(",", "")) for line in printed.splitlines() if "bytes a token" in line)
    small = 8 * 32 * 2 + 2 * 4 * bench.TINY.num_heads + 9 * 4      # A x of eight layers, softmax sums, norms
    assert kept == 54 * d + 6 * f + small
    assert "tiny in all, 8 GPUs, shard: an estimate" in printed
    with pytest.raises(SystemExit):
        bench.main(["--train", "tiny", "--fp8", "--device", "cpu"])
    assert "--fp8" in capsys.readouterr().err


TWO_TRAIN = """
import json, sys, torch
import scale
from test_all import stop_after, train_dit, train_vae
torch.set_num_threads(1)
end, scale.end_process_group = scale.end_process_group, lambda: None
train_vae.end_process_group = train_dit.end_process_group = lambda: None
for script, arguments, stop in json.loads(sys.argv[1]):
    with stop_after(stop):
        try:
            dict(train_vae=train_vae, train_dit=train_dit)[script].main(arguments)
        except SystemExit as left:
            assert stop and left.code == 130
end()
"""


@contextmanager
def stop_after(step):
    """As if SIGTERM had come in that step, counted from 1."""
    gradients = scale.gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "gradients", lambda *args: gradients(*args[:-1], args[-1] or args[3] + 1 == step))
        yield


def curve(run):
    return [json.loads(row)["loss"] for row in (run / "log.jsonl").open()]


def into(out, arguments):
    arguments = list(arguments)
    arguments[arguments.index("--out") + 1] = str(out)
    return arguments


RESULTS = {"vae-base": "Wan2.1_VAE.safetensors", "dit-base": "diffusion_pytorch_model.safetensors",
           "vae-rgba": "Wan-Alpha-v2-VAE.safetensors", "dit-rgba": "t2v.safetensors"}


def same_training(one, two, name):
    pairs = list(zip(curve(one / name), curve(two / name), strict=True))
    assert len(pairs) == 4 and all(abs(a - b) <= 1e-5 for a, b in pairs), (name, pairs)
    got, expected = load_file(two / RESULTS[name]), load_file(one / RESULTS[name])
    assert all(torch.allclose(got[k], expected[k], atol=1e-4) for k in expected), name


def test_processes_and_passes_train_as_one(tmp_path):
    """All four trainings: two processes, and two passes a batch, give the loss curve of one from the same global batch,
    and the same weights; sharded too. A run of two processes goes on in one, and back in two."""
    _, out, commands = trained_folder(tmp_path)
    torch.set_num_threads(1)
    for script, arguments in commands.values():
        script.main(arguments)
    two, back, passes = tmp_path / "two", tmp_path / "back", tmp_path / "passes"
    jobs = [(script.__name__, into(two, arguments) + ["--shard"] * (name == "dit-rgba"), 0)
            for name, (script, arguments) in commands.items()]
    script, arguments = commands["dit-rgba"]
    moved = into(back, arguments)
    torchrun(tmp_path, TWO_TRAIN, json.dumps([*jobs, ("train_dit", moved, 1)]))
    with stop_after(3), pytest.raises(SystemExit):
        script.main([*moved, "--resume"])
    assert len(curve(back / "dit-rgba")) == 3 and not (back / "t2v.safetensors").exists()
    torchrun(tmp_path, TWO_TRAIN, json.dumps([("train_dit", [*moved, "--resume", "--shard"], 0)]))
    for name in ("vae-rgba", "dit-rgba"):
        commands[name][0].main(into(passes, commands[name][1]) + ["--accumulate", "2"])
        same_training(out, passes, name)
    for name in RESULTS:
        same_training(out, two, name)
    same_training(out, back, "dit-rgba")


# ---- generate.py: many clips, two experts, memory, several processes


SHORT = "--frames", 1, "--size", "16x16", "--steps", 1
DIT_FILE = "diffusion_pytorch_model.safetensors"


@functools.cache
def base_of_two():
    """A base folder like Wan2.2's; its two transformers differ."""
    folder = Path(kept().name) / "two"
    shutil.copytree(base(), folder)
    state = load_file(folder / DIT_FILE)
    (folder / DIT_FILE).unlink()
    for name, factor in (("high_noise_model", 1), ("low_noise_model", 0.7)):
        (folder / name).mkdir()
        save_file({key: factor * tensor for key, tensor in state.items()}, folder / name / DIT_FILE)
        shutil.copy(folder / "config.json", folder / name)
    return folder


def test_prompts_and_seeds_are_many_single_runs(tmp_path, monkeypatch, capsys):
    loaded = []
    for name in ("load_scaled", "load_rgba_vae"):
        load = getattr(generate, name)
        monkeypatch.setattr(generate, name, lambda *a, load=load, **k: loaded.append(load.__name__) or load(*a, **k))
    (tmp_path / "prompts.txt").write_text("\ufeffa ball\r\n\n  a blue   ghost \n", encoding="utf-8")
    flags = "--base", base(), "--guidance", 2, *SHORT
    generate.main([str(a) for a in ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "many", "--seed", 5, 0,
                                    *flags)])
    assert loaded == ["load_rgba_vae", "load_scaled", "load_rgba_vae"]          # the first onto the meta device
    out, err = capsys.readouterr()
    names = ["a-ball-5", "a-ball-0", "a-blue-ghost-5", "a-blue-ghost-0"]
    assert out.split() == [str(tmp_path / "many" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == sorted(names)
    assert all(f"\n{stage}: seconds" in f"\n{err}" for stage in ("text", "transformer", "decode", "write"))
    for prompt, seed, name in (("a ball", 0, names[1]), ("a blue ghost", 5, names[2])):
        run = json.loads((tmp_path / "many" / name / "run.json").read_text())
        assert (run["arguments"]["prompt"], run["seed"], run["arguments"]["seed"]) == (prompt, seed, seed)
        assert list(run["stages"]) == ["text", "transformer", "decode", "write"]
        single = make(prompt, tmp_path / "single", "--guidance", 2, *SHORT, "--seed", seed)
        assert single.name == name and pngs(single) == pngs(tmp_path / "many" / name)


@pytest.mark.parametrize("stage", ["shift_noise", "decode"])
def test_finished_clips_are_kept_if_a_later_one_fails(stage, tmp_path, monkeypatch, capsys):
    run, calls = getattr(generate, stage), []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return run(*args)
    monkeypatch.setattr(generate, stage, fail_second)
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments("ball", tmp_path, "--seed", 1, 2, 3, *SHORT))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == f"{tmp_path / 'ball-1'}\n" and "not enough memory" in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["ball-1"] and len(pngs(tmp_path / "ball-1")) == 1


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_two_experts_share_the_noise_levels(solver, monkeypatch):
    load, seen, alive = generate.load_scaled, [], []

    def spy(path, *args):
        assert not any(expert() for expert in alive)                            # one at a time
        dit = load(path, *args)
        dit.register_forward_pre_hook(lambda _, inputs: seen.append((path.name[:4].strip("_"), inputs[1].item())))
        alive.append(weakref.ref(dit))
        return dit
    monkeypatch.setattr(generate, "load_scaled", spy)
    args = settled("ball", "--base", base_of_two(), "--steps", 4, "--shift", 5, "--guidance", 2, 1, "--negative",
                   "ghost", "--seed", 1, 2, "--sampler", solver)
    mask = generate.make_mask(args)
    with torch.inference_mode():
        contexts = generate.encode_prompts(args)
        latents, error = generate.sample(args, contexts, mask)
    times = [1000, 937.5, 2500 / 3, 625] if solver == "euler" else [999, 937, 833, 624]
    guided = [("high", time) for time in times[:2] for _ in range(2)]           # at 2 twice a step, at 1 once
    assert error is None and [name for name, _ in seen] == [name for name, _ in guided * 2 + 4 * [("low", 0)]]
    assert np.allclose([time for _, time in seen], [time for _, time in guided * 2] + times[2:] * 2)
    high, low = (load_dit(expert.path, expert.adapters) for expert in args.experts)

    def velocity(z, t):
        if t < 875:
            return low(z, t, [contexts["ball"]])
        return guide(high(z, t, [contexts["ball"]]), high(z, t, [contexts["ghost"]]), 2)
    noise = torch.randn(latents[1].shape, generator=torch.Generator().manual_seed(2))
    noise = generate.shift_noise(noise, mask, args.mean)
    sigmas = shifted_sigmas(4, start=1.0 if solver == "euler" else 0.999)
    with torch.inference_mode():
        *_, (_, z) = (euler if solver == "euler" else unipc)(velocity, noise, sigmas)
    assert torch.equal(z, latents[1]) and not torch.equal(*latents)


def test_wan_2_2_has_numbers_of_its_own_unless_distilled(tmp_path):
    adapter = shutil.copy(base() / "t2v.safetensors", tmp_path)
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()

    def numbers(*flags):
        args = settled("ball", "--base", tmp_path, *flags)
        return args.steps, args.shift, [e.guidance for e in args.experts], [len(e.adapters) for e in args.experts]
    assert numbers() == (40, 12, [4, 3], [0, 0])
    assert numbers("--distill", adapter, "--dora", adapter, "") == (4, 5, [1, 1], [2, 1])
    assert numbers("--steps", 8, "--guidance", 2) == (8, 12, [2, 2], [0, 0])
    assert settled("ball", "--guidance", 5, "--steps", 50).experts[0].guidance == 5


def test_offloaded_is_resident():
    assert torch.equal(latent("ball"), latent("ball", "--offload"))


def test_too_large_a_model_names_the_flags_that_make_it_fit(monkeypatch):
    def parts(*flags):
        args = settled("ball", *flags)
        return args, load_text_encoder(args.text).model, load_dit(args.base), rgba

    def needs(dit, tokens, dtype, offload, fp8, ranks, shard):
        return (1 if offload else 4) * dtype.itemsize // (2 if fp8 else 1) * 2 ** 30 + tokens * 2 ** 20, 0

    def advice(free, *flags):
        monkeypatch.setattr(generate, "free_memory", lambda device: free * 2 ** 30)
        try:
            return generate.check_memory(*parts(*flags))
        except ValueError as error:
            assert "the transformer needs" in str(error) and f"{free:.1f} are free" in str(error)
            return str(error).rpartition("; ")[2]
    args = settled("ball")
    rgba = load_rgba_vae(args.vae, args.vae_adapter)
    monkeypatch.setattr(generate, "dit_memory", needs)
    assert advice(17) is None and advice(9) == "give --dtype bfloat16"
    assert advice(9, "--dtype", "bfloat16") is None
    assert advice(5, "--dtype", "bfloat16") == "give --offload" and advice(2.5) == "give --dtype bfloat16 --offload"
    assert advice(1.5) == "give --dtype bfloat16 --offload --fp8"
    flags = "--dtype", "bfloat16", "--offload", "--fp8", "--frames"
    assert advice(1.5, *flags, 401) == "give a smaller --size or fewer --frames" and advice(1.5, *flags, 81) is None
    assert advice(9, "--offload", "--fp8") is None
    assert advice(0.01).startswith("take a smaller model")


def test_14b_needs_what_it_needs(monkeypatch):
    args = settled("ball", "--size", "832x480", "--frames", 81)
    text, rgba = load_text_encoder(args.text).model, load_rgba_vae(args.vae, args.vae_adapter)

    def short(free, config, **changes):
        monkeypatch.setattr(generate, "free_memory", lambda device: free * 10 ** 9)
        changed = Namespace(**vars(args) | changes)
        with torch.device("meta"):
            dit = WanDiT(config)
        return any("transformer" in sentence for sentence in generate.lacking(changed, text, dit, rgba))
    half = dict(dtype=torch.bfloat16)
    assert short(24, WAN_14B) and short(24, WAN_14B, **half) and not short(24, WAN_14B, **half, fp8=True)
    assert not short(24, WAN_1_3B) and not short(80, WAN_14B, **half)
    monkeypatch.setattr(generate, "free_memory", lambda device: 2 ** 29)
    generate.check(settled("ball", "--base", Path(generate.__file__).with_name("tiny")))        # never refused


def test_decoding_is_the_same_in_any_chunks(monkeypatch):
    args = settled("ball", "--frames", 17)
    rgba = load_rgba_vae(args.vae, args.vae_adapter)
    z, config = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(0)), rgba.vae.config

    def decoded(chunk):
        with torch.inference_mode():
            return np.concatenate([x.ravel() for x in generate.decode(Namespace(**vars(args) | dict(vae_chunk=chunk)),
                                                                      rgba, z)]).astype(int)
    difference = np.abs(decoded(1) - decoded(3))
    assert difference.max() <= 1 and difference.mean() < 1e-3
    assert generate.choose_chunk(config, args) == 1
    full = settled("ball", "--size", "832x480", "--frames", 81)
    args.device = full.device = "cuda"
    chunks = []
    for free in (0, 2 ** 30, 2 ** 32, 2 ** 50):
        monkeypatch.setattr(generate, "free_memory", lambda device: free)
        chunks.append((generate.choose_chunk(config, args), generate.choose_chunk(Namespace(dim=96), full)))
    assert chunks[0] == (1, 1) and chunks[-1] == (5, 4) and chunks == sorted(chunks)


def test_colour_is_written_while_alpha_decodes(tmp_path, monkeypatch):
    write, to_bytes, written, pieces = generate.write_rgba, generate.to_bytes, threading.Event(), []

    def spy(path, *args):
        write(path, *args)
        written.set() if path.name == "rgb.mp4" else None

    def slow_alpha(frames):
        pieces.append(frames)
        assert len(pieces) == 1 or written.wait(60)
        return to_bytes(frames)
    monkeypatch.setattr(generate, "write_rgba", spy)
    monkeypatch.setattr(generate, "to_bytes", slow_alpha)
    make("ball", tmp_path, *SHORT)
    assert len(pieces) == 2


def test_wrong_input_for_many_clips_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "encode_prompts", lambda args: pytest.fail("long work before the error"))
    files = dict(empty=b" \n\n", binary=b"a\0b", latin="é".encode("latin-1"), twice=b"A ball\na ball!", good=b"ball")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    lone, good, adapter = tmp_path / "lone", tmp_path / "good", base() / "t2v.safetensors"
    shutil.copytree(base_of_two(), lone)
    shutil.rmtree(lone / "low_noise_model")
    common = "--out", tmp_path / "out", "--base"
    for name in ("empty", "binary", "latin", "none", "."):
        assert f"--prompts {tmp_path / name} " in fails(capsys, "--prompts", tmp_path / name, *common, base())
    assert "a-ball-0" in fails(capsys, "--prompts", tmp_path / "twice", *common, base())
    assert "either" in fails(capsys, "ball", "--prompts", good, *common, base())
    for flags, word in ((("--seed", 1, 1), "ball-1"), (("--seed", 3, -1), "--seed -1"), (("--shard",), "torchrun"),
                        (("--seed", "ball"), "ball"), (("--vae-chunk", 0), "--vae-chunk"),
                        *(((flag, adapter, adapter), flag) for flag in ("--dora", "--distill")),
                        (("--guidance", 4, 3), "--guidance"), (("--vae-adapter", *[adapter] * 3), "one file")):
        assert word in fails(capsys, "ball", *flags, *common, base()), flags
    assert "low_noise_model" in fails(capsys, "ball", *common, lone)
    assert "--guidance" in fails(capsys, "ball", "--guidance", 1, 2, 3, *common, base_of_two())
    assert not (tmp_path / "out").exists()


def test_an_error_in_one_process_ends_all(tmp_path, monkeypatch):
    def gather(errors, error):
        errors[:] = [None, ValueError("the second has no file")]
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank, kind in ((0, ValueError), (1, SystemExit)):
        with pytest.raises(kind) as stop:
            generate.prepare(generate.make_parser().parse_args(arguments("ball", tmp_path)), rank, 2, None)
        assert str(stop.value) in ("the second has no file", "2")


def test_two_processes_make_the_clip_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--frames", 5, "--size", "32x16", "--seed", 1, 2
    command = [sys.executable, generate.__file__, *arguments("ball", tmp_path / "two", *flags)]
    group = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    runs = [subprocess.Popen(command, env=os.environ | group | dict(RANK=str(rank), LOCAL_RANK=str(rank)), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    single = list(generate.generate(generate.make_parser().parse_args(arguments("ball", tmp_path / "one", *flags))))
    (out, err), (silent, silent_err) = (run.communicate(timeout=120) for run in runs)
    assert [run.returncode for run in runs] == [0, 0], err + silent_err
    assert out.split() == [str(tmp_path / "two" / folder.name) for folder in single] and silent == ""
    assert "transformer: " in err and "sampling" not in silent_err and "transformer: " not in silent_err
    for folder in single:
        for one, two in zip(*(read_rgba(tmp_path / name / folder.name / "frames") for name in ("one", "two"))):
            assert np.abs(one.astype(int) - two).max() <= 1


# ---- bench.py


def test_bench_checkpoint_has_the_released_layout_and_loads_as_officially(tmp_path):
    config = bench.TINY
    bench.write_checkpoint(tmp_path, config)
    assert "text_dim" not in json.loads((tmp_path / "config.json").read_text())     # Wan leaves it to the tensors
    base, both = load_dit(tmp_path), bench.load_here(tmp_path, torch.float32, "cpu")
    scaled = bench.load_here(tmp_path, torch.float32, "cpu", offload=False, fp8=False)
    plain = bench.load_official(tmp_path, torch.float32, "cpu")
    assert base.config == both.config == config
    for name, p in plain.state_dict().items():
        close(both.state_dict()[name], p, 1e-5)
        assert torch.equal(scaled.state_dict()[name], both.state_dict()[name])
        untouched = name.endswith("modulation") or name == "patch_embedding.weight"
        assert torch.equal(p, base.state_dict()[name]) == untouched, name


def test_bench_adapters_have_the_layout_of_the_released_ones():
    base, dora, light = bench.checkpoint_shapes(WAN_14B)
    assert (len(dora), len(light)) == (1200, 1459)
    assert dora["blocks.39.ffn.2.lora_A.default.weight"] == (32, 13824)
    assert dora["blocks.39.ffn.2.lora_magnitude_vector.default.weight"] == (5120,)
    assert light["diffusion_model.head.head.lora_up.weight"] == (64, 64)
    assert light["diffusion_model.blocks.0.norm3.diff_b"] == light["diffusion_model.patch_embedding.diff_b"] == (5120,)


def test_bench_prints_and_writes_its_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    small, file = ["--size", "32x16", "--frames", "5", "--device", "cpu"], tmp_path / "table.json"
    bench.main(["--clip", "tiny", "--steps", "2", *small, "--json", str(file), "--offload"])
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "transformer: random weights", "transformer: pass 1 of 2", "transformer: pass 2 of 2",
        "decoders: random weights", "decoders: colour", "decoders: alpha"]
    bench.main(["--load", "tiny", "--device", "cpu", "--folder", str(tmp_path / "new")])
    table = capsys.readouterr().out
    assert all(way in table for way in ("load_dit", "load_scaled", "official procedure", "anonymous GB"))
    assert (tmp_path / "new" / "config.json").is_file()
    if bench.status("VmHWM"):
        assert all(0 < row["anonymous"] <= row["host"] for row in rows)


def test_bench_measures_the_memory_of_the_block_alone():
    with bench.measured("nothing", "cpu") as before:
        pass
    with bench.measured("300 MB", "cpu") as row:
        torch.ones(75_000_000)
    with bench.measured("nothing", "cpu") as after:
        pass
    if bench.status("RssAnon") is None:
        pytest.skip("no /proc here")
    for kind in ("host", "anonymous"):
        assert row[kind] - before[kind] > 0.25 and row[kind] - after[kind] > 0.25, kind


def test_bench_answers_wrong_input_with_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep")
    monkeypatch.setattr(bench, "alone", lambda *args: pytest.fail("measured"))

    def said(*argv):
        with pytest.raises(SystemExit) as stop:
            bench.main([*argv, "--device", "cpu"])
        assert stop.value.code == 2
        return capsys.readouterr().err
    assert "invalid choice: '7B'" in said("--forward", "7B")
    assert "4k+1" in said("--forward", "tiny", "--frames", "16")
    assert "empty --folder" in said("--load", "tiny", "--folder", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    monkeypatch.setattr(bench, "dit_memory", lambda *args: (1e15, 0))
    assert "takes about 1000000.0 GB of memory on cpu" in said("--forward", "tiny")
    free = bench.free_memory("cpu")
    monkeypatch.setattr(bench, "dit_memory", lambda *args: (0.6 * free, 0.6 * free))      # on a CPU they are one
    assert "memory on cpu" in said("--forward", "tiny", "--offload")
    monkeypatch.setattr(bench, "dit_memory", lambda *args: (0, 0))
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: bench.argparse.Namespace(free=0))
    assert "disk space" in said("--load", "tiny", "--folder", str(tmp_path / "new"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        leave_out_sheets(patch)
        kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
        test_killed_ten_times_it_ends_with_the_same_bits(Path(folder), None, kills, 4 * kills)
        print(f"killed {kills} times in {4 * kills} steps: the same bits")
