"""Objects and backgrounds of the procedural clips, drawn with numpy.

An object is a shape (its signed distance, from a table), a colour and a material; a background is a kind and two or
more colours that drift with an imagined camera. Everything is float32 in [0, 1].
Letters: t frames, h w height and width; u v an object's coordinates in radii, x y the frame's in heights; sd signed
distance to the outline, negative inside.
"""
from collections import namedtuple
from functools import cache

import numpy as np

SHAPES = ("ball", "cube", "star", "ring", "heart", "drop", "leaf", "ghost")
COLORS = {"red": (0.90, 0.08, 0.10), "orange": (1.00, 0.50, 0.02), "yellow": (1.00, 0.90, 0.08),
          "green": (0.10, 0.68, 0.20), "cyan": (0.10, 0.85, 0.95), "blue": (0.10, 0.22, 0.92),
          "purple": (0.52, 0.10, 0.72), "pink": (1.00, 0.48, 0.74), "white": (0.96, 0.96, 0.97),
          "black": (0.07, 0.07, 0.09)}                                    # no two nearer than 0.4
MATERIALS = ("solid", "glass", "glow", "smoke", "bubble")
BACKGROUNDS = {"plain": 0.2, "graded": 0.3, "cloudy": 0.15, "striped": 0.1, "checked": 0.1, "cluttered": 0.15}
REACH = 1.6                                                               # half width of a distance table, in radii
Place = namedtuple("Place", "u v unit sd depth facing spot body pixel")


# ---- shapes


def outline(shape):
    """Closed polygon of a shape: complex numbers, x right and y down, within about the unit circle."""
    a = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if shape == "cube":
        return np.exp(1j * (np.arange(6) * np.pi / 3 + np.pi / 6))
    if shape == "star":
        radii = np.where(np.arange(10) % 2, 0.47, 1.04)
        return radii * np.exp(1j * (np.arange(10) * np.pi / 5 - np.pi / 2)) + 0.06j
    if shape == "heart":
        height = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a) + 2.4
        return 16 * np.sin(a) ** 3 / 17 - 1j * height / 16
    if shape == "drop":
        return 0.86 * np.sin(a) * np.sin(a / 2) ** 1.3 - 0.98j * np.cos(a)
    if shape == "leaf":
        s = np.linspace(-1, 1, 49)
        side = 0.56j * (1 - s ** 2) ** 0.9 * (1 - 0.25 * s)
        return np.concatenate([s + side, (s - side)[-2:0:-1]]) * np.exp(-1j * np.radians(48))
    dome, hem = np.linspace(np.pi, 2 * np.pi, 40), np.linspace(0.74, -0.74, 60)         # of a ghost, wavy below
    waves = 0.72 - 0.17 * np.cos(hem / 0.74 * 3 * np.pi)
    return np.concatenate([0.74 * np.exp(1j * dome) - 0.18j, hem + 1j * waves])


@cache
def distance_table(shape, n=192):
    """Signed distance (negative inside) and its gradient on a grid over [-REACH, REACH]^2: (n, n, 3), in radii."""
    axis = np.linspace(-REACH, REACH, n)
    p = axis + 1j * axis[:, None]
    if shape == "ball":
        sd = np.abs(p) - 0.96
    elif shape == "ring":
        sd = np.abs(np.abs(p) - 0.74) - 0.26
    else:
        a = outline(shape)[:, None, None]                                 # each side goes from a to b
        b = np.roll(a, -1, 0)
        along = np.clip(((p - a) / (b - a)).real, 0, 1)
        far = np.abs(p - a - along * (b - a)).min(0)
        turned = np.angle((p - b) / (p - a)).sum(0)                       # seen from inside, it goes all the way round
        sd = np.where(np.abs(turned) > np.pi, -far, far)
    gy, gx = np.gradient(sd, axis, axis)
    return np.stack([sd, gx, gy], -1).astype(np.float32)


def distance(shape, u, v):
    """Signed distance (bilinear) and its gradient (nearest) at points u, v: three arrays shaped like u."""
    n = len(distance_table(shape))
    x, y = (np.clip((k + REACH) * ((n - 1) / (2 * REACH)), 0, n - 1.001) for k in (u, v))
    i, j = y.astype(np.int32), x.astype(np.int32)
    fy, fx, k = y - i, x - j, i * n + j
    sd, gx, gy = distance_table(shape).reshape(-1, 3).T
    top, low = sd[k] * (1 - fx) + sd[k + 1] * fx, sd[k + n] * (1 - fx) + sd[k + n + 1] * fx
    return top * (1 - fy) + low * fy, gx[k], gy[k]


