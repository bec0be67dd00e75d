"""Rectified flow with a shifted noise mean: how Wan-Alpha tells a video model where the object is, and how it samples.

    z_t = sigma eps + (1 - sigma) z,  v = eps - z,  model time = 1000 sigma     rectified flow: interpolate, flow_target
    eps ~ N(0, I) + mu (1 - G)                                                  mean shift: shift_noise

G is 1 at the middle of the object and falls to 0 around it: one Gaussian ellipse a latent frame, fitted to the clip's
alpha in training, and in sampling given by the user as nothing, an ellipse, a saved mask (`load_mask`) or an alpha clip
(`mask_from_alpha`). A distilled model then needs four Euler steps and no guidance.
Sources: Wan-Alpha (CVPR 2026; arXiv 2509.24979), where it trains the diffusion transformer; Wan2.1 (arXiv 2503.20314);
UniPC (arXiv 2302.04867), whose letters `unipc` keeps.

Letters: b batch, c channels, t frames, h w height and width, n points. A latent has 1 + (t-1)/4 frames; its cells are
8 x 8 pixels. dtype: ellipses are fitted in float64; masks, sigmas and the state of a sampler are float32 whatever the
model computes in.

Differences from the official code (commit 5804410):
- Masks are resized in time as in space; officially a mask is good for 81 frames only
  (test_masks_from_outside_fit_any_clip).
- Euler by default; officially UniPC, on a grid of its own, which `unipc` keeps (test_official_numbers).
- The object touches a cell if it fills more than 0.2 of it, as officially, but 0.25 where it is so thin that it fills
  fewer than five (test_official_masks); where no cell reaches that, 0.2
  (test_ellipse_turns_with_the_object_even_of_few_cells_or_a_thin_one).
- mu is 0.05, as its documents say; its command line says 0.03.
The paper writes N(G mu, I) with G the transparent part; the code, as here, mu (1 - G) with G the object
(test_mean_shift_is_outside).
"""
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from kit.files import Checkpoint, show_help

Model = Callable[[Tensor, Tensor], Tensor]  # model(z (b,c,t,h,w), time (b,) in [0,1000]) -> v like z
Ellipse = tuple[float, float, float, float, float]  # in cells: centre x, y, half axes a, b; angle of a in radians
CENTERED = ((0.0, 0.5, 0.5, 0.43, 0.43, 0.0),)  # time, x, y, a, b, angle; as large as the official example mask's mean

# ---- rectified flow


def shifted_sigmas(steps: int, shift: float = 5.0, start: float = 1.0) -> Tensor:
    """Noise levels down to 0, (steps+1,): k evenly spaced from start, shifted. More shift, more steps at high noise."""
    k = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    return (shift * k / (1 + (shift - 1) * k)).float()


def training_sigmas(shift: float = 5.0) -> Tensor:
    """The 1000 noise levels that training draws from, (1000,), falling from 1."""
    return shifted_sigmas(1000, shift)[:-1]


def training_weights(sigmas: Tensor) -> Tensor:
    """w(t) = exp(-2 ((t-500)/1000)^2), t = 1000 sigma, less its minimum, scaled to mean 1: all levels (n,) -> (n,)."""
    w = torch.exp(-2 * (sigmas - 0.5) ** 2)
    return (w - w.min()) / (w - w.min()).mean()


def sample_sigma(generators: Sequence[torch.Generator], shift: float = 5.0) -> tuple[Tensor, Tensor]:
    """One of the training levels a sample, each as likely as another, and its weight: (b,), (b,)."""
    sigmas = training_sigmas(shift)
    i = torch.stack([torch.randint(len(sigmas), (), generator=generator) for generator in generators])
    return sigmas[i], training_weights(sigmas)[i]


def sample_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Gaussian noise (b, *shape), float32: a generator a sample, so that a sample's noise is its own in any batch."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def interpolate(z: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_t = sigma noise + (1 - sigma) z, for z and noise (b,c,t,h,w), sigma (b,)."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return sigma * noise + (1 - sigma) * z


def flow_target(z: Tensor, noise: Tensor) -> Tensor:
    """v = noise - z = d z_t / d sigma: what the model learns to predict."""
    return noise - z


