"""A demo run from the data to the files."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from .data import Split, load, split_for_seed
from .errors import DemoError
from .landscape import loss_along
from .metrics import noisy_accuracy, sharpness
from .plot import draw
from .report import Result, as_json, table, write_json
from .settings import DATASETS, OPTIMIZERS, Settings
from .train import train

PICTURE = "demo.png"
FIGURES = "demo.json"
_DIRECTION_SEED = 1712


def run(settings: Settings) -> None:
    """Train with every optimizer at every seed, print the table, and write the picture and the JSON file to
    ``settings.output``.

    Raises:
        DemoError: no data, training diverged, or the output folder cannot be written.
    """
    start = time.perf_counter()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    picture, figures = _prepare_output(settings.output)
    dataset = load(settings.dataset, settings.data, _say)
    _say(
        f"{DATASETS[settings.dataset].title} ({dataset.source}): {settings.train_size:,} training images, "
        f"{settings.label_noise:.0%} of their labels "
        f"randomised; {len(dataset.test_images):,} test images\n"
        f"{', '.join(OPTIMIZERS[name].label for name in settings.optimizers)}; {settings.epochs} epochs, batch "
        f"{settings.batch_size}, "
        f"{'adaptive ' if settings.adaptive else ''}rho {settings.rho:g}, seeds {', '.join(map(str, settings.seeds))}, "
        f"{torch.get_num_threads()} thread(s)"
    )
    results = []
    for seed in settings.seeds:
        split = split_for_seed(dataset, settings.train_size, settings.label_noise, seed)
        results += [_train_and_measure(name, split, settings, seed) for name in settings.optimizers]
    seconds = time.perf_counter() - start
    try:
        draw(results, settings, picture)
        write_json(figures, as_json(results, settings, dataset.source, seconds))
    except OSError as error:
        raise DemoError(f"{settings.output}: cannot be written ({error.strerror or error})") from error
    _say(f"\n{table(results, settings)}\n")
    _say(f"picture: {picture.resolve()}\nfigures: {figures.resolve()}\ntotal: {seconds:.0f} s")


def _train_and_measure(name: str, split: Split, settings: Settings, seed: int) -> Result:
    model, curves = train(name, split, settings, seed)
    images, labels = split.train_images, split.train_labels
    return Result(
        optimizer=name,
        seed=seed,
        wrong_labels=split.wrong,
        curves=curves,
        noisy_accuracy=[
            noisy_accuracy(model, split.test_images, split.test_labels, level) for level in settings.noise_levels
        ],
        sharpness=sharpness(
            model,
            images[: settings.sharpness_images],
            labels[: settings.sharpness_images],
            rho=settings.rho,
            adaptive=settings.adaptive,
            batch_size=settings.batch_size,
        ),
        landscape=loss_along(
            model,
            images[: settings.landscape_images],
            labels[: settings.landscape_images],
            directions=settings.landscape_directions,
            points=settings.landscape_points,
            span=settings.landscape_span,
            seed=_DIRECTION_SEED + seed,
        ),
    )


def _prepare_output(folder: Path) -> tuple[Path, Path]:
    """Make the output folder and make sure, before the long work, that both files can be written."""
    files = folder / PICTURE, folder / FIGURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            with file.open("ab"):
                pass
    except OSError as error:
        raise DemoError(f"--output {folder}: cannot be written ({error.strerror or error})") from error
    return files


def _say(text: str) -> None:
    print(text, flush=True)
