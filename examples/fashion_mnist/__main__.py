"""Is SAM worth its time? Trains a small network with SGD, with SGD for as long as SAM takes, with SAM, and with the
cheapest SAM that docs/quality.md accepts. Takes minutes, prints a table, and saves the figures and a picture."""

import argparse
import datetime
import json
import socket
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .data import Dataset, load, split_for_seed
from .report import draw, table
from .train import ROWS, train

DATA = "folder in Fashion-MNIST's format, or 'digits'; default: Fashion-MNIST of Debian or OpenML, else the digits"
LABEL_NOISE = 0.5  # the share of training labels that are drawn anew
RHOS = (0.025, 0.05, 0.1, 0.2, 0.4)
TUNING_SEEDS = range(100, 105)  # bench/quality chose the other settings with them; the first three choose rho here


def options(arguments: list[str] | None) -> tuple[Any, Dataset]:
    """The options and the data; exits with 2 and a message that names the option where one cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m examples.fashion_mnist", description=__doc__)
    parser.add_argument("--data", default="auto", metavar="DIR", help=DATA)
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="passes over the images; default: 20")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: 0 1 2 3, or 100 101 102 to tune")
    parser.add_argument("--output", type=Path, default="demo-output", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tune", action="store_true", help="compare values of rho, on images held out; saves nothing")
    chosen = parser.parse_args(arguments)
    chosen.seeds = list(dict.fromkeys(chosen.seeds or (TUNING_SEEDS[:3] if chosen.tune else range(4))))
    if chosen.epochs < 1:
        parser.error(f"argument --epochs: {chosen.epochs} is less than 1")
    if not 0 <= min(chosen.seeds) <= max(chosen.seeds) < 2**63:
        parser.error("argument --seeds: a seed is out of range, 0 to 2**63 - 1")
    if any((seed in TUNING_SEEDS) != chosen.tune for seed in chosen.seeds):
        parser.error("argument --seeds: seeds 100 to 104 chose the settings: give them with --tune, and no others")
    try:
        data = load(chosen.data)
    except (OSError, ValueError) as error:
        parser.error(f"argument --data: {error}")
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=chosen.output).close()
    except OSError as error:
        parser.error(f"argument --output: {error}")
    chosen.images = min(3000, 3 * len(data.train_images) // 4)
    return chosen, data


def compare(chosen: Any, data: Dataset) -> None:
    """Train all rows with all seeds. However it ends, finished runs are printed and, unless this is tuning, saved."""
    rows = ROWS
    if chosen.tune:
        tuned = [replace(r, rho=rho, title=f"{r.title}, rho {rho:g}") for r in ROWS.values() if r.rho for rho in RHOS]
        rows = {row.title: row for row in tuned}
    height, width = data.train_images.shape[2:]
    title = f"{data.source}, {chosen.images:,} images of {height} x {width}, {LABEL_NOISE:.0%} of the labels drawn anew"
    print(f"{title}; epochs: {chosen.epochs}; seeds: {', '.join(map(str, chosen.seeds))}", flush=True)
    runs = []
    try:
        for seed in chosen.seeds:
            split = split_for_seed(data, chosen.images, LABEL_NOISE, seed, held_out=chosen.tune)
            for name, row in rows.items():
                runs.append(train(name, row, split, seed, chosen.epochs))
    finally:
        if runs:
            print(f"\n{table(runs, rows)}")
        if runs and not chosen.tune:
            settings = vars(chosen) | {"output": str(chosen.output), "rows": rows, "torch": torch.__version__}
            settings["date"] = datetime.date.today().isoformat()
            content = {"title": title, "settings": settings, "runs": runs}
            text = json.dumps(content, indent=1, allow_nan=False, default=asdict)
            (chosen.output / "results.json").write_text(f"{text}\n", encoding="utf-8")
            draw(runs, title).savefig(chosen.output / "accuracy.png")
            print(f"\nThis is in {chosen.output}/results.json, with accuracy.png.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. The exit code is 1 if training diverges, 130 if it is interrupted."""
    torch.set_num_threads(1)  # the tensors are small: more threads mostly wait for each other
    try:
        compare(*options(arguments))
    except FloatingPointError as error:
        sys.exit(f"given up: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    socket.setdefaulttimeout(30)  # OpenML may not answer
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code
    main()
