"""SOAP does what its paper says, is the same in every turned frame, and its state survives a stop."""

import shutil

import pytest
import torch
from torch import Tensor, nn

from multifid.config import parse_config
from multifid.model.potential import Potential
from multifid.train.costs import bases, encoder_bytes
from multifid.train.optimizer import adamw, moments, set_moments, updates_of
from multifid.train.soap import EPSILON, EVERY, SOAP, is_turned
from test_train import assert_same_bits, config_of, start

torch.set_num_threads(1)


def made(seed: int, *shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"encoder.{k}.weight": nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for k, shape in enumerate(shapes)
    }


def gradients(seed: int, like: dict[str, nn.Parameter], steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in like.items()}
        for _ in range(steps)
    ]


def walk(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], path: list[dict[str, Tensor]]) -> None:
    for grads in path:
        for name, p in parameters.items():
            p.grad = grads[name].clone()
        optimizer.step()


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("steps", [1, EVERY + 3])
def test_a_matrix_moves_as_the_paper_says(steps: int) -> None:
    """One matrix, written out with the paper's running averages, its basis by an iteration on explicit columns."""
    parameters = made(0, (4, 6))
    (weight,) = parameters.values()
    w, lr, decay, b = weight.detach().clone(), 0.01, 0.1, 0.95
    path = gradients(1, parameters, steps)
    walk(SOAP(parameters, lr, decay), parameters, path)

    first, second = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    for t, grads in enumerate(path, 1):
        (g,) = grads.values()
        if t == 1:
            left, right = g @ g.T, g.T @ g
            q_l, q_r = (torch.linalg.eigh(x).eigenvectors for x in (left, right))
        else:
            left, right = b * left + (1 - b) * g @ g.T, b * right + (1 - b) * g.T @ g
        first, second = b * first + (1 - b) * g, b * second + (1 - b) * (q_l.T @ g @ q_r) ** 2
        adam = (q_l.T @ first @ q_r / (1 - b**t)) / ((second / (1 - b**t)).sqrt() + EPSILON)
        w = (1 - lr * decay) * w - lr * q_l @ adam @ q_r.T
        if t % EVERY == 0:
            order = torch.argsort((q_l.T @ left @ q_l).diag(), descending=True)
            q_l, second = gram_schmidt(left @ q_l[:, order]), second[order]
            order = torch.argsort((q_r.T @ right @ q_r).diag(), descending=True)
            q_r, second = gram_schmidt(right @ q_r[:, order]), second[:, order]
    torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-8)


def gram_schmidt(columns: Tensor) -> Tensor:
    done: list[Tensor] = []
    for x in columns.T:
        for _ in range(2):  # twice is enough for rounding
            x = x - sum((torch.dot(q, x) * q for q in done), torch.zeros_like(x))
        done.append(x / x.norm())
    return torch.stack(done, dim=1)


def test_the_path_is_the_same_in_a_turned_frame_and_that_of_adamw_is_not() -> None:
    """With A W B in place of W and A G B in place of G, A and B orthogonal, the path is A W_t B."""
    a, b = orthogonal(6, 2), orthogonal(6, 3)  # square: no eigenvalues are equal, so the basis is unique
    apart = {}
    for make in (SOAP, adamw):
        plain = made(0, (6, 6))
        (name,) = plain
        frame = {name: nn.Parameter(a @ plain[name].detach() @ b)}
        path = gradients(1, plain, 2 * EVERY + 1)
        walk(make(plain, 0.01, 0.1), plain, path)
        walk(make(frame, 0.01, 0.1), frame, [{name: a @ grads[name] @ b} for grads in path])
        apart[make] = float((a @ plain[name] @ b - frame[name]).abs().max().detach())
    assert apart[SOAP] < 1e-6 < 1e-2 < apart[adamw]


def test_an_update_does_not_depend_on_what_else_is_optimised() -> None:
    """A rank holds only some branches: their updates must be those of one process that holds all."""
    everything, alone = made(0, (8, 8), (8, 8), (8,), (1, 8)), made(0, (8, 8))
    path = gradients(1, everything, EVERY + 2)
    walk(SOAP(everything, 0.01, 0.0), everything, path)
    walk(SOAP(alone, 0.01, 0.0), alone, path)
    name = next(iter(alone))
    torch.testing.assert_close(everything[name], alone[name], rtol=1e-10, atol=1e-12)


def test_state_that_is_taken_out_and_put_back_goes_on_with_the_same_bits() -> None:
    through, halfway = made(0, (6, 4), (4,)), made(0, (6, 4), (4,))
    path = gradients(1, through, 2 * EVERY + 2)
    walk(SOAP(through, 0.01, 0.01), through, path)
    before, after = SOAP(halfway, 0.01, 0.01), SOAP(halfway, 0.01, 0.01)
    walk(before, halfway, path[: EVERY + 3])
    for p in halfway.values():
        set_moments(after, p, {k: v.clone() for k, v in moments(before, p).items()}, updates_of(before, p))
    walk(after, halfway, path[EVERY + 3 :])
    for name, p in through.items():
        assert torch.equal(p, halfway[name])


def test_embeddings_vectors_and_single_rows_are_not_turned() -> None:
    shapes = {"encoder.embedding.element.weight": (9, 8), "a.bias": (8,), "a.gate.weight": (1, 8), "a.weight": (8, 9)}
    assert [n for n, shape in shapes.items() if is_turned(n, nn.Parameter(torch.zeros(shape)))] == ["a.weight"]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameters = made(0, (4, 4), (4,))
    optimizer = SOAP(parameters, 0.01, 0.1)
    walk(optimizer, parameters, gradients(1, parameters, 2))
    held = [p.detach().clone() for p in parameters.values()]
    optimizer.found_inf = torch.tensor(1.0)
    walk(optimizer, parameters, [{n: torch.full_like(p, torch.nan) for n, p in parameters.items()}])
    assert all(torch.equal(p, h) for p, h in zip(parameters.values(), held, strict=True))
    assert {updates_of(optimizer, p) for p in parameters.values()} == {2}


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"optimizer": "soap", "steps": 18, "checkpoint_every": 7})
    run = start(values)
    whole = shutil.copytree(run, tmp_path / "whole")
    for step in (17, 18):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06}", ignore_errors=True)
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == ["step-000014"]
    start(values)
    assert_same_bits(run, whole)


def test_an_encoder_in_pieces_is_refused_because_pieces_are_no_matrices(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"optimizer": "soap"}, parallel={"shard_encoder": True})
    with pytest.raises(ValueError, match=r"train\.optimizer: soap needs whole matrices"):
        parse_config(values, "test")


def test_the_limit_of_memory_knows_what_is_kept(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run", train={"optimizer": "soap"}), "test")
    plain = parse_config(config_of(stores, tmp_path / "run", train={"optimizer": "adamw"}), "test")
    potential = Potential(config.model, ["a"], {"a": "a"}, seed=0)
    encoder, branch = dict(potential.encoder_parameters()), dict(potential.branch_parameters("a"))
    optimizer = SOAP(encoder | branch, 1e-3, 0.0)

    def beside_moments(parameters):
        held = [moments(optimizer, p) for p in parameters.values()]
        return sum(t.numel() for tensors in held for name, t in tensors.items() if not name.startswith("exp_avg"))

    assert bases(config) == (beside_moments(encoder), beside_moments(branch)) and min(bases(config)) > 0
    assert encoder_bytes(config, 1) - encoder_bytes(plain, 1) == 4 * beside_moments(encoder)
    assert bases(plain) == (0, 0)
