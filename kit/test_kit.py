"""Tests of what is not the method: wrong input, media, data sets, resume, processes, memory. test_all.py takes them in.

`official` holds what the official code (commit 5804410) returned for small models, whose weights `named` rebuilds from
their names.
"""
import base64
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import accumulate, count, product
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import dora
import generate
import sampler
import train_dit
import train_vae
from dit import Block, DiTConfig, load_dit, open_dit, WAN_14B, WAN_1_3B, WanDiT
from dora import adapter_state, add_dora, add_lora, load_adapter_state, merge_adapter
from kit import (ablate, adapter, batches, bench, clips, curves, data, evaluate, export, lpips, memory, pictures,
                 pretrain, request, result, run, scale, score, spellings, view, walk)
from kit.clips import (BACKGROUNDS, caption_of, COLORS, draw_wording, held_out, MATERIALS, MOTIONS, procedural_clip,
                       SENTENCES, SHAPES)
from kit import command as command_line
from kit.command import Parser, run_command
from kit.data import open_data, RGBADataset
from kit.files import cache_key, Checkpoint, file_key, read_checkpoint, read_json, save_json, save_tensors
from kit.media import (area_size, bleed, checkerboard, contact_sheet, cover, heat, over, read_pair, read_rgba, to_clip,
                       write_rgba)
from kit.run import load_batches, Run, sample_generator, shares
from kit.score import (chance_of, compare_clips, masked_mean, named_color, named_motion, named_shape, psnr, score_by,
                       score_clip, score_table, shares_of, silhouette, ssim_map)
from losses import tabd_mask, VGG
from merge import FeatureMerge, load_rgba_vae, RGBAVAE
from sampler import (ellipse_mask, euler, gaussian_mask, guide, load_mask, mask_from_alpha, shift_noise, shifted_sigmas,
                     unipc)
from text import load_text_encoder, make_tokenizer, T5Config, UMT5
from vae import VAEConfig, WanVAE

os.environ.setdefault("OMP_NUM_THREADS", "1")       # small models; and nothing else on the machine slows them down
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
ROOT = Path(__file__).parent.parent
official = load_file(ROOT / "assets/official.safetensors")

# ---- what all tests share


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


def refuses(call, *words, errors=(ValueError, OSError)):
    """call() ends with one sentence that holds these words; returns it. SystemExit(text) of a command counts too."""
    with pytest.raises(errors) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and all(str(word) in sentence for word in words), (words, sentence)
    return sentence


def fails(capsys, command, *argv, words=()):
    """`command(argv)`, a run_command-style entry (returns the exit code), ends with 2 and one sentence on stderr."""
    code = command([str(a) for a in argv])
    err = capsys.readouterr().err
    assert code == 2 and err.strip().count("\n") == 0 and all(str(word) in err for word in words), (argv, words, err)
    return err


DIT_TINY = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=16)      # of the parity file
TEXT_TINY = T5Config(vocab=64, dim=32, dim_attn=48, dim_ffn=80, num_heads=4, num_layers=3, num_buckets=32)
CAPTIONS = ["A red glass ball moving from left to right.", "A semi-transparent blue ghost, moving from right to left."]
TEXT_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors", "Wan2.1_VAE.safetensors"
DIT_FILE, DORA_FILE = "diffusion_pytorch_model.safetensors", "t2v.safetensors"
VAE_ADAPTER = "Wan-Alpha-v2-VAE.safetensors"
BASE_FILES = ("config.json", "google/umt5-xxl/tokenizer.json", TEXT_FILE, DIT_FILE, VAE_FILE, VAE_ADAPTER, DORA_FILE)


def write_base(folder, config=DIT_TINY, generate=None):
    """The factory of small checkpoint folders: laid out like tiny/, random weights that all have a say."""
    folder = Path(folder)
    torch.manual_seed(0)
    (folder / "google/umt5-xxl").mkdir(parents=True)
    make_tokenizer(CAPTIONS).save(str(folder / "google/umt5-xxl/tokenizer.json"))
    save_file(UMT5(T5Config(64, config.text_dim, 32, 64, 2, 2, 32)).state_dict(), folder / TEXT_FILE)
    vae = WanVAE(VAEConfig(dim=8, num_res_blocks=1))
    vae.init_weights()
    save_file(vae.state_dict(), folder / VAE_FILE, dict(mean=json.dumps([0.1] * 16), std=json.dumps([0.9] * 16)))
    rgba, dit = RGBAVAE(vae, FeatureMerge(64, 16, 32)).add_adapters(rank=4), WanDiT(config)
    nn.init.normal_(dit.head.head.weight, std=0.2)
    save_file(dit.state_dict(), folder / DIT_FILE)
    add_dora(dit, 4, 4, targets=r".*_attn\.[qkvo]|.*\.ffn\.[02]")
    for name, parameter in [*rgba.named_parameters(), *dit.named_parameters()]:
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    save_file(rgba.adapter_state(), folder / VAE_ADAPTER)
    save_file(adapter_state(dit), folder / DORA_FILE)
    section = dict(size=[48, 32], frames=5, fps=8, steps=2, vae_adapter=VAE_ADAPTER, dora=DORA_FILE)
    (folder / "config.json").write_text(json.dumps(asdict(config) | dict(generate=generate or section)))
    return folder


@cache
def kept():
    """A folder for all tests; it goes when the process ends."""
    return tempfile.TemporaryDirectory()


@cache
def base():
    """One such folder, for all tests that only read it."""
    return write_base(Path(kept().name) / "base", DiTConfig(48, 96, 2, 2, text_dim=32, text_len=32))


def launch(folder, code, *arguments, count=2):
    """Runs `code` in `count` processes joined by gloo, as torchrun would start them."""
    file = Path(folder) / "launched.py"
    file.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                                    OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    jobs = [subprocess.Popen([sys.executable, file, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
                             env=environment | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(count)]
    for job in jobs:
        _, errors = job.communicate(timeout=170)
        assert job.returncode == 0, errors


# ---- the small models of the parity file, and their files


def filled(module, prefix=""):
    module.load_state_dict(named_like(module, prefix))
    return module.eval().requires_grad_(False)


def tiny_vae():
    return filled(WanVAE(VAEConfig(dim=8)))


def tiny_dit():
    return filled(WanDiT(DIT_TINY))


def tiny_rgba(vae):
    return RGBAVAE(vae, filled(FeatureMerge(64, 16, 32), "middle."))


def official_adapter(vae, rank=4):
    """The merge block and both LoRAs of the parity file, in the layout of *-VAE.bin."""
    state = tiny_rgba(vae).add_adapters(rank).adapter_state()
    return {k: named(k, v.shape) * (3 if ".lora_B." in k else 1) for k, v in state.items()}


@cache
def rgba_files():
    """They as files: base, *-VAE.bin, decoder.bin."""
    folder, adapter = Path(tempfile.mkdtemp(dir=kept().name)), official_adapter(tiny_vae())
    files = {"Wan2.1_VAE.pth": tiny_vae().state_dict(), "VAE.bin": adapter,
             "decoder.bin": {k: v for k, v in adapter.items() if not k.startswith("middle")}}
    for name, state in files.items():
        torch.save(state, folder / name)
    return [folder / name for name in files]


def smooth_video(key, shape):
    """The parity file's video inputs: its rule for weights, smoothed and bounded."""
    return torch.tanh(F.avg_pool3d(3 * named(key, shape), (1, 5, 5), 1, (0, 2, 2)))


def official_videos():
    rgb, alpha = (smooth_video(f"vae_tiny.{name}", (1, c, 9, 32, 48)) for name, c in (("rgb", 3), ("alpha", 1)))
    return rgb, alpha.repeat(1, 3, 1, 1, 1)


def dit_inputs():
    return named("dit_tiny.z", (16, 3, 4, 6))[None], torch.tensor([750.0]), named("dit_tiny.context", (7, 32))[None]


def dit_folder(folder, state=None, shards=1):
    """A checkpoint folder of the tiny model: config.json and one file, or shards and their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel"} | asdict(DIT_TINY)))
    state, names = state or tiny_dit().state_dict(), [DIT_FILE]
    if shards > 1:
        names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {key: names[i % shards] for i, key in enumerate(state)}
        (folder / f"{DIT_FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for i, name in enumerate(names):
        save_file({key: state[key] for key in list(state)[i::shards]}, folder / name)
    return folder


def dora_file():
    """Under the names that `adapter_state` gives: from others come other values."""
    state = adapter_state(add_dora(tiny_dit(), 4, 4, r"blocks\..*"))
    return {name: named(name, tensor.shape) for name, tensor in state.items()}


def lightx2v_file():
    adapter = {}
    for name, weight in tiny_dit().blocks.state_dict(prefix="blocks.").items():
        layer = "diffusion_model." + name.rpartition(".")[0]
        if weight.ndim == 2:
            adapter[f"{layer}.lora_down.weight"] = named(f"{layer}.lora_down.weight", (3, weight.shape[1]))
            adapter[f"{layer}.lora_up.weight"] = 0.5 * named(f"{layer}.lora_up.weight", (weight.shape[0], 3))
            adapter[f"{layer}.diff_b"] = named(f"{layer}.bias", weight.shape[:1])
        elif "norm" in name and name.endswith("weight"):
            adapter[f"{layer}.diff"] = 0.05 * named(f"{layer}.diff", weight.shape)
    return adapter


def block_adapters(folder):
    save_file(dora_file(), folder / "dora.safetensors")
    save_file(lightx2v_file(), folder / "distill.safetensors")
    return (folder / "dora.safetensors", 1.0), (folder / "distill.safetensors", 1.0)


def far(a, b, tol=1e-2):
    assert (a - b).abs().max() > tol * b.std()


def same(state, expected):
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def command_of(module):
    return lambda argv: run_command(lambda: module.main(argv), module.__name__)


def grey(alpha):
    return np.repeat(alpha[..., None], 3, -1)


def same_bytes(one, other):
    return all(map(np.array_equal, one, other))


def content_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_objects_stay_inside_the_frame_and_a_second_one_is_named_and_drawn():
    for seed in range(40):
        size = (64, (48, 80), (80, 48), 96)[seed % 4]
        alpha = procedural_clip(seed, size=size, frames=9, two=0.5).alpha
        assert max(alpha[:, 0].max(), alpha[:, -1].max(), alpha[:, :, 0].max(), alpha[:, :, -1].max()) == 0, seed
        assert alpha.max(axis=(1, 2)).min() > 25
    pair, lone = (procedural_clip(3, two=two, material="solid", motion="moving from left to right") for two in (1, 0))
    a = pair.attributes
    assert a["second_shape"] != a["shape"] and a["second_color"] != a["color"] and "small" not in lone.caption
    assert f"small {a['second_color']} {a['second_shape']}" in pair.caption
    assert (pair.alpha >= lone.alpha).all() and pair.alpha.sum(dtype=int) > 1.05 * lone.alpha.sum(dtype=int)


def test_held_out_combinations_are_kept_apart():
    assert held_out("leaf", "white", "smoke", "rising") and not held_out("ball", "red", "glass", "bouncing")
    assert 0.1 < np.mean([held_out(**attributes) for attributes in clips.COMBINATIONS]) < 0.15
    for split in ("train", "test"):
        found = [procedural_clip(seed, 16, 1, split, wander=0).attributes for seed in range(80)]
        assert {held_out(*(a[k] for k in ("shape", "color", "material", "motion"))) for a in found} == {split == "test"}
        assert len({a["shape"] for a in found}) == 8 and len({a["motion"] for a in found}) == 8
    refuses(lambda: procedural_clip(0, shape="red", color="red", material="glass", motion="rising"), "pin other")


def test_captions_name_shape_colour_material_motion_and_mostly_transparency():
    attributes = dict(shape="ball", color="red", material="glass", motion="bouncing")
    assert caption_of(attributes, dict(frame=1)) == ("This video has a transparent background. Close-up shot. "
                                                     "A red glass ball bouncing. Realistic style.")
    second = dict(color="orange", second=True, second_color="blue", second_shape="cube")
    assert caption_of(attributes | second) == "an orange glass ball bouncing beside a small blue cube"
    assert caption_of(attributes | dict(motion=None)) == "a red glass ball"
    rng = np.random.default_rng(0)
    wordings = [draw_wording(rng) for _ in range(300)]
    for material, name in dict(solid="", glass="glass", glow="glowing", smoke="smok", bubble="soap bubble").items():
        texts = [caption_of(attributes | dict(material=material), wording).lower() for wording in wordings]
        assert all(word in text for text in texts for word in ("ball", "red", name))
        assert all("bounc" in text or "jumps up and down" in text for text in texts) and len({*texts}) > 100
        assert 0.5 < np.mean(["transparent background" in text for text in texts]) < 0.7
    unseen = {caption_of(attributes, dict(sentence=i), sentences=clips.UNSEEN_SENTENCES) for i in range(3)}
    known = {caption_of(attributes, dict(sentence=i, verb=j)) for i in range(len(SENTENCES)) for j in range(2)}
    assert len(unseen) == 3 and not unseen & known


def test_objects_are_anywhere_of_any_size_and_some_go_their_own_way():
    made = [procedural_clip(seed, 32, 5, two=0) for seed in range(150)]
    places = np.array([evaluate.centres(clip.alpha).mean(0) for clip in made])
    assert (places.min(0) < 0.3).all() and (places.max(0) > 0.7).all() and (np.abs(places.mean(0) - 0.5) < 0.05).all()
    areas = np.array([(clip.alpha > 25).mean() for clip in made])
    assert np.quantile(areas, 0.9) > 2.5 * np.quantile(areas, 0.1)
    own = [clip for clip in made if clip.attributes["motion"] is None]
    assert 0.05 < len(own) / len(made) < 0.25
    assert all(motion not in clip.caption for clip in own for motion in MOTIONS)
    reach = [np.ptp(evaluate.centres(clip.alpha), axis=0).max() for clip in own]
    assert np.median(reach) > 0.1


def test_what_is_hidden_is_a_scene_and_a_scene_is_opaque():
    kinds, flat = set(), 0
    for seed in range(40):
        clip = procedural_clip(seed, 32, 5)
        flat += clip.rgb[clip.alpha == 0].std(0).max() < 1
        shown = clips.in_scene(seed, clip)
        assert shown.alpha.min() == 255 and "transparent" not in shown.caption
        assert "background" not in clip.caption or f"{shown.attributes['background']} background" in shown.caption
        opaque = clip.alpha == 255
        assert np.array_equal(shown.rgb[opaque], clip.rgb[opaque])
        kinds.add(shown.attributes["background"])
    assert kinds == {*BACKGROUNDS} and 2 <= flat <= 16                        # plain backgrounds, one in five


def test_bleeding_is_an_option_of_the_data_set(tmp_path):
    clip = procedural_clip(5, 32, 5, material="solid", two=0)
    write_rgba(tmp_path / "a.webp", *clip[:2])
    for size in (32, 16):
        bled, stored = (RGBADataset(tmp_path, size, 5, bled=bled).clip(0) for bled in (True, False))
        hidden = stored[1] == 0
        assert np.array_equal(bled[1], stored[1]) and np.array_equal(bled[0][~hidden], stored[0][~hidden])
        assert np.abs(bled[0].astype(int) - stored[0])[hidden].mean() > 10
    assert np.array_equal(RGBADataset(tmp_path, 32, 5, bled=False).clip(0)[0], clip.rgb)
    parts = [batches.crop(*clip[:2], 5, 16, 32, (0, 0, 0.5, 0.5), bled)[0] for bled in (True, False)]
    assert not np.array_equal(*parts)


def test_the_clips_command_is_reproducible_and_reads_back(tmp_path, capsys):
    arguments = ["--clips", "2", "--size", "32", "--frames", "5"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        clips.main([str(tmp_path / name), *arguments, f"--seed={seed}"])
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b") != content_of(tmp_path / "c")
    for i, line in enumerate(map(json.loads, (tmp_path / "a/metadata.jsonl").read_text().splitlines())):
        clip, item = procedural_clip(line["seed"], size=32, frames=5), RGBADataset(tmp_path / "a", 32, 5)[i]
        assert same_bytes(read_rgba(tmp_path / "a" / line["file"]), clip[:2])
        assert item["caption"] == line["caption"] == clip.caption and line["shape"] == clip.attributes["shape"]
    capsys.readouterr()
    fails(capsys, command_of(clips), tmp_path / "a", *arguments, "--seed=1", words=["choose another folder"])


def test_sprites_move_and_keep_their_name(tmp_path):
    y, x = np.mgrid[:40, :60]
    alpha = np.where(np.hypot((x - 30) / 25, (y - 20) / 15) < 1, 255, 0).astype(np.uint8)[None]
    rgb = np.stack([np.where(alpha, colour, 0) for colour in (200, 100, 0)], -1).astype(np.uint8)
    for name, matte in {"rubber_duck.png": alpha, ".hidden/other.png": alpha, "opaque.png": None}.items():
        write_rgba(tmp_path / "in" / name, rgb, matte)
    clips.main(f"{tmp_path}/out --sprites {tmp_path}/in --clips 6 --size 48 --frames 5".split())
    for line in map(json.loads, (tmp_path / "out/metadata.jsonl").read_text().splitlines()):
        rgb, alpha = read_rgba(tmp_path / "out" / line["file"])
        assert "rubber duck" in line["caption"].lower()
        assert any(form in line["caption"].lower() for form in (line["motion"], *MOTIONS[line["motion"]]))
        assert (np.abs(np.diff(alpha.astype(int), axis=0)).max((1, 2)) > 100).all()
        assert np.abs(rgb[alpha > 20].astype(int) - (200, 100, 0)).max() <= 8                 # no dark fringe


@pytest.mark.parametrize("arguments, word", [
    ("x --size=60", "16"), ("x --frames=16", "4k+1"), ("x --clips=0", "--clips"), ("x --seed=-1", "--seed"),
    ("file/x", "cannot write"), ("opaque", "other files"), ("x --sprites=opaque", "transparency"),
    ("x --sprites=nowhere", "nowhere")])
def test_wrong_arguments_exit_with_2_and_a_sentence(arguments, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    write_rgba("opaque/a.png", np.zeros((1, 8, 8, 3), np.uint8))
    fails(capsys, command_of(clips), *arguments.split(), words=[word])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["clip.apng", "clip.png", "clip.webp", "clip.zip", "folder"])
def test_lossless_media_return_every_byte(tmp_path, name):
    clip = procedural_clip(1, size=(31, 33), frames=6, material="smoke", two=0)
    pairs = [0, 0, 1, 1, 2, 2]                                            # equal frames must not be merged
    rgb, alpha = clip.rgb[pairs], clip.alpha[pairs]
    assert (rgb[alpha == 0] > 0).any()                                    # colour under alpha 0 must not be dropped
    written = []
    for n in (6, 4, 4):                                                   # overwriting leaves nothing behind
        write_rgba(tmp_path / name, rgb[:n], alpha[:n])
        written.append(content_of(tmp_path))
        assert same_bytes(read_rgba(tmp_path / name), (rgb[:n], alpha[:n]))
    assert written[1] == written[2]


@pytest.mark.parametrize("name", ["12:30/a.webm", "pipe:1.mp4", "http:x.mov", "-out/a.mp4"])
def test_no_name_of_a_video_is_a_protocol_or_a_flag(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rgba(name, procedural_clip(2, size=32, frames=5).rgb)
    assert read_rgba(name)[0].shape == (5, 32, 32, 3) and Path(name).stat().st_size > 100


@pytest.mark.parametrize("name", ["clip.webm", "clip.mov"])
def test_videos_return_alpha_and_straight_colour(tmp_path, name):
    clip = procedural_clip(2, size=(64, 61), frames=5, shape="cube", color="green", material="glass", motion="growing")
    write_rgba(tmp_path / name, *clip[:2])
    rgb, alpha = read_rgba(tmp_path / name)
    assert rgb.shape == clip.rgb.shape and [p.name for p in tmp_path.iterdir()] == [name]
    assert np.abs(alpha.astype(float) - clip.alpha).mean() < 1
    half = (clip.alpha > 70) & (clip.alpha < 180)                         # premultiplied colour would be half as bright
    assert np.abs(rgb[half].mean(0) - clip.rgb[half].mean(0)).max() < 6
    assert np.abs(rgb[half].astype(float) - clip.rgb[half]).mean() < 12


class Browser:
    """A page in headless Chromium, spoken to through two pipes in its own protocol: JSON, each message ended by 0."""

    def __init__(self, page, width=800, height=600):
        (read, self.asks), (self.hears, write) = os.pipe(), os.pipe()
        flags = f"--headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size={width},{height}"
        command = f"exec chromium {flags} --user-data-dir={page}.profile --remote-debugging-pipe 3<&{read} 4>&{write}"
        self.process = subprocess.Popen(["bash", "-c", command], stderr=subprocess.DEVNULL, pass_fds=(read, write))
        os.close(read), os.close(write)
        self.number, self.left, self.session = count(1), b"", {}
        target = self.ask("Target.createTarget", url=page.as_uri())["targetId"]
        self.session = dict(sessionId=self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        while self.run("location.href + document.readyState") != page.as_uri() + "complete":
            time.sleep(0.02)

    def ask(self, method, **params):
        number = next(self.number)
        os.write(self.asks, json.dumps(dict(id=number, method=method, params=params) | self.session).encode() + b"\0")
        while True:
            while b"\0" not in self.left:
                if not select.select([self.hears], [], [], 60)[0] or not (said := os.read(self.hears, 1 << 20)):
                    raise TimeoutError("chromium does not answer")
                self.left += said
            said, _, self.left = self.left.partition(b"\0")
            answer = json.loads(said)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, expression):
        """Its value; of a promise what it promises."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, words):
        """With the mouse, in the middle of the button that has these words."""
        button = f"[...document.querySelectorAll('button')].find(button => button.textContent == {words!r})"
        box = self.run(f"JSON.parse(JSON.stringify({button}.getBoundingClientRect()))")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1,
                     x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2)

    def see(self):
        """What it shows: uint8 (h, w, 3)."""
        shown = base64.b64decode(self.ask("Page.captureScreenshot")["data"])
        return np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"))


@contextmanager
def browser(page, *size):
    try:
        opened = Browser(page, *size)
    except (TimeoutError, BrokenPipeError):
        pytest.skip("chromium does not start here")
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.asks), os.close(opened.hears)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
def test_a_browser_shows_the_colours_and_the_alpha_of_the_frames(tmp_path):
    clip, colors = procedural_clip(2, frames=5, two=0, material="glass", color="red"), ("#f00", "#0f0", "#00f")
    opaque = over(clip.rgb, clip.alpha, [226] * 3)
    for name, pair in {"a.webm": clip[:2], "frames": clip[:2], "b.mp4": (opaque,)}.items():
        write_rgba(tmp_path / name, *pair)
    shown = '<video muted preload=auto src=a.webm></video><img src=frames/0000.png><video muted src=b.mp4></video>'
    rows = [f'<div style="background:{color};height:64px;font-size:0">{shown}</div>' for color in colors]
    (tmp_path / "page.html").write_text(f'<body style="margin:0">{"".join(rows)}')
    with browser(tmp_path / "page.html") as page:
        page.run("Promise.all([...document.querySelectorAll('video')].map(v => v.readyState > 1 || "
                 "new Promise(done => v.onloadeddata = done)))")
        seen = page.see()[:192, :192].reshape(3, 64, 3, 64, 3).swapaxes(1, 2) / 1.0
    for k, (webm, png, mp4) in enumerate(seen):
        expected = over(clip.rgb[:1], clip.alpha[:1], 255 * np.eye(3)[k])[0]
        assert np.abs(png - expected).max() <= 1 and np.abs(webm - expected).mean() <= 1
        assert np.abs(mp4 - opaque[0]).mean() <= 3


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
def test_a_page_of_clips_draws_as_we_do_and_obeys_its_buttons(tmp_path):
    asked = dict(prompt="</script> a star", size=[64, 64], frames=5, fps=8, steps=4, mean=1, mask="0.25,0.5,0.2,0.1")
    shown = [procedural_clip(i, frames=5, two=0, material="glass") for i in (2, 3)]
    for name, clip in zip("ab", shown):
        write_rgba(tmp_path / name / "frames", *clip[:2])
        save_json(tmp_path / name / "run.json", dict(arguments=asked, seed=1, stages=dict(text=dict(seconds=0.5))))
    view.main([str(tmp_path / "a"), str(tmp_path / "b"), "--page", str(tmp_path / "index.html")])
    with browser(tmp_path / "index.html", 1300, 700) as page:
        page.run("Promise.all(clips.flatMap(clip => clip.images.map(image => image.decode())))")
        page.click("pause")
        page.run("$('zoom').value = 1, state.frame = 0, draw()")
        words = page.run("document.querySelector('main').textContent")
        assert "</script> a star" in words and "seed 1" in words and "0.5 s" in words

        def canvases():
            boxes = page.run("clips.map(clip => { const b = clip.canvas.getBoundingClientRect(); return [b.x, b.y] })")
            return [page.see()[round(y):round(y) + 64, round(x):round(x) + 64].astype(int) for x, y in boxes]
        for button, behind in ("black", 0), ("white", 255), ("checker", checkerboard(64, 64)):
            page.click(button)
            for seen, clip in zip(canvases(), shown):
                assert np.abs(seen - over(clip.rgb[:1], clip.alpha[:1], behind)[0]).max() <= 2, button
        page.click("\u203a")
        page.click("alpha")
        for seen, clip in zip(canvases(), shown):
            assert np.abs(seen - grey(clip.alpha[1])).max() <= 1
        page.run("$('gain').value = 2, draw()")
        assert np.abs(canvases()[0] - np.minimum(2 * grey(shown[0].alpha[1]).astype(int), 255)).max() <= 2
        page.click("colour")
        for seen, clip in zip(canvases(), shown):
            assert np.abs(seen - clip.rgb[1])[clip.alpha[1] > 40].max() <= 8
        page.click("alpha")
        page.run("$('ellipse').checked = true, draw()")
        y, x = np.nonzero((canvases()[0][..., 1] < 60) & (canvases()[0][..., 0] > 120))
        assert abs(x.mean() - 16) < 1.5 and abs(y.mean() - 32) < 1.5 and np.ptp(x) > 1.5 * np.ptp(y)
    (tmp_path / "a/index.html").write_text("mine")
    refuses(lambda: view.main([str(tmp_path / "a")]), "index.html", "--page")
    (tmp_path / "b/run.json").write_text("{}")
    refuses(lambda: view.main([str(tmp_path / "b")]), "no clip of generate.py")


