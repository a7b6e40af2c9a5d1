"""Planted results whose verdict a person can work out, and the words it comes in."""

import pytest
from planted import strategy, write

from fedexec._report import summarize
from fedexec._report.schema import REUSED

pytestmark = pytest.mark.unit

INLINE = ("inline", 2.0)


def judged(file, *strategies, **content):
    path = write(file, strategy(*INLINE, survived=0), *strategies, **content)
    (section,) = summarize([path]).sections
    return section.verdict


def test_a_clear_winner(file):
    verdict = judged(
        file,
        strategy("standby", 2.1, warm=0.006),
        strategy("process", 6.0, host=300),
        strategy("loky", 2.08, host=800, warm=0.001),
    )
    # Rounds of standby and loky are alike; a task that does nothing takes 5 ms more, which is 5 % of 100 ms,
    # of which loky itself spends 1 ms.
    assert verdict.break_even_seconds == pytest.approx(0.099)
    assert verdict.text == (
        "Use standby: 4.76 clients/s with 2 workers, 186 % more than process. "
        "Switch to loky if a client computes for less than 99 ms or to process if memory is below 500 MiB."
    )
    assert verdict.switch_if == (
        "a client computes for less than 99 ms: to loky; memory is below 500 MiB: to process"
    )


def test_a_tie_within_the_noise_still_recommends_the_default(file):
    verdict = judged(
        file,
        strategy("pool", 2.10, noise=0.03),
        strategy("standby", 2.16, noise=0.03),
        strategy("process", 6.0),
    )
    assert (verdict.use, verdict.as_good) == ("standby", ("pool",))
    assert verdict.text == (
        "Use standby: 4.63 clients/s with 2 workers; pool is as good (a difference of 2.9 %, inside the "
        "noise of 6 %), and standby is the default; both are faster than process."
    )


def test_a_tie_without_the_default_recommends_the_fastest_of_our_own(file):
    verdict = judged(
        file,
        strategy("process", 2.12),
        strategy("pool", 2.10),
        strategy("standby", 6.0),
    )
    assert (verdict.use, verdict.as_good) == ("pool", ("process",))
    assert "pool is the default" not in verdict.text


def test_a_tie_recommends_none_that_a_keeping_strategy_beats(file):
    verdict = judged(
        file,
        strategy("pool", 2.08),
        strategy("standby", 2.16),
        strategy("loky", 2.00),
    )
    # standby is as fast as pool, but loky, which is as fast as pool, is 8 % faster than standby.
    assert (verdict.use, verdict.as_good) == ("pool", ("standby",))


def test_memory_decides_where_the_faster_one_does_not_fit(file):
    verdict = judged(
        file,
        strategy("standby", 2.3, residual=0, peak=1000),
        strategy("kept", 2.0, residual=24_000, peak=24_000, out_of_memory=14),
    )
    assert verdict.text == (
        "Use standby: 4.35 clients/s with 2 workers; kept is faster but ran out of memory with 14 "
        "of 100 clients."
    )
    assert "Device memory is EMULATED (emulated:24GiB): no GPU was measured." in verdict.as_dict()["notes"]


def test_memory_decides_between_equals(file):
    verdict = judged(file, strategy("standby", 2.10, host=900), strategy("pool", 2.12, host=500))
    assert verdict.text == (
        "Use pool: 4.72 clients/s with 2 workers, as fast as standby inside the noise, "
        "with 500 MiB of memory instead of 900 MiB."
    )


def test_compute_below_the_break_even(file):
    verdict = judged(
        file,
        strategy("standby", 0.10, compute=0.01, residual=0, peak=1000),
        strategy("loky", 0.06, compute=0.01, residual=1000, peak=1000),
    )
    # 8 ms more a client are 5 % of 160 ms, of which loky spends 2 ms beside computing.
    assert verdict.break_even_seconds == pytest.approx(0.158)
    assert verdict.text == (
        "Use loky: 167 clients/s with 2 workers; a client computes for 10.0 ms, and standby costs less than "
        "5 % only from 0.16 s on. Switch to standby if the 1000 MiB that loky keeps on the device must come "
        "back after each client or a client computes for more than 0.16 s."
    )


def test_all_that_give_the_memory_back_as_fast_are_named_to_switch_to(file):
    verdict = judged(
        file,
        strategy("standby", 0.10, compute=0.01),
        strategy("pool", 0.102, compute=0.01),
        strategy("process", 0.101, compute=0.01),
        strategy("tutorial", 9.0, compute=0.01),
        strategy("loky", 0.06, compute=0.01),
    )
    assert verdict.text == (
        "Use loky: 167 clients/s with 2 workers; a client computes for 10.0 ms, and standby, process or pool "
        "costs less than 5 % only from 0.16 s on. Switch to standby, process or pool if the memory that loky "
        "keeps must come back after each client or a client computes for more than 0.16 s."
    )


