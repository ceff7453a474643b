"""Iterative magnitude pruning: train, prune, rewind, again; and the controls that branch off."""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lth.events import Observer, Plan, PlannedStage
from lth.masked import any_sparse, choose_kernels, dense_weights, densely, mask_as_chosen, unmasked, with_exempt
from lth.plan import Search
from lth.prune import Layer, Masks, at_random, by_magnitude, density_of, full_masks, weight_key
from lth.seeds import derive, seed_all
from lth.stepper import captures, stepper
from lth.store import TICKET, Run, Stage, StageFiles
from lth.timing import fastest_threads, side_by_side, threads
from lth.train import Task, Training, as_numbers, computing_in, evaluating, synchronize, train


@dataclass(frozen=True)
class Driver:
    """Runs the stages of a plan; what is finished on disk is skipped, what was begun is continued."""

    task: Task
    search: Search
    layers: Sequence[Layer]
    run: Run
    observer: Observer

    def go(self, plan: Plan) -> None:
        finished = [planned.stage for planned in plan.stages if self.run.stage(planned.stage).finished]
        for stage in finished:
            self.run.stage(stage).drop_checkpoint()  # a crash may have come between the result and this
        self._note_environment()
        self.observer.run_started(plan, finished)
        for planned in plan.stages:
            if planned.stage not in finished:
                self._stage(planned)
        self.observer.run_finished(plan.directory)

    def _stage(self, planned: PlannedStage) -> None:
        stage, files = planned.stage, self.run.stage(planned.stage)
        weights, masks = self._start(stage, files), self._masks(stage, files)
        kernels = self._kernels(planned, files, weights, masks)
        model = mask_as_chosen(self._model(stage, weights), masks, kernels)

        seed_all(self._seed(stage, "training", stage.round, stage.branch))
        training = Training.begin(self.task, model, planned.start)
        checkpoint = files.checkpoint()
        if checkpoint is not None:
            training.restore(checkpoint)
        files.keep_evaluations(checkpoint)
        self.observer.stage_started(planned, kernels, training.iteration)
        with threads(kernels.get("threads")):
            train(
                self.task,
                training,
                stepper(self.task, training, self._seed(stage, "order"), stage),
                files,
                self.observer,
                iterations=planned.iterations,
                eval_every=self.search.eval_every,
                checkpoint_seconds=self.search.checkpoint_seconds,
                reached=self._snapshots(stage),
            )
        result = self._result(planned, training, masks, kernels, files)
        step_ms = 1000 * training.seconds / max(training.steps, 1)
        result["timing"] = {"seconds": training.seconds, "step_ms": step_ms, "sampled": kernels["sampled"]}
        files.finish(dense_weights(model), result)
        self.observer.stage_finished(stage, result)

    def _start(self, stage: Stage, files: StageFiles) -> dict[str, Tensor]:
        """The weights that a stage starts from; those of θ0 and of a reinit are drawn and saved when first wanted."""
        if stage.branch == "reinit":
            if not (files.path / "start.safetensors").exists():
                files.save_start(dense_weights(self._draw(stage, "reinit", stage.round)))
        elif not self.run.has(stage.replicate, "initial"):
            given = self.task.first is not None and stage.replicate == 0
            model = self.task.fresh() if given else self._draw(stage, "initial")
            self.run.save(stage.replicate, "initial", dense_weights(model))
        return files.start()

    def _masks(self, stage: Stage, files: StageFiles) -> Masks:
        if files.has_mask:
            return files.mask()
        masks = self._prune(stage)
        if empty := [name for name, mask in masks.items() if not mask.any()]:
            self.observer.note(f"{stage}: nothing is left of {', '.join(empty)}; what it gives on is its bias or 0")
        files.save_mask(masks)
        return masks

    def _prune(self, stage: Stage) -> Masks:
        replicate, number = stage.replicate, stage.round
        if number == 0:
            return full_masks(self.layers)
        if stage.branch == "reinit":
            return self.run.stage(Stage(replicate, number)).mask()
        if stage.branch == "random":
            generator = torch.Generator().manual_seed(self._seed(stage, "random", number))
            return at_random(self.layers, self.run.stage(Stage(replicate, number)).mask(), generator)
        before = self.run.stage(Stage(replicate, 0 if stage.branch == "oneshot" else number - 1))
        trained = before.weights()
        weights = {layer.name: trained[weight_key(layer.name)] for layer in self.layers}
        return by_magnitude(self.layers, weights, before.mask(), number, self.search.scope)

    def _kernels(
        self, planned: PlannedStage, files: StageFiles, weights: Mapping[str, Tensor], masks: Masks
    ) -> dict[str, Any]:
        """How the masked layers run: as decided before, or as for the ticket, or decided now."""
        kernels = files.kernels()
        if kernels is None:
            kernels = self._choose_kernels(planned, weights, masks)
            files.save_kernels(kernels)
        return kernels

    def _choose_kernels(self, planned: PlannedStage, weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Any]:
        stage, asked = planned.stage, self.search.kernels

        def alone(kernels: Mapping[str, Any]) -> dict[str, Any]:
            step = self._stepper(planned, weights, masks, kernels) if self._chooses_threads else None
            return {**kernels, "threads": step and fastest_threads(step), "sampled": None}

        if stage.branch != TICKET:
            ticket = self.run.stage(Stage(stage.replicate, stage.round)).kernels()
            assert ticket is not None  # its stage goes before its branches
            return {**ticket, "sampled": None}
        if stage.round == 0:
            return alone(unmasked(self.layers))
        example = self.task.example(self.task.batches(0, self._seed(stage, "order"))) if asked == "auto" else None
        model = self._model(stage, weights)
        device = next(model.parameters()).device
        with computing_in(self.task.autocast, device):
            kernels = choose_kernels(model, masks, self.layers, asked, example, captures(self.task, device))
        if not any_sparse(kernels):
            return alone(kernels)
        whole = with_exempt(kernels, self._model(stage, weights), self.layers[0].block) if asked == "auto" else None
        if whole is not None and self._sampled(planned, weights, masks, whole, kernels)["speedup"] > 1:
            kernels = whole
        sampled = self._sampled(planned, weights, masks, kernels, densely(kernels, ""))
        sparse_threads, dense_threads = sampled["threads"]
        if asked == "auto" and sampled["speedup"] <= 1:
            times = [f"{sampled[side]:.3g} ms" for side in ("sparse_ms", "dense_ms")]
            reason = "a training step takes {} sparse and {} dense masked".format(*times)
            return {**densely(kernels, reason), "threads": dense_threads, "sampled": None}
        return {**kernels, "threads": sparse_threads, "sampled": sampled}

    @functools.cached_property
    def _chooses_threads(self) -> bool:
        """Whether steps may run on fewer threads than PyTorch uses, where they are faster so."""
        if self.search.kernels != "auto" or torch.get_num_threads() == 1:
            return False
        with torch.random.fork_rng():
            return not next(self.task.fresh().parameters()).is_cuda

    def _model(self, stage: Stage, weights: Mapping[str, Tensor]) -> nn.Module:
        seed_all(self._seed(stage, "initial"))
        model = self.task.fresh()
        model.load_state_dict(weights)
        return model

    def _draw(self, stage: Stage, *path: int | str) -> nn.Module:
        seed_all(self._seed(stage, *path))
        return self.task.model()

    def _seed(self, stage: Stage, *path: int | str) -> int:
        return derive(self.search.seed, stage.replicate, *path)

    def _snapshots(self, stage: Stage) -> dict[int, Callable[[nn.Module], None]]:
        if stage.round or not self.search.rewind:
            return {}
        return {self.search.rewind: lambda model: self.run.save(stage.replicate, "rewind", dense_weights(model))}

    def _result(
        self, planned: PlannedStage, training: Training, masks: Masks, kernels: Mapping[str, Any], files: StageFiles
    ) -> dict[str, Any]:
        """What result.json holds, without its timing."""
        stage, evaluations = planned.stage, files.evaluations()
        judged = [record for record in evaluations if not math.isnan(record.get("val_loss", math.nan))]
        final = dict(evaluations[-1]) if evaluations else None
        if self.task.conclude is not None:
            final = {**(final or {"iteration": training.iteration}), **_conclusion(self.task, training.model)}
        return {
            "replicate": stage.replicate,
            "round": stage.round,
            "branch": stage.branch,
            "density": density_of(masks),
            "layers": {
                name: {"weights": mask.numel(), "remaining": int(mask.sum())} for name, mask in sorted(masks.items())
            },
            "start": planned.start,
            "iterations": training.iteration,
            "evaluations": len(evaluations),
            "early_stop": min(judged, key=lambda record: record["val_loss"]) if judged else None,
            "final": final,
            "kernels": {key: value for key, value in kernels.items() if key not in ("sampled", "threads")},
        }

    def _sampled(
        self,
        planned: PlannedStage,
        weights: Mapping[str, Tensor],
        masks: Masks,
        sparse: Mapping[str, Any],
        dense: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Training steps of copies, one way beside the other, each on the threads that suit it."""
        steps = [self._stepper(planned, weights, masks, side) for side in (sparse, dense)]
        counts = [fastest_threads(step) if self._chooses_threads else None for step in steps]
        timed = side_by_side(*(_on_threads(step, count) for step, count in zip(steps, counts, strict=True)))
        return {**timed, "threads": counts}

    def _stepper(
        self, planned: PlannedStage, weights: Mapping[str, Tensor], masks: Masks, kernels: Mapping[str, Any]
    ) -> Callable[[], None]:
        """Does a training step of a copy when called."""
        model = mask_as_chosen(self._model(planned.stage, weights), masks, kernels)
        training = Training.begin(self.task, model, planned.start)
        step = stepper(self.task, training, self._seed(planned.stage, "order"), f"{planned.stage}, timed on a copy")
        step.prepare()
        schedule = training.schedule()

        def finished_step() -> None:
            if training.iteration == planned.iterations:  # where schedules and batches may end
                training.reschedule(planned.start, schedule)
            step()
            synchronize(model)

        return finished_step

    def _note_environment(self) -> None:
        here = {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "machine": platform.node()}
        records = self.run.environment()
        if records and (changed := [key for key in here if records[-1].get(key) != here[key]]):
            self.observer.note(
                "equal bits are promised for an equal machine only; changed since the last start: "
                + ", ".join(f"{key} {records[-1].get(key)} → {here[key]}" for key in changed)
            )
        self.run.append_environment({**here, "python": platform.python_version(), "started": time.time()})


def _on_threads(step: Callable[[], None], count: int | None) -> Callable[[], None]:
    def threaded() -> None:
        with threads(count):
            step()

    return threaded if count is not None else step


def _conclusion(task: Task, model: nn.Module) -> dict[str, float]:
    assert task.conclude is not None
    with evaluating(model):
        return as_numbers("conclude", task.conclude(model))
