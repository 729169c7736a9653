"""How many names a brace pattern stands for, so that one of too many is refused before it is written out.

`{a,b}` 40 times over is a short text and a million million names; a range is as short.
"""

from __future__ import annotations

import re


def most_names(pattern: str) -> int:
    """Return how many names a brace pattern has, without writing them out."""
    # Of each brace that is open: the names of the finished alternatives, of this one, and where it begins.
    finished, current, starts = [0], [1], [0]
    for place, char in enumerate(pattern):
        if char == "{":
            finished.append(0)
            current.append(1)
            starts.append(place + 1)
        elif char == "," and len(current) > 1:
            finished[-1] += current[-1]
            current[-1] = 1
        elif char == "}" and len(current) > 1:
            names = finished.pop() + current.pop()
            current[-1] *= max(names, _range(pattern[starts.pop() : place]))
    return current[0]


def _range(text: str) -> int:
    """Return how many names a range has, its step aside; 0 for what is none."""
    if numbers := re.match(r"(-?\d+)\.\.(-?\d+)", text):
        return abs(int(numbers[2]) - int(numbers[1])) + 1
    letters = re.match(r"([A-Za-z])\.\.([A-Za-z])", text)
    return abs(ord(letters[2]) - ord(letters[1])) + 1 if letters else 0
