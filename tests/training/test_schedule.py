"""Learning-rate schedules against values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from avcl_jax.training.optimizer import warmup_multistep


def test_a_multistep_schedule_rises_then_falls_at_its_milestones():
    schedule = warmup_multistep(learning_rate=1.0, warmup_steps=4, milestones=(6, 8), factor=0.5)
    found = [float(schedule(step)) for step in range(10)]
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_without_warm_up_it_begins_at_the_full_rate():
    schedule = warmup_multistep(learning_rate=2.0, warmup_steps=0, milestones=(2,), factor=0.1)
    np.testing.assert_allclose([float(schedule(s)) for s in range(4)], [2, 2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("milestones", [(3, 3), (5, 4), (2,)])
def test_milestones_that_make_no_sense_are_refused(milestones):
    with pytest.raises(ValueError, match="must increase and come after the 2 steps"):
        warmup_multistep(learning_rate=1.0, warmup_steps=2, milestones=milestones, factor=0.1)
