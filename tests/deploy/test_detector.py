"""The detector without MMDetection finds what MMDetection's finds."""
import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from helpers.tiny_data import CONFIGS
from mmcv.transforms import Resize
from mmdet.apis import DetInferencer
from PIL import Image
from torchvision.ops import box_iou

from mmdet_efficientdet import Detector, load_detector, plain_network
from mmdet_efficientdet.deploy import detector, pictures
from mmdet_efficientdet.deploy.releases import CONFIG
from mmdet_efficientdet.deploy.settings import DetectorSettings

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / 'zoo' / 'trees'
PHOTO = ROOT / 'resources' / 'forest.jpg'


@pytest.fixture(scope='module')
def host():
    """The released checkpoint in MMDetection."""
    checkpoint, = TREES.glob('*.pth')
    return DetInferencer(weights=str(checkpoint), device='cpu')


@pytest.fixture(scope='module')
def trees():
    return load_detector(TREES, 'cpu')


@pytest.fixture
def photo(tmp_path):
    """A photograph without loss, so that all readers agree."""
    path = tmp_path / 'photo.png'
    Image.open(PHOTO).crop((0, 0, 450, 300)).save(path)
    return path


def by_host(inferencer, path):
    """Boxes, scores and labels of MMDetection."""
    found = inferencer(str(path), return_datasamples=True)['predictions'][0]
    found = found.pred_instances
    return (x.numpy() for x in (found.bboxes, found.scores, found.labels))


def opencv(picture, size, device):
    """MMDetection's ``Resize``, in place of ours."""
    pixels = torch.from_numpy(cv2.resize(picture, size[::-1]))
    return pixels.permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(
    'resize, score, pixels', [(opencv, 1e-5, 0.002), (None, 0.01, 2)],
    ids=['resized by OpenCV', 'resized by PyTorch'])
def test_same_as_the_inferencer(resize, score, pixels, host, trees, photo,
                                monkeypatch):
    """With the same weights; OpenCV's uint8 pixels differ by at most 1."""
    if resize:
        monkeypatch.setattr(detector, 'resize', resize)
    network = plain_network(host.model)
    found = Detector(network, trees.settings, 'cpu')(photo, threshold=0)
    boxes, scores, labels = by_host(host, photo)
    assert len(scores) == len(found.scores) == 300
    np.testing.assert_allclose(found.scores, scores, atol=score)
    strong = scores > 0.2
    assert strong.sum() > 15
    iou = box_iou(torch.tensor(boxes[strong]), torch.tensor(found.boxes))
    order = iou.argmax(1).numpy()
    difference = abs(found.boxes[order] - boxes[strong])
    assert difference.max() < pixels and np.median(difference) < pixels / 20
    assert abs(found.scores[order] - scores[strong]).max() < score
    assert (found.labels == labels).all()
    assert found.names == ['Tree'] * 300
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.labels.dtype == np.int64


def test_resize_crop_and_classes(photo, monkeypatch):
    """A detector of 80 classes and ResizeCrop, whose every tensor shows."""
    config = CONFIGS / 'efficientdet_lite0_8xb16-300e_coco.py'
    torch.manual_seed(0)
    inferencer = DetInferencer(str(config), device='cpu')
    with torch.no_grad():
        for parameter in inferencer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        inferencer.model.bbox_head.conv_cls.pointwise.bias.fill_(-1)
    model = inferencer.cfg.model
    settings = DetectorSettings(
        image_size=[320, 320],
        mean=model.data_preprocessor.mean,
        std=model.data_preprocessor.std,
        classes=list(inferencer.model.dataset_meta['classes']),
        resize='pad',
        anchors=dict(
            octave_base_scale=3.0,
            aspect_pairs=model.bbox_head.anchor_generator.aspect_pairs),
        test_cfg=dict(model.test_cfg))
    # Many scores are nearly equal: the pixels must be those of OpenCV.
    monkeypatch.setattr(
        detector, 'resize', lambda picture, size, device: opencv(
            picture.astype(np.float32), size, device))
    ours = Detector(plain_network(inferencer.model), settings, 'cpu')
    found = ours(photo, threshold=0)
    boxes, scores, labels = by_host(inferencer, photo)
    assert len({*labels.tolist()}) > 3 and len(scores) == 100
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, boxes, atol=0.01)
    assert (found.labels == labels).all()
    assert found.names == [settings.classes[i] for i in found.labels]


