"""The whole job: a model folder, a corpus and a dictionary go in, an unlearned model folder comes out.

    prepare -> align -> reinforce -> label -> unlearn -> evaluate -> export -> report

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
from whp_fast.progress import say


def run_job(
    config: JobConfig, *, overwrite: bool = False, earlier_seconds: dict[str, float] | None = None
) -> Path:
    """Run every stage that is not complete yet; return the folder of the unlearned model.

    Args:
        config: the job.
        overwrite: start anew in a run folder that is there.
        earlier_seconds: seconds of work done before the job (making the demo's world), for the report.

    Raises:
        UserError: something the caller can mend; finished stages are kept.
    """
    job = Job(config, overwrite=overwrite)
    try:
        job.prepare()
        job.align()
        job.reinforce()
        job.label()
        job.unlearn()
        job.evaluate()
        job.export()
        job.report(earlier_seconds or {})
    finally:
        job.run.close()
    return job.stages["export"].folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for what the user can mend, 130 when interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rest = [word for word in arguments if word not in ("--overwrite", "--debug")]

    def work() -> None:
        began = time.monotonic()
        _refuse_many_processes()
        folder = run_job(parse_config(rest), overwrite="--overwrite" in arguments)
        say(f"[bold]done[/bold] in {time.monotonic() - began:.0f} s: {escape(str(folder))}")

    return exit_status(work, debug="--debug" in arguments)


def _refuse_many_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} processes were started, but a job runs on one; use "
            "torchrun --nproc-per-node 1."
        )


if __name__ == "__main__":
    sys.exit(main())
