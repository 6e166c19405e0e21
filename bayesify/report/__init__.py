"""One self-contained HTML page on how far a fitted posterior can be trusted.

``gather`` measures, ``render`` makes the page of what it found; ``bayesify report`` does both.
"""

from .content import Report as Report
from .curve import pruning_curve as pruning_curve
from .data import gather as gather
from .page import render as render
from .shell import check_installed as check_installed
from .shell import html_page as html_page
