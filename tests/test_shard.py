"""An encoder in pieces: any placement equals one process, a rank holds its piece, collectives have one order."""

import math

import numpy as np
import pytest
import torch

from multifid.config import parse_config
from multifid.model.encoders import build_encoder
from multifid.parallel.layout import GIB
from multifid.training.costs import bytes_per_parameter, encoder_bytes, memory
from test_model import KINDS
from test_parallel import assert_equal_to_one_process, assert_same_run, random_placement, values_of

EGNN = {"name": "egnn", "layers": 2, "hidden": 7, "vectors": 2}  # rows that no number of ranks divides
PAINN = {"name": "painn", "layers": 2, "hidden": 6}


def sharded(values: dict, encoder: dict = EGNN, shard: bool = True, **parallel) -> dict:
    model = values["model"] | {"encoder": encoder}
    return values | {"model": model, "parallel": values["parallel"] | {"shard_encoder": shard} | parallel}


CASES = [  # tasks, ranks, placement, encoder, forces, most edges of a micro-batch, without forces, unlabelled in step 2
    (3, 2, "split", EGNN, "direct", None, None, None),
    (5, 3, "split", EGNN, "direct", 20, "apple", "cherry"),
    (2, 5, "replicated", EGNN, "direct", 20, None, "apple"),
    (2, 4, "split", PAINN, "direct", None, "berry", None),
    (3, 2, "replicated", PAINN, "conservative", 20, None, "apple"),
    (5, 4, "random", EGNN, "conservative", 20, "berry", None),
    (2, 5, "split", PAINN, "conservative", 20, None, "apple"),  # ranks run over no atoms in some rounds
    (2, 3, {"apple": [0], "berry": [0, 2]}, EGNN, "conservative", None, None, "berry"),  # rank 1 has no branch
    (2, 3, {"apple": [0, 2], "berry": [0]}, EGNN, "direct", None, None, None),
    (3, 3, "split", PAINN, "both", 20, "berry", None),  # one rank with conservative forces, two with direct ones
]


@pytest.mark.parametrize(
    ("tasks", "ranks", "placement", "encoder", "forces", "max_edges", "no_forces", "silent"), CASES
)
def test_an_encoder_in_pieces_equals_one_process(
    pool, five, tasks, ranks, placement, encoder, forces, max_edges, no_forces, silent
):
    one = sharded(values_of(five, tasks, forces=forces), encoder)  # in a world of one the piece is the whole
    where = random_placement(tasks, ranks, seed=ranks) if placement == "random" else placement
    many = values_of(five, tasks, placement=where, forces=forces, max_edges=max_edges)
    many = sharded(many, encoder, allow_idle=isinstance(placement, dict))
    found = pool.run(ranks, "five_steps", many, no_forces, silent, 2_000)
    if max_edges is not None and ranks < tasks:
        assert max(rank["micro"] for rank in found) > 1
    assert_equal_to_one_process(pool.run(1, "five_steps", one, no_forces, silent, 10_000)[0], found, tolerance=1e-10)


ORDINARY = ["painn with attention", "dimenet"]  # the one has layers of two kinds, the other carries features of edges


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in ORDINARY else pytest.mark.full) for k in KINDS])
def test_any_encoder_in_pieces_equals_one_process(pool, five, kind, forces):
    encoder = KINDS[kind] | {"layers": 2, "hidden": 8}
    one = sharded(values_of(five, 3, forces=forces), encoder)
    three = sharded(values_of(five, 3, placement="split", forces=forces, max_edges=20), encoder)
    found = pool.run(3, "five_steps", three, None, None, 2_000)
    assert_equal_to_one_process(pool.run(1, "five_steps", one, None, None, 10_000)[0], found, tolerance=1e-10)


def test_pieces_are_gathered_again_for_what_is_recomputed(pool, five):
    one, two = (
        pool.run(n, "five_steps", sharded(values_of(five, 3, placement="split", recompute=n > 1)), None, None, 10_000)
        for n in (1, 2)
    )
    assert_equal_to_one_process(one[0], two, tolerance=1e-10)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 1e-1)])
def test_lower_precisions_equal_one_process_to_their_rounding(pool, five, precision, tolerance):
    one, two = (
        pool.run(n, "five_steps", sharded(values_of(five, 3, placement="split", precision=precision)), None, None, 900)
        for n in (1, 2)
    )
    for rank in two:
        np.testing.assert_allclose(rank["norms"], one[0]["norms"], rtol=tolerance)
        np.testing.assert_allclose(rank["validation"], one[0]["validation"], rtol=tolerance, atol=1e-6)


