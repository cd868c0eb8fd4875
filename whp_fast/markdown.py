"""Text, tokens and durations in the Markdown of the report."""

from __future__ import annotations

import re


def escaped(text: str, strip: bool = True) -> str:
    """Text that Markdown shows as it is, on one line of a table."""
    text = re.sub(r"\s*\n\s*", " ↵ ", text.strip() if strip else text)
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def code(text: str) -> str:
    """Text between backticks, fit for a table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