def test_a_clip_is_exported_as_others_read_it(tmp_path, capsys):
    clip = procedural_clip(4, frames=5, two=0, material="glass")
    write_rgba(tmp_path / "frames", *clip[:2])
    save_json(tmp_path / "run.json", dict(arguments=dict(fps=20)))
    export.main([str(tmp_path), *export.KINDS, "--trim"])
    assert sorted(Path(line).name for line in capsys.readouterr().out.split()) == [
        "premultiplied", "premultiplied.mov", "rgba.apng", "sprites.json", "sprites.png"]
    x, y, w, h = export.object_box(clip.alpha)
    inside = np.s_[:, y:y + h, x:x + w]
    assert not (np.delete(clip.alpha, np.s_[y:y + h], 1) > 3).any() and h < 64 > w and h % 2 == w % 2 == 0
    assert (clip.alpha[inside] > 3).any((0, 2))[[0, -2]].all() and (clip.alpha[inside] > 3).any((0, 1))[[0, -2]].all()
    assert same_bytes(read_rgba(tmp_path / "rgba.apng"), (clip.rgb[inside], clip.alpha[inside]))
    sheet, told = Image.open(tmp_path / "sprites.png"), read_json(tmp_path / "sprites.json")
    assert told["meta"]["size"] == dict(w=sheet.size[0], h=sheet.size[1]) and len(told["frames"]) == 5
    for i, frame in enumerate(told["frames"].values()):
        fx, fy, fw, fh = frame["frame"].values()
        assert np.array_equal(np.asarray(sheet)[fy:fy + fh, fx:fx + fw, 3], clip.alpha[inside][i])
        assert frame["spriteSourceSize"] == dict(x=x, y=y, w=w, h=h) and frame["duration"] == 50
    seen = read_rgba(tmp_path / "premultiplied")[0]
    assert np.array_equal(seen, over(clip.rgb, clip.alpha, 0)[inside])
    assert np.abs(read_rgba(tmp_path / "premultiplied.mov")[0].astype(int) - seen).mean() < 3
    assert export.object_box(np.zeros((2, 8, 6))) == (0, 0, 6, 8)
    refuses(lambda: export.main([str(tmp_path / "frames"), "apng"]), "no clip")
    folder, = make(tmp_path / "out", "ball", "--also", "sheet", "--trim", "--fps", 4, *SHORT)
    assert read_json(folder / "sprites.json")["frames"]["0000.png"]["duration"] == 250


def test_the_walk_names_functions_and_tests_that_are_there_and_shows_every_picture(tmp_path, capsys):
    walk.main(["a <red> ball", "--base", str(base()), "--out", str(tmp_path), "--steps", "2"])
    page = (tmp_path / "walk.html").read_text(encoding="utf-8")
    assert "a &lt;red&gt; ball" in page and "{" not in page.partition("</style>")[2] and len(page) < 8e6
    assert page.count("<img") == 13 + 2 and page.count("test_all.py:") == 8 == page.count('class="ask"')
    for file, line in re.findall(r"\(([\w/]+\.py):(\d+)\)", page):
        assert re.match(r"\s*(@|def |class )", (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1])
    if shutil.which("chromium"):
        with browser(tmp_path / "walk.html") as shown:
            assert shown.run("[...document.images].every(image => image.naturalWidth > 30)")


@pytest.mark.parametrize("ending", ["mp4", "mov", "webm"])
def test_videos_carry_all_four_colour_tags(ending, tmp_path):
    write_rgba(tmp_path / f"a.{ending}", np.full((5, 32, 32, 3), (200, 40, 40), np.uint8))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", tmp_path / f"a.{ending}"]
    assert "(tv, bt709, progressive)" in subprocess.run(command, capture_output=True, text=True).stderr


def test_media_of_every_mode_rate_and_size_are_read(tmp_path):
    x = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(x.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(x).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(x).save(tmp_path / "keyed.png", transparency=7)
    for path in tmp_path.iterdir():
        alpha = np.where((x == 7) & (path.name == "keyed.png"), 0, 255)
        assert same_bytes(read_rgba(path), (grey(x[None]), alpha[None])), path
    for times, shown in (([40, 80, 40, 120], [0, 1, 1, 2, 3, 3, 3]), ([33, 33, 34, 33], [0, 1, 2, 3])):
        first, *others = (Image.fromarray(np.roll(x, i)) for i in range(4))
        first.save(tmp_path / "a.png", save_all=True, append_images=others, duration=times)
        assert np.array_equal(read_rgba(tmp_path / "a.png")[0][..., 0], np.stack([np.roll(x, i) for i in shown]))
    write_rgba(tmp_path / "mute.mp4", procedural_clip(2, size=(33, 47), frames=8).rgb)
    command = f"-v error -i {tmp_path}/mute.mp4 -f lavfi -i anullsrc=r=8000:cl=mono -t 3 -c:v copy -c:a aac"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *command.split(), tmp_path / "sound.mp4"], check=True)
    assert read_rgba(tmp_path / "sound.mp4")[0].shape == (8, 34, 48, 3)   # longer than its pictures


def test_wrong_media_is_one_sentence(tmp_path):
    clip = procedural_clip(4)
    for name in ("half.apng", "half.webm", "half.mov", "half.webp", "empty.png", "empty.mp4", "empty.zip"):
        write_rgba(tmp_path / name, *clip[:2])
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2 if "half" in name else 0)
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        refuses(lambda: read_rgba(path), path.name, errors=ValueError)
    refuses(lambda: read_rgba(tmp_path / "nowhere.mov"), "nowhere.mov", errors=FileNotFoundError)
    refuses(lambda: write_rgba(tmp_path / "clip.bmp", clip.rgb, clip.alpha), "unknown ending")
    refuses(lambda: write_rgba(tmp_path / "clip.mov", clip.rgb, clip.alpha[:2]), "its colour is")
    refuses(lambda: RGBADataset(tmp_path / "folder"), "holds no clip")
    refuses(lambda: RGBADataset(tmp_path / "nowhere"), "no folder", errors=FileNotFoundError)


def test_resizing_weighs_colour_by_alpha(tmp_path):
    y, x = np.mgrid[:90, :120] + 0.5
    alpha = (255 * (np.hypot(x - 60, y - 45) < 30)).astype(np.uint8)[None]
    rgb, alpha = cover(grey(np.where(alpha > 0, 240, 60).astype(np.uint8)), alpha, (32, 32))  # dark around the disc
    assert rgb.min() > 237 and rgb.max() < 243 and ((alpha > 0) & (alpha < 255)).sum() > 20   # no dark or bright edge
    assert abs((alpha / 255).sum() - np.pi * (30 * 32 / 90) ** 2) < 8      # covers: scaled by the height, middle kept
    clip = procedural_clip(3, size=(300, 700), frames=9)                  # resized in parts
    frames = [cover(clip.rgb[[i]], clip.alpha[[i]], (64, 48)) for i in range(9)]
    assert same_bytes(cover(*clip[:2], (64, 48)), map(np.concatenate, zip(*frames)))


def test_figures_show_colour_and_alpha(tmp_path, monkeypatch, capsys):
    rgb, alpha = np.full((1, 1, 3, 3), 200, np.uint8), np.array([[[0, 50, 255]]], np.uint8)
    assert over(rgb, alpha, (100, 100, 100))[0, 0, :, 0].tolist() == [100, 120, 200]
    clip, board = procedural_clip(1, size=32, frames=3, material="solid", two=0), checkerboard(32, 32)
    monkeypatch.chdir(tmp_path)
    contact_sheet("s.png", [(clip.rgb, clip.alpha)] * 2, columns=4, scale=1)
    sheet = np.asarray(Image.open("s.png"))
    assert sheet.shape == (64, 256, 3) and (board[0, 0] != board[0, 8]).all()
    assert np.array_equal(sheet[:32, 128:160, 0], clip.alpha[0])
    assert np.array_equal(sheet[:32, :32], over(clip.rgb[0], clip.alpha[0], board))
    clips.main([])
    assert Image.open("out/procedural.png").size == (2 * 6 * 128, 16 * 128) and "yellow" in capsys.readouterr().out


def test_a_folder_is_taken_as_a_lab_has_it(tmp_path):
    clip = procedural_clip(4, frames=5, two=0)
    for name, rgb in {"pairs/x.mp4": clip.rgb, "pairs/x_seg.mp4": grey(clip.alpha), "csv/fgr/a.mp4": clip.rgb,
                      "csv/fgr/a_alpha.mp4": 255 - grey(clip.alpha), "csv/pha/a.mp4": grey(clip.alpha),
                      "csv/own_mask.png": 0 * clip.rgb}.items():          # the csv says otherwise of two
        write_rgba(tmp_path / name, rgb)
    own = ["01.webp", "1.webp", "2.webm", "10.mov", "b/frames"]
    for name in (*own, ".hidden/a.png", "csv/own.apng", "csv/frames/1"):
        write_rgba(tmp_path / name, *clip[:2])
        (tmp_path / f"{name.split('.')[0]}.txt").write_text(f"caption of {name}", encoding="utf-8-sig")
    write_rgba(tmp_path / "red_still.png", clip.rgb[:1], clip.alpha[:1])
    (tmp_path / "b/frames/._0000.png").write_bytes(b"no picture")
    (tmp_path / "csv/up").symlink_to(tmp_path)                             # a link that leads back
    (tmp_path / "csv/metadata.csv").write_bytes(
        "\ufeffid,video_fgr,video_pha,prompt\r\n0,fgr/a.mp4,pha/a.mp4,\"a, b\nof a csv\"\r\n1,own.apng,,\r\n,,,\r\n"
        f"2,{(tmp_path / 'csv/frames/1').resolve()},,frames\r\n".encode())
    captions = {name: f"caption of {name}" for name in own} | {
        "csv/fgr/a.mp4": "a, b\nof a csv", "csv/frames/1": "frames", "csv/own.apng": "caption of csv/own.apng",
        "pairs/x.mp4": "x", "red_still.png": "red still"}
    samples = RGBADataset(tmp_path, size=64, frames=5)
    assert [(samples.name(i), samples.caption(i)) for i in range(len(samples))] == [*captions.items()]
    for i in range(10):
        rgb, alpha = samples.source(i)
        assert len(rgb) == (1 if i == 9 else 5) and np.abs(alpha.astype(float) - clip.alpha[:len(rgb)]).mean() < 3, i
    assert not read_rgba(tmp_path / "csv/own.apng")[1].any()              # a black matte lies beside it
    write_rgba(tmp_path / "pairs/x_seg.mp4", grey(clip.alpha[:3]))
    refuses(lambda: read_rgba(tmp_path / "pairs/x.mp4"), "x.mp4 has", "5, 64, 64", "x_seg.mp4 has", "3, 64, 64")


def test_pairs_are_found_by_their_names_and_what_has_no_alpha_is_refused(tmp_path):
    clip = procedural_clip(4, size=32, frames=5, two=0)
    for name in ("001_rgb", "b_fgr", "c"):
        write_rgba(tmp_path / f"{name}.mp4", clip.rgb)
        write_rgba(tmp_path / f"{name.partition('_')[0]}_pha.mp4", grey(clip.alpha))
    (tmp_path / "b.txt").write_text("a thing")
    found = open_data(tmp_path, 32, 5, 0)
    assert [found.name(i) for i in range(3)] == ["001_rgb.mp4", "b_fgr.mp4", "c.mp4"]
    assert [found.caption(i) for i in range(3)] == ["001", "a thing", "c"]
    assert all((found.source(i)[1] == 0).any() for i in range(3))
    for name in "defg":
        write_rgba(tmp_path / f"{name}.mp4", clip.rgb)
    refuses(lambda: open_data(tmp_path, 32, 5, 0), "4 of 7 clips", "no transparency", "d.mp4", "NAME_alpha.mp4")
    assert len(open_data(tmp_path, 32, 5, 0, opaque=True)) == 7
    write_rgba(tmp_path / "lost_alpha.mp4", grey(clip.alpha))
    refuses(lambda: data.find_samples(tmp_path), "lost_alpha.mp4", "no colour lost")


def test_pictures_of_a_folder_are_a_clip_only_if_they_look_like_one(tmp_path):
    clip = procedural_clip(4, size=32, frames=3)
    for name in ("clip/frame_01", "clip/frame_02", "words/cat", "words/dog", "sizes/1", "sizes/2"):
        n = 16 if name == "sizes/2" else 32
        write_rgba(tmp_path / f"{name}.png", clip.rgb[:1, :n, :n], clip.alpha[:1, :n, :n])
    with pytest.warns(UserWarning, match="2 pictures are taken as stills") as told:
        found = data.find_samples(tmp_path)
    assert [s.name for s in found] == ["clip", "sizes/1.png", "sizes/2.png", "words/cat.png", "words/dog.png"]
    assert len(told) == 2


def test_captions_take_turns_and_labels_stand_before_or_after(tmp_path):
    for name in "ab":
        write_rgba(tmp_path / f"{name}.png", *procedural_clip(4, size=32, frames=1)[:2])
    (tmp_path / "a.txt").write_text("one\nline more\n\n  two  \n")
    (tmp_path / "metadata.csv").write_text("video,prompt,labels\nb.png,a thing,fast\n")
    found = RGBADataset(tmp_path)
    assert [found.caption(0, variant) for variant in range(3)] == ["one\nline more", "two", "one\nline more"]
    assert {found.caption(1, variant) for variant in range(9)} == {"a thing fast", "fast a thing"}


