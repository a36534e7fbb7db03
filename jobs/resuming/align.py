"""Find the line at which a resumed run is where the undisturbed run was after its save."""

from collections import defaultdict
from collections.abc import Sequence

_MATCH = 14  # lines in a row that must be the same
_LEAST = 3
Line = tuple[str, int]


def aligned(undisturbed: Sequence[Line], resumed: Sequence[Line]) -> tuple[int, int] | None:
    """Return the number of a line of each, from which on the same lines are run; None if there is none.

    It is the first such line of the resumed run: all that it restores has been restored by then, and
    nothing has been trained yet.
    """
    places = defaultdict(list)
    for number, line in enumerate(undisturbed):
        places[line].append(number)
    for p, line in enumerate(resumed):
        for q in places.get(line, ()):
            length = min(_MATCH, len(undisturbed) - q)
            if length >= _LEAST and list(resumed[p : p + length]) == list(undisturbed[q : q + length]):
                return q, p
    return None
