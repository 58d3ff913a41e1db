"""The model card, the entry for a metafile and the curves of a release."""
import argparse
import json
from pathlib import Path

import yaml
from mmengine.config import Config
from report import draw_curves, read_scalars

from mmdet_efficientdet.utils import printable, write_file

CARD = '''# {name}

EfficientDet, trained with
[MMDetection](https://github.com/open-mmlab/mmdetection)
and `{package}`. {parameters:,} parameters in {precision}, with folded norms;
classes: {classes}.

```python
from mmdet_efficientdet import load_detector

detector = load_detector('path/to/{name}')  # or https://..., hf://OWNER/NAME
found = detector('photo.jpg')
print(found.boxes, found.scores, found.names)
```

This needs PyTorch, and neither MMDetection nor MMCV. Every file holds data;
loading executes nothing and checks `SHA256SUMS`.

## Results

On `{evaluated_on}`: images: {images}, boxes: {boxes}; by COCO's rules, with at
most 100 boxes for an image.

| | AP | AP50 | AP75 |
| --- | ---: | ---: | ---: |
| this release, loaded in a new process | {AP} | {AP50} | {AP75} |
| `{checkpoint}` in MMDetection | {AP_in_MMDetection} | | |
| the checkpoint of the training in MMDetection | {trained_checkpoint} | | |

{table}

{seconds:.3f} s for a picture, from file to boxes, measured once. Threads:
{threads}; processor: {processor}.

![Curves of the training](curves.png)

## Training

{training}

The whole config is in `training_config.json`, as data, and the numbers of
each step are in `training.jsonl`.

## Licences

{licences}

Data: {data_name}.

## Known limits

{limits}
'''


def write(folder: Path, source: dict, config: Config,
          args: argparse.Namespace) -> None:
    """Writes README.md, metafile.yml, training.jsonl and curves.png.

    Args:
        folder (Path): Of the release.
        source (dict): Provenance with results.
        config (Config): Of the training.
        args (Namespace): Of tools/release.py; with ``hub_dataset``, it also
            writes .eval_results/results.yaml, which Hugging Face reads.
    """
    results, data = source['results'], source['data']
    records = read_scalars(args.work_dir)
    lines = [json.dumps(x) + '\n' for x in records]
    write_file(folder / 'training.jsonl', ''.join(lines).encode())
    write_file(folder / 'curves.png', draw_curves(records))
    names = [name for name, *_ in results['classes']]
    limits = list(args.limits)
    if data['images'] < 100:
        limits.append(f'Images behind the AP: {data["images"]}.')
    limits = limits or ['None was stated.']
    text = CARD.format(
        name=source['name'],
        package=source['package'],
        parameters=source['parameters'],
        precision=source['precision'],
        classes=', '.join(map(plain, names)),
        table=table(results['classes']),
        training=listing({
            **source['training'], 'checkpoint':
            source['checkpoint_kind'],
            **source['environment']
        }),
        licences=listing(source['licences']),
        data_name=plain(data['name']),
        limits='\n'.join(f'- {plain(x)}' for x in limits),
        checkpoint=source['checkpoint'],
        **{key: data[key]
           for key in ('evaluated_on', 'boxes')},
        **source['released_on'],
        **{
            key: value
            for key, value in results.items() if key != 'classes'
        })
    write_file(folder / 'README.md', (header(source) + text).encode())
    entry = dict(
        Name=source['name'],
        **{'In Collection': 'EfficientDet'},
        Config=f'{source["config"]}.py',
        Metadata=dict(Parameters=source['parameters']),
        Results=[dict(
            Task='Object Detection',
            Dataset=data['name'],
            Metrics={'box AP': results['AP']})],
        Weights=source['checkpoint'])  # yapf: disable
    write_file(folder / 'metafile.yml', dump(dict(Models=[entry])).encode())
    if args.hub_dataset:
        folder = folder / '.eval_results'
        folder.mkdir()
        entry = dict(
            dataset=dict(zip(('id', 'task_id'), args.hub_dataset)),
            value=results['AP'],
            notes=f'box AP in points of 100 on {data["evaluated_on"]}')
        write_file(folder / 'results.yaml', dump([entry]).encode())


def header(source: dict) -> str:
    """The YAML in front of a card of Hugging Face."""
    data, results = source['data'], source['results']
    metrics = [
        dict(type=key.lower(), name=f'box {key}', value=results[key])
        for key in ('AP', 'AP50')
    ]
    licence = source['licences']['released weights']
    index = dict(
        name=source['name'],
        results=[dict(
            task=dict(type='object-detection'),
            dataset=dict(type='coco', name=data['name'],
                         split=Path(data['evaluated_on']).stem),
            metrics=metrics)])  # yapf: disable
    return '---\n' + dump(
        {
            'license': 'other' if licence == 'not stated' else licence.lower(),
            'library_name': 'mmdet_efficientdet',
            'pipeline_tag': 'object-detection',
            'tags': ['efficientdet', 'object-detection', 'mmdetection'],
            'model-index': [index]
        }) + '---\n\n'


def dump(data: dict) -> str:
    """YAML of plain data."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def plain(value) -> str:
    """A text that Markdown and HTML do not interpret."""
    text = printable(' '.join(str(value).split()))
    for char in '\\`*_[]<>|#':
        text = text.replace(char, f'\\{char}')
    return text


def table(classes: list) -> str:
    """AP of each class."""
    rows = ['| class | boxes | AP | AP50 |', '| --- | ---: | ---: | ---: |']
    for name, boxes, *points in classes:
        cells = [f'{x:.2f}' if x >= 0 else '' for x in points]
        rows.append(f'| {plain(name)} | {boxes} | {" | ".join(cells)} |')
    return '\n'.join(rows)


def listing(facts: dict) -> str:
    """One line for each fact that is known."""
    return '\n'.join(f'- {key.replace("_", " ")}: {plain(value)}'
                     for key, value in facts.items() if value is not None)
