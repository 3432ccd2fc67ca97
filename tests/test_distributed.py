"""Data-parallel training with two processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Each rank trains on its half of a batch, and compares with the whole batch in one process.
TRAIN = """
import copy, sys, torch, torch.distributed as dist, torch.nn as nn, dgrad
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP

kind, device = sys.argv[1:]
dist.init_process_group("gloo" if device == "cpu" else "nccl")
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank)
place = torch.device(device, rank if device == "cuda" else None)
torch.manual_seed(0)
single = nn.Sequential(
    nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, (3, 5), padding=(1, 2)),
).to(place, torch.float64)
model = copy.deepcopy(single)
assert dgrad.convert(model) == ["0", "2"]
parallel = DDP(model) if kind == "ddp" else FSDP(model, use_orig_params=True, device_id=place)
optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (single, parallel)]
for step in range(4):
    # Ranks meet the sizes in another order.
    sizes = [(6, 7), (5, 5)]
    if rank % 2:
        sizes.reverse()
    batches = {size: torch.randn(2 * world, 4, *size, dtype=torch.float64).to(place)
               for size in sorted(sizes)}
    for m, optimizer in zip((single, parallel), optimizers):
        optimizer.zero_grad()
        own = slice(None) if m is single else slice(2 * rank, 2 * rank + 2)
        loss = sum(m(batches[size][own]).square().mean() for size in sizes)
        loss.backward()
        optimizer.step()
probe = torch.ones(2, 4, 5, 5, dtype=torch.float64, device=place)
torch.testing.assert_close(parallel(probe), single(probe))
assert device == "cpu" or dgrad.selections(), "dgrad ran nothing"
dist.destroy_process_group()
"""


def train(tmp_path: Path, kind: str, device: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(script), kind, device],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "DGRAD_STORE": str(tmp_path / "store"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_on_the_cpu(tmp_path: Path, kind: str) -> None:
    train(tmp_path, kind, "cpu")


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.seconds(20)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(tmp_path: Path, kind: str) -> None:
    train(tmp_path, kind, "cuda")
