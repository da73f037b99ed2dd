"""Frozen batch normalisation, folded into the convolution before it: the same function, parameters and gradients, faster.

With fixed statistics a normalisation after a convolution is one affine map a channel, so it can be applied to the
convolution's weights (a few thousand numbers) instead of its output (millions): conv(x; w * s) + b - mean * s with
s = scale / sqrt(variance + eps). Weights, scales and biases stay parameters of their own under their own names.
"""

from typing import Any

import torch
from torch import Tensor, nn

_Norm = nn.modules.batchnorm._BatchNorm


class _Convolution:
    """The convolution as it is, with other weights."""

    def __init__(self, plain: nn.Module, weight: Tensor, bias: Tensor) -> None:
        self._plain, self.weight, self.bias = plain, weight, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


def _forward_convolution(self: Any, images: Tensor) -> Tensor:
    (norm,) = self.folded
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * gain
    if self.bias is not None:
        bias = bias + self.bias * gain
    seen_as = _Convolution(self, self.weight * gain.view(-1, 1, 1, 1), bias)
    found: Tensor = type(self).plain.forward(seen_as, images)
    return found


def _forward_norm(self: Any, features: Tensor) -> Tensor:
    found: Tensor = (
        self.act(self.drop(features)) if hasattr(self, "act") else features
    )  # timm's norms hold an activation
    return found


def _become(module: nn.Module, forward: Any) -> None:
    plain = type(module)
    module.__class__ = type(f"Folded{plain.__name__}", (plain,), {"forward": forward, "plain": plain})


def fold(network: nn.Module, sample: Tensor) -> int:
    """Fold every batch normalisation that directly follows a convolution; returns how many.

    For training with the statistics frozen and for evaluation. Nothing is folded (0) where the network would give
    another answer, such as where a convolution's output is read by something else too.

    Args:
        network: not yet in DDP. sample: an input that it takes, to see what follows what.
    """
    made: dict[int, nn.Module] = {}
    pairs: list[tuple[nn.Module, Any]] = []
    kept: list[Tensor] = []  # so that no id is used twice

    def after(module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
        kept.extend([given[0], found])
        if isinstance(module, nn.Conv2d):
            made[id(found)] = module
        elif id(given[0]) in made:
            pairs.append((made[id(given[0])], module))

    seen = [m for m in network.modules() if isinstance(m, nn.Conv2d) or (isinstance(m, _Norm) and m.affine)]
    hooks = [m.register_forward_hook(after) for m in seen]
    was_training = network.training
    network.eval()
    with torch.no_grad():
        network(sample)
        for hook in hooks:
            hook.remove()
        weights = [norm.weight.clone() for _, norm in pairs]
        for _, norm in pairs:  # a norm that does nothing yet would hide what a convolution's other readers get
            norm.weight.mul_(1.05)
        before = network(sample)
        for convolution, norm in pairs:
            convolution.__dict__["folded"] = (norm,)  # in a tuple: no submodule of it, and copied with the network
            _become(convolution, _forward_convolution)
            _become(norm, _forward_norm)
        folded = len(pairs)
        if not torch.allclose(network(sample), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            for module in (m for pair in pairs for m in pair):
                module.__class__ = type(module).plain  # type: ignore[union-attr]
            folded = 0
        for (_, norm), weight in zip(pairs, weights, strict=True):
            norm.weight.copy_(weight)
    network.train(was_training)
    return folded
