"""The examples run as they are printed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


def test_the_autoencoder_finds_a_ticket(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "find_ticket.py"))
    example["main"](iterations=60, rounds=2)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:3]] == ["100.00%", "60.00%", "36.00%"]
    losses = [float(line.split()[-1]) for line in printed[:3]]
    assert all(loss < 0.9 for loss in losses)  # 1 is what a constant would reach on normalised images
