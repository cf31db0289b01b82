"""Scripts that the pages show."""

from __future__ import annotations

import re

from support.paths import ROOT


def page_script(page: str, name: str) -> str:
    """The script that a how-to page shows, which begins with its name."""
    text = (ROOT / "docs" / "how-to" / page).read_text()
    (block,) = re.findall(
        rf"^```py\n(# {re.escape(name)}\n.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    return block
