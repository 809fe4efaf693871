"""Tasks in processes and on a Dask cluster: the same results, also when workers die."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import netdecouple
from netdecouple import Resources, Settings
from netdecouple.errors import ModelError, NetDecoupleError, UnavailableError
from netdecouple.execution.executors import Shared, ThisProcess, Workers, dask, processes
from tests import networks
from tests.execution.tasks import Unknown, counted, deadly, each, factor, failing, once_deadly, process, times
from tests.networks import images_for

SETTINGS = Settings(families=("nd",))
PATH = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with processes(2) as workers:
        yield workers


def test_this_process_loads_shared_arguments_once():
    loaded: list[int] = []

    def load() -> int:
        loaded.append(1)
        return 3

    tasks = ((Shared("factor", load), n) for n in range(5))
    assert list(ThisProcess().map(times, tasks)) == [0, 3, 6, 9, 12]
    assert len(loaded) == 1


def test_results_keep_their_order(two: Workers):
    assert list(two.map(times, each(40))) == [3 * n for n in range(40)]
    assert sorted(two.map(times, each(40, 4), ordered=False)) == [4 * n for n in range(40)]


def test_both_work(two: Workers):
    pids = set(two.map(process, each(20)))
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_shared_argument_is_pickled_once_and_kept(two: Workers):
    loaded: list[int] = []

    def load() -> int:
        loaded.append(1)
        return 7

    shared = Shared("seven", load)
    assert list(two.map(times, [(shared, n) for n in range(9)])) == [7 * n for n in range(9)]
    assert len(loaded) == 1
    assert list(two.map(times, [(shared, 1)])) == [7]
    assert len(loaded) == 1  # the workers kept it


def test_pinned_tasks_find_the_state_that_they_left(two: Workers):
    """Until it is stale, forgotten, or of another group; then it is sent again."""

    def calls(expected: int, group: str = "a") -> list[tuple[int, int]]:
        state = [Shared(f"{group}{i}", lambda: [0] * sent, group) for i in range(3)]
        return list(two.map(counted, [(shared, expected) for shared in state], pinned=True))

    sent = 0
    first, second = calls(0), calls(1)
    assert [n for n, _ in first] == [1, 1, 1]
    assert [n for n, _ in second] == [2, 2, 2]
    assert [pid for _, pid in first] == [pid for _, pid in second]
    assert first[0][1] == first[2][1] != first[1][1]
    sent = 5
    assert [n for n, _ in calls(5)] == [6, 6, 6]
    assert [n for n, _ in calls(6)] == [7, 7, 7]
    two.forget("a")
    assert [n for n, _ in calls(5)] == [6, 6, 6]
    assert [n for n, _ in calls(5, "b")] == [6, 6, 6]
    assert [n for n, _ in calls(5)] == [6, 6, 6]


def test_a_task_s_own_errors_come_through(two: Workers):
    with pytest.raises(ModelError, match="layer 1 is no good"):
        list(two.map(failing, [(factor(), 1), (factor(), 1)]))
    assert list(two.map(times, [(factor(), 1)])) == [3]


def test_what_cannot_be_pickled_is_an_error(two: Workers):
    with pytest.raises(ModelError, match="cannot be sent to workers"):
        list(two.map(times, [(Shared("lock", threading.Lock), 1)]))


def test_what_workers_cannot_open_is_an_error(two: Workers):
    with pytest.raises(ModelError, match="a worker cannot open what it was sent"):
        list(two.map(times, [(Shared("unknown", Unknown), 1)]))


def test_a_worker_that_dies_is_replaced(two: Workers, tmp_path: Path):
    tasks = [(factor(), str(tmp_path), n) for n in range(3)]
    assert list(two.map(once_deadly, tasks)) == [3 * n for n in range(3)]


def test_a_task_that_kills_every_worker_is_given_up(two: Workers, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("netdecouple.execution.executors.LOSSES", 1)
    with pytest.raises(UnavailableError) as caught:
        list(two.map(deadly, each(3)))
    assert "workers died while they executed tasks" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(two.map(times, [(factor(), 1)])) == [3]


def test_any_executor_will_do():
    with ThreadPoolExecutor(2) as pool:
        assert list(Workers.of(pool, 2).map(times, each(5))) == [0, 3, 6, 9, 12]


def test_a_run_in_any_executor_is_the_same():
    """Its tasks cannot be pinned, so this process advances the network."""
    model, images = residual()
    run = partial(netdecouple.decouple, model, images, macs=0.6, settings=SETTINGS)
    with ThreadPoolExecutor(2) as pool:
        other = run(resources=Resources(shards=3, workers=Workers.of(pool, 2)))
    assert other.model == run(resources=Resources(shards=3)).model


def test_worker_processes_end_with_their_parent(tmp_path: Path):
    """Also if it is killed."""
    script = tmp_path / "begin.py"
    script.write_text(
        "import os, time\n"
        "from netdecouple.execution.executors import processes\n"
        "from tests.execution.tasks import each, process\n"
        "if __name__ == '__main__':\n"
        "    with processes(2) as workers:\n"
        "        print(*set(workers.map(process, each(20))), flush=True)\n"
        "        time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": PATH}
    begun = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert begun.stdout is not None
    pids = [int(pid) for pid in begun.stdout.readline().split()]
    assert len(pids) == 2
    begun.kill()
    begun.wait()
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
    begun.stdout.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_nonsense_is_refused():
    with pytest.raises(UnavailableError, match="give 1 or more"), processes(0):
        pass
    with pytest.raises(NetDecoupleError, match="give 1 or more"):
        Resources(shards=0)


def residual() -> tuple[onnx.ModelProto, np.ndarray]:
    model = networks.residual()
    return model, images_for(model, 30)


def test_a_run_is_the_same_with_workers(two: Workers):
    """The same shards: the same bytes, here where sums are made by one thread; and close to one shard's."""
    model, images = residual()

    def run(**options: Any) -> Any:
        return netdecouple.decouple(
            model, images, macs=0.6, settings=SETTINGS, resources=Resources(**options)
        )

    local, remote, plain = run(shards=4), run(shards=4, workers=two), run()
    for a, b in ((local, remote), (plain, remote)):
        for one, other in zip(a.plan.layers, b.plan.layers, strict=True):
            assert replace(one, predicted_loss=0, predicted_error=0) == replace(
                other, predicted_loss=0, predicted_error=0
            )
            assert one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-4)


