"""The specification, executed: parity with the official numbers, properties, equations, learning, end to end.

`official` holds what the official code (commit 5804410) returned for small models, whose weights `named` rebuilds from
their names. What is not the method (wrong input, media, resume, processes) is tested in kit/test_kit.py, taken in last.
`python -m kit.mutants` plants bugs and says which test kills which.
"""
import ast
import copy
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import processors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_dit
import train_vae
from dit import load_dit, read_config, rope_table, WAN_14B, WAN_1_3B, WanDiT
from dora import (adapted_layers, adapter_state, add_dora, add_lora, Delta, load_adapter_state, merge_adapter,
                  merge_tensor)
from kit import evaluate
from kit.clips import procedural_clip
from kit.command import run_command
from kit.files import Checkpoint, find_adapter, find_vae, read_section, show_help, TINY
from kit.media import read_rgba, write_rgba
from kit.score import compare_clips
from kit.test_kit import (block_adapters, CAPTIONS, close, DIT_FILE, dit_folder, dit_inputs, DIT_TINY, dora_file, far,
                          filled, kept, lightx2v_file, named, official, official_videos, rgba_files, ROOT, same,
                          smooth_video, TEXT_FILE, TEXT_TINY, tiny_dit, tiny_rgba, tiny_vae)
from losses import (edge_loss, gradient_magnitude, hard_render, random_colors, reconstruction_loss, rgba_loss,
                    soft_render, tabd_loss, tabd_mask, VGG)
from merge import FeatureMerge, load_rgba_vae, RGBAVAE
from sampler import (ellipse_mask, euler, filled_ellipse, fit_ellipse, flow_target, gaussian, gaussian_mask, guide,
                     interpolate, load_mask, mask_from_alpha, sample_noise, sample_sigma, shift_noise, shifted_sigmas,
                     training_sigmas, training_weights, unipc)
from text import clean_prompt, distance_buckets, load_text_encoder, make_tokenizer, T5Config, TextEncoder, UMT5
from vae import CausalConv3d, load_vae, vae_config, VAEConfig, WanVAE

# ---- the VAE


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_vae_is_the_same_in_any_chunks(chunk):
    vae, video, z = tiny_vae(), named("stream", (1, 3, 17, 16, 16)), named("stream", (1, 16, 5, 2, 2))
    close(vae.encode(video, 4 * chunk), vae.encode(video, None))
    close(vae.decode(z, chunk), vae.decode(z, None))


def test_vae_is_causal():
    """Without the frames of the last latent frame nothing before it changes."""
    vae, video, z = tiny_vae(), named("causal", (1, 3, 13, 16, 16)), named("causal", (1, 16, 4, 2, 2))
    for run, x, last, start in ((vae.encode, video, 9, 3), (vae.decode, z, 3, 9)):
        whole, other = run(x, None), run(torch.cat([x[:, :, :last], 0 * x[:, :, last:]], 2), None)
        close(whole[:, :, :start], other[:, :, :start], 1e-5)
        far(whole[:, :, start:], other[:, :, start:])


def test_vae_memory_does_not_grow_with_the_clip():
    """What a streamed decoding keeps between two pieces is the cache: copies of few frames, no views of chunks."""
    vae, cache, sizes = tiny_vae(), {}, []
    for frame in named("memory", (1, 16, 12, 2, 2)).split(1, dim=2):
        vae.decoder(vae.conv2(frame), cache)
        tensors = [v for v in cache.values() if isinstance(v, torch.Tensor)]
        sizes.append(sum(v.untyped_storage().nbytes() for v in tensors))
    assert sizes[2] == sizes[11] == sum(v.nbytes for v in tensors) > 0