def test_frames_of_a_clip_are_no_stills_unless_a_csv_names_them(tmp_path, capsys):
    for name in ("a/0.png", "a/1.PNG", "a/x.mp4", "a/x_pha.mp4", "a/b/c.webm"):
        write_rgba(tmp_path / name, *procedural_clip(4, frames=1)[:2])
    found = data.find_samples(tmp_path)
    mattes = [sample.matte and sample.matte.name for sample in found]
    assert [s.name for s in found] == ["a", "a/b/c.webm", "a/x.mp4"] and mattes == [None, None, "x_pha.mp4"]
    assert len(read_pair(found[0].path, None)[0]) == 2
    (tmp_path / "metadata.csv").write_text("video,alpha,prompt\na/1.PNG,,one\na/0.png,,zero\n")
    assert [s.name for s in data.find_samples(tmp_path)] == ["a/0.png", "a/1.PNG", "a/b/c.webm", "a/x.mp4"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + 38 * "a/1.PNG,x\n" + 2 * "a/x.mp4,y\n")
    assert RGBADataset(tmp_path).training == 39 and RGBADataset(tmp_path).caption(39) == "y"        # of 41; 40 and 41
    (tmp_path / "metadata.csv").write_text("video,alpha,prompt\n" + 20 * "a/0.png,,x\n" + "a/0.png,lost.mp4,y\n")
    assert len(open_data(tmp_path, 64, 1, 0)) == 22 and "lost.mp4" in capsys.readouterr().err     # of 20 and 2 others


@pytest.mark.parametrize("content, word", [
    (b"", "column of videos"), (b"sound,text\na.mp4,b\n", "column of videos"),
    (b"video;alpha;prompt\na;b;c, d\n", "column of videos"),
    (b"video,alpha,prompt\n", "lacks rows"), (b"video,alpha,prompt\n,,\n\n", "lacks rows"),
    (b"video,alpha,prompt\n,a.mp4,b\n", "lacks a video in a row"), (b"video,alpha,prompt\na,,b,c\n", "more cells"),
    ("video,alpha,prompt\na,,ä\n".encode("latin-1"), "UTF-8"), (b"video,alpha,prompt\na,," + b"b" * 200_000, "UTF-8")])
def test_a_wrong_csv_is_one_sentence(content, word, tmp_path, capsys):
    (tmp_path / "metadata.csv").write_bytes(content)
    fails(capsys, command_of(data), tmp_path, words=["metadata.csv", word])


def test_items_have_the_ranges_of_the_models(tmp_path):
    clip, way = procedural_clip(6, frames=5, material="bubble", two=0), [0, 1, 2, 3, 4, 3, 2, 1, 0]
    write_rgba(tmp_path / "red-soap_bubble.webp", *clip[:2])
    (tmp_path / "red-soap_bubble.txt").write_bytes(b" \n")
    item = RGBADataset(tmp_path, size=64, frames=9)[0]
    rgb, alpha = item["rgb"], item["alpha"]
    assert (item["name"], item["caption"]) == ("red-soap_bubble.webp", "red soap bubble")
    assert rgb.dtype == alpha.dtype == torch.float32 and -1 <= rgb.min() < -0.3 and 0.9 < rgb.max() <= 1
    assert alpha.shape == (1, 9, 64, 64) and alpha.min() == 0 and 0.5 < alpha.max() <= 1
    rgb, alpha = to_clip(rgb, alpha)
    assert same_bytes((rgb, alpha), (bleed(clip.rgb, clip.alpha)[way], clip.alpha[way]))
    assert np.array_equal(rgb[alpha > 0], clip.rgb[way][alpha > 0]) and to_clip(torch.ones(3, 1, 2, 2))[1].min() == 255


def test_decoded_files_are_kept_up_to_a_size_and_until_released(tmp_path):
    for name in "abc":
        write_rgba(tmp_path / name, *procedural_clip(1, size=32, frames=6)[:2])
    samples = RGBADataset(tmp_path, 32, 2, cache_gb=2.5 * 6 * 32 * 32 * 4 / 2 ** 30)
    for _ in range(2):
        assert [len(samples.source(i)[0]) for i in (0, 1, 2, 0)] == [6] * 4 and len(samples.kept) == 2
        assert samples.source(0)[0] is samples.source(0)[0] and samples.source(2)[0] is not samples.source(2)[0]
        assert np.shares_memory(samples.clip(0)[1], samples.source(0)[1])     # nothing changes, nothing is computed
        kept = weakref.ref(samples.source(0)[0])
        samples.release()
        assert kept() is None


def test_a_window_slides_over_a_still_and_is_drawn_from_a_clip(tmp_path):
    y, x = np.mgrid[:160, :200].astype(np.uint8)
    clip, ways = np.stack([np.stack([x, y, 0 * x + 9 * t], -1) for t in range(3)]), set()
    for name, rgb in dict(a=clip, b=clip, still=clip[:1]).items():
        write_rgba(tmp_path / name, rgb)
    samples = RGBADataset(tmp_path, size=(128, 160), frames=5)
    for variant in range(20):
        rgb, alpha = samples.clip(2, variant)
        left, top = rgb[:, 0, 0, 0].astype(int), rgb[:, 0, 0, 1].astype(int)
        assert {left[0], left[-1]} == {0, 40} and {top[0], top[-1]} == {0, 32}                # 0.8 of it, end to end
        assert (np.abs(np.diff(left)) == 10).all() and (np.abs(np.diff(top)) == 8).all()      # a straight line, even
        assert np.array_equal(rgb[2], rgb[2, :1, :1] + clip[0, :128, :160])
        assert same_bytes((rgb, alpha), samples.clip(2, variant))
        ways.add((left[0], top[0]))
    assert len(ways) == 4 and np.array_equal(RGBADataset(tmp_path, (160, 200), 1).clip(2, 1)[0], clip[:1])
    samples = RGBADataset(tmp_path, (160, 200), 5)
    found = np.stack([samples.clip(0, variant)[0] for variant in range(1, 60)]).astype(int)
    assert (found[:, :, 50, 50, 2] == [0, 9, 18, 9, 0]).all() and (np.ptp(found[..., 0], axis=1) == 0).all()
    left, widths = found[:, 0, 50, 0, 0], (found[:, 0, 50, -1, 0] - found[:, 0, 50, 0, 0] + 1) / 200
    assert 0.79 < widths.min() < 0.83 and 0.97 < widths.max() <= 1 and left.min() < 3 and left.max() > 20
    assert not same_bytes(samples.clip(0, 1), samples.clip(1, 1))         # seeded with i as well
    assert same_bytes(samples.clip(0, 1), RGBADataset(tmp_path, (160, 200), 5).clip(0, 1))
    assert RGBADataset(tmp_path, (40, 160), 2, keep_aspect=True).clip(0, 1)[1].shape == (2, 64, 96)
    shorter = RGBADataset(tmp_path, (160, 200), 1)
    assert {int(shorter.clip(0, variant)[0][0, 50, 50, 2]) for variant in range(20)} == {0, 9, 18}
    assert area_size(1080, 1920, 640 * 624) == (480, 848) and area_size(10, 9000, 64 * 64) == (16, 1920)


def test_content_is_the_bytes_and_geometry_the_rest(tmp_path):
    clip = procedural_clip(1, size=32, frames=2)
    for name, frames in {"a": 2, "b.apng": 2, "c.png": 1, "d.png": 1}.items():
        write_rgba(tmp_path / name, clip.rgb[:frames], clip.alpha[:frames])
    write_rgba(tmp_path / "a_pha", grey(clip.alpha))
    files = [tmp_path / name for name in ("a/0000.png", "a/0001.png", "a_pha/0000.png", "a_pha/0001.png")]
    samples, still = RGBADataset(tmp_path, 32, 5), RGBADataset(tmp_path, 32, 1)
    assert samples.content(0) == cache_key(*map(file_key, files))
    g = samples.geometry
    assert g(0) == g(1) and len({g(1), g(0, 1), g(1, 1), g(1, 2)}) == 4
    assert len({g(1), g(2), g(3), g(3, 1)}) == 4 and still.geometry(2) == still.geometry(3, 3)      # stills slide
    others = [RGBADataset(tmp_path, *arguments) for arguments in ((48, 5), (32, 9), (32, 5, 4.0, True), ((32, 48), 5))]
    assert len({s.geometry(0) for s in (samples, *others)}) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_are_named_and_left_out(workers, tmp_path, capsys, monkeypatch):
    clip = procedural_clip(4, size=32, frames=5)
    for i in range(27):
        write_rgba(tmp_path / f"{i}.apng", *clip[:2])
        (tmp_path / f"{i}.txt").write_text("a thing")
    write_rgba(tmp_path / "short.mp4", clip.rgb)
    write_rgba(tmp_path / "short_pha.mp4", grey(clip.alpha[:3]))
    (tmp_path / "broken.webm").write_bytes(b"no video")
    (tmp_path / "photo.jpg").write_bytes(b"a kind that is not read")
    write_rgba(tmp_path / "latin.png", clip.rgb[:1], clip.alpha[:1])
    (tmp_path / "latin.txt").write_bytes("Bällchen".encode("latin-1"))
    write_rgba(tmp_path / "wide.png", np.zeros((1, 16, 64, 3), np.uint8))
    before = content_of(tmp_path)
    assert command_of(data)([str(tmp_path), f"--workers={workers}"]) == 0 and content_of(tmp_path) == before
    lines, pixels = capsys.readouterr().out.splitlines(), np.append([clip.alpha] * 27, [255] * (16 * 64))
    assert {"0.apng: clip of 5 frames, 32x32", "broken.webm: left out", "ignored: photo.jpg",
            "wide.png: still, 64x16, opaque, no caption"} <= {*lines[:32]}
    table = {line[:36].strip(): line[36:] for line in lines[32:-3]}
    assert table.pop("no transparency at all").startswith("1  (warning")
    assert table == {"clips": "31", "captions missing": "1", "pairs of unequal length or size": "1",
                     "cannot be read": "2", "height x width (clips)": "32 x 32 (27), 16 x 64 (1)",
                     "frames: min, median, max": "1  5  5", "width / height: min, median, max": "1  1  4",
                     "transparent pixels": f"{(pixels == 0).mean():.1%}",
                     "opaque pixels": f"{(pixels == 255).mean():.1%}",
                     "semi-transparent pixels": f"{((pixels > 0) & (pixels < 255)).mean():.1%}"}
    samples, said = open_data(tmp_path, 32, 5, workers), capsys.readouterr().err.splitlines()
    rows = {row["name"]: row for row in json.loads((tmp_path / ".checked.json").read_text())}
    bad = {"broken.webm": "cannot be read", "latin.png": "UTF-8", "short.mp4": "make them equal"}
    errors = [rows[name]["error"] for name in bad]
    assert all(word in error for word, error in zip(bad.values(), errors)) and lines[-3:] == errors
    assert said[-4:] == [*(f"skipped: {error}" for error in errors), "skipped 3 of 31 clips"]
    assert len(samples) == 28 and samples.caption(26) == "a thing"
    assert samples.cache == 4 * 2 ** 30 / max(1, workers)                 # shared among the processes that read
    (tmp_path / "0.apng").write_bytes((tmp_path / "1.apng").read_bytes() + b" ")
    (tmp_path / "latin.txt").write_text("ball")
    write_rgba(tmp_path / "new.png", clip.rgb[:1], clip.alpha[:1])
    read, examine = [], data.Sample.examine
    monkeypatch.setattr(data.Sample, "examine", lambda sample: read.append(sample.name) or examine(sample))
    again = open_data(tmp_path, 32, 5, 0)
    assert read == ["0.apng", "latin.png", "new.png"] and len(again) == 30 and again.fingerprint != samples.fingerprint
    assert open_data(tmp_path, 32, 5, 0).fingerprint == again.fingerprint and len(read) == 3


def test_a_check_that_cannot_go_on_is_one_sentence(tmp_path, capsys, monkeypatch):
    for i in range(9):
        write_rgba(tmp_path / f"{i}.png", np.zeros((1, 8, 8, 3), np.uint8))
    (tmp_path / "10.webm").write_bytes(b"no video")
    (tmp_path / "0.png").write_bytes(b"")                                 # more than one in ten
    assert command_of(data)([str(tmp_path)]) == 2 and "0.png cannot be read" in capsys.readouterr().out
    refuses(lambda: open_data(tmp_path, 8, 1, 0), "2 of 10 clips", "0.png, 10.webm", "kit.data")
    monkeypatch.setattr(data, "read_pair", lambda *_: os._exit(1))        # a process that ends while reading
    refuses(lambda: RGBADataset(tmp_path).check(workers=2), "use fewer than 2 workers", errors=OSError)


def test_what_was_checked_is_read_anew_where_its_record_is_damaged(tmp_path):
    write_rgba(tmp_path / "a.png", np.zeros((1, 8, 8, 3), np.uint8))
    file, fingerprint = tmp_path / ".checked.json", open_data(tmp_path, 8, 1, 0, opaque=True).fingerprint
    rows = json.loads(file.read_text())
    wrong = [dict(name=[]), dict(bytes={}), dict(changed="x"), dict(frames="x"), dict(error=5), dict(more=1)]
    wrong = [5, None, dict(a=1), [1], [[1]], ["name"], *([rows[0] | change] for change in wrong)]
    for content in ("", "[", "[" * 99999, *map(json.dumps, wrong)):
        file.write_text(content)
        assert open_data(tmp_path, 8, 1, 0, opaque=True).fingerprint == fingerprint, content
        assert json.loads(file.read_text()) == rows


def test_crops_hold_the_object_scale_and_slide():
    alpha = np.zeros((9, 40, 60), np.uint8)
    alpha[:, 30:34, 50:54] = 255
    rgb = np.where(grey(alpha) > 0, 200, 0).astype(np.uint8)
    for u in torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).tolist():
        colour, part = batches.crop(rgb, alpha, 5, 16, 40, u)
        assert part.shape == (5, 16, 16) and (part == 255).sum() == 5 * 16 and (colour == 200).all()     # bled
        part = batches.crop(rgb, alpha, 5, 32, None, u)[1]                # scaled by 32/40 to 64/40
        assert part.shape == (5, 32, 32) and 5 * 16 * 0.5 < (part > 127).sum() < 5 * 16 * 3
    still = np.zeros((1, 40, 60), np.uint8)
    still[0, 20, 4:56] = 255
    part = batches.crop(grey(still), still, 9, 16, 40, (0, 0, 0.0, 0.99))[1]              # from left to right
    assert part.any(axis=(1, 2)).tolist() == [True] * 9 and not part[0, :, :4].any() and not part[-1, :, -4:].any()
    short = np.ones((3, 16, 16), np.uint8) * np.arange(1, 4, dtype=np.uint8)[:, None, None]
    assert batches.crop(grey(short), short, 9, 16, 16, [0.5] * 4)[1][:, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2, 1]


def test_a_sample_is_the_same_in_any_part_of_a_batch_and_never_held_out(tmp_path):
    clips.main([str(tmp_path), "--clips=40", "--size=16", "--frames=1"])
    dataset, phases = RGBADataset(tmp_path, 16, 1), [(3, 1, 16, 8), (6, 5, 24, 4)]
    assert dataset.held_out() == [38, 39] and dataset.held_out(1) == [38] and dataset.training == 38
    assert batches.parse_schedule("3:1:16:8,6:5:24:4") == phases and batches.batch_sizes(phases) == [8] * 3 + [4] * 6
    wrong = "5 1:1:16 1:1:16:1:1 0:1:16:1 1:0:16:1 1:-3:16:1 1:2:16:1 1:1:8:1 1:1:20:1 1:1:16:0 1:1:16:x 1:1:16:1,"
    for text in ("", *wrong.split()):
        refuses(lambda: batches.parse_schedule(text), "steps:frames:side:batch", errors=ValueError)
    for step, n in enumerate(batches.batch_sizes(phases)):
        def draw(part):
            return batches.draw_clips(dataset, phases, None, step, [sample_generator(0, step, i) for i in part])
        batch, parts = draw(range(n)), [draw([i]) for i in range(n)]
        assert batch["rgb"].shape == ((8, 3, 1, 16, 16) if step < 3 else (4, 3, 5, 24, 24))
        assert batch["names"] == [part["names"][0] for part in parts] and len({*batch["names"]}) > 1
        assert not {dataset.name(i) for i in dataset.held_out()} & {*batch["names"]}
        assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in ("rgb", "alpha"))
    dataset.samples = dataset.samples[:19]                                # too small to hold any out
    assert dataset.training == 19 and dataset.held_out(2) == [0, 1]


def test_latents_are_made_once_and_drawn_by_shape(tmp_path):
    shapes, made, seen = [(16, 2, 4, 4), (16, 2, 2, 6), (16, 2, 2, 6)], [], set()

    def item(i):
        z = torch.full(shapes[i], float(i))
        return f"key{i}", lambda: made.append(i) or dict(z=z, mask=z[0] + 0, context=torch.ones(i + 1, 8))
    files = batches.encoded(tmp_path / "cache", 3, item)
    os.truncate(files[1], 900)                                            # cut: made again
    assert batches.encoded(tmp_path / "cache", 3, item) == files and made == [0, 1, 2, 1]
    groups = batches.of_one_shape(files)
    assert groups == [[0], [1, 2], [1, 2]] and [batches.latent_shape(file) for file in files] == shapes
    for step in range(20):
        generators = [sample_generator(7, step, i) for i in (0, 1, 2, 3, 3)]
        batch = batches.draw_latents(files, groups, "abc", 7, step, generators[:4])
        alone = batches.draw_latents(files, groups, "abc", 7, step, generators[4:])       # the same in a smaller part
        assert torch.equal(batch["z"][3:], alone["z"])
        assert batch["z"].flatten(1)[:, 0].tolist() == batch["mask"].flatten(1)[:, 0].tolist() == batch["picks"]
        assert [len(context) - 1 for context in batch["context"]] == ["abc".index(x) for x in batch["names"]]
        assert batch["names"] == ["abc"[i] for i in batch["picks"]]
        seen.add(tuple(sorted({*batch["picks"]})))
    assert {(0,), (1, 2)} <= seen <= {(0,), (1,), (2,), (1, 2)}
    (tmp_path / "file").write_text("")
    refuses(lambda: batches.encoded(tmp_path / "file", 3, item), "choose another --cache", errors=OSError)


Q = "blocks.0.self_attn.q"
ONES, PEFT, COMFY = torch.ones(48), "--to official out.safetensors", "--to comfy out.safetensors"
FACTORS = {"ffn.0.lora_down.weight": named("down", (3, 48)), "ffn.0.lora_up.weight": named("up", (96, 3))}


def zeros(meta):
    return {name: torch.zeros(x.shape) for name, x in meta.items()}


