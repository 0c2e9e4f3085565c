"""Pages that are written at each build: the reference, mathematics, gallery and benchmarks, of what the sources say.

Each module has ``write(folder)``, which `docs/conf.py` calls with the folder of the site's pages.
"""
