"""What sacct prints is read as what it means: units, starts that were requeued, steps; recorded from Slurm 22.05.8."""

import pytest

from jobs.accounting import mebibytes_of, parse, seconds_of

# sacct -D -n -P: an array of two, each with 2 tasks of 200 MB that computed for 6 s and slept for 3 on a busy machine; a job that was
# requeued once and then cancelled; one that waits.
RECORDED = """\
1_0|COMPLETED|00:00:10|00:10:00|00:02.817|4|1|1500M||
1_0.batch|COMPLETED|00:00:10||00:00.012|4|1||10568K|1
1_0.0|COMPLETED|00:00:10||00:02.805|4|1||206156K|2
1_1|COMPLETED|00:00:10|00:10:00|00:02.860|4|1|1500M||
1_1.batch|COMPLETED|00:00:10||00:00.011|4|1||10472K|1
1_1.0|COMPLETED|00:00:10||00:02.849|4|1||206160K|2
2|REQUEUED|00:00:06|1-02:03:00|00:00.001|1|1|2G||
2.batch|CANCELLED|00:00:06||00:00.001|1|1||3164K|1
3|PENDING|00:00:00|UNLIMITED|00:00:00|1|1|500M||
2|CANCELLED by 0|00:00:16|1-02:03:00|00:00.001|1|1|2G||
2.batch|CANCELLED|00:00:16||00:00.001|1|1||3252K|1
""".splitlines()


def test_a_job_is_the_sum_of_its_starts_and_its_memory_that_of_its_largest_step() -> None:
    found = parse(RECORDED)
    assert set(found) == {"1_0", "1_1", "2"}
    one = found["1_0"]
    assert (one.state, one.starts, one.seconds, one.limit_seconds, one.cores) == ("COMPLETED", 1, 10.0, 600.0, 4)
    assert one.cpu_seconds == pytest.approx(2.817)
    assert one.memory_asked_mb == 1500
    assert one.memory_used_mb == pytest.approx(2 * 206156 / 1024)  # two tasks, of which the larger is told
    again = found["2"]
    assert (again.state, again.starts, again.seconds, again.limit_seconds) == ("CANCELLED", 2, 22.0, 93780.0)
    assert again.memory_used_mb == pytest.approx(3252 / 1024)


def test_what_is_not_gathered_is_not_known() -> None:
    """JobAcctGatherType=jobacct_gather/none, or a job that is gone from the accounting."""
    found = parse(["7|COMPLETED|00:00:20|UNLIMITED|00:00:00|4|1|8000M||", "7.batch|COMPLETED|00:00:20||00:00:00|4|1|||1"])
    assert (found["7"].cpu_seconds, found["7"].memory_used_mb, found["7"].limit_seconds) == (None, None, None)
    assert parse(["", "sacct: error"]) == {}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:00:10", 10),
        ("02:03.500", 123.5),
        ("12:00:01", 43201),
        ("1-02:03:04", 93784),
        ("00:02.966", 2.966),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [
        ("206064K", 201.234375),
        ("1500M", 1500),
        ("2G", 2048),
        ("1.50G", 1536),
        ("1T", 2**20),
        ("4Gc", 8 * 4096),
        ("16Gn", 2 * 16384),
        ("2048", 2),
        ("0", None),
        ("", None),
        ("16?", None),
    ],
)
def test_sizes(text: str, mebibytes: float | None) -> None:
    assert mebibytes_of(text, cores=8, nodes=2) == mebibytes
