"""Which device a process and each of its threads works on, by a recorded stand-in for an accelerator of two devices."""

import ast
import os
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import multifid
from multifid.config import parse_config
from multifid.parallel import devices
from multifid.parallel.devices import find_device
from multifid.parallel.groups import alone, in_one_order
from multifid.training import checkpoint, outcome, run
from multifid.workflows import study
from test_train import assert_same_bits, config_of, start

SOURCE = Path(multifid.__file__).parent


@pytest.fixture
def two_gpus(monkeypatch):
    """torch finds two devices of kind cuda; the list holds (thread, device) of every choice of a current device."""
    chosen: list[tuple[str, int]] = []

    def choose(device) -> None:
        chosen.append((threading.current_thread().name, torch.device(device).index))

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", choose)
    return chosen


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [(None, 0, 0), (None, 3, 1), ("cuda", 1, 1), ("cuda:1", 0, 1), ("cuda:0", 1, 0)]
)
def test_a_device_is_chosen_by_name_or_in_turn_and_is_the_current_one(two_gpus, name, local_rank, index):
    assert find_device(name, local_rank) == torch.device("cuda", index)
    assert two_gpus == [("MainThread", index)], "also where the name has the index"


def test_processes_of_a_study_take_the_accelerators_of_their_host_in_turn(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # and put back at the end
    numbers = get_context("spawn").SimpleQueue()
    found = []
    for number in range(3):
        numbers.put(number)
        study._number(numbers)
        found.append(alone(None).device)
    assert found == [torch.device("cuda", index) for index in (0, 1, 0)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda:2", r"train\.device: cuda:2: this host has 2 of them"),
        ("xpu", r"train\.device: xpu: torch finds 'cuda' on this host; choose cpu"),
        ("gpu", r"train\.device: 'gpu' is no device: give cpu, cuda, cuda:1"),
    ],
)
def test_a_device_that_is_not_here_is_refused_with_what_is(two_gpus, name, says):
    with pytest.raises(ValueError, match=says):
        find_device(name, 0)


def test_without_an_accelerator_the_cpu_is_taken_and_others_are_refused():
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    assert find_device(None, 0) == find_device("cpu", 5) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"cuda:1: torch finds no accelerator on this host; choose cpu, or leave it"):
        find_device("cuda:1", 0)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("mps", TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")),
        ("xpu", RuntimeError("Required aspect fp64 is not supported on the device")),
    ],
)
def test_a_device_without_float64_is_left_for_the_cpu_with_a_word_or_refused_by_name(monkeypatch, capsys, kind, error):
    """A Mac, or an Arc."""

    def ones(*shape, device, dtype):
        assert dtype == torch.float64 and torch.device(device).type == kind
        raise error

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: None)
    assert find_device(None, 1) == torch.device("cpu") and not capsys.readouterr().err, "one rank of a host says it"
    assert find_device(None, 0) == torch.device("cpu")
    assert f"{kind} has no float64" in (said := capsys.readouterr().err) and "computing on the CPU" in said
    with pytest.raises(ValueError, match=rf"train\.device: {kind}: {kind} has no float64, in which .*; choose cpu"):
        find_device(kind, 0)


def test_every_thread_of_a_run_chooses_the_device_before_it_does_anything_else(stores, tmp_path, monkeypatch):
    """Loaders, and the threads that write checkpoints."""
    chosen, worked, here = {}, [], threading.local()

    def choose(device) -> None:
        here.device = device
        chosen.setdefault(threading.current_thread().name.partition("_")[0], set()).add(device)

    def watched(original):
        def call(*arguments, **options):
            if threading.current_thread() is not threading.main_thread():
                assert hasattr(here, "device"), "no device was chosen in this thread"
                worked.append(threading.current_thread().name.partition("_")[0])
            return original(*arguments, **options)

        return call

    for module in (run, checkpoint):
        monkeypatch.setattr(module, "use", choose)
    monkeypatch.setattr(run.Feed, "step", watched(run.Feed.step))
    monkeypatch.setattr(run.Trainer, "ready", watched(run.Trainer.ready))
    monkeypatch.setattr(checkpoint, "save_file", watched(checkpoint.save_file))
    run.train(parse_config(config_of(stores, tmp_path / "run", train={"workers": 2, "steps": 4}), "test"))
    assert set(worked) == set(chosen) == {"loader", "saver"}
    assert set.union(*chosen.values()) == {torch.device("cpu")}


def test_a_deterministic_run_asks_torch_for_one_order_and_has_the_same_bits_here(stores, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    asked, runs = [], []

    def step(self, *arguments, original=run.Trainer.step, **options):
        asked.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return original(self, *arguments, **options)

    monkeypatch.setattr(run.Trainer, "step", step)
    for wanted in (True, False):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        train = {"deterministic": wanted, "steps": 4}
        runs.append(start(config_of(stores, tmp_path / str(wanted), train=train)))
    assert asked == [(True, ":4096:8")] * 4 + [(False, None)] * 4
    assert_same_bits(*runs)


def test_one_order_is_asked_for_where_torch_only_warned(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        in_one_order(True)
        assert torch.get_deterministic_debug_mode() == 2
    finally:
        in_one_order(False)
    assert torch.get_deterministic_debug_mode() == 0


class Number:
    """A number on its way through the second device: it is there when an event of its stream has been waited for."""

    device = torch.device("cuda", 1)

    def detach(self):
        return self


def test_a_number_is_read_when_its_own_device_has_come_to_it(monkeypatch):
    """An event without a stream is recorded on the current device's, which is another one, idle and done at once."""
    host = torch.full((1,), -1.0)

    class Event:
        def __init__(self, device):
            self.device, self.on = device, torch.device("cuda", 0)

        def record(self, stream=None):
            self.on = self.on if stream is None else stream

        def synchronize(self):
            if self.on == self.device == Number.device:
                host.fill_(7.0)

    class Host:
        def copy_(self, number, non_blocking):
            assert non_blocking
            return host

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", lambda number, **options: Host())
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: torch.device(device))
    assert outcome.Later(Number()).values() == [7.0]


def test_nothing_speaks_of_the_current_device_without_naming_one():
    """Which device is current differs between threads; so calls that default to it are given one."""
    free = {"is_available", "device_count", "current_accelerator", "is_initialized"}
    free |= {
        "is_current_stream_capturing",
        "CUDAGraph",
        "graph_pool_handle",
    }  # of no device, or under `torch.cuda.device`
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)) or node.args or node.keywords:
                continue
            call = ast.unparse(node.func)
            of_torch = call.startswith(("torch.accelerator.", "torch.cuda.")) and node.func.attr not in free
            assert not of_torch and node.func.attr != "record", f"{path}:{node.lineno}: {call}()"
    assert devices.use(torch.device("cpu")) is None
