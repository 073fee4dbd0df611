"""`lbc prune` and `lbc convert`: from a model or a weight file to a packed, verified checkpoint, without training.

    start = from_name("resnet50", weights="pretrained")     or from_file("dense.safetensors")
    outcome = prune(start, pattern="2:4", out="sparse.safetensors")
    outcome = prune(start, pattern="2:4", out="sparse.safetensors", method="sparsegpt", data="/imagenet")
    outcome = convert("apex.pth", model="resnet50", pattern="2:4", out="packed.safetensors")

Pruning decides which weights stay; converting takes weights that hold N:M already as they are.

    starts      models with weights of a choice          scores      the methods by name: one line each
    pruning     `lbc prune`, step by step                taylor      (w dL/dw)^2
    converting  `lbc convert`                            wanda       |w| times the norm of its input
    writing     save, verify, report                     sparsegpt   second order, with updates of what stays
    outcome     what there is to report                  inputs      what layers are multiplied by
    images      calibration and evaluation images        batchnorm   new statistics after pruning
    choice      what the methods share
"""

from __future__ import annotations

from lbc_cli.oneshot.converting import convert
from lbc_cli.oneshot.outcome import Calibrated, Measured, Outcome, PrunedLayer
from lbc_cli.oneshot.pruning import CALIBRATION, Request, prune
from lbc_cli.oneshot.scores import SCORES, Score, find_score
from lbc_cli.oneshot.starts import PRETRAINED, RANDOM, Start, from_file, from_name

__all__ = [
    "CALIBRATION",
    "PRETRAINED",
    "RANDOM",
    "SCORES",
    "Calibrated",
    "Measured",
    "Outcome",
    "PrunedLayer",
    "Request",
    "Score",
    "Start",
    "convert",
    "find_score",
    "from_file",
    "from_name",
    "prune",
]
