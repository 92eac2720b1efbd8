"""Images as pixels and as numbers, and where one becomes the other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metaloom.datasets import ClassSamples, Index, MixedSamples
from metaloom.datasets.affine import Affine
from metaloom.datasets.pixels import as_numbers, of_one_form
from metaloom.engine.precision import ComputeFormat, Precision

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3, 3), dtype=np.uint8)
NUMBERS = (PIXELS.astype(np.float64) / 255).astype(np.float32).transpose(0, 1, 4, 2, 3)


def test_pixels_become_the_float32_nearest_to_a_255th_with_channels_first() -> None:
    numbers = as_numbers(PIXELS)
    np.testing.assert_array_equal(numbers, NUMBERS, strict=True)
    assert numbers.flags.c_contiguous
    assert as_numbers(numbers) is numbers


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float64"])
def test_models_are_shown_the_same_numbers(compute: ComputeFormat) -> None:
    precision, cpu = Precision(compute), torch.device("cpu")
    shown = precision.on_device(torch.from_numpy(PIXELS), cpu)
    assert shown.dtype == precision.storage_dtype
    assert shown.is_contiguous()
    assert torch.equal(shown, torch.from_numpy(NUMBERS).to(precision.storage_dtype))
    assert torch.equal(shown, precision.on_device(torch.from_numpy(NUMBERS.copy()), cpu))
    tokens = torch.arange(4)
    assert torch.equal(precision.on_device(tokens, cpu), tokens)


def test_pixels_of_no_channels_are_not_distorted_as_if_they_had_some() -> None:
    with pytest.raises(ValueError, match=r"pixels are \[N, H, W, C\], not \[2, 4, 5\]"):
        Affine().distort(np.zeros((2, 4, 5), np.uint8), np.random.default_rng(0))


def test_arrays_side_by_side_have_one_form() -> None:
    same = [PIXELS[0], PIXELS[1]]
    assert of_one_form(same) is same
    pixels, numbers = of_one_form([PIXELS[0], NUMBERS[1]])
    np.testing.assert_array_equal(pixels, NUMBERS[0], strict=True)
    np.testing.assert_array_equal(numbers, NUMBERS[1], strict=True)


def test_samples_of_a_mixture_have_one_form(glyphs: Path) -> None:
    index = Index.load(str(glyphs))
    parts = [ClassSamples(index, "train", seed=0, affine=affine) for affine in (None, Affine())]
    mixed = MixedSamples(parts, [1.0, 1.0], seed=0, purpose="test").batch(0, 20).arrays["inputs"]
    assert (mixed.dtype.name, mixed.shape) == ("float32", (20, 1, 28, 28))
    assert all(0.5 < image.max() <= 1 for image in mixed)
