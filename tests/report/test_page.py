"""The page in a real browser: quiet, alone, sortable, and telling the figures of the JSON."""

import json

import pytest
from browser import browse, executable
from planted import of_schema, strategy, whole, write

from fedexec._report import page, summarize
from fedexec._report.columns import columns

pytestmark = pytest.mark.skipif(executable() is None, reason="needs Chromium: apt-get install chromium")

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return summarize([whole(tmp_path_factory.mktemp("page") / "whole.json")])


@pytest.fixture(scope="module")
def file(summary, tmp_path_factory):
    made = tmp_path_factory.mktemp("page") / "page.html"
    made.write_text(page(summary))
    return made


@pytest.fixture(scope="module")
def browser():
    with browse() as tab:
        yield tab


@pytest.fixture(params=SIZES)
def tab(browser, file, request):
    browser.look_like(*SIZES[request.param], touch=request.param == "phone")
    browser.open(file.as_uri())
    return browser


def column(tab, number):
    rows = "[...document.querySelectorAll('.strategies tbody tr')]"
    return tab.run(f"{rows}.map(row => row.children[{number}].dataset.value)")


def test_nothing_is_said_in_the_console_and_nothing_asked_of_anybody(tab, file):
    tab.run("document.querySelectorAll('th button').forEach(one => one.click())")
    assert tab.console == []
    assert set(tab.requests) == {file.as_uri()}
    assert file.read_text().count("http") == 1, "the word http-equiv"


