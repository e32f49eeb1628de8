"""The batch that both passes of a step are given: its rows, and copies with which no pass disturbs the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn, strided
from torch.nn.utils.rnn import PackedSequence

_PLAIN = frozenset((Tensor, int, float, bool, str, bytes, type(None)))
"""Types that need no copy. They are recognized first, because a batch may hold a hundred thousand numbers."""


def number_of_rows(batch: Any) -> int | None:
    """The first dimension of the first tensor that has one; None where there is no such tensor."""
    first = _first_tensor(batch)
    return None if first is None else len(first)


def every_row(batch: tuple[Any, ...], every: int) -> tuple[Any, ...]:
    """Rows 0, ``every``, 2 * ``every``, ... of everything in ``batch`` that has as many rows as the batch."""
    first = _first_tensor(batch)
    return tuple(_mapped(item, first, lambda rows: rows[::every]) for item in batch)


def slice_rows(batch: tuple[Any, ...], begin: int, end: int) -> tuple[Any, ...]:
    """Rows ``begin`` to ``end - 1`` of everything in ``batch`` that has as many rows as the batch."""
    first = _first_tensor(batch)
    return tuple(_mapped(item, first, lambda rows: rows[begin:end]) for item in batch)


def with_own_containers(value: Any, known: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """The same tensors in new containers: what one pass removes from its batch, or replaces in it, is still there for
    the other. Objects that define ``__copy__``, such as graphs, are copied too. Both passes share what cannot be copied
    or refuses to be written into. ``known``: by its id, each value met so far and its copy. A batch may contain itself.
    """
    if type(value) in _PLAIN:
        return value
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]
    own: Any = value
    try:
        if isinstance(value, (MutableMapping, list)):
            own = copy(value)
            known[id(value)] = value, own
            for key, item in value.items() if isinstance(value, MutableMapping) else enumerate(value):
                if type(item) not in _PLAIN and (made := with_own_containers(item, known)) is not item:
                    own[key] = made
        elif isinstance(value, tuple):
            items = [with_own_containers(item, known) for item in value]
            if any(made is not item for made, item in zip(items, value, strict=True)):
                own = tuple.__new__(type(value), items)  # its constructor may take other arguments
                if hasattr(value, "__dict__"):
                    vars(own).update(vars(value))
        elif hasattr(type(value), "__copy__"):
            if not (hasattr(value, "shape") or isinstance(value, nn.Module)):
                own = copy(value)
        elif _is_record(value):
            own = copy(value)
            known[id(value)] = value, own
            for name, item in _attributes_of(value).items():  # also those that pickling, and so copy(), leaves out
                object.__setattr__(own, name, with_own_containers(item, known))  # frozen ones, too
    except Exception:  # it cannot be copied: both passes share it
        own = value
    known[id(value)] = value, own
    return own


def _is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass, or a namespace."""
    return (is_dataclass(type(value)) or isinstance(value, SimpleNamespace)) and not isinstance(value, nn.Module)


def _attributes_of(record: Any) -> dict[str, Any]:
    if hasattr(record, "__dict__"):
        return dict(vars(record))
    return {field.name: getattr(record, field.name) for field in fields(record) if hasattr(record, field.name)}


def versions_of(batch: Any) -> list[int]:
    """The versions of the tensors in ``batch``: writing into a tensor changes its version."""
    return [tensor._version for tensor in _tensors(batch, in_records=True) if not tensor.is_inference()]


def warn_of_written(batch: Any, versions: list[int], stacklevel: int = 3) -> None:
    """Warn if a tensor of ``batch`` has been written into since its versions were ``versions``.

    ``stacklevel``: as for ``warnings.warn``; by default the warning points at the caller's caller.
    """
    if versions_of(batch) != versions:
        warnings.warn(
            "the first pass of SAM has written into tensors of its batch, and the second one, which gets the same "
            "batch, sees what it wrote: make new tensors, x = x * 2 in place of x.mul_(2). If writing a second time "
            "changes nothing, ignore this",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def _first_tensor(batch: Any) -> Tensor | None:
    return next((t for t in _tensors(batch) if t.dim()), None)


def _tensors(value: Any, in_records: bool = False) -> Iterator[Tensor]:
    """The tensors in lists, tuples and mappings, each of which is searched once. Dataclasses and namespaces are not cut
    into rows, and are searched only with ``in_records``.
    """
    known: dict[int, Any] = {}
    ahead = [value]  # no recursion: records may form a long chain
    while ahead:
        item = ahead.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if type(item) in _PLAIN or id(item) in known:
            continue
        record = in_records and _is_record(item)
        if record or isinstance(item, (Mapping, list, tuple)):
            known[id(item)] = item
            inside = _attributes_of(item) if record else item
            ahead += reversed(list(inside.values() if isinstance(inside, Mapping) else inside))


def _mapped(value: Any, first: Any, f: Callable[[Any], Any]) -> Any:
    """``value`` with ``f`` applied to each tensor, array and list of samples that has as many rows as ``first``, the
    batch's first tensor. Containers keep their kind.
    """
    if isinstance(value, PackedSequence) or (isinstance(value, Tensor) and value.layout != strided):
        raise TypeError(
            f"a batch with a {type(value).__name__} that is packed, sparse or nested cannot be cut into rows: make it "
            "in loss_fn, or use ascent=1 and micro_batches=1"
        )
    if tuple(getattr(value, "shape", ()))[:1] == (len(first),):  # a tensor, an array, a TensorDict
        return f(value)
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        named = {key: _mapped(item, first, f) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return type(value)(named)  # type: ignore[call-arg]
        made = copy(value)  # keeps what else the object has: a default factory, attributes
        if hasattr(made, "__dict__"):
            vars(made).update(_mapped(vars(value), first, f))
        for key, item in named.items():
            made[key] = item
        return made
    if isinstance(value, (list, tuple)):
        if hasattr(value, "_fields"):
            return type(value)(*(_mapped(item, first, f) for item in value))
        return type(value)(f(value) if _holds_samples(value, first) else [_mapped(item, first, f) for item in value])
    return value


def _holds_samples(items: Sequence[Any], first: Tensor) -> bool:
    """Whether there is an item for each row, as in lists of strings or of tensors that differ in size."""
    if len(items) != len(first) or any(t is first for t in _tensors(items)):
        return False
    if len(items) > 1 and all(number_of_rows(item) == len(first) for item in items):
        raise TypeError(
            f"a {type(items).__name__} of {len(first)} items of {len(first)} rows cannot be cut into rows, since "
            "either may be the samples: leave such small batches out (drop_last=True), or use ascent=1 and "
            "micro_batches=1"
        )
    return True
