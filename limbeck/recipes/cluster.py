"""Labelling on many machines by Ray Data (`pip install limbeck[cluster]`): workers label blocks of the same plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.errors import UserError
from limbeck.teachers import Filling

if TYPE_CHECKING:
    from limbeck.recipes.label import Labelling


class BlockLabeller:
    """One Ray worker: it builds data and teacher from the recipe once, then writes the parts of the blocks it is given.

    The parts go to the store's folder, which all machines must see under the same path.
    """

    def __init__(self, plan: Labelling, number: int) -> None:
        for place, filling in enumerate(plan.fillings()):
            self.filling = filling
            if place == number:
                break

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.filling.label(batch["block"].tolist())
        return batch


def label_on_ray(
    plan: Labelling,
    number: int,
    filling: Filling,
    *,
    workers: int,
    address: str | None = None,
    progress: bool = False,
) -> None:
    """Write all parts that `filling`, the plan's of this number, lacks, by that many Ray workers.

    Each has a GPU of its own where the cluster has one for each.

    Raises:
        UserError: Ray is not installed, or no worker is asked for.
    """
    if workers < 1:
        raise UserError(f"ray is {workers}; give the number of workers, at least 1")
    try:
        import ray
    except ImportError:
        raise UserError("labelling on several machines needs Ray: pip install 'limbeck[cluster]'") from None
    left = [block for block in range(filling.blocks) if not filling.part(block).exists()]
    if not left:
        return
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=progress, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = progress
    gpus: dict[str, Any] = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= workers else {}
    blocks = ray.data.from_items([{"block": block} for block in left], override_num_blocks=min(len(left), 4 * workers))
    done = blocks.map_batches(
        BlockLabeller,
        fn_constructor_args=(plan, number),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **gpus,
    )
    done.materialize()