def smoothstep(x, low, high):
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def waves(rng, u, v, lengths=(2.2, 5.5)):
    """Smooth noise in [0, 1] that drifts with time: eight random waves over points u, v (t, h, w)."""
    total, s = 0, np.linspace(0, 1, len(u), dtype=np.float32)[:, None, None]
    low, high = (lengths[0], 0, 2, 0), (lengths[1], 2 * np.pi, 5, 2 * np.pi)
    for length, angle, drift, start in rng.uniform(low, high, (8, 4)).tolist():
        total = total + np.sin(length * (np.cos(angle) * u + np.sin(angle) * v) + drift * s + start, dtype=np.float32)
    return smoothstep(total, -3.0, 3.0)


# ---- objects


def place(shape, radius, track, h, w):
    """Where each pixel lies in the object: distance in radii (unit) and heights (sd), ..., (t, h, w) each.
    track: centre in heights and scale, (2, t) each, x and y."""
    (x, y), (sx, sy) = np.asarray(track, np.float32)[..., None, None]
    u = ((np.arange(w, dtype=np.float32) + 0.5) / h - x) / (radius * sx)
    v = ((np.arange(h, dtype=np.float32)[:, None] + 0.5) / h - y) / (radius * sy)
    u, v = np.broadcast_arrays(u, v)                                      # (t, h, w)
    unit, nx, ny = distance(shape, u, v)
    sd = unit * (radius / np.sqrt((nx / sx) ** 2 + (ny / sy) ** 2 + 1e-4))
    sd += radius * np.hypot(np.maximum(np.abs(u) - REACH, 0) * sx, np.maximum(np.abs(v) - REACH, 0) * sy)
    depth = np.clip(unit / -0.45, 0, 1)
    facing = (1 - depth) * -(0.55 * nx + 0.75 * ny)                       # towards a light from above left
    spot_u, spot_v = {"ring": (-0.52, -0.52), "drop": (-0.24, 0.22), "leaf": (0.18, -0.44)}.get(shape, (-0.30, -0.34))
    spot = np.exp(-((u - spot_u) ** 2 + (v - spot_v) ** 2 * 1.6) / 0.022, dtype=np.float32) * smoothstep(-unit, 0, 0.1)
    return Place(u, v, unit, sd, depth, facing, spot, body=np.clip(0.5 - sd * h, 0, 1), pixel=1 / (radius * h))


def shaded(shape, base, p):
    """Body colour (t, h, w, 3) under a soft light, and lines drawn on it (t, h, w): a cube's edges, a leaf's veins."""
    u, v = p.u, p.v
    shade = 1 + 0.2 * p.facing - 0.08 * np.clip(0.5 * u + 0.7 * v, -1, 1)
    gloss, line = 0.10 * np.maximum(p.facing, 0), np.zeros_like(p.unit)
    if shape == "cube":
        slope = np.float32(np.tan(np.pi / 6))
        top, left = np.clip((-v - slope * np.abs(u)) / p.pixel + 0.5, 0, 1), np.clip(0.5 - u / p.pixel, 0, 1)
        shade = 0.70 + 0.22 * left + top * (1.14 - 0.70 - 0.22 * left)
        gloss = 0.10 * top + 0.03 * left * (1 - top)
        spokes = np.minimum(np.where(v > 0, np.abs(u), 9), np.abs(v + slope * np.abs(u)) * np.float32(0.866))
        line = np.clip(1.2 - spokes / (1.3 * p.pixel), 0, 1)
    elif shape == "leaf":
        along, across = 0.669 * u - 0.743 * v, 0.743 * u + 0.669 * v
        vein = np.minimum(np.abs(across), 0.05 + np.abs((along - np.abs(across)) % 0.42 - 0.21))
        line = np.clip(1.4 - vein / (1.1 * p.pixel), 0, 1) * (np.abs(along) < 0.84) * (p.unit < p.pixel)
        shade = shade * (1 - 0.28 * line) + 0.06 * np.sign(across)
    return base * shade[..., None] + gloss[..., None], line


def solid(rng, p, base, rgb, line, radius):
    return rgb + 0.45 * p.spot[..., None] * (1 - rgb), p.body


def glass(rng, p, base, rgb, line, radius):
    rim = smoothstep(64 * p.sd, -2.6, -1.2)                               # in pixels of a frame 64 high
    alpha = p.body * np.maximum(0.38 + 0.52 * np.maximum(rim, 0.6 * line), 0.9 * p.spot)
    return rgb * (1 - 0.12 * rim[..., None]) + 0.9 * p.spot[..., None] * (1 - rgb), alpha


def glow(rng, p, base, rgb, line, radius):
    alpha = np.maximum(p.body, 0.75 * np.clip(1 - p.sd / (0.5 * radius), 0, 1) ** 2)
    heat = 0.5 * base.max() * smoothstep(-p.unit, 0, 0.5) * (1 - 0.45 * line)
    return base * (0.92 + 0.1 * p.body[..., None]) + heat[..., None] * (1 - base), alpha