def test_released_weights(host, trees, photo):
    """Rounded to float16 before or after folding: nearly the same boxes."""
    found = trees(photo)
    boxes, scores, _ = by_host(host, photo)
    iou = box_iou(torch.tensor(found.boxes), torch.tensor(boxes))
    assert len(found.boxes) > 5
    assert iou.amax(1).min() > 0.9
    best = scores[iou.argmax(1).numpy()]
    assert abs(found.scores - best).max() < 0.02
    assert found.scores.min() >= detector.THRESHOLD


@pytest.mark.slow
def test_without_mmdetection(photo, trees):
    """In a process that has neither MMDetection, MMCV, MMEngine nor OpenCV."""
    code = ('import sys\n'
            'for name in ("mmdet", "mmcv", "mmengine", "cv2", "torchvision",'
            ' "yaml"):\n'
            '    sys.modules[name] = None\n'
            'from mmdet_efficientdet import load_detector\n'
            f'found = load_detector({str(TREES)!r}, "cpu")({str(photo)!r})\n'
            'print(found.boxes.tolist())')
    run = subprocess.run([sys.executable, '-c', code],
                         cwd=ROOT,
                         capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    found = np.float32(json.loads(run.stdout))
    np.testing.assert_allclose(found, trees(photo).boxes, atol=1e-2)


def test_arguments(trees, photo, tmp_path):
    """File, array, grey array, picture of Pillow, list and folder."""
    expected = trees(photo)
    pixels = np.asarray(Image.open(photo))
    for picture in (str(photo), pixels, Image.open(photo)):
        assert (trees(picture).boxes == expected.boxes).all()
    assert expected.path == str(photo) and trees(pixels).path == ''
    flipped = trees(pixels[:, ::-1])  # negative strides
    assert len(flipped.boxes) > 5
    grey = pixels[..., 0]
    assert (trees(grey).scores == trees(np.stack([grey] * 3, 2)).scores).all()
    found = trees([photo, pixels])
    assert [len(x.boxes) for x in found] == [len(expected.boxes)] * 2
    assert [x.path for x in trees(tmp_path)] == [str(photo)]
    assert len(trees(photo, threshold=0.9).boxes) < len(expected.boxes)
    assert trees([]) == []


def test_boxes_are_inside(trees, photo):
    pixels = np.asarray(Image.open(photo))
    for part in (pixels[:50], pixels[:, :31], pixels[:1, :1]):
        boxes = trees(part, threshold=0).boxes
        height, width = part.shape[:2]
        assert len(boxes) and boxes.min() >= 0
        assert (boxes <= [width, height] * 2).all()


@pytest.mark.parametrize('array', [
    np.zeros((4, 4, 4), 'uint8'),
    np.zeros((4, 4, 3)),
    np.zeros((0, 4, 3), 'uint8'),
    np.zeros(3, 'uint8')
], ids=lambda x: f'{x.dtype}-{x.shape}')  # yapf: disable
def test_arrays_that_are_no_pictures(array, trees):
    with pytest.raises(ValueError, match='uint8') as error:
        trees(array)
    assert str(array.shape) in str(error.value)


def kinds(folder):
    """Pictures of all kinds, which OpenCV reads, too."""
    generator = np.random.default_rng(0)
    rgb = generator.integers(0, 256, (20, 30, 3), np.uint8)
    picture = Image.fromarray(rgb)
    wide = generator.integers(0, 65536, (20, 30), np.uint16)
    alpha = np.dstack([rgb, generator.integers(0, 256, (20, 30), np.uint8)])
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        'grey.png': (picture.convert('L'), {}),
        'wide.png': (Image.fromarray(wide), {}),
        'wide.tif': (Image.fromarray(wide), {}),
        'rgba.png': (Image.fromarray(alpha), {}),
        'palette.png': (picture.quantize(64), {}),
        'bits.png': (picture.convert('1'), {}),
        'exif.png': (picture, dict(exif=turned)),
        'photo.jpg': (picture, dict(exif=turned, quality=95)),
        'photo.webp': (picture, dict(lossless=True)),
        'photo.bmp': (picture, {}),
    }
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
        yield folder / name


def test_kinds_of_pictures(tmp_path):
    """The pixels are those of OpenCV, the host's reader."""
    for path in kinds(tmp_path):
        expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
        found = pictures.read_picture(path)
        assert found.dtype == np.uint8 and found.shape == expected.shape, path
        # Decoders of JPEG round in other ways.
        limit = 3 if path.suffix == '.jpg' else 0
        difference = abs(found.astype(int) - expected)
        assert difference.max() <= limit, path


