"""Where work runs. To add an engine, write `engines/x.py` with a `map` as in `interfaces.Engine`, and its name on the
command line.
"""
