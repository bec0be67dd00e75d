"""The RGBA autoencoder of Wan-Alpha: one frozen encoder twice, a merge block, two LoRA decoders (paper, section 3.2).

    rgb (b, 3, t, h, w) in [-1, 1], alpha (b, 1, t, h, w) in [0, 1]
      -> features of the hard render and of alpha as grey, (b, 384, t', h/8, w/8) each, concatenated: rgb first
      -> merge block -> raw latent (b, 16, t', h/8, w/8), normalised with the base VAE's MEAN and STD like any other
      -> the RGB decoder's three channels; the alpha decoder's mean of three channels, (x + 1) / 2

The latent has the shape and statistics of an RGB latent, so the transformer needs no new layer. There is no KL term.
Letters: b batch, c channels, t frames, h w height and width.
Differs from the official code: the encoder is held once, not in both VAEs; chunks of any length stream through encoder
and merge block alike (test_rgba_streaming_is_exact); starting the merge block as the base encoder's own head
(`start_as_rgb`) is ours. Parameter names are official (middle.block.*, vae_fgr.*, vae_pha.*).
dtype rule: as in vae.py; everything keeps the input's dtype.
"""

import copy
import re
from pathlib import Path

import torch
from torch import nn

from dora import adapter_state, add_lora, load_adapter_state, merge_adapter, parse_adapter
from kit.files import Checkpoint, load_strict, show_help
from losses import hard_render
from vae import AttentionBlock, CausalConv3d, RMSNorm, ResidualBlock, Sequential, WanVAE, chunks, load_vae

WHITE = torch.ones(3)


class FeatureMerge(nn.Module):
    """Encoder features of RGB and alpha, (b, in_dim, t, h, w), to one raw latent (b, out_dim, t, h, w)."""

    def __init__(self, in_dim: int = 768, out_dim: int = 16, mid_dim: int = 384):
        super().__init__()
        self.block = nn.ModuleDict(dict(
            conv1=CausalConv3d(in_dim, mid_dim, 1),
            middle=Sequential(ResidualBlock(mid_dim, mid_dim), AttentionBlock(mid_dim), ResidualBlock(mid_dim, mid_dim),
                              AttentionBlock(mid_dim), ResidualBlock(mid_dim, mid_dim)),
            head=Sequential(RMSNorm(mid_dim), nn.SiLU(), CausalConv3d(mid_dim, out_dim, 3, padding=1))))

    def forward(self, features, cache=None):
        return self.block["head"](self.block["middle"](self.block["conv1"](features), cache), cache)

    @torch.no_grad()
    def start_as_rgb(self, vae: WanVAE):
        """Before training: pass the RGB features to a copy of the base encoder's head, so the first latents are RGB."""
        conv1, middle, head = self.block["conv1"], self.block["middle"], self.block["head"]
        conv1.weight.zero_()
        conv1.weight[:, :conv1.weight.shape[0], 0, 0, 0] = torch.eye(conv1.weight.shape[0])
        conv1.bias.zero_()
        for block in middle:
            last = block.residual[6] if isinstance(block, ResidualBlock) else block.proj
            last.weight.zero_()
            last.bias.zero_()
        mix, offset = (p[:vae.config.z_dim] for p in (vae.conv1.weight.flatten(1), vae.conv1.bias))  # to the mean alone
        head[0].gamma.copy_(vae.encoder.head[0].gamma)
        head[2].weight.copy_(torch.einsum("z y, y ... -> z ...", mix, vae.encoder.head[2].weight))
        head[2].bias.copy_(mix @ vae.encoder.head[2].bias + offset)


ENCODING, DECODING = ("encoder", "conv1"), ("conv2", "decoder")


def keep(vae: WanVAE, names: tuple) -> WanVAE:
    """A VAE of these parts alone; their parameters are shared with `vae`."""
    part = copy.copy(vae)
    part._modules = {name: module for name, module in vae._modules.items() if name in names}
    return part


