"""mmengine's runner, in which options can be turned off by themselves."""
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import RUNNERS


@RUNNERS.register_module()
class LenientRunner(Runner):
    """Takes None for every hook, and ``num_workers=0`` alone.

    ``--cfg-options default_hooks.ema=None`` turns a hook off. mmengine takes
    None only for its own six hooks. Without workers, ``persistent_workers`` is
    ignored, which data loaders refuse.
    """

    def register_default_hooks(self, hooks: dict = None) -> None:
        """Registers the hooks; a hook that does nothing stands for None."""
        super().register_default_hooks({
            name: Hook() if hook is None else hook
            for name, hook in (hooks or {}).items()
        })

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs):
        """Builds a data loader as mmengine does."""
        if isinstance(dataloader, dict) and not dataloader.get('num_workers'):
            dataloader = dict(dataloader, persistent_workers=False)
        return Runner.build_dataloader(dataloader, *args, **kwargs)
