"""What trust.py tries many times over: one file a section, listed here."""

from __future__ import annotations

from .files import FILES
from .images import IMAGES
from .section import Section

SECTIONS: tuple[Section, ...] = (FILES, IMAGES)
