"""What a model of the zoo is, and what a model that is trained here is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Generator, Tensor, nn

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import Metric

WEIGHTS = Path(__file__).with_name("weights")
CALIBRATION = 2  # batches of training data that come with a model


@dataclass(frozen=True)
class ZooModel:
    """A model with real skill, and data to show it.

    Attributes:
        name: the key in ``ZOO``.
        model: in eval mode, fp32.
        batches: evaluation data with labels; none of it was trained on.
        train_batches: a little of the training data, for calibration.
        metrics: the metric of the model's task first.
        head_dim: columns of Q and K in every head.
        num_layers: layers; an encoder's and a decoder's are added up.
        description: architecture, task and data in one sentence.
        floor: the value of the task metric that the model must reach, in ``metrics[0]``'s sense.
        data_digest: SHA-256 of ``batches``. Text comes from the running interpreter, so it may
            differ between versions of Python; numbers are comparable where the digest is the same.
    """

    name: str
    model: nn.Module
    batches: list[Batch]
    train_batches: list[Batch]
    metrics: tuple[str | Metric, ...]
    head_dim: int
    num_layers: int
    description: str
    floor: float
    data_digest: str


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained.

    Attributes:
        build: makes the model with random weights.
        sample: draws one batch of training data, labels aligned with the logits; the number is the
            share of the steps that are done, for data that grow harder.
        evaluation: the evaluation data.
        steps: of training, one batch each.
        rate: the highest learning rate.
        For the others see :class:`ZooModel`.
    """

    name: str
    description: str
    metrics: tuple[str | Metric, ...]
    head_dim: int
    num_layers: int
    floor: float
    build: Callable[[], nn.Module]
    sample: Callable[[Generator, float], Batch]
    evaluation: Callable[[], list[Batch]]
    steps: int
    rate: float = 2e-3

    @property
    def weights(self) -> Path:
        """The file of the trained weights."""
        return WEIGHTS / f"{self.name}.safetensors"

    def load(self) -> ZooModel:
        """The model with its trained weights, and its data.

        Raises:
            FileNotFoundError: it was never trained.
        """
        if not self.weights.exists():
            raise FileNotFoundError(
                f"zoo: got no file {self.weights}; run python -m tests.zoo.train {self.name}"
            )
        model = self.build().eval()
        load_weights(model, self.weights)
        generator = Generator().manual_seed(2)
        batches = self.evaluation()
        return ZooModel(
            self.name,
            model,
            batches,
            [self.sample(generator, 1.0) for _ in range(CALIBRATION)],
            self.metrics,
            self.head_dim,
            self.num_layers,
            self.description,
            self.floor,
            digest(batches),
        )


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters in fp16, each storage once; buffers are remade when a model is built."""
    found = {name: p.detach() for name, p in model.named_parameters()}  # tied ones only once
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in found.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill the parameters of ``model`` from what ``stored_weights`` gave.

    Raises:
        ValueError: the file is of another model.
    """
    parameters = dict(model.named_parameters())
    with safe_open(path, "pt") as file, torch.no_grad():
        names = set(file.keys())
        if names != parameters.keys():
            differ = ", ".join(sorted(names ^ parameters.keys())[:3])
            raise ValueError(f"{path}: got other parameters than the model has: {differ}, ...")
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))


def digest(batches: Iterable[Batch]) -> str:
    """SHA-256 of the tensors of all batches.

    Of integers every bit counts; of floating-point tensors the norm to four digits, for resampled
    pictures differ in their last bits from one version of torch to the next.
    """
    found = hashlib.sha256()
    for batch in batches:
        labels = [batch.labels] if isinstance(batch.labels, Tensor) else []
        for tensor in (*batch.args, *batch.kwargs.values(), *labels):
            found.update(str(tuple(tensor.shape)).encode())
            if tensor.is_floating_point():
                found.update(f"{tensor.double().norm().item():.4g}".encode())
            else:
                found.update(tensor.long().contiguous().numpy().tobytes())
    return found.hexdigest()


def batched(
    size: int, inputs: Mapping[str, Tensor], labels: Tensor, limit: int | None = None
) -> list[Batch]:
    """Keyword arguments and labels, example by example, in batches of ``size``."""
    parts = range(0, len(labels), size)
    return [
        Batch(
            kwargs={name: value[i : i + size] for name, value in inputs.items()},
            labels=labels[i : i + size],
        )
        for i in islice(parts, limit)
    ]
