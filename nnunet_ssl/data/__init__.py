"""Unlabeled cases: find, preprocess, check and load them."""
