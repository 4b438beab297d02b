"""SegmentLayout against a token-by-token construction, over random layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bernini.kernels import Segment, SegmentLayout, segment_phases

sizes = st.integers(1, 3)
grids = st.tuples(sizes, sizes, sizes)


@st.composite
def samples(draw: st.DrawFn, number: int) -> list[Segment]:
    """text, up to nine sources, a target, sometimes a closing text: every order that the models use, and others."""
    count = draw(st.integers(0, 9))
    segments = [
        Segment("source", draw(grids), phase, number)
        for phase in segment_phases(count, interpolate=draw(st.booleans()))
    ]
    for _ in range(draw(st.integers(0, 2))):
        segments.insert(draw(st.integers(0, len(segments))), Segment("text", (draw(sizes), 1, 1), 0.0, number))
    segments.append(Segment("target", draw(grids), 0.0, number))
    if draw(st.booleans()):  # two targets in a row, or a text behind a target: the rows that need two intervals
        segments.append(
            draw(st.sampled_from([Segment("text", (2, 1, 1), 0.0, number), Segment("target", (1, 2, 1), 0.0, number)]))
        )
    return segments


@st.composite
def layouts(draw: st.DrawFn) -> SegmentLayout:
    return SegmentLayout([s for number in range(draw(st.integers(1, 4))) for s in draw(samples(number))])


def tokens_of(layout: SegmentLayout) -> list[tuple[int, Segment, tuple[int, int, int]]]:
    """(segment number, segment, position) of every token, by plain loops."""
    return [
        (number, segment, (t, h, w))
        for number, segment in enumerate(layout.segments)
        for t in range(segment.grid[0])
        for h in range(segment.grid[1])
        for w in range(segment.grid[2])
    ]


@settings(max_examples=150)
@given(layouts())
def test_ranges_rows_phases_and_indices(layout: SegmentLayout) -> None:
    tokens = tokens_of(layout)
    assert layout.tokens == len(tokens)
    for number, (start, stop) in enumerate(layout.ranges):
        assert [i for i, token in enumerate(tokens) if token[0] == number] == list(range(start, stop))
    sample_of = [segment.sample for _, segment, _ in tokens]
    assert layout.timestep_rows.tolist() == sample_of
    assert layout.num_samples == len(set(sample_of))
    borders = [i for i in range(len(tokens)) if i == 0 or sample_of[i] != sample_of[i - 1]]
    assert list(layout.cu_seqlens) == [*borders, len(tokens)]
    assert layout.max_seqlen == max(sample_of.count(b) for b in range(layout.num_samples))
    for i, (_, segment, position) in enumerate(tokens):
        t, h, w, s = layout.rows[i].tolist()
        assert (t, h, w) == ((0, 0, 0) if segment.kind == "text" else position)
        assert layout.phases[s] == segment.phase
        assert t < layout.grid_sizes[0] and h < layout.grid_sizes[1] and w < layout.grid_sizes[2]
    assert layout.target_index.tolist() == [i for i, (_, s, _) in enumerate(tokens) if s.kind == "target"]
    sources = layout.numbers("source")
    assert layout.indices(sources).tolist() == [i for i, (_, s, _) in enumerate(tokens) if s.kind == "source"]


def visible(layout: SegmentLayout) -> np.ndarray:
    """The rule of the hybrid mask for every pair of tokens."""
    tokens = tokens_of(layout)
    mask = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for q, (q_number, query, _) in enumerate(tokens):
        for k, (k_number, key, _) in enumerate(tokens):
            own_target = query.kind == "target" and k_number == q_number
            mask[q, k] = query.sample == key.sample and (own_target or (key.kind != "target" and k <= q))
    return mask


@settings(max_examples=150)
@given(layouts())
def test_intervals_are_the_hybrid_mask(layout: SegmentLayout) -> None:
    starts, ends, second = layout.intervals
    keys = np.arange(layout.tokens)
    mask = (keys >= starts[:, None]) & (keys < ends[:, None])
    if second is not None:
        extra = (keys >= second[0][:, None]) & (keys < second[1][:, None])
        assert not (mask & extra).any(), "the two intervals overlap"
        mask |= extra
    assert (mask == visible(layout)).all()


def test_the_interval_test_can_fail() -> None:
    layout = SegmentLayout([Segment("text", (3, 1, 1)), Segment("target", (1, 2, 2)), Segment("text", (2, 1, 1))])
    keys = np.arange(layout.tokens)
    causal = keys <= keys[:, None]  # what a library does when the mask is forgotten
    assert (causal != visible(layout)).any()
    assert layout.intervals.second is not None
    first_only = (keys >= layout.intervals.starts[:, None]) & (keys < layout.intervals.ends[:, None])
    assert (first_only != visible(layout)).any()


@settings(max_examples=100)
@given(layouts(), st.data())
def test_branches(layout: SegmentLayout, data: st.DataObject) -> None:
    sources = layout.numbers("source")
    keep = data.draw(st.sets(st.sampled_from(sources)) if sources else st.just(set()))
    kept = [s for number, s in enumerate(layout.segments) if s.kind != "source" or number in keep]
    assert layout.branch(keep).segments == tuple(kept)
    restarted = layout.branch(keep, ids="restart").segments
    assert [(s.kind, s.grid, s.sample) for s in restarted] == [(s.kind, s.grid, s.sample) for s in kept]
    for sample in range(layout.num_samples):
        phases = [s.phase for s in restarted if s.kind == "source" and s.sample == sample]
        n = len(phases)
        expected = [1.0 + i for i in range(n)] if n <= 5 else [1 + 4 * i / (n - 1) for i in range(n)]
        assert np.allclose(phases, expected, rtol=0, atol=5e-7)
    assert all(s.phase == 0 for s in restarted if s.kind == "target")
    assert layout.branch(sources) == layout


def test_phases_of_the_release() -> None:
    assert segment_phases(0) == ()
    assert segment_phases(5) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert segment_phases(7)[1] == 1.6666667461395264  # rounded in float32, as released
    assert segment_phases(7, interpolate=False) == tuple(float(i) for i in range(1, 8))


def test_device_copies_are_made_once() -> None:
    layout = SegmentLayout([Segment("source", (2, 2, 2), 1.5), Segment("target", (3, 2, 2))])
    on_cpu = layout.on("cpu")
    assert layout.on(torch.device("cpu")) is on_cpu and on_cpu.rows is on_cpu.rows
    assert on_cpu.rows.tolist() == layout.rows.tolist()
    assert on_cpu.intervals[0].tolist() == layout.intervals.starts.tolist()
    assert [tuple(table.shape) for table in on_cpu.tables(16)] == [(3, 4, 2), (2, 2, 2), (2, 2, 2), (2, 8, 2)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentLayout([]), "at least one segment"),
        (lambda: Segment("video", (1, 1, 1)), "kind='video'"),  # type: ignore[arg-type]
        (lambda: Segment("target", (1, 0, 1)), "three positive whole numbers"),
        (lambda: Segment("text", (1, 2, 1)), r"grid \(n, 1, 1\)"),
        (lambda: Segment("source", (1, 1, 1), float("nan")), "finite"),
        (lambda: Segment("source", (1, 1, 1), 1.0, -1), "sample"),
        (lambda: SegmentLayout([Segment("target", (1, 1, 1), 0.0, 1)]), "numbered 0, 1, 2"),
        (
            lambda: SegmentLayout([Segment("target", (1, 1, 1), 0.0, b) for b in (0, 1, 0)]),
            "numbered 0, 1, 2",
        ),
        (lambda: SegmentLayout([Segment("target", (1, 1, 1))]).branch([0]), "not a source"),
        (lambda: SegmentLayout([Segment("target", (1, 1, 1))]).branch([], ids="new"), "ids='new'"),  # type: ignore[arg-type]
        (lambda: SegmentLayout([Segment("target", (1, 1, 1))]).indices([3]), "no segment 3"),
        (lambda: segment_phases(-1), "must not be negative"),
    ],
)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_three_intervals_are_refused() -> None:
    parts = ["text", "target", "text", "target", "text"]
    layout = SegmentLayout([Segment(kind, (1, 1, 1)) for kind in parts])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="segment 4 .*3 key intervals"):
        _ = layout.intervals
