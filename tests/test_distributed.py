"""Data-parallel training with two processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgrad import _loader

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch without distributed"
)
KINDS = [
    "ddp",
    "ddp-static",
    "fsdp",
    pytest.param(
        "fsdp2",
        marks=pytest.mark.skipif(
            torch.__version__ < "2.6", reason="PyTorch has no fully_shard there yet"
        ),
    ),
]

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
if kind.startswith("ddp"):
    parallel = DDP(model, static_graph=kind == "ddp-static")
elif kind == "fsdp":
    parallel = FSDP(model, use_orig_params=True, device_id=place)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (world,))
    for part in (model[0], model):  # a layer of its own, and what is left
        parallel = fully_shard(part, mesh=mesh)
    assert isinstance(model[0], dgrad.ConvTranspose2d)
optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (single, parallel)]
batch = torch.randn(2, 4, 6, 7, dtype=torch.float64).to(place)
dgrad.warm_up(parallel, batch)
if kind == "fsdp":
    dgrad.warm_up(lambda x: parallel(x), batch)
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
"""


# Each rank meets the same problems, in another order; what they would time is pretended.
SHARE = """
import json, sys
from pathlib import Path

import pytest, torch.distributed as dist
from claims import select, slow_times
from fake_cudnn import FakeEngine, FakeResult, StoredCore, X, compute, real_problem
from fake_device import pretend_name

dist.init_process_group("gloo")
patch = pytest.MonkeyPatch()
pretend_name(patch)
core = StoredCore(FakeResult("ALGO_1", "FMA_MATH"))
core.engines = {"convolution": [FakeEngine("eng1"), FakeEngine("eng2")]}
core.begin(patch)
compute(core, X)
folder = Path(sys.argv[1])
slow_times(core, patch, folder / "measured", 0.1)
sizes = [3, 4, 5, 6, 7]
if dist.get_rank():
    sizes.reverse()
dist.barrier()
sources = {size: select(real_problem(size)).source for size in sizes}
(folder / f"{dist.get_rank()}.json").write_text(json.dumps(sources))
"""

# gloo may abort a rank whose peer is gone while it still receives. A thread of gloo may free a
# tensor later, which takes the interpreter's lock: that aborts a process whose interpreter ends.
END = """
import os
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def run_ranks(tmp_path: Path, code: str, *arguments: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(code + END)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=380,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "DGRAD_STORE": str(tmp_path / "store"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]


@distributed
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_on_the_cpu(tmp_path: Path, kind: str) -> None:
    run_ranks(tmp_path, TRAIN, kind, "cpu")


@distributed
@pytest.mark.skipif(_loader.load()[0] is None, reason="a problem needs the native module")
def test_two_processes_measure_each_problem_once(tmp_path: Path) -> None:
    run_ranks(tmp_path, SHARE, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 5
    for size, source in first.items():
        assert {source, second[size]} == {"measured", "stored"}
    assert len((tmp_path / "measured").read_text().splitlines()) == 5


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.seconds(15)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_train_as_one(tmp_path: Path, kind: str) -> None:
    run_ranks(tmp_path, TRAIN, kind, "cuda")
