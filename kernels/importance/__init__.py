"""The gradient that chosen blocks hand to the scores that chose them."""
