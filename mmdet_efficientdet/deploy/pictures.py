"""Reads pictures and videos; resizes them as a detector's config does."""
from pathlib import Path
from typing import Iterator, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

# Of pixels alone: for others, such as EPS, Pillow starts programs.
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
Image.init()  # else Pillow does not know all of them
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
# Names of FFmpeg's readers by suffix. One is given, and the protocol of files,
# because others, such as that of playlists, open further files and addresses.
VIDEOS = dict(avi='avi', mkv='matroska', mov='mov', mp4='mp4', webm='webm')


def read_picture(path: str) -> np.ndarray:
    """Reads a file as RGB, ``(H, W, 3)`` uint8.

    It is turned as its EXIF data says. Transparency is ignored, and of 16 bits
    the upper 8 are kept, as OpenCV does.

    Raises:
        ValueError: If it cannot be read. The message has its path.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return to_rgb(picture)
    except Exception as error:  # Pillow's readers raise anything
        raise ValueError(
            f'{path} cannot be read as a picture: {error}') from error


def is_video(path: str) -> bool:
    """Whether a path is that of a video, by its suffix."""
    return _suffix(path) in VIDEOS


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()[1:]


def read_video(path: str) -> Iterator[np.ndarray]:
    """Reads a video frame by frame as RGB, ``(H, W, 3)`` uint8.

    Frames are turned as the file says.

    Raises:
        ValueError: If it cannot be read, or PyAV is not installed.
    """
    try:
        import av
        with av.open(f'file:{path}', format=VIDEOS[_suffix(path)]) as video:
            for frame in video.decode(video=0):
                turns = round(frame.rotation / 90)
                yield np.rot90(frame.to_ndarray(format='rgb24'), turns)
    except ImportError as error:
        raise ValueError(f'{path} is a video, which PyAV reads. Install it: '
                         'pip install av') from error
    except Exception as error:  # PyAV has dozens
        raise ValueError(
            f'{path} cannot be read as a video: {error}') from error


def to_rgb(picture: Union[np.ndarray, Image.Image]) -> np.ndarray:
    """RGB ``(H, W, 3)`` uint8 of a picture of Pillow or an array.

    Of 32-bit integers, values of more than 255 are read as 16 bits.

    Raises:
        ValueError: If an array is not uint8 ``(H, W)`` or ``(H, W, 3)``, or a
            picture has float values, whose range is unknown.
    """
    if isinstance(picture, Image.Image):
        deep = picture.format == 'PPM' or picture.mode != 'I'
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == 'F':
            raise ValueError('it has float values; convert it to 8 bits')
        if picture.mode.startswith('I'):
            wide = np.asarray(picture).astype(np.int64)
            if deep or wide.max(initial=0) > 255:
                wide >>= 8
            picture = Image.fromarray(wide.clip(0, 255).astype('uint8'))
        picture = np.array(picture.convert('RGB'))
    if not isinstance(picture, np.ndarray):
        raise ValueError(f'{type(picture).__name__} is no picture; give a '
                         'path, an array or a picture of Pillow')
    if picture.dtype == np.uint8 and picture.ndim == 2:
        picture = picture[..., None].repeat(3, 2)
    if (picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3
            or not picture.size):
        raise ValueError(f'an array of {picture.dtype} {picture.shape} is no '
                         'picture; give uint8 (height, width, 3), RGB, or '
                         '(height, width)')
    return picture


def resize(picture: np.ndarray, size: Sequence[int],
           device: torch.device) -> Tensor:
    """Bilinear, without antialiasing: ``(1, 3, h, w)`` float32."""
    # A copy, because arrays may be read-only or have negative strides.
    pixels = torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1)[None]
    if pixels.shape[2:] == tuple(size):
        return pixels.float()
    return F.interpolate(pixels.float(), tuple(size), mode='bilinear')


def enlarged_size(shape: Sequence[int], factor: float) -> Tuple[int, int]:
    """The size of MMDetection's ``Resize(scale_factor=factor)``."""
    target = [int(n * factor + 0.5) for n in shape]
    scale = min(max(target) / max(shape), min(target) / min(shape))
    height, width = (max(1, int(n * scale + 0.5)) for n in shape)
    return height, width


def scaled_size(shape: Tuple[int, int],
                image_size: Tuple[int, int],
                ratio: float = 1.0) -> Tuple[np.float32, Tuple[int, int]]:
    """Returns the official size of a resized image.

    float32 and truncation decide about the last pixel: a 612x612 image
    becomes 896x896, while float64 would give 895.

    Args:
        shape (tuple[int]): Height and width of the image.
        image_size (tuple[int]): Height and width to fit into.
        ratio (float): Factor on ``image_size``. Defaults to 1.0.

    Returns:
        tuple: The scale, and the new height and width, at least 1.
    """
    shape = np.float32(shape)
    target = (np.float32(ratio) * np.float32(image_size)).astype(np.int32)
    scale = np.min(target.astype(np.float32) / shape)
    return scale, tuple(max(1, int(n)) for n in shape * scale)
