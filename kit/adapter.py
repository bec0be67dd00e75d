"""What an adapter file is, and the same adapter under other names.

    python -m kit.adapter FILE                          dialect, kind, rank, scale; which released model it fits
    python -m kit.adapter FILE --to peft|comfy OUT      its tensors, bit for bit, under the other key names

Reads all spellings of keys that `dora.split_key` knows. dtype: tensors keep theirs, B too when it takes in a scale.
"""
import sys
from collections import Counter

import torch
from torch import Tensor

from dit import WAN_14B, WAN_1_3B, WanDiT
from dora import KEY, PARTS, match_adapter, parse_adapter, split_key
from kit.command import Parser, run_command
from kit.files import Checkpoint, read_checkpoint, save_tensors
from merge import RGBAVAE, adapter_part
from vae import WanVAE

PEFT = dict(down="lora_A", up="lora_B", magnitude="lora_magnitude_vector")
COMFY = dict(down="lora_down.weight", up="lora_up.weight", magnitude="lora_magnitude_vector.weight", alpha="alpha",
             weight="diff", bias="diff_b", modulation="diff_m")
WORDS = {"peft": {part: f"{{}}.{word}.default.weight" for part, word in PEFT.items()},
         "comfy": {part: f"diffusion_model.{{}}.{word}" for part, word in COMFY.items()}}
OWNERS = {"lora_unet_": "kohya", "diffusion_model.": "ComfyUI", "base_model.model.": "peft, base_model.model."}


def dialect(key: str) -> str:
    """Whose spelling an adapter's key has, and the word that tells: "ComfyUI (lora_down)", "peft (lora_A.default)"."""
    word = KEY.fullmatch(key)["part"]
    unmarked = "peft" if word == "lora_A" else "no prefix"
    owner = next((name for prefix, name in OWNERS.items() if key.startswith(prefix)), unmarked)
    return f"{owner} ({word}.default)" if ".default" in key else f"{owner} ({word})"


def released_models(vae: bool) -> dict[str, dict[str, Tensor]]:
    with torch.device("meta"):
        if vae:
            return {"Wan's VAE": RGBAVAE(WanVAE()).state_dict()}
        return {"Wan 1.3B": WanDiT(WAN_1_3B).state_dict(), "Wan 14B": WanDiT(WAN_14B).state_dict()}


def describe_fit(adapter: dict[str, Tensor], vae: bool) -> list[str]:
    """How many layers fit each released model; up to ten keys that do not fit the nearest."""
    layers = {layer for layer, part in map(split_key, adapter) if part}
    problems = {model: match_adapter(adapter, state)[1] for model, state in released_models(vae).items()}
    fit = {model: len(layers - {split_key(key)[0] for key in wrong}) for model, wrong in problems.items()}
    nearest = max(fit, key=fit.get)
    left = [f"  {key} {text}" for key, text in problems[nearest].items()]
    return [*(f"{model}: {n} of {len(layers)} layers fit" for model, n in fit.items()),
            f"left over in {nearest}: {len(left) or 'nothing'}", *left[:10]]


def describe(path: str) -> str:
    """What an adapter file is; of its tensors only `.alpha` is read. ValueError for none, or LyCORIS's magnitudes."""
    file = Checkpoint(path)
    vae = any(key.startswith(("vae_fgr.", "vae_pha.")) for key in file.meta)
    kinds = Counter(map(adapter_part, file.meta))
    parts = {key: split_key(key) for key in file.meta if not vae or adapter_part(key) not in ("middle", "skipped")}
    count = Counter(part for _, part in parts.values() if part)
    if not count:
        raise ValueError(f"{path} is no adapter: none of its {len(parts)} keys names a LoRA, a DoRA or a difference")
    telling = ["down"] if count["down"] else PARTS
    spelt = dict.fromkeys(dialect(key) for key, (_, part) in parts.items() if part in telling)
    rank = {layer: file.meta[key].shape[:1].numel() for key, (layer, part) in parts.items() if part == "down"}
    alphas = file.read(key for key, (_, part) in parts.items() if part == "alpha" and file.meta[key].numel() == 1)
    found = {float(alpha) / rank.get(parts[key][0], 1) for key, alpha in alphas.items()}
    scales = sorted(found) or f"{'1 / rank' if vae else '1'}, there is no .alpha"
    kind = "DoRA" if count["magnitude"] else "LoRA"
    differences = [f"{count[part]} {part}" for part in ("diff", "diff_b", "diff_m") if count[part]]
    lines = [f"{path}: {', '.join(spelt)}",
             f"{kind} on {len(rank)} layers, rank {sorted(set(rank.values()))}, scale {scales}",
             f"differences: {', '.join(differences) or 'none'}"]
    if vae:
        lines.append(f"merge block: {kinds['middle']} tensors; frozen copies, skipped: {kinds['skipped']}")
    return "\n".join(lines + describe_fit({key: file.meta[key] for key in parts}, vae))


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
    """An adapter of Wan's transformer as peft or comfy names it; ValueError for what that has no name for."""
    names, result = dict.fromkeys(released_models(vae=False)["Wan 14B"]), {}
    for name, delta in parse_adapter(adapter, names).items():
        layer, _, parameter = name.rpartition(".")
        parts = {parameter if part == "diff" else part: adapter[key] for part, key in delta.keys.items()}
        if parts.keys() & {"down", "up", "magnitude", "alpha"} and not parts.keys() >= {"down", "up"}:
            raise ValueError(f"{name} has {', '.join(parts)}, but not both low-rank factors")
        if to == "peft" and "alpha" in parts:
            parts = fold_alpha(name, parts)
        if unsaid := parts.keys() - WORDS[to].keys():
            raise ValueError(f"{to} has no name for differences, as {layer} has them in its {', '.join(unsaid)}")
        result |= {WORDS[to][part].format(layer): tensor for part, tensor in parts.items()}
    return result


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
