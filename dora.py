"""LoRA and DoRA: small trainable matrices beside frozen weights, and the merge that makes them vanish.

    LoRA (arXiv 2106.09685, eq. 3)    W' = W + s B A
    DoRA (arXiv 2402.09353, eq. 5)    W' = m (W + s B A) / ||W + s B A||

A (r i k..) is `lora_A` or "down", B (o r 1..) is `lora_B` or "up", m (o) is the magnitude, s = alpha / r. The norm runs
over the input axes, one number per *output* row, and counts as a constant in backward (DoRA, section 4.3).
At inference nothing is left of this but other values in the same weights: Wan-Alpha merges its DoRA (r 32, s 1, on
q k v o ffn.0 ffn.2 of every block) and then LightX2V's few-step LoRA, in this order, for the two do not commute.
Its two VAE decoders carry LoRA on every convolution (r 128, s 1/128).

Four parts: layers that train (`add_lora`, `add_dora`), the names they are stored under (`adapter_state`,
`load_adapter_state`), the merge into a state dict (`read_adapter`, `merge_adapter`, and the latter's two halves
`parse_adapter` and `merge_tensor` for loaders that see one tensor at a time), and the command

    python dora.py FILE                          what that adapter is, and which released model it fits
    python dora.py FILE --to peft|comfy OUT      the same adapter under the other key names
    python dora.py                               this stage's shapes

Letters: o output rows, i inputs, r rank, k kernel. dtype: adapters are made in float32; sums, norms and merges are
computed in float32 and cast to the weight's dtype; a linear layer's low-rank products run in the dtype of its input.
Difference from the official code: that merges the keys it knows and passes over the rest, here every key must find its
tensor (test_dora_key_without_target_is_refused); where both merge they agree (test_dora_merge_equals_official).
"""
import argparse
import copy
import functools
import math
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


# The equations

def low_rank_sum(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A in float32, (o i k..). The kernel of a convolution stays with A; B only mixes its r rows."""
    flat = torch.addmm(weight.flatten(1).float(), scale * up.flatten(1).float(), down.flatten(1).float())
    return flat.view(weight.shape)


def row_norm(weight: Tensor) -> Tensor:
    """||W|| over the input axes: (o i k..) -> (o), float32. Rows of zeros get a tiny norm, so that 0/0 becomes 0."""
    return torch.linalg.vector_norm(weight.flatten(1).float(), dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def set_row_norm(weight: Tensor, magnitude: Tensor) -> Tensor:
    """m W / ||W||, the norm without gradient: every output row gets the length that `magnitude` (o) says."""
    return einsum(magnitude.float() / row_norm(weight.detach()), weight, "o, o ... -> o ...")


# Layers that train

class AdaptedLinear:
    """Mixed in before nn.Linear: `weight` and `bias` stay, frozen; `lora_A`, `lora_B` and DoRA's `magnitude` train.

    DoRA in its direct form, y = (m / ||W'||) (x W^T + s (x A^T) B^T) + b, has one dense product and no gradient of W's
    size: W' is only built for its norm, and without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(self.lora_scale * F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        if self.magnitude is None:
            return super().forward(x) + update
        with torch.no_grad():
            norm = row_norm(low_rank_sum(self.weight, self.lora_A, self.lora_B, self.lora_scale))
        y = F.linear(x, self.weight) + update
        y = y * (self.magnitude / norm).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class AdaptedConv:
    """Mixed in before a convolution class, whose forward runs as it is, with its own padding and cache: only the
    `weight` that it reads is now W' (state dicts keep W). Building W' costs far less than another convolution."""

    @property
    def weight(self) -> Tensor:
        base = self._parameters["weight"]
        weight = low_rank_sum(base, self.lora_A, self.lora_B, self.lora_scale)
        return (weight if self.magnitude is None else set_row_norm(weight, self.magnitude)).to(base.dtype)


@functools.cache
def adapted_class(cls: type) -> type:
    return type("Adapted" + cls.__name__, (AdaptedLinear if issubclass(cls, nn.Linear) else AdaptedConv, cls), {})


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers inside `module` that carry an adapter, by dotted name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, (AdaptedLinear, AdaptedConv))}


