"""Sphinx: ``make docs`` builds the site into build/docs, without a network."""

from importlib.metadata import version as installed

project = "hf_semalign"
author = "the hf_semalign authors"
release = version = installed("hf_semalign")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "hf_semalign"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__new__, __init__"}  # the class says what it takes
autodoc_typehints = "none"  # docstrings give shapes and units, which types do not
napoleon_numpy_docstring = False


def setup(app):
    """Let docstrings name classes and functions as the code does, without their modules."""
    app.connect("missing-reference", _by_last_name)


def _by_last_name(app, env, node, contnode):
    if node.get("refdomain") != "py":
        return None
    node["refspecific"] = True  # search all modules
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, contnode
    )
