"""What the experiments draw and print, so that a file of theirs holds its science.

- `parts`: what several draw and print alike: a mean with its range, rows of images, bars, cells of tables
- the others: the pictures and tables of the experiment of that name, where they are long

Imports fnet, never an experiment: what is shown is given as arguments.
"""
