"""LPIPS with VGG-16 (Zhang et al. 2018, version 0.1), from weight files that a user has.

Two files: vgg16-397923af.pth, as torchvision publishes it, and the linear weights vgg.pth of the authors' package.
They were not at hand here: the distance is built by its published definition and was run with weights by name only.
"""
import torch
from torch import nn

from kit.files import Checkpoint

WIDTHS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)       # a pooling between the groups
SHIFT, SCALE = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])


class LPIPS(nn.Module):
    """Distance of pictures (b, 3, h, w) in [-1, 1], h and w at least 16: (b,). FileNotFoundError, ValueError."""

    def __init__(self, vgg, linear):
        super().__init__()
        self.features, width = nn.ModuleList(), 3
        for group in WIDTHS:
            layers = [nn.MaxPool2d(2)] if self.features else []
            for width, before in zip(group, (width, *group)):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            self.features.append(nn.Sequential(*layers))
        self.linear = nn.ParameterList(nn.Parameter(torch.empty(1, group[-1], 1, 1)) for group in WIDTHS)
        layers = nn.Sequential(*[layer for group in self.features for layer in group])      # named as in the file
        try:
            own = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
            read, weights = Checkpoint(vgg).read(own), Checkpoint(linear).read()
            layers.load_state_dict({name.removeprefix("features."): read[name] for name in own})
            for i, weight in enumerate(self.linear):
                weight.data = weights[f"lin{i}.model.1.weight"].float().reshape(weight.shape)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{vgg} and {linear} are not VGG-16's weights and LPIPS's linear ones for it: give "
                             f"vgg16-397923af.pth and vgg.pth ({type(error).__name__})") from None
        self.requires_grad_(False)

    def forward(self, x, y):
        x, y = (((v.movedim(1, -1) - SHIFT) / SCALE).movedim(-1, 1) for v in (x, y))
        total = 0
        for group, weight in zip(self.features, self.linear):
            x, y = group(x), group(y)
            unit = [v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y)]
            total = total + ((unit[0] - unit[1]) ** 2 * weight).sum(1).mean((1, 2))
        return total
