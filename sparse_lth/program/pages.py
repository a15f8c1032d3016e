"""Pages of one file that needs nothing else: Jinja templates, a style sheet, and pictures."""

import base64
import io
from functools import cache
from importlib import resources

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from matplotlib.image import imsave

from .findings import percent


def render(template: str, **data: object) -> str:
    """The page of a template, named by its path in the package, with the data that it shows."""
    return _environment().get_template(template).render(data)


@cache
def _environment() -> Environment:
    files = resources.files(__package__.partition(".")[0])
    environment = Environment(
        loader=FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment


def png(rgba: np.ndarray) -> str:
    """rgba: (height, width, 4) uint8 -> the picture, as the address that an <img> takes"""
    file = io.BytesIO()
    imsave(file, rgba, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
