"""The experiment: its runs, a row of its table done again, the contenders' time on an idle machine, docs/quality.md."""

from __future__ import annotations

import argparse
import platform
import socket
import time
from typing import Any

import torch

from bench.quality import plan
from bench.quality.contenders import CONTENDERS
from bench.quality.tasks import TASKS
from bench.quality.timing import measure
from bench.quality.train import fix_allocator, train
from bench.records import processor


def run(hours: float, tasks: list[str]) -> None:
    """Do the tasks' runs that the file of results lacks, until all are there or the time is over."""
    end = time.monotonic() + 3600 * hours
    writer, results = plan.Writer(), plan.load()
    where = {"processor": processor(), "torch": torch.__version__, "python": platform.python_version()}
    for todo in plan.plan(results, tasks):
        if todo in results:
            continue
        if time.monotonic() > end:
            return
        results[todo] = train(todo) | where
        writer.add(todo, results[todo])
        print(f"{len(results)} runs, {todo}: {results[todo]['accuracy']} %", flush=True)


def row(task: str, contender: str, seeds: list[int]) -> int:
    """Train a contender again as in the table; returns 1 if an accuracy is over 0.5 points off the one on file."""
    results = plan.load()
    setting = plan.chosen(task, contender, results)
    if setting is None:
        raise SystemExit(f"{contender} on task {task}: tuning has not finished, there is no such row yet")
    print(f"task {task}, {contender}: {setting}")
    off = 0
    for seed in seeds:
        todo = plan.run_of(task, contender, setting, seed)
        again, filed = train(todo), results.get(todo)
        known = f"{filed['accuracy']:.2f} %" if filed else "not yet"
        print(f"seed {seed}: test accuracy {again['accuracy']:.2f} %, on file {known}", flush=True)
        off += filed is not None and abs(again["accuracy"] - filed["accuracy"]) > 0.5
    return int(off > 0)


def main() -> int:
    socket.setdefaulttimeout(30)  # OpenML may not answer
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="do the missing runs; a stopped one goes on where it was")
    runs.add_argument("--hours", type=float, default=24.0, help="begin no run after this time (default: %(default)g)")
    runs.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS), help="default: all")
    again = commands.add_parser("row", help="train a row of the table again and compare with the results on file")
    again.add_argument("task", choices=TASKS)
    again.add_argument("contender", choices=CONTENDERS)
    again.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    timed = commands.add_parser("time", help="time the contenders, on an otherwise idle machine")
    timed.add_argument("--rounds", type=int, default=30, help="default: %(default)s, some ten minutes")
    commands.add_parser("report", help="make docs/quality.md and its pictures from the results on file")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(1)
    fix_allocator()
    if arguments.command == "row":
        return row(arguments.task, arguments.contender, arguments.seeds)
    if arguments.command == "run":
        run(arguments.hours, arguments.tasks)
    elif arguments.command == "time":
        measure(arguments.rounds)
    else:
        from bench.quality.report import write  # the others do without scipy and matplotlib

        write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
