"""Triton kernels for what lies between the matrix products of EGNN's edges; `egnn.py` beside this calls them.

    z1 = a_i + c_j + f W_p     y = silu(z1)                     first
    z2 = y W_m + b             n = silu(z2),  g = sigmoid(n . w_g + b_g),  m = g n,  S_i = sum_j u m      middle
    z3 = m W_v + b             phi = silu(z3) W_w + b           last

Each has a form for the backward pass, and each of the six another for directional derivatives (DUAL): then every
number x has a tangent x_t beside it, and the kernel writes tangents. Loads and stores are in the type of the products,
arithmetic and sums in the type of the geometry (float32, in tests float64).

A program takes an atom and, ROWS at a time, the edges that it receives: all K hidden units of each (KB, a power of
two, of which K are there). So gates are sums within a program, sums to the receiver are no atomic additions, and sums
over all edges (gradients of biases) leave one row of a program.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    """silu, and its first and second derivative."""
    s = 1.0 / (1.0 + tl.exp(-x))
    y = x * s
    slope = s + y * (1.0 - s)
    return y, slope, (1.0 - s) * (s + slope - y * s)


@triton.jit
def _rows(x, rows, inside, k, K, T: tl.constexpr):
    """Some rows of (..., K)."""
    return tl.load(x + rows[:, None] * K + k[None, :], mask=inside, other=0.0).to(T)


@triton.jit
def _put(x, rows, inside, k, K, values):
    tl.store(x + rows[:, None] * K + k[None, :], values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _row(x, row, k, K, T: tl.constexpr):
    """One row of (..., K), zero behind it."""
    return tl.load(x + row * K + k, mask=k < K, other=0.0).to(T)


@triton.jit
def _narrow_times_wide(x, rows, ok, w, k, K, C: tl.constexpr, ROWS: tl.constexpr, KB: tl.constexpr, T: tl.constexpr):
    """x (rows, C) w (C, K), without tensor cores: C is small, and float32 stays float32."""
    out = tl.zeros((ROWS, KB), dtype=T)
    for c in range(C):
        out += tl.load(x + rows * C + c, mask=ok, other=0.0).to(T)[:, None] * _row(w, c, k, K, T)[None, :]
    return out


@triton.jit
def _put_wide_times_narrow(out, rows, ok, x, w, bias, k, K, C: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr):
    """out (rows, C) = x (rows, K) w (C, K)^T, and the bias (C,)."""
    for c in range(C):
        column = tl.sum(x * _row(w, c, k, K, T)[None, :], axis=1)
        if BIAS:
            column += tl.load(bias + c).to(T)
        tl.store(out + rows * C + c, column.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _gate(n, w_gate, b_gate, k, K, T: tl.constexpr):
    """(rows,) between 0 and 1; and the weights."""
    w = _row(w_gate, 0, k, K, T)
    return 1.0 / (1.0 + tl.exp(-(tl.sum(n * w[None, :], axis=1) + tl.load(b_gate).to(T)))), w


@triton.jit
def first(
    a, c, f, w_pair, a_t, c_t, f_t, j, offsets, y, N, K,
    P: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """y (E, K), or its tangent, which is written to y too."""
    T: tl.constexpr = f.dtype.element_ty
    k = tl.arange(0, KB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        end = tl.load(offsets + atom + 1)
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            sent = tl.load(j + rows, mask=ok, other=0)
            z = _row(a, atom, k, K, T)[None, :] + _rows(c, sent, inside, k, K, T)
            z += _narrow_times_wide(f, rows, ok, w_pair, k, K, P, ROWS, KB, T)
            value, slope, _ = _silu(z)
            if DUAL:
                z_t = _row(a_t, atom, k, K, T)[None, :] + _rows(c_t, sent, inside, k, K, T)
                z_t += _narrow_times_wide(f_t, rows, ok, w_pair, k, K, P, ROWS, KB, T)
                value = slope * z_t
            _put(y, rows, inside, k, K, value)


@triton.jit
def middle(
    z, u, w_gate, b_gate, z_t, u_t, offsets, m, sums, N, K,
    KB: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """m (E, K) and the sums u m of every atom (N, K), or their tangents."""
    T: tl.constexpr = u.dtype.element_ty
    k = tl.arange(0, KB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        total = tl.zeros((KB,), dtype=T)
        end = tl.load(offsets + atom + 1)
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            n, slope, _ = _silu(_rows(z, rows, inside, k, K, T))
            g, w = _gate(n, w_gate, b_gate, k, K, T)
            envelope = tl.load(u + rows, mask=ok, other=0.0)
            if DUAL:
                n_t = slope * _rows(z_t, rows, inside, k, K, T)
                g_t = g * (1.0 - g) * tl.sum(n_t * w[None, :], axis=1)
                value = g_t[:, None] * n + g[:, None] * n_t
                total += tl.sum(envelope[:, None] * value, axis=0)
                total += tl.sum((tl.load(u_t + rows, mask=ok, other=0.0) * g)[:, None] * n, axis=0)
            else:
                value = g[:, None] * n
                total += tl.sum(envelope[:, None] * value, axis=0)
            _put(m, rows, inside, k, K, value)
        tl.store(sums + atom * K + k, total.to(sums.dtype.element_ty), mask=k < K)


@triton.jit
def last(
    z, w, b, z_t, offsets, phi, N, K,
    C: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """phi (E, C), or its tangent."""
    T: tl.constexpr = phi.dtype.element_ty
    k = tl.arange(0, KB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        end = tl.load(offsets + atom + 1)
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            value, slope, _ = _silu(_rows(z, rows, inside, k, K, T))
            if DUAL:
                value = slope * _rows(z_t, rows, inside, k, K, T)
            _put_wide_times_narrow(phi, rows, ok, value, w, b, k, K, C, not DUAL, T)


@triton.jit
def last_back(
    z, w, g_phi, z_t, g_phi_t, offsets, g_z, y, g_z_t, y_t, g_bias, N, K,
    C: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Gradient of z3 and, for that of W_w, y = silu(z3), (E, K); of the bias of z3, a row of each program."""
    T: tl.constexpr = g_phi.dtype.element_ty
    k = tl.arange(0, KB)
    of_bias = tl.zeros((KB,), dtype=T)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        end = tl.load(offsets + atom + 1)
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            value, slope, bend = _silu(_rows(z, rows, inside, k, K, T))
            g = _narrow_times_wide(g_phi, rows, ok, w, k, K, C, ROWS, KB, T)
            _put(y, rows, inside, k, K, value)
            _put(g_z, rows, inside, k, K, g * slope)
            if DUAL:
                z_tangent = _rows(z_t, rows, inside, k, K, T)
                g_t = _narrow_times_wide(g_phi_t, rows, ok, w, k, K, C, ROWS, KB, T)
                g_t = g_t * slope + g * bend * z_tangent
                _put(y_t, rows, inside, k, K, slope * z_tangent)
                _put(g_z_t, rows, inside, k, K, g_t)
                of_bias += tl.sum(g_t, axis=0)
            else:
                of_bias += tl.sum(g * slope, axis=0)
    tl.store(g_bias + tl.program_id(0) * K + k, of_bias, mask=k < K)


