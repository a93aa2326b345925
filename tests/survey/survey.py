"""Survey the zoo: what the pass finds, how it decides, and whether it changes a number.

    python -m tests.survey.survey [--only PATTERN] [--slice] [--resume] [--jobs N]

One line per case goes to ``results.csv``. Every case is measured in a worker process, which is
restarted when a case runs over its time.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fnmatch
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from distr_compile.comparing import named_tensors, relative_error
from distr_compile.lowering.exactly import computing_exactly

from .labels import agreement, census, parse, read_labels, spell
from .models import Case, cases, split
from .runtime import record

RESULTS = Path(__file__).with_name("results.csv")
TIME_LIMIT = 300.0  # seconds for one case, of which nearly all need fewer than ten

# Everything that can be approximated is: decisions then speak of structure, not of size.
# Nothing hangs on what is faster here.
APPROXIMATE: dict[str, Any] = {"default": {"group_size": 2, "min_seq_len": 0, "exact": "sdpa"}}
EXACT: dict[str, Any] = {"default": {"group_size": 1, "exact": "sdpa"}}

# Relative Frobenius error allowed between eager and the rewritten exact graph, both in fp32. The
# rewrite only reorders sums and moves factors, so an attention differs by a few eps = 6e-8; two to
# twenty layers with weights of gain one carry that to the output at 1e-7 to 3e-6 in this zoo. A
# lost mask, bias or scale costs 1e-2 and more.
TOLERANCE = 1e-5

# About one case per family, for the test suite; the zoo there has more.
SLICE = (
    "timm:beit_base_patch16_224:eager",
    "timm:convit_tiny:eager",
    "timm:swinv2_tiny_window8_256:eager",
    "timm:vit_tiny_patch16_224:eager",
    "hf:bert:eager",
    "hf:deberta-v2:eager",
    "hf:deepseek_v3:eager",
    "hf:gpt_oss:eager",
    "hf:llama:eager",
    "hf:xlnet:eager",
    "diffusers:CogVideoXTransformer3DModel:sdpa",
    "diffusers:PriorTransformer:eager",
)


@dataclass(frozen=True)
class Result:
    """One line of the survey.

    ``distr``, ``exact`` and ``found`` are decisions under ``APPROXIMATE``; ``max_rel_err`` is the
    worst output under ``EXACT`` against eager, ``max_rel_err_op`` under ``APPROXIMATE`` with
    exact attention in the place of the estimate: it checks every argument the op was given.
    ``right`` of ``labelled`` sites agree with the hand labels; ``inductor_fused`` is what
    Inductor's own ``fuse_attention`` pass rewrites of an eager spelling (0 for the others).
    """

    source: str
    name: str
    variant: str
    runtime_count: int = 0
    rows: int = 0
    not_attention: int = 0
    count_equal: bool = False
    distr: int = 0
    exact: int = 0
    found: str = ""
    right: int = 0
    labelled: int = 0
    inductor_fused: int = 0
    max_rel_err: float = float("nan")
    max_rel_err_op: float = float("nan")
    graphs: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def key(self) -> str:
        """As ``Case.key``."""
        return f"{self.source}:{self.name}:{self.variant}"

    @property
    def count_ours(self) -> int:
        """What must equal ``runtime_count``."""
        return self.rows + self.not_attention


def measure(case: Case, inductor: bool = True) -> Result:
    """Run every check on one case; whatever it raises becomes the line's ``error``."""
    start = time.perf_counter()
    result = Result(case.source, case.name, case.variant)
    try:
        result = _measure(case, result, inductor)
    except Exception as error:
        line = f"{type(error).__name__}: {error}".replace("\n", " ")
        result = dataclasses.replace(result, error=line[:300])
    return dataclasses.replace(result, seconds=round(time.perf_counter() - start, 1))


