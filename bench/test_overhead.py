"""What a backend adds to a task that does nothing, and to one that carries 10 MB there and back."""

import numpy as np
import pytest
from tasks import give_back, nothing

import fedexec

AVAILABLE = [info.name for info in fedexec.backends() if info.available]


@pytest.fixture(params=AVAILABLE)
def executor(request: pytest.FixtureRequest):
    with fedexec.create_executor(request.param, max_workers=1) as executor:
        executor.submit(nothing).result()  # start-up is not what is measured
        yield executor


@pytest.mark.benchmark(group="no-op")
def test_no_op(benchmark, executor):
    benchmark.pedantic(lambda: executor.submit(nothing).result(), rounds=30, warmup_rounds=2)


@pytest.mark.benchmark(group="10 MB there and back")
def test_ten_megabytes(benchmark, executor):
    array = np.arange(2_500_000, dtype=np.float32)
    result = benchmark.pedantic(
        lambda: executor.submit(give_back, array).result(), rounds=10, warmup_rounds=1
    )
    np.testing.assert_array_equal(result, array)
