"""The benchmark harness: its schema, fairness, and that it judges nothing on a busy machine."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ["name", "shape", "dtype", "ours", "peer", "unit", "ratio", "bar", "holds", "note"]


def load(name: str) -> ModuleType:
    """A module of bench_perf, which is not installed and, with the root off the path, not importable by itself."""
    if "bench_perf" not in sys.modules:
        folder = ROOT / "bench_perf"
        spec = importlib.util.spec_from_file_location(
            "bench_perf", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["bench_perf"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench_perf"])
    return importlib.import_module(f"bench_perf.{name}")


harness, report, workload, main = load("harness"), load("report"), load("workload"), load("__main__")


class Clock:
    """A clock that only moves when a fake call takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float, log: list[str]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            log.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=fake, process_time=lambda: 0.0))
    return fake


def watch(clock: Clock, others: float) -> Any:
    """A watch on a machine where other processes use ``others`` cores and we use one."""

    def read() -> tuple[float, float]:
        return clock.now * (1 + others), clock.now

    return harness.Watch(read)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_the_schema_is_the_agreed_one() -> None:
    assert list(harness.COLUMNS) == SCHEMA


@pytest.mark.parametrize(
    ("arguments", "ratio", "holds"),
    [
        ({"ours": 2.0, "peer": 5.0, "bar": 2.0}, 2.5, True),
        ({"ours": 2.0, "peer": 3.0, "bar": 2.0}, 1.5, False),
        ({"ours": 2.0, "peer": 3.0}, 1.5, None),
        ({"ours": 50.0, "peer": 20.0, "bar": 2.0, "higher_is_better": True}, 2.5, True),
        ({"ours": 0.2, "bar": 0.3}, None, True),
        ({"ours": 0.4, "bar": 0.3}, None, False),
        ({"ours": 0.4, "bar": 0.3, "higher_is_better": True}, None, True),
        ({"ours": 2.0, "peer": 5.0, "bar": 2.0, "unfit": "busy"}, 2.5, None),
        ({"ours": 0.0, "peer": 5.0, "bar": 2.0}, float("inf"), True),
    ],
)
def test_judging(arguments: dict[str, Any], ratio: float | None, holds: bool | None) -> None:
    row = harness.judged("x", unit="s", note="spread", **arguments)
    assert (row.ratio, row.holds) == (ratio, holds)
    assert row.note == ("not judged: busy; spread" if "unfit" in arguments else "spread")


# --- timing ---------------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_alternate_who_begins(clock: Clock) -> None:
    log: list[str] = []
    row = harness.compare(
        "x", clock.call("ours", 0.02, log), clock.call("peer", 0.05, log), bar=2.0, budget=0.0, watch=watch(clock, 0.0)
    )
    assert log[:4] == ["ours"] * 2 + ["peer"] * 2, "a warm-up and one call to see how long it takes"
    assert log[4:] == ["ours", "peer", "peer", "ours"] * 2 + ["ours", "peer"]
    assert (row.ours, row.peer, row.ratio, row.holds) == pytest.approx((20.0, 50.0, 2.5, True))
    assert row.note == "min..p80 20..20 against 50..50 ms"


def test_short_calls_are_repeated_to_a_long_sample(clock: Clock) -> None:
    log: list[str] = []
    sides = clock.call("ours", 0.001, log), clock.call("peer", 0.004, log)
    row = harness.compare("x", *sides, unit="us", budget=0.0, watch=watch(clock, 0.0))
    counts = Counter(log)
    assert counts["ours"] == 5 + 5 * 50
    assert counts["peer"] == 5 + 5 * 13
    assert (row.ours, row.peer) == pytest.approx((1000.0, 4000.0))


def test_rounds_stop_at_the_budget_or_the_limit(clock: Clock) -> None:
    log: list[str] = []
    harness.compare("x", clock.call("ours", 1.0, log), budget=10.0, watch=watch(clock, 0.0))
    assert len(log) == 2 + 11, "the first check after ten seconds finds them not exceeded"
    log.clear()
    harness.compare("x", clock.call("ours", 0.02, log), budget=1e9, watch=watch(clock, 0.0))
    assert len(log) == 2 + harness.ROUNDS[1]


