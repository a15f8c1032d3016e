"""The program on top of the library: LeNets, data sets, flags and reports, for main.py."""
