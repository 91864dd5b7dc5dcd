import numpy as np
import pytest
import torch

from trainer.recipe.counter_random import mix, random_bits, uniform

STEP = 0x9E3779B97F4A7C15


def splitmix64(state: int, num: int) -> list[int]:
    """Steele, Lea and Flood's generator in plain integers."""
    out = []
    for _ in range(num):
        state = (state + STEP) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def as_int64(values: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64))


def test_mix_gives_the_published_outputs_of_splitmix64() -> None:
    # First outputs for seed 1234567, as listed with the reference implementation and on Rosetta Code.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4) == published
    states = as_int64([(1234567 + STEP * k) % 2**64 for k in range(1, 5)])
    assert torch.equal(mix(states), as_int64(published))


@pytest.mark.parametrize("seed", [0, 7, -3, 2**63, 2**64 - 1, 10**30])
def test_bits_are_those_of_a_splitmix64_seeded_by_the_hashed_sample(seed: int) -> None:
    indices = [0, 1, 12345, 2**40, 2**62]
    for i, row in zip(indices, random_bits(seed, torch.tensor(indices)[:, None], 0, torch.arange(5)), strict=True):
        (state,) = splitmix64((i * STEP + seed - STEP) % 2**64, 1)
        assert torch.equal(row, as_int64(splitmix64(state, 5)))


def test_uniform_equals_the_numpy_hash_on_many_samples() -> None:
    index = np.arange(10_000, dtype=np.uint64)

    def finalise(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    counter = np.uint64(((3 << 32) + 8) * STEP % 2**64)
    expected = (finalise(finalise(index * np.uint64(STEP) + np.uint64(5)) + counter) >> np.uint64(40)) / 2.0**24
    found = uniform(5, torch.arange(10_000), 3, 7)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))


def test_tensors_of_views_and_draws_give_the_numbers_of_single_calls() -> None:
    index, view, draw = torch.arange(5), torch.arange(3)[:, None, None], torch.arange(4)[:, None]
    block = uniform(1, index, view, draw)
    assert block.shape == (3, 4, 5)
    for v in range(3):
        for d in range(4):
            assert torch.equal(block[v, d], uniform(1, index, v, d))


def test_numbers_are_uniform_and_independent_over_every_argument() -> None:
    base = torch.arange(1 << 16)
    streams = [uniform(0, base, 0, 0), uniform(1, base, 0, 0), uniform(0, base, 1, 0), uniform(0, base, 0, 1)]
    streams.append(uniform(0, base + 1, 0, 0))
    values = torch.stack(streams)
    assert values.min() >= 0
    assert values.max() < 1
    for stream in values:  # chi-square with 255 degrees of freedom: 255 ± 5 standard deviations of 22.6
        counts = torch.histc(stream, bins=256, min=0, max=1)
        assert abs(((counts - 256) ** 2 / 256).sum().item() - 255) < 113
    correlation = torch.corrcoef(values) - torch.eye(5)
    correlation[0, 4] = correlation[4, 0] = 0  # the same stream shifted by one: tested for serial correlation below
    assert correlation.abs().max() < 5 / 256
    assert torch.corrcoef(torch.stack([values[0], values[4]]))[0, 1].abs() < 5 / 256


def test_the_floor_of_n_times_a_number_stays_below_n() -> None:
    highest = torch.tensor(1 - 2**-24)
    numbers = torch.arange(1, 1 << 16)
    assert ((numbers * highest).floor() < numbers).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_are_the_same_on_cpu_and_gpu() -> None:
    index = torch.arange(1 << 16)
    assert torch.equal(uniform(3, index, 1, 2), uniform(3, index.cuda(), 1, 2).cpu())
