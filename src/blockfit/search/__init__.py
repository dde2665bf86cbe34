"""The method: calibrate, judge, choose, solve; sweeps."""
