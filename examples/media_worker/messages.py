"""What comes in, and what goes out: plain JSON."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from conveyor import event

MEDIA_PROCESS: Final = "media.process"


class FileInfo(Struct, frozen=True):
    """A file of a user's.

    Parameters:
        path: below the media folder, with ``/`` between its parts.
        size, sha256: what the sender knows of it; a file that differs is refused.
    """

    path: Annotated[str, Meta(min_length=1, max_length=1000)]
    size: Annotated[int, Meta(ge=0)] | None = None
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-fA-F]{64}\Z")] | None = None


@event(MEDIA_PROCESS)
class ProcessMedia(Struct, frozen=True):
    """Please process this file."""

    user_id: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    file_info: FileInfo


@event("file.processed")
class FileProcessed(Struct, frozen=True):
    """A file was processed, and the data service knows.

    Parameters:
        path: what the data service was told: an image's largest thumbnail, another file itself.
        thumbnails: longest side in pixels → path.
    """

    user_id: int
    path: str
    media_type: str
    size: int
    sha256: str
    thumbnails: dict[str, str]