@triton.jit
def middle_back(
    z, u, w_gate, b_gate, g_m, g_sums, offsets, g_z, m, g_u, g_bias, g_gate, N, K,
    KB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of z2, and m again, (E, K); of u (E,). Of the bias of z2 and of the gate (K weights, a bias): rows.

    g_m is the part of m's gradient that comes from z3.
    """
    T: tl.constexpr = u.dtype.element_ty
    k = tl.arange(0, KB)
    of_bias, of_gate = tl.zeros((KB,), dtype=T), tl.zeros((KB,), dtype=T)
    of_gate_bias = 0.0 * tl.load(b_gate).to(T)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        end = tl.load(offsets + atom + 1)
        q = _row(g_sums, atom, k, K, T)[None, :]
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            n, slope, _ = _silu(_rows(z, rows, inside, k, K, T))
            g, w = _gate(n, w_gate, b_gate, k, K, T)
            value = g[:, None] * n
            of_m = tl.load(u + rows, mask=ok, other=0.0)[:, None] * q + _rows(g_m, rows, inside, k, K, T)
            logit = tl.sum(of_m * n, axis=1) * g * (1.0 - g)
            of_z = (g[:, None] * of_m + logit[:, None] * w[None, :]) * slope
            _put(m, rows, inside, k, K, value)
            _put(g_z, rows, inside, k, K, of_z)
            tl.store(g_u + rows, tl.sum(q * value, axis=1), mask=ok)
            of_bias += tl.sum(of_z, axis=0)
            of_gate += tl.sum(logit[:, None] * n, axis=0)
            of_gate_bias += tl.sum(logit, axis=0)
    tl.store(g_bias + tl.program_id(0) * K + k, of_bias, mask=k < K)
    tl.store(g_gate + tl.program_id(0) * (K + 1) + k, of_gate, mask=k < K)
    tl.store(g_gate + tl.program_id(0) * (K + 1) + K, of_gate_bias)


@triton.jit
def middle_back_dual(
    z, u, w_gate, b_gate, g_m, g_sums, z_t, u_t, g_m_t, g_sums_t, offsets, g_z, g_z_t, m, m_t, g_u_t, g_bias, g_gate,
    N, K, KB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tangents of what `middle_back` gives; and the gradient of z2 and both values of m, for those of weights."""
    T: tl.constexpr = u.dtype.element_ty
    k = tl.arange(0, KB)
    of_bias, of_gate = tl.zeros((KB,), dtype=T), tl.zeros((KB,), dtype=T)
    of_gate_bias = 0.0 * tl.load(b_gate).to(T)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        end = tl.load(offsets + atom + 1)
        q, q_t = _row(g_sums, atom, k, K, T)[None, :], _row(g_sums_t, atom, k, K, T)[None, :]
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            n, slope, bend = _silu(_rows(z, rows, inside, k, K, T))
            z_tangent = _rows(z_t, rows, inside, k, K, T)
            n_t = slope * z_tangent
            g, w = _gate(n, w_gate, b_gate, k, K, T)
            p = g * (1.0 - g)
            g_t = p * tl.sum(n_t * w[None, :], axis=1)
            value_t = g_t[:, None] * n + g[:, None] * n_t
            _put(m, rows, inside, k, K, g[:, None] * n)
            _put(m_t, rows, inside, k, K, value_t)
            tl.store(g_u_t + rows, tl.sum(q_t * g[:, None] * n + q * value_t, axis=1), mask=ok)

            e, e_t = tl.load(u + rows, mask=ok, other=0.0), tl.load(u_t + rows, mask=ok, other=0.0)
            of_m = e[:, None] * q + _rows(g_m, rows, inside, k, K, T)
            of_m_t = e_t[:, None] * q + e[:, None] * q_t + _rows(g_m_t, rows, inside, k, K, T)
            along = tl.sum(of_m * n, axis=1)
            logit = along * p
            logit_t = tl.sum(of_m_t * n + of_m * n_t, axis=1) * p + along * (1.0 - 2.0 * g) * g_t
            of_n = g[:, None] * of_m + logit[:, None] * w[None, :]
            of_n_t = g_t[:, None] * of_m + g[:, None] * of_m_t + logit_t[:, None] * w[None, :]
            of_z_t = of_n_t * slope + of_n * bend * z_tangent
            _put(g_z, rows, inside, k, K, of_n * slope)
            _put(g_z_t, rows, inside, k, K, of_z_t)
            of_bias += tl.sum(of_z_t, axis=0)
            of_gate += tl.sum(logit_t[:, None] * n + logit[:, None] * n_t, axis=0)
            of_gate_bias += tl.sum(logit_t, axis=0)
    tl.store(g_bias + tl.program_id(0) * K + k, of_bias, mask=k < K)
    tl.store(g_gate + tl.program_id(0) * (K + 1) + k, of_gate, mask=k < K)
    tl.store(g_gate + tl.program_id(0) * (K + 1) + K, of_gate_bias)


@triton.jit
def first_back(
    a, c, f, w_pair, g_y, a_t, c_t, f_t, g_y_t, j, offsets, g_z, g_z_t, g_a, g_f, N, K,
    P: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Gradient of z1 (E, K), of a (N, K) and of f (E, P); with DUAL tangents of all, and that of z1 itself too."""
    T: tl.constexpr = f.dtype.element_ty
    k = tl.arange(0, KB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        total = tl.zeros((KB,), dtype=T)
        end = tl.load(offsets + atom + 1)
        for edge in range(tl.load(offsets + atom), end, ROWS):
            rows = edge + tl.arange(0, ROWS)
            ok = rows < end
            inside = ok[:, None] & (k < K)[None, :]
            sent = tl.load(j + rows, mask=ok, other=0)
            x = _row(a, atom, k, K, T)[None, :] + _rows(c, sent, inside, k, K, T)
            x += _narrow_times_wide(f, rows, ok, w_pair, k, K, P, ROWS, KB, T)
            _, slope, bend = _silu(x)
            of_y = _rows(g_y, rows, inside, k, K, T)
            value = of_y * slope
            _put(g_z, rows, inside, k, K, value)
            if DUAL:
                x_t = _row(a_t, atom, k, K, T)[None, :] + _rows(c_t, sent, inside, k, K, T)
                x_t += _narrow_times_wide(f_t, rows, ok, w_pair, k, K, P, ROWS, KB, T)
                value = _rows(g_y_t, rows, inside, k, K, T) * slope + of_y * bend * x_t
                _put(g_z_t, rows, inside, k, K, value)
            total += tl.sum(value, axis=0)
            _put_wide_times_narrow(g_f, rows, ok, value, w_pair, w_pair, k, K, P, False, T)
        tl.store(g_a + atom * K + k, total, mask=k < K)


@triton.jit
def by_sender(x, order, offsets, sums, N, K, KB: tl.constexpr, ROWS: tl.constexpr):
    """Sums (N, K) of the rows of x (E, K) to their senders."""
    T: tl.constexpr = sums.dtype.element_ty
    k = tl.arange(0, KB)
    for atom in range(tl.program_id(0), N, tl.num_programs(0)):
        total = tl.zeros((KB,), dtype=T)
        end = tl.load(offsets + atom + 1)
        for place in range(tl.load(offsets + atom), end, ROWS):
            places = place + tl.arange(0, ROWS)
            ok = places < end
            rows = tl.load(order + places, mask=ok, other=0)
            total += tl.sum(_rows(x, rows, ok[:, None] & (k < K)[None, :], k, K, T), axis=0)
        tl.store(sums + atom * K + k, total, mask=k < K)
