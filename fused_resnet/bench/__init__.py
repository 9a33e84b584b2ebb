"""Measures: the schema of results, facts of the machine, timing, and the cases that are timed.

The programs that use it are in bench/. Figures leave it as JSON of one schema (`schema`), never otherwise.
"""
