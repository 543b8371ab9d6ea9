"""Ten kills at random moments: each rerun ends in the uninterrupted run's matrix and adapter, bit for bit."""

import random
import signal
import time

import pytest

from tests.recipes.conftest import Recipe

SEED = 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(10))
def test_a_kill_at_a_random_moment_changes_nothing(finished: Recipe, fresh: Recipe, number: int) -> None:
    # A run that ends before its moment must be equal too.
    moment = random.Random(SEED + number).uniform(0.05, 0.95) * finished.seconds
    process = fresh.start()
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = fresh.run()
    assert done.returncode == 0, done.stderr
    assert fresh.result() == finished.result()