@pytest.mark.parametrize('mode', ['I', 'I;16'])
def test_integers(mode):
    """Of 32 bits, values up to 255 are 8 bits; else the upper 8 of 16 stay."""
    values = np.array([[0, 99, 255]], np.int32 if mode == 'I' else np.uint16)
    narrow, wide = (
        pictures.to_rgb(Image.fromarray(x))[0, :, 0].tolist()
        for x in (values, values * 257))
    assert Image.fromarray(values).mode == mode
    assert narrow == ([0, 99, 255] if mode == 'I' else [0, 0, 0])
    assert wide == [0, 99, 255]


def test_dark_pgm(tmp_path):
    """Its 16 bits are read as such, like OpenCV's."""
    path = tmp_path / 'dark.pgm'
    path.write_bytes(b'P5 3 1 65535 ' + bytes([0, 0, 0, 99, 0, 255]))
    expected = cv2.imread(str(path))
    assert np.array_equal(pictures.read_picture(path), expected)


def test_cmyk(tmp_path):
    """Red stays red."""
    red = Image.new('RGB', (8, 8), (255, 0, 0)).convert('CMYK')
    red.save(tmp_path / 'red.jpg')
    pixel = pictures.read_picture(tmp_path / 'red.jpg')[4, 4]
    assert pixel[0] > 240 and pixel[1:].max() < 15


