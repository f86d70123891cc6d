"""Checks that the plugin leaves a model as good as it was."""
