"""Text that a terminal can be shown: names of files, samples and runs come from strangers.

A terminal obeys control characters: it can be told to hide text, to change its title, in some cases to type.
So they are shown by their codes, as are those that turn the direction of writing, and bytes of a file's name
that are no text.
"""

import re

# All but the newline and the tab, which are how lines and tables are written.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Return the text with what a terminal would obey, or could not write, replaced by its code."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
