"""Predicted scaling of this project's problems: records of one machine, tables, plots and the published experiment."""
