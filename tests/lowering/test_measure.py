"""What is faster: how it is measured, and when it is not."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering import judge as judging
from distr_compile.lowering import measure, stored, training
from distr_compile.lowering.call import BHND, Approximation, Shape
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import DISTR, EXACT, SDPA, Measured, Race

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 200, 160, 64, 48, False, None, torch.float32, CPU)
HALF = Approximation("projection", 32)

FAST = Race({SDPA: 4e-3, DISTR: 2e-3}, "d", 1.4, 7, 4)
SLOW = dataclasses.replace(FAST, gain=0.8)

# --- measuring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": True, "causal_offset": 3, "dtype": torch.bfloat16},
        {"mask": ((2, 4, 200, 160), torch.bool), "order": ((0, 2, 1, 3), BHND, (0, 1, 3, 2))},
        {"mask": ((2, 1, 1, 160), torch.float32)},
        {"softcap": True, "sinks": True},
    ],
    ids=str,
)
def test_every_kind_of_call_is_measured(estimator: str, changes: dict[str, Any]) -> None:
    shape = SHAPE._replace(**changes)
    found = measure.race(shape, Approximation(estimator, 32))
    assert isinstance(found, Race)
    assert found.rounds >= measure.ROUNDS
    assert list(found.seconds) == [SDPA, DISTR]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.gain > 0


def test_what_is_timed_is_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, order in memory, mask, scores and approximation reach the op."""
    seen: list[tuple[Shape, Approximation]] = []
    real = measure.choose.run

    def run(call: Any) -> Any:
        seen.append((call.shape, call.approximation))
        return real(call)

    monkeypatch.setattr(measure.choose, "run", run)
    shape = SHAPE._replace(
        batch=1,
        num_heads=2,
        num_key_heads=1,
        is_causal=True,
        causal_offset=3,
        mask=((1, 2, 200, 1), torch.bool),
        order=((0, 2, 1, 3), (0, 1, 3, 2), (0, 1, ~2, 3)),
    )
    measure.race(shape, HALF, EXACT)
    wanted = {(shape, HALF), (shape, Approximation.none(64))}
    assert set(seen) == wanted


def scripted(monkeypatch: pytest.MonkeyPatch, times: dict[str, list[float]], warming: int) -> None:
    """Let the rounds take these times, the first of them also while warming up."""
    rounds = iter([*[0] * warming, *range(100)])

    def fake(arms: Any, device: Any, repeats: int, turn: int = 0) -> dict[str, float]:
        i = next(rounds)
        return {name: times[name][i % len(times[name])] for name in arms}

    monkeypatch.setattr(measure, "_round", fake)


ONE_HEAD = SHAPE._replace(batch=1, num_heads=1, num_key_heads=1)


