"""What every room stands on, and nothing that a user calls first.

- `checks` of arguments and what messages show of them, `trees` of arrays, `numerics`: dtypes, means, keys by name
- `contexts`: what holds while something is traced; `extras` that are imported when they are needed
- `jax_insides`: all that is taken of jax beyond its stable interface; `interpret`, `programs` and `operations` read
  traced programs; `drawing` of parameters by programs that are compiled once for all that are alike
- `placement` of a state on several devices, `splitting` of activations by examples, `platforms` that are traced for
- `processes` of one run: how they begin, and what they agree on; `checksums` that no split changes
- `files` that are written whole, `forks` after which jax hangs

Imports `fnet.types` alone.
"""
