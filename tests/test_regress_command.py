"""``distr regress`` as a user runs it, and the loading of published weights."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distr_compile import cli, targets
from distr_compile.cli import FOUND_ERROR, OK, USAGE, main
from distr_compile.commands import regress
from tests.saved_models import TEXT, pictures, saved_gpt2, saved_timm

POLICY = "[default]\nmin_seq_len = 0\n"
WORSE = "[default]\nmin_seq_len = 0\nestimator = 'lsh-sample'\n"
MINE = """
import torch
from distr_compile import Batch
from tests.tiny_models import noise, stack

def model():
    return stack()

def loader():
    return (Batch((noise(seed, 2, 48),), labels=torch.ones(2)) for seed in range(3))

def score(output, batch):
    return output.square().mean((1, 2)) * batch.labels
"""


@pytest.fixture(autouse=True)
def _project(tmp_path, monkeypatch):
    """A folder of a user as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    for name, text in {"p.toml": POLICY, "text.txt": TEXT, "mine.py": MINE}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    yield
    sys.modules.pop("mine", None)


def test_a_language_model_and_a_text(tmp_path, capsys):
    saved_gpt2(tmp_path)
    command = "regress hf:gpt2 --pretrained --text text.txt --policy p.toml --tokens 64 --limit 2"
    command += " --batch-size 4 --baseline base.json --json out.json"
    assert main([*command.split(), "--update-baseline"]) == OK
    out, _ = capsys.readouterr()
    header, _, line, note = out.splitlines()
    assert header.split()[:4] == ["model", "policy", "approximated", "perplexity"]
    assert line.split()[:3] == ["hf:gpt2", "p", "1/1"]
    assert note == "hf:gpt2: wrote base.json"
    found = json.loads(Path("out.json").read_text())["policies"]["p"]
    assert found["layers"].keys() == {"transformer.h.0.attn"}

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained("gpt2").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[: 8 * 64 + 1]
    with torch.no_grad():
        logits = model(ids[:-1].view(8, 64)).logits
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1).double(), ids[1:]))
    assert found["metrics"]["perplexity"]["exact"] == pytest.approx(expected, rel=1e-5)

    assert main(command.split()) == OK
    Path("p.toml").write_text(WORSE)
    capsys.readouterr()
    assert main(command.split()) == FOUND_ERROR
    out, _ = capsys.readouterr()
    assert "hf:gpt2  p         transformer.h.0.attn  output error" in out
    assert "worse" in out


def test_a_vision_model_and_a_folder_of_pictures(tmp_path, capsys):
    saved_timm(tmp_path)
    pictures(tmp_path, 3)
    command = "regress timm:local-dir:vit --pretrained --data pictures --policy p.toml"
    assert main(command.split()) == OK
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.split()[2:5] == ["approximated", "top1", "top5"]
    assert line.split()[:3] == ["timm:local-dir:vit", "p", "1/1"]
    assert line.split()[5:7] == ["1", "(1)"]  # top-5 of two classes


def test_pictures_of_other_classes_than_the_model_has(tmp_path, capsys):
    saved_timm(tmp_path)
    folder = pictures(tmp_path, 3)
    (folder / "cat").mkdir()
    next(folder.glob("ant/*")).rename(folder / "cat" / "one.png")
    command = "regress timm:local-dir:vit --pretrained --data pictures --policy p.toml"
    assert main(command.split()) == OK
    out, err = capsys.readouterr()
    assert "has 3 classes and the model 2: the labels are left out" in err
    assert out.splitlines()[0].split()[2:5] == ["approximated", "cosine", "sqnr"]


