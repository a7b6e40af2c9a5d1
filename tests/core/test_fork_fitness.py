"""Which preloads and warm-ups leave a template fit to be forked, and what is said of the others."""

import functools
import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import fedexec
from fedexec._processes import fork_fitness
from fedexec.testing.refusals import without_warnings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

USES = {  # a library that starts threads at its import, and what a worker does with it
    "pyarrow": "__import__('pyarrow').array(range(100_000)).nbytes",
    "pandas": "int(__import__('pandas').DataFrame({'a': [1, 2, 3]}).a.sum())",
    "polars": "__import__('polars').DataFrame({'a': [1, 2, 3]}).select(a=2).height",
    "sklearn.ensemble": "bool(__import__('sklearn.ensemble'))",
    "datasets": "len(__import__('datasets').Dataset.from_dict({'a': [1, 2, 3]}))",
    "xgboost": "bool(__import__('xgboost'))",
    "lightgbm": "bool(__import__('lightgbm'))",
    "numexpr": "int(__import__('numexpr').evaluate('2 * 3'))",
}


LEAVES_A_THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
"""


@pytest.fixture
def warnings_of(caplog):
    """Return a function that makes an executor, runs one task, and returns its result and the warnings."""

    def run(task=os.getppid, **options):
        caplog.clear()
        with fedexec.create_executor("standby", max_workers=1, **options) as executor:
            result = executor.submit(task).result(60)
        return result, [record.getMessage() for record in caplog.records]

    return run


@pytest.mark.thorough_but("pandas", "pyarrow", "sklearn.ensemble")
@pytest.mark.parametrize("library", USES)
def test_a_library_whose_threads_do_no_harm_can_be_preloaded(library, warnings_of):
    if importlib.util.find_spec(library.partition(".")[0]) is None:
        pytest.skip(f"needs {library}")
    result, warnings = warnings_of(functools.partial(eval, USES[library]), preload=[library])
    assert (bool(result), warnings) == (True, [])


def test_the_monitor_of_tqdm_does_no_harm(modules, warnings_of):
    pytest.importorskip("tqdm")
    modules("reads_with_a_bar", "from tqdm import tqdm\nDATA = [x for x in tqdm(range(10), mininterval=9)]\n")
    result, warnings = warnings_of(count_with_a_bar, preload=["reads_with_a_bar"])
    assert (result, warnings) == (10, [])


def count_with_a_bar():
    import reads_with_a_bar  # type: ignore[import-not-found]
    from tqdm import tqdm

    return len(list(tqdm(reads_with_a_bar.DATA)))


def test_threads_that_have_ended_are_forgiven(warnings_of):
    for _ in range(5):
        _, warnings = warnings_of(warmup=start_and_join)
        assert warnings == []


def start_and_join():
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(abs, range(8)))
    ThreadPoolExecutor(2).submit(abs, 1).result()  # nobody holds it: its threads end when it is collected


@pytest.mark.parametrize("kind", ["python", "pool", "native"])
def test_a_thread_that_would_be_lost_is_named_with_what_started_it(kind, modules, warnings_of):
    start = {
        "python": "threading.Thread(target=time.sleep, args=(99,), name='reader', daemon=True).start()",
        "pool": "POOL = concurrent.futures.ThreadPoolExecutor(2, 'reader'); POOL.submit(abs, 1).result()",
        "native": "_thread.start_new_thread(time.sleep, (99,))",
    }
    modules("my_reader", f"import _thread, concurrent.futures, threading, time\n{start[kind]}\n")
    result, (warning,) = warnings_of(ask_my_reader, preload=["my_reader"])
    assert result == "my_reader"
    assert "imported my_reader: it left 1 thread(s) running" in warning
    assert ("reader" in warning.partition("running")[2]) == (kind != "native")


def ask_my_reader():
    import my_reader  # type: ignore[import-not-found]

    pool = getattr(my_reader, "POOL", None)
    assert pool is None or pool.submit(abs, 1).result(10) == 1
    return my_reader.__name__


def test_a_warm_up_is_named_by_the_modules_of_the_user_that_it_imported(modules, warnings_of):
    modules(
        "my_data",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    )
    _, (warning,) = warnings_of(warmup=functools.partial(__import__, "my_data"))
    assert "imported my_data: it left 1 thread(s)" in warning


def test_a_warm_up_that_imports_nothing_is_named_by_its_function(warnings_of):
    _, (warning,) = warnings_of(warmup=functools.partial(exec, LEAVES_A_THREAD))
    assert "imported builtins.exec: it left 1 thread(s)" in warning


@pytest.mark.thorough_but("nvidia0")
@pytest.mark.parametrize("file", ["nvidia0", "nvidia-uvm", "nvidiactl", "kfd", "dri/renderD128"])
def test_a_file_of_a_gpu_that_is_open_is_named(file, modules, tmp_path, warnings_of):
    # MOCK: this machine may have no GPU, so the files of GPUs are looked for in another directory.
    (tmp_path / "dev" / "dri").mkdir(parents=True)
    (tmp_path / "dev" / file).touch()
    modules(
        "plants",
        f"from fedexec._processes import fork_fitness\nroot = {str(tmp_path)!r}\n"
        "fork_fitness.GPU_FILES = tuple(root + file for file in fork_fitness.GPU_FILES)\n"
        "fork_fitness.NVML_FILES = tuple(root + file for file in fork_fitness.NVML_FILES)\n",
    )
    modules("opens_gpu", f"FILE = open({str(tmp_path / 'dev' / file)!r})\n")
    _, (warning,) = warnings_of(preload=["plants", "opens_gpu"])
    assert f"imported opens_gpu: it opened {tmp_path / 'dev' / file}" in warning


def test_a_preload_that_initialised_cuda_is_named(modules, warnings_of):
    # MOCK: this machine may have no GPU, so a stand-in for torch says that CUDA is initialised.
    modules("torch", "class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
    _, (warning,) = warnings_of(preload=["torch"])
    assert "imported torch: it had torch start cuda" in warning


def test_a_library_that_dies_or_hangs_in_a_forked_child_is_unfit(monkeypatch):
    monkeypatch.setattr(fork_fitness, "TRIAL_SECONDS", 0.3)
    assert fork_fitness._try_in_child(lambda: None) is None
    assert fork_fitness._try_in_child(lambda: "a reason") == "a reason"
    assert "-9" in str(fork_fitness._try_in_child(lambda: os.kill(os.getpid(), 9)))
    assert "0.3 s" in str(fork_fitness._try_in_child(lambda: time.sleep(60)))
    assert "ZeroDivisionError" in str(fork_fitness._try_in_child(lambda: str(1 / 0)))


def test_forking_beside_a_harmless_thread_warns_of_nothing():
    code = (
        "import fedexec\n"
        "with fedexec.create_executor('standby', max_workers=1, preload=['pyarrow']) as executor:\n"
        "    print([executor.submit(abs, -n).result() for n in range(3)])\n"
    )
    pytest.importorskip("pyarrow")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, without_warnings(done.stderr)) == ("[0, 1, 2]\n", "")


def threads_and_a_sum():
    import torch

    return torch.get_num_threads(), float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())


@pytest.mark.thorough_but("3")
@pytest.mark.parametrize("threads_per_worker", [1, 3])
def test_a_number_of_threads_that_an_import_tells_torch_stays(modules, warnings_of, threads_per_worker):
    pytest.importorskip("torch")
    modules("tells_torch", "import torch\ntorch.set_num_threads(2)\n")
    result, warnings = warnings_of(
        threads_and_a_sum, preload=["tells_torch"], threads_per_worker=threads_per_worker
    )
    assert result == (2, 300.0**3)
    assert warnings == []  # it was forked


USES_A_POOL = """
import concurrent.futures
import multiprocessing

pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
closed = concurrent.futures.ProcessPoolExecutor(1)
closed.shutdown()


def power():
    return pool.submit(pow, 2, 3).result(30)
"""


@pytest.mark.parametrize("is_open", [True, False])
def test_a_pool_of_processes_that_waits_for_its_first_task_is_not_shared(modules, warnings_of, is_open):
    modules("uses_a_pool", USES_A_POOL if is_open else USES_A_POOL.replace("pool = ", "pool = None and "))
    result, warnings = warnings_of(power if is_open else int, preload=["uses_a_pool"])
    assert result == (8 if is_open else 0)
    assert ["ProcessPoolExecutor" in warning for warning in warnings] == [True] * is_open


def power():
    import uses_a_pool  # type: ignore[import-not-found]

    return uses_a_pool.power()