def test_a_rank_holds_its_piece_in_all_copies(pool, five):
    ranks, width = 3, 8
    values = sharded(values_of(five, 3, placement="split"))
    with torch.device("meta"):
        shapes = [p.shape for p in build_encoder(parse_config(values, "test").model.encoder, 3.0).parameters()]
    rows = [math.ceil(shape[0] / ranks) for shape in shapes]
    piece = sum(n * shape[1:].numel() for n, shape in zip(rows, shapes, strict=True)) * width
    assert piece < 0.4 * sum(shape.numel() for shape in shapes) * width
    for i, rank in enumerate(pool.run(ranks, "five_steps", values, None, None, 2_000)):
        used = [max(0, min(n, shape[0] - n * i)) * shape[1:].numel() for n, shape in zip(rows, shapes, strict=True)]
        own = sum(used) * width  # the last ranks have fewer rows, but memory for as many
        branch = sum(w.nbytes for n, w in rank["weights"].items() if n.startswith("branches"))
        kept = {"parameters": piece + branch, "gradients": piece + branch}
        assert rank["bytes"] == kept | {"moments": 2 * (own + branch), "averages": own + branch}
        assert rank["built"] == rank["bytes"] | {"gradients": branch, "moments": 0}


def test_the_memory_of_a_rank_counts_pieces_and_what_is_gathered(five):
    config = parse_config(sharded(values_of(five, 3), memory=1.0), "test")
    whole = parse_config(sharded(values_of(five, 3), memory=1.0, shard=False), "test")
    assert memory(whole, 64).encoder == encoder_bytes(config, 1) == encoder_bytes(whole, 64)
    big = {"name": "egnn", "layers": 8, "hidden": 512}
    values = sharded(values_of(five, 3), big, memory=64.0)
    config = parse_config(values, "test")
    state = bytes_per_parameter(config.train) / 8
    one, many = encoder_bytes(config, 1), encoder_bytes(config, 64)
    assert one / 64 < many < one / 64 + one / state, "four of eight layers are gathered for a while"
    values["model"]["branch"] = {"hidden": [6], "forces": "conservative"}
    assert many < encoder_bytes(parse_config(values, "test"), 64) < one
    assert memory(config, 64).limit == 64 * GIB


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_collectives_have_one_order_on_all_ranks(pool, five, forces):
    """Of the encoder and of branches, also where a head is not reached; a step that is not finite is skipped by all."""
    values = sharded(values_of(five, 2, placement={"apple": [0, 1], "berry": [1, 2]}, forces=forces, max_edges=40))
    ranks = pool.run(3, "recorded_steps", values, 2)
    for rank in ranks:
        assert rank["updated"] == [True, True, False, True] and rank["kept"] == [False, False, True, False]
    for step in range(4):
        logs = [rank["logs"][step] for rank in ranks]
        encoder = [[entry.split()[0] for entry in log if not entry.startswith("sum")] for log in logs]
        assert encoder[0] == encoder[1] == encoder[2]
        layers = EGNN["layers"]
        rounds = encoder[0].count("gather") // (layers + 1 if forces == "conservative" else 2 * layers)
        assert rounds >= 1 and encoder[0].count("scatter") == layers + 1, "reduced once, in the last round"
        places = set()
        for rank, log in zip(ranks, logs, strict=True):
            buckets = rank["buckets"]
            first = log.index(buckets[0])
            assert len(buckets) > 1 and log[first : first + len(buckets)] == buckets, "by name, before the encoder's"
            places.add(len([entry for entry in log[:first] if not entry.startswith("sum")]))
        assert len(places) == 1, "at one place among the encoder's"


def test_a_run_goes_on_with_pieces_or_without(pool, five, tmp_path):
    """1 -> 2 in pieces -> 3 whole -> 4 in pieces, some of them empty, stopped by SIGTERM on the last rank each time."""
    values = sharded(values_of(five, 5, run=tmp_path / "whole", log_every=2), shard=False)
    assert pool.run(1, "whole_run", values, None, 0) == [0]
    for ranks, pieces, placement, stop_at in (
        (1, False, "auto", 2), (2, True, "split", 3), (3, False, "split", 2), (4, True, "replicated", None)
    ):  # fmt: skip
        values = values_of(five, 5, run=tmp_path / "changed", log_every=2, placement=placement)
        codes = pool.run(ranks, "whole_run", sharded(values, shard=pieces), stop_at, ranks - 1)
        assert codes == [143 if stop_at else 0] * ranks
    assert_same_run(tmp_path / "whole", tmp_path / "changed")


def test_pieces_start_from_another_run(pool, five, tmp_path):
    first = sharded(values_of(five, 2, run=tmp_path / "first", steps=2, epoch_steps=2))
    assert pool.run(2, "whole_run", first) == [0, 0]
    for ranks, name in ((1, "one"), (2, "two")):
        values = values_of(five, 3, run=tmp_path / name, forces="conservative", steps=3, epoch_steps=3)
        assert pool.run(ranks, "whole_run", sharded(values) | {"init": str(tmp_path / "first")}) == [0] * ranks
    assert_same_run(tmp_path / "one", tmp_path / "two")
