"""The command line of the demo. Light: what needs more than torch is imported when the demo runs."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import DemoError
from .settings import BASES, DATASETS, OPTIMIZERS, RHO, RHO_ADAPTIVE, WEIGHTS, Settings

REQUIRED = ("matplotlib", "numpy", "tabulate", "tqdm")
BOTH = ("sgd", "sam")
ROUNDING = {"nearest": False, "stochastic": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    defaults = ", ".join(f"{entry.train_size:,} for {name}" for name, entry in DATASETS.items())
    epochs = ", ".join(f"{entry.epochs} for {name}" for name, entry in DATASETS.items())
    lrs = ", ".join(f"{base.lr:g} for {base.cls}" for base in BASES.values())
    add = parser.add_argument
    add(
        "--dataset",
        choices=list(DATASETS),
        default="fashion-mnist",
        help="digits is scikit-learn's and needs no download (default: %(default)s)",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the four Fashion-MNIST files (IDX, gzipped or not); by default they are looked for",
    )
    add(
        "--label-noise",
        type=_fraction,
        default=0.3,
        metavar="F",
        help="share of training labels drawn anew at random (default: %(default)s)",
    )
    add("--train-size", type=_integer(2), metavar="N", help=f"number of training images (default: {defaults})")
    add("--epochs", type=_integer(1), metavar="N", help=f"default: {epochs}")
    add(
        "--rho",
        type=_number(0.0),
        metavar="R",
        help=f"radius of SAM's ball (default: {RHO}, with --adaptive {RHO_ADAPTIVE})",
    )
    add("--adaptive", action="store_true", help="ASAM: a ball measured relative to each weight")
    add(
        "--optimizer",
        nargs="+",
        choices=[*OPTIMIZERS, "both"],
        default=["both"],
        metavar="NAME",
        help=f"one or more of {', '.join(OPTIMIZERS)} (sam is SAM around SGD), or both = sgd sam (default: both)",
    )
    add("--seed", type=_integer(0), nargs="+", default=[0, 1], metavar="N", help="one or more (default: 0 1)")
    add("--batch-size", type=_integer(2), default=128, metavar="N", help="default: %(default)s")
    add("--lr", type=_positive, metavar="LR", help=f"initial learning rate, for all optimizers (default: {lrs})")
    add(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the picture and the figures (default: %(default)s)",
    )
    add(
        "--weights",
        choices=list(WEIGHTS),
        default="float32",
        help="format that weight matrices are kept in; arithmetic is float32 (default: %(default)s)",
    )
    add("--rounding", choices=list(ROUNDING), help="how SAM rounds weights in a 16-bit format (default: SAM's own)")
    add("--threads", type=_integer(1), metavar="N", help="default: torch's")


def main(arguments: argparse.Namespace) -> int:
    """Run the demo with parsed arguments; returns the exit code: 0, 1 (a message is on stderr), 130 (interrupted)."""
    try:
        settings = _settings(arguments)
        needed = (*REQUIRED, "sklearn") if settings.dataset == "digits" else REQUIRED
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise DemoError(f'the demo needs {", ".join(missing)}: pip install "sam_fast[demo]"')
        from .run import run

        run(settings)
    except DemoError as error:
        print(f"sam_fast demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsam_fast demo: interrupted", file=sys.stderr)
        return 130
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.data is not None and arguments.dataset == "digits":
        raise DemoError("--data is for --dataset fashion-mnist; digits come with scikit-learn")
    defaults = DATASETS[arguments.dataset]
    rho = arguments.rho
    if rho is None:
        rho = RHO_ADAPTIVE if arguments.adaptive else RHO
    return Settings(
        dataset=arguments.dataset,
        data=arguments.data,
        train_size=arguments.train_size or defaults.train_size,
        label_noise=arguments.label_noise,
        epochs=arguments.epochs or defaults.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        rho=rho,
        adaptive=arguments.adaptive,
        optimizers=_expand(arguments.optimizer),
        seeds=tuple(dict.fromkeys(arguments.seed)),
        output=arguments.output,
        threads=arguments.threads,
        weights=arguments.weights,
        stochastic_rounding=ROUNDING.get(arguments.rounding),
    )


def _expand(names: Sequence[str]) -> tuple[str, ...]:
    """Replace ``both``; keep the order of first mention, each name once."""
    return tuple(dict.fromkeys(one for name in names for one in (BOTH if name == "both" else (name,))))


def _integer(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or value >= 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return convert


def _number(least: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least:g}")
        return value

    return convert


def _positive(text: str) -> float:
    value = _number(0.0)(text)
    if value == 0.0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _fraction(text: str) -> float:
    value = _number(0.0)(text)
    if value > 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1")
    return value
