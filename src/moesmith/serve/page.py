"""The page that the server shows at /: a conversation, and the experts its last reply went through.

One file of HTML with its style and script inside, which asks nobody but the server it came from. The page's
own policy allows this one script (by its hash) and requests to its own server, nothing else: what a model
writes is put into the page as text, and would do no harm if that had a hole.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.lru_cache(maxsize=1)
def html() -> str:
    """The page; the same for every model and every client."""
    css, js = _file("page.css"), _file("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(js)}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    filled = {"policy": policy, "css": css, "js": js}
    # One pass: a slot's name inside of what was filled in is text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match.group(1)], _file("page.html"))


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
