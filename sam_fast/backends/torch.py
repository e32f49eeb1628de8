"""The ``torch`` backend: the same operations with ``torch._foreach_*``, for every device, dtype (complex included) and memory layout."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..amp import inverse_scale
from ..bucket import is_wrapper
from ..rounding import ROUNDED, round_stochastically
from .base import Backend, GroupOptions, StateTensors, check_dense_gradient, shape_changed, signature

if TYPE_CHECKING:
    from ..amp import Scaling
    from ..bucket import Bucket


class TensorTable:
    """What the rows looked like when the bucket was built, and for every row its gradient in this step and whether it has a backup."""

    def __init__(self, bucket: Bucket) -> None:
        self.expected = [signature(row) for row in bucket.rows]
        self.grads: list[Tensor | None] = [None] * len(bucket.rows)
        self.saved = [False] * len(bucket.rows)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32 for the 16-bit formats, else the rows' own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _wide(dtype: torch.dtype, accumulate: torch.dtype) -> torch.dtype:
    """The dtype to sum squares in: ``accumulate``, or the complex dtype made of it."""
    return accumulate.to_complex() if dtype.is_complex else accumulate


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if any(target.is_neg() or target.is_conj() for target in targets):  # foreach refuses to write to these
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    elif targets:
        torch._foreach_copy_(targets, sources)


class TorchBackend(Backend):
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def rejects(self, tensor: Tensor, arithmetic: bool = True) -> str | None:
        return None

    def attach(self, bucket: Bucket) -> TensorTable:
        return TensorTable(bucket)

    def num_partials(self, bucket: Bucket) -> int:
        return 1

    def addresses(self, bucket: Bucket) -> bytes:
        return array("Q", map(Tensor.data_ptr, bucket.rows)).tobytes()

    def collect(self, bucket: Bucket, options: GroupOptions) -> bool:
        table: TensorTable = bucket.table
        if [signature(row) for row in bucket.rows] != table.expected:
            return False
        for index, (row, group) in enumerate(zip(bucket.rows, bucket.groups, strict=True)):
            grad = row.grad if options.perturb[group] else None
            if grad is not None:
                check_dense_gradient(grad, row)
                if is_wrapper(type(grad)):
                    grad = torch.empty_like(row, requires_grad=False).copy_(grad.detach())
            table.grads[index] = grad
        return True

    def _participants(self, bucket: Bucket) -> dict[int, tuple[list[int], list[Tensor], list[Tensor]]]:
        """For each group the rows that have a gradient: their indices, the rows and the gradients, in the dtype of the arithmetic."""
        table: TensorTable = bucket.table
        dtype = _compute_dtype(bucket.dtype)
        found: dict[int, tuple[list[int], list[Tensor], list[Tensor]]] = {}
        for index, (row, group, grad) in enumerate(zip(bucket.rows, bucket.groups, table.grads, strict=True)):
            if grad is not None and grad.numel() > 0:
                indices, rows, grads = found.setdefault(group, ([], [], []))
                indices.append(index)
                rows.append(row.detach().to(dtype))
                grads.append(grad.detach().to(dtype))
        return found

    @torch.no_grad()
    def grad_norm(self, bucket: Bucket, options: GroupOptions, partials: Tensor) -> None:
        norms: list[Tensor] = []
        for group, (_, rows, grads) in self._participants(bucket).items():
            _, eta, adaptive = options.of(group)
            terms = torch._foreach_mul(_asam_t(rows, eta), grads) if adaptive else grads
            # In float64: PyTorch's float32 norm of 1e8 elements was seen to be 3.5 % off.
            norms.extend(torch._foreach_norm(terms, 2, dtype=_wide(terms[0].dtype, partials.dtype)))
        if norms:
            partials.copy_(torch.stack(norms).square().sum())
        else:
            partials.zero_()

    @torch.no_grad()
    def perturb(self, bucket: Bucket, options: GroupOptions, partials: Tensor, eps: float, norm: Tensor) -> None:
        table: TensorTable = bucket.table
        norm.copy_(partials.sum().sqrt())
        finite = norm.isfinite()
        participants = self._participants(bucket)
        # All rows before any is moved: rows may share memory.
        saved = [i for indices, _, _ in participants.values() for i in indices]
        if saved:
            torch._foreach_copy_([bucket.flat_rows[i] for i in saved], [bucket.rows[i].detach() for i in saved])
        for i in saved:
            table.saved[i] = True
        moves: Iterable[tuple[list[int], list[Tensor]]] = self._moves(participants, options, norm + eps)
        if bucket.shared:  # one row after the other, each by the e of w
            moves = [([i], [e_of_row]) for indices, e in moves for i, e_of_row in zip(indices, e, strict=True)]
        for indices, e in moves:
            rows = [bucket.rows[i].detach() for i in indices]
            wide = [row.to(_compute_dtype(bucket.dtype)) for row in rows]
            moved = torch._foreach_add(wide, e)
            # Chosen on the device: reading `finite` here would wait for it.
            chosen = [torch.where(finite, m, row) for m, row in zip(moved, wide, strict=True)]
            _copy_all(rows, self._rounded(bucket, indices, chosen, options.rounding_key))
        table.grads = [None] * len(bucket.rows)

    def _moves(
        self, participants: dict[int, tuple[list[int], list[Tensor], list[Tensor]]], options: GroupOptions, norm: Tensor
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """For each group its rows that have a gradient, and their e."""
        for group, (indices, rows, grads) in participants.items():
            rho, eta, adaptive = options.of(group)
            # A zero gradient moves nothing, also where norm, eps included, is 0.
            dtype = rows[0].real.dtype
            most = torch.finfo(dtype).max  # an infinite scale would make NaN of a gradient of 0
            scale = torch.where(norm > 0, rho / norm, 0.0).clamp(-most, most).to(dtype)
            if adaptive:
                t = _asam_t(rows, eta)
                yield indices, list(torch._foreach_mul(torch._foreach_mul(torch._foreach_mul(t, grads), scale), t))
            else:
                yield indices, list(torch._foreach_mul(grads, scale))

    def _rounded(self, bucket: Bucket, indices: list[int], values: list[Tensor], rounding_key: int | None) -> list[Tensor]:
        """New weights for the rows ``indices``, stochastically rounded if they are to be; else the copy into the row rounds them to nearest."""
        if rounding_key is None or bucket.dtype not in ROUNDED:
            return values
        rounded = []
        for i, value in zip(indices, values, strict=True):
            backup, slot = bucket.flat_rows[i], bucket.slots[i]
            index = torch.arange(slot, slot + backup.numel(), device=bucket.device).to(torch.int32).as_strided(backup.shape, backup.stride())
            rounded.append(round_stochastically(value.contiguous(), bucket.dtype, index.contiguous(), rounding_key))
        return rounded

    def saved(self, bucket: Bucket) -> list[int]:
        table: TensorTable = bucket.table
        return [index for index, saved in enumerate(table.saved) if saved]

    @torch.no_grad()
    def restore(self, bucket: Bucket, release: bool = True) -> None:
        table: TensorTable = bucket.table
        lost = []
        # .data: what is written back may be a BatchNorm buffer that autograd has saved, and its value is as it was.
        rows, backups = [], []
        for index in self.saved(bucket):
            row, backup = bucket.rows[index].data, bucket.flat_rows[index]
            if row.shape != backup.shape:
                lost.append(f"row {index}: {tuple(backup.shape)} -> {tuple(row.shape)}")
                continue
            rows.append(row)
            backups.append(backup)
        _copy_all(rows, backups)
        if release:
            table.saved = [False] * len(bucket.rows)
        if lost:
            raise shape_changed(lost)

    @torch.no_grad()
    def save(self, bucket: Bucket) -> bool:
        table: TensorTable = bucket.table
        if [signature(row) for row in bucket.rows] != table.expected:
            return False
        torch._foreach_copy_(bucket.flat_rows, [row.detach() for row in bucket.rows])
        table.saved = [True] * len(bucket.rows)
        return True

    fused_steps = frozenset({"restore_sgd", "restore_adam"})
    steps_empty_rows = True

    def share_saved(self, bucket: Bucket, source: Bucket) -> None:
        table: TensorTable = bucket.table
        saved: list[bool] = source.table.saved
        table.saved = [was_saved for was_saved, params in zip(saved, source.params, strict=True) for _ in params]

    def release(self, bucket: Bucket) -> None:
        table: TensorTable = bucket.table
        table.saved = [False] * len(bucket.rows)

    def collect_step(self, bucket: Bucket, state: StateTensors) -> bool:
        table: TensorTable = bucket.table
        if state.learning_rates or state.device_steps or [signature(row) for row in bucket.rows] != table.expected:
            return False
        if any(row.is_neg() or row.is_conj() for row in bucket.rows):
            return False
        if any(grad is not None and (is_wrapper(type(grad)) or grad.layout != torch.strided) for grad in (row.grad for row in bucket.rows)):
            return False
        for name, tensors in state.tensors.items():
            for tensor, row in zip(tensors, bucket.rows, strict=True):
                if tensor is None or name == "step":
                    continue
                if (tensor.layout, tensor.shape, tensor.dtype, tensor.device) != (torch.strided, row.shape, row.dtype, row.device):
                    return False
        return True

    def restore_sgd(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        def step(options: Sequence[float], w: list[Tensor], g: list[Tensor], states: dict[str, list[Tensor]]) -> None:
            lr, momentum, dampening, weight_decay, nesterov, maximize = options
            buffers: list[Tensor | None] = list(states["momentum_buffer"]) or [None] * len(w)
            sgd(
                w,
                g,
                buffers,
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=bool(nesterov),
                maximize=bool(maximize),
            )

        self._restore_and_step(bucket, state, scaling, 6, step)

    def restore_adam(self, bucket: Bucket, state: StateTensors, scaling: Scaling) -> None:
        def step(options: Sequence[float], w: list[Tensor], g: list[Tensor], states: dict[str, list[Tensor]]) -> None:
            lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = options
            adam(
                w,
                g,
                states["exp_avg"],
                states["exp_avg_sq"],
                states["max_exp_avg_sq"],
                states["step"],
                has_complex=w[0].is_complex(),
                decoupled_weight_decay=bool(decoupled),
                amsgrad=bool(amsgrad),
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=weight_decay,
                eps=eps,
                maximize=bool(maximize),
            )

        self._restore_and_step(bucket, state, scaling, 8, step)

    @torch.no_grad()
    def _restore_and_step(self, bucket: Bucket, state: StateTensors, scaling: Scaling, width: int, step: Callable[..., None]) -> None:
        """Restore, then ``step`` group by group, with that group's ``width`` options; in float32 for the 16-bit formats."""
        self.restore(bucket)
        dtype = _compute_dtype(bucket.dtype)
        members: dict[int, list[int]] = {}
        for index, (row, group) in enumerate(zip(bucket.rows, bucket.groups, strict=True)):
            if row.grad is not None:
                members.setdefault(group, []).append(index)
        for group, indices in members.items():
            states = {name: [t for i in indices if (t := tensors[i]) is not None] for name, tensors in state.tensors.items()}
            weights = [bucket.rows[i].detach() for i in indices]
            grads = [grad.detach().to(dtype) for i in indices if (grad := bucket.rows[i].grad) is not None]
            if dtype.is_complex:
                grads = [grad.resolve_conj() for grad in grads]
            if scaling.grad_scale is not None:
                grads = list(torch._foreach_mul(grads, inverse_scale(scaling.grad_scale).to(bucket.device)))
            options = state.groups[width * group : width * (group + 1)]
            if dtype == bucket.dtype:
                step(options, weights, grads, states)
                continue
            wide = {name: tensors if name == "step" else [t.to(dtype) for t in tensors] for name, tensors in states.items()}
            moved = [w.to(dtype) for w in weights]
            step(options, moved, grads, wide)
            for name, tensors in wide.items():
                if name != "step" and tensors:
                    torch._foreach_copy_(states[name], tensors)
            torch._foreach_copy_(weights, self._rounded(bucket, indices, moved, state.rounding_key))


def _asam_t(rows: list[Tensor], eta: float) -> list[Tensor]:
    """ASAM's normalization operator T = |w| + eta; real for complex weights too."""
    t = torch._foreach_abs(rows)
    return list(torch._foreach_add(t, eta)) if eta else list(t)


BACKEND = TorchBackend()
