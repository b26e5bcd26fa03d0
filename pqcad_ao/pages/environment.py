"""The templates of pages, and how they are filled in."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment() -> Environment:
    """Of the folder ``templates``: what is not there is an error, and text is escaped in HTML."""
    return Environment(
        loader=PackageLoader("pqcad_ao.pages"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
