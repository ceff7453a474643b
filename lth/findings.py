"""What a run's results say in words and in rows of tables. Claims only where replicates carry them."""

from __future__ import annotations

from typing import Any

from lth import plots
from lth.results import (
    DENSE_MS,
    EARLY_ACCURACY,
    EARLY_ITERATION,
    FINAL_ACCURACY,
    GAP,
    SPARSE_MS,
    SPEEDUP,
    STEP_MS,
    Results,
    Saved,
    duration,
)
from lth.store import TICKET, Run


def findings(results: Results) -> list[str]:
    """Plain sentences of what was measured; they compare nothing that replicates would have to carry."""
    last_round = max(results.rounds())
    said = [_ends(results, 0, "The dense network")]
    if last_round:
        remaining = results.remaining(last_round)
        said.append(_ends(results, last_round, f"The sparsest ticket ({remaining:.3g} % of the weights)"))
    if points := results.points(SPEEDUP):
        last, line = points[-1], plots.speedup_lines({"": results})[0]
        sparse, dense = results.point(SPARSE_MS, last.round), results.point(DENSE_MS, last.round)
        if sparse and dense:
            said.append(
                f"At {last.remaining:.3g} % a training step takes {sparse.mean:.3g} ms sparse and {dense.mean:.3g} ms "
                f"dense masked: {last.mean:.2f}× (repeats from {line.lows[-1]:.2f}× to {line.highs[-1]:.2f}×)."
            )
    said.append(_unsettled(results))
    said.append(saved_sentence(results.saved()))
    return [sentence for sentence in said if sentence]


def saved_sentence(saved: Saved) -> str:
    """What sparse steps saved, as an estimate."""
    missing = f" {saved.unsampled} sparse training(s) without a sample are left out." if saved.unsampled else ""
    if not saved.stages:
        return f"No training ran sparse with a sampled step time, so no saving can be stated.{missing}"
    verb = "saved" if saved.seconds >= 0 else "lost"
    return (
        f"Estimate: sparse steps {verb} {duration(abs(saved.seconds))} of the {duration(saved.dense_seconds)} that the "
        f"same {saved.stages} training(s) would have taken dense masked (iterations × the difference of the sampled "
        f"step times).{missing}"
    )


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Tickets against the dense network and each branch: differences with intervals, and what they show."""
    measures = (EARLY_ACCURACY, FINAL_ACCURACY, EARLY_ITERATION)
    found = []
    for other in (None, *(branch for branch in results.branches if branch != TICKET)):
        columns = [{d.round: d for d in results.differences(measure, other)} for measure in measures]
        rounds = sorted({number for column in columns for number in column})
        if rounds:
            name = "the dense network" if other is None else plots.BRANCH_NAMES[other]
            rows = [
                {"remaining": results.remaining(number), "cells": [column.get(number) for column in columns]}
                for number in rounds
            ]
            found.append({"other": name, "sentence": _claim(results, name, other), "rows": rows})
    return found


def round_rows(results: Results) -> list[dict[str, Any]]:
    """A row a round and branch: points of the measures in the order of the page's columns."""
    measures = (EARLY_ITERATION, EARLY_ACCURACY, FINAL_ACCURACY, GAP, STEP_MS, SPARSE_MS, DENSE_MS, SPEEDUP)
    rows = []
    for number in results.rounds():
        for branch in results.branches:
            if stages := results.at(number, branch):
                spreads = [s["timing"]["sampled"]["spread"] for s in stages if s["timing"].get("sampled")]
                rows.append(
                    {
                        "round": number,
                        "branch": plots.BRANCH_NAMES[branch] if number else "dense network",
                        "remaining": results.remaining(number, branch),
                        "points": [results.point(measure, number, branch) for measure in measures],
                        "spread": (min(low for low, _ in spreads), max(high for _, high in spreads))
                        if spreads
                        else None,
                    }
                )
    return rows


def layer_rows(run: Run, results: Results) -> list[dict[str, Any]]:
    """How each layer ran in each round of the first replicate, and % of it that remained."""
    replicate = results.replicates[0]
    return [
        {
            "round": result["round"],
            "cells": [
                (result["kernels"]["layers"][name], 100 * layer["remaining"] / layer["weights"])
                for name in run.layers
                for layer in [result["layers"][name]]
            ],
            "reason": result["kernels"].get("reason", ""),
        }
        for number in results.rounds()
        if (result := results.get(replicate, number)) is not None
    ]


def _ends(results: Results, number: int, who: str) -> str:
    points = [results.point(measure, number) for measure in (EARLY_ITERATION, EARLY_ACCURACY, FINAL_ACCURACY)]
    stop, early, final = points
    if not (stop and early and final):
        return ""
    return (
        f"{who} stops early at iteration {stop.mean:,.0f} with {early.mean:.2f} % test accuracy, "
        f"and ends at {final.mean:.2f} %."
    )


def _unsettled(results: Results) -> str:
    """Trainings whose early stop lies at the end, where the lowest validation loss may not have been reached."""
    judged = [r for r in results.all if r["early_stop"] is not None]
    late = [r for r in judged if r["early_stop"]["iteration"] == r["iterations"]]
    if not late:
        return ""
    return (
        f"In {len(late)} of {len(judged)} trainings validation loss was lowest at the last iteration: it might have "
        "fallen further, so their early stop is a lower bound."
    )


def _claim(results: Results, name: str, other: str | None) -> str:
    differences = results.differences(EARLY_ACCURACY, other)
    above = [d for d in differences if d.shown and d.mean > 0]
    below = [d for d in differences if d.shown and d.mean < 0]
    parts = [
        f"{word} accurate at " + ", ".join(f"{d.remaining:.3g}" for d in chosen) + " % remaining"
        for word, chosen in (("more", above), ("less", below))
        if chosen
    ]
    if not parts:
        return f"Against {name}, at early stop, no difference in test accuracy is shown at any density."
    rest = "; elsewhere no difference is shown" if len(above) + len(below) < len(differences) else ""
    return f"Against {name}, at early stop, tickets are " + ", ".join(parts) + f"{rest}."
