"""What the frameworks need before they are imported."""

from __future__ import annotations

import importlib
import os
import re

import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A torchvision of another build than torch's does not find its own operators, and then neither timm nor fastai can be
# imported. Nothing here uses these operators, so empty definitions will do.
for _ in range(20):
    try:
        importlib.import_module("torchvision")
        break
    except ImportError:
        break
    except RuntimeError as error:
        missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
        if missing is None:
            break
        torch.library.define(missing[1], "(Tensor x) -> Tensor")
