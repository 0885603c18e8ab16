"""Gemma 2 and Gemma 3 text models whose MLPs are Mixtures of Experts. transformers has no such classes.

The other two files are copied beside the weights of a saved model, so they import nothing of moesmith.
"""
