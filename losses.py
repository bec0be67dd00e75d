"""Losses of the RGBA autoencoder: render, compare, and keep the latent familiar to the diffusion transformer.

    L_vae = L_alpha + L_soft + L_hard + 0.1 L_TABD     the first three are L_rec(x, y) = mean|x - y| + perceptual + edge

Colour under transparent pixels means nothing, so an RGBA clip is not compared channel by channel. It is rendered on a
random corner of the RGB cube, softly (V a + c (1 - a): what a viewer sees) and hard (V [a > 0] + c [a = 0]: full colour
wherever there is any object), output and target on the same colour. L_TABD lets a frozen diffusion transformer with an
empty prompt judge the latent: opaque cells should look to it like the latents it knows, transparent ones should not.
Source: Wan-Alpha (CVPR 2026; arXiv 2509.24979), where it trains the RGBA VAE.

Letters: b batch, c channels, t frames, h w height and width, n palette colours. Colour is in [-1,1], alpha in [0,1].
dtype: float32 in and out; a caller that trains in lower precision casts what it passes.

Differences from the official code (commit 5804410):
- TABD is clamped to [-1,1], as its formula needs; officially to [0,1], which leaves transparent cells without gradient
  (`tabd_loss(..., clamp=(0, 1))`, test_tabd_pulls_opaque_cells_and_pushes_transparent_ones_within_bounds).
- Edges by Sobel, as the paper says; officially by central differences
  (`edge_loss(..., operator="central")`, test_official_alpha_edges_and_model_times).
- The hard render cuts the output, too, by the target's alpha; by the formula each is cut by its own (see `rgba_loss`,
  test_rgba_loss_sees_alpha_and_visible_colour_alone).
- TABD is meant for normalised latents, which the transformer knows; officially they come as the encoder left them.
"""
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from kit.files import Checkpoint, show_help

PALETTE = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # (n=8, 3): the corners of the RGB cube
GREY = torch.tensor([0.257, 0.504, 0.098])
DIFFERENCE = torch.tensor([-1.0, 0.0, 1.0])
SMOOTHING = {"sobel": torch.tensor([1.0, 2.0, 1.0]), "central": torch.tensor([0.0, 1.0, 0.0])}


def soft_render(rgb: Tensor, alpha: Tensor, color: Tensor) -> Tensor:
    """R_s = V a + c (1 - a). rgb (b,3,t,h,w) in [-1,1], alpha (b,1,t,h,w) in [0,1], color (3,) or (b,3) in [-1,1]."""
    c = rearrange(color.to(rgb), "... c -> ... c 1 1 1")
    return rgb * alpha + c * (1 - alpha)


def hard_render(rgb: Tensor, alpha: Tensor, color: Tensor) -> Tensor:
    """R_h = V [a > 0] + c (1 - [a > 0]), shapes as in `soft_render`: no gradient reaches alpha."""
    return soft_render(rgb, (alpha > 0).to(rgb), color)


