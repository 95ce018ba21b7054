"""SOAP does what its paper says, is a smooth function of gradients of any rank, and its state survives a stop."""

import shutil

import pytest
import torch
from torch import Tensor, nn

from multifid.config import parse_config
from multifid.model.kernels.native.build import library
from multifid.model.potential import Potential
from multifid.training import soap, soap_native
from multifid.training.costs import encoder_bytes, kept_beside
from multifid.training.optimizer import adamw, moments, set_moments, updates_of
from multifid.training.soap import DAMPING, EPSILON, EVERY, FIRST, FLOOR, SOAP, first_basis, is_rotated
from test_train import assert_same_bits, config_of, start

torch.set_num_threads(1)
usable = soap_native.usable


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


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("steps", [1, 2 * EVERY + 3])
def test_a_matrix_moves_as_the_paper_says(steps: int, in_torch: bool, monkeypatch) -> None:
    """One matrix, written out, its bases by an iteration on explicit columns from their first places."""
    if in_torch:
        monkeypatch.setattr(soap_native, "usable", lambda *_: False)
    parameters = made(0, (4, 6))
    (weight,) = parameters.values()
    w, lr, decay, b = weight.detach().clone(), 0.01, 0.1, 0.95
    path = gradients(1, parameters, steps)
    walk(SOAP(parameters, lr, decay), parameters, path)

    first, second = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    left, right, q_l, q_r = torch.zeros(4, 4).double(), torch.zeros(6, 6).double(), first_basis(4), first_basis(6)
    for t, grads in enumerate(path, 1):
        (g,) = grads.values()
        left, right = b * left + (1 - b) * g @ g.T, b * right + (1 - b) * g.T @ g
        for _ in range(FIRST if t == 1 else 0):
            q_l, q_r = rotated(left, q_l), rotated(right, q_r)
        first, second = b * first + (1 - b) * g, b * second + (1 - b) * (q_l.T @ g @ q_r) ** 2
        size = (second / (1 - b**t)).sqrt()
        size = size + FLOOR * size.square().mean().sqrt() + EPSILON
        w = (1 - lr * decay) * w - lr * q_l @ (q_l.T @ first @ q_r / (1 - b**t) / size) @ q_r.T
        if t % EVERY == 0:
            q_l, q_r = rotated(left, q_l), rotated(right, q_r)
    torch.testing.assert_close(weight.detach(), w, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(library() is None, reason="no C++ compiler here, or MULTIFID_NATIVE=0")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_library_moves_weights_as_torch_does(dtype, tolerance, threads, monkeypatch) -> None:
    """Shapes around the widths of vectors and of blocks of rows, vectors, gradients that are divided."""
    shapes, ends = [(64, 64), (64, 64), (64, 17), (15, 29), (7, 5), (136, 64), (2, 3), (33,), (1, 64), (1,)], []
    torch.set_num_threads(threads)
    try:
        for in_torch in (False, True):
            monkeypatch.setattr(soap_native, "usable", usable if not in_torch else lambda *_: False)
            parameters = made(0, *shapes)
            path = gradients(1, parameters, 2 * EVERY + 2)
            for p in parameters.values():
                p.data = p.data.to(dtype)
            optimizer = SOAP(parameters, 0.01, 0.1)
            optimizer.grad_scale = torch.tensor(1.7)
            walk(optimizer, parameters, [{name: g.to(dtype) for name, g in grads.items()} for grads in path])
            ends.append([x for p in parameters.values() for x in (p.detach(), *moments(optimizer, p).values())])
    finally:
        torch.set_num_threads(1)
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(y.abs().max()))


def rotated(factor: Tensor, basis: Tensor) -> Tensor:
    return gram_schmidt(factor @ basis / (factor.diag().mean() + EPSILON**2) + DAMPING * basis)


def gram_schmidt(columns: Tensor) -> Tensor:
    done: list[Tensor] = []
    for x in columns.T:
        for _ in range(2):  # twice is enough for rounding
            x = x - sum((torch.dot(q, x) * q for q in done), torch.zeros_like(x))
        done.append(x / x.norm())
    return torch.stack(done, dim=1)


def test_bases_find_the_directions_that_gradients_have() -> None:
    """Planted: gradients A diag(s) Z, whose rows vary along the columns of A alone, each with another size."""
    parameters, a = made(0, (6, 40)), orthogonal(6, 2)
    (name, weight), optimizer = next(iter(parameters.items())), SOAP(parameters, 0.01, 0.1)
    sizes = torch.tensor([8.0, 5.0, 3.0, 2.0, 1.2, 0.7]).double()
    walk(optimizer, parameters, [{name: (a * sizes) @ g[name]} for g in gradients(1, parameters, 30 * EVERY)])
    basis = optimizer.state[weight]["left_basis"]
    assert (a.T @ basis).diag().abs().min() > 0.99
    torch.testing.assert_close(basis.T @ basis, torch.eye(6).double(), atol=1e-14, rtol=0)


