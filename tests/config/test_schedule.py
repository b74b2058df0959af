from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.config.batches import BatchPlan, divide_batch, plan_batches, possible_world_sizes
from refinedet.pipeline.config.schedule import make_schedule
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs.errors import UserError


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


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "expected"),
    [(None, 1, BatchPlan(32, 32, 1, 1)), (None, 4, BatchPlan(32, 8, 1, 4)), (4, 2, BatchPlan(32, 4, 4, 2))],
)
def test_the_global_batch_is_what_the_spec_says(micro_batch: int | None, world_size: int, expected: BatchPlan) -> None:
    plan = plan_batches(Training(micro_batch=micro_batch), world_size)
    assert plan == expected
    assert plan.micro_batch * plan.accumulation * plan.world_size == plan.global_batch


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "expected"),
    [
        (None, 3, BatchPlan(32, 11, 1, 3)),
        (4, 3, BatchPlan(32, 4, 3, 3)),
        (16, 4, BatchPlan(32, 8, 1, 4)),
        (1, 3, BatchPlan(32, 2, 10, 3)),  # shares of 11, 11 and 10 images: one more than asked for
    ],
)
def test_shares_may_differ_by_one(micro_batch: int | None, world_size: int, expected: BatchPlan) -> None:
    assert divide_batch(32, micro_batch, world_size) == expected


@given(global_batch=st.integers(1, 300), micro_batch=st.none() | st.integers(1, 300), data=st.data())
def test_a_division_fits_every_rank(global_batch: int, micro_batch: int | None, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, global_batch))
    plan = divide_batch(global_batch, micro_batch, world_size)
    smallest, largest = global_batch // world_size, -(-global_batch // world_size)
    assert plan.accumulation <= smallest  # no micro-batch is empty
    assert plan.micro_batch == -(-largest // plan.accumulation)
    assert plan.micro_batch <= (micro_batch or largest) or (micro_batch == 1 and plan.micro_batch == 2)


def test_more_workers_than_images_are_a_users_mistake() -> None:
    with pytest.raises(UserError, match="global_batch 32 has fewer images than the 33 workers"):
        divide_batch(32, None, 33)


def test_a_batch_that_does_not_divide_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="global_batch 32 cannot be shared by 3 workers"):
        plan_batches(Training(), 3)
    with pytest.raises(UserError, match=r"micro_batch 16 does not divide .* share 8 .*choose one of 1, 2, 4, 8"):
        plan_batches(Training(micro_batch=16), 4)


def test_an_elastic_job_takes_only_sizes_that_share_the_batch() -> None:
    assert possible_world_sizes(Training(), 1, 8) == [8, 4, 2, 1]
    assert possible_world_sizes(Training(micro_batch=8), 1, 8) == [4, 2, 1]
    assert possible_world_sizes(Training(), 4, 4) == [4]
    with pytest.raises(UserError, match="shared by no number of workers from 5 to 7"):
        possible_world_sizes(Training(), 5, 7)
    with pytest.raises(UserError, match="global_batch 32 cannot be shared by 3 workers"):
        possible_world_sizes(Training(), 3, 3)