def test_a_model_and_a_loader_of_the_user(capsys):
    command = "regress mine:model --data mine:loader --policy p.toml --limit 2"
    assert main([*command.split(), "--metric", "mine:score", "--dtype", "float32"]) == OK
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.split()[3:6] == ["score", "cosine", "sqnr"]
    assert line.split()[:3] == ["mine:model", "p", "2/2"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("mine:model", USAGE, "--data, --text: got neither"),
        ("mine:model --data mine:loader --text text.txt", USAGE, "--data, --text: got both"),
        ("mine:model --text text.txt", USAGE, "--text: got one for mine:model; accepted: hf:"),
        ("mine:model --data folder", USAGE, "--data: got 'folder' for mine:model; accepted: pkg"),
        ("mine:model --data mine:loder", FOUND_ERROR, "--data: got 'mine:loder': module 'mine'"),
        ("mine:model --data mine:loader --metric tops", USAGE, "--metric: got 'tops'; accepted"),
        ("mine:model --data mine:loader --update-baseline", USAGE, "got no --baseline to write"),
        ("mine:model --data mine:loader --pretrained", USAGE, "a factory loads its own"),
        ("mine:model --data mine:loader --device tpu9", USAGE, "--device: got 'tpu9'"),
        ("mine:model --data mine:loader --policy p.toml --policy x/p.toml", FOUND_ERROR, "x/p"),
        (
            "mine:model --data :x",
            USAGE,
            "--data: got ':x'; accepted: pkg.module:name",
        ),
        ("mine:model --data .mine:x", USAGE, "--data: got '.mine:x'; accepted: pkg.module:name"),
        (".mine:model --data mine:loader", USAGE, "target: got '.mine:model'; accepted: timm:"),
        ("mine:model --data mine:loader --json .", USAGE, "--json: got '.'; accepted: a file in"),
        (
            "mine:model --data mine:loader --tolerance nan",
            USAGE,
            "got 'nan'; accepted: a ",
        ),
        (
            "mine:model --data mine:loader --tolerance -1",
            USAGE,
            "got '-1'; accepted: a num",
        ),
        (
            "hf:bert --text latin.txt",
            FOUND_ERROR,
            "--text: got 'latin.txt', whose byte 2 is",
        ),
        ("mine:model --data mine:loader --limit 0", USAGE, "got '0'; accepted"),
        ("timm:vit_tinny --data . --pretrained", FOUND_ERROR, "timm has no model vit_tinny"),
        ("hf:./none --text text.txt --pretrained", FOUND_ERROR, "its weights cannot be loaded"),
        ("mine:model --data mine:loader --baseline none.json", FOUND_ERROR, "there is no file"),
    ],
)
def test_mistakes(capsys, arguments, code, message):
    assert main(["regress", *arguments.split()]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_published_weights_are_asked_for_where_timm_has_them(monkeypatch):
    asked = []

    def download(repo_id, *args, **options):
        asked.append(repo_id)
        raise OSError("no network here")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    with pytest.raises(targets.TargetError, match="no network here; without network give a model"):
        targets.pretrained("timm:vit_base_patch16_224")
    assert asked[0].startswith("timm/vit_base_patch16_224")


def test_published_weights_are_asked_for_where_transformers_has_them(monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["trust_remote_code"]))
        raise OSError("no network here")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", download)
    with pytest.raises(targets.TargetError, match=r"no network here; .* save_pretrained wrote"):
        targets.pretrained("hf:openai-community/gpt2")
    assert asked == [("openai-community/gpt2", False)]


def test_weights_of_a_folder_are_those_that_were_saved(tmp_path):
    import transformers

    model = targets.pretrained(f"hf:{saved_gpt2(tmp_path)}")
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert not model.training
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- docs/regress.md ---------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[1] / "docs/regress.md").read_text("utf-8")


def test_the_commands_of_the_document_are_written_rightly():
    commands = re.findall(r"^distr (regress .*)$", DOCUMENT, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        options = cli._parser().parse_args(shlex.split(command))
        assert options.run is regress.run
        assert options.policy == ["p.toml"]


def test_the_program_of_the_document_runs(tmp_path, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    exec(compile(program, "regress.md", "exec"), {})
    _, _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:3] == ["encoder", "policy", "1/1"]
    assert (tmp_path / "base.json").exists()
