"""One hash of the project's code, to tell whether a recorded result belongs to it.

python tests/code_hash.py

The folders are walked, git is not asked: a plain copy of the files has the same hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("src", "python", "cmake")
_FILES = ("CMakeLists.txt", "pyproject.toml")
_PRODUCTS = {"__pycache__", "build"}
_PRODUCT_SUFFIXES = {".so", ".pyd", ".pyc", ".pyo", ".egg-info", ".o", ".a"}


def code_hash() -> str:
    """SHA-256, as hexadecimal text, over the path and content of every source file."""
    digest = hashlib.sha256()
    for path in sorted(_source_files(), key=lambda path: path.relative_to(_ROOT).as_posix()):
        content = path.read_bytes()
        # The length keeps the end of one file apart from the start of the next.
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    for folder in _FOLDERS:
        yield from _walk(_ROOT / folder)
    yield from (path for path in (_ROOT / "tests").glob("*.py") if _is_source(path))
    yield from (_ROOT / name for name in _FILES)


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if not _is_source(path):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _is_source(path: Path) -> bool:
    return not (
        path.name.startswith(".")
        or path.name in _PRODUCTS
        or path.suffix in _PRODUCT_SUFFIXES
        or path.name.endswith("~")
    )


if __name__ == "__main__":
    print(code_hash())
