"""What can go wrong in training, each with a message for the person who started it. No torch here."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A setting that cannot be meant; the message names it, what it is and what was expected."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message names the file."""


class NonFiniteError(RuntimeError):
    """The loss or a weight is not finite; the message names the step, the examples and the last good checkpoint."""


class Interrupted(Exception):  # noqa: N818 - not an error: it was wished
    """Training was asked to stop, and has saved what it had."""
