"""Small images, as pixels, as JPEG files and as beton files."""

import io

import numpy as np
import PIL.Image

from ffssl.data.beton.read import MODE_JPEG, MODE_RAW
from ffssl.data.beton.write import BetonWriter


def smooth_image(height, width, seed):
    """A random image without sharp edges, of all hues: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.BICUBIC))


def jpeg_bytes(image):
    """image: uint8, (height, width, 3), or (height, width) for a greyscale file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_beton(path, images, labels=None, raw=False):
    with BetonWriter(path, len(images)) as writer:
        for i, image in enumerate(images):
            data, mode = (image.tobytes(), MODE_RAW) if raw else (jpeg_bytes(image), MODE_JPEG)
            writer.add(
                data, mode, image.shape[1], image.shape[0], 10 * i if labels is None else labels[i]
            )
    return path
