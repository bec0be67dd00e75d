"""Files: written whole or not at all, named by what is in them, and read without trust.

    Checkpoint      names, shapes and tensors of .safetensors, .pth, .bin and .pt files, one by one; code is never run
    find_*          where a checkpoint folder like Wan2.1-T2V-14B keeps its parts
    read_section    what such a folder says in config.json's "generate"

Errors are FileNotFoundError or ValueError, one sentence each: what is wrong, where, and what to do.
"""
import hashlib
import json
import math
import os
import sys
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kit.spellings import BLOCK_LAYERS, PREFIXES, SCALES, wan_names     # noqa: F401, the first two are for dora


def show_help(doc: str) -> None:
    """`python FILE.py --help` of a file that runs by itself says what it shows, and no more."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(doc)
        sys.exit()


@contextmanager
def replacing(path):
    """A temporary name beside `path`, with its ending, that becomes `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path, content) -> None:
    """What JSON has no type for (paths, dtypes) is written as its text."""
    save_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def save_tensors(path, tensors: dict, metadata: dict | None = None) -> None:
    """One safetensors file; metadata: str -> str."""
    with replacing(path) as temporary:
        temporary.write_bytes(save({name: x.contiguous().clone() for name, x in tensors.items()}, metadata))


def stored(state: dict, half: bool) -> dict:
    """Trained tensors as they go into a file: float16 or float32."""
    return {name: x.detach().to(torch.float16 if half else torch.float32) for name, x in state.items()}


def cache_key(*parts) -> str:
    """Name of cached tensors: SHA-256 (hex) of all they depend on, bytes or strings; no stale cache is ever found."""
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def file_key(path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: give its right name, or make it first")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoint:
    """The tensors of one file, or of several as one (shards). `meta` tells their names and shapes, as meta tensors;
    `read` brings them. A pickle that is one bare tensor holds it under the name "".

    Models are read under Wan's names, however they are spelt (kit/spellings.py), and a block's weight in fp8 with its
    scale, a number or one a row, as float32. A file is mapped anew by each `read`, so that its pages are given back."""

    def __init__(self, *paths):
        self.meta, self.metadata, self.files = {}, {}, {}
        for path in map(Path, paths):
            if not path.is_file():
                raise FileNotFoundError(f"there is no checkpoint file {path}: give its right name, or download it")
            if path.suffix == ".gguf":
                raise ValueError(f"{path} is a GGUF file, which is not read: take the safetensors it was made from")
            with reading(path):
                tensors, metadata = open_file(path, None, "meta")
            self.meta |= tensors
            self.metadata |= metadata
            self.files |= dict.fromkeys(tensors, path)
        self.own = {ours: own for own, ours in wan_names(self.meta).items()}      # Wan's name -> the file's
        self.scales = find_scales({ours: self.meta[own] for ours, own in self.own.items()})
        extra = {name for names in self.scales.values() for name in names}
        self.meta = {ours: self.meta[own] for ours, own in self.own.items() if ours not in extra}

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these names, or all, in this order."""
        names, found = list(self.meta if names is None else names), {}
        wanted = [self.own[name] for name in names] + [self.own[self.scales[n][0]] for n in names if n in self.scales]
        for path in dict.fromkeys(self.files[name] for name in wanted):
            with reading(path):
                found |= open_file(path, [name for name in wanted if self.files[name] == path])[0]
        for name in names:
            if name in self.scales:
                scale = found[self.own[self.scales[name][0]]].float().flatten()[:, None]
                found[self.own[name]] = found[self.own[name]].float() * scale
        return {name: found[self.own[name]] for name in names}


def find_scales(meta: dict[str, Tensor]) -> dict[str, list[str]]:
    """For each weight of a block that has one, the names of its scale and, if it has that, of its input's scale."""
    found = {}
    for name, weight in meta.items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            layer = name.removesuffix("weight")
            scale, inputs = (next((layer + word for word in words if layer + word in meta), None) for words in SCALES)
            if scale and meta[scale].numel() in (1, len(weight)):
                found[name] = [name for name in (scale, inputs) if name]
    return found


@contextmanager
def reading(path: Path):
    """What the file formats' own libraries raise becomes one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is cut short, no checkpoint or more than plain tensors ({type(error).__name__}): "
                         "download it again, or export its plain state dict") from None


def open_file(path: Path, names: list[str] | None, device="cpu") -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of one file; device "meta": shapes alone, nothing else is read."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = names or file.keys()
            if device == "meta":
                return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}, (
                    file.metadata() or {})
            return {name: file.get_tensor(name) for name in names}, {}
    content = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    content = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise TypeError("not a flat dict of tensors")
    return {name: content[name] for name in names or content}, {}


def read_checkpoint(path) -> tuple[dict[str, Tensor], dict]:
    """All tensors and the metadata of a file."""
    file = Checkpoint(path)
    return file.read(), file.metadata


def check_fit(path, expected: dict, found: dict, what: str) -> None:
    """ValueError that lists up to ten names, unless both hold the same names and tensors of the same shapes."""
    shapes = [{name: tuple(x.shape) for name, x in tensors.items()} for tensors in (expected, found)]
    expected, found = shapes
    names = sorted(expected | found, key=lambda name: name in expected and name in found)      # shapes last
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
             for name in names if expected.get(name) != found.get(name)]
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{path} does not fit {what}: {'; '.join(wrong[:10])}{more}")


def load_strict(module: nn.Module, state: dict, path, dtype=torch.float32, device="cpu") -> nn.Module:
    """Put `state` into `module` (on the meta device), all names and shapes matching; frozen, in eval mode."""
    check_fit(path, module.state_dict(), state, type(module).__name__)
    module.load_state_dict({name: x.to(device, dtype) for name, x in state.items()}, assign=True)
    return module.requires_grad_(False).eval()

TINY = Path(__file__).parents[1] / "tiny"                      # the embedded one: what a command takes without --base
WEIGHTS = (".safetensors", ".bin", ".pth")
VAE_ADAPTER, DORA = "Wan-Alpha-v2-VAE.safetensors", "t2v.safetensors"               # as the trainings name them


def either(folder, name: str, other: str = ".pth") -> Path:
    """name.safetensors in that folder, or else, if there is one, the pickle that was released."""
    file, released = (Path(folder) / (name + ending) for ending in (".safetensors", other))
    return released if released.is_file() and not file.is_file() else file


def find_vae(folder) -> Path:
    """Wan's file, or the one of a folder as diffusers has it."""
    theirs, wan = Path(folder) / "vae/diffusion_pytorch_model.safetensors", either(folder, "Wan2.1_VAE")
    return theirs if theirs.is_file() and not wan.is_file() else wan


def find_text(folder) -> Path:
    """Wan's file, or the one of a folder as diffusers has it, or the index of its shards."""
    wan = either(folder, "models_t5_umt5-xxl-enc-bf16")
    theirs = (Path(folder) / "text_encoder" / name for name in ("model.safetensors", "model.safetensors.index.json"))
    return wan if wan.is_file() else next((file for file in theirs if file.is_file()), wan)


find_adapter = partial(either, name="Wan-Alpha-v2-VAE", other=".bin")


def find_trained(path, name: str) -> Path:
    """The adapter that `path` is, or the one of this name in that folder."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def find_start(path, name: str) -> tuple[str | None, int | None]:
    """What --start names, a file or a folder with one of this name, and the rank of the LoRA or DoRA in it. No rank of
    a checkpoint.pt, and neither without a path."""
    if not path:
        return None, None
    file = find_trained(path, name)
    meta = Checkpoint(file).meta if file.suffix in WEIGHTS else {}
    return str(file), next((len(x) for key, x in meta.items() if ".lora_A" in key and x.ndim > 1), None)


def find_tokenizer(folder) -> Path:
    wan, theirs = Path(folder) / "google/umt5-xxl/tokenizer.json", Path(folder) / "tokenizer/tokenizer.json"
    return theirs if theirs.is_file() and not wan.is_file() else wan


def find_dit(path) -> list[Path]:
    """The files of a transformer: the path itself, a folder's one file, or the shards that its index names; in a folder
    as diffusers has it, those in transformer/."""
    path = Path(path)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        return shards(index)
    return [path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path]


def shards(index: Path) -> list[Path]:
    """The files that an index names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} names no shards: download it again")
    return sorted({index.parent / name for name in names.values()})


def read_json(path) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a readable JSON object: download it again")
    return content


def read_trained(folder) -> dict:
    """What the trainings of a folder, their --out, have left for use: base, adapters and, of a DoRA, the size, frames
    and mean that it was trained with. ValueError without any, or with one that is not finished."""
    found, both = {}, {"vae-rgba": ("vae_adapter", VAE_ADAPTER), "dit-rgba": ("dora", DORA)}
    for run, (flag, file) in both.items():
        record = Path(folder) / run / "run.json"
        if record.is_file():
            asked = read_json(record).get("arguments", {})
            if not (Path(folder) / file).is_file():
                raise ValueError(f"the training in {record.parent} is not finished: there is no {Path(folder) / file}; "
                                 "go on with it by --resume")
            names = ("base", "vae_adapter", "size", "frames", "mean") if flag == "dora" else ("base",)
            found |= {name: asked[name] for name in names if name in asked} | {flag: str(Path(folder) / file)}
    if "base" not in found:
        raise ValueError(f"{folder} holds no training of the autoencoder or of the transformer: give its --out")
    return found


COUNT = (lambda x: type(x) is int and x > 0), "a whole number above 0"
NUMBER = (lambda x: type(x) in (int, float) and math.isfinite(x)), "a finite number"
ABOVE = (lambda x: NUMBER[0](x) and x > 0), "a finite number above 0"
FRAMES = (lambda x: COUNT[0](x) and x % 4 == 1), "4k+1"
SIDES = (lambda x: isinstance(x, list) and len(x) == 2 and all(COUNT[0](n) and n % 16 == 0 for n in x)), (
    "[width, height] in multiples of 16")
NAME = (lambda x: x is None or isinstance(x, str)), "a file's name"
SECTION = dict(size=SIDES, frames=FRAMES, steps=COUNT, fps=ABOVE, shift=ABOVE, guidance=NUMBER, mean=NUMBER,
               vae_adapter=NAME, dora=NAME, distill=NAME)      # of "generate": what a value must be


def read_section(folder) -> dict:
    """Section "generate" of a folder's config.json, {} where there is none: the numbers that a model was made for."""
    file = Path(folder) / "config.json"
    section = read_json(file).get("generate", {}) if file.is_file() else {}
    if not isinstance(section, dict):
        raise ValueError(f'{file}: section "generate" is not an object, such as {{"size": [832, 480], "frames": 81}}')
    for name, value in section.items():
        right, kind = SECTION.get(name, (lambda x: False, f"one of {', '.join(SECTION)}"))
        if not right(value):
            raise ValueError(f'{file}: {name} in section "generate" is {json.dumps(value)}; it must be {kind}')
    return section
