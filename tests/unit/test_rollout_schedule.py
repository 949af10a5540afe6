"""Which rollout is made when and by which weights, with a service that does nothing but keep the order."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from siren_megatron.rollout.schedule import RolloutSchedule


class Service:
    """Runs the work in a thread that waits until somebody wants its result, or at once."""

    def __init__(self, in_background):
        self.in_background = in_background
        self.version = 0

    def start(self, work):
        future: Future = Future()
        thread = threading.Thread(target=lambda: future.set_result(work()))
        thread.start()
        if not self.in_background:
            thread.join()
        return future

    def finish(self, future):
        return future.result(10)


def train(schedule, service, made, *, first, last):
    """The loop of a run: (step, the rollout's step, its weights' version) of every step."""
    used = []
    for step in range(first, last + 1):
        used.append((step, *schedule.next(step)))
        service.version = -1  # between updates nobody may look
        schedule.settle()
        service.version = step
    return used


def make(ahead, service, made, num_steps=6):
    def collect(step):
        made.append(step)
        return step, service.version

    return RolloutSchedule(collect, service, steps_ahead=ahead, num_steps=num_steps)


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_each_rollout_is_made_once_in_order_by_the_weights_of_the_schedule(ahead):
    service, made = Service(in_background=False), []
    used = train(make(ahead, service, made), service, made, first=1, last=6)
    assert used == [(s, s, max(0, s - 1 - ahead)) for s in range(1, 7)]
    assert made == list(range(1, 7)), "none beyond the last step"


@pytest.mark.parametrize("ahead, kept", [(0, 0), (1, 1), (3, 3)])
def test_a_resumed_run_goes_on_with_what_was_ready(ahead, kept):
    service, made = Service(in_background=False), []
    whole = train(make(ahead, service, made), service, made, first=1, last=6)
    service.version, made = 0, []
    schedule = make(ahead, service, made)
    first = train(schedule, service, made, first=1, last=3)
    assert len(schedule.ready) == kept
    resumed = make(ahead, service, made)
    resumed.restore(3, schedule.ready)
    assert first + train(resumed, service, made, first=4, last=6) == whole
    assert made == list(range(1, 7))


def test_another_number_of_steps_ahead_may_follow():
    service, made = Service(in_background=False), []
    schedule = make(2, service, made)
    train(schedule, service, made, first=1, last=3)
    none_ahead = make(0, service, made)
    none_ahead.restore(3, schedule.ready)
    used = train(none_ahead, service, made, first=4, last=6)
    assert used == [(4, 4, 1), (5, 5, 2), (6, 6, 5)]
    service.version, made = 3, []
    more_ahead = make(1, service, made)
    more_ahead.restore(3, [])
    assert train(more_ahead, service, made, first=4, last=6) == [(4, 4, 3), (5, 5, 3), (6, 6, 4)]


def test_the_next_one_is_made_while_a_step_is_trained():
    service, go_on = Service(in_background=True), threading.Event()

    def collect(step):
        assert step == 1 or go_on.wait(10)
        return step

    schedule = RolloutSchedule(collect, service, steps_ahead=1, num_steps=3)
    assert schedule.next(1) == 1, "it does not wait for the second one"
    go_on.set()
    schedule.settle()
    assert schedule.ready == [2]
