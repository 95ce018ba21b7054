"""Triton kernels for PaiNN's edges, each of them whole: its products are with a few radial functions only.

    l = b W + bias (3, H),  w = u l,  x = phi_j w          S_i = sum_j x_0,   V_i = sum_j (x_1 v_j + x_2 d)

Forwards a program takes an atom and the edges that it receives, backwards those that it sends: then the sums that are
wanted stay in the program, and of atoms at the other end numbers are gathered, which mostly lie in the cache. With DUAL
every number x has a tangent x_t beside it, and tangents are written. All of it is in the type of the geometry.

Sums are (N, 4, H): scalars, and vectors by component. Names of tiles: three of scalars 0, 1, 2 and of vectors x, y, z.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x, rows, ok, parts: tl.constexpr, part: tl.constexpr, h, H, T: tl.constexpr):
    """(rows, H) of a part of (..., parts, H)."""
    at = (rows[:, None] * parts + part) * H + h[None, :]
    return tl.load(x + at, mask=ok[:, None] & (h < H)[None, :], other=0.0).to(T)


@triton.jit
def _row(x, row, parts: tl.constexpr, part: tl.constexpr, h, H, T: tl.constexpr):
    """(1, H) of a part of one row of (..., parts, H)."""
    return tl.load(x + (row * parts + part) * H + h, mask=h < H, other=0.0).to(T)[None, :]


@triton.jit
def _number(x, rows, ok, parts: tl.constexpr, part: tl.constexpr, T: tl.constexpr):
    """(rows, 1) of a column of (..., parts)."""
    return tl.load(x + rows * parts + part, mask=ok, other=0.0).to(T)[:, None]


@triton.jit
def _filter(
    basis, rows, ok, w, bias, part: tl.constexpr, h, H, R: tl.constexpr, ROWS: tl.constexpr, HB: tl.constexpr,
    BIAS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A third of l, (rows, H); w is (R, 3, H)."""
    out = tl.zeros((ROWS, HB), dtype=T)
    if BIAS:
        out += _row(bias, 0, 3, part, h, H, T)
    for r in range(R):
        out += _number(basis, rows, ok, R, r, T) * _row(w, r, 3, part, h, H, T)
    return out


@triton.jit
def _put_row(x, row, parts: tl.constexpr, part: tl.constexpr, h, H, values):
    tl.store(x + (row * parts + part) * H + h, values, mask=h < H)


@triton.jit
def _put_numbers(x, rows, ok, parts: tl.constexpr, part: tl.constexpr, values):
    tl.store(x + rows * parts + part, values, mask=ok)


@triton.jit
def _put_rows(x, row, h, H, first, second, third):
    """A row of (N, 3, H)."""
    _put_row(x, row, 3, 0, h, H, first)
    _put_row(x, row, 3, 1, h, H, second)
    _put_row(x, row, 3, 2, h, H, third)


