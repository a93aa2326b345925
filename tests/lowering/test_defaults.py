"""What a program has set as default dtype or default device changes nothing of a call.

Each default is set in a process of its own before anything is loaded, as the library is tried once
in a process; the kernel had written fp32 to memory of another dtype there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

H, N, D = 2, 64, 64


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def found() -> list[list[float]]:
    """Sums of results and gradients, one list for each call."""
    import distr_compile.ops  # noqa: F401

    op = torch.ops.distr.attention
    result = []
    for dtype in (torch.float32, torch.float64):
        q, k, v = (draw(1, H, N, D, seed=s, dtype=dtype).requires_grad_() for s in range(3))
        mask = draw(1, 1, N, N, seed=3, dtype=dtype).requires_grad_()
        sinks = draw(H, seed=4, dtype=dtype).requires_grad_()
        for rank, estimator, rounds in (
            (D, "projection", 1),
            (32, "projection", 1),
            (32, "lsh-mean", 1),
        ):
            options: dict[str, Any] = {"scale": 0.1, "rank": rank, "estimator": estimator}
            options |= {"rounds": rounds, "grouping_block": 32, "min_seq_len": 0}
            for strict in (False, True) if estimator == "projection" and rank < D else (False,):
                options |= {"strict": strict, "is_causal": strict}
                for given in ((mask, sinks), (None, sinks), (None, None)):
                    out = op(q, k, v, given[0], None, None, given[1], **options)
                    leaves = [q, k, v, *(t for t in given if t is not None)]
                    grads = torch.autograd.grad(out.square().sum(), leaves)
                    result.append([t.double().square().sum().item() for t in (out, *grads)])
    return result


def measured() -> list[float]:
    """What the metrics make of outputs on the CPU."""
    from distr_compile.accuracy.batch import Batch
    from distr_compile.accuracy.metrics import METRICS, as_metric
    from distr_compile.tuning.bounds import loss_with_bound

    exact, ours = (draw(4, 8, 5, seed=s, dtype=torch.float32) for s in range(2))
    labels = exact.argmax(-1)
    batch = Batch((), {}, labels)
    own = as_metric(lambda output, batch: [0.1, 0.2, 0.3, 0.4])
    result = []
    for metric in (*METRICS.values(), own):
        rows = [metric.statistic({"logits": x}, {"logits": exact}, batch) for x in (exact, ours)]
        loss = loss_with_bound(metric, *rows, 0.9)
        result += [loss.exact, loss.value, loss.loss, loss.upper]
    return result


@pytest.mark.parametrize("default", ["bfloat16", "float64", "meta"])
def test_defaults_of_a_program_change_nothing(default: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DISTR_MEASURE": "0"}
    told = subprocess.run(
        [sys.executable, __file__, default],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    calls, metrics, reason = json.loads(told.stdout)
    assert reason is None
    for got, wanted in zip(calls, found(), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    assert metrics == pytest.approx(measured(), rel=1e-9, nan_ok=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, sys.argv[1]))
    answers = [found(), measured()]
    from distr_compile.kernels.attention.cpu import unavailable_reason

    print(json.dumps([*answers, unavailable_reason()]))
