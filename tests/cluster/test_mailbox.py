"""Messages between driver and workers on a real local Ray, also while their actor dies."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from refinedet.pipeline.cluster.mailbox import Mailbox, MailboxLink

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("connected")]


def test_messages_arrive_in_order_and_the_request_to_stop_comes_back() -> None:
    with Mailbox() as mailbox:
        link = MailboxLink(mailbox.actor, rank=3)
        for step in range(20):
            link.push(step)
        link.push("last", wait=True)
        assert mailbox.take() == [*((3, step) for step in range(20)), (3, "last")]
        assert not link.stop_requested
        mailbox.take(stop=True)
        link.push(20, wait=True)
        assert link.stop_requested
    link.push(21, wait=True)  # the actor is gone: no step is lost for that


def test_threads_share_a_link() -> None:
    """A worker's steps, its node's load and a notice of preemption come from different threads."""
    with Mailbox() as mailbox:
        link = MailboxLink(mailbox.actor, rank=0)

        def push(thread: int) -> None:
            for number in range(300):
                link.push((thread, number), wait=number % 10 == thread)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(push, range(4)))
        link.push("last", wait=True)
        received = [message for _, message in mailbox.take()]
    assert received.pop() == "last"
    for thread in range(4):
        assert [number for sender, number in received if sender == thread] == list(range(300))


def test_a_killed_actor_costs_messages_and_nothing_else() -> None:
    with Mailbox() as mailbox:
        link = MailboxLink(mailbox.actor, rank=0)
        link.push(1, wait=True)
        pid = ray.get(mailbox.actor.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        deadline, seen = time.monotonic() + 60, []
        while not seen or not link.stop_requested:
            link.push("after")
            seen += [message for _, message in mailbox.take(stop=True)]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert set(seen) == {"after"}
