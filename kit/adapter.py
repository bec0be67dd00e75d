"""What an adapter file is, and the same adapter as others read it.

    python -m kit.adapter FILE                                  dialect, kind, rank, scale; which model it fits
    python -m kit.adapter FILE --to official OUT.safetensors    the names of Wan-Alpha's own code, which we write, too
    python -m kit.adapter FILE --to peft OUT                    a folder for PeftModel.from_pretrained
    python -m kit.adapter FILE --to diffusers OUT.safetensors   for load_lora_weights
    python -m kit.adapter FILE --to comfy OUT.safetensors --base FOLDER
    python -m kit.adapter FILE --to merged OUT.safetensors --base FOLDER    the transformer's own weights: always safe

An adapter of the VAE goes --to official OUT.bin, as *-VAE.bin of the official code, or --to merged OUT --base FOLDER:
OUT/rgb.safetensors and OUT/alpha.safetensors, two whole VAEs as ComfyUI has them.

ComfyUI divides W + s B A by the norm of W, not by its own. So for it a magnitude is written as m ||W|| / ||W + s B A||,
which needs the base's weights and is noted in the metadata; --comfy-norm leaves it as it is, for versions that mend it.
Reads all spellings of keys that `dora.split_key` knows. dtype: tensors keep theirs, B too when it takes in a scale.
"""
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from dit import WAN_14B, WAN_1_3B, WanDiT, open_dit
from dora import (KEY, PARTS, low_rank_sum, match_adapter, parse_adapter, read_delta, reading_options,
                  row_norm, split_key)
from kit.command import Parser, run_command
from kit.files import BLOCK_LAYERS, TINY, Checkpoint, find_dit, find_vae, replacing, save_json, save_tensors
from merge import RGBAVAE, adapter_part, load_rgba_vae
from vae import WanVAE, load_vae

LOW_RANK = dict(down="lora_A.weight", up="lora_B.weight", magnitude="lora_magnitude_vector")
COMFY = dict(down="lora_down.weight", up="lora_up.weight", magnitude="dora_scale", alpha="alpha", weight="diff",
             bias="diff_b", modulation="diff_m")
OFFICIAL = dict(down="lora_A.default.weight", up="lora_B.default.weight",
                magnitude="lora_magnitude_vector.default.weight")
WORDS = {to: {part: f"{before}{{}}.{word}" for part, word in words.items()} for to, before, words in (
    ("official", "", OFFICIAL), ("peft", "base_model.model.", LOW_RANK), ("diffusers", "transformer.", LOW_RANK),
    ("comfy", "diffusion_model.", COMFY))}
OWNERS = {"lora_unet_": "kohya", "diffusion_model.": "ComfyUI", "base_model.model.": "peft, base_model.model."}


def dialect(key: str) -> str:
    """Whose spelling an adapter's key has, and the word that tells: "ComfyUI (lora_down)", "peft (lora_A.default)"."""
    word = KEY.fullmatch(key)["part"]
    unmarked = "peft" if word == "lora_A" else "no prefix"
    owner = next((name for prefix, name in OWNERS.items() if key.startswith(prefix)), unmarked)
    return f"{owner} ({word}.default)" if ".default" in key else f"{owner} ({word})"


def known_models(vae: bool) -> dict[str, dict[str, Tensor]]:
    """The released ones and the embedded one: names and shapes."""
    with torch.device("meta"):
        if vae:
            own = RGBAVAE(load_vae(find_vae(TINY), device="meta"))
            return {"Wan's VAE": RGBAVAE(WanVAE()).state_dict(), "tiny/": own.state_dict()}
        return {"Wan 1.3B": WanDiT(WAN_1_3B).state_dict(), "Wan 14B": WanDiT(WAN_14B).state_dict(),
                "tiny/": open_dit(TINY)[0].state_dict()}


def describe_fit(adapter: dict[str, Tensor], vae: bool) -> list[str]:
    """How many layers fit each known model; up to ten keys that do not fit the nearest."""
    layers = {layer for layer, part in map(split_key, adapter) if part}
    problems = {model: match_adapter(adapter, state)[1] for model, state in known_models(vae).items()}
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


def respell(adapter: dict[str, Tensor], to: str, **options) -> dict[str, Tensor]:
    """An adapter of Wan's transformer as `to` names it; ValueError for what that has no name for. options: those of
    `dora.match_adapter`."""
    names, result = dict.fromkeys(known_models(vae=False)["Wan 14B"]), {}
    for name, delta in parse_adapter(adapter, names, **options).items():
        layer, _, parameter = name.rpartition(".")
        parts = {parameter if part == "diff" else part: getattr(delta, part) for part in delta.keys}
        if parts.keys() & {"down", "up", "magnitude", "alpha"} and not parts.keys() >= {"down", "up"}:
            raise ValueError(f"{name} has {', '.join(parts)}, but not both low-rank factors")
        if "down" in parts and delta.strength != 1:                       # peft's config says s
            parts["alpha"] = torch.tensor(delta.strength * len(parts["down"]))
        if to != "comfy" and "alpha" in parts:
            parts = fold_alpha(name, parts)
        if unsaid := parts.keys() - WORDS[to].keys():
            raise ValueError(f"{to} has no name for differences, as {layer} has them in its {', '.join(unsaid)}")
        if to == "diffusers":
            layer = diffusers_name(layer)
        if "magnitude" in parts:
            m = parts["magnitude"].flatten()
            parts["magnitude"] = m[:, None] if to == "comfy" else m
        result |= {WORDS[to][part].format(layer): tensor for part, tensor in parts.items()}
    return result


