"""Augmentation on the device, a batch at a time: geometry by one resampling, stain in optical density.

The random numbers of a batch are drawn on the CPU from (seed, step) for the whole global batch and then cut by rank,
so that they do not depend on the number of workers.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

SCALE = 1.15
"""Largest change of size, up or down."""
SHIFT = 0.04
"""Largest shift, in parts of the network's field (1 um of 25)."""


@dataclass(frozen=True)
class Draws:
    """Random numbers for B images."""

    uniform: Tensor  # B x 15, in -1..1
    normal: Tensor  # B x 3 x 3, standard normal
    generator: torch.Generator
    """For whatever else is drawn for this batch."""

    @classmethod
    def of(cls, batch: int, seed: int, step: int) -> Self:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        uniform = torch.rand(batch, 15, generator=generator) * 2 - 1
        normal = torch.randn(batch, 3, 3, generator=generator)
        return cls(uniform, normal, generator)

    def cut(self, rank: int, workers: int, device: torch.device) -> "Draws":
        """This rank's part: every `workers`-th image."""
        uniform, normal = (t[rank::workers].to(device, non_blocking=True) for t in (self.uniform, self.normal))
        return Draws(uniform, normal, self.generator)


def augment(images_BHWC: Tensor, draws: Draws, out_px: int, margin: float, stain_jitter: float) -> Tensor:
    """uint8 crops with a margin to float B x 3 x out_px x out_px in 0..1.

    Args:
        images_BHWC: B x S x S x 3, uint8; a field `margin` times as wide as the network's.
        stain_jitter: strength of the change of colour in optical density; 0 leaves it, 1 changes each channel's density
            by up to about 40 %.
    """
    images = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(255.0)
    images = _turn(images, draws.uniform[:, 10:15], out_px, margin)
    images = _stain(images, draws, stain_jitter)
    return _blur(images, draws.uniform[:, 9]).clamp_(0.0, 1.0)


def _turn(images: Tensor, uniform: Tensor, out_px: int, margin: float) -> Tensor:
    """Any angle, mirrored or not, a little larger or smaller, a little off the centre."""
    angle = math.pi * uniform[:, 0]
    mirror = torch.where(uniform[:, 1] < 0, -1.0, 1.0)
    scale = torch.exp(uniform[:, 2] * math.log(SCALE)) / margin
    shift = uniform[:, 3:5] * 2 * SHIFT / margin
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack(
        [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1
    )
    grid = functional.affine_grid(rows, [len(images), 3, out_px, out_px], align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _stain(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Beer-Lambert: density D = -log I; D' = (M D + offset) ** gamma, with a random gain, mixing, offset and gamma."""
    u = draws.uniform * strength
    gain = torch.exp(0.15 * u[:, :1] + 0.22 * u[:, 1:4])
    off_diagonal = 1 - torch.eye(3, device=images.device)
    mixing = torch.diag_embed(gain) + 0.06 * strength * draws.normal * off_diagonal
    offset = 0.08 * u[:, 4:5] + 0.06 * u[:, 5:8]
    gamma = torch.exp(0.2 * u[:, 8])[:, None, None]
    light = images.clamp(min=1 / 255).flatten(2)
    density = torch.baddbmm(offset[:, :, None], mixing, light.log_().neg_()).clamp_(min=1e-4)
    return (
        density.log_().mul_(gamma).exp_().neg_().exp_().view_as(images)
    )  # a power by its logarithm: several times faster


def _blur(images: Tensor, amount: Tensor) -> Tensor:
    """One image in six loses sharpness, in place: a blend with its 3 x 3 mean. The others are not touched, which saves time."""
    weight = ((amount - 0.67) * 3.0).clamp(0.0, 1.0)
    rows = weight.nonzero().squeeze(1)
    sharp = images[rows]
    wide = functional.pad(sharp, (1, 1, 1, 1), mode="replicate")
    tall = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    soft = (tall[..., :-2] + tall[..., 1:-1] + tall[..., 2:]).div_(9.0)
    return images.index_copy_(0, rows, sharp.lerp_(soft, weight[rows][:, None, None, None]))
