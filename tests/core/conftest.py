import pytest

import fedexec


@pytest.fixture
def create_on():
    """Return a function that makes an executor, whose workers end with the test at the latest."""
    made = []

    def make(backend, **options):
        made.append(fedexec.create_executor(backend, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.kill_workers()
