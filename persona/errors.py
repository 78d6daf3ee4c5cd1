"""The one family of errors that persona raises on purpose.

Every message says what was wrong, where, and what to do. `PersonaError` is a `ValueError`, so code that
already guards a call with `except ValueError` keeps working.
"""


class PersonaError(ValueError):
    """Base of all errors raised on purpose by persona."""


class EventError(PersonaError):
    """An event or a history that cannot be one: wrong type, not-a-number, no user."""


class RecipeError(PersonaError):
    """A recipe that does not say what to do: unknown key, wrong type, missing file."""


class DataError(PersonaError):
    """A raw record that could not be read; the message names file, line and field."""


class CheckpointError(PersonaError):
    """A saved encoder or adapter that is missing, corrupt, or was made for something else."""


class MissingExtraError(PersonaError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""
