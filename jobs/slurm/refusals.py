"""Read Slurm's error messages: refusals that last, a full queue, and troubles that may pass."""

import re

# Slurm's own words (slurm_errno.c). What blames an absent or busy controller may pass.
_PASSING = re.compile(
    "contact slurm|timed out|time out|connect|communicat|zero bytes|temporarily|unreachable|socket|authentication|try again|standby"
    "|unexpected|no answer|exit status 124|error writing script|not responding",
    re.I,
)
# These end when jobs of the user or of the account end.
_FULL = re.compile(
    "job submit limit|submitjob|too many jobs|too many array|(maximum|max(imum)? number of|limit on) .*jobs"
    "|(queued|submitted|pending) jobs.*(limit|exceed)|job limit",
    re.I,
)
_LASTING = re.compile(
    "invalid|not permitted|denied|not allowed|not available|not authorized|unauthorized|unable to allocate|violates|exceed|more processors"
    "|disabled|not defined|unrecognized|unknown|rejected|must (be|have|specify|use|request)"
    "|required|too (long|large|small)|no such|not found|mutually exclusive"
    "|dependency problem|execution impossible|not supported|forbidden|no partition|no account|bad constraint|unable to open|missing",
    re.I,
)


# The limit that a job breaks; the sentence beside it names all that it could be.
_LIMITS = re.compile(r"\b(?:Assoc|QOS)[A-Z]\w+")


def is_full(said: str) -> bool:
    """Return whether sbatch refused a job because too many are queued; a smaller array may fit."""
    limits = _LIMITS.findall(said)
    return any("Submit" in limit for limit in limits) if limits else bool(_FULL.search(said))


def may_pass(said: str) -> bool:
    """Return whether a Slurm error message blames an absent controller, not the request."""
    return bool(_PASSING.search(said)) and not is_full(said)


def is_refusal(said: str) -> bool:
    """Return whether Slurm has refused the request itself, so that asking again is useless.

    Words that are neither this nor `may_pass`, such as those of another language or of a site's
    plugin, are worth a few tries.
    """
    return is_full(said) or (bool(_LASTING.search(said)) and not may_pass(said))
