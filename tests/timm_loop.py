"""Images per second of `lbc`'s loop beside a plain loop over timm's own parts: `python -m tests.timm_loop [FOLDER]`.

Both train the same dense model on the same image folder with the same augmentation, optimizer and number of loader
processes, in turns; each prints the median over the rounds. Without a folder, photographs' size of noise is generated.
The plain loop is what timm's training script does for a step, without its options: forward, loss, backward, step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2

from lbc_cli import training
from lbc_cli.engine import fit
from lbc_cli.recipe import resolve

MODEL, SIZE, BATCH, WORKERS, ROUNDS = "resnet18", 128, 32, 1, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(root: Path, count: int = 320) -> None:
    """A folder of JPEG files, 256 x 256 pixels, of two classes."""
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 32)):
        for number in range(images):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def plain(root: Path) -> float:
    """Images per second of one epoch of the plain loop."""
    dataset = create_dataset("", str(root), split="train", is_training=True, batch_size=BATCH)
    device = torch.device("cpu")
    loader: Any = create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        no_aug=False,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=WORKERS,
        use_prefetcher=False,
        persistent_workers=False,
        device=device,
    )
    model = timm.create_model(MODEL, num_classes=len(dataset.reader.class_to_idx))
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=5e-4, momentum=0.9)
    criterion = torch.nn.CrossEntropyLoss()
    seen, began = 0, time.perf_counter()
    for images, targets in loader:
        loss = criterion(model(images.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(images)
    loss.item()
    return seen / (time.perf_counter() - began)


def ours(root: Path) -> tuple[float, float]:
    """Images per second of one epoch of lbc's loop, and the share of the time spent waiting for data."""
    values = {"batch_size": BATCH, "workers": WORKERS, "image_size": SIZE, "mean": list(MEAN), "std": list(STD)}
    overrides = [f"data.{key}={value}" for key, value in values.items()]
    overrides += ["data.interpolation=bilinear", "augment.interpolation=bilinear", "train.channels_last=true"]
    overrides += ["schedule.warmup_epochs=0", "schedule.name=constant", "optimizer.lr=0.01", "train.log_every=1000"]
    flags = {"model.name": MODEL, "data.source": str(root), "method.name": "dense", "train.epochs": 1}
    job = training.prepare(resolve(overrides=overrides, flags=flags))
    parts = (job.model, job.optimizer, job.scheduler, job.pruner, job.task, job.loaders, job.settings)
    record = fit(*parts).last
    return record["images_per_second"], record["data_wait"]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {"plain loop": [], "lbc": [], "data wait": []}
    for number in range(ROUNDS + 1):
        first, (second, wait) = plain(root), ours(root)
        if number:  # the first round warms up
            for name, value in zip(rates, (first, second, wait), strict=True):
                rates[name].append(value)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{MODEL}, {SIZE} px, batch {BATCH}, {WORKERS} loader process, {ROUNDS} rounds, torch {torch.__version__}")
    print(f"plain loop {medians['plain loop']:.1f} images/s, lbc {medians['lbc']:.1f} images/s")
    ratio = medians["lbc"] / medians["plain loop"]
    print(f"ratio {ratio:.3f}, lbc waits for data {100 * medians['data wait']:.1f} % of the time")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            make_images(Path(temporary))
            main(Path(temporary))
