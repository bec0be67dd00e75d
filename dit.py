"""Wan's diffusion transformer: a noisy latent z, its time t and a text context become the velocity v = noise - z.

z (b c t h w) is cut into 1x2x2 patches, tokens of width d. In every block the tokens attend to each other (3-D rotary
positions), then to the text, then pass a feed-forward network; t shifts, scales and gates the first and the last of the
three. Wan2.1, arXiv 2503.20314, section 4.2. Wan-Alpha changes nothing here: its adapters merge into the weights, which
`load_dit` does on the way. Only that needs `dora.py` and `kit/files.py`; the model itself needs nothing of ours.

Letters: b batch, c channels, t frames, h height, w width, n tokens, l text tokens, d width, a heads. Parameters have
their official names.

dtype: a matrix product runs in the dtype of its weights. Residual stream, norms, rotation, modulation and the sinusoids
of t are always float32 (bfloat16 turns t = 988.49 and 987.17 both into 988: test_dit_keeps_time_in_float32), and
`load_dit` leaves the weights of time embedding, modulation, norms and head in float32.
Difference from the official code: one size for all clips of a batch; the rotation is real and float32, not complex and
float64 (test_official_numbers).
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dora import Delta, merge_tensor, parse_adapter, read_delta, reading_options
from kit.files import Checkpoint, check_fit, find_dit, read_json, show_help


@dataclass
class DiTConfig:
    dim: int                        # d, width of a token
    ffn_dim: int                    # width inside the feed-forward network
    num_heads: int
    num_layers: int
    in_dim: int = 16                # channels of z
    out_dim: int = 16               # channels of v
    text_dim: int = 4096            # width of the text encoder
    text_len: int = 512             # text tokens after zero-padding; the zeros are not masked
    freq_dim: int = 256             # sinusoids of t
    patch_size: tuple = (1, 2, 2)   # latent cells to a token along t, h, w
    eps: float = 1e-6

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size)    # config.json knows lists only


WAN_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


def frequencies(k: int, device) -> Tensor:
    """10000^(-i/k) for i < k, float64: the radians by which the i-th of k sinusoids turns per unit of time or place."""
    return 10000.0 ** (-torch.arange(k, dtype=torch.float64, device=device) / k)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """t (b,) in [0, 1000] -> (b, dim) float32, the cosines first, then the sines."""
    angles = torch.outer(t.double(), frequencies(dim // 2, t.device))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rope_table(head_dim: int, t: int, h: int, w: int, device=None) -> Tensor:
    """Cosine and sine (2, n, head_dim/2), float32, of the angle by which each channel pair of each token is turned.

    The first pairs of a head turn with the token's t, then head_dim//6 with h and as many with w: 22, 21, 21 of 64.
    """
    position = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64, device=device) for size in (t, h, w)))
    pairs = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)
    angles = torch.cat([torch.outer(p, frequencies(k, device)) for p, k in zip(position.T, pairs)], dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the pairs of neighbouring channels of x (b a n d) by the angles of `rope_table`."""
    cos, sin = rope
    even, odd = rearrange(x.float(), "b a n (k two) -> two b a n k", two=2)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos])
    return rearrange(turned, "two b a n k -> b a n (k two)").to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight in float32, returned in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32, returned in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.weight.float(), self.bias.float()) if self.elementwise_affine else (None, None)
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Queries from x (b n d), keys and values from source (b m d); q and k are normed over the full width d."""

    attend = staticmethod(F.scaled_dot_product_attention)   # (b a n d/a) x 3 -> (b a n d/a); replaceable

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor, source: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (rearrange(y, "b n (a d) -> b a n d", a=self.num_heads) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.o(rearrange(self.attend(q, k, v), "b a n d -> b n (a d)"))


class Block(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        d, eps = config.dim, config.eps
        self.norm1 = LayerNorm(d, eps, elementwise_affine=False)
        self.self_attn = Attention(d, config.num_heads, eps)
        self.norm3 = LayerNorm(d, eps)
        self.cross_attn = Attention(d, config.num_heads, eps)
        self.norm2 = LayerNorm(d, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(d, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, d))
        self.modulation = nn.Parameter(torch.empty(1, 6, d))

    def forward(self, x: Tensor, e: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        """x (b n d) and what the time says, e (b 6 d), in float32; context (b l d) in the dtype to compute in."""
        dtype = context.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e).chunk(6, dim=1)    # (b 1 d) each
        y = (self.norm1(x) * (1 + scale1) + shift1).to(dtype)
        x = x + gate1 * self.self_attn(y, y, rope)
        x = x + self.cross_attn(self.norm3(x).to(dtype), context)
        y = (self.norm2(x) * (1 + scale2) + shift2).to(dtype)
        return x + gate2 * self.ffn(y)


class Head(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (b n d), e (b d) -> (b n (pt ph pw c)), float32."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        return self.head((self.norm(x) * (1 + scale) + shift).to(self.head.weight.dtype)).float()


class WanDiT(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, d, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, d), nn.GELU("tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if not self.patch_embedding.weight.is_meta:     # there, normal_ would import torch's compiler, a second of work
            self.init_weights()

    def init_weights(self) -> None:
        """The start of training from scratch; v is zero until the head has learned. Source: WanModel.init_weights."""
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(p, std=self.config.dim ** -0.5)
            elif p.ndim == 1:
                nn.init.constant_(p, float("norm" in name and name.endswith("weight")))
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p.data.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    def pad_context(self, context: Tensor | list[Tensor]) -> Tensor:
        """(b, l, text_dim), or one (l, text_dim) a prompt -> (b, text_len, text_dim), zeros after each prompt."""
        if max(len(c) for c in context) > self.config.text_len:
            raise ValueError(f"a context is longer than the {self.config.text_len} text tokens of this model: cut it")
        return torch.stack([F.pad(c, (0, 0, 0, self.config.text_len - len(c))) for c in context])

    def forward(self, z: Tensor, t: Tensor, context: Tensor | list[Tensor]) -> Tensor:
        """The velocity v, float32, shaped like the latents z (b c t h w), at times t (b,) in [0, 1000], never bfloat16.

        context: (b, l, text_dim), l <= text_len, or a list of (l, text_dim). ValueError if z is not whole patches.
        """
        config, size = self.config, tuple(z.shape[2:])
        if any(s % p for s, p in zip(size, config.patch_size)):
            raise ValueError(f"a latent of {size} cells (t, h, w) cannot be cut into patches of {config.patch_size}")
        x = self.patch_embedding(z.to(self.patch_embedding.weight.dtype))
        grid = dict(zip("thw", x.shape[2:]))
        rope = rope_table(config.dim // config.num_heads, **grid, device=z.device)
        x = rearrange(x, "b d t h w -> b (t h w) d").float()
        e = self.time_embedding(sinusoids(t, config.freq_dim).to(self.time_embedding[0].weight.dtype))      # (b d)
        e6 = rearrange(self.time_projection(e), "b (six d) -> b six d", six=6).float()
        context = self.text_embedding(self.pad_context(context).to(self.text_embedding[0].weight.dtype))    # (b l d)
        for block in self.blocks:
            x = block(x, e6, context, rope)
        return rearrange(self.head(x, e.float()), "b (t h w) (p q r c) -> b c (t p) (h q) (w r)",
                         **grid, **dict(zip("pqr", config.patch_size)))


FLOAT32 = ("time_", "modulation", "norm", "head")   # parameters with one of these in their name stay float32


def read_config(path: Path, meta: dict[str, Tensor]) -> DiTConfig:
    """What config.json in (or beside) path says; what it leaves unsaid, and the patch size, the tensors' shapes tell.

    ValueError for tensors of something else, and for sizes that are no whole numbers above 0 or do not go together."""
    shapes = {name: tuple(tensor.shape) for name, tensor in meta.items()}
    try:
        dim, in_dim, *patch_size = shapes["patch_embedding.weight"]
        config = dict(dim=dim, in_dim=in_dim, patch_size=patch_size, ffn_dim=shapes["blocks.0.ffn.0.bias"][0],
                      out_dim=shapes["head.head.bias"][0] // math.prod(patch_size),
                      text_dim=shapes["text_embedding.0.weight"][1], freq_dim=shapes["time_embedding.0.weight"][1],
                      num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
                      num_heads={c.dim: c.num_heads for c in (WAN_1_3B, WAN_14B)}.get(dim))
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"{path} is not a Wan DiT: its tensors are others") from None
    file = find_dit(path)[0].parent / "config.json"
    said = read_json(file) if file.is_file() else {}
    said |= {"num_heads": said["num_attention_heads"]} if "num_attention_heads" in said else {}      # diffusers' word
    config |= {f.name: said[f.name] for f in fields(DiTConfig) if f.name in said and f.name != "patch_size"}
    if config["num_heads"] is None:
        raise ValueError(f"the number of heads of {path} is not known: put it as num_heads into {file}")
    config = DiTConfig(**config)
    sizes = {name: n for name, n in vars(config).items() if name not in ("patch_size", "eps")}
    if wrong := {name: n for name, n in sizes.items() if type(n) is not int or n < 1}:
        raise ValueError(f"{file}: sizes must be whole numbers above 0, but there is {wrong}")
    if type(config.eps) not in (int, float) or not 0 < config.eps < math.inf:
        raise ValueError(f"{file}: eps must be a number above 0, not {config.eps!r}")
    if config.dim % (2 * config.num_heads):
        raise ValueError(f"{file}: dim {config.dim} must be a multiple of twice num_heads, {config.num_heads}")
    return config


def read_deltas(file: Checkpoint, path: str | Path, state: dict, scale: float) -> dict[str, Delta]:
    """What an adapter does to the tensors of `state`, by their names; its own are left in the file, for `read_delta`.
    ValueError unless names and shapes fit."""
    try:
        return parse_adapter(file.meta, state, scale, **reading_options(file, path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_dit(path: str | Path, adapters=()) -> tuple[WanDiT, Iterator[tuple[str, Tensor]]]:
    """A checkpoint's model on the meta device (names and shapes), and its tensors one by one under the same names, as
    stored or, where an adapter changes them, merged in float32. For loaders that place them in their own way.

    path, adapters and errors as in `load_dit`; the errors come at once, before the first tensor is read.
    """
    path = Path(path)
    weights = Checkpoint(*find_dit(path))
    with torch.device("meta"):
        model = WanDiT(read_config(path, weights.meta))
    state = model.state_dict()
    check_fit(path, state, weights.meta, "the transformer of its config")
    changes = []
    for file, scale in adapters:
        adapter = Checkpoint(file)
        changes.append((adapter, read_deltas(adapter, file, state, scale)))

    def read(name):
        tensor = weights.read([name])[name]
        for adapter, deltas in changes:
            if name in deltas:
                tensor = merge_tensor(tensor.float(), read_delta(deltas[name], adapter))
        return tensor
    return model, ((name, read(name)) for name in state)


def resident_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter of this name is held in, in a model of `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32) else dtype


def load_dit(path: str | Path, adapters=(), dtype: torch.dtype = torch.float32, device="cpu") -> WanDiT:
    """A WanDiT from a checkpoint folder (config.json; one file, or shards and their index) or one .safetensors file.

    adapters: (file, scale) each, LoRA or DoRA in any dialect, merged in this order, in float32, before the cast.
    Tensor by tensor, so little more memory is used than the model's own; places that are all made before the first
    merge leave no gaps between them.
    FileNotFoundError: a file is missing. ValueError: one is broken or no Wan DiT, or keys do not fit (ten are listed).
    """
    model, tensors = open_dit(path, adapters)
    state = {name: torch.empty(p.shape, dtype=resident_dtype(name, dtype), device=device)
             for name, p in model.state_dict().items()}
    for name, tensor in tensors:
        state[name].copy_(tensor)
        del tensor                  # or it would stay until the next one is read and merged
    model.load_state_dict(state, assign=True)
    return model


if __name__ == "__main__":
    show_help("dit.py: a small random transformer, part by part: shapes in and out")
    model = WanDiT(DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=16))
    for name in ("patch_embedding", "text_embedding", "time_projection", "blocks.0.self_attn", "blocks.0", "head"):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, y, name=name: print(
            f"{name:18} {str(tuple(inputs[0].shape)):20} -> {tuple(y.shape)}"))
    v = model(torch.randn(1, 16, 3, 8, 12), torch.tensor([750.0]), torch.randn(1, 7, 32))
    print(f"v {tuple(v.shape)}; {sum(p.numel() for p in model.parameters()):,} parameters")
