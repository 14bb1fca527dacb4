"""How good the images of a generator are: networks, sums, protocols, and the evaluator that brings them together."""
