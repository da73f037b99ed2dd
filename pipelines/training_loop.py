"""What one Ray Train worker does: its part of every batch, the network, checkpoints.

Frozen normalisations are folded into their convolutions (smearline/frozen_norm.py).
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import ray.train
import torch
from numpy.typing import NDArray
from ray.train.torch import get_device, prepare_model
from timm.optim import param_groups_weight_decay
from torch import Tensor

from smearline import augmentation, frozen_norm, reader, settings
from smearline.initial_weights import load_initial_weights
from smearline.recogniser import characteristics_loss, label_set_loss, of_settings

STATE_FILE = "state.pt"


class _Batch(NamedTuple):
    """One worker's part of a batch, and what it must know of the whole."""

    crops: Tensor
    allowed: Tensor
    values: Tensor
    num_labelled: Tensor  # of the whole batch, divided by the workers, whose gradients are averaged
    num_labelled_K: Tensor
    draws: augmentation.Draws
    dropped: Tensor

    def part(self, number: int, parts: int) -> Self:
        """Every `parts`-th image from `number` on: its losses add up to the whole's over all numbers."""
        cut = {name: getattr(self, name)[number::parts] for name in ("crops", "allowed", "values", "dropped")}
        return self._replace(**cut, draws=self.draws.cut(number, parts, self.crops.device))