def test_an_adapter_is_told_by_kind_rank_scale_and_model(tmp_path, capsys):
    file, one = tmp_path / "adapter.safetensors", torch.zeros(1)
    save_file(zeros(bench.checkpoint_meta(replace(WAN_14B, num_layers=1))[1]), file)
    lines = adapter.describe(file).splitlines()
    assert lines[0] == f"{file}: peft (lora_A.default)" and "DoRA on 10 layers, rank [32], scale 1," in lines[1]
    assert lines[2:] == ["differences: none", "Wan 1.3B: 0 of 10 layers fit", "Wan 14B: 10 of 10 layers fit",
                         "tiny/: 0 of 10 layers fit", "left over in Wan 14B: nothing"]
    given = zeros(bench.checkpoint_meta(replace(WAN_1_3B, num_layers=1))[2])
    given = {key: x for key, x in given.items() if "blocks.0" in key}
    given |= {key.replace("s.0.", "s.30."): x + 0 for key, x in given.items() if ".diff" not in key}   # there is no 30
    alphas = {f"diffusion_model.blocks.0.ffn.{i}.alpha": x for i, x in ((0, torch.tensor(16.0)), (2, torch.ones(2)))}
    save_file(given | alphas | {"strange": one}, file)
    shown = adapter.describe(file)
    assert "ComfyUI (lora_down)" in shown and "LoRA on 20 layers, rank [64], scale [0.25]" in shown
    assert "differences: 5 diff, 11 diff_b\nWan 1.3B: 14 of 25 layers fit\nWan 14B: 0 of 25 layers fit" in shown
    assert "left over in Wan 1.3B: 22\n  diffusion_model.blocks.30" in shown and shown.count("finds no target") == 10
    with torch.device("meta"):
        state = RGBAVAE(WanVAE(), FeatureMerge()).add_adapters(2).adapter_state()
    state = zeros({name: x for name, x in state.items() if name.startswith("vae")})
    others = "middle.block.conv1.weight", "edge_loss.kernel", "vae_pha.decoder.conv1.conv3D.base_layer.weight"
    save_file(state | {name: one + 0 for name in others}, file)
    adapter.main([str(file)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "LoRA on 76 layers, rank [2], scale 1 / rank, there is no .alpha", "differences: none",
        "merge block: 1 tensors; frozen copies, skipped: 2", "Wan's VAE: 76 of 76 layers fit",
        "tiny/: 0 of 76 layers fit",
        "left over in Wan's VAE: nothing"]


def test_an_adapter_is_respelt_and_comes_back(tmp_path):
    """Bit for bit the same tensors; alpha / r = 1/2 goes into B for peft, and stays in ComfyUI's with differences."""
    peft, comfy, given = {key: x.bfloat16() for key, x in load_file(base() / DORA_FILE).items()}, {}, {}
    for key, x in peft.items():
        layer, part = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up").split(".lora_")
        part, flat = part.replace(".default", ""), "lora_unet_" + layer.replace(".", "_")
        comfy[f"diffusion_model.{layer}.lora_{part}"] = x
        given |= {f"{flat}.lora_{part}": 2 * x if part == "up.weight" else x, f"{flat}.alpha": torch.tensor(2.0)}
    comfy = {key.replace("lora_magnitude_vector.weight", "dora_scale"): x[:, None] if x.ndim == 1 else x
             for key, x in comfy.items()}
    more = {"diff_m": torch.ones(1, 6, 48), "norm3.diff": ONES, "ffn.2.diff_b": ONES + 1, "ffn.0.alpha": ONES[0] / 3}
    more = comfy | {f"diffusion_model.blocks.0.{name}": x for name, x in more.items()}
    source, out = str(tmp_path / "source.bin"), str(tmp_path / "out.safetensors")
    ways = (given, "official", peft), (peft, "comfy", comfy), (comfy, "official", peft), (more, "comfy", more)
    for state, to, expected in ways:
        torch.save(state, source)
        adapter.main([source, "--to", to, out, *["--comfy-norm"] * (to == "comfy")])
        torch.testing.assert_close(load_file(out), expected, rtol=0, atol=0)                # names, dtypes, bits


@pytest.mark.parametrize("to", ["official", "peft", "diffusers", "comfy", "merged"])
def test_an_adapter_merges_to_the_same_from_whatever_it_was_written_for(to, tmp_path):
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    adapter.main([str(base() / DORA_FILE), "--to", to, str(out), "--base", str(base())])
    before, expected = (load_dit(base(), adapters).state_dict() for adapters in ((), [(base() / DORA_FILE, 1.0)]))
    file = out / "adapter_model.safetensors" if to == "peft" else out
    keys = load_file(file)
    if to == "merged":
        return same(keys, expected)
    torch.testing.assert_close(dict(load_dit(base(), [(file, 1.0)]).state_dict()), dict(expected), rtol=1e-5, atol=1e-5)
    if to == "comfy":                           # as ComfyUI merges: the norm is that of the base
        for again in ("official x.safetensors", "peft x", "comfy x.safetensors --comfy-norm"):
            refuses(lambda: adapter.main([str(out), "--to", *again.split()]), "written for ComfyUI")
        q = "diffusion_model.blocks.1.self_attn.q"
        weight, scale = before["blocks.1.self_attn.q.weight"], keys[f"{q}.dora_scale"]
        sum_ = weight + keys[f"{q}.lora_up.weight"] @ keys[f"{q}.lora_down.weight"]
        close(sum_ * scale / weight.norm(dim=1, keepdim=True), expected["blocks.1.self_attn.q.weight"], 1e-5)
    if to == "diffusers":
        layers = {key.removeprefix("transformer.blocks.0.").partition(".lora")[0] for key in keys if "blocks.0." in key}
        assert layers == {*(f"attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")),
                          "ffn.net.0.proj", "ffn.net.2"}


@pytest.mark.parametrize("change, scale", [
    ({}, 2), (dict(use_rslora=True), 4), (dict(alpha_pattern={"self_attn.q": 2}), 0.5),
    (dict(rank_pattern={"q": 16}), 0.5)])
