"""The command line: what it prints, where, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from distr_compile import targets
from distr_compile.cli import FOUND_ERROR, OK, USAGE, main
from distr_compile.commands import policy, tune
from distr_compile.reporting import GraphReport, Reason, Report, SiteRow

POLICY = """
[default]
group_size = 2

[[rule]]
layers = "blocks.*.attn"
group_size = 1
"""

TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
SMALL_TIMM = "timm:vit_tiny_patch16_224"  # the smallest ViT timm has; 12 blocks of fused attention

FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x, *, causal):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention()}) for _ in range(2))

    def forward(self, x, causal=False):
        for block in self.blocks:
            x = x + block["attn"](x, causal=causal).transpose(1, 2).flatten(2)
        return x

def whole():
    return Model(), (torch.randn(2, 32, 64),), {"causal": True}

def pair():
    return Model(), (torch.randn(2, 32, 64),)

def alone():
    return Model()

def wrong():
    return Model(), torch.randn(2, 32, 64)

number = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with ``models.py`` as the current one, as for a user in their project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    (tmp_path / "models.py").write_text(FACTORIES)
    (tmp_path / "p.toml").write_text(POLICY)
    (tmp_path / "bert.json").write_text(json.dumps(TINY_BERT))
    yield tmp_path
    sys.modules.pop("models", None)


@pytest.fixture
def explained(monkeypatch):
    """``explain`` replaced by one that keeps its arguments and returns a made-up report."""
    calls = types.SimpleNamespace(unmatched=(), error=None)

    def explain(model, *args, policy=None, **kwargs):
        if calls.error:
            raise calls.error
        calls.model, calls.args, calls.policy, calls.kwargs = model, args, policy, kwargs
        calls.grad = torch.is_grad_enabled()
        calls.static = torch._dynamo.config.assume_static_by_default
        q = (2, 2, 32, 32)
        rows = tuple(
            SiteRow(
                *(f"blocks.{i}.attn", "sdpa", {"q": q, "k": q, "v": q}, "float32", "none"),
                decision="exact",
                reasons=(Reason("group-size-1", "the policy says so"),),
                site=i,
            )
            for i in range(2)
        )
        return Report((GraphReport(0, "Model", rows, unmatched=calls.unmatched),), "Model")

    fake = types.SimpleNamespace(explain=explain)
    monkeypatch.setitem(sys.modules, "distr_compile.explaining", fake)
    return calls


# --- usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["explain"], "TARGET"),
        (["explian", "x:y"], "invalid choice: 'explian'"),
        (["explain", "hf:bert", "--shape", "2,-1"], "got '2,-1'; accepted: positive sizes"),
        (["explain", "hf:bert", "--attn", "flash"], "invalid choice: 'flash'"),
        (["explain", "bert"], "target: got 'bert'; accepted: timm:NAME, hf:NAME"),
        (["explain", "models:pair", "--shape", "2,8"], "--shape and --attn are for timm: and hf:"),
        (["policy"], "ACTION"),
    ],
)
def test_a_wrongly_written_command_is_usage(models, capsys, argv, message):
    assert main(argv) == USAGE
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_help_is_fine(capsys):
    assert main(["explain", "--help"]) == OK
    assert "pkg.module:factory" in capsys.readouterr().out


# --- distr policy ------------------------------------------------------------------------------


def test_policy_check_says_what_the_file_says(models, capsys):
    assert main(["policy", "check", "p.toml"]) == OK
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "OK p.toml"
    assert "default: group_size = 2, estimator = projection" in out
    assert "rule 1: blocks.*.attn: group_size = 1" in out
    assert err == ""


def test_policy_check_against_a_model_counts_modules(models, capsys):
    assert main(["policy", "check", "p.toml", "--model", "models:alone"]) == OK
    assert "rule 1: blocks.*.attn: group_size = 1 (2 modules)" in capsys.readouterr().out


def test_policy_check_finds_a_rule_that_names_no_module(models, capsys):
    (models / "p.toml").write_text(POLICY.replace("blocks", "layers"))
    assert main(["policy", "check", "p.toml", "--model", "models:alone"]) == FOUND_ERROR
    out, err = capsys.readouterr()
    assert "layers.*.attn" in err
    assert out == ""


def test_policy_check_shows_an_error_without_a_traceback(models, capsys):
    (models / "p.toml").write_text(POLICY.replace("group_size = 1", "group_size = 0"))
    assert main(["policy", "check", "p.toml"]) == FOUND_ERROR
    err = capsys.readouterr().err
    assert err.startswith("distr: p.toml:")
    assert "group_size: got 0" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(models):
    (models / "p.toml").write_text("nonsense = 1")
    with pytest.raises(ValueError, match="nonsense"):
        main(["policy", "check", "p.toml", "--debug"])


def test_policy_schema_is_json(capsys):
    assert main(["policy", "schema"]) == OK
    schema = json.loads(capsys.readouterr().out)
    assert "rule" in schema["properties"]


def test_policy_commands_load_no_torch(models):
    script = (
        "import sys; from distr_compile.cli import main; main(['policy', 'check', 'p.toml']); "
        "sys.exit('torch' in sys.modules)"
    )
    path = {"PYTHONPATH": str(targets.Path(targets.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], cwd=models, env=path, timeout=60)
    assert done.returncode == 0


# --- distr explain, with explain replaced ------------------------------------------------------


def test_explain_prints_the_table_and_writes_json(models, explained, capsys):
    assert main(["explain", "models:whole", "--policy", "p.toml", "--json", "out.json"]) == OK
    out, err = capsys.readouterr()
    assert "blocks.{0..1}.attn  x2" in out
    assert err == ""
    assert Report.from_json((models / "out.json").read_text()).found == 2
    assert [tuple(a.shape) for a in explained.args] == [(2, 32, 64)]
    assert explained.kwargs == {"causal": True}
    assert explained.policy.rule[0].layers == "blocks.*.attn"
    assert not explained.model.training
    assert not explained.grad
    assert explained.static


def test_explain_without_folding(models, explained, capsys):
    assert main(["explain", "models:pair", "--no-fold"]) == OK
    assert "blocks.1.attn" in capsys.readouterr().out


def test_explain_with_symbolic_sizes(models, explained):
    assert main(["explain", "models:pair", "--dynamic"]) == OK
    assert not explained.static
    assert torch._dynamo.config.assume_static_by_default


def test_explain_casts_weights_and_inputs(models, explained):
    assert main(["explain", "models:pair", "--dtype", "bfloat16"]) == OK
    assert {p.dtype for p in explained.model.parameters()} == {torch.bfloat16}
    assert explained.args[0].dtype == torch.bfloat16


def test_explain_takes_the_policy_of_the_environment(models, explained, monkeypatch):
    monkeypatch.setenv("DISTR_POLICY", "p.toml")
    assert main(["explain", "models:pair"]) == OK
    assert explained.policy.rule[0].layers == "blocks.*.attn"


def test_explain_fails_for_an_unmatched_rule_but_shows_the_table(models, explained, capsys):
    explained.unmatched = ("blocks.*.mlp",)
    assert main(["explain", "models:pair"]) == FOUND_ERROR
    out, err = capsys.readouterr()
    assert "blocks.{0..1}.attn  x2" in out
    assert "no attention is named by 'blocks.*.mlp'" in err


@pytest.mark.parametrize("inner", [ValueError("shape mismatch"), OSError("disk gone")])
def test_explain_shows_the_error_inside_dynamos(models, explained, capsys, inner):
    explained.error = RuntimeError("backend failed, a long story")
    explained.error.inner_exception = inner
    assert main(["explain", "models:pair"]) == FOUND_ERROR
    err = capsys.readouterr().err
    name = type(inner).__name__
    assert err.splitlines() == [f"distr: {name}: {inner}", "(--debug shows where)"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("models:alone", "inputs do not fit Model.forward(x, causal=False): missing a required"),
        ("models:wrong", "returned (Model, Tensor); accepted: a module, (module, args)"),
        ("models:pear", "models has no function pear (did you mean pair?)"),
        ("models:number", "models has no function number"),
        ("modelz:pair", "cannot import modelz: No module named 'modelz'"),
        ("timm:vit_tiny_patch16_22", "did you mean vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nope", "Invalid pretrained tag (nope)"),
        ("hf:./nope.json", "there is no file nope.json"),
        ("hf:p.toml", "p.toml is not JSON"),
        ("hf:out.json", "got model_type 'brt'; accepted: a model type of transformers (did you"),
        ("hf:patchtst", "cannot guess inputs of PatchTSTModel (main input past_values)"),
    ],
)
def test_a_target_that_cannot_be_built_says_why(models, explained, capsys, target, message):
    (models / "out.json").write_text('{"model_type": "brt"}')
    assert main(["explain", target]) == FOUND_ERROR
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("distr: ")
    assert out == ""


def test_a_hub_model_without_network_says_what_works_without(models, capsys, monkeypatch):
    import transformers

    def offline(name, **options):
        assert options == {"trust_remote_code": False}
        raise OSError("We couldn't connect to the hub\nand a long story")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert main(["explain", "hf:bertt"]) == FOUND_ERROR
    assert capsys.readouterr().err == (
        "distr: hf:bertt: not a file, not a model type of transformers (did you mean bert or ibert "
        "or hubert?), and its configuration cannot be had from the hub: We couldn't connect to the "
        "hub; without network give a model type or a config.json\n"
    )


def test_a_missing_extra_says_what_to_install(models, explained, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(targets.importlib, "import_module", missing)
    assert main(["explain", "timm:vit_tiny_patch16_224"]) == FOUND_ERROR
    assert "timm is not installed; pip install timm" in capsys.readouterr().err


def test_random_weights_are_the_same_every_time() -> None:
    state = torch.get_rng_state()
    first, second = (targets.build(SMALL_TIMM).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_of_weights_needs_pretrained() -> None:
    with pytest.raises(targets.TargetError, match="loaded with --pretrained; add it"):
        targets.build("timm:local-dir:here")


def test_a_module_will_do_for_a_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("made")
    made.net = nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "made", made)
    assert targets.build("made:net").model is made.net


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    arguments = ["tune", "a:b", "--data", "a:c", "--budget", "1%", "--out", "p.toml"]
    monkeypatch.setattr(tune, "run", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err == (
        "distr: interrupted; the same command goes on from what is done\n"
    )
    monkeypatch.setattr(policy, "run_schema", interrupted)
    assert main(["policy", "schema"]) == 130
    assert capsys.readouterr().err == "distr: interrupted\n"


def test_a_model_larger_than_memory_is_refused(models, monkeypatch):
    monkeypatch.setattr(targets.os, "sysconf", lambda name: 10)
    with pytest.raises(targets.TargetError, match=r"give a config\.json with fewer layers"):
        targets.build("hf:bert.json")


# --- what a target is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("bert", TINY_BERT, {"input_ids": (2, 38), "attention_mask": (2, 38)}),
        (
            "t5",
            {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            {"input_ids": (2, 128), "attention_mask": (2, 128), "decoder_input_ids": (2, 128)},
        ),
        (
            "vit",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32},
            {"pixel_values": (2, 3, 32, 32)},
        ),
        (
            "wav2vec2",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            {"input_values": (2, 16_000)},
        ),
        (
            "whisper",
            {
                "d_model": 32,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "max_source_positions": 50,
                "vocab_size": 100,
                "pad_token_id": 0,
                "decoder_start_token_id": 1,
                "eos_token_id": 2,
                "bos_token_id": 3,
            },
            {"input_features": (2, 80, 100), "decoder_input_ids": (2, 128)},
        ),
    ],
)
def test_inputs_fit_the_model(models, model_type, config, expected):
    (models / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    target = targets.build("hf:.")  # a folder
    assert {name: tuple(value.shape) for name, value in target.kwargs.items()} == expected
    with torch.no_grad():
        target.model(**target.kwargs)


def test_shape_and_attention_of_a_transformers_model(models):
    target = targets.build("hf:bert.json", shape=(3, 20), attn="eager")
    assert target.kwargs["input_ids"].shape == target.kwargs["attention_mask"].shape == (3, 20)
    assert target.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("attn", "fused"), [("eager", False), ("sdpa", True)])
def test_attention_of_a_timm_model_and_nothing_else_changes(attn, fused):
    from timm.layers import use_fused_attn

    before = use_fused_attn()
    target = targets.build(SMALL_TIMM, shape=(1, 3, 224, 224), attn=attn)
    assert target.model.blocks[0].attn.fused_attn is fused
    assert [tuple(a.shape) for a in target.args] == [(1, 3, 224, 224)]
    assert use_fused_attn() is before


def test_a_model_alone_needs_no_inputs_when_forward_takes_none():
    assert targets.Target("x", nn.Identity(), (1,)).input_problem() is None
    assert "missing a required argument" in (targets.Target("x", nn.Identity()).input_problem())


# --- distr explain, the real one ---------------------------------------------------------------


def explain_json(models, *argv):
    assert main(["explain", *argv, "--json", "out.json"]) == OK
    return Report.from_json((models / "out.json").read_text())


def test_explain_a_factory(models):
    found = explain_json(models, "models:whole", "--policy", "p.toml")
    assert [r.layer for r in found.rows] == ["blocks.0.attn", "blocks.1.attn"]
    assert {r.decision for r in found.rows} == {"exact"}
    assert {r.mask for r in found.rows} == {"causal"}
    assert "group-size-1" in {reason.code for r in found.rows for reason in r.reasons}


def test_explain_a_factory_with_symbolic_sizes(models):
    found = explain_json(models, "models:pair", "--dynamic")
    assert found.found == 2
    assert any(isinstance(size, str) for size in found.rows[0].shapes["q"])


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_explain_a_transformers_model(models, attn):
    found = explain_json(models, "hf:bert.json", "--attn", attn)
    assert found.found == 2
    assert [r.shapes["q"] for r in found.rows] == [(2, 2, 38, 32)] * 2
    assert found.rows[1].layer.startswith("encoder.layer.1.attention")


def test_explain_a_timm_model(models, capsys):
    found = explain_json(models, SMALL_TIMM)
    assert [r.layer for r in found.rows] == [f"blocks.{i}.attn" for i in range(12)]
    assert "blocks.{0..11}.attn  x12" in capsys.readouterr().out


def test_nobody_reads_the_output_any_more():
    """As in ``distr ... | head``: quiet, and the code that shells give to it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "distr_compile", "policy", "schema"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error(models, explained, capfd):
    explained.error = BrokenPipeError(32, "of a worker")
    assert main(["explain", "models:pair"]) == FOUND_ERROR
    assert "of a worker" in capfd.readouterr().err
