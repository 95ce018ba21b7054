"""The edges of a layer in C++ against the same function in torch: values, first, second and third derivatives."""

from functools import partial

import pytest
import torch

from multifid.environment import cache_directory, compiler_named, native_wanted
from multifid.graphs.graph import Graph
from multifid.model.encoders import painn
from multifid.model.encoders.egnn import EGNNLayer, edges_of_layer
from multifid.model.kernels import egnn_native as native
from multifid.model.kernels import mlp_native, painn_atoms_native, painn_native, pairs_native
from multifid.model.kernels.egnn import EdgeWeights
from multifid.model.kernels.native import build, twice
from multifid.model.layers import MLP, LayerNorm, PairBasis, bent_maps, draw_weights, pairs

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler is here")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
CASES = {  # hidden, vectors, tensors, first layer, atoms, edges
    "first": (16, 8, 0, True, 40, 900),
    "later": (40, 5, 0, False, 40, 900),
    "tensors": (64, 8, 8, False, 40, 300),
    "few tensors": (130, 3, 2, False, 3, 5),
    "no edges": (16, 8, 2, False, 3, 0),
}


def layer_of(case, dtype=torch.float64):
    """(function in torch, function in C++, inputs and weights) of random numbers; some atoms have no edges."""
    hidden, vectors, tensors, first, atoms, edges = CASES[case]
    random = torch.Generator().manual_seed(1)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()

    layer, width = EGNNLayer(hidden, vectors, tensors, 8, 5.0, first).to(dtype), -(-hidden // 32) * 32
    i = torch.randint(0, atoms - 1, (edges,), generator=random).sort()[0]
    j = torch.randint(0, atoms, (edges,), generator=random)
    inputs = [draw(atoms, width), draw(atoms, width), draw(atoms, vectors, 3, scale=0.5), draw(edges, 3)]
    inputs += [draw(edges, 8), draw(edges, 1), *([draw(edges, 5)] if tensors else [])]
    weights = [draw(*w.shape, scale=0.15) for w in layer.edge_weights(width)]
    plain = partial(edges_of_layer, i, j, layer.per_area, layer.angle is not None)
    count = len(inputs)

    def compiled(*x):
        known = (plain, i, j, layer.per_area, layer.angle is not None)
        return native.edges(*known, x[:count], EdgeWeights(*x[count:]))

    return plain, compiled, inputs, weights


def directions(like):
    random = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype).requires_grad_() for x in like]


def first(function, inputs, weights):
    outputs = function(*inputs, *weights)
    return outputs, torch.autograd.grad(outputs, [*inputs, *weights], directions(outputs))


def second(function, inputs, weights, create_graph=False):
    """Gradients of energies and forces together: of the outputs, and of gradients of the inputs."""
    outputs = function(*inputs, *weights)
    given = directions(outputs)
    forces = torch.autograd.grad(outputs, inputs, given, create_graph=True)
    loss = sum((x.sin() if n % 2 else x.square()).sum() for n, x in enumerate(forces))
    loss = loss + sum((x * y).sum() for x, y in zip(outputs, given, strict=True))
    return torch.autograd.grad(loss, [*inputs, *weights, *given], create_graph=create_graph, materialize_grads=True)


def assert_near(found, expected, tolerance):
    for k, (x, y) in enumerate(zip(found, expected, strict=True)):
        scale = y.abs().max().item() if y.numel() else 0.0
        assert x.shape == y.shape and torch.isfinite(x).all()
        torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * max(scale, 1e-30), msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_values_and_two_derivatives_are_those_of_torch(case, dtype, threads, set_threads):
    set_threads(threads)
    plain, compiled, *given = layer_of(case, dtype)
    for derivative in (first, second):
        found, expected = derivative(compiled, *given), derivative(plain, *given)
        if derivative is first:
            assert_near(found[0], expected[0], TOLERANCE[dtype])
            found, expected = found[1], expected[1]
        assert_near(found, expected, TOLERANCE[dtype])


def test_third_derivatives_are_those_of_torch():
    """By torch: what they are needed for is rare."""
    plain, compiled, *given = layer_of("few tensors")
    found = []
    for function in (compiled, plain):
        gradients = second(function, *given, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in gradients), [*given[0], *given[1]]))
    assert_near(*found, 1e-11)


def test_gradients_of_the_same_edges_twice():
    """Two tasks that share structures differentiate the same edges; the wait of one must not be the other's."""
    plain, compiled, inputs, weights = layer_of("later")
    found = []
    for function in (compiled, plain):
        outputs = function(*inputs, *weights)
        loss = 0.0
        for k in (1.0, 2.0):
            given = [k * x.detach().cos() for x in outputs]
            forces = torch.autograd.grad(outputs, inputs, given, create_graph=True)
            loss = loss + sum((k * x).square().sum() for x in forces)
        kept = torch.autograd.grad(loss, inputs[2], retain_graph=True)  # leaves nothing behind for the next one
        found.append([*kept, *torch.autograd.grad(loss + outputs[0].sum(), [*inputs, *weights])])
    assert_near(*found, 1e-12)


