"""Numbers of a clip: how near it is to another one, and whether it shows what its prompt names.

A clip is uint8: rgb (t, h, w, 3) straight, alpha (t, h, w). A mask is bool (t, h, w). Sums in float32 for PSNR (its
squares reach 65025), in float64 for SSIM. The scores of prompts are no part of the paper: procedural clips of kit/clips
pass all of them, wrong labels by chance alone (test_scores_pass_on_the_truth).
"""
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from kit.drawing import COLORS, MATERIALS, SHAPES, distance_table
from kit.media import over
from losses import PALETTE


def masked_mean(x, mask=None) -> float:
    """Over the pixels where mask (t, h, w) is true, all channels, but those that are nan; nan without any."""
    values = x if mask is None else x[mask]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


def psnr(x, y, mask=None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays where mask is true, at most 78; nan where it nowhere is."""
    error = masked_mean((x.astype(np.float32) - y.astype(np.float32)) ** 2, mask)
    return float(10 * np.log10(255 ** 2 / np.maximum(error, 1e-3)))


def ssim_map(x, y):
    """Structural similarity of uint8 (t, h, w) or (t, h, w, c): (t, h, w, c), nan where no whole window fits in. As
    published (Wang et al. 2004): a Gaussian window of 11 pixels, deviation 1.5, K 0.01 and 0.03, channel by channel."""
    t, h, w = x.shape[:3]
    x, y = (rearrange(torch.from_numpy(v).double().reshape(t, h, w, -1), "t h w c -> (t c) 1 h w") for v in (x, y))
    window = torch.softmax(-torch.arange(-5, 6).double() ** 2 / (2 * 1.5 ** 2), 0)
    blurred = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window.view(1, 1, -1, 1))
    blurred = F.conv2d(blurred, window.view(1, 1, 1, -1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = F.pad(blurred, (5, 5, 5, 5), value=torch.nan).chunk(5)
    var_x, var_y, covariance = mean_xx - mean_x * mean_x, mean_yy - mean_y * mean_y, mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return rearrange(luminance * structure, "(t c) 1 h w -> t h w c", t=t).numpy()


def compare_pairs(pairs: list, *masks) -> list[dict]:
    """For each mask the means over pairs of pictures (x, y)."""
    maps = [ssim_map(*pair) for pair in pairs]
    return [dict(psnr=float(np.mean([psnr(*pair, mask) for pair in pairs])),
                 ssim=float(np.mean([masked_mean(found, mask) for found in maps]))) for mask in masks]


def compare_clips(rgb, alpha, rgb_hat, alpha_hat) -> dict:
    """PSNR in dB and SSIM of a result against its target: soft and hard renders, their mean over the 8 palette colours
    (the hard ones cut by the target's alpha), and alpha, over the whole frame and in the object's region (alpha > 0,
    two pixels wider); colour where alpha > 0; raw colour, also where it is hidden. And `matte_errors`."""
    region = grow(alpha > 0, 2, height=alpha.shape[1])
    palette = [(color + 1) / 2 * 255 for color in PALETTE.numpy()]
    shown = np.where(alpha > 0, 255, 0).astype(np.uint8)
    renders = [(over(rgb, alpha, color), over(rgb_hat, alpha_hat, color)) for color in palette]
    cut = [(over(rgb, shown, color), over(rgb_hat, shown, color)) for color in palette]
    render, render_region = compare_pairs(renders, None, region)
    hard, = compare_pairs(cut, None)
    matte, matte_region = compare_pairs([(alpha, alpha_hat)], None, region)
    colour, raw = compare_pairs([(rgb, rgb_hat)], alpha > 0, None)
    return {"soft render": render, "soft render, region": render_region, "hard render": hard,
            "alpha": matte, "alpha, region": matte_region, "colour, alpha > 0": colour, "raw colour": raw,
            "matte": matte_errors(alpha, alpha_hat) | {"colour MSE": square_error(rgb, rgb_hat, alpha > 0)}}


def square_error(x, y, mask=None) -> float:
    """Mean over the mask, in thousandths of full scale."""
    return 1000 * masked_mean((x.astype(np.float32) - y.astype(np.float32)) ** 2, mask) / 255 ** 2


def gradient(x):
    """Length of the gradient of (t, h, w) by derivatives of a Gaussian of deviation 1.4: what matting errors use."""
    r = torch.arange(-4, 5).double()
    blur = torch.softmax(-r ** 2 / (2 * 1.4 ** 2), 0)
    slope = r / 1.4 ** 2 * blur
    x = F.pad(x[:, None], (4, 4, 4, 4), mode="replicate")
    gx = F.conv2d(F.conv2d(x, slope.view(1, 1, 1, -1)), blur.view(1, 1, -1, 1))
    gy = F.conv2d(F.conv2d(x, blur.view(1, 1, 1, -1)), slope.view(1, 1, -1, 1))
    return torch.hypot(gx, gy)[:, 0]


def matte_errors(alpha, alpha_hat) -> dict:
    """The usual errors of a matte: MAD and MSE in thousandths; Grad, a frame's sum of squared differences of gradients,
    in thousandths of the pixels; dtSSD, the root of the mean squared difference of changes in time, in hundredths."""
    a, b = (torch.from_numpy(x).double() / 255 for x in (alpha, alpha_hat))
    change = (a.diff(dim=0) - b.diff(dim=0)).square().mean((1, 2)).sqrt()
    return {"MAD": 1000 * float((a - b).abs().mean()), "MSE": square_error(alpha, alpha_hat),
            "Grad": 1000 * float((gradient(a) - gradient(b)).square().mean()),
            "dtSSD": 100 * float(change.mean()) if len(a) > 1 else 0.0}


def grow(mask, n, height=64):
    """Bool (t, h, w), wider by n pixels of frames of that height, at least by one pixel, diagonals too."""
    n = max(1, round(n * mask.shape[1] / height))
    return F.max_pool2d(torch.from_numpy(mask)[:, None].float(), 2 * n + 1, 1, n)[:, 0].bool().numpy()


def body_alpha(alpha) -> float:
    """Median alpha where the object surely is (alpha > 0.1, less a margin of 3), over all frames, 0 to 1; 0 without."""
    inside = alpha[~grow(alpha <= 25, 3)]
    return float(np.median(inside)) / 255 if len(inside) else 0.0


def silhouette(alpha):
    """Where alpha is above half the body's, or above the body's less 0.35 if that is more: bool (t, h, w), no halo."""
    level = body_alpha(alpha)
    return alpha > 255 * max(level / 2, level - 0.35, 0.1)


def has_holes(alpha) -> bool:
    """Some frame encloses a place with alpha < 0.8: no path of such pixels leads from it to the frame's border."""
    low = torch.from_numpy(alpha < 204).float()
    free, reached = (F.pad(x, (1, 1, 1, 1), value=1) for x in (low, torch.zeros_like(low)))    # from outside on
    while not reached.equal(more := F.max_pool2d(reached, 3, 1, 1) * free):
        reached = more
    return bool((free > reached).any())


def named_color(rgb, alpha) -> str:
    """The nearest of the ten colours, in RGB, to the silhouette's median colour over all frames."""
    inside = rgb[silhouette(alpha)]
    if not len(inside):
        return "none"
    away = np.array(list(COLORS.values())) - np.median(inside, 0) / 255
    return list(COLORS)[(away ** 2).sum(1).argmin()]


def moments(mask):
    """Area (t,), centre and standard deviation (t, 2) of bool (t, h, w): x and y, in frame heights from the middle."""
    h, w = mask.shape[1:]
    y, x = torch.meshgrid((torch.arange(h) + 0.5 - h / 2) / h, (torch.arange(w) + 0.5 - w / 2) / h, indexing="ij")
    area, xy = mask.sum((1, 2)), torch.stack([x, y], -1)
    centre, square = (torch.einsum("thw,hwd->td", mask.float(), v) / area[:, None] for v in (xy, xy ** 2))
    return area, centre, (square - centre ** 2).clamp(min=1e-8).sqrt()


def named_motion(alpha) -> str:
    """The first rule that holds of the silhouette's area, proportion (width / height) and centre, in frame heights."""
    area, centre, deviation = moments(torch.from_numpy(silhouette(alpha)))
    proportion = deviation[:, 0] / deviation[:, 1]
    reach = centre.amax(0) - centre.amin(0)                 # how far it comes about, in x and in y
    net = centre[-1] - centre[0]
    across = bool(reach[0] > reach[1])
    comes_back = bool((net.abs() < 0.5 * reach)[reach.argmax()])
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
    """By the largest intersection over union with its outline, mean over the frames of at least median area."""
    mask = torch.from_numpy(silhouette(alpha))
    area = mask.sum((1, 2))
    if area.max() == 0:
        return "none"
    mask = aligned(mask[area >= area.median().clamp(min=1)])[:, None]
    outlines = aligned(torch.stack([torch.from_numpy(distance_table(shape)[..., 0] < 0) for shape in SHAPES]))
    overlap = ((mask & outlines).sum((2, 3)) / (mask | outlines).sum((2, 3))).mean(0)
    return SHAPES[overlap.argmax()] if overlap.max() >= 0.75 else "none"


def shows_material(alpha, material: str) -> bool:
    """Glass, smoke and bubble share one rule; glow is told by the mean alpha at a distance of 3 from the silhouette."""
    level, inside = body_alpha(alpha), silhouette(alpha)
    if material == "glow":
        halo = alpha[grow(inside, 3) & ~grow(inside, 2)]
        return level > 0.7 and float(halo.sum()) / max(1, len(halo)) > 0.05 * 255
    return level > 0.95 if material == "solid" else 0.15 < level < 0.85


def score_clip(rgb, alpha, attributes: dict) -> dict:
    """Name of a score -> whether the clip passes, None where it does not apply. Besides "material" one per material;
    corners: of an eighth of the height, a mean alpha below 0.01; no_holes: of solid bodies, except the ring."""
    material, shape = attributes["material"], attributes["shape"]
    side = alpha.shape[1] // 8
    edges = np.r_[:side, -side:0]
    shown = shows_material(alpha, material)
    return dict(color=named_color(rgb, alpha) == attributes["color"],
                motion=named_motion(alpha) == attributes["motion"],
                shape=named_shape(alpha) == shape,
                corners=bool(alpha[:, edges][:, :, edges].mean() < 0.01 * 255),
                material=shown, **(dict.fromkeys(MATERIALS) | {material: shown}),
                no_holes=not has_holes(alpha) if material == "solid" and shape != "ring" else None)


def mean_scores(rows: list[dict], mean=np.nanmean) -> dict:
    """Of several `compare_clips`."""
    return {name: {kind: float(mean([row[name][kind] for row in rows])) for kind in kinds}
            for name, kinds in rows[0].items()}


def print_scores(title: str, rows: list[dict]) -> None:
    means, low = mean_scores(rows), mean_scores(rows, np.nanmin)
    print(f"\n{title}: {len(rows)} clips".ljust(27) + "PSNR, dB: mean  lowest   SSIM: mean  lowest")
    for name, mean in means.items():
        if "psnr" in mean:
            least = low[name]
            print(f"  {name:<24}{mean['psnr']:13.2f}{least['psnr']:8.2f}{mean['ssim']:13.4f}{least['ssim']:8.4f}")
    for title in ("matte", "LPIPS"):
        if title in means:
            print(f"  {title}:", ", ".join(f"{name} {value:.3f}" for name, value in means[title].items()))


def measure_clip(rgb, alpha, attributes: dict) -> dict:
    """What no score counts, in thousandths. background alpha: the mean far from the object; flicker: the mean change,
    from frame to frame, of the object's mean colour and mean alpha; tint: how much redder than its named colour the
    object is. All nan where there is no object."""
    inside = silhouette(alpha)
    far = alpha[~grow(inside, 10)]
    if not inside.any(axis=(1, 2)).all():
        return dict.fromkeys(("background alpha", "colour flicker", "alpha flicker", "tint"), np.nan)
    colour = np.stack([frame[where].mean(0) for frame, where in zip(rgb, inside)]) / 255
    matte = np.stack([frame[where].mean() for frame, where in zip(alpha, inside)]) / 255
    off = colour.mean(0) - COLORS[attributes["color"]]
    return {"background alpha": 1000 * far.mean() / 255 if far.size else np.nan,
            "colour flicker": 1000 * np.abs(np.diff(colour, axis=0)).mean(),
            "alpha flicker": 1000 * np.abs(np.diff(matte)).mean(), "tint": 1000 * (off[0] - off[1:].mean())}


def chance_of(clips, attributes: list[dict]) -> dict:
    """The share that passes each score with the attributes of another clip, the mean over three of them."""
    others = [attributes[k:] + attributes[:k] for k in (1, len(attributes) // 2, len(attributes) - 1)]
    return shares_of([score_clip(*clip, other) for asked in others for clip, other in zip(clips, asked)])


def passed_of(rows: list[dict]) -> dict[str, list[bool]]:
    """Score -> whether it passes, of each clip that it applies to."""
    return {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}


def shares_of(rows: list[dict]) -> dict:
    """The share of the clips that pass, of those a score applies to; None without any."""
    return {name: sum(passed) / len(passed) if passed else None for name, passed in passed_of(rows).items()}


def score_table(rows: list[dict], chance: dict | None = None) -> str:
    """A line for each score: the percentage that passes, and counts, of the clips it applies to; materials indented.
    chance: name -> the share that passes with wrong attributes."""
    lines = []
    for name, passed in passed_of(rows).items():
        title = f"  {name}" if name in MATERIALS else name
        percent = f"{100 * np.mean(passed):.1f}" if passed else "-"
        beside = f"  chance {100 * chance[name]:5.1f} %" if chance and chance.get(name) is not None else ""
        lines.append(f"{title:<12}{percent:>6} %  {sum(passed):4d} of {len(passed):4d}{beside}")
    return "\n".join(lines)


def score_by(rows: list[dict], prompts: list, name: str, attribute: str) -> str:
    """One line: how many clips pass a score, for every value of an attribute of their prompts."""
    values = [attributes[attribute] for _, attributes in prompts]
    passed = Counter(value for value, row in zip(values, rows) if row[name])
    counts = [f"{value} {passed[value]} of {n}" for value, n in Counter(values).items()]
    return f"{name} by {attribute}: {', '.join(counts)}"
