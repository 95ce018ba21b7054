"""Small stores with planted labels, shared by the tests of what trains and evaluates."""

import os
import re
import sys
import time

# Before torch is loaded: threads of several processes would fight for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

# Processes that tests start find the encoders of another package too.
os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{Path(__file__).parent / 'elsewhere'}"

# `mpiexec` and `lmp` of the environment, also where nobody has activated it.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

import numpy as np
import pytest
import torch

from multifid.evaluation.data import Data, label_sets
from multifid.preparation.prepare import prepare
from multifid.store.store import Store

# Of the rows of a journal, what two runs of one config do not have in common.
MEASURED = ("seconds", "structures_per_second", "seconds_left", "memory", "device_memory")


def data_of(text: str) -> list[Data]:
    """`[TASK=]STORE`: the label set TASK (or the only one) under the name TASK; without TASK all label sets."""
    name, equals, path = text.rpartition("=")
    return label_sets(Store(Path(path)), name if equals else None)


def measured_effort(work):
    """What a function returns, and its processor time in units of adding up three million integers in plain Python.

    A ratio on the same machine: no machine is too slow for a bound on it.
    """

    def seconds(function):
        started = time.process_time()
        return function(), time.process_time() - started

    yardstick = min(seconds(lambda: sum(range(3_000_000)))[1] for _ in range(3))
    result, spent = seconds(work)
    return result, spent / yardstick


def pair_energy_forces(numbers, positions, depth):
    """A pair potential like Morse's (no cutoff): energy (eV) and its exact forces (eV/angstrom).

    x^2 - 2 x with 1 / x = 1 + v + v^2 / 2 + v^3 / 6 in place of exp(v), whose last bits are the processor's: labels,
    and so the order of data, are the same anywhere.
    """
    r = positions[None] - positions[:, None]
    d = np.linalg.norm(r, axis=-1) + np.eye(len(numbers))
    v = 1.2 * (d - 1.4)
    slope_of_v = 1 + v + v * v / 2
    x = 1 / (slope_of_v + v * v * v / 6)
    pair = depth * (x * x - 2 * x) * (1 - np.eye(len(numbers)))
    slope = depth * 2.4 * slope_of_v * x * x * (1 - x) * (1 - np.eye(len(numbers)))
    return pair.sum() / 2, (slope / d)[..., None] * r


def write_molecules(path: Path, count: int, depth: float, offset: float, seed: int) -> None:
    """Random small molecules as extended XYZ, labelled by the pair potential plus an energy for each element."""
    rng = np.random.default_rng(seed)
    reference = {"H": -2.0 + offset, "C": -9.0 - offset, "O": -5.0 + 2 * offset}
    z = {"H": 1, "C": 6, "O": 8}
    with path.open("w") as file:
        for _ in range(count):
            n = int(rng.integers(2, 7))
            symbols = list(rng.choice(["H", "C", "O"], n))
            positions = np.zeros((0, 3))
            while len(positions) < n:
                trial = rng.uniform(-1.8, 1.8, 3)
                if all(((trial - p) ** 2).sum() > 0.81 for p in positions):
                    positions = np.vstack([positions, trial])
            energy, pairs = pair_energy_forces([z[s] for s in symbols], positions, depth)
            forces = pairs.sum(axis=1)
            energy += sum(reference[s] for s in symbols)
            file.write(
                f'{n}\nProperties=species:S:1:pos:R:3:forces:R:3 energy={energy!r} pbc="F F F"\n'.replace(
                    "np.float64(", ""
                ).replace(")", "")
            )
            for s, p, f in zip(symbols, positions, forces, strict=True):
                file.write(" ".join([s, *(f"{x:.17g}" for x in (*p, *f))]) + "\n")


# What starts several processes itself, or watches clocks and memory, runs in one worker, one after the other.
ALONE = ("test_two_hosts.py", "test_memory.py", "test_scaling.py", "test_workers.py", "test_train.py")

