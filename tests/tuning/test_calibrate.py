"""Calibration: the sums it makes, the bases that come of them, and where they may be used."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distr_compile
from distr_compile import Batch, cli, explain
from distr_compile.bases import Bases, fingerprint
from distr_compile.cli import FOUND_ERROR, OK, USAGE, main
from distr_compile.commands import calibrate as command
from distr_compile.policy import Policy, PolicyError
from distr_compile.tuning.calibrate import Statistics, calibrate, nested_bases
from tests.saved_models import TEXT, saved_gpt2
from tests.tiny_models import HEADS, KEY_HEADS, WIDTH, Attention, noise, stack
from tests.tuning.calibrated import FIELDS, relative, run

# --- the sums -----------------------------------------------------------------------------------


def numpy_gram(rows: Tensor, counted: np.ndarray) -> np.ndarray:
    """Of (tokens..., heads of one key head, d)."""
    X = rows.detach().double().numpy()[counted].reshape(-1, rows.shape[-1])
    return X.T @ X


def test_statistics_are_the_gram_matrices_of_the_rows_that_count() -> None:
    q, k = torch.randn(2, HEADS, 20, WIDTH), torch.randn(2, KEY_HEADS, 20, WIDTH)
    q[0, 0, 3, 5] = torch.inf
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, 12:] = False
    statistics = Statistics()
    statistics.add(q, k, keep[:, None, None, :])
    statistics.add(q[:1], k[:1], None)
    assert statistics.rows == 20 + 12 + 20
    assert statistics.Cq is not None
    assert statistics.Ck is not None
    assert statistics.Cq.dtype == torch.float64
    q = q.nan_to_num(posinf=0)
    for head in range(KEY_HEADS):
        Cq, Ck = np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, WIDTH))
        for entry, counted in ((0, keep[0]), (1, keep[1]), (0, keep[0])):
            for query_head in (2 * head, 2 * head + 1):
                Cq += numpy_gram(q[entry, query_head], counted.numpy())
            Ck += numpy_gram(k[entry, head], counted.numpy())
        np.testing.assert_allclose(statistics.Cq[head], Cq, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(statistics.Ck[head], Ck, rtol=1e-12, atol=1e-12)
    assert statistics.query_rows is not None
    assert statistics.query_rows.tolist() == [2 * 52, 2 * 52]


def test_keys_shared_by_all_batch_entries_count_once_for_each_that_masks_them() -> None:
    q, k = torch.randn(2, 1, 20, WIDTH), torch.randn(1, 1, 24, WIDTH)
    keep = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    keep[1, ..., 10:] = False
    statistics = Statistics()
    statistics.add(q, k, keep)
    K = k[0, 0].double()
    assert statistics.Ck is not None
    torch.testing.assert_close(statistics.Ck[0], K.T @ K + K[:10].T @ K[:10])
    assert statistics.key_rows is not None
    assert statistics.key_rows.tolist() == [34]


def test_a_model_is_observed_with_exact_activations(tmp_path: Path) -> None:
    """The second layer's sums are those of the exact first layer; padding is left out."""
    model, x = stack(), noise(3, 2, 32)
    keep = torch.ones(2, 32, dtype=torch.bool)
    keep[0, 20:] = False
    batch = {"x": x, "keep": keep}
    result = calibrate(model, [batch, batch], path=tmp_path / "b", progress=False)
    assert result.refused == {}
    assert list(result.bases.layers) == ["layers.0", "layers.1"]
    with torch.no_grad():
        first, second = model.layers  # type: ignore[misc]
        q, k, _ = second.operands(x + first(x, keep))  # type: ignore[operator]
    layer = result.bases.layers["layers.1"]
    assert layer.rows == 2 * (32 + 20)
    rows = keep.numpy()
    for head in range(KEY_HEADS):
        Q = np.concatenate([q[:, 2 * head + i].double().numpy()[rows] for i in range(2)])
        K = k[:, head].double().numpy()[rows]
        values = np.linalg.svd(Q @ K.T, compute_uv=False)[:WIDTH] / np.sqrt(len(Q) * len(K))
        # The ridge adds up to 2^-18 of the norm of Cq to the squares of Q's singular values.
        np.testing.assert_allclose(layer.singular_values[head], values, rtol=1e-3, atol=1e-5)


