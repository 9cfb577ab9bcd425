"""Tests slots and their time."""

from psyche_lightning_localnet.clock import SlotClock


class Wall:
    def __init__(self, at):
        self.at = at

    def __call__(self):
        return self.at


def test_slots_are_due_with_the_wall_clock_and_never_late():
    wall = Wall(1000.0)
    clock = SlotClock(400, now=wall)
    assert (clock.slot, clock.unix_time(), clock.due()) == (0, 1000, 0)
    wall.at += 0.399
    assert clock.due() == 0
    assert 0 < clock.until_next() < 0.0011
    wall.at += 10.0
    assert clock.due() == 25
    clock.passed(25)
    assert (clock.slot, clock.unix_time(), clock.due()) == (25, 1010, 0)


def test_an_advanced_clock_goes_on_from_there():
    wall = Wall(1000.0)
    clock = SlotClock(500, now=wall)
    clock.advance(100)
    assert (clock.unix_time(), clock.due()) == (1050, 0)
    wall.at += 1.0
    assert clock.due() == 2


def test_a_frozen_clock_stands_and_resumes_where_it_stood():
    wall = Wall(1000.0)
    clock = SlotClock(500, now=wall, running=False, unix_ms=77_000)
    wall.at += 1000
    assert (clock.due(), clock.unix_time()) == (0, 77)
    clock.advance(4)
    clock.resume()
    wall.at += 0.5
    assert (clock.unix_time(), clock.due()) == (79, 1)
    clock.freeze()
    assert clock.due() == 0


def test_a_wall_clock_that_is_set_back_does_not_stop_the_chain():
    wall = Wall(1000.0)
    clock = SlotClock(500, now=wall)
    wall.at = 10.0
    assert clock.due() == 0
    wall.at += 0.5
    assert clock.due() == 1


def test_after_having_been_away_all_slots_are_due():
    wall = Wall(1000.0)
    clock = SlotClock(1000, now=wall)
    clock.begin(50, 1_050_000)
    wall.at = 5000.0
    clock.follow_wall()
    assert (clock.slot, clock.due()) == (50, 3950)
    clock.passed(3950)
    assert (clock.unix_time(), clock.unix_time(50), clock.unix_time(40)) == (5000, 1050, 1040)
    wall.at = 3.0  # the chain's time never goes back
    clock.follow_wall()
    assert (clock.slot, clock.due()) == (4000, 0)
    wall.at = 4.0
    assert clock.due() == 1