def test_the_lower_quartile_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of seven ratios far above the margin are not enough."""
    exact = [7e-3, 7e-3, 7e-3, 7e-3, 7.1e-3, 7.1e-3, 7.1e-3]
    distr = [3e-3, 3e-3, 3e-3, 3e-3, 7e-3, 7e-3, 7e-3]
    scripted(monkeypatch, {EXACT: exact, DISTR: distr}, warming=0)
    found = measure.race(ONE_HEAD, HALF, EXACT)
    assert isinstance(found, Race)
    ratios = [e / d for e, d in zip(exact, distr, strict=True)]
    wanted = statistics.quantiles(ratios, n=4, method="inclusive")[0]
    assert wanted < measure.MARGIN < statistics.median(ratios)
    assert found.gain == pytest.approx(wanted)
    assert not found.is_won
    assert found.seconds == {EXACT: pytest.approx(7e-3), DISTR: pytest.approx(3e-3)}
    assert found.rounds == 7


def test_a_slice_is_scaled_to_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    scripted(monkeypatch, {arm: [2e-2] for arm in (SDPA, EXACT, DISTR)}, warming=0)
    found = measure.race(SHAPE._replace(batch=8, num_heads=12, num_key_heads=6), HALF)
    assert isinstance(found, Race)
    assert found.heads == 2 * 2  # key heads of the slice, and query heads of each
    assert found.seconds[SDPA] == pytest.approx(2e-2 * 8 * 6 / 2)


def test_a_short_call_is_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host takes for a call is not in proportion to its heads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    scripted(monkeypatch, {arm: [1e-4] for arm in (SDPA, EXACT, DISTR)}, warming=0)
    found = measure.race(SHAPE._replace(batch=2, num_heads=12, num_key_heads=6), HALF)
    assert isinstance(found, Race)
    assert found.heads == 2 * 12
    assert found.seconds[SDPA] == pytest.approx(1e-4)


def test_what_takes_too_long_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {arm: [0.2] for arm in (SDPA, EXACT, DISTR)}, warming=0)
    found = measure.race(SHAPE, HALF, limit=2.0)
    assert found == "it takes about 2.8 s, more than 2 s"
    assert isinstance(measure.race(SHAPE, HALF), Race)


def test_times_of_two_races_are_put_together() -> None:
    exact = Race({SDPA: 8.0, EXACT: 4.0}, "ours", 1.9, 7, 4)
    found = Measured(exact, Race({EXACT: 6.0, DISTR: 3.0}, "narrow", 2.0, 7, 4))
    assert found.seconds == {SDPA: 8.0, EXACT: 4.0, DISTR: 2.0}
    assert str(found) == "sdpa 8e+03 ms, exact (ours) 4e+03 ms, distr (narrow) 2e+03 ms"
    assert found.gains == {"exact_gain": 1.9, "distr_gain": 2.0}
    assert (found.best_exact, found.prefers_distr) == (EXACT, True)
    alone = Measured(None, Race({SDPA: 6.0, DISTR: 3.0}, "narrow", 1.0, 7, 4))
    assert alone.seconds == {SDPA: 6.0, DISTR: 3.0}
    assert (alone.best_exact, alone.prefers_distr, alone.prefers_ours) == (SDPA, False, False)


def test_a_hopeless_call_is_foretold() -> None:
    """Nothing of its length is run: by real clocks."""
    long = ONE_HEAD._replace(num_queries=60000, num_keys=60000)
    started = time.perf_counter()
    found = measure.warm_up(long, HALF, limit=2.0)
    assert found is not None
    assert "more than 2 s" in found
    assert time.perf_counter() - started < 20  # a minute and more, were it run


def test_a_slice_is_bounded() -> None:
    wide = SHAPE._replace(num_queries=2**20, num_keys=2**20)
    assert measure.warm_up(wide, HALF, limit=2.0) == "one key head takes 1344 MiB, more than 256"
    seen = SHAPE._replace(mask=((2, 4, 200, 160), torch.float32))
    assert measure._bytes(seen, 2) == 4 * 2 * (2 * 200 + 160) * (64 + 48) + 4 * 200 * 160 * 4


def test_measuring_leaves_everything_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state().clone()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.enable_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.device("meta"),
            torch._subclasses.FakeTensorMode(),
        ):
            found = measure.race(SHAPE, HALF)
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert torch.empty(1).device.type == "meta"
            assert type(torch.empty(1)) is torch._subclasses.FakeTensor
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(found, Race)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.empty(1).device.type == "cpu"
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_measuring_under_inference_mode() -> None:
    with torch.inference_mode():
        assert isinstance(measure.race(SHAPE, HALF), Race)
        assert torch.is_inference_mode_enabled()


def test_a_random_mask_hides_nothing() -> None:
    """What is timed is full work: an all-True mask, a bias of zeros."""
    for dtype in (torch.bool, torch.float32):
        shape = SHAPE._replace(mask=((2, 4, 200, 160), dtype))
        q, k, v, mask = measure.inputs(shape, 2)
        assert mask is not None
        got = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(got, wanted)


# --- the judge ----------------------------------------------------------------------------------


def raced(shape: Shape, approximation: Any = None, against: str = SDPA, *_: Any) -> Race:
    """Everything is fast."""
    return Race({against: 4e-3, DISTR if approximation else EXACT: 2e-3}, "k", 1.4, 7, 4)


BOTH = Measured(raced(SHAPE), raced(SHAPE, HALF, EXACT))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, may_measure: Path) -> list[tuple[Any, ...]]:
    """What is raced; everything is found to be fast, and takes 8 s."""
    calls: list[tuple[Any, ...]] = []
    clock = iter(range(0, 10**6, 8))

    def fake(*args: Any) -> Race:
        calls.append(args)
        return raced(*args)

    monkeypatch.setattr(judging.measure, "race", fake)
    monkeypatch.setattr(judging.measure, "warm_up", lambda *_: None)
    monkeypatch.setattr(judging.choose, "name_of", lambda *_: "k")
    monkeypatch.setattr(judging.time, "perf_counter", lambda: next(clock))
    return calls


def test_exact_attention_first_then_the_approximation(asked: list[Any]) -> None:
    assert Judge()(SHAPE, HALF) == BOTH
    assert [call[1:3] for call in asked] == [(None, SDPA), (HALF, EXACT)]
    assert Judge()(SHAPE, None) == Measured(BOTH.exact)
    assert Judge()(SHAPE, Approximation("projection", 16)).exact == BOTH.exact  # type: ignore[union-attr]
    assert len(asked) == 3, "SDPA and our exact kernel are raced once for all plans"


def test_where_ours_is_slower_the_approximation_has_sdpa_to_beat(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(*args: Any) -> Race:
        asked.append(args)
        return dataclasses.replace(raced(*args), gain=1.05)

    monkeypatch.setattr(judging.measure, "race", fake)
    found = Judge()(SHAPE, HALF)
    assert isinstance(found, Measured)
    assert [call[1:3] for call in asked] == [(None, SDPA), (HALF, SDPA)]
    assert not found.prefers_ours
    assert not found.prefers_distr


def test_without_a_kernel_of_ours(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        judging.choose, "name_of", lambda _, how: "sdpa" if how.rank == 64 else "products"
    )
    assert Judge()(SHAPE, None) == Measured(None)
    found = Judge()(SHAPE, HALF)
    assert isinstance(found, Measured)
    assert (found.exact, found.prefers_distr) == (None, True)
    assert [call[1:3] for call in asked] == [(HALF, SDPA)]


def test_a_call_is_measured_once(asked: list[Any]) -> None:
    Judge()(SHAPE, HALF)
    assert Judge()(SHAPE, dataclasses.replace(HALF, seed=5)) == BOTH
    assert len(asked) == 2
    stored.forget()  # as in another process
    assert Judge(may_measure=False)(SHAPE, HALF) == BOTH
    assert len(asked) == 2


@pytest.mark.parametrize(
    "changed",
    [
        SHAPE._replace(num_keys=161),
        SHAPE._replace(dtype=torch.bfloat16),
        SHAPE._replace(order=((0, 2, 1, 3), BHND, BHND)),
        SHAPE._replace(mask=((1, 1, 1, 160), torch.bool)),
        SHAPE._replace(is_causal=True),
    ],
    ids=str,
)
def test_another_call_is_measured_anew(asked: list[Any], changed: Shape) -> None:
    Judge()(SHAPE, None)
    Judge()(changed, None)
    assert [call[0] for call in asked] == [SHAPE, changed]


def test_another_number_of_threads_or_other_code_is_measured_anew(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Judge()(SHAPE, None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    Judge()(SHAPE, None)
    monkeypatch.setattr(stored, "code_digest", lambda: "of other code")
    Judge()(SHAPE, None)
    assert len(asked) == 3


def test_a_compile_has_so_many_seconds(asked: list[Any]) -> None:
    judge = Judge()
    found = [judge(SHAPE._replace(num_keys=n), None) for n in (20, 21, 22, 23)]
    assert found[:3] == [Measured(BOTH.exact)] * 3
    assert found[3] == "measuring has taken the 20 s that a compile spends on it"
    assert [call[3] for call in asked] == [2.0, 2.0, 2.0]
    Judge(call_limit=None, limit=None)(SHAPE, None)
    assert asked[-1][3] is None


def test_it_can_be_forbidden(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Judge(may_measure=False)(SHAPE, HALF) == "measuring is switched off"
    monkeypatch.setenv("DISTR_MEASURE", "0")
    assert Judge()(SHAPE, HALF) == "measuring is switched off"
    assert not asked


@pytest.mark.parametrize(("world", "measures"), [(1, True), (2, False)])
def test_a_group_of_processes_takes_what_is_stored(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, world: int, measures: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    found = Judge()(SHAPE, None)
    assert isinstance(found, Measured) == measures == bool(asked)
    if not measures:
        assert "a group of processes" in str(found)
        stored.store(SHAPE, None, SDPA, FAST)
        assert Judge()(SHAPE, None) == Measured(FAST)


def test_too_little_memory_is_no_error(monkeypatch: pytest.MonkeyPatch, may_measure: Path) -> None:
    def fail(*_: Any) -> Race:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(judging.measure, "race", fail)
    monkeypatch.setattr(judging.measure, "warm_up", lambda *_: None)
    monkeypatch.setattr(judging.choose, "name_of", lambda *_: "k")
    assert Judge()(SHAPE, HALF) == "there is not enough memory to measure it"
    assert not [path for path in may_measure.iterdir() if "race" in path.read_text()]


# --- symbolic sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fast_from", "fits_to", "least"),
    [(0, 9999, 256), (1024, 9999, 1024), (5000, 9999, None), (1024, 1024, 1024), (0, 200, None)],
)
def test_the_least_length_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    may_measure: Path,
    fast_from: int,
    fits_to: int,
    least: int | None,
) -> None:
    seen: list[Shape] = []

    def fake(shape: Shape, approximation: Any, against: str, *_: Any) -> Race | str:
        seen.append(shape)
        if shape.num_queries > fits_to:
            return "it takes too long"
        is_fast = approximation is None or shape.num_queries >= fast_from
        return dataclasses.replace(raced(shape, approximation, against), gain=1 + 0.4 * is_fast)

    monkeypatch.setattr(judging.measure, "race", fake)
    monkeypatch.setattr(judging.measure, "warm_up", lambda *_: None)
    monkeypatch.setattr(judging.choose, "name_of", lambda *_: "k")
    shape = SHAPE._replace(num_queries=1000, num_keys=1000, mask=((1, 1, 1, 1000), torch.bool))
    found = Judge().break_even(shape, HALF, ("num_queries", "num_keys"))
    assert (found[0] if isinstance(found, tuple) else None) == least
    lengths = [s.num_queries for s in seen]
    assert set(lengths) <= {256, 512, 1024, 2048}
    assert all(s.num_keys == s.num_queries == s.mask[0][3] for s in seen if s.mask)


@pytest.mark.parametrize(
    ("keys", "fast_from", "least"),
    [(77, 0, 77), (77, 600, "slower"), (4000, 0, 128), (4000, 500, 512), (4000, 4000, "slower")],
)
def test_only_what_is_symbolic_moves(
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    keys: int,
    fast_from: int,
    least: int | str,
) -> None:
    """With fewer keys than queries min(N, M) tells no length from another: all or none."""

    def fake(shape: Shape, *rest: Any) -> Race:
        asked.append((shape, *rest))
        is_fast = rest[0] is None or shape.num_queries >= fast_from
        return dataclasses.replace(raced(shape, *rest), gain=1.4 if is_fast else 0.9)

    monkeypatch.setattr(judging.measure, "race", fake)
    shape = SHAPE._replace(num_queries=500, num_keys=keys)
    found = Judge(limit=None).break_even(shape, HALF, ["num_queries"])
    if isinstance(found, Measured):
        assert (least, found.prefers_distr) == ("slower", False)
    else:
        assert found[0] == least
    assert {call[0].num_keys for call in asked} == {keys}
    assert {call[0].num_queries for call in asked} == {1024, 512, 256, 128}


def test_what_could_not_be_measured_stays_so(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decision must not hang on how busy the machine was; a judge without limits asks again."""
    monkeypatch.setattr(judging.measure, "warm_up", lambda *_: "it takes too long")
    assert Judge()(SHAPE, HALF) == "it takes too long"
    monkeypatch.setattr(judging.measure, "warm_up", lambda *_: None)
    assert Judge()(SHAPE, HALF) == "it takes too long"
    stored.forget()
    assert Judge()(SHAPE, HALF) == "it takes too long"
    assert not asked
    assert Judge(call_limit=None, limit=None)(SHAPE, HALF) == BOTH
    stored.forget()
    assert Judge()(SHAPE, HALF) == BOTH