@pytest.mark.slow
def test_shards_that_are_lost_start_again(tmp_path: Path):
    """Workers are killed between layers that are fitted; the network is the same."""
    model, images = residual()
    resources = Resources(shards=5)
    expected = netdecouple.decouple(model, images, macs=0.4, settings=SETTINGS, resources=resources)
    killed: list[int] = []
    with processes(2) as workers:

        def progress(step: str, done: int, total: int) -> None:
            if step.startswith("Decoupling layers") and done in (1, 3) and len(killed) < 2:
                assert total > 4
                pids = set(workers.map(process, each(20)))
                killed.append(pids.pop())
                os.kill(killed[-1], signal.SIGKILL)

        found = netdecouple.decouple(
            model,
            images,
            macs=0.4,
            settings=SETTINGS,
            resources=replace(resources, workers=workers),
            progress=progress,
        )
    assert len(killed) == 2
    for one, other in zip(expected.plan.layers, found.plan.layers, strict=True):
        assert (one.family, one.sizes, one.channels) == (other.family, other.sizes, other.channels)
    for one, other in zip(expected.report.layers, found.report.layers, strict=True):
        assert other.samples == one.samples
        assert (one.measured_error is None) == (other.measured_error is None)
        if one.measured_error is not None:
            assert other.measured_error == pytest.approx(one.measured_error, rel=1e-4)
    assert found.report.agreement.divergence == pytest.approx(expected.report.agreement.divergence, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("data_free", [False, True])
def test_a_pytorch_module_is_sent_as_well(two: Workers, data_free: bool):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn
    convs = nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)
    module = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    settings = replace(SETTINGS, data_free=data_free)

    def run(**options: Any) -> Any:
        new = netdecouple.decouple(
            module,
            torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
            macs=0.6,
            settings=settings,
            filter=lambda name, _: name != "4",
            resources=Resources(**options),
        )
        return new.decoupling.plan

    one, other = run(shards=3), run(shards=3, workers=two)
    assert [(la.name, la.family, la.sizes) for la in one.layers] == [
        (la.name, la.family, la.sizes) for la in other.layers
    ]
    assert other.predicted_loss == pytest.approx(one.predicted_loss, rel=1e-4)


