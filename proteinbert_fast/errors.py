"""Errors with one clear line each: what is wrong, where, and what to do."""


class ProteinBertError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(ProteinBertError, ValueError):
    """A sequence, file, option or configuration that cannot be used as given."""


class CheckpointError(ProteinBertError):
    """A weights file that is damaged, unsafe, or of another model."""


class BackendError(ProteinBertError, RuntimeError):
    """A back end that was asked for and cannot run here."""


class NonFiniteError(ProteinBertError, FloatingPointError):
    """NaN or infinity where training needs numbers."""