def shift_noise(noise: Tensor, mask: Tensor, mean: float = 0.05) -> Tensor:
    """The mean shift: noise + mu (1 - G), so the mean is mu outside the object and 0 at its middle.

    noise (c,t,h,w) or (b,c,t,h,w); mask: G in [0,1], (t,h,w) or (b,t,h,w), resized to the noise's grid; mean: mu, 0.05
    for Wan-Alpha v2 and 0 for v1, which was trained without. Source: official code (test_official_numbers).
    """
    return noise + mean * (1 - resize_mask(mask.to(noise), *noise.shape[-3:]).unsqueeze(-4))


def mean_for_grid(frames: int, height: int, width: int, mean: float = 0.05) -> float:
    """mu that is found as easily on the latent grid of such a clip as `mean` on the paper's, 21 x 60 x 104 cells.

    A shift of mu in n cells of unit noise stands out by mu sqrt(n): mu sqrt(n) = 0.05 sqrt(131 040), 1.0 for 320 cells.
    Ours; `python -m kit.pictures mean` draws why (test_mu_counts_as_much_on_any_grid).
    """
    cells = (frames + 3) // 4 * (height // 8) * (width // 8)
    return mean * math.sqrt(21 * 60 * 104 / cells)


# ---- samplers


def guide(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond)."""
    return v_uncond + scale * (v_cond - v_uncond)


def euler(model: Model, noise: Tensor, sigmas: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Follow dz = v d sigma from noise (b,c,t,h,w) along sigmas (steps+1,); yields (step, z) after each, from 0 on."""
    z = noise.float()
    for i in range(len(sigmas) - 1):
        v = model(z, (1000 * sigmas[i]).expand(len(z)).to(z))
        z = z + (sigmas[i + 1] - sigmas[i]) * v.float()
        yield i, z


def unipc(model: Model, noise: Tensor, steps: int | Tensor, shift: float = 5.0) -> Iterator[tuple[int, Tensor]]:
    """UniPC of order 2 with B(h) = exp(-h) - 1 ("bh2"), on predicted data; last step of order 1. Yields like `euler`.

    Each call of the model first corrects the state that it was called on, then predicts the next (paper, section 3).
    Starts at 0.999 and cuts model times to integers, as FlowUniPCMultistepScheduler of Wan2.1 does, the source.
    steps: their number, or the noise levels themselves (steps+1,), all below 1.
    """
    sigmas = (steps if isinstance(steps, Tensor) else shifted_sigmas(steps, shift, start=0.999)).double()
    steps = len(sigmas) - 1
    times = (1000 * sigmas).floor()
    z = corrected = noise.float()
    data = []  # clean latents, predicted at each level so far
    for i in range(steps):
        data.append(z - sigmas[i] * model(z, times[i].expand(len(z)).to(z)).float())
        if i > 0:
            corrected = unipc_update(corrected, data, sigmas, i - 1, order=min(i, 2))
        z = unipc_update(corrected, data, sigmas, i, order=min(i + 1, 2, steps - i))
        yield i, z


def unipc_update(z: Tensor, data: list[Tensor], sigmas: Tensor, i: int, order: int) -> Tensor:
    """From level i to i+1: the predictor if data is known up to level i, the corrector if up to i+1.

    z' = sigma'/sigma z - alpha' B(h) (m + sum_k rho_k D_k), with alpha = 1 - sigma, lambda = log(alpha/sigma),
    h = lambda' - lambda, m = data[i], D_1 = (data[i-1] - m)/r, r = (lambda[i-1] - lambda[i])/h, D_2 = data[i+1] - m.
    A lone D has rho = 1/2.
    """
    log_snr = torch.log(1 - sigmas) - torch.log(sigmas)
    h, m, D = log_snr[i + 1] - log_snr[i], data[i], []
    if order == 2:
        r = (log_snr[i - 1] - log_snr[i]) / h
        D.append((data[i - 1] - m) / r)
    if len(data) > i + 1:
        D.append(data[i + 1] - m)
    rho = unipc_weights(h, r) if len(D) == 2 else [0.5]
    slope = m + sum(p * d for p, d in zip(rho, D))
    return sigmas[i + 1] / sigmas[i] * z - (1 - sigmas[i + 1]) * torch.expm1(-h) * slope


