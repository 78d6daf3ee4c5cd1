"""One of two processes of a contrastive loss: `python contrastive_process.py PORT FOLDER RANK`."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from persona.training.objectives import contrastive_loss

LABELS = torch.tensor([0, 1, 2, 1, 3, 0])
ENDS = (3, 4, 6)
"""How many of the six pairs the first process has."""


def rows(seed, n=6, d=8):
    torch.manual_seed(seed)
    return normalize(torch.randn(n, d), dim=-1)


def main(port, folder, rank):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = []
    for end in ENDS:
        weight = torch.eye(8).requires_grad_()
        own = slice(end) if rank == 0 else slice(end, None)
        users = normalize(rows(0)[own] @ weight, dim=-1)
        loss = contrastive_loss(users, rows(1)[own], LABELS[own])
        loss.backward()
        dist.all_reduce(weight.grad)
        found.append((loss.detach(), weight.grad / 2))  # the mean that DDP takes
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
