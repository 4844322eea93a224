"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse

Commands = argparse._SubParsersAction  # where a command's parser is added


def a_file(name: str) -> str:
    """A file that can be written, known before the work is done whose result it is to hold."""
    import os

    folder = os.path.dirname(name) or "."
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {folder}; make it, or give another file")
    if os.path.isdir(name) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: can't be written; give another file")
    return name


def a_picture(name: str) -> str:
    """A file that can be written, with an ending that says which kind of picture it is."""
    endings = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
    if not name.lower().endswith(endings):
        raise argparse.ArgumentTypeError(f"{name}: a picture's name ends in one of {', '.join(endings)}")
    return a_file(name)
