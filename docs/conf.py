"""`make docs`: Sphinx reads fnet's docstrings as they stand; the functions below make up for what it does not know."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # experiments and docs.generate are not installed

import fnet  # noqa: E402
from docs.generate import benchmarks, explorer, gallery, mathematics, reference  # noqa: E402
from docs.generate.docstrings import as_rst  # noqa: E402

project = html_title = "fnet"
author = copyright = "The fnet authors"
version = release = fnet.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "generate"]
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", ".*"),  # the types in signatures, which pyright checks
    ("py:obj", r"(jax|jnp|numpy|np|optax|torch|sklearn|flax|orbax|grain)\b.*"),
]
suppress_warnings = ["ref.python"]  # of two classes of one name in signatures
smartquotes = False  # y' is a derivative
nb_execution_mode = "off"  # the tests run the cells
myst_enable_extensions = ["colon_fence", "html_image", "attrs_inline"]
myst_heading_anchors = 3
copybutton_prompt_text = ">>> "
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "DTypeLike", "PyTree")}
python_maximum_signature_line_length = 100

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "use_download_button": False,
    "navbar_persistent": [],  # the sidebar has the search
}


def skip(app, what, name, obj, skip, options):
    """The fields of a NamedTuple say nothing that its docstring does not."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def aliases_by_name(app, what, name, obj, options, signature, returns):
    """Within a union Sphinx shows what stands for an alias, not its name."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def as_written(app, what, name, obj, options, lines):
    """Docstrings are written for a terminal."""
    lines[:] = as_rst(lines)


def find(app, env, node, contnode):
    """A name alone means the one object of fnet that is called so."""
    domain, target = env.get_domain("py"), node.get("reftarget", "")
    last, rest = target.rpartition(".")[2], target.removeprefix("fnet.")
    found = [n for n in domain.objects if n.rpartition(".")[2] == last and ("." not in rest or n.endswith(f".{rest}"))]
    if not found and "." in rest:  # fnet.optimizers.adam stands in the reference as fnet.adam
        found = [n for n in domain.objects if n == f"fnet.{last}"]
    if not found:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", min(found, key=len), node, contnode)


def in_its_language(app, page, template, context, doctree):
    """Pages under es/ are in Spanish."""
    if page.startswith("es/"):
        context["language"] = "es"


def back_to_its_place(app, page, template, context, doctree):
    """Of a module whose names stand under several paths `viewcode` takes one path for the links back to all of them."""
    if not page.startswith("_modules/fnet"):
        return
    objects = app.env.get_domain("py").objects
    there = {(each.docname, name.rpartition(".")[2]): each for name, each in objects.items()}

    def mended(link):
        before, document, name = link.groups()
        own = objects.get(name)
        return before + (own if own and own.docname == document else there[document, name.rpartition(".")[2]]).node_id

    context["body"] = re.sub(r'(class="viewcode-back" href="[./]*([\w/]+)\.html#)([\w.]+)', mended, context["body"])


def setup(app):
    """What Sphinx calls: the pages that are generated are written, then the hooks connected."""
    reference.write(HERE / "reference")
    mathematics.write(HERE / "mathematics")
    benchmarks.write(HERE / "benchmarks")
    explorer.write(HERE / "_static" / "explorer")
    gallery.write(HERE / "gallery")
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", aliases_by_name)
    app.connect("autodoc-process-docstring", as_written)
    app.connect("missing-reference", find)
    app.connect("html-page-context", in_its_language)
    app.connect("html-page-context", back_to_its_place)
