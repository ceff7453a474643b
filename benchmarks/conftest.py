"""Tables that the benchmarks fill, printed at the end and with `--results FILE` kept, as `.json` or `.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

Row = dict[str, object]


class Tables:
    """Rows of results by title, in the order in which they came."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}

    def add(self, title: str, **row: object) -> None:
        self.rows.setdefault(title, []).append(row)

    def markdown(self) -> str:
        return "\n\n".join(f"{title}\n\n{_markdown(rows)}" for title, rows in self.rows.items())

    def write(self, path: Path) -> None:
        text = json.dumps(self.rows, indent=2, ensure_ascii=False, default=str) if path.suffix == ".json" else ""
        path.write_text(text or self.markdown() + "\n")


def _markdown(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines: list[Iterable[object]] = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


_tables = pytest.StashKey[Tables]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="file for the tables of results, .json or .md")
    parser.addoption("--compiled", action="store_true", help="also run dense networks through torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tables] = Tables()


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> Tables:
    return request.config.stash[_tables]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tables = config.stash[_tables]
    if not tables.rows:
        return
    terminalreporter.write_line("\n" + tables.markdown())
    if path := config.getoption("--results"):
        tables.write(path)
