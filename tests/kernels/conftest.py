"""Kernels' outputs start as NaN in every test here, so that an element that is never written shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **keywords: Any) -> Tensor:
            made = make(*args, **keywords)
            return made.fill_(torch.nan) if made.is_floating_point() and made.device.type != "meta" else made

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
