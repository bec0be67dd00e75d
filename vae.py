"""The causal 3-D VAE of Wan2.1: video <-> latent, 8x smaller in space and 4x in time (Wan2.1 report, section 4.1).

    encode: (b, 3, t, h, w) in [-1, 1]  ->  (b, 16, t', h/8, w/8), normalised     decode: the way back
    t = 1 + 4k frames become t' = 1 + k latent frames: the first frame stands alone, then every four share one.

Every convolution looks only into the past, so a clip can be cut into chunks of any length: each causal convolution
keeps the last input frames it will need again in `cache`, and the result is the same as in one pass. With no cache
(None) a call is one whole clip, which is what training uses.

Letters: b batch, c channels, t frames, h w height and width, z latent channels.
Differs from the official code (Wan2.1 `vae.py`): the cache idiom stands once, in CausalConv3d, not at 34 places; any
chunking is allowed, not only 1, 4, 4, ...; test_official_numbers and test_vae_is_the_same_in_any_chunks pin both.
Parameter names are official.
dtype rule: activations keep the input's dtype; only a norm's mean square is taken in float32.
"""

import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kit.files import Checkpoint, load_strict, show_help

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    dim: int = 96                                      # channels at full resolution
    z_dim: int = 16                                    # latent channels
    dim_mult: tuple = (1, 2, 4, 4)                     # channels per level, in units of dim; each level halves h and w
    num_res_blocks: int = 2                            # per level of the encoder; the decoder has one more
    temporal_downsample: tuple = (False, True, True)   # does the step after this level halve t too?
    mean: tuple = WAN_MEAN                             # of the raw latent, per channel: z = (raw - mean) / std
    std: tuple = WAN_STD


class CausalConv3d(nn.Conv3d):
    """3-D convolution that pads space on both sides and time on the left only, by kernel - stride frames.

    forward(x (b, c, t, h, w), cache): with a cache (a dict), the frames on the left are the last ones of the previous
    call; without, or at the start of a clip, they are zeros.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel, stride=1, padding=0):
        super().__init__(in_dim, out_dim, kernel, stride, (0, padding, padding))

    def forward(self, x, cache=None):
        past = self.kernel_size[0] - self.stride[0]
        if past:
            history = None if cache is None else cache.get(self)
            if history is None and x.shape[2] == 1:    # zeros on the left: only the last tap of the kernel counts
                if cache is not None:
                    cache[self] = F.pad(x, (0, 0, 0, 0, past - 1, 0))
                frame = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self.padding[1:])
                return frame.unsqueeze(2)
            x = F.pad(x, (0, 0, 0, 0, past, 0)) if history is None else torch.cat([history, x], dim=2)
            if cache is not None:
                cache[self] = x[:, :, -past:].clone()  # a copy: a view would keep the whole chunk alive
        return super().forward(x)


class Sequential(nn.Sequential):
    """nn.Sequential that hands the cache to the layers that keep one."""

    def forward(self, x, cache=None):
        for layer in self:
            x = layer(x, cache) if isinstance(layer, (CausalConv3d, ResidualBlock, Resample)) else layer(x)
        return x


class RMSNorm(nn.Module):
    """x / ||x||_2 * sqrt(c) * gamma over the channel axis 1. images=True: per-frame features (b, c, h, w)."""

    def __init__(self, dim: int, images: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * (2 if images else 3)))

    def forward(self, x):
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(mean_square + 1e-20).to(x.dtype) * self.gamma.to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = Sequential(
            RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMSNorm(out_dim), nn.SiLU(), nn.Identity(), CausalConv3d(out_dim, out_dim, 3, padding=1))
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x, cache=None):
        return self.shortcut(x) + self.residual(x, cache)


class AttentionBlock(nn.Module):
    """One head of self-attention among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, images=True)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        b, c, t, h, w = x.shape
        frames = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        q, k, v = rearrange(self.to_qkv(frames), "n (three c) h w -> three n 1 (h w) c", three=3)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(rearrange(out, "n 1 (h w) c -> n c h w", h=h))
        return x + rearrange(out, "(b t) c h w -> b c t h w", t=t)


