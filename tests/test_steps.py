"""Steps of long work: counted by the work, shown by whoever started it."""

import pytest

from icmsr_core.steps import Steps


def test_every_advance_is_shown_with_the_total():
    seen = []
    steps = Steps(lambda done, total: seen.append((done, total)))
    steps.begin(5)
    steps.advance()
    steps.advance(3)
    assert seen == [(1, 5), (4, 5)]
    steps.begin(2)
    steps.advance()
    assert seen[-1] == (1, 2), "work that begins starts from nothing"


def test_what_shows_the_steps_may_stop_the_work():
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(stop).advance()


def test_steps_that_nobody_watches_are_counted():
    steps = Steps()
    steps.advance(2)
    assert steps.done == 2


def test_a_portion_advances_in_whole_steps_each_once():
    seen = []
    steps = Steps(lambda done, total: seen.append(done))
    steps.advance(2)
    portion = steps.portion(3)
    for share in (0.1, 0.32, 1 / 3, 0.5, 0.2, 0.99, 1.0, 0.4, 1.0):  # back where the work runs again
        portion.reach(share)
    assert seen == [2, 3, 4, 5]


def test_a_share_may_pass_several_steps_at_once():
    steps = Steps()
    steps.portion(4).reach(0.8)
    assert steps.done == 3
