"""What the package does to the process around it: it survives forks, and writes no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Threads of their own are what forks could break.
pytest.importorskip("sam_fast._cpu")

PROCESSES = """
import os, sys
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader
from sam_fast import SAM

def step(seed=0):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 200_000))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9)
    for _ in range(2):
        p.grad = torch.randn(200_000, generator=torch.Generator().manual_seed(seed))
        optimizer.first_step()
        optimizer.second_step()
    return p.detach()

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return step()

def spawned(rank, expected):
    torch.set_num_threads(2)
    assert torch.equal(step(), expected)

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = step()
    for batch in DataLoader(Samples(), num_workers=1, multiprocessing_context="fork"):
        assert torch.equal(batch[0], expected)
    assert torch.equal(step(), expected)
    mp.spawn(spawned, (expected,), nprocs=1)
    assert torch.equal(step(), expected)
    print("fine")
"""


@pytest.mark.guarantee(id="fork")
def test_forked_workers_and_spawned_processes_after_threads_were_used(tmp_path: Path) -> None:
    """A forked child has none of OpenMP's threads: a kernel that asked for them would wait forever."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


WATCHED = """
import os, sys
import torch
# what PyTorch imports late, and writes then, is not our concern
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
written = []
def hook(event, arguments):
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing:
        if str(arguments[0]) != os.devnull:
            written.append((event, str(arguments[0])))
    files = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.rmdir", "shutil.copyfile")
    if event in (*files, "socket.connect", "subprocess.Popen"):
        written.append((event, str(arguments[0])))
sys.addaudithook(hook)
import sam_fast, sam_fast.backends, sam_fast.reference
from sam_fast import SAM
p = torch.nn.Parameter(torch.ones(100))
for base in (torch.optim.SGD, torch.optim.AdamW):
    optimizer = SAM([p], base, lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(100)
        optimizer.first_step()
        with optimizer.second_pass(torch.nn.BatchNorm1d(3)):
            pass
        optimizer.second_step()
    optimizer.load_state_dict(optimizer.state_dict())
sam_fast.backends.build_info()
assert not written, written
open("probe", "w").close()
assert written  # it does watch
print("fine")
"""


@pytest.mark.guarantee(id="no-files")
def test_importing_and_stepping_writes_nothing(tmp_path: Path) -> None:
    """No file, no folder, no connection, no process. (Python's own byte code is switched off here.)"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.stdout == "fine\n", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe"]
