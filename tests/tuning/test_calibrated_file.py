"""The file of bases: what is in it, and which file is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distr_compile import explain
from distr_compile.bases import Bases, fingerprint
from distr_compile.policy import Policy, PolicyError
from distr_compile.tuning.calibrate import calibrate
from tests.tiny_models import noise
from tests.tuning.calibrated import FIELDS, relative, run


def test_the_file_is_deterministic_and_read_back(calibrated: Any, tmp_path: Path) -> None:
    model, result, _ = calibrated
    batches = [noise(1, 2, 64), noise(2, 3, 40)]
    again = calibrate(model, batches, path=tmp_path / "again", progress=False)
    assert again.path.read_bytes() == result.path.read_bytes()
    read = Bases.from_bytes(result.path.read_bytes())
    assert read.fingerprint == fingerprint(model)
    assert read.torch_version == torch.__version__
    for name, layer in result.bases.layers.items():
        assert read.layers[name].rows == layer.rows == 248
        assert torch.equal(read.layers[name].basis_q, layer.basis_q)
        assert torch.equal(read.layers[name].basis_k, layer.basis_k)
        assert torch.equal(read.layers[name].singular_values, layer.singular_values)


def error_of(model: nn.Module, policy: Policy) -> str:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(model, policy, noise(1, 2, 64))
    assert isinstance(caught.value.inner_exception, PolicyError)
    with pytest.raises(PolicyError) as explained:
        explain(model, noise(1, 2, 64), policy=policy)
    assert str(explained.value) == str(caught.value.inner_exception)
    return str(explained.value)


def test_bases_of_other_weights_are_refused(calibrated: Any) -> None:
    model, _, policy = calibrated
    with torch.no_grad():
        model.layers[1].out.bias += 1e-3
    assert "bases: file: got bases of a model with fingerprint" in error_of(model, policy)


def test_bases_of_another_dtype_are_refused(calibrated: Any) -> None:
    model = calibrated[0]
    assert fingerprint(model) != fingerprint(model.bfloat16())


def test_a_changed_file_is_refused(calibrated: Any) -> None:
    model, result, policy = calibrated
    result.path.write_bytes(result.path.read_bytes() + b" ")
    message = error_of(model, policy)
    assert f"accepted: the file of SHA-256 {result.sha256}" in message
    assert "run distr calibrate" in message


def test_a_missing_file_is_refused(calibrated: Any) -> None:
    model, result, policy = calibrated
    result.path.unlink()
    assert "No such file" in error_of(model, policy)


def test_a_file_of_another_kind_is_refused(calibrated: Any) -> None:
    model, result, policy = calibrated
    result.path.write_bytes(b"not a safetensors file")
    sha256 = hashlib.sha256(b"not a safetensors file").hexdigest()
    policy = policy.with_bases(result.path, sha256)
    assert "got not a file of format 'distr-bases 1'" in error_of(model, policy)


def test_a_policy_without_bases_is_refused(calibrated: Any) -> None:
    message = error_of(calibrated[0], Policy(FIELDS))
    assert 'bases: got estimator = "calibrated" and no table [bases]' in message


def test_a_layer_without_bases_is_refused(calibrated: Any, tmp_path: Path) -> None:
    model = calibrated[0]
    some = calibrate(model, [noise(1, 2, 64)], path=tmp_path / "s", layers="*.0", progress=False)
    policy = Policy(FIELDS).with_bases(some.path, some.sha256)
    message = error_of(model, policy)
    assert "got no bases for the attention 'layers.1'; it has: 'layers.0'" in message
    # A rule that keeps the layer exact asks for none.
    exact = policy.with_rule("layers.1", group_size=1)
    assert relative(run(model, exact, noise(1, 2, 64)), model(noise(1, 2, 64)).detach()) < 0.1


def test_bases_of_another_width_are_refused(calibrated: Any) -> None:
    model, result, policy = calibrated
    cut = {
        name: dataclasses.replace(
            layer,
            basis_q=layer.basis_q[:1],
            basis_k=layer.basis_k[:1],
            singular_values=layer.singular_values[:1],
        )
        for name, layer in result.bases.layers.items()
    }
    data = dataclasses.replace(result.bases, layers=cut).to_bytes()
    result.path.write_bytes(data)
    policy = policy.with_bases(result.path, hashlib.sha256(data).hexdigest())
    assert "got bases for 1 key heads of width 32 at 'layers.0'" in error_of(model, policy)