# Tests of some seconds and more, left to the full product. What `make test` keeps in their place is another case
# of the same test, or a shorter test of the same promise.
LONG = re.compile(
    "|".join(
        (
            r"test_prepare.py::test_memory_does_not_grow",
            r"test_cli.py::test_(a_users_error_is_one_message|train_and_evaluate_as_in_the_readme)",
            r"test_commands.py::test_commands_and_python_of_the_readme_run",
            r"test_lammps.py::test_(two_ranks_give|an_error_on_one_rank|a_wrong_task_and)",
            r"test_compile.py::test_generated_code_reads",
            r"test_soap.py::test_a_run_that_goes_on_from_a_checkpoint",
            r"test_plan.py::test_the_largest_batch",
            r"test_fitted.py::test_every_table_fits_and_shows_every_name_and_number\[(80|None)",
            r"test_order.py::test_the_permutations_of_six",
            r"test_hostile.py::test_a_bomb_behind_much",
            r"test_finetune.py::test_refitted_references_are_found",
            r"test_plan.py::test_(a_trial_gives_the_rates_of_passes_and_of_quick_updates.soap|groups_wait)",
            r"test_shard.py::test_lower_precisions_equal_one_process_to_their_rounding\[(?!bf16)",
            r"test_model.py::test_every_encoder_keeps_the_contract\[(dimenet|mace)-gradients",
            r"test_uncertainty.py::test_a_run_is_calibrated_the_same_by_any_number_of_ranks\[(?!direct)",
            r"test_parallel.py::test_another_encoder_and_ranks_without_any_branch_equal_one_process\[angular",
            r"test_adios.py::test_parts_are_the_file",
            r"test_evaluation.py::test_many_ranks_say_what_one_process_says_and_one_of_them_writes\[2",
            r"test_plan.py::test_bytes_are_those_of_a_run\[(?!angular-16-direct-adamw)",
            r"test_plan.py::test_a_large_batch_in_tiles_is_told_from_a_small_one\[(?!painn\])",
            r"test_finetune.py::test_a_curve_is_made_of_ordinary_runs",
            r"test_plan.py::test_few_and_many_edges_are_counted_too\[(?!True-0.01)",
            r"test_sample.py::test_(the_reader|what_a_reader|the_files|sources_json|ani1x_groups|mptrj_frames|alexandria_e)",
            r"test_sample.py::test_(transition1x_data|the_dispersion)",
            r"test_compile.py::test_compiled_(passes|conservative_passes)_equal_eager(?!.*\[painn-1\])",
            r"test_precision.py::test_compiled_passes_in_bf16",
            r"test_scaling.py::test_one_rank_is_measured",
            r"test_predict.py::test_relaxed_structures_are_where",
            r"test_shard.py::test_(a_run_goes_on_with_pieces|pieces_start_from_another_run)",
            r"test_shard.py::test_an_encoder_in_pieces_equals_one_process\[(?!3-2-)",
            r"test_parallel.py::test_when_a_rank_is_gone_the_others_leave_and_the_run_goes_on\[(?!0-9)",
            r"test_parallel.py::test_a_run_with_measured_costs",
            r"test_parallel.py::test_a_run_goes_on_with_any_number_of_ranks\[adamw",
            r"test_parallel.py::test_another_encoder_and_ranks_without_any_branch_equal_one_process\[painn",
            r"test_parallel.py::test_in_single_precision_ranks_are_as_near_to_the_truth_as_one_process\[(?!3-)",
            r"test_parallel.py::test_any_number_of_ranks_equals_one_process"
            r"\[(?!5-2-s|5-3-[sa]|5-5-(rep|random-3)|5-7-s|2-4-split-3|1-3-r)",
            r"test_parallel.py::test_thirty_updates_of_every_optimizer.*(micro-batches-egnn-direct-adamw|explicit-painn)",
            r"test_api.py::test_the_decision_of_a_callback_is_that_of_all_ranks",
            r"test_adios.py::test_a_published_file_becomes_a_store.*MPTrj",
            r"test_check.py::test_published_samples_are_believed.*(alex_go|omol25|physicsml|train_300K|ethanol|alexandria_sample)",
            r"test_angular.py::test_the_encoder_keeps_the_contract\[exportable",
            r"test_model.py::test_every_encoder_keeps_the_contract"
            r"\[(?!egnn-|painn-|gat-|gin-).*gradients_are_slopes-conservative",
            r"test_identity.py::test_every_rank_refuses_other_data_and_needs_no_init_again\[1",
            r"test_uncertainty.py::test_uncertainties_travel.*conservative",
            r"test_hostile.py::test_packed_files_are_read.*(mptrj-(bz2|xz|gz)|extxyz-zst)",
            r"gpu/test_runs.py::(?!test_two_ranks_are_one_process\[cpu-parallel0)",
            r"test_api.py::test_models_and_data_in_any_form",
            r"test_compile.py::test_a_compiled_run_is_the_eager_run",
            r"test_counts.py::test_(with_labels_that_are_missing_here_and_there_ranks_equal_one_process\[[45]|a_run_with)",
            r"test_parallel.py::test_thirty_updates_of_every_optimizer_are_those_of_one_process\[explicit-painn-direct-adamw",
            r"test_plan.py::test_(an_update_is_counted_as_it_is_made\[soap|a_step_holds_the_update)",
            r"test_use.py::test_a_bond_breaks",
            r"test_hostile.py::test_a_bomb_is_an_error\[(?!gz)",
            r"test_hostile.py::test_damaged_files_are_errors_or_skips_and_checked_ones_never_wrong\[(?!extxyz)",
            r"test_length.py::test_interrupted_at_any_moment",
            r"test_shares.py::test_the_most_loaded_rank_is_within",
        )
    )
)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups, and before marks are selected
def pytest_collection_modifyitems(items):
    for item in items:
        if LONG.search(item.nodeid):
            item.add_marker(pytest.mark.full)
        if "pool" in getattr(item, "fixturenames", ()) or item.path.name in ALONE:
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[str, Path]:
    """Three tasks of one chemistry and three fidelities, of different sizes: {task: store}."""
    folder = tmp_path_factory.mktemp("stores")
    out = {}
    for task, count, depth, offset in (("apple", 60, 1.0, 0.0), ("berry", 37, 0.7, 1.5), ("cherry", 23, 1.3, -2.0)):
        write_molecules(folder / f"{task}.xyz", count, depth, offset, seed=count)
        prepare("extxyz", [folder / f"{task}.xyz"], folder / task, task=task, fractions=(0.6, 0.2, 0.2), progress=False)
        out[task] = folder / task
    return out


@pytest.fixture(scope="session")
def five(stores, tmp_path_factory) -> dict[str, Path]:
    """Two more tasks beside the three of all tests."""
    folder = tmp_path_factory.mktemp("more")
    out = dict(stores)
    for task, count, depth, offset in (("damson", 30, 0.9, 0.5), ("elder", 18, 1.1, -1.0)):
        write_molecules(folder / f"{task}.xyz", count, depth, offset, seed=count)
        prepare("extxyz", [folder / f"{task}.xyz"], folder / task, task=task, fractions=(0.6, 0.2, 0.2), progress=False)
        out[task] = folder / task
    return out


@pytest.fixture(scope="session")
def pool():
    """Processes that are the ranks of many small worlds (see `parallel_worker`)."""
    from parallel_worker import Pool

    pool = Pool(7)
    yield pool
    pool.close()


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