def _measure(case: Case, result: Result, inductor: bool) -> Result:
    from distr_compile import explain

    model, inputs = case.build()
    args, kwargs = split(inputs)
    torch._dynamo.reset()
    torch.manual_seed(0)  # a few models sample in eval mode too (informer, vit_mae)
    expected, events = record(model, inputs)
    with torch.no_grad():
        report = explain(model, *args, policy=APPROXIMATE, **kwargs)
    kept = run_compiled(model, inputs, EXACT)
    with computing_exactly():
        rewritten = run_compiled(model, inputs, APPROXIMATE)
    found = census(report)
    label = read_labels().get((case.source, case.name, case.variant))
    right, labelled = agreement(parse(label), found) if label is not None else (0, 0)
    fused = inductor_fusions(model, inputs) if inductor and case.variant == "eager" else 0
    return dataclasses.replace(
        result,
        runtime_count=len(events),
        rows=len(report.rows),
        not_attention=len(report.not_attention),
        count_equal=len(events) == len(report.rows) + len(report.not_attention),
        distr=report.distr,
        exact=report.exact,
        found=spell(found),
        right=right,
        labelled=labelled,
        inductor_fused=fused,
        max_rel_err=float(f"{worst_error(expected, kept):.1e}"),
        max_rel_err_op=float(f"{worst_error(expected, rewritten):.1e}"),
        graphs=report.graphs,
    )


def run_compiled(model: nn.Module, inputs: Mapping[str, Any], policy: dict[str, Any]) -> Any:
    """The output of a fresh compile with our pass alone; the rewritten graph runs eagerly."""
    args, kwargs = split(inputs)
    torch._dynamo.reset()
    options: dict[str, Any] = {"policy": policy, "compiler": "eager"}
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.compile(model, backend="distr", options=options)(*args, **kwargs)


def worst_error(expected: Any, got: Any) -> float:
    """The worst relative error over all floating tensors of two outputs of one model.

    Equal infinities (masked logits) and NaN in the same place count as equal.
    """
    pairs = zip(named_tensors(expected), named_tensors(got), strict=True)
    return max((relative_error(one, other) for (_, one), (_, other) in pairs), default=0.0)


