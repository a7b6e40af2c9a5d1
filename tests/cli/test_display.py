import pytest

pytest.importorskip("rich", reason="needs rich: pip install 'fedexec[flower]'")
pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")

from fedexec.cli.display import Display
from fedexec.settings import resolve


@pytest.mark.parametrize(("workers", "said"), [(3, ", 3 workers"), ("auto", "at most ")])
def test_a_number_that_memory_decides_is_a_bound(capsys, workers, said):
    Display(1, quiet=False).chosen(resolve({"max_workers": workers}))
    assert said in capsys.readouterr().out
