"""Numbers of a clip: how near it is to another one, and whether it shows what its prompt names.

    compare_clips   PSNR and SSIM of a result against its target, as composites, as alpha and as colour
    score_clip      colour, motion, shape, material of a clip against the attributes of its prompt, each passed or not

A clip is uint8: rgb (t, h, w, 3) straight, alpha (t, h, w). A mask is bool (t, h, w). Sums in float32 for PSNR (its
squares reach 65025), in float64 for SSIM. The scores of prompts are no part of the paper: procedural clips of kit/clips
pass all of them (test_every_score_passes_on_the_truth_and_through_a_blur), wrong labels by chance alone.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from kit.clips import COLORS, MATERIALS, SHAPES, distance_table
from kit.media import over
from losses import PALETTE

PEAK = 255
WINDOW = 11                     # of SSIM, pixels
EDGE = WINDOW // 2              # SSIM's map is smaller than the clip by this much on each side

# ---- how near is a clip to another one?


def masked_mean(x, mask=None) -> float:
    """Over the pixels where mask (t, h, w) is true, all channels; nan without any."""
    values = x if mask is None else x[mask]
    return float(values.mean()) if values.size else math.nan


def psnr(x, y, mask=None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays where mask is true, at most 78; nan where it nowhere is."""
    error = masked_mean((x.astype(np.float32) - y.astype(np.float32)) ** 2, mask)
    if math.isnan(error):
        return math.nan
    return float(10 * np.log10(PEAK ** 2 / max(error, 1e-3)))


