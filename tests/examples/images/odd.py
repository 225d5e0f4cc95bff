"""Images that are not what one hopes for."""

from __future__ import annotations

import io
import os
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from PIL import Image

from examples.images.pictures import photograph

SIZE: Final = (60, 40)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb() -> bytes:
    """A small PNG that claims 60,000 × 60,000 pixels."""
    head = (60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    body = zlib.compress(b"\0" * 60_001 * 100)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sixteen_bits() -> bytes:
    """Grey from dark to light, in 16 bits."""
    image = Image.new("I;16", (256, 10))
    for x in range(256):
        for y in range(10):
            image.putpixel((x, y), x * 257)
    return encoded(image, "PNG")


def rotated() -> bytes:
    """Lying on its side, with a note in its EXIF that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(1, SIZE), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    first, *others = [photograph(number, SIZE) for number in range(3)]
    return encoded(first, kind, save_all=True, append_images=others)


def photo(kind: str = "JPEG", mode: str = "RGB") -> bytes:
    return encoded(photograph(1, SIZE).convert(mode), kind)


HANDLED: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    "cmyk": ("a.jpg", lambda: photo("JPEG", "CMYK")),
    "16 bits": ("a.png", sixteen_bits),
    "rotated by EXIF": ("a.jpg", rotated),
    "wrong name": ("a.jpg", lambda: photo("PNG", "RGBA")),
    "palette": ("a.gif", lambda: photo("GIF", "P")),
    "one bit": ("a.tif", lambda: photo("TIFF", "1")),
    "grey with transparency": ("a.png", lambda: photo("PNG", "LA")),
    "upper case": ("A.JPG", photo),
    "with a preview, from a camera": ("a.jpg", lambda: animated("MPO")),
}
REFUSED: Final[dict[str, tuple[str, Callable[[], bytes], str]]] = {
    "zero bytes": ("a.jpg", bytes, "a.jpg is empty"),
    "no image": ("a.jpg", lambda: b"hello, I am a text", "a.jpg is no image that can be read"),
    "corrupt": ("a.png", lambda: photo("PNG")[:60] + b"\xff" * 3000, "a.png is broken"),
    "truncated": ("a.jpg", lambda: photo()[:700], "a.jpg is broken"),
    "animated GIF": ("a.gif", lambda: animated("GIF"), "a.gif is animated, or has several pages .3.; only single"),
    "animated PNG": ("a.png", lambda: animated("PNG"), "a.png is animated"),
    "animated WebP": ("a.webp", lambda: animated("WEBP"), "a.webp is animated"),
    "pages": ("a.tiff", lambda: animated("TIFF"), "a.tiff is animated, or has several pages"),
    "bomb": ("a.png", bomb, "a.png .*bomb.*--largest-megapixels"),
    "floating point": ("a.tif", lambda: photo("TIFF", "F"), "floating-point pixels"),
}


def no_files(folder: Path) -> dict[str, str]:
    """Make what has an image's name and is no file; gives what is said about each."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "nothing.jpg").symlink_to("nowhere.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    here = os.open(folder, os.O_RDONLY)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/socket.jpg")
    os.close(here)
    return {
        "pipe.jpg": "is a named pipe, no file",
        "folder.jpg": "is a folder, no file",
        "nothing.jpg": "is a link to nothing",
        "circle.jpg": "is a link to nothing",
        "device.jpg": "is a device, no file",
        "socket.jpg": "is a socket, no file",
        "missing.jpg": "there is no file",
        "x" * 300 + ".jpg": "there is no file",
    }


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
