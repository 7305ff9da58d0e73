"""A study by one command.

Generated from book/97_study_command.md by `make export`: edit there.
"""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt

from diffussm.command_line import check_device, interruptible
from diffussm.guards import expect_there, refuse

if TYPE_CHECKING:
    from diffussm.study import Study
    from diffussm.study_runs import Row

__all__ = ["study"]


def study(
    file: Path,
    *,
    out: Path,
    workers: NonNegativeInt = 0,
    record: Path | None = None,
    known: Path | None = None,
    only: str = "",
    quick: bool = False,
    list_: bool = False,
    time: bool = False,
    report: bool = False,
    device: str | None = None,
) -> int:
    """train a grid of recipes with several seeds, and say what they show

    Carry out what is missing of a study; the same command again goes on.

    Args:
        file: YAML file of the study
        out: folder of its runs, its rows and its report
        workers: processes; 0: one for each core, or a single one on a GPU
        record: a file of rows that gets those of this study as well
        known: a file of rows, as --record wrote; their runs are not carried out again
        only: one "question, name" of the study: nothing but its seeds
        quick: the first seed alone, to be compared with rows that are known
        list_: print the runs with an estimate of their seconds, and train nothing
        time: write the seconds of a step of each run into the study's file of them
        report: write OUT/report.md about the rows that are there, and train nothing
        device: DEVICE
    """
    from diffussm.study import read_study

    refuse(list_ + time + report > 1, "give one of --list, --time and --report")
    for name, value in {"--only": only, "--quick": quick, "--known": known}.items():
        refuse(value and (time or report), f"{name} is for runs and --list")
    check_device(device)
    asked = read_study(file)
    asked = replace(asked, seeds=1) if quick else asked
    if time:
        return _time(asked, out)
    if report:
        return _report(asked, out)
    workers = workers or _cores(device)
    if list_:
        return _list(asked, out, workers, device, only, _known(known))
    return _carry_out(asked, out, workers, device, record, only, _known(known))


def _known(file: Path | None) -> list["Row"]:
    from diffussm.study_runs import read_rows

    if file is None:
        return []
    expect_there(file, "a file of rows, as --record writes")
    return read_rows(file)


def _cores(device: str | None) -> int:
    """How many runs at once: what shares a GPU does not get faster."""
    from diffussm.distributed import own_device

    gpu = (device or own_device(None).type) != "cpu"
    if gpu:
        return 1
    of_linux = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if of_linux else os.cpu_count() or 1


def _carry_out(
    asked: "Study",
    out: Path,
    workers: int,
    device: str | None,
    record: Path | None,
    only: str,
    known: list["Row"],
) -> int:
    from diffussm.study import runs_of
    from diffussm.study_runs import run_study

    runs = {run.digest for each in runs_of(asked, out).values() for run in each}
    number = itertools.count(1)

    def tell(row: "Row") -> None:
        print(f"{next(number)}: {_in_short(row)}", flush=True)
        if record is not None:
            _add_rows(record, [row])

    goes_on = "finished runs are kept, the same command goes on"
    with interruptible(lambda: goes_on):
        rows = run_study(asked, out, workers, device, tell, only, known)
    if record is not None:
        _add_rows(record, rows)
    print(f"{len(rows)} of {len(runs)} runs are in {out / 'results.jsonl'}")
    return 0


def _in_short(row: "Row") -> str:
    name = f"{row['digest']}, seed {row['recipe']['seed']}"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    loss, bits = row["held_out"]["loss"], list(row["bits_per_dim"].values())
    told = f", {bits[-1]['bits_per_dim']:.3f} bits/dim" if bits else ""
    return f"{name}: held-out loss {loss:.4f}{told}"


def _add_rows(record: Path, rows: list["Row"]) -> None:
    from diffussm.study_runs import read_rows, write_rows

    record.parent.mkdir(parents=True, exist_ok=True)
    there: dict[str, Any] = {row["digest"]: row for row in read_rows(record)}
    write_rows(record, (there | {row["digest"]: row for row in rows}).values())


def _list(
    asked: "Study",
    out: Path,
    workers: int,
    device: str | None,
    only: str,
    known: list["Row"],
) -> int:
    from diffussm.study import runs_of
    from diffussm.study_runs import chosen, row_there, seconds_needed

    left: dict[str, float] = {}
    for (question, name), runs in chosen(runs_of(asked, out), only).items():
        missing = [r for r in runs if row_there(r, out, asked.measure, known) is None]
        each = seconds_needed(runs[0], out, asked.measure, device)
        left |= {run.digest: each for run in missing}
        there = f"{len(runs) - len(missing)} of {len(runs)} seeds finished"
        steps = f"{runs[0].recipe.steps:,} steps"
        print(f"{question}, {name}: {steps}, {each:.0f} s each, {there}", flush=True)
    hours = sum(left.values()) / workers / 3600
    print(f"{len(left)} runs are missing: {hours:.2f} h for {workers} processes")
    return 0


def _time(asked: "Study", out: Path) -> int:
    from diffussm.study_runs import write_seconds

    found = write_seconds(asked, out)
    print(f"wrote {asked.seconds}: processor seconds of {len(found)} different steps")
    return 0


def _report(asked: "Study", out: Path) -> int:
    from diffussm.study_report import write_report
    from diffussm.study_runs import read_rows

    rows = read_rows(out / "results.jsonl")
    refuse(not rows, f"{out} has no rows yet: give the command without --report first")
    print(f"wrote {write_report(asked, rows, out)}")
    return 0