def test_nothing_runs_over_the_edge(tab):
    wide, inner = tab.run("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    boxes = "[...document.querySelectorAll('.strategies, .answers, figure')]"
    assert tab.run(f"{boxes}.every(one => one.scrollWidth <= one.clientWidth)"), (
        "nothing is to be scrolled for"
    )


def test_the_table_tells_the_figures_of_the_json(tab, summary):
    (workload,) = summary.as_dict()["workloads"]
    (section,) = summary.sections
    shown = [each.key for each in columns(section.table)]
    for key in ("strategy", "reason", "clients_per_second", "round_median", "device_peak", "host_peak", "n"):
        expected = [str(row[key]) for row in workload["rows"]]
        assert column(tab, shown.index(key)) == expected
    embedded = json.loads(tab.run("document.getElementById('report').textContent"))
    assert embedded == json.loads(json.dumps(summary.as_dict()))
    told = tab.run("document.querySelector('.answer').textContent").replace("\N{NO-BREAK SPACE}", " ")
    assert told == workload["verdict"]["sentence"]


def test_the_answer_comes_before_everything_else(tab):
    first = tab.run("document.querySelector('main table').className")
    assert first == "answers"
    cells = tab.run("[...document.querySelectorAll('.answers tbody td')].map(cell => cell.textContent)")
    assert cells[0] == "standby"
    assert cells[1].startswith("9.62\N{NO-BREAK SPACE}clients/s") or cells[1].startswith("9.62 clients/s")
    assert tab.run("document.querySelector('.answers a').hash") == "#workload-1"
    assert tab.run("document.querySelector(document.querySelector('.answers a').hash + ' h2').textContent")


def test_eligible_rows_come_first_and_each_has_its_reason(tab):
    classes = tab.run("[...document.querySelectorAll('.strategies tbody tr')].map(row => row.className)")
    assert classes == ["used", "able", "able", "able", "able", "out"]
    assert all(column(tab, 1))
    greys = tab.run(
        "[...document.querySelectorAll('.strategies tbody tr th')].map(one => getComputedStyle(one).color)"
    )
    assert greys[-1] not in greys[:-1]


def test_emulated_stands_in_headings_only(tab):
    told = tab.run(
        "[...document.querySelectorAll('main *')].filter(one => !one.children.length &&"
        "one.textContent.includes('EMULATED')).map(one => one.localName)"
    )
    assert sorted(set(told)) in (["desc", "h3", "p", "th"], ["desc", "h3", "p", "th", "title"])
    assert tab.run("document.querySelectorAll('[aria-label*=EMULATED]').length") == 0


def test_a_phone_has_a_card_for_each_strategy(browser, file):
    browser.look_like(*SIZES["phone"], touch=True)
    browser.open(file.as_uri())
    cards = browser.run(
        "[...document.querySelectorAll('.strategies tbody tr')].map(row => row.getBoundingClientRect().width)"
    )
    assert len(cards) == 6 and min(cards) > 300
    shown = "[...document.querySelectorAll('.strategies tr.used td')].filter(one => one.offsetHeight).length"
    few = browser.run(shown)
    label = "getComputedStyle(document.querySelector('.strategies td:nth-child(4)'), '::before').content"
    assert browser.run(label) == '"clients/s"'
    browser.tap(".all input")
    browser.wait_for(f"{shown} > {few}", seconds=5)


def test_the_memory_of_our_own_backends_is_shown_and_that_of_peers_on_demand(tab):
    first = tab.run("document.querySelector('section figure').classList.contains('wide')")
    assert first, "the picture of the memory comes first"
    names = "[...document.querySelector('.wide').querySelectorAll('svg text.name')]"
    wide = f"{names}.filter(one => one.checkVisibility()).map(one => one.textContent)"
    assert tab.run(wide) == ["standby", "loky", "pool", "process", "inline"]
    tab.run("document.querySelector('.wide details').open = true")
    assert tab.run(wide)[-1] == "tutorial"


def test_headings_are_explained_where_they_stand(browser, file):
    browser.look_like(*SIZES["desktop"])
    browser.open(file.as_uri())
    told = browser.run("document.querySelector('.strategies thead').innerText")
    for words in ("new executor to first result", "other clients that finish", "why, or why not"):
        assert words in " ".join(told.split())


def test_a_click_sorts_and_another_turns_it_around(tab):
    head = ".strategies thead tr:last-child th:nth-child(4)"
    tab.run(f"document.querySelector('{head} button').click()")
    rates = [float(value) for value in column(tab, 3)]
    assert rates == sorted(rates)
    assert tab.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "ascending"
    tab.run(f"document.querySelector('{head} button').click()")
    assert [float(value) for value in column(tab, 3)] == rates[::-1]
    tab.run("document.querySelector('th button').click()")
    assert column(tab, 0) == sorted(column(tab, 0))
    assert tab.run("document.querySelectorAll('[aria-sort]').length") == 1


def tip(tab):
    return tab.run(
        "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
    )


def test_pointing_at_a_mark_tells_its_numbers(browser, file):
    browser.look_like(*SIZES["desktop"])
    browser.open(file.as_uri())
    assert tip(browser) is None
    browser.point_at(".figures svg .mark[aria-label^='standby'] .dot")
    assert tip(browser) == "standby: 9.62 clients/s, 0 B left after a round"
    box = browser.run(
        "(() => { const box = document.getElementById('tip').getBoundingClientRect();"
        "return [box.left, box.top, innerWidth - box.right, innerHeight - box.bottom]; })()"
    )
    assert min(box) >= 0
    browser.point_at("h1")
    assert tip(browser) is None


def test_tapping_a_mark_tells_its_numbers(browser, file):
    browser.look_like(*SIZES["phone"], touch=True)
    browser.open(file.as_uri())
    browser.tap("svg .mark[aria-label^='process, import'] rect")
    browser.wait_for("!document.getElementById('tip').hidden", seconds=5)
    assert tip(browser) == "process, import: 72.0 ms"
    browser.tap("h1")
    browser.wait_for("document.getElementById('tip').hidden", seconds=5)


def test_the_keyboard_goes_from_mark_to_mark(browser, file):
    browser.look_like(*SIZES["desktop"])
    browser.open(file.as_uri())
    mark = '.mark[tabindex=\\"0\\"]'
    stops = browser.run(
        f"[...document.querySelectorAll('svg')].map(svg => svg.querySelectorAll(\"{mark}\").length)"
    )
    assert set(stops) == {1}, "one stop a plot"
    browser.run("document.querySelector('.mark').focus({preventScroll: true})")
    first = tip(browser)
    assert first.startswith("standby, peak at ")
    browser.press("ArrowRight")
    assert tip(browser) == "standby, after round 1: 0 B"
    browser.press("ArrowLeft")
    assert tip(browser) == first
    browser.press("Escape")
    assert tip(browser) is None


def test_a_screen_reader_finds_words_for_everything(tab):
    assert tab.run("[...document.querySelectorAll('svg')].every(svg => svg.getAttribute('aria-labelledby'))")
    assert tab.run(
        "[...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].every(one =>"
        "document.getElementById(one.getAttribute('aria-labelledby')).textContent.length > 3 &&"
        "document.getElementById(one.getAttribute('aria-describedby')).textContent.length > 20)"
    )
    assert tab.run(
        "[...document.querySelectorAll('.mark')].every(one => one.getAttribute('aria-label').length > 5)"
    )
    assert tab.run("document.querySelectorAll('.strategies tbody th[scope=row]').length") == 6
    assert tab.run("document.documentElement.lang") == "en"


def test_dark_and_light_are_both_readable(browser, file):
    found = {}
    for dark in (False, True):
        browser.look_like(*SIZES["desktop"], dark=dark)
        browser.open(file.as_uri())
        found[dark] = browser.run(CONTRAST)
    assert found[False]["paper"] != found[True]["paper"]
    for contrasts in found.values():
        assert contrasts["text"] > 10
        assert contrasts["soft"] > 4.5
        assert min(contrasts["names"]) > 3


CONTRAST = """(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const paper = style("body").backgroundColor, card = style("figure").backgroundColor;
  const dots = [...document.querySelectorAll("svg .dot")].map(dot => ratio(getComputedStyle(dot).fill, card));
  const soft = ratio(style(".soft").color, paper);
  return {paper, soft, text: ratio(style("body").color, paper), names: dots};
})()"""


def test_it_prints_light(browser, file):
    browser.look_like(*SIZES["desktop"], dark=True, media="print")
    browser.open(file.as_uri())
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 249)", "light"
    assert browser.pdf().startswith(b"%PDF")


