"""Groups of real processes with gloo between them, for the tests of what happens across processes.

They are forked from a server that has imported torch once, and a group lives for as long as its fixture. So a check
costs no more than what it computes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.optim",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "pytest",
]

PATIENCE = 90.0
"""Seconds after which the parent gives up on a check. A check that hangs fails after the group's timeout."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED, "sam_fast"])


class Group:
    """``size`` processes in one process group. Every check runs on all of them at once."""

    def __init__(self, size: int, folder: str, timeout: float = 30.0) -> None:
        self.size = size
        self.processes = []
        self.connections: list[Connection] = []
        for rank in range(size):
            here, there = _context.Pipe()
            process = _context.Process(target=_work, args=(rank, size, f"{folder}/store", there, timeout), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def outcomes(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """For every rank what ``check`` returned, or the text of what it raised, or None for a process that died."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((check, args, kwargs)))
        found: list[Any] = [None] * self.size
        waiting = dict(zip(self.connections, range(self.size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=PATIENCE)
            assert ready, f"ranks {sorted(waiting.values())} did not finish {check.__name__}"
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    found[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    found[rank] = None
        return found

    def run(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """For every rank what ``check`` returned.

        Raises:
            AssertionError: it raised on one of them.
        """
        found = self.outcomes(check, *args, **kwargs)
        for rank, outcome in enumerate(found):
            assert not isinstance(outcome, Raised), f"rank {rank}:\n{outcome.text}"
        for process in self.processes:
            assert process.is_alive(), f"a process died with exit code {process.exitcode}"
        return found

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()


class Raised:
    """What a check raised, as text."""

    def __init__(self, text: str) -> None:
        self.text = text


@contextmanager
def group_of(size: int, timeout: float = 30.0) -> Iterator[Group]:
    with tempfile.TemporaryDirectory() as folder:
        group = Group(size, folder, timeout)
        try:
            yield group
        finally:
            group.close()


def launch(script: Path, arguments: Sequence[str], size: int, folder: Path) -> list[str]:
    """Run a script as torchrun does, with the variables that it sets, in ``folder``.

    Returns what each process printed, errors as well.
    """
    with tempfile.TemporaryDirectory() as outputs:
        port = _free_port()
        processes = [
            _context.Process(target=_run_script, args=(str(script), arguments, rank, size, port, folder, outputs))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
        texts = [(Path(outputs) / str(rank)).read_text() for rank in range(size)]
    assert [process.exitcode for process in processes] == [0] * size, "\n".join(texts)
    return texts


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def _run_script(
    script: str, arguments: Sequence[str], rank: int, size: int, port: int, folder: Path, outputs: str
) -> None:
    descriptor = os.open(f"{outputs}/{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    _kept = runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    # Without destructors: DDP's waits, holding the GIL, for a thread of gloo's that may be waiting for the GIL.
    os._exit(0)


def _work(rank: int, size: int, store: str, connection: Connection, timeout: float) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{Path(store)}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            check, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            outcome = check(*args, **kwargs)
        except BaseException:  # pytest's own exceptions are not derived from Exception
            outcome = Raised(traceback.format_exc())
        connection.send_bytes(pickle.dumps(outcome))
    distributed.destroy_process_group()
