import pytest

pytest.importorskip("rich", reason="needs rich: pip install 'fedexec[flower]'")
pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")

from fedexec._cli.display import Display
from fedexec.flower import Round
from fedexec.settings import resolve


@pytest.mark.parametrize(("workers", "said"), [(3, ", 3 workers"), ("auto", "at most ")])
def test_a_number_that_memory_decides_is_a_bound(capsys, workers, said):
    Display(1, quiet=False).chosen(resolve({"max_workers": workers}))
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["in the [columns]", "no file: [/data/client0]", "[bold]loud[/]", ":smile: [0]"]
)
def test_what_others_wrote_is_shown_as_they_wrote_it(capsys, text):
    display = Display(1, quiet=False)
    display.progress(Round(1, clients=[0], failures=[{"client": 0, "reason": text}], seconds=1.0), 1)
    assert f"client 0: {text}" in capsys.readouterr().out


def test_what_clients_have_evaluated_is_shown_where_it_is_known(capsys):
    display = Display(2, quiet=False)
    found = {"metrics": {"accuracy": 0.625}, "client_loss": 0.25, "client_metrics": {"eval_acc": 0.75}}
    display.progress(Round(1, loss=0.5, seconds=1.0, **found), 1)
    display.progress(Round(2, loss=0.5, seconds=1.0), 1)
    assert capsys.readouterr().out.splitlines() == [
        "round 1/2  loss 0.5000  accuracy 0.6250  clients' loss 0.2500  clients' accuracy 0.7500  1.0 s",
        "round 2/2  loss 0.5000  accuracy not measured  1.0 s",
    ]


def test_where_there_is_no_bar_a_server_writes_how_many_clients_it_waits_for(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedexec._cli.display.time.monotonic", lambda: now[0])
    display = Display(2, quiet=False)
    for there, seconds in ((0, 1), (0, 1), (3, 1), (4, 5), (4, 5), (9, 5)):
        display.waiting("127.0.0.1:8080", there, 10, written=True)
        now[0] += seconds
    display.waiting("127.0.0.1:8080", 9, 10)
    assert capsys.readouterr().out.splitlines() == [
        "waiting for clients at 127.0.0.1:8080: 0 of 10 are there",
        "waiting for clients at 127.0.0.1:8080: 4 of 10 are there",
        "waiting for clients at 127.0.0.1:8080: 9 of 10 are there",
    ]
