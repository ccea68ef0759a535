"""Where this package keeps files of its own between runs: converted models, tuned configurations."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """TP_ATTENTION_CACHE, else tp_attention in the user's cache directory."""
    if path := os.environ.get("TP_ATTENTION_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tp_attention"
