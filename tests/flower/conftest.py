import pytest

pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")