def test_exact_attention_that_would_not_run_is_not_raced(asked: list[Any]) -> None:
    found = Judge()(SHAPE, HALF, ours=False)
    assert isinstance(found, Measured)
    assert found.exact is None
    assert [call[1:3] for call in asked] == [(HALF, SDPA)]


def test_beyond_sdpa_our_own_exact_attention_is_to_beat(asked: list[Any]) -> None:
    capped = SHAPE._replace(softcap=True)
    found = Judge()(capped, HALF)
    assert isinstance(found, Measured)
    assert [call[1:3] for call in asked] == [(HALF, EXACT)]
    assert list(found.seconds) == [EXACT, DISTR]
    assert isinstance(Judge()(capped, None), str)


def test_nothing_is_raced_without_elements(asked: list[Any]) -> None:
    assert Judge()(SHAPE._replace(batch=0), HALF) == "it has no elements"
    assert not asked


def test_a_mask_has_the_sizes_of_its_call() -> None:
    masked = SHAPE._replace(mask=((2, 1, 200, 160), torch.bool))
    assert masked.resized({"num_queries": 7}).mask == ((2, 1, 7, 160), torch.bool)
    assert masked.resized({"num_keys": 7}).mask == ((2, 1, 200, 7), torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_call_is_timed_both_ways(dtype: torch.dtype) -> None:
    """SDPA and the approximation, each with its backward; by name who computes them."""
    shape = SHAPE._replace(
        trained=True,
        dtype=dtype,
        is_causal=True,
        mask=((1, 1, 200, 160), dtype),
        order=((0, 2, 1, 3), (0, ~1, 2, 3), (0, 2, 1, 3)),
    )
    how = Approximation("projection", 32)
    arms = measure.arms(shape, how, 2)
    with measure.undisturbed(shape):
        for run in arms.values():
            gradients = run()
            sizes = [(1, 4, 200, 64), (1, 2, 160, 64), (1, 2, 160, 48)]
            assert [g.shape for g in gradients] == sizes
            assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)
    found = measure.race(shape, how)
    assert isinstance(found, Race)
    assert found.kernel == " + ".join(dict.fromkeys(training.names(shape, how)[:2]))