def test_vae_loads_pth_and_safetensors_with_their_statistics(tmp_path):
    vae, video = load_vae(rgba_files()[0]), named("statistics", (1, 3, 1, 16, 16))
    assert vae.config == VAEConfig(dim=8)
    mean, std = list(map(float, range(16))), list(map(float, range(1, 17)))
    save_file(vae.state_dict(), tmp_path / "v.safetensors", dict(mean=json.dumps(mean), std=json.dumps(std)))
    again, half = (load_vae(tmp_path / "v.safetensors", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    close(again.encode(video)[:, 2], (again.moments(again.features(video))[0][:, 2] - 2) / 3)
    close(again.decode(again.encode(video)), vae.decode(vae.encode(video)))       # each takes back its own statistics


# ---- the merge block and the RGBA VAE


def test_rgba_streaming_is_exact():
    """In any chunks as in one; what is encoded is the hard render on the given colour (white), and alpha as grey."""
    torch.manual_seed(0)
    rgba, color = tiny_rgba(tiny_vae()), torch.tensor([0.0, -1.0, 1.0])
    rgb, alpha = 2 * torch.rand(1, 3, 17, 16, 16) - 1, (torch.rand(1, 1, 17, 16, 16) - 0.3).clamp(min=0)
    rendered = torch.where(alpha > 0, rgb, color.view(1, 3, 1, 1, 1))
    whole = rgba.vae.normalize(rgba.merged(rendered, (2 * alpha - 1).repeat(1, 3, 1, 1, 1)))
    for chunk in (4, 8, None):
        close(rgba.encode(rgb, alpha, color, chunk), whole)
    close(rgba.encode(rgb, alpha), rgba.encode(torch.where(alpha > 0, rgb, 1.0), alpha, None))


def test_channels_of_alpha_are_clamped_before_their_mean():
    rgba, z = load_rgba_vae(*rgba_files()[:2]), 3 * named("clamp", (1, 16, 2, 2, 2))
    raw, (rgb, alpha) = [branch.decode(z) for branch in (rgba.vae_fgr, rgba.vae_pha)], rgba.decode(z, clamp=True)
    assert torch.equal(rgb, raw[0].clamp(-1, 1))
    close(alpha, (raw[1].clamp(-1, 1).mean(1, keepdim=True) + 1) / 2)
    far(alpha, rgba.decode(z)[1].clamp(0, 1))


def test_merge_block_starts_as_the_base_encoder():
    vae, (rgb, alpha) = tiny_vae(), official_videos()
    rgba = tiny_rgba(vae)
    rgba.middle.start_as_rgb(vae)
    close(vae.normalize(rgba.merged(rgb, alpha)), vae.encode(rgb))


def test_rgba_vae_holds_what_is_of_use_and_on_the_meta_device_reads_no_tensor(tmp_path, monkeypatch):
    """The base has no decoder, a branch no encoder; frozen copies are skipped; two whole VAEs decode as decoder.bin."""
    base, whole, decoders = rgba_files()
    frozen = ("vae_fgr.decoder.conv1.conv3D.base_layer.weight", "vae_pha.encoder.conv1.weight", "vgg_loss.features.0")
    torch.save(torch.load(whole) | {name: torch.zeros(3) for name in frozen}, tmp_path / "VAE.bin")
    adapters = [tmp_path / "VAE.bin", decoders, (base, base)]
    assert [load_rgba_vae(base, adapter).skipped for adapter in adapters[:2]] == [3, 0]
    state, decode_only, _ = states = [load_rgba_vae(base, adapter).state_dict() for adapter in adapters]
    same(decode_only, {name: p for name, p in state.items() if name.startswith("vae_")})
    assert {".".join(name.split(".")[:2]) for name in state} == {
        "vae.encoder", "vae.conv1", "middle.block",
        "vae_fgr.conv2", "vae_fgr.decoder", "vae_pha.conv2", "vae_pha.decoder"}
    monkeypatch.delattr(Checkpoint, "read")
    for adapter, state in zip(adapters, states):
        meta = load_rgba_vae(base, adapter, torch.bfloat16, "meta").state_dict()
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.values())
        assert {name: p.shape for name, p in meta.items()} == {name: p.shape for name, p in state.items()}


# ---- LoRA and DoRA

LAYERS = {"linear": (lambda: nn.Linear(6, 10), (2, 5, 6)),
          "square": (lambda: nn.Linear(8, 8, bias=False), (2, 5, 8)),
          "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
          "causal": (lambda: CausalConv3d(4, 6, 3, padding=1), (1, 4, 3, 5, 5))}


def adapted_toy(kind, add=add_dora, seed=0):
    """A plain model of one layer, the same with an adapter whose B and m are not at their start, and an input."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    plain = nn.Sequential(make())
    adapted = add(copy.deepcopy(plain), 3, 6.0, ".*")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.5 * torch.rand_like(parameter)
    return plain, adapted, torch.randn(shape)


@pytest.mark.parametrize("add", [add_lora, add_dora])
@pytest.mark.parametrize("kind", LAYERS)
def test_dora_starts_as_the_base_and_merged_equals_unmerged(kind, add):
    plain, adapted, x = adapted_toy(kind, add)
    fresh = add(copy.deepcopy(plain), 3, 6.0, ".*")
    close(fresh(x), plain(x))
    assert fresh[0].lora_A.std() > 0 and not fresh[0].lora_B.any()
    merged = merge_adapter(plain.state_dict(), adapter_state(adapted), scale=2.0)     # alpha / rank = 6 / 3
    assert (adapted(x) - plain(x)).std() > 0.1 * plain(x).std()
    close(torch.func.functional_call(plain, merged, x), adapted(x))
    if kind == "causal":                                            # an adapted layer keeps the cache of its class
        memory = {}
        close(torch.cat([adapted[0](part, memory) for part in x.split(1, dim=2)], 2), adapted(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_state_has_official_names_and_loads_back(kind):
    (plain, adapted, x), (_, other, _) = adapted_toy(kind), adapted_toy(kind, seed=1)
    state, (o, *inputs), layer = adapter_state(adapted), plain[0].weight.shape, "0.conv3D" if kind == "causal" else "0"
    assert state[f"{layer}.lora_A.default.weight"].shape == (3, *inputs)
    assert state[f"{layer}.lora_B.default.weight"].shape == (o, 3, *[1] * len(inputs[1:]))
    assert state[f"{layer}.lora_magnitude_vector.default.weight"].numel() == o and len(state) == 3
    assert not other.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    load_adapter_state(other, {"base_model.model." + key.replace(".default", ""): t for key, t in state.items()})
    assert torch.equal(other(x), adapted(x))


@pytest.mark.parametrize("shape", [(10, 6), (8, 8), (6, 4, 3, 3, 3)])
def test_dora_magnitude_is_the_length_of_each_output_row(shape):
    """A diff comes after the norm; all is float32 inside, then as the weight is."""
    torch.manual_seed(0)
    up, down = torch.randn(shape[0], 2, *[1] * len(shape[2:])), torch.randn(2, *shape[1:])
    delta, weight = Delta(magnitude=1 + torch.rand(shape[0]), down=down, up=up), torch.randn(shape).bfloat16()
    merged = merge_tensor(weight.float(), delta)
    torch.testing.assert_close(merged.flatten(1).norm(dim=1), delta.magnitude)
    assert torch.equal(merge_tensor(weight, delta), merged.bfloat16())
    delta.diff = torch.randn(shape)
    torch.testing.assert_close(merge_tensor(weight.float(), delta), merged + delta.diff)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dora_norm_is_a_constant_in_backward(kind):
    plain, adapted, x = adapted_toy(kind)
    layer, base = adapted[0], plain[0].weight.detach()
    adapted(x).square().sum().backward()
    down = layer.lora_A.detach().requires_grad_()
    rows = base.flatten(1) + 2.0 * layer.lora_B.detach().flatten(1) @ down.flatten(1)
    rows = (layer.magnitude / rows.norm(dim=1)).detach()[:, None] * rows
    y = torch.func.functional_call(plain, {"0.weight": rows.view_as(base)}, x)
    close(layer.lora_A.grad, torch.autograd.grad(y.square().sum(), down)[0])


def test_dora_makes_one_dense_product_and_no_dense_gradient():
    n, i, o, r = 64, 48, 96, 2
    layer, x = add_dora(nn.Sequential(nn.Linear(i, o)), r, r, ".*"), torch.randn(n, i, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    small = 2 * n * r * (i + o)                                    # x A^T and B, each time they are used
    assert forward.get_total_flops() == 2 * n * i * o + small + 2 * o * i * r       # the last: B A for the norm
    assert backward.get_total_flops() == 2 * n * i * o + 2 * small                  # a weight gradient: 2 n i o more


def test_dora_trains_float32_adapters_alone_beside_half_precision():
    model = add_lora(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).bfloat16(), 2, 2, "[02]")
    nested = add_dora(nn.ModuleDict({"a": model, "q": nn.Linear(4, 4).bfloat16()}), 2, 2, ["q"])
    y = nested["q"](model(named("half", (5, 4)).bfloat16()))
    y.float().sum().backward()
    trained = {name: p.grad.dtype for name, p in nested.named_parameters() if p.grad is not None}
    names = ("a.0.lora_A", "a.0.lora_B", "a.2.lora_A", "a.2.lora_B", "q.lora_A", "q.lora_B", "q.magnitude")
    assert y.dtype == torch.bfloat16 and trained == dict.fromkeys(names, torch.float32)


@pytest.mark.parametrize("targets, found", [(".*", ["0.q", "0.norm_q", "0.ffn.0", "patch"]),
                                            (r"\d+\..*q", ["0.q", "0.norm_q"]), (["q", "ffn.0"], ["0.q", "0.ffn.0"])])
def test_dora_targets_are_a_whole_name_or_its_endings(targets, found):
    block = {"q": nn.Linear(4, 4), "norm_q": nn.Linear(4, 4), "ffn": nn.Sequential(nn.Linear(4, 8))}
    model = nn.ModuleDict({"0": nn.ModuleDict(block), "patch": nn.Conv3d(3, 4, 2)})
    assert list(adapted_layers(add_lora(model, 2, 2, targets))) == found


LIGHTX2V = (".lora_down.weight", ".lora_up.weight", ".lora_magnitude_vector.weight")
DIALECTS = {      # what stands before a layer's name; what after it, for A, B and m
    "peft": ("base_model.model.", (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight")),
    "comfy": ("diffusion_model.", (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")),
    "causal": ("", [f".conv3D.{part}.default.weight" for part in ("lora_A", "lora_B", "magnitude_vector")]),
    "lightx2v": ("diffusion_model.", LIGHTX2V), "alpha": ("", LIGHTX2V),
    "kohya": ("lora_unet_", LIGHTX2V), "kohya2": ("lora_unet__", LIGHTX2V), "lycoris": ("lycoris_", LIGHTX2V),
    "studio": ("pipe.dit.", LIGHTX2V), "whole": ("model.diffusion_model.", LIGHTX2V)}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dora_every_dialect_merges_to_the_same(dialect):
    state, adapter, (before, after), respelled = tiny_dit().state_dict(), dora_file(), DIALECTS[dialect], {}
    layers = [key.removesuffix(".lora_A.default.weight") for key in adapter if "lora_A" in key]
    for layer in layers:
        a, b, m = (adapter[f"{layer}.lora_{part}.default.weight"] for part in ("A", "B", "magnitude_vector"))
        name = before + (layer.replace(".", "_") if before.endswith("_") else layer)
        if dialect in ("alpha", "kohya", "kohya2"):
            b, respelled[f"{name}.alpha"] = 2 * b, torch.tensor(2.0)         # s = alpha / r = 2 / 4
        respelled |= {name + end: tensor for end, tensor in zip(after, (a, b, m))}
    same(merge_adapter(state, respelled, 0.5), merge_adapter(state, adapter, 0.5))


def test_dora_diffs_go_to_weight_bias_and_modulation():
    state, before = tiny_dit().state_dict(), tiny_dit().state_dict()
    changes = {"blocks.1.ffn.0.diff": "blocks.1.ffn.0.weight", "lora_unet_blocks_1_ffn_2.diff_b": "blocks.1.ffn.2.bias",
               "blocks.0.diff_m": "blocks.0.modulation", "blocks.1.modulation.diff": "blocks.1.modulation"}
    diffs = {key: named(key, state[name].shape) for key, name in changes.items()}
    merged = merge_adapter(state, diffs, 0.5)
    same(merged, before | {name: before[name] + 0.5 * diffs[key] for key, name in changes.items()})
    same(state, before)                                                     # a new dict, that shares what stays
    assert {name for name in state if merged[name] is not state[name]} == set(changes.values())


# ---- the diffusion transformer


def test_models_have_the_names_and_sizes_of_wan(tmp_path):
    """Which tensors alone tell; the names stand in the parity file, whose weights are made of them."""
    with torch.device("meta"):
        vae, small, large = (model.state_dict() for model in (WanVAE(), WanDiT(WAN_1_3B), WanDiT(WAN_14B)))
    counts = [(len(state), sum(p.numel() for p in state.values())) for state in (vae, small, large)]
    assert counts == [(194, 126_892_531), (825, 1_418_996_800), (1095, 14_288_491_584)]
    assert vae_config(vae) == VAEConfig() and vae["decoder.upsamples.3.time_conv.weight"].shape == (768, 384, 3, 1, 1)
    assert read_config(tmp_path / "a", small) == WAN_1_3B and read_config(tmp_path / "a", large) == WAN_14B


@pytest.mark.parametrize("head_dim, pairs", [(128, (22, 21, 21)), (24, (4, 4, 4)), (32, (6, 5, 5)), (64, (12, 10, 10))])
def test_dit_rope_splits_a_head_over_time_height_and_width(head_dim, pairs):
    cos, sin = rope_table(head_dim, 3, 4, 5)
    angles = [[10000 ** (-i / k) if axis == turned else 0 for turned, k in enumerate(pairs) for i in range(k)]
              for axis in range(3)]
    torch.testing.assert_close(torch.atan2(sin, cos)[[20, 5, 1]], torch.tensor(angles))      # (1,0,0) (0,1,0) (0,0,1)


def test_dit_samples_have_their_own_times_and_prompts_of_any_length():
    model, (z, t, context), prompt = tiny_dit(), dit_inputs(), named("long.context", (16, 32))
    two = model(torch.cat([z, z]), torch.tensor([20.0, 750.0]), [prompt, context[0]])
    close(two, torch.cat([model(z, torch.tensor([20.0]), prompt[None]), model(z, t, context)]))
    far(two[:1], two[1:])


def test_dit_keeps_time_in_float32(tmp_path):
    """bfloat16 would turn both times into 988."""
    (z, _, context), times = dit_inputs(), torch.tensor([988.49, 987.17])
    near, after = (tiny_dit()(z, time[None], context) for time in times)
    for model in (load_dit(dit_folder(tmp_path / "tiny"), dtype=torch.bfloat16), tiny_dit().bfloat16()):
        v, change = model(z, times[:1], context), model(z, times[:1], context) - model(z, times[1:], context)
        assert v.dtype == torch.float32 and (v - near).std() < 0.05 * v.std()
        assert (change - (near - after)).std() < 0.5 * (near - after).std()


def test_dit_norms_modulation_and_stream_are_float32_for_bfloat16_weights(tmp_path):
    model, dtypes = load_dit(dit_folder(tmp_path / "tiny"), dtype=torch.bfloat16), {}
    for module in model.modules():
        module.register_forward_hook(lambda module, _, y: dtypes.setdefault(type(module).__name__, set()).add(y.dtype))
    model(*dit_inputs())
    assert dtypes["Block"] == dtypes["LayerNorm"] == {torch.float32} and dtypes["Attention"] == {torch.bfloat16}
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) is any(word in name for word in ("time_", "modulation", "norm", "head")), name


def test_dit_starts_at_zero_and_learns():
    torch.manual_seed(0)
    model, inputs, target = WanDiT(DIT_TINY), dit_inputs(), torch.randn(1, 16, 3, 4, 6)
    assert not model(*inputs).any() and model.blocks[0].norm3.weight.eq(1).all()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = (model(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * target.square().mean() and all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_dit_is_the_same_from_shards_or_one_file_with_adapters_merged_in_order(tmp_path):
    """Config.json may say what it likes, or little: sizes are in the tensors."""
    folder, sharded = dit_folder(tmp_path / "one"), dit_folder(tmp_path / "three", shards=3)
    (sharded / "config.json").write_text(json.dumps(dict(num_heads=2, text_len=16, patch_size=2)))
    (dora, _), distill = block_adapters(tmp_path)
    merged = merge_adapter(merge_adapter(tiny_dit().state_dict(), dora_file(), 0.5), lightx2v_file())
    for path in (sharded, folder / DIT_FILE, str(folder)):
        model = load_dit(path, [(dora, 0.5), distill])
        assert model.config == DIT_TINY
        same(model.state_dict(), merged)
    half = load_dit(folder, [(dora, 0.5), distill], torch.bfloat16).state_dict()
    same(half, {name: p.to(half[name].dtype) for name, p in merged.items()})    # one rounding, after both merges
    with open(folder / DIT_FILE, "r+b") as opened:
        opened.write(bytes((folder / DIT_FILE).stat().st_size))
    same(model.state_dict(), merged)                                            # the file is not the model's memory


def tiny_umt5():
    model = filled(UMT5(TEXT_TINY))
    model.token_embedding.weight *= 32 ** 0.5
    return model


def seeded(n=1):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def last(steps):
    return list(steps)[-1][1]


def toy(x, t):
    return torch.tanh(1.3 * x - t.view(-1, 1, 1, 1, 1) / 1000) - 0.2 * x


# ---- text


def test_text_distances_fall_into_t5_buckets():
    buckets = distance_buckets(300, 32)
    left = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 23: 11, 32: 12, 90: 14, 91: 15, 128: 15, 299: 15}
    for distance, bucket in left.items():
        assert buckets[distance, 0] == bucket                                   # the key stands on the left,
        assert buckets[0, distance] == (bucket + 16 if distance else 0)         # or on the right


def test_text_encoder_starts_as_t5_but_hears_word_order_at_once():
    torch.manual_seed(0)
    phrases = [f"{thing} from {way}" for thing in "abcdef" for way in ("left to right", "right to left")]
    encoder, head = TextEncoder(make_tokenizer(phrases), UMT5(T5Config(32, 64, 128, 256, 4, 2, 32))), nn.Linear(64, 1)
    start = {"attn.q": (64 * 32) ** -0.5, "attn.o": 128 ** -0.5, "ffn.fc2": 256 ** -0.5, "pos_embedding.embedding": 2}
    for name, std in start.items():                                             # the last is larger than T5's
        assert encoder.model.state_dict()[f"blocks.1.{name}.weight"].std().item() == pytest.approx(std, rel=0.2), name
    optimizer = torch.optim.AdamW([*encoder.model.parameters(), *head.parameters()], lr=1e-3)
    is_right = torch.tensor([1.0, 0.0]).repeat(6)
    for _ in range(8):
        logits = head(torch.stack([context.mean(0) for context in encoder(phrases)]))[:, 0]
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, is_right).backward()
        optimizer.step()
    assert torch.equal(logits > 0, is_right > 0)
    assert all(p.grad.abs().sum() > 0 for p in encoder.model.parameters())


def test_clean_prompt():
    assert clean_prompt("  a  red\n\tball ") == "a red ball"
    assert clean_prompt("salt &amp;amp; pepper &lt;b&gt; &amp;quot;x&amp;quot;") == 'salt & pepper <b> "x"'
    assert clean_prompt("\u201cit\u2019s\u201d glass") == '"it\'s" glass'
    assert clean_prompt("a \udce9 ball") == "a ? ball"                          # what a shell makes of invalid UTF-8
    assert clean_prompt("\uff21\uff11\uff0c\u3000\u900f\u660e") == "A1, \u900f\u660e"
    assert clean_prompt("\U0001f98a\u200d\U0001f525 \u00bd") == "\U0001f98a\u200d\U0001f525 \u00bd"  # not NFKC


@pytest.mark.filterwarnings("error")
def test_text_encoder_ends_prompts_once_cuts_long_ones_and_hides_padding():
    encoder = TextEncoder(make_tokenizer(CAPTIONS), tiny_umt5(), text_len=8)
    words = "<pad> </s> <unk> . a from left moving right to , - ball blue ghost glass red semi transparent".split()
    assert encoder.tokenizer.get_vocab() == {word: i for i, word in enumerate(words)}       # frequent ones first
    prompts = ["Red dragon", "", "red &amp; red &amp; red &amp; ball"]
    (ids, _), red = encoder.tokenize(prompts), words.index("red")
    assert ids[:2].tolist() == [[red, 2, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]       # a dragon is unknown: 2
    for prompt, context in zip(prompts, encoder(prompts)):
        close(context, encoder([prompt])[0])                                    # (l d), as without the batch's padding
    encoder.tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert torch.equal(encoder.tokenize(prompts)[0], ids)                       # umT5's own file appends </s> too
    with pytest.warns(UserWarning, match="3001 tokens: the last 2993"):
        assert encoder.tokenize(["red " * 3000])[0].tolist() == [[red] * 7 + [1]]


def test_text_encoder_loads_from_a_folder(tmp_path):
    """Sizes come from the tensors, the length of prompts from config.json and never from the tokenizer's own file."""
    file, tokenizer = (tmp_path / TEXT_FILE).with_suffix(".pth"), make_tokenizer(CAPTIONS)
    torch.save(tiny_umt5().state_dict(), file)                                  # as released
    exact = TextEncoder(tokenizer, tiny_umt5())(CAPTIONS)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(tmp_path / "google/umt5-xxl/tokenizer.json"))
    encoder = load_text_encoder(str(tmp_path))
    assert encoder.model.config == TEXT_TINY and encoder.text_len == 512
    assert all(torch.equal(a, b) for a, b in zip(encoder(CAPTIONS), exact, strict=True))
    (tmp_path / "config.json").write_text('{"text_len": 9}')
    assert load_text_encoder(tmp_path).text_len == load_text_encoder(file).text_len == 9