def blur(x):
    """float64 (n, 1, h, w) -> (n, 1, h - 10, w - 10): mean under a Gaussian window with a deviation of 1.5 pixels."""
    window = torch.exp(-torch.arange(-EDGE, EDGE + 1.0).double() ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def ssim_map(x, y):
    """Structural similarity of uint8 (t, h, w) or (t, h, w, c), at least 11 x 11 pixels, at every place that its window
    fits into: (t, h - 10, w - 10, c). As published (Wang et al. 2004): K 0.01 and 0.03, each channel by itself."""
    if x.ndim == 3:
        x, y = x[..., None], y[..., None]
    channels = x.shape[-1]
    x, y = (rearrange(torch.from_numpy(v).double(), "t h w c -> (t c) 1 h w") for v in (x, y))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    var_x, var_y = mean_xx - mean_x * mean_x, mean_yy - mean_y * mean_y
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return rearrange(luminance * structure, "(t c) 1 h w -> t h w c", c=channels).numpy()


def inner(mask):
    """A mask on the places of `ssim_map`."""
    return None if mask is None else mask[:, EDGE:-EDGE, EDGE:-EDGE]


def ssim(x, y, mask=None) -> float:
    """The mean of `ssim_map` over the places whose middle is in the mask; nan without any."""
    return masked_mean(ssim_map(x, y), inner(mask))


def object_region(alpha):
    """The pixels with alpha > 0 and those up to two pixels from one, (t, h, w)."""
    return dilate(alpha > 0, 2)


def psnr_and_ssim(pairs: list, masks: list) -> list[dict]:
    """For each mask the means over pairs of pictures (x, y)."""
    maps = [ssim_map(x, y) for x, y in pairs]
    return [dict(psnr=float(np.mean([psnr(x, y, mask) for x, y in pairs])),
                 ssim=float(np.mean([masked_mean(similar, inner(mask)) for similar in maps]))) for mask in masks]


def compare_clips(rgb, alpha, rgb_hat, alpha_hat) -> dict:
    """PSNR in dB and SSIM of a result against its target: soft renders, their mean over the 8 palette colours, and
    alpha, over the whole frame and in the object's region (alpha > 0, two pixels wider); colour where alpha > 0."""
    region = object_region(alpha)
    palette = [(color + 1) / 2 * PEAK for color in PALETTE.numpy()]
    renders = [(over(rgb, alpha, color), over(rgb_hat, alpha_hat, color)) for color in palette]
    render, render_region = psnr_and_ssim(renders, [None, region])
    matte, matte_region = psnr_and_ssim([(alpha, alpha_hat)], [None, region])
    colour, = psnr_and_ssim([(rgb, rgb_hat)], [alpha > 0])
    return {"soft render": render, "soft render, region": render_region,
            "alpha": matte, "alpha, region": matte_region, "colour, alpha > 0": colour}


# ---- where is the object? Distances are in 64ths of the frame's height


def dilate(mask, n: int):
    """Bool (t, h, w), wider by n pixels in every frame, diagonals too."""
    return F.max_pool2d(torch.from_numpy(mask)[:, None].float(), 2 * n + 1, 1, n)[:, 0].bool().numpy()


def grow(mask, distance):
    return dilate(mask, max(1, round(distance * mask.shape[1] / 64)))


def body(alpha):
    """Where the object surely is, bool (t, h, w): alpha > 0.1, less a margin of 3."""
    return ~grow(alpha <= 25, 3)


def body_alpha(alpha) -> float:
    """Median alpha of the body over all frames, in [0, 1]; 0 without a body."""
    inside = alpha[body(alpha)]
    return float(np.median(inside)) / 255 if len(inside) else 0.0


def silhouette(alpha):
    """Where alpha is above half the body's, or above the body's less 0.35 if that is more: bool (t, h, w), no halo."""
    level = body_alpha(alpha)
    return alpha > 255 * max(level / 2, level - 0.35, 0.1)


def halo_alpha(alpha) -> float:
    """Mean alpha at a distance of 3 from the silhouette, in [0, 1]."""
    inside = silhouette(alpha)
    third = grow(inside, 3) & ~grow(inside, 2)
    return float(alpha[third].sum() / max(1, third.sum())) / 255


def corner_alpha(alpha) -> float:
    """Mean alpha of the four corners, squares of an eighth of the height, over all frames, in [0, 1]."""
    side = alpha.shape[1] // 8
    edges = np.r_[:side, -side:0]
    return float(alpha[:, edges][:, :, edges].mean()) / 255


def has_holes(alpha) -> bool:
    """Some frame encloses a place with alpha < 0.8: no path of such pixels leads from it to the frame's border."""
    free = F.pad(torch.from_numpy(alpha < 204).float(), (1, 1, 1, 1), value=1)[:, None]
    reached = torch.ones_like(free)
    reached[..., 1:-1, 1:-1] = 0                            # from the padded border on
    while not reached.equal(more := F.max_pool2d(reached, 3, 1, 1) * free):
        reached = more
    return bool((free > reached).any())


# ---- what does it show?


def named_color(rgb, alpha) -> str:
    """The nearest of the ten colours, in RGB, to the silhouette's median colour over all frames."""
    inside = rgb[silhouette(alpha)]
    if not len(inside):
        return "none"
    away = np.array(list(COLORS.values())) - np.median(inside, 0) / 255
    return list(COLORS)[(away ** 2).sum(1).argmin()]


def moments(mask):
    """Area (t,), centre and standard deviation (t, 2) as x, y of bool (t, h, w), in frame heights from the middle."""
    h, w = mask.shape[1:]
    x = (torch.arange(w) + 0.5 - w / 2) / h
    y = (torch.arange(h)[:, None] + 0.5 - h / 2) / h
    area = mask.sum((1, 2))

    def mean(values):
        return (mask * values).sum((1, 2)) / area
    centre = torch.stack([mean(x), mean(y)], 1)
    square = torch.stack([mean(x ** 2), mean(y ** 2)], 1)
    return area, centre, (square - centre ** 2).clamp(min=1e-8).sqrt()


def named_motion(alpha) -> str:
    """The first rule that holds of the silhouette's area, proportion (width / height) and centre, in frame heights."""
    area, centre, deviation = moments(torch.from_numpy(silhouette(alpha)))
    proportion = deviation[:, 0] / deviation[:, 1]
    reach = centre.amax(0) - centre.amin(0)                 # how far it comes about, in x and in y
    net = centre[-1] - centre[0]
    across = bool(reach[0] > reach[1])
    main = int(reach.argmax())
    comes_back = bool(net[main].abs() < 0.5 * reach[main])
    rules = (("none", area.min() == 0),
             ("growing", area[-1] > 2 * area[0]),
             ("spinning", proportion.min() < 0.5 * proportion.max()),
             ("none", reach.max() < 0.1),
             ("orbiting", reach.min() > 0.5 * reach.max()),
             ("bouncing", comes_back and not across),
             ("none", comes_back),
             ("moving from left to right", across and net[0] > 0),
             ("moving from right to left", across),
             ("falling", net[1] > 0),
             ("rising", True))
    return next(name for name, holds in rules if holds)


def aligned(mask, n=48):
    """Bool (t, h, w) moved and stretched to one centre and one standard deviation in x and in y: bool (t, n, n)."""
    _, centre, deviation = moments(mask)
    unit = 2 / torch.tensor([mask.shape[2] / mask.shape[1], 1])            # affine_grid counts from -1 to 1
    theta = torch.cat([torch.diag_embed(2.6 * deviation * unit), (centre * unit)[..., None]], -1)
    grid = F.affine_grid(theta, (len(mask), 1, n, n), align_corners=False)
    return F.grid_sample(mask[:, None].float(), grid, align_corners=False)[:, 0] > 0.5


def named_shape(alpha) -> str:
    """The shape whose outline overlaps the silhouette best, both stretched to one centre, width and height: the largest
    intersection over union, mean over the frames of at least median area; none if that is below 0.75."""
    mask = torch.from_numpy(silhouette(alpha))
    area = mask.sum((1, 2))
    if area.max() == 0:
        return "none"
    mask = aligned(mask[area >= area.median().clamp(min=1)])[:, None]
    outlines = aligned(torch.stack([torch.from_numpy(distance_table(shape)[..., 0] < 0) for shape in SHAPES]))
    overlap = ((mask & outlines).sum((2, 3)) / (mask | outlines).sum((2, 3))).mean(0)
    return SHAPES[overlap.argmax()] if overlap.max() >= 0.75 else "none"


def shows_material(alpha, material: str) -> bool:
    """solid: body_alpha > 0.95. glow: body_alpha > 0.7 and halo_alpha > 0.05. Others: 0.15 < body_alpha < 0.85."""
    level = body_alpha(alpha)
    if material == "solid":
        return level > 0.95
    if material == "glow":
        return level > 0.7 and halo_alpha(alpha) > 0.05
    return 0.15 < level < 0.85


def score_clip(rgb, alpha, attributes: dict) -> dict:
    """Name of a score -> whether the clip passes, None where it does not apply; besides "material" one per material.

    corners: corner_alpha < 0.01. no_holes: of solid bodies, except the ring.
    """
    material, shape = attributes["material"], attributes["shape"]
    shown = shows_material(alpha, material)
    by_material = {name: shown if name == material else None for name in MATERIALS}
    whole = material == "solid" and shape != "ring"
    return dict(color=named_color(rgb, alpha) == attributes["color"],
                motion=named_motion(alpha) == attributes["motion"],
                shape=named_shape(alpha) == shape,
                corners=corner_alpha(alpha) < 0.01,
                material=shown, **by_material,
                no_holes=not has_holes(alpha) if whole else None)


# ---- many clips


def mean_scores(rows: list[dict], mean=np.nanmean) -> dict:
    """Of several `compare_clips`."""
    return {name: {kind: float(mean([row[name][kind] for row in rows])) for kind in ("psnr", "ssim")}
            for name in rows[0]}


def print_scores(title: str, rows: list[dict]) -> None:
    low = mean_scores(rows, np.nanmin)
    print(f"\n{title}: {len(rows)} clips".ljust(27) + "PSNR, dB: mean  lowest   SSIM: mean  lowest")
    for name, mean in mean_scores(rows).items():
        print(f"  {name:<24}{mean['psnr']:13.2f}{low[name]['psnr']:8.2f}{mean['ssim']:13.4f}{low[name]['ssim']:8.4f}")


def passed_of(rows: list[dict], name: str) -> list[bool]:
    """A score of the clips that it applies to."""
    return [row[name] for row in rows if row[name] is not None]


def shares_of(rows: list[dict]) -> dict:
    """The share of the clips that pass, of those a score applies to; None without any."""
    found = {name: passed_of(rows, name) for name in rows[0]}
    return {name: sum(passed) / len(passed) if passed else None for name, passed in found.items()}


def score_table(rows: list[dict]) -> str:
    """A line for each score: the percentage that passes, and counts, of the clips it applies to; materials indented."""
    lines = []
    for name, share in shares_of(rows).items():
        passed = passed_of(rows, name)
        title = f"  {name}" if name in MATERIALS else name
        percent = "-" if share is None else f"{100 * share:.1f}"
        lines.append(f"{title:<12}{percent:>6} %  {sum(passed):4d} of {len(passed):4d}")
    return "\n".join(lines)


def score_by(rows: list[dict], prompts: list, name: str, attribute: str) -> str:
    """One line: how many clips pass a score, for every value of an attribute of their prompts."""
    found = {}
    for row, (_, attributes) in zip(rows, prompts):
        found.setdefault(attributes[attribute], []).append(row[name])
    counts = [f"{value} {sum(passed)} of {len(passed)}" for value, passed in found.items()]
    return f"{name} by {attribute}: {', '.join(counts)}"
