"""The command `lth`: run, report, doctor."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lth.data import available
from lth.events import Observer, Observers, Plan
from lth.presets import Settings, directory_of, make, named, plan
from lth.progress import Progress
from lth.ticket import run_search
from lth.tracking import tracker

USAGE = """usage: lth COMMAND

  lth run [PRESET] [options]   find a ticket; without arguments LeNet on the small MNIST, without a network
  lth report RUN...            one page about finished runs, and its pictures
  lth doctor                   what this machine has, and what each choice would use

lth COMMAND --help lists the options.
"""
INTERRUPTED = 130
UNREAD = 141  # as of a program that SIGPIPE ended
NO_ROOM = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota leaves no space",
    errno.EFBIG: "the limit on a file's size leaves no space",
}


@dataclass(frozen=True)
class Options(Settings):
    """Find a ticket: train, prune the smallest weights, rewind the rest, and again."""

    # lenet, lenet-wide, conv2, conv4, conv6, resnet20 (the paper's "ResNet-18") or vgg19; the defaults are its own
    preset: tyro.conf.Positional[str] = "lenet"
    data_dir: Path | None = None  # read the data set from this folder and nowhere else
    out: Path | None = None  # folder of the run; by default runs/PRESET and what is not the preset's own
    resume: bool = False  # continue the run that the folder holds
    dry_run: bool = False  # say what would be done, and do nothing
    threads: int | None = None  # of PyTorch; with --kernels auto, steps that are faster on fewer take fewer
    checkpoint_seconds: float = 20.0  # a checkpoint follows an evaluation if so long has passed
    track: str | None = None  # tensorboard: write curves for it into the run's folder

    @property
    def settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})

    @property
    def directory(self) -> Path:
        return self.out or directory_of(self.preset, self.settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 1 (an error, said in a line), 2 (wrong usage), 130 (interrupted or terminated) or 141
    (nobody reads the output any more)."""
    _print_what_can_be_printed()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as cleanly as Ctrl-C
    try:
        status = _obeyed(sys.argv[1:] if arguments is None else list(arguments))
        if sys.stdout is not None:  # it was closed then
            sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        sys.exit(UNREAD)
    except Exception as error:
        if os.environ.get("LTH_TRACEBACK"):
            raise
        print(f"lth: {_explained(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _obeyed(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"lth: no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    return COMMANDS[command](rest)


def run(arguments: Sequence[str]) -> int:
    """`lth run`. Parses twice: the preset that the first pass finds gives the defaults of the second."""
    preset = _parsed([one for one in arguments if one not in ("-h", "--help")], Options()).preset
    options = _parsed(arguments, Options(**dataclasses.asdict(named(preset)), preset=preset))
    if options.threads is not None:
        _set_threads(options.threads)
    if options.dry_run:
        return _dry_run(options)
    if options.device == "cuda":
        _repeat_on_a_gpu()
    task, search, settings, dataset = make(options.settings, options.data_dir)
    search = dataclasses.replace(search, checkpoint_seconds=options.checkpoint_seconds)
    counts = f"{len(dataset.train):,} training, {len(dataset.validation):,} validation, {len(dataset.test):,} test"
    folder = shlex.quote(str(options.directory))
    with Progress() as progress:
        observer: Observer = Observers(progress, tracker(options.track)) if options.track else progress
        try:
            observer.note(f"{dataset.name} from {dataset.source}: {counts} examples")
            run_search(task, search, options.directory, resume=options.resume, observer=observer, settings=settings)
        except KeyboardInterrupt:
            observer.note(f"interrupted; the same command with --resume continues {folder}")
            return INTERRUPTED
        except (BrokenPipeError, SystemExit):  # rich makes the other of the one
            print(f"lth: nobody reads the output; the same command with --resume continues {folder}", file=sys.stderr)
            return UNREAD
    print(f"{folder} holds everything; `lth report {folder}` draws it")
    return 0


def report(arguments: Sequence[str]) -> int:
    from lth import report  # matplotlib takes a while to import

    return report.main(arguments)


def doctor(arguments: Sequence[str]) -> int:
    from lth import doctor

    return doctor.main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"run": run, "report": report, "doctor": doctor}


def _dry_run(options: Options) -> int:
    """Prints the plan. What would stop the run stops this too, unless the data is yet to be downloaded."""
    planned = plan(options.settings, options.directory)
    if options.track:
        tracker(options.track)
    place = options.data_dir or available(options.data)
    if place:
        _, search, _, dataset = make(options.settings, options.data_dir)
        dataclasses.replace(search, checkpoint_seconds=options.checkpoint_seconds)
        place = dataset.source
    print_plan(planned)
    print(f"{options.data}: {place or 'nowhere on this machine: it would be downloaded'}.")
    return 0


def print_plan(plan: Plan) -> None:
    """The dry run's table, a row a round, and what all of it adds up to."""
    columns = _columns(plan)
    table = Table(title=escape(str(plan.directory)))
    for heading in ("round", "% remaining", *columns, "trainings", "iterations"):
        table.add_column(heading, justify="right")
    for number in sorted({planned.stage.round for planned in plan.stages}):
        stages = [planned for planned in plan.stages if planned.stage.round == number]
        iterations = sum(planned.iterations - planned.start for planned in stages)
        counts = [f"{sum(stages[0].remaining[name] for name in names):,}" for names in columns.values()]
        table.add_row(str(number), f"{100 * stages[0].density:.2f}", *counts, str(len(stages)), f"{iterations:,}")
    blocks = sorted({tuple(layer["block"]) for layer in plan.layers.values()})
    unit = "weights" if blocks == [(1, 1)] else "blocks of " + ", ".join(f"{r}x{c}" for r, c in blocks)
    total = sum(planned.iterations - planned.start for planned in plan.stages)
    Console().print(table)
    print(f"The layers' columns count the {unit} that remain.")
    print(f"{len(plan.stages)} trainings, {total:,} iterations in all, into {plan.directory}; nothing was done.")


def _columns(plan: Plan) -> dict[str, list[str]]:
    """{heading: what it counts}: a column a layer or, of many, one for neighbours that are pruned at the same rate."""
    names = list(plan.stages[0].remaining)
    if len(names) <= 3:
        return {name: [name] for name in names}
    runs = [list(run) for _, run in itertools.groupby(names, key=lambda name: plan.layers[name]["rate"])]
    return {", ".join(run) if len(run) <= 2 else f"{run[0]} to {run[-1]}": run for run in runs}


def _parsed(arguments: Sequence[str], default: Options) -> Options:
    flags: Any = Annotated[Options, tyro.conf.FlagCreatePairsOff]
    return tyro.cli(flags, prog="lth run", args=list(arguments), default=default)


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ValueError(f"threads: {threads}; it takes at least 1")
    torch.set_num_threads(threads)


def _repeat_on_a_gpu() -> None:
    """Equal seeds give equal bits: cuDNN and cuBLAS would choose faster sums in an order that varies."""
    import torch

    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _print_what_can_be_printed() -> None:
    """Where the output takes few letters only, in ASCII say, a multiplication sign must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _explained(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f"{NO_ROOM[error.errno]} to write {error.filename or 'the output'}; what was written before is whole. "
            "Make room, and the same command with --resume continues"
        )
    if isinstance(error, OSError | ValueError | RuntimeError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (LTH_TRACEBACK=1 shows where)"


if __name__ == "__main__":
    main()
