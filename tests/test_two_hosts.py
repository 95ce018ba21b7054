"""Two network namespaces as two hosts with addresses of their own, started as `launch/two_hosts.sh` says."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from multifid.config import dump_config, parse_config
from multifid.parallel import heartbeat
from multifid.training.checkpoint import load_checkpoint
from parallel_worker import Pool

ROOT = Path(__file__).resolve().parent.parent
SILENCE = 5.0  # seconds, so that the test is short
MINUTE = 60 - 2 * (heartbeat.SILENCE - SILENCE)  # what is left of a minute if only the silence is shorter
FIRST, SECOND = "10.213.57.1", "10.213.57.2"
HOSTS = [(f"multifid{os.getpid()}{side}", f"mf{os.getpid()}{side}", own) for side, own in (("a", FIRST), ("b", SECOND))]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if shutil.which("ip") is None or not sys.platform.startswith("linux"):
        return "the `ip` command is missing"
    try:
        ip("netns", "add", "multifid-try")
        ip("netns", "del", "multifid-try")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    return ""


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces and a cable between them: (name, interface, address)."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        for name, _, _ in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", HOSTS[0][1], "netns", HOSTS[0][0], "type", "veth", "peer", HOSTS[1][1], "netns", HOSTS[1][0])
        for name, interface, address in HOSTS:
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            for device in ("lo", interface):
                ip("-n", name, "link", "set", device, "up")
        yield HOSTS
    finally:
        for name in set(ip("netns", "list").split()) & {name for name, _, _ in HOSTS}:
            for pid in processes_on(name):
                os.kill(pid, signal.SIGKILL)
            ip("netns", "del", name)


def processes_on(host: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", host).split()]


def start(node: int, config: Path, log: Path) -> subprocess.Popen:
    name, interface, _ = HOSTS[node]
    environment = os.environ | {"INTERFACE": interface, "RANKS": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = [str(ROOT / "launch" / "two_hosts.sh"), str(node), FIRST, str(config)]
    command = ["ip", "netns", "exec", name, "bash", *script]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_host_that_is_cut_off_ends_both_and_the_run_goes_on(stores, tmp_path, hosts):
    values = {
        "run": str(tmp_path / "run"),
        "tasks": {task: {"store": str(stores[task])} for task in ("apple", "berry")},
        "model": {"cutoff": 3.0, "encoder": {"layers": 1, "hidden": 8}, "branch": {"hidden": [6]}},
        "train": {"batch": 3, "steps": 1_000_000, "epoch_steps": 1_000_000, "checkpoint_every": 5, "device": "cpu"},
        "parallel": {"placement": "split", "silence": SILENCE},
    }
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(parse_config(values, "test")), encoding="utf-8")
    logs = [tmp_path / f"host{node}.log" for node in (0, 1)]

    def said() -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)

    ranks = [start(node, config, logs[node]) for node in (0, 1)]
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")), ranks, 600, said)
    cut = time.monotonic()
    ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
    codes = [rank.wait(timeout=max(0.0, MINUTE - (time.monotonic() - cut))) for rank in ranks]
    print(f"both left {time.monotonic() - cut:.1f} s after the cut, with {codes}")
    assert 0 not in codes, said()
    assert [processes_on(name) for name, _, _ in hosts] == [[], []], "no process stays behind"
    assert "start the run again to go on" in said()

    state, _, complaints = load_checkpoint(tmp_path / "run")
    assert not complaints
    pool = Pool(2)
    try:
        assert pool.run(2, "whole_run", values, 3) == [143, 143], "goes on, and stops when it is told to"
    finally:
        pool.close()
    again, _, complaints = load_checkpoint(tmp_path / "run")
    assert again["step"] == state["step"] + 4 and not complaints


def wait_for(condition, ranks: list[subprocess.Popen], seconds: float, said) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and all(rank.poll() is None for rank in ranks), said()
        time.sleep(0.05)
