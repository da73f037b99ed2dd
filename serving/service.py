"""The BentoML services: `Smearline` answers over HTTP, `Recogniser` runs the network and batches over requests."""

import os
from pathlib import Path

import bentoml
import numpy as np
from aiohttp import ClientError
from bentoml.exceptions import BentoMLException
from fastapi import HTTPException

from serving.api import Desk, app
from serving.cases import CaseStore
from smearline.recognition import RecognitionModel

PACKAGE = Path(__file__).resolve().parents[1] / "package"
_FOREVER = {"max_requests": 2_000_000_000, "max_age": 3e8}
"""A connection that is renewed while requests are under way fails them (BentoML 1.4.39)."""


@bentoml.service(workers=1, traffic={"timeout": 300}, runner_connection=_FOREVER)
class Recogniser:
    """Crops to probabilities and embeddings, with ONNX Runtime."""

    def __init__(self) -> None:
        self._model = RecognitionModel(PACKAGE / "recogniser", threads=os.cpu_count() or 1)
        size = self._model.card.size_px
        self.run(np.zeros((1, size, size, 3), np.uint8))  # the first answer is no slower than the others

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=240_000)
    def run(self, crops: np.ndarray) -> np.ndarray:
        """B x S x S x 3 uint8 to B x (T + V + E) float32: one array, since only arrays can be cut apart again."""
        outputs = self._model.run(crops, "type_probabilities", "characteristic_probabilities", "embedding")
        return np.concatenate(outputs, axis=1)


# BentoML's own metrics name every path that was asked for: case ids stand in some, and there is no end of unknown ones.
@bentoml.service(workers=1, traffic={"timeout": 300}, metrics={"enabled": False})
@bentoml.asgi_app(app, path="/")
class Smearline:
    """The public service."""

    recogniser = bentoml.depends(Recogniser)

    def __init__(self) -> None:
        # scikit-learn takes seconds to load, and the other processes need none of it.
        from serving.reading import Reader

        app.state.desk = Desk(Reader(PACKAGE, self._recognise), CaseStore())

    async def _recognise(self, crops: np.ndarray) -> np.ndarray:
        try:
            return await self.recogniser.to_async.run(crops)
        except (BentoMLException, ClientError, TimeoutError) as error:
            raise HTTPException(503, "the recogniser is busy or starting; come again", {"Retry-After": "2"}) from error
