"""In this process, one shard after the other."""

from __future__ import annotations

from .base import Executor, Placement, Progress, Work


class LocalExecutor(Executor):
    """No worker that could die: what the work raises comes out, and a kill ends the run (resume it)."""

    def run(self, work: Work, *, progress: Progress | None = None) -> None:
        missing = work.missing()
        if not missing:
            return
        captured, total = 0, work.rows(missing)

        def done(rows: int) -> None:
            nonlocal captured
            captured += rows
            if progress is not None:
                progress(captured, total)

        done(0)
        work.capture(missing, place=Placement(n_threads=self.config.threads_per_worker), done=done)