class RGBAVAE(nn.Module):
    """vae: of the base what encodes; middle: the merge block; without one there is nothing to encode with (decode
    only). vae_fgr, vae_pha: decoders of RGB, alpha; skipped: tensors of the adapter file that nobody needs."""

    skipped = 0

    def __init__(self, vae: WanVAE, middle: FeatureMerge | None = None):
        super().__init__()
        vae.requires_grad_(False)
        self.vae, self.middle = keep(vae, ENCODING if middle else ()), middle
        self.vae_fgr, self.vae_pha = (copy.deepcopy(keep(vae, DECODING)) for _ in range(2))

    def merged(self, rgb, alpha, caches=(None, None, None)):
        """Raw latent of one chunk: rgb rendered, alpha as grey, both (b, 3, t, h, w) in [-1, 1]."""
        features = [self.vae.features(x, cache) for x, cache in zip((rgb, alpha), caches)]
        return self.middle(torch.cat(features, dim=1), caches[2])

    def encode(self, rgb, alpha, color=WHITE, chunk: int | None = 4):
        """rgb (b, 3, t, h, w) in [-1, 1], alpha (b, 1, t, h, w) in [0, 1], straight
        -> normalised latent (b, 16, t', h/8, w/8); chunk as in WanVAE.encode.
        color (3,) or (b, 3): where alpha is 0; random in training, white where nothing is random; None: no render."""
        if self.middle is None:
            raise ValueError("this adapter holds decoders only; to encode give one with the merge block (*-VAE.bin)")
        if alpha.shape != rgb[:, :1].shape or rgb.shape[2] % 4 != 1 or (chunk and chunk % 4):
            raise ValueError(f"encode takes rgb (b,3,t,h,w) and alpha (b,1,t,h,w), t = 4k+1, chunk a multiple of 4; "
                             f"not {tuple(rgb.shape)}, {tuple(alpha.shape)}, {chunk}")
        rendered, grey = rgb if color is None else hard_render(rgb, alpha, color), (2 * alpha - 1).expand_as(rgb)
        caches = (None, None, None) if chunk is None else ({}, {}, {})
        parts = zip(chunks(rendered, 1, chunk), chunks(grey, 1, chunk))
        return self.vae.normalize(torch.cat([self.merged(*part, caches) for part in parts], dim=2))

    def decode(self, z, chunk: int | None = 1, clamp: bool = False):
        """Normalised latent -> rgb (b, 3, t, h, w), about [-1, 1], alpha (b, 1, t, h, w), about [0, 1].
        clamp: as shown, each decoded channel within its range, alpha's before their mean."""
        rgb, alpha = self.vae_fgr.decode(z, chunk), self.vae_pha.decode(z, chunk)
        return (rgb.clamp(-1, 1), self.to_alpha(alpha.clamp(-1, 1))) if clamp else (rgb, self.to_alpha(alpha))

    @staticmethod
    def to_alpha(video):
        return (video.mean(dim=1, keepdim=True) + 1) / 2

    def add_adapters(self, rank: int = 128):
        """LoRA (scale 1/rank) on every convolution of both decoders; those and the merge block are left to train."""
        for branch in (self.vae_fgr, self.vae_pha):
            add_lora(branch, rank, alpha=1.0, targets=r"decoder\..*")
        self.middle.requires_grad_(True)
        return self

    def adapter_state(self) -> dict:
        """What training learnt, in the official layout: middle.*, vae_fgr.decoder.*, vae_pha.decoder.*."""
        state = {f"middle.{k}": v for k, v in self.middle.state_dict().items()}
        for name in ("vae_fgr", "vae_pha"):
            state |= {f"{name}.{k}": v for k, v in adapter_state(getattr(self, name)).items()}
        return state

    def load_adapter(self, state: dict) -> None:
        """The way back, into adapters of the same rank; after a decoder.bin the merge block alone is left to train.
        ValueError or RuntimeError if something does not fit."""
        parts = split_adapter(state, "the file")
        if parts["middle"]:
            self.middle.load_state_dict(parts["middle"])
        for name in ("vae_fgr", "vae_pha"):
            load_adapter_state(getattr(self, name), parts[name])
            if not parts["middle"]:
                getattr(self, name).requires_grad_(False)


def adapter_part(key: str) -> str:
    """What a key of a Wan-Alpha VAE adapter belongs to: "middle", the merge block; "vae_fgr" or "vae_pha", a decoder's
    LoRA; "skipped", buffers of losses and the frozen base weights that *-VAE.bin repeats (encoders, conv1, conv2, what
    of a decoder has no LoRA, and, where it has one, peft's `.base_layer.`); "" if it is none of these."""
    branch, _, name = key.partition(".")
    if branch == "middle" or (branch in ("vae_fgr", "vae_pha") and ".lora_" in name):
        return branch
    frozen = branch in ("vae_fgr", "vae_pha") and name.startswith(("encoder.", "decoder.", "conv1.", "conv2."))
    return "skipped" if frozen or re.search("loss|lpips|vgg", branch) else ""