def test_a_tie_among_workers_that_keep(file):
    verdict = judged(
        file,
        strategy("standby", 0.20, compute=0.03, host=400),
        strategy("loky", 0.061, compute=0.03, host=400),
        strategy("kept", 0.060, compute=0.03, host=400, isolation=REUSED),
    )
    assert (verdict.use, verdict.as_good) == ("kept", ("loky",))
    assert verdict.text == (
        "Use kept: 167 clients/s with 2 workers; loky is as good (a difference of 1.7 %, inside the noise of "
        "5 %); a client computes for 30.0 ms, and standby costs less than 5 % only from 0.56 s on. Switch to "
        "standby if the memory that kept keeps must come back after each client or a client computes for "
        "more than 0.56 s."
    )


def test_a_peer_that_is_as_fast_is_no_rival(file):
    verdict = judged(
        file,
        strategy("standby", 0.20, compute=0.03, host=400),
        strategy("loky", 0.061, compute=0.03, host=400),
        strategy("plain-loky", 0.060, compute=0.03, host=400, isolation=REUSED, peer=True),
    )
    assert verdict.sentence.startswith(
        "Use loky: 164 clients/s with 2 workers; a client computes for 30.0 ms"
    )
    faster = strategy("plain-loky", 0.03, compute=0.03, host=400, isolation=REUSED, peer=True)
    assert judged(file, strategy("loky", 0.061, host=400), faster).use == "plain-loky"


def test_a_break_even_that_lies_far_from_what_was_measured_is_not_told_but_its_cause(file):
    loky = strategy("loky", 0.6, compute=0.1, import_seconds=0.0)
    verdict = judged(file, strategy("standby", 17.0, compute=0.1, import_seconds=3.0), loky)
    assert verdict.break_even_seconds is None
    assert verdict.text == (
        "Use loky: 16.7 clients/s with 2 workers; on standby each client costs 3.3 s more, 3.0 s of it for "
        "imports, which preload= would spare. Switch to standby if the memory that loky keeps must come back "
        "after each client."
    )
    verdict = judged(file, strategy("tutorial", 17.0, compute=0.1), loky)
    assert "on tutorial each client costs 3.3 s more, for its process." in verdict.text
    assert verdict.break_even_seconds is None


def test_where_nothing_gives_memory_back(file):
    loky = strategy("loky", 0.061, host=400)
    warm = strategy("kept", 0.060, host=400, isolation=REUSED)
    assert judged(file, loky).text == (
        "Use loky: 164 clients/s with 2 workers; nothing was measured that gives the memory back."
    )
    assert judged(file, loky, warm).text == (
        "Use kept: 167 clients/s with 2 workers; loky is as good (a difference of 1.7 %, inside the noise of "
        "5 %); nothing was measured that gives the memory back."
    )


def test_all_that_are_as_good_are_named_to_switch_to(file):
    verdict = judged(
        file,
        strategy("standby", 2.10, warm=0.006, host=900),
        strategy("loky", 2.08, warm=0.001, host=900),
        strategy("ray-warm", 2.09, warm=0.001, host=900, isolation=REUSED),
        strategy("process", 6.0, host=300),
        strategy("pool", 6.1, host=310),
        strategy("tutorial", 9.0, host=300),
    )
    assert verdict.switch == (
        "Switch to loky or ray-warm if a client computes for less than 99 ms "
        "or to process or pool if memory is below 900 MiB."
    )


def test_a_missing_peer_is_named_and_decides_nothing(file):
    verdict = judged(
        file, strategy("standby", 2.1), strategy("process", 6.0), missing={"ray-warm": "ray is not installed"}
    )
    assert verdict.text == "Use standby: 4.76 clients/s with 2 workers, 186 % more than process."
    assert "Not measured: ray-warm (ray is not installed)." in verdict.remarks


def test_a_backend_that_failed_is_out(file):
    verdict = judged(
        file,
        strategy("standby", 2.1),
        strategy("process", 6.0),
        strategy("pool", 1.0),
        failed={"test_footprint[pool/cnn]": "WorkerDiedError: it was killed"},
    )
    assert verdict.text == "Use standby: 4.76 clients/s with 2 workers, 186 % more than process."
    assert (
        "Not considered: pool failed in footprint: WorkerDiedError: it was killed."
        in verdict.as_dict()["notes"]
    )


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        ({"digest": "other"}, "computed something else"),
        ({"digest": "varies"}, "computed something else"),
        ({"survived": 0}, "lost the work of others: when one worker died, 0 of 3 other clients finished"),
        ({"usable": False}, "could not go on after one worker died"),
        ({"n": 2}, "only 2 rounds measured"),
    ],
)
def test_the_fastest_is_out_where_it_is_wrong(file, wrong, note):
    verdict = judged(file, strategy("standby", 2.1), strategy("pool", 1.0, **wrong))
    assert verdict.use == "standby"
    assert f"Not considered: pool {note}." in verdict.as_dict()["notes"]


def test_what_was_not_measured_is_said(file):
    assert "Device memory: not measured." in judged(file, strategy("standby", 2.1)).remarks


