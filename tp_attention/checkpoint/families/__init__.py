"""The layouts that ship: one for each way in which a family of models names and packs its weights."""

from __future__ import annotations

from pathlib import Path

from tp_attention.checkpoint.families import bert, deepspeed, gpt, llama, megatron
from tp_attention.checkpoint.layouts import Layout, from_json

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for module in (llama, gpt, bert, megatron, deepspeed)
    for layout in vars(module).values()
    if isinstance(layout, Layout)
}


def find(name: str | Path) -> Layout:
    """The layout that ships as `name`, or the one that the JSON file `name` describes.

    Raises ValueError for an unknown name, listing the known ones, and for a file that is no layout.
    """
    if (layout := LAYOUTS.get(str(name))) is not None:
        return layout
    if (path := Path(name)).suffix == ".json" and path.is_file():
        return from_json(path)
    raise ValueError(f"unknown layout {str(name)!r}; known: {', '.join(LAYOUTS)}, or the path of a layout's .json file")
