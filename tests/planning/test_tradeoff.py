"""Where the knee of a curve is."""

from __future__ import annotations

from netdecouple.planning import tradeoff


def knee(*points: tuple[int, float]) -> int | None:
    """The knee of networks of so many MACs in a thousand, and with such losses."""
    return tradeoff.knee([1000 / macs for macs, _ in points], [loss for _, loss in points])


def test_the_knee_of_a_curve_that_bends() -> None:
    """Little is lost down to a third of the MACs, and much beyond."""
    assert knee((800, 0.002), (500, 0.01), (333, 0.02), (250, 0.2), (200, 0.4)) == 2


def test_the_order_of_the_points_does_not_matter() -> None:
    """The same network is found."""
    assert knee((200, 0.4), (333, 0.02), (500, 0.01), (250, 0.2), (800, 0.002)) == 1


def test_a_flat_curve_recommends_the_smallest() -> None:
    """Nothing that shows is lost anywhere."""
    assert knee((800, 0.001), (500, 0.002), (333, 0.009)) == 2


def test_a_straight_line_has_no_knee() -> None:
    """Every halving of the MACs costs the same: it is the user's to choose."""
    assert knee((500, 0.1), (250, 0.2), (125, 0.3)) is None


def test_a_curve_that_is_saturated_has_no_knee() -> None:
    """All is lost at once, or the loss rises less and less."""
    assert knee((800, 2.0), (500, 2.2), (250, 2.3)) is None
    assert knee((800, 0.2), (500, 0.3), (250, 0.35)) is None


def test_ruined_networks_do_not_hide_the_knee() -> None:
    """However much is lost where all is lost, the knee stays: up to 10 nats it would move."""
    some = [(800, 0.002), (500, 0.01), (400, 0.03), (250, 0.3)]
    assert knee(*some, (200, 0.6), (150, 10.0)) == knee(*some, (200, 3.0)) == 2


def test_a_point_that_another_beats_is_not_the_knee() -> None:
    """It has more MACs and loses more."""
    assert knee((500, 0.05), (480, 0.01), (300, 0.3)) == 1


def test_few_points() -> None:
    """The original and one network make no curve, unless that network loses nothing."""
    assert knee() is None
    assert knee((500, 0.1)) is None
    assert knee((500, 0.001)) == 0
