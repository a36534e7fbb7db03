"""What sacct prints is read as what it means: units, starts that were requeued, steps; recorded from Slurm 22.05.8."""

from types import SimpleNamespace

import pytest

from jobs.slurm import sacct
from jobs.slurm.queue import SlurmError, SlurmSilentError
from jobs.slurm.sacct import mebibytes_of, parse, seconds_of, used_at_the_end

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
    assert (one.state, one.seconds, one.limit_seconds, one.cores) == ("COMPLETED", 10.0, 600.0, 4)
    assert one.cpu_seconds == pytest.approx(2.817)
    assert one.memory_asked_mb == 1500
    assert one.memory_used_mb == pytest.approx(2 * 206156 / 1024)  # two tasks, of which the larger is reported
    again = found["2"]
    assert (again.state, again.seconds, again.limit_seconds) == ("CANCELLED", 22.0, 93780.0)
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


class Waiting:
    """A sacct that gives one answer after another, the last again and again, and a clock that only sleep moves."""

    def __init__(self, patch: pytest.MonkeyPatch, *answers: str | SlurmError) -> None:
        self.answers, self.asked, self.now = list(answers), list[str](), 100.0
        patch.setattr(sacct, "ask", self.ask)
        patch.setattr(sacct, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def ask(self, command: list[str], patience_seconds: float) -> str:
        assert patience_seconds == 0
        self.asked.append(command[command.index("-j") + 1])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def used(self, *jobs: str, wait: float = 20.0) -> dict[str, sacct.JobUse]:
        return used_at_the_end(jobs, wait)


RUNS = "5|RUNNING|00:00:10|00:10:00|00:00:00|4|1|8000M||\n5.batch|RUNNING|00:00:10||00:00:00|4|1||0|1\n"
COMPLETING = RUNS.replace("5|RUNNING", "5|COMPLETING").replace("batch|RUNNING", "batch|COMPLETED")
STEP_RUNS = RUNS.replace("5|RUNNING", "5|COMPLETED")
NO_STEP = "5|COMPLETED|00:00:12|00:10:00|00:00:09|4|1|8000M||\n"
WHOLE = f"{NO_STEP}5.batch|COMPLETED|00:00:12||00:00:09|4|1||2048K|1\n"
OTHER = WHOLE.replace("5", "6", 1).replace("\n5.", "\n6.")
NAMES = {"": "none", RUNS: "running", COMPLETING: "completing", STEP_RUNS: "a step runs", NO_STEP: "no step"}


@pytest.mark.parametrize("early", [*NAMES, None], ids=[*NAMES.values(), "no answer"])
def test_a_record_that_is_not_whole_is_asked_for_again_until_it_is(early: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SlurmSilentError("sacct: Connection refused") if early is None else early
    waiting = Waiting(monkeypatch, answer, answer, WHOLE)
    use = waiting.used("5")["5"]
    assert (use.state, use.seconds, use.cpu_seconds, use.memory_used_mb) == ("COMPLETED", 12.0, 9.0, 2.0)
    assert (len(waiting.asked), waiting.now) == (3, 102.0)


def test_only_the_records_that_are_missing_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, OTHER + RUNS, WHOLE)
    assert sorted(waiting.used("5", "6")) == ["5", "6"]
    assert waiting.asked == ["5,6", "5"]


@pytest.mark.parametrize("never", NAMES, ids=NAMES.values())
def test_the_wait_for_a_record_has_an_end(never: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, never)
    found = waiting.used("5", wait=20.0)
    assert (waiting.now, len(waiting.asked)) == (120.0, 21)
    # A site may keep no steps: what there is of the job is taken then.
    assert [use.ended for use in found.values()] == ([] if not never else [never == NO_STEP])


def test_where_there_is_no_accounting_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, SlurmError("sacct: Slurm accounting storage is disabled"))
    with pytest.raises(SlurmError, match="disabled"):
        waiting.used("5")
    assert (waiting.now, len(waiting.asked)) == (100.0, 1)


def test_an_accounting_that_stays_silent_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, SlurmSilentError("sacct: Connection refused"))
    with pytest.raises(SlurmSilentError):
        waiting.used("5")
    assert waiting.now == 120.0
    partly = Waiting(monkeypatch, OTHER, SlurmSilentError("sacct: Connection refused"))
    assert sorted(partly.used("5", "6")) == ["6"]


def test_a_step_of_an_earlier_start_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, RUNS.replace("5|RUNNING", "5|NODE_FAIL") + WHOLE)
    assert waiting.used("5")["5"].ended
    assert len(waiting.asked) == 1


def test_cores_that_one_start_does_not_tell_of_are_not_known_for_the_job() -> None:
    """Else they would look idle. What a job held is counted over all its starts."""
    lines = ["2|NODE_FAIL|00:00:06|01:00:00|{first}|4|1|2G||", "2|COMPLETED|00:00:16|01:00:00|00:10.000|4|1|2G||"]
    reported = {first: parse([line.format(first=first) for line in lines])["2"] for first in ("00:05.000", "00:00:00")}
    assert [use.cpu_seconds for use in reported.values()] == [15.0, None]
    assert {(use.state, use.seconds, use.memory_used_mb) for use in reported.values()} == {("COMPLETED", 22.0, None)}


def test_many_jobs_are_asked_for_in_several_requests_with_all_their_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def ask(command: list[str], patience_seconds: float) -> str:
        assert "-D" in command  # the starts before the last too
        jobs = command[command.index("-j") + 1].split(",")
        asked.append(jobs)
        return "".join(f"{job}|COMPLETED|00:00:10|00:10:00|00:02.000|4|1|1500M||\n" for job in jobs)

    monkeypatch.setattr(sacct, "ask", ask)
    jobs = [f"7_{i}" for i in range(450)]
    assert list(sacct.used(jobs)) == jobs
    assert [len(a) for a in asked] == [200, 200, 50]
