"""Image files, opened with Pillow; not in `classification`, so that a bad one is refused before torch is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hermes.errors import InputError

__all__ = ["open_images"]


def open_images(paths: Sequence[Path]) -> list[Any]:
    """The images, decoded, in RGB. Raises InputError for the first that cannot be read, or without Pillow."""
    if not paths:
        raise InputError("there is nothing to look at: no image was given")
    return [_open_image(path) for path in paths]


def _open_image(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError("images need Pillow: pip install 'hermes-stream[image]'") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image of a kind that Pillow knows") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as an image: {reason}") from error
