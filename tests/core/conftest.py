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


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Return a function that writes a module which workers can import."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write
