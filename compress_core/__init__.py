"""The mathematics of Eigenpress: decompositions, allocation, evaluation and the model formats they need."""
