"""The built-in solver of multiple-choice knapsack problems, in NumPy."""
