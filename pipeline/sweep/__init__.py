"""`ggscope COMMAND -m ...`: many runs of one command, each a process and a run folder of its own.

The points are shared out by `pipeline/executors`, not by a launcher of Hydra's. A run that is finished is its own
commit, so sweeps resume and skip what is done; a worker that dies costs its point; GPUs are handed out; and one
`executor=pool|ray|submitit` means the same for shards and for points. Hydra's launchers have none of it, and their
plugins (joblib, submitit, Ray, the Optuna sweeper) were last released for Hydra 1.1 to 1.3 and Optuna 2.
"""