def diffusers_name(layer: str) -> str:
    """`blocks.0.self_attn.o` -> `blocks.0.attn1.to_out.0`."""
    theirs = {ours: theirs for theirs, ours in BLOCK_LAYERS.items()}
    blocks, number, name = [*layer.split(".", 2), "", ""][:3]
    if blocks != "blocks" or name not in theirs:
        raise ValueError(f"diffusers: only the linear layers of blocks are written, not {layer}")
    return f"blocks.{number}.{theirs[name]}"


def for_comfy(path: str, base: str) -> dict[str, Tensor]:
    """An adapter with magnitudes that are right where they are divided by ||W||: m ||W|| / ||W + s B A||."""
    file, weights = Checkpoint(path), Checkpoint(*find_dit(base))
    deltas = parse_adapter(file.meta, weights.meta, **reading_options(file, path))
    result = respell(file.read(), "comfy", **reading_options(file, path))
    for name, delta in deltas.items():
        if "magnitude" in delta.keys and not delta.base_norm:
            delta, weight = read_delta(delta, file), weights.read([name])[name].float()
            ratio = row_norm(weight) / row_norm(low_rank_sum(weight, delta.down, delta.up, delta.scale))
            key = WORDS["comfy"]["magnitude"].format(name.removesuffix(".weight"))
            result[key] = (delta.magnitude.flatten().float() * ratio)[:, None]
    return result


def write_peft(folder: Path, adapter: dict[str, Tensor]) -> None:
    """adapter_model.safetensors and the adapter_config.json without which peft reads nothing."""
    ranks = {len(tensor) for key, tensor in adapter.items() if ".lora_A." in key}
    layers = sorted({split_key(key)[0] for key in adapter})
    if len(ranks) != 1:
        raise ValueError(f"peft wants one rank, not {sorted(ranks)}")
    rank = ranks.pop()
    save_tensors(folder / "adapter_model.safetensors", adapter)
    save_json(folder / "adapter_config.json", dict(
        peft_type="LORA", r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=layers,
        use_dora=any("magnitude" in key for key in adapter), inference_mode=True))


def write_vae(file: Checkpoint, to: str, out: str, base: str | None) -> None:
    if to == "official" and out.endswith(".bin"):
        with replacing(Path(out)) as temporary:
            torch.save(file.read(), temporary)
    elif to == "merged" and base:
        whole, rgba = Checkpoint(find_vae(base)), load_rgba_vae(find_vae(base), next(iter(file.files.values())))
        for name, branch in (("rgb", rgba.vae_fgr), ("alpha", rgba.vae_pha)):
            save_tensors(Path(out) / f"{name}.safetensors", whole.read() | branch.state_dict(), whole.metadata)
    else:
        raise ValueError("an adapter of the VAE goes --to official OUT.bin or --to merged OUT --base FOLDER")


def write(args) -> None:
    to, out = args.to
    file = Checkpoint(args.file)
    if any(key.startswith("vae_fgr.") for key in file.meta):
        return write_vae(file, to, out, args.base)
    if to not in (*WORDS, "merged") or (to != "peft") != out.endswith(".safetensors"):
        raise ValueError(f"--to takes {', '.join(WORDS)} or merged, and a name that ends in .safetensors, for peft a "
                         f"folder; not {to} {out}")
    magnitudes = any(split_key(key)[1] == "magnitude" for key in file.meta)
    if not args.base and (to == "merged" or to == "comfy" and magnitudes and not args.comfy_norm):
        raise ValueError(f"--to {to} wants --base, the folder of the transformer that the adapter is for")
    if to == "merged":
        return save_tensors(out, dict(open_dit(args.base, [(args.file, 1.0)])[1]))
    if to == "comfy" and magnitudes and not args.comfy_norm:
        return save_tensors(out, for_comfy(args.file, args.base), dict(dora_norm="base"))
    options = reading_options(file, args.file)
    if options["base_norm"] and magnitudes:
        raise ValueError(f"{args.file} was written for ComfyUI, its magnitudes would be wrong elsewhere: take the file "
                         "it was made from, or --to merged")
    adapter = respell(file.read(), to, **options)
    if to == "peft":
        return write_peft(Path(out), adapter)
    save_tensors(out, adapter)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m kit.adapter", description="What an adapter file is; the same as others read it.")
    parser.add_argument("file", metavar="FILE", help="LoRA or DoRA: .safetensors, .bin, .pth or .pt")
    parser.add_argument("--to", nargs=2, metavar=("KIND", "OUT"), help=f"write it for {', '.join(WORDS)} or merged")
    parser.add_argument("--base", metavar="DIR", help="folder of the transformer, for comfy's magnitudes and merged")
    parser.add_argument("--comfy-norm", action="store_true", help="magnitudes as they are, for a ComfyUI that divides "
                        "by the norm of W + s B A")
    args = parser.parse_args(argv)
    if args.to:
        return write(args)
    print(describe(args.file))


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.adapter"))
