"""Self-contained HTML pages: templates, and images as data URIs."""
import base64
import io
from pathlib import Path

import jinja2

WIDTH = 240  # of an image on a page, in pixels


def render(template, **values):
    """Return the page that a template of this folder gives for these values."""
    text = (Path(__file__).parent / template).read_text()
    return jinja2.Environment(autoescape=True).from_string(text).render(width=WIDTH, **values)


def data_uri(kind, save):
    """Return what save(file) writes as a data URI."""
    save(file := io.BytesIO())
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def embed_image(image, kind="png", width=WIDTH, **more):
    """Return a PIL image, `width` pixels wide, as a data URI."""
    small = image.resize((width, round(width * image.height / image.width)))
    return data_uri(kind, lambda file: small.save(file, kind, **more))
