"""Measurements on a trained model: loss and accuracy, accuracy under noise, sharpness.

All in eval mode; the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

EVAL_BATCH = 500
_NOISE_SEED = 20200000

Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the previous mode after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (0 to 1) over images (n, 1, height, width) and labels (n,)."""
    loss, correct = 0.0, 0
    with evaluating(model):
        for x, y in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
            logits = model(x)
            loss += float(cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(dim=1) == y).sum())
    return loss / len(labels), correct / len(labels)


def noisy_accuracy(model: nn.Module, images: Tensor, labels: Tensor, level: float) -> float:
    """Accuracy on images plus Gaussian noise of standard deviation ``level`` (1 = the full pixel range; not clipped),
    the same at every call.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
    return evaluate(model, images + level * noise, labels)[1]


def sharpness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    rho: float,
    adaptive: bool = False,
    eta: float = 0.0,
    batch_size: int = 128,
    loss_fn: Loss = cross_entropy,
) -> float:
    """Mean over batches of L(w + e) - L(w), with e the point of the rho-ball that the batch's own gradient g points to.

    e = rho * g / ||g||; with ``adaptive``, e = rho * T^2 g / ||T g|| and T = |w| + eta. BatchNorm uses its running
    statistics in both.

    Args:
        images, labels: (n, ...) and (n,); the mean weights every image equally.
        batch_size: images per gradient, as in training (the ball is climbed batch by batch there too).
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = 0.0
    with evaluating(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            loss = loss_fn(model(x), y)
            grads = [g.float() for g in torch.autograd.grad(loss, list(params.values()))]
            with torch.no_grad():
                scales = [p.float().abs() + eta if adaptive else torch.ones(()) for p in params.values()]
                norm = torch.stack([(t * g).norm() for t, g in zip(scales, grads, strict=True)]).norm()
                if norm == 0:
                    continue
                worst = {
                    name: p.float() + rho * t * t * g / norm
                    for (name, p), t, g in zip(params.items(), scales, grads, strict=True)
                }
                total += float(loss_fn(functional_call(model, worst, (x,)), y) - loss) * len(y)
    return total / len(labels)