class _Run:
    """What one worker holds: its part of every batch, and the network."""

    def __init__(self, config: dict[str, Any]) -> None:
        params = settings.check(config["settings"], "train_loop_config")
        self.params, self.train, self.files = params, params.train, str(config["files"])
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(self.train.threads_per_worker)
        torch.manual_seed(self.train.seed)
        self.device = get_device()
        frame = pd.read_parquet(config["cells"]).astype(object)
        frame = frame.where(frame.notna(), None)
        types = tuple(config["types"])
        characteristics = {k: tuple(v) for k, v in config["characteristics"].items()}
        network = of_settings(params, types, characteristics)
        load_initial_weights(network, params.model.weights)
        self.slices = list(network.slices().values())
        if params.model.frozen_batch_norm:
            frozen_norm.fold(network.backbone, torch.rand(1, 3, params.image.size_px, params.image.size_px))
        self.plain = network.to(memory_format=torch.channels_last)
        self.network: Any = prepare_model(self.plain)  # the same weights, on the device and shared among the workers
        if self.train.compile:
            self.network = torch.compile(self.network)

        image = params.image
        train, self.train_targets = _labelled(frame[frame["split"] == "train"], types, characteristics)
        val, self.val_targets = _labelled(frame[frame["split"] == "val"], types, characteristics)
        threads = self.train.threads_per_worker
        wide = round(image.size_px * image.margin)
        self.train_crops = reader.Crops(train, image.field_um * wide / image.size_px, wide, threads)
        self.val_crops = reader.Crops(val, image.field_um, image.size_px, threads)
        self.weights = reader.drawing_weights(train, self.train.balance)
        self.steps = max(1, len(train) // self.train.batch_size)
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(self.plain, self.train.weight_decay),
            lr=self.train.lr,
            fused=self.device.type == "cuda",
        )
        total = self.train.epochs * self.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warmup_cosine(total, self.train.warmup))

    def batches(self, epoch: int, first: int) -> Iterator[_Batch]:
        """This rank's part of every batch from step `first` on; the next ones are read meanwhile.

        All that is random is drawn for the whole batch, and the losses are divided by the labels of the whole batch, so
        that any number of workers takes the same steps.
        """
        size = self.train.batch_size
        order = reader.epoch_order(self.train_crops.groups, self.weights, self.steps * size, self.train.seed, epoch)
        order = order.reshape(self.steps, size)
        mine = order[:, self.rank :: self.workers]
        read = self.train_crops.batches(mine.ravel(), mine.shape[1], first)
        for step, crops in enumerate(read, first):
            allowed, values = (torch.from_numpy(t[mine[step]]).to(self.device) for t in self.train_targets)
            whole_allowed, whole_values = (t[order[step]] for t in self.train_targets)
            labelled = [whole_allowed.any(axis=1).sum(), *(whole_values >= 0).sum(axis=0)]
            divisors = torch.tensor(np.maximum(labelled, 1) / self.workers, dtype=torch.float32).to(self.device)
            draws = augmentation.Draws.of(size, self.train.seed, epoch * self.steps + step)
            dropped = self.plain.dropout(size, draws.generator)[self.rank :: self.workers]
            yield _Batch(
                torch.from_numpy(crops).to(self.device),
                allowed,
                values,
                divisors[0],
                divisors[1:],
                draws.cut(self.rank, self.workers, self.device),
                dropped.to(self.device),
            )

    def say(self, text: str) -> None:
        """A line of progress, by the first worker alone."""
        if self.rank == 0:
            self._write("progress", text)

    def told_to_stop(self, row: dict[str, float]) -> bool:
        """Tell the driver an epoch's figures; whether it wants no more of them. The same for all ranks."""
        if self.rank == 0:
            self._write("rows", json.dumps(row))
        answer = [Path(f"{self.files}.stop").exists()]
        if self.workers > 1:
            torch.distributed.broadcast_object_list(answer)
        return answer[0]

    def _write(self, kind: str, line: str) -> None:
        with Path(f"{self.files}.{kind}").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def epoch(self, epoch: int, losses: list[float], save: Callable[[list[float]], None]) -> float:
        """Train one epoch, less the steps whose losses are given; `save` is called every `checkpoint_steps`.

        Returns the mean loss of the whole batches.
        """
        self.network.train()
        if self.params.model.frozen_batch_norm:
            freeze_batch_norm(self.network)
        losses, new, said = [*losses], list[Tensor](), time.monotonic()
        every = self.train.checkpoint_steps

        def of_the_whole() -> list[float]:
            """The losses so far. A rank divides by the labels of the whole batch, cut by the workers: their mean is its."""
            if new:
                mean = torch.stack(new)
                if self.workers > 1:
                    torch.distributed.all_reduce(mean)
                losses.extend((mean / self.workers).tolist())
                new.clear()
            return losses

        for step, batch in enumerate(self.batches(epoch, len(losses)), len(losses)):
            new.append(self._step(batch))
            if every and (step + 1) % every == 0 and step + 1 < self.steps:
                save(of_the_whole())
            if time.monotonic() - said > 20:
                said = time.monotonic()
                loss = np.mean([*losses, *(float(one) for one in new)])
                self.say(f"  epoch {epoch + 1}: {step + 1}/{self.steps} batches, loss {loss:.3f}")
        return float(np.mean(of_the_whole()))

    def _step(self, batch: _Batch) -> Tensor:
        """One step of the optimizer, over `accumulate` parts of the batch; the batch's loss."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.train.accumulate
        losses = []
        for number in range(parts):
            part = batch.part(number, parts)
            image = self.params.image
            images = augmentation.augment(part.crops, part.draws, image.size_px, image.margin, self.train.stain_jitter)
            images = images.contiguous(memory_format=torch.channels_last)
            alone = number + 1 < parts and hasattr(self.network, "no_sync")  # the ranks meet at the last part
            with self.network.no_sync() if alone else nullcontext():
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                    type_logits, value_logits, _ = self.network(images, part.dropped)
                loss = label_set_loss(type_logits, part.allowed, part.num_labelled)
                more = characteristics_loss(value_logits, part.values, self.slices, part.num_labelled_K)
                loss = loss + self.train.characteristics_weight * more
                loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        return torch.stack(losses).sum()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Loss, accuracy, balanced accuracy and fitted temperature on the validation cells."""
        self.plain.eval()
        if not (num_cells := len(self.val_targets[0])):
            return {"temperature": 1.0}
        mine = np.arange(num_cells)[self.rank :: self.workers]
        parts = []
        for read in self.val_crops.batches(mine, 64):
            crops = torch.from_numpy(read).to(self.device)
            parts.append(self.plain(crops.permute(0, 3, 1, 2).float() / 255.0)[0].float().cpu())
        own = torch.cat(parts) if parts else torch.zeros(0, len(self.plain.types))
        gathered: list[Any] = [None] * self.workers
        if self.workers > 1:
            torch.distributed.all_gather_object(gathered, (mine, own))
        else:
            gathered = [(mine, own)]
        logits = torch.empty(num_cells, own.shape[1])
        for positions, values in gathered:
            logits[torch.from_numpy(positions)] = values
        return _validation_figures(logits, torch.from_numpy(self.val_targets[0]))

    def save(self, row: dict[str, float], epoch: int, losses: list[float], history: list[dict[str, float]]) -> None:
        """Report a checkpoint: `epoch` is the one to go on with, after the steps that these losses are of.

        Written by the first rank and uploaded meanwhile; the one before is registered first, so that at most what came
        since the last but one is trained again.
        """
        ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
        made = None
        if self.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix=f"{Path(self.files).name}.", dir=Path(self.files).parent))
            torch.save(self.state(epoch, losses, history), folder / STATE_FILE)
            made = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            row,
            checkpoint=made,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def state(self, epoch: int, losses: list[float], history: list[dict[str, float]]) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "losses": losses,
            "history": history,
            "network": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.plain.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])


