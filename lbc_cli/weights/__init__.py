"""Weights from anywhere: files read without running any code in them, as dense tensors under clean names.

    base         what reading gives
    containers   which kind of file it is: plain (any safetensors), pickles (.pth, .pt, .bin, .tar), folders (timm's)
    names        prefixes that wrappers leave behind
    layouts      how the tensors encode sparse weights: authors, bitmask, asp
    models       a timm model around them
    conversion   weights that hold N:M already, ready to be packed

No pickle is read but through `torch.load(weights_only=True)`, and what that refuses is refused.
"""

from __future__ import annotations

from lbc_cli.weights.base import Weights
from lbc_cli.weights.containers import read
from lbc_cli.weights.layouts import LAYOUTS, Layout
from lbc_cli.weights.models import create, load

__all__ = ["LAYOUTS", "Layout", "Weights", "create", "load", "read"]
