"""How errors show what they were given."""

from __future__ import annotations

_MOST = 200  # characters


def shown(value: object) -> str:
    """A value in an error's words: short, and whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits, or somebody's code
        return f"<{type(value).__name__}>"
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."