def test_a_busy_machine_gives_no_verdict(file):
    verdict = judged(
        file, strategy("standby", 2.1, load=[9.0, 1.0, 1.0]), strategy("pool", 3, load=[8, 1, 1])
    )
    assert verdict.use is None
    assert verdict.text == "No verdict: the machine was not quiet (load 8 on 2 cores): measure again."


def test_the_load_of_the_benchmark_itself_is_none_of_others(file):
    verdict = judged(
        file, strategy("standby", 2.1, load=[4.0, 1.0, 1.0]), strategy("pool", 3, load=[3, 1, 1])
    )
    assert verdict.use == "standby"


def test_nothing_to_recommend(file):
    verdict = judged(file)
    assert (verdict.use, verdict.text) == (None, "No verdict: nothing was measured that could be used.")


@pytest.mark.parametrize(
    ("standby", "loky"),
    [
        ((2.1, 0.4, 0.001), (2.1, 0.4, 0.002)),  # a task that does nothing takes loky as long
        ((2.1, 0.4, 0.006), (3.0, 0.4, 0.001)),  # loky is slower
        ((0.100, 0.01, 0.006), (0.0975, 0.01, 0.001)),  # it would be 99 ms: rounds of 10 ms were as fast
    ],
)
def test_no_break_even_where_keeping_workers_buys_nothing(file, standby, loky):
    verdict = judged(
        file,
        *(
            strategy(name, median, compute=compute, warm=warm)
            for name, (median, compute, warm) in (("standby", standby), ("loky", loky))
        ),
    )
    assert (verdict.use, verdict.switch, verdict.break_even_seconds) == ("standby", None, None)


def test_only_who_is_slower_than_both_of_a_tie_is_said_to_be(file):
    verdict = judged(
        file, strategy("standby", 2.10), strategy("pool", 2.19), strategy("process", 2.22), strategy("x", 3.0)
    )
    assert verdict.text == (
        "Use standby: 4.76 clients/s with 2 workers; pool is as good (a difference of 4.3 %, inside the "
        "noise of 5 %), and standby is the default; both are faster than x."
    )


def test_clients_that_return_something_else_each_time(file):
    path = write(
        file, strategy("inline", 2.0, survived=0, digest="varies"), strategy("standby", 2.1, digest="varies")
    )
    (section,) = summarize([path]).sections
    assert section.verdict.use == "standby"
    assert (
        "The clients return something else each time: whether results are equal was not told."
        in section.verdict.remarks
    )


def test_what_did_not_fit_in_either_pass_is_counted(file):
    kept = strategy("kept", 1.0)
    kept[0]["extra_info"]["fedexec"] |= {"tasks": 20, "out_of_memory": 3}
    verdict = judged(file, strategy("standby", 2.1), kept)
    assert verdict.use == "standby"
    assert "Not considered: kept ran out of memory with 3 of 120 clients." in verdict.as_dict()["notes"]


def reasons(file, *strategies, **content):
    path = write(file, strategy(*INLINE, survived=0), *strategies, **content)
    (section,) = summarize([path]).sections
    return {row.strategy: row.reason for row in section.table}


def test_every_row_says_why_it_is_recommended_or_not(file):
    found = reasons(
        file,
        strategy("standby", 2.10, residual=0, peak=500),
        strategy("pool", 2.12, residual=0, peak=500),
        strategy("process", 2.52, residual=0, peak=500),
        strategy("slow", 6.3, residual=0, peak=500),
        strategy("loky", 2.08, residual=500, peak=500),
        strategy("heavy", 2.11, residual=0, peak=900),
        strategy("plain", 2.10, residual=0, peak=500, peer=True),
        strategy("wrong", 1.0, digest="other"),
        failed={"test_round[broken/cnn]": "Breaks: at once"},
    )
    assert list(found.items()) == [
        ("standby", "recommended: the default, and none is better"),
        ("loky", "as fast as standby, keeps 500 MiB on the device"),
        ("plain", "as fast as standby, not one of fedexec's"),
        ("heavy", "as fast as standby, takes 900 MiB of memory instead of 500 MiB"),
        ("pool", "as good as standby"),
        ("process", "takes 20 % longer than standby"),
        ("slow", "takes 3.0 times as long as standby"),
        ("wrong", "computed something else"),
        ("inline", "is the baseline: no isolation"),
        ("broken", "failed in round: Breaks: at once"),
    ]


def test_rows_that_give_memory_back_say_what_that_costs(file):
    found = reasons(file, strategy("standby", 0.12, compute=0.01), strategy("loky", 0.06, compute=0.01))
    assert found == {
        "loky": "recommended",
        "standby": "takes 2.0 times as long as loky, gives all memory back",
        "inline": "is the baseline: no isolation",
    }


def test_without_a_verdict_only_those_that_are_out_have_a_reason(file):
    found = reasons(file, strategy("standby", 2.1, load=[9.0, 1.0, 1.0]))
    assert found == {"standby": "", "inline": "is the baseline: no isolation"}
