"""The evaluation of a recogniser as one page that a haematologist and a quality manager can read and file."""

from smearline.evaluation_page.page import ErrorExample, render

__all__ = ["ErrorExample", "render"]
