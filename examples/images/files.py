"""Image files: read with care, filtered, and written whole or not at all. Blocking; for threads and processes."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from msgspec import Struct
from PIL import Image, ImageOps, UnidentifiedImageError

from examples.images.filters import FilterPipeline, Step

FORMATS: Final = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""What a file name's ending says. It decides how an image is written; what is read is known by its content."""
OPTIONS: Final[dict[str, dict[str, Any]]] = {"JPEG": {"quality": 90}, "WEBP": {"quality": 90}}
OPAQUE: Final = ("JPEG", "BMP")
"""Formats that know no transparency."""
FROM_CAMERAS: Final = "MPO"
"""A JPEG with a preview, or what else a camera knows, behind the image itself."""
LARGEST_SIDES: Final = {"JPEG": 65_500, "WEBP": 16_383, "GIF": 65_535}
"""Pixels of a side that a format can hold at most; the others hold any that fit into the memory."""
WITH_PROFILE: Final = ("JPEG", "PNG", "WEBP", "TIFF")
LARGEST_PIXELS: Final = 80_000_000
"""An image may be larger than any camera's, but not so large that a small file fills the memory."""
PLAIN_MODES: Final = ("L", "LA", "RGB", "RGBA")
DEEP_GREY: Final = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""16 bits of grey per pixel; Pillow reads some of them into 32."""
DEPTH: Final = 256
"""Of 16 bits the upper 8 are kept."""
HOST: Final = socket.gethostname()
TEMPORARY: Final = ".conveyor-"
"""Begins the name of a file that is being written."""
KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""What may have the name of an image, and is none."""
NO_FILE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
NO_SYNC: Final = {errno.EINVAL, errno.ENOTSUP}
"""So some network file systems say that their folders need none."""

# Large images are refused here, where the limit can be chosen; Pillow's own warning comes from half of its own limit on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Refused(Exception):
    """A file that will not be processed, however often it is tried; says why."""


class Processed(Struct, frozen=True):
    """What was done with one image.

    Parameters:
        steps: loading, each filter and saving, with their seconds.
        seconds: all of it.
        process: the id of the process that did it.
        host: where that process is.
        attempt: which attempt it was.
    """

    source: str
    target: str
    width: int
    height: int
    steps: tuple[Step, ...]
    seconds: float
    process: int
    host: str = ""
    attempt: int = 1


def process_file(
    source: Path,
    target: Path,
    pipeline: FilterPipeline,
    *,
    largest_pixels: int = LARGEST_PIXELS,
    on_step: Callable[[Step], object] = lambda _: None,
) -> Processed:
    """Load an image, apply the filters, and save what they make. Doing it again makes the same.

    Parameters:
        on_step: called after each step.

    Raises:
        Refused: this image will not do, now or later.
        OSError: another time it may; the disk is full, for example.
    """
    started = time.perf_counter()
    check_target(source, target)  # before the work, not after it
    changed = _changed(source)
    image = load_image(source, largest_pixels=largest_pixels)
    load = Step("load", time.perf_counter() - started)
    on_step(load)
    if size := pipeline.size_of(*image.size):  # before the work, where that is known
        check_size(target, *size)
    filtered = pipeline.apply(image, on_step)
    saving = time.perf_counter()
    save_image(filtered.image, target, profile=_profile_for(filtered.image, image), not_before=changed)
    ended = time.perf_counter()
    save = Step("save", ended - saving)
    on_step(save)
    steps = (load, *filtered.steps, save)
    return Processed(str(source), str(target), *filtered.image.size, steps, ended - started, os.getpid(), HOST)


def is_made(source: Path, target: Path, since: float) -> bool:
    """Whether target was made, after since (Unix seconds), of what source is now."""
    try:
        made = target.stat()
    except OSError:
        return False
    return stat.S_ISREG(made.st_mode) and made.st_mtime >= max(since, _changed(source))


def check_source(path: Path) -> None:
    """See that an image can be read, as far as that is known without opening it.

    Raises:
        Refused: it is no file, but a named pipe, for example; or a link to nothing.
    """
    with _refusing(path):
        _check_kind(path, path.stat().st_mode)


def check_target(source: Path, target: Path) -> None:
    """See that an image can be written.

    Raises:
        Refused: its name says no known format, it is the original itself, or something in its place is no file.
    """
    format_for(target)
    itself = Refused(f"{target.name} is the original itself, which would be lost: write to another file")
    if target == source:
        raise itself
    with suppress(OSError):
        found = target.stat()
        _check_kind(target, found.st_mode)
        if os.path.samestat(found, source.stat()):
            raise itself


def check_size(target: Path, width: int, height: int) -> None:
    """See that the target's format can hold an image of this size.

    Raises:
        Refused: it cannot.
    """
    kind = format_for(target)
    most = LARGEST_SIDES.get(kind)
    if most is not None and max(width, height) > most:
        raise Refused(
            f"{target.name} would have {width} × {height} pixels; {kind} holds at most {most:,} a side: write another format"
        )