# ---- losses


def small_clip():
    """Colour in [-1,1]; alpha a third transparent, a third opaque, the rest between."""
    rgb, alpha = (torch.rand(2, c, 5, 16, 24, generator=seeded(4)[c]) for c in (3, 1))
    return 2 * rgb - 1, (3 * alpha - 1).clamp(0, 1)


def test_renders_of_straight_alpha():
    rgb, alpha = torch.full((2, 3, 1, 1, 3), 0.5), torch.tensor([0.0, 0.25, 1.0]).expand(2, 1, 1, 1, 3)
    colors = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    soft, hard = soft_render(rgb, alpha, colors), hard_render(rgb, alpha, colors)
    assert soft[0, :, 0, 0].tolist() == [[1.0, 0.875, 0.5], [-1.0, -0.625, 0.5], [1.0, 0.875, 0.5]]     # 0.5/4 + 3/4
    assert hard[1, :, 0, 0].tolist() == [[-1.0, 0.5, 0.5], [-1.0, 0.5, 0.5], [1.0, 0.5, 0.5]]


def test_sobel_sees_8_and_central_differences_2_where_grey_rises_by_1_a_pixel():
    ramp = torch.arange(6.0).expand(6, 6) / 0.859
    for image, operator, inner in (ramp, "sobel", 8.0), (ramp.T, "sobel", 8.0), (ramp, "central", 2.0):
        edges = gradient_magnitude(image.expand(1, 3, 1, 6, 6), operator)[0, 0]
        assert torch.allclose(edges[1:-1, 1:-1], torch.tensor(inner), atol=1e-4)


