"""Runs beside the paper: results, figures, tables, claims and the page of all."""
