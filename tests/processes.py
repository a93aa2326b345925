"""Several processes of ``torch.distributed`` (gloo) that run one function of a test together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Call a function of a module in ``world`` new processes.

    Args:
        function: called with ``args``; gives what JSON can say.
        world: how many.
        folder: an empty one, for what they tell one another and us.
        args: of the function.

    Returns:
        What each process gave, by rank.
    """
    mp.spawn(_run, (function, world, str(folder), args), nprocs=world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _run(
    rank: int, function: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    try:
        found = function(*args)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()
