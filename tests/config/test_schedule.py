from __future__ import annotations

import pytest
from refinedet.pipeline.config.schedule import make_schedule
from refinedet.pipeline.config.spec import Training


def test_the_papers_schedule() -> None:
    schedule = make_schedule(Training(), steps_per_epoch=100)
    assert schedule.total_steps == 11_000
    assert schedule.learning_rate(0) == pytest.approx(3.125e-4)
    assert schedule.learning_rate(50) == pytest.approx((3.125e-4 + 4e-3) / 2)
    assert schedule.learning_rate(100) == schedule.learning_rate(7_999) == pytest.approx(4e-3)
    assert schedule.learning_rate(8_000) == pytest.approx(4e-4)
    assert schedule.learning_rate(10_000) == pytest.approx(4e-5)


def test_the_rate_follows_the_global_batch() -> None:
    doubled = make_schedule(Training(global_batch=64), steps_per_epoch=10)
    plain = make_schedule(Training(), steps_per_epoch=10)
    assert all(
        doubled.learning_rate(step) == pytest.approx(2 * plain.learning_rate(step)) for step in range(0, 1100, 7)
    )


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert make_schedule(Training(warmup_epochs=0), 10).learning_rate(0) == pytest.approx(4e-3)