class Resample(nn.Module):
    """Halve or double h and w, frame by frame; with time=True t as well. The clip's first frame keeps its own place in
    time: it passes the time convolution by. Downsampling uses it as history; upsampling starts from zeros after it."""

    def __init__(self, dim: int, up: bool, time: bool):
        super().__init__()
        self.up = up
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"),
                                          nn.Conv2d(dim, dim // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if time:
            self.time_conv = CausalConv3d(dim, 2 * dim if up else dim, (3, 1, 1), stride=(1 if up else 2, 1, 1))

    def forward(self, x, cache=None):
        time = hasattr(self, "time_conv")
        if time and self.up:
            x = self.in_time(x, cache)
        t = x.shape[2]
        x = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        x = rearrange(x, "(b t) c h w -> b c t h w", t=t)
        return self.in_time(x, cache) if time and not self.up else x

    def in_time(self, x, cache):
        cache = {} if cache is None else cache
        start = self not in cache
        cache[self] = True
        first, rest = (x[:, :, :1], x[:, :, 1:]) if start else (x[:, :, :0], x)
        if start and not self.up:
            cache[self.time_conv] = first
        if rest.shape[2] == 0:
            return first
        rest = self.time_conv(rest, cache)
        if self.up:
            rest = rearrange(rest, "b (two c) t h w -> b c (t two) h w", two=2)
        return torch.cat([first, rest], dim=2)


class Encoder3d(nn.Module):
    """Video to features; `head` makes mean and log variance of the latent from them."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], 3, padding=1)
        layers = []
        for level, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            for block in range(config.num_res_blocks):
                layers.append(ResidualBlock(in_dim if block == 0 else out_dim, out_dim))
            if level < len(config.dim_mult) - 1:
                layers.append(Resample(out_dim, up=False, time=config.temporal_downsample[level]))
        self.downsamples = Sequential(*layers)
        self.middle = Sequential(ResidualBlock(out_dim, out_dim), AttentionBlock(out_dim),
                                 ResidualBlock(out_dim, out_dim))
        self.head = Sequential(RMSNorm(out_dim), nn.SiLU(), CausalConv3d(out_dim, 2 * config.z_dim, 3, padding=1))

    def forward(self, x, cache=None):
        return self.middle(self.downsamples(self.conv1(x, cache), cache), cache)


class Decoder3d(nn.Module):
    """The encoder's mirror: latent to video."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], 3, padding=1)
        self.middle = Sequential(ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]),
                                 ResidualBlock(dims[0], dims[0]))
        layers = []
        for level, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            in_dim = in_dim if level == 0 else in_dim // 2     # the upsampling before this level halved the channels
            for block in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(in_dim if block == 0 else out_dim, out_dim))
            if level < len(config.dim_mult) - 1:
                layers.append(Resample(out_dim, up=True, time=config.temporal_downsample[::-1][level]))
        self.upsamples = Sequential(*layers)
        self.head = Sequential(RMSNorm(out_dim), nn.SiLU(), CausalConv3d(out_dim, 3, 3, padding=1))

    def forward(self, z, cache=None):
        return self.head(self.upsamples(self.middle(self.conv1(z, cache), cache), cache), cache)


def chunks(x, first: int, size: int | None):
    """Cut (b, c, t, h, w) in time into `first`, `size`, `size`, ... frames; size None: all in one."""
    if size is None or x.shape[2] <= first:
        return [x]
    return [x[:, :, :first], *x[:, :, first:].split(size, dim=2)]


class WanVAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder3d(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder3d(config)

    def statistics(self, like):
        """MEAN and STD of the raw latent, each (1, z, 1, 1, 1), on the device and in the dtype of `like`."""
        return (torch.tensor(s, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
                for s in (self.config.mean, self.config.std))

    def normalize(self, raw):
        mean, std = self.statistics(raw)
        return (raw - mean) / std

    def features(self, video, cache=None):
        """Encoder features before the head: (b, 3, t, h, w) in [-1, 1] -> (b, 384, t', h/8, w/8).
        Input of the merge block."""
        b, c, t, h, w = video.shape
        if h % 8 or w % 8 or (cache is None and t % 4 != 1):
            raise ValueError(f"the VAE takes 4k+1 frames of sides divisible by 8, not {t} frames of {w}x{h}; "
                             "crop or pad the clip")
        return self.encoder(video, cache)

    def moments(self, features, cache=None):
        """Mean and log variance of the raw latent, (b, z, t', h/8, w/8) each, from the features."""
        return self.conv1(self.encoder.head(features, cache)).chunk(2, dim=1)

    def encode(self, video, chunk: int | None = 4):
        """Video (b, 3, t, h, w) in [-1, 1], t = 4k+1 -> normalised latent (b, 16, t', h/8, w/8).
        chunk: frames at a time after the first, a multiple of 4; None: one pass. It changes memory, not the result."""
        if video.shape[2] % 4 != 1 or (chunk and chunk % 4):
            raise ValueError("encode takes 4k+1 frames in chunks of 4k, "
                             f"not {video.shape[2]} frames in chunks of {chunk}")
        cache = None if chunk is None else {}
        raw = [self.moments(self.features(part, cache), cache)[0] for part in chunks(video, 1, chunk)]
        return self.normalize(torch.cat(raw, dim=2))

    def decode_stream(self, z, chunk: int | None = 1):
        """Yield the decoded video piece by piece, `chunk` latent frames at a time (None: all in one). Not clamped."""
        mean, std = self.statistics(z)
        cache = None if chunk is None else {}
        for part in chunks(z, chunk, chunk):
            yield self.decoder(self.conv2(part * std + mean), cache)

    def decode(self, z, chunk: int | None = 1):
        """Normalised latent (b, 16, t', h', w') -> video (b, 3, 4t'-3, 8h', 8w'), about [-1, 1], not clamped."""
        if chunk is None:
            return next(self.decode_stream(z, None))
        b, _, t, h, w = z.shape
        video, done = z.new_empty(b, 3, 4 * t - 3, 8 * h, 8 * w), 0
        for part in self.decode_stream(z, chunk):
            video[:, :, done:done + part.shape[2]] = part
            done += part.shape[2]
        return video

    @torch.no_grad()
    def init_weights(self):
        """Start from scratch: kernels keep the signal's size and act on the present frame, hardly on the past."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                fan_in = module.weight[0].numel() / (module.kernel_size[0] if module.weight.dim() == 5 else 1)
                module.weight.normal_(0, fan_in ** -0.5)
                module.bias.zero_()
                if module.weight.dim() == 5:
                    module.weight[:, :, :-1] *= 0.1
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.residual[6].weight *= 0.4
            if isinstance(module, Resample) and hasattr(module, "time_conv"):     # pass frames on: the newest is copied
                module.time_conv.weight.zero_()
                halves = module.time_conv.weight[:, :, -1, 0, 0].chunk(2 if module.up else 1)
                for half in halves:
                    half.copy_(torch.eye(half.shape[1]))


def vae_config(state: dict, metadata: dict | None = None) -> VAEConfig:
    """Sizes from the tensors of a Wan VAE; mean and std from the file's metadata where it has them, else Wan's."""
    down = [k.split(".")[2] for k in state if k.startswith("encoder.downsamples.")]
    count = max(map(int, down)) + 1
    name = "encoder.downsamples.{}.{}"
    blocks = [i for i in range(count) if name.format(i, "residual.2.weight") in state]
    steps = [i for i in range(count) if name.format(i, "resample.1.weight") in state]
    dim, per_level = state["encoder.conv1.weight"].shape[0], steps[0]
    widths = [state[name.format(i, "residual.6.weight")].shape[0] for i in blocks[::per_level]]
    stats = {k: tuple(json.loads(v)) for k, v in (metadata or {}).items() if k in ("mean", "std")}
    return VAEConfig(dim, state["conv2.weight"].shape[0], tuple(w // dim for w in widths), per_level,
                     tuple(name.format(i, "time_conv.weight") in state for i in steps), **stats)


def load_vae(path, config: VAEConfig | None = None, dtype=torch.float32, device="cpu") -> WanVAE:
    """Wan2.1_VAE.pth, or a .safetensors of the same keys, of any size; without `config` it is read from the tensors.
    device "meta": names and shapes only. FileNotFoundError, or ValueError if it does not fit."""
    file = Checkpoint(path)
    try:
        config = config or vae_config(file.meta, file.metadata)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{path} is not a Wan VAE: encoder.conv1.weight and its neighbours are not in it") from None
    with torch.device("meta"):
        vae = WanVAE(config)
    return load_strict(vae, file.meta if str(device) == "meta" else file.read(), path, dtype, device)


if __name__ == "__main__":
    show_help("vae.py: a random clip through a small random autoencoder, whole and streamed: shapes and difference")
    config = VAEConfig(dim=8)
    vae, video = WanVAE(config).eval(), torch.rand(1, 3, 17, 64, 64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(video)
        print(f"{asdict(config) | {'mean': '...', 'std': '...'}}")
        print(f"video {tuple(video.shape)} -> features {tuple(vae.features(video).shape)} -> latent {tuple(z.shape)}")
        whole, streamed = vae.decode(z, chunk=None), vae.decode(z, chunk=1)
    print(f"-> video {tuple(whole.shape)}; streamed one latent frame at a time it differs by "
          f"{(whole - streamed).abs().max():.1e}")