def test_the_scale_of_an_adapter_is_what_its_config_says(change, scale, tmp_path):
    state = {f"base_model.model.{Q}.lora_{part}.weight": named(part, shape) for part, shape in
             dict(A=(4, 48), B=(48, 4)).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    save_json(tmp_path / "adapter_config.json", dict(r=4, lora_alpha=8) | change)
    merged = load_dit(base(), [(tmp_path / "adapter_model.safetensors", 1.0)]).state_dict()[f"{Q}.weight"]
    product = state[f"base_model.model.{Q}.lora_B.weight"] @ state[f"base_model.model.{Q}.lora_A.weight"]
    close(merged - load_dit(base()).state_dict()[f"{Q}.weight"], scale * product)
    for wrong in (dict(r="x"), dict(r=0), dict(r=4, alpha_pattern=5), dict(r=4, rank_pattern={"(": 1}), dict(r=-4)):
        save_json(tmp_path / "adapter_config.json", dict(lora_alpha=8) | wrong)
        refuses(lambda: load_dit(base(), [(tmp_path / "adapter_model.safetensors", 1.0)]), "adapter_config.json")


@pytest.mark.parametrize("given, to, word", [
    (None, "", "there is no checkpoint file"), ({"norm3.weight": ONES}, "", "no adapter"),
    ({"norm3.weight": ONES}, PEFT, "no target"), (FACTORS, "--to official out.bin", "safetensors"),
    (FACTORS | {"ffn.0.dora_scale": torch.ones(1, 48)}, COMFY, "--base"),
    (FACTORS, "--to diff out.safetensors", "diffusers"), (FACTORS | {"norm3.diff": ONES}, PEFT, "no name for diff"),
    (FACTORS | {"ffn.0.alpha": torch.tensor(2.0)}, PEFT, "scale 0.666667"),
    (FACTORS | {"ffn.0.alpha": torch.ones(2)}, PEFT, "blocks.0.ffn.0")])
def test_what_is_no_adapter_or_nothing_for_peft_is_one_sentence(given, to, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if given:
        torch.save({f"diffusion_model.blocks.0.{name}": x for name, x in given.items()}, "given.bin")
    refuses(partial(adapter.main, ["given.bin", *to.split()]), word)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("weight_map, word", [
    (None, "names no shards"), ({}, "names no shards"), ({"a": 1}, "names no shards"), ({"a": "gone.bin"}, "gone.bin"),
    ({"a": "diffusion_pytorch_model-0.safetensors"}, "its tensors are others")])
def test_an_index_that_does_not_fit_its_shards_is_one_sentence(weight_map, word, tmp_path):
    bench.write_checkpoint(tmp_path, DIT_TINY)
    save_json(tmp_path / f"{DIT_FILE}.index.json", dict(weight_map=weight_map))
    refuses(partial(open_dit, tmp_path), word, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what memory holds of a file")
def test_loading_keeps_one_tensor_of_its_files_in_memory(tmp_path):
    def resident():
        sizes = re.findall(rf"{tmp_path}/.*?\nRss: +(\d+)", Path("/proc/self/smaps").read_text(), re.DOTALL)
        return sum(map(int, sizes)) / 1024                                                  # MiB
    bench.write_checkpoint(tmp_path, DiTConfig(512, 1024, 4, 3, text_dim=32, text_len=16))
    (model, tensors), most = open_dit(tmp_path, [(tmp_path / file, 1.0) for file in bench.ADAPTERS]), {}
    for name, tensor in tensors:
        most[name] = resident()
        del tensor
    assert list(most) == list(model.state_dict()) and resident() == 0
    largest = max(p.numel() for p in model.parameters()) * 4 / 2 ** 20                      # 6 MiB, of 50 MiB
    assert max(most.values()) <= 1.1 * largest + 1


def test_a_vae_adapter_may_be_bfloat16_or_merged_already(tmp_path):
    vae, lora = (load_file(base() / name) for name in (VAE_FILE, VAE_ADAPTER))
    one, *pair = (tmp_path / name for name in ("VAE.bin", "rgb.safetensors", "alpha.safetensors"))
    torch.save({name: x.bfloat16() for name, x in lora.items()}, one)
    load, z = partial(load_rgba_vae, base() / VAE_FILE), named("z", (1, 16, 1, 2, 2))
    exact, rgba, half = load(base() / VAE_ADAPTER), load(one), load(one, torch.bfloat16)
    assert {p.dtype for p in rgba.parameters()} == {torch.float32}
    close(rgba.decode(z)[0], exact.decode(z)[0], tol=0.1)
    assert half.decode(z.bfloat16())[1].dtype == torch.bfloat16
    for file, branch in zip(pair, (exact.vae_fgr, exact.vae_pha)):      # as ComfyUI has them: two whole VAEs
        save_file(vae | branch.state_dict(), file)
    adapter.main([str(one), "--to", "merged", str(tmp_path / "out"), "--base", str(base())])
    close(load([tmp_path / "out/rgb.safetensors", tmp_path / "out/alpha.safetensors"]).decode(z)[1], rgba.decode(z)[1])
    adapter.main([str(base() / VAE_ADAPTER), "--to", "official", str(tmp_path / "again.bin")])
    same(read_checkpoint(tmp_path / "again.bin")[0], lora)
    merged = load(pair)
    assert all(torch.equal(a, b) for a, b in zip(merged.decode(z), exact.decode(z)))
    assert merged.middle is None and merged.skipped == 2 * sum(name.startswith(("encoder.", "conv1.")) for name in vae)


def test_a_text_encoder_may_be_bfloat16_or_fp8_with_scales(tmp_path):
    def load(state, dtype=torch.float32):
        save_file(state, file)
        return load_text_encoder(file, dtype)
    file = write_base(tmp_path / "base") / "other.safetensors"
    exact = load_file(file.with_name(TEXT_FILE))
    half = {name: p.bfloat16() for name, p in exact.items()}
    eight, scaled, marks = half.copy(), half.copy(), {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name in [name for name, p in exact.items() if p.ndim == 2 and "embedding" not in name]:
        scale = exact[name].abs().max() / 448
        eight[name], scaled[name] = (x.to(torch.float8_e4m3fn) for x in (half[name], exact[name] / scale))
        scaled[name.replace("weight", "scale_weight")] = scale
        marks[name.replace("weight", "scale_input")] = torch.ones(())
    contexts = [load(state)(CAPTIONS)[1] for state in (exact, half, eight, scaled, scaled | marks)]
    for context, tol in zip(contexts[1:], (0.1, 1, 1, 1)):
        close(context, contexts[0], tol)
        assert context.dtype == torch.float32
    assert torch.equal(contexts[3], contexts[4]) and not torch.equal(contexts[2], contexts[3])
    name, scale = "blocks.1.attn.q.weight", scaled["blocks.1.attn.q.scale_weight"]
    once = (scaled[name].float() * scale).bfloat16()                                        # rounded at the end alone
    assert torch.equal(load(scaled, torch.bfloat16).model.state_dict()[name], once)
    for odd in ("blocks.0.attn.q.scale_wait", "token_embedding.scale_weight", "lm_head.weight"):
        refuses(partial(load, scaled | {odd: torch.ones(())}), file, "umT5", odd)


def test_the_bench_has_the_released_layout_as_training_makes_it_and_loads_as_officially(tmp_path):
    _, dora, light = bench.checkpoint_meta(WAN_14B)
    assert (len(dora), len(light)) == (1200, 1459)
    assert dora["blocks.39.ffn.2.lora_magnitude_vector.default.weight"].shape == (5120,)
    assert light["diffusion_model.head.head.lora_up.weight"].shape == (64, 64)
    bench.write_checkpoint(tmp_path, bench.TINY)
    adapters = [(tmp_path / file, 1.0) for file in bench.ADAPTERS]
    before, both = (load_dit(tmp_path, chosen).state_dict() for chosen in ((), adapters))
    for name, p in bench.load_official(tmp_path, adapters, torch.float32, "cpu").state_dict().items():
        close(both[name], p, 1e-5)
        assert torch.equal(p, before[name]) == (name.endswith("modulation") or name == "patch_embedding.weight"), name
    trained = adapter_state(add_dora(load_dit(tmp_path), 32, 32, train_dit.TARGETS))
    same(zeros(trained), zeros(load_file(adapters[0][0])))


def test_the_bench_prints_its_tables_each_row_with_its_own_memory(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args, **options: ThreadPoolExecutor(1))
    small, sizes = "tiny --size 32x16 --frames 5 --device cpu", bench.TINY
    bench.main(f"clip {small} --steps 2 --offload".split())
    assert [line[:42].strip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        "transformer: random weights", "transformer: pass 1 of 2", "transformer: pass 2 of 2",
        "decoders: random weights", "decoders: colour", "decoders: alpha"]
    bench.main(f"train {small}".split())
    bench.main("load --device cpu tiny".split())
    table = capsys.readouterr().out
    kept = 54 * sizes.dim + 6 * sizes.ffn_dim + 8 * 32 * 2 + 2 * 4 * sizes.num_heads + 9 * 4     # + A x, sums, norms
    for words in (f"a block keeps {kept:,} bytes a token", "8 GPUs, shard", "load_scaled", "load_official", "host MiB"):
        assert words in table
    peaks = []
    for numbers in (1, 75_000_000, 1):
        with bench.row_of("memory", "cpu") as row:
            torch.ones(numbers)
        peaks.append(row["host_mib"])
    assert peaks[1] - max(peaks[0], peaks[2]) > 240 or not Path("/proc/self/clear_refs").exists()


@pytest.mark.parametrize("flags, word", [
    ("forward 7B", "invalid choice: '7B'"), ("forward tiny --frames 16", "4k+1"), ("train tiny --fp8", "fp8"),
    ("forward tiny --size 30", "multiples of 16"), ("forward tiny --offload", "memory on cpu")])
def test_the_bench_refuses_in_one_sentence(flags, word, monkeypatch):
    monkeypatch.setattr(bench, "dit_memory", lambda *args: 2 * [0.6 * bench.free_memory("cpu")])     # on a CPU one
    refuses(partial(bench.main, [*flags.split(), "--device", "cpu"]), word)


def test_the_ablations_go_on_after_a_failure_with_words_that_the_commands_know(tmp_path, monkeypatch, capsys):
    def run(command, stdout, **options):
        script, *words = command[1:]
        calls.append(evaluate.parse_args(words[1:]) if script == "-m" else parsers[script].parse_args(words))
        folder, number = Path(calls[-1].out), len(calls) % 5 / 10
        stdout.write(broken.get(folder.parent.name, ""))
        stdout.flush()
        psnr = number + (40 if folder.parent.name == "vae-naive" else 30)
        kinds = {name: dict(psnr=psnr, ssim=0.5) for name in ("soft render", "hard render", "alpha")}
        passed = dict.fromkeys(("no_holes", "corners", "shape", "background alpha", "tint"), number)
        save_json(folder / "dit-rgba/summary.json", dict(held_out_mse=0.25))
        if script == "-m":
            steps = dict.fromkeys(("1", "2", "4", "8", "20"), passed)
            save_json(folder / "eval.json", dict(scores=steps, measures=steps, ellipse=dict(x=number, size=number)) if
                      calls[-1].model == "dit" else {"unseen clips": dict(mean=kinds), "cells": dict(opaque=1)})
        return ablate.subprocess.CompletedProcess(command, int(folder.parent.name in broken))
    out, calls = tmp_path / "all of it", []
    broken = {"vae-tabd": "no luck", "vae-tabd-paper": "the loss 9 is over 50 times its median 0.1"}
    parsers = {"train_vae.py": train_vae.make_parser(), "train_dit.py": train_dit.make_parser()}
    monkeypatch.setattr(ablate.subprocess, "run", run)
    monkeypatch.setattr(ablate.clips, "main", lambda argv: save_json(Path(argv[0]) / "metadata.jsonl", argv))
    ablation = partial(ablate.main, [str(out), "--seeds", "0", "1", "2", "--jobs", "1"])
    refuses(ablation, "vae-tabd/0.log")
    assert "no luck" in (out / "vae-tabd/0.log").read_text()
    del broken["vae-tabd"]
    ablation()
    made, table = len(calls), capsys.readouterr().out
    assert "| vae-tabd-paper | diverged 3 of 3 |" in table and "| dit-tabd, 20 steps |" in table
    assert re.search(r"renders: alpha \| alpha: psnr \| -\d.* \+1.24 dB \| opposite", table)
    assert {c.data for c in calls if c.out.endswith("dit-few-lora/1") and hasattr(c, "lora")} == {f"{out}/few"}
    ablation()
    assert len(calls) == made and calls[-1].mean == 2
    refuses(lambda: ablate.main([str(out), "--seeds", "0"]), "--seeds")


def test_a_verdict_needs_an_interval_without_zero():
    assert ablate.judge([1, 1.1, 0.9], 1)[2] == "same direction" and ablate.judge([1, 1.1, 0.9], -1)[2] == "opposite"
    mean, half, verdict = ablate.judge([1, -1, 0.5, 1.5], 1)
    assert verdict == "cannot tell" and abs(mean - 0.5) < 1e-9 and abs(half - 3.18 * 1.0801 / 2) < 1e-3


def one(motion="rising", material="solid"):
    return procedural_clip(5, two=0, shape="ball", color="red", material=material, motion=motion)


def test_scores_pass_on_the_truth():
    def smooth(x):                                # the mean of 3 x 3 pixels; no object touches the border
        return np.mean([np.roll(x, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)], 0).round().astype(np.uint8)
    sizes, asked = (96, 64, (64, 112)), [attributes for _, attributes in evaluate.unseen_prompts(24)]
    large = dict(two=0, radius=(0.225, 0.26), spread=0.08)
    clips = [procedural_clip(i, sizes[i % 3], **large, **attributes)[:2] for i, attributes in enumerate(asked)]
    blurred = [[smooth(smooth(x)) for x in clip] for clip in clips[::3]]
    for clip, attributes in zip(clips + blurred, asked + asked[::3]):
        assert False not in score_clip(*clip, attributes).values(), attributes
    others = asked[1:] + asked[:1]
    got = [score_clip(*clip, other) for clip, other in zip(clips, others)]
    for name in ("shape", "color", "motion"):                              # it passes just where the labels agree
        agree = [attributes[name] == other[name] for attributes, other in zip(asked, others)]
        assert [scores[name] for scores in got] == agree and np.mean(agree) < 0.3
    assert np.mean([scores["material"] for scores in got]) < 0.7           # glass, smoke and bubble share one rule


def test_left_and_right_up_and_down_are_told_apart_and_what_comes_back_has_no_motion():
    right, left = "moving from left to right", "moving from right to left"
    same = [(motion,) * 3 for motion in ("bouncing", "spinning", "orbiting")]
    for expected in ((right, left, left), ("rising", "rising", "falling"), *same):
        alpha = one(expected[0]).alpha
        assert tuple(named_motion(x.copy()) for x in (alpha, alpha[:, :, ::-1], alpha[::-1])) == expected
    alpha = one(right).alpha
    for x in (np.repeat(alpha[:1], 17, 0), np.concatenate([alpha[::2], alpha[-2::-2]]), np.insert(alpha, 9, 0, axis=0)):
        assert named_motion(x) == "none"


def test_scores_fail_where_they_should_and_a_dent_is_no_hole():
    clip, nothing = one("moving from left to right"), np.zeros((17, 64, 64, 3), np.uint8)
    y, x = (int(places.mean()) for places in silhouette(clip.alpha)[8].nonzero())
    hole, dent, empty, cross = clip.alpha.copy(), clip.alpha.copy(), nothing[..., 0], nothing[..., 0].copy()
    hole[8, y:y + 2, x:x + 2] = dent[8, :y, x:x + 2] = 150
    cross[:, 30:34, 10:54] = cross[:, 10:54, 30:34] = 255
    assert {named_shape(cross), named_shape(empty), named_motion(empty), named_color(nothing, empty)} == {"none"}
    for alpha, other, name, expected in (
            (hole, {}, "no_holes", False), (hole, {"shape": "ring"}, "no_holes", None), (dent, {}, "no_holes", True),
            (hole, {"material": "glass"}, "no_holes", None), (clip.alpha // 10 * 9, {}, "solid", False),
            (np.maximum(clip.alpha, 4), {}, "corners", False)):            # 4: 0.016
        assert score_clip(clip.rgb, alpha, clip.attributes | other)[name] is expected
    for material, as_if in (("solid", "glow"), ("solid", "glass"), ("glass", "solid"), ("smoke", "glow")):
        shown = one(material=material)
        scores = score_clip(shown.rgb, shown.alpha, shown.attributes | {"material": as_if})
        assert scores["material"] is scores[as_if] is False and scores[material] is None
    passed = [name for name, passes in score_clip(nothing, empty, clip.attributes).items() if passes]
    assert passed == ["corners", "no_holes"]


# ---- scores of control and mattes


def test_mu_counts_as_much_on_any_grid():
    assert abs(sampler.mean_for_grid(81, 480, 832) - 0.05) < 1e-9
    assert abs(sampler.mean_for_grid(17, 64, 64) - 1.0118) < 1e-3
    assert abs(sampler.mean_for_grid(81, 240, 416, 0.03) - 0.06) < 1e-9                        # a quarter of the cells
    pairs = ((5, 8, 8), 1.0), ((5, 16, 16), 0.5), ((5, 16, 16), 0.05)
    heard = [pictures.told_from_noise(grid, mean) for grid, mean in pairs]
    assert abs(heard[0] - heard[1]) < 0.05 and min(heard[:2]) > 0.85 > 0.5 > heard[2]


def test_an_ellipse_follows_stands_still_or_is_left_out():
    generators, (n, t) = [sample_generator(0, 0, i) for i in range(600)], (600, 3)
    batch = dict(mask=torch.zeros(n, t, 2, 2), still_mask=torch.full((n, t, 2, 2), 0.5), generators=generators)
    found = train_dit.choose_mask(batch, 0.5, 0.1)[:, 0, 0, 0]
    shares = [(found == value).float().mean() for value in (0, 0.5, 1)]
    assert all(abs(share - p) < 0.07 for share, p in zip(shares, (0.4, 0.5, 0.1))) and abs(sum(shares) - 1) < 1e-5
    assert torch.equal(train_dit.choose_mask(batch, 0, 0), batch["mask"])


def test_a_moved_object_is_found_where_the_ellipse_asks(monkeypatch):
    def obedient(keys, still=True):
        rows, columns = np.mgrid[:64, :64] / 64 + 1 / 128
        made = []
        for time in np.r_[0, np.repeat(np.arange(1, 5), 4)] / 4:
            x, y, r = (np.interp(time, [key[0] for key in keys], [key[i] for key in keys]) for i in (1, 2, 3))
            made.append(np.where(np.hypot(columns - x, rows - y) < r, 255, 0).astype(np.uint8))
        return [(None, np.stack(made))] * 2
    found = evaluate.ellipse_control(obedient)
    assert min(found["x"], found["y"], found["size"]) > 0.99 and found["distance"] < 0.02
    lost = evaluate.ellipse_control(lambda keys, still=True: obedient([(0, 0.5, 0.5, 0.2, 0.2, 0)]))
    assert (lost["x"], lost["y"], lost["size"]) == (0, 0, 0) and lost["distance"] > 0.1


def test_matte_errors_and_measures_of_known_mistakes():
    clip = one()
    off = np.where(clip.alpha > 0, clip.alpha - np.minimum(clip.alpha, 51), 0).astype(np.uint8)
    assert all(value == 0 for value in score.matte_errors(clip.alpha, clip.alpha).values())
    errors = score.matte_errors(clip.alpha, off)
    lost = (clip.alpha.astype(float) - off) / 255
    assert abs(errors["MAD"] - 1000 * lost.mean()) < 1e-6 and abs(errors["MSE"] - 1000 * (lost ** 2).mean()) < 1e-3
    flicker = clip.alpha.copy()
    flicker[::2] = off[::2]
    assert score.matte_errors(clip.alpha, flicker)["dtSSD"] > 2 * errors["dtSSD"] and errors["Grad"] > 0
    calm, nervous = (score.measure_clip(clip.rgb, alpha, clip.attributes) for alpha in (clip.alpha, flicker))
    assert nervous["alpha flicker"] > 100 > 10 > calm["alpha flicker"] and calm["background alpha"] == 0
    red = np.minimum(clip.rgb.astype(int) + (60, 0, 0), 255).astype(np.uint8)
    blue = dict(clip.attributes, color="blue")
    assert score.measure_clip(red, clip.alpha, blue)["tint"] > score.measure_clip(clip.rgb, clip.alpha, blue)["tint"]


def test_lpips_is_a_weighted_distance_of_unit_features(tmp_path):
    sizes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256),
             17: (512, 256), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512))}
    shapes = {f"features.{i}": shape for i, shape in sizes.items()}
    vgg = {f"{name}.weight": 0.03 * named(name, (*shape, 3, 3)) for name, shape in shapes.items()}
    vgg |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    linear = {f"lin{i}.model.1.weight": torch.full((1, n, 1, 1), 2.0) for i, n in enumerate((64, 128, 256, 512, 512))}
    save_tensors(tmp_path / "vgg.safetensors", vgg | {"classifier.0.weight": torch.zeros(1)})
    save_tensors(tmp_path / "lin.safetensors", linear)
    distance = lpips.LPIPS(tmp_path / "vgg.safetensors", tmp_path / "lin.safetensors")
    x, y = 2 * torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    found = distance(x, y)
    assert found.shape == (2,) and (found > 0.01).all() and (found < 20).all()     # five terms of at most 2 x 2
    assert torch.equal(distance(x, x), torch.zeros(2)) and torch.allclose(found, distance(y, x))
    first = F.relu(F.conv2d(x, vgg["features.0.weight"], padding=1))
    first = F.relu(F.conv2d(first, vgg["features.2.weight"], padding=1))
    assert torch.allclose(distance.features[0](x), first, atol=1e-5)
    clip = one()
    said = evaluate.perceptual_distances(distance, clip[:2], (clip.rgb, clip.alpha // 2))
    assert said["alpha"] > 0 and said["soft render"] > 0
    refuses(lambda: lpips.LPIPS(tmp_path / "lin.safetensors", tmp_path / "vgg.safetensors"), "vgg16-397923af.pth")


def test_chance_is_what_wrong_attributes_pass():
    asked = [attributes for _, attributes in evaluate.unseen_prompts(16)]
    made = [procedural_clip(i, radius=(0.23, 0.26), spread=0.08, two=0, **a)[:2] for i, a in enumerate(asked)]
    chance = chance_of(made, asked)
    assert chance["color"] < 0.3 and chance["shape"] < 0.4 and chance["corners"] > 0.9
    assert "chance" in score_table([score_clip(*made[0], asked[0])], chance)


def test_pictures_are_drawn(tmp_path, capsys):
    pictures.main(f"cells {base()}/Wan-Alpha-v2-VAE.safetensors --base {base()} --out {tmp_path}".split())
    assert {file.name for file in tmp_path.iterdir()} == {"cells-map.png", "cells.png"}
    curves.draw_charts(tmp_path / "chart.png", {"a": dict(one=[(0, 1), (1, 2)], two=[(0, 0), (1, 1)])})
    shown = np.asarray(Image.open(tmp_path / "chart.png")).reshape(-1, 3)
    assert all((shown == color).all(1).sum() > 300 for color in curves.COLORS[:2])
    assert heat([[[-9, 0, 9]]], -1, 1)[0, 0].tolist() == [[20, 20, 70], [190, 40, 60], [255, 235, 90]]


def test_tables_count_only_what_applies():
    rows = [dict(color=True, glass=None, glow=None), dict(color=False, glass=True, glow=None)]
    assert shares_of(rows) == dict(color=0.5, glass=1, glow=None)
    assert " ".join(score_table(rows).split()) == "color 50.0 % 1 of 2 glass 100.0 % 1 of 1 glow - % 0 of 0"
    assert score_by(rows, [("", dict(a="o")), ("", dict(a="x"))], "color", "a") == "color by a: o 1 of 1, x 0 of 1"


def test_unseen_prompts_are_held_out_different_and_even():
    prompts = evaluate.unseen_prompts()
    combinations = [tuple(attributes.values()) for _, attributes in prompts]
    assert len(set(combinations)) == 200 and all(held_out(*c) for c in combinations)
    for values, column in zip((SHAPES, COLORS, MATERIALS, MOTIONS), zip(*combinations)):
        assert min(column.count(value) for value in values) > 0.7 * 200 / len(values)
    for i, (prompt, attributes) in enumerate(prompts):
        assert prompt == caption_of(attributes, dict(frame=1 - i % 2))
    assert not {prompt for prompt, _ in prompts} & {prompt for prompt, _ in evaluate.unseen_wordings(prompts)}
    assert prompts[:24] == evaluate.unseen_prompts(24) != evaluate.unseen_prompts(24, seed=1)


def test_psnr_and_ssim_of_known_pictures():
    """scikit-image 0.25: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)."""
    rgb, (alpha, error) = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((2, 1, 16, 16), np.uint8)
    alpha[:, 7, 7], error[:, 5:10, 5:10], error[:, 6:9, 6:9] = 255, 51, 0   # two pixels away from the object's only one
    scores = compare_clips(rgb, alpha, rgb, alpha + error)
    assert psnr(rgb, rgb) > 75 and round(psnr(alpha, alpha + error, error > 0), 4) == 13.9794
    assert round(scores["alpha, region"]["psnr"], 4) == 15.9176 and round(scores["alpha"]["psnr"], 4) == 26.0206
    y, x = np.mgrid[:32, :40]
    a = ((x * 7 + y * 3 + (x * y) % 11 * 9) % 256).astype(np.uint8)[None]
    b = np.clip(a.astype(int) + ((x * 13 + y * 29) % 41 - 20), 0, 255).astype(np.uint8)
    for pair, expected in (((a, b), 0.9633062), ((a, np.roll(a, 3, 2)), 0.0922819), ((a // 4 + 90, b), 0.4380390)):
        similar = ssim_map(*map(grey, pair))
        assert similar.shape == (*a.shape, 3) and abs(masked_mean(similar, a >= 0) - expected) < 1e-5
    half, left = np.where(x < 20, a, b), np.broadcast_to(x < 15, a.shape)   # its windows end where the halves meet
    assert masked_mean(ssim_map(a, half), left) == 1 > masked_mean(ssim_map(a, half))


def test_evaluation_is_as_the_base_says_and_repeatable(tmp_path):
    records = []
    for more in ("", "", "--seed 1", "--mean 1"):
        evaluate.main(f"dit --base {base()} --out {tmp_path} --prompts 2 --steps 1 {more}".split())
        records.append(read_json(tmp_path / "eval.json"))
    assert dict(size=[48, 32], frames=5, mean=0.05, shift=5).items() <= records[0]["arguments"].items()
    assert records[0] == records[1] and records[0]["ellipse"] not in [record["ellipse"] for record in records[2:]]
    assert {*records[0]["scores"]} == {"4", "1", "wordings", "mean 0"} and len(records[0]["clips"]) == 2


def test_held_out_noise_is_always_the_same_and_another_for_each_clip_and_round(tmp_path):
    def step(item, generators):
        return dict(mse=item["z"][0, 2] + generators[0].initial_seed())
    save_tensors(tmp_path / "z.safetensors", dict(z=torch.full((3,), 8.0)))
    assert evaluate.held_out_mse(step, [tmp_path / "z.safetensors"] * 2) == 8 + 3_000_010       # of 2 (1000003 k + i)


@pytest.mark.parametrize("argv, word", [("", "model"), ("vae --base nowhere", "nowhere"), ("vae --frames 6", "4k+1"),
                                        ("dit --size 40x64", "16"), ("dit --prompts 3000", "only")])
def test_wrong_arguments_of_an_evaluation(argv, word):
    refuses(lambda: evaluate.main(argv.split()), word)


# ---- generate.py

CLIP_FILES = ("rgba.webm", "rgba.mov", "frames", "preview.mp4", "preview.webp", "rgb.mp4", "alpha.mp4", "run.json",
              "index.html")
SHORT = "--frames 1 --size 16x16 --steps 1".split()
HALF, LESS = "--dtype bfloat16", "--offload --fp8"
command = command_of(generate)


def parsed(*argv):
    return generate.make_parser().parse_args(["--base", str(base()), *map(str, argv)])


def settled(*argv):
    return request.settle(parsed(*argv))


def make(out, *argv):
    return list(generate.generate(parsed("--out", out, *argv)))


def pngs(folder):
    return [path.read_bytes() for path in sorted((folder / "frames").iterdir())]


@cache
def clip():
    return make(Path(kept().name) / "out", "A red glass ball", "--seed", 3)[0]


def test_generate_writes_every_file_and_keeps_alpha_and_a_record():
    assert clip().name == "a-red-glass-ball-3" and [*clip().parent.iterdir()] == [clip()]
    assert sorted(path.name for path in clip().iterdir()) == sorted(CLIP_FILES)
    read = {name: read_rgba(clip() / name) for name in CLIP_FILES[:-2]}
    rgb, alpha = read["frames"]
    assert rgb.shape == (5, 32, 48, 3) and alpha.std() > 5 and rgb.std() > 5                    # worth a test
    assert all(colour.shape == rgb.shape for colour, _ in read.values())
    for shown in (read["rgba.webm"][1], read["rgba.mov"][1], read["alpha.mp4"][0][..., 0]):
        assert np.abs(shown.astype(float) - alpha).mean() < 3
    preview, opacity = read["preview.webp"][0], alpha[:, 0, 0] / 255            # of a corner, over the light square
    assert np.abs(preview[:, 0, 0, 0] - (rgb[:, 0, 0, 0] * opacity + 226 * (1 - opacity))).max() <= 1
    run = json.loads((clip() / "run.json").read_text())
    asked = dict(prompt="A red glass ball", seed=3, size=[48, 32], steps=2, fps=8, mean=0.05)   # config.json's, Wan's
    assert asked.items() <= run["arguments"].items() and run["seed"] == 3
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["python"] == sys.version.split()[0]
    assert list(run["stages"]) == ["text", "transformer", "decode", "write"]
    assert all(stage["seconds"] >= 0 and stage["host_mib"] > 50 for stage in run["stages"].values())
    assert run["weights"] == {str(base() / name): file_key(base() / name) for name in BASE_FILES}


def test_same_seed_same_bytes(tmp_path):
    """Alone or among other prompts and seeds, and in place of an earlier result."""
    (tmp_path / "prompts.txt").write_text("\ufeffa ball\r\n\n  A red   glass ball \n", encoding="utf-8")
    for _ in range(2):
        many = make(tmp_path, "--prompts", tmp_path / "prompts.txt", "--seed", 5, 3)
        assert [folder.name for folder in many] == ["a-ball-5", "a-ball-3", "a-red-glass-ball-5", "a-red-glass-ball-3"]
        assert (tmp_path / "index.html").read_text(encoding="utf-8").count('"prompt"') == 4
        assert pngs(many[3]) == pngs(clip()) and all(pngs(folder) != pngs(clip()) for folder in many[:3])
    run = json.loads((many[1] / "run.json").read_text())
    assert (run["arguments"]["prompt"], run["arguments"]["seed"], run["seed"]) == ("a ball", 3, 3)


@torch.inference_mode()
def sampled(*argv):
    args = settled(*argv)
    (z,), _ = generate.sample(args, generate.encode_prompts(args), request.make_mask(args))
    return z


def test_a_clip_made_again_keeps_what_others_put_beside_it(tmp_path):
    folder, = make(tmp_path, "ball", "--also", "sheet", *SHORT)
    (folder / "my notes.txt").write_text("mine")
    (folder / "frames/0007.png").write_bytes(b"of a longer one")
    make(tmp_path, "ball", *SHORT)
    names = {path.name for path in folder.iterdir()}
    assert (folder / "my notes.txt").read_text() == "mine" and "sprites.png" not in names and len(pngs(folder)) == 1
    assert names - {"my notes.txt"} == {*CLIP_FILES} <= {*result.FILES} and len(list(tmp_path.iterdir())) == 1


def test_every_argument_has_a_say():
    plain = sampled("ball")
    assert torch.equal(plain, sampled("ball", "--offload")) and plain.shape == (1, 16, 2, 4, 6)
    for flags in ("--seed 1", "--steps 3", "--shift 3", "--guidance 2", "--mean 0", "--mean 0.1", "--dora=", "--fp8",
                  "--mask 0.2,0.5,0.2,0.3", f"--distill {base() / DORA_FILE}", "--sampler unipc", "--dtype bfloat16"):
        assert not torch.equal(plain, sampled("ball", *flags.split())), flags
    assert not torch.equal(plain, sampled("ghost"))
    assert sampled("ball", "--size", "32x48", "--frames", 9).shape == (1, 16, 3, 6, 4)


def test_guidance_reads_the_negative_prompt():
    for guidance, texts in ((1, ["ball"]), (0, ["ball", "ghost"]), (3, ["ball", "ghost"])):
        args = settled("ball", "--negative", "ghost", "--guidance", guidance)
        assert list(generate.encode_prompts(args)) == texts


def test_pixels_are_rounded():
    pieces = [torch.tensor([[[[[-0.5, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.5]]]]])] * 2
    assert generate.to_bytes(pieces)[..., 0].tolist() == [[[0, 0, 1, 255, 255]]] * 2


def test_masks_of_every_kind(tmp_path):
    def mask(spec, *flags):
        return request.make_mask(settled("ball", "--size", "64x64", "--mask", spec, *flags))
    alpha, rgb = np.zeros((3, 32, 32), np.uint8), np.full((3, 32, 32, 3), 90, np.uint8)
    alpha[:, 4:28, 4:12] = 255
    write_rgba(tmp_path / "clip.webm", rgb, alpha)
    write_rgba(tmp_path / "matte", grey(alpha))
    saved = mask(tmp_path / "clip.webm")
    assert saved.shape == (2, 8, 8) and saved[0].argmax() % 8 in (1, 2)
    assert torch.allclose(mask(tmp_path / "matte"), saved, atol=0.05)
    assert mask("this is not read", "--mean", 0) is None


def test_generate_takes_any_prompt_from_anywhere(tmp_path):
    argv = "一只红色的玻璃球 🐉 " + "word " * 3000, "--base", base(), *SHORT
    run = subprocess.run([sys.executable, ROOT / "generate.py", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert run.stdout == f"{Path('out') / folder.name}\n" and folder.name.startswith("一只红色的玻璃球-word")
    (cut,) = [line for line in run.stderr.splitlines() if "cut" in line]
    assert cut.startswith("generate.py: ") and "limit 32" in cut and len(pngs(folder)) == 1
    assert all(f"\n{stage}: seconds" in run.stderr for stage in ("text", "transformer", "decode", "write"))


def test_a_prompt_never_fails_silently(tmp_path):
    with pytest.warns(UserWarning, match="does not know dragon, flies"):
        generate.encode_prompts(settled("A red dragon flies"))
    (tmp_path / "prompts").write_text("# mine\na ball\n  # no\n")
    assert settled("--prompts", tmp_path / "prompts").clips == [("a ball", 0)]
    for flags in ("--size 480x480", "--frames 81"):
        with pytest.warns(UserWarning, match="trained with 5 frames of 48x32"):
            request.warn_of_strangers(settled("ball", *flags.split()))
    state, _ = read_checkpoint(base() / DORA_FILE)
    for digest, warned in ((file_key(base() / VAE_ADAPTER), 0), ("other", 1)):
        save_file(state, tmp_path / "dora.safetensors", dict(vae_adapter=digest))
        with warnings.catch_warnings(record=True) as caught:
            request.warn_of_strangers(settled("ball", "--dora", tmp_path / "dora.safetensors"))
        assert len(caught) == warned


def test_folder_names():
    name = partial(result.folder_name, seed=0)
    assert name("Élan: 2 red glass balls, bouncing! 🐉") == "élan-2-red-glass-balls-bouncing-0"
    assert name("../../etc") == "etc-0" and name(settled("a \udce9 ball").prompt) == "a-ball-0"     # invalid UTF-8
    assert name("🐉") != name("🐱") and name("word " * 20 + "parrot") != name("word " * 20 + "dragon")
    assert all(len(name(word * 3000).encode()) <= 180 for word in ("word ", "球", "𠀀", "a"))


@cache
def base_of_two():
    """A base folder like Wan2.2's; its two transformers differ."""
    folder = shutil.copytree(base(), Path(kept().name) / "two", ignore=shutil.ignore_patterns(DIT_FILE))
    state, _ = read_checkpoint(base() / DIT_FILE)
    for name, factor in (("high_noise_model", 1), ("low_noise_model", 0.7)):
        save_tensors(folder / name / DIT_FILE, {key: factor * x for key, x in state.items()})
        shutil.copy(folder / "config.json", folder / name)
    return folder


# flags, {} a folder of wrong files: a word of the sentence if that is not the flag
WRONG = """--size 50x32|--size -16x32|--size axb|--frames 4|--frames 0|--steps 0|--shift 0|--mean nan|--guidance inf|
    --guidance 4 3|--seed 3 -1|--seed 9223372036854775808|--seed ball: ball|--seed 1 1: ball-1|--vae-chunk 0|
    --shard --fp8|--shard: torchrun|--base {}/none: config.json|--base {}/lone: low_noise_model|--mask ball: ball|
    --mask {}/none.webm: none.webm|--vae-adapter {}/none: none|--vae-adapter DORA: t2v.safetensors|--dora {}/none: none|
    --dora DORA DORA|--distill {}/blank: blank|--distill DORA DORA|--out {}/twice|--out {}: ball-0|--prompts {}/none|
    --prompts {}/blank|--prompts {}/binary|--prompts {}/latin|--prompts {}/twice: a-ball-0|&nbsp;: prompt|
    --trim: --also|--seed 1 --prompts {}/twice: either"""


@pytest.mark.parametrize("row", WRONG.split("|"))
def test_wrong_input_is_one_sentence(row, tmp_path, monkeypatch, capsys):
    for module, name in ((generate, "encode_prompts"), (dora, "merge_tensor")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("long work before the error"))
    for name, content in dict(blank=b" \n\n", binary=b"a\0b", latin=b"\xe9", twice=b"A ball\na ball!").items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "ball-0").mkdir()
    shutil.copytree(base_of_two(), tmp_path / "lone", ignore=shutil.ignore_patterns("low_noise_model"))
    flags, _, word = row.format(tmp_path).partition(": ")
    argv = flags.replace("DORA", str(base() / DORA_FILE)).split()
    prompt = [] if argv[0] in ("--prompts", "&nbsp;") else ["ball"]
    fails(capsys, command, *prompt, "--base", base(), "--out", tmp_path / "out", *argv, words=[word or argv[0]])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BASE_FILES)
def test_broken_base_folder_is_one_sentence(name, tmp_path, capsys):
    file, argv = shutil.copytree(base(), tmp_path / "base") / name, ("ball", "--base", tmp_path / "base")
    whole = file.read_bytes()
    for broken in (b"", whole[:len(whole) // 2], b"nothing of the kind"):
        file.write_bytes(broken)
        fails(capsys, command, *argv, words=[file.stem])
    file.unlink()
    fails(capsys, command, *argv, words=[file.stem])


@pytest.mark.parametrize("stage", ["shift_noise", "decode"])
def test_finished_clips_are_kept_if_a_later_one_fails(stage, tmp_path, monkeypatch, capsys):
    run, calls = getattr(generate, stage), count(1)

    def fail_second(*args):
        if next(calls) == 2:
            raise MemoryError
        return run(*args)
    monkeypatch.setattr(generate, stage, fail_second)
    save_json(tmp_path / "ball-2/run.json", "earlier")
    assert command(["ball", "--base", str(base()), "--out", str(tmp_path), "--seed", *"123", *SHORT]) == 2
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'ball-1'}\n" and "not enough memory" in err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ball-1", "ball-2"]
    assert len(pngs(tmp_path / "ball-1")) == 1 and "earlier" in (tmp_path / "ball-2/run.json").read_text()


@pytest.mark.parametrize("name, solver, start", [("euler", euler, 1.0), ("unipc", unipc, 0.999)])
@torch.inference_mode()
def test_two_experts_share_the_noise_levels(name, solver, start, monkeypatch):
    load, loaded = generate.load_scaled, []

    def spy(*args):
        assert not any(expert() for expert in loaded)                           # one at a time
        loaded.append(weakref.ref(dit := load(*args)))
        return dit
    monkeypatch.setattr(generate, "load_scaled", spy)
    flags = f"--steps 4 --shift 5 --guidance 2 1 --negative ghost --seed 1 2 --sampler {name}".split()
    args = settled("ball", "--base", base_of_two(), *flags)
    contexts, mask = generate.encode_prompts(args), request.make_mask(args)
    latents, error = generate.sample(args, contexts, mask)
    high, low = (load_dit(expert.path, expert.adapters) for expert in args.experts)

    def velocity(z, t):
        if t < 875:
            return low(z, t, [contexts["ball"]])
        return guide(high(z, t, [contexts["ball"]]), high(z, t, [contexts["ghost"]]), 2)
    noise = torch.randn(latents[1].shape, generator=torch.Generator().manual_seed(2))
    *_, (_, z) = solver(velocity, shift_noise(noise, mask, args.mean), shifted_sigmas(4, start=start))
    assert error is None and len(loaded) == 2 and torch.equal(z, latents[1]) and not torch.equal(*latents)


def test_wan_2_2_has_numbers_of_its_own_unless_distilled(tmp_path):
    for name in request.EXPERTS:
        (tmp_path / name).mkdir()

    def numbers(*flags):
        args = settled("ball", "--base", tmp_path, *flags)
        return args.steps, args.shift, [e.guidance for e in args.experts], [len(e.adapters) for e in args.experts]
    assert numbers() == (40, 12, [4, 3], [0, 0])
    assert numbers("--distill", "a.bin", "--dora", "b.bin", "") == (4, 5, [1, 1], [2, 1])
    assert numbers("--steps", 8, "--guidance", 2) == (8, 12, [2, 2], [0, 0])


def test_a_plain_wan_makes_clips_without_alpha(tmp_path):
    folder = shutil.copytree(base(), tmp_path / "plain")
    config = read_json(folder / "config.json")
    del config["generate"]["vae_adapter"], config["generate"]["dora"]
    save_json(folder / "config.json", config)
    with pytest.warns(UserWarning, match="plain Wan"):
        made, = make(tmp_path / "out", "ball", "--base", folder)
    assert {path.name for path in made.iterdir()} == {"rgb.mp4", "frames", "run.json", "index.html"}
    assert (read_rgba(made / "frames")[1] == 255).all() and settled("ball", "--base", folder).mean == 0
    assert settled("ball").mean == 0.05


def test_single_files_under_others_names_stand_in_for_those_of_the_base(tmp_path):
    """ComfyUI's prefix and fp8 with a scale for the transformer, diffusers' names for an autoencoder, a text encoder
    of transformers': the same clip but for fp8's rounding."""
    theirs = {"dit": {}, "text": {}}
    for name, x in load_file(base() / DIT_FILE).items():
        fits = name.startswith("blocks.") and x.ndim == 2 and "modulation" not in name
        layer = f"model.diffusion_model.{name.removesuffix('weight')}"
        eight = {f"{layer}weight": (x / 0.02).to(torch.float8_e4m3fn), f"{layer}scale_weight": torch.tensor(0.02)}
        theirs["dit"] |= eight if fits else {f"model.diffusion_model.{name}": x}
    for name, x in load_file(base() / TEXT_FILE).items():
        for ours, other in (("token_embedding", "shared"), ("norm.w", "encoder.final_layer_norm.w")):
            name = name.replace(ours, other) if name.startswith(ours) else name
        for ours, other in {
                "blocks.": "encoder.block.", ".attn.": ".layer.0.SelfAttention.", ".norm1": ".layer.0.layer_norm",
                ".norm2": ".layer.1.layer_norm", ".ffn.gate.0": ".layer.1.DenseReluDense.wi_0",
                ".ffn.fc1": ".layer.1.DenseReluDense.wi_1", ".ffn.fc2": ".layer.1.DenseReluDense.wo",
                ".pos_embedding.embedding": ".layer.0.SelfAttention.relative_attention_bias"}.items():
            name = name.replace(ours, other)
        theirs["text"][name] = x
    for model, state in theirs.items():
        save_file(state, tmp_path / f"{model}.safetensors")
    shutil.copy(base() / "config.json", tmp_path)                       # says the number of heads
    plain, other = sampled("ball"), sampled("ball", "--text", tmp_path / "text.safetensors")
    assert torch.equal(plain, other)
    close(sampled("ball", "--dit", tmp_path / "dit.safetensors", "--dora="), sampled("ball", "--dora="), 0.5)
    names = {"decoder.up_blocks.1.resnets.0.conv1.weight": "decoder.upsamples.3.residual.2.weight",
             "decoder.up_blocks.0.upsamplers.0.resample.1.weight": "decoder.upsamples.2.resample.1.weight",
             "decoder.up_blocks.0.resnets.1.norm2.gamma": "decoder.upsamples.1.residual.3.gamma",
             "encoder.mid_block.attentions.0.to_qkv.bias": "encoder.middle.1.to_qkv.bias",
             "encoder.down_blocks.3.conv_shortcut.weight": "encoder.downsamples.3.shortcut.weight",
             "encoder.conv_out.bias": "encoder.head.2.bias", "post_quant_conv.weight": "conv2.weight"}
    assert spellings.wan_names(names) == names
    names = {"blocks.0.norm2.weight": "blocks.0.norm3.weight", "proj_out.bias": "head.head.bias",
             "blocks.1.attn2.to_out.0.weight": "blocks.1.cross_attn.o.weight", "scale_shift_table": "head.modulation",
             "blocks.1.scale_shift_table": "blocks.1.modulation", "blocks.0.ffn.net.0.proj.bias": "blocks.0.ffn.0.bias",
             "condition_embedder.time_proj.weight": "time_projection.1.weight"}
    assert spellings.wan_names(names) == names


def test_more_adapters_are_merged_in_their_order(tmp_path):
    files = {}
    for name in ("one", "two"):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({f"blocks.0.ffn.0.{key}": named(name + key, shape) for key, shape in
                   {"lora_A.weight": (2, 48), "lora_B.weight": (96, 2)}.items()}, files[name])
    args = settled("ball", "--lora", f"{files['one']}:0.5", files["two"])
    assert args.experts[0].adapters[1:] == [(str(files["one"]), 0.5), (str(files["two"]), 1.0)]
    plain, more = sampled("ball"), sampled("ball", "--lora", f"{files['one']}:0.5")
    far(plain, more)


@pytest.mark.parametrize("rank, kind", [(0, ValueError), (1, SystemExit)])
def test_an_error_in_one_process_ends_all(rank, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda errors, own: errors.append(ValueError("lost")))
    refuses(lambda: request.prepare(parsed("ball", "--out", tmp_path), rank, 2, None), errors=kind)


# ---- kit/memory.py and kit/scale.py


@pytest.mark.parametrize("free, flags, advice", [
    (17, "", None), (9, "", f"give {HALF}"), (9, HALF, None), (5, HALF, "give --offload"),
    (2.5, "", f"give {HALF} --offload"), (1.5, "", f"give {HALF} {LESS}"), (9, LESS, None),
    (1.5, f"{HALF} {LESS} --frames 401", "give a smaller --size or fewer --frames"),
    (1.5, f"{HALF} {LESS} --frames 81", None), (0.01, "", "take a smaller model or a larger machine")])
def test_too_large_a_model_names_the_fewest_flags_that_make_it_fit(free, flags, advice, monkeypatch):
    def needs(dit, tokens, dtype, offload, fp8, ranks, shard):
        return (1 if offload else 4) * dtype.itemsize // (2 if fp8 else 1) * 2 ** 30 + tokens * 2 ** 20, 0
    args = settled("ball", *flags.split())
    monkeypatch.setattr(memory, "dit_memory", needs)
    monkeypatch.setattr(memory, "free_memory", lambda device: free * 2 ** 30)
    if advice is None:
        request.check(args)
    else:
        said = refuses(lambda: request.check(args), "the transformer needs", f"{free:.1f} are free")
        assert said.endswith(f"; {advice}")


@pytest.mark.parametrize("device, free, frames, size, chunk", [
    ("cpu", 2 ** 50, 17, (48, 32), 1), ("cuda", 0, 17, (48, 32), 1), ("cuda", 2 ** 50, 17, (48, 32), 5),
    ("cuda", 2 ** 33, 81, (832, 480), 1), ("cuda", 2 ** 35, 81, (832, 480), 2), ("cuda", 2 ** 50, 81, (832, 480), 4)])
def test_chunks_of_decoding_grow_with_free_memory(device, free, frames, size, chunk, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    args = Namespace(device=device, frames=frames, size=size, vae_dtype=torch.float32)
    assert memory.choose_chunk(args, Namespace(dim=96)) == chunk


def test_memory_estimates_at_known_sizes():
    """14B is 28.6 GB in bfloat16 (14.3e9 parameters); streaming keeps two of forty blocks on the device."""
    clip, ways = 21 * 30 * 52, ({}, dict(offload=True), dict(ranks=8, shard=True))        # 81 frames of 832 x 480
    assert abs(memory.dit_memory(WAN_14B, 1, torch.bfloat16)[0] / 1e9 - 28.8) < 0.5
    assert abs(memory.dit_memory(WAN_1_3B, 1, torch.float32)[0] / 5.7e9 - 1) < 0.05
    whole, streamed, sharded, small = (memory.dit_memory(WAN_14B, clip, torch.bfloat16, **way)
                                       for way in (*ways, dict(fp8=True)))
    assert 33e9 < whole[0] < 40e9 and streamed[0] < 11e9 and 27e9 < streamed[1] < 31e9
    assert 7e9 < sharded[0] < 11e9 and small[0] < 24e9
    whole, streamed, sharded, two = (memory.training_memory(WAN_14B, clip, **way) for way in (*ways, dict(batch=2)))
    assert abs(whole["weights"] / 28.95e9 - 1) < 0.01 and abs(whole["total"] / 72.2e9 - 1) < 0.01
    assert streamed["host"] == whole["kept"] == 20 * streamed["kept"] and two["kept"] == 2 * whole["kept"]
    assert sharded["weights"] < whole["weights"] / 5 and sharded["block"] == whole["block"]


def test_training_memory_is_what_a_step_allocates():
    """Kept and block, and a quarter of the adapters' bytes for their gradients, against the allocator's own events.
    Blocks that are computed again give the same gradients; in host memory, which is the device here, they keep more."""
    config, gradients = DiTConfig(dim=256, ffn_dim=640, num_heads=4, num_layers=6, text_dim=32, text_len=8), []
    inputs = named("z", (1, 16, 4, 32, 32)), torch.tensor([500.0]), named("context", (1, 8, 32))
    for checkpoint, offload, tolerance in ((False, False, 0.03), (True, False, 0.03), (True, True, 0.06)):
        model = scale.place_dit(WanDiT(config), WanDiT(config).state_dict().items(), torch.bfloat16)
        dora.add_dora(model, 4, 4, r".*_attn\.[qkvo]|.*\.ffn\.[02]")
        model.load_state_dict(named_like(model))
        if checkpoint:
            scale.checkpoint_blocks(model, Block, offload)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            model(*inputs).square().mean().backward()
        changes = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = max(accumulate(size for _, size in sorted(changes)))
        expected = memory.training_memory(config, 4 * 16 * 16, rank=4, checkpoint=checkpoint)
        assert expected["adapters"] == 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert abs(peak / (expected["kept"] + expected["block"] + expected["adapters"] / 4) - 1) < tolerance
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        for name, gradient in gradients[0].items():
            close(gradients[-1][name], gradient, 0.1)           # both are sums of bfloat16 products


SMALL_INPUTS = [(named("scale.z", (2, 16, 3, 2, w)), torch.tensor([750.0, 20.0]), named("scale.context", (2, 7, 32)))
                for w in (4, 6, 10)]        # 6, 9 and 15 tokens


@cache
def small_dit():
    folder, config = Path(kept().name) / "small", DiTConfig(48, 96, 2, 3, text_dim=32, text_len=16)
    save_tensors(folder / DIT_FILE, named_like(WanDiT(config)))
    save_json(folder / "config.json", vars(config))
    return folder


@pytest.mark.parametrize("way", [dict(dtype=torch.float32), dict(dtype=torch.bfloat16), dict(fp8=True)])
@torch.no_grad()
def test_streamed_blocks_give_the_same_bits(way):
    """Also in a second call, whose first block must not see what the first call left in the buffers."""
    resident, streamed = (scale.load_scaled(small_dit(), **way, offload=offload) for offload in (False, True))
    assert len(streamed.blocks.slots) == 2 and all(torch.equal(streamed(*x), resident(*x)) for x in SMALL_INPUTS)


def test_tensors_that_share_a_page_do_not_overlap():
    pages = scale.PinnedPages(size=2048, pin=False)
    kinds = [((3, 50), torch.float32), ((7,), torch.bfloat16), ((1000,), torch.float32), ((), torch.float32)]
    tensors = [pages.empty(*kind).fill_(i) for i, kind in enumerate(kinds)]
    assert all((x == i).all() and (x.shape, x.dtype) == kinds[i] for i, x in enumerate(tensors))
    assert tensors[0].untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr()


@torch.no_grad()
def test_float8_is_close_and_one_byte():
    """Rows of very different size keep their own scale; the result moves by a few percent."""
    weight = named("rows", (8, 64)) * 10.0 ** torch.arange(-4, 4)[:, None]
    numbers, factors = scale.quantize(weight)
    assert ((numbers.float() * factors - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.04
    model, small = load_dit(small_dit()), scale.load_scaled(small_dit(), fp8=True)
    layers = [m for m in small.modules() if isinstance(m, scale.FP8Linear)]
    assert len(layers) == 10 * 3 and all(m.weight.dtype == torch.float8_e4m3fn for m in layers)
    v, got = model(*SMALL_INPUTS[1]), small(*SMALL_INPUTS[1])
    assert 1e-4 < (got - v).norm() / v.norm() < 0.05


TWO = """
import sys, torch, generate
from kit import command, scale
command.start_process_group()
dit, cases, *argv = sys.argv[1:]
with torch.inference_mode():
    for way, local, results in torch.load(cases):
        model = scale.load_scaled(dit, **way)
        for inputs, v in results:
            assert (model(*inputs) - v).abs().max() < 1e-5, way
        assert sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local")) == local, way
generate.main(argv)
"""


@torch.no_grad()
def test_two_processes_equal_one(tmp_path, capfd):
    """6 tokens, then 9 and 15, which two cannot halve; each process keeps half of the matrices when sharded."""
    whole, small = (scale.load_scaled(small_dit(), fp8=fp8) for fp8 in (False, True))
    half = sum(p.numel() for name, p in whole.blocks.named_parameters() if "norm" not in name and p.ndim < 3) // 2
    ways = ({}, 0, whole), (dict(shard=True), half, whole), (dict(offload=True), 0, whole), (dict(fp8=True), 0, small)
    cases = [(way, local, [(inputs, model(*inputs)) for inputs in SMALL_INPUTS]) for way, local, model in ways]
    torch.save(cases, tmp_path / "cases.pt")
    flags = "ball", "--base", base(), "--frames", 5, "--size", "32x16", "--seed", 1
    launch(tmp_path, TWO, small_dit(), tmp_path / "cases.pt", "--out", tmp_path, *flags)
    assert capfd.readouterr().out == f"{tmp_path / 'ball-1'}\n"                 # said once
    (single,) = make(tmp_path / "one", *flags)
    for one, two in zip(read_rgba(single / "frames"), read_rgba(tmp_path / "ball-1" / "frames")):
        assert np.abs(one.astype(int) - two).max() <= 1


# ---- trainings: the same steps however they are cut, stopped or shared

SMALL = "--size 32 --seed 3 --save-every 2 --log-every 1 --lr 1e-3 --muon"
RESULTS = {"vae-base": VAE_FILE, "dit-base": DIT_FILE, "vae-rgba": VAE_ADAPTER, "dit-rgba": DORA_FILE}


def four_trainings(folder):
    """name -> (main, arguments) of all trainings, four steps each at the smallest size: a whole checkpoint folder."""
    data, out = folder / "data", folder / "base"
    clips.main(f"{data} --clips 3 --size 32 --frames 5".split())
    latents = f"--steps 4 --batch 2 --frames 5 --cache {folder}/cache {SMALL} --base {out} --out {out}"
    sizes = "--dim 24 --heads 2 --layers 1 --text-dim 16 --text-layers 1 --text-len 48"
    crops = f"--rank 2 --perceptual 0 {SMALL} --base {out} --out {out}"
    trainings = {
        "vae-base": (pretrain.main, f"vae {data} --schedule 2:1:16:2,2:5:32:2 --dim 8 {SMALL} --out {out}"),
        "dit-base": (pretrain.main, f"dit {data} {latents} {sizes}"),
        "vae-rgba": (train_vae.main, f"{data} --schedule 4:5:32:2 {crops}"),
        "dit-rgba": (train_dit.main, f"{data} {latents} --rank 2")}
    return {name: (main, arguments.split()) for name, (main, arguments) in trainings.items()}


def curve(folder):
    return [json.loads(row)["loss"] for row in (folder / "log.jsonl").open()]


def test_all_four_trainings_resume_bit_for_bit(tmp_path, monkeypatch):
    """Ended in the middle of step 3 and resumed, each run writes the same bytes as one that was never stopped."""
    out, backward = tmp_path / "base", Run.backward
    torch.set_num_threads(1)

    def killed(self, losses):
        if self.step == 2:
            raise KeyboardInterrupt
        backward(self, losses)
    for name, (main, arguments) in four_trainings(tmp_path).items():
        main(arguments)
        expected, losses = load_file(out / RESULTS[name]), curve(out / name)
        shutil.rmtree(out / name)
        (out / RESULTS[name]).unlink()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "backward", killed)
            main(arguments)
        assert not (out / RESULTS[name]).exists() and (out / name / "checkpoint.pt").exists()
        main([*arguments, "--resume"])
        result = load_file(out / RESULTS[name])
        assert result.keys() == expected.keys() and all(torch.equal(result[k], expected[k]) for k in expected), name
        assert len(losses) == 4 and curve(out / name) == losses
    assert "blocks.0.cross_attn.o.lora_magnitude_vector.default.weight" in load_file(out / DORA_FILE)


@contextmanager
def stop_after(step):
    """As if SIGTERM had come in that step, counted from 1."""
    update = Run.update

    def caught(self, lr):
        if self.step + 1 == step:
            self.caught.append(signal.SIGTERM)
        return update(self, lr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "update", caught)
        yield


TWO_TRAIN = """
import json, sys, torch
from kit import pretrain
from kit.command import end_process_group
from kit.test_kit import stop_after, train_dit, train_vae
torch.set_num_threads(1)
for script in (train_vae, train_dit, pretrain):
    script.end_process_group = lambda: None
from kit import run
run.end_process_group = lambda: None
for name, arguments, stop in json.loads(sys.argv[1]):
    script = pretrain if name.endswith("base") else dict(vae=train_vae, dit=train_dit)[name[:3]]
    with stop_after(stop):
        try:
            script.main(arguments)
        except SystemExit as left:
            assert stop and left.code == 130
end_process_group()
"""


def into(out, arguments):
    arguments = list(arguments)
    arguments[arguments.index("--out") + 1] = str(out)
    return arguments


def same_training(one, two, name):
    for a, b in zip(curve(one / name), curve(two / name), strict=True):
        assert abs(a - b) <= 1e-4 * abs(a), (name, a, b)
    got, expected = load_file(two / RESULTS[name]), load_file(one / RESULTS[name])
    assert all(torch.allclose(got[k], expected[k], atol=1e-3) for k in expected), name


def test_processes_and_passes_train_as_one(tmp_path):
    """All four trainings: two processes, and two passes a batch, give the loss curve of one from the same global batch,
    and the same weights; sharded too. A run of two processes goes on in one, and back in two."""
    commands, out = four_trainings(tmp_path), tmp_path / "base"
    torch.set_num_threads(1)
    for main, arguments in commands.values():
        main(arguments)
    two, back, passes = tmp_path / "two", tmp_path / "back", tmp_path / "passes"
    jobs = [(name, into(two, arguments), 0) for name, (_, arguments) in commands.items()]
    jobs[1][1][jobs[1][1].index("--base") + 1] = str(two)
    jobs[-1][1].append("--shard")
    main, moved = commands["dit-rgba"][0], into(back, commands["dit-rgba"][1])
    launch(tmp_path, TWO_TRAIN, json.dumps([*jobs, ("dit-rgba", moved, 1)]))
    with stop_after(3), pytest.raises(SystemExit):
        main([*moved, "--resume"])
    assert len(curve(back / "dit-rgba")) == 3 and not (back / DORA_FILE).exists()
    launch(tmp_path, TWO_TRAIN, json.dumps([("dit-rgba", [*moved, "--resume", "--shard"], 0)]))
    for name in ("vae-rgba", "dit-rgba"):
        main, arguments = commands[name]
        main([*into(passes, arguments), "--accumulate", "2"])
        same_training(out, passes, name)
    for name in RESULTS:
        same_training(out, two, name)
    same_training(out, back, "dit-rgba")


# ---- one training, ended in many ways


def a_training(folder, *flags, steps=30):
    """A short DoRA training whose latents are in the cache: fit for being stopped."""
    arguments = [*(f"{folder}/data --base {base()} --out {folder}/out --cache {folder}/cache --steps {steps} --batch 2 "
                 "--rank 2 --size 32 --frames 5 --seed 3 --muon --save-every 1 --log-every 1 --lr 1e-3").split(),
                 *flags]
    if not (folder / "data").exists():
        clips.main(f"{folder}/data --clips 3 --size 32 --frames 5".split())
        encode(arguments)
    return arguments


def encode(arguments):
    args = train_dit.make_parser().parse_args(arguments)
    train_dit.settle(args)
    dataset = open_data(args.data, args.size[::-1], args.frames, 0, keep_aspect=True)
    return dataset, train_dit.encode_clips(args, dataset)


@pytest.fixture
def no_sheets(monkeypatch):
    monkeypatch.setattr(train_dit, "draw_held_out", lambda *_: [])
    monkeypatch.setattr(train_dit, "contact_sheet", lambda *_: None)


def started(arguments):
    """The training in a process of its own."""
    torch.set_num_threads(1)

    def work():
        os.setpgrp()
        sys.exit(run_command(lambda: train_dit.main(arguments), "train_dit.py"))
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def steps_done(out):
    log = out / "dit-rgba/log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition() and process.is_alive() and time.time() < end:
        time.sleep(0.002)


def test_killed_ten_times_it_ends_with_the_same_bits(tmp_path, no_sheets):
    """SIGKILL at random moments: the checkpoint is always whole, and the end is that of an unbroken run.
    `KILLS=60 pytest -k killed` kills 60 times."""
    kills = int(os.environ.get("KILLS", 10))
    steps = max(30, 4 * kills)
    arguments, out, chance = a_training(tmp_path, steps=steps), tmp_path / "out", random.Random(0)
    process = started(arguments)
    process.join()
    expected = load_file(out / DORA_FILE)
    shutil.rmtree(out)
    for _ in range(kills):
        resume = ["--resume"] if (out / "dit-rgba/checkpoint.pt").exists() else []
        wanted, process = steps_done(out) + chance.randint(1, 3), started([*arguments, *resume])
        wait_for(lambda: steps_done(out) >= (wanted if resume else 1), process)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
    assert not (out / DORA_FILE).exists()
    process = started([*arguments, "--resume"])
    process.join()
    got, rows = load_file(out / DORA_FILE), [json.loads(row)["step"] for row in (out / "dit-rgba/log.jsonl").open()]
    assert process.exitcode == 0 and rows == list(range(1, steps + 1))
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, tmp_path, no_sheets, capfd):
    process = started(a_training(tmp_path, steps=500))
    wait_for(lambda: steps_done(tmp_path / "out") >= 2, process)
    os.killpg(process.pid, number)                                        # its workers too, as torchrun does
    process.join(30)
    saved = torch.load(tmp_path / "out/dit-rgba/checkpoint.pt", weights_only=True)
    assert process.exitcode == 130 and saved["step"] == steps_done(tmp_path / "out") < 500
    said = capfd.readouterr().err
    assert f"stopped after step {saved['step']}" in said and "--resume" in said and "Traceback" not in said


def test_a_second_signal_ends_a_training_at_once(tmp_path, no_sheets, monkeypatch):
    monkeypatch.setattr(train_dit, "flow_step", lambda *_, **__: time.sleep(60))
    process = started(a_training(tmp_path))
    wait_for(lambda: (tmp_path / "out/dit-rgba/run.json").exists(), process)
    time.sleep(2)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
    process.join(5)
    assert process.exitcode == 130


def test_what_was_trained_is_used_by_one_flag_and_the_next_command_is_told(tmp_path, no_sheets, capsys):
    out, arguments = tmp_path / "out", a_training(tmp_path, steps=8)
    at = arguments.index("--rank")
    train_dit.main(arguments[:at] + arguments[at + 2:] + ["--start", str(base())])      # rank 4, as what it starts with
    said = capsys.readouterr()
    caption = open_data(tmp_path / "data", 32, 5, 0).caption(0)
    assert said.out.splitlines()[-1] == shlex.join(["next:", "python", "generate.py", caption, "--run", str(out)])
    assert re.search(r"about [\d.]+ s to go, .* GB so far", said.err)
    asked = settled(caption, "--run", out)
    assert (asked.base, asked.experts[0].adapters, asked.frames) == (base(), [(str(out / DORA_FILE), 1.0)], 5)
    assert tuple(asked.size) == (32, 32) and asked.vae_adapter == [str(base() / VAE_ADAPTER)]
    scored = evaluate.parse_args(["dit", "--run", str(out)])
    assert (scored.base, scored.dora, scored.frames) == (str(base()), str(out / DORA_FILE), 5)
    assert len(load_file(out / DORA_FILE)["blocks.0.ffn.0.lora_A.default.weight"]) == 4
    (out / DORA_FILE).unlink()
    refuses(lambda: settled("ball", "--run", out), "not finished", "--resume")
    refuses(lambda: settled("ball", "--run", tmp_path), "no training")


def test_a_released_adapter_is_a_start_and_after_decoders_alone_the_merge_block_trains(tmp_path):
    clips.main(f"{tmp_path}/data --clips 3 --size 32 --frames 5".split())
    released = load_file(base() / VAE_ADAPTER)
    decoders = {key: x for key, x in released.items() if not key.startswith("middle")}
    for name, state in dict(whole=released, decoders=decoders).items():
        torch.save({key: x.bfloat16() for key, x in state.items()}, tmp_path / f"{name}.bin")
        train_vae.main(f"{tmp_path}/data --base {base()} --out {tmp_path}/{name} --start {tmp_path}/{name}.bin "
                       "--tabd 0 --perceptual 0 --schedule 3:5:32:2 --size 32 --lr 1e-3 --warmup 1 --workers 0".split())
        made = load_file(tmp_path / name / VAE_ADAPTER)
        moved = {key.split(".")[0] for key, x in made.items() if not torch.equal(x, released[key].bfloat16().float())}
        assert moved == ({"middle"} if name == "decoders" else {"middle", "vae_fgr", "vae_pha"}), moved


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, no_sheets, monkeypatch):
    arguments, replacing = a_training(tmp_path, steps=6), run.replacing

    @contextmanager
    def full(path):
        if path.name == "checkpoint.pt" and steps_done(tmp_path / "out") == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        with replacing(path) as temporary:
            yield temporary
    monkeypatch.setattr(run, "replacing", full)
    refuses(lambda: train_dit.main(arguments), "cannot write into", "No space left", "checkpoint.pt is the last good")
    assert torch.load(tmp_path / "out/dit-rgba/checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.undo()
    (tmp_path / "file").write_text("not a folder")
    refuses(lambda: train_dit.main([*arguments, "--out", str(tmp_path / "file/out")]), "cannot write into")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, no_sheets, monkeypatch):
    arguments, step, calls = a_training(tmp_path, "--workers", "0", steps=6), train_dit.flow_step, []

    def broken(*args, **options):
        calls.append(1)
        factor = float("nan") if len(calls) == 4 else 1
        return {name: value * factor for name, value in step(*args, **options).items()}
    monkeypatch.setattr(train_dit, "flow_step", broken)
    refuses(lambda: train_dit.main(arguments), "not finite at step 3, clips 0000", ".apng", "is the last good state")
    saved = torch.load(tmp_path / "out/dit-rgba/checkpoint.pt", weights_only=True)
    assert saved["step"] == 3 and all(bool(x.isfinite().all()) for x in saved["model"].values())
    usual = [0.1] * 200
    run.check_loss(4.9, 1.0, usual, 200, ["a"], Path("c.pt"))
    run.check_loss(9.0, 1.0, usual[:50], 50, ["a"], Path("c.pt"))
    refuses(lambda: run.check_loss(5.1, 1.0, usual, 200, ["a"], Path("c.pt")), "over 50 times its median", "clips a")


def test_a_training_begins_with_weights_that_one_has_written(tmp_path, no_sheets):
    """At a learning rate of nothing they come out as they went in."""
    a_training(tmp_path)
    vae = f"{tmp_path}/data --base {base()} --perceptual 0 --tabd 0 --rank 2 --schedule 2:1:16:2 --workers 0"
    dit = f"{tmp_path}/data --base {base()} --cache {tmp_path}/cache --size 32 --frames 5 --rank 2 --steps 2 --batch 1"
    for main, flags, name in ((train_vae.main, vae, "Wan-Alpha-v2-VAE.safetensors"), (train_dit.main, dit, DORA_FILE)):
        first, second = (tmp_path / name.split("-")[0] / part for part in "ab")
        main([*flags.split(), "--out", str(first), "--lr", "0.01", "--warmup", "1"])
        main([*flags.split(), "--out", str(second), "--lr", "1e-12", "--start", str(first / name)])
        one, two = load_file(first / name), load_file(second / name)
        assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)
        assert any(".lora_B" in key and value.any() for key, value in one.items())
        other = [*flags.replace("--rank 2", "--rank 3").split(), "--out", str(tmp_path / "c"), "--start"]
        refuses(lambda: main([*other, str(first / name)]), "does not fit")


def test_resume_wants_the_same_run_and_a_new_one_a_new_folder(tmp_path, no_sheets):
    arguments = a_training(tmp_path, steps=2)
    refuses(lambda: train_dit.main([*arguments, "--resume"]), "checkpoint.pt to go on from")
    train_dit.main(arguments)
    said = (tmp_path / "out/dit-rgba/run.json").read_text()
    refuses(lambda: train_dit.main(arguments), "holds a run already: --resume goes on")
    for flags, named in ((["--lr", "2e-3"], "other lr:"), (["--mean", "0.1", "--seed", "4"], "other mean, seed:")):
        refuses(lambda: train_dit.main([*arguments, *flags, "--resume"]), named, "--start")
    refuses(lambda: train_dit.main([*arguments, "--out", str(tmp_path / "new"), "--start", __file__]), "checkpoint")
    assert (tmp_path / "out/dit-rgba/run.json").read_text() == said
    train_dit.main([*arguments, "--resume", "--workers", "2", "--save-every", "7"])       # it is finished: no step left
    (tmp_path / "data/00002.apng").unlink()
    refuses(lambda: train_dit.main([*arguments, "--resume"]), "other data")


def test_summary_curves_and_record_are_written(tmp_path, no_sheets, capsys):
    train_dit.main(a_training(tmp_path, "--lora", "--rank", "8", steps=3))       # matrices only: all for Muon
    folder = tmp_path / "out/dit-rgba"
    summary, record = (json.loads((folder / name).read_text()) for name in ("summary.json", "run.json"))
    assert summary["steps"] == 3 and 0 <= summary["waited_for_data"] <= 1 and summary["peak_memory_gb"] > 0.1
    assert iio.imread(folder / "curves.png").shape[2] == 3 and "steps a second" in capsys.readouterr().out
    assert record["arguments"]["betas"] == [0.9, 0.999] and record["versions"]["processes"] == 1
    assert {key.split(".")[-3] for key in load_file(tmp_path / "out" / DORA_FILE)} == {"lora_A", "lora_B"}


def test_a_folder_of_mixed_aspects_trains_draws_and_survives_damaged_records(tmp_path):
    for i, size in enumerate(((16, 32), (32, 16))):
        clip = clips.procedural_clip(i, size, 1, two=0)
        clips.write_rgba(tmp_path / f"data/{i}.webp", clip.rgb, clip.alpha)
    arguments = a_training(tmp_path, "--size", "32x16", "--frames", "1", "--save-every", "2", steps=2)
    train_dit.main(arguments)
    assert (tmp_path / "out" / DORA_FILE).exists() and (tmp_path / "out/dit-rgba/sheet-000002.png").exists()
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-100])                        # cut: made again
    (tmp_path / "data/.checked.json").write_text('[1, {"name": 2}')
    with (tmp_path / "out/dit-rgba/log.jsonl").open("a") as log:
        log.write('{"step": 3, "los')
    train_dit.main([*arguments, "--resume"])
    names = {"z", "mask", "still_mask", "context"}
    assert all(load_file(file).keys() == names for file in (tmp_path / "cache").iterdir())


# ---- parts of a run


class Draw:
    """A batch that shows which samples it is made of."""

    def __call__(self, step, generators):
        if step == 5:
            raise ValueError("clip.mov cannot be read")
        return dict(step=step, x=torch.stack([torch.rand((), generator=generator) for generator in generators]))


def run_flags(**changed):
    """The defaults of the flags that all trainings share."""
    parser = Parser()
    run.add_run_flags(parser)
    return Namespace(**vars(parser.parse_args([])) | dict(device="cpu") | changed)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_bring_batches_in_order_and_errors_as_they_are(workers):
    args = run_flags(workers=workers, seed=1)
    batches = load_batches(run.Batches(Draw(), [2] * 8, args), range(2, 8), args)
    for step in (2, 3, 4):
        (batch,) = next(batches)
        fresh = [sample_generator(1, step, index) for index in range(2)]
        assert batch["step"] == step and batch["x"].tolist() == [float(torch.rand((), generator=g)) for g in fresh]
        later = [torch.rand((), generator=g) for g in batch["generators"]]      # they travelled, and go on
        assert later == [torch.rand((), generator=g) for g in fresh]
    refuses(lambda: next(batches), "clip.mov cannot be read (the run stopped there; --resume")


def test_every_sample_has_random_numbers_of_its_own():
    seen = {sample_generator(*numbers).initial_seed() for numbers in product((0, 1), range(50), range(-1, 40))}
    assert len(seen) == 2 * 50 * 41 and max(seen) < 2 ** 32                 # what torch's generator takes of a seed
    assert [list(part) for rank in range(2) for part in shares(12, rank, 2, 3)] == [[k, k + 1] for k in range(0, 12, 2)]
    refuses(lambda: shares(10, 0, 2, 2), "batch of 10 cannot be cut into 4 equal parts")


def test_muon_moves_kernels_as_matrices_b_takes_larger_steps_and_the_rate_falls():
    shapes = (16, 2, 3, 3), (16, 18)
    kernel, matrix = (nn.Parameter(named("kernel", shapes[0]).reshape(shape)) for shape in shapes)
    for p in (kernel, matrix):
        _, muon = run.make_optimizers(nn.ParameterList([p, nn.Parameter(torch.ones(1))]), run_flags(lr=0.1, muon=True))
        (p * named("slope", (16, 18)).reshape(p.shape)).sum().backward()
        muon.step()
    assert torch.equal(kernel.flatten(1), matrix) and not torch.equal(matrix, named("kernel", (16, 2, 3, 3)).flatten(1))
    (adamw,) = run.make_optimizers(add_dora(nn.Sequential(nn.Linear(3, 3)), 2, 2, ".*"), run_flags(lora_plus=16.0))
    assert {group["scale"]: [len(p) for p in group["params"]] for group in adamw.param_groups} == {1: [2, 3], 16: [3]}
    rates = [run.learning_rate(step, 100, 2.0, warmup=10) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == rates[9] and 0 < rates[-1] < 0.05


def test_times_are_float32_under_autocast():
    """The base transformer computes in bfloat16, which knows no difference between the times 999 and 1000."""
    model, seen = tiny_dit(), []
    pretrain.keep_float32(model.time_embedding, model.time_projection, model.head.head)
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            assert model(*dit_inputs()).dtype == torch.float32
    assert seen[0].dtype == seen[1].dtype == torch.float32 and torch.equal(*seen)


def test_renders_of_one_clip_are_all_held_out_or_none_and_opaque_clips_are_taken_as_they_are(tmp_path):
    args = Namespace(base=base(), device="cpu", bf16=False, cache=str(tmp_path / "cache"))
    for name, flags in dict(clear=[], opaque=["--scenes"]).items():
        clips.main([str(tmp_path / name), "--clips", "20", "--size", "16", "--frames", "1", *flags])
        dataset = open_data(tmp_path / name, 16, 1, 0, opaque=True)
        files, captions, training = pretrain.encode_renders(args, dataset)
        assert len({*files}) == len(files) == len(captions) and not any("transparent" in text for text in captions)
        renders = 2 if "transparent" in dataset.caption(19) else 1
        assert dataset.training == 19 and training == len(files) - renders
        assert (len(files) > 20) == (name == "clear")
    item, generators = dataset[0], [sample_generator(0, 0, i) for i in range(40)]
    rgb, alpha = (item[name].expand(40, -1, -1, -1, -1) for name in ("rgb", "alpha"))
    assert torch.equal(pretrain.rgb_views(rgb, alpha, generators), rgb)
    views = pretrain.rgb_views(rgb, 0 * alpha, [sample_generator(0, 0, i) for i in range(40)])
    assert len({tuple(view[:, 0, 0, 0].tolist()) for view in views}) > 15                     # colours; alpha is black


def test_a_cached_context_depends_on_the_length_that_prompts_are_cut_to(tmp_path, monkeypatch):
    """And decoded clips are let go before the training begins."""
    folder = shutil.copytree(base(), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    arguments = [*a_training(tmp_path), "--base", str(folder)]
    found = []
    for length in (32, 5):
        (folder / "config.json").write_text(json.dumps(config | dict(text_len=length)))
        dataset, files = encode(arguments)
        found.append([len(load_file(file)["context"]) for file in files])
        assert not dataset.kept
    assert min(found[0]) > 5 and max(found[1]) == 5


def test_tests_that_a_docstring_names_exist():
    sources = [file.read_text() for file in [*ROOT.glob("*.py"), *ROOT.glob("kit/*.py")]]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    named_somewhere = {name for source in sources for name in re.findall(r"\(?(test_\w+)[,;): ]", source)}
    assert named_somewhere - defined <= {"test_all", "test_kit"}


# ---- curves


def curve_pixels(path):
    """y, x of the curve's pixels."""
    return np.nonzero((iio.imread(path) == curves.CURVE).all(-1))


def test_curves_have_a_panel_for_each_scalar_rise_and_leave_gaps(tmp_path):
    file = tmp_path / "curves.png"
    for n, shape in ((1, (200, 360, 3)), (8, (600, 1080, 3))):
        curves.draw_curves(file, [dict(step=step, seconds=1.0, **{f"x{i}": step for i in range(n)}) for step in (1, 2)])
        assert iio.imread(file).shape == shape
    for values in (range(-4, 4), [10.0 ** i for i in range(8)]):                    # decades on a log axis
        curves.draw_curves(file, [dict(step=i, loss=value) for i, value in enumerate(values)])
        y, x = curve_pixels(file)
        top = np.array([y[x == column].min() for column in np.unique(x)])
        assert np.ptp(x) > 250 and np.abs(top - np.linspace(top[0], top[-1], len(top))).max() < 3 < top[0] - top[-1]
    curves.draw_curves(file, [dict(step=i, loss=np.nan if i == 4 else 1 + i % 2) for i in range(9)] + [dict(step=9)])
    columns = np.unique(curve_pixels(file)[1])
    assert (np.diff(columns) > 20).sum() == 1 and columns[-1] < 330
    curves.draw_curves(file, [dict(step=1, loss=0.5, tabd=np.nan)])
    assert len(curve_pixels(file)[0]) > 0                                           # one row is a dot


# ---- wrong input of the trainings

WRONG_TRAININGS = {       # script -> arguments, and the word that the sentence must hold
    train_vae: [("nowhere --schedule 9:5:32:2", "nowhere"), ("", "data"), ("{data} --schedule 10:4:32:2", "4k+1"),
                ("{data} --schedule -1:5:32:2", "--schedule"), ("{data} --schedule 9:5:8:2", "16 on"),
                ("{data} --schedule 9:5:24:2", "multiples of 16"), ("{data} --base nowhere", "nowhere"),
                ("{data} --schedule 9:5:32:2 --vgg nowhere.pth", "nowhere.pth"), ("{data} --size 40", "--size 40"),
                ("{data} --schedule 9:5:64:2 --size 32", "--size 32"), ("{data} --device cuda:99", "cuda:99"),
                ("{data} --schedule 9:5:32:1 --tabd-clamp 1 -1", "lower bound"),
                ("{data} --schedule 9:5:32:3 --accumulate 2", "multiple of that")],
    train_dit: [("{data} --frames 16", "4k+1"), ("{data} --size 30x32", "30x32"), ("{data} --base nowhere", "nowhere"),
                ("{data} --vae-adapter nowhere.bin", "nowhere.bin"), ("", "data")],
    pretrain: [("dit {data} --base {data} --dim 50", "--dim 50"), ("dit {data} --base {data} --frames 16", "4k+1"),
               ("vae {data} --out {out} --schedule 1:1:16:1 --start {data}/00000.apng", "00000.apng"),
               ("vae {data} --out {out} --size 32", "--size 32"), ("other", "invalid choice")]}
FLAGS = ("--lr nan", "--lr 0", "--clip -1", "--betas 2 2", "--workers -1", "--warmup 0", "--accumulate 0", "--seed -1",
         "--lora-plus 0", "--weight-decay inf", "--size 0")


def test_trainings_refuse_wrong_input_in_one_sentence(tmp_path):
    clips.main(f"{tmp_path}/data --clips 1 --size 32 --frames 5".split())
    for script, rows in WRONG_TRAININGS.items():
        for arguments, word in rows:
            refuses(lambda: script.main(arguments.format(data=tmp_path / "data", out=tmp_path / "out").split()), word)
    for script in (train_vae, train_dit):
        for flag in FLAGS:
            refuses(lambda: script.main(["data", *flag.split()]), f"argument {flag.split()[0]}", "is not")


@pytest.mark.parametrize("section", [dict(size=64), dict(frames="17"), dict(size=[64, "64"]), 5])
def test_a_wrong_section_of_config_json_is_one_sentence_for_training_too(section, tmp_path):
    folder = shutil.copytree(base(), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(generate=section)))
    refuses(lambda: train_dit.main([str(tmp_path), "--base", str(folder)]), "config.json", "generate")


def test_a_small_model_gets_few_threads_unless_the_user_says(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with torch.device("meta"):
        models = nn.Linear(1000, 1000), nn.Linear(10_000, 6000), nn.Linear(10 ** 5, 10 ** 5)
    for model in models:
        command_line.choose_threads(model)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for model in models:
        command_line.choose_threads(model)
    assert chosen == [1, 3, 8]


def test_a_command_ends_with_the_right_words(capsys):
    def ends(error):
        def main():
            raise error
        return run_command(main, "name"), capsys.readouterr().err
    assert ends(ValueError("two\nlines")) == (2, "name: two lines\n")
    assert ends(KeyboardInterrupt()) == (130, "name: stopped\n")
    for text in ("CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory: you tried"):
        code, said = ends(RuntimeError(text))
        assert code == 2 and "not enough memory" in said
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), KeyError("bug")):
        with pytest.raises(type(error)):                                            # a bug keeps its traceback
            ends(error)


# ---- wrong input of the method: files, adapters, sizes

A, B, M = (f"{Q}.lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector"))
ONE, RGB, ALPHA = torch.ones(1), torch.zeros(1, 3, 9, 16, 16), torch.zeros(1, 1, 9, 16, 16)


def test_checkpoints_are_plain_tensors_and_nothing_else(tmp_path):
    class Code:
        def __reduce__(self):
            return sys.exit, ("a checkpoint's code was run",)
    bad = tmp_path / "bad.pth"
    for content in ({"step": 3}, [ONE], {"a": ONE, "x": Code()}):
        torch.save(content, bad)
        refuses(lambda: Checkpoint(bad).read(), bad, errors=ValueError)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refuses(lambda: Checkpoint(tmp_path / "a.gguf"), "GGUF", "safetensors")
    for save, file in ((torch.save, tmp_path / "good.bin"), (save_file, tmp_path / "good.safetensors")):
        save({"a": RGB}, file)
        whole = file.read_bytes()
        for spoilt in (whole[:len(whole) // 2], b"", b"\x89PNG" + whole):
            file.write_bytes(spoilt)
            refuses(lambda: Checkpoint(file).read(), file, errors=ValueError)


def without(state, key):
    return {name: tensor for name, tensor in state.items() if key not in name}


@pytest.mark.parametrize("place, lost, extra, words", [
    (0, "conv1.bias", "extra", "conv1.bias extra"), (1, "vae_pha", "vgg", "vae_pha"),
    (1, "-", "odd.weight", "odd.weight"), (1, "-", "vae_fgr.no.lora_A.weight", "no.lora_A.weight"),
    *[(1, f"block.{name}", "vgg", f"block.{name}") for name in ("conv1.weight", "head.2.weight", "head.0.gamma")]])
def test_vae_files_that_do_not_fit_name_their_keys(place, lost, extra, words, tmp_path):
    files = rgba_files()[:2]
    torch.save(without(torch.load(files[place]), lost) | {extra: ONE}, tmp_path / "bad.bin")
    files[place] = tmp_path / "bad.bin"
    for device in ("cpu", "meta"):
        refuses(lambda: load_rgba_vae(*files, device=device), files[place], *words.split(), errors=ValueError)


@pytest.mark.parametrize("key, shape, complaint", [
    ("blocks.7.self_attn.q.lora_A.weight", [4, 48], "no target"), (f"{Q}.lora_C.weight", [4, 48], "no target"),
    ("blocks.0.norm3.lora_B.weight", [48, 4], "without"), ("blocks.0.norm3.diff", [49], "(49,), not (48,)"),
    (f"{Q}.dora_scale", [1, 48], "LyCORIS"), (f"{Q}.dora_scale", [48], "LyCORIS"),
    (f"{Q}.lora_A.weight", [4, 48], A), (A, [4, 47], "(4, 47), not (4, 48)"),
    (B, [48, 5], "(48, 5), not (48, 4)"), (M, [1, 48], "(1, 48), not (48,)")])
def test_dora_key_without_target_is_refused(key, shape, complaint):
    adapter = dora_file() | {key: torch.ones(shape)}
    if "dora_scale" in key:
        del adapter[M]
    refuses(lambda: merge_adapter(tiny_dit().state_dict(), adapter), key, complaint, errors=ValueError)


def test_adapted_layers_take_their_own_adapter_alone():
    layer = add_dora(nn.ModuleDict({"q": nn.Linear(4, 6)}), 2, 2, ["q"])
    state, key = adapter_state(layer), "q.lora_A.default.weight"
    changes = {"q.lora_A.weight": state[key]}, {"v.lora_A.weight": ONE}, {key: ONE}
    for wrong in (*(state | change for change in changes), without(state, key)):
        refuses(lambda: load_adapter_state(layer, wrong), "lora_A", errors=ValueError)
    for targets, rank, word in ((["q"], 2, "already"), ("qq", 2, "qq"), (["q", "fnn.0"], 2, "fnn"), (["q"], 0, "rank")):
        refuses(lambda: add_lora(layer, rank, 2, targets), word, errors=ValueError)


def test_dit_files_that_do_not_fit_list_ten_keys(tmp_path):
    state, file, odd = tiny_dit().state_dict(), tmp_path / "other.safetensors", tmp_path / "odd"
    save_file({f"blocks.{i}.self_attn.q.diff_b": torch.zeros(48) for i in range(1, 40)}, file)
    assert refuses(lambda: load_dit(dit_folder(tmp_path / "one"), [(file, 1.0)]), file, "28 more").count("diff_b") == 10
    many = dit_folder(tmp_path / "many", state | {f"extra.{i}": torch.zeros(1) for i in range(30)})
    assert refuses(lambda: load_dit(many), many, "20 more").count("extra.") == 10
    dit_folder(odd, without(state, "blocks.0.ffn.0.weight") | {"img.weight": ONE, "head.modulation": torch.ones(2, 40)})
    refuses(lambda: load_dit(odd), odd, "blocks.0.ffn.0.weight", "img.weight", "(2, 40)", "(1, 2, 48)")


@pytest.mark.parametrize("name, number", [
    ("num_heads", 0), ("num_heads", 5), ("num_heads", 16), ("num_heads", True), ("dim", "48"), ("text_len", None),
    ("ffn_dim", -1), ("num_layers", 2.0), ("eps", "1e-6"), ("eps", 0)])
def test_dit_config_with_a_wrong_number_names_it(name, number, tmp_path):
    file = dit_folder(tmp_path / "tiny") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: number}))
    refuses(lambda: load_dit(file.parent), file, name, errors=ValueError)


@pytest.mark.parametrize("call, word", [
    (lambda: tiny_vae().encode(RGB[:, :, :8]), "4k+1"), (lambda: tiny_vae().encode(RGB, chunk=6), "6"),
    (lambda: tiny_vae().encode(RGB[..., :12]), "divisible by 8"), (lambda: tiny_vae().features(RGB[:, :, :8]), "4k+1"),
    (lambda: tiny_rgba(tiny_vae()).encode(RGB, ALPHA[:, :, :1]), "(1, 1, 1, 16, 16)"),
    (lambda: tiny_rgba(tiny_vae()).encode(RGB[:, :, :8], ALPHA[:, :, :8]), "4k+1"),
    (lambda: load_rgba_vae(*rgba_files()[::2]).encode(RGB, ALPHA), "decoders only"),
    (lambda: load_rgba_vae(*rgba_files()[1:]), "VAE.bin is not a Wan VAE"),
    (lambda: load_rgba_vae(rgba_files()[0], rgba_files()[0]), "RGB first"),
    (lambda: tiny_dit()(*dit_inputs()[:2], torch.zeros(1, 17, 32)), "16 text tokens"),
    (lambda: tiny_dit()(torch.zeros(1, 16, 3, 4, 5), *dit_inputs()[1:]), "(3, 4, 5)")])
def test_calls_with_wrong_input_are_refused(call, word):
    refuses(call, word, errors=ValueError)


# ---- wrong input of text, losses, sampler

TOKENIZER, CONFIG = "google/umt5-xxl/tokenizer.json", "config.json"
FLAT = {f"features.{i}.{part}": torch.zeros(3) for i in (0, 2, 5, 7) for part in ("weight", "bias")}
RISING = torch.linspace(-1, 1, 96).view(1, 8, 12)


@pytest.mark.parametrize("name, content", [
    (TEXT_FILE, b""), (TEXT_FILE, b"<!doctype html>" * 99), (TOKENIZER, b"{}"), (TOKENIZER, b'{"model": '),
    (CONFIG, b"{"), (CONFIG, b"[1]"),
    *[(CONFIG, b'{"text_len": %s}' % value) for value in (b'"9"', b"0", b"-1", b"2.5", b"true", b"null")]])
def test_text_encoder_names_the_file_that_is_wrong_or_missing(tmp_path, name, content):
    file = shutil.copytree(base(), tmp_path / "base") / name
    file.write_bytes(content)
    refuses(lambda: load_text_encoder(tmp_path / "base"), file, errors=ValueError)
    if name != CONFIG:
        file.unlink()
        refuses(lambda: load_text_encoder(tmp_path / "base"), file.with_suffix(""), errors=FileNotFoundError)


def test_text_encoder_lists_the_tensors_that_do_not_fit(tmp_path):
    folder = shutil.copytree(base(), tmp_path / "base")
    state, q, tokenizer = load_file(folder / TEXT_FILE), "blocks.0.attn.q.weight", (folder / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(tokenizer.replace(b"<pad>", b"<nix>"))
    refuses(lambda: load_text_encoder(folder), folder / TOKENIZER, "<pad>")
    make_tokenizer([f"word{i}" for i in range(99)]).save(str(folder / TOKENIZER))
    refuses(lambda: load_text_encoder(folder), folder, "more tokens")
    for foreign in ({"conv1.weight": torch.zeros(3)}, state | {q: torch.zeros(3)}):
        save_file(foreign, folder / TEXT_FILE)
        refuses(lambda: load_text_encoder(folder), TEXT_FILE, "not a umT5 encoder")
    save_file(state | {"norm.weight": torch.ones(31), "lm_head.weight": torch.ones(1)}, folder / TEXT_FILE)
    refuses(lambda: load_text_encoder(folder), TEXT_FILE, "norm.weight is (31,)", "lm_head.weight is (1,)")


@pytest.mark.parametrize("content", [{"classifier.6.bias": torch.zeros(9)}, FLAT, [1, 2]])
def test_vgg_of_another_file_says_how_to_do_without(tmp_path, content):
    torch.save(content, tmp_path / "vgg.pth")
    refuses(lambda: VGG(tmp_path / "vgg.pth"), tmp_path / "vgg.pth", "--perceptual 0", errors=ValueError)
    refuses(lambda: VGG(tmp_path / "none.pth"), tmp_path / "none.pth", "--perceptual 0", errors=FileNotFoundError)


@pytest.mark.parametrize("size", [(8, 64, 96), (9, 60, 96), (9, 64, 90), (0, 64, 96)])
def test_masks_are_of_whole_cells(tmp_path, size):
    torch.save(torch.ones(3, 8, 12), tmp_path / "mask")
    refuses(lambda: gaussian_mask(torch.ones(size)), "4k+1", "multiples of 8")
    refuses(lambda: tabd_mask(torch.ones(1, 1, *size)), "4k+1", "multiples of 8")
    for spec in (None, str(tmp_path / "mask")):
        refuses(lambda: load_mask(spec, *size), "4k+1", "multiples of 8")


@pytest.mark.parametrize("text, word", [
    *[(text, "neither") for text in ("", "0.5,0.5,0.4", "1,2,3,4,5,6", "clip.webm", "a" * 999)],
    ("0.5,0.5,0,0.4", "half axes"), ("0.5,0.5,nan,0.4", "finite"), ("0.5,0.5,1,1; 0.2,0.5,1,1", "rise"),
    ("0:0.5,0.5,1,1; 2:0.5,0.5,1,1", "rise"), ("-1:0.5,0.5,1,1", "rise"),
    ("0.3,0.5,0.2,0.2 + 0.7,0.5,0.2,0.2", "one ellipse at a time"), ("1.2,0.5,0.2,0.2", "outside the frame")])
def test_wrong_ellipses_get_one_sentence(text, word):
    refuses(lambda: load_mask(text, 17, 64, 96), word)
    refuses(lambda: ellipse_mask(17, 64, 96, [(0.5, 0.5, 0.4, 0.4)]), "half axes")


@pytest.mark.parametrize("mask, word", [
    (0 * RISING, "empty"), (RISING * math.nan, "nan"), (2 * RISING.abs(), "to 2"), (RISING, "-1"),
    (RISING[:0], "(0, 8, 12)"), (RISING[0], "(8, 12)"), ({}, "NoneType"), ([1.0], "mask.png"), ("text", "mask.png")])
def test_wrong_saved_masks_get_one_sentence(tmp_path, mask, word):
    torch.save(mask, tmp_path / "mask.png")
    refuses(lambda: load_mask(str(tmp_path / "mask.png"), 9, 64, 96), word)
    refuses(lambda: mask_from_alpha(torch.zeros(9, 64, 96), 17, 64, 96), "empty")