def smoke(rng, p, base, rgb, line, radius):
    cloud = waves(rng, np.clip(p.u, -1.2, 1.2), np.clip(p.v, -1.2, 1.2))
    alpha = smoothstep(-p.sd / radius, -0.12, 0.16) * (0.38 + 0.44 * cloud)
    return rgb * (0.84 + 0.22 * cloud[..., None]) + 0.05 * cloud[..., None], alpha


def bubble(rng, p, base, rgb, line, radius):
    rim, light = np.maximum(smoothstep(64 * p.sd, -2.2, -0.6), 0.5 * line), smoothstep(p.spot, 0.2, 0.8)
    alpha = p.body * np.maximum(0.24 + 0.56 * rim, 0.85 * smoothstep(p.spot, 0.35, 0.8))
    phase = (3.2 * p.unit + 1.8 * p.u - 1.1 * p.v + rng.uniform(0, 6))[..., None]
    rgb = rgb + (0.09 + 0.09 * p.depth[..., None]) * np.cos(phase + np.array([0, 2.1, 4.2], np.float32))
    return rgb + 0.9 * light[..., None] * (1 - rgb), alpha


def draw(rng, size, shape, color, material, radius, track):
    """One object: straight colour (t, h, w, 3) and alpha (t, h, w), and its signed distance in heights (t, h, w)."""
    p = place(shape, radius, track, *size)
    base = np.array(COLORS[color], np.float32)
    look = dict(solid=solid, glass=glass, glow=glow, smoke=smoke, bubble=bubble)[material]
    rgb, alpha = look(rng, p, base, *shaded(shape, base, p), radius)
    if shape == "ghost":
        eyes = np.hypot((np.abs(p.u) - 0.28) / 0.13, (p.v + 0.22) / 0.19).astype(np.float32)
        eyes = np.clip(0.5 + (1 - eyes) * 0.15 / p.pixel, 0, 1)
        dark = np.float32(0.93 if color == "black" else 0.06)             # dark eyes; on a black ghost, light ones
        rgb, alpha = rgb + eyes[..., None] * (dark - rgb), np.maximum(alpha, eyes * p.body)
    return np.clip(rgb, 0, 1).astype(np.float32), alpha.astype(np.float32), p.sd


def stack(front, back):
    """Two objects (rgb, alpha, sd), straight, as one: rgb, alpha. Where both are clear, the nearer one's colour."""
    (rgb, alpha, sd), (rgb2, alpha2, sd2) = front, back
    share, rest = alpha + 1e-3 * (sd < sd2), alpha2 * (1 - alpha) + 1e-3 * (sd2 <= sd)
    mixed = (rgb * share[..., None] + rgb2 * rest[..., None]) / (share + rest)[..., None]
    return mixed, alpha + alpha2 * (1 - alpha)


# ---- backgrounds


def mix(a, b, share):
    return a + share[..., None] * (b - a)


def clutter(rng, ground, x, y):
    """Twenty boxes, bars and discs in any colour over a ground (t, h, w, 3)."""
    for _ in range(20):
        color, angle = rng.random(3, np.float32), rng.uniform(0, np.pi)
        (cx, cy), (a, b) = rng.uniform(-0.2, 1.2, 2), rng.uniform(0.03, 0.2, 2)
        along, across = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / a, \
                        ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / b
        far = np.hypot(along, across) if rng.random() < 0.4 else np.maximum(np.abs(along), np.abs(across))
        ground = mix(ground, color, np.clip((1 - far) * min(a, b) * 64 + 0.5, 0, 1).astype(np.float32))
    return ground


def background(rng, kind, frames, size):
    """A scene without an object, (t, h, w, 3), seen by a camera that stands still or drifts."""
    h, w = size
    drift, angle = rng.choice([0, 0.5]) * rng.uniform(-1, 1, 2), rng.uniform(0, 2 * np.pi)
    s = np.linspace(-0.5, 0.5, frames)[:, None, None]
    x, y = (np.arange(w) + 0.5) / h + drift[0] * s, (np.arange(h)[:, None] + 0.5) / h + drift[1] * s
    x, y = np.broadcast_arrays(x, y)
    one, two, three = rng.random((3, 3), np.float32)
    along = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    if kind == "plain":
        return np.zeros_like(x, np.float32)[..., None] + one
    if kind == "cloudy":
        return mix(mix(one, two, waves(rng, x, y, (4, 14))), three, waves(rng, x, y, (4, 14)))
    if kind in ("striped", "checked"):
        across = np.cos(angle) * (y - 0.5) - np.sin(angle) * (x - 0.5)
        count = rng.uniform(9, 30)
        pattern = np.sin(count * along)
        if kind == "checked":
            pattern = pattern * np.sin(count * across)
        return mix(one, two, np.clip(pattern * 64 / count + 0.5, 0, 1).astype(np.float32))
    ground = mix(one, two, np.clip(along + 0.5, 0, 1).astype(np.float32))
    return clutter(rng, ground, x, y) if kind == "cluttered" else ground