def adapt(layer: nn.Module, rank: int, alpha: float, dora: bool) -> None:
    """Turns a layer into its adapted class, in place. B = 0 and m = ||W||, so its output is at first what it was."""
    o, *inputs = layer.weight.shape
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device=layer.weight.device)
    layer.lora_A = nn.Parameter(zeros(rank, *inputs))
    layer.lora_B = nn.Parameter(zeros(o, rank, *[1] * len(inputs[1:])))
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    layer.register_parameter("magnitude", nn.Parameter(row_norm(layer.weight.detach())) if dora else None)
    layer.lora_scale = alpha / rank
    layer.__class__ = adapted_class(type(layer))


def find_layers(module: nn.Module, targets: str | list[str]) -> list[nn.Module]:
    layers = {n: m for n, m in module.named_modules() if n and isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))}
    patterns = {targets: targets} if isinstance(targets, str) else {t: rf"(.*\.)?{re.escape(t)}" for t in targets}
    found = {target: [n for n in layers if re.fullmatch(pattern, n)] for target, pattern in patterns.items()}
    if missing := [target for target in found if not found[target]]:
        raise ValueError(f"no linear or convolution layer matches {missing}; there are {list(layers)[:10]} ...")
    names = dict.fromkeys(sum(found.values(), []))
    if twice := [n for n in names if n in adapted_layers(module)]:
        raise ValueError(f"these layers carry an adapter already: {twice[:10]}")
    return [layers[n] for n in names]


def add_adapters(module: nn.Module, rank: int, alpha: float, targets: str | list[str], dora: bool) -> nn.Module:
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, not {rank}")
    for layer in find_layers(module, targets):
        adapt(layer, rank, alpha, dora)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B", "magnitude"))
    return module


def add_lora(module: nn.Module, rank: int, alpha: float, targets: str | list[str]) -> nn.Module:
    """Gives layers inside `module` a LoRA with s = alpha / rank, in place; freezes all else in it; returns it.

    `targets` as in peft: one regular expression for the whole dotted name (".*" is every nn.Linear, nn.Conv2d and
    nn.Conv3d), or a list of name endings (["q", "ffn.0"]). ValueError if one matches nothing, or an adapted layer."""
    return add_adapters(module, rank, alpha, targets, dora=False)


def add_dora(module: nn.Module, rank: int, alpha: float, targets: str | list[str]) -> nn.Module:
    """`add_lora` with DoRA's magnitudes. They start as the row norms: load the base weights first."""
    return add_adapters(module, rank, alpha, targets, dora=True)


# Names

def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapters inside `module` under peft's names, which official loaders read; shares memory, as state_dict does.

    Official causal convolutions (here: any subclass of nn.Conv3d) keep their kernel in an inner `conv3D`; peft keeps a
    convolution's magnitude as (1 o 1 1..). The scale alpha / r has no key in such a file: keep it beside."""
    state = {}
    for name, layer in adapted_layers(module).items():
        causal = isinstance(layer, nn.Conv3d) and type(layer) is not adapted_class(nn.Conv3d)
        prefix, ones = name + ".conv3D" * causal, [1] * (layer.lora_A.ndim - 2)
        state[f"{prefix}.lora_A.default.weight"] = layer.lora_A.detach()
        state[f"{prefix}.lora_B.default.weight"] = layer.lora_B.detach()
        if layer.magnitude is not None:
            m = layer.magnitude.detach()
            state[f"{prefix}.lora_magnitude_vector.default.weight"] = m.view(1, -1, *ones) if ones else m
    return state


def load_adapter_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies what `adapter_state` returned into adapted layers. ValueError unless all fits, each key once.

    Names may be peft's, ComfyUI's or those with down and up; kohya's underscores and `.alpha` find no layer."""
    own = {split_key(key): (key, tensor) for key, tensor in adapter_state(module).items()}
    given = {split_key(key): (key, tensor) for key, tensor in state.items()}
    problems = [f"{key} and {given[part][0]} are the same thing" for key in state
                if given[part := split_key(key)][0] != key]
    problems += [f"{own[part][0]} is missing" for part in own.keys() - given.keys()]
    problems += [f"{given[part][0]} finds no adapted layer" for part in given.keys() - own.keys()]
    problems += [f"{given[part][0]} has shape {tuple(given[part][1].shape)}, not {tuple(own[part][1].shape)}"
                 for part in own.keys() & given.keys() if own[part][1].shape != given[part][1].shape]
    raise_if(problems)
    for part, (_, tensor) in own.items():
        tensor.copy_(given[part][1])


PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "lora_magnitude_vector": "magnitude",
         "magnitude_vector": "magnitude", "alpha": "alpha", "diff": "diff", "diff_b": "diff_b", "diff_m": "diff_m"}
FIELDS = {"diff_b": "bias", "diff_m": "modulation"}    # the layer's tensor that a part changes, if not its weight
KEY = re.compile(r"(?:base_model\.model\.|diffusion_model\.|lora_unet_+)*(?P<layer>.+?)(?:\.conv3D)?"
                 rf"\.(?P<part>{'|'.join(PARTS)})(?:\.default)?(?:\.weight)?")


def split_key(key: str) -> tuple[str, str]:
    """An adapter's key in any dialect -> (layer, part); (key, "") if it is none. ValueError for LyCORIS's `dora_scale`.

    `base_model.model.blocks.0.ffn.0.lora_A.default.weight` and `diffusion_model.blocks.0.ffn.0.lora_down.weight` are
    (`blocks.0.ffn.0`, `down`); kohya's `lora_unet_blocks_0_ffn_0.lora_down.weight` is (`blocks_0_ffn_0`, `down`)."""
    if "dora_scale" in key:
        raise ValueError(f"{key} is a LyCORIS magnitude, a number per input column where DoRA has one per output row: "
                         "it would merge wrong unnoticed, so use a file with lora_magnitude_vector")
    match = KEY.fullmatch(key)
    return (match["layer"], PARTS[match["part"]]) if match else (key, "")


# Merge

