import pytest
from support.sample_images import smooth_image, write_beton

SIZES = [(48, 64), (64, 48), (37, 91), (120, 80), (16, 16)]  # height, width


@pytest.fixture(scope="session")
def images():
    return [smooth_image(*SIZES[i % len(SIZES)], seed=i) for i in range(23)]


@pytest.fixture(scope="session")
def beton(images, tmp_path_factory):
    """23 JPEGs of five sizes; label 10 i at index i."""
    return write_beton(tmp_path_factory.mktemp("beton") / "images.beton", images)
