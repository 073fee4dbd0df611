"""Data: the bundled digits, timm's data sets behind guards, and loaders whose every batch can be reproduced.

source = open_data(recipe.data)                      # DataError before the first step if anything is wrong
loaders = make_loaders(source, recipe.data, recipe.augment, data_config=..., device=..., seed=0)
for epoch in range(epochs):
    loaders.set_epoch(epoch)
    for images, targets in loaders.train: ...
"""

from __future__ import annotations

from lbc_cli.data.digits import generated_data
from lbc_cli.data.images import DataSource
from lbc_cli.data.loaders import Loader, Loaders, TrainingLoader, make_loaders
from lbc_cli.data.order import EpochSampler
from lbc_cli.data.rng import epoch_seed, seed_everything
from lbc_cli.data.sources import open_data
from lbc_cli.data.transforms import Pixels

__all__ = [
    "DataSource",
    "EpochSampler",
    "Loader",
    "Loaders",
    "Pixels",
    "TrainingLoader",
    "epoch_seed",
    "generated_data",
    "make_loaders",
    "open_data",
    "seed_everything",
]
