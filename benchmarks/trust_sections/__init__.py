"""What trust.py tries many times over: one file a section, listed here."""

from __future__ import annotations

from .commands import COMMANDS
from .concurrency import CONCURRENCY
from .disks import DISKS
from .draws import DRAWS
from .files import FILES
from .images import IMAGES
from .kills import KILLS
from .load import LOAD
from .memory import MEMORY
from .native import NATIVE
from .section import Section
from .signals import SIGNALS

SECTIONS: tuple[Section, ...] = (
    FILES, IMAGES, KILLS, SIGNALS, DISKS, COMMANDS, DRAWS, CONCURRENCY, MEMORY, NATIVE, LOAD,
)  # fmt: skip
