"""Rewrite rules: one rule, one file, one class, one folder of cases."""