def test_the_median_judges() -> None:
    timing = harness.Timing.of([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.minimum, timing.median, timing.p80) == (1.0, 3.0, 5.0)


def test_a_time_limit_without_a_peer(clock: Clock) -> None:
    row = harness.compare("x", clock.call("ours", 0.02, []), unit="s", bar=0.03, budget=0.0, watch=watch(clock, 0.0))
    assert (row.peer, row.ratio, row.holds) == (None, None, True)


# --- other processes ------------------------------------------------------------------------------------------------


def test_nothing_is_judged_on_a_busy_machine(clock: Clock) -> None:
    def row(others: float) -> Any:
        sides = clock.call("ours", 1.0, []), clock.call("peer", 3.0, [])
        return harness.compare("x", *sides, bar=2.0, watch=watch(clock, others))

    assert row(0.04).holds is True
    busy = row(0.5)
    assert busy.holds is None
    assert busy.ratio == pytest.approx(3.0)
    assert "not judged: other processes used 50% of a core (limit 5%)" in busy.note
    assert row(0.07).holds is None


def test_a_system_that_does_not_tell_is_not_judged(clock: Clock) -> None:
    row = harness.compare("x", clock.call("ours", 1.0, []), unit="s", bar=2.0, watch=harness.Watch(lambda: None))
    assert row.holds is None
    assert "does not tell" in row.note


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux only")
def test_own_work_and_that_of_children_is_not_somebody_elses() -> None:
    before = harness.cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(i * i for i in range(3_000_000))"], check=True)
    sum(i * i for i in range(3_000_000))
    after = harness.cpu_seconds()
    assert before is not None
    assert after is not None
    own, total = after[1] - before[1], after[0] - before[0]
    assert own > 0.05
    assert total > 0.5 * own


# --- reports --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[Any]:
    return [
        harness.judged("kernel", 1.0, 2.5, unit="ms", shape="4 x 5", dtype="float32", bar=2.0, note="peer: [eager]"),
        harness.judged("slow kernel", 3.0, 2.5, unit="ms", bar=2.0),
        harness.judged("start", 0.1, unit="s", bar=0.3, unfit="busy"),
        harness.judged("nothing to draw", 7, unit="modules", bar=0),
    ]


def test_json_is_a_list_of_rows(rows: list[Any], tmp_path: Path) -> None:
    report.write_json(rows, tmp_path / "rows.json")
    assert [list(entry) for entry in json.loads((tmp_path / "rows.json").read_text())] == [SCHEMA] * 4
    assert report.read_json(tmp_path / "rows.json") == rows


def test_table_and_chart(rows: list[Any], tmp_path: Path) -> None:
    text = io.StringIO()
    report.print_table(rows, "title", Console(file=text, width=100))
    for expected in ("2.5x", "yes", "no", "1  peer: [eager]", "3  not judged: busy"):
        assert expected in text.getvalue()
    report.write_chart(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    report.write_chart([], tmp_path / "empty.png")


# --- command line ---------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench_perf", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_list_shows_every_benchmark_without_importing_them() -> None:
    done = bench("--list")
    assert done.returncode == 0
    package = sys.modules["bench_perf"]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*package.BENCHMARKS, *package.GROUPS]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "there is no benchmark 'nonsense'; there are import, "),
        ([], "name a benchmark: import, "),
        (["import", "--json", "no/such/folder/rows.json"], "the folder no/such/folder does not exist"),
    ],
)
def test_bad_use_is_one_sentence_and_exit_code_2(arguments: list[str], complaint: str) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_real_run_writes_rows(tmp_path: Path) -> None:
    done = bench("import", "--json", str(tmp_path / "rows.json"), "--chart", str(tmp_path / "rows.png"))
    assert done.returncode in (0, 1), done.stderr  # 1: a slow machine is no fault of the harness
    entries = report.read_json(tmp_path / "rows.json")
    assert [entry.name for entry in entries if entry.unit == "s"] == ["import bernini", "import bernini.kernels"]
    assert all(entry.holds for entry in entries if entry.unit == "modules")
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_the_environment_keeps_what_the_caller_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "5")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    measured = main.environment(default_malloc=False)
    assert (measured["OMP_NUM_THREADS"], measured["OMP_WAIT_POLICY"]) == ("7", "active")
    assert (measured["MALLOC_MMAP_MAX_"], measured["MALLOC_TRIM_THRESHOLD_"]) == ("5", "100000000000")
    assert not set(main.MALLOC) & set(main.environment(default_malloc=True))


@pytest.fixture
def fake_benchmark(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    module = ModuleType("bench_perf.fake")
    module.run = lambda: list(rows)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench_perf.fake", module)
    monkeypatch.setitem(main.BENCHMARKS, "fake", "bench_perf.fake")
    return rows


def test_a_child_measures_and_the_parent_judges(
    fake_benchmark: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    assert main.main(["fake", "--measure", "reuse", "--json", str(path)]) == 0
    measured = report.read_json(path)
    assert measured == fake_benchmark
    monkeypatch.setattr(main, "fresh", lambda name, malloc: list(measured))
    assert main.main(["fake", "--json", str(path)]) == 1, "a bar does not hold"
    extra = report.read_json(path)[len(measured) :]
    assert [row.name for row in extra] == ["kernel (default malloc)", "slow kernel (default malloc)"]
    assert {row.bar for row in extra} == {row.holds for row in extra} == {None}


# --- the workload ---------------------------------------------------------------------------------------------------


def test_workload_has_the_papers_shares() -> None:
    assert sum(workload.SHARES.values()) == pytest.approx(100)
    counts = Counter(record.task for record in workload.sample(20_000))
    for task, share in workload.SHARES.items():
        assert counts[task] / 200 == pytest.approx(share, abs=1)


def test_workload_is_fixed() -> None:
    assert workload.sample(50) == workload.sample(80)[:50]
    assert workload.sample(50) != workload.sample(50, seed=1)
    assert [(r.task, r.text_tokens, r.visual_tokens) for r in workload.sample(3)] == [
        ("Und", 70, 1590),
        ("Und", 294, 1590),
        ("I2I", 194, 4770),
    ]


def test_workload_segments_fit_their_task() -> None:
    for record in workload.sample(2000):
        sources = [segment.frames for segment in record.segments if segment.kind == "source"]
        targets = [segment.frames for segment in record.segments if segment.kind == "target"]
        assert 50 <= record.text_tokens <= 500
        assert all(length == 1 or 33 <= length <= 121 for length in sources + targets)
        assert all(length % 4 == 1 for length in sources + targets)
        assert len(targets) == (record.task != "Und")
        if record.task in ("V2V", "IV2V"):
            assert sources[0] == targets[0]
            assert len(sources) <= 5
        if record.task in ("T2I", "I2I"):
            assert targets == [1]
        if record.task in ("I2I", "I2V"):
            assert set(sources) == {1}
            assert 1 <= len(sources) <= 4
    assert workload.Visual("target", 81).grid == (21, 30, 53)
    assert workload.Visual("target", 81).tokens == 21 * 30 * 53
