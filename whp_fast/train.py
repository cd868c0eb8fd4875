"""The whole job: a model folder, a corpus and a dictionary go in, an unlearned model folder comes out.

    prepare -> align -> reinforce -> label -> unlearn -> evaluate -> export -> attack -> report

Each stage leaves finished artifacts in the run folder and is skipped when they are complete and what they
depend on has not changed. Run as ``torchrun -m whp_fast.train --config CONFIG [--section.key value ...]``, or
with ``python -m`` for the same on one process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from whp_fast.config import JobConfig, parse_config
from whp_fast.errors import UserError, exit_status
from whp_fast.job import Job
from whp_fast.processes import Processes, ProcessLost, join_processes
from whp_fast.progress import console, say
from whp_fast.stopping import interrupt_on_sigterm


def run_job(
    config: JobConfig,
    *,
    overwrite: bool = False,
    earlier_seconds: dict[str, float] | None = None,
    processes: Processes | None = None,
) -> Path:
    """Run every stage that is not complete yet; return the folder of the unlearned model.

    Args:
        config: the job.
        overwrite: start anew in a run folder that is there.
        earlier_seconds: seconds of work done before the job (making the demo's world), for the report.
        processes: the group that runs the job together; each calls this with the same arguments.

    Raises:
        UserError: something the caller can mend; finished stages are kept.
    """
    job = Job(config, overwrite=overwrite, processes=processes)
    try:
        job.prepare()
        job.align()
        job.reinforce()
        job.label()
        job.unlearn()
        job.evaluate()
        job.export()
        job.attack()
        job.report(earlier_seconds or {})
    finally:
        job.close()
    return job.stages["export"].folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for what the user can mend, 130 when interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rest = [word for word in arguments if word not in ("--overwrite", "--debug")]

    rank = os.environ.get("RANK", "0")

    def work() -> None:
        began = time.monotonic()
        try:
            config = parse_config(rest)
        except UserError:
            if rank != "0":  # said by the first process
                raise SystemExit(2) from None
            raise
        with join_processes(config.run.device) as processes:
            console.quiet = not processes.first
            folder = run_job(config, overwrite="--overwrite" in arguments, processes=processes)
        say(f"[bold]done[/bold] in {time.monotonic() - began:.0f} s: {escape(str(folder))}")

    def work_of_many() -> None:
        try:
            work()
        except ProcessLost as lost:
            if int(rank) == lost.told_by and "could not go on" not in str(lost):
                print(f"error: {lost}", file=sys.stderr)
            raise SystemExit(1) from lost

    _let_cuda_memory_grow()
    interrupt_on_sigterm()
    return exit_status(work_of_many, debug="--debug" in arguments)


def _let_cuda_memory_grow() -> None:
    """Segments of GPU memory that grow, against holes between tensors of changing sizes; unless the caller's
    environment says how. The allocator reads it when CUDA starts."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


if __name__ == "__main__":
    sys.exit(main())
