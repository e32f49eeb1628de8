"""Is SAM worth its time? Trains a small network with SGD, with SGD for as long as SAM takes, with SAM, and with the
cheapest SAM that docs/quality.md accepts. Prints a table, and saves it with a picture."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .data import Dataset, halved, load, split_for_seed
from .report import conclusion, save, spread, table
from .train import BATCH, NOISE, ROWS, Run, train

LABEL_NOISE = 0.5  # the share of training labels that are drawn anew
RHOS = (0.025, 0.05, 0.1, 0.2, 0.4)
TUNING_SEEDS = (100, 101, 102)


def options(arguments: Sequence[str] | None) -> tuple[Any, Dataset]:
    """The options and the data; exits with 2 and a message that names the option where one cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m examples.fashion_mnist", description=__doc__)
    where = (
        "a folder with Fashion-MNIST's four files, or 'digits' (scikit-learn's); default: Fashion-MNIST from Debian's"
    )
    parser.add_argument("--data", default="auto", metavar="DIR", help=f"{where} package or OpenML, else the digits")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: 0 1 2 3")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tune", action="store_true", help=f"try values of rho, seeds {TUNING_SEEDS}, held-out images")
    chosen = parser.parse_args(arguments)
    chosen.seeds = list(dict.fromkeys(chosen.seeds or (TUNING_SEEDS if chosen.tune else range(4))))
    if chosen.epochs < 1:
        parser.error(f"argument --epochs: {chosen.epochs} is less than 1")
    if not 0 <= min(chosen.seeds) <= max(chosen.seeds) < 2**63:
        parser.error("argument --seeds: a seed is out of range, 0 to 2**63 - 1")
    if set(range(100, 105)) & set(chosen.seeds) and not chosen.tune:
        parser.error("argument --seeds: seeds 100 to 104 chose the settings, give others")
    try:
        data = load(chosen.data)
        if len(data.train_images) < 2 * BATCH:
            raise ValueError(f"{chosen.data}: {len(data.train_images)} training images, {2 * BATCH} are needed")
    except (OSError, ValueError) as error:
        parser.error(f"argument --data: {error}")
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
        if not os.access(chosen.output, os.W_OK):
            raise PermissionError(f"{chosen.output} is not writable")
    except OSError as error:
        parser.error(f"argument --output: {error}")
    chosen.images = min(3000, 3 * len(data.train_images) // 4)
    return chosen, data if data.train_images.shape[-1] < 16 else halved(data)


def tune(chosen: Any, data: Dataset) -> None:
    """Print each rho's accuracy on training images that the seed did not draw, as far as it gets."""
    lines = [["trained with", "rho", "accuracy, %", f"noisy, % (sd {NOISE:g})"]]
    splits = {seed: split_for_seed(data, chosen.images, LABEL_NOISE, seed, held_out=True) for seed in chosen.seeds}
    try:
        for name, row in ROWS.items():
            for rho in RHOS if row.rho else ():
                runs = [train(name, replace(row, rho=rho), splits[seed], seed, chosen.epochs) for seed in splits]
                cells = [spread([100 * getattr(run, c) for run in runs], ".2f") for c in ("accuracy", "noisy")]
                lines.append([row.title, f"{rho:g}", *cells])
    finally:
        print(tabulate(lines, "firstrow", tablefmt="github", disable_numparse=True))


def show(chosen: Any, data: Dataset) -> None:
    """Train all rows with all seeds. Whatever ends it, what is finished is saved and printed."""
    height, width = data.train_images.shape[1:]
    title = f"{data.source}, {chosen.images:,} images of {height} x {width}, {LABEL_NOISE:.0%} of the labels drawn anew"
    print(f"{title}, {chosen.epochs} epochs; seeds {', '.join(map(str, chosen.seeds))}", flush=True)
    settings = {**vars(chosen), "output": str(chosen.output), "rows": {name: asdict(row) for name, row in ROWS.items()}}
    settings |= {"torch": torch.__version__, "date": datetime.date.today().isoformat()}
    runs: list[Run] = []
    try:
        for seed in chosen.seeds:
            split = split_for_seed(data, chosen.images, LABEL_NOISE, seed)
            for name, row in ROWS.items():
                runs.append(train(name, row, split, seed, chosen.epochs))
    finally:
        if runs:
            save(runs, settings, title, chosen.output)
            print(
                f"\n{table(runs)}\n\n{conclusion(runs)}\n\nThis is in {chosen.output}/results.json, with accuracy.png."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (training diverged), 130 (interrupted)."""
    chosen, data = options(arguments)
    torch.set_num_threads(1)  # the tensors are small: more threads mostly wait for each other
    try:
        (tune if chosen.tune else show)(chosen, data)
    except FloatingPointError as error:
        print(f"given up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
