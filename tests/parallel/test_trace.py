"""The collective-trace checker: it never cries wolf, misses nothing that would hang, and names who did what."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bernini.parallel.calls import Mismatch, Note, View, circle, compare
from bernini.parallel.group import Group, Message
from bernini.parallel.plan import Cut
from bernini.parallel.trace import KEPT, Trace, simulate
from bernini.parallel.ulysses import gathered

Call = tuple[str, dict[tuple[int, int], int]]
"""A kind, and the elements that go from one rank to another."""
Programs = list[list[Call]]


def programs(dice: random.Random, ranks: int) -> Programs:
    """The same calls for every rank."""
    calls: list[Call] = []
    for _ in range(dice.randint(1, 9)):
        kind = dice.choice(["exchange", "exchange", "gather", "tell"])
        pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
        sizes = [dice.randint(1, 3) for _ in range(ranks)]
        sent = {
            "exchange": {pair: dice.randint(1, 3) for pair in pairs if dice.random() < 0.6},
            "gather": {(a, b): sizes[a] for a, b in pairs},
            "tell": {},
        }
        calls.append((kind, sent[kind]))
    return [list(calls) for _ in range(ranks)]


def spoil(dice: random.Random, given: Programs) -> int:
    """Changes what one rank does, so that it differs from what the others expect; which rank."""
    rank = dice.randrange(len(given))
    calls, before = given[rank], list(given[rank])

    def own() -> list[Call]:
        """Nobody sees what the rank has no part in."""
        return [(kind, {pair: size for pair, size in sent.items() if rank in pair}) for kind, sent in calls]

    expected = own()
    while own() == expected:
        calls[:] = before
        at = dice.randrange(len(calls))
        kind, sent = calls[at]
        match dice.randrange(5):
            case 0:
                del calls[at]
            case 1:
                calls.insert(at, (dice.choice(["exchange", "tell"]), {}))
            case 2:
                calls[at] = dice.choice([name for name in ("exchange", "gather", "tell") if name != kind]), sent
            case 3 if mine := [pair for pair in sent if rank in pair]:
                calls[at] = kind, {**sent, (pair := dice.choice(mine)): sent[pair] + 1}
            case 4 if at:
                calls[at - 1], calls[at] = calls[at], calls[at - 1]
    return rank


@dataclass
class Rank:
    """One that can be stopped anywhere. A call ends when those that it needs have begun theirs, whatever it is."""

    number: int
    calls: list[Call]
    trace: Trace
    seen: list[View] = field(default_factory=list)

    def step(self, others: list[Rank]) -> bool:
        """One beginning or end; whether there was one."""
        view = self.trace.view()
        if view.inside:
            needs = view.calls[-1].needs
            if any(others[need].trace.view().number < view.number for need in needs):
                return False
            self.trace.end()
        elif view.number < len(self.calls):
            kind, sent = self.calls[view.number]
            sends, receives = (
                [
                    Note(pair[1 - way], "float32", (size,), size)
                    for pair, size in sent.items()
                    if pair[way] == self.number
                ]
                for way in (0, 1)
            )
            self.trace.begin(kind, sends, receives, kind == "tell")
        elif self.trace.ended:
            return False
        else:
            self.trace.ended = True
        self.seen.append(self.trace.view())
        return True


def played(dice: random.Random, given: Programs) -> list[Rank]:
    """Ranks after they have taken turns in a random order, some far ahead, until none can go on."""
    ranks = [Rank(rank, calls, Trace(range(len(given)), rank)) for rank, calls in enumerate(given)]
    able = set(range(len(ranks)))
    weights = [dice.choice([0.05, 1.0, 1.0]) for _ in ranks]
    while able:
        rank = dice.choices(sorted(able), [weights[at] for at in sorted(able)])[0]
        able = able | set(range(len(ranks))) if ranks[rank].step(ranks) else able - {rank}
    return ranks


def test_ten_thousand_schedules_and_none_that_hangs_or_is_wrongly_accused() -> None:
    dice = random.Random(0)
    hung = 0
    for round_ in range(10_000):
        given = programs(dice, dice.randint(2, 4))
        wrong = spoil(dice, given) if round_ % 2 else None
        ranks = played(dice, given)
        for _ in range(6):  # what one reads of another may be old
            one, other = dice.sample(ranks, 2)
            said = compare(dice.choice(one.seen), dice.choice(other.seen))
            assert said is None or wrong in (one.number, other.number), said
        found = [
            (one.number, other.number, said)
            for one in ranks
            for other in ranks
            if one is not other and (said := compare(one.trace.view(), other.trace.view()))
        ]
        if wrong is None:
            assert not found and all(rank.trace.ended for rank in ranks)
            continue
        hung += not all(rank.trace.ended for rank in ranks)
        assert found
        for one, other, said in found:
            assert wrong in (one, other) and f"rank {wrong}" in said
    assert hung > 1000  # most of them would have


def run(group: Group, calls: list[Call]) -> None:
    for kind, sent in calls:
        if kind == "exchange":
            sends = [Message(b, torch.zeros(size)) for (a, b), size in sent.items() if a == group.rank]
            group.exchange(sends, [Message(a, torch.zeros(size)) for (a, b), size in sent.items() if b == group.rank])
        elif kind == "gather":
            sizes = [max((n for (a, _), n in sent.items() if a == rank), default=1) for rank in range(group.size)]
            group.gather(torch.zeros(sizes[group.rank]), sizes)
        else:
            group.tell(group.rank)


def test_threads_that_disagree_end() -> None:
    """The same with real groups, whose ranks are threads and wait for each other."""
    dice, said = random.Random(1), set()
    for round_ in range(300):
        given = programs(dice, dice.randint(2, 4))
        if round_ % 3 == 0:
            assert simulate(len(given), lambda group, given=given: run(group, given[group.rank])) == [None] * len(given)
            continue
        wrong = spoil(dice, given)
        with pytest.raises(Mismatch) as caught:
            simulate(len(given), lambda group, given=given: run(group, given[group.rank]))
        assert f"rank {wrong} " in str(caught.value)
        said.add("ended" if "has ended" in str(caught.value) else "disagree")
    assert said == {"ended", "disagree"}


def test_the_message_says_who_did_what() -> None:
    def work(group: Group) -> None:
        group.tell(None)
        if group.rank == 2:
            group.gather(torch.zeros(2, 5, dtype=torch.bfloat16), [2, 2, 2])
        else:
            group.exchange([Message(2, torch.zeros(3, 4))], [])

    with pytest.raises(Mismatch) as caught:
        simulate(3, work)
    said = str(caught.value)
    assert said.startswith("ranks disagree in call 2: rank ")
    here = "test_the_message_says_who_did_what.work"
    assert (
        f"rank 2 is in group.gather by test_trace.{here}, sends it bfloat16[2, 5], expects from it bfloat16[2, 5]"
        in said
    )
    assert f"is in group.exchange by test_trace.{here}, sends it float32[3, 4]" in said


def test_shapes_may_differ_where_their_elements_do_not() -> None:
    def work(group: Group) -> list[float]:
        shape = (6,) if group.rank else (2, 3)
        found = torch.empty(shape)
        group.exchange(
            [Message(1 - group.rank, torch.full(shape, float(group.rank)))], [Message(1 - group.rank, found)]
        )
        return found.flatten().tolist()

    assert simulate(2, work) == [[1.0] * 6, [0.0] * 6]


def test_callers_of_this_package_count_and_others_do_not() -> None:
    cut = Cut((0, 2, 4))

    def one(group: Group) -> Any:
        return gathered(group, cut, torch.zeros(2))

    def other(group: Group) -> Any:
        return gathered(group, cut, torch.zeros(2))

    assert len(simulate(2, lambda group: (one, other)[group.rank](group))) == 2
    with pytest.raises(Mismatch, match=r"group.gather by ulysses._Gathered.forward < .*; |group.gather by test_trace"):
        simulate(2, lambda group: one(group) if group.rank else group.gather(torch.zeros(2), cut.sizes))


def test_a_difference_older_than_the_words_is_still_found() -> None:
    one, other = Trace([0, 1], 0), Trace([0, 1], 1)
    for number in range(KEPT + 5):
        one.begin("exchange", [Note(1, "float32", (3,), 3)], [], False)
        other.begin("exchange", [], [Note(0, "float32", (3 + (number == 0),), 3 + (number == 0))], False)
    said = compare(one.view(), other.view())
    assert said is not None and said.startswith("ranks disagree in call 6 or before it: ")


def test_ranks_that_wait_in_a_circle() -> None:
    """0 waits for 1 among (0, 1), 1 for 2 among (1, 2), 2 for 0 among (0, 2)."""
    views: dict[int, list[View]] = {}
    for rank, (mine, also) in enumerate([((0, 1), (0, 2)), ((1, 2), (0, 1)), ((0, 2), (1, 2))]):
        first, second = Trace(mine, mine.index(rank)), Trace(also, also.index(rank))
        first.begin("tell", [], [], True)
        views[rank] = [second.view(), first.view()]
    assert [view.members for view in circle(views, 0)] == [(0, 1), (1, 2), (0, 2)]
    free = Trace((0, 2), 1)
    assert circle({**views, 2: [free.view(), views[2][0]]}, 0) == []  # 2 is at work, and will come
    assert circle({rank: views[rank] for rank in (0, 1)}, 0) == []  # nothing is known of 2


def test_notes_survive_the_store() -> None:
    trace = Trace([4, 6], 1)
    trace.begin("exchange", [Note(0, "float32", torch.Size((2, 3)), 6), Note(0, "int64", (0, 3), 0)], [], False)
    view = trace.view()
    assert View.read(json.loads(json.dumps(view.plain()))) == view and view.who == "rank 6"
    assert len(view.calls[0].sends) == 1  # what is empty is not sent
