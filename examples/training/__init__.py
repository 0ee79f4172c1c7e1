"""The parts of examples/train_nsa.py."""
