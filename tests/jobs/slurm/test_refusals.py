"""What sbatch and its friends say when they fail: whether to ask again, to wait for room, or to give up."""

import pytest

from jobs.slurm.refusals import is_full, is_refusal, may_pass

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    "said",
    [
        FAILED + "Unable to contact slurm controller (connect failure)",
        FAILED + "Socket timed out on send/recv operation",
        FAILED + "Zero Bytes were transmitted or received",
        FAILED + "Slurm backup controller in standby mode",
        FAILED + "Slurm temporarily unable to accept job, sleeping and retrying",
        FAILED + "Resource temporarily unavailable",
        FAILED + "I/O error writing script/environment to file",
        FAILED + "Protocol authentication error",
        "sbatch: error: Munge encode failed: Failed to access socket: Connection refused",
        "Command '['timeout', '60', 'sbatch']' returned non-zero exit status 124.",
    ],
)
def test_trouble_with_the_controller_may_pass(said: str) -> None:
    assert may_pass(said)
    assert not is_refusal(said)
    assert not is_full(said)


@pytest.mark.parametrize(
    "said",
    [
        FAILED + "Invalid account or account/partition combination specified",
        FAILED + "Invalid qos specification",
        FAILED + "Requested node configuration is not available",
        FAILED + "Requested time limit is invalid (missing or exceeds some limit)",
        FAILED + "User's group not permitted to use this partition",
        FAILED + "Access/permission denied",
        FAILED + "Invalid job array specification",
        FAILED + "More processors requested than permitted",
        "sbatch: error: AssocMaxWallDurationPerJobLimit " + FAILED + POLICY,
        "sbatch: error: QOSMaxNodePerJobLimit " + FAILED + POLICY,
        "scontrol: error: Requested operation is presently disabled for job 7",
    ],
)
def test_a_refusal_of_the_request_lasts(said: str) -> None:
    assert is_refusal(said)
    assert not may_pass(said)
    assert not is_full(said)


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: AssocMaxSubmitJobLimit " + FAILED + POLICY,
        "sbatch: error: QOSMaxSubmitJobPerUserLimit " + FAILED + POLICY,
        "sbatch: error: AssocGrpSubmitJobsLimit " + FAILED + POLICY,
        FAILED + POLICY,
        "sbatch: error: Enforcing the maximum number of queued jobs: 50",
        "ERROR: you have too many jobs in the queue, try again later",
    ],
)
def test_a_full_queue_is_told_from_both(said: str) -> None:
    assert is_full(said)
    assert is_refusal(said)
    assert not may_pass(said)


@pytest.mark.parametrize("said", ["", "sbatch: erreur: impossible de soumettre le travail", "sbatch: Fehler 17", "!!"])
def test_other_words_are_none_of_these(said: str) -> None:
    assert not is_refusal(said)
    assert not may_pass(said)
