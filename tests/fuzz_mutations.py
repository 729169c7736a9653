"""Damage to files: flipped bits, lost and doubled pieces, words in the place of others."""

from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

WILD_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=40)
WILD_NUMBERS = st.sampled_from(
    (0, -1, 1, 2, 3, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"))
)
WILD_SCALARS = st.none() | st.booleans() | WILD_NUMBERS | WILD_TEXT
WILD_VALUES = st.recursive(
    WILD_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WILD_TEXT, inner, max_size=3),
    max_leaves=6,
)

_TOKENS = (
    b"",
    b"\n",
    b'"',
    b"[",
    b"]",
    b"{}",
    b"=",
    b"#",
    b"1e999",
    b"-",
    b"nan",
    b"\0",
    b"\xff\xfe",
    b"../..",
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a damaged copy of the content: one to three injuries."""
    for _ in range(draw(st.integers(1, 3))):
        content = draw(st.sampled_from(_INJURIES))(draw, content)
    return content


def _flip(draw: st.DrawFn, content: bytes) -> bytes:
    if not content:
        return b"\0"
    place, bit = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 7))
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def _flip_near_the_start(draw: st.DrawFn, content: bytes) -> bytes:
    """Where formats have their headers."""
    return _flip(draw, content[:200]) + content[200:]


def _truncate(draw: st.DrawFn, content: bytes) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def _cut_out(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return content[:start] + content[end:]


def _double(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return content[:end] + content[start:end][:4096] + content[end:]


def _insert(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    token = draw(st.sampled_from(_TOKENS) | st.binary(max_size=8))
    return content[:place] + token + content[place:]


def _zero(draw: st.DrawFn, content: bytes) -> bytes:
    """What a power cut leaves of a page that was not written."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return content[:start] + bytes(end - start) + content[end:]


def _swap_lines(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.split(b"\n")
    one, other = draw(st.tuples(*[st.integers(0, len(lines) - 1)] * 2))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\n".join(lines)


def _wild_word(draw: st.DrawFn, content: bytes) -> bytes:
    """Put something else in the place of what stands behind a ":" or "="."""
    places = [i + 1 for i, byte in enumerate(content[:20_000]) if byte in b":="]
    if not places:
        return content
    start = draw(st.sampled_from(places))
    end = start
    while end < len(content) and content[end] not in b",}\n":
        end += 1
    word = draw(
        st.sampled_from((b"null", b"true", b"-1", b"[]", b"{}", b'""', b'"x"', b"1e400", b"1.5", b"NaN"))
    )
    return content[:start] + b" " + word + content[end:]


_INJURIES: tuple[Callable[[st.DrawFn, bytes], bytes], ...] = (
    _flip,
    _flip_near_the_start,
    _truncate,
    _cut_out,
    _double,
    _insert,
    _zero,
    _swap_lines,
    _wild_word,
)


def injure_file(draw: st.DrawFn, path: Path) -> None:
    """Damage a file, or lose it, or have something else in its place."""
    kind = draw(st.sampled_from(("content",) * 6 + ("missing", "empty", "folder", "loop", "elsewhere")))
    content = path.read_bytes() if kind == "content" else b""
    path.unlink()
    if kind == "content":
        path.write_bytes(draw(damaged(content)))
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "elsewhere":
        path.symlink_to("/dev/null")