def test_what_is_not_whole_is_said_on_the_page(browser, tmp_path):
    good = write(
        tmp_path / "half.json", strategy("standby", 2.1),
        planned=["test_round[standby/cnn]", "test_round[x/cnn]"],
        failed={"test_round[pool/cnn]": "WorkerDiedError: killed"},
    )  # fmt: skip
    later = of_schema(write(tmp_path / "later.json", strategy("standby", 2.1)), 99)
    made = tmp_path / "page.html"
    made.write_text(page(summarize([good, later])))
    browser.open(made.as_uri())
    told = browser.run("document.querySelector('.problems').textContent")
    for words in ("schema 99", "the run was interrupted", "WorkerDiedError: killed"):
        assert words in told
    assert (
        browser.run("document.querySelector('.strategies tbody tr:last-child th').textContent")
        == "pool failed"
    )


def test_two_runs_are_compared_on_the_page(browser, tmp_path):
    before = write(tmp_path / "before.json", strategy("standby", 2.0), strategy("pool", 3.0))
    after = write(tmp_path / "after.json", strategy("standby", 1.0), strategy("pool", 3.0))
    made = tmp_path / "page.html"
    made.write_text(page(summarize([before, after])))
    browser.open(made.as_uri())
    first = "section:first-of-type tbody tr"
    rows = browser.run(f"[...document.querySelectorAll('{first}')].map(row => row.lastChild.textContent)")
    assert rows == ["faster by 100 %", "no change inside the noise of 5 %"]
