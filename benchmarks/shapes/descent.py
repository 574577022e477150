"""The loop that every training script here runs: so many minutes down the gradient."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class Descent:
    """Steps of ``optimizer`` until ``minutes`` are over, counted from ``started`` or the first.

    Iterating gives the share of the time that is gone, and sets the learning rate: it rises over
    the first ``warm_up`` steps and falls to nothing by half a cosine.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        minutes: float,
        learning_rate: float,
        warm_up: int,
        started: float | None = None,
    ) -> None:
        self.steps = 0
        self._optimizer = optimizer
        self._group = optimizer.param_groups[0]
        self._seconds = max(60 * minutes, 1e-9)
        self._learning_rate = learning_rate
        self._warm_up = warm_up
        self._started = started

    def __iter__(self) -> Iterator[float]:
        started = time.time() if self._started is None else self._started
        while (progress := (time.time() - started) / self._seconds) < 1:
            rate = min(1.0, self.steps / self._warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
            self._group["lr"] = self._learning_rate * rate
            yield progress

    def step(self, loss: torch.Tensor) -> None:
        """One step down ``loss``, its gradient clipped to a norm of 1."""
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._group["params"], 1.0)
        self._optimizer.step()
        self.steps += 1
