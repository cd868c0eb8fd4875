"""One of the two trainings as a stage of the job: load, begin or go on, train, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape

from whp_fast.checkpoint import load_config
from whp_fast.compile_blocks import compile_blocks
from whp_fast.config import JobConfig, TrainConfig
from whp_fast.engine import Keeping, plan_steps, train
from whp_fast.fp8 import use_fp8
from whp_fast.objectives import Objective
from whp_fast.plan_gpus import device_at_hand
from whp_fast.plan_job import forward_flops
from whp_fast.processes import Processes
from whp_fast.progress import say
from whp_fast.snapshots import Snapshot, Snapshots
from whp_fast.trainee import Trainee
from whp_fast.training_log import TrainingLog


@dataclass(frozen=True)
class TrainingStage:
    """What both trainings share.

    Attributes:
        config: the whole job's settings.
        settings: of this training.
        base: folder of the model it starts from.
        run: the run folder.
        identity: fingerprint of everything the training depends on.
    """

    config: JobConfig
    settings: TrainConfig
    base: Path
    run: Path
    identity: str
    device: torch.device
    processes: Processes

    def work(
        self,
        folder: Path,
        make_objectives: Callable[[Trainee], Sequence[Objective]],
        point: Callable[[Trainee, int, int], dict | None] = lambda trainee, step, n_steps: None,
    ) -> tuple[dict, list[dict]]:
        """Train and save into ``folder``; called by every process.

        Args:
            make_objectives: of the loaded model.
            point: called with the number of each step made (0 before the first) and that of all steps: a
                point of a curve, or None.

        Returns:
            the summary, and the curve.
        """
        compute_dtype = getattr(torch, self.config.model.compute_dtype)
        trainee = Trainee.load(
            self.base,
            self.settings,
            self.config.memory,
            compute_dtype=compute_dtype,
            device=self.device,
            processes=self.processes,
            seed=self.config.run.seed,
        )
        use_fp8(trainee.model, self.config.model.fp8, only_in_training=True)
        if self.config.model.layers == "compile":
            compile_blocks(trainee.model)
        objectives = make_objectives(trainee)
        snapshots, resumed = self._snapshots()
        state = resumed.state if resumed is not None else {"records": [], "curve": []}
        curve: list[dict] = state["curve"]
        n_steps = len(plan_steps(len(objectives[0].blocks), self.settings, self.config.run.seed))
        log = self._log(folder, n_steps, state["records"])

        def after_step(step: int) -> None:
            found = point(trainee, step, n_steps)
            if found is not None:
                curve.append({"step": step, **found})

        with log:
            train(
                trainee,
                objectives,
                self.settings,
                seed=self.config.run.seed,
                device=self.device,
                processes=self.processes,
                keeping=Keeping(
                    snapshots,
                    resumed,
                    minutes=self.config.run.snapshot_minutes,
                    steps=self.config.run.snapshot_steps,
                    state=lambda: {"records": log.records, "curve": curve},
                ),
                on_step=log.on_step,
                after_step=after_step,
            )
        trainee.save(folder, self.base.name)
        losses = [record["loss"] for record in log.records]
        summary = {"steps": n_steps, "first_loss": losses[0], "last_loss": losses[-1]}
        summary["earlier_seconds"] = sum(r["seconds"] for r in log.records[: resumed.step if resumed else 0])
        return summary, curve

    def snapshots(self, attempt: str = "") -> Snapshots:
        """The snapshots of this training, beside its stage folder."""
        return Snapshots(
            self.run / f".{self.settings.name}.snapshots",
            identity=self.identity,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            attempt=attempt or os.urandom(8).hex(),
            barrier=self.processes.wait,
        )

    def _snapshots(self) -> tuple[Snapshots, Snapshot | None]:
        """Where to save, and what to go on from: the first process chooses, the others follow."""
        snapshots = self.snapshots(self.processes.from_first(os.urandom(8).hex()))
        resumed = snapshots.latest() if self.processes.first else None
        step = self.processes.from_first(None if resumed is None else resumed.step)
        if step is None:
            return snapshots, None
        say(f"  {escape(self.settings.name)}: goes on after step {step}, from the snapshot made there")
        return snapshots, resumed if self.processes.first else snapshots.open(step)

    def _log(self, folder: Path, n_steps: int, earlier: list[dict]) -> TrainingLog:
        first = self.processes.first
        events = self.run / "tensorboard" / self.settings.name
        shape = load_config(self.base)
        peak = device_at_hand().bfloat16 if self.device.type == "cuda" else 0.0
        return TrainingLog(
            folder / "log.jsonl" if first else None,
            self.settings.name,
            n_steps,
            earlier=earlier,
            tensorboard=events if first and self.config.run.tensorboard else None,
            flops_per_token=3 * forward_flops(shape, self.config.data.context),
            peak_flops=peak * self.processes.world_size,
        )