def test_gradients_of_weights_that_are_differentiated_too():
    plain, compiled, inputs, weights = layer_of("few tensors")
    found = []
    for function in (compiled, plain):
        outputs = function(*inputs, *weights)
        gradients = torch.autograd.grad(outputs, weights, [x.detach().cos() for x in outputs], create_graph=True)
        loss = sum(x.square().sum() for x in gradients)
        found.append(torch.autograd.grad(loss, [*inputs, *weights], materialize_grads=True))
    assert_near(*found, 1e-11)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("case", ["later", "tensors"])
def test_bfloat16_is_float32_to_its_precision(case, number, monkeypatch):
    """Products in bfloat16: of the processor, where it has them (2), or of rounded numbers (3); sums in float32."""
    plain, compiled, *given = layer_of(case, torch.float32)
    monkeypatch.setitem(twice.TYPES, torch.bfloat16, number)
    for derivative in (first, second):
        expected = derivative(plain, *given)
        with torch.autocast("cpu", torch.bfloat16):
            found = derivative(compiled, *given)
        if derivative is first:
            found, expected = found[1], expected[1]
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == torch.float32
            assert torch.linalg.vector_norm(x - y) <= 0.03 * torch.linalg.vector_norm(y)
        assert not all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


PAINNS = {"wide": (32, 8, 40, 900), "odd": (20, 5, 7, 130), "no edges": (16, 8, 3, 0)}  # channels, radial, atoms, edges


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", PAINNS)
def test_edges_of_painn_are_those_of_torch(case, dtype, set_threads):
    set_threads(2)
    channels, radial, atoms, edges = PAINNS[case]
    random = torch.Generator().manual_seed(1)
    i = torch.randint(0, atoms - 1, (edges,), generator=random).sort()[0]
    j = torch.randint(0, atoms, (edges,), generator=random)
    shapes = [(atoms, 3, channels), (atoms, 3, channels), (edges, 3), (edges, radial), (edges, 1)]
    given = directions([torch.empty(s, dtype=dtype) for s in (*shapes, (3 * channels, radial), (3 * channels,))])
    plain = partial(painn.edges_of_layer, i, j)
    found = []
    for function in (lambda *x: painn_native.edges(plain, i, j, x), plain):
        outputs, gradients = first(lambda *x, f=function: (f(*x),), given[:5], given[5:])
        twice_over = second(lambda *x, f=function: (f(*x),), given[:5], given[5:])
        found.append([*outputs, *gradients, *twice_over])
    assert_near(*found, TOLERANCE[dtype])


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_edges_of_painn_that_run_both_ways_share_their_filters(threads, moving, set_threads):
    """Half of them have the same functions as their twin; second derivatives are along changes that differ."""
    set_threads(threads)
    random = torch.Generator().manual_seed(1)
    i, j = torch.nonzero(torch.ones(19, 19) - torch.eye(19)).t()
    place = torch.randn(19, 3, generator=random, dtype=torch.float64)
    twin = painn_native.twins(i, j, 19, place[j] - place[i])
    assert torch.equal(i[twin], j) and torch.equal(j[twin], i)
    shapes = [(19, 3, 32), (19, 3, 32), (len(i), 3), (len(i), 5), (len(i), 1), (96, 5), (96,)]
    given = [x.detach() for x in directions([torch.empty(s, dtype=torch.float64) for s in shapes])]
    given[1] = given[1] if moving else 0 * given[1]
    first_of_both, alike = torch.minimum(torch.arange(len(i)), twin), i + j < 19
    given[3:5] = [torch.where(alike[:, None], x[first_of_both], x) for x in given[3:5]]
    given = [x.requires_grad_(moving or k != 1) for k, x in enumerate(given)]
    plain, found, inputs = partial(painn.edges_of_layer, i, j), [], [x for x in given[:5] if x.requires_grad]
    for function in (lambda *x: painn_native.edges(plain, i, j, x, twin), plain):

        def of_layer(*x, f=function):
            return (f(*x) if moving else f(x[0], given[1], *x[1:]),)

        outputs, gradients = first(of_layer, inputs, given[5:])
        found.append([*outputs, *gradients, *second(of_layer, inputs, given[5:])])
        (sums,) = of_layer(*inputs, *given[5:])  # as in a step: gradients of energies and forces, for weights alone
        (forces,) = torch.autograd.grad(sums.sin().sum(), inputs[0], create_graph=True)
        found[-1] += torch.autograd.grad(forces.square().sum() + sums.sum(), [inputs[0], *given[5:]])
    assert_near(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels", "atoms"), [(32, 150), (20, 7), (16, 0)])
def test_atoms_of_painn_are_those_of_torch(channels, atoms, dtype, set_threads):
    set_threads(2)
    layer = painn.PaiNNLayer(channels, 8).to(dtype)
    draw_weights(layer, torch.Generator().manual_seed(0))
    given = directions([torch.empty(s, dtype=dtype) for s in ((atoms, channels), (atoms, 3, channels))])
    given += directions([torch.empty(atoms, 4, channels, dtype=dtype)])
    weights = [(w + 0.1 * torch.cos(torch.arange(w.numel())).view(w.shape)).to(dtype) for w in layer.update_weights()]
    weights = [w.detach().requires_grad_() for w in weights]
    plain, found = partial(painn.updated_with, 1e-5), []
    for function in (lambda *x: painn_atoms_native.update(plain, x[:3], x[3:], 16.0, 1e-5), plain):
        outputs, gradients = first(function, given, weights)
        found.append([*outputs, *gradients, *second(function, given, weights)])
    assert_near(*found, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("radial", "sized", "turned", "edges"), [(8, 0, False, 700), (3, 5, True, 37), (8, 8, True, 0)]
)
def test_functions_of_the_distance_are_those_of_torch(radial, sized, turned, edges, dtype, monkeypatch):
    """Also beyond the cutoff, where the envelope is zero, as neighbours of a list with a skin may be."""
    random = torch.Generator().manual_seed(1)
    basis = PairBasis(radial, sized, 5.0).to(dtype)
    i, j = torch.randint(0, 40, (2, edges), generator=random)
    numbers, lengths = torch.randint(1, 90, (40,), generator=random), torch.rand(edges, 1, generator=random) * 6 + 0.3
    (r,) = directions([torch.empty(edges, 3, dtype=dtype)])
    r = (lengths * r / r.norm(dim=1, keepdim=True)).to(dtype).detach().requires_grad_()
    none, found = torch.zeros(1, dtype=torch.int64), []
    for native_one in (True, False):
        if not native_one:
            monkeypatch.setattr(pairs_native, "usable", lambda _: False)

        def function(r):
            graph = Graph(numbers, torch.zeros_like(numbers), none, none, i, j, r, r.norm(dim=1))
            return tuple(pairs(graph, basis, 5.0, turned))

        outputs, gradients = first(function, [r], [])
        found.append([*outputs, *gradients, *second(function, [r], [])])
    assert_near(*found, 10 * TOLERANCE[dtype])


MLPS = {  # widths, SiLU behind the last map, rows
    "node": ([150, 64, 64], False, 260),
    "head": ([20, 33, 40, 3], True, 130),
    "one": ([70, 8], False, 1),
    "no rows": ([16, 16], True, 0),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("case", MLPS)
def test_maps_of_atoms_are_those_of_torch(case, normed, dtype, monkeypatch, set_threads):
    """Values, gradients, and gradients of gradients, as forces need them."""
    set_threads(2)
    widths, bent, rows = MLPS[case]
    mlp = MLP(widths)
    draw_weights(mlp, torch.Generator().manual_seed(0))
    mlp.to(dtype)
    norm = LayerNorm(widths[0]).to(dtype) if normed else None
    (x,) = directions([torch.empty(rows, widths[0], dtype=dtype)])
    found = []
    for native_one in (True, False):
        if not native_one:
            monkeypatch.setattr(mlp_native, "usable", lambda *_: False)

        def function(x, *_):
            return (bent_maps(x, mlp.linears(), bent, norm),)

        weights = [*mlp.parameters(), *([] if norm is None else norm.parameters())]
        outputs, gradients = first(function, [x], weights)
        found.append([*outputs, *gradients, *second(function, [x], weights)])
    assert_near(*found, TOLERANCE[dtype])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_not_a_number_stays_none(precision):
    """A step is skipped for it, so nothing must swallow it."""
    _, compiled, inputs, weights = layer_of("later", torch.float32)
    with torch.no_grad():
        inputs[0][3, 5] = float("nan")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        outputs, gradients = first(compiled, inputs, weights)
    assert outputs[0][3].isnan().all() and outputs[1][3].isnan().any()
    assert gradients[len(inputs) + 1].isnan().any()
    assert not outputs[0][5].isnan().any()


def test_where_it_cannot_be_compiled_there_is_no_library(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    build.library.cache_clear()
    try:
        assert build.library() is None
        assert "false could not compile" in caplog.text and "more slowly" in caplog.text
        build.library.cache_clear()
        monkeypatch.setenv("MULTIFID_NATIVE", "0")
        assert build.library() is None and not list(tmp_path.rglob("*.so"))
    finally:
        monkeypatch.undo()
        build.library.cache_clear()
    assert build.library() is not None


def test_what_the_user_set_is_read():
    assert native_wanted({}) and not native_wanted({"MULTIFID_NATIVE": "0"})
    assert compiler_named({"CXX": "ccache g++"}) == ["ccache", "g++"] and compiler_named({}) == []
    assert cache_directory({"XDG_CACHE_HOME": "/c"}).as_posix() == "/c/multifid"
