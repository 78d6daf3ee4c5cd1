"""Training in several processes, started by `accelerate launch` or `torchrun`: what they share and agree on.

A run of several processes takes the steps that one process would have taken: each has its share of every batch, and
means are over the items of all. With one process all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from persona.errors import PersonaError
from persona.training.hardware import precision


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is one of those that were started together, with a GPU of its own where there are any."""
    from accelerate import PartialState

    PartialState(cpu=precision()["use_cpu"])
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this one is; number 0 is the one that writes."""
    return dist.get_rank() if process_count() > 1 else 0


def own_share(batch: int) -> int:
    """How much of a batch each process has. Raises `PersonaError` where it cannot be divided."""
    share, rest = divmod(batch, process_count())
    if rest or not share:
        raise PersonaError(
            f"training.histories_per_step is {batch}, which {process_count()} processes cannot share evenly: "
            "change it, or the number of processes"
        )
    return share


def check_one_process(what: str) -> None:
    """Raises `PersonaError` where several processes were started for something that is done by one."""
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PersonaError(f"{what} is done by one process: start it without accelerate launch or torchrun")


def of_first(number: int, device: torch.device) -> int:
    """The number that process 0 has, in all of them."""
    if process_count() == 1:
        return number
    held = torch.tensor(number, device=device)
    dist.broadcast(held, 0)
    return int(held)


def mean_weight(count: torch.Tensor) -> torch.Tensor | float:
    """What to multiply a mean over `count` items of this process by: the mean over processes, which DDP takes of their
    gradients, is then the mean over all items."""
    if process_count() == 1:
        return 1.0
    total = count.clone()
    dist.all_reduce(total)
    return count * process_count() / total.clamp(min=1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives the gradients of all processes' mean, as DDP does, to parameters of which each process has its own copy."""
    parameters = list(parameters)
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.long, device=parameters[0].device)
    dist.all_reduce(used)
    averaged = [p for p, count in zip(parameters, used.tolist()) if count]
    for parameter in averaged:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in averaged])
    dist.all_reduce(flat)
    for parameter, mean in zip(averaged, (flat / process_count()).split([p.numel() for p in averaged])):
        parameter.grad.copy_(mean.view_as(parameter))


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, as many as each has, in order of the processes; those given where there is one process.

    Every process can so compute the loss of the whole batch. Only its own rows have gradients, multiplied by the number
    of processes: the mean over processes, which DDP takes, is then the true gradient.
    """
    if process_count() == 1:
        return rows
    sizes = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(process_count())]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    padded = rows.new_zeros(int(max(sizes)), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    parts = [part[: int(size)] for part, size in zip(parts, sizes)]
    own = rows.view_as(rows)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * len(sizes))
    parts[process_number()] = own
    return torch.cat(parts)
