"""Tests of brain_jax.convolutions: against the operations of JAX and Flax that they stand for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brain_jax import convolutions

# Odd and even sizes, fewer rows than the kernel has.
SHAPES = [(2, 9, 12, 6), (3, 2, 5, 6)]
CASES = [
    (convolutions.pointwise_convolution, 1, 1),
    (convolutions.convolution_3x3, 3, 1),
    (convolutions.stem_convolution, 7, 2),
]


def convolve(x, kernel, stride):
    reach = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(reach, reach)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('function', 'size', 'stride'), CASES)
def test_convolutions(function, size, stride, shape):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = jnp.array(rng.normal(size=shape)), jnp.array(rng.normal(size=(size, size, shape[-1], 4)))
        expected, expected_gradients = jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)
        found, gradients = jax.vjp(function, x, kernel)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        grad = jnp.array(rng.normal(size=found.shape))
        for ours, theirs in zip(gradients(grad), expected_gradients(grad), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize('shape', SHAPES)
def test_max_pool(shape):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.array(rng.normal(size=shape))
        expected, expected_gradient = jax.vjp(
            lambda x: nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))), x
        )
        found, gradient = jax.vjp(convolutions.max_pool, x)
        np.testing.assert_array_equal(found, expected)
        grad = jnp.array(rng.normal(size=found.shape))
        np.testing.assert_allclose(gradient(grad)[0], expected_gradient(grad)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(('function', 'size', 'stride'), CASES[1:])
def test_accelerators_convolve(function, size, stride):
    x, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((size, size, 6, 4))
    step = jax.jit(jax.grad(lambda x, kernel: jnp.sum(function(x, kernel) ** 2), argnums=(0, 1))).trace(x, kernel)
    counts = {
        platform: [text.count(name) for name in ('stablehlo.convolution', 'stablehlo.dot_general')]
        for platform in ('cpu', 'cuda', 'tpu')
        if (text := step.lower(lowering_platforms=(platform,)).as_text())
    }
    # There, both gradients are convolutions; on CPU that of the kernel, or both, are products.
    assert counts['cuda'] == counts['tpu'] == [3, 0]
    assert counts['cpu'][0] < 3 and counts['cpu'][1] > 0
