"""These tests run Triton's kernels on a CPU: test_interpreted.py starts them with the variable
that Triton wants set before it is imported, and that no other test should meet."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    from sparse_lth.kernels import tiles

    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *scope):  # Triton 3.4 has no scope, which undoes patches
        """Triton 3.6 takes int() of an array with one element, which numpy 2.5 refuses."""
        _patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor

    @pytest.fixture(autouse=True)
    def sparse(monkeypatch):
        """Takes the sparse kernel even where a dense product would be the faster."""
        monkeypatch.setattr(tiles, "crossover", lambda *case: 1.0)
        tiles.launch.cache_clear()
