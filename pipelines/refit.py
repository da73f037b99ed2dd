"""A recogniser's head for the types, fitted anew on the network's own features: what a few labels of a new site can teach it.

The network under the head stays as it is, and so do the characteristics and the embedding. With 100 labels of JHU, on a
network of PBC alone, this named more cells rightly than training the whole network on (docs/decisions/012).

Shapes: N cells, C channels of the pooled features, T types, D directions.
"""

import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from smearline import reader, recogniser, settings

_SAY = 4096
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cells:
    """Labelled cells of one place: features (N x C), what each label allows (N x T), and each cell's weight (N)."""

    features_NC: Floats
    allowed_NT: NDArray[np.bool_]
    weight_N: NDArray[np.float64]


def features(network: recogniser.Recogniser, frame: pd.DataFrame, params: settings.Settings) -> Floats:
    """The pooled features of cells (N x C), averaged over the views as in service; `frame`: shard, row, scale (um/px)."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    served = recogniser.Served(network, 1.0, params.model.views).eval()
    crops = reader.Crops(frame, params.image.field_um, params.image.size_px, threads)
    found: list[Floats] = []
    with torch.inference_mode():
        for batch in crops.batches(np.arange(len(frame)), 64):
            found.append(served.averaged(torch.from_numpy(batch))[2].numpy())
            done = sum(map(len, found))
            if done // _SAY > (done - len(batch)) // _SAY:
                print(f"  {done} of {len(frame)} cells seen", flush=True)
    return np.concatenate(found)


def fit_head(network: recogniser.Recogniser, home: Cells, new: Cells, strength: float) -> None:
    """Replace the type head of `network` by the softmax regression of the labels on the features; those of home and those of the
    new site count the same together.

    The features are turned to the principal directions of home's and each is divided by the root of its deviation: halfway
    between leaving them as they are, where a few directions say everything, and whitening, where noise says as much as they.

    Args:
        strength: what the mean loss is multiplied by, beside half of the squared length of the coefficients, for features of mean
            squared length 100 at home (scikit-learn's C times the sum of the weights).
    """
    middle = home.features_NC.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(np.cov(home.features_NC - middle, rowvar=False, bias=True))
    deviations = np.sqrt(np.maximum(values, 0.0))
    kept = deviations > 1e-4 * deviations.max()
    turn_CD = axes[:, kept] / np.sqrt(deviations[kept]) * 10 / np.sqrt(deviations[kept].sum())
    # Rows that allow nothing teach nothing.
    taught = [part.weight_N * part.allowed_NT.any(axis=1) for part in (home, new)]
    weight = np.concatenate([part / max(float(part.sum()), 1e-30) for part in taught])
    x = torch.from_numpy((np.concatenate([home.features_NC, new.features_NC]) - middle) @ turn_CD).float()
    allowed = torch.from_numpy(np.concatenate([home.allowed_NT, new.allowed_NT]))
    share = torch.from_numpy(weight / weight.sum()).float()
    head = torch.nn.Linear(x.shape[1], len(network.types))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=1000, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = recogniser.label_set_loss(head(x), allowed, torch.ones(()), share)
        total = strength * loss + head.weight.square().sum() / 2
        total.backward()
        return total

    optimizer.step(closure)
    weight_TC = head.weight.detach().double().numpy() @ turn_CD.T
    bias_T = head.bias.detach().double().numpy() - weight_TC @ middle
    with torch.no_grad():
        network.type_head.weight.copy_(torch.from_numpy(weight_TC))
        network.type_head.bias.copy_(torch.from_numpy(bias_T))