# --- the bases ----------------------------------------------------------------------------------


def grams(Q: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    return Q.mT @ Q, K.mT @ K


def correlated(seed: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    mixing = mixing * torch.logspace(0, -2, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing


def test_every_rank_is_the_best_possible() -> None:
    """Against NumPy's truncated SVD of the whole matrix of scores: at most 0.1 % more error."""
    Q, K = correlated(0, 200, 32), correlated(1, 300, 32)
    A, B, s = nested_bases(*grams(Q, K))
    S = (Q @ K.T).numpy()
    values = np.linalg.svd(S, compute_uv=False)
    np.testing.assert_allclose(s, values[:32], rtol=1e-4, atol=2e-5 * values[0])
    for rank in range(1, 32):
        error = np.linalg.norm(S - ((Q @ A[:, :rank]) @ (K @ B[:, :rank]).T).numpy())
        best = np.sqrt((values[rank:] ** 2).sum())
        # The ridge is not in S: it shows where S has hardly anything left.
        assert best * (1 - 1e-9) <= error <= best * 1.001 + 1e-5 * values[0], rank


def test_the_full_rank_is_exact() -> None:
    A, B, _ = nested_bases(*grams(correlated(0, 200, 64), correlated(1, 300, 64)))
    torch.testing.assert_close(A @ B.mT, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-10)
    # As stored: A and B in fp32, and roots that differ by up to 2^9.
    torch.testing.assert_close(A.float() @ B.float().mT, torch.eye(64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("narrow", ["queries", "keys"])
def test_exact_where_the_data_has_no_more_than_the_rank(narrow: str) -> None:
    Q, K = correlated(0, 100, 32), correlated(1, 100, 32)
    if narrow == "queries":
        Q = Q[:, :16] @ torch.randn(16, 32, dtype=torch.float64)
    else:
        K = K[:, :16] @ torch.randn(16, 32, dtype=torch.float64)
    A, B, _ = nested_bases(*grams(Q, K))
    S = Q @ K.T
    assert relative(Q @ A[:, :16] @ (K @ B[:, :16]).T, S) < 1e-4


@pytest.mark.parametrize("zero", ["Q", "K", "both"])
def test_nothing_but_zeros_gives_finite_bases(zero: str) -> None:
    Q, K = correlated(0, 50, 16), correlated(1, 50, 16)
    Q, K = Q * (zero == "K"), K * (zero == "Q")
    A, B, s = nested_bases(*grams(Q, K))
    for t in (A, B, s):
        assert t.isfinite().all()
    torch.testing.assert_close(A @ B.mT, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-8)


def test_factors_come_out_equally_large(calibrated: Any) -> None:
    model, result, _ = calibrated
    with torch.no_grad():
        q, k, _ = model.layers[0].operands(noise(1, 2, 64))
    layer = result.bases.layers["layers.0"]
    Qhat = q.unflatten(1, (KEY_HEADS, -1)) @ layer.basis_q[:, None, :, :16]
    Khat = k @ layer.basis_k[..., :16]
    ratio = Qhat.square().mean((0, 2, 3, 4)) / Khat.square().mean((0, 2, 3))
    assert ((ratio > 0.5) & (ratio < 2)).all(), ratio


# --- compiled models ----------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_every_compiler_takes_the_bases(calibrated: Any, compiler: str) -> None:
    model, _, policy = calibrated
    x = noise(1, 2, 64)
    exact = model(x).detach()
    got = run(model, policy, x, compiler=compiler)
    assert 1e-4 < relative(got, exact) < 0.1
    dynamic = run(model, policy, x, compiler=compiler, dynamic=True)
    torch.testing.assert_close(dynamic, got, rtol=1e-4, atol=1e-5)
    full = policy.with_default(rank=WIDTH - 1)
    assert relative(run(model, full, x, compiler=compiler), exact) < relative(got, exact) / 3


@pytest.mark.parametrize("changed", [1, 15, 16, 31, 47])
def test_no_later_token_moves_an_earlier_output(calibrated: Any, changed: int) -> None:
    """Strictly causal, inside a block and at its edge: equal but for sums in another order."""
    model, _, policy = calibrated
    x = noise(4, 2, 48)
    other = x.clone()
    other[:, changed:] = noise(5, 2, 48)[:, changed:] * 30
    policy = policy.with_default(grouping_block=16)
    before, after = run(model, policy, x), run(model, policy, other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-6, atol=1e-6)
    assert not torch.equal(after[:, changed:], before[:, changed:])


def test_the_report_says_that_nothing_else_is_seen(calibrated: Any) -> None:
    model, _, policy = calibrated
    for row in explain(model, noise(1, 2, 64), policy=policy).rows:
        assert (row.decision, row.estimator, row.rank) == ("distr", "calibrated", 16)
        assert row.sees == "nothing but the row itself"


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner.layers:  # type: ignore[union-attr]
            torch._dynamo.graph_break()
            x = x + layer(x)
        return x


@pytest.mark.parametrize("make", [Checkpointed, Broken])
def test_bodies_and_several_graphs(make: Any, tmp_path: Path) -> None:
    model, x = make().eval(), noise(1, 2, 64)
    result = calibrate(model, [x], path=tmp_path / "b", progress=False)
    assert list(result.bases.layers) == ["inner.layers.0", "inner.layers.1"]
    policy = Policy(FIELDS).with_bases(result.path, result.sha256)
    assert 1e-4 < relative(run(model, policy, x, compiler="aot_eager"), model(x).detach()) < 0.1


@torch.compiler.nested_compile_region
def region(layer: Attention, x: Tensor) -> Tensor:
    return Attention.forward(layer, x)


class Regional(Attention):
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return region(self, x)  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One module called twice, and two attentions in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = stack().layers[0]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * self.layer(x.flip(1) + 1)  # type: ignore[no-any-return]


def test_calls_of_one_layer_have_bases_each(tmp_path: Path) -> None:
    model, x = Twice().eval(), noise(1, 2, 64)
    result = calibrate(model, [x], path=tmp_path / "b", progress=False)
    assert list(result.bases.layers) == ["layer#1of2", "layer#2of2"]
    policy = Policy(FIELDS).with_bases(result.path, result.sha256)
    error = relative(run(model, policy, x), model(x).detach())
    assert error < 0.12
    names = list(result.bases.layers)
    swapped = dict(zip(names[::-1], result.bases.layers.values(), strict=True))
    data = dataclasses.replace(result.bases, layers=swapped).to_bytes()
    result.path.write_bytes(data)
    policy = policy.with_bases(result.path, hashlib.sha256(data).hexdigest())
    torch.compiler.reset()
    assert relative(run(model, policy, x), model(x).detach()) > 1.2 * error


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"path": "no/such/b"}, ValueError, "path: got 'no/such/b'; accepted: a file in a folder"),
        ({"path": None}, TypeError, "path: got None (NoneType); accepted: the path of a file"),
        ({"limit": -1}, ValueError, "limit: got -1; accepted: a number of batches >= 1"),
        ({"model": None}, TypeError, "model: got None (NoneType); accepted: a torch.nn.Module"),
        (
            {"layers": ["layers.0", "layres.1"]},
            PolicyError,
            'got "layres.1", which names no module of the model; accepted: ',
        ),
    ],
)
def test_mistakes_are_told_before_the_model_runs(
    options: dict[str, Any], kind: type[Exception], told: str, tmp_path: Path
) -> None:
    def never() -> list[Batch]:
        raise AssertionError("measured")

    arguments: dict[str, Any] = {"model": stack(), "path": tmp_path / "b", **options}
    with pytest.raises(kind, match=re.escape(told)):
        calibrate(batches=never, progress=False, **arguments)
    assert not (tmp_path / "b").exists()


def test_data_without_a_finite_row_makes_no_bases(tmp_path: Path) -> None:
    x = noise(1, 2, 64)
    x[1] = torch.nan
    made = calibrate(stack(), [x], path=tmp_path / "b", progress=False)
    assert {bases.rows for bases in made.bases.layers.values()} == {64}
    with pytest.raises(ValueError, match="no finite row of the data was counted"):
        calibrate(stack(), [x[1:]], path=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_a_body_shared_by_layers_is_refused(tmp_path: Path) -> None:
    """Neither can it be calibrated nor take bases, of which it would need several."""
    model = nn.Sequential(Regional(), Regional()).eval()
    with pytest.raises(ValueError, match="one body is called for several layers"):
        calibrate(model, [noise(1, 2, 64)], path=tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()
    for row in explain(model, noise(1, 2, 64), policy=Policy(FIELDS)).rows:
        assert row.decision == "exact"
        assert "each of which has bases of its own" in row.reasons[0].text


SECOND_PROCESS = """
import sys, torch
sys.path.insert(0, {folder!r})
from tests.tiny_models import noise, stack
from distr_compile.tuning.calibrate import calibrate
from distr_compile.policy import Policy
model, x = stack(), noise(1, 2, 64)
result = calibrate(model, [noise(int(sys.argv[1]), 2, 64)], path="b", progress=False)
policy = Policy({fields!r}).with_bases(result.path, result.sha256)
with torch.no_grad():
    got = torch.compile(model, backend="distr", options={{"policy": policy}})(x)
    eager = {{"policy": policy, "compiler": "eager"}}
    torch.compiler.reset()
    wanted = torch.compile(model, backend="distr", options=eager)(x)
torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
print("hits", hits, "moved", (wanted - model(x)).norm().item())
"""


def test_cached_code_takes_the_bases_of_the_present_file(tmp_path: Path) -> None:
    """Inductor's caches are of the code; bases made from other data are inputs of it."""
    script = SECOND_PROCESS.format(folder=str(Path(__file__).parents[2]), fields=FIELDS)
    outputs = []
    for seed in ("1", "7"):
        done = subprocess.run(
            [sys.executable, "-c", script, seed],
            cwd=tmp_path,
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                # Neither vector instructions nor headers are compiled for one kernel.
                "TORCHINDUCTOR_VEC_ISA_OK": "0",
                "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert [out[1] for out in outputs] == ["0", "1"]
    assert outputs[0][3] != outputs[1][3]


# --- what is calibrated -------------------------------------------------------------------------


def test_the_policy_says_which_layers(tmp_path: Path) -> None:
    policy = {"rule": [{"layers": "*.1", "estimator": "calibrated"}]}
    result = calibrate(stack(), [noise(1, 2, 64)], policy, path=tmp_path / "b", progress=False)
    assert list(result.bases.layers) == ["layers.1"]


def test_refused_attention_is_listed(tmp_path: Path) -> None:
    result = calibrate(
        stack(), [noise(1, 2, 8), noise(1, 2, 64)], path=tmp_path / "b", progress=False
    )
    assert result.refused == {}  # of the 8 rows nothing is known, of the 64 all
    with pytest.raises(ValueError, match=r"layers\.0.: N_q is 8; fewer than 16"):
        calibrate(stack(), [noise(1, 2, 8)], path=tmp_path / "b", progress=False)


def test_without_data_or_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches: got none"):
        calibrate(stack(), [], path=tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="no attention to make bases for"):
        calibrate(stack(), [noise(1, 2, 64)], {}, path=tmp_path / "b", progress=False)


def test_batches_are_taken_as_everywhere(tmp_path: Path) -> None:
    """Any kind of call, from a function or a list, so many as asked for, on the model's device."""
    moved = []

    class Moved(Batch):
        def to(self, device: torch.device | str) -> Batch:
            moved.append(device)
            return super().to(device)

    x, y = noise(1, 2, 64), noise(2, 2, 64)
    kinds: list[Any] = [x, (x,), {"x": x}, Moved((x,), labels=torch.ones(2))]
    files = [tmp_path / str(number) for number in range(len(kinds) + 1)]
    for kind, path in zip(kinds, files[1:], strict=True):
        function = functools.partial(iter, [kind, y])
        calibrate(stack(), function, path=path, limit=1, progress=False)
    calibrate(stack(), [x], path=files[0], progress=False)
    assert len({path.read_bytes() for path in files}) == 1
    assert moved == [torch.device("cpu")]
    with pytest.raises(ValueError, match="generator, which can be walked only once; accepted"):
        calibrate(stack(), (x for _ in "1"), path=tmp_path / "b", progress=False)


def test_the_callers_compilation_is_left_alone(calibrated: Any) -> None:
    """Calibrating leaves no compiled code behind, and the model as it was."""
    model, _, _ = calibrated
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(model, backend=counter)(noise(1, 2, 64))
    assert counter.frame_count == 1
    assert not any("distr" in name for name, _ in model.named_buffers())


def test_a_hugging_face_decoder(tmp_path: Path) -> None:
    """Grouped heads, rotary positions, and a mask that hides the left padding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    seen: dict[str, Tensor] = {}

    def keep(module: Any, _: Any, output: Tensor, name: str) -> None:
        seen[name] = output

    first = model.layers[0].self_attn
    handles = [
        getattr(first, name).register_forward_hook(lambda m, i, o, n=name: keep(m, i, o, n))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(**batch, position_ids=positions)
        cos, sin = model.rotary_emb(seen["q_proj"], positions)
    for handle in handles:
        handle.remove()
    result = calibrate(
        model, [{**batch, "position_ids": positions}], path=tmp_path / "b", progress=False
    )
    assert result.refused == {}
    assert list(result.bases.layers) == [f"layers.{i}.self_attn" for i in range(2)]
    layer = result.bases.layers["layers.0.self_attn"]
    assert layer.rows == 48 + 28
    q, k = (seen[n].unflatten(-1, (-1, 32)).transpose(1, 2) for n in ("q_proj", "k_proj"))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    rows = mask.bool().numpy()
    for head in range(2):
        Q = np.concatenate([q[:, 2 * head + i].double().numpy()[rows] for i in range(2)])
        K = k[:, head].double().numpy()[rows]
        values = np.linalg.svd(Q @ K.T, compute_uv=False)[:32] / np.sqrt(len(Q) * len(K))
        np.testing.assert_allclose(
            layer.singular_values[head], values, rtol=1e-2, atol=1e-3 * values[0]
        )


# --- the command --------------------------------------------------------------------------------


def data() -> list[Tensor]:
    """For the command line."""
    return [noise(seed, 2, 48) for seed in range(4)]


COMMAND = ["calibrate", "tests.tiny_models:stack", "--data", "test_calibrate:data"]


def test_the_command_writes_a_file_that_the_policy_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policies").mkdir()
    policy = Path("policies/p.toml")
    policy.write_text('# mine\n[default]\nestimator = "calibrated"\nmin_seq_len = 0\n')
    arguments = [*COMMAND, "--out", "b.safetensors", "--policy", str(policy), "--write"]
    assert main([*arguments, "--batches", "3"]) == OK
    out = capsys.readouterr().out
    assert "layers.0: 288 rows, 2 key heads of width 32" in out
    assert 'file = "../b.safetensors"' in out
    text = policy.read_text()
    assert text.startswith("# mine\n[default]")
    assert text.endswith(out[out.index("[bases]") :])
    calibrate(stack(), data()[:3], path="mine", progress=False)
    assert Path("mine").read_bytes() == Path("b.safetensors").read_bytes()
    rows = explain(stack(), noise(9, 2, 48), policy=policy).rows
    assert [row.decision for row in rows] == ["distr", "distr"]


def test_the_command_takes_published_weights_and_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against NumPy's SVD of the scores that the saved model has on the text."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    saved_gpt2(tmp_path)
    Path("text.txt").write_text(TEXT)
    line = "calibrate hf:gpt2 --pretrained --text text.txt --tokens 64 --batch-size 4 --limit 2"
    assert main([*line.split(), "--out", "b.safetensors"]) == OK
    out, err = capsys.readouterr()
    assert "transformer.h.0.attn: 512 rows, 2 key heads of width 32" in out
    assert "random" not in err

    model = transformers.AutoModelForCausalLM.from_pretrained("gpt2").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[:512].view(8, 64)
    seen: list[Tensor] = []
    first = model.transformer.h[0].attn.c_attn
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(ids)
    bases = Bases.from_bytes(Path("b.safetensors").read_bytes())
    assert bases.fingerprint == fingerprint(model)
    values = bases.layers["transformer.h.0.attn"].singular_values
    q, k, _ = (part.double().numpy() for part in seen[0].flatten(0, 1).split(64, -1))
    for head, columns in enumerate((slice(0, 32), slice(32, 64))):
        wanted = np.linalg.svd(q[:, columns] @ k[:, columns].T, compute_uv=False)[:32] / 512
        np.testing.assert_allclose(values[head], wanted, rtol=1e-2, atol=1e-3 * wanted[0])


def test_the_commands_of_the_document_are_written_rightly() -> None:
    text = (Path(__file__).parents[2] / "docs/estimators.md").read_text("utf-8")
    lines = re.findall(r"^distr (calibrate .*)$", text, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        options = cli._parser().parse_args(shlex.split(line))
        assert options.run is command.run
        assert options.write


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*COMMAND, "--write"], USAGE, "--write: got no --policy to write into"),
        (COMMAND[:2], USAGE, "--data, --text: got neither; accepted: one of the two"),
        ([*COMMAND[:2], "--text", "t.txt"], USAGE, "--text: got one for tests.tiny_models:stack"),
        ([*COMMAND[:3], "test_calibrate:dat"], FOUND_ERROR, "--data: got 'test_calibrate:dat'"),
        ([*COMMAND, "--policy", "none.toml"], FOUND_ERROR, "none.toml"),
        ([*COMMAND, "--metric", "kl"], USAGE, "unrecognized arguments: --metric kl"),
        ([*COMMAND, "--shape", "2,48"], USAGE, "unrecognized arguments: --shape 2,48"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "b")]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "b").exists()


def test_a_model_that_is_trained_keeps_its_bases(tmp_path: Path) -> None:
    """They are of the parameters before the first step: that is said, and no error."""
    torch._dynamo.reset()
    model, x = stack(), noise(1, 2, 64)
    result = calibrate(model, [x], path=tmp_path / "b", progress=False)
    fields = {**FIELDS, "training": "approximate"}
    policy = Policy(fields).with_bases(result.path, result.sha256)
    options = {"policy": policy, "compiler": "eager"}
    compiled = torch.compile(model, backend="distr", options=options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compiled(x).square().mean().backward()
    assert distr_compile.report(compiled).parts[0].notes == ()
    optimizer.step()
    compiled(noise(2, 3, 64)).square().mean().backward()
    with torch.no_grad():
        compiled(x)
    for graph in distr_compile.report(compiled).parts[1:]:
        assert any("before its parameters changed" in note for note in graph.notes)
    for other in (copy.deepcopy(model), model):  # also by another torch.compile
        with pytest.raises(Exception, match="bases of a model with fingerprint"):
            torch.compile(other, backend="distr", options={**options, "measure": False})(x)
