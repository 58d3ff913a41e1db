"""One training in a folder at a time, and what is resumed from it."""
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
from helpers.toy_training import toy_runner
from helpers.two_ranks import errors_of_ranks

from mmdet_efficientdet import SafeCheckpointHook
from mmdet_efficientdet.engine.work_dir import find_checkpoint, lock_folder


def hold(folder, pipe):
    """Trains in a folder, as far as others see, with a worker."""
    lock = lock_folder(folder)
    worker = os.fork()
    if worker:
        pipe.send(worker)
    time.sleep(60)
    lock.close()


@contextmanager
def other_training(folder):
    """A process that has the folder, and has written half a file."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context('fork').Process(
        target=hold, args=(str(folder), theirs))
    process.start()
    worker = ours.recv()
    (folder / 'epoch_1.pth.0a1b.tmp').write_text('half')
    try:
        yield process
    finally:
        process.kill()
        process.join()
        os.kill(worker, signal.SIGKILL)


def train(folder):
    toy_runner(folder, [0.5]).train()


def test_second_training_is_refused(tmp_path):
    """As long as the first one lives; its workers do not count."""
    with other_training(tmp_path) as first:
        with pytest.raises(BlockingIOError) as info:
            train(tmp_path)
        for part in (f'process {first.pid} on ', str(tmp_path), '--work-dir',
                     f'remove {tmp_path}/.lock'):
            assert part in str(info.value)
        assert (tmp_path / 'epoch_1.pth.0a1b.tmp').exists()
        first.kill()
        first.join()
        train(tmp_path)
        assert [p.name for p in tmp_path.glob('epoch*')] == ['epoch_1.pth']


@pytest.mark.distributed
def test_all_ranks_are_refused(tmp_path):
    """None of them waits for the first one."""
    (tmp_path / 'ranks').mkdir()
    with other_training(tmp_path):
        for error in errors_of_ranks(train, tmp_path / 'ranks', tmp_path):
            assert '--work-dir' in error


def test_lock_ends_with_the_training(tmp_path):
    """Although the process goes on, as that of a notebook does."""
    train(tmp_path)
    with other_training(tmp_path):
        pass


def test_shared_out_dir(tmp_path):
    """Two work directories of one name may have one folder of checkpoints."""
    (tmp_path / 'out' / 'name').mkdir(parents=True)
    runner = toy_runner(tmp_path / 'name', [0.5])
    hook, = (h for h in runner.hooks if isinstance(h, SafeCheckpointHook))
    hook.out_dir = str(tmp_path / 'out')
    with other_training(tmp_path / 'out' / 'name'):
        with pytest.raises(BlockingIOError, match='out/name/.lock'):
            runner.train()


def test_removed_lock(tmp_path):
    """The way out where a network drive keeps the lock of a dead machine."""
    with other_training(tmp_path):
        (tmp_path / '.lock').unlink()
        train(tmp_path)


def test_without_locks(tmp_path, log):
    """A warning, and half-written files may be those of another training."""
    (tmp_path / '.lock').mkdir()
    (tmp_path / 'epoch_1.pth.0a1b.tmp').touch()
    assert lock_folder(str(tmp_path)) is None
    assert f'{tmp_path} cannot be locked' in log[-1]
    assert (tmp_path / 'epoch_1.pth.0a1b.tmp').exists()


@pytest.mark.parametrize('pointer', [
    None, '', '{old}/epoch_2.pth', '{old}/epo', '\0\udcff', 'epoch_2.pth\n',
    '{old}', '/gone/epoch_7.pth'
])
@pytest.mark.parametrize('copied', [True, False])
def test_resume_from_a_moved_folder(pointer, copied, tmp_path):
    """Its own checkpoint, and not that of the place where it was."""
    old, new = tmp_path / 'old', tmp_path / 'new'
    toy_runner(old, [0.1, 0.9]).train()
    shutil.copytree(old, new)
    if not copied:
        shutil.rmtree(old)
    else:
        toy_runner(old, [0.1, 0.9]).train()
    if pointer is None:
        (new / 'last_checkpoint').unlink()
    else:
        text = pointer.format(old=old).encode(errors='surrogateescape')
        (new / 'last_checkpoint').write_bytes(text)
    runner = toy_runner(new, [0.8, 0.95])  # the validation is made again
    runner._train_loop['max_epochs'] = 3
    runner._resume = True
    runner.train()
    assert runner._load_from == str(new / 'epoch_2.pth')
    assert (runner.epoch, runner.iter) == (3, 9)
    # The best checkpoint so far has moved as well.
    assert sorted(path.name for path in new.glob('*.pth')) == [
        'best_mAP_epoch_3.pth', 'epoch_3.pth'
    ]


def test_newest_checkpoint(tmp_path, log):
    """By its number; where there is none, the error says what to write."""
    assert find_checkpoint(str(tmp_path), 'epoch_{}.pth') is None
    (tmp_path / 'last_checkpoint').write_text('/gone/epoch_3.pth')
    with pytest.raises(FileNotFoundError) as info:
        find_checkpoint(str(tmp_path), 'epoch_{}.pth')
    for part in ("last_checkpoint names '/gone/epoch_3.pth'", '--resume FILE'):
        assert part in str(info.value)
    for name in ('epoch_9.pth', 'epoch_10.pth', 'epoch_11.pth.0a1b.tmp',
                 'best_mAP_epoch_12.pth', 'iter_13.pth'):
        (tmp_path / name).touch()
    found = find_checkpoint(str(tmp_path), 'epoch_{}.pth')
    assert found == str(tmp_path / 'epoch_10.pth')
    assert log[-1].endswith(f'resuming from {found}')


def test_numbers_of_a_width(tmp_path):
    """Names such as epoch_003.pth."""
    for name in ('epoch_003.pth', 'epoch_012.pth'):
        (tmp_path / name).touch()
    found = find_checkpoint(str(tmp_path), 'epoch_{:03d}.pth')
    assert found == str(tmp_path / 'epoch_012.pth')


def test_file_of_out_dir(tmp_path):
    """An old checkpoint of the same name does not hide that of out_dir."""
    for folder in ('wd', 'out'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'epoch_3.pth').touch()
    named = str(tmp_path / 'out' / 'epoch_3.pth')
    (tmp_path / 'wd' / 'last_checkpoint').write_text(named)
    args = str(tmp_path / 'wd'), 'epoch_{}.pth'
    assert find_checkpoint(*args, elsewhere=True) == named
    assert find_checkpoint(*args) == str(tmp_path / 'wd' / 'epoch_3.pth')


def test_two_runners_of_one_process(tmp_path):
    """The second one does not free the folder when the first one is gone."""
    first = lock_folder(tmp_path)
    assert lock_folder(tmp_path) is first
    first.close()
    second = lock_folder(tmp_path)
    assert second is not first and not second.closed
    second.close()


def test_checkpoints_elsewhere(tmp_path):
    """Those of out_dir, and of a remote drive, stay where they are."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'epoch_2.pth').touch()
    (tmp_path / 'epoch_1.pth').touch()
    for named in (str(tmp_path / 'out' / 'epoch_2.pth'), 's3://b/epoch_2.pth'):
        (tmp_path / 'last_checkpoint').write_text(named)
        assert find_checkpoint(str(tmp_path), 'epoch_{}.pth') == named
