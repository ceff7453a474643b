"""The command `lth`: run, report, doctor."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

USAGE = """usage: lth COMMAND

  lth run [PRESET] [options]   find a ticket; without arguments LeNet on the small MNIST, without a network
  lth report RUN...            pictures and tables of finished runs
  lth doctor                   what this machine has, and what each choice would use

lth COMMAND --help lists the options.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 1 (an error, said in a line), 2 (wrong usage) or 130 (interrupted)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"run": run, "report": report, "doctor": doctor}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] not in commands:
        print(f"lth: no command {arguments[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    sys.exit(commands[arguments[0]](arguments[1:]))


def run(arguments: Sequence[str]) -> int:
    from lth import presets

    @dataclass(frozen=True)
    class Options(presets.Settings):
        preset: tyro.conf.Positional[str] = "lenet"
        data_dir: Path | None = None  # read the data set from here, and nowhere else
        out: Path | None = None  # the run's folder; without it runs/PRESET and what is not the preset's own
        resume: bool = False  # continue the run that the folder holds
        dry_run: bool = False  # say what would be done, and do nothing
        track: str | None = None  # tensorboard: write its curves into the run's folder
        threads: int | None = None  # of PyTorch; bits are equal for equal numbers only
        checkpoint_seconds: float = 20.0  # at most about so much of a round is lost when the run is killed

    def parse(default: Options) -> Options:
        return tyro.cli(
            Annotated[Options, tyro.conf.FlagCreatePairsOff], prog="lth run", args=list(arguments), default=default
        )

    try:
        preset = parse(Options()).preset
        chosen = dataclasses.asdict(presets.named(preset))
        return _run(preset, parse(Options(preset=preset, **chosen)))
    except KeyboardInterrupt:
        print("lth: interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    except Exception as error:
        return _explain(error)


def _run(preset, options) -> int:
    import torch

    from lth import presets
    from lth.events import Observers
    from lth.progress import Progress
    from lth.ticket import plan_search, run_search
    from lth.tracking import tracker

    settings = presets.Settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(presets.Settings)})
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"threads: {options.threads}; it takes at least 1")
        torch.set_num_threads(options.threads)
    trackers = [tracker(options.track)] if options.track else []
    directory = options.out or presets.directory_of(preset, settings)
    task, search, described, dataset = presets.make(settings, options.data_dir)
    search = dataclasses.replace(search, checkpoint_seconds=options.checkpoint_seconds)
    if options.dry_run:
        print_plan(plan_search(task, search, directory))
        return 0
    with Progress(_console()) as progress:
        progress.note(
            f"{dataset.name} from {dataset.source}: {len(dataset.train):,} training, "
            f"{len(dataset.validation):,} validation, {len(dataset.test):,} test examples"
        )
        observer = Observers(progress, *trackers)
        run_search(task, search, directory, resume=options.resume, observer=observer, settings=described)
    print(f"Everything is in {directory}; `lth report {directory}` draws it.")
    return 0


def report(arguments: Sequence[str]) -> int:
    from lth import report as module

    return _guarded(lambda: module.main(arguments))


def doctor(arguments: Sequence[str]) -> int:
    from lth import doctor as module

    return _guarded(lambda: module.main(arguments))


def print_plan(plan) -> None:
    """The dry run's table: a row a round, then what all of it adds up to."""
    layers = list(plan.layers)
    table = Table(title=str(plan.directory))
    for heading in ("round", "% remaining", *layers, "trainings", "iterations"):
        table.add_column(heading, justify="right")
    for number in sorted({planned.stage.round for planned in plan.stages}):
        stages = [planned for planned in plan.stages if planned.stage.round == number]
        table.add_row(
            str(number),
            f"{100 * stages[0].density:.2f}",
            *(f"{stages[0].remaining[layer]:,}" for layer in layers),
            str(len(stages)),
            f"{sum(planned.iterations - planned.start for planned in stages):,}",
        )
    console = _console()
    console.print(table)
    blocks = {tuple(layer["block"]) for layer in plan.layers.values()}
    unit = "weights" if blocks == {(1, 1)} else "blocks of " + ", ".join(f"{r}x{c}" for r, c in sorted(blocks))
    total = sum(planned.iterations - planned.start for planned in plan.stages)
    console.print(
        f"Layer columns count the {unit} that remain. {len(plan.stages)} trainings, {total:,} iterations in all."
    )


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _guarded(command) -> int:
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """One line about an error, and the exit status. The traceback is for those who set LTH_TRACEBACK."""
    if os.environ.get("LTH_TRACEBACK"):
        raise error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"no space is left on the disk for {error.filename}; what was written before is whole: make room, then --resume"
    elif isinstance(error, OSError | ValueError | RuntimeError):
        text = str(error)
    else:
        text = f"unexpected {type(error).__name__}: {error} (LTH_TRACEBACK=1 shows where)"
    print(f"lth: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
