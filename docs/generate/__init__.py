"""Pages that are written at each build: the reference, mathematics, gallery and benchmarks, of what the sources say.

Those with ``write(folder)`` are called by `docs/conf.py` with the folder that they write.
"""
