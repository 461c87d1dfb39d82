"""Losses of distillation against their formulas in NumPy, float64, and the laws that they follow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.errors import OptionError
from xlathe.passes.distill import losses

RNG = np.random.default_rng(0)
STUDENT = (2 * RNG.normal(size=(3, 4, 50))).astype(np.float32)
TEACHER = (2 * RNG.normal(size=(3, 4, 50))).astype(np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def near(found: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_and_reverse_kl(temperature: float) -> None:
    s, t = softmax(STUDENT, temperature), softmax(TEACHER, temperature)
    near(losses.forward_kl(STUDENT, TEACHER, temperature), temperature**2 * kl(t, s))
    near(losses.reverse_kl(STUDENT, TEACHER, temperature), temperature**2 * kl(s, t))


def test_gradients_of_forward_kl_are_tau_times_the_difference_of_probabilities() -> None:
    for temperature in (1.0, 4.0):
        found = jax.grad(lambda s, tau=temperature: losses.forward_kl(s, TEACHER, tau).sum())(STUDENT)
        expected = temperature * (softmax(STUDENT, temperature) - softmax(TEACHER, temperature))
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_gradients_keep_their_size_at_high_temperature() -> None:
    """For tau far above the logits, tau^2 KL has the gradient of the squared error of centered logits over twice V."""
    found = jax.grad(lambda s: losses.forward_kl(s, TEACHER, 1000.0).sum())(STUDENT)
    apart = STUDENT.astype(np.float64) - TEACHER
    np.testing.assert_allclose(found, (apart - apart.mean(-1, keepdims=True)) / 50, atol=2e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd(beta: float) -> None:
    s, t = softmax(STUDENT, 2.0), softmax(TEACHER, 2.0)
    mixed = beta * t + (1 - beta) * s
    near(losses.jsd(STUDENT, TEACHER, beta, 2.0), 4 * (beta * kl(t, mixed) + (1 - beta) * kl(s, mixed)))


def test_jsd_has_the_divergences_at_its_ends_and_their_slopes_beside_them() -> None:
    student, teacher = STUDENT / 8, TEACHER / 8  # close to each other: the next power of beta is small
    forward, reverse = (each(student, teacher) for each in (losses.forward_kl, losses.reverse_kl))
    np.testing.assert_array_equal(losses.jsd(student, teacher, 0), forward)
    np.testing.assert_array_equal(losses.jsd(student, teacher, 1), reverse)
    np.testing.assert_allclose(losses.jsd(student, teacher, 0.01) / 0.01, forward, rtol=0.03)
    np.testing.assert_allclose(losses.jsd(student, teacher, 0.99) / 0.01, reverse, rtol=0.03)
    with pytest.raises(OptionError, match=r"beta=1\.5"):
        losses.jsd(student, teacher, 1.5)


def test_jsd_is_symmetric_at_a_half_and_never_negative_where_both_are_alike() -> None:
    np.testing.assert_allclose(losses.jsd(STUDENT, TEACHER), losses.jsd(TEACHER, STUDENT), rtol=1e-5)
    close = (TEACHER + 1e-3 * STUDENT).astype(jnp.bfloat16)
    assert float(losses.jsd(close, TEACHER.astype(jnp.bfloat16)).min()) >= -1e-6


def test_cross_entropy() -> None:
    tokens = RNG.integers(0, 50, (3, 4)).astype(np.int32)
    picked = np.take_along_axis(softmax(STUDENT), tokens[..., None], -1)[..., 0]
    near(losses.cross_entropy(STUDENT, tokens), -np.log(picked))


@pytest.mark.parametrize("k", [1, 8, 49])
def test_top_k_and_one_bucket_of_all_others(k: int) -> None:
    s, t = softmax(STUDENT, 1.5), softmax(TEACHER, 1.5)
    order = np.argsort(-t, -1)

    def bucketed(p: np.ndarray) -> np.ndarray:
        ordered = np.take_along_axis(p, order, -1)
        return np.concatenate([ordered[..., :k], ordered[..., k:].sum(-1, keepdims=True)], -1)

    found = losses.top_k_kl(STUDENT, losses.top_k(TEACHER, k, 1.5), 1.5)
    near(found, 1.5**2 * kl(bucketed(t), bucketed(s)))


def test_top_k_grows_to_the_whole_divergence() -> None:
    whole = losses.forward_kl(STUDENT, TEACHER)
    parts = [losses.top_k_kl(STUDENT, losses.top_k(TEACHER, k)) for k in (1, 2, 4, 8, 16, 32, 49, 50)]
    for less, more in itertools.pairwise(parts):
        assert np.all(np.asarray(less) <= np.asarray(more) + 1e-6)
    near(parts[-1], whole)
    gradient = jax.grad(lambda s: losses.top_k_kl(s, losses.top_k(TEACHER, 50)).sum())(STUDENT)
    np.testing.assert_allclose(gradient, softmax(STUDENT) - softmax(TEACHER), atol=2e-6)


def test_top_k_sees_what_the_student_puts_elsewhere() -> None:
    top = losses.top_k(TEACHER, 8)
    away = STUDENT + 20.0
    np.put_along_axis(away, np.asarray(top.ids), np.take_along_axis(STUDENT, np.asarray(top.ids), -1), -1)
    assert float(losses.top_k_kl(away, top).min()) > 10 > float(losses.top_k_kl(STUDENT, top).max())


def test_features() -> None:
    s, t = (x.astype(np.float64) for x in (STUDENT, TEACHER))
    near(losses.squared_error(STUDENT, TEACHER), ((s - t) ** 2).mean(-1) / (t**2).mean(-1))
    norms = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(losses.cosine_distance(STUDENT, TEACHER), 1 - (s * t).sum(-1) / norms, atol=2e-6)
    assert float(losses.cosine_distance(jnp.zeros(5), jnp.ones(5))) == 1.0
    assert np.isfinite(jax.grad(lambda x: losses.cosine_distance(x, jnp.ones(5)))(jnp.zeros(5))).all()


def test_padding_changes_nothing() -> None:
    values = losses.forward_kl(STUDENT, TEACHER)
    expected = losses.masked_sum(values, jnp.ones((3, 4), bool))
    padding = ((0, 2), (0, 3))
    other = RNG.normal(size=(2, 5, 7, 50)).astype(np.float32)
    other[0, :3, :4], other[1, :3, :4] = STUDENT, TEACHER
    found = losses.masked_sum(losses.forward_kl(*other), np.pad(np.ones((3, 4), bool), padding))
    assert float(found[1]) == float(expected[1]) == 12
    near(found[0], np.float64(expected[0]))
