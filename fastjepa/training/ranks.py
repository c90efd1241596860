"""The processes that train together: who this one is, and what they say to one another."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastjepa.objective import IJEPA

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
PATIENCE = 1800  # seconds for the first process to answer, as torch's process groups wait


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes: its number among all, and among those of its node."""

    rank: int = 0
    world: int = 1
    local: int = 0
    address: str = ""
    port: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """As torchrun or SLURM's srun have set it; a single process where neither has.

        Raises:
            ValueError: some of the variables are set and others are not, or one is no number; names it. Nothing falls
                back to a single process in silence.

        >>> Ranks.from_environment({}).world
        1
        """
        if any(name in environment for name in TORCHRUN[:3]):
            _require(environment, TORCHRUN, "torchrun sets all of them")
            rank, world, local = (_number(environment, name) for name in TORCHRUN[:3])
            return cls(rank, world, local, environment["MASTER_ADDR"], _number(environment, "MASTER_PORT"))
        if int(environment.get("SLURM_NTASKS") or 1) == 1:
            return cls()
        _require(environment, SLURM, "start with srun, which sets them for each task")
        if "SLURM_STEP_NODELIST" not in environment and "MASTER_ADDR" not in environment:
            raise ValueError(
                f"SLURM_NTASKS is {environment['SLURM_NTASKS']}, but SLURM_STEP_NODELIST is not set: start each task "
                "with srun, or one process with `env -u SLURM_NTASKS`"
            )
        rank, world, local = (_number(environment, name) for name in SLURM)
        address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = environment.get("MASTER_PORT") or str(20000 + int(environment.get("SLURM_JOB_ID") or 0) % 20000)
        return cls(rank, world, local, address, _number({"MASTER_PORT": port}, "MASTER_PORT"))

    def wrap(self, model: nn.Module, compress: bool = False, parts: int = 1) -> nn.Module:
        """The model as it is called: one whose gradients are averaged over the processes as backward makes them.

        `compress`: they are sent as bf16. `parts`: of a batch, whose gradients are sent together.
        """
        if self.world == 1:
            return model
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=parts == 1)
        if compress:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def sends(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of a batch: gradients are sent with the last one."""
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def shard(self, model: IJEPA, device: torch.device, bf16: bool = False, compress: bool = False) -> nn.Module:
        """The model as it is called: divided in place among all processes by `fully_shard`, block by block.

        Each process keeps its part of every parameter, and gathers those of a block as the block runs. The target
        encoder is divided as the encoder is, so that its moving average needs nothing of others. Positions, which take
        no gradient, stay whole, as wide as they are.

        `bf16`: weights are gathered in it; activations are left to autocast. `compress`: gradients are sent as bf16.

        Source: Zhao et al. 2023 (arXiv 2304.11277).
        """
        from torch.distributed.device_mesh import init_device_mesh  # which takes a while to import
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        weights, gradients = torch.bfloat16 if bf16 else None, torch.bfloat16 if compress else torch.float32
        policy = MixedPrecisionPolicy(weights, gradients, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (self.world,))
        encoder, predictor, target = model.encoder, model.predictor, model.target_encoder
        positions: set[nn.Parameter] = {encoder.pos_embed, predictor.predictor_pos_embed, target.pos_embed}
        # The target encoder can be called alone. What the other two have beside their blocks belongs to the whole
        # model: they give `Ragged`, in which FSDP would not find the tensors whose gradients it waits for.
        for module in (*encoder.blocks, *predictor.predictor_blocks, *target.blocks, target, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=positions)
        return model

    def share(self, tokens: int, device: torch.device) -> Tensor | float:
        """What part of all processes' target tokens these `tokens` are; known on the device alone."""
        if self.world == 1:
            return 1.0
        mine = torch.full((), float(tokens), device=device)
        return mine / self.total(mine.clone())

    def of_each(self, number: int, device: torch.device) -> list[int]:
        """Every process's number, in their order, on all of them."""
        numbers = torch.zeros(self.world, dtype=torch.int64, device=device)
        numbers[self.rank] = number
        return self.total(numbers).tolist()

    def leader_says(self, yes: bool, device: torch.device) -> bool:
        """What the leader has said here, for what all must do alike and only their own clocks tell."""
        return bool(self.total(torch.full((), float(yes and self.leads), device=device)))

    @property
    def leads(self) -> bool:
        """Whether this process writes for all."""
        return self.rank == 0

    def device(self, name: torch.device) -> torch.device:
        """This process's own of a kind of devices.

        Raises:
            ValueError: fewer of them than processes on this node.
        """
        if name.type != "cuda" or self.world == 1:
            return name
        if self.local >= torch.cuda.device_count():
            raise ValueError(
                f"this node has {torch.cuda.device_count()} GPUs and a process for number {self.local}; start one "
                "process a GPU (torchrun --nproc-per-node)"
            )
        return torch.device("cuda", self.local)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Within, the processes can talk to one another; nothing to do for a single one."""
        if self.world == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        already = dist.is_initialized()
        if not already:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=self._store(),
                rank=self.rank,
                world_size=self.world,
                device_id=device if device.type == "cuda" else None,
            )
        try:
            yield
        finally:
            if not already:
                dist.destroy_process_group()

    def _store(self) -> Store:
        """Where the processes leave their addresses for one another, with nothing in it from processes before.

        torchrun hands those that it starts anew the store of those that died, addresses and all. So the first of us
        names a new part of it, and each other one takes a name only once the first has answered to it.
        """
        url = "env://" if "RANK" in os.environ else f"tcp://{self.address}:{self.port}"
        store, *_ = next(rendezvous(url, self.rank, self.world))
        me = uuid.uuid4().hex
        if self.rank == 0:
            store.set("fastjepa", me)
            for rank in range(1, self.world):
                store.set(f"{me}/{store.get(f'{me}/{rank}').decode()}", "heard")
            return PrefixStore(me, store)
        for _ in range(PATIENCE):
            first = store.get("fastjepa").decode()
            store.set(f"{first}/{self.rank}", me)
            try:
                store.wait([f"{first}/{me}"], timedelta(seconds=1))
            except dist.DistStoreError:  # of a process that is no more
                continue
            return PrefixStore(first, store)
        raise TimeoutError(f"process 0 of {self.world} has not answered process {self.rank} for {PATIENCE} s")

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


ALONE = Ranks()


def first_host(nodes: str) -> str:
    """The first name of SLURM's short form of a list of nodes.

    >>> first_host("node[07-08,12],other3"), first_host("alone"), first_host("a1,a2")
    ('node07', 'alone', 'a1')
    """
    found = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?([^,]*)", nodes)
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no node")
    return found.group(1) + (found.group(2) or "")


def _require(environment: Mapping[str, str], names: tuple[str, ...], hint: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        there = [name for name in names if environment.get(name)]
        raise ValueError(f"{', '.join(there)} set but not {', '.join(missing)}: {hint}")


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdigit():
        raise ValueError(f"{name} must be a number, got {environment[name]!r}")
    return int(environment[name])
