"""Built-in solver of multiple-choice knapsack problems (MCKP), in NumPy.

``knapsack`` splits a reduced problem into knapsacks. ``relaxation`` solves their linear relaxation by one sort, and
``fixing`` removes variables by reduced costs. ``open_choices`` has the lower bounds on partial choices, with
which ``beam`` closes the gap. ``solver`` is the adapter.
"""
