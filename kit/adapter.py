"""What an adapter file is, and the same adapter under other names.

    python -m kit.adapter FILE                          dialect, kind, rank, scale; which released model it fits
    python -m kit.adapter FILE --to peft|comfy OUT      its tensors, bit for bit, under the other key names

A dialect is a spelling of the keys: peft's `blocks.0.ffn.0.lora_A.default.weight`, which official loaders read, is
ComfyUI's `diffusion_model.blocks.0.ffn.0.lora_down.weight`. All that `dora.split_key` knows are read, these two are
written. dtype: tensors keep theirs; only a scale that moves into B changes numbers, and none where that would round.
"""
import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from dit import WAN_14B, WAN_1_3B, WanDiT
from dora import KEY, PARTS, match_adapter, raise_if, split_key
from kit.command import Parser, run_command
from kit.files import Checkpoint, read_checkpoint, save_tensors
from merge import adapter_part
from vae import WanVAE

WORDS = {"peft": dict(down="{}.lora_A.default.weight", up="{}.lora_B.default.weight",
                      magnitude="{}.lora_magnitude_vector.default.weight"),
         "comfy": dict(down="diffusion_model.{}.lora_down.weight", up="diffusion_model.{}.lora_up.weight",
                       magnitude="diffusion_model.{}.lora_magnitude_vector.weight", alpha="diffusion_model.{}.alpha",
                       weight="diffusion_model.{}.diff", bias="diffusion_model.{}.diff_b",
                       modulation="diffusion_model.{}.diff_m")}
OWNERS = {"lora_unet_": "kohya", "diffusion_model.": "ComfyUI", "base_model.model.": "peft, base_model.model."}

# ---- what it is


def dialect(key: str) -> str:
    """Whose spelling an adapter's key has, and the word that tells: "ComfyUI (lora_down)", "peft (lora_A.default)"."""
    word = KEY.fullmatch(key)["part"]
    owner = "peft" if word.startswith("lora_A") else "no prefix"
    for prefix, name in OWNERS.items():
        if key.startswith(prefix):
            owner = name
    return f"{owner} ({word}.default)" if ".default" in key else f"{owner} ({word})"


@functools.cache
def released_models(vae: bool) -> dict[str, dict[str, Tensor]]:
    """Names and shapes, as meta tensors, of the models that an adapter may be for."""
    with torch.device("meta"):
        if not vae:
            return {"Wan 1.3B": WanDiT(WAN_1_3B).state_dict(), "Wan 14B": WanDiT(WAN_14B).state_dict()}
        state = WanVAE().state_dict()
    return {"Wan's VAE": {f"{branch}.{name}": p for branch in ("vae_fgr", "vae_pha") for name, p in state.items()}}


def describe_fit(adapter: dict[str, Tensor], vae: bool) -> list[str]:
    """How many layers fit each released model, names and shapes; up to ten keys that do not fit the nearest."""
    layers = {layer for layer, part in map(split_key, adapter) if part}
    problems = {model: match_adapter(adapter, state)[1] for model, state in released_models(vae).items()}
    fit = {model: len(layers - {split_key(key)[0] for key in wrong}) for model, wrong in problems.items()}
    nearest = max(fit, key=fit.get)
    left = [f"{key} {text}" for key, text in problems[nearest].items()]
    return [*(f"{model}: {n} of {len(layers)} layers fit" for model, n in fit.items()),
            f"left over in {nearest}: {len(left) or 'nothing'}", *("  " + text for text in left[:10])]


def describe_scale(file: Checkpoint, parts: dict[str, tuple], vae: bool) -> str:
    """Layers, ranks and scales; of the tensors only `.alpha` is read."""
    rank = {layer: file.meta[key].shape[:1].numel() for key, (layer, part) in parts.items() if part == "down"}
    alphas = file.read(key for key, (_, part) in parts.items() if part == "alpha" and file.meta[key].numel() == 1)
    scales = sorted({float(alpha) / rank.get(parts[key][0], 1) for key, alpha in alphas.items()})
    if not scales:
        scales = f"{'1 / rank' if vae else '1'}, there is no .alpha"
    kind = "DoRA" if any(part == "magnitude" for _, part in parts.values()) else "LoRA"
    return f"{kind} on {len(rank)} layers, rank {sorted(set(rank.values()))}, scale {scales}"


