"""What people and programs read: tables, progress, plots, JSON. The only package that imports rich; no torch here."""

from __future__ import annotations

from lbc_cli.report.console import Console, Verbosity, format_error, print_error, print_json
from lbc_cli.report.formats import (
    format_bytes,
    format_change,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_shape,
)
from lbc_cli.report.plots import curves, run_curves
from lbc_cli.report.progress import TrainingProgress, task
from lbc_cli.report.tables import (
    format_plan,
    format_summary,
    format_train_bench,
    format_verify,
    print_plan,
    print_summary,
    print_train_bench,
    print_verify,
    table,
    train_bench_record,
)
from lbc_cli.report.views import (
    CheckedLayerView,
    CostView,
    EpochView,
    LayerView,
    PlanView,
    SkippedView,
    StepTiming,
    SummaryView,
    TrainBenchView,
    VerifyView,
    ViolationView,
)

__all__ = [
    "CheckedLayerView",
    "Console",
    "CostView",
    "EpochView",
    "LayerView",
    "PlanView",
    "SkippedView",
    "StepTiming",
    "SummaryView",
    "TrainBenchView",
    "TrainingProgress",
    "Verbosity",
    "VerifyView",
    "ViolationView",
    "curves",
    "format_bytes",
    "format_change",
    "format_count",
    "format_error",
    "format_number",
    "format_percent",
    "format_plan",
    "format_ratio",
    "format_seconds",
    "format_shape",
    "format_summary",
    "format_train_bench",
    "format_verify",
    "print_error",
    "print_json",
    "print_plan",
    "print_summary",
    "print_train_bench",
    "print_verify",
    "run_curves",
    "table",
    "task",
    "train_bench_record",
]
