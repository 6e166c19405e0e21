"""What trust.py tries many times over: one file a section, listed here."""

from __future__ import annotations

from .files import FILES
from .images import IMAGES
from .kills import KILLS
from .section import Section
from .signals import SIGNALS

SECTIONS: tuple[Section, ...] = (FILES, IMAGES, KILLS, SIGNALS)