def inductor_fusions(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many attentions Inductor's ``fuse_attention`` patterns rewrite in this model.

    Inductor matches them in its joint-graph passes, before ``inner_compile`` lowers the graph and
    generates code; nothing after that point runs them again. An ``inner_compile`` that returns the
    graph as it is therefore counts the same as a full compile (checked on BERT, GPT-2, ViT, DINOv2,
    DeiT and Swin) in a tenth of the time. Caches are off: a hit would skip the passes.
    """
    from torch._dynamo.utils import counters
    from torch._functorch import config as functorch_config
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    def keep(graph: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        return make_boxed_func(graph.forward)

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_fx(graph, example_inputs, inner_compile=keep)

    args, kwargs = split(inputs)
    torch._dynamo.reset()
    counters["inductor"].clear()
    with (
        torch.no_grad(),
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(force_disable_caches=True),
    ):
        torch.compile(model, backend=backend)(*args, **kwargs)
    return counters["inductor"]["fuse_attention"]


# --- the runner ---------------------------------------------------------------------------------


def _worker(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        connection.send(measure(connection.recv()))


class _Lane:
    """One worker process and its restarts."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self.connection, other = self.context.Pipe()
        self.process = self.context.Process(target=_worker, args=(other, self.threads), daemon=True)
        self.process.start()
        other.close()

    def measure(self, case: Case) -> Result:
        """The result, or a line saying that the case ran over its time or killed its process."""
        self.connection.send(case)
        try:
            if self.connection.poll(TIME_LIMIT):
                result: Result = self.connection.recv()
                return result
            problem = f"no result after {TIME_LIMIT:.0f} s"
        except EOFError:
            problem = "the worker process died"
        self.stop()
        self._start()
        return Result(case.source, case.name, case.variant, error=problem)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run(chosen: Sequence[Case], jobs: int) -> Iterable[Result]:
    """Measure cases in ``jobs`` processes; results come as they are ready."""
    todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    for case in chosen:
        todo.put(case)

    def drain() -> None:
        lane = _Lane(threads=max(1, torch.get_num_threads() // jobs))
        try:
            while True:
                done.put(lane.measure(todo.get_nowait()))
        except queue.Empty:
            lane.stop()

    for _ in range(jobs):
        threading.Thread(target=drain, daemon=True).start()
    for _ in chosen:
        yield done.get()


def read_results(path: Path = RESULTS) -> dict[str, Result]:
    """The committed survey, by case key; empty where there is none."""
    if not path.exists():
        return {}
    kinds: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "bool": "True".__eq__,
        "str": str,
    }
    fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(Result)}
    with path.open(newline="") as file:
        results = [
            Result(**{name: fields[name](value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]
    return {result.key: result for result in results}


def write_results(results: Mapping[str, Result], path: Path = RESULTS) -> None:
    """Write every case that has a result, in the order of the zoo."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Result)])
        for case in cases():
            if case.key in results:
                writer.writerow(dataclasses.astuple(results[case.key]))


def problems(result: Result) -> list[str]:
    """What is wrong with a line, in words; empty when everything holds."""
    if result.error:
        return [result.error]
    found = []
    if not result.count_equal:
        found.append(f"ran {result.runtime_count}, reported {result.count_ours}")
    if result.right != result.labelled:
        expected = read_labels()[result.source, result.name, result.variant]
        found.append(f"labelled {expected!r}, found {result.found!r}")
    if not result.max_rel_err <= TOLERANCE:
        found.append(f"error {result.max_rel_err:.1e} at group_size 1")
    if not result.max_rel_err_op <= TOLERANCE:
        found.append(f"error {result.max_rel_err_op:.1e} with the op computing exact attention")
    return found


def summary(results: Iterable[Result]) -> str:
    """The totals of a survey."""
    lines = list(results)
    clean = [line for line in lines if not line.error]
    total = sum(line.runtime_count for line in clean)
    right, labelled = sum(line.right for line in clean), sum(line.labelled for line in clean)
    eager = [line for line in clean if line.variant == "eager"]
    return "\n".join(
        (
            f"cases            {len(lines)} ({len(lines) - len(clean)} failed), "
            f"{len({line.name for line in clean if line.source == 'timm'})} timm models, "
            f"{len({line.name for line in clean if line.source == 'hf'})} transformers types, "
            f"{len({line.name for line in clean if line.source == 'diffusers'})} diffusers classes",
            f"counts equal     {sum(line.count_equal for line in clean)} of {len(clean)} cases "
            f"({total} attention-like operations ran)",
            f"labels agree     {right} of {labelled} sites"
            + (f" ({100 * right / labelled:.2f} %)" if labelled else ""),
            _errors("wrong at G = 1  ", [line.max_rel_err for line in clean]),
            _errors("wrong arguments ", [line.max_rel_err_op for line in clean]),
            f"approximated     {sum(line.distr for line in clean)} of "
            f"{sum(line.rows for line in clean)} attentions",
            f"eager spellings  ours {sum(line.distr for line in eager)} approximated of "
            f"{sum(line.rows for line in eager)}, "
            f"Inductor's fuse_attention {sum(line.inductor_fused for line in eager)}",
        )
    )


def _errors(title: str, errors: Sequence[float]) -> str:
    wrong = sum(not error <= TOLERANCE for error in errors)
    return f"{title} {wrong} of {len(errors)} cases, worst error {max(errors, default=0):.1e}"


def main() -> None:
    """The command line."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", help="glob on source:name:variant")
    parser.add_argument("--slice", action="store_true", help="the cases of the test suite")
    parser.add_argument("--resume", action="store_true", help="keep lines that have no error")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    options = parser.parse_args()

    chosen = [
        case
        for case in cases()
        if (not options.only or fnmatch.fnmatch(case.key, options.only))
        and (not options.slice or case.key in SLICE)
    ]
    part = bool(options.only or options.slice)
    results = read_results() if options.resume or part else {}
    if options.resume:
        chosen = [c for c in chosen if c.key not in results or results[c.key].error]
    progress = tqdm(total=len(chosen), unit="case", smoothing=0)
    for result in run(chosen, options.jobs):
        results[result.key] = result
        write_results(results)
        progress.update()
        progress.set_postfix_str(result.name)
        for problem in problems(result):
            progress.write(f"{result.key}: {problem}")
    progress.close()
    print(summary(results.values()))


if __name__ == "__main__":
    main()
