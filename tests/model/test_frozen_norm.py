"""Folding frozen normalisation changes no answer, no gradient and no name."""

import copy

import pytest
import timm
import torch
from torch import nn

from smearline import frozen_norm


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name, num_classes=0, global_pool="").eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return made


@pytest.mark.mission("a folded network trains as the network that it was")
@pytest.mark.parametrize(
    ("backbone", "least"), [("tf_efficientnet_lite0", 49), ("resnet18", 20), ("densenet121", 59), ("convnext_atto", 0)]
)
def test_answers_gradients_and_names_stay(backbone: str, least: int):
    plain, images = network(backbone).double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    folded = copy.deepcopy(plain)
    assert frozen_norm.fold(folded, images[:1]) == least
    assert list(folded.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(folded(images), plain(images))
    for one in (folded, plain):
        one(images).square().mean().backward()
    given = dict(plain.named_parameters())
    for name, parameter in folded.named_parameters():
        if given[name].grad is not None:
            torch.testing.assert_close(parameter.grad, given[name].grad, rtol=1e-6, atol=1e-12)


def test_a_copy_is_normalised_by_its_own_numbers():
    folded, images = network("resnet18"), torch.rand(1, 3, 64, 64)
    frozen_norm.fold(folded, images)
    before, average = folded(images), copy.deepcopy(folded)
    for module in folded.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(2)
    torch.testing.assert_close(average(images), before)
    assert not torch.allclose(folded(images), before)


def test_a_convolution_that_something_else_reads_too_is_left_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.weight.data.fill_(3.0)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found = self.convolution(images)
            return found + self.norm(found)

    one, images = Both().eval(), torch.rand(1, 3, 8, 8)
    before = one(images)
    assert frozen_norm.fold(one, images) == 0
    torch.testing.assert_close(one(images), before)
    assert type(one.convolution) is nn.Conv2d
