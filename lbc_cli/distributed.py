"""Training on several processes: who they are, what they add up, and that they agree.

torchrun (or srun) starts the processes, and torch's DistributedDataParallel averages their gradients. Masks and scores
need no traffic of their own: they follow from the averaged gradients, which are the same bits on every rank. What is
left is here: the launch, sums and flags over all ranks, and the comparison that stops a run whose ranks have parted.

`launch` reads the environment and loads no torch; `session` joins the processes; a `World` is what the rest of lbc
sees, and `ALONE` is that of a process on its own, whose every operation is the identity.

The small exchanges go over gloo and the CPU, beside the gradients' own backend, so that none of them waits for a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lbc_cli.errors import DistributedError, LbcError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Gradients: a rank that hangs is given up after this. The small exchanges wait longer, for rank 0 may be at work alone:
# decoding every image of ImageNet takes an hour.
_PATIENCE = timedelta(minutes=10)
_LONG_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher says of this process.

    Attributes:
        rank: of the process among all, from 0.
        size: how many processes there are.
        local_rank: among those of this machine; chooses the GPU.
        address: where rank 0 listens.
        port: likewise.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: str


def launch(environ: Mapping[str, str] | None = None) -> Launch | None:
    """How this process was launched; None for a process on its own.

    torchrun's RANK and WORLD_SIZE count first. Under srun, and only there, SLURM's numbers do: a batch script that runs
    `lbc` without srun is one process, whatever SLURM_NTASKS says.

    Raises:
        UsageError: for numbers that make no sense, or a launch that does not say where rank 0 is.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = [env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", "0")]
        address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    elif _under_srun(env):
        found = [env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env.get("SLURM_LOCALID", "0")]
        address = env.get("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", ""))
        # Two jobs on one node must not meet: their numbers differ.
        job = env.get("SLURM_JOB_ID", "0")
        port = env.get("MASTER_PORT", str(20000 + int(job) % 10000) if job.isdecimal() else "")
    else:
        return None
    try:
        rank, size, local = (int(text) for text in found)
    except ValueError:
        raise UsageError(
            f"RANK, WORLD_SIZE, LOCAL_RANK = {', '.join(found)}: they must be integers; start with torchrun"
        ) from None
    if not 0 <= rank < size or local < 0:
        raise UsageError(f"RANK = {rank} of WORLD_SIZE = {size}: a rank lies between 0 and the size; use torchrun")
    if size == 1:
        return None
    if not address or not port:
        raise UsageError(
            f"WORLD_SIZE = {size}, but MASTER_ADDR and MASTER_PORT do not say where rank 0 is: start with torchrun, or "
            "set them to the first node's address and a free port"
        )
    return Launch(rank, size, local, address, port)


def _under_srun(env: Mapping[str, str]) -> bool:
    step = "SLURM_STEP_ID" in env or "SLURM_STEPID" in env
    return step and "SLURM_PROCID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1"


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: among those of this machine.
        control: gloo group for small exchanges on the CPU; None for a process on its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that talks and writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of a CPU or GPU tensor over all ranks, in float64 on the CPU."""
        return self._reduced(values, "SUM")

    def largest(self, value: float) -> float:
        """The largest of a number over all ranks."""
        if self.size == 1:
            return value
        import torch

        return float(self._reduced(torch.tensor([value]), "MAX"))

    def gather(self, value: float) -> list[float]:
        """The number of every rank, in their order."""
        if self.size == 1:
            return [value]
        import torch

        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        return [float(found) for found in self._reduced(values, "SUM")]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is raised on any rank; all in one exchange."""
        if self.size == 1:
            return flags
        import torch

        return tuple(bool(found) for found in self._reduced(torch.tensor(flags), "MAX"))

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        summed = values.detach().double().cpu()
        if self.size == 1:
            return summed
        import torch.distributed as dist

        summed = summed.clone()
        with _lost("adding up over all ranks"):
            dist.all_reduce(summed, op=getattr(dist.ReduceOp, how), group=self.control)
        return summed

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON must know, on every rank."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode() if self.main else b""
        length = torch.tensor([len(text)])
        with _lost("hearing from rank 0"):
            dist.broadcast(length, src=0, group=self.control)
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.main else None
            content = torch.empty(int(length), dtype=torch.uint8) if content is None else content
            dist.broadcast(content, src=0, group=self.control)
        return json.loads(bytes(content.numpy()))

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any(False)

    def take_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers, such as the statistics of batch norms.

        DDP does so before every training pass; what the last pass changed differs until then.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        with _lost("taking over rank 0's buffers"):
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def agree(self, digest: str, what: str) -> None:
        """Stop unless every rank has the same digest.

        Args:
            digest: hexadecimal.
            what: it is of, for the message.

        Raises:
            DistributedError: on every rank, naming those that differ from rank 0.
        """
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _lost(f"comparing {what}"):
            dist.all_gather(found, mine, group=self.control)
        others = [rank for rank, theirs in enumerate(found) if not torch.equal(theirs, found[0])]
        if others:
            raise DistributedError(
                f"{what} differ between the ranks: {', '.join(map(str, others))} of {self.size} are not as rank 0's. "
                "All ranks must see the same gradients, from the same versions on the same kind of device; stopped "
                "before training went on with them"
            )


ALONE = World()


@contextlib.contextmanager
def _lost(doing: str) -> Iterator[None]:
    """A rank that has gone shows as an error of the connection on the others."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DistributedError(f"another rank was lost while {doing}: {reason[:200]}; see its own output") from error


@contextlib.contextmanager
def session(launched: Launch | None, device: str = "auto") -> Iterator[World]:
    """Join the processes of a launch, and leave them at the end.

    Args:
        launched: from `launch`; None is a process on its own.
        device: the recipe's train.device, which chooses NCCL for GPUs and gloo for CPUs.

    Raises:
        DistributedError: if the others cannot be reached.
    """
    if launched is None:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(_gpu(launched.local_rank))
    where = f"tcp://{launched.address}:{launched.port}"
    os.environ.setdefault("MASTER_ADDR", launched.address)
    os.environ.setdefault("MASTER_PORT", launched.port)
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo", rank=launched.rank, world_size=launched.size, timeout=_PATIENCE
        )
        control = dist.new_group(backend="gloo", timeout=_LONG_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DistributedError(
            f"rank {launched.rank} cannot join {launched.size} ranks at {where}: {reason}"
        ) from error
    world = World(launched.rank, launched.size, launched.local_rank, control)
    try:
        yield world
    except LbcError as error:
        # After an error on one rank the others may be gone: taking leave of them could wait for ever.
        if error.exit_code == 130:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _gpu(local_rank: int) -> int:
    import torch

    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"local rank {local_rank}, but this machine has {count} GPUs: give torchrun --nproc-per-node {count}"
        )
    return local_rank


def rank_device(name: str, world: World) -> torch.device | None:
    """The GPU of a rank, or None where the device's name alone decides.

    Raises:
        UsageError: for a numbered GPU in a run of several ranks, which would all take it.
    """
    import torch

    if world.size == 1:
        return None
    if name.startswith("cuda:"):
        raise UsageError(f"train.device = {name!r} with {world.size} ranks: write cuda, each rank takes its own GPU")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", _gpu(world.local_rank))
    return torch.device("cpu")