def describe(path: str | Path) -> str:
    """What an adapter file is: dialect, kind, rank, scale, differences; which layers of the released models it fits.
    ValueError if it is no adapter, or one with LyCORIS's magnitudes."""
    file = Checkpoint(path)
    adapter, kinds = file.meta, Counter()
    vae = any(key.startswith(("vae_fgr.", "vae_pha.")) for key in adapter)
    if vae:
        kinds = Counter(map(adapter_part, adapter))
        adapter = {key: x for key, x in adapter.items() if adapter_part(key) not in ("middle", "skipped")}
    parts = {key: split_key(key) for key in adapter}
    count = Counter(part for _, part in parts.values() if part)
    if not count:
        raise ValueError(f"{path} is no adapter: none of its {len(adapter)} keys names a LoRA, a DoRA or a difference")
    telling = ["down"] if count["down"] else PARTS
    spelt = dict.fromkeys(dialect(key) for key, (_, part) in parts.items() if part in telling)
    differences = [f"{count[part]} {part}" for part in ("diff", "diff_b", "diff_m") if count[part]]
    lines = [f"{path}: {', '.join(spelt)}", describe_scale(file, parts, vae),
             f"differences: {', '.join(differences) or 'none'}"]
    if vae:
        lines.append(f"merge block: {kinds['middle']} tensors; frozen copies, skipped: {kinds['skipped']}")
    return "\n".join(lines + describe_fit(adapter, vae))


# ---- under other names


def fold_alpha(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts with s = alpha / r inside B. ValueError if that rounds; it does not for powers of two."""
    if parts["alpha"].numel() != 1 or parts["down"].ndim < 2:
        raise ValueError(f"{name} has no scale: its .alpha must be one number and its A a matrix")
    scale, up = float(parts["alpha"]) / len(parts["down"]), parts["up"]
    folded = (scale * up.double()).to(up.dtype)
    if not torch.equal(folded.double(), scale * up.double()):
        raise ValueError(f"peft has no name for the scale {scale:g} of {name}, which does not go into B unrounded")
    return {part: tensor for part, tensor in parts.items() if part != "alpha"} | {"up": folded}


def respell(adapter: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """An adapter of Wan's transformer in the dialect "peft" or "comfy", its tensors bit for bit. ValueError for what
    that cannot say: peft has no differences and no `.alpha`, which goes into B where nothing is rounded."""
    deltas, problems = match_adapter(adapter, dict.fromkeys(released_models(vae=False)["Wan 14B"]))
    raise_if([f"{key} {text}" for key, text in problems.items()])
    result = {}
    for name, delta in deltas.items():
        layer, _, parameter = name.rpartition(".")
        parts = {parameter if part == "diff" else part: adapter[key] for part, key in delta.keys.items()}
        low_rank = parts.keys() & {"down", "up", "magnitude", "alpha"}
        if low_rank and not low_rank >= {"down", "up"}:
            raise ValueError(f"{name} has {', '.join(parts)}, but not both low-rank factors")
        if to == "peft" and "alpha" in parts:
            parts = fold_alpha(name, parts)
        if unsaid := parts.keys() - WORDS[to].keys():
            raise ValueError(f"{to} has no name for differences, as {layer} has them in its {', '.join(unsaid)}")
        result |= {WORDS[to][part].format(layer): tensor for part, tensor in parts.items()}
    return result


# ---- the command


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m kit.adapter", description="What an adapter file is; the same under other names.")
    parser.add_argument("file", metavar="FILE", help="LoRA or DoRA: .safetensors, .bin, .pth or .pt")
    parser.add_argument("--to", nargs=2, metavar=("peft|comfy", "OUT"), help="write it, so spelt, to OUT.safetensors")
    args = parser.parse_args(argv)
    if not args.to:
        print(describe(args.file))
        return
    to, out = args.to
    if to not in WORDS or not out.endswith(".safetensors"):
        raise ValueError(f"--to takes peft or comfy, and a name that ends in .safetensors, not {to} {out}")
    save_tensors(out, respell(read_checkpoint(args.file)[0], to))


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.adapter"))
