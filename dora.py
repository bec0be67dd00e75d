"""LoRA and DoRA: small trainable matrices beside frozen weights, and the merge that makes them vanish.

    LoRA (arXiv 2106.09685, eq. 3)    W' = W + s B A
    DoRA (arXiv 2402.09353, eq. 5)    W' = m (W + s B A) / ||W + s B A||

A (r i k..) is `lora_A` or "down", B (o r 1..) is `lora_B` or "up", m (o) is the magnitude, s = alpha / r. The norm runs
over the input axes, one number per *output* row, and counts as a constant in backward (DoRA, section 4.3).
At inference nothing is left of this but other values in the same weights: Wan-Alpha merges its DoRA (r 32, s 1, on
q k v o ffn.0 ffn.2 of every block) and then LightX2V's few-step LoRA, in this order, for the two do not commute.
Its two VAE decoders carry LoRA on every convolution (r 128, s 1/128).

Three parts: layers that train (`add_lora`, `add_dora`), the names they are stored under (`adapter_state`,
`load_adapter_state`), and the merge into a state dict (`merge_adapter`, and its two halves `parse_adapter` and
`merge_tensor` for loaders that see one tensor at a time). What an adapter file is, `python -m kit.adapter FILE` tells.

Letters: o output rows, i inputs, r rank, k kernel. dtype: adapters are made in float32; sums, norms and merges are
computed in float32 and cast to the weight's dtype; a linear layer's low-rank products run in the dtype of its input.
Difference from the official code: that merges the keys it knows and passes over the rest, here every key must find its
tensor (test_dora_key_without_target_is_refused); where both merge they agree (test_official_numbers).
"""
import copy
import functools
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from kit.files import BLOCK_LAYERS, PREFIXES, Checkpoint, read_json, show_help


# The equations

def low_rank_sum(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A in float32, (o i k..). The kernel of a convolution stays with A; B only mixes its r rows."""
    flat = torch.addmm(weight.flatten(1).float(), scale * up.flatten(1).float(), down.flatten(1).float())
    return flat.view(weight.shape)


def row_norm(weight: Tensor) -> Tensor:
    """||W|| over the input axes: (o i k..) -> (o), float32. Rows of zeros get a tiny norm, so that 0/0 becomes 0."""
    return torch.linalg.vector_norm(weight.flatten(1).float(), dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def set_row_norm(weight: Tensor, magnitude: Tensor, base: Tensor | None = None) -> Tensor:
    """m W / ||W||, the norm without gradient: every output row gets the length that `magnitude` (o) says. base: a
    tensor whose norm stands in for W's."""
    norm = row_norm((weight if base is None else base).detach())
    return einsum(magnitude.float() / norm, weight, "o, o ... -> o ...")


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
         "magnitude_vector": "magnitude", "dora_scale": "magnitude", "alpha": "alpha", "diff": "diff",
         "diff_b": "diff_b", "diff_m": "diff_m"}
FIELDS = {"diff_b": "bias", "diff_m": "modulation"}    # the layer's tensor that a part changes, if not its weight
OWNERS = *PREFIXES, "base_model.model.", "pipe.dit.", "transformer."
KEY = re.compile(rf"(?:{'|'.join(map(re.escape, OWNERS))}|lora_unet_+|lycoris_+)*(?P<layer>.+?)(?:\.conv3D)?"
                 rf"\.(?P<part>{'|'.join(PARTS)})(?:\.default)?(?:\.weight)?")


def split_key(key: str) -> tuple[str, str]:
    """An adapter's key in any dialect -> (layer, part); (key, "") if it is none.

    `base_model.model.blocks.0.ffn.0.lora_A.default.weight` and `diffusion_model.blocks.0.ffn.0.lora_down.weight` are
    (`blocks.0.ffn.0`, `down`); kohya's `lora_unet_blocks_0_ffn_0.lora_down.weight` is (`blocks_0_ffn_0`, `down`);
    diffusers' `transformer.blocks.0.attn1.to_out.0.lora_B.weight` is (`blocks.0.self_attn.o`, `up`)."""
    match = KEY.fullmatch(key)
    if not match:
        return key, ""
    block, _, name = match["layer"].partition(".")[2].partition(".")          # blocks.0.attn1.to_q: 0, attn1.to_q
    layer = f"blocks.{block}.{BLOCK_LAYERS[name]}" if name in BLOCK_LAYERS else match["layer"]
    return layer, PARTS[match["part"]]


def peft_scale(config: dict, layer: str) -> float:
    """s of a layer as peft's adapter_config.json says: alpha / r, or alpha / sqrt(r) of rsLoRA; patterns name layers
    that have others. ValueError for what are no numbers above 0."""
    def own(name, usual):
        patterns = config.get(f"{name}_pattern") or {}
        found = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
        return next(found, usual)
    try:
        rank, alpha = own("rank", config.get("r", 8)), own("alpha", config.get("lora_alpha", 8))
        if min(rank, alpha) <= 0:
            raise ValueError
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error):
        raise ValueError("its adapter_config.json has no ranks and alphas above 0: download it again") from None


# Merge

