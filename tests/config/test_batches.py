"""Division of a global batch over ranks and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.config.batches import BatchPlan, divide_batch, plan_batches, possible_world_sizes
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs.errors import UserError


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


def test_every_size_of_an_elastic_job_is_checked() -> None:
    assert possible_world_sizes(Training(micro_batch=8), 1, 3) == [3, 2, 1]
    with pytest.raises(UserError, match="32 has fewer images than the 40 workers"):
        possible_world_sizes(Training(), 30, 40)
