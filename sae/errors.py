"""The error tree of ggscope. A message says what was expected, what came, and what to do.

The command line prints the message as one line and exits with `exit_code`.
"""

from __future__ import annotations


class SAEError(Exception):
    """Anything that is the input's or the environment's fault, not ours."""

    exit_code = 2


class ConfigError(SAEError, ValueError):
    """A configuration key or value that cannot be used."""


class ShapeError(SAEError, ValueError):
    """An array whose shape or dtype does not fit."""


class FormatError(SAEError, ValueError):
    """A file that is not what it should be: truncated, foreign, hostile."""


class StoreError(SAEError, RuntimeError):
    """An activation store that is missing, damaged, locked or does not fit."""


class DiskError(SAEError, RuntimeError):
    """A file that could not be written: full disk, no permission."""


class DivergedError(SAEError, RuntimeError):
    """Training that left the finite numbers."""


class OutOfMemoryError(SAEError, RuntimeError):
    """More memory asked for than the machine or the GPU has."""


class HookError(SAEError, LookupError):
    """A hook point the model does not have."""


class LlamaError(SAEError, RuntimeError):
    """llama.cpp refused or failed."""


class ModelMismatchError(SAEError, ValueError):
    """An SAE and a model, or a store and a model, that do not belong together."""


class CheckFailedError(SAEError):
    """A verification that ran and said no."""

    exit_code = 3


class InterruptedRunError(SAEError):
    """Stopped by the user; the run can be resumed."""

    exit_code = 130