def random_colors(generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Two different palette colours a sample, (n,3) each: one for the soft render, another for the hard one."""
    pairs = torch.stack([torch.randperm(8, generator=generator)[:2] for generator in generators])
    return PALETTE[pairs[:, 0]], PALETTE[pairs[:, 1]]


class VGG(nn.Module):
    """Perceptual distance: mean squared difference of VGG-16 features at relu2_2. Videos are compared frame by frame.

    path: the ImageNet weights as torchvision publishes them, vgg16-397923af.pth.
    Raises FileNotFoundError if there is no such file, ValueError if it holds something else.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.features = nn.Sequential(  # names and order of VGG-16: features.0 ... features.8
            conv(3, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), nn.MaxPool2d(2),
            conv(64, 128), nn.ReLU(), conv(128, 128), nn.ReLU())
        self.load_state_dict(read_vgg(path, self.state_dict()))
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (b,3,t,h,w) in [-1,1] -> scalar. The features see [0,1], not ImageNet's normalisation, as officially."""
        fx, fy = (self.features(rearrange((v + 1) / 2, "b c t h w -> (b t) c h w")) for v in (x, y))
        return F.mse_loss(fx, fy)


def read_vgg(path: str | Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the VGG-16 file that `like` names."""
    try:
        state = Checkpoint(path).read(like)
        return {name: state[name].reshape(tensor.shape) for name, tensor in like.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: download vgg16-397923af.pth from download.pytorch.org/models "
                                "or train without the perceptual term by --perceptual 0") from None
    except (ValueError, KeyError, RuntimeError):
        raise ValueError(f"{path} does not hold the weights of VGG-16: use vgg16-397923af.pth or train without the "
                         "perceptual term by --perceptual 0") from None


def gradient_magnitude(x: Tensor, operator: str = "sobel") -> Tensor:
    """(b,3,t,h,w) -> (b t,1,h,w): sqrt(gx^2 + gy^2 + 1e-6) of the grey image, zeros around the frame."""
    grey = rearrange(torch.einsum("b c t h w, c -> b t h w", x, GREY.to(x)), "b t h w -> (b t) 1 h w")
    gx = torch.outer(SMOOTHING[operator], DIFFERENCE).to(x)
    gx, gy = F.conv2d(grey, torch.stack([gx, gx.T])[:, None], padding=1).unbind(1)
    return (gx**2 + gy**2 + 1e-6).sqrt()[:, None]


def edge_loss(x: Tensor, y: Tensor, operator: str = "sobel") -> Tensor:
    """Mean |edges of x - edges of y|, videos (b,3,t,h,w) in [-1,1]. operator: "sobel" (paper) or "central" (code)."""
    return F.l1_loss(gradient_magnitude(x, operator), gradient_magnitude(y, operator))


def reconstruction_loss(x: Tensor, y: Tensor, vgg: nn.Module | None = None, perceptual: float = 1.0, edge: float = 1.0,
                        operator: str = "sobel") -> Tensor:
    """L_rec = L1 + perceptual + edge for videos (b,3,t,h,w) in [-1,1].

    vgg: a module that gives a distance of two videos; None leaves the term out. perceptual, edge: weights.
    """
    loss = F.l1_loss(x, y) + edge * edge_loss(x, y, operator)
    return loss if vgg is None else loss + perceptual * vgg(x, y)


def as_grey(alpha: Tensor) -> Tensor:
    """alpha (b,1,t,h,w) in [0,1] as a grey video 2a - 1, (b,3,t,h,w) in [-1,1]."""
    return (2 * alpha - 1).expand(-1, 3, -1, -1, -1)


def rgba_loss(rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor, colors: tuple[Tensor, Tensor],
              own_alpha: bool = False, **options) -> dict[str, Tensor]:
    """L_alpha, L_soft and L_hard of an output (rgb_hat, alpha_hat) and its target; the loss is the sum of the values.

    Colour (b,3,t,h,w) in [-1,1]; alpha (b,1,t,h,w) in [0,1], compared as grey 2a - 1 so that all terms weigh alike.
    Output and target share each random colour. The hard render cuts both by the target's alpha: cut by its own, an
    output faintly opaque everywhere would be drawn to random colours (own_alpha: officially it is). colors: of the soft
    and the hard render, (b,3) each, as `random_colors` draws them. options: those of `reconstruction_loss`.
    """
    soft, hard = colors
    pairs = {
        "alpha": (as_grey(alpha_hat), as_grey(alpha)),
        "soft": (soft_render(rgb_hat, alpha_hat, soft), soft_render(rgb, alpha, soft)),
        "hard": (hard_render(rgb_hat, alpha_hat if own_alpha else alpha, hard), hard_render(rgb, alpha, hard)),
    }
    return {name: reconstruction_loss(x, y, **options) for name, (x, y) in pairs.items()}


def raw_loss(rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor, **options) -> dict[str, Tensor]:
    """What a naive autoencoder minimises: L_rec of alpha and of the colour everywhere, also where alpha is 0."""
    return {"alpha": reconstruction_loss(as_grey(alpha_hat), as_grey(alpha), **options),
            "raw": reconstruction_loss(rgb_hat, rgb, **options)}


def tabd_mask(alpha: Tensor, strict: bool = False) -> Tensor:
    """M of L_TABD: alpha (b,1,t,h,w) in [0,1], t = 4k+1 -> (b,1,1+k,h/8,w/8), a cell: 8 x 8 pixels, 1 or 4 frames.

    +1 opaque (every pixel 1); -1 transparent (every pixel 0) or semi-transparent (every pixel between); 0 mixed.
    In the first frame all that is not opaque is -1. strict: the paper's mask of two values, where mixed cells are -1 in
    every frame. Source: official code (test_official_masks).
    """
    if (alpha.shape[2] - 1) % 4 or alpha.shape[3] % 8 or alpha.shape[4] % 8:
        t, h, w = alpha.shape[2:]
        raise ValueError(f"alpha has {t} frames of {w} x {h}: give 4k+1 frames, width and height in multiples of 8")

    def extreme(operation):
        cells = reduce(alpha, "b c t (h p) (w q) -> b c t h w", operation, p=8, q=8)
        rest = reduce(cells[:, :, 1:], "b c (t f) h w -> b c t h w", operation, f=4)
        return torch.cat([cells[:, :, :1], rest], 2)

    low, high = extreme("min"), extreme("max")
    opaque, transparent = low == 1, (high == 0) | ((low > 0) & (high < 1))
    transparent[:, :, :1] = ~opaque[:, :, :1]
    if strict:
        transparent = ~opaque
    return opaque.to(alpha.dtype) - (transparent & ~opaque).to(alpha.dtype)


def tabd_loss(v_hat: Tensor, v: Tensor, mask: Tensor, weight: Tensor, clamp: tuple[float, float] = (-1, 1)) -> Tensor:
    """L_TABD = mean clamp(M w(t) (v_hat - v)^2): the transparency-aware bidirectional diffusion loss.

    v_hat: what the frozen transformer predicts for the noised latent; v: noise - z; both (b,c,t,h,w), of latents
    normalised as the transformer learned them. mask: `tabd_mask`. weight (b,): w(t). clamp: (-1, 1) pulls opaque cells
    to v and pushes transparent ones away while w (v_hat - v)^2 < 1; officially (0, 1), which only pulls.
    """
    return (mask * rearrange(weight, "b -> b 1 1 1 1") * (v_hat - v) ** 2).clamp(*clamp).mean()


if __name__ == "__main__":
    show_help("losses.py: the losses of three outputs of one clip; draws renders and TABD's mask into out/losses.png")
    import imageio.v3 as iio

    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    alpha = (2.4 - 3 * (x**2 + y**2).sqrt()).clamp(0, 1).expand(1, 1, 17, 64, 64)  # a disc with a soft rim
    stripes = torch.stack([x, (40 * y).sin(), -x]).view(1, 3, 1, 64, 64)           # behind it; nothing should see them
    rgb = torch.where(alpha > 0, torch.stack([x, y, -x]).view(1, 3, 1, 64, 64), stripes)
    for name, hat in {"equal": (rgb, alpha), "paler": (rgb * 0.8, alpha), "fainter": (rgb, alpha * 0.8)}.items():
        parts = rgba_loss(*hat, rgb, alpha, random_colors([torch.Generator().manual_seed(0)]))
        print(name.ljust(8), *(f"{k} {v:.4f}" for k, v in parts.items()))
    cells = tabd_mask(alpha)[:, :, 1:2].repeat_interleave(8, 3).repeat_interleave(8, 4).expand(1, 3, 1, 64, 64)
    first = [rgb, as_grey(alpha), cells, *[torch.ones_like(rgb)] * 5]
    rows = [first] + [[render(rgb, alpha, c) for c in PALETTE] for render in (soft_render, hard_render)]
    sheet = torch.cat([torch.cat([video[0, :, 0] for video in row], 2) for row in rows], 1)
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/losses.png", (127.5 * (sheet + 1)).round().byte().movedim(0, 2).numpy())
    print("out/losses.png: colour as stored, alpha, TABD's mask (white opaque, black transparent or semi-transparent, "
          "grey mixed);\nunder them soft and hard renders on the eight palette colours")
