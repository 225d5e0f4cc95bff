"""What is done with a file: checked, measured, and, if it is an image, made small. Blocking; for threads."""

from __future__ import annotations

import hashlib
import mimetypes
import os
import stat
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from msgspec import Struct
from PIL import Image, ImageOps, UnidentifiedImageError

CHUNK: Final = 1024 * 1024
"""Bytes that are read at once."""
FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
"""Image formats that are opened at all: fewer decoders, fewer surprises."""
UNKNOWN: Final = "application/octet-stream"
BEGINNINGS: Final = (
    (b"%PDF-", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"OggS", "application/ogg"),
    (b"ID3", "audio/mpeg"),
    (b"\x1aE\xdf\xa3", "video/x-matroska"),
)
QUALITY: Final = 85


class Refused(Exception):
    """A file that will not be processed, however often it is tried; says why."""


class Facts(Struct, frozen=True):
    """What is known about a file."""

    media_type: str
    size: int
    sha256: str


class Limits(Struct, frozen=True):
    """What is too much: bytes of a file, pixels of an image."""

    file_bytes: int
    image_pixels: int


def find(root: Path, path: str) -> Path:
    """The file that a path below root means.

    Raises:
        Refused: the path leads outside, or to something that is no plain file.
        FileNotFoundError: there is none, perhaps not yet.
    """
    parts = PurePosixPath(path)
    if "\0" in path or "\\" in path or parts.is_absolute() or ".." in parts.parts:
        raise Refused(f"the path {path!r} leads out of the media folder")
    real = (root / parts).resolve(strict=True)
    if not real.is_relative_to(root.resolve()):
        raise Refused(f"the path {path!r} leads out of the media folder by a link")
    if not stat.S_ISREG(real.stat().st_mode):
        raise Refused(f"{path!r} is no file")
    return real


def examine(file: Path, limits: Limits) -> Facts:
    """A file's type, size and checksum.

    Raises:
        Refused: it is too large.
    """
    checksum, size, start = hashlib.sha256(), 0, b""
    with file.open("rb") as source:
        while part := source.read(CHUNK):
            start = start or part[:16]
            checksum.update(part)
            size += len(part)
            if size > limits.file_bytes:
                raise Refused(f"the file is larger than {limits.file_bytes:,} bytes")
    return Facts(_media_type(file, start), size, checksum.hexdigest())


def thumbnails(file: Path, folder: Path, sizes: Sequence[int], limits: Limits) -> dict[int, Path]:
    """Make an image's thumbnails: longest side → file. Each appears whole, or not at all.

    Raises:
        Refused: the image is broken, or its pixels are too many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, which is left behind anyway
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > limits.image_pixels:
                    raise Refused(
                        f"the image has {image.width} × {image.height} pixels, more than {limits.image_pixels:,} in all"
                    )
                image.draft("RGB", (max(sizes), max(sizes)))  # of a JPEG only as much is decoded as is needed
                upright = ImageOps.exif_transpose(image)
                opaque = not upright.has_transparency_data
                plain = upright.convert("RGB" if opaque else "RGBA")
            return {side: _save(plain, side, folder, opaque=opaque) for side in sizes}
    except UnidentifiedImageError as error:
        raise Refused("the image cannot be read") from error
    except Image.DecompressionBombError as error:
        raise Refused(f"the image is a decompression bomb: {error}") from error
    except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the image's
        raise Refused(f"the image is broken: {error}") from error


def _save(image: Image.Image, side: int, folder: Path, *, opaque: bool) -> Path:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    target = folder / f"{side}.{'jpg' if opaque else 'png'}"
    # In the same folder, so that renaming puts it there in one step.
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            if opaque:
                small.save(out, "JPEG", quality=QUALITY, optimize=True)
            else:
                small.save(out, "PNG", optimize=True)
            out.flush()
            os.fchmod(out.fileno(), 0o644)
            os.fsync(out.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _media_type(file: Path, start: bytes) -> str:
    """What a file is: its content says it, else its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                return Image.MIME.get(image.format or "", UNKNOWN)
    except Image.DecompressionBombError as error:
        raise Refused(f"the image is a decompression bomb: {error}") from error
    except (UnidentifiedImageError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OSError):
        pass
    for beginning, media_type in BEGINNINGS:
        if start.startswith(beginning):
            return media_type
    return mimetypes.guess_type(file.name)[0] or UNKNOWN
