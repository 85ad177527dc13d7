"""What native code is made of: C++ for products and elements, and what operations are in it."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef void (*Gemm)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                     const int*, const float*, const int*, const float*, float*, const int*);
// Branches are selections, so that compilers make vectors of all this. At most 2.5 units in the last place off, as the
// kernels of PyTorch are; infinities and NaN come out as there.
static inline float exponential(float x) {
    float y = x < 89.0f ? x : 89.0f;
    y = y > -104.0f ? y : -104.0f;
    float k = rintf(y * 1.44269504088896341f);
    float r = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, y));
    float p = fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p * r, r, r) + 1.0f;
    int32_t whole = (int32_t)k, half = whole >> 1, rest = whole - half;
    int32_t low = (half + 127) << 23, high = (rest + 127) << 23;
    float first, second;
    memcpy(&first, &low, 4);
    memcpy(&second, &high, 4);
    return x != x ? x : p * first * second;
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
static inline float tangent(float x) {
    float a = fabsf(x), z = x * x;
    float q = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
    q = fmaf(q, z, -5.37397155531e-2f);
    q = fmaf(q, z, 1.33314422036e-1f);
    q = fmaf(q, z, -3.33332819422e-1f);
    q = fmaf(q * z, a, a);
    float e = 1.0f - 2.0f / (exponential(2.0f * a) + 1.0f);
    return copysignf(a < 0.625f ? q : e, x);
}
// c = a b, or c + a b; all row by row; b has `width` columns and lies transposed if `turned`.
static void product(Gemm gemm, int64_t rows, int64_t width, int64_t depth, const float* a, int64_t a_step,
                    const float* b, int64_t turned, float* c, int64_t c_step, float kept) {
    int m = (int)width, n = (int)rows, k = (int)depth, lda = (int)(turned ? depth : width);
    int ldb = (int)a_step, ldc = (int)c_step;
    float one = 1.0f;
    gemm(turned ? "T" : "N", "N", &m, &n, &k, &one, b, &lda, a, &ldb, &kept, c, &ldc);
}
"""

EXPRESSIONS: dict[Any, str] = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.mul.Tensor: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.neg.default: "-{0}",
    aten.clone.default: "{0}",
    aten.sigmoid.default: "sigmoid({0})",
    aten.tanh.default: "tangent({0})",
    aten.relu.default: "({0} < 0.0f ? 0.0f : {0})",
    aten.addcmul.default: "{0} + {1} * {2}",
    aten.sigmoid_backward.default: "{0} * (1.0f - {1}) * {1}",
    aten.tanh_backward.default: "{0} * (1.0f - {1} * {1})",
    aten.threshold_backward.default: "({1} <= {2} ? 0.0f : {0})",
}
"""What is done to each element; arguments are tensors and numbers, in order."""

PRODUCTS = (aten.mm.default, aten.addmm.default)
JOINING = (aten.cat.default, aten.stack.default)
