"""Data-set distillation: a few synthetic pictures and their labels that stand for a whole training set."""