@triton.jit
def forward(
    phi, v, u, d, basis, w, bias, phi_t, v_t, u_t, d_t, basis_t, j, offsets, sums, N, H,
    R: tl.constexpr, HB: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Sums (N, 4, H), or their tangents."""
    T: tl.constexpr = u.dtype.element_ty
    h = tl.arange(0, HB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        s = tl.zeros((HB,), dtype=T)
        x, y, z = tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T)
        end = tl.load(offsets + atom + 1)
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            k = tl.load(j + rows, mask=ok, other=0)
            e = _number(u, rows, ok, 1, 0, T)
            l0 = _filter(basis, rows, ok, w, bias, 0, h, H, R, ROWS, HB, True, T)
            l1 = _filter(basis, rows, ok, w, bias, 1, h, H, R, ROWS, HB, True, T)
            l2 = _filter(basis, rows, ok, w, bias, 2, h, H, R, ROWS, HB, True, T)
            p1, p2 = _tile(phi, k, ok, 3, 1, h, H, T), _tile(phi, k, ok, 3, 2, h, H, T)
            dx, dy, dz = _number(d, rows, ok, 3, 0, T), _number(d, rows, ok, 3, 1, T), _number(d, rows, ok, 3, 2, T)
            b, c = e * l1 * p1, e * l2 * p2
            vx, vy, vz = _tile(v, k, ok, 3, 0, h, H, T), _tile(v, k, ok, 3, 1, h, H, T), _tile(v, k, ok, 3, 2, h, H, T)
            if DUAL:
                e_t = _number(u_t, rows, ok, 1, 0, T)
                w0 = e_t * l0 + e * _filter(basis_t, rows, ok, w, bias, 0, h, H, R, ROWS, HB, False, T)
                w1 = e_t * l1 + e * _filter(basis_t, rows, ok, w, bias, 1, h, H, R, ROWS, HB, False, T)
                w2 = e_t * l2 + e * _filter(basis_t, rows, ok, w, bias, 2, h, H, R, ROWS, HB, False, T)
                b_t = w1 * p1 + e * l1 * _tile(phi_t, k, ok, 3, 1, h, H, T)
                c_t = w2 * p2 + e * l2 * _tile(phi_t, k, ok, 3, 2, h, H, T)
                of_s = w0 * _tile(phi, k, ok, 3, 0, h, H, T) + e * l0 * _tile(phi_t, k, ok, 3, 0, h, H, T)
                s += tl.sum(of_s, axis=0)
                x += tl.sum(b_t * vx + b * _tile(v_t, k, ok, 3, 0, h, H, T) + c_t * dx
                            + c * _number(d_t, rows, ok, 3, 0, T), axis=0)  # fmt: skip
                y += tl.sum(b_t * vy + b * _tile(v_t, k, ok, 3, 1, h, H, T) + c_t * dy
                            + c * _number(d_t, rows, ok, 3, 1, T), axis=0)  # fmt: skip
                z += tl.sum(b_t * vz + b * _tile(v_t, k, ok, 3, 2, h, H, T) + c_t * dz
                            + c * _number(d_t, rows, ok, 3, 2, T), axis=0)  # fmt: skip
            else:
                s += tl.sum(e * l0 * _tile(phi, k, ok, 3, 0, h, H, T), axis=0)
                x += tl.sum(b * vx + c * dx, axis=0)
                y += tl.sum(b * vy + c * dy, axis=0)
                z += tl.sum(b * vz + c * dz, axis=0)
        _put_row(sums, atom, 4, 0, h, H, s)
        _put_row(sums, atom, 4, 1, h, H, x)
        _put_row(sums, atom, 4, 2, h, H, y)
        _put_row(sums, atom, 4, 3, h, H, z)


@triton.jit
def _put_tile(x, rows, ok, part: tl.constexpr, h, H, values):
    """A part of rows of (E, 3, H)."""
    tl.store(x + (rows[:, None] * 3 + part) * H + h[None, :], values, mask=ok[:, None] & (h < H)[None, :])


@triton.jit
def backward(
    phi, v, u, d, basis, w, bias, g_sums, i, order, offsets, g_phi, g_v, g_u, g_d, g_l, N, H,
    R: tl.constexpr, HB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of phi and v (N, 3, H), u (E, 1), d (E, 3), l (E, 3, H)."""
    T: tl.constexpr = u.dtype.element_ty
    h = tl.arange(0, HB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        s0, s1, s2 = tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T)
        x, y, z = tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T)
        p0, p1, p2 = _row(phi, atom, 3, 0, h, H, T), _row(phi, atom, 3, 1, h, H, T), _row(phi, atom, 3, 2, h, H, T)
        vx, vy, vz = _row(v, atom, 3, 0, h, H, T), _row(v, atom, 3, 1, h, H, T), _row(v, atom, 3, 2, h, H, T)
        end = tl.load(offsets + atom + 1)
        for place in range(tl.load(offsets + atom), end, ROWS):
            places = place + tl.arange(0, ROWS)
            ok = places < end
            rows = tl.load(order + places, mask=ok, other=0)
            k = tl.load(i + rows, mask=ok, other=0)
            e = _number(u, rows, ok, 1, 0, T)
            l0 = _filter(basis, rows, ok, w, bias, 0, h, H, R, ROWS, HB, True, T)
            l1 = _filter(basis, rows, ok, w, bias, 1, h, H, R, ROWS, HB, True, T)
            l2 = _filter(basis, rows, ok, w, bias, 2, h, H, R, ROWS, HB, True, T)
            dx, dy, dz = _number(d, rows, ok, 3, 0, T), _number(d, rows, ok, 3, 1, T), _number(d, rows, ok, 3, 2, T)
            g0, gx = _tile(g_sums, k, ok, 4, 0, h, H, T), _tile(g_sums, k, ok, 4, 1, h, H, T)
            gy, gz = _tile(g_sums, k, ok, 4, 2, h, H, T), _tile(g_sums, k, ok, 4, 3, h, H, T)
            g1, g2 = gx * vx + gy * vy + gz * vz, gx * dx + gy * dy + gz * dz
            b, c = e * l1 * p1, e * l2 * p2
            x += tl.sum(b * gx, axis=0)
            y += tl.sum(b * gy, axis=0)
            z += tl.sum(b * gz, axis=0)
            _put_numbers(g_d, rows, ok, 3, 0, tl.sum(c * gx, axis=1))
            _put_numbers(g_d, rows, ok, 3, 1, tl.sum(c * gy, axis=1))
            _put_numbers(g_d, rows, ok, 3, 2, tl.sum(c * gz, axis=1))
            s0 += tl.sum(e * l0 * g0, axis=0)
            s1 += tl.sum(e * l1 * g1, axis=0)
            s2 += tl.sum(e * l2 * g2, axis=0)
            _put_numbers(g_u, rows, ok, 1, 0, tl.sum(g0 * p0 * l0 + g1 * p1 * l1 + g2 * p2 * l2, axis=1))
            _put_tile(g_l, rows, ok, 0, h, H, e * g0 * p0)
            _put_tile(g_l, rows, ok, 1, h, H, e * g1 * p1)
            _put_tile(g_l, rows, ok, 2, h, H, e * g2 * p2)
        _put_rows(g_phi, atom, h, H, s0, s1, s2)
        _put_rows(g_v, atom, h, H, x, y, z)


