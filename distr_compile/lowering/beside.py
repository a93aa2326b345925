"""Two kinds of work on a GPU, one beside the other: what comes next is made while this is used.

With items 0, 1, 2, ... ``make`` of an item runs on a second stream beside ``use`` of the one
before. The second stream begins after all that the first was given so far, and the first goes on
after all that was made, so that a CUDA graph that is being captured takes both.

Memory needs no marks for other streams. What ``make`` allocates belongs to the second stream and is
free once ``use`` was started; the next to get it is ``make`` of the item after the next, which
waits for that ``use``. After the last item the second stream waits for the first: whoever is given
it later, even by a call on other streams, comes after all that was read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def one_ahead(
    items: Sequence[Item],
    make: Callable[[Item], Made],
    use: Callable[[Item, Made], object],
    device: torch.device,
) -> None:
    """``use(item, make(item))`` for every item, in this order on the device.

    Args:
        items: what is done one after another.
        make: starts work on the current stream; what it returns is not kept longer than ``use``.
        use: likewise; it may read what was made.
        device: a GPU, whose current stream is the first one; on others nothing runs beside.
    """
    if device.type != "cuda" or len(items) < 2:
        for item in items:
            use(item, make(item))
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_event(main.record_event())
    made, ready = _made_on(side, make, items[0])
    used: Any = None
    for item, following in zip(items, [*items[1:], None], strict=True):
        coming = None
        if following is not None:
            if used is not None:
                side.wait_event(used)
            coming = _made_on(side, make, following)
        main.wait_event(ready)
        use(item, made)
        used = main.record_event()
        if coming is not None:
            made, ready = coming
    side.wait_event(used)


def _made_on(stream: Any, make: Callable[[Item], Made], item: Item) -> tuple[Made, Any]:
    """What ``make`` returns on another stream, and the event of its end."""
    with torch.cuda.stream(stream):
        made = make(item)
        return made, stream.record_event()
