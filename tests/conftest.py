import os
from pathlib import Path

import pytest
import torch

from sparse_lth.program.data import Dataset, Split


def _split(n, generator):
    """n images that are learnable: the label is the brightest of 10 columns."""
    labels = torch.randint(10, (n,), generator=generator)
    images = torch.randn(n, 1, 28, 28, generator=generator)
    images[torch.arange(n), 0, :, 2 * labels] += 1
    return Split(images, labels)


@pytest.fixture(scope="session")
def tiny():
    """A data set small enough to train on in a test."""
    generator = torch.Generator().manual_seed(0)
    return Dataset("digits", *(_split(n, generator) for n in (200, 50, 50)))


@pytest.fixture(scope="session")
def mnist_dir():
    """torchvision's root of a real MNIST, or a skip."""
    root = Path(os.environ.get("SPARSE_LTH_DATA", "data"))
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {root}: set SPARSE_LTH_DATA to torchvision's root")
    return root


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def _skipped_for_a_gpu(report):
    keywords = getattr(report, "keywords", ())  # a file that was skipped whole has none
    return report.skipped and "gpu" in keywords and not torch.cuda.is_available()


def pytest_report_teststatus(report):
    """Counts them as skipped, without a letter for each."""
    return ("skipped", "", "SKIPPED") if _skipped_for_a_gpu(report) else None


def pytest_terminal_summary(terminalreporter):
    skipped = sum(map(_skipped_for_a_gpu, terminalreporter.stats.get("skipped", [])))
    if skipped:
        terminalreporter.line(
            f"tests skipped because they need a GPU: {skipped}; where there is one, pytest -m gpu"
        )