def test_reconstruction_loss_is_the_sum_of_l1_edges_and_relu2_2_of_vgg(tmp_path):
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128)}
    state = {f"features.{i}.weight": named(f"{i}.weight", (*shape, 3, 3)) for i, shape in shapes.items()}
    state |= {f"features.{i}.bias": named(f"{i}.bias", shape[:1]) for i, shape in shapes.items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(9)}, tmp_path / "vgg", _use_new_zipfile_serialization=False)
    relu = lambda h, i: F.relu(F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
    relu2_2 = lambda image: relu(relu(F.max_pool2d(relu(relu(image, 0), 2), 2), 5), 7)
    x, y, vgg = small_clip()[0], 0.5 * small_clip()[0], VGG(tmp_path / "vgg")   # in the old format, as torchvision's
    fx, fy = (relu2_2((video.transpose(1, 2).flatten(0, 1) + 1) / 2) for video in (x, y))       # frames in [0,1]
    l1, perceptual = (x - y).abs().mean(), (fx - fy).square().mean()
    assert torch.allclose(vgg(x, y), perceptual, rtol=1e-4) and not any(p.requires_grad for p in vgg.parameters())
    assert torch.allclose(reconstruction_loss(x, y, vgg, 200, 3), l1 + 200 * vgg(x, y) + 3 * edge_loss(x, y))


def test_rgba_loss_sees_alpha_and_visible_colour_alone():
    (rgb, alpha), colors = small_clip(), random_colors(seeded(2))
    parts = lambda *output: rgba_loss(*output, rgb, alpha, colors, edge=0)
    assert parts(torch.where(alpha == 0, -rgb, rgb), alpha) == {"alpha": 0, "soft": 0, "hard": 0}
    paler, fainter = parts(0.9 * rgb, alpha), parts(rgb, 0.5 * alpha + 0.05)
    assert paler["alpha"] == 0 and paler["soft"] > 0 and paler["hard"] > paler["soft"]
    assert fainter["soft"] > 0 and fainter["hard"] == 0
    assert torch.allclose(fainter["alpha"], (alpha - 0.1).abs().mean())         # grey in [-1,1]: 2 |a/2 + 0.05 - a|
    faint = rgba_loss(rgb, alpha + 0.01, rgb, alpha, colors, own_alpha=True, edge=0)      # officially it is drawn whole
    assert torch.allclose(faint["hard"], ((rgb - colors[1].view(-1, 3, 1, 1, 1)).abs() * (alpha == 0)).mean())


def test_tabd_pulls_opaque_cells_and_pushes_transparent_ones_within_bounds():
    """M is 1 where a cell is opaque, -1 where it is transparent, 0 between (test_official_masks); the paper's has no 0.
    """
    alpha = disc()[None, None]
    three, two = tabd_mask(alpha), tabd_mask(alpha, strict=True)
    assert (three == 0).any() and torch.equal(two, torch.where(three == 1, 1.0, -1.0))
    mask = torch.tensor([1.0, 1.0, -1.0, 0.0]).view(1, 1, 1, 1, 4)
    for options, sign in ({}, mask), ({"clamp": (0, 1)}, mask.clamp(min=0)):    # the official clamp only pulls
        v_hat = torch.full(mask.shape, 0.3, requires_grad=True)
        tabd_loss(v_hat, torch.zeros_like(mask), mask, torch.tensor([2.0]), **options).backward()
        assert torch.allclose(4 * v_hat.grad, 1.2 * sign)                       # 2 w (v_hat - v), and its opposite
    errors, weight = torch.tensor([9.0, 0.5]).view(2, 1, 1, 1, 1), torch.tensor([1.0, 2.0])
    loss = tabd_loss(errors, 0 * errors, mask, weight)                          # a weight a sample: 81 is cut, 0.5 not
    assert torch.allclose(loss, (1 + 0.5) / 2 * mask.mean())


# ---- sampler


def test_random_draws_are_even_and_a_sample_has_its_own_in_any_batch():
    soft, hard = random_colors(500 * seeded())                                  # two different corners of the RGB cube
    assert (soft.abs() == 1).all() and len(soft.unique(dim=0)) == len(hard.unique(dim=0)) == 8
    assert (soft != hard).any(1).all()
    for shift in (), (3.0,):
        levels, (sigma, weight) = training_sigmas(*shift), sample_sigma(4000 * seeded(), *shift)
        index = (sigma[:, None] == levels).int().argmax(1)
        assert torch.equal(sigma, levels[index]) and torch.equal(weight, training_weights(levels)[index])
        assert all(300 < count < 500 for count in (index // 100).bincount(minlength=10))
    for draw in random_colors, sample_sigma, lambda generators: [sample_noise((4, 2), generators)]:
        for whole, part in zip(draw(seeded(3)), draw(seeded(3)[1:]), strict=True):
            assert torch.equal(whole[1:], part) and len(whole.unique(dim=0)) > 1


def test_flow_and_guidance_are_straight_lines():
    z, noise, sigma = named("z", (3, 4, 2, 9, 9)), sample_noise((4, 2, 9, 9), seeded(3)), torch.tensor([0.0, 1.0, 0.3])
    z_t = interpolate(z, noise, sigma)
    assert torch.allclose(z_t, z + sigma.view(-1, 1, 1, 1, 1) * flow_target(z, noise), atol=1e-6)
    assert abs(noise.mean()) < 0.1 and 0.9 < noise.std() < 1.1
    assert [guide(torch.tensor(2.0), torch.tensor(1.0), scale) for scale in (0, 1, 5)] == [1, 2, 6]


def test_mean_shift_is_outside():
    noise, mask = torch.zeros(2, 16, 3, 8, 12), ellipse_mask(9, 64, 96)
    shifted = shift_noise(noise, torch.stack([mask, 0 * mask]))                 # one mask a sample
    assert shifted[0, 0, 0].flatten()[mask[0].argmax()] == 0 and (shifted[1] == 0.05).all()
    assert shifted[..., 0, 0].allclose(torch.tensor(0.05), atol=1e-4)
    assert torch.equal(shift_noise(noise, mask), shifted[:1].expand_as(noise))


def test_samplers_lead_back_to_the_data():
    """Where paths are straight, Euler lands on z in any number of steps, and so does UniPC from its own start."""
    z, noise = torch.randint(-4, 5, (2, 2, 4, 1, 3, 3), generator=seeded()[0]) / 4      # bfloat16 holds them exactly
    def velocity(x, t):
        assert x.dtype == t.dtype == torch.float32 and t.shape == (2,)                  # whatever the model answers in
        return flow_target(z, noise).bfloat16()
    for steps in (1, 2, 9):
        states = list(euler(velocity, noise.bfloat16(), shifted_sigmas(steps)))
        assert [i for i, _ in states] == list(range(steps)) and torch.allclose(states[-1][1], z, atol=1e-5)
        start = interpolate(z, noise, shifted_sigmas(steps, start=0.999)[0])
        assert torch.allclose(last(unipc(velocity, start, steps)), z, atol=1e-5)


def disc(frames=9, height=64, width=96, x=48.0, y=32.0, radius=16.0):
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((columns - x) ** 2 + (rows - y) ** 2 < radius**2).float().repeat(frames, 1, 1)


def peaks(mask):
    """Where each frame of (t,h,w) is highest, in cells: x (t,), y (t,)."""
    return mask.amax(1).argmax(1) + 0.5, mask.amax(2).argmax(1) + 0.5


def test_ellipse_turns_with_the_object_even_of_few_cells_or_a_thin_one():
    few, thin = torch.zeros(2, 8, 12).double()
    x, y, a, b, angle = fit_ellipse((gaussian((7, 5, 4, 1.5, math.radians(30)), 11, 15) > 0.4).double())
    assert (x, y) == pytest.approx((7, 5), abs=0.2) and a > 1.5 * b
    assert math.degrees(angle) % 180 == pytest.approx(30, abs=6)            # y points down: clockwise on the screen
    few[2, 3] = few[2, 7] = few[3, 5] = 1
    assert fit_ellipse(few) == (5.0, 2.5, 2.0, 1.0, 0.0)
    thin[2, 3:8] = 0.25
    assert fit_ellipse(thin)[:2] == (5, 2)
    thin[4, 3:8] = 0.5                                      # where a cell is fuller than that, 0.25 no longer counts
    assert fit_ellipse(thin)[1] == 4


@pytest.mark.parametrize("a, b, degrees, drawing", [
    (2, 2, 20, "////......##/....####/.....####/.....####/.....#"),
    (4, 2, -70, "//......##/......###/.....####/....#####/....#####/....#####/....####/....####/.....##")])
def test_filled_ellipse_draws_the_polygon_of_opencv(a, b, degrees, drawing):
    """Drawn by cv2.ellipse(image, (6, 6), (a, b), degrees, 0, 360, 1, -1): 4 corners below 3 cells, 12 below 10."""
    ellipse = filled_ellipse(torch.tensor([6.2, 5.9]), torch.tensor([a, b]) + 0.3, math.radians(degrees), 13, 13)
    rows = ["".join("#" if cell else "." for cell in row).rstrip(".") for row in ellipse]
    assert "/".join(rows).rstrip("/") == drawing


def test_ellipse_of_a_user_is_a_centred_circle_or_passes_its_keys():
    mask, oval, square = load_mask(None, 17, 64, 96), load_mask("0.5,0.5,0.4,0.2", 17, 64, 96), ellipse_mask(5, 64, 64)
    assert mask.shape == (5, 8, 12) and torch.equal(mask[0], mask[4]) and mask.min() == 0 and mask.max() == 1
    for one, other in (mask, mask.flip(1)), (mask, mask.flip(2)), (oval, oval.flip(1)), (square, square.mT):
        assert torch.allclose(one, other, atol=1e-6)
    turned = gaussian((5.5, 3.5, 2.0, 1.0, math.radians(20)), 8, 12)        # the frame's middle lies between cells
    assert torch.allclose(load_mask("0.5,0.5,0.25,0.125,20", 5, 64, 96), turned.expand(2, 8, 12), atol=1e-6)
    x, y = peaks(load_mask("0:0.125,.4375,0.2,0.2; 0.5:.325,.4375, .2,0.2 ;1:0.725,0.4375,0.2,0.2,0;", 17, 64, 160))
    assert x.tolist() == [2.5, 4.5, 6.5, 10.5, 14.5] and (y == 3.5).all()


def test_masks_from_outside_fit_any_clip(tmp_path):
    saved = load_mask("0:0.3,0.5,0.3,0.4; 1:0.7,0.5,0.3,0.4", 81, 96, 160)
    torch.save(saved, tmp_path / "mask")
    save_file({"mask": saved}, tmp_path / "mask.safetensors")
    assert torch.equal(load_mask(str(tmp_path / "mask.safetensors"), 81, 96, 160), saved)
    for frames, height, width, first, end in (1, 64, 104, 6.5, 6.5), (17, 64, 64, 2.5, 5.5), (161, 128, 64, 2.5, 5.5):
        mask = load_mask(str(tmp_path / "mask"), frames, height, width)
        assert mask.shape == ((frames + 3) // 4, height // 8, width // 8) and 0 <= mask.min() and mask.max() <= 1
        x, _ = peaks(mask)
        assert (x.diff() >= 0).all() and (x[0], x[-1]) == (first, end)      # its time axis from end to end
    drawn = mask_from_alpha((60 + 195 * disc(30, 100, 150, x=75, y=50, radius=25)).byte().numpy(), 17, 64, 96)
    assert drawn.shape == (5, 8, 12) and (drawn - gaussian_mask(disc(17))).abs().mean() < 0.02      # 60 is no object


# ---- parity: what the official code returned for the same weights and inputs

KINDS = ["appear", "dot", "ellipse", "empty", "full", "glass", "two"]     # of alpha clips in the file


@cache
def official_rgba():
    """The RGBA VAE of the parity file, loaded from files as the released ones are."""
    return load_rgba_vae(*rgba_files()[:2])


@cache
def official_dit(*names):
    """The transformer of the parity file, loaded from two shards, with adapters merged in this order."""
    folder = Path(tempfile.mkdtemp(dir=kept().name))
    dit_folder(folder / "dit", shards=2)
    adapters = dict(zip(("dora", "lightx2v"), block_adapters(folder)))
    return load_dit(folder / "dit", [adapters[name] for name in names])


def weight_of(name, *adapters):
    return official_dit(*adapters).state_dict()[name]


def velocity(*adapters):
    return official_dit(*adapters)(*dit_inputs())[0]


def context():
    ids, mask = torch.tensor([[5, 9, 2, 33, 63, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    return tiny_umt5()(ids, mask)[0, :6]


def taken(sampler, *steps):
    return last(sampler(toy, named("toy.noise", (1, 16, 3, 4, 6)), *steps))


def latent():
    return official["vae_tiny.merged"]


PARITY = {      # key in the file -> what is to give the same, to 1e-4 of its deviation
    "vae_tiny.features": lambda: tiny_vae().features(official_videos()[0]),
    "vae_tiny.encode": lambda: tiny_vae().encode(official_videos()[0]),
    "vae_tiny.decode": lambda: tiny_vae().decode(official["vae_tiny.encode"]),
    "vae_tiny.merged_raw": lambda: official_rgba().merged(*official_videos()),
    "vae_tiny.merged": lambda: tiny_vae().normalize(official_rgba().merged(*official_videos())),
    "vae_tiny.vae_fgr.decode": lambda: official_rgba().decode(latent())[0],
    "vae_tiny.vae_pha.decode": lambda: official_rgba().vae_pha.decode(latent()),
    "dit_tiny.v": lambda: velocity(),
    "dit_tiny.v_dora": lambda: velocity("dora"),
    "dit_tiny.v_dora_lightx2v": lambda: velocity("dora", "lightx2v"),
    "dit_tiny.q0_dora": lambda: weight_of("blocks.0.self_attn.q.weight", "dora"),
    "dit_tiny.ffn0_all": lambda: weight_of("blocks.0.ffn.0.weight", "dora", "lightx2v"),
    "dit_tiny.qb_all": lambda: weight_of("blocks.0.self_attn.q.bias", "dora", "lightx2v"),
    "t5_tiny.context": context,
    "train.sigmas": training_sigmas,
    "train.weights": lambda: training_weights(training_sigmas()),
    "euler4.sigmas": lambda: shifted_sigmas(4)[:-1],
    "unipc4.sigmas": lambda: shifted_sigmas(4, start=0.999),
    "toy.euler4": lambda: taken(euler, shifted_sigmas(4)),
    "toy.unipc4": lambda: taken(unipc, 4),
    "toy.unipc20": lambda: taken(unipc, official["unipc20.sigmas"]),
    "shift.noise_out": lambda: shift_noise(named("shift.noise", (16, 3, 10, 14)), official["ellipse.gauss"])}


@pytest.mark.parametrize("key", PARITY)
def test_official_numbers(key):
    with torch.no_grad():
        close(PARITY[key](), official[key])


def test_official_alpha_edges_and_model_times():
    alpha, times = official_rgba().decode(latent())[1], []
    close(alpha, (official["vae_tiny.vae_pha.decode"].mean(1, keepdim=True) + 1) / 2)
    a, b = (smooth_video(key, (1, 3, 5, 16, 20)) for key in ("sobel.a", "sobel.b"))
    expected = official["official_edge_loss"].item()
    assert edge_loss(a, b, "central").item() == pytest.approx(expected, rel=1e-4)
    assert abs(edge_loss(a, b).item() - expected) > 0.1 * expected          # Sobel, the default, is another operator
    last(unipc(lambda x, t: times.append(t.item()) or toy(x, t), named("toy.noise", (1, 16, 3, 4, 6)), 4))
    assert times == official["unipc4.timesteps"].tolist() == [999, 937, 833, 624]


@pytest.mark.parametrize("kind", KINDS)
def test_official_masks(kind):
    alpha = official[f"{kind}.alpha"] / 255
    assert torch.equal(tabd_mask(alpha[None, None])[0, 0], official[f"{kind}.tabd_mask"])
    g = gaussian_mask(alpha)
    assert g.shape == official[f"{kind}.gauss"].shape
    assert (g - official[f"{kind}.gauss"]).abs().mean() < 1e-4       # 0.03 would do: growth stops at the same ellipse


def test_adapters_do_not_commute():
    swapped, right = velocity("lightx2v", "dora"), official["dit_tiny.v_dora_lightx2v"]
    assert (swapped - right).std() > 0.1 * right.std()


# ---- learning


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
    optimizer = torch.optim.AdamW([p for p in rgba.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        losses.append(train_vae.rgba_step(rgba, rgb, alpha, seeded())["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(v, rgba.state_dict()[k]) for k, v in base.items())


def test_rgba_loss_is_the_sum_of_its_terms_and_a_tenth_of_tabd():
    rgba, dit = small_rgba(), WanDiT(DIT_TINY)
    rgb, alpha = named("step.rgb", (2, 3, 1, 16, 16)).tanh(), named("step.alpha", (2, 1, 1, 16, 16)).sigmoid().round()
    nn.init.normal_(dit.head.head.weight)

    def step(part, **options):
        with torch.no_grad():
            parts = train_vae.rgba_step(rgba, rgb[part], alpha[part], seeded(2)[part], **options)
        return {name: float(value) for name, value in parts.items()}
    both = step(slice(None), tabd=0.1, dit=dit, empty=torch.zeros(1, 32))
    assert both.keys() == {"loss", "alpha", "soft", "hard", "tabd"} and both["tabd"] != 0
    assert both["loss"] == pytest.approx(both["alpha"] + both["soft"] + both["hard"] + 0.1 * both["tabd"], rel=1e-4)
    alone = [step(slice(i, i + 1)) for i in range(2)]
    for name in ("alpha", "soft", "hard"):              # a sample's random colours are its own in any batch
        assert both[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-3)


def test_naive_autoencoder_sees_hidden_colour_and_is_judged_by_it(monkeypatch):
    rgba, alpha = small_rgba(), torch.zeros(1, 1, 1, 16, 16)
    alpha[..., :8] = 1
    rgb, seen = torch.full((1, 3, 1, 16, 16), 0.5), []
    encode = rgba.encode
    monkeypatch.setattr(rgba, "encode", lambda *args, **options: seen.append(encode(*args, **options)) or seen[-1])
    with torch.no_grad():
        for naive in (False, True):
            one, two = (train_vae.rgba_step(rgba, x, alpha, seeded(), naive=naive)["loss"]
                        for x in (rgb, torch.where(alpha > 0, rgb, -1.0)))
            assert bool(one != two) is naive and torch.equal(seen[-1], seen[-2]) is not naive


def test_flow_step_draws_the_shifted_noise():
    """Who answers with the true velocity of the noise that was drawn makes no error; the noise's mean is mu (1 - G)."""
    z, mask = named("flow.z", (2, 16, 2, 4, 4)), torch.rand(2, 2, 4, 4, generator=seeded()[0])
    seen = []

    def model(z_t, t, context):
        sigma = (t / 1000).view(-1, 1, 1, 1, 1)
        seen.append((z_t - (1 - sigma) * z) / sigma)                     # the noise
        return seen[-1] - z
    for mean in (0.0, 0.5):
        step = train_dit.flow_step(model, z, None, seeded(2), mask, mean)
        assert step["mse"] < 1e-6 and step["loss"] < 1e-6
    assert torch.allclose((seen[1] - seen[0]).mean(1), 0.5 * (1 - mask), atol=1e-3)


def test_flow_loss_is_weighted_by_the_level_or_not():
    z, one = torch.zeros(3, 16, 1, 2, 2), lambda z_t, t, context: torch.zeros_like(z_t)
    _, weight = sample_sigma(seeded(3))
    errors = sample_noise((16, 1, 2, 2), restarted(3)).square().mean((1, 2, 3, 4))
    for weighted, expected in ((True, weight * errors), (False, errors)):
        step = train_dit.flow_step(one, z, None, seeded(3), weighted=weighted)
        assert float(step["loss"]) == pytest.approx(float(expected.mean()), rel=1e-4)
        assert float(step["mse"]) == pytest.approx(float(errors.mean()), rel=1e-4)


def restarted(n):
    """Generators as they are after a time was drawn from each."""
    generators = seeded(n)
    sample_sigma(generators)
    return generators


# ---- the house: floors, and what runs by itself

FLOORS = [{"kit.files", "kit.command", "kit.media", "kit.curves", "kit.drawing", "kit.spellings"},
          {"kit.run", "kit.clips"},
          {"vae", "dora", "text", "losses", "sampler"}, {"dit", "merge"},
          {"kit.data", "kit.scale", "kit.memory", "kit.result", "kit.score", "kit.lpips", "kit.view", "kit.export"},
          {"kit.batches", "kit.evaluate", "kit.request"},
          {"train_vae", "train_dit", "generate",
           "kit.pretrain", "kit.adapter", "kit.bench", "kit.ablate", "kit.pictures", "kit.mutants",
           "kit.walk"}]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_only_go_down():
    """From each floor to lower ones, or sideways without a circle; the method takes of kit only files; no script
    imports another."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    files = {file.stem: file for file in ROOT.glob("*.py")}
    files |= {f"kit.{file.stem}": file for file in ROOT.glob("kit/*.py")}
    files = {name: file for name, file in files.items() if "test" not in name and "__init__" not in name}
    assert files.keys() == floor.keys()
    ours = {name: {other for other in imports(file) if other in floor} - {name} for name, file in files.items()}
    for name, others in ours.items():
        assert all(floor[other] <= floor[name] for other in others), (name, others)
        if floor[name] in (2, 3):
            assert {other for other in others if other.startswith("kit")} <= {"kit.files"}, (name, others)
        if floor[name] == 6:
            assert all(floor[other] < 6 for other in others), (name, others)
    TopologicalSorter(ours).prepare()           # raises at a circle


def test_every_file_of_the_method_runs_by_itself(tmp_path):
    leaves = ("vae", "merge", "dit", "text", "dora", "losses", "sampler")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = {name: subprocess.Popen([sys.executable, ROOT / f"{name}.py"], cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in leaves}
    for name, run in runs.items():
        said, errors = run.communicate(timeout=60)
        assert run.returncode == 0 and said, (name, errors)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["vae.py", "--help"])
        show_help("shown")


# ---- the embedded model: below the scores in the report, far above chance


def test_embedded_model_shows_what_unseen_prompts_say(tmp_path):
    """Wrong weights and swapped decoders fail here."""
    evaluate.main(["dit", "--prompts", "12", "--brief", "--steps", "--out", str(tmp_path)])
    scores = json.loads((tmp_path / "eval.json").read_text())["scores"]["4"]
    for name, least in dict(color=9, corners=10, material=10, motion=10, shape=6).items():
        assert scores[name] > (least - 0.5) / 12, name


@torch.no_grad()
def test_the_ellipse_moves_the_object_of_the_embedded_model():
    said, contexts = read_section(TINY), load_text_encoder(TINY)(["a red heart", "a glowing blue star"])
    dit, rgba = load_dit(TINY, [(TINY / "t2v.safetensors", 1.0)]), load_rgba_vae(find_vae(TINY), find_adapter(TINY))
    for axis, left, right in (0, (0.3, 0.5), (0.7, 0.5)), (1, (0.5, 0.3), (0.5, 0.7)):
        masks = torch.stack([ellipse_mask(17, 64, 64, [(0, *place, 0.22, 0.22, 0)]) for place in (left, right)])
        for seed in range(2):
            clips = evaluate.sample(dit, rgba, contexts, masks, said["mean"], said["shift"], seed=seed)
            one, two = (evaluate.centres(alpha)[:, axis].mean() for _, alpha in clips)
            assert one < 0.42 and two > 0.58, (axis, one, two)


def test_embedded_autoencoder_keeps_colour_and_alpha(tmp_path):
    clip = procedural_clip(3, 64, 9, "test", material="solid", motion="growing", two=0)
    write_rgba(tmp_path / "data/red ball.webp", clip.rgb, clip.alpha)
    evaluate.main(["vae", str(tmp_path / "data"), "--frames", "9", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "eval.json").read_text())
    scores = record["clips"]["clips"]["red ball.webp"]
    assert json.loads((tmp_path / "eval.jsonl").read_text()) == dict(clip="red ball.webp") | scores
    assert scores == record["clips"]["mean"] and record["cells"]["opaque"] < record["cells"]["transparent"]
    for name in ("soft render", "alpha"):
        assert 25 < scores[name]["psnr"] < 60 and 0.9 < scores[name]["ssim"] < 1
    target, result = (read_rgba(tmp_path / f"eval/red ball-{kind}.webp") for kind in ("target", "result"))
    assert np.array_equal(target[1], clip.alpha) and scores == compare_clips(*target, *result)


# ---- the README

README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = {           # how a command of the README begins -> flags that make it take seconds, and a word that it prints
    'generate.py "a red': ("", "out/a-red-glass-ball-bouncing-0"), "-m kit.clips": ("", ""),
    "-m kit.data": ("", "transparent pixels"), "train_vae.py": ("--schedule 2:1:32:2", "held out: soft render"),
    "train_dit.py": ("--steps 2 --batch 2 --frames 5", "steps 2,"), 'generate.py "cherries': ("", "out/cherries")}


def test_files_and_functions_of_the_readme_are_there():
    rows = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("| ")]
    files = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[0])]
    functions = [name for row in rows if len(row) == 2 for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", row[1])]
    assert len(files) > 20 and len(functions) > 20
    assert [name for name in files if not (ROOT / name).is_file()] == []
    for module, *path in (name.split(".") for name in functions):
        found = importlib.import_module(module)
        for name in path:
            found = getattr(found, name)


def test_commands_of_the_readme_do_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)             # clips/, runs/ and out/ are made there
    (tmp_path / "tiny").symlink_to(TINY)
    sprite = procedural_clip(3, 64, 1, radius=(0.4, 0.4), two=0)
    write_rgba(tmp_path / "pictures/cherries.png", sprite.rgb, sprite.alpha)
    commands = re.findall(r"^    python (.+)$", README, re.M)
    for start, (flags, word) in QUICK.items():
        command, = [command for command in commands if command.startswith(start)]
        argv = shlex.split(command.removeprefix("-m "), comments=True) + flags.split()
        module = importlib.import_module(argv[0].removesuffix(".py"))
        assert run_command(lambda: module.main(argv[1:]), argv[0]) == 0, command
        assert word in capsys.readouterr().out, command


# ---- what is not the method

from kit.test_kit import *       # noqa: E402, F401, F403
