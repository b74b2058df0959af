from __future__ import annotations

import logging
import threading

import pytest
from refinedet.pipeline.tracking.outbox import Outbox, Point


class Server:
    """Receives points; away until set otherwise."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.points: list[Point] = []
        self.num_requests = 0

    def send(self, points: list[Point]) -> None:
        self.num_requests += 1
        if self.away.is_set():
            raise ConnectionError("away")
        self.points.extend(points)


def _points(first: int, last: int) -> list[Point]:
    return [Point("loss", 1.0, step, step) for step in range(first, last)]


@pytest.fixture
def server() -> Server:
    return Server()


def test_points_arrive_in_order_and_in_few_requests(server):
    outbox = Outbox(server.send, linger_s=60)
    for step in range(1000):
        outbox.put_points(_points(step, step + 1))
    assert outbox.close(5)
    assert server.points == _points(0, 1000)
    assert server.num_requests <= 4


def test_an_outage_loses_nothing_and_is_said_once(server, caplog):
    server.away.set()
    outbox = Outbox(server.send, linger_s=0, max_pause_s=0.05)
    outbox.put_points(_points(0, 10))
    assert not outbox.flush(0.3)
    outbox.put_points(_points(10, 20))
    server.away.clear()
    assert outbox.close(5)
    assert server.points == _points(0, 20)
    assert [record.message for record in caplog.records].count(
        "The tracking server does not answer; the run continues, deliveries wait."
    ) == 1
    assert outbox.num_lost == 0


def test_a_long_outage_drops_the_oldest_points_and_says_so_once(server, caplog):
    server.away.set()
    outbox = Outbox(server.send, linger_s=0, max_pause_s=0.05, max_points=100, batch_points=30)
    for step in range(150):
        outbox.put_points(_points(step, step + 1))
    server.away.clear()
    assert not outbox.close(5), "not all was delivered"
    assert server.points == _points(50, 150)
    assert outbox.num_lost == 50
    assert sum("oldest are dropped" in record.message for record in caplog.records) == 1


def test_what_the_server_refuses_holds_nothing_up(server, caplog):
    def refuse() -> None:
        raise ValueError("no such run")

    outbox = Outbox(server.send, is_away=lambda error: isinstance(error, ConnectionError), max_pause_s=0.01)
    outbox.put_call("the parameters", refuse)
    outbox.put_points(_points(0, 3))
    assert not outbox.close(5), "not all was delivered"
    assert server.points == _points(0, 3)
    assert "the parameters could not be delivered to the tracking server: no such run" in caplog.text


def test_closing_while_the_server_is_away_gives_up_and_says_what_is_lost(server, caplog):
    server.away.set()
    outbox = Outbox(server.send, linger_s=0)
    outbox.put_points(_points(0, 7))
    outbox.put_call("the status FINISHED", lambda: server.send([]))
    with caplog.at_level(logging.WARNING):
        assert not outbox.close(0.2)
    assert "7 metric values and the status FINISHED were not delivered" in caplog.text
    assert outbox.num_lost == 7
