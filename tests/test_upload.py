"""What the triton backend uploads to a device and when, also in graphs and after interruptions."""

from __future__ import annotations

import pytest
import torch
from cases import buckets_of, interpreter, make_params

from sam_fast import SAM, backends
from sam_fast.backends import upload


@interpreter
def test_tables_are_uploaded_only_when_they_changed():
    params = make_params([100, 3000])
    optimizer = SAM(params, lr=0.0, backend="triton")
    (bucket,) = buckets_of(optimizer)
    uploads = (bucket.directions, bucket.addresses, bucket.numbers, bucket.targets)

    def step() -> tuple[int, ...]:
        before = [upload.uploads for upload in uploads]
        optimizer.first_step()
        optimizer.second_step()
        return tuple(upload.uploads - count for upload, count in zip(uploads, before, strict=True))

    assert step() == (1, 1, 1, 0)
    assert step() == (0, 0, 0, 0)
    optimizer.param_groups[0]["rho"] = 0.1
    assert step() == (1, 0, 0, 0)
    optimizer.param_groups[0]["lr"] = 0.1
    assert step() == (0, 0, 1, 0)
    params[0].grad = params[0].grad.clone()
    assert step() == (1, 1, 0, 0)
    optimizer.first_step()
    params[1].grad = None
    before = [upload.uploads for upload in uploads]
    optimizer.second_step()  # one tensor is stepped, the other one restored
    assert [upload.uploads - count for upload, count in zip(uploads, before, strict=True)] == [0, 1, 0, 1]
    params[1].grad = torch.ones(3000)
    params[1].data = params[1].data.clone()
    optimizer.first_step()  # builds new buckets only where a tensor no longer matches: an address alone may change
    assert buckets_of(optimizer) == [bucket]
    optimizer.restore()
    assert step() == (0, 1, 0, 0)


@interpreter
def test_saving_again_and_again_uploads_once():
    bucket = backends.BACKENDS["triton"].bucket([torch.randn(10), torch.randn(7)], [0, 0])
    for _ in range(3):
        assert bucket.save()
        bucket.restore()
    assert bucket.targets.uploads == 1


def test_a_graph_has_its_own_tables(monkeypatch):
    """Captured copies are replayed: their memory belongs to the graph, and eager steps use other memory."""
    capturing = False
    monkeypatch.setattr(upload, "is_capturing", lambda device: capturing)
    memory = upload.Upload(torch.device("cpu"))

    def send(numbers: bytes) -> torch.Tensor:
        memory.begin()
        return memory.send(numbers)

    first, second, third = b"1" * 16, b"2" * 16, b"3" * 16
    eager = send(first)
    capturing = True
    captured = send(second)
    assert memory.send(second) is captured  # what follows in the same operation reads the same copy
    again = send(second)  # another operation may be in another graph
    assert send(first) is eager  # which is the graph's from now on
    capturing = False
    assert len({t.data_ptr() for t in (eager, captured, again)}) == 3
    kept = [t.clone() for t in (eager, captured, again)]
    assert send(first) is eager
    other = send(third)
    assert send(third) is other
    assert memory.uploads == 4
    assert all(torch.equal(a, b) for a, b in zip(kept, (eager, captured, again), strict=True))
    assert other.numpy().tobytes() == third


def test_an_upload_that_was_interrupted_is_made_again(monkeypatch):
    memory = upload.Upload(torch.device("cpu"))
    first, second = b"1" * 16, b"2" * 16
    memory.begin()
    memory.send(first)
    copy = memory._copy

    def interrupted(*args):
        copy(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.send(second)
    monkeypatch.undo()
    assert memory.send(first).numpy().tobytes() == first


def test_what_is_uploaded_is_on_the_host_whatever_the_default_device():
    torch.set_default_device("meta")
    try:
        assert upload.Upload(torch.device("cpu"))._new_host(3).device.type == "cpu"
    finally:
        torch.set_default_device(None)
