"""The key of a server, as a flag gives it. No message repeats what was given: it may be the key."""

from __future__ import annotations

from pathlib import Path

from moesmith.errors import UserError

HINT = "openssl rand -hex 24 > key, then --api-key key"


def read_key(given: str | None, *, slash: bool = True) -> str | None:
    """The first line of the file that is named, else the word itself.

    Args:
        slash: whether a key may hold a slash; if not, a word with one is a file that must be there.

    Raises:
        UserError: nothing there, or what a header cannot carry.
    """
    if given is None:
        return None
    key = given
    try:
        path = Path(given).expanduser()
        if path.is_file():
            key = path.read_text(encoding="utf-8").partition("\n")[0]
        elif "/" in given and not slash:
            raise UserError('api_key: there is no such file, and a key itself holds no "/" here', HINT)
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        # a long key is no name of a file
        if "/" in given or isinstance(error, UnicodeDecodeError):
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(f"api_key: the file cannot be read: {reason.lower()}", HINT) from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError("api_key: no key there, or one with characters that a header cannot carry", HINT)
    return key
