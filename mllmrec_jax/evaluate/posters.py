"""Pictures of items, made small enough to be part of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

POSTER_WIDTH = 144
"""Pictures are scaled down to this width (pixels): twice the widest place they are shown in."""


class Posters:
    """Thumbnails as data URIs, each picture once however often it is shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: list[str] = []
        self._names: dict[str, str] = {}
        self.uris: dict[str, str] = {}

    def add(self, image: str | None) -> str:
        """The CSS class that shows `image`; empty where there is none or it cannot be read (then listed in `unreadable`)."""
        if not image:
            return ""
        if image not in self._names:
            uri = self._read(self.folder / image)
            self._names[image] = f"poster-{len(self.uris)}" if uri else ""
            if uri:
                self.uris[self._names[image]] = uri
            else:
                self.unreadable.append(image)
        return self._names[image]

    @staticmethod
    def _read(path: Path) -> str:
        from PIL import Image  # here: only reports need it

        try:
            with Image.open(path) as picture:
                picture.draft("RGB", (POSTER_WIDTH, POSTER_WIDTH))
                picture = picture.convert("RGB")
                picture.thumbnail((POSTER_WIDTH, 2 * POSTER_WIDTH), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                picture.save(buffer, format="JPEG", quality=82, optimize=True)
        except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            return ""
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