@dataclass
class Delta:
    """What an adapter does to one tensor: m (W + s B A) / ||W + s B A|| + strength * diff, as far as it has them.
    base_norm: divided by ||W|| instead, as ComfyUI merges."""
    strength: float = 1.0
    down: Tensor | None = None         # A (r i k..)
    up: Tensor | None = None           # B (o r 1..)
    magnitude: Tensor | None = None    # m (o), or peft's (1 o 1 1..) for a convolution
    alpha: Tensor | None = None        # s = strength * alpha / r; without alpha, s = strength
    diff: Tensor | None = None         # shaped like the tensor
    base_norm: bool = False
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
        if "dora_scale" in self.keys.get("magnitude", ""):      # LyCORIS's: (1, i) is of columns, (n) may be of either
            right["magnitude"] = [(o, *[1] * len(inputs))]
            if given.get("magnitude") not in right["magnitude"]:
                return {"magnitude": f"is a LyCORIS magnitude of shape {given.get('magnitude')}, but DoRA's is "
                                     f"{right['magnitude'][0]}, one number a row: it would merge wrong unnoticed"}
        return {part: f"has shape {has}, not {right[part][0]}" for part, has in given.items() if has not in right[part]}


def raise_if(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError("the adapter does not fit this model: " + "; ".join(sorted(problems)[:10]) + more)


def match_adapter(adapter: dict[str, Tensor], model: dict, strength: float = 1.0, config: dict | None = None,
                  base_norm: bool = False) -> tuple[dict[str, Delta], dict]:
    """What an adapter does to a model's tensors, and what is wrong with those of its keys that do not fit.

    Shapes do not count where `model` has None for a tensor. config: peft's (`peft_scale`); base_norm: see `Delta`."""
    flat = {name.replace(".", "_"): name for name in model}    # kohya's spelling
    deltas, problems = {}, {}
    for key, tensor in adapter.items():
        layer, part = split_key(key)
        parameter = FIELDS.get(part, "weight")
        part = "diff" if part in FIELDS else part
        name = flat.get(f"{layer}_{parameter}", layer if layer in model else f"{layer}.{parameter}")
        if not part or name not in model:
            problems[key] = "finds no target"
        elif part in (delta := deltas.setdefault(name, Delta(strength, base_norm=base_norm))).keys:
            problems[key] = f"and {delta.keys[part]} are the same thing"
        else:
            delta.keys[part] = key
            setattr(delta, part, tensor)
    for name, delta in deltas.items():
        if config and delta.down is not None and delta.alpha is None:
            delta.strength = strength * peft_scale(config, name.removesuffix(".weight"))
        if model[name] is not None:
            problems |= {delta.keys[part]: text for part, text in delta.problems(model[name].shape).items()}
    return deltas, problems


def parse_adapter(adapter: dict[str, Tensor], model: dict[str, Tensor], strength: float = 1.0,
                  **options) -> dict[str, Delta]:
    """What an adapter file, in any dialect, does to a model's tensors: {"blocks.0.ffn.0.weight": Delta(...), ...}.

    Of `model`, a state dict, only names and shapes are read: meta tensors will do. ValueError, before anything is
    merged, lists up to ten keys that find no target, lack their partner, stand twice or have the wrong shape. options:
    those of `match_adapter`."""
    deltas, problems = match_adapter(adapter, model, strength, **options)
    raise_if([f"{key} {text}" for key, text in problems.items()])
    return deltas


def merge_tensor(weight: Tensor, delta: Delta) -> Tensor:
    """One tensor with its `Delta` merged, in float32, then cast to the tensor's dtype. To merge several adapters into a
    half-precision tensor, give it `weight.float()` and cast once at the end."""
    merged = weight.float()
    if delta.down is not None:
        merged = low_rank_sum(merged, delta.down, delta.up, delta.scale)
    if delta.magnitude is not None:
        merged = set_row_norm(merged, delta.magnitude.flatten(), weight if delta.base_norm else None)
    if delta.diff is not None:
        merged = merged + delta.strength * delta.diff.float()
    return merged.to(weight.dtype)


def merge_adapter(state: dict[str, Tensor], adapter: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """A new state dict with the adapter merged; `state` stays as it was and shares the tensors that nothing changes.

    `scale` multiplies B A (times alpha / r where the file has `.alpha`) and the diffs: 1 for Wan-Alpha's DoRA and for
    LightX2V, 1 / r for the VAE decoders. ValueError as in `parse_adapter`."""
    deltas = parse_adapter(adapter, state, scale)
    return {name: merge_tensor(weight, deltas[name]) if name in deltas else weight for name, weight in state.items()}


def reading_options(file: Checkpoint, path) -> dict:
    """What stands beside an adapter's tensors: peft's adapter_config.json, and in the metadata of a file that
    kit/adapter.py wrote for ComfyUI, that it divides by ||W||."""
    config = Path(path).with_name("adapter_config.json")
    return dict(config=read_json(config) if config.is_file() else None,
                base_norm=file.metadata.get("dora_norm") == "base")


def read_delta(delta: Delta, file: Checkpoint) -> Delta:
    """A delta parsed from shapes alone with its tensors, read from that file: they take memory while they are used."""
    keys = {part: key for part, key in delta.keys.items() if getattr(delta, part).is_meta}
    tensors = file.read(keys.values())
    return replace(delta, **{part: tensors[key] for part, key in keys.items()})


if __name__ == "__main__":
    show_help("dora.py: DoRA on two small layers: its tensors' names and shapes, and that merged and unmerged agree")
    plain, x = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)), torch.randn(4, 48)
    adapted = add_dora(copy.deepcopy(plain), rank=4, alpha=4, targets=["0", "2"])
    for layer in adapted_layers(adapted).values():
        nn.init.normal_(layer.lora_B)
    for key, tensor in adapter_state(adapted).items():
        print(f"{key:46} {tuple(tensor.shape)}")
    merged = torch.func.functional_call(plain, merge_adapter(plain.state_dict(), adapter_state(adapted)), x)
    print(f"the adapter moves the output by {(merged - plain(x)).abs().max():.3f}; "
          f"merged and unmerged differ by {(merged - adapted(x)).abs().max():.1e}")
