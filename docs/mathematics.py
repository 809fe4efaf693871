"""LaTeX in the pages becomes MathML when the site is built; browsers need no script and no network for it.

Written as on GitHub: $`x^2`$ in a line, a fenced block of the language "math" for a formula of its own.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor


def block(source: str, *args: Any, **kwargs: Any) -> str:
    """Format a fenced block, as pymdownx.superfences asks for it."""
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


class Inline(InlineProcessor):
    """A formula within a line."""

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(convert(match[1])), match.start(), match.end()


class Mathematics(Extension):
    """Both of them."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(Inline(r"\$`([^`]+)`\$", md), "mathematics", 200)  # before code


def makeExtension(**options: Any) -> Mathematics:
    """What Markdown looks for."""
    return Mathematics(**options)
