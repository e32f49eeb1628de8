"""sam_fast.sharpness: what is refused, by name and with the weights as they were; and its progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same_bits, values
from quadratic import EIGENVALUES, ROWS, Quadratic, loss_of
from torch import Tensor, nn

from sam_fast.sharpness import hessian_eigenvalue, hessian_trace, landscape, loss_along, random_direction, rho_sharpness


def sharp(model: nn.Module, loss_fn: Any = loss_of, batches: Any = ROWS, **options: Any) -> Any:
    return rho_sharpness(model, loss_fn, batches, **({"rho": 0.1} | options))


def kink(model: Any, x: Tensor) -> Tensor:
    """A gradient of zero, and no second derivative."""
    return (model.vector - model.vector.detach()).abs().pow(1.5).sum()


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1, sparse=True)

    def loss(self, x: Tensor) -> Tensor:
        return self.table(x.long() % 3).square().mean()


ALONG = {"vector": torch.ones(3)}
BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "rho": (lambda q: sharp(q, rho=0.0), ValueError, "rho must be a finite number above 0"),
    "a negative rho": (lambda q: sharp(q, rho=-1.0), ValueError, "rho must be a finite number above 0"),
    "eta": (lambda q: sharp(q, eta=-1.0), ValueError, "eta must be"),
    "adaptive": (lambda q: sharp(q, adaptive="False"), ValueError, "adaptive must be True or False"),
    "progress": (lambda q: sharp(q, progress="no"), ValueError, "progress must be True or False"),
    "m": (lambda q: sharp(q, m=0), ValueError, "m must be an int of at least 1"),
    "m of one batch": (lambda q: sharp(q, m=3), ValueError, "m=3 is more than the 2 rows"),
    "backend": (lambda q: sharp(q, backend="fast"), ValueError, "fast"),
    "model": (lambda q: sharp([q]), TypeError, "model must be a torch.nn.Module, got list"),
    "frozen": (lambda q: sharp(q.requires_grad_(False)), ValueError, "model has no trainable parameters"),
    "loss_fn": (lambda q: sharp(q, "loss"), TypeError, "loss_fn must be a function of the model and the batch"),
    "a criterion": (lambda q: sharp(q, nn.MSELoss()), TypeError, r"lambda model, x, y: criterion\(.*got MSELoss"),
    "a batch": (lambda q: sharp(q, batches=ROWS[0]), TypeError, "batches must be an iterable"),
    "no batches": (lambda q: sharp(q, batches=[]), ValueError, "batches is empty"),
    "no rows": (lambda q: sharp(q, batches=[3.0]), ValueError, "no tensor that has rows"),
    "no tensor": (lambda q: sharp(q, lambda model, x: 3.0), TypeError, "loss_fn must return a tensor, got float"),
    "no scalar": (lambda q: sharp(q, lambda model, x: model(x) + x), ValueError, r"a scalar.* got shape \(2, 1\)"),
    "complex loss": (lambda q: sharp(q, lambda q, x: q.w().sum() * 1j), ValueError, "must return a real number"),
    "no steps": (lambda q: loss_along(q, loss_of, ROWS, ALONG, 1.0), TypeError, "steps must be numbers"),
    "a list": (lambda q: loss_along(q, loss_of, ROWS, {"vector": [1.0]}, [1.0]), TypeError, "must be a tensor, got"),
    "constant": (lambda q: sharp(q, lambda model, x: x.sum()), ValueError, "depends on no trainable parameter"),
    "infinite": (lambda q: sharp(q, lambda q, x: q.w().sum() / 0), ValueError, "loss_fn returned -?inf at w:"),
    "infinite later": (lambda q: sharp(q, lambda q, x: q.vector.exp().sum(), rho=2e3), ValueError, r"inf at w \+ e"),
    "gradient": (lambda q: sharp(q, lambda q, x: (q.vector * 0).sqrt().sum()), ValueError, "not finite"),
    "inference": (lambda q: torch.inference_mode()(sharp)(q), RuntimeError, "outside torch.inference_mode"),
    "tolerance": (lambda q: hessian_eigenvalue(q, loss_of, ROWS, tolerance=0.0), ValueError, "tolerance must be a"),
    "iterations": (lambda q: hessian_eigenvalue(q, loss_of, ROWS, max_iterations=0), ValueError, "max_iterations"),
    "iterator": (lambda q: hessian_eigenvalue(q, loss_of, iter(ROWS)), ValueError, "batches is an iterator"),
    "no eigenvalue": (lambda q: hessian_eigenvalue(q, loss_of, []), ValueError, "batches is empty"),
    "sparse": (lambda q: sharp(Sparse(), Sparse.loss), RuntimeError, "parameter 'table.weight' has a sparse gradient"),
    "complex": (lambda q: hessian_trace(nn.Linear(1, 1, dtype=torch.cfloat), loss_of, ROWS), ValueError, "complex"),
    "samples": (lambda q: hessian_trace(q, loss_of, ROWS, samples=1), ValueError, "samples must be an int of at least"),
    "curvature": (lambda q: hessian_trace(q, kink, ROWS), ValueError, "Hessian .* is not finite"),
    "a curve": (lambda q: hessian_eigenvalue(q, kink, ROWS), ValueError, "Hessian .* is not finite"),
    "direction": (lambda q: loss_along(q, loss_of, ROWS, [1.0], [1.0]), TypeError, "direction must map names"),
    "name": (lambda q: landscape(q, loss_of, ROWS, ALONG, {"b": q.b}, [1.0]), ValueError, "second has 'b'"),
    "shape": (lambda q: landscape(q, loss_of, ROWS, {"vector": q.b}, ALONG, [1.0]), ValueError, r"first\['vector'\]"),
    "zero": (lambda q: loss_along(q, loss_of, ROWS, {"vector": torch.zeros(3)}, [1.0]), ValueError, "leads nowhere"),
    "steps": (lambda q: loss_along(q, loss_of, ROWS, ALONG, []), ValueError, "steps must be finite numbers"),
    "words": (lambda q: loss_along(q, loss_of, ROWS, ALONG, ["far"]), TypeError, "steps must be numbers"),
    "nothing": (lambda q: loss_along(q, loss_of, ROWS, ALONG, [None]), TypeError, "steps must be numbers"),
    "seed": (lambda q: hessian_trace(q, loss_of, ROWS, seed=None), ValueError, "seed must be an int of at least 0"),
    "its seed": (lambda q: random_direction(q, 0.5), ValueError, "seed must be an int of at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, error, message = BAD[case]
    model = Quadratic(EIGENVALUES)
    before = values(list(model.parameters()))
    with pytest.raises(error, match=message):
        call(model)
    assert same_bits(before, values(list(model.parameters())))


def test_progress_is_shown_where_it_is_wanted(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sharp(Quadratic(EIGENVALUES))
    assert capfd.readouterr().err == ""
    sharp(Quadratic(EIGENVALUES), progress=True)
    assert "sharpness: 100%" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        sharp(Quadratic(EIGENVALUES), progress=True)