def load_image(
    path: Path, *, largest_pixels: int = LARGEST_PIXELS, preview: tuple[int, int] | None = None
) -> Image.Image:
    """An image as filters want it: upright, still, in 8 bits of grey or red, green and blue, perhaps with transparency.

    Parameters:
        preview: at least this size will do; a JPEG is then decoded in a fraction of the time.

    Raises:
        Refused: it is missing, broken, no image, animated or too large.
        OSError: it cannot be read now.
    """
    with _refusing(path), _opened(path) as file, Image.open(file, formats=sorted(set(FORMATS.values()))) as image:
        if image.width * image.height > largest_pixels:
            raise Refused(
                f"{path.name} has {image.width} × {image.height} pixels, more than {largest_pixels / 1e6:g} megapixels: "
                "perhaps a decompression bomb (--largest-megapixels, or largest_pixels=, allows more)"
            )
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != FROM_CAMERAS:
            raise Refused(f"{path.name} is animated, or has several pages ({frames}); only single images are processed")
        if preview is not None:
            image.draft(None, (2 * preview[0], 2 * preview[1]))
        image.load()
        profile = image.info.get("icc_profile")
        plain = _plain(ImageOps.exif_transpose(image), path)
        plain.info = {"icc_profile": profile} if profile and plain.mode == image.mode else {}
        return plain


def pixels_of(path: Path) -> int:
    """How many pixels a result has, however many: nothing is decompressed. 0 where it cannot be read any more."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # load_image has a limit of its own
    try:
        with _opened(path) as file, Image.open(file) as image:
            return image.width * image.height
    except (OSError, ValueError, SyntaxError, Refused):
        return 0
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def save_image(image: Image.Image, target: Path, *, profile: bytes | None = None, not_before: float = 0.0) -> None:
    """Write an image in the format that the target's ending says: under a temporary name, then renamed.

    Parameters:
        profile: what its colours mean (ICC).
        not_before: Unix seconds; the file is not older than that, whatever the clock says.

    Raises:
        Refused: there is no such format, or it holds no image so large.
        OSError: it cannot be written now.
    """
    kind = format_for(target)
    check_size(target, *image.size)
    if kind in OPAQUE and image.mode.endswith("A"):
        image = _on_white(image)
    extra = (
        {"icc_profile": profile} if kind in WITH_PROFILE else {}
    )  # said also where there is none: else Pillow would guess
    with whole(target) as temporary:
        image.save(temporary, kind, **OPTIONS.get(kind, {}), **extra)
        if not_before > _changed(temporary):
            os.utime(temporary, (not_before, not_before))


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes the target, on the disk for certain, when the block ends well."""
    _make_folder(target.parent)
    # In the same folder, so that renaming puts it there in one step; with the permissions that any new file gets.
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}{target.suffix}")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield temporary
        os.fsync(handle)
        temporary.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Have a folder there, on the disk for certain."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk for certain."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def format_for(target: Path) -> str:
    """The format that a file name's ending says.

    Raises:
        Refused: there is no such format.
    """
    kind = FORMATS.get(target.suffix.lower())
    if kind is None:
        raise Refused(f"{target.name}: its ending says no known format; there are {' '.join(FORMATS)}")
    return kind


def _opened(path: Path) -> BinaryIO:
    """A file to read, and nothing else: opening a named pipe would wait for its writer, for ever."""
    _check_kind(path, path.stat().st_mode)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 - it is given
    try:  # it may have become something else meanwhile
        _check_kind(path, os.fstat(file.fileno()).st_mode)
    except Refused:
        file.close()
        raise
    return file


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Refused(f"{path.name} is {KINDS.get(stat.S_IFMT(mode), 'something else')}, no file")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What Pillow raises at a bad image, in words; what the disk raises stays as it is."""
    try:
        yield
    except UnidentifiedImageError as error:
        empty = path.exists() and path.stat().st_size == 0
        raise Refused(f"{path.name} {'is empty' if empty else 'is no image that can be read'}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(
            f"{path.name} is a decompression bomb, larger than --largest-megapixels can allow: {error}"
        ) from error
    except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_FILE:
            link = os.path.islink(path)  # noqa: PTH114 - that of Path raises at a name that is too long
            raise Refused(f"{path.name} is a link to nothing" if link else f"there is no file {path}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Refused(f"{path.name} is broken: {error}") from error


def _changed(path: Path) -> float:
    """When a file was changed last, in Unix seconds; 0.0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _plain(image: Image.Image, path: Path) -> Image.Image:
    """In one of the modes that filters know."""
    if image.mode in DEEP_GREY:  # convert("L") would clip instead of scale
        low, high = image.convert("I").getextrema()
        if not 0 <= float(str(low)) <= float(str(high)) < DEPTH**2:
            raise Refused(f"{path.name} has more than 16 bits per pixel, which no filter knows")
        return image.convert("I").point(lambda value: value * (1 / DEPTH)).convert("L")
    if image.mode == "F":
        raise Refused(f"{path.name} has floating-point pixels, which no filter knows")
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in {"L", "LA", "La"} else "RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in PLAIN_MODES else image.convert("RGB")


def _profile_for(filtered: Image.Image, original: Image.Image) -> bytes | None:
    """The original's colour profile, where the colours are still of the kind that it is about."""
    profile: bytes | None = original.info.get("icc_profile")
    return profile if filtered.mode.removesuffix("A") == original.mode.removesuffix("A") else None


def _on_white(image: Image.Image) -> Image.Image:
    plain = image.convert("RGBA")
    ground = Image.new("RGBA", plain.size, "white")
    return Image.alpha_composite(ground, plain).convert(image.mode[:-1])
