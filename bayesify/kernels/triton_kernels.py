"""What runs on CUDA: noise, draw, its backward and the KL divergence, as Triton kernels.

Each program treats ``BLOCK`` elements of one tensor. :mod:`.triton_draw` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _uniform(word):
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _turn(v):
    """Cosine and sine of ``2 pi v`` for v in [0, 1], in float32.

    The polynomials are those of cosf and sinf of Cephes (Moshier, 1989), exact to 1e-7. Those of
    CUDA's library reduce arguments of any size, which costs more than all else here.
    """
    quarter = (4.0 * v + 0.5).to(tl.int32)
    x = (4.0 * v - quarter.to(tl.float32)) * 1.5707963267948966
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    tail = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * z + z * z * tail
    odd = (quarter & 1) == 1
    far, near = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    far = tl.where(((quarter + 1) & 2) == 2, -far, far)
    return far, tl.where((quarter & 2) == 2, -near, near)


@triton.jit
def _box_muller(first, second, WIDE: tl.constexpr):
    u, v = _uniform(first), _uniform(second)
    if WIDE:
        angle = 6.283185307179586 * v.to(tl.float64)
        cos, sin = tl.cos(angle), tl.sin(angle)
        u = u.to(tl.float64)
    else:
        cos, sin = _turn(v)
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * cos, radius * sin


@triton.jit
def _normals(seed, key, start, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Noise of the elements from ``start``, a multiple of 4: four numbers of each Philox block."""
    block = start // 4 + tl.arange(0, BLOCK // 4)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    key = key.to(tl.int64)
    key_low = (key & 0xFFFFFFFF).to(tl.uint32) + low * 0
    key_high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32) + low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, key_low, key_high)
    n0, n1 = _box_muller(w0, w1, WIDE)
    n2, n3 = _box_muller(w2, w3, WIDE)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit(do_not_specialize=["seed", "key"])
def noise_kernel(out, seed: tl.int64, key: tl.int64, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    tl.store(out + at, _normals(seed, key, start, WIDE, BLOCK), mask=at < n)


@triton.jit
def _draw_part(
    mean, logvar, out, seed, key, start, n,
    MASKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    mask = at < n if MASKED else None
    noise = _normals(seed, key, start, WIDE, BLOCK)
    std = tl.exp(0.5 * tl.load(logvar + at, mask=mask)).to(noise.dtype)
    value = tl.load(mean + at, mask=mask).to(noise.dtype) + std * noise
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def draw_kernel(
    table, rows, TYPE: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """``out = mean + exp(logvar / 2) * noise`` for the tensor of each row of ``table``."""
    program = tl.program_id(0)
    entry = table + tl.load(rows + program) * 7
    mean = tl.multiple_of(tl.load(entry).to(tl.pointer_type(TYPE)), 16)
    logvar = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    out = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(OUT)), 16)
    seed = tl.load(entry + 3)
    key = tl.load(entry + 4)
    n = tl.load(entry + 5)
    start = (program - tl.load(entry + 6)) * BLOCK
    # a mask of unknown alignment would turn every access into one of a single element
    if start + BLOCK <= n:
        _draw_part(mean, logvar, out, seed, key, start, n, False, WIDE, BLOCK)
    else:
        _draw_part(mean, logvar, out, seed, key, start, n, True, WIDE, BLOCK)


@triton.jit
def _excess(x):
    """``exp(x) - 1 - x``, also where it is small."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040))
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0 - x)


@triton.jit(do_not_specialize=["seed", "key"])
def backward_kernel(
    mean, logvar, grad, kl, prior_mean, prior_var, by_mean, by_logvar,
    seed: tl.int64, key: tl.int64, n,
    DRAWN: tl.constexpr, KL: tl.constexpr, HELD: tl.constexpr,
    MEAN_STRIDE: tl.constexpr, VAR_STRIDE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``by_logvar = grad std noise / 2 + kl (e^l / v - 1) / 2``; with a KL divergence also
    ``by_mean = grad + kl (m - p) / v``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    mask = at < n
    raw = tl.load(logvar + at, mask=mask)
    to_mean = tl.zeros((BLOCK,), tl.float32)
    to_logvar = tl.zeros((BLOCK,), tl.float32)
    if DRAWN:
        noise = _normals(seed, key, start, WIDE, BLOCK)
        upstream = tl.load(grad + at, mask=mask).to(noise.dtype)
        to_logvar = (upstream * (0.5 * tl.exp(0.5 * raw).to(noise.dtype) * noise)).to(tl.float32)
        to_mean = upstream.to(tl.float32)
    if KL:
        factor = tl.load(kl)
        var = tl.load(prior_var + at * VAR_STRIDE, mask=mask, other=1.0)
        difference = tl.load(mean + at, mask=mask) - tl.load(
            prior_mean + at * MEAN_STRIDE, mask=mask
        )
        if HELD:  # below HELD of gaussian.py: pruned or fixed, without a KL
            held = raw < -2048.0
            difference = tl.where(held, 0.0, difference)
            var = tl.where(held, 1.0, var)
            raw = tl.where(held, 0.0, raw)
        ratio = raw - tl.log(var)
        to_mean += factor * difference / var
        to_logvar += 0.5 * factor * (_excess(ratio) + ratio)
        tl.store(by_mean + at, to_mean, mask=mask)
    tl.store(by_logvar + at, to_logvar, mask=mask)


@triton.jit
def _kl_part(
    mean, logvar, prior_mean, prior_var, mean_stride, var_stride, has_held, start, n,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    mask = at < n if MASKED else None
    other = 0.0 if MASKED else None
    var = tl.load(prior_var + at * var_stride, mask=mask, other=1.0 if MASKED else None)
    difference = tl.load(mean + at, mask=mask, other=other)
    difference -= tl.load(prior_mean + at * mean_stride, mask=mask, other=other)
    raw = tl.load(logvar + at, mask=mask, other=other)
    held = (raw < -2048.0) & (has_held != 0)
    terms = _excess(tl.where(held, 0.0, raw) - tl.log(var)) + difference * difference / var
    return tl.sum(tl.where(held, 0.0, terms))


@triton.jit
def kl_kernel(table, rows, partial, BLOCK: tl.constexpr):
    """Twice the KL divergence of each block, for the tensors of ``table``."""
    program = tl.program_id(0)
    entry = table + tl.load(rows + program) * 9
    mean = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16)
    logvar = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    prior_mean = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    prior_var = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    mean_stride, var_stride = tl.load(entry + 4), tl.load(entry + 5)
    n = tl.load(entry + 6)
    start = (program - tl.load(entry + 7)) * BLOCK
    has_held = tl.load(entry + 8)
    if start + BLOCK <= n:
        total = _kl_part(
            mean,
            logvar,
            prior_mean,
            prior_var,
            mean_stride,
            var_stride,
            has_held,
            start,
            n,
            False,
            BLOCK,
        )
    else:  # what is masked out is N(0, 1) beside N(0, 1)
        total = _kl_part(
            mean,
            logvar,
            prior_mean,
            prior_var,
            mean_stride,
            var_stride,
            has_held,
            start,
            n,
            True,
            BLOCK,
        )
    tl.store(partial + program, total)
