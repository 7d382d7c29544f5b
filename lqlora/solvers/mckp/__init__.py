"""Built-in solver of multiple-choice knapsack problems (MCKP), in NumPy.

``knapsack`` splits a reduced problem into knapsacks. ``relaxation`` solves their linear relaxation by one sort, and
``fixing`` removes variables by reduced costs. ``open_choices`` and ``beam`` close the gap. ``solver`` is the adapter.
"""
