"""The mathematics of Eigenpress: decompositions, allocation, evaluation, model formats."""
