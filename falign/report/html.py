"""Markup that is safe by construction: what is not ``Html`` is text, and is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

__all__ = ["Html", "joined", "markup", "tag"]

VOID = frozenset({"meta", "br", "wbr"})
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What a completion may hold and HTML in UTF-8 may not."""


class Html(str):
    """Markup, to be put into a page as it is."""

    __slots__ = ()


def markup(content: str) -> Html:
    r"""Return markup as it is, and text escaped.

    Example:
        >>> markup("<b> & \x00"), markup(Html("<b>"))
        ('&lt;b&gt; &amp; �', '<b>')
    """
    return content if isinstance(content, Html) else Html(html.escape(UNWRITABLE.sub("\ufffd", content), quote=True))


def tag(name: str, *children: str, attributes: Mapping[str, str] | None = None) -> Html:
    """Return an element; children and values of attributes are escaped unless they are markup.

    Example:
        >>> tag("p", "1 < 2", tag("br"), attributes={"class": "note"})
        '<p class="note">1 &lt; 2<br></p>'
    """
    written = "".join(f' {key}="{markup(value)}"' for key, value in (attributes or {}).items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str], separator: str = "") -> Html:
    """Return parts one after the other, each escaped unless it is markup."""
    return Html(separator.join(map(markup, parts)))