@dataclass
class Delta:
    """What an adapter does to one tensor: m (W + s B A) / ||W + s B A|| + strength * diff, as far as it has them."""
    strength: float = 1.0
    down: Tensor | None = None         # A (r i k..)
    up: Tensor | None = None           # B (o r 1..)
    magnitude: Tensor | None = None    # m (o), or peft's (1 o 1 1..) for a convolution
    alpha: Tensor | None = None        # s = strength * alpha / r; without alpha, s = strength
    diff: Tensor | None = None         # shaped like the tensor
    keys: dict[str, str] = field(default_factory=dict)      # of these tensors in the file, by the names above

    @property
    def scale(self) -> float:
        return self.strength * (1.0 if self.alpha is None else float(self.alpha) / len(self.down))

    def problems(self, shape: torch.Size) -> dict[str, str]:
        """What is wrong with each of its tensors for a target of this shape; empty if it fits."""
        given = {part: tuple(tensor.shape) for part, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        if given.keys() - {"diff"} and not given.keys() >= {"down", "up"}:
            return {part: "stands without both low-rank factors" for part in given.keys() - {"diff"}}
        o, *inputs = shape or (1,)
        rank, ones = given.get("down", ())[:1], (1,) * len(inputs[1:])
        right = {"down": [(*rank, *inputs)], "up": [(o, *rank, *ones)], "magnitude": [(o,)], "alpha": [(), (1,)],
                 "diff": [tuple(shape)]}
        right["magnitude"] += [(1, o, *ones)] if ones else []
        return {part: f"has shape {has}, not {right[part][0]}" for part, has in given.items() if has not in right[part]}


def raise_if(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError("the adapter does not fit this model: " + "; ".join(sorted(problems)[:10]) + more)


def match_adapter(adapter: dict[str, Tensor], model: dict, strength: float = 1.0) -> tuple[dict[str, Delta], dict]:
    """What an adapter does to a model's tensors, and what is wrong with those of its keys that do not fit.

    Shapes do not count where `model` has None for a tensor."""
    flat = {name.replace(".", "_"): name for name in model}    # kohya's spelling
    deltas, problems = {}, {}
    for key, tensor in adapter.items():
        layer, part = split_key(key)
        parameter = FIELDS.get(part, "weight")
        part = "diff" if part in FIELDS else part
        name = flat.get(f"{layer}_{parameter}", layer if layer in model else f"{layer}.{parameter}")
        if not part or name not in model:
            problems[key] = "finds no target"
        elif part in (delta := deltas.setdefault(name, Delta(strength))).keys:
            problems[key] = f"and {delta.keys[part]} are the same thing"
        else:
            delta.keys[part] = key
            setattr(delta, part, tensor)
    for name, delta in deltas.items():
        if model[name] is not None:
            problems |= {delta.keys[part]: text for part, text in delta.problems(model[name].shape).items()}
    return deltas, problems


def parse_adapter(adapter: dict[str, Tensor], model: dict[str, Tensor], strength: float = 1.0) -> dict[str, Delta]:
    """What an adapter file, in any dialect, does to a model's tensors: {"blocks.0.ffn.0.weight": Delta(...), ...}.

    Of `model`, a state dict, only names and shapes are read: meta tensors will do. ValueError, before anything is
    merged, lists up to ten keys that find no target, lack their partner, stand twice or have the wrong shape."""
    deltas, problems = match_adapter(adapter, model, strength)
    raise_if([f"{key} {text}" for key, text in problems.items()])
    return deltas


def merge_tensor(weight: Tensor, delta: Delta) -> Tensor:
    """One tensor with its `Delta` merged, in float32, then cast to the tensor's dtype. To merge several adapters into a
    half-precision tensor, give it `weight.float()` and cast once at the end."""
    merged = weight.float()
    if delta.down is not None:
        merged = low_rank_sum(merged, delta.down, delta.up, delta.scale)
    if delta.magnitude is not None:
        merged = set_row_norm(merged, delta.magnitude.flatten())
    if delta.diff is not None:
        merged = merged + delta.strength * delta.diff.float()
    return merged.to(weight.dtype)


def merge_adapter(state: dict[str, Tensor], adapter: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """A new state dict with the adapter merged; `state` stays as it was and shares the tensors that nothing changes.

    `scale` multiplies B A (times alpha / r where the file has `.alpha`) and the diffs: 1 for Wan-Alpha's DoRA and for
    LightX2V, 1 / r for the VAE decoders. ValueError as in `parse_adapter`."""
    deltas = parse_adapter(adapter, state, scale)
    return {name: merge_tensor(weight, deltas[name]) if name in deltas else weight for name, weight in state.items()}


def read_adapter(path: str | Path, keys: Iterable[str] | None = None, device="cpu") -> dict[str, Tensor]:
    """The tensors of a .safetensors, or of a .bin, .pth or .pt file (memory-mapped). Code in a pickle is never run.

    keys: only these. device "meta": shapes alone, nothing is read; a mapping of its own each time gives its pages back
    with the tensors (see `read_delta`); a pickle is mapped once and whole, whatever keys and device are.
    FileNotFoundError if there is none; ValueError if it holds more than tensors, is cut short or is something else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                if device == "meta":
                    return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
                return {key: file.get_tensor(key) for key in keys or file.keys()}
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds Python objects and was not opened: export its plain state dict") from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError):
        raise ValueError(f"{path} is cut short, unreadable or no checkpoint: download or export it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} is not a flat dict of tensors: export the adapter's state dict alone")
    return tensors


def read_delta(delta: Delta, path: str | Path) -> Delta:
    """A delta parsed from shapes alone with its tensors, read from that file: they take memory while they are used."""
    keys = {part: key for part, key in delta.keys.items() if getattr(delta, part).is_meta}
    tensors = read_adapter(path, keys.values()) if keys else {}
    return replace(delta, **{part: tensors[key] for part, key in keys.items()})


# The command

WORDS = {"peft": dict(down="{}.lora_A.default.weight", up="{}.lora_B.default.weight",
                      magnitude="{}.lora_magnitude_vector.default.weight"),
         "comfy": dict(down="diffusion_model.{}.lora_down.weight", up="diffusion_model.{}.lora_up.weight",
                       magnitude="diffusion_model.{}.lora_magnitude_vector.weight", alpha="diffusion_model.{}.alpha",
                       weight="diffusion_model.{}.diff", bias="diffusion_model.{}.diff_b",
                       modulation="diffusion_model.{}.diff_m")}


def dialect(key: str) -> str:
    """Whose spelling an adapter's key has, and the word that tells: "ComfyUI (lora_down)", "peft (lora_A.default)"."""
    word = KEY.fullmatch(key)["part"] + ".default" * (".default" in key)
    owners = {"lora_unet_": "kohya", "diffusion_model.": "ComfyUI", "base_model.model.": "peft, base_model.model."}
    owner = next((owner for prefix, owner in owners.items() if key.startswith(prefix)), None)
    return f"{owner or ('peft' if word.startswith('lora_A') else 'no prefix')} ({word})"


@functools.cache
def released_models(vae: bool) -> dict[str, dict[str, Tensor]]:
    """Names and shapes, as meta tensors, of the models that an adapter may be for."""
    from dit import WAN_14B, WAN_1_3B, WanDiT
    from vae import WanVAE
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


def describe(path: str | Path) -> str:
    """What an adapter file is: dialect, kind, rank, scale, differences; which layers of the released models it fits.
    ValueError if it is no adapter, or one with LyCORIS's magnitudes."""
    from merge import adapter_part
    adapter, kinds = read_adapter(path), Counter()
    if vae := any(key.startswith(("vae_fgr.", "vae_pha.")) for key in adapter):
        kinds = Counter(map(adapter_part, adapter))
        adapter = {key: t for key, t in adapter.items() if adapter_part(key) not in ("middle", "skipped")}
    parts = {key: split_key(key) for key in adapter}
    count = Counter(part for _, part in parts.values())
    if not count.keys() - {""}:
        raise ValueError(f"{path} is no adapter: none of its {len(adapter)} keys names a LoRA, a DoRA or a difference")
    rank = {layer: len(adapter[key]) for key, (layer, part) in parts.items() if part == "down"}
    scales = {float(adapter[key]) / rank.get(layer, 1) for key, (layer, part) in parts.items() if part == "alpha"}
    spelt = dict.fromkeys(dialect(key) for key, (_, part) in parts.items() if part in (["down"] if rank else PARTS))
    return "\n".join([
        f"{path}: {', '.join(spelt)}",
        f"{'DoRA' if count['magnitude'] else 'LoRA'} on {len(rank)} layers, rank {sorted(set(rank.values()))}, scale "
        f"{sorted(scales) or ('1 / rank' if vae else '1') + ', there is no .alpha'}",
        "differences: " + (", ".join(f"{count[d]} {d}" for d in ("diff", "diff_b", "diff_m") if count[d]) or "none"),
        *[f"merge block: {kinds['middle']} tensors; frozen copies, skipped: {kinds['skipped']}"] * vae,
        *describe_fit(adapter, vae)])


def fold_alpha(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts with s = alpha / r inside B. ValueError if that rounds; it does not for powers of two."""
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
        if parts.keys() & {"down", "up", "magnitude", "alpha"} and not parts.keys() >= {"down", "up"}:
            raise ValueError(f"{name} has {', '.join(parts)}, but not both low-rank factors")
        if to == "peft" and "alpha" in parts:
            parts = fold_alpha(name, parts)
        if unsaid := parts.keys() - WORDS[to].keys():
            raise ValueError(f"{to} has no name for differences, as {layer} has them in its {', '.join(unsaid)}")
        result |= {WORDS[to][part].format(layer): tensor for part, tensor in parts.items()}
    return result


def show_stage() -> None:
    plain, x = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)), torch.randn(4, 48)
    adapted = add_dora(copy.deepcopy(plain), rank=4, alpha=4, targets=["0", "2"])
    for layer in adapted_layers(adapted).values():
        nn.init.normal_(layer.lora_B)
    for key, tensor in adapter_state(adapted).items():
        print(f"{key:46} {tuple(tensor.shape)}")
    merged = torch.func.functional_call(plain, merge_adapter(plain.state_dict(), adapter_state(adapted)), x)
    print(f"the adapter moves the output by {(merged - plain(x)).abs().max():.3f}; "
          f"merged and unmerged differ by {(merged - adapted(x)).abs().max():.1e}")


def main(argv: list[str] | None = None) -> None:
    from data import save_tensors
    parser = argparse.ArgumentParser(prog="dora.py", description="What an adapter file is; without one, shapes.")
    parser.add_argument("file", nargs="?", metavar="FILE", help="LoRA or DoRA: .safetensors, .bin, .pth or .pt")
    parser.add_argument("--to", nargs=2, metavar=("peft|comfy", "OUT"), help="write it, so spelt, to OUT.safetensors")
    args = parser.parse_args(argv)
    to, out = args.to or ("peft", ".safetensors")
    if to not in WORDS or not out.endswith(".safetensors") or (args.to and not args.file):
        parser.error("--to takes a FILE before it, peft or comfy, and a name that ends in .safetensors")
    try:
        if args.to:
            save_tensors(out, respell(read_adapter(args.file), to))
        elif args.file:
            print(describe(args.file))
        else:
            show_stage()
    except (ValueError, OSError, SafetensorError) as error:
        print("dora.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
