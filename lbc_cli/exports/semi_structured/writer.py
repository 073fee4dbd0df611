"""Writing a semi-structured file: which layers fit, and the file, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lbc_cli.errors import UsageError
from lbc_cli.exports.base import ExportedLayer, Job, Written

if TYPE_CHECKING:
    from lbc_cli.checkpoint.container import TensorInfo
    from lbc_cli.exports.cast import Caster
    from lbc_cli.exports.semi_structured.manifest import Manifest

STORED = "semi-structured 2:4"
_NATIVE = ("F16", "BF16", "I8")  # what the tensor cores take as it is


class SemiStructured:
    """See the head of the package."""

    name = "semi-structured"
    description = "2:4 layers in the layout of torch's CUTLASS back end, as plain tensors with a manifest"
    runs_on = "torch on NVIDIA GPUs (compute capability 8.0 or more); its dense weights anywhere"
    extra: str | None = None
    dtypes = ("float16", "bfloat16")

    def default_path(self, source: Path) -> Path:
        """Beside the checkpoint: NAME-semi-structured.safetensors."""
        return source.with_name(f"{source.stem}-semi-structured.safetensors")

    def write(self, job: Job, out: Path) -> Written:
        """Write the file; see `Exporter.write`."""
        from lbc_cli.exports.semi_structured.manifest import parts

        plan = _plan(job)
        if not plan.layers:
            sparse = {**job.manifest.sparse, **job.manifest.unstructured}
            whys = [f"{name}: {why}" for name, why in plan.dense.items() if name in sparse]
            told = "; ".join(whys[:3]) or "it has no sparse layers"
            raise UsageError(f"{job.source}: no layer can be stored semi-structured ({told}); try --format dense")
        if taken := sorted(parts(plan.layers) & set(job.infos)) or sorted(
            name for name in job.infos if name.endswith((".packed", ".meta"))
        ):
            raise UsageError(f"{job.source} has a tensor called {taken[0]}: names that end so are reserved here")
        manifest = _write(job, plan, out)
        return _describe(job, plan, manifest)


@dataclass(slots=True)
class _Plan:
    """What becomes of each weight."""

    cast: Caster
    layers: dict[str, TensorInfo]
    """Stored sparse: dense shape, and dtype as stored."""
    dense: dict[str, str]
    """Two or more dimensions, stored dense: why."""


def _plan(job: Job) -> _Plan:
    from lbc_cli.exports.cast import Caster

    cast = Caster.to(_dtype(job))
    infos = {name: cast.info(info) for name, info in job.infos.items()}
    groups, reasons = _of_model(job)
    whys = {
        name: _obstacle(job, name, info, groups.get(name, 1), reasons)
        for name, info in infos.items()
        if len(info.shape) > 1
    }
    open_questions = {name for name, why in whys.items() if not why and not _implies_two_of_four(job, name)}
    if open_questions:
        whys |= _violations(job, open_questions, Caster(cast.dtype))
    layers = {name: infos[name] for name, why in whys.items() if not why}
    return _Plan(cast, layers, {name: why for name, why in whys.items() if why})


def _dtype(job: Job) -> str | None:
    """What to round to: what the user says, else bfloat16 unless every sparse weight can stay as it is."""
    candidates = [*job.manifest.sparse, *job.manifest.unstructured]
    native = all(job.infos[name].dtype in _NATIVE for name in candidates)
    return job.options.dtype or (None if native else "bfloat16")


def _obstacle(job: Job, name: str, info: TensorInfo, groups: int, reasons: Mapping[str, str]) -> str:
    """Why a weight cannot be stored sparse whatever its values, "" if nothing is known."""
    from lbc_cli.exports.semi_structured.manifest import Layer

    if name not in job.manifest.sparse and name not in job.manifest.unstructured:
        return reasons.get(name, "dense in the checkpoint")
    if info.dtype not in _NATIVE:
        return f"{info.dtype}: only {', '.join(_NATIVE)} can be semi-structured"
    if 0 in info.shape:
        return "empty"
    if groups > 1:
        return f"convolution of {groups} groups: not one matrix product"
    if info.shape[1] % 4 and (len(info.shape) > 2 or name not in job.manifest.sparse):
        return f"{info.shape[1]} input channels, not a multiple of 4"
    layer = Layer(info.shape, info.dtype, None)
    if sum(part.num_bytes for part in layer.stored()) >= info.num_bytes:
        rows, columns = layer.padded
        return f"padded to {rows} x {columns} it would take no less than dense"
    return ""


def _of_model(job: Job) -> tuple[dict[str, int], dict[str, str]]:
    """What a timm model tells of its weights: groups of its grouped convolutions, and why layers are not targets."""
    from lbc_cli import models
    from lbc_cli.checkpoint.architecture import uninitialised
    from lbc_cli.patterns import Pattern
    from lbc_cli.targets import find_targets

    if job.manifest.arch is None:
        return {}, {}
    with uninitialised():
        model = models.create(job.manifest.arch, kwargs=job.manifest.kwargs)
    groups = {f"{name}.weight": getattr(module, "groups", 1) for name, module in model.named_modules()}
    commonest = max([*job.patterns.values(), "2:4"], key=[*job.patterns.values()].count)
    reasons = {skipped.name: skipped.reason for skipped in find_targets(model, Pattern.parse(commonest)).skipped}
    return {name: number for name, number in groups.items() if isinstance(number, int) and number > 1}, reasons


def _implies_two_of_four(job: Job, name: str) -> bool:
    """Whether the pattern of a layer alone says that it satisfies 2:4: 2:4, 1:4, 2:8, 1:16, ..., and 1:2."""
    entry = job.manifest.sparse.get(name)
    return entry is not None and ((entry.n <= 2 and entry.m % 4 == 0) or entry.m == 2)


def _violations(job: Job, names: set[str], cast: Caster) -> dict[str, str]:
    """Why the weights themselves do not satisfy 2:4, "" for those that do."""
    from lbc_cli.exports.semi_structured.layout import misfit, to_matrix

    found: dict[str, str] = {}
    for name, tensor in job.tensors():
        if name in names:
            first = misfit(to_matrix(cast(name, tensor)))
            pattern = job.patterns.get(name, "no pattern")
            where = "" if first is None else _place(first, tuple(tensor.shape))
            found[name] = where and f"{pattern}, but not 2:4: {where} has more than 2 of 4"
    return found


def _place(position: tuple[int, int], shape: tuple[int, ...]) -> str:
    """A group of four of the matrix in terms of the weight, "(o=3, k=(1, 2), i=8..11)"."""
    row, column = position
    k, i = divmod(column, shape[1])
    where: list[int] = []
    for size in reversed(shape[2:]):
        k, at = divmod(k, size)
        where.insert(0, at)
    return f"(o={row}, k={tuple(where)}, i={i}..{min(i + 3, shape[1] - 1)})"


def _write(job: Job, plan: _Plan, out: Path) -> Manifest:
    from lbc_cli.checkpoint.tensors import to_bytes
    from lbc_cli.exports.semi_structured.layout import encode, to_matrix
    from lbc_cli.exports.semi_structured.manifest import META, PACKED
    from lbc_cli.exports.tensor_file import tensor_file

    manifest = _manifest(job, plan)
    with tensor_file(out, manifest.infos, lambda digests: manifest.with_digests(digests).to_metadata()) as file:
        for name, tensor in job.tensors():
            weight = plan.cast(name, tensor)
            if name not in plan.layers:
                file.put(name, to_bytes(weight))
                continue
            packed, meta = encode(to_matrix(weight), manifest.layers[name].padded, name)
            file.put(name + PACKED, to_bytes(packed))
            file.put(name + META, to_bytes(meta))
    return manifest


def _manifest(job: Job, plan: _Plan) -> Manifest:
    """The manifest, without digests yet."""
    from lbc_cli.checkpoint.manifest import sha256
    from lbc_cli.exports.semi_structured.manifest import META, PACKED, Dense, Layer, Manifest

    given, patterns = job.manifest, job.patterns
    layers = {name: Layer(info.shape, info.dtype, patterns.get(name)) for name, info in plan.layers.items()}
    infos = {name: plan.cast.info(info) for name, info in job.infos.items() if name not in layers}
    for name, layer in layers.items():
        infos[name + PACKED], infos[name + META] = layer.stored()
    return Manifest(
        arch=given.arch,
        kwargs=given.kwargs,
        task=given.task,
        layers=layers,
        dense={name: Dense(why, patterns.get(name)) for name, why in plan.dense.items()},
        rounded_from=tuple(sorted({i.dtype for i in job.infos.values() if plan.cast.info(i) != i})),
        infos=infos,
        digests={},
        checkpoint={
            "sha256": sha256(given.to_json().encode()),
            "method": given.method,
            "epoch": given.epoch,
            "metrics": given.metrics,
            "recipe": given.recipe,
            "environment": given.environment,
        },
    )


def _describe(job: Job, plan: _Plan, manifest: Manifest) -> Written:
    sparse = [ExportedLayer(name, info.shape, job.patterns.get(name, ""), STORED) for name, info in plan.layers.items()]
    dense = [
        ExportedLayer(name, job.infos[name].shape, job.patterns.get(name, ""), "dense", why)
        for name, why in plan.dense.items()
    ]
    notes = list(plan.cast.notes())
    convs = [name for name, info in plan.layers.items() if len(info.shape) > 2]
    if convs:
        notes.append(
            f"{len(convs)} convolutions are stored as matrices [O, prod(K) * I], input channels innermost: multiply "
            f"them with patches in that order"
        )
    if convs and job.manifest.arch is None:
        notes.append("the checkpoint does not say which model it is: its convolutions are taken to be ungrouped")
    return Written(tuple(sparse + dense), tuple(notes), {"stored share of 2:4 layers": _share(manifest)})


def _share(manifest: Manifest) -> float:
    """Bytes of the sparse layers as stored, padding included, over their dense bytes in the same dtype."""
    stored = sum(part.num_bytes for layer in manifest.layers.values() for part in layer.stored())
    dense = sum(math.prod(layer.shape) * (1 if layer.dtype == "I8" else 2) for layer in manifest.layers.values())
    return stored / dense


EXPORTER = SemiStructured()
