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


def first_line(error: BaseException) -> str:
    """An error of another library in a line: its kind, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