def unipc_weights(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """rho of the order-2 corrector: rho_1 + rho_2 = b_1, r rho_1 + rho_2 = b_2; b_k = k! x phi_{k+1}(x)/B, x = -h."""
    x, B = -h, torch.expm1(-h)
    phi_2 = (B / x - 1) / x
    phi_3 = (phi_2 - 1 / 2) / x
    b_1, b_2 = x * phi_2 / B, 2 * x * phi_3 / B
    rho_1 = (b_1 - b_2) / (1 - r)
    return rho_1, b_1 - rho_1


# ---- the ellipse of an alpha clip


def gaussian_mask(alpha: Tensor) -> Tensor:
    """G of an alpha clip (t,h,w) in [0,1], t = 4k+1: (1+k,h/8,w/8) in [0,1]. A frame without an object is 0.

    Raises ValueError for other lengths and for sizes that 8 does not divide. Source: official code, whose ellipses the
    functions below repeat (test_official_masks).
    """
    check_size(*alpha.shape)
    cells = reduce((alpha > 0.5).float(), "t (h p) (w q) -> t h w", "mean", p=8, q=8)
    cells = torch.cat([cells[:1], reduce(cells[1:], "(t f) h w -> t h w", "mean", f=4)])
    return torch.stack([gaussian(fit_ellipse(c.double().cpu()), *c.shape).to(c) for c in cells])


def gaussian(ellipse: Ellipse | None, h: int, w: int) -> Tensor:
    """exp(-((x'/a)^2 + (y'/b)^2)/2) on (h,w) cells, x' and y' along the half axes, stretched to [0,1]. None: zeros."""
    if ellipse is None:
        return torch.zeros(h, w)
    x, y, a, b, angle = ellipse
    dy, dx = torch.meshgrid(torch.arange(h) - y, torch.arange(w) - x, indexing="ij")
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = dy * math.cos(angle) - dx * math.sin(angle)
    g = torch.exp(-((along / a) ** 2 + (across / b) ** 2) / 2)
    return (g - g.min()) / (g.max() - g.min()).clamp(min=1e-12)


def fit_ellipse(cells: Tensor) -> Ellipse | None:
    """The ellipse around what fills the cells (h,w) of one latent frame, each between 0 and 1; None around nothing.

    Centre and extent come from the cells that the object touches; the angle from those that it fills, if at least five.
    """
    core = points(cells > 0.9)
    thin = len(core) < 5 and cells.max() > 0.25  # 0.25 is read off one official mask of a thin, moving object
    body = points(cells > (0.25 if thin else 0.2))
    if len(body) == 0:
        return None
    if len(body) < 5:
        low, high = body.amin(0), body.amax(0)
        return *((low + high) / 2).tolist(), *((high - low) / 2).clamp(min=1).tolist(), 0.0
    center, axes = body.mean(0), principal_axes(body)
    extent = (body @ axes).aminmax(dim=0)
    half = ((extent.max - extent.min) / 2).clamp(min=1)
    x, y = (principal_axes(core) if len(core) >= 5 else axes)[:, 0].tolist()
    angle = math.atan2(y, x)
    return *center.tolist(), *grow(half, center, angle, body, cells.shape).tolist(), angle


def points(mask: Tensor) -> Tensor:
    """The set cells of (h,w) as (n,2): x, y."""
    return mask.nonzero().flip(1).double()


def principal_axes(xy: Tensor) -> Tensor:
    """Unit vectors along which points (n,2) spread most and least, as the columns of (2,2)."""
    return torch.linalg.eigh(torch.cov(xy.T)).eigenvectors.flip(1)


def grow(half: Tensor, center: Tensor, angle: float, body: Tensor, size: Sequence[int]) -> Tensor:
    """Half axes (2,) times 1.12^k: the first k <= 8 that covers 98 % of the points (n,2), else the best one."""
    x, y = body.long().unbind(1)
    covered = []
    while len(covered) < 9 and max(covered, default=0) < 0.98:
        ellipse = filled_ellipse(center, half * 1.12 ** len(covered), angle, *size)
        covered.append(ellipse[y, x].double().mean().item())
    return half * 1.12 ** covered.index(max(covered))


def filled_ellipse(center: Tensor, half: Tensor, angle: float, h: int, w: int) -> Tensor:
    """The cells (h,w) that OpenCV's `ellipse` fills, but for a few on the rim; centre and half axes (2,) are rounded.

    It draws a polygon, on this grid so coarse that it decides where growth ends. Edges advance by one cell along their
    longer side, from the lower coordinate on; rows are filled from one end of the outline to the other.
    """
    center, half, angle = center.round(), half.round(), math.radians(round(math.degrees(angle)))
    size = half.max()
    theta = torch.arange(0, 361, 90 if size < 3 else 30 if size < 10 else 18 if size < 15 else 5).double().deg2rad()
    x, y = theta.cos() * half[0], theta.sin() * half[1]
    x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    corners = torch.stack([x, y], 1) + center
    edges = corners.diff(dim=0)
    length, side = edges.abs().max(1, keepdim=True)
    backward = edges.gather(1, side) < 0
    start = torch.where(backward, corners[1:], corners[:-1])
    steps = torch.minimum(torch.arange(length.max() + 1), length.floor())[..., None]
    outline = start[:, None] + steps * (torch.where(backward, -edges, edges) / length)[:, None]
    outline = torch.cat([outline.flatten(0, 1), corners])
    x, y = (outline + 0.5 + 1e-6).floor().long().unbind(1)  # halves go up
    canvas = torch.zeros(h + 2, w + 2)  # with a margin for what lies outside
    canvas[(y + 1).clamp(0, h + 1), (x + 1).clamp(0, w + 1)] = 1
    return ((canvas.cumsum(1) > 0) & (canvas.flip(1).cumsum(1).flip(1) > 0))[1:-1, 1:-1]


# ---- the ellipse of a user


def ellipse_mask(frames: int, height: int, width: int, keys: Sequence[Sequence[float]] = CENTERED) -> Tensor:
    """G of an ellipse, still (one key) or moving (several), for 4k+1 frames: (1+k,height/8,width/8) in [0,1].

    keys: (time, x, y, a, b, angle), linear in between. time: 0 first, 1 last frame. x, y: centre, in widths and heights
    from the upper left corner. a, b: half axes in shorter sides, so a = b is a circle. angle: of a, degrees, clockwise.
    """
    check_size(frames, height, width)
    k = np.array(keys, float)
    if k.ndim != 2 or k.shape[1] != 6 or not np.isfinite(k).all() or k[:, 3:5].min() <= 0:
        raise ValueError(f"ellipse {keys}: a key is time, x, y, a, b, angle, all finite, the half axes a, b above 0")
    if k[:, 0].min() < 0 or k[:, 0].max() > 1 or (np.diff(k[:, 0]) <= 0).any():
        raise ValueError(f"ellipse times {k[:, 0].tolist()}: they must rise between 0 (first frame) and 1 (last)")
    h, w = height // 8, width // 8
    masks = []
    for time in np.linspace(0, 1, (frames + 3) // 4):
        x, y, a, b, angle = (np.interp(time, k[:, 0], column) for column in k[:, 1:].T)
        masks.append(gaussian((x * w - 0.5, y * h - 0.5, a * min(h, w), b * min(h, w), math.radians(angle)), h, w))
    return torch.stack(masks)


def parse_ellipse(text: str) -> list[tuple[float, ...]]:
    """Keys for `ellipse_mask` from "x,y,a,b[,angle]" or, moving, from "0:x,y,a,b[,angle]; 1:x,y,a,b[,angle]; ..."."""
    def key(part):
        time, colon, values = part.rpartition(":")
        x, y, a, b, *rest = map(float, values.split(","))
        (angle,) = rest or [0.0]
        return float(time) if colon else 0.0, x, y, a, b, angle
    try:
        return [key(part) for part in text.strip(" ;").split(";")]
    except ValueError:
        raise ValueError(f"mask {text!r} is neither a file nor an ellipse: write x,y,a,b[,angle], "
                         "or several times time:x,y,a,b[,angle] with semicolons between; it is one ellipse at a time, "
                         "for two objects give a clip of their alpha") from None


# ---- masks from outside


def load_mask(spec: str | None, frames: int, height: int, width: int) -> Tensor:
    """G (1+k,height/8,width/8) for 4k+1 frames from None (a centred circle), the text of an ellipse or a saved tensor
    (torch.save's, or the first of a .safetensors file).

    A clip must be read first and given to `mask_from_alpha`. Raises ValueError for what is none of these.
    """
    if spec is None:
        return ellipse_mask(frames, height, width)
    if not os.path.isfile(spec):     # Path would raise on a long text
        keys = parse_ellipse(spec)
        if not all(0 <= place <= 1 for key in keys for place in key[1:3]):
            raise ValueError(f"mask {spec!r}: the centre x, y lies outside the frame, which goes from 0 to 1")
        return ellipse_mask(frames, height, width, keys)
    tensors = Checkpoint(spec).read()
    return mask_from_tensor(next(iter(tensors.values()), None), frames, height, width)


def mask_from_tensor(mask: Tensor, frames: int, height: int, width: int) -> Tensor:
    """G (1+k,height/8,width/8) from a saved one, (t,h,w) of any size, 0 outside the object to 1 in it."""
    check_size(frames, height, width)
    if not isinstance(mask, Tensor) or mask.dim() != 3 or mask.numel() == 0:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a saved mask must be a tensor of frames, height and width, not {found}")
    low, high = mask.float().aminmax()
    if not 0 <= low <= high <= 1 or high == 0:  # also false for NaN
        raise ValueError(f"a saved mask must lie in [0,1] and not be empty: this one goes from {low:.3g} to {high:.3g}")
    return resize_mask(mask.float(), (frames + 3) // 4, height // 8, width // 8)


def mask_from_alpha(alpha: Tensor | np.ndarray, frames: int, height: int, width: int) -> Tensor:
    """G (1+k,height/8,width/8) fitted to an alpha or matte clip, (t,h,w) in [0,1] or uint8, of any length and size."""
    alpha = torch.as_tensor(alpha)
    alpha = alpha.float() / 255 if alpha.dtype == torch.uint8 else alpha.float()
    mask = gaussian_mask(resize_mask(alpha, frames, height, width))
    if not mask.any():
        raise ValueError("the mask clip is empty: nowhere is its alpha above one half")
    return mask


def resize_mask(mask: Tensor, t: int, h: int, w: int) -> Tensor:
    """The last three axes of a mask to (t,h,w), linear in space and time, corners not aligned."""
    out = F.interpolate(mask.reshape(1, -1, *mask.shape[-3:]), (t, h, w), mode="trilinear", align_corners=False)
    return out.view(*mask.shape[:-3], t, h, w)


def check_size(frames: int, height: int, width: int) -> None:
    if min(frames, height, width) < 1 or (frames - 1) % 4 or height % 8 or width % 8:
        raise ValueError(f"{frames} frames of {width} x {height}: give 4k+1 frames, width and height in multiples of 8")


if __name__ == "__main__":
    show_help("sampler.py: draws a moving alpha, its ellipses and the shifted noise into out/ellipse.png")
    import imageio.v3 as iio

    alpha = torch.stack([gaussian((60 + 5 * i, 60, 35, 12, i / 8), 120, 208) for i in range(17)])
    G = gaussian_mask(alpha)
    mean = mean_for_grid(17, 120, 208)
    noise = shift_noise(sample_noise((1, *G.shape), [torch.Generator().manual_seed(0)]), G, mean)[0, 0]
    cells = [x.repeat_interleave(8, 1).repeat_interleave(8, 2) for x in (G, 1 - G, (noise / 6 + 0.5).clamp(0, 1))]
    Path("out").mkdir(exist_ok=True)
    sheet = torch.cat([torch.cat(list(row), 1) for row in (alpha[::4] > 0.5, *cells)])
    iio.imwrite("out/ellipse.png", (255 * sheet).round().byte().numpy())
    print(f"out/ellipse.png: a moving alpha; its masks G, {tuple(G.shape)}; the mean of the noise outside, up to mu; a "
          f"channel of the noise\nmu is 0.05 on 21 x 60 x 104 cells and counts as much as {mean:.2f} on these")
