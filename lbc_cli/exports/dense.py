"""The format `dense`: one safetensors file with the model's plain state-dict keys, zeros written out.

Tensors are streamed: only one is in memory at a time. The bytes depend on nothing but the weights.
"""

from __future__ import annotations

from pathlib import Path

from lbc_cli.exports.base import ExportedLayer, Job, Written


class Dense:
    """See the head of this module."""

    name = "dense"
    description = "one safetensors file, plain keys, zeros written out"
    runs_on = "anything that reads safetensors"
    extra: str | None = None
    dtypes = ("float32", "float16", "bfloat16")

    def default_path(self, source: Path) -> Path:
        """Beside the checkpoint: NAME-dense.safetensors."""
        return source.with_name(f"{source.stem}-dense.safetensors")

    def write(self, job: Job, out: Path) -> Written:
        """Write the file; see `Exporter.write`."""
        return write_dense(job, out)


def write_dense(job: Job, path: Path) -> Written:
    """Write every tensor of a checkpoint densely under its own name.

    Raises:
        UsageError: if a weight overflows in the dtype asked for.
    """
    from lbc_cli.checkpoint.tensors import to_bytes
    from lbc_cli.exports.cast import Caster
    from lbc_cli.exports.tensor_file import tensor_file

    cast = Caster.to(job.options.dtype)
    infos = {name: cast.info(info) for name, info in job.infos.items()}
    with tensor_file(path, infos, lambda digests: {"format": "pt"}) as file:
        for name, tensor in job.tensors():
            file.put(name, to_bytes(cast(name, tensor)))
    layers = tuple(
        ExportedLayer(name, job.infos[name].shape, pattern, "dense") for name, pattern in job.patterns.items()
    )
    return Written(layers, cast.notes())


EXPORTER = Dense()
