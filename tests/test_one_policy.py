"""One ``torch.compile`` has one policy, whatever becomes of the file or dict it was read of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distr_compile
from tests.backend_models import tokens, two_layers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

APPROXIMATE = "[default]\ngroup_size = 2\nmin_seq_len = 0\n"
EXACT = "[default]\ngroup_size = 1\n"


def compiled(policy: Any) -> Any:
    options = {"policy": policy, "compiler": "eager"}
    return torch.compile(two_layers(), backend="distr", options=options, dynamic=False)


def decisions(model: Any) -> list[str]:
    return [row.decision for row in distr_compile.report(model).rows]


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_file_is_read_once(is_deleted: bool, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(APPROXIMATE)
    model = compiled(path)
    with torch.no_grad():
        model(tokens(length=40))
        if is_deleted:
            path.unlink()
        else:
            path.write_text(EXACT)
        model(tokens(length=56))
        assert decisions(model) == ["distr"] * 4
        if not is_deleted:
            other = compiled(path)
            other(tokens(length=40))
            assert decisions(other) == ["exact"] * 2


def test_a_dict_is_read_once() -> None:
    policy = {"default": {"group_size": 2, "min_seq_len": 0}}
    model = compiled(policy)
    with torch.no_grad():
        model(tokens(length=40))
        policy["default"] = {"group_size": 1}
        model(tokens(length=56))
        assert decisions(model) == ["distr"] * 4
        other = compiled(policy)
        other(tokens(length=40))
    assert decisions(other) == ["exact"] * 2


def test_a_wrong_file_that_is_mended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("[default]\ngroup_size = 0\n")
    model = compiled(path)
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="group_size: got 0"):
            model(tokens(length=40))
        path.write_text(APPROXIMATE)
        model(tokens(length=40))
    assert decisions(model) == ["distr"] * 2
