"""The same unit of work on Apache Beam: DirectRunner here, Dataflow, Flink or Spark elsewhere.

Each part is one element of the pipeline. A worker of the runner gives it to a `Pool` of one
process, so that a clip whose decoder crashes or hangs is rejected there exactly as on one machine,
and the shards are the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.manifest import PrepareError
from data_prep.pool import Pool
from data_prep.shards import Job


def _do(job: Job, timeout_seconds: float) -> int:
    """Runs on a worker of the runner; returns the number of clips."""
    Pool(workers=1, timeout_seconds=timeout_seconds, progress=lambda entry, count: None).run([job])
    return len(job.part.entries)


def run_on_beam(
    jobs: Sequence[Job], *, runner: str, options: Sequence[str], timeout_seconds: float
) -> None:
    """Does all jobs.

    Args:
      jobs: What to do; their directory must be visible to all workers.
      runner: Name of a Beam runner.
      options: Of the pipeline, NAME=VALUE.
      timeout_seconds: For one clip.

    Raises:
      PrepareError: If Beam is not installed, does not know the runner, or the pipeline fails.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise PrepareError(
            f"--runner={runner} needs Apache Beam: pip install 'avcl-jax[beam]'"
        ) from error
    flags = [f"--runner={runner}", *(f"--{option}" for option in options)]
    try:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            parts: Any = pipeline | "Parts" >> beam.Create(list(jobs))
            # Else a runner may fuse all parts onto the worker that lists them.
            parts | "Spread" >> beam.Reshuffle() | "Prepare" >> beam.Map(_do, timeout_seconds)
    except Exception as error:  # runners raise what they like
        raise PrepareError(f"the Beam pipeline failed: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Returns the last line of what a runner raises: it wraps errors into pages of text."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
