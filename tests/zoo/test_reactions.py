"""The optional model of the zoo: what it is asked, and how it is fetched."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from distr_compile.accuracy.metrics import IGNORED
from tests.zoo import load, reactions
from tests.zoo.train import skill


def test_reactions_are_amide_couplings_and_split_into_their_letters() -> None:
    texts = reactions.reactions()
    assert len(set(texts)) == len(texts) == 64
    assert texts[0].startswith("CC(=O)O.NCc1ccccc1.")
    assert texts[0].endswith(">>CC(=O)NCc1ccccc1")
    assert any(text.endswith(">>O=C(NCC(C)C)c1ccccc1") for text in texts)
    for text in texts:
        assert "".join(reactions.TOKEN.findall(text)) == text
        before, _, after = text.partition(">>")
        # Water is lost: of acid and amine together the amide lacks one oxygen and nothing else.
        acid, amine, *_ = before.split(".")
        for letter in "CcNnOoF":
            lost = (acid + amine).count(letter) - after.count(letter)
            assert lost == (letter == "O"), (text, letter)


def test_a_share_of_the_tokens_is_hidden_and_no_special_one() -> None:
    texts = reactions.reactions()[:20]
    seen = sorted({token for text in texts for token in reactions.TOKEN.findall(text)})
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *seen]
    found = reactions.encoded(texts, {word: number for number, word in enumerate(words)})
    ids, labels, mask = (found[x] for x in ("input_ids", "labels", "attention_mask"))
    hidden = labels != IGNORED
    assert torch.equal(ids == words.index("[MASK]"), hidden)
    assert not hidden[:, 0].any()
    assert not hidden[mask == 0].any()
    assert 0.1 < hidden.sum() / mask.sum() < 0.2
    whole = torch.where(hidden, labels, ids)
    for row, length, text in zip(whole, mask.sum(-1), texts, strict=True):
        assert "".join(words[i] for i in row[1 : length - 1]) == text


def test_only_the_known_wheel_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, folder = tmp_path / "rxnfp.whl", tmp_path / "model"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*reactions.FILES, "other.bin"):
            archive.writestr(reactions.INSIDE + name, name)
    with pytest.raises(ValueError, match=r"rxnfp.whl: got SHA-256 .*; accepted: c5c1e818"):
        reactions.unpack(wheel, folder)
    assert not folder.exists()
    monkeypatch.setattr(reactions, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    reactions.unpack(wheel, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: name for name in reactions.FILES
    }


def test_a_model_that_was_not_fetched_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reactions, "FOLDER", tmp_path)
    assert not reactions.is_fetched()
    with pytest.raises(FileNotFoundError, match=r"run python -m tests\.zoo\.reactions"):
        load("reactions")


@pytest.mark.skipif(not reactions.is_fetched(), reason="python -m tests.zoo.reactions fetches it")
def test_it_names_what_was_hidden() -> None:
    zoo = load("reactions")
    assert skill(zoo) >= zoo.floor
    assert (zoo.head_dim, zoo.num_layers) == (64, 12)