@triton.jit
def _third(g_l, g_l_t, rows, ok, part: tl.constexpr, h, H, e, e_t, l, l_t, p, p_t, g, g_t):
    """Of one of the three x: writes the gradient of l and its tangent; gives that of phi, and of u, to be summed."""
    of_w, of_w_t = g * p, g_t * p + g * p_t
    _put_tile(g_l, rows, ok, part, h, H, e * of_w)
    _put_tile(g_l_t, rows, ok, part, h, H, e_t * of_w + e * of_w_t)
    return tl.sum((e_t * l + e * l_t) * g + e * l * g_t, axis=0), of_w_t * l + of_w * l_t


@triton.jit
def _both_filters(
    basis, basis_t, rows, ok, w, bias, part: tl.constexpr, h, H, R: tl.constexpr, ROWS: tl.constexpr, HB: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    l = _filter(basis, rows, ok, w, bias, part, h, H, R, ROWS, HB, True, T)
    return l, _filter(basis_t, rows, ok, w, bias, part, h, H, R, ROWS, HB, False, T)


@triton.jit
def backward_dual(
    phi, v, u, d, basis, w, bias, g_sums, phi_t, v_t, u_t, d_t, basis_t, g_sums_t, i, order, offsets,
    g_phi, g_v, g_u, g_d, g_l, g_l_t, N, H, R: tl.constexpr, HB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tangents of what `backward` gives, and the gradient of l. One x after the other: few values at once."""
    T: tl.constexpr = u.dtype.element_ty
    h = tl.arange(0, HB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        s0, s1, s2 = tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T)
        x, y, z = tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T), tl.zeros((HB,), dtype=T)
        end = tl.load(offsets + atom + 1)
        for place in range(tl.load(offsets + atom), end, ROWS):
            places = place + tl.arange(0, ROWS)
            ok = places < end
            rows = tl.load(order + places, mask=ok, other=0)
            k = tl.load(i + rows, mask=ok, other=0)
            e, e_t = _number(u, rows, ok, 1, 0, T), _number(u_t, rows, ok, 1, 0, T)

            p, p_t = _row(phi, atom, 3, 0, h, H, T), _row(phi_t, atom, 3, 0, h, H, T)
            l, l_t = _both_filters(basis, basis_t, rows, ok, w, bias, 0, h, H, R, ROWS, HB, T)
            g, g_t = _tile(g_sums, k, ok, 4, 0, h, H, T), _tile(g_sums_t, k, ok, 4, 0, h, H, T)
            more, of_u = _third(g_l, g_l_t, rows, ok, 0, h, H, e, e_t, l, l_t, p, p_t, g, g_t)
            s0 += more

            gx, gx_t = _tile(g_sums, k, ok, 4, 1, h, H, T), _tile(g_sums_t, k, ok, 4, 1, h, H, T)
            gy, gy_t = _tile(g_sums, k, ok, 4, 2, h, H, T), _tile(g_sums_t, k, ok, 4, 2, h, H, T)
            gz, gz_t = _tile(g_sums, k, ok, 4, 3, h, H, T), _tile(g_sums_t, k, ok, 4, 3, h, H, T)

            p, p_t = _row(phi, atom, 3, 2, h, H, T), _row(phi_t, atom, 3, 2, h, H, T)
            l, l_t = _both_filters(basis, basis_t, rows, ok, w, bias, 2, h, H, R, ROWS, HB, T)
            c, c_t = e * l * p, (e_t * l + e * l_t) * p + e * l * p_t
            _put_numbers(g_d, rows, ok, 3, 0, tl.sum(c_t * gx + c * gx_t, axis=1))
            _put_numbers(g_d, rows, ok, 3, 1, tl.sum(c_t * gy + c * gy_t, axis=1))
            _put_numbers(g_d, rows, ok, 3, 2, tl.sum(c_t * gz + c * gz_t, axis=1))
            ax, ax_t = _number(d, rows, ok, 3, 0, T), _number(d_t, rows, ok, 3, 0, T)
            ay, ay_t = _number(d, rows, ok, 3, 1, T), _number(d_t, rows, ok, 3, 1, T)
            az, az_t = _number(d, rows, ok, 3, 2, T), _number(d_t, rows, ok, 3, 2, T)
            g = gx * ax + gy * ay + gz * az
            g_t = gx_t * ax + gy_t * ay + gz_t * az + gx * ax_t + gy * ay_t + gz * az_t
            more, more_of_u = _third(g_l, g_l_t, rows, ok, 2, h, H, e, e_t, l, l_t, p, p_t, g, g_t)
            s2, of_u = s2 + more, of_u + more_of_u

            p, p_t = _row(phi, atom, 3, 1, h, H, T), _row(phi_t, atom, 3, 1, h, H, T)
            l, l_t = _both_filters(basis, basis_t, rows, ok, w, bias, 1, h, H, R, ROWS, HB, T)
            c, c_t = e * l * p, (e_t * l + e * l_t) * p + e * l * p_t
            x += tl.sum(c_t * gx + c * gx_t, axis=0)
            y += tl.sum(c_t * gy + c * gy_t, axis=0)
            z += tl.sum(c_t * gz + c * gz_t, axis=0)
            vx, vx_t = _row(v, atom, 3, 0, h, H, T), _row(v_t, atom, 3, 0, h, H, T)
            vy, vy_t = _row(v, atom, 3, 1, h, H, T), _row(v_t, atom, 3, 1, h, H, T)
            vz, vz_t = _row(v, atom, 3, 2, h, H, T), _row(v_t, atom, 3, 2, h, H, T)
            g = gx * vx + gy * vy + gz * vz
            g_t = gx_t * vx + gy_t * vy + gz_t * vz + gx * vx_t + gy * vy_t + gz * vz_t
            more, more_of_u = _third(g_l, g_l_t, rows, ok, 1, h, H, e, e_t, l, l_t, p, p_t, g, g_t)
            s1 += more
            _put_numbers(g_u, rows, ok, 1, 0, tl.sum(of_u + more_of_u, axis=1))
        _put_rows(g_phi, atom, h, H, s0, s1, s2)
        _put_rows(g_v, atom, h, H, x, y, z)
