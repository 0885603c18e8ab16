"""The one exception type meant for the person at the keyboard.

Raised for what a user gave (a file, a key, a value); the command line prints it as `error: ...` without a
traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """What was seen, what was wanted; `hint` says what to do about it, on its own line."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint
