"""What several tests of models share."""
import pytest

_DETECTORS = {}


@pytest.fixture
def meta_detector(build_detector):
    """A function that returns the detector of a size, without memory.

    It has 90 classes. All tests get the same one, so they must not change it.
    """

    def get(name):
        if name not in _DETECTORS:
            _DETECTORS[name] = build_detector(name, device='meta')
        return _DETECTORS[name]

    return get
