"""The report without any compile: rows made by hand, read back in every way a user can."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distr_compile.reporting import (
    DistrWarning,
    GraphReport,
    NotAttention,
    Reason,
    Report,
    SiteRow,
    record,
    registry,
    report,
    table,
)
from distr_compile.reporting.publish import publish

POLICY_SAYS = Reason("group-size-1", "the policy says group_size = 1 (rule 1)")
NO_PRODUCT = Reason("no-qk-product", "no product of two activations reaches this softmax")


def shapes(*q, kv=None):
    return {"q": q, "k": kv or q, "v": kv or q}


def row(layer, site=0, **changes):
    base = SiteRow(
        layer=layer,
        form="softmax",
        shapes=shapes(2, 12, 128, 64),
        dtype="float32",
        mask="none",
        decision="distr",
        group_size=2,
        rank=32,
        estimator="lsh-mean",
        rounds=1,
        sees="all query rows of the grouping block",
        grouping_block="auto",
        flops=2 * 2 * 12 * 128 * 128 * (64 + 64),
        site=site,
    )
    return replace(base, **changes)


def exact_row(layer, site=0, reasons=(POLICY_SAYS,), **changes):
    plain = dict.fromkeys(("rank", "estimator", "rounds", "sees", "grouping_block"))
    plain["group_size"] = 1
    return row(layer, site, decision="exact", reasons=reasons, **plain, **changes)


def encoder(depth=12, exact=(3,)):
    """A BERT-like graph: ``depth`` layers of which ``exact`` stay exact."""
    names = [f"encoder.layer.{i}.attention.self" for i in range(depth)]
    rows = [
        exact_row(name, i, kernel="sdpa") if i in exact else row(name, i)
        for i, name in enumerate(names)
    ]
    gate = NotAttention("encoder.router", "softmax", (2, 128, 8), NO_PRODUCT)
    return GraphReport(0, "BertModel", tuple(rows), (gate,), notes=("one note",))


def lines(text):
    return text.splitlines()


def line_with(text, *parts):
    """The one line of ``text`` that has all ``parts``."""
    (line,) = [line for line in lines(text) if all(part in line for part in parts)]
    return line


# --- rows and totals ---------------------------------------------------------------------------


def test_totals_count_sites_and_flops():
    cross = row("cross", 12, flops=0, shapes=shapes("s0", 12, 128, 64))
    graph = encoder()
    whole = Report((replace(graph, rows=(*graph.rows, cross)),))
    assert (whole.found, whole.distr, whole.exact, whole.graphs) == (13, 12, 1, 1)
    assert len(whole.not_attention) == 1
    # 12 layers of equal size, 11 of them approximated; the one of unknown size does not count.
    assert whole.flops_approximated_percent == pytest.approx(100 * 11 / 12)


def test_share_of_flops_weighs_sites_by_size():
    rows = (row("big", 0, flops=300), exact_row("small", 1, flops=100))
    assert Report((GraphReport(0, "M", rows),)).flops_approximated_percent == 75.0


@pytest.mark.parametrize("rows", [(), (row("a", flops=0),)])
def test_share_of_flops_is_unknown_without_flops(rows):
    whole = Report((GraphReport(0, "M", rows),))
    assert whole.flops_approximated_percent is None
    assert "%" not in whole.summary()


def test_an_exact_row_needs_a_reason():
    with pytest.raises(ValueError, match=r"blocks\.0: an exact site needs at least one reason"):
        exact_row("blocks.0", reasons=())


def test_an_unknown_decision_is_refused():
    with pytest.raises(ValueError, match="got 'maybe'; accepted: 'distr', 'exact'"):
        row("blocks.0", decision="maybe")


def test_sites_of_a_graph_are_unique():
    with pytest.raises(ValueError, match=r"unique, got \[1, 1\]"):
        GraphReport(0, "M", (row("a", 1), row("b", 1)))


def test_runtime_counter_is_live_in_every_view_of_the_row():
    model = nn.Linear(1, 1)
    graph = GraphReport(4, "Linear", (row("a", 7), row("b", 9)))
    record(model, graph)
    before = report(model)
    graph.hear(9)
    graph.hear(9)
    assert [r.runtime_exact_calls for r in graph.rows] == [0, 2]
    assert [r.runtime_exact_calls for r in before.rows] == [0, 2]
    assert [r.runtime_exact_calls for r in report(model).rows] == [0, 2]
    assert "(2x exact)" in str(before)
    with pytest.raises(ValueError, match=r"site: got 8; graph 4 has \[7, 9\]"):
        graph.hear(8)


def test_counting_from_threads_loses_nothing():
    graph = GraphReport(0, "M", (row("a", 0),))

    def work():
        for _ in range(2000):
            graph.hear(0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graph.rows[0].runtime_exact_calls == 8000


def test_unmatched_is_what_no_graph_matched():
    first = GraphReport(0, "M", matched=("a",), unmatched=("b", "c"))
    second = GraphReport(1, "M", matched=("b",), unmatched=("c", "a"))
    assert Report((first, second)).unmatched == ("c",)


# --- the table ---------------------------------------------------------------------------------


def test_table_folds_equal_layers_and_shows_the_odd_one():
    text = Report((encoder(),), "BertModel").table(width=140)
    assert lines(text)[0] == "BertModel"
    assert "lsh-mean" in line_with(text, "encoder.layer.{0..2,4..11}.attention.self  x11")
    odd = line_with(text, "encoder.layer.3.attention.self")
    assert odd.split() == [
        *("encoder.layer.3.attention.self", "softmax", "qkv", "[2,12,128,64]", "float32", "none"),
        *("exact,", "sdpa", "1", "-", "group-size-1", "[1]"),
    ]
    assert line_with(text, "encoder.router").split()[1:] == [
        *("softmax", "[2,128,8]", "no-qk-product", "[2]")
    ]
    assert "[1] the policy says group_size = 1 (rule 1) (1x)" in text
    assert "[2] no product of two activations reaches this softmax (1x)" in text
    assert "note: one note" in text
    assert lines(text)[-1] == (
        "12 attentions in 1 graph; 11 distr, 1 exact; 91.7 % of attention FLOPs approximated; "
        "1 not attention"
    )


def test_table_without_folding_has_a_line_per_site():
    text = Report((encoder(),)).table(fold=False)
    assert sum("float32" in line for line in lines(text)) == 12
    assert "{" not in text


def test_table_numbers_the_graphs_when_there_are_several():
    parts = tuple(GraphReport(i, "Block", (row(f"blocks.{i}", i),)) for i in range(3))
    graphs = [line.split()[:2] for line in lines(Report(parts).table(fold=False))]
    assert graphs[0] == ["graph", "layer"]
    assert graphs[2:5] == [["0", "blocks.0"], ["1", "blocks.1"], ["2", "blocks.2"]]
    assert "blocks.{0..2}  x3" in Report(parts).table()


def test_table_folds_alternating_and_repeated_rows():
    rows = []
    for i in range(4):  # a decoder: self and cross attention take turns
        rows.append(row(f"decoder.{i}.self", 2 * i, mask="causal"))
        rows.append(row(f"decoder.{i}.cross", 2 * i + 1, shapes=shapes(2, 12, 128, 64, kv=(2, 3))))
    rows += [row("shared.attention", 8 + i) for i in range(5)]  # one module called five times
    text = str(Report((GraphReport(0, "M", tuple(rows)),)))
    assert "causal" in line_with(text, "decoder.{0..3}.self  x4")
    assert "q [2,12,128,64]" in line_with(text, "decoder.{0..3}.cross  x4")
    assert line_with(text, "shared.attention  x5")
    assert sum("distr" in line for line in lines(text)) == 3 + 1  # and the totals


def test_table_does_not_fold_what_differs_in_two_numbers():
    rows = (row("layers.0.blocks.0", 0), row("layers.1.blocks.1", 1))
    text = str(Report((GraphReport(0, "M", rows),)))
    assert line_with(text, "layers.0.blocks.0")
    assert line_with(text, "layers.1.blocks.1")


@pytest.mark.parametrize("width", [110, 132])
@pytest.mark.parametrize("fold", [True, False])
def test_table_keeps_its_width(fold, width):
    long = Reason("min-seq-len", "min(N_q, N_k) is below what is known to be faster " * 5)
    rows = [
        exact_row(
            f"model.vision_tower.transformer.resblocks.{i}.cross_attention.attn",
            i,
            reasons=(long, POLICY_SAYS),
            form="multi_head_attention_forward",
            shapes={"q": (2, 32, "s77", 64), "k": (2, 8, "s77", 64), "v": (2, 8, "s77", 128)},
            dtype="bfloat16",
            mask="causal",
        )
        for i in range(3)
    ]
    graph = GraphReport(0, "M", tuple(rows), notes=("a long note " * 30,), unmatched=("x.*",))
    text = Report((graph,)).table(fold, width)
    assert max(map(len, lines(text))) <= width
    for part in ("q [2,32,s77,64]", "k [2,8,s77,64]", "v [2,8,s77,128]", "min-seq-len [1]"):
        assert part in text
    assert "unmatched: policy pattern 'x.*' matches no attention" in text
    joined = "".join(line[:40].strip() for line in lines(Report((graph,)).table(False, width)))
    assert "transformer." in joined
    assert "cross_attention." in joined


def test_table_says_block_only_when_it_is_not_auto():
    rows = (row("a", 0), row("b", 1, grouping_block=64))
    text = str(Report((GraphReport(0, "M", rows),)))
    assert text.count("block") == 1
    assert "block 64" in text


def test_table_says_the_rank_where_it_is_no_group_size_and_more_than_one_round():
    odd = {"group_size": None, "rank": 40, "estimator": "projection", "rounds": 2}
    rows = (row("a", 0), row("b", 1, **odd), row("c", 2, **odd, grouping_block=64), row("d", 3))
    text = str(Report((GraphReport(0, "M", rows),)))
    assert line_with(text, "a ", "[2,12,128,64]").split()[-2:] == ["2", "lsh-mean"]
    for layer in "bc":
        assert line_with(text, f"{layer} ", "projection").split()[-2:] == ["r=40", "projection"]
    below = [line.strip() for line in lines(text) if line.startswith(" " * 40)]
    assert below == ["rounds 2", "rounds 2", "block 64"]


def test_table_says_what_the_rows_of_causal_sites_depend_on():
    far = {"estimator": "projection", "sees": "all keys", "mask": "causal"}
    rows = [row(f"blocks.{i}", i, mask="causal") for i in range(3)]
    rows += [row("last", 3, **far), row("cross", 4), exact_row("first", 5, mask="causal")]
    text = str(Report((GraphReport(0, "M", tuple(rows)),)))
    assert line_with(text, "blocks.{0..2}  x3").endswith("sees [1]")
    assert line_with(text, "last ").endswith("sees [2]")
    assert line_with(text, "cross ").endswith("lsh-mean")
    assert "[1] causal, and lsh-mean sees all query rows of the grouping block (3x)" in text
    assert "[2] causal, and projection sees all keys (1x)" in text
    assert "[3] the policy says" in text


def test_an_empty_report_prints():
    assert str(Report(())) == "0 attentions in 0 graphs; 0 distr, 0 exact"
    assert repr(Report((), "M")) == "<Report M: 0 attentions in 0 graphs; 0 distr, 0 exact>"


# --- JSON --------------------------------------------------------------------------------------


def test_json_round_trip_keeps_everything(tmp_path):
    graph = replace(encoder(), matched=("a",), unmatched=("b",))
    symbolic = GraphReport(1, "M", (row("", 5, shapes=shapes(2, "s0", 64), grouping_block=64),))
    symbolic.hear(5)
    whole = Report((graph, symbolic), "BertModel")
    path = tmp_path / "report.json"
    text = whole.to_json(path)
    again = Report.from_json(path.read_text())
    assert again == whole
    assert again.rows[-1].runtime_exact_calls == 1
    assert again.to_json() == text
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert json.loads(text)["totals"] == {
        "found": 13,
        "distr": 12,
        "exact": 1,
        "not_attention": 1,
        "graphs": 2,
        "graphs_without_attention": 0,
        "flops_approximated_percent": pytest.approx(100 * 12 / 13),
    }


def test_json_says_rank_rounds_and_what_a_row_depends_on():
    odd = row("a", group_size=None, rank=40, estimator="projection", rounds=2, sees="all keys")
    whole = Report((GraphReport(0, "M", (odd, exact_row("b", 1))),))
    approximate, exact = whole.to_dict()["graphs"][0]["rows"]
    names = ("group_size", "rank", "estimator", "rounds", "sees")
    assert [approximate[name] for name in names] == [None, 40, "projection", 2, "all keys"]
    assert [exact[name] for name in names] == [1, None, None, None, None]
    assert Report.from_json(whole.to_json()) == whole


def test_json_is_a_snapshot_of_the_counter():
    graph = GraphReport(0, "M", (row("a", 0),))
    data = Report((graph,)).to_dict()
    graph.hear(0)
    assert data["graphs"][0]["rows"][0]["runtime_exact_calls"] == 0


def test_json_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        Report(()).to_json(tmp_path / "missing" / "report.json")


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken', a folder; accepted: the path of a file"):
        Report(()).to_json(tmp_path / "taken")
    with pytest.raises(OSError, match=r"report: cannot write '\.', a folder; accepted: the path"):
        Report(()).to_json("")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=99), "got schema 99; this version reads schema 5"),
        (lambda d: d.pop("schema"), "got schema None"),
        (lambda d: d.pop("graphs"), "missing, unknown or wrong field: 'graphs'"),
        (lambda d: d["graphs"][0].update(colour="red"), "colour"),
        (lambda d: d["graphs"][0]["rows"][0].pop("dtype"), "dtype"),
        (lambda d: d["graphs"][0]["rows"][0].update(decision="maybe"), "got 'maybe'"),
    ],
)
def test_json_of_another_shape_is_refused(change, message):
    data = Report((encoder(),)).to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[1]", "null"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="report: "):
        Report.from_json(text)


# --- where reports are kept --------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Identity()

    def forward(self, x):
        return self.attn(x)


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))

    def forward(self, x):
        return self.blocks(x)


def one_site(layer, root="Block"):
    return GraphReport(0, root, (row(layer, 0),))


def test_a_compiled_model_and_the_model_have_one_report():
    model = Model()
    compiled = torch.compile(model, backend="eager")
    record(compiled, one_site("blocks.0.attn", "Model"))
    for obj in (model, compiled, model.forward):
        found = report(obj)
        assert found.name == "Model"
        assert [r.layer for r in found.rows] == ["blocks.0.attn"]


def test_functions_are_found_through_their_wrappers():
    def attention(x):
        return x

    compiled = torch.compile(attention, backend="eager")
    record(attention.__code__, one_site("", "attention"))
    for obj in (attention, compiled, functools.partial(attention), attention.__code__):
        assert report(obj).found == 1
    assert report(attention).name == "attention"


def test_submodules_compiled_one_by_one_merge_under_their_names():
    model = Model()
    gate = NotAttention("gate", "softmax", (2, 8), NO_PRODUCT)
    graph = replace(one_site("attn"), not_attention=(gate,))
    record(model.blocks[0], graph)
    record(model.blocks[2], one_site(""))
    record(model, one_site("head", "Model"))
    whole = report(model)
    assert [r.layer for r in whole.rows] == ["head", "blocks.0.attn", "blocks.2"]
    assert [r.graph for r in whole.rows] == [0, 1, 2]
    assert whole.not_attention[0].layer == "blocks.0.gate"
    assert [r.layer for r in report(model.blocks[0]).rows] == ["attn"]
    graph.hear(0)
    assert [r.runtime_exact_calls for r in whole.rows] == [0, 1, 0]


def test_a_submodule_replaced_by_its_compiled_wrapper_keeps_its_name():
    model = Model()
    record(model.blocks[1], one_site("attn"))
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert [r.layer for r in report(model).rows] == ["blocks.1.attn"]


def test_an_equal_key_replaces_and_another_one_adds():
    model = Model()
    record(model, one_site("first"), key=("forward", (2, 128)))
    record(model, one_site("second"), key=("forward", (2, 256)))
    record(model, one_site("again"), key=("forward", (2, 128)))
    assert [r.layer for r in report(model).rows] == ["again", "second"]
    record(model, one_site("unnamed"))
    record(model, one_site("unnamed"))
    assert report(model).graphs == 4


def test_the_report_lives_no_longer_than_the_model():
    model = Model()
    record(model, one_site("a"), key="k")
    record(model.blocks[0], one_site("a"))
    gc.collect()  # of other tests
    kept = len(registry._ENTRIES)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None
    assert len(registry._ENTRIES) == kept - 2


def test_modules_that_compare_by_value_are_kept_apart():
    class Equal(nn.Module):
        def __hash__(self):
            return 0

        def __eq__(self, other):
            return isinstance(other, Equal)

    first, second = Equal(), Equal()
    record(first, one_site("first"))
    record(second, one_site("second"))
    assert [r.layer for r in report(first).rows] == ["first"]
    assert [r.layer for r in report(second).rows] == ["second"]


def test_recording_from_threads_keeps_every_graph():
    model = Model()
    threads = [
        threading.Thread(target=lambda: [record(model, one_site("a")) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert report(model).graphs == 400


def test_nothing_recorded_says_what_to_do():
    with pytest.raises(LookupError, match=r"no report for Model: .*backend='distr'.*call it once"):
        report(Model())


def test_a_wrong_object_is_refused():
    with pytest.raises(TypeError, match=r"report: got str; accepted: an nn.Module, a function"):
        report("model")


def test_unmatched_patterns_warn_once_per_model():
    model = Model()
    graph = replace(one_site("a"), unmatched=("decoder.*",))
    with pytest.warns(DistrWarning, match=r"policy pattern 'decoder\.\*' matches no attention"):
        record(model, graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(model, graph)
    with pytest.warns(DistrWarning):
        record(Model(), graph)


def test_a_pattern_that_an_earlier_graph_matched_does_not_warn():
    model = Model()
    record(model, replace(one_site("a"), matched=("a",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(model, replace(one_site("b"), unmatched=("a",)))
    assert report(model).unmatched == ()


# --- where reports are shown -------------------------------------------------------------------


def test_the_log_says_the_rank_where_it_is_no_group_size_and_more_than_one_round():
    even = row("a", estimator="lsh-sample", grouping_block=64)
    assert table.line_of(even).endswith("distr, G = 2, lsh-sample, block 64")
    odd = row("a", group_size=None, rank=40, estimator="projection", rounds=2)
    assert table.line_of(odd).endswith("distr, r=40, projection in 2 rounds, block auto")


def test_publish_counts():
    from torch._dynamo.utils import counters

    before = counters["distr"].copy()
    publish(encoder(depth=4, exact=(0, 3)))
    counts = counters["distr"]
    counts.subtract(before)
    assert {name: n for name, n in counts.items() if n} == {
        "found": 4,
        "distr": 2,
        "exact": 2,
        "not_attention": 1,
        "reason: group-size-1": 2,
        "reason: no-qk-product": 1,
    }


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_publish_logs_sites_at_debug_and_totals_at_info(caplog, level):
    with caplog.at_level(level, "distr_compile"):
        publish(encoder(depth=2, exact=(1,)))
    ours = [entry for entry in caplog.records if entry.name.startswith("distr_compile")]
    said = [entry.getMessage() for entry in ours]
    totals = (
        "BertModel: 2 attentions in 1 graph; 1 distr, 1 exact; "
        "50.0 % of attention FLOPs approximated; 1 not attention"
    )
    sites = [
        "graph 0 encoder.layer.0.attention.self (softmax, qkv [2,12,128,64], float32): "
        "distr, G = 2, lsh-mean, block auto",
        "graph 0 encoder.layer.1.attention.self (softmax, qkv [2,12,128,64], float32): "
        "exact: group-size-1: the policy says group_size = 1 (rule 1)",
        "graph 0 encoder.router: softmax is not attention: "
        "no-qk-product: no product of two activations reaches this softmax",
    ]
    assert said == ([*sites, totals] if level == logging.DEBUG else [totals])


def test_torch_logs_and_tlparse_show_the_report(tmp_path):
    """In a process of its own: torch reads both variables while it is imported."""
    script = """
        import torch
        from distr_compile.reporting import GraphReport, Reason, SiteRow
        from distr_compile.reporting.publish import publish
        q = (1, 2, 32, 16)
        site = SiteRow("blocks.0", "sdpa", {"q": q, "k": q, "v": q}, "float32", "none", "exact",
                       reasons=(Reason("why", "because"),))
        publish(GraphReport(0, "Model", (site,)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TORCH_LOGS": "+distr_compile", "TORCH_TRACE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "graph 0 blocks.0 (sdpa, qkv [1,2,32,16], float32): exact: why: because" in done.stderr
    assert "Model: 1 attention in 1 graph; 0 distr, 1 exact" in done.stderr

    (trace,) = tmp_path.glob("*.log")
    text = trace.read_text()
    header = line_with(text, '"distr_report"')
    assert '"encoding": "json"' in header
    payload = text.split(header)[1].removeprefix("\n")
    kept = [line.removeprefix("\t") for line in lines(payload) if line.startswith("\t")]
    assert Report.from_json("\n".join(kept)).rows[0].layer == "blocks.0"