def test_the_path_is_the_same_in_a_rotated_frame_and_that_of_adamw_is_not(monkeypatch) -> None:
    """With A W B in place of W and A G B in place of G, A and B orthogonal, the path is A W_t B."""
    a, b = orthogonal(5, 2), orthogonal(8, 3)
    plain_first, rotated_first = soap.first_basis, {5: a @ first_basis(5), 8: b.T @ first_basis(8)}.__getitem__
    apart = {}
    for make in (SOAP, adamw):
        plain = made(0, (5, 8))
        (name,) = plain
        frame = {name: nn.Parameter(a @ plain[name].detach() @ b)}
        path = gradients(1, plain, 2 * EVERY + 1)
        monkeypatch.setattr(soap, "first_basis", plain_first)
        walk(make(plain, 0.01, 0.1), plain, path)
        monkeypatch.setattr(soap, "first_basis", rotated_first)
        walk(make(frame, 0.01, 0.1), frame, [{name: a @ grads[name] @ b} for grads in path])
        apart[make] = float((a @ plain[name] @ b - frame[name]).abs().max().detach())
    assert apart[SOAP] < 1e-11 < 1e-2 < apart[adamw]


def deficient(shape: tuple[int, int], kind: str, steps: int) -> list[Tensor]:
    """Gradients whose products have eigenvalues that are zero, equal, or of the size of rounding errors."""
    generator, (m, n) = torch.Generator().manual_seed(3), shape
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    if kind == "one rank":
        u, v = draw(m, 1), draw(1, n)
        return [u @ v * draw(1) for _ in range(steps)]
    if kind == "columns that are equal or zero":
        return [torch.cat([x := draw(m, 2), x, torch.zeros(m, n - 4).double()], dim=1) for _ in range(steps)]
    if kind == "equal eigenvalues":
        return [orthogonal(max(m, n), k)[:m, :n] for k in range(steps)]
    return [draw(m, n) * torch.logspace(0, -16, n, dtype=torch.float64) for _ in range(steps)]


DEFICIENT = ("one rank", "columns that are equal or zero", "equal eigenvalues", "sizes down to rounding errors")


@pytest.mark.parametrize(("dtype", "noise", "tolerance"), [(torch.float64, 1e-15, 1e-11), (torch.float32, 1e-7, 1e-3)])
@pytest.mark.parametrize("shape", [(64, 17), (6, 4), (12, 12)])
@pytest.mark.parametrize("kind", DEFICIENT)
def test_a_rounding_error_of_the_gradients_stays_one_whatever_their_rank(kind, shape, dtype, noise, tolerance):
    """Relative to the way that a weight has gone in so many updates. With bases by eigh it was a third of that way."""
    updates, ends = 4 * EVERY + 1, []
    for size in (0.0, noise):
        parameters, random = made(0, shape), torch.Generator().manual_seed(4)
        (name, weight) = next(iter(parameters.items()))
        path = [
            g + size * g.abs().max() * torch.randn(shape, generator=random).double()
            for g in deficient(shape, kind, updates)
        ]
        weight.data = weight.data.to(dtype)
        walk(SOAP(parameters, 0.01, 0.1), parameters, [{name: g.to(dtype)} for g in path])
        ends.append(weight.detach().double())
    assert (ends[0] - ends[1]).abs().max() < tolerance * 0.01 * updates


def test_no_update_is_much_longer_than_the_learning_rate_whatever_comes_before_it() -> None:
    """Gradients of nothing, of rounding errors, and then a billion times larger, between two roots and after them."""
    parameters = made(0, (8, 5))
    (name, weight), optimizer = next(iter(parameters.items())), SOAP(parameters, 0.01, 0.0)
    sizes = [0.0] * 3 + [1e-17] * EVERY + [1.0] * EVERY + [1e9] * EVERY + [1e-3] * EVERY
    for size, grads in zip(sizes, gradients(1, parameters, len(sizes)), strict=True):
        before = weight.detach().clone()
        walk(optimizer, parameters, [{name: size * grads[name]}])
        moved = (weight.detach() - before).square().mean().sqrt() / 0.01
        assert moved.isfinite() and moved <= 1.5
        assert size < 1.0 or moved > 0.05


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


def test_embeddings_vectors_and_single_rows_are_not_rotated() -> None:
    shapes = {"encoder.embedding.element.weight": (9, 8), "a.bias": (8,), "a.gate.weight": (1, 8), "a.weight": (8, 9)}
    assert [n for n, shape in shapes.items() if is_rotated(n, nn.Parameter(torch.zeros(shape)))] == ["a.weight"]


def test_counts_that_are_put_back_stay_on_the_host_where_they_are_read():
    parameter = nn.Parameter(torch.empty(3, 4, device="meta"))
    optimizer = SOAP({"a.weight": parameter}, 0.01, 0.0)
    set_moments(optimizer, parameter, moments(optimizer, parameter), 5)
    kept = optimizer.state[parameter]
    assert kept.pop("step").device.type == "cpu" and {x.device.type for x in kept.values()} == {"meta"}


def test_products_of_an_update_are_exact_in_a_run_that_takes_its_others_in_tf32(monkeypatch):
    seen = []
    monkeypatch.setattr(SOAP, "_gradients", lambda *_: seen.append(torch.get_float32_matmul_precision()) or [])
    monkeypatch.setattr(SOAP, "_rotated", lambda *_: [torch.zeros(4, 4).double()])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        parameters = made(0, (4, 4))
        walk(SOAP(parameters, 0.01, 0.0), parameters, gradients(1, parameters, 1))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


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

    kept = kept_beside(config.model, config.train)
    assert kept == (beside_moments(encoder), beside_moments(branch)) and min(kept) > 0
    assert encoder_bytes(config, 1) - encoder_bytes(plain, 1) == 4 * beside_moments(encoder)
    assert kept_beside(plain.model, plain.train) == (0, 0)
