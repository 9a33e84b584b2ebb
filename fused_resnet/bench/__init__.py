"""Measuring: the schema of results, what is known of the machine, timing, and the cases that are timed.

The programs that use it are in bench/. Figures leave it as JSON of one schema (`schema`), never otherwise.
"""
