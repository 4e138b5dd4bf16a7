"""Virtual steps: train on, look what came of it, and go back.

A method whose loop updates the student at every yielded turn takes a `Snapshot` before its first virtual turn and
restores it before the real one. What goes back with the parameters is part of the method, hence explicit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.train.checkpoint import random_state, set_random_state


class Snapshot:
    """A module's parameters as they are now; `restore` puts them back, as often as it is called.

    Args:
        module: parameters that require no gradient are left alone.
        optimizer: roll its state (moments, step counts) back too; None lets it keep what virtual steps left there.
        buffers: roll the module's buffers (BatchNorm statistics) back too.
        random: roll all random generators back, so that the next draw repeats the first one after the snapshot.
    """

    def __init__(
        self, module: nn.Module, *, optimizer: Any | None = None, buffers: bool = False, random: bool = False
    ) -> None:
        self.tensors: list[Tensor] = [p.detach() for p in module.parameters() if p.requires_grad]
        if buffers:
            self.tensors += list(module.buffers())
        self.saved = [tensor.clone() for tensor in self.tensors]
        # Fabric wraps the optimiser, and its wrapper keeps the state that it had before a checkpoint was loaded.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.state = {} if self.optimizer is None else {p: _copy(s) for p, s in self.optimizer.state.items()}
        self.random = random_state() if random else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back in place: parameters and buffers keep their storage."""
        torch._foreach_copy_(self.tensors, self.saved)
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update({p: _copy(s) for p, s in self.state.items()})
        if self.random is not None:
            set_random_state(self.random)


class Soup:
    """The mean of a module's parameters over several moments (Wortsman et al. 2022: a uniform model soup)."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.count = 0

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Take in the parameters that the module has now."""
        parameters = [p.detach() for p in module.parameters()]
        if self.count == 0:
            self.sums = [p.clone() for p in parameters]
        else:
            torch._foreach_add_(self.sums, parameters)
        self.count += 1

    @torch.no_grad()
    def pour(self, module: nn.Module) -> None:
        """Give the module the mean. Raises `ValueError` where nothing was added."""
        if self.count == 0:
            raise ValueError("a soup needs at least one module: add one before it is poured.")
        means = torch._foreach_div(self.sums, self.count)
        torch._foreach_copy_([p.detach() for p in module.parameters()], list(means))


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
