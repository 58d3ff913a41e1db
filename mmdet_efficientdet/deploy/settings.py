"""What a detector needs beside its plain network; a JSON file holds it."""
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, TypedDict

import msgspec
from msgspec import Meta

_Side = Annotated[int, Meta(ge=1, le=1 << 13)]
_Positive = Annotated[float, Meta(gt=0, le=1e6)]
_THREE = Meta(min_length=3, max_length=3)


class BoxSettings(TypedDict, total=False):
    """What a release may set in ``test_cfg``."""
    nms_pre: Annotated[int, Meta(ge=1, le=1 << 20)]
    max_per_img: Annotated[int, Meta(ge=1, le=1 << 14)]
    score_thr: float
    nms: Dict[str, Any]


@dataclass
class DetectorSettings:
    """The settings of the input and of the boxes.

    Args:
        image_size (list[int]): Height and width of the input.
        mean, std (list[float]): Of RGB values from 0 to 255.
        classes (list[str]): Names, in the order of the outputs.
        resize (str): 'pad' keeps the aspect ratio, puts the image into the
            upper left corner and fills the rest with ``mean``; 'stretch' does
            not keep it; 'factor' enlarges every picture by ``factor`` and pads
            it to multiples of ``image_size``.
        anchors (dict): Arguments of ``AnchorGenerator``.
        factor (float): Defaults to 1.
        test_cfg (BoxSettings): As of ``EfficientDetHead``. Defaults to its
            defaults.
        provenance: Where a release comes from, with its results; not checked.
    """
    image_size: Annotated[List[_Side], Meta(min_length=2, max_length=2)]
    mean: Annotated[List[float], _THREE]
    std: Annotated[List[_Positive], _THREE]
    classes: List[str]
    resize: Literal['pad', 'stretch', 'factor']
    anchors: Dict[str, Any]
    factor: _Positive = 1.0
    test_cfg: BoxSettings = field(default_factory=dict)
    provenance: Any = None

    def save(self, path: str) -> None:
        """Writes a JSON file."""
        text = msgspec.json.format(msgspec.json.encode(asdict(self)))
        Path(path).write_bytes(text + b'\n')

    @classmethod
    def load(cls, path: str) -> 'DetectorSettings':
        """Reads what :meth:`save` has written; what else is there is ignored.

        Raises:
            ValueError: If the file is something else.
        """
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, RecursionError, msgspec.MsgspecError) as error:
            raise ValueError(f'{path} does not hold the settings of a '
                             f'detector: {error}') from error