def broken(folder):
    """Files that are no pictures, and words of their errors."""
    whole = PHOTO.read_bytes()
    for name, data in (('empty.jpg', b''), ('text.png', b'no picture'),
                       ('half.jpg', whole[:len(whole) // 2])):
        (folder / name).write_bytes(data)
        yield folder / name
    Image.new('F', (4, 4)).save(folder / 'float.tif')
    yield folder / 'float.tif'
    yield folder / 'missing.jpg'


def test_no_program_is_started(tmp_path):
    """Pillow would give EPS to Ghostscript, whatever the file's name is."""
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (8, 8)).save(path, 'EPS')
    Image.open(path).close()
    with pytest.raises(ValueError, match='cannot identify'):
        pictures.read_picture(path)


def test_one_bad_file_of_many(trees, photo, tmp_path):
    """The others are done; the bad ones are listed in their places."""
    bad = list(broken(tmp_path))
    found = trees([photo, *bad, photo])
    assert [bool(x.error) for x in found] == [False, *[True] * len(bad), False]
    for path, result in zip(bad, found[1:]):
        assert result.path == str(path) and str(path) in result.error
        assert result.boxes.shape == (0, 4) and result.names == []
        with pytest.raises(ValueError, match=path.name):
            trees(path)


def test_huge(trees, photo, monkeypatch):
    """What would exhaust the memory is refused with its size."""
    monkeypatch.setattr(detector, 'MAX_PIXELS', 1 << 17)
    with pytest.raises(ValueError, match='450x300.*1024x768.*131,072'):
        trees(photo)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ValueError, match='photo.png.*135000 pixels'):
        trees(photo)


def test_empty_folder(trees, tmp_path):
    with pytest.raises(ValueError, match='has no pictures'):
        trees(tmp_path)


@pytest.mark.parametrize('shape', [(333, 500), (100, 60), (1, 5), (640, 97)])
def test_pixels_of_the_resize(shape):
    """OpenCV's, which the host uses, in float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for side in (512, 64):
        size = pictures.scaled_size(shape, (side, side))[1]
        expected = cv2.resize(pixels.astype(np.float32), size[::-1])
        found = pictures.resize(pixels, size, torch.device('cpu'))
        found = found[0].permute(1, 2, 0).numpy()
        assert abs(found - expected).max() < 0.01


@pytest.mark.parametrize('factor', [1.8, 0.37, 1.0])
def test_size_of_the_factor(factor):
    resize = Resize(scale_factor=factor, keep_ratio=True)
    for shape in ((489, 1035), (7, 400), (333, 333), (101, 57)):
        given = dict(img=np.zeros((*shape, 3), np.uint8), img_shape=shape)
        expected = resize(given)['img'].shape[:2]
        assert pictures.enlarged_size(shape, factor) == expected


@pytest.mark.parametrize('change', [
    dict(mean=[float('nan'), 0, 0]),
    dict(std=[0, 1, 1]),
    dict(image_size=[-512, 512]),
    dict(image_size=[1 << 20, 512]),
    dict(classes='Tree'),
    dict(resize='__import__("os")'),
    dict(classes=['a', 'b']),
    dict(anchors=dict(octave_base_scale='4')),
    dict(anchors=dict(strides=8)),
    dict(anchors=dict(scales_per_octave=4)),
    dict(test_cfg=dict(nms=dict(type='code'))),
    dict(test_cfg=dict(nms=[1])),
    dict(test_cfg=dict(max_per_img='all')),
    dict(test_cfg=dict(score_thr='all')),
    dict(test_cfg=dict(max_per_img=-1)),
    dict(test_cfg=dict(nms_pre=10**9)),
    dict(test_cfg=dict(nms=dict(sigma=-0.5))),
    dict(anchors=dict(octave_base_scale=1e308)),
], ids=str)  # yapf: disable
def test_wrong_settings(change, trees, tmp_path):
    """None reaches a picture."""
    settings = replace(trees.settings, **change)
    (tmp_path / CONFIG).write_text(json.dumps(asdict(settings)))
    with pytest.raises(ValueError):
        Detector(trees.network, DetectorSettings.load(tmp_path / CONFIG),
                 'cpu')


def test_deep_settings(tmp_path):
    deep = '[' * 10**5 + ']' * 10**5
    (tmp_path / CONFIG).write_text(f'{{"extra": {deep}}}')
    with pytest.raises(ValueError, match=CONFIG):
        DetectorSettings.load(tmp_path / CONFIG)


def test_no_picture(trees):
    """What is not a picture does not end a list."""
    broken = io.BytesIO()
    Image.new('RGB', (64, 64)).save(broken, 'png')
    broken = Image.open(io.BytesIO(broken.getvalue()[:60]))
    grey = np.zeros((64, 64), np.uint8)
    bad = [None, 3, b'', [grey], broken]
    *found, last = trees([*bad, grey])
    assert all(x.error for x in found) and not last.error


@pytest.fixture
def video(tmp_path):
    """A video without loss, turned by 90 degrees, and its three frames."""
    with Image.open(PHOTO) as photo:
        frames = [np.asarray(photo)[:256, x:x + 200] for x in (0, 100, 200)]
    path = tmp_path / 'clip.mkv'
    with av.open(str(path), 'w') as file:
        stream = file.add_stream('ffv1', rate=5)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = 'bgr0'
        stream.set_display_rotation(90)
        for frame in frames:
            frame = av.VideoFrame.from_ndarray(frame, format='rgb24')
            file.mux(stream.encode(frame.reformat(format='bgr0')))
        file.mux(stream.encode())
    return path, [np.rot90(frame) for frame in frames]


def test_video(video, trees):
    """The boxes of each frame; a list goes on behind a video that is none."""
    path, frames = video
    found = trees(path)
    assert [(x.path, x.frame) for x in found] == [(str(path), i)
                                                  for i in range(3)]
    for one, frame in zip(found, frames):
        expected = trees(frame)
        assert len(expected.scores) > 3
        np.testing.assert_array_equal(one.boxes, expected.boxes)
        np.testing.assert_array_equal(one.scores, expected.scores)
    bad = path.with_name('bad.mp4')
    bad.write_text(f'ffconcat version 1.0\nfile {path.name}\n')  # a list
    with pytest.raises(ValueError, match='bad.mp4'):
        trees(bad)
    first, *rest = trees.each([bad, str(path), frames[0]])
    assert 'bad.mp4' in first.error and not len(first.boxes)
    assert [x.frame for x in rest] == [0, 1, 2, None]


def test_videos_that_end_nothing(video, trees, monkeypatch):
    """Addresses are not opened; a folder and other files are done."""
    path, _ = video
    monkeypatch.chdir(path.parent)
    path.rename('10:00.mkv')
    data = path.with_name('10:00.mkv').read_bytes()
    path.with_name('cut.mkv').write_bytes(data[:50])
    names = [
        'cut.mkv', 'http://127.0.0.1:9/x.mp4', 'concat:10:00.mkv|10:00.mkv'
    ]
    *bad, first, _, last = trees.each([*names, '10:00.mkv'])
    assert [x.path for x in bad] == names
    assert 'refused' not in ''.join(x.error for x in bad)
    assert (first.error, last.frame) == ('', 2)
    found = trees(path.parent)
    assert [bool(x.error) for x in found] == [False] * 3 + [True]


def test_video_without_pyav(video, trees, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ValueError, match='pip install av'):
        trees(video[0])
