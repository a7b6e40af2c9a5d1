"""Who decides a setting, and what is said of one that makes no sense."""

import logging

import pytest

import fedexec
from fedexec._system.available_resources import available_cores
from fedexec._system.sizes import format_size, parse_size
from fedexec.settings import DEFAULT_BACKEND, resolve, unknown_variables


def test_an_argument_wins_over_a_flag_over_the_environment_over_the_default():
    everything = {"backend": "a"}, {"backend": "b"}, {"FEDEXEC_BACKEND": "c"}
    for given, value, source in (
        (everything, "a", "argument"),
        ((None, *everything[1:]), "b", "flag"),
        ((None, None, everything[2]), "c", "FEDEXEC_BACKEND"),
        ((None, None, {}), DEFAULT_BACKEND, "default"),
    ):
        settings = resolve(*given)
        assert (settings.backend, settings.sources["backend"]) == (value, source)


def test_the_environment_gives_every_setting():
    settings = resolve(
        environ={
            "FEDEXEC_BACKEND": "loky",
            "FEDEXEC_MAX_WORKERS": "3",
            "FEDEXEC_START_METHOD": "spawn",
            "FEDEXEC_TIMEOUT": "1.5",
            "FEDEXEC_MEMORY_LIMIT": "512MiB",
            "FEDEXEC_PRELOAD": "json, decimal",
            "FEDEXEC_RETRIES": "2",
            "FEDEXEC_THREADS_PER_WORKER": "4",
            "FEDEXEC_LOG_LEVEL": "debug",
        }
    )
    assert settings.max_workers == 3
    assert settings.start_method == "spawn"
    assert settings.timeout == 1.5
    assert settings.memory_limit == 512 * 1024**2
    assert settings.preload == ("json", "decimal")
    assert (settings.retries, settings.threads_per_worker, settings.log_level) == (2, 4, "DEBUG")


def test_an_empty_variable_is_not_given():
    settings = resolve({"preload": ()}, environ={"FEDEXEC_BACKEND": "", "FEDEXEC_PRELOAD": "json"})
    assert settings.sources["backend"] == "default"
    assert settings.preload == ("json",)


def test_cores_are_shared_out_to_the_workers():
    cores = available_cores()
    assert resolve(environ={}).max_workers == cores
    assert resolve({"max_workers": 1}, environ={}).threads_per_worker == cores
    assert resolve({"max_workers": 10 * cores}, environ={}).threads_per_worker == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 1024**2),
        ("1.5GB", 1_500_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("800m", 800_000_000),
        ("2kib", 2048),
        ("1TiB", 1024**4),
        ("4096", 4096),
        ("12B", 12),
        (7, 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "1.2.3MB", "-1GB", "0", "5 parsecs", "1GiBB", True, "i", "5i"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(fedexec.SettingsError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "not measured"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (450 * 1024**2, "450 MiB"),
        (2**40, "1024 GiB"),
    ],
)
def test_sizes_are_written_for_people(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_workers", 0, "max_workers must be greater than 0"),
        ("max_workers", -1, "max_workers must be greater than 0"),
        ("max_workers", 1.5, "whole number"),
        ("max_workers", True, "whole number"),
        ("timeout", 0, "greater than 0"),
        ("timeout", float("nan"), "greater than 0"),
        ("timeout", float("inf"), "greater than 0"),
        ("retries", -1, "must not be negative"),
        ("start_method", "fork", "forkserver, spawn"),
        ("memory_limit", "big", "512MiB"),
        ("log_level", "shout", "DEBUG"),
        ("backend", "", "name of a backend"),
        ("backend", 3, "name of a backend"),
        ("threads_per_worker", 0, "greater than 0"),
    ],
)
def test_a_value_that_makes_no_sense_is_a_value_error_that_says_so(name, value, says):
    with pytest.raises(ValueError, match=says):
        fedexec.create_executor(**{name: value})


def test_the_message_names_the_variable():
    with pytest.raises(fedexec.SettingsError, match=r"timeout must be .*\(FEDEXEC_TIMEOUT\)"):
        resolve(environ={"FEDEXEC_TIMEOUT": "-1"})


def test_a_setting_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="max_worker"):
        resolve({"max_worker": 1})


def test_what_was_chosen_and_by_whom_is_logged_once(caplog, monkeypatch):
    monkeypatch.setenv("FEDEXEC_MAX_WORKERS", "1")
    with caplog.at_level(logging.INFO, logger="fedexec"), fedexec.create_executor("inline") as executor:
        executor.submit(abs, -1).result()
    chosen = [record.getMessage() for record in caplog.records if "backend=" in record.getMessage()]
    assert len(chosen) == 1
    assert "backend=inline (argument)" in chosen[0]
    assert "max_workers=1 (FEDEXEC_MAX_WORKERS)" in chosen[0]


def test_a_promise_that_cannot_be_kept_is_said(caplog):
    with fedexec.create_executor("inline", timeout=5, memory_limit="1GiB"):
        pass
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [("timeout" in text, "memory_limit" in text) for text in warnings] == [
        (True, False),
        (False, True),
    ]


def test_settings_are_plain_data():
    import json

    row = json.loads(json.dumps(resolve({"backend": "loky"}, environ={}).as_dict()))
    assert row["backend"] == "loky"
    assert row["sources"]["backend"] == "argument"


def test_a_variable_that_is_no_setting_is_named_once_with_the_one_that_was_meant(caplog):
    for _ in range(2):
        resolve(environ={"FEDEXEC_BAKEND": "loky", "FEDEXECUTOR": "1", "_FEDEXEC_CALLER": "1"})
    assert caplog.messages == [
        "FEDEXEC_BAKEND is set, but fedexec has no such setting; did you mean FEDEXEC_BACKEND?"
    ]
    unknown = unknown_variables({"FEDEXEC_XYZZY": "1"})
    assert unknown["FEDEXEC_XYZZY"].startswith("known: FEDEXEC_BACKEND, FEDEXEC_MAX_WORKERS")


@pytest.mark.parametrize("preload", [["json", 5], 5, [None]])
def test_a_preload_that_names_no_modules_is_an_error(preload):
    with pytest.raises(fedexec.SettingsError, match="names of modules"):
        resolve({"preload": preload}, environ={})
