import contextlib

import pytest

from ffssl.run_folder import checkpoint


@pytest.fixture
def interrupted_after(monkeypatch):
    """A block that is interrupted when it has saved the checkpoint of that epoch."""

    @contextlib.contextmanager
    def interrupted_after(epoch):
        save = checkpoint.save

        def save_and_stop(folder, state, name):
            save(folder, state, name)
            if state["epoch"] == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save", save_and_stop)
            yield

    return interrupted_after