def test_a_killed_run_with_workers_goes_on_from_the_last_shard(two: Workers, tmp_path: Path, monkeypatch):
    model, images = residual()
    resources = Resources(work=tmp_path / "work", shards=5, workers=two)
    expected = netdecouple.decouple(
        model, images, macs=0.6, settings=SETTINGS, resources=replace(resources, work=None)
    )
    from netdecouple.execution.checkpoint import Checkpoint

    save = Checkpoint.save
    saved: list[str] = []

    def stop(kept: Checkpoint, name: str, value: Any) -> None:
        save(kept, name, value)
        saved.append(name)
        if saved.count("moments-0000") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            netdecouple.decouple(model, images, macs=0.6, settings=SETTINGS, resources=resources)

    def count(kept: Checkpoint, name: str, value: Any) -> None:
        save(kept, name, value)
        saved.append(name)

    monkeypatch.setattr(Checkpoint, "save", count)
    again = netdecouple.decouple(model, images, macs=0.6, settings=SETTINGS, resources=resources)
    assert saved.count("moments-0000") == 5
    assert again.model == expected.model


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and workers, on loopback, each a process."""
    environment = os.environ | {
        "PYTHONPATH": PATH,
        "DASK_DISTRIBUTED__DASHBOARD__LINK": "",
        "OMP_NUM_THREADS": "1",
    }
    scheduler_file = folder / "scheduler.json"
    begun: list[subprocess.Popen[bytes]] = []

    def begin(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]]
        begun.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
        return begun[-1]

    try:
        begin(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", str(scheduler_file),
        )  # fmt: skip
        started = [
            begin(
                "dask_worker", "--scheduler-file", str(scheduler_file), "--nthreads", "1", "--no-nanny",
                "--no-dashboard", "--local-directory", str(folder), "--host", "127.0.0.1",
            )
            for _ in range(workers)
        ]  # fmt: skip
        distributed = importlib.import_module("distributed")
        with distributed.Client(
            scheduler_file=str(scheduler_file), set_as_default=False, timeout="60s"
        ) as client:
            client.wait_for_workers(workers, timeout=60)
            yield client.scheduler.address, started
    finally:
        for running in reversed(begun):
            running.kill()
            running.wait()


@pytest.mark.slow
def test_a_dask_cluster_may_lose_workers(tmp_path: Path):
    """A scheduler and three workers as processes; two are killed meanwhile, and nothing is lost."""
    pytest.importorskip("distributed")
    model, images = residual()
    expected = netdecouple.decouple(model, images, macs=0.6, settings=SETTINGS, resources=Resources(shards=6))
    steps: list[str] = []
    with cluster(tmp_path, 3) as (address, started), dask(address) as workers:
        assert workers.count == 3
        assert list(workers.map(times, each(20))) == [3 * n for n in range(20)]

        def progress(step: str, done: int, total: int) -> None:
            steps.append(step)
            if step == "Collecting moments" and steps.count(step) == 2:
                started[0].kill()
            if step.startswith("Decoupling layers") and steps.count(step) == 2:
                started[1].kill()

        resources = Resources(shards=6, workers=workers)
        found = netdecouple.decouple(
            model, images, macs=0.6, settings=SETTINGS, resources=resources, progress=progress
        )
        assert [process.wait(60) for process in started[:2]] == [-signal.SIGKILL] * 2
        with pytest.raises(ModelError, match="layer 1 is no good"):
            list(workers.map(failing, [(factor(), 1)]))
    for one, other in zip(expected.plan.layers, found.plan.layers, strict=True):
        assert (one.name, one.family, one.sizes) == (other.name, other.family, other.sizes)
        assert one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-4)


def test_without_dask_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UnavailableError, match=r"pip install 'netdecouple\[dask\]'"),
        dask("tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_an_error():
    pytest.importorskip("distributed")
    with pytest.raises(UnavailableError, match="no scheduler answers there"), dask("tcp://127.0.0.1:1"):
        pass