def split_adapter(state: dict, path) -> dict[str, dict]:
    """The tensors of such an adapter by `adapter_part`, the part's name taken off the keys but for skipped ones."""
    parts = {name: {} for name in ("middle", "vae_fgr", "vae_pha", "skipped", "")}
    for key, value in state.items():
        part = adapter_part(key)
        parts[part][key.removeprefix(part + ".")] = value
    if parts[""] or not parts["vae_fgr"] or not parts["vae_pha"]:
        has = f" and has {', '.join([*parts['']][:10])}" if parts[""] else ""
        if "decoder.conv1.weight" in state:
            has += "; of two decoders merged already give both files, RGB first"
        raise ValueError(f"{path} is not a Wan-Alpha VAE adapter: it needs vae_fgr.* and vae_pha.* LoRA keys{has}")
    return parts


def load_rgba_vae(vae_path, adapter_path, dtype=torch.float32, device="cpu") -> RGBAVAE:
    """Base VAE file plus adapter: decoder.bin (decode only), *-VAE.bin, or what train_vae.py wrote; LoRA is merged in
    float32. Or, in place of an adapter, two whole VAEs whose decoders are merged already, RGB first (decode only):
    ComfyUI's wan_alpha_2.1_vae_rgb_channel.safetensors and wan_alpha_2.1_vae_alpha_channel.safetensors. Or None: of a
    plain Wan there is a decoder of colour, and vae_pha is None.
    device "meta": names and shapes only. ValueError if something does not fit."""
    source = "meta" if str(device) == "meta" else "cpu"
    vae = load_vae(vae_path, device=source)
    if adapter_path is None:
        rgba = RGBAVAE(vae).to(device, dtype).requires_grad_(False).eval()
        rgba.vae_pha = None
        return rgba
    files = [adapter_path] if isinstance(adapter_path, (str, Path)) else list(adapter_path)
    if len(files) not in (1, 2):
        raise ValueError(f"a VAE adapter is one file, or two of merged decoders, RGB first; not {len(files)}")
    rgba = load_merged(vae, files, source) if len(files) == 2 else load_adapted(vae, files[0], source)
    return rgba.to(device, dtype).requires_grad_(False).eval()


def load_adapted(vae: WanVAE, path, device) -> RGBAVAE:
    file = Checkpoint(path)
    parts = split_adapter(file.meta if device == "meta" else file.read(), path)
    rgba = RGBAVAE(vae, load_middle(parts["middle"], path, device) if parts["middle"] else None)
    rgba.skipped = len(parts["skipped"])
    for branch, lora in ((rgba.vae_fgr, parts["vae_fgr"]), (rgba.vae_pha, parts["vae_pha"])):
        rank = next((v.shape[0] for k, v in lora.items() if ".lora_A." in k), 1)
        try:
            if device == "meta":
                parse_adapter(lora, branch.state_dict())    # a product there would import torch's compiler, a second
            else:
                branch.load_state_dict(merge_adapter(branch.state_dict(), lora, scale=1 / rank), assign=True)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return rgba


def load_merged(vae: WanVAE, paths: list, device) -> RGBAVAE:
    """RGB and alpha decoder from two whole VAEs; their encoders, the base's own, are passed over and counted."""
    rgba = RGBAVAE(vae)
    for path, branch in zip(paths, (rgba.vae_fgr, rgba.vae_pha)):
        state, names = load_vae(path, vae.config, device=device).state_dict(), branch.state_dict()
        branch.load_state_dict({name: state[name] for name in names}, assign=True)
        rgba.skipped += len(state) - len(names)
    return rgba


def load_middle(state: dict, path, device) -> FeatureMerge:
    """The merge block from its tensors, whose shapes say its sizes."""
    sizes = [state.get(f"block.{name}.weight", torch.empty(1, 1)).shape for name in ("conv1", "head.2")]
    with torch.device("meta"):
        middle = FeatureMerge(sizes[0][1], *sizes[1][:2])
    return load_strict(middle, state, path, device=device)


if __name__ == "__main__":
    show_help("merge.py: random colour and alpha through a small random RGBA autoencoder: shapes")
    from vae import VAEConfig
    vae = WanVAE(VAEConfig(dim=8))
    rgba = RGBAVAE(vae, FeatureMerge(64, 16, 32))
    rgb, alpha = torch.rand(1, 3, 17, 64, 64) * 2 - 1, torch.rand(1, 1, 17, 64, 64)
    with torch.no_grad():
        z = rgba.encode(rgb, alpha)
        print(f"rgb {tuple(rgb.shape)}, alpha {tuple(alpha.shape)} -> latent {tuple(z.shape)} -> ",
              *(tuple(x.shape) for x in rgba.decode(z)))
