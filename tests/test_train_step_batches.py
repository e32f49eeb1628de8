"""What TrainStep cuts a batch into, whatever the batch is made of."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn

from sam_fast import SAM, TrainStep

PARTS: list[dict[str, Any]] = [{"ascent": 0.25}, {"micro_batches": 4}]


class Encoding(UserDict[str, Any]):
    """As a tokenizer's, which has attributes beside its entries."""

    def __init__(self, data: Any = None, language: str = "unknown") -> None:
        super().__init__(data)
        self.language, self.weight = language, torch.ones(8)


@pytest.mark.parametrize("options", PARTS)
def test_a_part_of_a_batch_has_its_attributes(options: dict[str, Any]) -> None:
    model, seen = nn.Linear(5, 1), []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((batch.language, len(batch["x"]), len(batch.weight)))
        return (model(batch["x"]).squeeze(1).square() * batch.weight).mean()

    batch = Encoding({"x": torch.randn(8, 5)}, "en")
    TrainStep(model, SAM(model.parameters(), lr=0.1), loss, **options)(batch)
    assert seen == ([("en", 2, 2), ("en", 8, 8)] if "ascent" in options else [("en", 2, 2)] * 8)
    assert len(batch["x"]) == len(batch.weight) == 8