def train_loop(config: dict[str, Any]) -> None:
    run = _Run(config)
    history: list[dict[str, float]] = []
    losses: list[float] = []
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        run.restore(saved)
        first, losses, history = saved["epoch"], saved["losses"], saved["history"]
        run.say(f"resumed after epoch {first}" + (f" and {len(losses)} batches" if losses else ""))
    for epoch in range(first, run.train.epochs):

        def within(done: list[float], epoch: int = epoch) -> None:
            run.save({"epoch": float(epoch)}, epoch, done, history)  # noqa: B023 - called before history changes

        loss = run.epoch(epoch, losses, within)
        losses = []
        row = {"epoch": float(epoch + 1), "train_loss": round(loss, 6), **run.validate()}
        history = [*history, row]
        run.save(row, epoch + 1, losses, history)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "epoch")
        run.say(f"epoch {epoch + 1}/{run.train.epochs}: {figures}")
        if run.told_to_stop(row):
            break
    # Registered, not only reported: the run ends with its last checkpoint.
    ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)


def _labelled(
    part: pd.DataFrame, types: tuple[str, ...], characteristics: dict[str, tuple[str, ...]]
) -> tuple[pd.DataFrame, tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """The cells that teach a type (undisputed) or a characteristic, and their targets."""
    allowed, values = reader.targets(part, types, characteristics)
    useful = (allowed.any(axis=1) | (values >= 0).any(axis=1)) & ~part["conflicted"].to_numpy(bool)
    return part[useful].reset_index(drop=True), (allowed[useful], values[useful])


def freeze_batch_norm(network: torch.nn.Module) -> None:
    """Normalise by the running statistics, as in service, and leave them as they are; scale and bias still learn.

    Statistics of the batch carry the laboratory's colours (Tsutsui 2023, arXiv 2303.01777); and without them a batch
    cut among several workers gives the same gradient as the whole.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def _warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (step - rising) / max(1, total - rising)))))

    return factor


def _validation_figures(logits: Tensor, allowed: Tensor) -> dict[str, float]:
    labelled = allowed.any(dim=1)
    logits, allowed = logits[labelled].double(), allowed[labelled]
    if not len(logits):
        return {"temperature": 1.0}
    right = allowed.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
    kinds = pd.factorize(pd.Series([bytes(row) for row in allowed.numpy()]))[0]
    balanced = float(pd.Series(right.numpy().astype(float)).groupby(kinds).mean().mean())
    grid = np.exp(np.linspace(np.log(0.3), np.log(3.0), 60))
    losses = [float(label_set_loss(logits / t, allowed)) for t in grid]
    return {
        "val_loss": round(float(label_set_loss(logits, allowed)), 6),
        "val_accuracy": round(float(right.double().mean()), 6),
        "val_balanced_accuracy": round(balanced, 6),
        "temperature": round(float(grid[int(np.argmin(losses))]), 6),
    }
