"""Scores, reports and cross-validation."""
